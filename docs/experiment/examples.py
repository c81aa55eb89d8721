"""Ten test outputs of a row of run.py side by side, with what a reader said of them: writes examples.md beside this.

    python docs/experiment/examples.py [ROW]        by default `make real`, the one row whose base was read, too

They are the first ten of the outputs labelled in reading.json, which were drawn at random.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run  # noqa: E402  (goes to the repository's root and makes its files importable)

from interface import results  # noqa: E402

HERE = Path(__file__).resolve().parent
LABELS = {"faithful": "faithful", "wrong person": "said of the wrong person", "invented": "invented or contradicted",
          "copy": "copies or continues the dialogue"}  # fmt: skip
HEAD = """# Ten outputs side by side

*For readers of [the experiment](../experiment.md): row `{row}`, by `python docs/experiment/examples.py "{row}"`. Texts:
SAMSum, Gliwa et al. 2019, CC BY-NC-ND 4.0. The base's answers are cut after 200 characters.*
"""


def cell(text):
    return text.strip().replace("\n", " / ").replace("|", "\\|").replace("<", "&lt;")


def main(row="make real"):
    read = json.loads((HERE / "reading.json").read_text())[row]
    outputs = results.read_outputs(run.folder_of(row) / "eval")
    page = HEAD.format(row=row)
    for i in list(map(int, read["mle"]))[:10]:
        page += f"\n## {outputs['id'][i]}\n\n| | | |\n| --- | --- | --- |\n"
        page += f"| dialogue | | {cell(outputs['source'][i])} |\n| reference | | {cell(outputs['reference'][i])} |\n"
        for column, labels in read.items():
            text = outputs[column][i]
            text = text if column != "base" or len(text) <= 200 else f"{text[:200]} …"
            page += f"| {column} | {LABELS[labels[str(i)]]} | {cell(text)} |\n"
    (HERE / "examples.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
