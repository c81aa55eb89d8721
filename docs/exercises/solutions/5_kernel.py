"""A solution of exercise 5."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, qweight, scales, y, N, K, group_size, M: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    m = tl.arange(0, M)  # (M,)
    acc = tl.zeros((M, BLOCK), dtype=tl.float32)
    for r in range(K // 8):
        word = tl.load(qweight + r * N + n, mask=n < N, other=0)  # (BLOCK,)
        scale = tl.load(scales + (8 * r // group_size) * N + n, mask=n < N, other=0.0).to(tl.float32)
        for j in tl.static_range(8):
            w = (((word >> (4 * j)) & 15) - 8).to(tl.float32) * scale  # (BLOCK,)
            acc += tl.load(x + m * K + 8 * r + j)[:, None] * w[None, :]  # (M, BLOCK)
    tl.store(y + m[:, None] * N + n[None, :], acc, mask=(n < N)[None, :])


def matmul(x, qweight, scales, group_size, BLOCK=32):
    (M, K), N = x.shape, qweight.shape[1]
    y = torch.empty(M, N, device=x.device)
    kernel[(triton.cdiv(N, BLOCK),)](x, qweight, scales, y, N, K, group_size, M, BLOCK)
    return y
