"""The experiment of docs/experiment/appendix.md: a row is a few stages in a folder of its own, in runs/experiment/.

    python docs/experiment/run.py [ROW ...]           all rows, or those named; what is there already stays
    python docs/experiment/run.py --table             what there is so far, into results.json and the page's tables

A row that was stopped goes on where it was: every stage is run with --resume. Nothing is set here that is not a flag of
lastmile.py; the lines printed can be typed one by one.
"""

import functools
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import eval as evaluation  # noqa: E402
import lastmile  # noqa: E402
from eval import COLUMNS  # noqa: E402
from interface import results  # noqa: E402
from safety import files as training_files  # noqa: E402

RUNS = Path("runs/experiment")
MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
SHORT = "--max-input-tokens 200"
MAKE_REAL = Path("runs/smollm2-samsum")  # where that command writes
UNQUANTIZED, BASE, REAL_BASE = (
    f"--data data/samsum --model {folder} {SHORT} --dtype bfloat16"
    for folder in (MODEL, f"{RUNS}/main/base", f"{MAKE_REAL}/base")
)
XSUM = f"--data data/xsum_test_1000.jsonl --model {RUNS}/main/base --max-input-tokens 600 --dtype bfloat16"
TRAIN, LESS = "--train-examples 420", "--train-examples 210 --eval-every 30 --eval-examples 50"
REWARD, MLE, PPO = (f"--learning-rate {rate}" for rate in ("1e-3", "3e-3", "1e-3"))  # chosen by `tune`
THREES = "--rows-per-prompt 3"  # the default when these rows were run; the later ones have all six
SEEDS = (1, 2, 3)
RATES = {"mle": ("3e-4", "1e-3", "3e-3"), "reward": ("3e-4", "1e-3"), "ppo": ("3e-4", "1e-3", "3e-3")}
TUNED = {"reward": THREES, "ppo": f"--reward {RUNS}/tune-reward-1e-3/reward", "mle": ""}


def judged(adapters, base=BASE, count=300):
    return f"{base} --bleurt none --test-examples {count} --adapters {adapters}"


def own_folder(row):
    return RUNS / row.replace(" ", "-")


def against(row):
    return f"--reward {own_folder(row)}/reward"


def changed(flags, seed=1, reward=None):
    """PPO as in the row `seed 1` (or another), but for the flags; reward: the row whose reward model it is against."""
    reward = against(reward or f"seed {seed}")
    return {"ppo": f"{BASE} --seed {seed} {TRAIN} {reward} {PPO} {flags}", "eval": judged("policy")}


def drawn(seed):
    """MLE, and PPO against the reward model of the row `seed 1`, by another seed: pairs, their order, samples."""
    common = f"{BASE} --seed {seed} {TRAIN}"
    return {"mle": f"{common} {MLE}", "ppo": f"{common} {against('seed 1')} {PPO}", "eval": judged("mle,policy")}


def rewarded(flags, seed=1):
    """The row `seed 1` (or another) without MLE, but for the flags of its reward model."""
    common = f"{BASE} --seed {seed} {TRAIN}"
    return {"reward": f"{common} {REWARD} {flags}", "ppo": f"{common} {PPO}", "eval": judged("policy")}


