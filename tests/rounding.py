"""Rounding to nearest in the 4-bit format, for tests and benchmarks; it imports nothing that .venv-bench lacks."""

import torch

import quant


def round_to_nearest(weight, group_size=128):
    """`quant.gptq` without the error feedback: what it must beat. weight: (N, K), as nn.Linear holds it."""
    g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // group_size  # (K,)
    scales = torch.stack([quant.symmetric_scale(group) for group in weight.split(group_size, dim=1)])  # (G, N)
    Q = (weight.T / scales[g_idx]).round().clamp(-8, 7) + 8  # (K, N)
    return quant.pack(Q, scales, g_idx)
