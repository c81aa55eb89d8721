"""Read a run's folder, finished or not, and write report.html into it: one file that loads nothing, without scripts."""

from itertools import chain
from pathlib import Path

import jinja2
import numpy as np

import eval as evaluation
from interface.folders import commit
from interface.inputs import subsample
from interface.plan import end_dry_run
from interface.results import read_lines, read_outputs, read_scores
from report.charts import curves, histograms, number
from report.examine import examine, settings_of
from safety.files import clear, sync
from safety.terminal import say, visible
from safety.validation import BEST


def write(settings):
    """One HTML file about everything in the run's folder. settings: interface.commands.Report."""
    run = Path(settings.output_dir)
    sections = {"curves": curves_of(run)}
    if (run / "eval").is_dir():
        found, _ = read_scores(run / "eval")
        columns = read_outputs(run / "eval")
        texts = {name: column for name, column in columns.items() if name not in ("id", "source")}
        sections["tables"] = (*evaluation.cells(*found, settings.beside), found[2]["bleurt"])
        sections["lengths"] = (len(columns["id"]), *histograms(texts, found[2].get("rouge_tokenizer", "ascii")))
        if settings.examples:
            rows = subsample(settings, "report", list(range(len(columns["id"]))), settings.examples)
            sections["examples"] = gallery(*examine(settings, columns, rows))
    elif not sections["curves"]:
        command = f"python lastmile.py reward --data {settings.data} --output-dir {run}"
        raise FileNotFoundError(f"{run}: no stage has run there yet; run: {command}")
    end_dry_run(settings)
    facts = f"{run}, reported by lastmile {commit()}"
    save(run / "report.html", render(Path(settings.data).stem, facts, **sections))


def render(title, facts, **sections):
    """The page, with those of the sections curves, tables, lengths and examples that the run has.

    Autoescape: no text of a model or of the data can open a tag or an attribute.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = dict.fromkeys(("curves", "tables", "lengths", "examples")) | sections
    return environment.get_template("page.html").render(title=title, facts=facts, sections=sections, number=number)


def save(file, html):
    """Write a page, whole or not at all."""
    hidden = file.with_name(f".{file.name}")
    try:
        hidden.write_text(visible(html), encoding="utf-8")
        sync(hidden)
        hidden.rename(file)
    finally:
        clear(hidden)
    say(f"The report is in {file.resolve()}; open it in a browser")


# ----------------------------------------------------------------------------------------------------------------------
# What page.html shows of a run


def curves_of(run):
    """[(stage, steps, charts)]. A stage that still runs, or was stopped, shows what it has."""
    found = []
    for stage in ("pretrain", "reward", "mle", "ppo"):
        lines = log_of(run / stage) or log_of(run / f"{stage}.partial")
        if lines:
            kept = getattr(settings_of(run, stage), "keep", "") == "best"
            found.append((stage, len(lines), curves(lines, BEST.get(stage), kept)))
    return found


def log_of(folder):
    """The lines of metrics.jsonl; numbers of validation.jsonl are added to the line of the step before them."""
    logs = [folder / name for name in ("metrics.jsonl", "validation.jsonl")]
    lines, validations = [read_lines(log) if log.is_file() else [] for log in logs]
    by_step = {line.get("step"): line for line in lines}  # a log may begin late: of a checkpoint saved without it
    for found in validations:
        done = found.pop("step", None)
        if isinstance(done, int):
            by_step.get(done - 1, {}).update(found)
    return lines


def gallery(examples, note):
    """(examples, note, scales) of report.examine, with a CSS style for each token: --r, --v and --a from -1 to 1.

    scales: {number: (middle, reach)}. The reward model learns 1 for true tokens and 0 for false ones, so its middle is
    0.5. Values and advantages have no such scale: a tenth of the tokens is beyond their reach.
    """
    outputs = chain.from_iterable(example["outputs"].values() for example in examples)
    tokens = list(chain.from_iterable(output["tokens"] for output in outputs))
    scales = {}
    for name in ("reward", "value", "advantage"):
        values = np.array([token["numbers"][name] for token in tokens if name in token.get("numbers", {})])
        if not len(values):
            continue
        middle, reach = (0.5, 0.5) if name == "reward" else (0, max(np.quantile(abs(values), 0.9), 1e-6))
        scales[name] = middle, reach
        for token, x in zip(tokens, ((values - middle) / reach).clip(-1, 1), strict=True):
            token["style"] = f"{token.get('style', '')}--{name[0]}:{x:.2f};"
    return examples, note, scales
