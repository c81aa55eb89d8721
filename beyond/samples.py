"""Negatives beyond the five classes: edits of the truth, and samples of base, mle and policy, valid but poor outputs.

`reward --hallucinations span`, `reward --samples base,mle --rounds 2`. SPIN (arXiv 2401.01335), TextGAIL (arXiv
2004.13796).
"""

from collections import Counter
from functools import partial

import data
import eval as evaluation
import model
from beyond import hallucinations
from formats.errors import UserError
from safety.terminal import progress, say

BATCH_SIZE = 32  # rows a sampling batch


def add_negatives(settings, llama, tokenizer, samplers, keep, rows, split, round=0):
    """The rows with the negatives of one round. samplers: {name: adapter} whose samples are more negatives.

    keep: (name, rows, file's name, make) -> make(), or what it returned before the run was stopped.
    """
    positives = [row for row in rows if row.label]
    seed = data.stream_seed(settings.seed, "round", round) if round else settings.seed
    samples = {}
    for name, adapter in samplers.items():
        if settings.dry_run:  # as long as they can be
            samples[f"{name}_sample"] = [[0] * settings.max_new_tokens] * len(positives)
            continue
        rng = data.generator(settings.seed, "samples", split, name, round, device=settings.device)
        sampler = partial(model.sample, llama, adapter=adapter, max_new_tokens=settings.max_new_tokens, generator=rng)
        bar = progress(f"reward: samples of {name}")
        make = partial(evaluation.predict, positives, sampler, BATCH_SIZE, list, bar)
        samples[f"{name}_sample"] = keep(name, positives, f"{split}-{round}-{name}", make)
    edit = None
    if settings.hallucinations != "off":
        edit = partial(hallucinations.hallucinated, whole=settings.hallucinations == "sequence")
    return data.with_negatives(rows, tokenizer, settings.max_new_tokens, seed, edit, samples)


def check_missing(settings, rows, names):
    """Print how many rows have no negative of a class, and why. Raises UserError where all outputs are one text.

    names: whose samples are negatives, too.
    """
    reasons = dict.fromkeys(data.NEGATIVES, "it would be the true output")
    reasons["shuffled"] = "the output is one word, or one word repeated"
    reasons["mismatched"] = "too many outputs are the same text"
    if settings.hallucinations != "off":
        reasons["hallucinated"] = "no kind of edit fits the output"
    for name in names:
        reasons[f"{name}_sample"] = "the sample is the true output"
    made = Counter("hallucinated" if row.kind in hallucinations.KINDS else row.kind for row in rows)
    if not made["mismatched"]:
        raise UserError(f"{settings.data}: all outputs are the same text: nothing to tell apart; add other examples")
    for kind, reason in reasons.items():
        missing = made["positive"] - made[kind]
        if missing:
            say(f"negatives: {missing} examples have no {kind} negative: {reason}")
