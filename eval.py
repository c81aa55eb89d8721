"""Evaluation: predictions, the paper's metrics, its two clean-up rules, its two tables.

Five columns are judged (paper, 4.3): base, mle and policy as they come, and base and mle after light cleaning.
A long prediction has high recall and a short one high precision; the length-adjusted variants correct for that (paper,
4.1), with n_p and n_g the words of the prediction and of the ground truth:

    la-recall = recall * min(1, n_g / n_p)        la-precision = precision * min(1, n_p / n_g)

Where ROUGE and whitespace count the same words, both equal matches / max(n_p, n_g), and so does their harmonic mean:
that is why the paper's three la- rows nearly coincide.

ROUGE: Lin 2004, the rouge-score package, no stemmer. BLEURT: Pu et al. 2021, the bleurt-pytorch package.
"""

import itertools

import numpy as np

from formats.errors import name_row
from formats.words import AsciiTokenizer, UnicodeTokenizer, choose_tokenizer, count_words

COLUMNS = ("base", "mle", "policy", "base cleaned", "mle cleaned")
ROUGES = ("rouge1", "rouge2", "rougeL")
PARTS = ("F1", "precision", "recall")
ROWS = ["bleurt"] + [f"{la}{rouge}-{part}" for la, rouge, part in itertools.product(("la-", ""), ROUGES, PARTS)]

# The paper's Tables 1 and 2: SAMSum, then XSum, each with its columns as in COLUMNS.
PAPER = """
excess_length       39.2 12.7  2.9 28.9  5.8   44.7 42.0 -1.1 39.6 -1.8
bleurt              0.51 0.57 0.58 0.54 0.58   0.32 0.37 0.48 0.33 0.49
la-rouge1-F1        0.21 0.39 0.43 0.25 0.42   0.14 0.18 0.35 0.15 0.36
la-rouge1-precision 0.21 0.39 0.44 0.25 0.43   0.14 0.18 0.35 0.15 0.36
la-rouge1-recall    0.21 0.39 0.43 0.25 0.42   0.14 0.18 0.35 0.15 0.36
la-rouge2-F1        0.08 0.20 0.21 0.10 0.22   0.03 0.07 0.15 0.03 0.15
la-rouge2-precision 0.08 0.20 0.21 0.10 0.22   0.03 0.06 0.15 0.03 0.15
la-rouge2-recall    0.08 0.20 0.21 0.10 0.22   0.03 0.07 0.15 0.03 0.15
la-rougeL-F1        0.16 0.32 0.35 0.19 0.35   0.09 0.13 0.28 0.10 0.29
la-rougeL-precision 0.16 0.32 0.36 0.20 0.35   0.09 0.13 0.28 0.10 0.29
la-rougeL-recall    0.16 0.31 0.35 0.19 0.34   0.09 0.13 0.28 0.10 0.29
rouge1-F1           0.31 0.46 0.50 0.35 0.50   0.21 0.26 0.39 0.22 0.40
rouge1-precision    0.21 0.43 0.50 0.26 0.49   0.14 0.18 0.41 0.15 0.43
rouge1-recall       0.65 0.60 0.56 0.63 0.58   0.45 0.54 0.39 0.44 0.39
rouge2-F1           0.11 0.24 0.24 0.13 0.25   0.05 0.10 0.16 0.05 0.17
rouge2-precision    0.08 0.22 0.25 0.10 0.25   0.03 0.07 0.17 0.03 0.18
rouge2-recall       0.25 0.30 0.27 0.25 0.30   0.10 0.21 0.16 0.10 0.16
rougeL-F1           0.23 0.38 0.41 0.27 0.40   0.14 0.19 0.31 0.15 0.33
rougeL-precision    0.16 0.35 0.41 0.20 0.40   0.09 0.13 0.33 0.10 0.35
rougeL-recall       0.50 0.49 0.46 0.49 0.48   0.31 0.40 0.31 0.30 0.32
"""
PAPER_DATA = {"samsum": "SAMSum", "xsum": "XSum"}


