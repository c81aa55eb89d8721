"""GPTQ: 4-bit weights, how they are stored, multiplied, and made.

A linear layer y = x W with W (K, N) keeps, for each weight, a 4-bit integer q in 0..15, and for each group of rows
(128 as a rule, 32 for small models) and each column a scale s and a zero point z:

    W[k, n] = (q[k, n] - z[g, n]) * s[g, n]        with g = g_idx[k], the group of row k

Eight 4-bit numbers share an int32, the first in the lowest bits:

    qweight (K/8, N) int32   nibble j of word r is q[8r + j, n]: packed down the rows
    qzeros  (G, N/8) int32   nibble j of word c is z[g, 8c + j] - zero_offset: packed along the columns
    scales  (G, N)   fp16
    g_idx   (K,)     int32   k // group_size, or any order when the quantiser sorted the rows ("act-order")

Worked example: the rows 1, 2, ..., 8 of one column pack into the word 0x87654321.

The trap of the format: checkpoints of version 1 ("gptq", nearly all there are) store z - 1, so zero_offset is 1;
version 2 ("gptq_v2") stores z, so zero_offset is 0. Some files bear the wrong label; `find_zero_offset` looks.

`QuantLinear` is frozen. Its backward yields the gradient of the input only, from the packed tensors: a base that kept
its dequantised weights for backward would not be a 4-bit base. On a CPU the weights are dequantised once and kept, the
fastest there for models that fit. On a GPU a Triton kernel multiplies straight from the packed words when there are
few rows (decoding); with many rows (training) it pays to dequantise into a scratch matrix and leave the product to
cuBLAS.

GPTQ: Frantar et al. 2023, arXiv 2210.17323. File format: AutoGPTQ, GPTQModel.
Dimensions: M rows of x, K input width, N output width, G groups.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: everything but the GPU path works
    triton = None

KERNEL_ROWS = 64  # up to here the packed kernel, above it dequantise and use cuBLAS

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
# What a checkpoint says of itself, and what it holds

SYNONYMS = {  # ours: what AutoGPTQ, GPTQModel, transformers and gptq-triton call it
    "method": ("quant_method", "method"),
    "format": ("checkpoint_format", "format"),
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "groupsize", "q_group_size"),
    "act_order": ("desc_act",),
    "sym": ("sym",),
}
TAKE_ANOTHER = "take a 4-bit GPTQ version of the model, or make one: python lastmile.py quantize --model UNQUANTISED"


def read_quantize_config(found):
    """The settings of a 4-bit GPTQ checkpoint, from all the files that may hold them.

    found: {file: its dict}; several files, and several spellings in one file, must agree. Keys that do not change how
    the tensors are read are passed over. Returns {"group_size", "act_order", "sym" (None: not said), "zero_offset"},
    or {} where nothing is found: not quantised. Raises ValueError with the file, the field and the remedy.
    """
    said = {}  # ours -> (value, where it was said)
    for file, raw in found.items():
        for name, spellings in SYNONYMS.items():
            for spelling in spellings:
                if raw.get(spelling) is None:
                    continue
                value = raw[spelling].lower() if isinstance(raw[spelling], str) else raw[spelling]
                other, place = said.setdefault(name, (value, f"{file} ({spelling})"))
                if other != value:
                    raise ValueError(
                        f"{file} ({spelling}): {value!r}, but {place} says {other!r}; keep the one that is true"
                    )
        if raw.get("is_marlin_format"):
            raise ValueError(f"{file} (is_marlin_format): marlin is another layout; {TAKE_ANOTHER}")
        if raw.get("load_in_4bit") or raw.get("load_in_8bit"):
            raise ValueError(f"{file}: bitsandbytes is not supported; {TAKE_ANOTHER}")
        if "zero_point" in raw or str(raw.get("version")).lower() in ("gemm", "gemv"):
            raise ValueError(f"{file}: awq is not supported; {TAKE_ANOTHER}")
        for field, plain in (("lm_head", False), ("dynamic", {}), ("pack_dtype", "int32")):
            if raw.get(field) not in (None, False, plain):
                raise ValueError(f"{file} ({field}): {raw[field]!r:.60} is not supported; {TAKE_ANOTHER}")
    if not said:
        return {}
    where = next(iter(found))
    for name, known, default in (("method", ("gptq",), "gptq"), ("format", ("gptq", "gptq_v2"), "gptq"),
                                 ("bits", (4,), None), ("act_order", (True, False), False),
                                 ("sym", (True, False, None), None)):  # fmt: skip
        value, place = said.get(name, (default, where))
        if value not in known:
            raise ValueError(f"{place}: {name} {value!r} is not supported; {TAKE_ANOTHER}")
    group_size, place = said.get("group_size", (None, where))
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise ValueError(f"{place}: group_size {group_size!r} must be -1 or a positive number; fetch the file again")
    version = said.get("format", ("gptq", ""))[0]
    return {
        "group_size": group_size, "act_order": bool(said.get("act_order", (False,))[0]),
        "sym": said.get("sym", (None,))[0], "zero_offset": 1 if version == "gptq" else 0,
    }  # fmt: skip


def find_zero_offset(qzeros, claimed, sym):
    """Decide by the label and by the zero points themselves: (zero_offset, a warning or "").

    qzeros: the packed zeros of all layers; claimed: the label's zero_offset; sym: True, False or None (not said). A
    symmetric checkpoint holds 7 everywhere in version 1 and 8 in version 2, whatever its label (vllm issue 38966).
    Raises ValueError for a 15 in version 1: its z is 16 to some programs and 0 to others, who wrote it is not known.
    """
    count = sum(unpack_rows(z).flatten().bincount(minlength=16) for z in qzeros)  # (16,)
    constant = int(count.argmax()) if int(count.max()) == int(count.sum()) else None
    offset, warning = claimed, ""
    if sym is not False and constant in (7, 8) and constant != 8 - claimed:
        offset = 8 - constant
        labels = {1: "gptq", 0: "gptq_v2"}
        warning = f"labelled {labels[claimed]}, but the zero points are those of {labels[offset]}; read as such"
    elif sym and constant is None:
        warning = "sym is true, but the zero points differ; read as they are"
    if offset and count[15]:
        raise ValueError("a zero point of version 1 is 15, which programs read in two ways; convert it to gptq_v2")
    return offset, warning


# ----------------------------------------------------------------------------------------------------------------------
# The Triton kernels

if triton:

    @triton.jit
    def _dequantize_tile(qweight, qzeros, scales, g_idx, k, n, K, N, zero_offset):
        """The tile W[k, n] as float32. k (BLOCK_K,) and n (BLOCK_N,) are indices; out of range reads as 0."""
        inside = (k < K)[:, None] & (n < N)[None, :]  # (BLOCK_K, BLOCK_N)
        word = tl.load(qweight + (k // 8)[:, None] * N + n[None, :], mask=inside, other=0)
        q = (word >> ((k % 8) * 4)[:, None]) & 15  # (BLOCK_K, BLOCK_N)
        g = tl.load(g_idx + k, mask=k < K, other=0)[:, None]  # (BLOCK_K, 1)
        word = tl.load(qzeros + g * (N // 8) + (n // 8)[None, :], mask=inside, other=0)
        z = ((word >> ((n % 8) * 4)[None, :]) & 15) + zero_offset  # (BLOCK_K, BLOCK_N)
        s = tl.load(scales + g * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        return (q - z).to(tl.float32) * s  # scale 0 outside: those weights are 0

    @triton.jit
    def _dequantize_kernel(
        qweight, qzeros, scales, g_idx, out, K, N, zero_offset, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        """out (K, N) = the dense weight, one tile a program."""
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        w = _dequantize_tile(qweight, qzeros, scales, g_idx, k, n, K, N, zero_offset)
        inside = (k < K)[:, None] & (n < N)[None, :]
        tl.store(out + k[:, None].to(tl.int64) * N + n[None, :], w.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _matmul_kernel(
        x, qweight, qzeros, scales, g_idx, out, M, K, N, zero_offset,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """out (M, N) = x (M, K) W: a program owns one tile of out and walks down K, sums in float32."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (m < M)[:, None] & (k < K)[None, :]
            rows = tl.load(x + m[:, None] * K + k[None, :], mask=inside, other=0.0)  # (BLOCK_M, BLOCK_K)
            w = _dequantize_tile(qweight, qzeros, scales, g_idx, k, n, K, N, zero_offset)  # (BLOCK_K, BLOCK_N)
            acc += tl.dot(rows, w.to(rows.dtype), input_precision="ieee")
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


