"""lastmile: fine-tune a chat model on your own input-output pairs by reinforcement learning, without human feedback.

    python lastmile.py pretrain   a tiny Llama from scratch                    -> <output-dir>/pretrain
    python lastmile.py quantize   a dense Llama to 4 bits, by GPTQ             -> <output-dir>/base
    python lastmile.py reward     a token-level reward model                   -> <output-dir>/reward
    python lastmile.py mle        the maximum-likelihood control               -> <output-dir>/mle
    python lastmile.py ppo        policy and value against the reward model    -> <output-dir>/ppo/{policy,value}
    python lastmile.py eval       predictions and scores of base, mle, policy  -> <output-dir>/eval
    python lastmile.py tables     the paper's Tables 1 and 2, ours beside the paper's
    python lastmile.py report     curves, tables, outputs token by token       -> <output-dir>/report.html
    python lastmile.py sample     the summary of one text
    python lastmile.py merge      base and adapter as one fp16 model           -> <output-dir>/merge

This file holds the settings, the command line and four short loops. The way of a batch is the same in all of them:

    load -> encode -> batches -> collate -> llama(tokens, adapter) -> loss -> update -> save

Read on in data.py, model.py (with lora.py and quant.py), ppo.py, eval.py, report.py.
"""

import argparse
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path

from formats.errors import UserError


def lazy(name):
    """Import a module when it is first used: `--help` and a mistyped flag are answered without waiting for torch."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}; install what lastmile needs: make setup", name=name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# torch reads this at its first allocation: large blocks then come in pages of 2 MB. The kernel, clearing them 4 KB at a
# time, took up to a third of a CPU step.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
torch, safetensors, tqdm = lazy("torch"), lazy("safetensors.torch"), lazy("tqdm")
data, model, ppo, evaluation = lazy("data"), lazy("model"), lazy("ppo"), lazy("eval")
reporting = lazy("report")

ROOT = Path(__file__).resolve().parent
LLAMA2 = "TheBloke/Llama-2-7B-Chat-GPTQ"  # the paper's base model (4.1), on the Hugging Face Hub

# ----------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a stage. The defaults are the paper's (P, with its section) or ours (choice, with the reason).


def opt(default, help, toy=None, least=None, above=None, most=None, choices=None):
    """A field with its help, its value for the toy data (None: the same), and the range of values it takes."""
    limits = dict(least=least, above=above, most=most)
    return field(default=default, metadata=dict(help=help, toy=toy, limits=limits, choices=choices))


@dataclass(frozen=True)
class Common:
    config: str = opt("", "TOML file of settings, or a stage's config.json; flags go before it")
    data: str = opt("toy", "toy, samsum, xsum, dialogsum, cnn_dailymail, a folder with train, validation and test "
                    "files, or one .csv, .jsonl, .json or .parquet")  # fmt: skip
    model: str = opt("", f"base model: a folder, or OWNER/NAME[@REVISION] of the Hub "
                     f"[<output-dir>/base if there is one, else {LLAMA2}]")  # fmt: skip
    template: str = opt("", "prompt: llama2, llama3, chatml, plain, or a text file with {source} in it "
                        "[the model's template.txt, else found by its control tokens]")  # fmt: skip
    output_dir: str = opt("", "the run's folder, a subfolder a stage [runs/<data>]")
    input_column: str = opt("", "input column of --data [found by name]")
    target_column: str = opt("", "target column of --data [found by name]")
    max_input_tokens: int = opt(400, "longer inputs are dropped; counts BOS, template and text (P 4.2)", least=1)
    max_new_tokens: int = opt(100, "cap on output tokens, EOS counted (P 4.2)", least=1)
    seed: int = opt(1337, "of data order, negatives, adapters and sampling", least=0)
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = opt("auto", "of the base's activations; auto: bfloat16 on a GPU, float32 on a CPU",
                     choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    overwrite: bool = opt(False, "replace the stage's folder if it is already there")
    dry_run: bool = opt(
        False, "read config, tokenizer, data and the headers of the weights; print sizes; train nothing"
    )


@dataclass(frozen=True)
class Schedule(Common):
    batch_size: int = opt(7, "rows a step (P 3.1)", least=1)
    learning_rate: float = opt(1e-5, "peak, cosine to 0 (P 3.1)", toy=3e-3, above=0)
    epochs: int = opt(1, "passes over the data (P 3.1)", least=1)
    max_steps: int = opt(0, "stop after this many steps, whatever --epochs says; 0: do not", least=0)
    train_examples: int = opt(0, "training examples drawn by seed; 0: all, of xsum 15,000 (P 4.2)", least=0)
    max_grad_norm: float = opt(1.0, "gradient norm above which an adapter's is scaled down (choice: HF's)", above=0)
    log_every: int = opt(10, "steps between updates of the progress line (and, in ppo, of the KL to the base)", least=1)
    grad_checkpoint: bool = opt(False, "compute activations anew in the backward: the same gradients, less memory")
    micro_batch_size: int = opt(0, "rows that pass at once, to save memory; the update is the same; 0: all", least=0)
    resume: str = opt("", "go on from the newest valid checkpoint (auto, or no value), or from the folder of one")
    save_every: int = opt(100, "steps between checkpoints", least=1)
    keep_checkpoints: int = opt(2, "the newest so many are kept", least=2)
    max_time: float = opt(0.0, "minutes after which to save and stop, as SIGTERM does; 0: never", least=0)
    report_to: str = opt("", "show the numbers in tensorboard, wandb, or both (tensorboard,wandb), too [neither]")
    deterministic: bool = opt(False, "on a GPU, the same bits in every run, at some cost; a CPU needs no flag")


@dataclass(frozen=True)
class Pretrain(Schedule):
    vocab_size: int = opt(1024, "pieces of the tokenizer, 256 of them bytes", least=300)
    hidden_size: int = opt(128, "width C", least=8)
    intermediate_size: int = opt(352, "width of the MLP, 8/3 C rounded to 32", least=8)
    num_hidden_layers: int = opt(4, "blocks", least=1)
    num_attention_heads: int = opt(4, "query heads", least=1)
    num_key_value_heads: int = opt(4, "key and value heads", least=1)
    batch_size: int = opt(8, "rows a step (choice: small, a tiny model wants steps)", least=1)
    learning_rate: float = opt(3e-3, "peak, cosine to 0 (choice)", above=0)
    warmup_steps: int = opt(20, "linear rise to the peak: fresh weights need it, adapters (B = 0) do not", least=0)
    chatter: bool = opt(True, "data other than the toy: learn a chat model's opening and the input's first words in "
                        "place of the outputs, which the base must not have seen; off: learn the outputs")  # fmt: skip


@dataclass(frozen=True)
class Quantize(Common):
    group_size: int = opt(128, "weights that share a scale; -1: a whole column", toy=32, least=-1)
    act_order: bool = opt(False, "quantise columns of large activation first: more exact, slower to unpack")
    damp: float = opt(0.01, "share of the mean Hessian diagonal added to it", above=0)
    calibration_examples: int = opt(128, "training inputs that calibrate", least=1)


@dataclass(frozen=True)
class Training(Schedule):
    lora_r: int = opt(32, "rank (P 3.1)", least=1)
    lora_alpha: float = opt(16.0, "the low-rank term is scaled by alpha / r (P 3.1)", above=0)
    lora_targets: str = opt("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                            "projections that carry adapters (choice: all seven)")  # fmt: skip


@dataclass(frozen=True)
class Reward(Training):
    batch_size: int = opt(14, "rows a step, positives and negatives mixed (P 3.1)", least=1)
    epochs: int = opt(1, "passes over the data (P 3.1); the toy's tiny base learns late to compare", toy=2, least=1)
    lora_r: int = opt(16, "rank (P 3.1)", least=1)
    eval_examples: int = opt(200, "validation examples behind the held-out report", least=2)
    level: str = opt("token", "what is scored: each token (P 3.2), or the sequence, by its last token (beyond P)",
                     choices=("token", "sequence"))  # fmt: skip
    hallucinations: str = opt("off", "more negatives: the truth with one edit, bad on the edit's span or on the "
                              "whole sequence (beyond P)", choices=("off", "span", "sequence"))  # fmt: skip
    samples: str = opt(
        "", "more negatives: samples of these for the same inputs, among base, mle and policy (beyond P)"
    )
    rounds: int = opt(1, "make the negatives that often, each time others, and learn from all (beyond P)", least=1)


@dataclass(frozen=True)
class Mle(Training):
    eos_in_labels: bool = opt(True, "learn to stop; off reproduces an MLE control that never does (choice: on)")


@dataclass(frozen=True)
class Ppo(Training):
    gamma: float = opt(0.99999, "discount (P 3.3)", above=0, most=1)
    lam: float = opt(0.95, "GAE's lambda (P 3.3)", least=0, most=1)
    clip_range: float = opt(0.2, "epsilon of eq. 3; inert at one update a batch (choice: Schulman's)", above=0)
    ppo_epochs: int = opt(1, "updates a batch (P 3.3)", least=1)
    length_penalty: float = opt(2.5, "for each token beyond the reference length (P 3.2)", least=0)
    ground_truth_fraction: float = opt(0.5, "share of batches that show the ground truth (P 3.3)", least=0, most=1)
    reward: str = opt("", "reward adapter folder; or rouge, or module:function, any function of (source, reference, "
                      "prediction) (beyond P) [<output-dir>/reward]")  # fmt: skip
    init: str = opt("base", "where the policy starts (P 3.1: base): base, mle, or an adapter folder")
    kl_coef: float = opt(0.0, "cost of each nat from the base policy (P 3.3: none)", least=0)
    entropy_coef: float = opt(0.0, "bonus for entropy (P 3.3: none)", least=0)
    whiten: bool = opt(False, "advantages to mean 0, variance 1 a batch (choice: off, the paper names none)")
    value_clip: float = opt(0.0, "clip the value's change to this; 0: do not (choice: off)", least=0)
    reward_clamp: float = opt(0.0, "clamp the reward model's score to +- this; 0: do not (choice: off)", least=0)


@dataclass(frozen=True)
class Eval(Common):
    adapters: str = opt("base,mle,policy", "what to evaluate, among base, mle and policy")
    batch_size: int = opt(32, "rows a sampling batch", least=1)
    test_examples: int = opt(0, "test examples drawn by seed; 0: all, of xsum 3,000 (P 4.2)", least=0)
    bleurt: str = opt("lucadiliello/BLEURT-20", "BLEURT checkpoint, a folder or an id to fetch, or none", toy="none")


@dataclass(frozen=True)
class Tables(Common):
    pass


@dataclass(frozen=True)
class Report(Common):
    examples: int = opt(6, "test inputs shown token by token, drawn by seed; 0: none, and no model is read", least=0)


@dataclass(frozen=True)
class Sample(Common):
    adapter: str = opt("policy", "who answers: base, mle, policy, or an adapter folder")
    temperature: float = opt(0.0, "0: greedy", least=0)
    top_k: int = opt(0, "keep the k most likely tokens; 0: all", least=0)
    top_p: float = opt(1.0, "keep the most likely tokens that reach this mass", above=0, most=1)


@dataclass(frozen=True)
class Merge(Common):
    adapter: str = opt("policy", "what to fold into the base: mle, policy, or an adapter folder")


# ----------------------------------------------------------------------------------------------------------------------
# What all stages share


def visible(text):
    """Other people's text with its control characters written out: they could command, or reorder, a terminal."""
    control = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text, file=None):
    print(visible(text), file=file)


