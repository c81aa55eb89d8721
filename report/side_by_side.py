"""Several runs on one page: what differs in their settings, their scores, and their curves over one another.

python lastmile.py report runs/a runs/b
"""

from pathlib import Path

from eval import COLUMNS
from formats.errors import UserError
from formats.files import read_json
from interface.folders import commit, settings_file
from interface.results import read_scores
from report.charts import CHARTS, STAGES, chart_of_runs, number
from report.page import Section, split_cells
from report.template import macros
from report.write import logs_of, save

PLACES = ("pretrain", "base", "reward", "mle", "ppo", "eval")  # the folders of stages that keep their settings
UNIMPORTANT = (
    "output_dir", "config", "overwrite", "resume", "dry_run", "stage", "push", "log_every", "save_every",
)  # fmt: skip
MOST = 6  # lines that can be told apart in one chart
LESS_IS_BETTER = "excess_length"  # nearest to 0


def write(names):
    """Write the page beside the first of the runs. names: their folders."""
    runs = runs_of(names)
    stages = {name: logs_of(folder) for name, folder in runs.items()}
    found = {name: read_scores(folder / "eval")[0] for name, folder in runs.items() if (folder / "eval").is_dir()}
    for name, folder in runs.items():
        if not stages[name] and name not in found:
            raise UserError(f"{folder}: no stage has run there yet; name a run's folder, as in runs/toy")
    parts = {
        "settings": (settings_of(runs), "Settings that differ"),
        "scores": (scores_of(found), "Scores on the test split"),
        "reward": (aucs_of(runs), "Reward models, held out"),
    }
    sections = []
    for id, (rows, title) in parts.items():
        if len(rows) > 1:
            sections.append(Section(id, title, macros().table(split_cells(rows), title)))
    sections.append(Section("curves", "Learning curves", curves(stages)))
    file = list(runs.values())[0].parent / f"{'-beside-'.join(Path(name).name for name in runs)}.html"
    if file.exists() and b"<title>lastmile:" not in file.read_bytes()[:2000]:
        raise UserError(f"{file}: exists and is no report; move it away")
    save(file, " beside ".join(runs), f"reported by lastmile {commit()}", sections)


def runs_of(names):
    """{name: folder}; the name is the folder's, or its path where two folders share a name."""
    folders = [Path(name).resolve() for name in names]
    if not 1 < len(folders) <= MOST:
        raise UserError(f"report: puts 2 to {MOST} runs side by side, not {len(folders)}; name some of them")
    for given, folder in zip(names, folders, strict=True):
        if not folder.is_dir():
            raise FileNotFoundError(f"{given}: no such folder; name a run's, as in runs/toy")
        if folders.count(folder) > 1:
            raise UserError(f"{given}: is named twice; remove one")
    unique = len({folder.name for folder in folders}) == len(folders)
    return {folder.name if unique else str(given): folder for given, folder in zip(names, folders, strict=True)}


def settings_of(runs):
    """Rows of a table: each setting of a stage that is not the same in all runs that have the stage."""
    rows = [["setting", *runs]]
    for place in PLACES:
        found = {}
        for name, folder in runs.items():
            for part in (folder / place, folder / f"{place}.partial"):
                file = settings_file(part)
                if name not in found and file.is_file():
                    found[name] = read_json(file)
        for key in dict.fromkeys(key for settings in found.values() for key in settings):
            values = [found[name].get(key) if name in found else None for name in runs]
            present = [value for name, value in zip(runs, values, strict=True) if name in found]
            if key not in UNIMPORTANT and any(value != present[0] for value in present):
                rows.append([f"{place} {key}", *("–" if value is None else str(value) for value in values)])
    return rows


def scores_of(found):
    """Rows of a table: the scores of each column of each run. The best of each metric ends with a star."""
    every = dict.fromkeys(m for run in found.values() for scores in run[0].values() for m in scores)
    names = [m for m in every if m.startswith(("excess", "la-", "rouge", "bleurt")) and "precision" not in m]
    names = [m for m in names if "recall" not in m]
    entries = [(name, column) for column in COLUMNS for name in found if column in found[name][0]]
    rows = [["output of", "run", "n", *names]]
    best = {}
    for metric in names:
        values = [found[name][0][column].get(metric) for name, column in entries]
        values = [abs(value) if metric == LESS_IS_BETTER else -value for value in values if value is not None]
        facts = ("data", "rouge_tokenizer", "bleurt") if metric == "bleurt" else ("data", "rouge_tokenizer")
        alike = len({tuple(found[name][2].get(fact) for fact in facts) for name in found}) == 1
        best[metric] = min(values, default=None) if alike else None  # scores of other data compare with none
    for name, column in entries:
        scores, ends = found[name][0][column], found[name][1].get(column, {})
        cells = []
        for metric in names:
            value = scores.get(metric)
            if value is None:
                cells.append("–")
                continue
            half = f" ±{(ends[metric][1] - ends[metric][0]) / 2:.3f}" if metric in ends else ""
            star = " ★" if (abs(value) if metric == LESS_IS_BETTER else -value) == best[metric] else ""
            cells.append(f"{value:.3f}{star}{half}")
        rows.append([column, name, str(found[name][2].get("n", "–")), *cells])
    return rows if entries else []


def aucs_of(runs):
    """Rows of a table: AUC of true outputs against each class of negatives, a run a row."""
    files = {name: folder / "reward" / "heldout.json" for name, folder in runs.items()}
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    kinds = list(dict.fromkeys(k for report in found.values() for k, numbers in report.items() if "auc" in numbers))
    rows = [["AUC of true outputs against", *kinds]]
    for name, report in found.items():
        rows.append([name, *(f"{report[kind]['auc']:.3f}" if kind in report else "–" for kind in kinds)])
    return rows if found else []


def curves(stages):
    """HTML of the charts of each stage, the runs as lines. stages: {run: {stage: lines of its log}}."""
    shown = []
    for stage in STAGES:
        logs = {name: found[stage] for name, found in stages.items() if stage in found}
        if logs:
            charts = [chart_of_runs(title, logs) for title in CHARTS]
            steps = ", ".join(f"{name} {number(len(rows))}" for name, rows in logs.items())
            shown.append((stage, f"steps: {steps}", charts))
    return macros().curves_of_runs(shown)
