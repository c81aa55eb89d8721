"""What it does to a reward model that the rows of one prompt share a batch: held-out loss and AUC by class.

    python tests/bench/groups.py --base runs/toy/base --output OUT [--data toy] [--flags "--epochs 1"] [--seeds 1,2,3]

Three compositions of a batch, all of 14 rows on average: rows shuffled one by one (`--no-share-prompts`), halves of a
datum's six rows, and whole groups. One line of OUT/groups.jsonl a run; what is there already is not run again.
"""

import argparse
import json
from pathlib import Path

import common  # noqa: F401 -- first: it makes the engine importable
import torch

import data
import lastmile
import ppo
from beyond.samples import add_negatives
from interface import command_line
from interface.folders import commit
from interface.inputs import load_rows
from speed import shared_prompts

# name: --rows-per-prompt. Halves are of rows at random; contrast has the truth and the mismatched output in the same
# half, apart in different ones.
COMPOSITIONS = {"rows": 1, "halves": 3, "groups": 0, "contrast": 3, "apart": 3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--data", default="toy")
    parser.add_argument("--flags", default="")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--compositions", default=",".join(COMPOSITIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(options.output) / "groups.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(found["composition"], found["seed"]) for found in map(json.loads, lines)}
    for seed in map(int, options.seeds.split(",")):
        for name in options.compositions.split(","):
            if (name, seed) not in done:
                numbers = run(options, name, COMPOSITIONS[name], seed)
                line = {"composition": name, "seed": seed, "commit": commit(), **numbers}
                with open(file, "a") as opened:
                    opened.write(json.dumps(line) + "\n")
                print(line, flush=True)


def run(options, name, rows_per_prompt, seed):
    """Train and judge one reward model: {"loss": held-out loss, "heldout": the stage's report}."""
    folder = Path(options.output) / f"{name}-{seed}"
    flags = ["--data", options.data, "--model", options.base, "--output-dir", str(folder), "--seed", str(seed)]
    flags += ["--overwrite", *options.flags.split(), "--rows-per-prompt", str(rows_per_prompt)]
    apart = shared_prompts.APART
    shared_prompts.APART = {"contrast": {"positive": 0, "mismatched": 0}, "apart": apart}.get(name, {})
    try:
        assert lastmile.main(["reward", *flags]) == 0
    finally:
        shared_prompts.APART = apart
    _, settings, _ = command_line.read(["reward", *flags])
    return {"loss": heldout_loss(settings), "heldout": json.loads((folder / "reward/heldout.json").read_text())}


def heldout_loss(settings):
    """The reward loss on the validation split with its negatives."""
    llama, tokenizer = lastmile.open_base(settings)
    llama.load_adapter("reward", Path(settings.output_dir) / "reward", head=True)
    rows = load_rows(settings, "validation", llama, tokenizer, settings.eval_examples)
    rows = add_negatives(settings, llama, tokenizer, {}, None, rows, "validation")
    loss = weight = 0.0
    for start in range(0, len(rows), 30):
        batch = data.collate(rows[start : start + 30])
        with torch.inference_mode():
            part = ppo.reward_loss(ppo.token_scores(llama, batch, shared_prompts.lay_out(batch)), batch, settings.level)
        loss += part.item() * batch.weight.sum().item()
        weight += batch.weight.sum().item()
    return loss / weight


if __name__ == "__main__":
    main()
