"""The 4-bit layout, its kernels, its backward, and the quantiser."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

import model
import quant


def random_packed(K, N, group_size=32, act_order=False, seed=0):
    """(qweight, qzeros, scales, g_idx) of random bits, weights of about 0.1."""
    g = torch.Generator().manual_seed(seed)
    group_size = K if group_size == -1 else group_size
    G = -(-K // group_size)
    words = [torch.randint(-(2**31), 2**31, shape, generator=g).int() for shape in ((K // 8, N), (G, N // 8))]
    scales = (torch.rand(G, N, generator=g) * 0.01 + 0.01).half()
    order = torch.randperm(K, generator=g) if act_order else torch.arange(K)
    return *words, scales, (order // group_size).int()


def random_layer(K, N, **kwargs):
    layer = quant.QuantLinear(K, N, kwargs.get("group_size", 32))
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = random_packed(K, N, **kwargs)
    return layer


def correlated(K, rows=512, seed=0):
    """Calibration inputs whose columns lean on each other and differ in size, as activations do: (rows, K)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K // 4, generator=g) @ torch.randn(K // 4, K, generator=g)
    return (x + 0.3 * torch.randn(rows, K, generator=g)) * torch.linspace(0.2, 2, K)


def hessian_of(x):
    return x.T @ x / len(x)


def int32(word):
    return torch.tensor(word).to(torch.int32) if word < 2**31 else torch.tensor(word - 2**32).to(torch.int32)


def dense_twin(folder):
    """The model of a quantised folder with every packed layer written out as an nn.Linear: what 4 bits must equal."""
    packed = model.load(folder)
    dense = model.Llama(replace(packed.config, quantization={})).requires_grad_(False)
    state = {name: tensor for name, tensor in packed.state_dict().items() if name in dense.state_dict()}
    for name, layer in packed.named_modules():
        if isinstance(layer, quant.QuantLinear):
            parts = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
            state[f"{name}.weight"] = quant.dequantize(*parts, layer.zero_offset).T
    dense.load_state_dict(state, strict=True)
    return dense


# ----------------------------------------------------------------------------------------------------------------------
# The layout


def test_eight_rows_share_a_word_lowest_bits_first():
    """The docstring's worked example, 1..8 -> 0x87654321: the other nibble order loads just as well and is nonsense."""
    column = torch.arange(1, 9)[:, None]
    assert quant.pack_rows(column).tolist() == [[int32(0x87654321)]]
    assert torch.equal(quant.unpack_rows(int32(0x87654321).view(1, 1)), column.int())


@pytest.mark.parametrize(
    "zero_offset, first, second",
    [
        (1, [-3.5, 2, -2.5, 6, -1.5, 10, -0.5, 14], [2, -12, 3, -8, 4, -4, 5, 0]),
        (0, [-3, 4, -2, 8, -1, 12, 0, 16], [2.5, -10, 3.5, -6, 4.5, -2, 5.5, 2]),
    ],
    ids=["v1", "v2"],
)
def test_dequantize_by_hand(zero_offset, first, second):
    """W = (q - z) s worked out on paper, rows of two groups interleaved. Read with the wrong version's zero point every
    weight is off by one whole step, and nothing complains.
    """
    qweight = torch.zeros(1, 8, dtype=torch.int32)
    qweight[0, :2] = torch.stack([int32(0x87654321), int32(0xFEDCBA98)])  # q = 1..8 and 8..15
    qzeros = torch.stack([int32(0x37), int32(0xE0)])[:, None]  # group 0: 7 and 3; group 1: 0 and 14
    scales = torch.tensor([0.5, 2.0]).half()[:, None].repeat(1, 8)
    g_idx = torch.tensor([0, 1] * 4, dtype=torch.int32)
    W = quant.dequantize(qweight, qzeros, scales, g_idx, zero_offset)
    assert W.dtype == torch.float32 and W.shape == (8, 8)
    assert W[:, 0].tolist() == first and W[:, 1].tolist() == second


