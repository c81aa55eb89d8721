"""One step of each training as the loops of lastmile.py do it, what it takes, and what --dry-run says it would."""

import contextlib
import ctypes
import io
import time

import common
import torch

import data
import lastmile
import ppo
from training import dry_run, optimizer
from training import settings as settings_module

ADAPTERS = {"mle": ["mle"], "reward": ["reward"], "ppo": ["policy", "value"]}  # that learn, and pass together
HEADS = {"value": "zero", "reward": "normal"}
SETTINGS = {"mle": settings_module.Mle, "reward": settings_module.Reward, "ppo": settings_module.Ppo}


def settings(stage, **changes):
    """A stage's settings, the paper's but for the changes; on the CPU in fp32 where they name nothing else."""
    return SETTINGS[stage](**dict(model="random weights", device="cpu", dtype="float32") | changes)


def add_adapters(stage, llama, s):
    for name in ADAPTERS[stage]:
        common.add_adapter(llama, name, s.lora_r, HEADS.get(name))
    if stage == "ppo":
        common.add_adapter(llama, "reward", settings_module.Reward.lora_r, "normal")
        for parameter in llama.adapter_parameters("reward"):
            parameter.requires_grad_(False)


def step(stage, llama, batch, s):
    """A function that does one step on the batch and returns its numbers. llama: with the stage's adapters."""
    llama.recompute = s.grad_checkpoint
    update = optimizer.Optimizer(*map(llama.adapter_parameters, ADAPTERS[stage]), max_grad_norm=s.max_grad_norm)

    def mle():
        for part in batch.split(s.micro_batch_size):
            loss = ppo.mle_loss(ppo.policy_logp(llama, part, "mle"), part.mask)
            update.add(loss, data.share(part.mask, batch.mask))
        return update(s.learning_rate)  # the loss and the norm of its gradient

    def reward():
        for part in batch.split(s.micro_batch_size):
            score = llama.scalar(llama(part.tokens, "reward"), "reward")  # (B, T)
            update.add(ppo.reward_loss(score, part), data.share(part.weight, batch.weight))
        return update(s.learning_rate)

    def both():
        return lastmile.ppo_updates(s, llama, batch, update, s.learning_rate, logged=False)

    return {"mle": mle, "reward": reward, "ppo": both}[stage]


def measure(stage, s, rows, size="15M", laps=3, returned=False):
    """{"seconds": of each lap, "peak": bytes} of steps on rows over a 4-bit tiny Llama, in a process of its own.

    The peak is the most memory held at any time less what the process held before the model was built: as --dry-run
    counts, weights, adapters, gradients and moments are in it, and Python and torch are not.
    returned: have glibc give every tensor beyond 1 MiB back as soon as it is freed, which takes time. By itself it
    keeps what was freed for the next one, which seldom fits exactly: the peak then says more about it than about us.
    """
    return common.in_child(_measure, stage, s, rows, size, laps, returned)


def _measure(stage, s, rows, size, laps, returned):
    if returned:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    common.warm_up()
    before, _ = common.rss()
    llama = common.tiny_llama(size, packed=True)
    add_adapters(stage, llama, s)
    run = step(stage, llama, data.collate(rows), s)
    run()
    seconds = []
    for _ in range(laps):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "peak": common.rss()[1] - before}


def estimate(stage, s, rows, llama):
    """What --dry-run says that a stage's memory goes into: {name: bytes}. llama: on the meta device, no adapters."""
    add_adapters(stage, llama, s)
    llama.recompute = s.grad_checkpoint
    with contextlib.redirect_stdout(io.StringIO()):
        memory = dry_run.dry_run(s, llama, rows, ADAPTERS[stage], ADAPTERS[stage])
    for _, layer in common.model.lora_layers(llama):
        for adapters in (layer.lora_A, layer.lora_B):
            adapters.clear()
    llama.score.clear()
    return memory


def meta_llama(config, packed, dtype=torch.float32):
    """A Llama of 4-bit projections without weights: what --dry-run makes of a folder's headers."""
    linear = lambda name, K, N: common.quant.QuantLinear(K, N, packed)  # noqa: E731
    with torch.device("meta"):
        llama = common.model.Llama(config, linear)
    return llama.to(dtype).requires_grad_(False)
