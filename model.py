"""The Llama: one forward pass that every stage shares, a KV-cached sampler, and loading by Hugging Face names.

    h = llama(tokens, adapter)            (B, T) -> (B, T, C)   the trunk under an adapter (see lora.py)
    llama.logits(h[...])                  (…, C) -> (…, V)      only where they are asked for
    llama.scalar(h, "reward")             (…, C) -> (…,)        a scalar head: rewards and values

Batches are padded on the right. Attention is causal, so no real token ever sees the padding and training needs neither
an attention mask nor position ids. Sampling prefills the padded prompts in one pass; from then on each row writes its
next token at its own position, over the padding, and looks at its own past only.

Modules bear the names of the Hugging Face checkpoint, so that loading is a comparison of names and no conversion.

Llama 2: Touvron et al. 2023, arXiv 2307.09288. Rotary positions: Su et al. 2021, arXiv 2104.09864, in the half-split
layout of Hugging Face: dimension i turns together with i + D/2 (Meta's own files pair 2i with 2i + 1; either loads into
the other without complaint and computes nonsense).
Dimensions: B batch, T time, C width, H query heads, J key/value heads, D head size, V vocabulary, S cache length.
"""

import errno
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from formats.errors import UserError
from lora import (
    LoRALinear,
    adapter_parameters,
    add_adapter,
    few_rows,
    load_adapter,
    lora_layers,
    project,
    save_adapter,
)
from quant import QuantLinear, find_zero_offset, quantize_blocks, read_quantize_config

# ----------------------------------------------------------------------------------------------------------------------
# Configuration: the fields of a Hugging Face config.json that the forward pass needs, under the same names


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or Llama 3's, see `rope_frequency`
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int = 1
    eos_token_id: tuple = (2,)
    quantization: dict = field(default_factory=dict)  # {} or what quant.read_quantize_config returns


FAMILIES = {  # model_type: what transformers takes where a config.json of that family is silent
    "llama": {"num_key_value_heads": None, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
SIZES = dict.fromkeys(  # whole numbers and the most they may be, checked before anything is made of that size
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
     "max_position_embeddings"), 1 << 24) | {"num_hidden_layers": 1000}  # fmt: skip
ROPE_SCALING = {"factor": float, "low_freq_factor": float, "high_freq_factor": float,
                "original_max_position_embeddings": int}  # fmt: skip


def read_config(folder):
    """LlamaConfig of a model folder. Raises FileNotFoundError or UserError naming file, field and remedy."""
    folder, file = Path(folder), Path(folder) / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such model folder; name one that holds config.json, *.safetensors and a tokenizer, or a "
            f"model of the Hub: --model OWNER/NAME"
        )
    raw = read_json(file)
    if raw.get("model_type") not in tuple(FAMILIES):
        raise UserError(
            f"{file}: model_type {raw.get('model_type')!r} is not supported; lastmile reads llama, and mistral without "
            f"sliding window"
        )
    raw = FAMILIES[raw["model_type"]] | raw
    if raw["sliding_window"] is not None:
        raise UserError(
            f"{file}: sliding_window {raw['sliding_window']} is not supported; take a version without, as Mistral is "
            f"from v0.2 on"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; a Llama has 'silu'")
    check_positive(file, raw, (*SIZES, "rms_norm_eps", "rope_theta"))
    try:
        heads, width = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        theta, scaling = read_rope(file, raw)
        config = LlamaConfig(
            vocab_size=int(raw["vocab_size"]), hidden_size=width, intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]), num_attention_heads=heads,
            num_key_value_heads=int(raw["num_key_value_heads"] or heads),
            head_dim=int(raw.get("head_dim") or width // heads), rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta, rope_scaling=scaling,
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)), mlp_bias=bool(raw.get("mlp_bias", False)),
            bos_token_id=raw.get("bos_token_id", 1), eos_token_id=read_eos(folder, raw),
            quantization=read_quantization(folder, raw),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{file}: missing or malformed field: {error}; fetch the file again") from None
    if heads % config.num_key_value_heads or config.head_dim % 2 or not config.head_dim:
        raise UserError(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}, or head_dim {config.head_dim} is odd or 0; fetch the file again"
        )
    return config


