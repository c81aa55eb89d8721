"""A policy without a critic: K samples of an input are a group, and each is judged beside the others.

The reward is one number an output: la-rouge1-F1 to the truth (self-critical training, Paulus et al. 2017), its mean to
the other samples of the group (agreement, which needs no truth), or a reward model's mean score.

Dimensions: B batch = inputs x K, T time.
"""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
import eval as evaluation
import model
import ppo
from speed import shared_prompts
from training import ranks, validation
from training.folders import stage_folder
from training.inputs import generator, load_examples, load_rows, open_base, start_adapter, load_trained
from training.checkpoint import adapter_hash
from training.optimizer import Optimizer
from training.outputs import save_trained
from training.run import Run
from formats import peft_adapter


def words(text):
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))


def overlap(a, b):
    """la-rouge1-F1 of two Counters of words: the words that both have over the number of the longer one's."""
    return (a & b).total() / max(a.total(), b.total(), 1)


def truth_reward(texts, targets):
    return [overlap(words(a), words(b)) for a, b in zip(texts, targets, strict=True)]


def agreement(texts, size):
    found = []
    for start in range(0, len(texts), size):
        group = [words(text) for text in texts[start : start + size]]
        for i, a in enumerate(group):
            found.append(sum(overlap(a, b) for j, b in enumerate(group) if j != i) / (size - 1))
    return found


def group_rows(settings, llama, tokenizer):
    """Labelled rows, and others of the training split as inputs without outputs (kind "input")."""
    s = settings
    labelled = load_rows(s, "train", llama, tokenizer, s.train_examples)
    rows = list(labelled) if s.labelled else []
    if s.more_inputs:
        known = {row.source for row in labelled}
        every = [row for row in load_rows(s, "train", llama, tokenizer) if row.source not in known]
        rng = random.Random(data.stream_seed(s.seed, "more inputs"))
        more = rng.sample(every, min(s.more_inputs, len(every)))
        rows += [replace(row, target="", kind="input", response=[tokenizer.eos]) for row in more]
    return rows


def train_group(settings):
    s = settings
    with stage_folder(s, "ppo") as folder:
        llama, tokenizer = open_base(s)
        rows = group_rows(s, llama, tokenizer)
        depends_on = start_adapter(s, llama, "policy", stream="policy")
        judges = [name for name in (s.reward, s.reward_more) if name not in ("rouge", "agreement")]
        if judges:
            load_trained(llama, "reward", judges[0], head=peft_adapter.has_head(Path(judges[0])))
            depends_on["reward adapter"] = adapter_hash(Path(judges[0]))
        optimizer = Optimizer(llama.adapter_parameters("policy"), max_grad_norm=s.max_grad_norm)
        bar = ["reward", "spread", "length"]
        validate = of_group(s, llama, tokenizer)
        if validate and ranks.first() and s.data == "toy":
            print("before:", validate())
        with Run(folder, "group", s, rows, optimizer, llama.folder, depends_on, bar, validate) as run:
            for step, rate, batch in run.batches():
                numbers = group_step(s, llama, tokenizer, batch, optimizer, step, rate)
                run.log(step, batch, learning_rate=rate, **numbers)
        save_trained(s, llama, tokenizer, "policy", folder / "policy")


def group_step(s, llama, tokenizer, batch, optimizer, step, rate):
    K = s.samples_per_input
    inputs = batch.rows
    uniform = torch.rand(len(inputs) * K, s.max_new_tokens, generator=generator(s, "rollout", step))
    drawn = model.sample(
        llama, [row.prompt for row in inputs], "policy", s.max_new_tokens, s.temperature, uniform=uniform,
        with_logp=True, copies=K,
    )  # fmt: skip
    copied = data.collate([row for row in inputs for _ in range(K)], s.device)
    batch = ppo.rollout(copied, lambda prompts: drawn)
    reward = rewards(s, llama, tokenizer, batch)  # (B,)
    adv = ppo.group_advantage(reward, K)  # (B,)
    if s.advantage == "best":
        best = reward.view(-1, K).argmax(1) + torch.arange(len(inputs)) * K
        adv = torch.zeros(len(reward)).index_fill(0, best, 1.0)
    logp = group_logp(llama, batch, s.temperature)  # (B, T)
    adv = adv[:, None].expand(logp.shape)
    constants = ppo.Trajectory(batch.tokens, batch.mask, batch.logp, None, None, adv, None)
    loss = ppo.policy_loss(logp, constants, s.clip_range)
    if s.advantage == "best":
        loss = ppo.mle_loss(logp, batch.mask & (adv > 0))
    optimizer.backward(loss)
    known = [row for row in inputs if row.kind != "input"]
    if s.truth and known:
        truth = data.collate(known, s.device)
        optimizer.backward(s.truth * ppo.mle_loss(ppo.response_logp(llama, truth, "policy"), truth.mask))
    grad_norm = optimizer.step(rate)
    return {
        "reward": reward.mean().item(),
        "best": reward.view(-1, K).max(1).values.mean().item(),
        "spread": reward.view(-1, K).std(1).mean().item(),
        "length": batch.mask.sum().item() / len(batch.rows),
        "sampler_mismatch": ppo.masked_mean((logp.detach() - batch.logp).abs(), batch.mask).item(),
        "clip_fraction": ppo.masked_mean(((logp.detach() - batch.logp).exp() - 1).abs().gt(s.clip_range).float(), batch.mask).item(),
        "loss": loss.item(),
        "grad_norm": grad_norm,
    }


def rewards(s, llama, tokenizer, batch):
    texts = [tokenizer.decode(row.response) for row in batch.rows]
    targets = [row.target for row in batch.rows]
    kinds = [s.reward_more if row.kind == "input" else s.reward for row in batch.rows]
    agreed = agreement(texts, s.samples_per_input) if "agreement" in kinds else None
    true = truth_reward(texts, targets)
    score = None
    if set(kinds) - {"rouge", "agreement"}:
        with torch.no_grad():
            score = ppo.token_scores(llama, batch, shared_prompts.lay_out(batch)).sum(1) / batch.mask.sum(1)
    found = []
    for i, kind in enumerate(kinds):
        found.append({"rouge": true[i]}.get(kind, agreed[i] if kind == "agreement" else score is not None and score[i].item()))
    found = torch.tensor(found, dtype=torch.float32)
    if s.length_bonus:
        found = found - s.length_bonus * (batch.mask.sum(1) - batch.ref_len).abs()
    return found


def group_logp(llama, batch, temperature):
    layout = shared_prompts.lay_out(batch)
    h = llama(layout.tokens, "policy", wanted=layout.before, layout=layout)  # (n, C)
    return ppo.token_logp(llama.logits(h, "policy") / temperature, batch)  # (B, T)


def of_group(s, llama, tokenizer):
    if not s.eval_every:
        return None
    rows = load_rows(s, "validation", llama, tokenizer, s.eval_examples)
    return validation.on_rows(rows, validate_group, s, llama, tokenizer)


def validate_group(s, llama, tokenizer, rows):
    sampler = partial(model.sample, llama, adapter="policy", max_new_tokens=s.max_new_tokens, temperature=0)
    texts = evaluation.predict(rows, sampler, 32, tokenizer.decode)
    scores = evaluation.metrics(texts, [row.target for row in rows])
    exact = sum(text == row.target for text, row in zip(texts, rows, strict=True)) / len(rows)
    return {f"val_{name}": scores[name] for name in ("la-rouge1-F1", "excess_length")} | {"val_exact": exact}
