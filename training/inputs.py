"""What a stage works on: the base with its tokenizer, the rows of a split, and the adapters of other stages."""

import math
from dataclasses import fields
from pathlib import Path

import torch

import data
import model
import ppo
from beyond import reward_function
from beyond.full import FullLlama
from formats import peft_adapter
from formats.errors import UserError
from formats.files import read_json, read_text
from formats.hub import fetch, on_hub
from formats.llama_folder import is_model
from formats.tables import PRESETS
from training.checkpoint import adapter_hash, model_hash
from training.files import digest
from training.folders import require, settings_file
from training.settings import LORA, Reward
from training.terminal import say, warn

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "template.txt", "vocab.txt", "merges.txt", "README.md"]
MAKERS = {"base": "quantize", "pretrain": "pretrain"}  # folder of a run: the command that makes the model in it


def generator(settings, *stream, device="cpu"):
    """The random numbers of one named stream, a pure function of --seed and the name."""
    return torch.Generator(device).manual_seed(data.stream_seed(settings.seed, *stream))


# ----------------------------------------------------------------------------------------------------------------------
# The base


def base_folder(settings):
    """The local folder of --model: of this run, a path, or a model of the Hub, downloaded where it is not cached."""
    path = Path(settings.model)
    if path.parent == Path(settings.output_dir) and path.name in MAKERS:
        return require(path, MAKERS[path.name], settings)
    hub = on_hub(settings.model)
    return fetch(*hub, MODEL_FILES, "model") if hub else path


def open_base(settings, dtype=None):
    """(llama, tokenizer): the frozen base with its tokenizer. Under --dry-run without its weights."""
    folder = base_folder(settings)
    dtype = dtype or getattr(torch, settings.dtype)
    llama = model.load(folder, settings.device, dtype, weights=not settings.dry_run, kind=FullLlama)
    tokenizer = data.load_tokenizer(folder, settings.template)
    check_tokenizer(folder, tokenizer, llama.config)
    if not settings.template:
        warn_of_other_template(folder, tokenizer)
    llama.add_eos(tokenizer.eos)  # a template may end answers with a token of its own
    llama.recompute = getattr(settings, "grad_checkpoint", False)
    llama.hash = "" if settings.dry_run else model_hash(folder)
    llama.template = tokenizer.template
    return llama, tokenizer


def check_tokenizer(folder, tokenizer, config):
    """Refuse a tokenizer whose texts or prompts have ids that the model lacks, or another EOS.

    Tokens that neither contains may lie beyond the model's: a padding token that someone added later.
    """
    size = max(tokenizer.text_size - 1, *tokenizer.ids_of_prompts()) + 1
    other_eos = tokenizer.own_eos and tokenizer.eos not in config.eos_token_id
    if size > config.vocab_size or other_eos:
        raise UserError(
            f"{folder}: the tokenizer ({size} pieces, EOS {tokenizer.eos}) does not match config.json "
            f"({config.vocab_size}, EOS {config.eos_token_id}); download the model again"
        )


def warn_of_short_groups(settings, config):
    """Warn where --group-size does not divide a width: not every reader of GPTQ files takes a short last group."""
    heads = config.num_attention_heads * config.head_dim
    widths = sorted({config.hidden_size, config.intermediate_size, heads})
    odd = [str(width) for width in widths if settings.group_size > 0 and width % settings.group_size]
    if odd:
        fits = max(size for size in (8, 16, 32, 64, 128) if math.gcd(*widths) % size == 0 or size == 8)
        warn(
            f"--group-size {settings.group_size} does not divide width {', '.join(odd)}: the last group is short, and "
            f"other readers of GPTQ may refuse the file; --group-size {fits} fits"
        )


def warn_of_other_template(folder, tokenizer):
    """Warn where a model with a chat template of its own gets another prompt for want of a better."""
    for name, mark in data.MARKS.items():
        has_other = tokenizer.chat_template not in ("", "null") and mark not in tokenizer.chat_template
        if has_other and tokenizer.template == data.TEMPLATES[name][0]:
            warn(
                f"{folder}: its chat template is none that lastmile knows, the prompt is that of {name}; write its "
                f"form to a text file with {{source}} in it: --template FILE"
            )


# ----------------------------------------------------------------------------------------------------------------------
# The rows


def load_examples(settings, split):
    """One split as a list of Example: true outputs, and those that the data call bad (label 0)."""
    s = settings
    return data.load(s.data, split, s.input_column, s.target_column, s.negative_column, s.delimiter)


