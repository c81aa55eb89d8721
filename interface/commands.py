"""The table of commands with their settings; here are those of the commands that judge or use what was trained."""

from dataclasses import dataclass

from interface.settings import Common, free, opt
from interface.training_settings import Mle, Ppo, Pretrain, Quantize, Reward


@dataclass(frozen=True)
class Eval(Common):
    """predictions and scores of base, mle and policy"""

    adapters: str = opt("base,mle,policy", "what to evaluate, among base, mle and policy")
    batch_size: int = opt(32, "rows a sampling batch", least=1)
    test_examples: int = opt(0, "random subset of the test examples; 0: all, of xsum 3,000 (P 4.2)", least=0)
    rouge_tokenizer: str = opt(
        "auto", "words that ROUGE and lengths count: ascii is the paper's; auto: by the letters of the references",
        choices=("auto", "ascii", "unicode"),
    )  # fmt: skip
    bleurt: str = opt("lucadiliello/BLEURT-20", "BLEURT checkpoint, a folder or an id to download, or none", toy="none")


@dataclass(frozen=True)
class Tables(Common):
    """the paper's Tables 1 and 2, ours beside the paper's"""

    beside: str = opt(
        "auto", "numbers of the paper to show beside ours; auto: of the same data (toy: SAMSum's), or none",
        choices=("auto", "none", "samsum", "xsum"),
    )  # fmt: skip


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
    """outputs for a file of inputs, a line each, continued after a stop"""

    input: str = free("", "file of inputs, in any format that --data reads; a target column is not needed")
    output: str = free("", "file of outputs, .jsonl [<output-dir>/predict/<input>.jsonl]")
    batch_size: int = opt(16, "rows a sampling batch", least=1)


@dataclass(frozen=True)
class Judge(Common):
    """whether a reward model's best of N outputs beats greedy answers: before hours of PPO, whether they can pay"""

    reward: str = opt("", "as of ppo [<output-dir>/reward]")
    adapter: str = opt("mle", "adapter that answers: base, mle, policy, or a folder")
    best_of: int = opt(8, "samples of each input", least=2)
    split: str = opt("validation", "examples to answer", choices=("train", "validation", "test"))
    eval_examples: int = opt(200, "random subset of them", least=2)


@dataclass(frozen=True)
class Merge(Common):
    """base and adapter as one dense model folder"""

    dtype: str = opt("float16", "dtype of the merged weights", choices=("float16", "bfloat16", "float32"))
    adapter: str = opt("policy", "adapter to merge into the base: mle, policy, or a folder")
    push: str = free("", "OWNER/NAME: upload the result to the Hugging Face Hub, as a private model")


COMMANDS = {
    "pretrain": Pretrain,
    "quantize": Quantize,
    "reward": Reward,
    "mle": Mle,
    "ppo": Ppo,
    "judge": Judge,
    "eval": Eval,
    "tables": Tables,
    "report": Report,
    "merge": Merge,
    "sample": Sample,
    "predict": Predict,
}
