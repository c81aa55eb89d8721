"""What the reward model of a row of run.py thinks of the row's test outputs; adds to judged.json beside this.

    python docs/experiment/judged.py ROW [JUDGE]        JUDGE: the row whose reward model judges, else ROW's own

For the references and each column: the mean score of an output (of its tokens, EOS included), the share of outputs that
score above the reference of the same input, the AUC of references against outputs (0.5: it sees no difference), and the
AUC of those outputs that were read as faithful (reading.json) against the others that were read.

And whether lengths are where the reward puts them. With a reward of r a token and a penalty of 2.5 for each token
beyond the reference, one more token is worth writing while r > 2.5 P(the reference is shorter): a policy that learned
this goes beyond its reference in a share r / 2.5 of its outputs.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
import run  # noqa: E402  (goes to the repository's root and makes its files importable)
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from eval import auc, markdown  # noqa: E402
from interface import results  # noqa: E402
from interface.training_settings import Ppo, Reward  # noqa: E402
from safety import files as training_files  # noqa: E402
from safety.validation import heldout_scores  # noqa: E402

FORMATS = {"mean score": ".3f", "above the reference": ".2f", "AUC of references": ".3f", "AUC of faithful": ".2f",
           "tokens": ".1f", "beyond the reference": ".2f", "r / 2.5": ".2f"}  # fmt: skip
HERE = Path(__file__).resolve().parent


def main(row, judge=None):
    torch.set_num_threads(1)
    judge = judge or row
    reward = run.folder_of(judge) / "reward"
    base = json.loads((reward / "config.json").read_text())["model"]
    llama, tokenizer = model.load(base, dtype=torch.bfloat16), data.load_tokenizer(base)
    llama.load_adapter("reward", reward, head=True)
    outputs = results.read_outputs(run.folder_of(row) / "eval")
    read = json.loads((HERE / "reading.json").read_text()).get(row, {})
    columns = [column for column in ("base", "mle", "policy") if column in outputs]
    judged = scores(llama, tokenizer, outputs, ["reference", *columns])
    truth, reference = judged["reference"]  # (n,) each
    found = {"reference": {"mean score": truth.mean(), "tokens": reference.mean()}}
    for column in columns:
        score, length = judged[column]  # (n,) each
        found[column] = {
            "mean score": score.mean(), "above the reference": (score > truth).mean(),
            "AUC of references": auc(truth, score), "tokens": length.mean(),
            "beyond the reference": (length > reference).mean(), "r / 2.5": score.mean() / Ppo.length_penalty,
        }  # fmt: skip
        if column in read:
            faithful = [kind == "faithful" for kind in read[column].values()]
            of_read = score[list(map(int, read[column]))]
            found[column]["AUC of faithful"] = auc(of_read[faithful], of_read[np.logical_not(faithful)])
    found = {column: {name: round(float(x), 4) for name, x in one.items()} for column, one in found.items()}
    file = HERE / "judged.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    training_files.write_json(file, stored | {f"{row}, by the reward model of {judge}": found})
    cells = [
        [column, *(format(one[n], how) if n in one else "" for n, how in FORMATS.items())]
        for column, one in found.items()
    ]
    print(markdown([["column", *FORMATS], *cells]))


def scores(llama, tokenizer, outputs, columns):
    """{column: (mean score of each output, number of its tokens)}, (n,) each; EOS counts unless the cap cut it."""
    prompts = tokenizer.prompts(outputs["source"])
    rows = {}
    for column in columns:
        responses = [[*ids, tokenizer.eos][: Ppo.max_new_tokens] for ids in tokenizer.encode(outputs[column])]
        pairs = zip(prompts, responses, strict=True)
        rows[column] = [data.Datum("", "", "", prompt, response, kind=column) for prompt, response in pairs]
    together = [row for same_prompt in zip(*rows.values(), strict=True) for row in same_prompt]
    found, _, _ = heldout_scores(Reward(device="cpu"), llama, together)
    return {column: (np.array(found[column]), np.array([len(row.response) for row in rows[column]])) for column in rows}


if __name__ == "__main__":
    main(*sys.argv[1:])
