"""Learning curves and histograms: numbers in, SVG out, drawn by the template macros.html.

The colours are CSS variables of the page, so that the charts follow its light and dark mode and its print style.
"""

import math
import statistics

from eval import COLUMNS
from formats.words import count_words
from report.template import macros

STAGES = ("pretrain", "reward", "mle", "ppo")
CHARTS = {  # title: (keys of metrics.jsonl, what is to be seen)
    "loss": (["loss"], "of the step's batch"),
    "val_loss": (["val_loss"], "on the validation split"),
    "val_return": (["val_return"], "of greedy outputs to the validation inputs"),
    "val_la-rouge1-F1": (["val_la-rouge1-F1"], "of the same outputs"),
    "val_excess_length": (["val_excess_length"], "of the same outputs, in words"),
    "score": (["positive", "negative"], "mean over true and false tokens"),
    "return": (["return"], "reward of a whole output"),
    "reward": (["reward"], "of a token, penalty included"),
    "length": (["length", "reference_length"], "tokens, of samples and references"),
    "no_eos": (["no_eos"], "share of outputs cut by the cap"),
    "kl": (["kl"], "policy from base, nats a token"),
    "entropy": (["entropy"], "of the policy, nats a token"),
    "explained_variance": (["explained_variance"], "variance of returns foreseen"),
    "advantage": (["advantage"], "mean over tokens"),
    "policy_loss": (["policy_loss"], "equation 3, negated"),
    "value_loss": (["value_loss"], "squared error to the return"),
    "grad_norm": (["grad_norm"], "before clipping"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def smooth(values, window):
    """The mean of a window around each value, narrower at both ends. Example: smooth([0, 3, 0], 3) -> [1.5, 1, 1.5]."""
    sums, half = [0.0], window // 2
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[high] - sums[low]) / (high - low) for low, high in spans]


def ticks(low, high, most=4):
    """At most so many + 1 round numbers between low and high. Example: ticks(0, 1) -> [0, 0.25, 0.5, 0.75, 1]."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m * most >= high - low)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(x, digits=3):
    """For people: few digits, a real minus sign."""
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"
    return text.replace("-", "−")


# ----------------------------------------------------------------------------------------------------------------------
# One plot


class Frame:
    """An SVG plot of 300 by 150: its scales, its grid, and the paths drawn in it, clipped at its edges."""

    left, top, width, height = 42, 6, 252, 120

    def __init__(self, x, y):
        """x, y: (low, high) of the two axes."""
        self.x = x
        self.y = y
        self.paths = []  # (CSS class, SVG path)

    def across(self, x):
        return (x - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def down(self, y):
        return (self.y[1] - y) / (self.y[1] - self.y[0]) * self.height

    def draw(self, kind, points, then="L"):
        """A path through points of a CSS class. then: what SVG does from each to the next, L draws a line."""
        path = then.join(f"{self.across(x):.1f} {self.down(y):.1f}" for x, y in points)
        self.paths.append((kind, f"M{path}h0"))

    def draw_line(self, kind, points):
        """A line through at most about 150 of the points, the last among them."""
        self.draw(kind, [*points[: -1 : len(points) // 150 + 1], points[-1]])

    def rows(self):
        """[(place, label)] of the horizontal grid lines."""
        return [(self.top + self.down(y), number(y, 5)) for y in ticks(*self.y)]

    def columns(self):
        """[(place, text anchor, label)] of the labels below."""
        found = []
        for x in ticks(*self.x, 3):
            anchor = "end" if self.across(x) > self.width - 12 else "middle"
            found.append((self.left + self.across(x), anchor, number(x, 5)))
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Learning curves


def chart(title, rows, best=None, kept=False):
    """One chart of a stage, or "" where its rows have no such numbers. title: a key of CHARTS.

    best: min or max, where the chart's best point is to be marked; kept: whether the stage ended with its adapter.
    """
    series = [(name, points_of(key, found)) for name, key, found in lines_of(title, rows)]
    series = [(name, points) for name, points in series if points]
    if not series:
        return ""
    frame = Frame(*limits(series))
    for i, (_, points) in enumerate(series):
        frame.draw(f"dots s{i}", points[:: len(points) // 400 + 1], "h0M")
    keys = []
    said = []
    for i, (name, points) in enumerate(series):
        line = smoothed(points)
        frame.draw_line(f"s{i}", line)
        keys.append((name, f"s{i}", number(line[-1][1])))
        said.append(f"{name} from {number(line[0][1])} to {number(line[-1][1])}")
    if best:
        step, value = best(series[0][1], key=lambda point: point[1])
        frame.draw("best", [(step, value)])
        words = f"best, after step {step + 1}{', kept' if kept else ''}:"
        keys.append((words, "best", number(value)))
        said.append(f"{words} {number(value)}")
    label = f"{title} over {len(rows)} steps: {'; '.join(said)}"
    return macros().figure(title, CHARTS[title][1], keys, frame, label)


def lines_of(title, rows):
    """[(name in the legend, key of metrics.jsonl, rows)]. PPO's sampled and ground-truth batches are separate lines."""
    names = CHARTS[title][0]
    truth = [row for row in rows if row.get("ground_truth") is True]
    sampled = [row for row in rows if row.get("ground_truth") is not True]
    if len(names) > 1:
        return [(name, name, sampled) for name in names]
    if truth and not title.startswith("val_"):  # validations come after a step: its batch has no part in them
        return [("sampled", names[0], sampled), ("truth", names[0], truth)]
    return [("at the end", names[0], rows)]