def check_positive(file, raw, names):
    """Refuse sizes and factors that are no numbers above 0 or too large; absent and null ones pass."""
    for name in names:
        value, most, kinds = raw.get(name), SIZES.get(name, 1e12), (int,) if name in SIZES else (int, float)
        if value is not None and not (type(value) in kinds and 0 < value <= most):
            kind = "whole number" if name in SIZES else "number"
            raise UserError(
                f"{file}: {name} is {value!r:.40}, expected a {kind} above 0, at most {most}; fetch the file again"
            )


def read_rope(file, raw):
    """(theta, {} or Llama 3's scaling), in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters)."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    check_positive(file, found, ("rope_theta", *ROPE_SCALING))
    theta = found.get("rope_theta", raw.get("rope_theta", 10000.0))
    if raw.get("rope_theta", theta) != theta:
        raise UserError(f"{file}: rope_theta {raw['rope_theta']}, but rope_parameters says {theta}; keep the true one")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rope type {kind!r} is not supported; take a model with 'default' or 'llama3'")
    scaling = ROPE_SCALING.items() if kind == "llama3" else ()
    return float(theta), {name: number(found[name]) for name, number in scaling}


def read_eos(folder, raw):
    """All ids that end an output, the last word being generation_config.json's where there is one."""
    file = folder / "generation_config.json"
    eos = [raw.get("eos_token_id", 2), read_json(file).get("eos_token_id") if file.is_file() else None]
    eos = [token for ids in eos if ids is not None for token in (ids if isinstance(ids, list) else [ids])]
    if not eos or not all(type(token) is int and abs(token) < 1 << 31 for token in eos):
        raise UserError(f"{folder}/config.json: eos_token_id {eos} is no token; set it to the id that ends an output")
    return tuple(dict.fromkeys(eos))


def read_quantization(folder, raw):
    """{} for an unquantised model, else its settings; several files may hold them, and must then agree."""
    names = ("quantize_config.json", "quant_config.json")
    found = {folder / "config.json": raw.get("quantization_config") or {}}
    found |= {folder / name: read_json(folder / name) for name in names if (folder / name).is_file()}
    return read_quantize_config(found)


def read_json(file):
    """The object in a JSON file of at most 64 MiB, the largest index of shards being well below."""
    try:
        if Path(file).stat().st_size > 64 << 20:
            raise UserError("over 64 MiB")
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; a model folder needs it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object; fetch the file again")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The model


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


class RMSNorm(nn.Module):
    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):  # (B, T, C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in fp32 inside: squares overflow fp16


def rope_frequency(config, device):
    """Radians a position by which each pair of dimensions turns: (D/2,).

    Llama 3.1 stretches a shorter context by slowing down the slow pairs: those that turn less than low_freq_factor
    times within the original context become `factor` times slower, those that turn more than high_freq_factor times
    stay, those between are mixed.
    """
    D, scaling = config.head_dim, config.rope_scaling
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, device=device).float() / D)
    if scaling:
        turns = frequency * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (stays + (1 - stays) / scaling["factor"])
    return frequency


