"""How well a reward model tells true outputs from each class of negatives, on held-out data.

Dimensions: B batch, T time, n response tokens of one row.
"""

import torch

import data
import eval as evaluation
import ppo
from beyond.hallucinations import KINDS
from speed import shared_prompts
from training import ranks
from training.terminal import say


def reward_report(settings, llama, rows):
    """Print held-out scores and return them: {class: {"mean", "auc": of positives against it}}.

    A hallucination with a span also has the mean of its span, and the AUC of the truth's tokens in that place.
    """
    scores, spans, _ = heldout_scores(settings, llama, rows)
    report = {kind: {"mean": sum(values) / len(values)} for kind, values in scores.items()}
    for kind in scores:
        if kind != "positive":
            report[kind]["auc"] = evaluation.auc(scores["positive"], scores[kind])
    for kind, pairs in spans.items():
        true, false = zip(*pairs, strict=True)
        report[kind]["span_mean"] = sum(false) / len(false)
        report[kind]["span_auc"] = evaluation.auc(true, false)
    show_reward_report(report, len(scores["positive"]), bool(spans))
    return report


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
        part = ranks.share(batch)
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
            elif row.judged and row.kind in KINDS:
                span = row.judged[0], row.judged[-1] + 1
                spans.setdefault(row.kind, []).append(span_means(truth, tokens, span))
    return scores, spans, loss / sum(row.weight for row in rows)


def span_means(truth, tokens, span):
    """Mean scores (of the truth in the place of an edit, of the edit); truth, tokens (n,): scores of both responses."""
    start, end = span
    end_in_truth = len(truth) - (len(tokens) - end)  # both end with the same tokens
    place = truth[start : max(start + 1, end_in_truth)]
    return place.mean().item(), tokens[start:end].mean().item()


def show_reward_report(report, n, has_spans):
    """Print the report as a table, a class a row."""
    columns = {"mean": "mean score", "auc": "AUC of positives against it"}
    if has_spans:
        columns |= {"span_mean": "mean of the span", "span_auc": "AUC of the truth in its place"}
    lines = [["class", *columns.values()]]
    for kind, numbers in report.items():
        lines.append([kind] + [f"{numbers[name]:.3f}" if name in numbers else "" for name in columns])
    say(f"\nheld out, {n} validation examples:")
    say(evaluation.markdown(lines))