def test_pack_and_unpack_are_inverse():
    """Any nibbles survive the round trip, 15 in the sign bits included: there int32 turns negative."""
    nibbles = torch.randint(0, 16, (40, 6), generator=torch.Generator().manual_seed(0))
    nibbles[7::8, 0] = 15  # the uppermost nibble of every word of a column
    nibbles[:8, 1] = 15  # the word -1
    packed = quant.pack_rows(nibbles)
    assert packed.dtype == torch.int32 and (packed[:, 0] < 0).all() and packed[0, 1] == -1
    assert torch.equal(quant.unpack_rows(packed), nibbles.int())


# ----------------------------------------------------------------------------------------------------------------------
# The kernels, in Triton's interpreter where there is no GPU

SHAPES = [  # M, K, N, group_size, act_order: below, on and across the tiles of 16 x 64 x 64
    (1, 64, 64, 32, False),
    (7, 72, 104, 32, False),
    (20, 176, 104, -1, False),
    (7, 176, 64, 32, True),
    (1, 72, 104, 32, True),
]


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
@pytest.mark.parametrize("M, K, N, group_size, act_order", SHAPES)
def test_kernels_equal_dequantize(M, K, N, group_size, act_order, dtype, tolerance):
    """Both kernels against the plain definition, on shapes that fill no tile; a wrong mask or group shows here only."""
    pytest.importorskip("triton")
    packed = random_packed(K, N, group_size, act_order)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    for zero_offset in (0, 1):
        W = quant.dequantize(*packed, zero_offset)
        on_device = [tensor.to(device()) for tensor in packed]
        made = quant.triton_dequantize(*on_device, zero_offset, dtype)
        assert torch.equal(made.cpu(), W.to(dtype))
        y = quant.triton_matmul(x.to(device()), *on_device, zero_offset)
        assert y.dtype == dtype
        torch.testing.assert_close(y.cpu().float(), x.float() @ W, rtol=tolerance, atol=tolerance)


def test_kernel_takes_strided_rows():
    """Rows cut out of a wider tensor, as a transposed attention output is, must not be read as if they were dense."""
    pytest.importorskip("triton")
    packed = random_packed(64, 64)
    wide = torch.randn(64, 9, generator=torch.Generator().manual_seed(1))
    x = wide.T[:5]  # (5, 64), strides (1, 9)
    y = quant.triton_matmul(x.to(device()), *(tensor.to(device()) for tensor in packed), 1)
    torch.testing.assert_close(y.cpu(), x @ quant.dequantize(*packed, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the oracle's bare kernel in the interpreter")
def test_kernel_equals_gptq_triton():
    """An independent implementation of the v1 format (fp16, no act-order) multiplies to the same numbers: our reading
    of the format is not only consistent with itself.
    """
    oracle = pytest.importorskip("gptq_triton.quant_linear").matmul4_kernel.fn
    M, K, N = 5, 256, 256
    qweight, qzeros, scales, g_idx = random_packed(K, N, group_size=128)
    x, y = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).half(), torch.empty(M, N).half()
    strides = [stride for tensor in (x, qweight, y, scales, qzeros) for stride in tensor.stride()]
    blocks = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, BLOCK_SIZE_K=64, GROUP_SIZE_M=8)
    oracle[(N // 64,)](x, qweight, y, scales, qzeros, M, N, K, *strides, 128, False, **blocks)
    ours = quant.triton_matmul(x, qweight, qzeros, scales, g_idx, 1)
    torch.testing.assert_close(ours, y, rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("act_order", [False, True])
def test_gradient_equals_the_dense_layers(act_order):
    """Forward and input gradient equal nn.Linear's over the dequantised weight. A forward-only kernel, as most 4-bit
    kernels are, would leave every adapter below the top layer without a gradient.
    """
    layer = random_layer(72, 40, act_order=act_order)
    dense = nn.Linear(72, 40, bias=False).requires_grad_(False)
    dense.weight.copy_(quant.dequantize(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, 1).T)
    x, dy = torch.randn(2, 3, 72), torch.randn(2, 3, 40)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).backward(dy)
    dense(b).backward(dy)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_backward_keeps_packed_tensors_only():
    """What autograd holds until backward is the four packed tensors: one dense copy a layer would undo the 4 bits."""
    layer, saved = random_layer(64, 64), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in layer.buffers()}
    assert max(t.numel() for t in saved if t.is_floating_point()) == 2 * 64  # the scales, not K x N


def test_training_after_sampling():
    """PPO samples first, under inference_mode, and trains next: the dense cache made there must do for the backward."""
    layer, x = random_layer(64, 64), torch.randn(3, 64)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight(x.dtype).sum(1).expand(3, -1))


