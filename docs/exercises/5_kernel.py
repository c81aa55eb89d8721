"""Exercise 5: a GPU kernel that multiplies by 4-bit weights. It needs no GPU: Triton's interpreter runs it on a CPU.

    make exercise N=5

The point of 4 bits is lost if a dense copy of the weights is made first. So this kernel reads words, takes them apart
in registers, and multiplies at once: y = x W, with x (M, K), and W (K, N) in words qweight (K/8, N) and scales (G, N):

    W[k, n] = (q - 8) * scales[k // group_size, n]       q = bits 4j to 4j + 3 of qweight[k // 8, n], j = k % 8

Worked example: in the word 0x87654321 the rows 0 to 7 are q = 1, 2, ..., 8; with a scale of 1/2 the weights are
-3.5, -3, ..., 0. A word is a *signed* integer, and >> fills up with copies of its sign: mask with & 15 after shifting.

Every program of the grid computes BLOCK columns of y for all M rows. M is a power of two, K and group_size are
multiples of 8, N is anything, so mask the columns beyond. A plan:

    n = the columns of this program, (BLOCK,); m = the rows, (M,); acc = zeros (M, BLOCK)
    for r in range(K // 8):                      the words of the rows 8r to 8r + 7
        load the words (BLOCK,) and their scales (BLOCK,), both with a mask
        for j in tl.static_range(8):             take out nibble j, make it weights (BLOCK,)
            load column 8r + j of x, (M,), and add its outer product with the weights to acc
    store acc

All tensors are contiguous: element [i, j] of an (I, J) tensor p is at p + i * J + j. You need tl.program_id, tl.arange,
tl.zeros, tl.load(pointer, mask=…, other=…), tl.store. Where to look: `quant.dequantize` is the definition, in plain
torch; `quant._matmul_kernel` is what becomes of this one when it must be fast.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, qweight, scales, y, N, K, group_size, M: tl.constexpr, BLOCK: tl.constexpr):
    """x, qweight, scales, y: pointers. y (M, N) = x (M, K) W (K, N)."""
    # yours


def matmul(x, qweight, scales, group_size, BLOCK=32):
    """x (M, K) float32, qweight (K/8, N) int32, scales (G, N) -> (M, N) float32."""
    raise NotImplementedError  # all that is to do here: take this line out once there is a kernel
    (M, K), N = x.shape, qweight.shape[1]
    y = torch.empty(M, N, device=x.device)
    kernel[(triton.cdiv(N, BLOCK),)](x, qweight, scales, y, N, K, group_size, M, BLOCK)
    return y
