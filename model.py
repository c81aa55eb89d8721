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

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora import LoRALinear, adapter_parameters, add_adapter, load_adapter, save_adapter
from quant import QuantLinear, quantize_blocks

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
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    eos_token_id: tuple = (2,)
    quantization: dict = field(default_factory=dict)  # {} or {"bits", "group_size", "zero_offset"}


def read_config(folder):
    """LlamaConfig of a model folder. Raises FileNotFoundError or ValueError naming file, field and remedy."""
    file = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder}: no such model folder; put a Llama there (config.json, *.safetensors, tokenizer.model), or name "
            f"another: --model FOLDER"
        )
    raw = read_json(file)
    if raw.get("model_type") != "llama":
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r} is not supported; lastmile reads 'llama'")
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise ValueError(f"{file}: {flag} is not supported; take a Llama without biases")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; a Llama has 'silu'")
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the new and the old spelling
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **scaling}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: rope type {kind!r} is not supported; take a model without rope scaling")
    eos = raw.get("eos_token_id", 2)
    if not eos or not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"{file}: eos_token_id {eos!r} is no token; set it to the id that ends an output")
    try:
        heads, width = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        config = LlamaConfig(
            vocab_size=int(raw["vocab_size"]), hidden_size=width, intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]), num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or width // heads), rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope["rope_theta"]), max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_id=tuple(eos) if isinstance(eos, list) else (eos,), quantization=read_quantization(folder, raw),
        )  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: missing or malformed field: {error}; fetch the file again") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_key_value_heads}"
        )
    return config


def read_quantization(folder, raw):
    """{} for an unquantised model, else {"bits", "group_size", "zero_offset"}."""
    file = Path(folder) / "quantize_config.json"
    found = raw.get("quantization_config") or (read_json(file) if file.is_file() else None)
    if not found:
        return {}
    method = found.get("quant_method", found.get("method", "gptq"))
    version = found.get("checkpoint_format", found.get("format", "gptq"))
    if method != "gptq" or version not in ("gptq", "gptq_v2") or found.get("bits") != 4:
        raise ValueError(
            f"{folder}: quantised by {method!r} ({version!r}, {found.get('bits')} bits); lastmile reads 4-bit GPTQ "
            f"(gptq, gptq_v2) and unquantised fp16, bf16 and fp32"
        )
    return {"bits": 4, "group_size": int(found["group_size"]), "zero_offset": 1 if version == "gptq" else 0}


def read_json(file):
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; a model folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object; fetch the file again")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The model


class RMSNorm(nn.Module):
    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):  # (B, T, C)
        y = x.float()  # squares overflow fp16 and lose too much in bf16
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_table(positions, D, theta):
    """cos and sin of every position's angles: (…, T) -> two (…, 1, T, D), in fp32 (a bf16 angle is off by radians)."""
    frequency = theta ** (-torch.arange(0, D, 2, device=positions.device).float() / D)  # (D/2,)
    angle = positions.float()[..., None, :, None] * frequency  # (…, 1, T, D/2)
    angle = torch.cat([angle, angle], dim=-1)  # (…, 1, T, D): dimension i and i + D/2 share an angle
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):  # (B, H, T, D)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


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

    def fill(self, layer, k, v):
        """Store the prompts: k, v (B, J, T, D), T <= S."""
        self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : v.shape[2]] = k, v


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.H, self.J, self.D = config.num_attention_heads, config.num_key_value_heads, D
        self.q_proj = LoRALinear(linear("q_proj", C, self.H * D))
        self.k_proj = LoRALinear(linear("k_proj", C, self.J * D))
        self.v_proj = LoRALinear(linear("v_proj", C, self.J * D))
        self.o_proj = LoRALinear(linear("o_proj", self.H * D, C))

    def forward(self, x, cos, sin, adapter, cache, layer):
        B, T, C = x.shape
        q = self.q_proj(x, adapter).view(B, T, self.H, self.D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x, adapter).view(B, T, self.J, self.D).transpose(1, 2)  # (B, J, T, D)
        v = self.v_proj(x, adapter).view(B, T, self.J, self.D).transpose(1, 2)  # (B, J, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = None  # causal, from scratch: training and prefill
        if cache is not None and T > 1:
            cache.fill(layer, k, v)
        elif cache is not None:
            k, v = cache.update(layer, k, v)  # (B, J, S, D)
            column = torch.arange(k.shape[2], device=x.device)  # (S,)
            seen = (column <= cache.length[:, None])[:, None, None]  # (B, 1, 1, S): is_causal would show column 0 only
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=self.H != self.J)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D), adapter)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.gate_proj = LoRALinear(linear("gate_proj", config.hidden_size, config.intermediate_size))
        self.up_proj = LoRALinear(linear("up_proj", config.hidden_size, config.intermediate_size))
        self.down_proj = LoRALinear(linear("down_proj", config.intermediate_size, config.hidden_size))

    def forward(self, x, adapter):
        return self.down_proj(F.silu(self.gate_proj(x, adapter)) * self.up_proj(x, adapter), adapter)


