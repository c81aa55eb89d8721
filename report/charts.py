"""Learning curves and histograms of lengths: numbers in; out the labels and SVG paths that page.html puts into place.

Colours are CSS classes of the page. By hand: matplotlib is not shorter, needs 9 s and 1.2 MB for the toy's curves
(these: 0.2 s, 0.1 MB), and its charts follow neither dark mode nor print.
"""

import math
from operator import itemgetter

import numpy as np

from formats.words import count_words

WIDTH, HEIGHT = 200, 110  # of a plot
CHARTS = {  # key of metrics.jsonl: what is to be seen
    "loss": "of the step's batch",
    "val_loss": "on the validation split",
    "val_return": "of greedy outputs",
    "val_la-rouge1-F1": "of the same outputs",
    "val_excess_length": "of the same outputs, in words",
    "score": "of true and false tokens",
    "return": "reward of a whole output",
    "reward": "of a token, penalty included",
    "length": "in tokens",
    "no_eos": "outputs cut by the cap",
    "kl": "policy from base, nats a token",
    "entropy": "of the policy, nats a token",
    "explained_variance": "variance of returns foreseen",
    "advantage": "mean over tokens",
    "policy_loss": "equation 3, negated",
    "value_loss": "squared error to the return",
    "grad_norm": "before clipping",
}
PAIRS = {"score": ("positive", "negative"), "length": ("length", "reference_length")}  # charts of two keys


def smooth(values, window):
    """The mean of an odd window around each value, narrower at both ends. Example: ([0, 3, 0], 3) -> [1.5, 1, 1.5]."""
    inside = np.convolve(np.ones(len(values)), np.ones(window), "same")
    return (np.convolve(values, np.ones(window), "same") / inside).tolist()


def ticks(low, high):
    """Two to five round numbers between low and high > low. Example: ticks(0, 1) -> [0, 0.25, 0.5, 0.75, 1]."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m * 4 >= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(x):
    """Three digits, for people."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def figure(title, gloss, series, legend, x_max, low, high):
    """What page.html needs of one chart. series: [(CSS class, [(x, y)])]; legend: [(CSS class, text)]."""

    def down(y):
        return round((high - y) / (high - low) * HEIGHT, 1)

    paths = []
    for kind, points in series:
        then = "h0M" if kind.startswith("dots") else "L"  # SVG for: a dot at each point, or a line to the next
        places = [f"{x / x_max * WIDTH:.1f} {down(y)}" for x, y in points]
        paths.append((kind, f"M{then.join(places)}h0"))
    grid = [(down(y), f"{y:,.12g}") for y in ticks(low, high)]
    return {"title": title, "gloss": gloss, "grid": grid, "paths": paths, "legend": legend, "x_max": f"{x_max:,}"}


# ----------------------------------------------------------------------------------------------------------------------
# Learning curves


def curves(rows, best=None, kept=False):
    """The charts of one stage. rows: the dicts of its log; best: (key, min or max) of the validation to mark, or None;
    kept: whether the stage ended with the adapter of that validation.
    """
    charts = []
    for title, gloss in CHARTS.items():
        lines = {name: found for name, found in lines_of(title, rows).items() if found}
        if not lines:
            continue
        dots, means, legend = [], [], []
        for i, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            mean = list(zip(x, smooth(y, len(y) // 16 | 1), strict=True))
            dots.append((f"dots s{i}", points[:: len(points) // 400 + 1]))
            means.append((f"s{i}", [*mean[: -1 : len(mean) // 150 + 1], mean[-1]]))
            legend.append((f"s{i}", f"{name} {number(mean[-1][1])}"))
        if best and title == best[0]:
            step, value = best[1](points, key=itemgetter(1))
            means.append(("best", [(step, value)]))
            legend.append(("best", f"best, after step {step + 1}{', kept' if kept else ''}: {number(value)}"))
        steps, values = zip(*sum(lines.values(), []), strict=True)
        low, high = np.quantile(values, [0.01, 0.99], method="nearest").tolist()
        margin = 0.04 * (high - low) or abs(high) * 0.04 or 1
        charts.append(figure(title, gloss, dots + means, legend, max(steps) or 1, low - margin, high + margin))
    return charts


def lines_of(title, rows):
    """{name in the legend: [(step, number)]} of a chart. PPO's sampled and ground-truth batches are separate lines."""
    truth = [row for row in rows if row.get("ground_truth") is True]
    sampled = [row for row in rows if row.get("ground_truth") is not True]
    if title in PAIRS:
        return {key: points_of(key, sampled) for key in PAIRS[title]}
    if truth and not title.startswith("val_"):  # validations come after a step: its batch has no part in them
        return {"sampled": points_of(title, sampled), "truth": points_of(title, truth)}
    return {"at the end": points_of(title, rows)}


def points_of(key, rows):
    """[(step, number)] of the rows whose number can be drawn."""
    points = [(row.get("step"), row.get(key)) for row in rows]
    points = [point for point in points if all(type(x) in (int, float) and -1e30 < x < 1e30 for x in point)]
    return [(step, float(x)) for step, x in points]


# ----------------------------------------------------------------------------------------------------------------------
# Histograms of lengths


def histograms(columns, tokenizer):
    """(charts, words a bar): words an output of each column, the reference outlined in each.

    columns: {name: texts}; tokenizer: whose words are counted, see formats.words.count_words.
    """
    words = {name: [count_words(text, tokenizer) for text in texts] for name, texts in columns.items()}
    longest = max(max(counts) for counts in words.values())
    width = longest // 40 + 1  # words a bar
    edges = np.arange(0, longest + width + 1, width)
    shares = {name: np.histogram(counts, edges)[0] / len(counts) for name, counts in words.items()}
    tallest = max(share.max() for share in shares.values())
    charts = []
    for name in words:
        if name == "reference":
            continue
        series, legend = [], []
        for kind, column in (("bar", name), ("s1", "reference")):
            upper = np.repeat(np.where(shares[column] > 0, shares[column], -1), 2).tolist()  # -1: below the frame
            series.append((kind, list(zip(np.repeat(edges, 2).tolist(), [-1, *upper, -1], strict=True))))
            legend.append((kind, f"{column}, median {np.median(words[column]):g}"))
        charts.append(figure(name, "", series, legend, int(edges[-1]), 0, 1.05 * tallest))
    return charts, width
