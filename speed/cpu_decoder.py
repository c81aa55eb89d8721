"""Decoding on a CPU: a step as a short list of products, over weights that are prepared once for a model.sample.

With seven rows, `model.decode` spends more time between its products than a small model's weights take to read, and the
products read them at a third of the memory's speed. So q, k and v become one matrix, gate and up another, and large
matrices are laid out as oneDNN multiplies few rows fastest. Without this, model.sample calls model.decode: the same
logits to rounding.

Where the base is bf16 and the CPU multiplies bf16, the weights are kept in bf16, half as much to read. bf16 has 8 bits,
and W + B A would lose what is small in B A: so an adapter's B stands beside W as further columns, for which x A^T makes
the further inputs. Otherwise all weights are fp32, the adapter folded in. All between the products is fp32.

Dimensions: B rows, C width, H query heads, J key/value heads, D head size, F width of the MLP, S columns of the cache,
K inputs and N outputs of a product, R ranks of the adapters of its layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from speed.cpu import by_mkl, multiplies_bf16

LARGEST = 2 << 30  # bytes of prepared weights; a larger model has no memory to spare for a second copy
LARGE = 1 << 16  # numbers in a matrix from which oneDNN's own layout pays


class Product:
    """x (B, K) -> x W^T + b (B, N), for a weight W (N, K); with A (R, K), W (N, K + R): [x, x A^T] W^T + b.

    bias: b (N,), or None.
    """

    def __init__(self, weight, rows, A=None, bias=None):
        self.packed = self.columns = None
        self.dtype = weight.dtype
        self.bias = bias  # fp32
        self.A = None if A is None else A.T.contiguous()  # (K, R) fp32
        if weight.numel() >= LARGE and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        else:
            self.columns = weight.T.contiguous()  # (K, N)

    def __call__(self, x):
        if self.A is not None:
            x = torch.cat((x, x @ self.A), dim=1)  # (B, K + R)
        x = x.to(self.dtype)
        if self.packed is None:
            y = (x @ self.columns).float()
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "").float()
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Layer:
    """The weights of one block."""

    input_norm: torch.Tensor  # (C,)
    qkv: Product  # C -> (H + 2 J) D
    head_norm: torch.Tensor | None  # (H + J, 1, D), of each head of q and k
    o: Product  # H D -> C
    mlp_norm: torch.Tensor  # (C,)
    gate_up: Product  # C -> 2 F
    down: Product  # F -> C


def prepare(llama, adapter, rows):
    """The prepared weights of a Llama under an adapter, ([Layer], head), or None where there is no such path for it.

    They are kept with the model until another adapter is asked for, or a parameter has changed.
    """
    config = llama.config
    one_adapter = adapter is None or isinstance(adapter, str)
    if not one_adapter or size(config) > LARGEST:
        return None
    key = (adapter, rows, [(id(p), p._version) for p in llama.parameters()])
    if llama.prepared is None or llama.prepared[0] != key:
        llama.prepared = None  # before the next one: not both at a time
        llama.prepared = key, (layers_of(llama, adapter, rows), head_of(llama, rows))
    return llama.prepared[1]


def in_bf16(llama):
    """Whether the prepared weights are bf16."""
    return llama.model.embed_tokens.weight.dtype == torch.bfloat16 and multiplies_bf16()


def size(config):
    """Bytes of the prepared weights in fp32."""
    C, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return 4 * (config.num_hidden_layers * (heads * D * C + 3 * C * inner) + config.vocab_size * C)


def layers_of(llama, adapter, rows):
    """[Layer] of all blocks."""
    found, bf16 = [], in_bf16(llama)
    for block in llama.model.layers:
        attention, mlp = block.self_attn, block.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
        )  # fmt: skip
        qkv, o, gate_up, down = [product(group, adapter, rows, bf16) for group in groups]
        norms = block.input_layernorm.weight.float(), block.post_attention_layernorm.weight.float()
        found.append(Layer(norms[0], qkv, head_norm(attention), o, norms[1], gate_up, down))
    return found


def head_norm(attention):
    """The weights of q_norm for every head of q and of k_norm for every head of k, (H + J, 1, D); None without them."""
    if not hasattr(attention.q_norm, "weight"):
        return None
    q, k = attention.q_norm.weight.float(), attention.k_norm.weight.float()
    return torch.cat((q.expand(attention.H, 1, -1), k.expand(attention.J, 1, -1)))


def product(layers, adapter, rows, bf16):
    """One Product of the layers with one input, their outputs side by side."""
    bias = None
    if layers[0].base.bias is not None:  # the others then have one, too
        bias = torch.cat([layer.base.bias.float() for layer in layers])
    if bf16:
        weight, (A, B) = merged(layers, None, torch.bfloat16), side_by_side(layers, adapter)
        return Product(torch.cat((weight, B.bfloat16()), dim=1), rows, A if len(A) else None, bias)
    return Product(merged(layers, adapter), rows, bias=bias)


def side_by_side(layers, adapter):
    """The adapter of several layers as one, (A (R, K), B (N, R)), B block by block; R = 0 where none has it."""
    A, B = [], []
    for layer in layers:
        if adapter in layer.lora_A:
            A.append(layer.lora_A[adapter])
            B.append(layer.scaling[adapter] * layer.lora_B[adapter])
        else:
            A.append(torch.zeros(0, layer.base.in_features))
            B.append(torch.zeros(layer.base.out_features, 0))
    return torch.cat(A).detach(), torch.block_diag(*B).detach()


def merged(layers, adapter, dtype=torch.float32):
    """The weights of layers with one input, the adapter folded in, one below the other: (N, K).

    A 4-bit layer keeps its dense weight in the dtype last asked for: another one than training's would make both
    dequantize at every change between them.
    """
    weights = [layer.merged(layer.base_weight(dtype), adapter) for layer in layers]
    return torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()


def head_of(llama, rows):
    """The language head."""
    weight = (llama.model.embed_tokens if llama.lm_head is None else llama.lm_head).weight
    return Product(weight if in_bf16(llama) else weight.float(), rows)


def decoder(llama, adapter, cache):
    """What model.decode does, as a function of the tokens alone: (B,) -> (B, V). None where there is no such path.

    cache: model.KVCache, whose rows may be dropped between steps.
    """
    prepared = prepare(llama, adapter, len(cache.length))
    if prepared is None:
        return None
    layers, head = prepared
    config = llama.config
    C, H, J, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    embed, last_norm, eps = llama.model.embed_tokens.weight, llama.model.norm.weight.float(), config.rms_norm_eps
    cache.k, cache.v = cache.k.float(), cache.v.float()

    @by_mkl()  # attention and small products; oneDNN would first copy the cache
    def step(token):
        B = len(token)
        length = cache.length
        S = int(length.max()) + 1
        rope = llama.rope(length[:, None])
        beyond = torch.arange(S) > length[:, None]  # (B, S)
        beyond = torch.zeros(B, S).masked_fill_(beyond, -torch.inf)[:, None, None]  # (B, 1, 1, S)
        x = embed[token].float()  # (B, C)
        for i, layer in enumerate(layers):
            heads = layer.qkv(F.rms_norm(x, (C,), layer.input_norm, eps)).view(B, H + 2 * J, 1, D)
            turned = heads[:, : H + J]  # (B, H + J, 1, D)
            if layer.head_norm is not None:
                turned = F.rms_norm(turned, (D,), eps=eps) * layer.head_norm
            turned = rope(turned)
            k, v = cache.append(turned[:, H:], heads[:, H + J :], i)  # (B, J, all columns, D)
            q = (turned[:, :H] * D**-0.5).view(B, J, H // J, D)
            score = q @ k[:, :, :S].transpose(2, 3) + beyond  # (B, J, H/J, S)
            y = score.softmax(-1) @ v[:, :, :S]  # (B, J, H/J, D)
            x = x + layer.o(y.view(B, H * D))
            gate, up = layer.gate_up(F.rms_norm(x, (C,), layer.mlp_norm, eps)).chunk(2, dim=-1)  # (B, F) each
            x = x + layer.down(F.silu(gate) * up)
        cache.length = length + 1
        return head(F.rms_norm(x, (C,), last_norm, eps))

    return step
