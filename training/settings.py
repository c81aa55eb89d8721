"""Settings: one dataclass a command, each field with its default, its help and the range of its values.

The defaults are the paper's (P, with its section) or ours (choice, with the reason). A class's docstring is the
command's line in --help. Nothing here imports torch: `--help` answers at once.
"""

from dataclasses import asdict, dataclass, field, fields

LLAMA2 = "TheBloke/Llama-2-7B-Chat-GPTQ"  # the paper's base model (4.1), on the Hugging Face Hub


def opt(default, help, toy=None, least=None, above=None, most=None, choices=None, result=True):
    """A field with its help, its default for the toy data (None: the same), and the range of its values.

    result: whether it can change a result. The others may differ when an interrupted run is resumed.
    """
    metadata = {
        "help": help, "toy": toy, "least": least, "above": above, "most": most, "choices": choices, "result": result,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


LORA = ("lora_r", "lora_alpha", "lora_targets")  # the settings of a new adapter


def result_settings(settings):
    """{name: value} of the settings that can change a result. Paths are not among them: what they contain is hashed."""
    values = asdict(settings)
    return {f.name: values[f.name] for f in fields(settings) if f.metadata["result"]}


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
        "prompt: llama2, llama3, chatml, plain, or a text file with {source} in it "
        "[the model's template.txt, else chosen by its control tokens]",
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
        "multiply it; else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    overwrite: bool = opt(False, "replace the stage's folder if it already exists", result=False)
    dry_run: bool = opt(
        False, "print sizes, steps and memory without training; of the weights only the headers are read", result=False
    )


@dataclass(frozen=True)
class Schedule(Common):
    """What every training needs."""

    batch_size: int = opt(7, "rows a step (P 3.1)", least=1)
    learning_rate: float = opt(1e-5, "peak, cosine to 0 (P 3.1)", toy=3e-3, above=0)
    epochs: int = opt(1, "passes over the data (P 3.1)", least=1)
    max_steps: int = opt(0, "stop after this many steps instead of after --epochs; 0: no limit", least=0)
    train_examples: int = opt(0, "random subset of the training examples; 0: all, of xsum 15,000 (P 4.2)", least=0)
    max_grad_norm: float = opt(
        1.0, "clip the gradient norm of each adapter to this (choice: Hugging Face's default)", above=0
    )
    log_every: int = opt(
        10, "steps between updates of the progress bar (and, in ppo, of the KL to the base)", least=1, result=False
    )
    grad_checkpoint: bool = opt(
        False, "recompute activations in the backward pass: the same gradients, less memory", result=False
    )
    micro_batch_size: int = opt(
        0, "rows in one forward pass, to save memory; the update is the same; 0: all", least=0, result=False
    )
    resume: str = opt(
        "", "continue from the latest valid checkpoint (auto, or no value), or from a checkpoint's folder", result=False
    )
    save_every: int = opt(100, "steps between checkpoints", least=1, result=False)
    keep_checkpoints: int = opt(2, "recent checkpoints to keep", least=2, result=False)
    max_time: float = opt(
        0.0, "save and stop this many minutes after the start, as on SIGTERM; 0: never", least=0, result=False
    )
    report_to: str = opt("", "log to tensorboard, wandb, or both (tensorboard,wandb) [neither]", result=False)
    deterministic: bool = opt(False, "the same bits in every run on a GPU, slower; a CPU needs no flag")


@dataclass(frozen=True)
class Pretrain(Schedule):
    """a tiny Llama from scratch on --data, tokenizer included"""

    vocab_size: int = opt(1024, "pieces of the tokenizer, 256 of them bytes", least=300)
    hidden_size: int = opt(128, "width C", least=8)
    intermediate_size: int = opt(352, "width of the MLP, 8/3 C rounded to 32", least=8)
    num_hidden_layers: int = opt(4, "blocks", least=1)
    num_attention_heads: int = opt(4, "query heads", least=1)
    num_key_value_heads: int = opt(4, "key and value heads", least=1)
    batch_size: int = opt(16, "rows a step (choice: of 8, a step would cost two thirds as much)", least=1)
    learning_rate: float = opt(4e-3, "peak, cosine to 0 (choice)", above=0)
    warmup_steps: int = opt(20, "linear rise to the peak: fresh weights need it, adapters (B = 0) do not", least=0)
    chatter: bool = opt(
        True,
        "data other than the toy: learn a chat model's opening and the input's first words in "
        "place of the outputs, which the base must not have seen; off: learn the outputs",
    )


@dataclass(frozen=True)
class Quantize(Common):
    """any fp16 or fp32 Llama folder to 4 bits by GPTQ"""

    group_size: int = opt(128, "weights that share a scale; -1: a whole column", toy=32, least=-1)
    act_order: bool = opt(False, "quantize columns of large activation first: more exact, slower to unpack")
    scale_search: bool = opt(False, "choose each scale for the least rounding error, not to span the largest weight")
    true_sequential: bool = opt(
        False, "within a block, calibrate o_proj on the quantized q, k and v, and so on: more exact, slower"
    )
    damp: float = opt(0.01, "add this share of the mean of the Hessian's diagonal to it", above=0)
    calibration_examples: int = opt(128, "training examples that calibrate", least=1)


@dataclass(frozen=True)
class Training(Schedule):
    """What every adapter needs."""

    eval_every: int = opt(0, "steps between validations; 0: never (P)", least=0, result=False)
    eval_examples: int = opt(200, "validation examples, a random subset", least=2, result=False)
    push: str = opt(
        "",
        "OWNER/NAME: upload the result to the Hugging Face Hub, as a private model; of ppo the policy",
        result=False,
    )
    keep: str = opt(
        "last",
        "the adapter that is saved: of the last step (P), or of the best validation",
        choices=("last", "best"),
        result=False,
    )
    tune: str = opt(
        "lora",
        "what trains: a LoRA adapter (P 3.1), or all weights, of an unquantized base",
        choices=("lora", "full"),
    )
    lora_r: int = opt(32, "rank (P 3.1)", least=1)
    lora_alpha: float = opt(16.0, "the low-rank term is scaled by alpha / r (P 3.1)", above=0)
    lora_targets: str = opt(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "projections that carry adapters (choice: all seven)"
    )
    init: str = opt(
        "base",
        "where the adapter (ppo: the policy) starts (P 3.1: base): base, or an adapter folder; mle: this run's",
        result=False,
    )


@dataclass(frozen=True)
class Reward(Training):
    """the token-level reward model (paper, 3.2)"""

    batch_size: int = opt(14, "rows a step, positives and negatives mixed (P 3.1)", least=1)
    learning_rate: float = opt(1e-5, "peak, cosine to 0 (P 3.1)", toy=2e-3, above=0)
    lora_r: int = opt(16, "rank (P 3.1)", least=1)
    eval_examples: int = opt(200, "validation examples in the held-out report", least=2)
    share_prompts: bool = opt(
        True,
        "batches of rows with one prompt, computed once for all of them; off: rows shuffled singly, without "
        "--rows-per-prompt (docs/speed.md)",
    )
    rows_per_prompt: int = opt(
        0,
        "rows of one prompt in a batch, at most; 0: all, up to half a batch. They share a pass over it (choice; "
        "docs/speed.md)",
        least=0,
    )
    level: str = opt(
        "token",
        "score each token (P 3.2), or the sequence by its last token (beyond P)",
        choices=("token", "sequence"),
    )
    head: str = opt(
        "scalar",
        "what scores a token: a scalar head at its own state (P 3.2), or its likelihood under the adapter (beyond P)",
        choices=("scalar", "likelihood"),
    )
    hallucinations: str = opt(
        "off",
        "more negatives: the truth with one edit; labelled bad: its span, or the whole sequence (beyond P)",
        choices=("off", "span", "sequence"),
    )
    samples: str = opt(
        "", "more negatives: what these answer to the same inputs, among base, mle and policy (beyond P)"
    )
    rounds: int = opt(1, "rounds of freshly drawn negatives, each used once (beyond P)", least=1)


@dataclass(frozen=True)
class Mle(Training):
    """the maximum-likelihood control (paper, 3.4)"""

    eos_in_labels: bool = opt(True, "learn to stop; off reproduces an MLE control that never does (choice: on)")


@dataclass(frozen=True)
class Ppo(Training):
    """policy and value by PPO (paper, 3.3)"""

    eval_examples: int = opt(50, "validation examples, a random subset, answered greedily", least=2, result=False)
    gamma: float = opt(0.99999, "discount (P 3.3)", above=0, most=1)
    lam: float = opt(0.95, "GAE's lambda (P 3.3)", least=0, most=1)
    clip_range: float = opt(0.2, "epsilon of eq. 3; inert at one update a batch (choice: Schulman's)", above=0)
    ppo_epochs: int = opt(1, "updates a batch (P 3.3)", least=1)
    length_penalty: float = opt(2.5, "for each token beyond the reference length (P 3.2)", least=0)
    ground_truth_fraction: float = opt(0.5, "share of batches that show the ground truth (P 3.3)", least=0, most=1)
    reward: str = opt(
        "",
        "reward adapter folder; or rouge, or module:function, any function of (source, reference, "
        "prediction) (beyond P) [<output-dir>/reward]",
        result=False,
    )
    kl_coef: float = opt(0.0, "cost of each nat from the base policy (P 3.3: none)", least=0)
    entropy_coef: float = opt(0.0, "bonus for entropy (P 3.3: none)", least=0)
    whiten: bool = opt(False, "advantages to mean 0, variance 1 a batch (choice: off, the paper names none)")
    value_warmup_steps: int = opt(
        0,
        "first steps in which the value learns and the policy stays as it is (choice: none, the paper names none)",
        least=0,
    )
    value_clip: float = opt(0.0, "clip the value's change to this; 0: do not (choice: off)", least=0)
    reward_clamp: float = opt(0.0, "clamp the reward model's score to +- this; 0: do not (choice: off)", least=0)


@dataclass(frozen=True)
class Group(Training):
    """a policy without a critic: K samples of an input judge each other, or the truth or a reward model judges them"""

    batch_size: int = opt(4, "inputs a step", least=1)
    eval_examples: int = opt(50, "validation examples, a random subset, answered greedily", least=2, result=False)
    samples_per_input: int = opt(8, "K", least=2)
    more_inputs: int = opt(0, "training examples beside --train-examples whose outputs are not looked at", least=0)
    labelled: bool = opt(True, "learn from the labelled inputs, too")
    reward: str = opt("rouge", "of labelled inputs: rouge (to the truth), agreement, or a reward adapter's folder")
    reward_more: str = opt("agreement", "of the other inputs: agreement, or mean likelihood under the same folder")
    advantage: str = opt("rloo", "rloo, best (the best sample alone, likelihood)", choices=("rloo", "best"))
    truth: float = opt(0.0, "weight of the truth's likelihood, of labelled inputs", least=0)
    temperature: float = opt(1.0, "of sampling, and of the policy that learns", above=0)
    clip_range: float = opt(0.2, "epsilon of eq. 3", above=0)
    init: str = opt("mle", "as of ppo", result=False)
    length_bonus: float = opt(0.0, "cost of a token of shortfall or excess, for judges", least=0)


@dataclass(frozen=True)
class Eval(Common):
    """predictions and scores of base, mle and policy"""

    adapters: str = opt("base,mle,policy", "what to evaluate, among base, mle and policy")
    batch_size: int = opt(32, "rows a sampling batch", least=1)
    test_examples: int = opt(0, "random subset of the test examples; 0: all, of xsum 3,000 (P 4.2)", least=0)
    rouge_tokenizer: str = opt(
        "auto",
        "words that ROUGE and lengths count: ascii (the paper's), unicode, or auto: by the letters of the references",
        choices=("auto", "ascii", "unicode"),
    )
    bleurt: str = opt("lucadiliello/BLEURT-20", "BLEURT checkpoint, a folder or an id to download, or none", toy="none")


@dataclass(frozen=True)
class Tables(Common):
    """the paper's Tables 1 and 2, ours beside the paper's"""

    beside: str = opt(
        "auto",
        "numbers of the paper to show beside ours; auto: those of the same data (for the toy SAMSum's), else none",
        choices=("auto", "none", "samsum", "xsum"),
    )


@dataclass(frozen=True)
class Report(Tables):
    """one HTML page: curves, tables, lengths, outputs token by token"""

    examples: int = opt(6, "random test inputs to show token by token; 0: none, and no model is loaded", least=0)


@dataclass(frozen=True)
class Sample(Common):
    """the output for a text, given as an argument or on standard input; on a terminal, for one after the other"""

    adapter: str = opt("policy", "adapter that answers: base, mle, policy, or a folder; sample: or several (base,mle)")
    temperature: float = opt(0.0, "0: greedy", least=0)
    top_k: int = opt(0, "keep the k most likely tokens; 0: all", least=0)
    top_p: float = opt(1.0, "keep the most likely tokens that reach this mass", above=0, most=1)


@dataclass(frozen=True)
class Predict(Sample):
    """outputs for a file of inputs, a line each, continued where it was stopped"""

    input: str = opt("", "file of inputs, in any format that --data reads; a target column is not needed", result=False)
    output: str = opt("", "file of outputs, .jsonl [<output-dir>/predict/<input>.jsonl]", result=False)
    batch_size: int = opt(16, "rows a sampling batch", least=1)


@dataclass(frozen=True)
class Judge(Common):
    """whether a reward model's best of N outputs beats greedy answers: before hours of PPO, whether they can pay"""

    reward: str = opt("", "as of ppo [<output-dir>/reward]")
    adapter: str = opt("mle", "adapter that answers: base, mle, policy, or a folder")
    best_of: int = opt(8, "samples of each input", least=2)
    temperature: float = opt(1.0, "of the samples", above=0)
    split: str = opt("validation", "examples to answer", choices=("train", "validation", "test"))
    eval_examples: int = opt(200, "random subset of them", least=2)
    length_penalty: float = opt(2.5, "as of ppo", least=0)


@dataclass(frozen=True)
class Merge(Common):
    """base and adapter as one dense model folder"""

    dtype: str = opt("float16", "dtype of the merged weights", choices=("float16", "bfloat16", "float32"))
    adapter: str = opt("policy", "adapter to merge into the base: mle, policy, or a folder")
    push: str = opt("", "OWNER/NAME: upload the result to the Hugging Face Hub, as a private model", result=False)


COMMANDS = {
    "pretrain": Pretrain,
    "quantize": Quantize,
    "reward": Reward,
    "mle": Mle,
    "ppo": Ppo,
    "judge": Judge,
    "group": Group,
    "eval": Eval,
    "tables": Tables,
    "report": Report,
    "merge": Merge,
    "sample": Sample,
    "predict": Predict,
}