def triton_dequantize(qweight, qzeros, scales, g_idx, zero_offset, dtype):
    """`dequantize` in one kernel: (K, N) of the given dtype. Needs a GPU, or TRITON_INTERPRET=1."""
    K, N = g_idx.numel(), scales.shape[1]
    out = torch.empty(K, N, dtype=dtype, device=qweight.device)
    grid = (triton.cdiv(K, 64), triton.cdiv(N, 64))
    _dequantize_kernel[grid](qweight, qzeros, scales, g_idx, out, K, N, zero_offset, BLOCK_K=64, BLOCK_N=64)
    return out


def triton_matmul(x, qweight, qzeros, scales, g_idx, zero_offset):
    """x (M, K) times the packed weight, without ever making it dense: (M, N), dtype of x.

    Needs a GPU, or TRITON_INTERPRET=1. One configuration, made for few rows: 16 is the least height of a tensor-core
    tile, 64 x 64 packed weights are 2 KiB of int32.
    """
    x = x.contiguous()
    (M, K), N = x.shape, scales.shape[1]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 64))
    _matmul_kernel[grid](
        x, qweight, qzeros, scales, g_idx, out, M, K, N, zero_offset, BLOCK_M=16, BLOCK_K=64, BLOCK_N=64
    )
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class QuantMatmul(torch.autograd.Function):
    """y = x W and dx = dy W^T for a frozen packed W. Saves the packed tensors only."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(layer.qweight, layer.qzeros, layer.scales, layer.g_idx)
        rows = x.flatten(0, -2)  # (M, K)
        if x.is_cuda and len(rows) <= KERNEL_ROWS:
            y = triton_matmul(rows, *ctx.saved_tensors, layer.zero_offset)  # (M, N)
        else:
            y = rows @ layer.weight(x.dtype)  # (M, N)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.weight(ctx.dtype).T, None


class QuantLinear(nn.Module):
    """A frozen 4-bit linear layer, K inputs to N outputs; stands where an nn.Linear(K, N) would.

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
        self.dense = None  # the CPU's cache, never saved

    def problem(self):
        """What is wrong with the loaded tensors, or "": numbers that would yield nonsense or read out of bounds."""
        if not self.scales.isfinite().all() or not self.scales.any():
            return "scales: not finite, or all 0"
        if int(self.g_idx.min()) < 0 or int(self.g_idx.max()) >= len(self.scales):
            return f"g_idx: groups {self.g_idx.min()} to {self.g_idx.max()}, expected 0 to {len(self.scales) - 1}"
        return ""

    def weight(self, dtype):
        """The dense weight (K, N): on a CPU made once and kept, on a GPU made anew for each product."""
        packed = self.qweight, self.qzeros, self.scales, self.g_idx
        if self.qweight.is_cuda:
            return triton_dequantize(*packed, self.zero_offset, dtype)
        if self.dense is None or self.dense.dtype != dtype:
            self.dense = dequantize(*packed, self.zero_offset).to(dtype)
        return self.dense

    def forward(self, x):  # (…, K) -> (…, N)
        y = QuantMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The quantiser