class Stream:
    """Standard output or error. Where nobody reads it, now or ever, or its disk is full, the work goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        pass


@contextmanager
def stage_folder(settings, stage):
    """The folder a stage writes to, locked. It bears its final name only once the stage has finished."""
    shown = " ".join(f"{name}={json.dumps(value)}" for name, value in asdict(settings).items())
    say(textwrap.fill(f"{stage}: {shown}", 120, subsequent_indent="  ", break_long_words=False,
                      break_on_hyphens=False))  # fmt: skip
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    final = Path(settings.output_dir) / stage
    partial, replaced = final.with_name(f"{stage}.partial"), final.with_name(f"{stage}.replaced")
    ours = not final.parent.exists()
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            make_way(settings, final, partial, replaced)
            yield partial
            # A model's own config.json is Hugging Face's: there the settings lie beside it.
            name = "settings.json" if stage in ("pretrain", "base", "merge") else "config.json"
            write_json(partial / name, asdict(settings) | {"stage": stage, "commit": commit()})
            for path in (*partial.rglob("*"), partial):
                sync(path)
        except BaseException as error:
            with suppress(OSError):  # bad input is found before anything is written, and leaves nothing behind
                partial.rmdir()
                if ours:
                    final.parent.rmdir()
            if isinstance(error, OSError) and error.errno and not error.filename:
                error.filename = str(partial)  # what fails in writing does not say where
            raise
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(final.parent)
        clear(replaced, final / "checkpoints")


def make_way(settings, final, partial, replaced):
    """Refuse to write over what is there already, unasked; clear away what a run has left that was killed."""
    if replaced.exists() and not final.exists():
        replaced.rename(final)  # it was killed between the two renames of stage_folder
    clear(replaced, final / "checkpoints")
    if final.exists() and not settings.overwrite:
        raise FileExistsError(f"{final}: already there; add --overwrite to replace it, or name another --output-dir")
    resume, saved = getattr(settings, "resume", ""), checkpoints(partial)
    if saved and not resume and not settings.overwrite:
        raise FileExistsError(
            f"{partial}: an interrupted run, saved at {saved[-1].name}; add --resume to go on with it, or "
            f"--overwrite to start anew"
        )
    if not resume:  # an interrupted run can go on until a new one is sure to start, in Run.restore
        clear(*(path for path in partial.iterdir() if path.name not in ("checkpoints", "metrics.jsonl")))


@contextmanager
def locked(folder):
    """Hold a folder for this process. The kernel lets go of it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is at work there; wait for it, or name another --output-dir"
            ) from None
        yield
    finally:
        os.close(handle)


def clear(*paths):
    for path in paths:
        if path.is_file() or path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def sync(path):
    """Have what was written to a file, or renamed in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(file, value):
    Path(file).write_text(json.dumps(value, indent=2) + "\n")


def commit():
    """The commit of this checkout, with a + where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def need(folder, command):
    """The folder of an earlier stage, or the line that says how to get it."""
    if not Path(folder).exists():
        raise FileNotFoundError(f"{folder}: not there yet; run: python lastmile.py {command}")
    return folder


def generator(settings, *stream, device="cpu"):
    return torch.Generator(device).manual_seed(data.stream_seed(settings.seed, *stream))


def base_folder(settings):
    """The local folder of --model: one of our own, a path, or a model of the Hub, fetched where it is not cached."""
    path, makers = Path(settings.model), {"base": "quantize", "pretrain": "pretrain"}
    if path.parent == Path(settings.output_dir) and path.name in makers:
        return need(path, f"{makers[path.name]} --data {settings.data} --output-dir {settings.output_dir}")
    hub = data.HUB_ID.fullmatch(settings.model)
    if path.exists() or not hub:
        return path
    return data.fetch(hub[1], hub[2] or "main", ["*.safetensors", "*.json", "tokenizer.model", "template.txt"], "model")


def open_base(settings, dtype=None):
    """The frozen base with its tokenizer; in a dry run without its weights."""
    folder = base_folder(settings)
    llama = model.load(folder, settings.device, dtype or getattr(torch, settings.dtype), weights=not settings.dry_run)
    tokenizer = data.load_tokenizer(folder, settings.template)
    ids, eos = (tokenizer.vocab_size - 1, tokenizer.bos or 0, tokenizer.eos), llama.config.eos_token_id
    size = max(ids) + 1
    if size > llama.config.vocab_size or (tokenizer.own_eos and tokenizer.eos not in eos):
        raise UserError(
            f"{folder}: the tokenizer ({size} pieces, EOS {tokenizer.eos}) is not that of config.json "
            f"({llama.config.vocab_size}, EOS {eos}); fetch the model again"
        )
    ends = dict.fromkeys((*eos, tokenizer.eos))  # a template may end answers with a token of its own
    llama.recompute = getattr(settings, "grad_checkpoint", False)
    llama.config = replace(llama.config, eos_token_id=tuple(ends))
    llama.hash = "" if settings.dry_run else model_hash(folder)
    return llama, tokenizer


def model_hash(folder):
    return digest(*sorted(folder.glob("*.safetensors")), folder / "config.json")


COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "generation_config.json", "template.txt")  # fmt: skip


def save_model(settings, llama, tokenizer, folder, quantization=None):
    """Write a whole model: weights, config, and what its base brought along to turn text into tokens."""
    model.save(llama, folder, quantization)
    for name in COMPANIONS:
        if (llama.folder / name).is_file():
            shutil.copyfile(llama.folder / name, folder / name)
    if settings.template and tokenizer.own_eos:  # llama3 and chatml are found again by their tokens
        (folder / "template.txt").write_text(tokenizer.template, encoding="utf-8")


def prepare(settings, split, tokenizer, examples=0, append_eos=True):
    """One split as a list of Datum, filtered and, where asked, cut to a number of examples drawn by seed."""
    loaded = data.load(settings.data, split, settings.input_column, settings.target_column)
    kept, counts = data.encode(loaded, tokenizer, settings.max_input_tokens, settings.max_new_tokens, append_eos)
    dropped, again = len(loaded) - len(kept), len(loaded) - len({(e.source, e.target) for e in loaded})
    say(
        f"{split}: {len(loaded)} examples, {dropped} dropped ({dropped / len(loaded):.1%}): {counts['long_input']} "
        f"with inputs over {settings.max_input_tokens} tokens, {counts['long_output']} with outputs over "
        f"{settings.max_new_tokens}{f'; {again} stand there more than once' if again else ''}"
    )
    return drawn(settings, split, kept, examples)


def drawn(settings, split, rows, examples):
    """That many of the rows, drawn by seed, in their order; all of them where examples is 0."""
    if not rows:
        raise UserError(
            f"{settings.data}: no {split} example is short enough; raise --max-input-tokens or --max-new-tokens"
        )
    if not 0 < examples < len(rows):
        return rows
    say(f"{split}: {examples} of them drawn by seed {settings.seed}")
    order = torch.randperm(len(rows), generator=generator(settings, "examples", split))
    return [rows[i] for i in sorted(order[:examples].tolist())]


def schedule(rows, settings, warmup_steps=0):
    """Yield (step, total, learning rate, row numbers) of every step: all epochs, or --max-steps."""
    lengths = [len(datum.prompt) + len(datum.response) for datum in rows]
    total = settings.max_steps or settings.epochs * math.ceil(len(rows) / settings.batch_size)
    epochs = (data.batches(lengths, settings.batch_size, settings.seed, epoch) for epoch in itertools.count())
    for step, index in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), total)):
        rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        yield step, total, settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / total)), index