ROWS = {
    "main": {"quantize": f"--data data/samsum --model {MODEL} --max-input-tokens 250 --group-size 32 --scale-search"},
    **{f"tune {stage} {rate}": {
        stage: f"{BASE} {LESS} --learning-rate {rate} {TUNED[stage]}"
    } for stage, rates in RATES.items() for rate in rates},
    "base": {"eval": judged("base")},
    "unquantized base": {"eval": judged("base", UNQUANTIZED)},
    **{f"seed {seed}": {
        "reward": f"{BASE} --seed {seed} {TRAIN} {REWARD} {THREES}",
        "mle": f"{BASE} --seed {seed} {TRAIN} {MLE}",
        "ppo": f"{BASE} --seed {seed} {TRAIN} {PPO}",
        "eval": judged("mle,policy"),
    } for seed in SEEDS},
    "make real": {},  # by that command, with its default seed, 1337
    "make real, all test rows": {"eval": judged("base,mle,policy", REAL_BASE, count=0)},
    "draw 4": drawn(4),
    "draw 5": drawn(5),
    "no EOS in labels": {"mle": f"{BASE} --seed 1 {TRAIN} {MLE} --no-eos-in-labels", "eval": judged("mle")},
    "init mle": changed(f"--init {RUNS}/seed-1/mle"),
    "value warm-up": changed("--value-warmup-steps 20", seed=3),
    "KL 0.05": changed("--kl-coef 0.05", seed=3),
    "rouge reward": {"ppo": f"{BASE} --seed 3 {TRAIN} {PPO} --reward rouge", "eval": judged("policy")},
    "span negatives": rewarded(f"{THREES} --hallucinations span"),
    "sequence level": rewarded(f"{THREES} --level sequence", seed=3),
    "2 rounds": rewarded("--rounds 2", seed=3),
    "float32": {
        "mle": f"{BASE} --dtype float32 --seed 3 {TRAIN} {MLE}",
        "eval": f"{judged('mle')} --dtype float32",
    },
    "all six rows": rewarded("", seed=3),
    "all six rows seed 1": rewarded(""),
    "2 rounds seed 1": rewarded("--rounds 2"),
    "all six rows value warm-up": changed("--value-warmup-steps 20", seed=3, reward="all six rows"),
    "all six rows keep best": changed(
        "--eval-every 10 --eval-examples 50 --keep best", seed=1, reward="all six rows seed 1"
    ),
    "mle samples": {
        "mle": f"{BASE} --seed 3 {TRAIN} {MLE}",
        "reward": f"{BASE} --seed 3 {TRAIN} {REWARD} {THREES} --samples mle",
        "ppo": f"{BASE} --seed 3 {TRAIN} {PPO}",
        "eval": judged("policy"),
    },
    "policy samples": {"reward": f"{BASE} --seed 3 {TRAIN} {REWARD} --samples policy"},
    "second policy": changed("", seed=3, reward="policy samples"),
    "1000 pairs": {
        "reward": f"{BASE} --seed 3 --train-examples 1000 {REWARD} {THREES}",
        "mle": f"{BASE} --seed 3 --train-examples 1000 {MLE}",
        "ppo": f"{BASE} --seed 3 --train-examples 1000 {PPO}",
        "eval": judged("mle,policy"),
    },
    "xsum": {
        "reward": f"{XSUM} --seed 1 --train-examples 350 {REWARD} {THREES}",
        "mle": f"{XSUM} --seed 1 --train-examples 350 {MLE}",
        "ppo": f"{XSUM} --seed 1 --train-examples 350 {PPO}",
        "eval": f"{XSUM} --bleurt none --adapters base,mle,policy",
    },
}  # fmt: skip
FOLDER = {"quantize": "base"}
PLACES = {"make real": MAKE_REAL}
ADAPTERS_OF = {"make real, all test rows": "make real", "policy samples": "all six rows"}
OF_SEED_3 = (
    "mle samples", "sequence level", "value warm-up", "KL 0.05", "rouge reward", "1000 pairs", "float32",
    "all six rows",
)  # fmt: skip
OF_ALL_SIX = "second policy", "2 rounds", "all six rows value warm-up"
COMPARED = {  # with the outputs of which row
    **dict.fromkeys(("no EOS in labels", "init mle"), "first seed 1"),  # an earlier run of `seed 1`, see the page
    "span negatives": "seed 1",
    **dict.fromkeys(OF_SEED_3, "seed 3"),
    **dict.fromkeys(OF_ALL_SIX, "all six rows"),
    "all six rows seed 1": "seed 1",
    **dict.fromkeys(("2 rounds seed 1", "all six rows keep best"), "all six rows seed 1"),
}
REPEATS = "seed 1", "seed 2", "seed 3", "make real", "draw 4", "draw 5", "first seed 1"  # the same but for chance


def folder_of(row):
    return PLACES.get(row) or own_folder(row)


def run(row):
    if row in ADAPTERS_OF:
        folder_of(row).mkdir(parents=True, exist_ok=True)
        for stage in ("mle", "ppo"):
            if not (link := folder_of(row) / stage).exists():
                link.symlink_to((folder_of(ADAPTERS_OF[row]) / stage).absolute())
    for stage, flags in ROWS[row].items():
        place = folder_of(row) / FOLDER.get(stage, stage)
        if not place.exists():
            trained = stage not in ("quantize", "eval")
            line = f"{stage} --output-dir {folder_of(row)} {flags}{' --resume' if trained else ''}"
            torch.set_num_threads(1)  # so that two rows can run side by side; the last bits depend on it
            print(f"\nOMP_NUM_THREADS=1 python lastmile.py {line}", flush=True)
            begin = time.monotonic()
            if code := lastmile.main(line.split()):
                sys.exit(code)
            print(f"{row}: {stage} took {time.monotonic() - begin:.0f} s", flush=True)


METRICS = ("excess_length", "la-rouge1-F1", "la-rouge2-F1", "la-rougeL-F1", "rouge1-F1", "rouge1-precision",
           "rouge1-recall")  # fmt: skip
SAMPLED = "return", "length", "reference_length"


@functools.cache
def by_example(row, column):
    """{metric: an array of one number for each test example}, from the row's predictions."""
    found = results.read_outputs(folder_of(row) / "eval")
    return evaluation.metrics_by_example(found[column], found["reference"])


def difference(one, other):
    """{metric: (mean, low, high)} of one (row, column) less the other on the same examples, with a paired bootstrap."""
    one, other = by_example(*one), by_example(*other)
    return {m: (float((one[m] - other[m]).mean()), *evaluation.interval(one[m] - other[m], 0)) for m in METRICS}


def loops(texts):
    """How many of the texts say one sentence three times or more."""
    sentences = [re.split(r"[.!?]+\s*|\n+", text.lower().strip()) for text in texts]
    return sum(max(Counter(filter(None, said)).values(), default=0) >= 3 for said in sentences)


