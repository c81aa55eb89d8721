"""One step of each training by lastmile.py's step functions: its time and its memory."""

import ctypes
import time
from functools import partial

import common

import data
import lastmile
import ppo
from interface import commands as settings_module

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
    groups = [llama.adapter_parameters(name) for name in ADAPTERS[stage]]
    update = lastmile.Optimizer(*groups, max_grad_norm=s.max_grad_norm)
    rate, micro = s.learning_rate, s.micro_batch_size

    if stage == "mle":
        tokens = batch.mask.sum().item()  # this batch is the average one
        return partial(lastmile.mle_step, llama, batch, update, rate, tokens, micro)
    if stage == "reward":
        weight = batch.weight.sum().item()
        return partial(lastmile.reward_step, llama, batch, update, rate, weight, "token", micro)
    score = partial(ppo.reward_scores, llama)
    return partial(lastmile.ppo_step, llama, batch, update, rate, score, s)


def measure(stage, s, rows, size="15M", laps=3, returned=False):
    """{"seconds": of each lap, "peak": bytes} of steps on rows over a 4-bit tiny Llama, in a process of its own.

    The peak is the most memory held at any time less what the process held before the model was built: it contains
    weights, adapters, gradients and moments, not Python and torch.
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