# ----------------------------------------------------------------------------------------------------------------------
# The quantiser


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_beats_rounding(group_size, act_order):
    """On its own calibration inputs the error of the outputs is below that of rounding: all that GPTQ is for."""
    W, hessian = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)), hessian_of(correlated(128))
    rounded = quant.output_error(W, quant.round_to_nearest(W, group_size), hessian)
    clever = quant.output_error(W, quant.gptq(W, hessian, group_size, act_order), hessian)
    assert 0 < clever < 0.5 * rounded  # it is 0.02 to 0.3 here


def test_output_error_is_the_error_of_the_outputs():
    """The yardstick of the test above equals the mean squared difference of real outputs."""
    W, x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), correlated(64)
    layer = quant.QuantLinear(64, 16, 32)
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = packed = quant.round_to_nearest(W, 32)
    direct = (layer(x) - x @ W.T).square().mean().item()
    assert quant.output_error(W, packed, hessian_of(x)) == pytest.approx(direct, rel=1e-4)


def test_independent_inputs_leave_nothing_to_correct():
    """With a diagonal Hessian no column can make up for another's error, so GPTQ must be rounding, to the bit."""
    W = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    packed = quant.gptq(W, torch.linspace(1, 3, 96).diag(), group_size=32)
    assert all(torch.equal(a, b) for a, b in zip(packed, quant.round_to_nearest(W, 32), strict=True))


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_on_the_grid_come_back_exactly(act_order):
    """Weights that 4 bits can hold are not touched, whatever the inputs. The last column, done last, sets the step."""
    step = 2.0**-4
    W = torch.randint(-7, 8, (16, 64), generator=torch.Generator().manual_seed(1)) * step
    W[:, -1] = -7.5 * step  # the step is the largest weight / 7.5
    x = correlated(64)
    x[:, -1] *= 0.01  # least activation: last in act-order too
    back = quant.dequantize(*quant.gptq(W, hessian_of(x), -1, act_order), zero_offset=1).T
    assert torch.equal(back[:, :-1], W[:, :-1])


@pytest.mark.parametrize("block", [1, 32, 1000])
def test_block_size_changes_nothing(block):
    """Corrections applied once a block equal those applied at once; all but rounding ties must agree."""
    W, hessian = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)), hessian_of(correlated(128))
    one, other = quant.gptq(W, hessian, 32), quant.gptq(W, hessian, 32, block=block)
    same = quant.unpack_rows(one[0]) == quant.unpack_rows(other[0])
    assert same.float().mean() > 0.99