def course(lines, width=20):
    """Of PPO's metrics.jsonl: means of the sampled batches of every so many steps, and how often the value was useless:
    its explained variance below 0.
    """
    found = {}
    for start in range(0, len(lines), width):
        sampled = [line for line in lines[start : start + width] if not line["ground_truth"]]
        means = {name: statistics.mean(line[name] for line in sampled) for name in SAMPLED}
        found[f"steps {start} to {min(start + width, len(lines)) - 1}"] = means
    return found | {"explained variance below 0": sum(line["explained_variance"] < 0 for line in lines)}


def collect():
    """{row: its commands, and what its PPO, its reward model and its columns score} of the rows that are done."""
    found = {}
    for row, stages in ROWS.items():
        place, one = folder_of(row), {"commands": stages}
        if (file := place / "reward" / "heldout.json").exists():
            one["heldout"] = json.loads(file.read_text())
        if (file := place / "ppo" / "metrics.jsonl").exists():
            one["ppo"] = course([json.loads(line) for line in file.read_text().splitlines()])
        if (file := place / "ppo" / "validation.jsonl").exists():
            one["validation"] = [json.loads(line) for line in file.read_text().splitlines()]
        if (place / "eval").exists():
            names = "scores", "intervals", "facts"
            one |= dict(zip(names, results.read_scores(place / "eval")[0], strict=True))
            outputs = results.read_outputs(place / "eval")
            one["loops"] = {column: loops(outputs[column]) for column in one["scores"] if "cleaned" not in column}
            if {"mle", "policy"} <= one["scores"].keys():
                one["policy less mle"] = difference((row, "policy"), (row, "mle"))
            if row in COMPARED and (folder_of(other := COMPARED[row]) / "eval").exists():
                shared = [column for column in ("mle", "policy") if column in one["scores"]]
                one[f"less that of {other}"] = {column: difference((row, column), (other, column)) for column in shared}
        if len(one) > 1:
            found[row] = one
    return found


def tables(found):
    """Of what `results` found: AUC of the reward models; every column; and differences on the same examples."""
    judged = {row: one["heldout"] for row, one in found.items() if "heldout" in one}
    classes = list(dict.fromkeys(kind for heldout in judged.values() for kind in heldout if kind != "positive"))
    rewards = [["AUC of positives against", *classes]]
    for row, heldout in judged.items():
        rewards.append([row, *(f"{heldout[kind]['auc']:.3f}" if kind in heldout else "" for kind in classes)])

    scores, differences = [["row", "column", "n", *METRICS]], [["difference", *METRICS]]
    for row, one in found.items():
        means = one.get("scores", {})
        for column in [column for column in COLUMNS if column in means]:
            raw = column.removesuffix(" cleaned")
            if raw != column and means[raw] == means[column]:
                continue  # nothing was there to clean up
            mean, ends = means[column], one["intervals"][column]
            cells = [f"{mean[m]:.3f} ±{(ends[m][1] - ends[m][0]) / 2:.3f}" for m in METRICS]
            scores.append([row, column, str(one["facts"]["n"]), *cells])
        pairs = {"policy less mle": one["policy less mle"]} if "policy less mle" in one else {}
        if other := COMPARED.get(row):
            less = one.get(f"less that of {other}", {})
            pairs |= {f"{column} less {other}'s": numbers for column, numbers in less.items()}
        for name, numbers in pairs.items():
            cells = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in (numbers[m] for m in METRICS)]
            differences.append([f"{row}: {name}", *cells])
    compared = [found[row]["scores"] for row in REPEATS if "policy less mle" in found.get(row, {})]
    for column in ("mle", "policy") if len(compared) > 1 else ():
        values = {m: [score[column][m] for score in compared] for m in METRICS}
        cells = [f"{statistics.mean(v):.3f} (sd {statistics.stdev(v):.3f})" for v in values.values()]
        scores.append([f"{len(compared)} runs", column, "", *cells])
    return [lines for lines in (rewards, scores, differences) if len(lines) > 1]


def write_tables(page, tables):
    """Put each table in the place of the one on the page whose first three columns have the same names."""
    text = page.read_text()
    for lines in tables:
        columns = r" +\| +".join(map(re.escape, lines[0][:3]))
        old = re.search(rf"^\| {columns} .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
        text = text[: old.start()] + evaluation.markdown(lines).strip() + text[old.end() :]
    page.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        stored = ROOT / "docs/experiment/results.json"
        before, found = json.loads(stored.read_text()), collect()
        found = {  # what this machine lacks of a row, or a whole row, stays
            row: before.get(row, {}) | found.get(row, {})
            for row in dict.fromkeys([*ROWS, *before]) if row in before or row in found
        }  # fmt: skip
        training_files.write_json(stored, found)
        write_tables(ROOT / "docs/experiment/appendix.md", tables(found))
    else:
        for row in sys.argv[1:] or ROWS:
            run(row)
