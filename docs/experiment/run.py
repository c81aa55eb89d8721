"""The experiment of docs/experiment.md: each row is a few stages in a folder of its own, under runs/experiment/.

    python docs/experiment/prepare.py RAW data        the data, once
    python docs/experiment/run.py [ROW ...]           all rows, or those named; what is there already stays
    python docs/experiment/run.py --table             what there is so far, as tables and as results.json

A row that was stopped goes on where it was: every stage is run with --resume. Nothing is set here that is not a flag of
lastmile.py; the lines printed can be typed one by one.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import lastmile  # noqa: E402
from eval import COLUMNS, markdown  # noqa: E402

RUNS = Path("runs/experiment")
SHAPE = ("--vocab-size 8000 --hidden-size 256 --intermediate-size 704 --num-hidden-layers 4 --num-attention-heads 4 "
         "--num-key-value-heads 4")  # fmt: skip
BASE = f"--data data/samsum --model {RUNS}/main/base"
TRAIN = f"{BASE} --train-examples 1500"
REWARD = f"--reward {RUNS}/main/reward"
MLE, PPO = "--learning-rate 1e-3", "--learning-rate 3e-4"  # chosen by the rows of `tune`
SEEDS = (1, 2, 3)
RATES = ("3e-4", "1e-3", "3e-3")


def seeded(mle="", ppo="", adapters="policy", seed=1):
    """The stages of one row: {stage: flags}; None leaves a stage out."""
    stages = {} if mle is None else {"mle": f"{TRAIN} --seed {seed} {MLE} {mle}"}
    if ppo is not None:
        stages["ppo"] = f"{TRAIN} --seed {seed} {PPO} {REWARD} {ppo}"
    return stages | {"eval": f"{BASE} --bleurt none --adapters {adapters}"}


ROWS = {
    "main": {
        "pretrain": f"--data data/chat --no-chatter --input-column source --target-column target {SHAPE} "
                    "--batch-size 16 --epochs 3 --learning-rate 2e-3 --warmup-steps 200 --max-new-tokens 110 "
                    "--dtype bfloat16 --save-every 200",
        "quantize": f"--data data/samsum --model {RUNS}/main/pretrain --group-size 32",
        "reward": f"{TRAIN} --learning-rate 1e-3",
    },
    **{f"tune mle {rate}": {
        "mle": f"{TRAIN.replace('data/samsum', 'data/tune')} --learning-rate {rate}",
        "eval": f"{BASE.replace('data/samsum', 'data/tune')} --bleurt none --adapters mle",
    } for rate in RATES},
    **{f"tune ppo {rate}": {
        "ppo": f"{TRAIN.replace('data/samsum', 'data/tune')} {REWARD} --learning-rate {rate}",
        "eval": f"{BASE.replace('data/samsum', 'data/tune')} --bleurt none --adapters policy",
    } for rate in RATES},
    **{f"seed {seed}": seeded(adapters="base,mle,policy", seed=seed) for seed in SEEDS},
    "no EOS in labels": seeded("--no-eos-in-labels", None, "mle"),
    "whiten": seeded(None, "--whiten"),
    "truth 0": seeded(None, "--ground-truth-fraction 0"),
    "truth 1": seeded(None, "--ground-truth-fraction 1"),
    "lambda 1": seeded(None, "--lam 1"),
    "init mle": seeded(None, f"--init {RUNS}/seed-1/mle"),
    "ppo-epochs 4": seeded(None, "--ppo-epochs 4"),
}  # fmt: skip
FOLDER = {"quantize": "base"}
THREADS = {"pretrain": 2}  # elsewhere 1: two rows can run side by side. The last bits depend on it


def folder_of(row):
    return RUNS / row.replace(" ", "-")


def run(row):
    for stage, flags in ROWS[row].items():
        place = folder_of(row) / FOLDER.get(stage, stage)
        if not place.exists():
            trained = stage not in ("quantize", "eval")
            line = f"{stage} --output-dir {folder_of(row)} {flags}{' --resume' if trained else ''}"
            threads = THREADS.get(stage, 1)
            torch.set_num_threads(threads)
            print(f"\nOMP_NUM_THREADS={threads} python lastmile.py {line}", flush=True)
            begin = time.monotonic()
            if code := lastmile.main(line.split()):
                sys.exit(code)
            print(f"{row}: {stage} took {time.monotonic() - begin:.0f} s", flush=True)


def results():
    """{row: {column: {metric: mean over test examples}}} of the rows that are done, with their facts."""
    found = {}
    for row in ROWS:
        place = folder_of(row) / "eval"
        if place.exists():
            scores, intervals, facts = (
                json.loads((place / f"{name}.json").read_text()) for name in ("scores", "intervals", "facts")
            )
            found[row] = {"commands": ROWS[row], "facts": facts, "scores": scores, "intervals": intervals}
    return found


METRICS = ("excess_length", "la-rouge1-F1", "la-rouge2-F1", "la-rougeL-F1", "rouge1-F1", "rouge1-precision",
           "rouge1-recall")  # fmt: skip


def table():
    found = results()
    lines = [["row", "column", "n", *METRICS]]
    for row, one in found.items():
        for column in COLUMNS:
            if column in one["scores"]:
                mean, ends = one["scores"][column], one["intervals"][column]
                cells = [f"{mean[m]:.3f} ±{(ends[m][1] - ends[m][0]) / 2:.3f}" for m in METRICS]
                lines.append([row, column, str(one["facts"]["n"]), *cells])
    done = [row for row in found if row.startswith("seed")]
    for column in COLUMNS:
        values = [found[row]["scores"][column] for row in done if column in found[row]["scores"]]
        if len(values) > 1:
            means = {m: [v[m] for v in values] for m in METRICS}
            cells = [f"{statistics.mean(v):.3f} (sd {statistics.stdev(v):.3f})" for v in means.values()]
            lines.append([f"{len(values)} seeds", column, "", *cells])
    print(markdown(lines))
    place = ROOT / "docs/experiment/results.json"
    lastmile.write_json(place, found)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        table()
    else:
        for row in sys.argv[1:] or ROWS:
            run(row)
