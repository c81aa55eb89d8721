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
from report import charts, examine
from report import page as page_module
from report import write as report_writer
from safety import terminal

HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&amp;\x1b[31m\u202e{}"
SHOWN = terminal.visible(HOSTILE)


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
            self.titles[-1][1].append(dict(attributes)["title"].replace("−", "-"))

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
    for stage in ("mle", "ppo"):
        small = "--max-steps 4 --train-examples 28 --learning-rate 1e-2 --eval-every 2 --eval-examples 4 --keep best"
        assert lastmile.main([stage, "--output-dir", str(folder), *small.split()]) == 0
    assert lastmile.main(["eval", "--output-dir", str(folder), "--test-examples", "6"]) == 0
    file = folder / "eval" / "policy.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["prediction"] = HOSTILE
    rows[1]["prediction"] = "park " * 200
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lastmile.main(["report", "--output-dir", str(folder)]) == 0
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_smooth_is_the_mean_of_the_window():
    """Against the definition, at every width: prefix sums are easily one off, and the line would lag the dots."""
    values = [math.sin(i) * i for i in range(23)]
    assert charts.smooth([0, 3, 0], 3) == [1.5, 1, 1.5]
    for window in (0, 1, 2, 5, 22, 60):
        expected = [
            sum(near) / len(near) for i in range(23) for near in [values[max(i - window // 2, 0) : i + window // 2 + 1]]
        ]
        assert charts.smooth(values, window) == pytest.approx(expected)


@pytest.mark.parametrize("low, high", [(0, 1), (-143, 16), (0.0351, 0.0352), (-1e-7, 3e5), (5, 5), (0, 1e-300)])
def test_ticks_are_few_round_and_inside(low, high):
    """An axis needs two to five numbers, whatever the range; a flat curve has one."""
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 5 and all(low <= tick <= high for tick in found)
    assert len({charts.number(tick, 5) for tick in found}) == len(found)
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]


def test_levels_are_symmetric():
    """Blue and orange must mean the same distance, and the bounds that the legend shows be those that colour."""
    assert page_module.level(-3, 0, (1, 2, 4, 8)) == 2
    for x in (0, 0.5, 1, 2, 5, 8, 100):
        assert page_module.level(x, 0, (1, 2, 4, 8)) - 4 == 4 - page_module.level(-x, 0, (1, 2, 4, 8))
    assert [page_module.level(x, 0.5, [0.1, 0.2, 0.3, 0.4]) for x in (-2, 0.05, 0.5, 0.65, 1.2)] == [0, 0, 4, 5, 8]


def luminance(colour):
    """Relative luminance by WCAG 2, of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [page_module.LIGHT, page_module.DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_background(colours):
    """WCAG's 4.5 : 1, text on all nine tones, and everything else that is written on the page itself."""
    pairs = [("text", tone) for tone in colours["tones"]]
    pairs += [(name, colours["page"]) for name in ("text", "faint", "blue", "orange")]
    for name, ground in pairs:
        low, high = sorted([luminance(colours[name]), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_sampled_and_true_batches_stand_apart():
    """Their returns differ by a hundred: one line through both would show the mixture, not the learning."""
    rows = [{"step": i, "ground_truth": i % 2 == 1, "return": 10.0 if i % 2 else -100.0} for i in range(64)]
    drawn = Page(charts.chart("return", rows))
    assert "sampled −100" in drawn.text and "truth 10" in drawn.text


def test_the_best_validation_is_marked(run):
    """The step and the value of the best validation of each stage, and that its adapter was kept."""
    page = (run / "report.html").read_text()
    for stage, key, choose in (("mle", "val_loss", min), ("ppo", "val_return", max)):
        best = choose(journal(run / stage, "validation.jsonl"), key=lambda line: line[key])
        assert f"best, after step {best['step']}, kept: {charts.number(best[key])}" in page
    assert page.count('<path class="best"') == 2


def test_validations_are_of_no_batch():
    """PPO's validations stand beside steps on samples and on the truth; their curve has all of them."""
    rows = [{"step": step, "ground_truth": step % 2 == 1, "val_return": step} for step in range(9, 60, 10)]
    ((_, key, found),) = charts.lines_of("val_return", rows)
    assert key == "val_return" and found == rows


def test_numbers_that_cannot_be_drawn_are_left_out():
    """A loss of nan, a KL that most steps lack, or no such key at all is no reason to have no page."""
    rows = [{"step": i, "loss": x} for i, x in enumerate([1.0, math.nan, None, "x", math.inf, True, 2.0])]
    drawn = charts.chart("loss", [*rows, {"step": 7, "loss": 10**400}])
    assert re.search('class="dots s0" d="([^"]*)"', drawn)[1].count("h0") == 2
    assert "nan" not in drawn and "inf" not in drawn
    assert charts.chart("kl", rows) == ""


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
    names = ("reference", "base", "mle", "policy", "base cleaned", "mle cleaned")
    assert [name for name, _ in page.titles] == list(names) * 6
    titles, compared = iter(page.titles), 0
    for i in range(6):
        prompt = tokenizer.prompts([columns["source"][i]])[0]
        reference = len(tokenizer.encode(columns["reference"][i])) + 1
        for name in names:
            ids = tokenizer.encode(columns[name][i])
            ids += [tokenizer.eos] * (len(ids) < 100)
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
    assert compared > 6 * 6 * 6 * 5


def reported(fresh_run, *ppo_flags):
    """The token numbers of each output, {(input, column): [{name: number}]}, after a short PPO with the given flags."""
    small = "--train-examples 8 --max-steps 2 --max-new-tokens 24 --learning-rate 3e-2"
    assert fresh_run("ppo", *small.split(), *ppo_flags) == 0
    assert fresh_run("eval", "--adapters", "base,policy", "--test-examples", 2, "--max-new-tokens", 24) == 0
    assert fresh_run("report", "--examples", 2) == 0
    titles = Page((fresh_run.folder / "report.html").read_text()).titles
    columns = len(titles) // 2
    return {(i // columns, name): [numbers_of(t) for t in found] for i, (name, found) in enumerate(titles)}


def test_the_report_scores_at_the_reward_models_level(fresh_run):
    """After `reward --level sequence` PPO pays the last token only. The report once scored every token, and showed
    rewards that PPO had never seen.
    """
    flags = "--train-examples 8 --eval-examples 6 --max-steps 4 --level sequence"
    assert fresh_run("reward", *flags.split()) == 0
    found = reported(fresh_run)
    assert len(found) == 2 * 4  # reference, base, policy, base cleaned
    for tokens in found.values():
        assert all(token["score"] == 0 for token in tokens[:-1])
    assert any(tokens[-1]["score"] != 0 for tokens in found.values())


def test_the_report_scores_with_the_reward_function(fresh_run):
    """After `ppo --reward rouge` the last token's score is la-rouge1-F1, all others are 0, and the reward model that
    the run's folder also has is not used.
    """
    flags = "--train-examples 8 --eval-examples 6 --max-steps 4"
    assert fresh_run("reward", *flags.split()) == 0
    found = reported(fresh_run, "--reward", "rouge")
    columns = results.read_outputs(fresh_run.folder / "eval")
    for (i, name), tokens in found.items():
        expected = reward_function.rouge("", columns["reference"][i], columns[name][i])
        assert [token["score"] for token in tokens[:-1]] == [0] * (len(tokens) - 1)
        assert tokens[-1]["score"] == pytest.approx(expected, abs=1e-3), (i, name)


def test_the_end_of_an_output_is_shown(run):
    """EOS is a token with a reward of its own; what the cap cut has none, and where the penalty begins is marked."""
    texts = [re.sub("<[^>]*>", "", text) for text in (run / "report.html").read_text().split("</p>")]
    assert any(re.search(r"park.*reference ends: \d+.*park.*cut by the cap at \d+$", text) for text in texts)
    assert sum(text.endswith("EOS") for text in texts) >= 6 + 1  # the references, and the hostile one


def test_pieces_join_to_the_text(run_folder):
    """Emoji are several tokens each, and a decoder shows half of one as a replacement character: none may be lost."""
    tokenizer = data.load_tokenizer(run_folder / "base")
    for text in ("Amy likes 🦊🦊 and naïve cafés.", "a\n\n b", "🦊", "\ufffd", ""):
        tokens = examine.tokens_of(tokenizer, {"policy": text}, {"policy": text}, 100)["policy"]["tokens"]
        assert "".join(token["text"] for token in tokens[:-1]) == text and tokens[-1]["text"] == "EOS"


# ----------------------------------------------------------------------------------------------------------------------
# The file


def test_strange_text_is_text(run):
    """A model says what it likes, and data come from strangers: neither may open a tag or an attribute in the page, nor
    turn its direction round.
    """
    text = (run / "report.html").read_text()
    page = Page(text)
    assert SHOWN in re.sub(r"·|reference ends: \d+", "", page.text)  # ·: a token that is a part of a character
    allowed = {"class", "tabindex", "title", "dir", "id", "href", "type", "name", "checked", "role", "aria-label",
               "viewbox", "d", "x", "y", "width", "height", "text-anchor", "charset", "content", "http-equiv",
               "lang"}  # fmt: skip
    assert {name for _, attributes in page.tags for name in attributes} <= allowed
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "link", "iframe"})
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize("place", ["title", "facts", "id", "source", "column"])
def test_every_place_for_text_is_escaped(place):
    """The same where our own stages write nothing hostile today, but a hand-made file could."""
    given = {name: HOSTILE if name == place else name for name in ("title", "facts", "id", "source", "column")}
    output = {"tokens": [{"text": "a", "reward": 1.0, "penalty": 0.0, "return": 1.0}], "cut": False, "reference": 1}
    scores = {"base": {"excess_length": 1.0}}
    intervals = {"base": {"excess_length": (0.0, 2.0)}}
    facts = {
        "data": given["facts"],
        "model": "m",
        "seed": 1,
        "commit": given["facts"],
        "n": 1,
        "bleurt": given["facts"],
    }
    sections = [
        page_module.tables(scores, intervals, facts),
        page_module.gallery(
            [{"id": given["id"], "source": given["source"], "outputs": {given["column"]: output}}], "note"
        ),
    ]
    page = Page(page_module.page(given["title"], given["facts"], sections))
    assert HOSTILE in page.text and "img" not in {tag for tag, _ in page.tags}


def test_the_page_is_a_function_of_the_run(run):
    """The same run, the same bytes: a report can be compared, and its draw of examples is by seed."""
    before = (run / "report.html").read_bytes()
    assert lastmile.main(["report", "--output-dir", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before
    assert lastmile.main(["report", "--output-dir", str(run), "--examples", "2", "--seed", "5"]) == 0
    assert (run / "report.html").read_text().count("<article>") == 2
    (run / "report.html").write_bytes(before)


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
    assert lastmile.main(["report", "--output-dir", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
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

    monkeypatch.setattr(report_writer, "sync", full)
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
def open_page(browser, run):
    """Opens the report in a window of a given width. At the end: nothing on the console, and no request but one."""
    heard, asked, pages = [], [], []

    def opened(width, **how):
        page = browser.new_page(viewport={"width": width, "height": 800}, **how)
        pages.append(page)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((run / "report.html").as_uri())
        return page

    yield opened
    assert heard == [] and len(asked) == len(pages)
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(open_page, width, scheme):
    """On a phone and on a desk nothing stands beyond the edge: what is wide, a table, scrolls within itself."""
    page = open_page(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(253, 252, 250)" if scheme == "light" else "rgb(21, 23, 26)")


def test_the_switch_recolours_tokens(open_page):
    """By keyboard alone: the arrow keys choose among reward, value and advantage, and the tokens' colours follow."""
    page = open_page(1400)
    page.focus("#by-reward")
    seen = []
    for name in page_module.NUMBERS:
        assert page.evaluate("document.activeElement.id") == f"by-{name}" and page.is_checked(f"#by-{name}")
        shown = page.eval_on_selector_all(".scale", "all => all.filter(x => x.offsetHeight).map(x => x.className)")
        assert shown == [f"scale {name}"]
        seen.append(page.eval_on_selector_all(
            "article .t", "all => all.map(x => getComputedStyle(x).backgroundColor).join()"
        ))  # fmt: skip
        page.keyboard.press("ArrowDown")
    assert len(set(seen)) == 3 and all("rgba(0, 0, 0, 0)" not in colours for colours in seen)


def test_tokens_can_be_reached_and_read(open_page):
    """Tab comes to an output once, not to each of its tokens; the arrow keys go along it, and the numbers are shown."""
    page = open_page(360)
    assert page.locator("article .t[tabindex='0']").count() == page.locator("article .text").count()
    page.focus("article .t")
    page.keyboard.press("ArrowRight")
    token = page.locator("article .t").nth(1)
    assert token.evaluate("x => x === document.activeElement")
    read = "x => [getComputedStyle(x, '::after').content, getComputedStyle(x, '::after').position]"
    content, position = token.evaluate(read)
    assert token.get_attribute("title") in json.loads(content) and position == "fixed"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # at the first token it stays
    assert page.locator("article .t").nth(0).evaluate("x => x === document.activeElement")


def test_print_keeps_the_colours_and_what_they_say(open_page):
    """On paper there is no hovering and often no colour: backgrounds are kept, and the underline says the sign."""
    page = open_page(718, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 252, 250)"
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    for kind, line in (("r0", "dashed"), ("r8", "solid")):
        style = f".scale .{kind}", "x => [getComputedStyle(x).borderBottomStyle, getComputedStyle(x).printColorAdjust]"
        assert page.eval_on_selector(*style) == [line, "exact"]


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


def test_wandb_hears_every_step(fresh_run, tmp_path, monkeypatch):
    """The numbers of metrics.jsonl, and what the log cannot have, speed and memory; and they change no result."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(os.sys.modules, "wandb", raising=False)
    assert fresh_run("mle", *TINY.split()) == 0
    before = (fresh_run.folder / "mle" / "adapter_model.safetensors").read_bytes()
    assert fresh_run("mle", *TINY.split(), "--report-to", "wandb", "--overwrite") == 0
    import wandb

    first, *steps, last = wandb.calls
    rows = [json.loads(line) for line in (fresh_run.folder / "mle" / "metrics.jsonl").read_text().splitlines()]
    assert first["name"] == "toy mle" and first["config"]["max_steps"] == 3 and last == "finish"
    for step, numbers in steps:
        assert numbers.pop("tokens_per_second") > 0 and 0.1 < numbers.pop("peak_memory_gb") < 64
        assert {"step": step} | numbers == rows[step]
    assert len(steps) == len(rows)
    assert fresh_run("mle", *TINY.split(), "--report-to", "wandb", "--overwrite", "--max-time", 1e-9) == 143
    wandb.calls.clear()
    assert fresh_run("mle", *TINY.split(), "--report-to", "wandb", "--overwrite", "--resume") == 0
    assert wandb.calls[0]["id"] == "abc" and wandb.calls[0]["resume"] == "allow" and wandb.calls[1][0] == 1
    assert "id" not in first
    assert (fresh_run.folder / "mle" / "adapter_model.safetensors").read_bytes() == before


def test_tensorboard_hears_every_step(fresh_run):
    """What is written can be read back by tensorboard itself; --overwrite leaves no second run beside the first."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: make setup")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        assert fresh_run("mle", *TINY.split(), "--report-to", "tensorboard", "--overwrite") == 0
    found = EventAccumulator(str(fresh_run.folder / "tensorboard" / "mle")).Reload()
    rows = [json.loads(line) for line in (fresh_run.folder / "mle" / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in rows]


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


def test_validations_belong_to_steps_not_to_lines(tmp_path):
    """A lone checkpoint's log begins late: what was validated after the eighth step is still in the line of step 7."""
    (tmp_path / "validation.jsonl").write_text('{"step": 3, "val_loss": 1}\n{"step": 8, "val_loss": 2}\n')
    lines = [{"step": 6}, {"step": 7}, {"step": 8}]
    report_writer.add_validations(lines, tmp_path / "validation.jsonl")
    assert lines == [{"step": 6}, {"step": 7, "val_loss": 2}, {"step": 8}]