def paper_numbers(data):
    """{metric: {column: number as printed}} of the paper, data "samsum" or "xsum"."""
    first = list(PAPER_DATA).index(data) * len(COLUMNS)
    rows = (line.split() for line in PAPER.strip().splitlines())
    return {metric: dict(zip(COLUMNS, numbers[first:], strict=False)) for metric, *numbers in rows}


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(data, sample, batch_size, decode, progress=iter):
    """One text a Datum, in the order of the data.

    sample: list of prompts -> list of responses. Prompts of like length share a batch, so that little is padded.
    """
    lengths = [len(datum.prompt) for datum in data]
    order = sorted(range(len(data)), key=lengths.__getitem__)
    texts = [None] * len(data)
    for start in progress(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        with name_row([(data[i].id, data[i].prompt) for i in rows]):
            responses = sample([data[i].prompt for i in rows])
        for i, response in zip(rows, responses, strict=True):
            texts[i] = decode(response)
    return texts


def clean_base(text):
    """Without the "Sure, here is a summary" line of a chat model (paper, 4.3)."""
    text = text.strip()
    return text.split("\n", 1)[1].strip() if text.startswith("Sure,") and "\n" in text else text


def clean_mle(text):
    """The text before the first newline (paper, 4.3); stripped first, or a leading newline would leave nothing."""
    return text.strip().split("\n", 1)[0]


CLEAN_UP = {"base": clean_base, "mle": clean_mle}


def with_cleaned(predictions):
    """Add the cleaned columns: {"base", "mle", "policy": texts} -> {column: texts}, in the order of COLUMNS."""
    columns = dict(predictions)
    for name, clean in CLEAN_UP.items():
        if name in predictions:
            columns[f"{name} cleaned"] = [clean(text) for text in predictions[name]]
    return {name: columns[name] for name in COLUMNS if name in columns}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def metrics_by_example(predictions, references, tokenizer="auto"):
    """{metric: array of one number an example}: excess length, ROUGE and length-adjusted ROUGE.

    tokenizer: "ascii", "unicode", or "auto", which decides by the references.
    """
    from rouge_score import rouge_scorer  # here, so that a machine that only trains can do without it

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if tokenizer == "auto":
        tokenizer = choose_tokenizer(references)
    units = UnicodeTokenizer() if tokenizer == "unicode" else AsciiTokenizer()
    scorer = rouge_scorer.RougeScorer(ROUGES, use_stemmer=False, tokenizer=units)
    rows = {metric: [] for metric in ("excess_length", *ROWS[1:])}
    for prediction, reference in zip(predictions, references, strict=True):
        n_p = count_words(prediction, tokenizer)
        n_g = count_words(reference, tokenizer)
        rows["excess_length"].append(n_p - n_g)
        for rouge, score in scorer.score(reference, prediction).items():  # rouge-score takes the target first
            plain = {"F1": score.fmeasure, "precision": score.precision, "recall": score.recall}
            adjusted = length_adjusted(score.precision, score.recall, n_p, n_g)
            for part in PARTS:
                rows[f"{rouge}-{part}"].append(plain[part])
                rows[f"la-{rouge}-{part}"].append(adjusted[part])
    return {metric: np.array(values, dtype=float) for metric, values in rows.items()}


def length_adjusted(precision, recall, n_p, n_g):
    """{"F1", "precision", "recall"} after the adjustment to the words of prediction (n_p) and truth (n_g).

    Example: length_adjusted(1.0, 0.5, 2, 4) -> precision 0.5, recall 0.5, F1 0.5.
    """
    la_precision = precision * min(1, n_p / max(n_g, 1))
    la_recall = recall * min(1, n_g / max(n_p, 1))
    la_f1 = 2 * la_precision * la_recall / ((la_precision + la_recall) or 1)
    return {"F1": la_f1, "precision": la_precision, "recall": la_recall}


def metrics(predictions, references, tokenizer="auto"):
    """Mean over examples of every metric but BLEURT, under the paper's row names.

    Example: the reference "a b c d" and the prediction "a b" have rouge1-precision 1, la-rouge1-precision 0.5.
    """
    found = metrics_by_example(predictions, references, tokenizer)
    return {metric: float(values.mean()) for metric, values in found.items()}


def bleurt(predictions, references, checkpoint, batch_size=16, device="cpu"):
    """BLEURT of each pair: an array. checkpoint: a folder, or an id to fetch such as "lucadiliello/BLEURT-20".

    Scores of different checkpoints cannot be compared. Pairs are cut at 512 tokens, the encoder's limit.
    Raises ImportError or OSError where package or weights are missing.
    """
    import torch
    from bleurt_pytorch import BleurtConfig, BleurtForSequenceClassification, BleurtTokenizer

    config = BleurtConfig.from_pretrained(checkpoint)
    encoder = BleurtForSequenceClassification.from_pretrained(checkpoint, config=config).to(device).train(False)
    tokenizer = BleurtTokenizer.from_pretrained(checkpoint)
    scores = []
    for start in range(0, len(predictions), batch_size):
        pairs = references[start : start + batch_size], predictions[start : start + batch_size]  # reference first
        inputs = tokenizer(*pairs, padding="longest", truncation=True, max_length=512, return_tensors="pt").to(device)
        with torch.inference_mode():
            scores += encoder(**inputs).logits.flatten().tolist()
    return np.array(scores)


def interval(values, seed, resamples=1000):
    """95 % bootstrap interval of the mean of values (n,): (low, high)."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]  # one by one: n may be a million
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def auc(positive, negative):
    """The chance that a positive scores above a negative, ties counted half: the area under the ROC curve.

    Example: auc([3, 2], [1, 2]) -> 0.875.
    """
    ordered = np.sort(negative)
    below, up_to = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + up_to).mean() / 2 / len(ordered))  # how many negatives are below, ties counted half


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def paper_beside(data, beside="auto"):
    """Which of the paper's numbers the tables show beside ours: "samsum", "xsum" or "" for none.

    auto: those of the same data; SAMSum's for the toy, for orientation; none for other data, which they cannot be
    compared with.
    """
    if beside == "auto":
        beside = {"samsum": "samsum", "xsum": "xsum", "toy": "samsum"}.get(data, "")
    return "" if beside == "none" else beside


def cells(scores, intervals, facts, beside="auto"):
    """Tables 1 and 2 as rows of strings, a header first, and a line about both.

    scores: {column: {metric: mean}}; intervals: {column: {metric: (low, high)}}; facts: {"data", "model", "seed",
    "commit", "n", "bleurt"}; beside: see paper_beside.
    """
    data = facts["data"]
    beside = paper_beside(data, beside)
    paper = paper_numbers(beside) if beside else None
    scores = {column: scores[column] for column in COLUMNS if column in scores}  # in the paper's order
    header = [""]
    for column in scores:
        header += [column, "paper"] if paper else [column]
    note = (
        f"data {data}, model {facts['model']}, seed {facts['seed']}, commit {facts['commit']}, n = {facts['n']}, "
        f"± half the 95 % bootstrap interval."
    )
    if paper and data not in PAPER_DATA:
        note += f" The paper has no such data: its {PAPER_DATA[beside]} numbers are shown beside."
    elif paper and beside != data:
        note += f" The paper's numbers are those of {PAPER_DATA[beside]}."
    first = [header, cell_row("excess_length", 1, scores, intervals, paper)]
    second = [header] + [cell_row(metric, 2, scores, intervals, paper) for metric in ROWS]
    return first, second, note


def cell_row(metric, digits, scores, intervals, paper):
    """One metric: its name, then for each column our mean with its interval and, where wanted, the paper's number."""
    row = [metric]
    for column, means in scores.items():
        ours = "n/a"
        if metric in means:
            low, high = intervals[column][metric]
            ours = f"{means[metric]:.{digits}f} ±{(high - low) / 2:.{digits}f}"
        row.append(ours)
        if paper:
            row.append(paper[metric][column])
    return row


def tables(scores, intervals, facts, beside="auto"):
    """`cells` as markdown."""
    first, second, note = cells(scores, intervals, facts, beside)
    parts = [
        note,
        "\n**Table 1**: extra length relative to ground truth, in words\n",
        markdown(first),
        f"\n**Table 2**: evaluation metrics (bleurt: {facts['bleurt']})\n",
        markdown(second),
    ]
    return "\n".join(parts)


def markdown(rows):
    """A list of rows of strings -> a markdown table with aligned columns, readable on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
