"""Validation while training: numbers on the validation split, and which of them says that an adapter is the best.

Each of_* returns a validator, or None if --eval-every is 0, as in the paper. Nothing random is in it: a run that
validates makes the same updates. `reward_report` judges a reward model that is trained.

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
from safety.terminal import say
from speed import shared_prompts

BEST = {"reward": ("val_loss", min), "mle": ("val_loss", min), "ppo": ("val_return", max)}  # what --keep best keeps


@dataclass(frozen=True)
class Validator:
    """validator() -> {metric: number} of its rows, a list of Datum, on which a result of --keep best depends."""

    rows: list
    measure: callable  # rows -> {metric: number}

    def __call__(self):
        with torch.no_grad():
            return self.measure(self.rows)


def of_reward(settings, llama, rows):
    """Loss and AUC of each class on held-out rows, negatives included."""

    def measure(rows):
        scores, _, loss = heldout_scores(settings, llama, rows)
        negatives = {kind: values for kind, values in scores.items() if kind != "positive"}
        aucs = {f"val_auc_{kind}": evaluation.auc(scores["positive"], values) for kind, values in negatives.items()}
        return {"val_loss": loss} | aucs

    return Validator(rows, measure) if settings.eval_every else None


def of_mle(settings, llama, rows):
    """Loss, the mean over all output tokens."""

    def measure(rows):
        total = tokens = 0
        for batch in batches(settings, rows):
            logp = ranks.whole(ppo.response_logp(llama, ranks.share(batch)[0], "mle"), len(batch.rows))  # (B, T)
            total -= logp.sum().item()
            tokens += batch.mask.sum().item()
        return {"val_loss": total / tokens}

    return Validator(rows, measure) if settings.eval_every else None


def of_ppo(settings, llama, tokenizer, score, rows):
    """Return, ROUGE and excess length of greedy outputs. score: see interface.inputs.open_reward."""
    s = settings
    sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=s.max_new_tokens, temperature=0)
    sampler = ranks.sharded(partial(sampler, with_logp=True))

    def measure(rows):
        total = 0.0
        texts = []
        for batch in batches(s, rows):
            batch = ppo.rollout(batch, sampler)
            reward = ranks.whole(score(ranks.share(batch)[0]), len(batch.rows))  # (B, T)
            total += ppo.token_rewards(batch, reward, s.length_penalty, s.reward_clamp).sum().item()
            texts += [tokenizer.decode(row.response) for row in batch.rows]
        scores = evaluation.metrics(texts, [row.target for row in rows])
        scores = {f"val_{name}": scores[name] for name in ("la-rouge1-F1", "excess_length")}
        return {"val_return": total / len(rows)} | scores

    return Validator(rows, measure) if s.eval_every else None


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
            elif row.judged:  # a hallucination with a span
                span = row.judged[0], row.judged[-1] + 1
                spans.setdefault(row.kind, []).append(span_means(truth, tokens, span))
    return scores, spans, loss / sum(row.weight for row in rows)


def reward_report(settings, llama, rows):
    """Print held-out scores and return them: {class: {"mean", "auc": of positives against it}}.

    A hallucination with a span also has the mean of its span, and the AUC of the truth's tokens in that place.
    """
    scores, spans, _ = heldout_scores(settings, llama, rows)
    report = {kind: {"mean": sum(values) / len(values)} for kind, values in scores.items()}
    for kind in scores.keys() - {"positive"}:
        report[kind]["auc"] = evaluation.auc(scores["positive"], scores[kind])
    for kind, pairs in spans.items():
        true, false = zip(*pairs, strict=True)
        report[kind] |= {"span_mean": sum(false) / len(false), "span_auc": evaluation.auc(true, false)}
    columns = {"mean": "mean score", "auc": "AUC of positives against it"}
    if spans:
        columns |= {"span_mean": "mean of the span", "span_auc": "AUC of the truth in its place"}
    lines = [["class", *columns.values()]]
    for kind, numbers in report.items():
        lines.append([kind] + [f"{numbers[name]:.3f}" if name in numbers else "" for name in columns])
    say(f"\nheld out, {len(scores['positive'])} validation examples:\n{evaluation.markdown(lines)}")
    return report


def span_means(truth, tokens, span):
    """Mean scores (of the truth in the place of an edit, of the edit); truth, tokens (n,): scores of both responses."""
    start, end = span
    end_in_truth = len(truth) - (len(tokens) - end)  # both end with the same tokens
    place = truth[start : max(start + 1, end_in_truth)]
    return place.mean().item(), tokens[start:end].mean().item()
