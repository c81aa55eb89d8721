"""Read what a run's folder contains, finished or not, and write report.html beside it."""

from pathlib import Path

from formats.files import read_json
from interface.folders import commit, settings_file
from interface.inputs import subsample
from interface.plan import end_dry_run
from interface.results import read_lines, read_outputs, read_scores
from report import page
from report.charts import STAGES
from report.examine import examine
from safety.files import clear, sync
from safety.terminal import say, visible
from safety.validation import BEST


def write(settings):
    """One HTML file about everything in the run's folder. settings: interface.settings.Report."""
    run = Path(settings.output_dir)
    sections = sections_of(settings, run)
    if not sections:
        command = f"python lastmile.py reward --data {settings.data} --output-dir {run}"
        raise FileNotFoundError(f"{run}: no stage has run there yet; run: {command}")
    end_dry_run(settings)
    save(run / "report.html", Path(settings.data).stem, f"{run}, reported by lastmile {commit()}", sections)


def save(file, title, facts, sections):
    """Write a page, whole or not at all."""
    content = visible(page.page(title, facts, sections))  # parts of it come from the data
    hidden = file.with_name(f".{file.name}")
    try:
        hidden.write_text(content, encoding="utf-8")
        sync(hidden)
        hidden.rename(file)
    finally:
        clear(hidden)
    say(f"The report is in {file.resolve()}; open it in a browser")


def sections_of(settings, run):
    """The sections that the run has contents for."""
    sections = []
    stages = logs_of(run)
    if stages:
        sections.append(page.curves(stages, BEST, {stage for stage in stages if keeps_best(run / stage)}))
    if (run / "eval").is_dir():
        found, _ = read_scores(run / "eval")
        columns = read_outputs(run / "eval")
        texts = {name: column for name, column in columns.items() if name not in ("id", "source")}
        sections.append(page.tables(*found, settings.beside))
        sections.append(page.lengths(texts, found[2].get("rouge_tokenizer", "ascii")))
        if settings.examples:
            rows = subsample(settings, "report", list(range(len(columns["id"]))), settings.examples)
            sections.append(page.gallery(*examine(settings, columns, rows)))
    return sections


def keeps_best(folder):
    """Whether a finished stage ended with the adapter of its best validation."""
    file = settings_file(folder)
    return file.is_file() and read_json(file).get("keep") == "best"


def logs_of(run):
    """{stage: the lines of its metrics.jsonl, with what was validated after a step in the step's line}.

    A stage that still runs, or was stopped, shows what it has.
    """
    stages = {}
    for stage in STAGES:
        for folder in (stage, f"{stage}.partial"):
            file = run / folder / "metrics.jsonl"
            lines = read_lines(file) if file.is_file() else []
            if lines:
                add_validations(lines, file.with_name("validation.jsonl"))
                stages[stage] = lines
                break
    return stages


def add_validations(lines, file):
    """Add the numbers of validation.jsonl to the lines of the steps after which they were measured."""
    by_step = {line.get("step"): line for line in lines}  # a log may begin late: of a checkpoint saved without it
    for found in read_lines(file) if file.is_file() else []:
        done = found.pop("step", None)
        if isinstance(done, int):
            by_step.get(done - 1, {}).update(found)