def load_rows(settings, split, llama, tokenizer, examples=0, append_eos=True, rejected=False):
    """One split as a list of Datum, length-filtered; where examples > 0, a random subset of that size.

    The limit of inputs is --max-input-tokens, or what the model's context leaves beside --max-new-tokens.
    rejected: keep outputs that the data call bad, from which only the reward model learns.
    """
    loaded = load_examples(settings, split)
    good = [example for example in loaded if example.label]
    bad = len(loaded) - len(good)
    if bad:
        say(f"{split}: {bad} outputs are labelled bad: {'negatives' if rejected else 'left to the reward model'}")
    if not good:
        raise UserError(f"{settings.data}: no {split} example has a good output; add some, or correct its labels")
    loaded = without_contradictions(loaded, split) if rejected else good
    limit = min(settings.max_input_tokens, context_left(settings, llama))
    kept, counts = data.encode(loaded, tokenizer, limit, settings.max_new_tokens, append_eos)
    dropped = len(loaded) - len(kept)
    duplicates = len(loaded) - len({(e.source, e.target) for e in loaded})
    say(
        f"{split}: {len(loaded)} examples, {dropped} dropped ({dropped / len(loaded):.1%}): {counts['long_input']} "
        f"with inputs over {limit} tokens, {counts['long_output']} with outputs over "
        f"{settings.max_new_tokens}{f'; {duplicates} duplicates' if duplicates else ''}"
    )
    good = [datum for datum in kept if datum.label]
    bad = [datum for datum in kept if not datum.label]
    some = subsample(settings, split, good, examples)
    if len(some) == len(good):
        return kept
    share = math.ceil(len(some) / len(good) * len(bad))
    return some + (subsample(settings, f"{split}, labelled bad", bad, share) if bad else [])


def without_contradictions(examples, split):
    """The examples without bad outputs that are also a good output of the same input; prints how many."""
    truths = {(example.source, example.target) for example in examples if example.label}
    kept = [e for e in examples if e.label or (e.source, e.target) not in truths]
    if len(kept) < len(examples):
        say(f"{split}: {len(examples) - len(kept)} bad outputs are also a good output of the same input: left out")
    return kept


def context_left(settings, llama):
    """How many tokens a prompt may have so that --max-new-tokens more fit into the model's context."""
    context = llama.config.max_position_embeddings
    if settings.max_new_tokens >= context:
        raise UserError(f"--max-new-tokens {settings.max_new_tokens}: the model reads {context} tokens; lower it")
    return context - settings.max_new_tokens


def subsample(settings, split, rows, examples):
    """A random subset of the rows, in their order; all of them where examples is 0."""
    if not rows:
        raise UserError(
            f"{settings.data}: no {split} example is short enough; raise --max-input-tokens or --max-new-tokens"
        )
    if not 0 < examples < len(rows):
        return rows
    say(f"{split}: a random subset of {examples}, seed {settings.seed}")
    order = torch.randperm(len(rows), generator=generator(settings, "examples", split))
    return [rows[i] for i in sorted(order[:examples].tolist())]


def warn_of_overlap(settings, rows):
    """Warn where test inputs of the user's own data are in the training split, too."""
    if settings.data in PRESETS:
        return
    try:
        train = load_examples(settings, "train")
    except FileNotFoundError:
        return  # a folder with a test split alone
    sources = {example.source for example in train}
    seen = sum(row.source in sources for row in rows)
    if seen:
        warn(f"{seen} test inputs are in the training split, too")


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def column_names(flag, value):
    """The names that a flag lists, each once, among base, mle and policy."""
    names = value.split(",")
    if not set(names) <= {"base", "mle", "policy"} or len(set(names)) < len(names):
        raise UserError(f"{flag} {value}: choose among base, mle and policy")
    return names


def adapter_folder(settings, name):
    """The folder of this run's mle or policy adapter, or the adapter folder that is named."""
    run = Path(settings.output_dir)
    stages = {"mle": ("mle", run / "mle"), "policy": ("ppo", run / "ppo" / "policy")}
    if name in stages:
        stage, folder = stages[name]
        return require(folder, stage, settings)
    if not (Path(name) / "adapter_config.json").is_file() and not is_model(name):
        raise FileNotFoundError(f"{name}: no adapter; name mle, policy, or a folder with an adapter_config.json")
    return Path(name)


def load_column(settings, llama, name, other="other"):
    """Load the adapter of base, mle, policy or a folder. Returns the adapter argument of forward.

    other: the name that the model gives to an adapter of a folder; a module's name cannot be a path.
    """
    if name == "base":
        return None
    adapter = name if name in ("mle", "policy") else other
    load_trained(llama, adapter, adapter_folder(settings, name))
    return adapter


def load_trained(llama, name, folder, head=False):
    """Load what a stage has saved, and refuse it where it has learned another prompt. head: as in load_adapter."""
    file = Path(folder) / "template.txt"
    if llama.template and file.is_file() and read_text(file, 1 << 16) != llama.template:
        raise UserError(f"{folder}: trained with another prompt than this one; add --template {file}")
    llama.load_adapter(name, folder, head)


