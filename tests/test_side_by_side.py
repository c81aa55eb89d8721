"""`report RUN RUN …`: what differs between runs, on one page; and the best validation, marked in a run's own report."""

import html
import json
import re

import pytest

import lastmile
from report import charts, side_by_side

FEW = ["--train-examples", "14", "--max-steps", "4"]


@pytest.fixture(scope="module")
def runs(run_folder, reward, tmp_path_factory):
    """Two runs over one base: an mle with validation that keeps its best, and another rate without."""
    place = tmp_path_factory.mktemp("side by side")
    for name, flags in (("one", "--eval-every 2 --eval-examples 4 --keep best"), ("other", "--learning-rate 1e-2")):
        folder = place / name
        folder.mkdir()
        (folder / "base").symlink_to(run_folder / "base")
        (folder / "reward").symlink_to(reward)
        run = ["--output-dir", str(folder)]
        assert lastmile.main(["mle", *FEW, *flags.split(), *run]) == 0
        assert lastmile.main(["eval", "--adapters", "mle", "--test-examples", "3", *run]) == 0
    return place


def page_of(runs):
    assert lastmile.main(["report", str(runs / "one"), str(runs / "other")]) == 0
    return (runs / "one-beside-other.html").read_text()


def cells(page, first):
    """The cells of each table row whose first cell is a text."""
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", page, re.S):
        texts = [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)]
        if texts[0] == first:
            found.append(texts[1:])
    return found


def test_settings_that_differ_and_no_others(runs):
    """The rate, the validation and what was kept differ; the seed does not, and is not there."""
    page = page_of(runs)
    assert cells(page, "mle learning_rate") == [["0.003", "0.01"]]
    assert cells(page, "mle keep") == [["best", "last"]]
    assert not cells(page, "mle seed") and not cells(page, "reward seed")


def test_scores_of_all_runs_the_best_marked(runs):
    """Each run's scores with their intervals, and a star at the best of each metric: the least excess in size."""
    page = page_of(runs)
    found = {name: json.loads((runs / name / "eval/scores.json").read_text())["mle"] for name in ("one", "other")}
    names = cells(page, "output of")[0][2:]
    rows = {row[0]: row[2:] for row in cells(page, "mle")}
    for i, name in enumerate(names):
        values = {run: scores[name] for run, scores in found.items()}
        size = {run: abs(x) if name == "excess_length" else -x for run, x in values.items()}
        for run, value in values.items():
            text = rows[run][i].replace("−", "-")
            assert text.startswith(f"{value:.3f}") and "±" in text
            assert ("★" in text) == (size[run] == min(size.values()))
    auc = json.loads((runs / "one/reward/heldout.json").read_text())["mismatched"]["auc"]
    assert f"{auc:.3f}" in cells(page, "one")[-1]


def test_no_star_between_scores_that_do_not_compare(runs):
    """Runs on other data, or judged by another BLEURT, stand side by side; which of them is best no number says."""
    facts = runs / "one/eval/facts.json"
    before = facts.read_text()
    facts.write_text(json.dumps(json.loads(before) | {"data": "other"}))
    try:
        assert all("★" not in cell for row in cells(page_of(runs), "mle") for cell in row)
    finally:
        facts.write_text(before)
    assert any("★" in cell for row in cells(page_of(runs), "mle") for cell in row)


def test_curves_lie_over_one_another(runs):
    """A chart of both runs has a line and a legend for each, with different colours and dashes."""
    logs = {name: [{"step": i, "loss": i + shift} for i in range(9)] for name, shift in (("a", 0), ("b", 3))}
    svg = charts.chart_of_runs("loss", logs)
    assert re.findall(r'<path class="(r\d)"', svg) == ["r0", "r1"]
    assert "a 8" in re.sub("<.*?>", "", svg) and "b 11" in re.sub("<.*?>", "", svg)
    assert charts.chart_of_runs("kl", logs) == ""
    assert all(f".r{i}" in page_of(runs) for i in range(side_by_side.MOST))


def test_the_best_validation_is_marked(runs):
    """A run's own report: the step and the value of the best validation, and that its adapter was kept."""
    assert lastmile.main(["report", "--output-dir", str(runs / "one"), "--examples", "0"]) == 0
    page = (runs / "one/report.html").read_text()
    lines = [json.loads(line) for line in (runs / "one/mle/validation.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["val_loss"])
    assert f"best, after step {best['step']}, kept: {charts.number(best['val_loss'])}" in page
    assert page.count('<path class="best"') == 1


def test_validations_are_of_no_batch():
    """PPO's validations stand beside steps on samples and on the truth; their curve has all of them, and the best."""
    rows = [{"step": step, "ground_truth": step % 2 == 1, "val_return": step} for step in range(9, 60, 10)]
    ((_, key, found),) = charts.lines_of("val_return", rows)
    assert key == "val_return" and found == rows


def test_names_stay_text(runs):
    """A folder whose name is a tag is shown as text, and the page still loads nothing."""
    hostile = runs / "<img src=x onerror=alert(1)>"
    if not hostile.exists():
        hostile.symlink_to(runs / "other")
    (runs / "copy").mkdir()
    for name in ("mle", "eval"):
        (runs / "copy" / name).symlink_to(runs / "other" / name)
    (runs / "copy").rename(runs / "<b>bold")
    assert lastmile.main(["report", str(runs / "one"), str(runs / "<b>bold")]) == 0
    page = (runs / "one-beside-<b>bold.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "default-src &#39;none&#39;" in page


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "nowhere"], "nowhere: no such folder"),
        (["one", "one"], "is named twice"),
        (["one"], "puts 2 to 6 runs side by side, not 1"),
        (["one", "empty"], "no stage has run there yet"),
        (["one", "damaged"], "damaged"),
    ],
)
def test_bad_input_is_one_line(runs, names, message, capsys):
    """A folder that is not there, is no run, is named twice, or holds damaged results: one line, exit code 2."""
    (runs / "empty").mkdir(exist_ok=True)
    (runs / "damaged/eval").mkdir(parents=True, exist_ok=True)
    (runs / "damaged/eval/scores.json").write_text("{")
    assert lastmile.main(["report", *(str(runs / name) for name in names)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("lastmile.py:") == 1


def test_a_file_of_another_kind_is_left_alone(runs, capsys):
    """Where the page would go lies a file that is none of ours: refused, and the file stays."""
    (runs / "one-beside-other.html").write_text("mine")
    assert lastmile.main(["report", str(runs / "one"), str(runs / "other")]) == 2
    assert "is no report" in capsys.readouterr().err
    assert (runs / "one-beside-other.html").read_text() == "mine"
    (runs / "one-beside-other.html").unlink()
