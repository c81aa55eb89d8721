"""Settings: one dataclass a command, each field with its default, its help and the range of its values. Here: shared.

The defaults are the paper's (P, with its section) or ours (choice, with the reason). A class's docstring is the
command's line in --help. Nothing here imports torch: `--help` answers at once.
"""

from dataclasses import dataclass, field, fields
from functools import partial

LLAMA2 = "TheBloke/Llama-2-7B-Chat-GPTQ"  # the paper's base model (4.1), on the Hugging Face Hub
LORA = ("lora_r", "lora_alpha", "lora_targets")  # the settings of a new adapter


def opt(default, help, toy=None, least=None, above=None, most=None, choices=None, result=True):
    """A field with its help, its default for the toy data (None: the same), and the range of its values.

    result: whether it can change a result. The others may differ when an interrupted run is resumed.
    """
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, "toy": toy, "result": result, **limits})


free = partial(opt, result=False)  # a setting that changes no result, or that names a file whose contents are hashed


def changed(settings):
    """{name: value} of the settings that are not the defaults."""
    values = {f: getattr(settings, f.name) for f in fields(settings)}
    return {f.name: value for f, value in values.items() if value != f.default}


@dataclass(frozen=True)
class Common:
    """What every command needs."""

    config: str = free("", "TOML file of settings, or a stage's config.json; flags on the command line win")
    data: str = free(
        "toy", "toy, samsum, xsum, dialogsum, cnn_dailymail, a folder with train, validation and test files, or one "
        "file: .csv, .tsv, .jsonl, .json or .parquet",
    )  # fmt: skip
    model: str = free(
        "", "base model: a folder, or OWNER/NAME[@REVISION] of the Hub [<output-dir>/base if there is one, else "
        f"{LLAMA2}; quantize: <output-dir>/pretrain]",
    )  # fmt: skip
    template: str = free(
        "", "prompt: llama2, llama3, chatml, plain, model (its own chat template), or a text file with {source} in it "
        "[the model's template.txt, else chosen by its control tokens, else its own]",
    )  # fmt: skip
    output_dir: str = free("", "the run's folder; each stage writes a subfolder [runs/<data>]")
    input_column: str = free("", "input column of --data [found by name]")
    target_column: str = free("", "target column of --data [found by name]")
    negative_column: str = free("", "column of bad outputs, negatives of the reward model [rejected, if there is one]")
    delimiter: str = free("", "what separates the cells of a .csv file, \\t for a tab [found in its header]")
    max_input_tokens: int = opt(400, "drop longer inputs in training and eval; the template counts (P 4.2)", least=1)
    max_new_tokens: int = opt(100, "cap on output tokens, EOS counted (P 4.2)", least=1)
    seed: int = opt(1337, "seed of data order, negatives, adapters and sampling", least=0)
    device: str = opt("auto", "cpu, cuda, or auto: cuda if there is one")
    dtype: str = opt(
        "auto", "of the base's activations; auto: bfloat16 on a GPU, on a CPU if it is faster and the base large",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    overwrite: bool = free(False, "replace the stage's folder if it already exists")
    dry_run: bool = free(False, "print sizes and steps, of a training also the memory of one update; write nothing")