def load_columns(settings, llama, names):
    """{name: adapter argument of forward} of the names or folders that --adapter lists, separated by commas."""
    found = {}
    for name in names.split(","):
        if name in found:
            raise UserError(f"--adapter {names}: {name} is named twice; remove one")
        found[name] = load_column(settings, llama, name, f"other{len(found)}")
    return found


def new_adapter(settings, llama, name, stream, head=None):
    """A fresh adapter of the stage's rank and targets; with --tune full a copy of the base in its place."""
    if settings.tune == "full":
        if llama.config.quantization:
            raise UserError(f"--tune full: {settings.model} is 4-bit; name an unquantized model, or use --tune lora")
        if settings.dtype == "float16":
            raise UserError("--tune full --dtype float16: gradients vanish without loss scaling; use bfloat16")
        return llama.add_copy(name, generator(settings, stream), head)
    targets = settings.lora_targets.split(",")
    llama.add_adapter(name, settings.lora_r, settings.lora_alpha, targets, generator(settings, stream), head)


def start_adapter(settings, llama, name, stream, head=None):
    """The adapter that a stage trains: new, or a copy of the one that --init names. Returns {what: hash} of that one.

    head: None, or how a scalar head starts, where the adapter of --init has none.
    """
    if settings.init == "base":
        new_adapter(settings, llama, name, stream, head)
        return {}
    folder = adapter_folder(settings, settings.init)
    if is_model(folder) and settings.tune == "lora":
        raise UserError(f"--init {settings.init}: is a whole model; add --tune full, or name an adapter")
    if not is_model(folder) and settings.tune == "full":
        raise UserError(f"--init {settings.init}: is an adapter, and --tune full needs a whole model; merge it first")
    saved_head = head is not None and peft_adapter.has_head(folder)
    load_trained(llama, name, folder, saved_head)
    if head is not None and not saved_head:
        llama.add_head(name, head, generator(settings, stream, "head"))
    if kept := [f.name for f in fields(settings) if f.name in LORA and getattr(settings, f.name) != f.default]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in kept)
        warn(f"--init {settings.init}: {name} keeps its rank, alpha and targets; without effect on it: {flags}")
    return {"init adapter": adapter_hash(folder)}


# ----------------------------------------------------------------------------------------------------------------------
# The reward


def open_reward(settings, llama, tokenizer, rows=()):
    """(score, depends_on) for --reward: score(batch) -> (B, T), the reward of every response token.

    The reward model of a folder, at the level it was trained for, or a Python function. depends_on: {name: hash} of
    what the scores depend on. The PPO loop and the report both score with this. rows: the data set; a function is tried
    on the first row, with the true output and with none, so that it fails here and not after hours of training.
    """
    if reward_function.is_function(settings.reward):
        function, file = reward_function.load(settings.reward, [row.target for row in rows])
        for row in rows[:1]:
            function(row.source, row.target, row.target)
            function(row.source, row.target, "")

        def score(batch):
            return reward_function.token_scores(function, batch, tokenizer.decode)

        return score, {"reward function": f"{settings.reward} {digest(file) if file else ''}"}
    if "," in settings.reward:
        scores, facts = [], {}
        for i, name in enumerate(settings.reward.split(",")):
            load_trained(llama, f"reward{i}", name, head=peft_adapter.has_head(Path(name)))
            scores.append(f"reward{i}")
            facts[f"reward adapter {i}"] = adapter_hash(Path(name))
        return lambda batch: sum(ppo.reward_scores(llama, batch, adapter=name) for name in scores) / len(scores), facts
    folder = Path(settings.reward)
    if not folder.exists():  # a dry run, before there is a reward model
        new_adapter(Reward(seed=settings.seed, tune=settings.tune), llama, "reward", "reward", head="normal")
        return None, {}
    level, head = reward_fact(folder, "level"), "scalar" if peft_adapter.has_head(folder) else "likelihood"
    load_trained(llama, "reward", folder, head=head == "scalar")

    def score(batch):
        return ppo.reward_scores(llama, batch, level)

    facts = {"reward adapter": adapter_hash(folder), "reward level": level}
    return score, facts | ({"reward head": head} if head != "scalar" else {})


def reward_fact(folder, name):
    """What config.json says of the reward model of a folder; name: "level" or "head". Without one: the paper's."""
    choices = {f.name: f.metadata["choices"] for f in fields(Reward)}[name]
    file = settings_file(folder)
    found = read_json(file).get(name, choices[0]) if file.is_file() else choices[0]
    if found not in choices:
        raise UserError(f"{file}: {name} {found!r} is neither {' nor '.join(choices)}; correct the file")
    return found