def points_of(key, rows):
    """[(step, number)] of the rows whose number can be drawn."""
    points = [(row.get("step"), row.get(key)) for row in rows]
    return [point for point in points if all(type(x) in (int, float) and -1e30 < x < 1e30 for x in point)]


def smoothed(points):
    """The moving mean of points over a sixteenth of the run."""
    steps = [x for x, _ in points]
    values = [y for _, y in points]
    return list(zip(steps, smooth(values, len(values) // 16), strict=True))


def limits(series):
    """((low, high) of the steps, (low, high) of the numbers). The most extreme 2 % do not count."""
    steps = []
    numbers = []
    for _, points in series:
        steps += [x for x, _ in points]
        numbers += [y for _, y in points]
    numbers.sort()
    cut = len(numbers) // 50
    low, high = numbers[cut], numbers[-1 - cut]
    margin = 0.04 * (high - low) or abs(high) * 0.04 or 1
    return (0, max(steps) or 1), (low - margin, high + margin)


# ----------------------------------------------------------------------------------------------------------------------
# Histograms of lengths


def histograms(columns, tokenizer):
    """(charts, words a bar): words an output of each column, the reference outlined in each.

    columns: {name: texts}; tokenizer: whose words are counted, see formats.words.count_words.
    """
    words = {name: [count_words(text, tokenizer) for text in texts] for name, texts in columns.items()}
    longest = max(max(counts) for counts in words.values())
    width = longest // 40 + 1  # words a bar
    shares = {name: shares_of(counts, width, longest // width + 1) for name, counts in words.items()}
    tallest = max(max(bars) for bars in shares.values())
    reference = statistics.median(words["reference"])
    figures = []
    for name in COLUMNS:
        if name not in words:
            continue
        frame = Frame((0, (longest // width + 1) * width), (0, tallest * 1.05))
        draw_bars(frame, shares[name], width)
        draw_outline(frame, shares["reference"], width)
        median = f"median {statistics.median(words[name]):g}"
        keys = [(name, "bar", median), ("reference", "s1", f"median {reference:g}")]
        figures.append(macros().figure(name, "", keys, frame, f"{name}: {median} words, reference {reference:g}"))
    return figures, width


def shares_of(counts, width, bars):
    """The share of the counts that falls into each bar."""
    found = [0.0] * bars
    for n in counts:
        found[n // width] += 1 / len(counts)
    return found


def draw_bars(frame, shares, width):
    """Filled bars, the empty ones left out."""
    for i, share in enumerate(shares):
        if share:
            left, right = i * width, (i + 1) * width
            frame.draw("bar", [(left, 0), (left, share), (right, share), (right, 0)])


def draw_outline(frame, shares, width):
    """The upper edge of bars as one line. -1 is below the frame, which clips it."""
    points = [(0, -1)]
    for i, share in enumerate(shares):
        points += [(i * width, share or -1), ((i + 1) * width, share or -1)]
    points.append((len(shares) * width, -1))
    frame.draw("s1", points)
