"""Validation while training: numbers on the validation split, and which of them says that an adapter is the best.

Every of_… returns None where --eval-every is 0, as in the paper, else a function without arguments that validates once
and returns {metric: number}; its attribute `rows` are the rows. Nothing random is in it: a run with it makes the same
updates.

Dimensions: B batch, T time.
"""

from functools import partial

import torch

import data
import eval as evaluation
import model
import ppo
from training import ranks
from training.inputs import load_rows
from training.reward_report import heldout_scores

BEST = {
    "reward": ("val_loss", min),
    "mle": ("val_loss", min),
    "ppo": ("val_return", max),
    "group": ("val_la-rouge1-F1", max),
}  # what --keep best keeps


def on_rows(rows, function, *arguments):
    """function(*arguments, rows), to be called later."""
    call = partial(function, *arguments, rows)
    call.rows = rows
    return call


def of_reward(settings, llama, rows):
    """Loss and AUC of each class on held-out rows, negatives included."""
    return on_rows(rows, validate_reward, settings, llama) if settings.eval_every else None


def validate_reward(settings, llama, rows):
    scores, _, loss = heldout_scores(settings, llama, rows)
    numbers = {"val_loss": loss}
    for kind, values in scores.items():
        if kind != "positive":
            numbers[f"val_auc_{kind}"] = evaluation.auc(scores["positive"], values)
    return numbers


def of_mle(settings, llama, tokenizer):
    """Loss, the mean over all output tokens."""
    if not settings.eval_every:
        return None
    rows = load_rows(settings, "validation", llama, tokenizer, settings.eval_examples, settings.eos_in_labels)
    return on_rows(rows, validate_mle, settings, llama)


@torch.no_grad()
def validate_mle(settings, llama, rows):
    total = tokens = 0
    for batch in batches(settings, rows):
        logp = ranks.whole(ppo.response_logp(llama, ranks.share(batch), "mle"), len(batch.rows))  # (B, T)
        total -= logp.sum().item()
        tokens += batch.mask.sum().item()
    return {"val_loss": total / tokens}


def of_ppo(settings, llama, tokenizer, score):
    """Return, ROUGE and excess length of greedy outputs. score: see training.inputs.open_reward."""
    if not settings.eval_every:
        return None
    rows = load_rows(settings, "validation", llama, tokenizer, settings.eval_examples)
    return on_rows(rows, validate_ppo, settings, llama, tokenizer, score)


@torch.no_grad()
def validate_ppo(settings, llama, tokenizer, score, rows):
    limit = settings.max_new_tokens
    sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=limit, temperature=0, with_logp=True)
    total = 0.0
    texts = []
    for batch in batches(settings, rows):
        batch = ppo.rollout(batch, ranks.sharded(sampler))
        reward = ranks.whole(score(ranks.share(batch)), len(batch.rows))  # (B, T)
        total += ppo.token_rewards(batch, reward, settings.length_penalty, settings.reward_clamp).sum().item()
        texts += [tokenizer.decode(row.response) for row in batch.rows]
    numbers = {"val_return": total / len(rows)}
    scores = evaluation.metrics(texts, [row.target for row in rows])
    return numbers | {f"val_{name}": scores[name] for name in ("la-rouge1-F1", "excess_length")}


def batches(settings, rows):
    """The rows in batches, in their order."""
    for start in range(0, len(rows), settings.batch_size):
        yield data.collate(rows[start : start + settings.batch_size], settings.device)
