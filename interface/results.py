"""The files of an eval folder and of the logs: written by eval, read by tables, the report and docs/experiment.

eval/base.jsonl, mle.jsonl, policy.jsonl    one prediction a line
eval/scores.json, intervals.json            {column: {metric: mean, or 95 % interval}}
eval/facts.json                             data, model, seed, commit, number of examples, BLEURT's checkpoint
"""

import json
from pathlib import Path

import eval as evaluation
from formats.errors import UserError
from formats.files import read_json
from formats.words import choose_tokenizer
from interface.folders import commit
from safety.files import write_json
from safety.terminal import say, warn

KEYS = ("id", "source", "reference", "prediction")


def write_predictions(file, rows, texts):
    """One line for each example: id, prediction, reference, source."""
    with open(file, "w", encoding="utf-8") as opened:
        for datum, text in zip(rows, texts, strict=True):
            line = {"id": datum.id, "prediction": text, "reference": datum.target, "source": datum.source}
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")


def score(settings, folder, rows, predictions):
    """Score the predictions {name: a text for each row}, raw and cleaned, and write the scores to an eval folder."""
    references = [row.target for row in rows]
    columns = evaluation.with_cleaned(predictions)
    words = settings.rouge_tokenizer
    if words == "auto":
        words = choose_tokenizer(references)
        say(f"eval: the references call for the {words} tokenizer; choose another by --rouge-tokenizer")
    examples = {name: evaluation.metrics_by_example(texts, references, words) for name, texts in columns.items()}
    note = add_bleurt(settings, examples, columns, references)
    facts = {
        "data": Path(settings.data).stem, "model": settings.model, "seed": settings.seed, "commit": commit(),
        "n": len(rows), "bleurt": note, "rouge_tokenizer": words,
    }  # fmt: skip
    scores = {}
    intervals = {}
    for column, metrics in examples.items():
        scores[column] = {metric: float(values.mean()) for metric, values in metrics.items()}
        intervals[column] = {metric: evaluation.interval(values, settings.seed) for metric, values in metrics.items()}
    write_json(folder / "scores.json", scores)
    write_json(folder / "intervals.json", intervals)
    write_json(folder / "facts.json", facts)


def add_bleurt(settings, examples, columns, references):
    """Add BLEURT to the metrics of every column, or warn why it is not there. Returns the note for the tables."""
    if settings.bleurt == "none":
        return "not computed, --bleurt none"
    try:
        found = {
            name: evaluation.bleurt(texts, references, settings.bleurt, device=settings.device)
            for name, texts in columns.items()
        }
    except Exception as error:  # a damaged checkpoint, no memory left, …: the other scores must not be lost by it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(f"bleurt: not computed ({reason}); name a checkpoint folder: --bleurt FOLDER")
        return f"not computed, {settings.bleurt} could not be used"
    for name, values in found.items():
        examples[name]["bleurt"] = values
    return Path(settings.bleurt).name


def read_scores(folder, beside="auto"):
    """((scores, intervals, facts), tables as text) of an eval folder. Raises UserError if they are not eval's."""
    found = [read_json(folder / f"{name}.json") for name in ("scores", "intervals", "facts")]
    try:
        text = evaluation.tables(*found, beside)
        text.encode()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not the scores that eval writes ({error!r}); run eval again") from None
    return found, text


def read_lines(file, keys=()):
    """The objects of a .jsonl file. A last line without its end is still being written, and is left out."""
    rows = []
    for i, line in enumerate(Path(file).read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise UserError(f"{file}: line {i} is not one that lastmile writes; run that stage again")
        rows.append(row)
    return rows


def read_outputs(folder):
    """{"id", "source", "reference", and each column: list of texts} of an eval folder."""
    found = {}
    for name in ("base", "mle", "policy"):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            found[name] = read_lines(file, KEYS)
    rows = next(iter(found.values()), [])
    ids = [row["id"] for row in rows]
    if not rows or any([row["id"] for row in other] != ids for other in found.values()):
        raise UserError(f"{folder}: not the predictions that eval writes; run eval again")
    columns = {key: [row[key] for row in rows] for key in ("id", "source", "reference")}
    predictions = {name: [row["prediction"] for row in rows] for name, rows in found.items()}
    return columns | evaluation.with_cleaned(predictions)
