"""Which library multiplies matrices on a CPU. The results are the same but for rounding; the time is not."""

from contextlib import contextmanager

import torch


def prefer_onednn():
    """Have oneDNN, not MKL, multiply fp32 matrices on this CPU, if it does so in fp32. Returns whether.

    On AMD's CPUs it is twice as fast. torch asks it only where rounding to bf16 on the way is allowed, which CPUs with
    matrix units (AMX) make use of and others do not: so it is tried, on few rows and on many, either way round.
    """
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    W = torch.rand(256, 512, generator=torch.Generator().manual_seed(0)) - 0.5  # (K, N)
    for left, right in ((W.T[:7], W), (W.T.contiguous(), W), (W, W.T), (W.T, W.T.contiguous().T)):
        exact = left.double() @ right.double()
        if (left @ right - exact).norm() > 1e-6 * exact.norm():
            matmul.fp32_precision = "none"
            return False
    return True


def multiplies_bf16():
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX): then about twice as fast as fp32.

    It asks what the CPU has and times nothing: a run that is resumed must decide as before.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def few_rows(rows):
    """Up to 64 rows, products in here by MKL: over small matrices oneDNN (see model.py) starts longer than it works."""
    matmul = torch.backends.mkldnn.matmul
    chosen = matmul.fp32_precision
    if rows <= 64:
        matmul.fp32_precision = "none"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen
