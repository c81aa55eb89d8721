"""The data of the experiment, from the raw files to two folders that `--data` reads.

    python docs/experiment/prepare.py RAW OUT

RAW holds samsum/{train,validation,test}.csv (Gliwa et al. 2019), sgd_dialogues.jsonl.gz (Schema-Guided Dialogue) and
crd3_pairs.jsonl.gz (CRD3: spoken turns, each with a weakly aligned recap).

    OUT/chat    what the base learns: pairs of a dialogue and what a chat model would answer. CRD3's wordy recaps;
                of SGD and of SAMSum's training split the dialogues alone, with their first 40 words for an answer.
                No summary of SAMSum is in it.
    OUT/samsum  SAMSum as it is
    OUT/tune    the same, its test split being the first 200 validation examples: learning rates are chosen there
"""

import csv
import gzip
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402

OPENING = "Sure, here is a summary of the conversation:\n\n"


def jsonl(file):
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main(raw, out):
    (out / "chat").mkdir(parents=True)
    shutil.copytree(raw / "samsum", out / "samsum")
    shutil.copytree(raw / "samsum", out / "tune")
    with open(raw / "samsum/validation.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[:201]
    with open(out / "tune/test.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    with open(raw / "samsum/train.csv", encoding="utf-8", newline="") as file:
        dialogues = [row["dialogue"] for row in csv.DictReader(file)]
    dialogues += [row["dialogue"] for row in jsonl(raw / "sgd_dialogues.jsonl.gz")]
    pairs = [(row["dialogue"], OPENING + row["summary"]) for row in jsonl(raw / "crd3_pairs.jsonl.gz")]
    examples = [data.Example(str(i), data.clean(text), "") for i, text in enumerate(dialogues) if text.strip()]
    pairs += [(e.source, e.target) for e in data.chatter(examples)]
    with open(out / "chat/train.jsonl", "w", encoding="utf-8") as file:
        for source, target in pairs:
            file.write(json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} pairs in {out / 'chat'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
