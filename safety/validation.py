"""Validation while training: numbers on the validation split, and which of them says that an adapter is the best.

Every of_… returns None where --eval-every is 0, as in the paper, else a function without arguments that validates once
and returns {metric: number}; its attribute `rows` are the rows. Nothing random is in it: a run with it makes the same
updates.

Dimensions: B batch, T time.
"""

from dataclasses import dataclass
from functools import partial

import torch

import data
import eval as evaluation
import model
import ppo
from safety import ranks
from speed import shared_prompts

BEST = {
    "reward": ("val_loss", min),
    "mle": ("val_loss", min),
    "ppo": ("val_return", max),
}  # what --keep best keeps


@dataclass(frozen=True)
class Validation:
    """validate() -> {metric: number}; rows: list of Datum that it is measured on, part of what a result depends on."""

    rows: list
    measure: callable  # rows -> {metric: number}

    def __call__(self):
        return self.measure(self.rows)


def of_reward(settings, llama, rows):
    """Loss and AUC of each class on held-out rows, negatives included."""
    return Validation(rows, partial(validate_reward, settings, llama)) if settings.eval_every else None


def of_mle(settings, llama, rows):
    """Loss, the mean over all output tokens."""
    return Validation(rows, partial(validate_mle, settings, llama)) if settings.eval_every else None


def of_ppo(settings, llama, tokenizer, score, rows):
    """Return, ROUGE and excess length of greedy outputs. score: see interface.inputs.open_reward."""
    return Validation(rows, partial(validate_ppo, settings, llama, tokenizer, score)) if settings.eval_every else None


def validate_reward(settings, llama, rows):
    scores, _, loss = heldout_scores(settings, llama, rows)
    numbers = {"val_loss": loss}
    for kind, values in scores.items():
        if kind != "positive":
            numbers[f"val_auc_{kind}"] = evaluation.auc(scores["positive"], values)
    return numbers


@torch.no_grad()
def validate_mle(settings, llama, rows):
    total = tokens = 0
    for batch in batches(settings, rows):
        logp = ranks.whole(ppo.response_logp(llama, ranks.share(batch)[0], "mle"), len(batch.rows))  # (B, T)
        total -= logp.sum().item()
        tokens += batch.mask.sum().item()
    return {"val_loss": total / tokens}


@torch.no_grad()
def validate_ppo(settings, llama, tokenizer, score, rows):
    limit = settings.max_new_tokens
    sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=limit, temperature=0, with_logp=True)
    total = 0.0
    texts = []
    for batch in batches(settings, rows):
        batch = ppo.rollout(batch, ranks.sharded(sampler))
        reward = ranks.whole(score(ranks.share(batch)[0]), len(batch.rows))  # (B, T)
        total += ppo.token_rewards(batch, reward, settings.length_penalty, settings.reward_clamp).sum().item()
        texts += [tokenizer.decode(row.response) for row in batch.rows]
    numbers = {"val_return": total / len(rows)}
    scores = evaluation.metrics(texts, [row.target for row in rows])
    return numbers | {f"val_{name}": scores[name] for name in ("la-rouge1-F1", "excess_length")}


def batches(settings, rows):
    """The rows in batches, in their order."""
    for start in range(0, len(rows), settings.batch_size):
        yield data.collate(rows[start : start + settings.batch_size], settings.device)


def heldout_scores(settings, llama, rows):
    """(scores, spans, loss) of rows with their negatives.

    scores: {class: the mean score of each row}. spans: {class: (mean of the true tokens, mean of the false ones) of
    each row}. loss: the reward loss of all rows.
    """
    scores = {}
    spans = {}
    loss = 0.0
    truth = None
    for start in range(0, len(rows), 32):
        batch = data.collate(rows[start : start + 32], settings.device)
        part, _ = ranks.share(batch)
        layout = shared_prompts.lay_out(part) if settings.share_prompts else None
        with torch.inference_mode():
            score = ppo.token_scores(llama, part, layout)
        score = ranks.whole(score, len(batch.rows))  # (B, T)
        loss += ppo.reward_loss(score, batch, settings.level).item() * batch.weight.sum().item()
        scored = ppo.scored_tokens(batch.mask, settings.level)  # (B, T)
        means = torch.where(scored, score, 0).sum(1) / scored.sum(1)  # (B,)
        for b, row in enumerate(batch.rows):
            scores.setdefault(row.kind, []).append(means[b].item())
            tokens = score[b][batch.mask[b]]  # (n,)
            if row.kind == "positive":
                truth = tokens  # its negatives follow it
            elif row.judged is not None:  # an edit, whose place in the truth is known
                span = row.judged[0], row.judged[-1] + 1
                spans.setdefault(row.kind, []).append(span_means(truth, tokens, span))
    return scores, spans, loss / sum(row.weight for row in rows)


def span_means(truth, tokens, span):
    """Mean scores (of the truth in the place of an edit, of the edit); truth, tokens (n,): scores of both responses."""
    start, end = span
    end_in_truth = len(truth) - (len(tokens) - end)  # both end with the same tokens
    place = truth[start : max(start + 1, end_in_truth)]
    return place.mean().item(), tokens[start:end].mean().item()
