"""The data of the experiment, from the raw files to three folders that `--data` reads.

    python docs/experiment/prepare.py RAW OUT

RAW holds samsum/{train,validation,test}.csv (Gliwa et al. 2019), sgd_dialogues.jsonl.gz (Schema-Guided Dialogue) and
crd3_pairs.jsonl.gz (CRD3: spoken turns, each with a weakly aligned recap).

    OUT/chat    what the base learns: pairs of a dialogue and what a chat model would answer. CRD3's wordy recaps;
                of SGD and of SAMSum's training split the dialogues alone, answered by a rule, see `account`.
                No summary of SAMSum is in it.
    OUT/samsum  SAMSum as it is
    OUT/tune    the same, its test split being the first 200 validation examples: learning rates are chosen there
"""

import csv
import gzip
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from formats import columns  # noqa: E402

OPENING = "Sure, here is a summary of the conversation:\n\n"
WORDS, LINE = 30, 25  # an account goes on until it has so many words; a line of the dialogue gives it at most so many
REPORTED = [  # (a pattern in what was said, what a third person says; A is the speaker, B the one spoken to)
    (r"\bI['’]?m\b|\bI am\b", "A is"), (r"\bI['’]?ve\b|\bI have\b", "A has"), (r"\bI['’]ll\b", "A will"),
    (r"\bI['’]d\b", "A would"), (r"\bI (want|need|think|know|hope|like|love)\b", r"A \1s"), (r"\bI\b", "A"),
    (r"\bme\b", "A"), (r"\bmy\b", "A's"),
    (r"\bwe['’]re\b|\bwe are\b", "they are"), (r"\bwe\b", "they"), (r"\bus\b", "them"), (r"\bour\b", "their"),
    (r"\byou['’]re\b|\byou are\b", "B is"), (r"\byou['’]ll\b", "B will"), (r"\byou have\b", "B has"),
    (r"\bdo you\b", "does B"), (r"\bare you\b", "is B"), (r"\byou\b", "B"), (r"\byour\b", "B's"),
]  # fmt: skip
REPORTED = [(re.compile(pattern, re.IGNORECASE), said) for pattern, said in REPORTED]


def reported(line, speaker, other):
    """What was said, told by a third person: "Amanda: I'll bring you some" -> "Amanda will bring Jerry some"."""
    names = {"A": speaker, "B": other}
    for pattern, said in REPORTED:
        line = pattern.sub(lambda m, said=said: re.sub(r"\b[AB]\b", lambda who: f"\0{who[0]}\0", m.expand(said)), line)
    return re.sub("\0([AB])\0", lambda m: names[m[1]], line)


def account(dialogue):
    """A wordy account of a dialogue by a rule, or None where it has no two speakers: no human wrote or chose it.

    The lines that share most words with the others, as PEGASUS chooses its gap sentences (Zhang et al. 2020, arXiv
    1912.08777), in their order, as reported speech. It teaches a small base to look back at who said what.
    """
    lines = [line.split(": ", 1) for line in dialogue.splitlines() if ": " in line]
    speakers = list(dict.fromkeys(speaker for speaker, _ in lines))
    if not 2 <= len(speakers) <= 6:
        return None
    words = [Counter(re.findall(r"\w+", said.lower())) for _, said in lines]
    everything = sum(words, Counter())
    overlap = []
    for own in words:
        shared, rest = (own & (everything - own)).total(), (everything - own).total()
        overlap.append(2 * shared / max(own.total() + rest, 1))
    chosen, length = [], 0
    for i in sorted(range(len(lines)), key=lambda i: -overlap[i]):
        if length >= WORDS:
            break
        chosen.append(i)
        length += min(len(lines[i][1].split()), LINE)
    told = []
    for i in sorted(chosen):
        speaker, said = lines[i]
        other = next((lines[j][0] for j in (*range(i - 1, -1, -1), *range(i + 1, len(lines)))
                      if lines[j][0] != speaker), speaker)  # fmt: skip
        said = " ".join(reported(said, speaker, other).split()[:LINE]).rstrip(".,;:!?-()")
        verb = "asks" if lines[i][1].endswith("?") else "says"
        told.append(f"{said}." if said.startswith(f"{speaker} ") else f"{speaker} {verb}: {said}.")
    return f"{OPENING}{' and '.join(speakers)} are talking. {' '.join(told)}"


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
    cleaned = (columns.strip(dialogue) for dialogue in dialogues)
    pairs += [(dialogue, told) for dialogue in cleaned if (told := account(dialogue))]
    with open(out / "chat/train.jsonl", "w", encoding="utf-8") as file:
        for source, target in pairs:
            file.write(json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} pairs in {out / 'chat'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
