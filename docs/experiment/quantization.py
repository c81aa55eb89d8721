"""What 4 bits cost a small model, and what helps: perplexity of true summaries under each way to quantize it.

    python docs/experiment/quantization.py MODEL DATA [VARIANT ...]

MODEL: an unquantized Llama folder. DATA: what --data takes. Each variant is `lastmile.py quantize` with its flags, into
runs/quantization/; those that are there stay. Perplexity is that of the first 200 validation outputs that are short
enough, EOS included, given their inputs; quantization.json beside this file holds the numbers.
"""

import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lastmile  # noqa: E402
from interface import commands, inputs  # noqa: E402
from interface.folders import commit  # noqa: E402
from safety import validation  # noqa: E402
from safety.files import write_json  # noqa: E402

RUNS, RESULT = ROOT / "runs/quantization", ROOT / "docs/experiment/quantization.json"
SHORT = "--max-input-tokens 250"
VARIANTS = {
    "dense": None,
    "group 128": "--group-size 128 --calibration-examples 32",
    "group 64": "--group-size 64 --calibration-examples 32",
    "group 32": "--group-size 32 --calibration-examples 32",
    "group 32, scale search": "--group-size 32 --calibration-examples 32 --scale-search",
    "group 32, scale search, true sequential": "--group-size 32 --calibration-examples 32 --scale-search "
                                               "--true-sequential",
    "group 32, scale search, act order": "--group-size 32 --calibration-examples 32 --scale-search --act-order",
    "group 32, scale search, damp 0.1": "--group-size 32 --calibration-examples 32 --scale-search --damp 0.1",
    "group 32, scale search, 128 rows": "--group-size 32 --calibration-examples 128 --scale-search",
    "group 64, scale search": "--group-size 64 --calibration-examples 32 --scale-search",
}  # fmt: skip


def perplexity(folder, source):
    """exp of the mean cross entropy of the validation outputs' tokens."""
    s = commands.Mle(data=source, model=str(folder), device="cpu", dtype="float32", max_input_tokens=250, eval_every=1)
    llama, tokenizer = inputs.open_base(s)
    rows = inputs.load_rows(s, "validation", llama, tokenizer)[:200]
    return math.exp(validation.of_mle(s, llama, rows)()["val_loss"])  # there is no adapter mle: of the base


def main(model, source, *chosen):
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in [name for name in chosen or VARIANTS if name not in found]:
        flags, folder = VARIANTS[name], Path(model)
        if flags:
            place = RUNS / name.replace(", ", "-").replace(" ", "-")
            folder = place / "base"
            if not folder.exists():
                line = f"quantize --data {source} --model {model} --output-dir {place} {SHORT} {flags}"
                if code := lastmile.main(line.split()):
                    sys.exit(code)
        found[name] = {"flags": flags, "perplexity": perplexity(folder, source), "commit": commit()}
        print(f"{name}: perplexity {found[name]['perplexity']:.2f}", flush=True)
        write_json(RESULT, found)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(*sys.argv[1:])