def plan(settings, llama, rows, adapters=(), trained=()):
    """What --dry-run prints instead of working: sizes, steps, and an estimate of the peak memory.

    llama: loaded without weights. adapters: those that pass over a batch together; trained: which of them learn, or
    ["base"]. The largest batch decides; what its pass keeps for the backward is counted by running it without weights.
    Not in the estimate: what single operations need in passing, and what the allocator wastes.
    """
    whole = {name: p for name, p in llama.named_parameters() if "lora_" not in name and "score" not in name}
    learning = [t for name in trained for t in (whole.values() if name == "base" else llama.adapter_parameters(name))]
    packed = [layer.in_features * layer.out_features for layer in llama.modules() if hasattr(layer, "qweight")]
    size = getattr(torch, settings.dtype).itemsize
    memory = {"weights": sum(t.numel() * t.element_size() for t in (*llama.parameters(), *llama.buffers()))}
    if packed:
        largest = 2 * max(packed)  # gate and up, side by side
        memory["unpacked weights"] = size * (largest if settings.device == "cuda" else sum(packed))
    if settings.device == "cpu" and "base" not in trained:
        memory["head by columns"] = size * llama.config.vocab_size * llama.config.hidden_size
    name = "fresh weights" if "base" in trained else settings.model
    say(f"\ndry run: no weights are read, nothing is trained\n  model    {name}: "
          f"{(sum(p.numel() for p in whole.values()) + sum(packed)) / 1e6:,.1f} M parameters")  # fmt: skip
    if rows:
        T = max(len(datum.prompt) + len(datum.response) for datum in rows)
        tokens = sum(len(datum.prompt) + len(datum.response) for datum in rows)
        say(f"  data     {len(rows):,} rows, {tokens / 1e6:,.2f} M tokens, the longest {T}")
    if learning:
        say(f"  trained  {', '.join(trained)}: {sum(p.numel() for p in learning):,} parameters")
        _, steps, *_ = next(schedule(rows, settings))
        say(f"  steps    {steps:,} of {settings.batch_size} rows")
        memory["gradients and AdamW"] = 3 * 4 * sum(p.numel() for p in learning)
        for parameter in learning:
            parameter.requires_grad_(True)
        B = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
        adapter = tuple((name, B) for name in adapters) or None
        memory["activations"] = model.kept_bytes(llama, B * max(len(adapters), 1), T, adapter)
        if adapters != ["reward"]:  # logits, their log-softmax and their gradient, on response tokens alone
            memory["logits"] = 3 * 4 * llama.config.vocab_size * B * max(len(datum.response) for datum in rows)
    elif rows and hasattr(settings, "batch_size"):
        c, S = llama.config, max(len(datum.prompt) for datum in rows) + settings.max_new_tokens
        width = c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        memory["keys and values"] = 2 * size * settings.batch_size * S * width
    parts = " + ".join(f"{name} {amount / 1e9:.2f}" for name, amount in memory.items())
    say(f"  memory   {parts} = {sum(memory.values()) / 1e9:.2f} GB, an estimate")
    return memory


class Updater:
    """AdamW over one or more groups of parameters, each with its own gradient clip. No weight decay (choice)."""

    def __init__(self, *groups, max_grad_norm):
        self.groups, self.max_grad_norm, self.loss = groups, max_grad_norm, 0.0
        for parameter in itertools.chain(*groups):
            parameter.requires_grad_(True)
        self.adamw = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)

    def add(self, loss, share=1.0):
        """Backward of one part of the batch; share: its part in the mean that the whole batch's loss is."""
        (loss * share).backward()
        self.loss += loss.item() * share

    def __call__(self, learning_rate):
        """One update. Returns the batch's loss and the gradient norm before clipping, of the first group."""
        norms = [torch.nn.utils.clip_grad_norm_(group, self.max_grad_norm).item() for group in self.groups]
        loss, self.loss = self.loss, 0.0
        if not all(math.isfinite(number) for number in (loss, *norms)):
            raise FloatingPointError(f"loss {loss}, gradient norms {norms}: not finite, no update made")
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss, norms[0]

    def tensors(self):
        """{name: tensor} of all that an update rests on: fp32 weights and AdamW's moments and step numbers."""
        weights = {f"weight.{i}": p.detach() for i, p in enumerate(itertools.chain(*self.groups))}
        state = self.adamw.state_dict()["state"]
        return weights | {f"{key}.{i}": tensor for i, found in state.items() for key, tensor in found.items()}

    def restore(self, tensors):
        """The inverse of `tensors`. Raises UserError where they are not of these parameters."""
        parameters = list(itertools.chain(*self.groups))
        keys = ("weight", "exp_avg", "exp_avg_sq", "step")
        shapes = {f"{key}.{i}": p.shape[: p.dim() * (key != "step")] for key in keys for i, p in enumerate(parameters)}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise UserError("its tensors are not those of this model")
        for name, tensor in tensors.items():
            least = {"step": 1, "exp_avg_sq": 0}.get(name.rpartition(".")[0], -math.inf)
            if tensor.dtype != torch.float32 or not tensor.isfinite().all() or tensor.min() < least:
                raise UserError(f"{name} holds numbers that no training leaves")
        state = {}
        for name, tensor in tensors.items():
            key, _, i = name.rpartition(".")
            if key == "weight":
                parameters[int(i)].data.copy_(tensor)
            else:
                state.setdefault(int(i), {})[key] = tensor
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints. Data order, negatives and sampling are pure functions of (seed, stream, step), so weights, moments and
# the step number are all there is to keep, and a run that was resumed ends with the same bits as one never stopped.

CHECKPOINT = ("state.safetensors", "state.json")  # what its manifest.json vouches for
VERSION = 1  # of this layout
FREE = {  # settings that change no result: they may differ when a run goes on. Paths do, what lies there may not.
    "config", "data", "model", "template", "input_column", "target_column", "output_dir", "overwrite", "dry_run",
    "reward", "init", "micro_batch_size", "grad_checkpoint", "resume", "save_every", "keep_checkpoints", "max_time",
    "log_every", "report_to",
}  # fmt: skip


def checkpoints(folder):
    """All checkpoints of a stage's folder, the newest last, valid or not."""
    return sorted((folder / "checkpoints").glob("step-*"))


