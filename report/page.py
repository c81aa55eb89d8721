"""The report's page: one HTML file that shows a run, with nothing outside of it: no server, no network, no fonts.

Numbers and texts in, HTML out by the templates of this folder; nothing here reads a run or knows a tensor. There is no
JSON in the page, and its only script moves the focus along a text's tokens by the arrow keys.

Colours: blue above, orange below, which the colour-blind tell apart; the sign is in the underline, too (solid above,
dashed below), for print without colours. A token has a class for each of reward, value and advantage, with a level from
0, the lowest, to 8: r3 v5 a8. CSS alone makes the radio buttons choose among the three.
"""

import base64
import bisect
import hashlib
import re
from typing import NamedTuple

from eval import cells
from report.charts import CHARTS, chart, histograms, number
from report.template import environment, macros, read

NUMBERS = ("reward", "value", "advantage")  # what tokens can be coloured by; the first letter is their CSS class
MINUS = re.compile(r"^-(?=\d)")  # of a number; names have hyphens
TITLE = ("reward", "score", "penalty", "value", "advantage", "return")  # the numbers of a token's title, in this order


class Section(NamedTuple):
    id: str
    title: str
    body: str  # HTML


def curves(stages, best=None, kept=()):
    """stages: {stage: lines of its metrics.jsonl as dicts}. best: {stage: (key, min or max)} of what --keep best keeps;
    kept: the stages that did.
    """
    shown = []
    for stage, rows in stages.items():
        key, choose = (best or {}).get(stage, ("", None))
        charts = [chart(title, rows, choose if title == key else None, stage in kept) for title in CHARTS]
        shown.append((stage, len(rows), charts))
    return Section("curves", "Learning curves", macros().curves(shown))


def tables(scores, intervals, facts, beside="auto"):
    """The arguments are those of eval.tables."""
    first, second, note = cells(scores, intervals, facts, beside)
    body = macros().tables(note, split_cells(first), split_cells(second), facts["bleurt"])
    return Section("tables", "Tables", body)


def split_cells(rows):
    """Rows of strings, as eval.cells makes them -> rows of (CSS class, number, half of its interval)."""
    found = []
    for row in rows:
        cells_of_row = []
        for i, text in enumerate(row):
            ours, _, half = (MINUS.sub("−", text) if i else text).partition(" ±")
            cells_of_row.append(("paper" if rows[0][i] == "paper" else "", ours, half))
        found.append(cells_of_row)
    return found


def lengths(columns, tokenizer="ascii"):
    """Histograms of words an output; columns: {name: texts}, the reference among them; tokenizer: eval's."""
    charts, width = histograms(columns, tokenizer)
    return Section("lengths", "Output lengths", macros().lengths(len(columns["reference"]), width, charts))


# ----------------------------------------------------------------------------------------------------------------------
# Examples, token by token


def level(x, middle, bounds):
    """0 (lowest) to 8: on which side of the middle x lies, and how many of four bounds its distance reaches.

    Example: level(-3, 0, (1, 2, 4, 8)) -> 2.
    """
    steps = bisect.bisect_right(bounds, abs(x - middle))
    return 4 + steps if x > middle else 4 - steps