def rope_table(positions, config):
    """cos and sin of every position's angles: (…, T) -> two (…, 1, T, D), in fp32 (a bf16 angle is off by radians).

    Dimension i and i + D/2 share an angle; the sin of the first half is negative, as `rotate` needs it.
    """
    frequency = rope_frequency(config, positions.device)  # (D/2,)
    angle = positions.float()[..., None, :, None] * frequency  # (…, 1, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """x (B, H, T, D): each pair (a, b) = (x_i, x_(i + D/2)) becomes (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, -1)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far: (B, J, S, D) a layer, and how many tokens each row holds.

    Row b's next token goes to column length[b]. What lies beyond is padding or nothing, and is never looked at.
    """

    def __init__(self, config, B, S, device, dtype):
        shape = config.num_hidden_layers, B, config.num_key_value_heads, S, config.head_dim
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(B, dtype=torch.long, device=device)  # (B,)
        self.row = torch.arange(B, device=device)

    def update(self, layer, k, v):
        """Append one token a row: k, v (B, J, 1, D). Returns all keys and values of the layer, (B, J, S, D)."""
        self.k[layer, self.row, :, self.length] = k[:, :, 0]
        self.v[layer, self.row, :, self.length] = v[:, :, 0]
        return self.k[layer], self.v[layer]

    def keep(self, rows):
        """Drop all rows but those of a (B,) mask."""
        self.k, self.v, self.length = self.k[:, rows], self.v[:, rows], self.length[rows]
        self.row = self.row[: len(self.length)]

    def fill(self, layer, k, v):
        """Store the prompts: k, v (B, J, T, D), T <= S."""
        self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : v.shape[2]] = k, v


def attend_last(q, k, v, length):
    """Attention of one new token a row to its columns 0 … length[b]: q (B, H, 1, D), k, v (B, J, S, D) -> q's shape.

    Two small products: on a CPU a tenth of the time of the fused kernel, which is made for many queries. The queries
    that share a key head stand under one another.
    """
    (B, H, _, D), (_, J, S, _) = q.shape, k.shape
    beyond = torch.arange(S, device=q.device) > length[:, None]  # (B, S): padding, or nothing yet
    with few_rows(B):
        score = q.view(B, J, H // J, D) * D**-0.5 @ k.transpose(2, 3)  # (B, J, H/J, S)
        score = score.float().masked_fill(beyond[:, None, None], -torch.inf)
        return (score.softmax(-1).to(v.dtype) @ v).view(B, H, 1, D)


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.H, self.J, self.D = config.num_attention_heads, config.num_key_value_heads, D
        self.q_proj = LoRALinear(linear("q_proj", C, self.H * D))
        self.k_proj = LoRALinear(linear("k_proj", C, self.J * D))
        self.v_proj = LoRALinear(linear("v_proj", C, self.J * D))
        self.o_proj = LoRALinear(linear("o_proj", self.H * D, C))

    def forward(self, x, cos, sin, adapter, cache, layer, at):
        B, T, C = x.shape
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x, adapter)
        q = q.view(B, T, self.H, self.D).transpose(1, 2)  # (B, H, T, D)
        k, v = (y.view(B, T, self.J, self.D).transpose(1, 2) for y in (k, v))  # (B, J, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None and T == 1:
            y = attend_last(q, *cache.update(layer, k, v), cache.length)
        else:
            if cache is not None:
                cache.fill(layer, k, v)
            if at is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.J)
            else:
                y = attend_last(q[cache.row, :, at][:, :, None], k, v, at)  # (B, H, 1, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, y.shape[2], self.H * self.D), adapter)  # (B, T or 1, C)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, (…, F) both. Keeps the two for backward and makes silu(gate) anew: an eighth less memory."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


class MLP(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.gate_proj = LoRALinear(linear("gate_proj", config.hidden_size, config.intermediate_size))
        self.up_proj = LoRALinear(linear("up_proj", config.hidden_size, config.intermediate_size))
        self.down_proj = LoRALinear(linear("down_proj", config.intermediate_size, config.hidden_size))

    def forward(self, x, adapter):
        gate, up = project((self.gate_proj, self.up_proj), x, adapter)
        mixed = SwiGLU.apply(gate, up) if gate.requires_grad else F.silu(gate) * up
        return self.down_proj(mixed, adapter)


class Block(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, lambda name, K, N: linear(f"self_attn.{name}", K, N))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, lambda name, K, N: linear(f"mlp.{name}", K, N))

    def forward(self, x, cos, sin, adapter=None, cache=None, layer=0, at=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, adapter, cache, layer, at)
        x = y + (x if at is None else x[cache.row, at][:, None])
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


def has_bias(config, name):
    """Whether config.json gives a projection a bias, name as in "model.layers.0.mlp.up_proj"."""
    return config.mlp_bias if ".mlp." in name else config.attention_bias


class Llama(nn.Module):
    """A Llama with named adapters and scalar heads. `linear(name, K, N)` makes the projections, dense or 4-bit."""

    def __init__(self, config, linear=None):
        super().__init__()
        self.config = config
        linear = linear or (lambda name, K, N: nn.Linear(K, N, has_bias(config, name)))
        V, C = config.vocab_size, config.hidden_size
        blocks = [
            Block(config, lambda name, K, N, i=i: linear(f"model.layers.{i}.{name}", K, N))
            for i in range(config.num_hidden_layers)
        ]
        self.model = nn.ModuleDict(
            dict(embed_tokens=nn.Embedding(V, C), layers=nn.ModuleList(blocks), norm=RMSNorm(C, config.rms_norm_eps))
        )
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, V, bias=False)
        self.score = nn.ParameterDict()  # adapter name -> (1, C), the scalar heads
        self.recompute = False  # whether backward computes each block's activations anew instead of keeping them
        self.columns = None  # the head of a frozen model on a CPU, see `logits`
        self.folder = None  # that it was loaded from
        self.hash = ""  # of its files, where the caller knows them: adapters remember their base by it

    def forward(self, tokens, adapter=None, cache=None, at=None):
        """Hidden states after the final norm: (B, T) long -> (B, T, C).

        With a cache: T > 1 stores the prompts, T = 1 appends one token a row; the caller then sets cache.length.
        at (B,), with the prompts: the one column of each that is asked for, (B, 1, C): the last block skips the rest.
        """
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device)  # (T,)
        if cache is not None and T == 1:
            positions = cache.length[:, None]  # (B, 1)
        cos, sin = rope_table(positions, self.config)  # (…, 1, T, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.model.layers):
            if recompute:
                x = checkpoint(block, x, cos, sin, adapter, use_reentrant=False, preserve_rng_state=False)
            else:
                last = i == len(self.model.layers) - 1
                x = block(x, cos, sin, adapter, cache, i, at if last else None)
        return self.model.norm(x)

    def logits(self, h):
        """Next-token logits, fp32: (…, C) -> (…, V)."""
        head = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        if head.requires_grad or head.device.type != "cpu":
            return F.linear(h, head).float()
        if self.columns is None or self.columns.dtype != head.dtype:
            with torch.inference_mode(False):  # sampling may come here first, and then autograd
                self.columns = head.T.contiguous()  # (C, V): decoding on a CPU reads it a third faster
        return (h @ self.columns).float()

    def scalar(self, h, adapter):
        """The scalar head of an adapter, fp32: (…, C) -> (…,)."""
        return F.linear(h.float(), self.score[adapter]).squeeze(-1)

    # Adapters: lora.py knows the layers, the model knows the heads.

    def add_adapter(self, name, r, alpha, targets, generator, head=None):
        """A new adapter. head: None, "zero" (values), or "normal", std 1/sqrt(C+1) (rewards; Huang et al. 2024)."""
        add_adapter(self, name, r, alpha, targets, generator)
        if head is not None:
            C = self.config.hidden_size
            weight = torch.zeros(1, C)
            if head == "normal":
                weight.normal_(0, (C + 1) ** -0.5, generator=generator)
            self.score[name] = nn.Parameter(weight.to(self.device))

    def adapter_parameters(self, name):
        """All trainable tensors of an adapter, its head included: a list."""
        return [*adapter_parameters(self, name).values(), *([self.score[name]] if name in self.score else [])]

    def save_adapter(self, name, folder, base_name):
        save_adapter(self, name, folder, base_name, self.score[name] if name in self.score else None, self.hash)

    def load_adapter(self, name, folder, head=False):
        """Load a saved adapter. head: whether it must bring a scalar head."""
        weight = load_adapter(self, name, folder, self.hash)
        if (weight is not None) != head or (head and weight.shape != (1, self.config.hidden_size)):
            need = f"needs a score head of (1, {self.config.hidden_size})" if head else "must not have a score head"
            raise UserError(f"{folder}: a {name} adapter {need}; is it the adapter of another stage?")
        if head:
            self.score[name] = nn.Parameter(weight.to(self.device), requires_grad=False)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.inference_mode()
def sample(llama, prompts, adapter=None, max_new_tokens=100, temperature=1.0, generator=None, top_k=0, top_p=1.0):
    """Continue prompts until EOS or the cap.

    prompts: list of lists of ids, of any lengths. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing, as PPO
    needs: it must sample from the very distribution whose probabilities it then takes.
    generator: on the model's device; without one, the global generator.
    Returns a list of token lists, each ending with EOS unless the cap cut it.
    """
    B, device = len(prompts), llama.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    T = int(length.max())
    tokens = torch.zeros(B, T, dtype=torch.long)  # (B, T)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(llama.config, B, T + max_new_tokens, device, llama.model.embed_tokens.weight.dtype)
    h = llama(tokens.to(device), adapter, cache, at=length - 1)[:, 0]  # (B, C)
    logits, cache.length = llama.logits(h), length
    step = decoder(llama, adapter, cache)
    eos = torch.tensor(llama.config.eos_token_id, device=device)
    row = torch.arange(B, device=device)  # which prompt each row of the cache belongs to
    done = torch.zeros(B, dtype=torch.bool, device=device)
    answers = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    for i in range(max_new_tokens):
        u = torch.rand(B, 1, generator=generator, device=device)[row]  # a prompt's luck is its own, whoever has ended
        token = pick(logits, temperature, top_k, top_p, u)  # (rows,)
        answers[row, i] = token
        done |= torch.isin(token, eos)
        if done.all() or i == max_new_tokens - 1:
            break
        if device.type == "cpu" and 2 * done.sum() >= len(done):  # half of the rows have ended: go on without them
            cache.keep(~done)
            row, token, done = row[~done], token[~done], done[~done]
        logits = step(token)  # (rows, V)
    return [until_eos(answer, llama.config.eos_token_id) for answer in answers[:, : i + 1].tolist()]


def decoder(llama, adapter, cache):
    """step(token), one decoding step: appends a token a row, (B,) -> logits of the next, (B, V).

    On a GPU the step is captured once as a CUDA graph and replayed: launching its thousand small kernels one by one
    takes several times as long as they do. Its shapes never change, so ended rows stay in the batch there; they cost
    nothing, since reading the weights is what a step's time goes into.
    """

    def step(token):
        h = llama(token[:, None], adapter, cache)[:, 0]  # (B, C)
        cache.length += 1
        return llama.logits(h)

    if llama.device.type != "cuda":
        return step
    token, side = torch.zeros_like(cache.length), torch.cuda.Stream()  # the graph reads and writes these very tensors
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once without a graph: compiles the kernels, lets cuBLAS take its workspace
        step(token)
        cache.length -= 1  # what it wrote will be written over
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(next_token):
        token.copy_(next_token)
        graph.replay()
        return logits

    return replay


def until_eos(row, eos):
    """[5, 6, 2, 9, 9] -> [5, 6, 2] where 2 is EOS."""
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


def pick(logits, temperature, top_k, top_p, u):
    """One token a row, u (B, 1) being uniform in [0, 1): (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)  # (B, V)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the tokens before this one already reach top_p; the first always stays
        logits = logits.scatter(-1, index, ordered.masked_fill(beyond, -torch.inf))
    # Inverse of the cumulative distribution: one uniform number a row, far faster than torch.multinomial on a CPU.
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def load(folder, device="cpu", dtype=torch.float32, weights=True):
    """Load a Llama from a Hugging Face folder: dense or 4-bit GPTQ, one safetensors file or shards.

    Every tensor the model needs must be there, in its shape, and nothing else but what is known to be redundant.
    Weights of any float type become `dtype`; packed weights and their scales stay as they are. All are frozen.
    weights=False reads names, types and shapes alone, from the files' headers: a model on the meta device.
    Raises FileNotFoundError or UserError with the folder, the tensor and the remedy.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder, weights)
    packed = config.quantization
    words = [name for name in tensors if name.endswith(".qweight")]
    if words and not packed:
        raise UserError(f"{folder}: {words[0]} is 4-bit, but no quantization_config says how; fetch the model again")
    if packed and not words:
        raise UserError(f"{folder}: quantization_config says 4-bit, but no tensor is; fetch the model again")

    def linear(name, K, N):
        if f"{name}.qweight" not in tensors:
            return nn.Linear(K, N, has_bias(config, name))
        if K % 8 or N % 8:
            raise UserError(f"{folder}: {name}: {K} x {N} 4-bit weights do not fill int32 words; take it unquantised")
        if not packed["act_order"]:  # then a file may leave out the order of the groups
            group_size = packed["group_size"] if packed["group_size"] > 0 else K
            tensors.setdefault(f"{name}.g_idx", torch.arange(K, dtype=torch.int32, device="cpu") // group_size)
        bias = f"{name}.bias" in tensors or has_bias(config, name)
        return QuantLinear(K, N, packed["group_size"], bias, packed["zero_offset"])

    with torch.device("meta"):
        llama = Llama(config, linear)
    expected = {name.replace(".base.", "."): tensor for name, tensor in llama.state_dict().items()}
    redundant = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings:
        redundant.append("lm_head.weight")
    for name in redundant:
        tensors.pop(name, None)
    for name in sorted(set(expected) | set(tensors)):
        if problem := misfit(tensors.get(name), expected.get(name)):
            raise UserError(f"{folder}: tensor {name} is {problem}; fetch the model again")
    floats = (name for name in tensors if tensors[name].is_floating_point() and not name.endswith(".scales"))
    for name in floats:
        tensors[name] = tensors[name].to(dtype)
    state = {name: tensors[name.replace(".base.", ".")] for name in llama.state_dict()}
    llama.load_state_dict(state, strict=True, assign=True)
    llama.folder = folder
    if weights and packed:
        inspect_packed(llama, folder)
    return llama.to(device if weights else "meta").requires_grad_(False)


def misfit(found, expected):
    """How a tensor of a file differs from what the model needs, or None."""
    if found is None or expected is None:
        return "missing" if found is None else "not part of this model"
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if found.dtype not in (floats if expected.is_floating_point() else (expected.dtype,)):
        return f"of type {found.dtype}, expected {'floats' if expected.is_floating_point() else expected.dtype}"
    return None


def inspect_packed(llama, folder):
    """Refuse 4-bit layers that hold nonsense, and settle what their zero points mean."""
    layers = {name.replace(".base", ""): m for name, m in llama.named_modules() if isinstance(m, QuantLinear)}
    for name, layer in layers.items():
        if problem := layer.problem():
            raise UserError(f"{folder}: {name}.{problem}; fetch the model again")
        if layer.bias is not None and not has_bias(llama.config, name):
            if layer.bias.any():
                raise UserError(f"{folder}: {name}.bias is not 0 and config.json declares none; fetch the model again")
            layer.bias = None  # some versions of AutoGPTQ wrote zeros
    try:
        found = llama.config.quantization
        qzeros = [layer.qzeros for layer in layers.values()]
        offset, warning = find_zero_offset(qzeros, found["zero_offset"], found["sym"])
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    if warning:
        print(f"lastmile.py: warning: {folder}: {warning}", file=sys.stderr)
    for layer in layers.values():
        layer.zero_offset = offset


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


def read_tensors(folder, weights=True):
    """{name: tensor} of a folder's safetensors files; without weights, empty tensors on the meta device."""
    files, weight_map = weight_files(folder)
    tensors, places = {}, set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    places.add((name, file.name))
                    tensors[name] = opened.get_tensor(name) if weights else torch.empty(
                        part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.bool), device="meta"
                    )  # fmt: skip
        except (SafetensorError, OSError) as error:
            problem = what_it_is(file) or f"not a readable safetensors file ({error})"
            raise UserError(f"{file}: {problem}; fetch it again") from None
    if weight_map and (wrong := weight_map.items() ^ places):
        name = min(wrong)[0]
        found = " and ".join(sorted(file for other, file in places if other == name))
        raise UserError(
            f"{folder}: tensor {name} should be in {weight_map.get(name, 'no file')} and is in {found or 'none'}; "
            f"fetch the model again"
        )
    return tensors