def write_checkpoint(place, tensors, facts):
    """Write a checkpoint that is there whole or not at all: first in a hidden folder, manifest last; then rename."""
    hidden = place.with_name(f".{place.name}")
    try:
        place.parent.mkdir(exist_ok=True)
        clear(*place.parent.glob(".step-*"))  # of a run that was killed here
        hidden.mkdir()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        contents = dict(zip(CHECKPOINT, (safetensors.save(tensors), json.dumps(facts).encode()), strict=True))
        manifest = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        manifest["version"] = VERSION
        for name, content in (*contents.items(), ("manifest.json", json.dumps(manifest).encode())):
            (hidden / name).write_bytes(content)
            sync(hidden / name)
        sync(hidden)
        shutil.rmtree(place, ignore_errors=True)  # the same step of a run that went on from an earlier one
        hidden.rename(place)
        sync(place.parent)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def read_checkpoint(place):
    """(tensors, facts) of a checkpoint. Raises UserError saying what is wrong where its manifest does not hold."""
    from safetensors import SafetensorError

    try:
        manifest = json.loads((place / "manifest.json").read_text())
        if manifest["version"] > VERSION:
            raise UserError("it was written by a newer lastmile")
        for name in CHECKPOINT:
            with open(place / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest[name]:
                    raise UserError(f"{name} is damaged")
        facts = json.loads((place / "state.json").read_text())
        if type(facts["step"]) is not int or facts["step"] < 0:
            raise UserError(f"step {facts['step']!r:.80} is no number of steps")
        return safetensors.load_file(place / "state.safetensors"), facts
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{place}: no valid checkpoint: {error}") from None


def digest(*paths, sample=1 << 26):
    """SHA-256 of files; of a file beyond 64 MiB, of its size and 64 pieces of 1 MiB spread over it."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(sample // 64, size // 64)):
                file.seek(start)
                found.update(file.read(sample // 64))
    return found.hexdigest()


def fingerprint(stage, settings, rows, base=None, loaded=None):
    """What a checkpoint must agree on with the run that goes on from it: {name: hash or value}, causes first.

    base: folder of the model, if there is one; loaded: {name: Path} of adapters, {name: text} of anything else.
    """
    found = {"stage": stage}
    found |= {f"--{name.replace('_', '-')}": v for name, v in asdict(settings).items() if name not in FREE}
    if base:
        found["base model"] = model_hash(base)
        found["tokenizer"] = digest(*(base / name for name in data.TOKENIZERS if (base / name).is_file()))
    for name, what in (loaded or {}).items():
        files = ("adapter_model.safetensors", "adapter_config.json")
        found[name] = what if isinstance(what, str) else digest(*(what / file for file in files))
    texts, ids = hashlib.sha256(), hashlib.sha256()
    for datum in rows:
        texts.update(repr((datum.id, datum.source, datum.target)).encode())
        ids.update(repr((datum.kind, datum.prompt, datum.response)).encode())
    return found | {"data": texts.hexdigest(), "prompt template or negatives": ids.hexdigest()}


class Stopped(BaseException):  # as KeyboardInterrupt is: no library's `except Exception` may swallow it
    """A signal or --max-time ended the run; `signal` is its number."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


def loggers(settings, stage):
    """(write a step's numbers, close) of each that --report-to names. They lie beside the stages' folders."""
    found, place = [], Path(settings.output_dir)
    if "tensorboard" in settings.report_to:
        from torch.utils.tensorboard import SummaryWriter

        if not settings.resume:
            clear(place / "tensorboard" / stage)
        writer = SummaryWriter(place / "tensorboard" / stage)
        write = lambda step, numbers: [writer.add_scalar(name, x, step) for name, x in numbers.items()]  # noqa: E731
        found.append((write, writer.close))
    if "wandb" in settings.report_to:
        import wandb

        name = f"{place.name} {stage}"
        try:
            run = wandb.init(project="lastmile", name=name, dir=place, config=asdict(settings))
        except wandb.Error as error:
            raise UserError(f"--report-to wandb: {error}; run wandb login, or set WANDB_MODE=offline") from None
        found.append((lambda step, numbers: run.log(numbers, step=step), run.finish))
    return found


class Run:
    """One training from its start, or from a checkpoint, to its end: its steps, its log, and the ways it can stop.

    with Run(folder, "mle", settings, rows, update, base, shown=["loss"]) as run:
        for step, rate, index in run.steps():
            …
            run.log(step, …)
    """

    def __init__(self, folder, stage, settings, rows, update, base=None, loaded=None, shown=()):
        self.folder, self.stage, self.settings, self.rows, self.update = folder, stage, settings, rows, update
        self.facts, self.shown = fingerprint(stage, settings, rows, base, loaded), shown
        self.index, self.stop, self.tokens = [], 0, 0
        if settings.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.loggers = loggers(settings, stage)
        self.first = self.restore()

    def restore(self):
        """Take up the checkpoint that --resume names. Returns the number of steps already done."""
        if not self.settings.resume:
            clear(self.folder / "checkpoints")
            return 0
        named = self.settings.resume != "auto"
        places = [Path(self.settings.resume).resolve()] if named else checkpoints(self.folder)[::-1]
        for place in places:
            try:
                tensors, facts = read_checkpoint(place)
            except ValueError as error:
                if named:
                    raise UserError(f"{error}; name another one, or --resume auto") from None
                say(f"lastmile.py: {error}; going back to the one before", file=sys.stderr)
                continue
            step = facts.pop("step")
            changed = [name for name in self.facts | facts if facts.get(name) != self.facts.get(name)]
            if changed:
                shown = [
                    f"{name} ({facts.get(name)} then, {self.facts.get(name)} now)" if name[:2] == "--" else name
                    for name in changed
                ]
                raise UserError(
                    f"{place}: changed since: {', '.join(shown)}; bring back what was, or start anew with --overwrite"
                )
            try:
                self.update.restore(tensors)
            except ValueError as error:
                raise UserError(f"{place}: {error}; name another one, or start anew with --overwrite") from None
            with suppress(shutil.SameFileError, FileNotFoundError):  # --resume PATH may name another run's
                shutil.copyfile(place.parents[1] / "metrics.jsonl", self.folder / "metrics.jsonl")
            say(f"{self.stage}: goes on from {place}")
            return step
        if places:
            raise UserError(
                f"{self.folder / 'checkpoints'}: not one is valid; bring one back, or start anew with "
                f"--overwrite in place of --resume"
            )
        say(f"{self.stage}: no checkpoint to go on from; starts at step 0")
        return 0

    def __enter__(self):
        """Open the log, cut to the steps that the checkpoint has seen: a killed run may have written more, or half."""
        file = self.folder / "metrics.jsonl"
        self.file, self.unwritten = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), b""
        os.ftruncate(self.file, sum(map(len, file.read_bytes().splitlines(keepends=True)[: self.first])))
        clear(self.folder / "bad_batch.json")
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.since, self.bar = time.monotonic(), None
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.file)
        if self.bar is not None:
            self.bar.close()
        for _, close in self.loggers:
            with suppress(OSError):
                close()
        if kind is FloatingPointError:
            file = self.folder / "bad_batch.json"
            write_json(file, {"step": self.step, "ids": [self.rows[i].id for i in self.index]})
            last = [place.name for place in checkpoints(self.folder)[-1:]]
            error.args = (
                f"step {self.step}: {error}; the batch's ids are in {file}; last checkpoint: {last or 'none'}",
            )
        if self.stop and kind is None:  # the signal came after the last step
            raise Stopped(self.stop)

    def on_signal(self, number, frame):
        if self.stop:
            os._exit(128 + number)
        self.stop = number
        with suppress(OSError):  # Ctrl-C ends `| tee`, too
            os.write(2, b"\nlastmile.py: finishing this step, then saving; once more to leave at once\n")

    def steps(self, warmup_steps=0):
        """Yield (step, learning rate, row numbers) of the steps still to do; save and stop between them when due."""
        for step, total, rate, index in schedule(self.rows, self.settings, warmup_steps):
            if step < self.first:
                continue
            self.step, self.index = step, index
            self.bar = self.bar or tqdm.tqdm(
                total=total, initial=self.first, desc=self.stage, unit="step", dynamic_ncols=True
            )
            yield step, rate, index
            self.bar.update()
            if 0 < self.settings.max_time * 60 < time.monotonic() - self.since:
                self.stop = self.stop or signal.SIGTERM
            done = step + 1
            if done % self.settings.save_every == 0 or done == total or self.stop:
                self.save(done, must=done == total or self.stop)
            if self.stop:
                raise Stopped(self.stop)

    def save(self, done, must):
        """Write a checkpoint and let the oldest go. A full disk is an error only where there will be no next time."""
        place = self.folder / "checkpoints" / f"step-{done:08}"
        try:
            self.flush()
            os.fsync(self.file)
            write_checkpoint(place, self.update.tensors(), self.facts | {"step": done})
        except OSError as error:
            if must:
                raise OSError(errno.EIO, f"not saved ({error.strerror})", str(place)) from error
            say(f"\nlastmile.py: {place}: not saved ({error.strerror}); the run and its older checkpoints go on",
                file=sys.stderr)  # fmt: skip
            return
        saved = checkpoints(self.folder)  # those beyond this one were damaged, or their run was taken back
        kept = [old for old in saved if old <= place][-self.settings.keep_checkpoints :]
        clear(*(old for old in saved if old not in kept))

    def flush(self):
        while self.unwritten:
            self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]

    def log(self, step, batch, **numbers):
        """A line of metrics.jsonl, and now and then the bar."""
        tokens = (batch.prompt_len.sum() + batch.mask.sum()).item()  # real ones, padding apart
        self.tokens += tokens
        numbers["padding"] = round(1 - tokens / batch.tokens.numel(), 4)
        self.unwritten += json.dumps({"step": step} | numbers).encode() + b"\n"
        with suppress(OSError):  # a full disk: the lines wait for the next time, and `save` says so
            self.flush()
            for write, _ in self.loggers:
                write(step, {name: float(x) for name, x in numbers.items() if x is not None})
        if step % self.settings.log_every == 0:
            shown = {name: f"{numbers[name]:.3g}" for name in self.shown if numbers[name] is not None}
            shown["tok/s"] = f"{self.tokens / (time.monotonic() - self.since):.0f}"
            if self.settings.device == "cuda":
                shown["GB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            self.bar.set_postfix(shown)


# ----------------------------------------------------------------------------------------------------------------------
# The base


def pretrain(settings):
    """A tiny Llama from scratch, tokenizer included: language modelling on prompts with chat-like answers."""
    C, H, J = settings.hidden_size, settings.num_attention_heads, settings.num_key_value_heads
    dtype = getattr(torch, settings.dtype)  # of the products; weights and their updates are fp32
    if dtype == torch.float16:
        raise UserError("--dtype float16: its gradients vanish without loss scaling; take bfloat16 or float32")
    if C % (2 * H) or H % J:  # rope turns dimensions in pairs
        raise UserError(f"--hidden-size {C} must be a multiple of twice the {H} heads, and these of the {J} kv heads")
    with stage_folder(settings, "pretrain") as folder:
        split = "pretrain" if settings.data == "toy" else "train"
        examples = data.load(settings.data, split, settings.input_column, settings.target_column)
        if settings.data != "toy" and settings.chatter:
            examples = data.chatter(examples)
        template = data.load_template(settings.template, folder, ())[0] if settings.template else data.SHORT_TEMPLATE
        (folder / "template.txt").write_text(template, encoding="utf-8")
        texts = [template.replace("{source}", e.source) + " " + e.target for e in examples]
        tokenizer = data.train_tokenizer(texts, settings.vocab_size, folder)
        rows, _ = data.encode(examples, tokenizer, settings.max_input_tokens, settings.max_new_tokens)
        say(f"pretrain: {len(rows)} of {len(examples)} examples are short enough")
        rows = drawn(settings, "pretrain", rows, settings.train_examples)
        rows = [replace(row, prompt=row.prompt[:1], response=row.prompt[1:] + row.response) for row in rows]
        config = model.LlamaConfig(
            tokenizer.vocab_size, C, settings.intermediate_size, settings.num_hidden_layers, H, J, C // H,
            eos_token_id=(tokenizer.eos,),
        )  # fmt: skip
        llama = model.initialize(config, generator(settings, "pretrain"))
        llama.recompute = settings.grad_checkpoint
        if settings.dry_run:
            return plan(settings, llama.to("meta"), rows, trained=["base"])
        llama.to(settings.device)
        update = Updater(list(llama.parameters()), max_grad_norm=settings.max_grad_norm)
        with Run(folder, "pretrain", settings, rows, update, shown=["loss"]) as run:
            for step, rate, index in run.steps(settings.warmup_steps):
                batch = data.collate([rows[i] for i in index], settings.device)
                for part in data.parts(batch, settings.micro_batch_size):
                    with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
                        loss = ppo.mle_loss(ppo.policy_logp(llama, part), part.mask)
                    update.add(loss, data.share(part.mask, batch.mask))
                loss, norm = update(rate)
                run.log(step, batch, loss=loss, grad_norm=norm, learning_rate=rate)
        model.save(llama, folder)


def quantize(settings):
    """A dense Llama folder to a 4-bit one. Reads --model, by default <output-dir>/pretrain."""
    if settings.group_size != -1 and (settings.group_size < 8 or settings.group_size % 8):
        raise UserError(f"--group-size {settings.group_size}: must be -1 (one scale a column) or a multiple of 8")
    with stage_folder(settings, "base") as folder:
        llama, tokenizer = open_base(settings)
        if llama.config.quantization:
            raise UserError(f"{settings.model}: is quantised already; name an fp16 or fp32 model: --model FOLDER")
        rows = prepare(settings, "train", tokenizer, settings.calibration_examples)
        if settings.dry_run:
            return plan(settings, llama, rows)
        calibration = [datum.prompt + datum.response for datum in rows]
        bar = progress("quantize", "block")
        described = model.quantize(llama, calibration, settings.group_size, settings.act_order, settings.damp, bar)
        save_model(settings, llama, tokenizer, folder, described)


# ----------------------------------------------------------------------------------------------------------------------
# The three trainings


def average_batch(settings, amounts):
    """What a batch holds of something on average, amounts being what each row does.

    Losses are divided by this, not by what their own batch holds. Rows of like length share a batch: divided by its own
    tokens or weights, a batch of long rows would weigh each of them less than a plain shuffle does.
    """
    return settings.batch_size * sum(amounts) / len(amounts)


def train_reward(settings):
    """The reward model: score 1 for every token of the truth, 0 for every token of a negative (paper, 3.2)."""
    names = answerers("--samples", settings.samples) if settings.samples else []
    if settings.level == "sequence" and settings.hallucinations == "span":
        raise UserError("--level sequence scores no single tokens; take --hallucinations sequence")
    with stage_folder(settings, "reward") as folder:
        llama, tokenizer = open_base(settings)
        positives = prepare(settings, "train", tokenizer, settings.train_examples)
        heldout = prepare(settings, "validation", tokenizer, settings.eval_examples)
        samplers = {name: load_answerer(settings, llama, name) for name in names}
        given, rows = (settings, llama, tokenizer, samplers), []
        for round in range(settings.rounds):
            rows += with_negatives(*given, positives, "train", round)
        heldout = with_negatives(*given, heldout, "validation")
        say_missing(settings, rows, names)
        targets = settings.lora_targets.split(",")
        draw = generator(settings, "lora")
        llama.add_adapter("reward", settings.lora_r, settings.lora_alpha, targets, draw, head="normal")
        if settings.dry_run:
            return plan(settings, llama, rows, ["reward"], ["reward"])
        update = Updater(llama.adapter_parameters("reward"), max_grad_norm=settings.max_grad_norm)
        loaded = {f"{name} adapter": adapter_folder(settings, name) for name in names if name != "base"}
        usual = average_batch(settings, [row.weight for row in rows])
        shown = ["loss", "positive", "negative"]
        with Run(folder, "reward", settings, rows, update, llama.folder, loaded, shown) as run:
            for step, rate, index in run.steps():
                batch, scores = data.collate([rows[i] for i in index], settings.device), []
                for part in data.parts(batch, settings.micro_batch_size):
                    score = llama.scalar(llama(part.tokens, "reward"), "reward")  # (B, T)
                    update.add(ppo.reward_loss(score, part, settings.level), part.weight.sum().item() / usual)
                    scores.append(score.detach())
                loss, norm = update(rate)
                loss *= usual / batch.weight.sum().item()
                score, scored = torch.cat(scores), ppo.carriers(batch.mask, settings.level)
                run.log(
                    step, batch, loss=loss, grad_norm=norm, learning_rate=rate,
                    positive=mean_or_none(score, scored & (batch.label == 1)),
                    negative=mean_or_none(score, scored & (batch.label == 0)),
                )  # fmt: skip
        llama.save_adapter("reward", folder, settings.model)
        write_json(folder / "heldout.json", reward_report(settings, llama, heldout))


def with_negatives(settings, llama, tokenizer, samplers, rows, split, round=0):
    """The rows with the negatives of one round; samplers: {name: adapter argument} of those whose samples are some."""
    seed = data.stream_seed(settings.seed, "round", round) if round else settings.seed
    samples = {}
    for name, adapter in samplers.items():
        draw = generator(settings, "samples", split, name, round, device=settings.device)
        answer = lambda prompts, adapter=adapter, draw=draw: model.sample(  # noqa: E731
            llama, prompts, adapter, settings.max_new_tokens, generator=draw
        )
        if settings.dry_run:
            answer = lambda prompts: [[0] * settings.max_new_tokens] * len(prompts)  # noqa: E731
        bar = progress(f"reward: samples of {name}")
        samples[f"{name}_sample"] = evaluation.predict(rows, answer, Eval.batch_size, list, bar)
    return data.with_negatives(rows, tokenizer, settings.max_new_tokens, seed, settings.hallucinations, samples)


def progress(title, unit="batch"):
    return lambda steps: tqdm.tqdm(steps, desc=title, unit=unit, dynamic_ncols=True)


def say_missing(settings, rows, names):
    """Say how many rows have no negative of a class, and why."""
    why = dict.fromkeys(data.NEGATIVES, "their outputs being a single word")
    if settings.hallucinations != "off":
        why["hallucinated"] = "no kind of edit fitting their outputs"
    why |= {f"{name}_sample": "the sample being the true output" for name in names}
    had = Counter("hallucinated" if row.kind in data.KINDS else row.kind for row in rows)
    for kind, reason in why.items():
        if missing := had["positive"] - had[kind]:
            say(f"negatives: {missing} examples have no {kind} one, {reason}")


def reward_report(settings, llama, rows):
    """Held-out scores: mean score of the positives and of each class, and how well the scores tell them apart; of
    spans, too, from the tokens that the truth has in their place.
    """
    scores, spans = {}, {}
    for start in range(0, len(rows), 32):
        batch = data.collate(rows[start : start + 32], settings.device)
        with torch.inference_mode():
            score = llama.scalar(llama(batch.tokens, "reward"), "reward")  # (B, T)
        scored = ppo.carriers(batch.mask, settings.level)  # (B, T)
        means = torch.where(scored, score, 0).sum(1) / scored.sum(1)  # (B,)
        for b, datum in enumerate(rows[start : start + 32]):
            scores.setdefault(datum.kind, []).append(means[b].item())
            tokens = score[b][batch.mask[b]]  # (n,)
            if datum.kind == "positive":
                truth = tokens
            elif datum.span:  # what follows the edit, the truth has behind its place
                first, end = datum.span
                place = truth[first : max(first + 1, len(truth) - len(tokens) + end)]
                spans.setdefault(datum.kind, []).append((place.mean().item(), tokens[first:end].mean().item()))
    report = {kind: {"mean": sum(values) / len(values)} for kind, values in scores.items()}
    for kind in scores:
        if kind != "positive":
            report[kind]["auc"] = evaluation.auc(scores["positive"], scores[kind])
    for kind, pairs in spans.items():
        true, false = zip(*pairs, strict=True)
        report[kind] |= {"span_mean": sum(false) / len(false), "span_auc": evaluation.auc(true, false)}
    columns = {"mean": "mean score", "auc": "AUC of positives against it"}
    columns |= {"span_mean": "mean of the span", "span_auc": "AUC of the truth there against it"} if spans else {}
    lines = [[kind, *(f"{r[name]:.3f}" if name in r else "" for name in columns)] for kind, r in report.items()]
    say(f"\nheld out, {len(scores['positive'])} validation examples:")
    say(evaluation.markdown([["class", *columns.values()], *lines]))
    return report


def mean_or_none(x, mask):
    return ppo.masked_mean(x, mask).item() if mask.any() else None


def train_mle(settings):
    """The control: maximum likelihood of the ground truth."""
    with stage_folder(settings, "mle") as folder:
        llama, tokenizer = open_base(settings)
        rows = prepare(settings, "train", tokenizer, settings.train_examples, settings.eos_in_labels)
        targets = settings.lora_targets.split(",")
        llama.add_adapter("mle", settings.lora_r, settings.lora_alpha, targets, generator(settings, "lora"))
        if settings.dry_run:
            return plan(settings, llama, rows, ["mle"], ["mle"])
        update = Updater(llama.adapter_parameters("mle"), max_grad_norm=settings.max_grad_norm)
        usual = average_batch(settings, [len(row.response) for row in rows])
        with Run(folder, "mle", settings, rows, update, llama.folder, shown=["loss"]) as run:
            for step, rate, index in run.steps():
                batch = data.collate([rows[i] for i in index], settings.device)
                for part in data.parts(batch, settings.micro_batch_size):
                    loss = ppo.mle_loss(ppo.policy_logp(llama, part, "mle"), part.mask)
                    update.add(loss, part.mask.sum().item() / usual)
                loss, norm = update(rate)
                loss *= usual / batch.mask.sum().item()
                run.log(step, batch, loss=loss, grad_norm=norm, learning_rate=rate)
        llama.save_adapter("mle", folder, settings.model)


def train_ppo(settings):
    """Policy and value against the reward model; half of the batches sampled, half ground truth (paper, 3.3)."""
    if settings.whiten and settings.micro_batch_size:
        raise UserError("--whiten needs the whole batch's advantages at once; leave out --micro-batch-size")
    with stage_folder(settings, "ppo") as folder:
        start = adapter_folder(settings, settings.init) if settings.init != "base" else None
        function, source = reward_function(settings.reward)
        if not function:
            reward_first(settings, start)
        llama, tokenizer = open_base(settings)
        if function:
            judge = lambda batch, rows: ppo.grade(function, rows, batch, tokenizer.decode)  # noqa: E731
            loaded = {"reward function": source}
        else:
            judge, loaded = open_judge(settings, llama)
        add_actors(settings, llama, start)
        rows = prepare(settings, "train", tokenizer, settings.train_examples)
        if function:  # what fails on the truth, or on an answer that ends at once, fails before hours of training
            for prediction in (rows[0].target, ""):
                function(rows[0].source, rows[0].target, prediction)
        if settings.dry_run:
            return plan(settings, llama, rows, ["policy", "value"], ["policy", "value"])
        policy, critic = llama.adapter_parameters("policy"), llama.adapter_parameters("value")
        update = Updater(policy, critic, max_grad_norm=settings.max_grad_norm)
        loaded |= {"init adapter": start} if start else {}
        shown = ["return", "reward", "length", "explained_variance"]
        with Run(folder, "ppo", settings, rows, update, llama.folder, loaded, shown) as run:
            for step, rate, index in run.steps():
                batch = data.collate([rows[i] for i in index], settings.device)
                truth = ppo.is_ground_truth(step, settings.ground_truth_fraction)
                if not truth:
                    draw = generator(settings, "rollout", step, device=settings.device)
                    batch = ppo.rollout(
                        batch, lambda prompts, draw=draw: model.sample(
                            llama, prompts, "policy", settings.max_new_tokens, generator=draw
                        ),
                    )  # fmt: skip
                logged, shown = step % settings.log_every == 0, [rows[i] for i in index]
                numbers = ppo_updates(settings, llama, batch, update, rate, logged, judge, shown)
                run.log(step, batch, ground_truth=truth, learning_rate=rate, **numbers)
        llama.save_adapter("policy", folder / "policy", settings.model)
        llama.save_adapter("value", folder / "value", settings.model)


def add_actors(settings, llama, start):
    """The policy, fresh or from the folder that --init named, and a fresh value."""
    r, alpha, targets = settings.lora_r, settings.lora_alpha, settings.lora_targets.split(",")
    if start:
        llama.load_adapter("policy", start)
    else:
        llama.add_adapter("policy", r, alpha, targets, generator(settings, "policy"))
    llama.add_adapter("value", r, alpha, targets, generator(settings, "value"), head="zero")


# What the reward model that PPO trains takes over from PPO, beside all of Common: how long and how, not how well.
SHARED = ("train_examples", "max_steps", "log_every", "grad_checkpoint", "micro_batch_size", "save_every",
          "keep_checkpoints", "max_time", "report_to", "deterministic")  # fmt: skip


def reward_first(settings, start):
    """Train the reward model that PPO needs, with that stage's own settings, where it is not there yet."""
    if Path(settings.reward) != Path(settings.output_dir) / "reward":
        need(settings.reward, "reward")
    if Path(settings.reward).exists() or settings.dry_run:
        return
    add_actors(settings, open_base(replace(settings, dry_run=True))[0], start)  # what PPO would refuse, it refuses now
    say(f"ppo: no reward model in {settings.reward} yet; training it first")
    given = {"resume": "auto" if settings.resume else ""} | {name: getattr(settings, name) for name in SHARED}
    if settings.config:  # its [reward] table goes before what PPO and the reward model share
        given = read_settings(settings.config, "reward", given)
    train_reward(resolve("reward", given | {f.name: getattr(settings, f.name) for f in fields(Common)}))


def open_judge(settings, llama):
    """Load the reward model. Returns how it scores, (batch, its rows) -> (B, T), and what a fingerprint tells of it."""
    folder, level = Path(settings.reward), "token"
    if folder.exists():
        llama.load_adapter("reward", folder, head=True)
        if (folder / "config.json").is_file():
            level = model.read_json(folder / "config.json").get("level", "token")
    else:  # a dry run, before there is one
        targets = Reward.lora_targets.split(",")
        llama.add_adapter("reward", Reward.lora_r, Reward.lora_alpha, targets, generator(settings), head="normal")
    if level not in ("token", "sequence"):
        raise UserError(f"{folder / 'config.json'}: level {level!r} is neither token nor sequence; mend the file")
    return lambda batch, rows: ppo.judge(llama, batch, level), {"reward adapter": folder, "reward level": level}


def reward_function(name):
    """The function that --reward names, its answers checked, and what tells it from another: (None, "") for a folder.

    A module is looked for in the current folder, then among what is installed.
    """
    module, colon, attribute = "eval:la_rouge1".partition(":") if name == "rouge" else name.partition(":")
    if not re.fullmatch(r"[\w.]+:\w+", module + colon + attribute):
        return None, ""
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name}: not to be had here: {type(error).__name__}: {error}") from error
    file = getattr(sys.modules[module], "__file__", None)

    def checked(source, reference, prediction):
        where = f"--reward {name}, given {source!r:.60}, {reference!r:.60}, {prediction!r:.60}"
        try:
            found = function(source, reference, prediction)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"{where}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})") from error
        numbers, n = found if isinstance(found, list) else [found], len(prediction.split())
        sound = (isinstance(x, Real) and abs(x) <= torch.finfo(torch.float32).max for x in numbers)
        if (isinstance(found, list) and len(found) != n) or not all(sound):
            raise UserError(f"{where}: {found!r:.60} is neither a finite number nor a list of {n}, one for each word")
        return found

    return checked, f"{name} {digest(Path(file)) if file else ''}"


