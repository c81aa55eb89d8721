"""What a stage works on: the base with its tokenizer, the rows of a split, and the adapters of other stages."""

import math
from functools import partial
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
from interface import trained_on
from interface.folders import require, settings_file
from interface.settings import LORA, changed
from interface.training_settings import Reward
from safety.checkpoint import adapter_hash, model_hash
from safety.files import digest
from safety.terminal import flag, say, warn

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "template.txt", "vocab.txt", "merges.txt", "README.md"]
MAKERS = {"base": "quantize", "pretrain": "pretrain"}  # folder of a run: the command that makes the model in it


def base_folder(settings):
    """The local folder of --model: of this run, a path, or a model of the Hub, downloaded unless it is cached."""
    path = Path(settings.model)
    if path.parent == Path(settings.output_dir) and path.name in MAKERS:
        return require(path, MAKERS[path.name], settings)
    hub = on_hub(settings.model)
    return fetch(*hub, MODEL_FILES, "model") if hub else path


def open_base(settings):
    """(llama, tokenizer): the frozen base with its tokenizer."""
    folder = base_folder(settings)
    llama = model.load(folder, settings.device, getattr(torch, settings.dtype), kind=FullLlama)
    tokenizer = data.load_tokenizer(folder, settings.template)
    check_tokenizer(folder, tokenizer, llama.config)
    llama.add_eos(tokenizer.eos)  # a template may end answers with a token of its own
    llama.recompute = getattr(settings, "grad_checkpoint", False)
    llama.hash = model_hash(folder)
    llama.template = tokenizer.template
    return llama, tokenizer


def check_tokenizer(folder, tokenizer, config):
    """Refuse a tokenizer whose texts or prompts have ids that the model lacks; warn of another EOS, which counts."""
    size = max(tokenizer.text_size - 1, *tokenizer.ids_of_prompts()) + 1
    if size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer ({size} pieces, EOS {tokenizer.eos}) does not match config.json "
            f"({config.vocab_size}, EOS {config.eos_token_id}); download the model again"
        )
    if tokenizer.own_eos and tokenizer.eos not in config.eos_token_id:
        ends = config.eos_token_id
        warn(f"{folder}: the tokenizer's EOS is {tokenizer.eos}, config.json's {ends}: each ends an output")


