"""Attention on one CPU thread, forward and backward, by MKL (speed.cpu.Attention) and by oneDNN, in turn.

python tests/bench/attention.py
"""

from functools import partial

import common
import torch
import torch.nn.functional as F

from speed.cpu import Attention

SHAPES = ((8, 4, 117, 32), (5, 6, 365, 48), (5, 9, 370, 64))  # B, H, T, D: the toy; 15M; SmolLM2-135M


def by_mkl(q, k, v):
    return Attention.apply(q, k, v, None)


def by_onednn(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def both_ways(attend, qkv, dy):
    torch.autograd.grad(attend(*qkv), qkv, dy)


def main():
    torch.set_num_threads(1)
    print(common.facts())
    for shape in SHAPES:
        qkv, dy = [torch.randn(shape).requires_grad_() for _ in range(3)], torch.randn(shape)
        ways = {way.__name__: common.by_onednn(partial(both_ways, way, qkv, dy)) for way in (by_mkl, by_onednn)}
        mkl, onednn = (1e3 * min(times) for times in common.race(ways, seconds=10).values())
        print(f"{shape}: MKL {mkl:.1f} ms, oneDNN {onednn:.1f} ms, {onednn / mkl:.1f}x", flush=True)


if __name__ == "__main__":
    main()