def ppo_updates(settings, llama, batch, update, rate, logged, judge=None, rows=()):
    """All updates on one batch, one by default. Returns the numbers of the last.

    judge: (batch, its rows) -> (B, T), the reward of every token; by default the reward model's score.
    """
    judge, rows = judge or (lambda batch, rows: ppo.judge(llama, batch)), iter(rows)
    parts = data.parts(batch, settings.micro_batch_size)
    trajs, kls = [], []
    for epoch in range(settings.ppo_epochs):
        passes, losses = [], torch.zeros(2)
        for i, part in enumerate(parts):
            logp, entropy, value = ppo.actor_critic(llama, part, settings.entropy_coef > 0)
            if epoch == 0:
                kl = None
                if settings.kl_coef or logged:  # the base is the policy without its adapter: no second model
                    with torch.inference_mode():
                        kls.append(logp.detach() - ppo.policy_logp(llama, part))  # (B, T)
                    kl = settings.kl_coef * kls[-1] if settings.kl_coef else None
                score = judge(part, list(itertools.islice(rows, len(part.tokens))))  # (B, T)
                trajs.append(ppo.trajectory(
                    part, logp, value, score, settings.gamma, settings.lam, settings.length_penalty,
                    settings.reward_clamp, kl, settings.whiten,
                ))  # fmt: skip
            policy_loss = ppo.policy_loss(logp, trajs[i], settings.clip_range)
            value_loss = ppo.value_loss(value, trajs[i], settings.value_clip)
            loss = policy_loss + value_loss
            if settings.entropy_coef:
                loss = loss - settings.entropy_coef * ppo.masked_mean(entropy, part.mask)
            share = data.share(part.mask, batch.mask)
            update.add(loss, share)
            losses += share * torch.tensor([policy_loss.item(), value_loss.item()])
            passes.append((logp.detach(), value.detach(), entropy.detach()))
        _, norm = update(rate)
    logp, value, entropy = (torch.cat(column) for column in zip(*passes, strict=True))
    traj = ppo.Trajectory(*(torch.cat(column) for column in zip(*(vars(t).values() for t in trajs), strict=True)))
    numbers = ppo.statistics(traj, batch, logp, value, entropy, settings.clip_range, llama.config.eos_token_id)
    if kls:
        numbers["kl"] = ppo.masked_mean(torch.cat(kls), batch.mask).item()
    return numbers | dict(policy_loss=losses[0].item(), value_loss=losses[1].item(), grad_norm=norm)


