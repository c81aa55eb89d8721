# greedy answers of an ensemble: mean of the members' log-probabilities
import sys, torch
from functools import partial
import model, eval as ev
from training import command_line
from training.inputs import open_base, load_rows, load_trained
names = sys.argv[1].split(",")
_, s, _ = command_line.read(["judge", "--data", "toy", "--model", "runs/toy/base", "--seed", "1", "--output-dir", "runs/h1"])
llama, tok = open_base(s)
rows = load_rows(s, "validation", llama, tok, 0)
for i, n in enumerate(names): load_trained(llama, f"m{i}", n)
limit = 60
@torch.inference_mode()
def greedy(prompts, members):
    B = len(prompts)
    caches, logps = [], 0
    for m in members:
        c, l = model.prefill(llama, prompts, m, limit); caches.append(c); logps = logps + l.log_softmax(-1)
    out = [[] for _ in prompts]; done = torch.zeros(B, dtype=torch.bool); eos = torch.tensor(llama.config.eos_token_id)
    for _ in range(limit):
        t = logps.argmax(-1)
        for b in range(B):
            if not done[b]: out[b].append(t[b].item())
        done |= torch.isin(t, eos)
        if done.all(): break
        logps = 0
        for m, c in zip(members, caches): logps = logps + model.decode(llama, m, c, t).log_softmax(-1)
    return out
refs = [r.target for r in rows]
for members in [[f"m{i}"] for i in range(len(names))] + [[f"m{i}" for i in range(len(names))]]:
    texts = ev.predict(rows, partial(greedy, members=members), 32, tok.decode)
    sc = ev.metrics(texts, refs)
    print(members, round(sc["la-rouge1-F1"], 4), "exact", sum(t == r for t, r in zip(texts, refs)) / len(refs), "excess", round(sc["excess_length"], 2), flush=True)
