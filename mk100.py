import sys, json, types
from pathlib import Path
from training import command_line
from training.inputs import open_base, load_rows
n, seed, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
_, s, _ = command_line.read(["mle", "--data", "toy", "--model", "runs/toy/base", "--train-examples", str(n), "--seed", seed, "--output-dir", "/tmp/none"])
llama, tok = open_base(s)
out.mkdir(parents=True, exist_ok=True)
for split, k in (("train", n), ("validation", 0), ("test", 0)):
    rows = load_rows(s, split, llama, tok, k)
    with open(out / f"{split}.jsonl", "w") as f:
        for r in rows: f.write(json.dumps({"id": r.id, "dialogue": r.source, "summary": r.target}) + "\n")