# ----------------------------------------------------------------------------------------------------------------------
# Judgement


def answerers(flag, value):
    """The names that a flag lists, each once."""
    names = value.split(",")
    if not set(names) <= {"base", "mle", "policy"} or len(set(names)) < len(names):
        raise UserError(f"{flag} {value}: choose among base, mle and policy")
    return names


def load_answerer(settings, llama, name):
    """Load the adapter of a column, or of a folder. Returns the adapter argument of forward."""
    if name == "base":
        return None
    adapter = name if name in ("mle", "policy") else "other"  # a module's name cannot be a path
    llama.load_adapter(adapter, adapter_folder(settings, name))
    return adapter


def adapter_folder(settings, name):
    """The folder of mle's or the policy's adapter in this run, or the folder that was named."""
    run, stages = Path(settings.output_dir), {"mle": ("mle", "mle"), "policy": ("ppo", "ppo/policy")}
    if name not in stages:
        if not (Path(name) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{name}: no adapter; name mle, policy, or a folder with an adapter_config.json")
        return Path(name)
    stage, folder = stages[name]
    return need(run / folder, f"{stage} --data {settings.data} --output-dir {run}")


def evaluate(settings):
    """Greedy predictions on the test split and their scores, for base, mle and policy, raw and cleaned."""
    names = answerers("--adapters", settings.adapters)
    with stage_folder(settings, "eval") as folder:
        llama, tokenizer = open_base(settings)
        adapters = {name: load_answerer(settings, llama, name) for name in names}
        rows = prepare(settings, "test", tokenizer, settings.test_examples)
        if settings.dry_run:
            return plan(settings, llama, rows)
        if settings.data not in data.PRESETS:
            train = {e.source for e in data.load(settings.data, "train", settings.input_column, settings.target_column)}
            if seen := sum(datum.source in train for datum in rows):
                print(f"lastmile.py: warning: {seen} test inputs stand in the training split too", file=sys.stderr)
        references = [datum.target for datum in rows]
        columns = {}
        for name, adapter in adapters.items():
            answer = lambda prompts, adapter=adapter: model.sample(  # noqa: E731
                llama, prompts, adapter, settings.max_new_tokens, temperature=0
            )
            columns[name] = evaluation.predict(
                rows, answer, settings.batch_size, tokenizer.decode, progress(f"eval {name}")
            )
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for datum, text in zip(rows, columns[name], strict=True):
                    line = {"id": datum.id, "prediction": text, "reference": datum.target, "source": datum.source}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        columns = evaluation.judged(columns)
        examples = {name: evaluation.metrics_by_example(texts, references) for name, texts in columns.items()}
        note = add_bleurt(settings, examples, columns, references)
        write_json(folder / "scores.json", {
            name: {metric: float(values.mean()) for metric, values in found.items()} for name, found in examples.items()
        })  # fmt: skip
        write_json(folder / "intervals.json", {
            name: {metric: evaluation.interval(values, settings.seed) for metric, values in found.items()}
            for name, found in examples.items()
        })  # fmt: skip
        facts = {"data": Path(settings.data).stem, "model": settings.model, "seed": settings.seed, "commit": commit(),
                 "n": len(rows), "bleurt": note}  # fmt: skip
        write_json(folder / "facts.json", facts)
    say(f"\n{rows[0].source}\n\nreference: {references[0]}")
    for name in names:
        say(f"{name}: {columns[name][0]}")


def add_bleurt(settings, examples, columns, references):
    """Add BLEURT to the metrics of every column; where that cannot be had, say why and go on. Returns the note."""
    if settings.bleurt == "none":
        return "not computed, --bleurt none"
    try:
        for name, found in examples.items():
            found["bleurt"] = evaluation.bleurt(columns[name], references, settings.bleurt, device=settings.device)
    except (ImportError, OSError) as error:
        for found in examples.values():
            found.pop("bleurt", None)
        reason = str(error).strip().splitlines()[0]
        print(f"bleurt: not computed ({reason}); name a checkpoint folder: --bleurt FOLDER", file=sys.stderr)
        return f"not computed, {settings.bleurt} could not be loaded"
    return Path(settings.bleurt).name


def read_scores(folder):
    """Scores, intervals and facts of an eval folder, sound enough to make tables of, and the tables."""
    found = [model.read_json(folder / f"{name}.json") for name in ("scores", "intervals", "facts")]
    try:
        text = evaluation.tables(*found)
        text.encode()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not the scores that eval writes ({error!r}); run eval again") from None
    return found, text


def show_tables(settings):
    folder = Path(settings.output_dir) / "eval"
    need(folder, f"eval --data {settings.data} --output-dir {settings.output_dir}")
    _, text = read_scores(folder)
    say(text)
    if settings.dry_run:
        return
    (folder / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    say(f"\nEverything lies in {Path(settings.output_dir).resolve()}; these tables in {folder / 'tables.md'}")


# ----------------------------------------------------------------------------------------------------------------------
# The report


def read_lines(file, keys=()):
    """The objects of a .jsonl file. A last line without its end is still being written, and left out."""
    rows = []
    for i, line in enumerate(Path(file).read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise UserError(f"{file}: line {i} is not one that lastmile writes; run that stage again")
        rows.append(row)
    return rows


def read_outputs(folder):
    """{"id", "source", "reference", and the columns: list of texts} of an eval folder."""
    keys, found = ("id", "source", "reference", "prediction"), {}
    for name in ("base", "mle", "policy"):
        if (folder / f"{name}.jsonl").is_file():
            found[name] = read_lines(folder / f"{name}.jsonl", keys)
    texts = {name: [row["prediction"] for row in rows] for name, rows in found.items()}
    rows = next(iter(found.values()), [])
    if not rows or any([row["id"] for row in other] != [row["id"] for row in rows] for other in found.values()):
        raise UserError(f"{folder}: not the predictions that eval writes; run eval again")
    return {key: [row[key] for row in rows] for key in keys[:3]} | evaluation.judged(texts)


def write_report(settings):
    """One HTML file about everything that lies in the run's folder."""
    run = Path(settings.output_dir)
    stages = {}
    for stage in reporting.STAGES:  # one that is still at work, or was stopped, shows what it has
        logs = [run / folder / "metrics.jsonl" for folder in (stage, f"{stage}.partial")]
        if rows := next((read_lines(file) for file in logs if file.is_file()), None):
            stages[stage] = rows
    sections = [reporting.curves(stages)] if stages else []
    if (run / "eval").is_dir():
        found, _ = read_scores(run / "eval")
        columns = read_outputs(run / "eval")
        texts = {name: column for name, column in columns.items() if name not in ("id", "source")}
        sections += [reporting.tables(*found), reporting.lengths(texts)]
        if settings.examples:
            rows = drawn(settings, "report", list(range(len(columns["id"]))), settings.examples)
            sections.append(reporting.gallery(*examine(settings, columns, rows)))
    if not sections:
        how = f"python lastmile.py reward --data {settings.data} --output-dir {run}"
        raise FileNotFoundError(f"{run}: no stage has run there yet; run: {how}")
    if settings.dry_run:
        return
    facts = f"{run}, reported by lastmile {commit()}"
    content = visible(reporting.page(Path(settings.data).stem, facts, sections))  # whatever of it came from the data
    file, hidden = run / "report.html", run / ".report.html"
    try:
        hidden.write_text(content, encoding="utf-8")
        sync(hidden)
        hidden.rename(file)
    finally:
        clear(hidden)
    say(f"The report lies in {file.resolve()}; open it in a browser")


def settings_of(run, command):
    """The settings that a stage of the run was made with; the defaults where it is not there."""
    file = run / command / "config.json"
    return COMMANDS[command][0](**(read_settings(str(file), command) if file.is_file() else {}))


def examine(settings, columns, rows):
    """(examples, note) for report.gallery: the reference and all outputs of some test inputs, token by token.

    One pass of the reward model and one of the value for each input; without their adapters, the texts alone.
    """
    run, shown = Path(settings.output_dir), [name for name in columns if name not in ("id", "source")]
    s, cap = settings_of(run, "ppo"), settings_of(run, "eval").max_new_tokens
    reward, value = Path(s.reward or run / "reward"), run / "ppo" / "value"
    reward = reward if reward.is_dir() else run / "reward"  # the run may have been moved
    adapters = {name: path for name, path in (("reward", reward), ("value", value)) if path.is_dir()}
    examples = [{"id": columns["id"][i], "source": columns["source"][i]} for i in rows]
    if "reward" not in adapters:
        for i, example in zip(rows, examples, strict=True):
            example["outputs"] = {name: {"tokens": [{"text": columns[name][i]}], "cut": False} for name in shown}
        return examples, "There is no reward model in this run, so the outputs bear no numbers."
    llama, tokenizer = open_base(settings)
    for name, path in adapters.items():
        llama.load_adapter(name, path, head=True)
    if settings.dry_run:
        plan(settings, llama, [])
        return [], ""
    same = 0
    for i, example in zip(rows, examples, strict=True):
        texts = {name: columns[name][i] for name in shown}
        raw = {name: columns[name.removesuffix(" cleaned")][i] for name in shown}
        outputs = example["outputs"] = tokens_of(tokenizer, texts, raw, cap)
        add_numbers(s, llama, tokenizer.prompts([columns["source"][i]])[0], outputs, adapters)
        for name, output in outputs.items():
            same += "".join(token["text"] for token in output["tokens"] if "end" not in token) == texts[name]
    return examples, (
        f"The outputs were encoded again from their texts: {same} of {len(rows) * len(shown)} give the same text back, "
        f"and one of {cap} tokens or more counts as cut by the cap. A token's reward is its score by the reward model, "
        f"less {s.length_penalty:g} beyond the reference's length{', without the cost of KL' if s.kl_coef else ''}. "
        + (f"Advantages: equation 2, gamma {s.gamma:g}, lambda {s.lam:g}." if "value" in adapters else
           "There is no value model in this run.")
    )  # fmt: skip


def tokens_of(tokenizer, texts, raw, cap):
    """{name: {"tokens": [{"id", "text"}], "cut"}}: texts as token ids, EOS behind those that the cap did not cut.

    raw: the same before cleaning: what cleaning has shortened at its end was not cut there by the cap.
    """
    outputs = {}
    for name, text in texts.items():
        cut = (
            name != "reference" and len(tokenizer.encode(raw[name])) >= cap and raw[name].strip().endswith(text.strip())
        )
        ids, tokens, done = tokenizer.encode(text), [], ""
        for t in range(1, len(ids) + 1):
            now = tokenizer.decode(ids[:t])  # a character of several tokens stands with its last
            whole = now.startswith(done) and (t == len(ids) or not now.endswith("\ufffd"))
            tokens.append({"id": ids[t - 1], "text": now[len(done) :] if whole else ""})
            done = now if whole else done
        tokens += [{"id": tokenizer.eos, "text": "EOS", "end": True}] * (not cut)
        outputs[name] = {"tokens": tokens, "cut": cut}
    return outputs


def add_numbers(s, llama, prompt, outputs, adapters):
    """Give the tokens of all outputs of one prompt the numbers that PPO, with settings s, would learn from."""
    reference = len(outputs["reference"]["tokens"])
    rows = [data.Datum("", "", "", prompt, [token["id"] for token in o["tokens"]]) for o in outputs.values()]
    batch = data.collate(rows, llama.device)
    batch = replace(batch, ref_len=torch.full_like(batch.ref_len, reference))
    with torch.inference_mode():
        score = value = ppo.judge(llama, batch)  # (B, T); the value, where there is one, is of the state before
        if "value" in adapters:
            h = llama(batch.tokens, "value")  # (B, T, C)
            value = ppo.fill(batch.mask, llama.scalar(ppo.before(h, batch.mask), "value"))  # (B, T)
        traj = ppo.trajectory(batch, value, value, score, s.gamma, s.lam, s.length_penalty, s.reward_clamp)
    penalty = ppo.length_penalty(batch, s.length_penalty)
    found = {"reward": traj.reward, "score": score, "penalty": penalty, "return": traj.ret}
    found |= {"value": value, "advantage": traj.adv} if "value" in adapters else {}
    for b, output in enumerate(outputs.values()):
        output["reference"] = reference
        for name, numbers in found.items():
            for token, x in zip(output["tokens"], numbers[b][batch.mask[b]].tolist(), strict=True):
                token[name] = x


def answer(settings, text):
    """Print the output for one input."""
    text = data.clean(text if text is not None else sys.stdin.read())
    if not text or not data.encodable(text):
        raise UserError("no text to summarise, or not UTF-8; give it as an argument or on standard input")
    llama, tokenizer = open_base(settings)
    adapter = load_answerer(settings, llama, settings.adapter)
    if settings.dry_run:
        return plan(settings, llama, [])
    prompt, most = tokenizer.prompts([text])[0], llama.config.max_position_embeddings
    if len(prompt) > most:
        raise UserError(f"text and template are {len(prompt)} tokens, the model reads {most}; shorten the text")
    draw = generator(settings, "sample", device=settings.device)
    response = model.sample(
        llama, [prompt], adapter, settings.max_new_tokens, settings.temperature, draw, settings.top_k, settings.top_p
    )
    say(tokenizer.decode(response[0]))


def merge(settings):
    """Base and adapter as one fp16 Hugging Face folder, for tools that know no adapters and no GPTQ."""
    with stage_folder(settings, "merge") as folder:
        llama, tokenizer = open_base(settings, torch.float16)
        llama.hash = ""  # an adapter trained over the 4-bit form may be folded into the model that this was made from
        llama.load_adapter("merged", adapter_folder(settings, settings.adapter))
        if settings.dry_run:
            return plan(settings, llama, [], ["merged"])
        model.merge(llama, "merged")
        save_model(settings, llama, tokenizer, folder)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {  # name: (settings, function, one line)
    "pretrain": (Pretrain, pretrain, "a tiny Llama from scratch on --data, tokenizer included"),
    "quantize": (Quantize, quantize, "any fp16 or fp32 Llama folder to 4 bits by GPTQ"),
    "reward": (Reward, train_reward, "the token-level reward model (paper, 3.2)"),
    "mle": (Mle, train_mle, "the maximum-likelihood control (paper, 3.4)"),
    "ppo": (Ppo, train_ppo, "policy and value by PPO (paper, 3.3)"),
    "eval": (Eval, evaluate, "predictions and scores of base, mle and policy"),
    "tables": (Tables, show_tables, "the paper's Tables 1 and 2, ours beside the paper's"),
    "report": (Report, write_report, "one HTML page: curves, tables, lengths, outputs token by token"),
    "merge": (Merge, merge, "base and adapter as one fp16 model folder"),
    "sample": (Sample, answer, "the summary of a text, given as an argument or on standard input"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the whole usage
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            flags = {"--" + f.name.replace("_", "-") for settings, *_ in COMMANDS.values() for f in fields(settings)}
            near = difflib.get_close_matches(unknown[1], flags, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {message}; see: python {self.prog} --help\n")


def out_of_range(f, value):
    """What is wrong with a setting's value, or "": it must be finite, within its limits, and one of its choices."""
    low, above, high = (f.metadata["limits"][name] for name in ("least", "above", "most"))
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        return f"none of {', '.join(f.metadata['choices'])}"
    if f.type in (str, bool):
        return "text with a NUL in it" if value and "\0" in str(value) else ""
    wanted = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
    wanted += [f"at most {high}"] * (high is not None)
    inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    return "" if -math.inf < value < math.inf and inside else f"out of range: must be finite, {' and '.join(wanted)}"


def converter(f):
    """What argparse makes of a flag's text."""

    def convert(text):
        value = f.type(text)
        if problem := out_of_range(f, value):
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    convert.__name__ = {int: "whole number", float: "number", str: "text"}[f.type]  # "invalid number value: 'x'"
    return convert


def read_settings(file, command, between=()):
    """The settings that a file holds for a command: a stage's config.json, or TOML.

    In TOML, keys before the first table are for every command that has such a setting, those in [ppo] for ppo alone.
    between: settings that go before the former, and behind the latter.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        raw = json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError or UnicodeDecodeError is a ValueError
        raise UserError(f"{file}: unreadable settings: {error}; mend the file") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: unreadable settings: not a JSON object; mend the file")
    if file.endswith(".json"):  # the first two are no settings, the others were about that run alone
        raw = {name: value for name, value in raw.items() if name not in ("stage", "commit", "overwrite", "resume")}
    tables = {name: table for name, table in raw.items() if isinstance(table, dict)}
    tables[""] = {name: value for name, value in raw.items() if name not in tables}
    known = {name: {f.name: f for f in fields(settings)} for name, (settings, *_) in COMMANDS.items()}
    known[""] = {name: f for stage in known.values() for name, f in stage.items()}
    found = {table: {} for table in known}
    for table, values in tables.items():
        if table not in known:
            raise UserError(f"{file}: no command [{table}]; tables are named {', '.join(COMMANDS)}")
        for key, value in values.items():
            name, where = key.replace("-", "_"), f"{file}: {f'[{table}] ' if table else ''}{key}"
            f = known[table].get(name)
            if f is None:
                near = difflib.get_close_matches(name, known[table], 1)
                raise UserError(f"{where}: no such setting{f'; did you mean {near[0]}?' if near else ''}")
            if name in found[table]:
                raise UserError(f"{where}: given twice, with a dash and with an underscore; remove one")
            if f.type is float and type(value) is int:
                value = float(str(value))  # inf, and so out of range, where it is too large
            if type(value) is not f.type:
                raise UserError(f"{where}: {value!r} is not of type {f.type.__name__}")
            if problem := out_of_range(f, value):
                raise UserError(f"{where}: {value!r} is {problem}")
            found[table][name] = value
    return {name: value for name, value in found[""].items() if name in known[command]} | dict(between) | found[command]


def dashed(argument):
    """--batch_size=7 -> --batch-size=7; what is no flag stays."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def parse(arguments):
    """(command, settings, text): what the command line says, and for the rest the toy's or the paper's defaults."""
    parser = Parser(prog="lastmile.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (settings, _, line) in COMMANDS.items():
        command = commands.add_parser(
            name, help=line, description=line, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        if name == "sample":
            command.add_argument("text", nargs="?", help="the text [standard input]")
        for f in fields(settings):
            help, toy = f.metadata["help"], f.metadata["toy"]
            if f.metadata["choices"]:
                help += f" {{{','.join(f.metadata['choices'])}}}"
            if f.default != "":
                help += f" [{f.default}{'' if toy is None else f'; toy: {toy}'}]"
            help = help.replace("%", "%%")
            flag = "--" + f.name.replace("_", "-")
            if f.name == "resume":
                command.add_argument(flag, nargs="?", const="auto", help=help, metavar="PATH")
            elif f.type is bool:
                command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
            else:
                command.add_argument(flag, type=converter(f), help=help, metavar="X")
    given = vars(parser.parse_args([dashed(argument) for argument in arguments]))
    command, text = given.pop("command"), given.pop("text", None)
    if given.get("config"):
        given = read_settings(given["config"], command) | given
    return command, resolve(command, given), text


def resolve(command, given):
    """Settings from the flags given; what depends on the data, the run's folder or the machine is filled in."""
    settings = COMMANDS[command][0]
    if given.get("data", "toy") == "toy":
        given = {f.name: f.metadata["toy"] for f in fields(settings) if f.metadata["toy"] is not None} | given
    if given.get("data") == "xsum":  # paper, 4.2
        sizes = {"train_examples": 15000, "test_examples": 3000}
        given = {name: size for name, size in sizes.items() if name in settings.__dataclass_fields__} | given
    s = settings(**given)
    output = Path(s.output_dir or Path("runs") / Path(s.data).stem)
    base = output / ("pretrain" if command == "quantize" else "base")
    found = {"output_dir": str(output), "model": s.model or str(base if s.data == "toy" or base.exists() else LLAMA2)}
    if command == "ppo":
        found["reward"] = s.reward or str(output / "reward")
    for name in filter(None, getattr(s, "report_to", "").split(",")):
        if name not in ("tensorboard", "wandb"):
            raise UserError(f"--report-to {s.report_to}: choose tensorboard, wandb, or tensorboard,wandb")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: it is not installed; run: .venv/bin/pip install {name}")
    cuda = torch.cuda.is_available()
    if s.device.startswith("cuda") and not cuda:
        raise UserError(f"--device {s.device}: this machine shows no GPU; use --device cpu")
    if s.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {s.device}: choose cpu, cuda or auto")
    found["device"] = s.device if s.device != "auto" else "cuda" if cuda else "cpu"
    found["dtype"] = s.dtype if s.dtype != "auto" else "bfloat16" if found["device"] == "cuda" else "float32"
    return replace(s, **found)


GO_ON = "if a training had begun, the same command with --resume goes on with it"


def diagnosis(error):
    """(exit code, what to say) of an error that is not a bug of this program; None for one that is."""
    if isinstance(error, KeyboardInterrupt | Stopped):
        number = getattr(error, "signal", signal.SIGINT)
        return 128 + number, f"stopped; {GO_ON}"
    if isinstance(error, FloatingPointError):
        return 3, error
    if isinstance(error, MemoryError) or re.search("out of memory|(can't|cannot) allocate memory", str(error), re.I):
        return 4, ("out of memory; a smaller --micro-batch-size changes no result, a smaller --batch-size, "
                   "--max-input-tokens or --max-new-tokens does; --dry-run estimates the need")  # fmt: skip
    if isinstance(error, OSError):
        told = f"{error.filename}: {error.strerror}" if error.filename else error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
        return (1, f"{told}; once that is mended, {GO_ON}") if full else (2, told)
    return (2, error) if isinstance(error, UserError) else None


def main(arguments=None):
    over = []  # not empty once the outcome is settled: from then on a signal has nothing to stop

    def stop(number, frame):
        if not over:
            raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)  # outside of trainings, which finish their step first
    with redirect_stdout(Stream(sys.stdout)), redirect_stderr(Stream(sys.stderr)):
        try:
            command, settings, text = parse(sys.argv[1:] if arguments is None else arguments)
            run = COMMANDS[command][1]
            if settings.device == "cpu":
                model.prefer_onednn()
            run(settings, text) if command == "sample" else run(settings)
            over.append(0)
            return 0
        except (Exception, KeyboardInterrupt, Stopped) as error:
            over.append(error)
            found = diagnosis(error)
            if found is None or os.environ.get("LASTMILE_TRACEBACK"):
                raise
            line = visible(" ".join(str(found[1]).split()))
            line = line if len(line) < 1000 else f"{line[:600]} … {line[-300:]}"  # it may quote what it was given
            say(f"lastmile.py: {line}", file=sys.stderr)
            return found[0]
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