def test_dead_inputs():
    """Inputs that were always 0 make the Hessian singular. Their weights become 0, the others are still fitted."""
    x = correlated(64)
    x[:, [3, 40]] = 0
    W, hessian = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), hessian_of(x)
    packed = quant.gptq(W, hessian, 32)
    back = quant.dequantize(*packed, zero_offset=1)
    assert back.isfinite().all() and (back[[3, 40]] == 0).all()
    assert quant.output_error(W, packed, hessian) < quant.output_error(W, quant.round_to_nearest(W, 32), hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_what_is_written_is_version_1(act_order):
    """Symmetric v1 stores every zero point 8 as 7, and g_idx gives each of the groups its share of the rows."""
    W, hessian = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)), hessian_of(correlated(96))
    qweight, qzeros, scales, g_idx = quant.gptq(W, hessian, 32, act_order)
    assert (qzeros == 0x77777777).all() and scales.dtype == torch.float16
    assert [tuple(t.shape) for t in (qweight, qzeros, scales, g_idx)] == [(12, 16), (3, 2), (3, 16), (96,)]
    assert g_idx.bincount().tolist() == [32, 32, 32]
    if act_order:  # the inputs of largest activation share the first group
        assert hessian.diagonal()[g_idx == 0].min() >= hessian.diagonal()[g_idx > 0].max()
    else:
        assert torch.equal(g_idx, torch.arange(96, dtype=torch.int32) // 32)


def test_blocks_are_calibrated_on_quantised_predecessors():
    """The second block sees what the quantised first one puts out, so that it can make up for its errors."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(OrderedDict(proj=nn.Linear(64, 64))).requires_grad_(False) for _ in range(2)]
    second, x = blocks[1].proj.weight, correlated(64, rows=128)[None]
    bias = blocks[0].proj.bias
    quant.quantize_blocks(blocks, [x], lambda block, h: block(h), group_size=32)
    assert torch.equal(blocks[0].proj.bias, bias)
    expected = quant.gptq(second, hessian_of(blocks[0](x)[0]), 32)
    assert torch.equal(blocks[1].proj.qweight, expected[0])


def test_widths_that_fill_no_word_are_refused():
    """12 inputs are a word and a half: the message names the layer and its size."""
    block = nn.Sequential(OrderedDict(proj=nn.Linear(12, 8)))
    with pytest.raises(ValueError, match="proj: 8 x 12"):
        quant.quantize_blocks([block], [torch.randn(1, 4, 12)], lambda block, h: block(h))


def test_quantised_folder_equals_its_dense_twin(run_folder):
    """Packed, saved and loaded again, the whole model computes what its dequantised weights compute in memory."""
    packed, dense = model.load(run_folder / "base"), dense_twin(run_folder / "base")
    assert sum(isinstance(m, quant.QuantLinear) for m in packed.modules()) == 2 * 7  # all projections of two blocks
    tokens = torch.arange(3, 51).view(2, 24)
    torch.testing.assert_close(packed.logits(packed(tokens)), dense.logits(dense(tokens)), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU, the same kernels compiled


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, quant.KERNEL_ROWS, quant.KERNEL_ROWS + 1, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_the_layer_on_a_gpu(rows, dtype, tolerance):
    """Both sides of the switch between packed kernel and cuBLAS, forward and backward, against the dense weight: what
    the interpreter cannot show is whether the compiled kernel, and bf16 at all, say the same."""
    layer = random_layer(512, 192, group_size=128, act_order=True).cuda()
    W = quant.dequantize(*(t.cpu() for t in (layer.qweight, layer.qzeros, layer.scales, layer.g_idx)), 1).cuda()
    x = torch.randn(rows, 512, device="cuda").to(dtype).requires_grad_()
    y, exact = layer(x), x.detach().float() @ W
    assert (y.float() - exact).norm() < tolerance * exact.norm()
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.float() @ W.T
    assert (x.grad.float() - exact).norm() < tolerance * exact.norm()


@pytest.mark.gpu
def test_a_quantised_model_on_a_gpu(run_folder):
    """Greedy continuations on the GPU are those of the CPU, in fp32: cache, kernels and sampler together."""
    prompts = [[1, 300, 301], [1, 400, 401, 402, 403]]
    answers = [model.sample(model.load(run_folder / "base", d), prompts, None, 12, 0) for d in ("cpu", "cuda")]
    assert answers[0] == answers[1]
