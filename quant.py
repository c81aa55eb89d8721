"""GPTQ: 4-bit weights, how they are stored, multiplied, and made.

A linear layer y = x W with W (K, N) keeps, for each weight, a 4-bit integer q in 0..15, and for each group of rows
(128 as a rule, 32 for small models) and each column a scale s and a zero point z:

    W[k, n] = (q[k, n] - z[g, n]) * s[g, n]        with g = g_idx[k], the group of row k

Eight 4-bit numbers share an int32, the first in the lowest bits:

    qweight (K/8, N) int32   nibble j of word r is q[8r + j, n]: packed down the rows
    qzeros  (G, N/8) int32   nibble j of word c is z[g, 8c + j] - zero_offset: packed along the columns
    scales  (G, N)   fp16
    g_idx   (K,)     int32   k // group_size, or any order when the quantizer sorted the rows ("act-order")

Worked example: the rows 1, 2, ..., 8 of one column pack into the word 0x87654321.

The trap of the format: checkpoints of version 1 ("gptq", nearly all there are) store z - 1, so zero_offset is 1;
version 2 ("gptq_v2") stores z, so zero_offset is 0. Some labels are wrong; see `formats.gptq.find_zero_offset`.

`QuantLinear` is frozen. Its backward yields the gradient of the input only, from the packed tensors: a base that kept
its dequantized weights for backward would not be a 4-bit base. On a CPU the weights are dequantized once and kept, the
fastest there for models that fit. On a GPU the words are rearranged (`Tiles`), and a Triton kernel multiplies
straight from them when there are few rows (decoding); with many rows (training) it pays to dequantize into a scratch
matrix and leave the product to cuBLAS.

GPTQ: Frantar et al. 2023, arXiv 2210.17323. File format: AutoGPTQ, GPTQModel.
Dimensions: M rows of x, K input width, N output width, G groups, T tiles of 128 rows, P columns of a tile.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: everything but the GPU path works
    triton = None

# ----------------------------------------------------------------------------------------------------------------------
# The layout, in plain torch


def unpack_rows(packed):
    """(R, C) int32 -> (8R, C) int32: nibble j of word r becomes row 8r + j."""
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)  # (8,)
    return ((packed[:, None, :] >> shift[:, None]) & 15).flatten(0, 1)  # (R, 8, C) -> (8R, C)


def pack_rows(nibbles):
    """(8R, C) integers in 0..15 -> (R, C) int32: the inverse of `unpack_rows`."""
    shift = torch.arange(0, 32, 4, device=nibbles.device)  # (8,)
    words = (nibbles.long().unflatten(0, (-1, 8)) << shift[:, None]).sum(1)  # (R, C), 0 .. 2**32 - 1
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # two's complement


def dequantize(qweight, qzeros, scales, g_idx, zero_offset):
    """The dense weight of a GPTQ layer: the definition that every kernel is tested against.

    qweight (K/8, N) int32, qzeros (G, N/8) int32, scales (G, N), g_idx (K,) int32; zero_offset 1 for v1, 0 for v2.
    Returns (K, N) float32.
    """
    q = unpack_rows(qweight)  # (K, N)
    z = unpack_rows(qzeros.T.contiguous()).T + zero_offset  # (G, N)
    return (q - z[g_idx]).float() * scales.float()[g_idx]  # (K, N)


# ----------------------------------------------------------------------------------------------------------------------
# The tiles, in plain torch


class Tiles(NamedTuple):
    """A layer as the kernels read it: T tiles of 128 rows and P columns, N and padding to a multiple of 128.

    The rows are sorted by group, and groups padded, so that each slot of 32 rows, 4 to a tile, is of one group. A
    column of a tile is 16 words side by side:

        nibble j of word c is row 2c + j // 4 of slot j % 4

    so that a shift and a mask leave two neighbours in the two halves of a word, where tensor cores want them.
    Worked example: 1, 2, 3, 4 in the rows 0, 32, 64, 96 of a column and 5, 6, 7, 8 in the rows 1, 33, 65, 97 make its
    first word 0x87654321.

    `scale_zero`: an fp32 scale whose lowest five mantissa bits (0 in any fp16 or bf16 scale) hold the zero point, 0 to
    16; one word for each group of up to 32, 64 or 128 rows (1, 2 or 4 slots), and for each 128 rows of a larger one.
    """

    words: torch.Tensor  # (T, P, 16) int32
    scale_zero: torch.Tensor  # (4 T / slots, P) int32
    order: torch.Tensor  # (128 T,) int32: the row of W at each position, K for padding
    gather: bool  # whether order is anything but 0, 1, 2, ...: the columns of x must then be gathered
    K: int
    N: int


def to_tiles(qweight, qzeros, scales, g_idx, zero_offset):
    """The tensors of a GPTQ layer -> Tiles."""
    K, (G, N) = len(g_idx), scales.shape
    count = g_idx.bincount(minlength=G)  # (G,) rows of each group
    unit = next(unit for unit in (32, 64, 128) if unit >= min(int(count.max()), 128))  # rows that share a scale
    padded = -(-count // unit) * unit  # (G,)
    T, P = -(-int(padded.sum()) // 128), -(-N // 128) * 128
    row = g_idx.argsort(stable=True)  # (K,) the rows, group by group
    shift = (padded - count).cumsum(0) - (padded - count)  # (G,) padding before each group
    order = torch.full((128 * T,), K, dtype=torch.int32, device=row.device)
    order[torch.arange(K, device=row.device) + shift[g_idx[row]]] = row.int()

    q = F.pad(unpack_rows(qweight), (0, P - N, 0, 1))[order]  # (128 T, P)
    q = q.view(T, 4, 16, 2, P).permute(0, 2, 3, 1, 4).flatten(0, 3)  # (128 T, P), by tile, word, half and slot
    words = pack_rows(q).view(T, 16, P).transpose(1, 2).contiguous()  # (T, P, 16)
    z = unpack_rows(qzeros.T.contiguous()).T + zero_offset  # (G, N)
    scale_zero = (scales.float().view(torch.int32) & -32) | z  # (G, N)
    scale_zero = F.pad(scale_zero.repeat_interleave(padded // unit, 0), (0, P - N))  # (…, P)
    scale_zero = F.pad(scale_zero, (0, 0, 0, 128 * T // unit - len(scale_zero)))  # (4 T / slots, P)
    gather = not torch.equal(order, torch.arange(K, device=row.device))
    return Tiles(words, scale_zero, order, gather, K, N)


def from_tiles(tiles):
    """The qweight (K/8, N) that went into `to_tiles`."""
    T, P, _ = tiles.words.shape
    q = unpack_rows(tiles.words.transpose(1, 2).flatten(0, 1))  # (128 T, P), by tile, word, half and slot
    q = q.view(T, 16, 2, 4, P).permute(0, 3, 1, 2, 4).flatten(0, 3)  # (128 T, P), by tile, slot, word and half
    position = tiles.order.argsort()[: tiles.K]  # (K,) where each row of W is
    return pack_rows(q[position, : tiles.N])


# ----------------------------------------------------------------------------------------------------------------------
# The Triton kernels

if triton:

    @triton.jit
    def _matmul_kernel(
        x, words, scale_zero, out, M, N, T,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SLOTS: tl.constexpr,
    ):  # fmt: skip
        """out (S, M, N) = x (M, 128 T) W: a program sums one of S shares of the tiles, for BLOCK_M x BLOCK_N of it.

        An H200 reads 8e12 4-bit weights a second and issues 30e12 instructions a second, so that a weight may cost
        fewer than 4. Hence:

        1. The weights are the left operand, y^T = W^T x^T: tensor cores want 16 rows there, more than M in decoding.
        2. They enter the product as 128 + q, neither converted nor scaled.
        3. Scale and zero point are applied to the sum over a group:

            sum of (q - z) s x  =  s (sum of (128 + q) x  -  (128 + z) sum of x)

        The sum of x is a product with ones, shared by all columns. The 128 costs the fp32 sums 5 of their 24 bits; in
        fp16 it is 1024 and costs 8; in fp32 it is 0.
        """
        dtype: tl.constexpr = x.dtype.element_ty
        BIAS: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024 if dtype == tl.float16 else 0
        GROUPS: tl.constexpr = 4 // SLOTS  # words of scale_zero a tile
        P = tl.cdiv(N, 128) * 128
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        split, S = tl.program_id(2), tl.num_programs(2)
        first, last = T * split // S, T * (split + 1) // S
        x += m[None, :] * T * 128 + first * 128 + tl.arange(0, 32)[:, None]  # (32, BLOCK_M): x^T
        words += (first * P + n[:, None]) * 16 + tl.arange(0, 16)[None, :]  # (BLOCK_N, 16)
        scale_zero += first * GROUPS * P + n  # (BLOCK_N,)
        ones = tl.full((BLOCK_N, 32), 1.0, dtype)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for _ in tl.range(first, last, num_stages=STAGES):
            word = tl.load(words, eviction_policy="evict_first")  # read once: leave the L2 cache to the rest
            for group in tl.static_range(GROUPS):
                both = tl.load(scale_zero + group * P)  # (BLOCK_N,)
                s = (both & -32).to(tl.float32, bitcast=True)
                z = ((both & 31) + BIAS).to(tl.float32)
                qx = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                sum_x = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                for slot in tl.static_range(group * SLOTS, group * SLOTS + SLOTS):
                    rows = tl.load(x + 32 * slot, mask=(m < M)[None, :], other=0.0)  # (32, BLOCK_M)
                    qx = tl.dot(_unpack(word, slot, dtype), rows, qx, input_precision="ieee")
                    sum_x = tl.dot(ones, rows, sum_x, input_precision="ieee")
                acc += s[:, None] * (qx - z[:, None] * sum_x)
            x += 128
            words += P * 16
            scale_zero += GROUPS * P
        out += (split * M + m[None, :]) * N + n[:, None]
        tl.store(out, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])

    @triton.jit
    def _unpack(word, slot: tl.constexpr, dtype: tl.constexpr):
        """The rows of a slot, (BLOCK_N, 16) words -> (BLOCK_N, 32): 128 + q in bf16, 1024 + q in fp16, q in fp32.

        In bf16 128 is 0x4300, in fp16 1024 is 0x6400, and the lowest four bits of both are worth 8, 4, 2 and 1: or-ing
        q in adds it, two at a time. Joining the halves costs nothing: the tensor cores read them in this order.
        """
        half: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
        pair = ((word >> (4 * slot)) & 0x000F000F) | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
        pair = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))  # (BLOCK_N, 16, 2)
        q = tl.reshape(pair, (word.shape[0], 32)).to(half, bitcast=True)
        return q.to(tl.float32) - 1024 if dtype == tl.float32 else q

    @triton.jit
    def _sum_kernel(parts, out, size, S, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        """out (size,) = the sum of parts (S, size), S <= SPLITS: always in the same order, unlike atomic additions."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        split = tl.arange(0, SPLITS)[:, None]  # (SPLITS, 1): all loads are issued at once
        part = tl.load(parts + split * size + i[None, :], mask=(split < S) & (i < size)[None, :], other=0.0)
        tl.store(out + i, tl.sum(part, 0).to(out.dtype.element_ty), mask=i < size)

    @triton.jit
    def _dequantize_kernel(words, scale_zero, order, out, P, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr):
        """out (K + 1, P) = the dense weight, a tile of BLOCK_N columns a program; padding is written to row K."""
        t = tl.program_id(1)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = tl.arange(0, 4)[:, None]  # (4, 1)
        row = t * 128 + 32 * slot + 2 * tl.arange(0, 16)[None, :]  # (4, 16)
        word = tl.load(words + (t * P + n[:, None]) * 16 + tl.arange(0, 16)[None, :])  # (BLOCK_N, 16)
        group = t * (4 // SLOTS) + tl.arange(0, 4)[None, :] // SLOTS  # (1, 4)
        both = tl.load(scale_zero + group * P + n[:, None])[:, :, None]  # (BLOCK_N, 4, 1)
        s = (both & -32).to(tl.float32, bitcast=True)
        shift = -((both & 31) + 128).to(tl.float32) * s  # exact: 8 bits times the 11 of an fp16
        pair = ((word[:, None, :] >> (4 * slot)) & 0x000F000F) | 0x43004300  # (BLOCK_N, 4, 16), as in _unpack
        for half in tl.static_range(2):
            q = pair & -65536 if half else pair << 16  # the bf16 128 + q, widened to fp32
            w = q.to(tl.float32, bitcast=True) * s + shift  # (q - z) s, exact
            line = out + tl.load(order + row + half).to(tl.int64) * P  # (4, 16)
            tl.store(line + n[:, None, None], w.to(out.dtype.element_ty))


# BLOCK_M, BLOCK_N, warps, stages: the first that holds all M rows, or the last. Chosen by the instructions that the
# compiler emits for sm_90 (`make sass`): 2.0, 2.3, 2.9 and 4.4 a weight, no spills. With two warps Triton multiplies by
# mma, which shares the products with ones and waits for nothing; 64 rows are worth four warps and wgmma.
# No GPU has timed these, KERNEL_ROWS or PROGRAMS yet.
CONFIGS = ((8, 128, 2, 4), (16, 128, 2, 4), (32, 128, 2, 3), (64, 128, 4, 3))
KERNEL_ROWS = 64  # up to here the packed kernel, above it dequantize and use cuBLAS
PROGRAMS = 4 * 132  # K is split until there are so many: four for each multiprocessor of a Hopper
FUSED = {"enable_fp_fusion": True}  # a b + c as one instruction; Triton 3.9 warns if this is not set


def triton_matmul(x, tiles):
    """x (M, K) times the packed weight, which is never made dense: (M, N), dtype of x.

    Needs a GPU, or TRITON_INTERPRET=1.
    """
    M, N, T, P = len(x), tiles.N, *tiles.words.shape[:2]
    if len(tiles.order) > tiles.K:
        x = F.pad(x, (0, 1))  # a column K of zeros for the padding
    if tiles.gather:
        x = x.index_select(1, tiles.order)
    BLOCK_M, BLOCK_N, warps, stages = next((config for config in CONFIGS if config[0] >= M), CONFIGS[-1])
    if x.dtype == torch.float32:
        stages = min(stages, 2)  # twice the size: three would not fit the 99 KB that a block has on an RTX 3090 or 4090
    grid = P // BLOCK_N, triton.cdiv(M, BLOCK_M)
    S = max(1, min(PROGRAMS // (grid[0] * grid[1]), T // 2, 16))  # two tiles at least: one loads, one is computed
    parts = torch.empty(S, M, N, dtype=x.dtype if S == 1 else torch.float32, device=x.device)
    _matmul_kernel[(*grid, S)](
        x.contiguous(), tiles.words.contiguous(), tiles.scale_zero.contiguous(), parts, M, N, T,
        BLOCK_M, BLOCK_N, stages, SLOTS=4 * T // len(tiles.scale_zero), num_warps=warps, **FUSED,
    )  # fmt: skip
    if S == 1:
        return parts[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _sum_kernel[(triton.cdiv(M * N, 256),)](parts, out, M * N, S, triton.next_power_of_2(S), 256, num_warps=2, **FUSED)
    return out


SCRATCH = {}  # (device, dtype) -> memory for the largest dense weight so far


def triton_dequantize(tiles, dtype, shared=False):
    """`dequantize` in one kernel: (K, N) of the given dtype. Needs a GPU, or TRITON_INTERPRET=1.

    shared: in one buffer for all layers, which the next call overwrites.
    """
    T, P, _ = tiles.words.shape
    key, size = (tiles.words.device, dtype), (tiles.K + 1) * P
    out = SCRATCH.get(key) if shared else None
    if out is None or len(out) < size:
        out = torch.empty(size, dtype=dtype, device=tiles.words.device)
    if shared:
        SCRATCH[key] = out
    words, scale_zero = tiles.words.contiguous(), tiles.scale_zero.contiguous()  # copied only for one of joined layers
    grid, slots = (P // 128, T), 4 * T // len(scale_zero)
    _dequantize_kernel[grid](words, scale_zero, tiles.order, out, P, BLOCK_N=128, SLOTS=slots, num_warps=2, **FUSED)
    return out[: tiles.K * P].view(tiles.K, P)[:, : tiles.N]


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class QuantMatmul(torch.autograd.Function):
    """y = x W and dx = dy W^T for a frozen packed W. Nothing is saved: W stays where it is, and packed."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return product(x, layer)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.weight(ctx.dtype, shared=True).T, None


def product(x, layer):
    """x (…, K) times the weight of a QuantLinear or Joined: (…, N)."""
    rows = x.flatten(0, -2)  # (M, K)
    if layer.dense is None and layer.tiles_on_gpu() and len(rows) <= KERNEL_ROWS:
        y = triton_matmul(rows, layer.tiles)  # (M, N)
    else:
        y = rows @ layer.weight(x.dtype, shared=True)  # (M, N)
    return y.unflatten(0, x.shape[:-1])


def multiply(x, layer):
    """`product`, differentiable."""
    return QuantMatmul.apply(x, layer) if x.requires_grad else product(x, layer)


class PackedWeight:
    """A 4-bit weight, that of one layer or of several joined, and its dense form."""

    def weight(self, dtype, shared=False):
        """The dense weight (K, N): on a CPU made once and kept, on a GPU made again for each product.

        shared: on a GPU, in one buffer for all layers, which the next call overwrites.
        """
        if self.dense is not None and self.dense.dtype == dtype:
            return self.dense
        if self.tiles_on_gpu():
            return triton_dequantize(self.tiles, dtype, shared)
        self.dense = self.make_dense(dtype)
        return self.dense


class Joined(PackedWeight):
    """Several layers of one input as one: one tensor holds their columns side by side, and each has a view of its part.

    One product for q, k and v and one for gate and up: fewer kernels to launch, and act-order's gather is done once.
    """

    def __init__(self, layers):
        self.layers, self.tiles, self.dense = layers, None, None
        first = layers[0].g_idx
        self.possible = first.is_meta or all(torch.equal(layer.g_idx, first) for layer in layers)

    def tiles_on_gpu(self):
        """As in QuantLinear."""
        found = [layer.tiles_on_gpu() for layer in self.layers]
        if found[0] and not self.tiles:
            words = torch.cat([tiles.words for tiles in found], 1)  # (T, sum of P, 16)
            scale_zero = torch.cat([tiles.scale_zero for tiles in found], 1)  # (4 T / slots, sum of P)
            widths = [tiles.words.shape[1] for tiles in found]
            self.tiles = found[0]._replace(words=words, scale_zero=scale_zero, N=sum(widths))
            for layer, w, sz in zip(self.layers, words.split(widths, 1), scale_zero.split(widths, 1), strict=True):
                layer.tiles = layer.tiles._replace(words=w, scale_zero=sz)
        return self.tiles

    def make_dense(self, dtype):
        """As in QuantLinear; from here on each layer's own weight is a part of this one."""
        dense = torch.cat([layer.weight(dtype) for layer in self.layers], 1)
        parts = dense.split([layer.out_features for layer in self.layers], 1)
        for layer, part in zip(self.layers, parts, strict=True):
            layer.dense = part
        return dense

    def __call__(self, x):
        """x (…, K) -> [(…, N) of each layer]."""
        y = multiply(x, self)
        widths = [layer.tiles.words.shape[1] if self.tiles else layer.out_features for layer in self.layers]
        parts = zip(self.layers, y.split(widths, -1), strict=True)
        return [layer.add_bias(part[..., : layer.out_features]) for layer, part in parts]


class QuantLinear(PackedWeight, nn.Module):
    """A frozen 4-bit linear layer, K inputs to N outputs; it replaces an nn.Linear(K, N).

    Its buffers are the tensors of the file. On a GPU the first product replaces qweight by tiles, so that the weights
    are in memory once; saving and moving to another device bring it back.
    zero_offset: 1 for checkpoints of version 1 (the file stores z - 1), 0 for version 2.
    """

    def __init__(self, K, N, group_size=128, bias=False, zero_offset=1):
        super().__init__()
        assert K % 8 == 0 and N % 8 == 0, f"8 weights share a word: K={K} and N={N} must be multiples of 8"
        G = 1 if group_size == -1 else -(-K // group_size)  # the last group may be short
        self.in_features, self.out_features, self.zero_offset = K, N, zero_offset
        self.register_buffer("qweight", torch.zeros(K // 8, N, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(G, N // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(G, N, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(K, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(N) if bias else None)
        self.tiles = None  # the GPU's form of the first four, never saved
        self.dense = None  # the CPU's cache, never saved
        self.joined = None  # the Joined whose product it takes part in

    def make_tiles(self):
        """Replace qweight by tiles."""
        with torch.inference_mode(False):  # sampling may come here first, and then autograd
            self.tiles = to_tiles(self.qweight, self.qzeros, self.scales, self.g_idx, self.zero_offset)
        self.qweight, self.dense = None, None

    def restore_qweight(self):
        """Replace the tiles, if there are any, by qweight."""
        if self.tiles:
            self.qweight, self.tiles = from_tiles(self.tiles), None
        self.joined = None

    def _apply(self, *args, **kwargs):  # .to(device)
        self.restore_qweight()
        self.dense = None
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args):
        self.restore_qweight()
        super()._save_to_state_dict(*args)

    def tiles_on_gpu(self):
        """The tiles, where the weights are on a GPU, else None."""
        if self.scales.is_cuda and not self.tiles:
            self.make_tiles()
        return self.tiles

    def make_dense(self, dtype):
        """The dense weight (K, N), by the definition."""
        return dequantize(self.qweight, self.qzeros, self.scales, self.g_idx, self.zero_offset).to(dtype)

    def add_bias(self, y):
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x):  # (…, K) -> (…, N)
        return self.add_bias(multiply(x, self))

    @staticmethod
    def forward_joined(layers, x):
        """[layer(x) for layer in layers], by one product if their g_idx are equal."""
        joined = layers[0].joined
        if joined is None or any(layer.joined is not joined for layer in layers):
            joined = Joined(layers)
            for layer in layers:
                layer.joined = joined
        return joined(x) if joined.possible else [layer(x) for layer in layers]


# ----------------------------------------------------------------------------------------------------------------------
# The quantizer


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized."""

    group_size: int = 128  # weights that share a scale; -1: a whole column
    act_order: bool = False  # do the columns of largest Hessian first, while there is most room to correct
    damp: float = 0.01  # share of the Hessian's mean diagonal that is added to it
    scale_search: bool = False  # see `symmetric_scale`
    true_sequential: bool = False  # calibrate o_proj on the quantized q, k and v of its block, and so on


def gptq(weight, hessian, recipe=Recipe(), block=128):
    """Quantize one layer, column by column, each column's error passed on to the columns not yet done.

    Rounding each weight to the nearest step minimizes the error of the weights. GPTQ minimizes the error of the
    outputs, |x W - x W_q|^2 summed over calibration inputs x, whose Hessian is H = X^T X for every output alike. After
    a column is rounded, the best correction of the remaining ones is given by the inverse of H; the Cholesky factor of
    that inverse holds all the rows of it that are ever needed (Frantar et al., algorithm 1).

    weight: (N, K) as nn.Linear holds it. hessian: (K, K), sum or mean of x x^T. block: columns whose corrections to the
    rest are applied at once. It changes only the speed, unless a group is wider than a block and not a multiple of it:
    the group's scale is then set before the corrections of the block in which it begins.
    Returns (qweight, qzeros, scales, g_idx) in the v1 format, symmetric (z = 8), on the weight's device.
    """
    N, K = weight.shape
    group_size = K if recipe.group_size == -1 else recipe.group_size
    block -= block % group_size if group_size < block else 0  # groups begin where blocks do
    W, H = weight.detach().float().clone(), hessian.float().clone()
    dead = H.diagonal() == 0  # inputs that were always 0: any value does, 0 is exact
    H[dead, dead] = 1
    W[:, dead] = 0
    order = H.diagonal().argsort(descending=True) if recipe.act_order else torch.arange(K, device=W.device)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(recipe.damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)  # (K, K), inverse = U^T U

    Q = torch.zeros_like(W)  # (N, K) integers in 0..15
    scales = torch.zeros(-(-K // group_size), N, device=W.device)  # (G, N)
    for start in range(0, K, block):
        end = min(start + block, K)
        error = torch.zeros(N, end - start, device=W.device)
        for k in range(start, end):
            if k % group_size == 0:
                scales[k // group_size] = symmetric_scale(W[:, k : k + group_size], recipe.scale_search)
            s = scales[k // group_size]  # (N,)
            Q[:, k] = (W[:, k] / s).round().clamp(-8, 7) + 8
            error[:, k - start] = (W[:, k] - (Q[:, k] - 8) * s) / U[k, k]
            W[:, k:end] -= error[:, k - start, None] * U[k, k:end]  # within the block at once
        W[:, end:] -= error @ U[start:end, end:]  # beyond it, once a block
    position = order.argsort()  # (K,) where each column was done
    return pack(Q[:, position].T, scales, (position // group_size).to(torch.int32))


def symmetric_scale(weight, scale_search=False):
    """(N, group) -> (N,): the scale at which -8..7 just spans the weights; rounded to fp16, as it will be stored.

    scale_search: or a smaller one, down to half, if the group's squared rounding error is smaller: a scale that cuts
    off the largest weight rounds all others more finely.
    """
    widest = (weight.abs().amax(1) / 7.5).clamp(min=1e-5)  # (N,)
    best = widest.half().float()
    least = torch.full_like(best, torch.inf)  # error
    for share in torch.linspace(1, 0.5, 26).tolist() if scale_search else ():
        scale = (widest * share).clamp(min=1e-5).half().float()
        s = scale[:, None]  # (N, 1)
        error = ((weight / s).round().clamp(-8, 7) * s - weight).square().sum(1)  # (N,)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def pack(Q, scales, g_idx):
    """Q (K, N) in 0..15 with zero point 8 -> the four tensors of a v1 file, which stores the zero point as 7."""
    G, N = scales.shape
    qzeros = pack_rows(torch.full((N, G), 7, device=Q.device)).T.contiguous()  # (G, N/8)
    return pack_rows(Q), qzeros, scales.half(), g_idx


STAGES = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)  # of a block, in order


def quantize_blocks(blocks, hidden, run, recipe=Recipe(), progress=iter):
    """Replace every nn.Linear inside a stack of blocks by a QuantLinear, first block first, in place.

    blocks: modules that follow one another. hidden: calibration inputs of the first block, a list of tensors.
    run(block, h) -> h: how a block is called. Each block is calibrated on the outputs of the quantized blocks before
    it, as GPTQ prescribes; with recipe.true_sequential, each of STAGES on those of the stages before it.
    Raises UserError for a layer whose widths are not multiples of 8.
    """
    for block in progress(blocks):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for stage in STAGES if recipe.true_sequential else [("",)]:
            chosen = {name: linear for name, linear in linears.items() if any(part in name for part in stage)}
            hessians = collect_hessians(chosen, block, hidden, run)
            for name, linear in chosen.items():
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, quantized(name, linear, hessians[name], recipe))
        hidden = [run(block, h) for h in hidden]


def quantized(name, linear, hessian, recipe):
    """The QuantLinear of an nn.Linear by `gptq`; name: for messages."""
    N, K = linear.weight.shape
    if N % 8 or K % 8:
        raise UserError(f"{name}: {N} x {K} weights do not fill int32 words of eight; leave it unquantized")
    layer = QuantLinear(K, N, recipe.group_size, linear.bias is not None)
    try:
        packed = gptq(linear.weight, hessian, recipe)
    except torch.linalg.LinAlgError:
        raise FloatingPointError(
            f"{name}: the Hessian of its inputs has no inverse; raise --damp, if the model's weights are finite"
        ) from None
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = packed
    if linear.bias is not None:
        layer.bias = linear.bias.detach()
    return layer


def collect_hessians(linears, block, hidden, run):
    """{name: mean over calibration rows of x x^T, (K, K)} of the inputs x that each linear of a block sees."""
    sums, rows = {}, {}

    def watch(name):
        def hook(module, inputs):
            x = inputs[0].flatten(0, -2).float()  # (M, K)
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    for h in hidden:
        run(block, h)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / rows[name] for name in linears}
