"""Which library multiplies matrices on a CPU. The results are the same but for rounding; the time is not."""

import math
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F


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
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bf16_is_faster(laps=3):
    """Whether products of bf16 matrices take less time here than of fp32, which takes 20 ms to find out.

    As a rule they take half of it where the hardware has them; on some Xeons with AVX512-BF16 1.7 times as much. Timed
    is one thread, without what other processes take: on a busy machine a clock was wrong one time in fourteen.
    """
    prefer_onednn()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    least = {}  # seconds
    x, W = torch.rand(256, 512), torch.rand(1024, 512)  # (M, K), (N, K)
    for _ in range(laps):
        for dtype in (torch.float32, torch.bfloat16):
            left, right = x.to(dtype), W.to(dtype)
            start = time.thread_time()
            F.linear(left, right)
            least[dtype] = min(least.get(dtype, math.inf), time.thread_time() - start)
    torch.set_num_threads(threads)
    return least[torch.bfloat16] < least[torch.float32]


@contextmanager
def by_mkl(small=True):
    """Products in here by MKL, if they are small: over small matrices oneDNN starts longer than it works."""
    matmul = torch.backends.mkldnn.matmul
    chosen = matmul.fp32_precision
    if small:
        matmul.fp32_precision = "none"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen


class Attention(torch.autograd.Function):
    """F.scaled_dot_product_attention as a CPU does it, forward and backward by MKL: its kernel multiplies one small
    block after the other. By oneDNN it takes 1.3 to 3.8 times as long, see docs/speed.md.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        """q (B, H, T, D), k, v (B, J, S, D), mask (B, 1, T, S) to add to the scores, or None: causal -> q's shape."""
        with by_mkl():
            y, scale = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, is_causal=mask is None, attn_mask=mask
            )
        ctx.save_for_backward(q, k, v, y, scale, mask)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, scale, mask = ctx.saved_tensors
        with by_mkl():
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy, q, k, v, y, scale, 0.0, mask is None, attn_mask=mask
            )
        return dq, dk, dv, None
