"""The numbers of walkthrough.md: one batch of two toy examples through all four stages, in a few seconds.

    make walkthrough                 prints them
    make walkthrough FLAGS=--write   puts them into walkthrough.md, in place of those that stand there

All work is done by the engine. What is worked out a second time is worked out by hand, for one token, to be compared.
What stands here under `=== NAME` stands in walkthrough.md in the fenced block that opens with ```text NAME.
"""

import contextlib
import functools
import io
import math
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the engine's files

import torch  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import lastmile  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import quant  # noqa: E402
from interface import commands as settings_module  # noqa: E402

SEED, RATE, CAP, UPDATES = 1337, 3e-3, 24, 48  # CAP: the most tokens of an output; UPDATES: of PPO
PLAN = settings_module.Ppo(seed=SEED, max_new_tokens=CAP)  # the rest of PPO's settings are the paper's
TARGETS = PLAN.lora_targets.split(",")  # all seven projections
OPENING = "Sure, here is a summary of the conversation:\n\n"
ENDING = " It is a short and friendly conversation."

# ----------------------------------------------------------------------------------------------------------------------
# Printing


def number(value, digits=2):
    """Two decimals are about what another CPU's rounding leaves alone."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def table(*rows):
    print(evaluation.markdown([[number(c) if isinstance(c, float) else str(c) for c in row] for row in rows]))


def by_hand(equation, value, function, engine, digits=2):
    engine = torch.as_tensor(engine).item()
    assert math.isclose(value, engine, rel_tol=1e-4, abs_tol=1e-5), f"{equation} = {value}, but {function}: {engine}"
    print(f"{equation:<42} = {number(value, digits):>7}    {function}: {number(engine, digits)}")


def title(name):
    print(f"=== {name}")


def visible(text):
    return text.replace("\n", "\\n")


def pieces(tokenizer, ids):
    """Tokens as a reader sees them: a space is _, a line end is \\n."""
    return [tokenizer.with_prefix.id_to_token(i).replace("▁", "_").replace("<0x0A>", "\\n") for i in ids]


def draw(*stream):
    return torch.Generator().manual_seed(data.stream_seed(SEED, *stream))


def answers(llama, tokenizer, rows, adapter=None):
    """The texts of always taking the likeliest token."""
    return evaluation.predict(
        rows, lambda prompts: model.sample(llama, prompts, adapter, CAP, temperature=0), len(rows), tokenizer.decode
    )


# ----------------------------------------------------------------------------------------------------------------------
# The batch and its base


def two_examples(folder):
    """Text, tokens, and the rectangle in which they are laid out."""
    examples = data.toy("train")
    two = [examples[149], examples[113]]
    (folder / "template.txt").write_text(data.SHORT_TEMPLATE)
    texts = [f"[INST] {e.source} [/INST] {e.target}" for e in examples[:1000] + data.toy("pretrain")[:1000]]
    tokenizer = data.train_tokenizer(texts, 800, folder)
    rows, _ = data.encode(two, tokenizer, max_new_tokens=CAP)
    batch = data.collate(rows)

    title("text")
    for b, e in enumerate(two):
        print(f"row {b} source  {visible(e.source)}\nrow {b} target  {e.target}")
    title("tokens")
    for b, row in enumerate(rows):
        n = len(row.prompt)
        print(f"row {b}, columns 0 to {n - 1}, the prompt\n    {' '.join(pieces(tokenizer, row.prompt))}")
        print(f"row {b}, columns {n} to {n + len(row.response) - 1}, the response")
        print(f"    {' '.join(pieces(tokenizer, row.response))}")
    title("batch")
    print(f"tokens      {batch.tokens.shape[0]} x {batch.tokens.shape[1]}")
    print(f"prompt_len  {batch.prompt_len.tolist()}\nref_len     {batch.ref_len.tolist()}")
    for b, row in enumerate(batch.mask.int().tolist()):
        print(f"mask row {b}  {''.join(map(str, row))}")
    return tokenizer, rows, batch


def a_base(tokenizer, rows):
    """A Llama that has learned to be wordy about these two dialogues, and its 4-bit version."""
    config = model.LlamaConfig(tokenizer.vocab_size, 64, 128, 2, 2, 2, 32, eos_token_id=(tokenizer.eos,))
    llama = model.initialize(config, draw("pretrain"))
    wordy = rows[0].target + ENDING, OPENING + rows[1].target
    examples = [data.Example(row.id, row.source, text) for row, text in zip(rows, wordy, strict=True)]
    batch = data.collate(data.encode(examples, tokenizer)[0])
    adamw = lastmile.Optimizer(list(llama.parameters()), max_grad_norm=1.0)
    tokens = batch.mask.sum().item()
    for _ in range(60):
        loss = lastmile.mle_step(llama, batch, adamw, RATE, tokens, adapter=None)["loss"]
    llama.requires_grad_(False)
    title("base")
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters, loss after 60 steps {number(loss)}")

    title("four bits")
    projection, x = llama.model.layers[0].self_attn.q_proj, torch.randn(8, 64, generator=draw("x"))  # (M, K)
    W, before = projection.base.weight.T.clone(), projection(x)  # (K, N), (M, N)
    model.quantize(llama, [row.prompt + row.response for row in rows], quant.Recipe(32))
    packed = projection.base
    word, s = packed.qweight[0, 0].item() & 0xFFFFFFFF, packed.scales[0, 0].item()
    q = [word >> 4 * k & 15 for k in range(8)]
    kept = quant.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx, packed.zero_offset)
    print(f"model.layers.0.self_attn.q_proj, column 0: rows 0 to 7 are the word 0x{word:08x}, s = {s:.3f}")
    table(["row k", "W", "q", "(q - 8) s", "quant.dequantize"],
          *([k, number(W[k, 0].item(), 3), q[k], number((q[k] - 8) * s, 3), number(kept[k, 0].item(), 3)]
            for k in range(8)))  # fmt: skip
    print(f"x W, relative error over random x: {number(((projection(x) - before).norm() / before.norm()).item())}")
    title("base says")
    for b, text in enumerate(answers(llama, tokenizer, rows)):
        print(f"row {b}  {visible(text)}")
    return llama


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def reward_stage(llama, tokenizer, rows):
    """Section 3.2: one positive and five negatives an example, a score for every token."""
    rows = data.with_negatives(rows, tokenizer, CAP, SEED)
    batch, size = data.collate(rows), [len(row.response) for row in rows]
    llama.add_adapter("reward", 16, 16.0, TARGETS, draw("lora"), head="normal")
    title("negatives")
    for row in rows[:6]:
        print(
            f"{row.kind:<14} label {row.label:.0f}  weight {row.weight:.1f}  {visible(tokenizer.decode(row.response))}"
        )

    adamw, scores = lastmile.Optimizer(llama.adapter_parameters("reward"), max_grad_norm=1.0), []
    for _ in range(61):
        score = ppo.reward_scores(llama, batch)  # (B, T)
        scores.append([row[mask].tolist() for row, mask in zip(score, batch.mask, strict=True)])
        loss = lastmile.reward_step(llama, batch, adamw, RATE, batch.weight.sum().item())["loss"]
    llama.requires_grad_(False)
    l = [sum((s - row.label) ** 2 for s in of) / n for row, of, n in zip(rows, scores[-1], size, strict=True)]  # noqa: E741
    total = sum(row.weight * each for row, each in zip(rows, l, strict=True)) / sum(row.weight for row in rows)
    title("reward")
    mean = lambda step, b: sum(scores[step][b]) / size[b]  # noqa: E731
    table(["mean score of row 0's", "at first", "after 60 updates"],
          *([rows[b].kind, mean(0, b), mean(60, b)] for b in range(6)))  # fmt: skip
    by_hand("sum(w l) / sum(w), after 60 updates", total, "ppo.reward_loss", loss)
    title("scores")
    for b in (0, 4):
        text = pieces(tokenizer, rows[b].response)
        cells = [f"{piece} {number(s)}" for piece, s in zip(text, scores[-1][b], strict=True)]
        print(rows[b].kind, *("    " + "  ".join(cells[i : i + 8]) for i in range(0, len(cells), 8)), sep="\n")
    title("optimum")
    shared = [(0, (4, 5)), (1, (4,)), (size[0] - 1, ())]  # token of the truth, the negatives that begin alike up to it
    table(["token", "also in", "best score", "score"],
          *([pieces(tokenizer, rows[0].response)[i], " and ".join(rows[b].kind for b in others) or "none",
             1 / (1 + sum(rows[b].weight * size[0] / size[b] for b in others)), scores[-1][0][i]]
            for i, others in shared))  # fmt: skip


def mle_stage(llama, tokenizer, batch):
    """Maximum likelihood of the truth, the control."""
    base = ppo.response_logp(llama, batch, None)  # (B, T)
    llama.add_adapter("mle", 32, 16.0, TARGETS, draw("lora"))
    adamw, logps = lastmile.Optimizer(llama.adapter_parameters("mle"), max_grad_norm=1.0), []
    for _ in range(31):
        logps.append(ppo.response_logp(llama, batch, "mle").detach())
        lastmile.mle_step(llama, batch, adamw, RATE, batch.mask.sum().item())
    llama.requires_grad_(False)
    title("lora")
    print(f"largest change of a logp by a fresh adapter: {number((logps[0] - base).abs().max().item())}")
    layer, x, zeros = llama.model.layers[0].self_attn.q_proj, torch.ones(1, 64), torch.zeros(1, 64)
    A, B = layer.lora_A["mle"].tolist(), layer.lora_B["mle"].tolist()
    delta = 16 / 32 * sum(B[0][r] * sum(A[r]) for r in range(32))  # of an x of ones
    by_hand("(alpha / r) sum_r B[0, r] sum_k A[r, k]", delta, "LoRALinear.plus", layer.plus(zeros, x, "mle")[0, 0], 3)
    title("mle")
    kept = logps[0][batch.mask].tolist()
    by_hand(f"-sum(logp) / {len(kept)}, at first", -sum(kept) / len(kept), "ppo.mle_loss",
            ppo.mle_loss(logps[0], batch.mask))  # fmt: skip
    n, end = batch.prompt_len[0].item(), (batch.prompt_len + batch.ref_len)[0].item()
    shown, text = (n, n + 1, end - 2, end - 1), pieces(tokenizer, batch.tokens[0].tolist())
    table(["t", "token", "logp at first", "after 1 update", "after 30"],
          *([t, text[t], *(logps[step][0, t].item() for step in (0, 1, 30))] for t in shown))  # fmt: skip


def show_trajectory(tokenizer, batch, traj, score):
    """Row 0, from the last column of its prompt to its last token."""
    penalty = ppo.length_penalty(batch, PLAN.length_penalty)
    columns = traj.logp_old, traj.value, score, penalty, traj.reward, traj.adv, traj.ret
    text, n = pieces(tokenizer, batch.tokens[0].tolist()), batch.prompt_len[0].item()
    table(["t", "token", "mask", "logp", "value", "score", "penalty", "reward", "adv", "ret"],
          *([t, text[t], int(traj.mask[0, t]), *(column[0, t].item() for column in columns)]
            for t in range(n - 1, n + traj.mask[0].sum().item())))  # fmt: skip


def equations(traj, t, logp, value):
    """Equations 1 to 4 for the token of row 0 in column t, with Python's own numbers, beside the engine's."""
    g, lam, eps = PLAN.gamma, PLAN.lam, PLAN.clip_range
    last = traj.mask[0].nonzero().max().item()
    r = traj.reward[0, t : last + 1].tolist()
    V = [*traj.value[0, t : last + 1].tolist(), 0.0]  # after the last token comes nothing
    only = torch.zeros_like(traj.mask)
    only[0, t] = True
    one = replace(traj, mask=only)  # a mean over one token is that token

    w = math.exp(logp[0, t].item() - traj.logp_old[0, t].item())
    A = sum((g * lam) ** i * (r[i] + g * V[i + 1] - V[i]) for i in range(len(r)))
    clipped = min(max(w, 1 - eps), 1 + eps)
    target = sum(g**i * r[i] for i in range(len(r)))
    by_hand("(1)  w = exp(logp - logp_old)", w, "ppo.ratio", ppo.ratio(logp, traj.logp_old)[0, t])
    by_hand("(2)  A = sum (gamma lam)^i delta_i", A, "ppo.gae", traj.adv[0, t])
    by_hand("(3)  min(w A, clip(w) A)", min(w * A, clipped * A), "-ppo.policy_loss", -ppo.policy_loss(logp, one, eps))
    by_hand("(4)  V_target = sum gamma^i r_i", target, "ppo.returns", traj.ret[0, t])
    by_hand("     (V - V_target)^2", (value[0, t].item() - target) ** 2, "ppo.value_loss", ppo.value_loss(value, one))


def ppo_stage(llama, tokenizer, batch):
    """Section 3.3: batches sampled and true in turn, one update on each."""
    lastmile.add_actors(PLAN, llama)
    groups = (llama.adapter_parameters(name) for name in ("policy", "value"))
    adamw = lastmile.Optimizer(*groups, max_grad_norm=1.0)
    scorer = functools.partial(ppo.reward_scores, llama)
    t = (batch.prompt_len + batch.ref_len)[0].item() - 1  # where row 0's reference ends
    rows = []

    def chances():
        """Probabilities of the two tokens that the base gets wrong: row 0's EOS and row 1's first."""
        p = ppo.response_logp(llama, batch, "policy").exp()  # (B, T)
        return [p[0, t].item(), p[1, batch.prompt_len[1]].item()]

    for step in range(UPDATES):
        truth = ppo.is_ground_truth(step, PLAN.ground_truth_fraction)
        drawn = {"adapter": "policy", "max_new_tokens": CAP, "generator": draw("rollout", step), "with_logp": True}
        taken = batch if truth else ppo.rollout(batch, functools.partial(model.sample, llama, **drawn))
        if step < 2:
            name = "truth" if truth else "sampled"
            logp, value, _ = ppo.actor_critic(llama, taken)
            score = ppo.reward_scores(llama, taken)
            reward = ppo.token_rewards(taken, score, PLAN.length_penalty)
            traj = ppo.trajectory(taken, logp, value, reward, PLAN.gamma, PLAN.lam)
            title(name)
            show_trajectory(tokenizer, taken, traj, score)
        if step % 12 == 0:
            rows.append([step, *chances()])
        lastmile.ppo_step(llama, taken, adamw, RATE, scorer, PLAN)
        if step < 2:
            title(f"equations {name}")
            print(f"column {t}, {pieces(tokenizer, taken.tokens[0].tolist())[t]}, before the update")
            equations(traj, t, logp, value)
            if truth:
                print("after it")
                logp, value, _ = ppo.actor_critic(llama, taken)
                equations(traj, t, logp, value)
    llama.requires_grad_(False)
    title("ppo")
    table(["updates", "row 0 ends in time", "row 1 begins with the truth"], *rows, [UPDATES, *chances()])


def eval_stage(llama, tokenizer, rows):
    """What each of them says now, and the paper's metrics."""
    texts = {name: answers(llama, tokenizer, rows, None if name == "base" else name) for name in evaluation.COLUMNS[:3]}
    texts["base cleaned"] = [evaluation.clean_base(text) for text in texts["base"]]
    title("eval")
    for name, found in texts.items():
        for b, text in enumerate(found):
            print(f"{name:<12}  row {b}  {visible(text)}")
    references = [row.target for row in rows]
    scores = {name: evaluation.metrics(found, references) for name, found in texts.items()}
    shown = "excess_length", "rouge1-precision", "rouge1-recall", "la-rouge1-precision", "la-rouge1-recall"
    title("metrics")
    table(["", *shown], *([name, *(found[metric] for metric in shown)] for name, found in scores.items()))
    first = evaluation.metrics(texts["base"][:1], references[:1])
    n_p, n_g = len(texts["base"][0].split()), len(references[0].split())
    by_hand(f"row 0, base: recall x min(1, {n_g} / {n_p})", first["rouge1-recall"] * min(1, n_g / n_p), "eval.metrics",
            first["la-rouge1-recall"])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------


def blocks():
    """{name: text} of all that is printed."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for a second thread
    with contextlib.redirect_stdout(printed), tempfile.TemporaryDirectory() as folder:
        tokenizer, rows, batch = two_examples(Path(folder))
        llama = a_base(tokenizer, rows)
        reward_stage(llama, tokenizer, rows)
        mle_stage(llama, tokenizer, batch)
        ppo_stage(llama, tokenizer, batch)
        eval_stage(llama, tokenizer, rows)
    torch.set_num_threads(threads)
    return dict(part.split("\n", 1) for part in printed.getvalue().split("=== ")[1:])


FENCE = re.compile(r"```text ([\w ]+)\n(.*?)```", re.DOTALL)  # name, text


def main():
    found = blocks()
    if "--write" not in sys.argv:
        print("\n".join(f"=== {name}\n{text}" for name, text in found.items()))
        return
    page = HERE / "walkthrough.md"
    text = FENCE.sub(lambda block: f"```text {block[1]}\n{found[block[1]]}```", page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
