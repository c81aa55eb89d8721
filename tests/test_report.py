"""The report: its arithmetic, what strangers' text can do to it (nothing), and how it looks and works in a browser."""

import html.parser
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import journal

import data
import lastmile
import model
import ppo
from beyond import reward_function
from interface import command_line, inputs, results
from report import charts, examine, write
from safety import terminal

HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&amp;\x1b[31m\u202e{}"
SHOWN = terminal.visible(HOSTILE)
CAP = 40  # --max-new-tokens
N = 4  # test inputs, all of them shown


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text between them, and under each output's heading its tokens' titles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.heading, self.titles = [], "", False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.heading = tag == "h4"
        if tag == "span" and "t" in dict(attributes).get("class", "").split():
            self.titles[-1][1].append(dict(attributes)["title"])

    def handle_data(self, text):
        self.text += text
        if self.heading:
            self.titles.append((text.strip(), []))
        self.heading = False


@pytest.fixture(scope="module")
def run(run_folder, reward, tmp_path_factory):
    """A small run through all stages, reported. One prediction is hostile, another as long as the cap."""
    folder = tmp_path_factory.mktemp("report") / "toy"
    folder.mkdir()
    (folder / "base").symlink_to(run_folder / "base")
    (folder / "reward").symlink_to(reward)
    short = ["--output-dir", str(folder), "--max-new-tokens", str(CAP)]
    for stage in ("mle", "ppo"):
        small = "--max-steps 4 --train-examples 28 --learning-rate 1e-2 --eval-every 2 --eval-examples 4 --keep best"
        assert lastmile.main([stage, *short, *small.split()]) == 0
    assert lastmile.main(["eval", *short, "--test-examples", str(N)]) == 0
    file = folder / "eval" / "policy.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["prediction"] = HOSTILE
    rows[1]["prediction"] = "park " * 2 * CAP
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lastmile.main(["report", "--output-dir", str(folder)]) == 0
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_smooth_is_the_mean_of_the_window():
    """Against the definition, at every width: one column off, and the line would lag the dots."""
    values = [math.sin(i) * i for i in range(23)]
    assert charts.smooth([0, 3, 0], 3) == [1.5, 1, 1.5]
    for window in (1, 3, 5, 23):
        near = [values[max(i - window // 2, 0) : i + window // 2 + 1] for i in range(23)]
        assert charts.smooth(values, window) == pytest.approx([sum(some) / len(some) for some in near])


@pytest.mark.parametrize("low, high", [(0, 1), (-143, 16), (0.0351, 0.0352), (-1e-7, 3e5), (0, 1e-300)])
def test_ticks_are_few_round_and_inside(low, high):
    """An axis needs two to five numbers, whatever the range."""
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 5 and all(low <= tick <= high for tick in found)
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]


def test_colours_are_symmetric():
    """Blue and orange mean the same distance from the middle: of the reward 0.5, of value and advantage 0."""
    values = [-4, 2, 8, 0, -8, 4]
    tokens = [{"numbers": {"reward": x / 8, "value": x, "return": 1}} for x in values]
    _, _, scales = write.gallery([{"outputs": {"policy": {"tokens": tokens}}}], "")
    assert scales == {"reward": (0.5, 0.5), "value": (0, 8)}
    assert [token["style"] for token in tokens] == [
        "--r:-1.00;--v:-0.50;", "--r:-0.50;--v:0.25;", "--r:1.00;--v:1.00;",
        "--r:-1.00;--v:0.00;", "--r:-1.00;--v:-1.00;", "--r:0.00;--v:0.50;",
    ]  # fmt: skip


def luminance(colour):
    """Relative luminance by WCAG 2, of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_background(scheme):
    """WCAG's 4.5 : 1, text on the strongest blue and orange of a token, and whatever is written on the page itself."""
    css = (Path(write.__file__).parent / "style.css").read_text()
    found = re.findall(r"--(\w+):light-dark\((#\w+),(#\w+)\)", css)
    colours = {name: light if scheme == "light" else dark for name, light, dark in found}
    pairs = [("text", "above"), ("text", "below"), *((name, "page") for name in ("text", "faint", "blue", "orange"))]
    for name, ground in pairs:
        low, high = sorted([luminance(colours[name]), luminance(colours[ground])])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_ppo_s_batches_stand_apart_and_its_validations_do_not():
    """The returns of samples and of the truth differ by a hundred: one line through both would show the mixture, not
    the learning. Validations come after steps of either kind and are one line.
    """
    rows = [{"step": i, "ground_truth": i % 2 == 1, "return": 10.0 if i % 2 else -100.0} for i in range(64)]
    rows = [row | ({"val_return": row["step"]} if row["step"] % 9 == 8 else {}) for row in rows]
    found = {chart["title"]: chart["legend"] for chart in charts.curves(rows)}
    assert found["return"] == [("s0", "sampled -100"), ("s1", "truth 10")]
    assert charts.lines_of("val_return", rows) == {"at the end": [(step, step) for step in range(8, 64, 9)]}


def test_the_best_validation_is_marked(run):
    """The step and the value of the best validation of each stage, and that its adapter was kept."""
    page = (run / "report.html").read_text()
    for stage, key, choose in (("mle", "val_loss", min), ("ppo", "val_return", max)):
        best = choose(journal(run / stage, "validation.jsonl"), key=lambda line: line[key])
        assert f"best, after step {best['step']}, kept: {charts.number(best[key])}" in page
    assert page.count('<path class="best"') == 2


def test_validations_belong_to_steps_not_to_lines(tmp_path):
    """A lone checkpoint's log begins late: what was validated after the eighth step is still in the line of step 7."""
    (tmp_path / "validation.jsonl").write_text('{"step": 3, "val_loss": 1}\n{"step": 8, "val_loss": 2}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"step": 8}\n')
    assert write.log_of(tmp_path) == [{"step": 6}, {"step": 7, "val_loss": 2}, {"step": 8}]


def test_numbers_that_cannot_be_drawn_are_left_out():
    """A loss of nan, a KL that most steps lack, or no such key at all is no reason to have no page."""
    losses = [1.0, math.nan, None, "x", math.inf, True, 2.0, 10**400, 3]
    (chart,) = charts.curves([{"step": i, "loss": x} for i, x in enumerate(losses)])
    assert chart["title"] == "loss" and chart["paths"][0][1].count("h0") == 3
    assert "nan" not in str(chart) and "inf" not in str(chart)


def test_histograms_share_their_axes():
    """Bars are shares of the outputs, the reference's outline and the axes are the same in each chart."""
    columns = {"reference": ["a b"] * 4, "base": ["a", "a b c", "a b c", "a b c d"], "mle": ["a b"] * 4}
    figures, width = charts.histograms(columns, "ascii")
    assert width == 1 and [chart["title"] for chart in figures] == ["base", "mle"]
    (base, reference), (mle, same) = [[path for _, path in chart["paths"]] for chart in figures]
    assert reference == same and mle == reference and figures[0]["grid"] == figures[1]["grid"]
    heights = [round(1.05 - float(y) * 1.05 / charts.HEIGHT, 2) for y in re.findall(r"\S+ (\S+?)[Lh]", base)]
    assert heights[1::2] == [-1, 0.25, -1, 0.5, 0.25, -1]  # -1: none, below the frame
    assert figures[0]["legend"] == [("bar", "base, median 3"), ("s1", "reference, median 2")]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def numbers_of(title):
    """{name: number} of a token's title, whose text may hold anything."""
    return {name: float(x) for name, x in re.findall(r"(\w+) (-?[\d.]+)(?:, |$)", title[title.rindex(": reward") :])}


def test_token_numbers_are_those_of_ppo(run):
    """Every number of every token, against a pass over that text alone by the functions that PPO itself calls: a
    column off, or padding that leaks, would colour the wrong word.
    """
    page = Page((run / "report.html").read_text())
    settings = command_line.read(["report", "--output-dir", str(run)])[1]
    llama, tokenizer = inputs.open_base(settings)
    llama.load_adapter("reward", run / "reward", head=True)
    llama.load_adapter("policy", run / "ppo" / "policy")
    llama.load_adapter("value", run / "ppo" / "value", head=True)
    columns = results.read_outputs(run / "eval")
    names = ("reference", "base", "mle", "policy")
    assert [name for name, _ in page.titles] == list(names) * N
    titles, compared = iter(page.titles), 0
    for i in range(N):
        prompt = tokenizer.prompts([columns["source"][i]])[0]
        reference = len(tokenizer.encode(columns["reference"][i])) + 1
        for name in names:
            ids = tokenizer.encode(columns[name][i])
            ids += [tokenizer.eos] * (len(ids) < CAP or name == "reference")
            batch = data.collate([data.Datum("", "", "", prompt, ids)])
            batch = replace(batch, ref_len=torch.tensor([reference]))
            with torch.inference_mode():
                logp, value, _ = ppo.actor_critic(llama, batch)
                score = ppo.reward_scores(llama, batch)
            traj = ppo.trajectory(batch, logp, value, ppo.token_rewards(batch, score, 2.5), 0.99999, 0.95)
            expected = {"reward": traj.reward, "score": score, "penalty": ppo.length_penalty(batch, 2.5),
                        "value": value, "advantage": traj.adv, "return": traj.ret}  # fmt: skip
            found = [numbers_of(title) for title in next(titles)[1]]
            assert len(found) == len(ids)
            for key, column in expected.items():
                wanted = column[batch.mask].tolist()
                assert [token[key] for token in found] == pytest.approx(wanted, abs=2e-3), (i, name, key)
                compared += len(wanted)
    assert compared > 6 * N * 4 * 5


def reported(run, folder, **changed):
    """{(input, column): [{name: number} of each token]}, as if stages had been run with other settings."""
    for stage in ("base", "reward", "ppo", "eval"):
        if stage not in changed:
            (folder / stage).symlink_to(run / stage)
            continue
        shutil.copytree(run / stage, folder / stage)
        config = json.loads((run / stage / "config.json").read_text())
        (folder / stage / "config.json").write_text(json.dumps(config | changed[stage]))
    assert lastmile.main(["report", "--output-dir", str(folder)]) == 0
    titles = Page((folder / "report.html").read_text()).titles
    return {(i // 4, name): [numbers_of(title) for title in found] for i, (name, found) in enumerate(titles)}


def test_the_report_scores_at_the_reward_models_level(run, tmp_path):
    """After `reward --level sequence` PPO pays the last token only. The report once scored every token, and showed
    rewards that PPO had never seen. In a run that was moved, the reward model is not where PPO found it.
    """
    found = reported(run, tmp_path, reward={"level": "sequence"}, ppo={"reward": "moved/reward"})
    assert len(found) == N * 4
    for tokens in found.values():
        assert all(token["score"] == 0 for token in tokens[:-1])
    assert any(tokens[-1]["score"] != 0 for tokens in found.values())


def test_the_report_scores_with_the_reward_function(run, tmp_path):
    """After `ppo --reward rouge` the last token's score is la-rouge1-F1, all others are 0, and the reward model that
    the run's folder also has is not used.
    """
    found = reported(run, tmp_path, ppo={"reward": "rouge"})
    columns = results.read_outputs(run / "eval")
    for (i, name), tokens in found.items():
        expected = reward_function.rouge("", columns["reference"][i], columns[name][i])
        assert [token["score"] for token in tokens[:-1]] == [0] * (len(tokens) - 1)
        assert tokens[-1]["score"] == pytest.approx(expected, abs=1e-3), (i, name)


def test_the_end_of_an_output_is_shown(run):
    """EOS is a token with a reward of its own; what the cap cut has none, and where the penalty begins is marked."""
    texts = [re.sub("<[^>]*>", "", text) for text in (run / "report.html").read_text().split("</p>")]
    assert any(re.search(r"park.*reference ends: \d+.*park.*cut by the cap at \d+$", text) for text in texts)
    assert sum(text.endswith("EOS") for text in texts) >= N  # the references


def test_pieces_join_to_the_text(run_folder):
    """Emoji are several tokens each, and a decoder shows half of one as a replacement character: none may be lost."""
    tokenizer = data.load_tokenizer(run_folder / "base")
    for text in ("Amy likes 🦊🦊 and naïve cafés.", "a\n\n b", "🦊", "\ufffd", ""):
        assert "".join(examine.pieces(tokenizer, tokenizer.encode(text))) == text


# ----------------------------------------------------------------------------------------------------------------------
# The file


def test_strange_text_is_text(run):
    """A model says what it likes, and data come from strangers: neither may open a tag or an attribute in the page, nor
    turn its direction round.
    """
    text = (run / "report.html").read_text()
    page = Page(text)
    assert SHOWN in re.sub(r"·|reference ends: \d+", "", page.text)  # ·: a token that is a part of a character
    assert not any(name.startswith(("on", "src")) for _, attributes in page.tags for name in attributes)
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "link", "iframe", "script"})
    assert "\x1b" not in text and "\u202e" not in text


def test_every_place_for_text_is_escaped():
    """The same where our own stages write nothing hostile today, but a hand-made file could."""
    tokens = [{"text": HOSTILE, "numbers": {"reward": 1.0, "penalty": 0.0, "return": 1.0}}]
    outputs = {"reference": {"tokens": tokens, "cut": False}, HOSTILE: {"tokens": tokens, "cut": True}}
    tables = [["", "base"], [HOSTILE, "1"]], [["", HOSTILE]], HOSTILE, HOSTILE
    examples = write.gallery([{"id": HOSTILE, "source": HOSTILE, "outputs": outputs}], HOSTILE)
    page = Page(write.render(HOSTILE, HOSTILE, tables=tables, examples=examples))
    assert page.text.count(HOSTILE) == 13 and "img" not in {tag for tag, _ in page.tags}


def test_the_page_is_a_function_of_the_run(run):
    """The same run, the same bytes: a report can be compared."""
    before = (run / "report.html").read_bytes()
    assert lastmile.main(["report", "--output-dir", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("stages", "sections"),
    [
        (["ppo"], ["curves"]),
        (["eval"], ["tables", "lengths", "examples"]),
        (["base", "eval", "reward"], ["curves", "tables", "lengths", "examples"]),
    ],
)
def test_a_part_of_a_run_is_reported(run, tmp_path, stages, sections, capsys):
    """Whatever stages have run: the page shows these, and numbers only where there is a model to give them."""
    for stage in stages:
        (tmp_path / stage).symlink_to(run / stage)
    assert lastmile.main(["report", "--output-dir", str(tmp_path), "--examples", "2"]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 2 * ("eval" in stages)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == sections
    choices = [attributes["id"] for tag, attributes in page.tags if tag == "input"]
    assert choices == (["by-reward"] if "reward" in stages else [])


def test_a_run_at_work_is_reported(run, tmp_path):
    """A training's page can be looked at before it ends, even while its last line is only half written."""
    (tmp_path / "mle.partial").mkdir()
    log = (run / "mle" / "metrics.jsonl").read_bytes()
    (tmp_path / "mle.partial" / "metrics.jsonl").write_bytes(log[:-9])
    assert lastmile.main(["report", "--output-dir", str(tmp_path)]) == 0
    assert "3 steps" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (None, "", "no stage has run there yet; run: python lastmile.py reward"),
        ("mle/metrics.jsonl", '{"step": 0}\n[]\n', "metrics.jsonl: line 2 is not one that lastmile writes"),
        ("eval/policy.jsonl", '{"id": 3}\n', "policy.jsonl: line 1 is not one that lastmile writes"),
        ("eval/policy.jsonl", "", "not the predictions that eval writes"),
        ("eval/scores.json", '{"base": 3}', "not the scores that eval writes"),
    ],
)
def test_bad_input_ends_in_one_line(run, tmp_path, file, content, said, capsys):
    """Exit code 2, one line that names the file, and no page that looks as if all were well."""
    if file:
        folder = tmp_path / Path(file).parent
        shutil.copytree(run / folder.name, folder)
        (tmp_path / file).write_text(content)
    assert lastmile.main(["report", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.glob("*report*"))


def test_a_report_is_there_whole_or_not_at_all(run, tmp_path, monkeypatch):
    """A full disk while the page is written leaves the one before, and nothing half done beside it."""
    (tmp_path / "mle").symlink_to(run / "mle")
    (tmp_path / "report.html").write_text("the one before")

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(write, "sync", full)
    assert lastmile.main(["report", "--output-dir", str(tmp_path)]) == 1
    assert (tmp_path / "report.html").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mle", "report.html"]


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, driven by playwright."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("needs Chromium: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: make setup")
    with driver.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        yield playwright.chromium.launch(executable_path=found, args=flags)


@pytest.fixture
def page(browser, run):
    """The report in a window. At the end: nothing on the console, and no request but one."""
    heard, asked = [], []
    page = browser.new_page()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report.html").as_uri())
    yield page
    assert heard == [] and len(asked) == 1
    page.close()


def test_the_page_fits(page):
    """On a phone and on a desk nothing stands beyond the edge: what is wide, a table, scrolls within itself."""
    for scheme, ground in (("light", "rgb(253, 252, 250)"), ("dark", "rgb(21, 23, 26)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    for width in (360, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_switch_recolours_tokens(page):
    """By keyboard alone: the arrow keys choose among reward, value and advantage, and the tokens' colours follow."""
    page.focus("#by-reward")
    seen = []
    for name in ("reward", "value", "advantage"):
        assert page.evaluate("document.activeElement.id") == f"by-{name}" and page.is_checked(f"#by-{name}")
        colours = "all => all.map(x => getComputedStyle(x).backgroundColor)"
        seen.append(page.eval_on_selector_all(".t", colours))
        page.keyboard.press("ArrowDown")
    assert seen[0] != seen[1] != seen[2] != seen[0] and all(len(set(colours)) > 5 for colours in seen)


def test_tokens_can_be_reached_and_read(page):
    """By Tab as by pointing: a token's numbers are shown at the bottom of the window."""
    page.focus("#by-advantage")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    token = page.locator(".t").nth(1)
    assert token.evaluate("x => x === document.activeElement")
    read = "x => [getComputedStyle(x, '::after').content, getComputedStyle(x, '::after').position]"
    content, position = token.evaluate(read)
    assert token.get_attribute("title") in json.loads(content) and position == "fixed"


def test_print_keeps_the_colours_and_what_they_say(page):
    """On paper there is no hovering and often no colour: backgrounds are kept, and a line says the sign."""
    page.set_viewport_size({"width": 718, "height": 800})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    for sign, above, below in (("-", "0px", "2px"), ("", "2px", "0px")):
        style = "x => (s => [s.borderTopWidth, s.borderBottomWidth, s.printColorAdjust])(getComputedStyle(x))"
        token = page.locator(f".t[style*='--r:{sign}1.00']").first
        assert token.evaluate(style) == [above, below, "exact"]


# ----------------------------------------------------------------------------------------------------------------------
# --report-to

TINY = "--max-steps 3 --train-examples 14"

WANDB = """
class Error(Exception): pass
calls = []
class Run:
    id = "abc"
    def log(self, numbers, step): calls.append((step, numbers))
    def finish(self): calls.append("finish")
def init(**settings):
    calls.append(settings)
    return Run()
"""


def test_loggers_hear_every_step(fresh_run, tmp_path, monkeypatch):
    """The numbers of metrics.jsonl, and what the log cannot have, speed and memory; and they change no result.
    Tensorboard itself reads them back; --overwrite leaves no second run beside the first.
    """
    pytest.importorskip("tensorboard", reason="needs tensorboard: make setup")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(os.sys.modules, "wandb", raising=False)
    mle = fresh_run.folder / "mle"
    assert fresh_run("mle", *TINY.split()) == 0
    before = (mle / "adapter_model.safetensors").read_bytes()
    for _ in range(2):
        assert fresh_run("mle", *TINY.split(), "--report-to", "tensorboard,wandb", "--overwrite") == 0
    import wandb

    rows = journal(mle)
    first, *steps, last = wandb.calls[len(wandb.calls) // 2 :]
    assert first["name"] == "toy mle" and first["config"]["max_steps"] == 3 and last == "finish"
    for step, numbers in steps:
        assert numbers.pop("tokens_per_second") > 0 and 0.1 < numbers.pop("peak_memory_gb") < 64
        assert {"step": step} | numbers == rows[step]
    assert len(steps) == len(rows)
    found = EventAccumulator(str(fresh_run.folder / "tensorboard" / "mle")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in rows]
    assert fresh_run("mle", *TINY.split(), "--report-to", "wandb", "--overwrite", "--max-time", 1e-9) == 143
    wandb.calls.clear()
    assert fresh_run("mle", *TINY.split(), "--report-to", "wandb", "--overwrite", "--resume") == 0
    assert wandb.calls[0]["id"] == "abc" and wandb.calls[0]["resume"] == "allow" and wandb.calls[1][0] == 1
    assert "id" not in first
    assert (mle / "adapter_model.safetensors").read_bytes() == before


def test_tensorboard_shows_a_resumed_step_once(fresh_run, monkeypatch):
    """Steps that a killed run had logged after its last checkpoint are logged again when it is resumed."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: make setup")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*TINY.split(), "--report-to", "tensorboard", "--save-every", 1]
    monkeypatch.setattr(lastmile, "save_trained", Mock(side_effect=MemoryError))
    assert fresh_run("mle", *flags) == 4
    shutil.rmtree(fresh_run.folder / "mle.partial/checkpoints/step-00000003")
    assert fresh_run("mle", *flags, "--resume") == 4
    found = EventAccumulator(str(fresh_run.folder / "tensorboard" / "mle")).Reload()
    assert [e.step for e in found.Scalars("loss")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "said"), [("mlflow", "choose tensorboard, wandb"), ("wandb", ".venv/bin/pip install wandb")]
)
def test_a_logger_that_is_not_there_is_said_first(fresh_run, value, said, monkeypatch, capsys):
    """One line before any work: not after the model has been loaded, or the first step made."""
    find = command_line.importlib.util.find_spec
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("the model was loaded"))
    assert fresh_run("mle", "--report-to", value) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (fresh_run.folder / "mle.partial").exists()