def weight_files(folder):
    """([file, ...], {tensor: its file's name} or None): model.safetensors, or an index's shards, or a lone file."""
    names = sorted(path.name for path in folder.iterdir())
    ours = [name for name in names if not name.startswith(("consolidated", "adapter_"))]  # no parts of the model
    files = [name for name in ours if name.endswith(".safetensors")]
    indices = [name for name in ours if name.endswith(".safetensors.index.json")]
    if "model.safetensors" in files:
        return [folder / "model.safetensors"], None
    if indices:
        index = folder / indices[0]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map; fetch it again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):  # never a path
                raise UserError(f"{index}: {shard!r:.80} is not the name of a safetensors file; fetch it again")
            if shard not in files:
                raise FileNotFoundError(f"{folder}: shard {shard} named in {index.name} is missing; fetch it")
        return [folder / shard for shard in sorted(set(weight_map.values()))], weight_map
    if len(files) == 1:
        return [folder / files[0]], None
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files, no model.safetensors.index.json; fetch it too")
    remedy = "fetch the model's *.safetensors"
    if any(name.endswith(".gguf") for name in names):
        remedy = "GGUF is not read; take the model's safetensors version"
    elif any(name.startswith("consolidated") for name in names):
        remedy = "Meta's own files are laid out differently; take the Hugging Face version"
    elif any(name.endswith(PICKLES) for name in names):
        remedy = "pickles can run code and are never opened; write safetensors with save_pretrained of transformers"
    raise FileNotFoundError(f"{folder}: no *.safetensors among {', '.join(names) or 'nothing'}; {remedy}")


