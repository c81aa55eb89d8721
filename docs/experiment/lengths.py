"""Does the trained length sit where the reward puts it? Of the rows of run.py that are done; lengths.json beside this.

    python docs/experiment/lengths.py

With a reward of r a token and a penalty of 2.5 for each token beyond the reference, one more token is worth writing
while r > 2.5 P(the reference is shorter). A policy that knows nothing of the reference's length stops at the r / 2.5
quantile of reference lengths; one that knows more goes beyond its reference in a share r / 2.5 of its outputs, still.
r is the mean score, by the reward model of the row `seed 1`, of the tokens that the column itself wrote on the test
split, EOS counted; beside it stands that of the references.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
import run  # noqa: E402  (goes to the repository's root and makes its files importable)
import torch  # noqa: E402

import data  # noqa: E402
from eval import markdown  # noqa: E402
from training import files as training_files  # noqa: E402
from training import (
    inputs,  # noqa: E402
    results,  # noqa: E402
)
from training import settings as settings_module  # noqa: E402

PENALTY = settings_module.Ppo.length_penalty
FORMATS = {"reward": ".3f", "reward of references": ".3f", "tokens": ".1f", "tokens of references": ".1f",
           "r / 2.5": ".2f", "quantile": ".0f", "beyond its reference": ".2f"}  # fmt: skip


def measure(score_of, tokenizer, lines, key):
    """(mean reward of a token, lengths in tokens) of the texts under `key`, as responses to their sources."""
    prompts = tokenizer.prompts([line["source"] for line in lines])
    texts = [ids[: settings_module.Ppo.max_new_tokens - 1] for ids in tokenizer.encode([line[key] for line in lines])]
    rows = [data.Datum("", "", "", p, [*ids, tokenizer.eos]) for p, ids in zip(prompts, texts, strict=True)]
    rewards = []
    for start in range(0, len(rows), 32):
        batch = data.collate(rows[start : start + 32])
        rewards.append(score_of(batch)[batch.mask])
    return torch.cat(rewards).mean().item(), np.array([len(row.response) for row in rows])


def main():
    model, reward = run.folder_of("main") / "base", run.folder_of("seed 1") / "reward"
    settings = settings_module.Ppo(model=str(model), reward=str(reward), device="cpu", dtype="float32")
    llama, tokenizer = inputs.open_base(settings)
    score_of, _ = inputs.open_reward(settings, llama, tokenizer)
    found, table, truth = {}, [["row", "column", *FORMATS]], None
    for row in [row for row in run.ROWS if not row.startswith("tune")]:
        for file in sorted((run.folder_of(row) / "eval").glob("*.jsonl")):
            lines = results.read_lines(file)
            if truth is None:  # all rows have the same test split
                truth, reference = measure(score_of, tokenizer, lines, "reference")
            reward, length = measure(score_of, tokenizer, lines, "prediction")
            share = min(max(reward / PENALTY, 0.0), 1.0)
            values = (reward, truth, length.mean(), reference.mean(), share, np.quantile(reference, share),
                      (length > reference).mean())  # fmt: skip
            numbers = dict(zip(FORMATS, map(float, values), strict=True))
            found.setdefault(row, {})[file.stem] = numbers
            table.append([row, file.stem, *(format(numbers[name], how) for name, how in FORMATS.items())])
    print(markdown(table))
    training_files.write_json(run.ROOT / "docs/experiment/lengths.json", found)


if __name__ == "__main__":
    main()
