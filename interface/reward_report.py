"""How well a reward model tells true outputs from each class of negatives, on held-out data.

Dimensions: B batch, T time, n response tokens of one row.
"""

import eval as evaluation
from safety.terminal import say
from safety.validation import heldout_scores


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