def scales(examples):
    """{what tokens are coloured by: (middle, four bounds)}.

    The reward model learns 1 for true tokens and 0 for false ones, so its middle is 0.5. Values and advantages have no
    such scale: their bounds are quantiles of the distance from 0 over all tokens shown.
    """
    tokens = [token for example in examples for output in example["outputs"].values() for token in output["tokens"]]
    found = {}
    for name in NUMBERS:
        distances = sorted(abs(token[name]) for token in tokens if name in token)
        if distances and name == "reward":
            found[name] = 0.5, [0.1, 0.2, 0.3, 0.4]
        elif distances:
            quantiles = [distances[len(distances) * part // 100] for part in (20, 40, 60, 80)]
            found[name] = 0.0, [float(f"{max(bound, 1e-6):.2g}") for bound in quantiles]
    return found


def shown_token(token, scale, first):
    """What the template needs of one token. Tab reaches the first of a text (first)."""
    text = token["text"]
    numbers = [f"{name} {token[name] + 0.0:.3f}" for name in TITLE if name in token]  # + 0.0: no -0.000
    if not numbers:
        return {"title": "", "shown": text}
    kinds = [f"{name[0]}{level(token[name], *scale[name])}" for name in scale if name in token]
    if token.get("penalty", 0) < 0:
        kinds.append("late")
    bare = text.lstrip(" ") or text  # the space before a word stays without colour
    end = bool(token.get("end"))
    return {
        "title": f"{text.strip() or repr(text)}: {', '.join(numbers)}".replace("-", "−"),
        "kinds": " ".join(kinds),
        "tabindex": 0 if first else -1,
        "space": " " * (len(text) - len(bare)),
        "shown": text if end else bare.replace("\n", "↵\n") or "·",
        "end": end,
    }


def shown_output(name, output, scale):
    """What the template needs of one output.

    output: {"tokens": dicts of "text" and numbers, and "end" where it is EOS; "cut": whether the cap cut it off;
    "reference": tokens of the reference, EOS counted}. Without numbers, "reference" is missing.
    """
    tokens = output["tokens"]
    reference = output.get("reference")
    said = f"{len(tokens)} tokens" if reference else ""
    if tokens and "penalty" in tokens[0]:
        penalty = sum(token["penalty"] for token in tokens)
        said += f", penalty {number(penalty)}, return {number(tokens[0]['return'])}"
    return {
        "name": name,
        "said": said,
        "tokens": [shown_token(token, scale, i == 0) for i, token in enumerate(tokens)],
        "reference_ends": reference if reference and len(tokens) > reference else -1,
        "cut": output["cut"],
    }


def shown_scale(name, middle, bounds):
    """[(CSS classes, upper bound)] of the nine levels."""
    edges = [middle - bound for bound in reversed(bounds)] + [middle + bound for bound in bounds]
    labels = [number(edge) for edge in edges] + [""]
    return [(f"{name[0]}{i}", label) for i, label in enumerate(labels)]


def gallery(examples, note):
    """examples: [{"id", "source", "outputs": {name: see shown_output}}]; note: what the numbers are based on."""
    scale = scales(examples)
    shown = []
    for example in examples:
        outputs = [shown_output(name, output, scale) for name, output in example["outputs"].items()]
        shown.append({"id": example["id"], "source": example["source"], "outputs": outputs})
    legends = [(name, shown_scale(name, *found)) for name, found in scale.items()]
    return Section("examples", "Examples", macros().gallery(note, legends, shown))


# ----------------------------------------------------------------------------------------------------------------------
# The page

LIGHT = {
    "page": "#fdfcfa", "text": "#1c1e21", "faint": "#5b6067", "rule": "#dcdad4", "blue": "#1d5fa6", "orange": "#b04f00",
    "tones": ("#f0a050", "#f5bd85", "#f9d6b1", "#fcead6", "#f0efea", "#dfebf6", "#bed8ef", "#98c2e8", "#72abdf"),
}  # fmt: skip
DARK = {
    "page": "#15171a", "text": "#e9ebed", "faint": "#a0a6ad", "rule": "#34383d", "blue": "#7ab4f0", "orange": "#f2a154",
    "tones": ("#8a4504", "#6f390a", "#542e10", "#3b2513", "#24272b", "#1c2d40", "#1c3c5c", "#1d4b79", "#1f5b97"),
}  # fmt: skip


def palette(colours):
    tones = "".join(f"--t{i}:{tone};" for i, tone in enumerate(colours["tones"]))
    return tones + "".join(f"--{name}:{colour};" for name, colour in colours.items() if name != "tones")


def token_rules():
    """For each of r, v, a and each level: the background, and the underline that says the same without colour."""
    rules = [".t{background:var(--r);border-bottom:var(--rl)}"]
    for i in range(9):
        kind, colour = ("dashed", "orange") if i < 4 else ("solid", "blue")
        line = f"{abs(i - 4) * 0.6:.1f}px {kind} var(--{colour})"
        rules += [f".{name[0]}{i}{{--{name[0]}:var(--t{i});--{name[0]}l:{line}}}" for name in NUMBERS]
    for name in NUMBERS:
        chosen, x = f"body:has(#by-{name}:checked)", name[0]
        rules.append(f"{chosen} .t{{background:var(--{x});border-bottom:var(--{x}l)}}{chosen} .{name}{{display:flex}}")
        rules.append(f".scale.{name} .t{{background:var(--{x})!important;border-bottom:var(--{x}l)!important}}")
    return "".join(rules)


def style():
    """style.css, the two palettes, and the rules of the tokens."""
    light = f":root{{color-scheme:light dark;{palette(LIGHT)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{palette(DARK)}}}}}"
    return read("style.css") + light + dark + token_rules()


def sha256(text):
    """A hash as a Content-Security-Policy wants it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(title, facts, sections):
    """The whole file. facts: one line about the run; sections: of `curves`, `tables`, `lengths` and `gallery`.

    The policy lets the page load nothing and run nothing but the style and the script written here.
    """
    css, script = style(), read("script.js")
    policy = (
        f"default-src 'none'; style-src 'sha256-{sha256(css)}'; script-src 'sha256-{sha256(script)}'; base-uri 'none'"
    )
    template = environment().get_template("page.html")
    return template.render(title=title, facts=facts, sections=sections, policy=policy, style=css, script=script)