def what_it_is(file):
    """What a file that should hold weights holds in truth, where its first bytes tell, else ""."""
    with open(file, "rb") as opened:
        head = opened.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file it points to"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML page"
    return "is a pickle, and never opened" if head.startswith((b"\x80", b"PK")) else ""


def save(llama, folder, quantization=None):
    """Write config.json and model.safetensors with Hugging Face's names. quantization: the quantization_config."""
    config = asdict(llama.config) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "eos_token_id": list(llama.config.eos_token_id),
        "rope_scaling": llama.config.rope_scaling | {"rope_type": "llama3"} if llama.config.rope_scaling else None,
        "torch_dtype": str(llama.model.embed_tokens.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    del config["quantization"]  # ours, as read; the file's own spelling follows
    if quantization:
        config["quantization_config"] = quantization
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name.replace(".base.", "."): t.detach().cpu().contiguous() for name, t in llama.state_dict().items()}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error), str(folder / "model.safetensors")) from None


@torch.no_grad()
def merge(llama, adapter, dtype=torch.float16):
    """Fold an adapter into its base, in place: a dense Llama of that dtype without adapters, 4-bit layers written out.

    Raises UserError where a weight does not fit the dtype.
    """
    for path, layer in lora_layers(llama):
        packed = isinstance(layer.base, QuantLinear)
        weight = layer.base.weight(torch.float32).T if packed else layer.base.weight.float()
        weight = layer.merged(weight, adapter).to(dtype)  # (N, K)
        if not weight.isfinite().all():
            raise UserError(f"{path}: a merged weight does not fit {dtype}; train with a smaller --learning-rate")
        dense = nn.Linear(*reversed(weight.shape), bias=layer.base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.contiguous())
        if layer.base.bias is not None:
            dense.bias = nn.Parameter(layer.base.bias)
        layer.base = dense
        layer.lora_A.clear()
        layer.lora_B.clear()
    llama.to(dtype)