def warn_of_short_groups(settings, config):
    """Warn if --group-size does not divide a width: not every reader of GPTQ files takes a short last group."""
    heads = config.num_attention_heads * config.head_dim
    widths = sorted({config.hidden_size, config.intermediate_size, heads})
    odd = [str(width) for width in widths if settings.group_size > 0 and width % settings.group_size]
    if odd:
        warn(
            f"--group-size {settings.group_size} does not divide width {', '.join(odd)}: other readers of GPTQ may "
            f"refuse the file; name a divisor of {math.gcd(*widths)}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The rows


def load_examples(settings, split):
    """One split as a list of Example: true outputs, and those that the data call bad (label 0)."""
    s = settings
    return data.load(s.data, split, s.input_column, s.target_column, s.negative_column, s.delimiter)


def load_rows(settings, split, llama, tokenizer, examples=0, append_eos=True, rejected=False):
    """One split as a list of Datum, length-filtered; if examples > 0, a random subset of that size.

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
    say(
        f"{split}: {len(loaded)} examples, {dropped} dropped ({dropped / len(loaded):.1%}): {counts['long_input']} "
        f"with inputs over {limit} tokens, {counts['long_output']} with outputs over {settings.max_new_tokens}; "
        f"{len(loaded) - len({(e.source, e.target) for e in loaded})} duplicates"
    )
    good = [datum for datum in kept if datum.label]
    bad = [datum for datum in kept if not datum.label]
    some = subsample(settings, split, good, examples)
    if len(some) == len(good):
        return kept
    share = math.ceil(len(some) / len(good) * len(bad))
    return some + (subsample(settings, f"{split}, labelled bad", bad, share) if bad else [])


def validation_rows(settings, llama, tokenizer, append_eos=True):
    """The rows that --eval-every validates on; none if it is 0."""
    if not settings.eval_every:
        return []
    return load_rows(settings, "validation", llama, tokenizer, settings.eval_examples, append_eos)


def without_contradictions(examples, split):
    """The examples without bad outputs that are also a good output of the same input."""
    truths = {(e.source, e.target) for e in examples if e.label}
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
    """A random subset of the rows, in their order; all of them if examples is 0."""
    if not rows:
        limits = "--max-input-tokens or --max-new-tokens"
        raise UserError(f"{settings.data}: no {split} example is short enough; raise {limits}")
    if not 0 < examples < len(rows):
        return rows
    say(f"{split}: a random subset of {examples}, seed {settings.seed}")
    order = torch.randperm(len(rows), generator=data.generator(settings.seed, "examples", split))
    return [rows[i] for i in sorted(order[:examples].tolist())]


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def adapter_names(flag, value):
    """The names that a flag lists, each once, among base, mle and policy."""
    names = value.split(",")
    if not set(names) <= {"base", "mle", "policy"} or len(set(names)) < len(names):
        raise UserError(f"{flag} {value}: choose among base, mle and policy")
    return names


def adapter_folder(settings, name):
    """The folder of this run's mle or policy adapter, or the adapter folder that is named."""
    stages = {"mle": ("mle", "mle"), "policy": ("ppo", "ppo/policy")}
    if name in stages:
        stage, folder = stages[name]
        return require(Path(settings.output_dir) / folder, stage, settings)
    if not (Path(name) / "adapter_config.json").is_file() and not is_model(name):
        raise FileNotFoundError(f"{name}: no adapter; name mle, policy, or a folder with an adapter_config.json")
    return Path(name)


def adapter_hashes(settings, names):
    """{what: hash} of the adapters of this run that have these names."""
    return {f"{name} adapter": adapter_hash(adapter_folder(settings, name)) for name in names if name != "base"}


def load_named(settings, llama, name, other="other"):
    """Load the adapter of base, mle, policy or a folder, which is then called `other`. Returns forward's argument."""
    if name == "base":
        return None
    adapter = name if name in ("mle", "policy") else other
    load_trained(llama, adapter, adapter_folder(settings, name))
    return adapter


def load_trained(llama, name, folder, head=False, any_base=False):
    """Load what a stage has saved. Raises UserError if it has learned another prompt. For the rest see load_adapter."""
    file = Path(folder) / "template.txt"
    if llama.template and file.is_file() and read_text(file, 1 << 16) != llama.template:
        raise UserError(f"{folder}: trained with another prompt than this one; add --template {file}")
    llama.load_adapter(name, folder, head, any_base)


def load_listed(settings, llama, names):
    """{name: adapter argument of forward} of the names or folders that --adapter lists, separated by commas."""
    found = {}
    for name in names.split(","):
        if name in found:
            raise UserError(f"--adapter {names}: {name} is named twice; remove one")
        found[name] = load_named(settings, llama, name, f"other{len(found)}")
    return found


def warn_of_test_rows(settings, names, rows):
    """Warn if adapters, named as in --adapters, have learned from inputs that they are to be judged by."""
    folders = [adapter_folder(settings, name) for name in names if name != "base"]
    for folder in folders:
        if found := trained_on.seen(folder, rows, 0):
            warn(f"{folder}: trained on {found} of these {len(rows)} test inputs: its scores are too good")


def new_adapter(settings, llama, name, stream, head=None):
    """A fresh adapter of the stage's rank and targets; with --tune full a copy of the base in its place."""
    rng = data.generator(settings.seed, stream)
    if settings.tune == "full":
        if llama.config.quantization:
            raise UserError(f"--tune full: {settings.model} is 4-bit; name an unquantized model, or use --tune lora")
        return llama.add_copy(name, rng, head)
    llama.add_adapter(name, settings.lora_r, settings.lora_alpha, settings.lora_targets.split(","), rng, head)


def start_adapter(settings, llama, name, stream, rows, head=None):
    """Add the adapter that a stage trains on rows: new, or loaded from --init. Returns {what: hash} of --init's.

    head: None, or how a scalar head starts if the adapter of --init has none.
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
    trained_on.warn_of_other_data(folder, rows)
    if head is not None and not saved_head:
        llama.add_head(name, head, data.generator(settings.seed, stream, "head"))
    if kept := [flag(setting) for setting in changed(settings) if setting in LORA]:
        warn(f"--init {settings.init}: {name} keeps its own rank, alpha and targets; no effect: {', '.join(kept)}")
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
        score = partial(reward_function.word_scores, function, decode=tokenizer.decode)
        return score, {"reward function": f"{settings.reward} {digest(file) if file else ''}"}
    folder = Path(settings.reward)
    if settings.dry_run and not folder.exists():
        new_adapter(Reward(seed=settings.seed, tune=settings.tune), llama, "reward", "reward", head="normal")
        return partial(ppo.reward_scores, llama), {}
    require(folder, "reward", settings)
    level, head = reward_facts(folder)
    load_trained(llama, "reward", folder, head=head == "scalar")
    facts = {"reward adapter": adapter_hash(folder), "reward level": level}
    return partial(ppo.reward_scores, llama, level=level), facts | ({} if head == "scalar" else {"reward head": head})


def reward_facts(folder):
    """(--level, --head) of the reward model of a folder, by its config.json.

    Any other adapter scores by its likelihood, unless it has a scalar head.
    """
    file = settings_file(folder)
    found = read_json(file) if file.is_file() else {}
    is_reward_model = found.get("stage") == "reward" or peft_adapter.has_head(folder)
    found = {"level": "token", "head": "scalar" if is_reward_model else "likelihood"} | found
    for name, choices in ("level", ("token", "sequence")), ("head", ("scalar", "likelihood")):
        if found[name] not in choices:
            raise UserError(f"{file}: {name} {found[name]!r} is neither {' nor '.join(choices)}; correct the file")
    return found["level"], found["head"]
