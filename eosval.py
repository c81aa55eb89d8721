# control: greedy answers of an adapter with a constant taken from the logit of EOS; validation rows
import sys, torch
from functools import partial
import model, eval as ev, numpy as np
from training import command_line
from training.inputs import open_base, load_rows, load_trained
from speed.cpu import prefer_onednn
folder, seed, n, cs = sys.argv[1], sys.argv[2], int(sys.argv[3]), [float(c) for c in sys.argv[4].split(",")]
split = sys.argv[5] if len(sys.argv) > 5 else "validation"
_, s, _ = command_line.read(["judge", "--data", "/work/shared/data/samsum", "--max-input-tokens", "200", "--dtype", "bfloat16", "--model", "runs/smol/base", "--seed", seed, "--output-dir", "runs/x"])
prefer_onednn()
llama, tok = open_base(s)
rows = load_rows(s, split, llama, tok, n)
load_trained(llama, "other", folder)
if len(sys.argv) > 6:  # weights of a checkpoint, over the adapter it started from
    from pathlib import Path
    from training.checkpoint import read_checkpoint
    tensors, facts = read_checkpoint(Path(sys.argv[6]))
    print("checkpoint of step", facts["step"])
    for i, p in enumerate(llama.adapter_parameters("other")):
        p.data.copy_(tensors[f"weight.{i}"])
shape, base = model.shape, None
refs = [r.target for r in rows]
for c in cs:
    def biased(logits, *a, c=c):
        logits = logits.clone(); logits[:, list(llama.config.eos_token_id)] -= c
        return shape(logits, *a)
    model.shape = biased
    texts = ev.predict(rows, partial(model.sample, llama, adapter="other", max_new_tokens=100, temperature=0), 32, tok.decode)
    m = ev.metrics_by_example(texts, refs)
    import json; json.dump({"ids": [r.id for r in rows], "texts": texts, "la": m["la-rouge1-F1"].tolist(), "excess": m["excess_length"].tolist()}, open(f"{folder.replace('/', '_')}_{split}_{n}_{len(sys.argv)}_{c}.json", "w"))
    x = m["la-rouge1-F1"]; base = x if base is None else base
    low, high = ev.interval(x - base, 1)
    print(f"eos -{c}: la-R1 {x.mean():.4f} ({(x-base).mean():+.4f}, {low:+.4f} to {high:+.4f}) la-R2 {m['la-rouge2-F1'].mean():.4f} rouge1 {m['rouge1-F1'].mean():.4f} excess {m['excess_length'].mean():+.2f}", flush=True)