class Fused(TorchFunctionMode):
    """Attention and norms that keep no more than the kernels of CPU and GPU do; those of the meta device keep several
    (T, T) matrices and fp32 copies.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], is_causal=True)[0]
        if function is F.rms_norm:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        return function(*args, **(kwargs or {}))


def kept_bytes(llama, B, T, adapter):
    """Bytes that autograd keeps from a pass over (B, T) tokens until its backward, base and adapters apart.

    Counted by running the pass on the meta device: no weights, no work. llama: loaded with weights=False.
    With llama.recompute: what enters the blocks, and the inside of one.
    """
    if llama.recompute:
        llama.recompute, c = False, llama.config
        inside = kept_bytes(llama, B, T, adapter) // c.num_hidden_layers
        llama.recompute = True
        return inside + c.num_hidden_layers * B * T * c.hidden_size * llama.model.embed_tokens.weight.element_size()
    constant = {t.untyped_storage()._cdata for t in (*llama.parameters(), *llama.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t  # once, however many operations share it
        return t

    with Fused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = llama(torch.empty(B, T, dtype=torch.long, device="meta"), adapter)
    del h
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in constant)


@torch.no_grad()
def quantize(llama, calibration, group_size=128, act_order=False, damp=0.01, progress=iter):
    """Quantise every projection of a dense Llama to 4 bits by GPTQ, in place; embeddings, norms and head stay.

    calibration: a list of lists of token ids. Returns the quantization_config that describes the result.
    """
    hidden = [llama.model.embed_tokens(torch.tensor([row], device=llama.device)) for row in calibration]  # (1, T, C)

    def run(block, x):
        cos, sin = rope_table(torch.arange(x.shape[1], device=x.device), llama.config)
        return block(x, cos, sin)

    quantize_blocks(llama.model.layers, hidden, run, group_size, act_order, damp, progress)
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": act_order, "sym": True,
        "damp_percent": damp, "true_sequential": False, "checkpoint_format": "gptq",
    }  # fmt: skip


def initialize(config, generator):
    """A dense Llama with fresh weights, ready for pretraining.

    Projections: normal, std 1/sqrt(inputs), the two that write to the residual stream smaller by sqrt(2 x blocks).
    Embeddings: std 1, so that a small model tells its tokens apart from the first step; with the usual 0.02 it
    learns to copy from its input much later.
    """
    llama = Llama(config)
    for name, parameter in llama.named_parameters():
        if parameter.dim() == 2:
            std = 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.base.weight", "down_proj.base.weight")):
                std /= (2 * config.num_hidden_layers) ** 0.5
            nn.init.normal_(parameter, 0, std, generator=generator)
    return llama
