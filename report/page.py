"""The report: one HTML file that shows a run, with nothing outside of it: no server, no network, no fonts.

Numbers and texts in, HTML out; nothing here reads a file or knows a tensor. All text of others passes through `esc`;
there is no JSON in the page, and its only script moves the focus along a text's tokens by the arrow keys.

Colours: blue above, orange below, which the colour-blind tell apart; the sign is in the underline too (solid above,
dashed below), for print without colours. A token bears a class for each of reward, value and advantage, with a level
from 0, the lowest, to 8: r3 v5 a8. CSS alone makes the radio buttons choose among the three.
"""

import base64
import bisect
import hashlib
import html
import math
import statistics

from eval import COLUMNS, cells

esc = html.escape  # quotes too: what it returns may stand in an attribute

STAGES = ("pretrain", "reward", "mle", "ppo")
CHARTS = {  # title: (keys of metrics.jsonl, what is to be seen)
    "loss": (["loss"], "of the step's batch"),
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
NUMBERS = ("reward", "value", "advantage")  # what tokens can be coloured by; the first letter is their CSS class
HELP = """Blue and underlined: above the middle; orange and dashed: below; dotted on top: beyond the reference's length.
Point at a token, tap it, or reach it by Tab and the arrow keys: its numbers stand at the foot of the window."""


# ----------------------------------------------------------------------------------------------------------------------
# Charts


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


class Frame:
    """An SVG plot of 300 by 150: its scales, its grid, and the paths drawn in it, cut at its edges."""

    left, top, width, height = 42, 6, 252, 120

    def __init__(self, x, y):
        self.x, self.y, self.paths = x, y, []  # x, y: (low, high)

    def across(self, x):
        return (x - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def down(self, y):
        return (self.y[1] - y) / (self.y[1] - self.y[0]) * self.height

    def draw(self, kind, points, then="L"):
        """A path through points of a CSS class; then: what SVG is to do from each to the next."""
        path = then.join(f"{self.across(x):.1f} {self.down(y):.1f}" for x, y in points)
        self.paths.append(f'<path class="{kind}" d="M{path}h0"/>')

    def svg(self, label):
        grid = []
        for y in ticks(*self.y):
            place = self.top + self.down(y)
            grid.append(f'<path class="rule" d="M{self.left} {place:.1f}h{self.width}"/>')
            grid.append(f'<text x="{self.left - 5}" y="{place + 3.5:.1f}" text-anchor="end">{number(y, 5)}</text>')
        for x in ticks(*self.x, 3):
            place, anchor = self.left + self.across(x), "end" if self.across(x) > self.width - 12 else "middle"
            grid.append(f'<text x="{place:.1f}" y="144" text-anchor="{anchor}">{number(x, 5)}</text>')
        return (f'<svg viewBox="0 0 300 150" role="img" aria-label="{esc(label)}">{"".join(grid)}'
                f'<svg x="{self.left}" y="{self.top}" width="{self.width}" height="{self.height}">'
                f"{''.join(self.paths)}</svg></svg>")  # fmt: skip


def figure(title, gloss, keys, frame, label):
    """keys: [(name, CSS class of its line, what is said of it)]."""
    legend = " ".join(f'<span><i class="{kind}"></i>{esc(name)} {esc(said)}</span>' for name, kind, said in keys)
    return (f"<figure><figcaption><b>{esc(title)}</b> <small>{esc(gloss)}</small></figcaption>"
            f'{frame.svg(label)}<p class="legend">{legend}</p></figure>')  # fmt: skip


def chart(title, rows):
    """One chart of a stage, or "" where its rows have no such numbers. ppo's sampled and true batches stand apart."""
    names, gloss = CHARTS[title]
    truth = [row for row in rows if row.get("ground_truth") is True]
    sampled = [row for row in rows if row.get("ground_truth") is not True]
    if len(names) == 1 and truth:
        wanted = [("sampled", names[0], sampled), ("truth", names[0], truth)]
    else:
        wanted = [(name if names[1:] else "at the end", name, sampled) for name in names]
    series = []
    for name, key, found in wanted:
        points = [(row.get("step"), row.get(key)) for row in found]
        points = [point for point in points if all(type(x) in (int, float) and -1e30 < x < 1e30 for x in point)]
        if points:
            x, y = zip(*points, strict=True)
            series.append((name, points, list(zip(x, smooth(y, len(y) // 16), strict=True))))
    if not series:
        return ""
    raw = sorted(y for _, points, _ in series for _, y in points)
    cut = len(raw) // 50  # the wildest 2 % at either end do not set the scale
    low, high = raw[cut], raw[-1 - cut]
    margin = 0.04 * (high - low) or abs(high) * 0.04 or 1
    frame = Frame((0, max(x for _, points, _ in series for x, _ in points) or 1), (low - margin, high + margin))
    for i, (_, points, _) in enumerate(series):
        frame.draw(f"dots s{i}", points[:: len(points) // 400 + 1], "h0M")
    for i, (_, _, line) in enumerate(series):
        frame.draw(f"s{i}", [*line[: -1 : len(line) // 150 + 1], line[-1]])
    keys = [(name, f"s{i}", number(line[-1][1])) for i, (name, _, line) in enumerate(series)]
    label = "; ".join(f"{name} from {number(line[0][1])} to {number(line[-1][1])}" for name, _, line in series)
    return figure(title, gloss, keys, frame, f"{title} over {len(rows)} steps: {label}")


def curves(stages):
    """stages: {stage: lines of its metrics.jsonl as dicts}."""
    parts = ["<p>Dots: single steps. Lines: their moving mean over a sixteenth of the run; its last value is written "
             "below. The wildest 2 % of the dots may lie outside of the frame.</p>"]  # fmt: skip
    for stage, rows in stages.items():
        figures = "".join(chart(title, rows) for title in CHARTS)
        parts.append(f'<h3>{esc(stage)} <small>{len(rows):,} steps</small></h3><div class="grid">{figures}</div>')
    return section("curves", "Learning curves", parts)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and lengths


def table(rows, label):
    """Rows of strings, as eval.cells makes them, the header first. The paper's columns and " ±" are set in grey."""

    def cell(i, text, tag):
        ours, sign, half = esc(text.replace("-", "−") if i else text).partition(" ±")
        kind = ' class="paper"' if rows[0][i] == "paper" else ""
        return f"<{tag}{kind}>{ours}{f' <small>±{half}</small>' if sign else ''}</{tag}>"

    head = "".join(cell(i, text, "th") for i, text in enumerate(rows[0]))
    body = "".join(
        f"<tr>{''.join(cell(i, text, 'td' if i else 'th') for i, text in enumerate(row))}</tr>" for row in rows[1:]
    )
    return (f'<div class="wide" tabindex="0" role="region" aria-label="{esc(label)}"><table><thead><tr>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def tables(scores, intervals, facts):
    """The arguments are those of eval.tables."""
    first, second, note = cells(scores, intervals, facts)
    return section("tables", "Tables", [
        f"<p>{esc(note)}</p>",
        "<h3>Table 1 <small>extra length relative to ground truth, in words</small></h3>", table(first, "Table 1"),
        f"<h3>Table 2 <small>evaluation metrics (bleurt: {esc(str(facts['bleurt']))})</small></h3>",
        table(second, "Table 2"),
    ])  # fmt: skip


def lengths(columns):
    """Histograms of words an output; columns: {name: texts}, the reference among them, which is outlined in each."""
    words = {name: [len(text.split()) for text in texts] for name, texts in columns.items()}
    longest = max(max(counts) for counts in words.values())
    width = longest // 40 + 1  # words a bar
    shares = {}
    for name, counts in words.items():
        bars = [0.0] * (longest // width + 1)
        for n in counts:
            bars[n // width] += 1 / len(counts)
        shares[name] = bars
    tallest = max(max(bars) for bars in shares.values())
    middle = {name: statistics.median(counts) for name, counts in words.items()}
    figures = []
    for name in (name for name in COLUMNS if name in words):
        frame = Frame((0, (longest // width + 1) * width), (0, tallest * 1.05))
        for i, share in enumerate(shares[name]):
            if share:
                corners = ((i * width, 0), (i * width, share), ((i + 1) * width, share), ((i + 1) * width, 0))
                frame.draw("bar", corners)
        steps = [(x * width, y or -1) for i, y in enumerate(shares["reference"]) for x in (i, i + 1)]
        frame.draw("s1", [(0, -1), *steps, (steps[-1][0], -1)])  # -1: below the frame, which cuts it off
        said = f"median {middle[name]:g}"
        keys = [(name, "bar", said), ("reference", "s1", f"median {middle['reference']:g}")]
        figures.append(figure(name, "", keys, frame, f"{name}: {said} words, reference {middle['reference']:g}"))
    return section("lengths", "Output lengths", [
        f"<p>Share of the {len(columns['reference'])} test outputs by their number of words, {width} a bar.</p>"
        f'<div class="grid">{"".join(figures)}</div>',
    ])  # fmt: skip


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


def token_html(token, scale, first):
    """One token: its level on each scale as a class, its numbers as a title. Tab reaches the first of a text."""
    kinds = [f"{name[0]}{level(token[name], *scale[name])}" for name in scale if name in token]
    kinds += ["late"] * (token.get("penalty", 0) < 0)
    names = ("reward", "score", "penalty", "value", "advantage", "return")
    says = ", ".join(f"{name} {token[name] + 0.0:.3f}" for name in names if name in token)  # + 0.0: no -0.000
    text = token["text"]
    if not says:
        return esc(text)
    bare = text.lstrip(" ") or text  # the space before a word stays without colour
    shown = f"<b>{esc(text)}</b>" if token.get("end") else esc(bare.replace("\n", "↵\n") or "·")
    title = f"{text.strip() or repr(text)}: {says}".replace("-", "−")
    space = " " * (len(text) - len(bare))
    return (
        f'{space}<span class="t {" ".join(kinds)}" tabindex="{0 if first else -1}" title="{esc(title)}">{shown}</span>'
    )


def output_html(name, output, scale):
    """output: {"tokens": dicts of "text" and numbers, and "end" where it is EOS; "cut": whether the cap cut it off;
    "reference": tokens of the reference, EOS counted}. Without numbers, "reference" is missing.
    """
    tokens, reference = output["tokens"], output.get("reference")
    parts = [token_html(token, scale, i == 0) for i, token in enumerate(tokens)]
    said = f"{len(tokens)} tokens" if reference else ""
    if reference and len(tokens) > reference:
        parts.insert(reference, f'<span class="mark">reference ends: {reference}</span>')
    if output["cut"]:
        parts.append(f'<span class="mark">cut by the cap at {len(tokens)}</span>')
    if tokens and "penalty" in tokens[0]:
        said += f", penalty {number(sum(token['penalty'] for token in tokens))}, return {number(tokens[0]['return'])}"
    return f'<div><h4>{esc(name)} <small>{said}</small></h4><p class="text" dir="auto">{"".join(parts)}</p></div>'


def switch(scale):
    """The radio buttons, and for each its scale."""
    buttons, legends = [], []
    for i, (name, (middle, bounds)) in enumerate(scale.items()):
        buttons.append(f'<label><input type="radio" name="by" id="by-{name}"{" checked" * (i == 0)}> {name}</label>')
        edges = [middle - bound for bound in reversed(bounds)] + [middle + bound for bound in bounds]
        steps = "".join(f'<i class="t {name[0]}{j}">{said}</i>' for j, said in enumerate([*map(number, edges), ""]))
        legends.append(f'<p class="scale {name}" title="bounds of the colours of {name}">{steps}</p>')
    return f"<fieldset><legend>colour by</legend>{''.join(buttons)}{''.join(legends)}</fieldset>"


def gallery(examples, note):
    """examples: [{"id", "source", "outputs": {name: see output_html}}]; note: what the numbers rest on."""
    scale = scales(examples)
    parts = [f"<p>{esc(note)}</p>", f"<p>{HELP}</p>{switch(scale)}" if scale else ""]
    for example in examples:
        outputs = "".join(output_html(name, output, scale) for name, output in example["outputs"].items())
        parts.append(f'<article><h3>{esc(example["id"])}</h3><p class="source" dir="auto">{esc(example["source"])}</p>'
                     f'<div class="outputs">{outputs}</div></article>')  # fmt: skip
    return section("examples", "Examples", parts)


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


STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem clamp(1rem,4vw,3rem) 5rem;max-width:92rem;background:var(--page);color:var(--text);
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;text-size-adjust:100%}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:3rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.75rem 0 .6rem;overflow-wrap:anywhere} h4{font-size:.95rem;margin:0 0 .25rem}
p{margin:.4rem 0;max-width:46rem}
section>p,header p{color:var(--faint);font-size:.9rem;overflow-wrap:anywhere}
small{font-size:.82em;font-weight:400;color:var(--faint)} figcaption small{display:block}
a{color:var(--blue)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-top:.5rem} nav a{padding:.25rem 0}
:focus-visible{outline:2px solid var(--blue);outline-offset:2px}

.grid{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr))}
figure{margin:0;break-inside:avoid} figcaption{line-height:1.3;margin-bottom:.3rem}
svg{display:block;width:100%;height:auto} svg text{font-size:11px;fill:var(--faint);font-variant-numeric:tabular-nums}
path{fill:none;stroke-linejoin:round;stroke-linecap:round} path.rule{stroke:var(--rule)}
.s0{stroke:var(--blue);stroke-width:1.8} .s1{stroke:var(--orange);stroke-width:1.8;stroke-dasharray:5 3.5}
.dots{stroke-width:2.4;stroke-dasharray:none;opacity:.25} .bar{fill:var(--t7);stroke:var(--blue);stroke-width:.6}
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;margin:.1rem 0 0;font-size:.8rem;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:1.2rem;margin-right:.35rem;vertical-align:.25em;border-top:2px solid var(--blue)}
.legend .s1{border-top:2px dashed var(--orange)}
.legend .bar{border-top:.6rem solid var(--t7);vertical-align:0;print-color-adjust:exact}

.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;line-height:1.3}
td,th{padding:.3rem .55rem;text-align:right;white-space:nowrap;font-weight:400}
thead th{border-bottom:1.5px solid var(--text);font-weight:600}
tbody tr+tr>*{border-top:1px solid var(--rule)} .paper{color:var(--faint);font-weight:400!important;padding-left:0}
th:first-child{position:sticky;left:0;background:var(--page);text-align:left;padding-left:0}

fieldset{position:sticky;top:0;z-index:1;margin:1rem 0;padding:.5rem 0;border:0;border-bottom:1px solid var(--rule);
 background:var(--page);display:flex;flex-wrap:wrap;align-items:center;gap:.1rem .8rem;font-size:.9rem}
legend{float:left;color:var(--faint);padding:0}
label{padding:.3rem 0;cursor:pointer;white-space:nowrap} input{accent-color:var(--blue)}
.scale{display:none;flex:1 1 18rem;max-width:30rem;margin:0;font-size:.7rem;font-variant-numeric:tabular-nums}
.scale i{flex:1;height:1.35rem;padding:.1rem .15rem 0 0;font-style:normal;text-align:right;white-space:nowrap}
article{margin-bottom:3rem}
.source{white-space:pre-wrap;overflow-wrap:anywhere;padding-left:1rem;border-left:3px solid var(--rule)}
.outputs{display:grid;gap:1.25rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
 margin-top:1rem}
.outputs>div{break-inside:avoid;min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;margin:0}
.t{padding:.1em 0;border-radius:2px;cursor:default;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.t+.t{margin-left:1px} .t b{font-size:.75em;letter-spacing:.04em;padding:0 .3em}
.late{border-top:2px dotted var(--text)}
.mark{font-size:.7rem;color:var(--faint);border:1px solid var(--faint);border-radius:3px;padding:.05rem .3rem;
 margin:0 .25rem;white-space:nowrap}
article .t:focus::after,article .t:hover::after{content:attr(title);position:fixed;inset:auto 0 0 0;z-index:2;
 padding:.6rem 1rem;background:var(--text);color:var(--page);font-size:.85rem;line-height:1.4;text-align:center;
 white-space:normal}

@media (max-width:26rem){legend{position:absolute;clip-path:inset(50%)} fieldset{gap:.1rem 1.2rem}}
@media print{
 :root{font-size:9pt} body{padding:0;max-width:none} nav,input,label:not(:has(:checked)){display:none}
 fieldset,th:first-child{position:static}
 h2,h3,h4{break-after:avoid} h2{margin-top:1.5rem} .wide{overflow:visible}
 td,th{padding:.15rem .3rem}
 .grid{grid-template-columns:repeat(3,1fr);gap:.75rem} .outputs{grid-template-columns:repeat(2,1fr)}
}
"""
STYLE += f":root{{color-scheme:light dark;{palette(LIGHT)}}}"
STYLE += f"@media screen and (prefers-color-scheme:dark){{:root{{{palette(DARK)}}}}}{token_rules()}"

SCRIPT = """addEventListener("keydown", event => {
  const way = {ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling"}[event.key], from = event.target;
  if (!way || !from.matches("article .t")) return;
  let to = from[way];
  while (to && !to.matches(".t")) to = to[way];
  if (!to) return;
  [from.tabIndex, to.tabIndex] = [-1, 0];
  to.focus();
  event.preventDefault();
});"""


def section(name, title, parts):
    return f'<section id="{name}"><h2>{title}</h2>{"".join(parts)}</section>'


def page(title, facts, sections):
    """The whole file. facts: one line about the run; sections: HTML of `curves`, `tables`, `lengths` and `gallery`.

    The policy lets the page load nothing and run nothing but the style and the script written here.
    """
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT))
    policy = f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'"
    links = "".join(f'<a href="#{name}">{name}</a>' for name in (text.split('"')[1] for text in sections))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>lastmile: {esc(title)}</title><style>{STYLE}</style></head><body><header><h1>{esc(title)}</h1>"
        f"<p>{esc(facts)}</p><nav>{links}</nav></header><main>{''.join(sections)}</main><script>{SCRIPT}</script>"
        f"</body></html>\n"
    )
