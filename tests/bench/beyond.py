"""What goes beyond the paper, on the toy: one change at a time, each with its reward model, PPO and evaluation.

    make beyond      about 45 minutes on one thread; stages that are there already stay

Everything lies in runs/beyond/<row>. All reward models are judged on the same held-out negatives, those with one edit
included, whatever they were trained on. Prints the tables of docs/beyond.md.
"""

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; with two threads the last bits differ
os.chdir(Path(__file__).resolve().parents[2])
sys.path.insert(0, os.getcwd())

import lastmile  # noqa: E402
from beyond import samples  # noqa: E402
from interface import command_line, inputs  # noqa: E402
from safety import validation  # noqa: E402

ALL = "--model runs/toy/base --train-examples 600 --epochs 2"
EVAL = "--adapters policy"


def over(flags, rates):
    """Reward, mle and ppo over the toy's base before its quantization, at a rate each, with the same flags."""
    base = f"--model runs/toy/pretrain {flags}"
    trained = {stage: f"{base} --learning-rate {rate}" for stage, rate in rates.items()}
    return trained | {"eval": "--model runs/toy/pretrain --adapters mle,policy"}


RATES = {  # full: the best on validation among 1e-4, 3e-4 and 1e-3; lora: the toy's defaults
    "lora": {"reward": "2e-3", "mle": "3e-3", "ppo": "3e-3"},
    "full": {"reward": "1e-3", "mle": "1e-3", "ppo": "3e-4"},
}
ROWS = {  # row: the commands that it takes, in order
    "default": {"reward": "", "ppo": "", "eval": EVAL},
    "hallucinations span": {"reward": "--hallucinations span", "ppo": "", "eval": EVAL},
    "hallucinations sequence": {"reward": "--hallucinations sequence", "ppo": "", "eval": EVAL},
    "samples base,mle": {"mle": "", "reward": "--samples base,mle", "ppo": "", "eval": "--adapters mle,policy"},
    "rounds 2": {"reward": "--rounds 2 --epochs 1", "ppo": "", "eval": EVAL},  # as many steps as default
    "level sequence": {"reward": "--level sequence", "ppo": "", "eval": EVAL},
    "reward rouge": {"ppo": "--reward rouge", "eval": EVAL},
    "unquantized": over("", RATES["lora"]),
    "tune full": over("--tune full", RATES["full"]),
    "default, all 2,700": {"reward": "--train-examples 0"},  # whom a negative tells apart once training is longer
    "span, all 2,700": {"reward": "--train-examples 0 --hallucinations span"},
    "likelihood, all 2,700": {"reward": "--train-examples 0 --hallucinations span --head likelihood"},
}


def folder_of(row):
    return Path("runs/beyond") / re.sub(r"\W+", "-", row)


def run(row):
    for stage, flags in ROWS[row].items():
        given = f"{stage} --output-dir {folder_of(row)} {ALL if stage != 'eval' else ALL.split(' --train')[0]} {flags}"
        if not (folder_of(row) / stage).exists():
            print("python lastmile.py", given, flush=True)
            start = time.monotonic()
            if lastmile.main(given.split()):
                sys.exit(f"{row}: {stage} failed")
            print(f"{row}: {stage} took {time.monotonic() - start:.0f} s", flush=True)


def heldout(row):
    """The held-out report of a row's reward model, on negatives of every kind."""
    folder = folder_of(row) / "reward"
    file = next(file for file in (folder / "settings.json", folder / "config.json") if file.exists())
    flags = ["reward", "--output-dir", str(folder_of(row)), "--config", str(file)]
    settings = command_line.read(flags)[1]
    edits = "sequence" if settings.level == "sequence" else "span"  # where single tokens are not scored, no span is
    settings = replace(settings, hallucinations=edits, eval_examples=300)
    llama, tokenizer = inputs.open_base(settings)
    llama.load_adapter("reward", folder, head=settings.head == "scalar")
    positives = inputs.load_rows(settings, "validation", llama, tokenizer, settings.eval_examples)
    keep = lambda name, rows, file, make: make()  # noqa: E731 - nothing is resumed
    rows = samples.add_negatives(settings, llama, tokenizer, {"base": None}, keep, positives, "validation")
    return validation.reward_report(settings, llama, rows)


def policy_line(row, column="policy"):
    scores, intervals = (json.loads((folder_of(row) / f"eval/{n}.json").read_text()) for n in ("scores", "intervals"))
    cells = [row if column == "policy" else f"{row}: {column}"]
    for metric in ("la-rouge1-F1", "excess_length"):
        low, high = intervals[column][metric]
        cells.append(f"{scores[column][metric]:.2f} ±{(high - low) / 2:.2f}")
    return cells


def main():
    names = sys.argv[1:] or list(ROWS)
    for row in names:
        run(row)
    judged = [row for row in names if "reward" in ROWS[row]]
    reports = {row: heldout(row) for row in judged}
    kinds = [kind for kind in reports[judged[0]] if kind != "positive"] if judged else []
    show = lambda found, name: f"{found[name]:.3f}" if name in found else "n/a"  # noqa: E731
    for title, name in (("AUC of positives", "auc"), ("AUC of the truth in its place against the span", "span_auc")):
        lines = [[kind, *(show(reports[row][kind], name) for row in judged)] for kind in kinds]
        print(f"\n{title}\n")
        print(lastmile.evaluation.markdown([["", *judged], *(line for line in lines if set(line[1:]) != {"n/a"})]))
    lines = [policy_line(row) for row in names if "ppo" in ROWS[row]]
    lines += [policy_line(row, "mle") for row in names if "mle" in ROWS[row]]
    print("\n" + lastmile.evaluation.markdown([["policy", "la-rouge1-F1", "excess length, words"], *lines]))


if __name__ == "__main__":
    main()
