"""Samples of base, mle and policy as negatives: valid but poor outputs, which the five classes do not contain.

`reward --samples base,mle --rounds 2`. SPIN (arXiv 2401.01335), TextGAIL (arXiv 2004.13796).
"""

from collections import Counter
from functools import partial

import data
import eval as evaluation
import model
from beyond import hallucinations
from training.inputs import generator
from training.settings import Eval
from training.terminal import progress, say


def with_negatives(settings, llama, tokenizer, samplers, rows, split, round=0):
    """The rows with the negatives of one round. samplers: {name: adapter} whose samples are more negatives."""
    seed = data.stream_seed(settings.seed, "round", round) if round else settings.seed
    samples = {}
    for name, adapter in samplers.items():
        if settings.dry_run:
            samples[f"{name}_sample"] = [[0] * settings.max_new_tokens] * len(rows)
            continue
        rng = generator(settings, "samples", split, name, round, device=settings.device)
        sampler = partial(model.sample, llama, adapter=adapter, max_new_tokens=settings.max_new_tokens, generator=rng)
        bar = progress(f"reward: samples of {name}")
        samples[f"{name}_sample"] = evaluation.predict(rows, sampler, Eval.batch_size, list, bar)
    return data.with_negatives(rows, tokenizer, settings.max_new_tokens, seed, settings.hallucinations, samples)


def say_missing(settings, rows, columns):
    """Print how many rows have no negative of a class, and why."""
    reasons = dict.fromkeys(data.NEGATIVES, "the output is one word")
    if settings.hallucinations != "off":
        reasons["hallucinated"] = "no kind of edit fits the output"
    for name in columns:
        reasons[f"{name}_sample"] = "the sample is the true output"
    made = Counter("hallucinated" if row.kind in hallucinations.KINDS else row.kind for row in rows)
    for kind, reason in reasons.items():
        missing = made["positive"] - made[kind]
        if missing:
            say(f"negatives: {missing} examples have no {kind} negative: {reason}")