class Block(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, lambda name, K, N: linear(f"self_attn.{name}", K, N))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, lambda name, K, N: linear(f"mlp.{name}", K, N))

    def forward(self, x, cos, sin, adapter=None, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, adapter, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


def dense_linear(name, K, N):
    return nn.Linear(K, N, bias=False)


class Llama(nn.Module):
    """A Llama with named adapters and scalar heads. `linear(name, K, N)` makes the projections, dense or 4-bit."""

    def __init__(self, config, linear=dense_linear):
        super().__init__()
        self.config = config
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

    def forward(self, tokens, adapter=None, cache=None):
        """Hidden states after the final norm: (B, T) long -> (B, T, C).

        With a cache: T > 1 stores the prompts, T = 1 appends one token a row; the caller then sets cache.length.
        """
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device)  # (T,)
        if cache is not None and T == 1:
            positions = cache.length[:, None]  # (B, 1)
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)  # (…, 1, T, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, adapter, cache, i)
        return self.model.norm(x)

    def logits(self, h):
        """Next-token logits, fp32: (…, C) -> (…, V)."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(h, head.weight).float()

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
        save_adapter(self, name, folder, base_name, self.score[name] if name in self.score else None)

    def load_adapter(self, name, folder, head=False):
        """Load a saved adapter. head: whether it must bring a scalar head."""
        weight = load_adapter(self, name, folder)
        if (weight is not None) != head or (head and weight.shape != (1, self.config.hidden_size)):
            need = f"needs a score head of (1, {self.config.hidden_size})" if head else "must not have a score head"
            raise ValueError(f"{folder}: a {name} adapter {need}; is it the adapter of another stage?")
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
    h = llama(tokens.to(device), adapter, cache)[torch.arange(B, device=device), length - 1]  # (B, C)
    cache.length = length
    eos = torch.tensor(llama.config.eos_token_id, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    columns = []
    for i in range(max_new_tokens):
        token = pick(llama.logits(h), temperature, top_k, top_p, generator)  # (B,)
        columns.append(token)
        done |= torch.isin(token, eos)
        if done.all() or i == max_new_tokens - 1:
            break
        h = llama(token[:, None], adapter, cache)[:, 0]  # (B, C)
        cache.length = cache.length + 1
    rows = torch.stack(columns, dim=1).tolist()  # (B, ≤ max_new_tokens)
    return [until_eos(row, llama.config.eos_token_id) for row in rows]


def until_eos(row, eos):
    """[5, 6, 2, 9, 9] -> [5, 6, 2] where 2 is EOS."""
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


def pick(logits, temperature, top_k, top_p, generator):
    """One token a row: (B, V) -> (B,)."""
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
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cdf[:, -1:]  # (B, 1), < the last
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def load(folder, device="cpu", dtype=torch.float32):
    """Load a Llama from a Hugging Face folder: dense or 4-bit GPTQ, one safetensors file or shards.

    Every tensor the model needs must be there, in its shape, and nothing else but what is known to be redundant.
    Weights of any float type become `dtype`; packed weights and their scales stay as they are. All are frozen.
    Raises FileNotFoundError or ValueError with the folder, the tensor and the remedy.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)

    def linear(name, K, N):
        if f"{name}.qweight" not in tensors:
            return dense_linear(name, K, N)
        if not config.quantization:
            raise ValueError(f"{folder}: {name}.qweight is 4-bit, but no quantization_config says how; fetch it again")
        return QuantLinear(
            K, N, config.quantization["group_size"], f"{name}.bias" in tensors, config.quantization["zero_offset"]
        )

    with torch.device("meta"):
        llama = Llama(config, linear)
    expected = {name.replace(".base.", "."): tensor for name, tensor in llama.state_dict().items()}
    redundant = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings:
        redundant.append("lm_head.weight")
    for name in redundant:
        tensors.pop(name, None)
    for name in sorted(set(expected) | set(tensors)):
        problem = (
            "missing" if name not in tensors
            else "not part of this model" if name not in expected
            else f"of shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            if tensors[name].shape != expected[name].shape
            else None
        )  # fmt: skip
        if problem:
            raise ValueError(f"{folder}: tensor {name} is {problem}; fetch the model again")
    floats = (name for name in tensors if tensors[name].is_floating_point() and not name.endswith(".scales"))
    for name in floats:
        tensors[name] = tensors[name].to(dtype)
    state = {name: tensors[name.replace(".base.", ".")] for name in llama.state_dict()}
    llama.load_state_dict(state, strict=True, assign=True)
    return llama.to(device).requires_grad_(False)


def read_tensors(folder):
    """{name: tensor} of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder}: no *.safetensors among {found}; convert or fetch the model as safetensors")
    if single.is_file():
        files = [single]  # other files beside it, an adapter say, are no part of the model
    elif index.is_file():
        files = sorted({folder / Path(str(name)).name for name in read_json(index).get("weight_map", {}).values()})
        if absent := [shard.name for shard in files if not shard.is_file()]:
            raise FileNotFoundError(f"{folder}: shard {absent[0]} named in {index.name} is missing; fetch it")
    elif len(files) > 1:
        raise ValueError(f"{folder}: {len(files)} safetensors files and no {index.name}; fetch the index too")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from None
    return tensors


def save(llama, folder, quantization=None):
    """Write config.json and model.safetensors with Hugging Face's names. quantization: the quantization_config."""
    config = asdict(llama.config) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": list(llama.config.eos_token_id), "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(llama.model.embed_tokens.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    del config["quantization"]  # ours, as read; the file's own spelling follows
    if quantization:
        config["quantization_config"] = quantization
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name.replace(".base.", "."): t.detach().cpu().contiguous() for name, t in llama.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def quantize(llama, calibration, group_size=128, act_order=False, damp=0.01, progress=iter):
    """Quantise every projection of a dense Llama to 4 bits by GPTQ, in place; embeddings, norms and head stay.

    calibration: a list of lists of token ids. Returns the quantization_config that describes the result.
    """
    hidden = [llama.model.embed_tokens(torch.tensor([row], device=llama.device)) for row in calibration]  # (1, T, C)

    def run(block, x):
        cos, sin = rope_table(torch.arange(x.shape[1], device=x.device), llama.config.head_dim, llama.config.rope_theta)
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
