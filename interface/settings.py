"""Settings: one dataclass a command, each field with its default, its help and the range of its values. Here: shared.

The defaults are the paper's (P, with its section) or ours (choice, with the reason). A class's docstring is the
command's line in --help. Nothing here imports torch: `--help` answers at once.
"""

from dataclasses import dataclass, field, fields

LLAMA2 = "TheBloke/Llama-2-7B-Chat-GPTQ"  # the paper's base model (4.1), on the Hugging Face Hub


def opt(default, help, toy=None, least=None, above=None, most=None, choices=None, result=True):
    """A field with its help, its default for the toy data (None: the same), and the range of its values.

    result: whether it can change a result. The others may differ when an interrupted run is resumed.
    """
    metadata = {
        "help": help, "toy": toy, "least": least, "above": above, "most": most, "choices": choices, "result": result,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def flag(name):
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def changed(settings):
    """{name: value} of the settings that are not the defaults."""
    values = {f: getattr(settings, f.name) for f in fields(settings)}
    return {f.name: value for f, value in values.items() if value != f.default}


LORA = ("lora_r", "lora_alpha", "lora_targets")  # the settings of a new adapter


@dataclass(frozen=True)
class Common:
    """What every command needs."""

    config: str = opt(
        "", "TOML file of settings, or a stage's config.json; flags on the command line win", result=False
    )
    data: str = opt(
        "toy",
        "toy, samsum, xsum, dialogsum, cnn_dailymail, a folder with train, validation and test "
        "files, or one file: .csv, .tsv, .jsonl, .json or .parquet",
        result=False,
    )
    model: str = opt(
        "",
        f"base model: a folder, or OWNER/NAME[@REVISION] of the Hub [<output-dir>/base if there is one, else {LLAMA2}; "
        "quantize: <output-dir>/pretrain]",
        result=False,
    )
    template: str = opt(
        "",
        "prompt: llama2, llama3, chatml, plain, model (its own chat template), or a text file with {source} in it "
        "[the model's template.txt, else chosen by its control tokens, else its own]",
        result=False,
    )
    output_dir: str = opt("", "the run's folder; each stage writes a subfolder [runs/<data>]", result=False)
    input_column: str = opt("", "input column of --data [found by name]", result=False)
    target_column: str = opt("", "target column of --data [found by name]", result=False)
    negative_column: str = opt(
        "", "column of bad outputs, negatives of the reward model [rejected, where there is one]", result=False
    )
    delimiter: str = opt(
        "", "what separates the cells of a .csv file, \\t for a tab [found in its header]", result=False
    )
    max_input_tokens: int = opt(
        400, "in training and eval: drop longer inputs; BOS and template count (P 4.2)", least=1
    )
    max_new_tokens: int = opt(100, "cap on output tokens, EOS counted (P 4.2)", least=1)
    seed: int = opt(1337, "seed of data order, negatives, adapters and sampling", least=0)
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = opt(
        "auto",
        "dtype of the base's activations; auto: bfloat16 on a GPU and, over bases of more than 64 MB, on CPUs that "
        "multiply it faster; else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    overwrite: bool = opt(False, "replace the stage's folder if it already exists", result=False)
    dry_run: bool = opt(
        False, "print sizes and steps; of a training also the memory of one update, which is not kept", result=False
    )
