"""Samples of base, mle and policy as negatives: valid but poor outputs, which the five classes do not contain.

`reward --samples base,mle --rounds 2`. SPIN (arXiv 2401.01335), TextGAIL (arXiv 2004.13796).
"""

from collections import Counter
from functools import partial

import data
import eval as evaluation
import model
from beyond import hallucinations
from formats.errors import UserError
from training.checkpoint import adapter_hash
from training.inputs import adapter_folder, generator, load_column, load_rows
from training.settings import Eval
from training.terminal import progress, say


def load_with_negatives(settings, llama, tokenizer, columns):
    """(rows to train on, of all rounds; held-out rows), each true output followed by its negatives.

    columns: of base, mle and policy those whose samples are negatives, too.
    """
    labelled = load_rows(settings, "train", llama, tokenizer, settings.train_examples, rejected=True)
    heldout = load_rows(settings, "validation", llama, tokenizer, settings.eval_examples, rejected=True)
    samplers = {name: load_column(settings, llama, name) for name in columns}
    rows = []
    for round in range(settings.rounds):
        rows += with_negatives(settings, llama, tokenizer, samplers, labelled, "train", round)
    heldout = with_negatives(settings, llama, tokenizer, samplers, heldout, "validation")
    check_missing(settings, rows, columns)
    return rows, heldout


def adapter_hashes(settings, columns):
    """{what: hash} of the adapters that the samples come from, for the fingerprint of the run."""
    return {f"{name} adapter": adapter_hash(adapter_folder(settings, name)) for name in columns if name != "base"}


def with_negatives(settings, llama, tokenizer, samplers, rows, split, round=0):
    """The rows with the negatives of one round. samplers: {name: adapter} whose samples are more negatives."""
    positives = [row for row in rows if row.label]
    seed = data.stream_seed(settings.seed, "round", round) if round else settings.seed
    samples = {}
    for name, adapter in samplers.items():
        if settings.dry_run:
            samples[f"{name}_sample"] = [[0] * settings.max_new_tokens] * len(positives)
            continue
        rng = generator(settings, "samples", split, name, round, device=settings.device)
        sampler = partial(model.sample, llama, adapter=adapter, max_new_tokens=settings.max_new_tokens, generator=rng)
        bar = progress(f"reward: samples of {name}")
        samples[f"{name}_sample"] = evaluation.predict(positives, sampler, Eval.batch_size, list, bar)
    return data.with_negatives(rows, tokenizer, settings.max_new_tokens, seed, settings.hallucinations, samples)


def check_missing(settings, rows, columns):
    """Print how many rows have no negative of a class, and why. Raises UserError where all outputs are one text."""
    reasons = dict.fromkeys(data.NEGATIVES, "it would be the true output")
    reasons["shuffled"] = "the output is one word, or one word repeated"
    reasons["mismatched"] = "too many outputs are the same text"
    if settings.hallucinations != "off":
        reasons["hallucinated"] = "no kind of edit fits the output"
    for name in columns:
        reasons[f"{name}_sample"] = "the sample is the true output"
    made = Counter("hallucinated" if row.kind in hallucinations.KINDS else row.kind for row in rows)
    if not made["mismatched"]:
        raise UserError(f"{settings.data}: all outputs are the same text: nothing to tell apart; add other examples")
    for kind, reason in reasons.items():
        missing = made["positive"] - made[kind]
        if missing:
            say(f"negatives: {missing} examples have no {kind} negative: {reason}")