def gptq(weight, hessian, group_size=128, act_order=False, damp=0.01, block=128):
    """Quantise one layer, column by column, each column's error passed on to the columns not yet done.

    Rounding each weight to the nearest step minimises the error of the weights. GPTQ minimises the error of the
    outputs, |x W - x W_q|^2 summed over calibration inputs x, whose Hessian is H = X^T X for every output alike. After
    a column is rounded, the best correction of the remaining ones is given by the inverse of H; the Cholesky factor of
    that inverse holds all the rows of it that are ever needed (Frantar et al., algorithm 1).

    weight: (N, K) as nn.Linear holds it. hessian: (K, K), sum or mean of x x^T. group_size: weights that share a scale,
    -1 for all K. act_order: do the columns of largest Hessian first, while there is most room to correct.
    damp: share of H's mean diagonal added to it. block: columns whose corrections to the rest are applied at once;
    only the speed depends on it, unless a group is wider than a block: its scale is then set before all corrections.
    Returns (qweight, qzeros, scales, g_idx) in the v1 format, symmetric (z = 8), on the weight's device.
    """
    N, K = weight.shape
    group_size = K if group_size == -1 else group_size
    block -= block % group_size if group_size < block else 0  # groups begin where blocks do
    W, H = weight.detach().float().clone(), hessian.float().clone()
    dead = H.diagonal() == 0  # inputs that were always 0: any value does, 0 is exact
    H[dead, dead] = 1
    W[:, dead] = 0
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(K, device=W.device)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)  # (K, K), inverse = U^T U

    Q = torch.zeros_like(W)  # (N, K) integers in 0..15
    scales = torch.zeros(-(-K // group_size), N, device=W.device)  # (G, N)
    for start in range(0, K, block):
        end = min(start + block, K)
        error = torch.zeros(N, end - start, device=W.device)
        for k in range(start, end):
            if k % group_size == 0:
                scales[k // group_size] = symmetric_scale(W[:, k : k + group_size])
            s = scales[k // group_size]  # (N,)
            Q[:, k] = (W[:, k] / s).round().clamp(-8, 7) + 8
            error[:, k - start] = (W[:, k] - (Q[:, k] - 8) * s) / U[k, k]
            W[:, k:end] -= error[:, k - start, None] * U[k, k:end]  # within the block at once
        W[:, end:] -= error @ U[start:end, end:]  # beyond it, once a block
    position = order.argsort()  # (K,) where each column was done
    return pack(Q[:, position].T, scales, (position // group_size).to(torch.int32))


def round_to_nearest(weight, group_size=128):
    """The same format without the error feedback: what `gptq` must beat."""
    N, K = weight.shape
    group_size = K if group_size == -1 else group_size
    g_idx = torch.arange(K, dtype=torch.int32) // group_size
    scales = torch.stack([symmetric_scale(group) for group in weight.float().split(group_size, dim=1)])  # (G, N)
    Q = (weight.float().T / scales[g_idx]).round().clamp(-8, 7) + 8  # (K, N)
    return pack(Q, scales, g_idx)


def symmetric_scale(weight):
    """(N, group) -> (N,): the step at which -8..7 just spans the weights; rounded to fp16, as it will be stored."""
    return (weight.abs().amax(1) / 7.5).clamp(min=1e-5).half().float()


def pack(Q, scales, g_idx):
    """Q (K, N) in 0..15 with zero point 8 -> the four tensors of a v1 file, which stores the zero point as 7."""
    G, N = scales.shape
    qzeros = pack_rows(torch.full((N, G), 7, device=Q.device)).T.contiguous()  # (G, N/8)
    return pack_rows(Q), qzeros, scales.half(), g_idx


def quantize_blocks(blocks, hidden, run, group_size=128, act_order=False, damp=0.01, progress=iter):
    """Replace every nn.Linear inside a stack of blocks by a QuantLinear, first block first, in place.

    blocks: modules that follow one another. hidden: calibration inputs of the first block, a list of (1, T, C).
    run(block, h) -> h: how a block is called. Each block is calibrated on what the quantised blocks before it put out,
    as GPTQ prescribes. Raises ValueError for a layer whose widths are not multiples of 8.
    """
    for block in progress(blocks):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        hessians = collect_hessians(linears, block, hidden, run)
        for name, linear in linears.items():
            N, K = linear.weight.shape
            if N % 8 or K % 8:
                raise ValueError(f"{name}: {N} x {K} weights do not fill int32 words of eight; leave it unquantised")
            layer = QuantLinear(K, N, group_size, linear.bias is not None)
            packed = gptq(linear.weight, hessians[name], group_size, act_order, damp)
            layer.qweight, layer.qzeros, layer.scales, layer.g_idx = packed
            if linear.bias is not None:
                layer.bias = linear.bias.detach()
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, layer)
        hidden = [run(block, h) for h in hidden]


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


def output_error(weight, packed, hessian):
    """Mean squared output error of packed tensors against weight (N, K) on inputs of the given Hessian: a float."""
    difference = dequantize(*packed, zero_offset=1).T - weight.float()  # (N, K)
    return F.linear(difference, hessian.float()).mul(difference).sum().item() / len(weight)
