"""The Llama: one forward pass that every stage shares, a KV-cached sampler, and loading by Hugging Face names.

    h = llama(tokens, adapter)            (B, T) -> (B, T, C)   the trunk under an adapter (see lora.py)
    h = llama(tokens, adapter, wanted=i)  (B, T) -> (n, C)      the same at n flat indices i into (B T)
    llama.logits(h[...])                  (…, C) -> (…, V)      only where they are asked for
    llama.scalar(h, "reward")             (…, C) -> (…,)        a scalar head: rewards and values

Batches are padded on the right. Attention is causal, so no real token ever sees the padding and training needs neither
an attention mask nor position ids. Sampling prefills the padded prompts in one pass; from then on each row writes its
next token at its own position, over the padding, and looks at its own past only.

Modules have the names of the Hugging Face checkpoint; files leave out the `.base.` that LoRALinear adds.

Llama 2: Touvron et al. 2023, arXiv 2307.09288. Rotary positions: Su et al. 2021, arXiv 2104.09864, in the half-split
layout of Hugging Face: dimension i turns together with i + D/2 (Meta's own files pair 2i with 2i + 1; either loads into
the other without complaint and computes nonsense).
Dimensions: B batch, T time, C width, H query heads, J key/value heads, D head size, V vocabulary, S cache length.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from formats import llama_folder, llama_weights, peft_adapter
from lora import LoRALinear, adapter_parameters, add_adapter, project, split_by_adapter
from quant import quantize_blocks
from speed import cpu, cpu_decoder
from speed.cuda_graph import capture
from speed.swiglu import SwiGLU

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
    quantization: dict = field(default_factory=dict)  # {} or what formats.gptq.read_quantize_config returns


# ----------------------------------------------------------------------------------------------------------------------
# The model


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
    """Keys and values of the tokens so far: (B, J, S, D) a layer, and how many tokens each row has.

    Row b's next token goes to column length[b]. Columns beyond contain padding or nothing, and are never read.
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

    def repeat(self, copies):
        """Each row `copies` times, one after the other."""
        self.k, self.v = self.k.repeat_interleave(copies, 1), self.v.repeat_interleave(copies, 1)
        self.length = self.length.repeat_interleave(copies)
        self.row = torch.arange(len(self.length), device=self.length.device)

    def fill(self, layer, k, v):
        """Store the prompts: k, v (B, J, T, D), T <= S."""
        self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : v.shape[2]] = k, v


def attend_last(q, k, v, length):
    """Attention of one new token a row to its columns 0 … length[b]: q (B, H, 1, D), k, v (B, J, S, D) -> q's shape.

    Two small products: on a CPU a tenth of the time of the fused kernel, which is made for many queries. The queries
    that share a key head are rows of one product.
    """
    (B, H, _, D), (_, J, S, _) = q.shape, k.shape
    beyond = torch.arange(S, device=q.device) > length[:, None]  # (B, S): padding, or nothing yet
    with cpu.few_rows(B):
        score = q.view(B, J, H // J, D) * D**-0.5 @ k.transpose(2, 3)  # (B, J, H/J, S)
        score = score.float().masked_fill(beyond[:, None, None], -torch.inf)
        return (score.softmax(-1).to(v.dtype) @ v).view(B, H, 1, D)


def attend(q, k, v, mask=None):
    """Attention, causal or by a mask: q (B, H, T, D), k, v (B, J, S, D), mask (B, 1, T, S) or None -> q's shape.

    The mask is added to the scores. It has no heads, so that no fused kernel makes a (B, H, T, S) of it.
    """
    if q.device.type == "cpu":
        return cpu.Attention.apply(q, k, v, mask)
    repeats = q.shape[1] // k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=repeats > 1)
    if repeats > 1:  # the kernel that takes a mask wants as many key heads as query heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_shared(q, k, v, mask):
    """Attention of rows of shared prompts: q (B, H, T, D), k, v (B, J, T, D) -> q's shape.

    Causal for the first P columns, which are prompt in every row; mask (B, 1, T - P, T) says what the rest see.
    """
    P = q.shape[2] - mask.shape[2]
    prompts = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P])  # (B, H, P, D)
    return torch.cat([prompts, attend(q[:, :, P:], k, v, mask)], dim=2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.H, self.J, self.D = config.num_attention_heads, config.num_key_value_heads, D
        self.q_proj = LoRALinear(nn.Linear(C, self.H * D, bias))
        self.k_proj = LoRALinear(nn.Linear(C, self.J * D, bias))
        self.v_proj = LoRALinear(nn.Linear(C, self.J * D, bias))
        self.o_proj = LoRALinear(nn.Linear(self.H * D, C, bias))

    def forward(self, x, cos, sin, adapter, cache, layer, mask):
        """The heads' outputs, before o_proj: (B, T, C) -> (B, T, H D)."""
        B, T, _ = x.shape
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x, adapter)
        q = rotate(q.view(B, T, self.H, self.D).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(k.view(B, T, self.J, self.D).transpose(1, 2), cos, sin)  # (B, J, T, D)
        v = v.view(B, T, self.J, self.D).transpose(1, 2)  # (B, J, T, D)
        if cache is not None and T == 1:
            y = attend_last(q, *cache.update(layer, k, v), cache.length)  # (B, H, 1, D)
        else:
            if cache is not None:
                cache.fill(layer, k, v)
            y = attend(q, k, v) if mask is None else attend_shared(q, k, v, mask)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, self.H * self.D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = LoRALinear(nn.Linear(C, inner, bias))
        self.up_proj = LoRALinear(nn.Linear(C, inner, bias))
        self.down_proj = LoRALinear(nn.Linear(inner, C, bias))

    def forward(self, x, adapter):
        gate, up = project((self.gate_proj, self.up_proj), x, adapter)
        mixed = SwiGLU.apply(gate, up) if gate.requires_grad else F.silu(gate).mul_(up)  # (…, inner)
        return self.down_proj(mixed, adapter)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, adapter=None, cache=None, layer=0, mask=None, wanted=None):
        """(B, T, C) -> (B, T, C), or (n, C) of the wanted tokens. wanted: (places, adapter argument of these rows)."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, adapter, cache, layer, mask)  # (B, T, H D)
        if wanted is not None:  # keys and values were needed of every token, what follows is not
            places, adapter = wanted
            x, y = x.flatten(0, 1)[places], y.flatten(0, 1)[places]  # (n, C), (n, H D)
        x = x + self.self_attn.o_proj(y, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


class Llama(nn.Module):
    """A Llama with named adapters and scalar heads.

    recompute: whether backward recomputes each block's activations instead of keeping them (--grad-checkpoint).
    folder: that it was loaded from. hash: of its files, where the caller knows it; adapters remember their base by it.
    template: the prompt of its tokenizer, where the caller knows it; adapters remember that, too.
    """

    def __init__(self, config):
        super().__init__()
        V, C = config.vocab_size, config.hidden_size
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(V, C),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(C, config.rms_norm_eps),
            }
        )
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, V, bias=False)
        self.score = nn.ParameterDict()  # adapter name -> (1, C), the scalar heads
        self.recompute = False
        self.prepared = None  # the weights of speed.cpu_decoder
        self.folder = None
        self.hash = ""
        self.template = ""

    def forward(self, tokens, adapter=None, cache=None, wanted=None, layout=None):
        """Hidden states after the final norm: (B, T) long -> (B, T, C).

        wanted: (n,) long, the places in the flattened (B T) of the tokens whose states are asked for, those of one
        adapter together. The last block then skips the rest, and the result is (n, C).
        layout: a speed.shared_prompts.SharedPrompts, whose tokens these are: several rows that continue one prompt.
        With a cache: T > 1 stores the prompts, T = 1 appends one token a row; the caller then sets cache.length.
        """
        B, T = tokens.shape
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        positions = torch.arange(T, device=tokens.device)  # (T,)
        mask = None  # causal
        if layout is not None:
            positions, mask = layout.positions, layout.mask(x.dtype)  # (B, T)
        if cache is not None and T == 1:
            positions = cache.length[:, None]  # (B, 1)
        cos, sin = rope_table(positions, self.config)  # (…, 1, T, D)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        last = len(self.model.layers) - 1
        if wanted is not None:
            of_wanted = adapter  # the adapter argument in which every wanted token is a row
            if not isinstance(adapter, str | None):
                of_wanted = [(name, len(places)) for name, places in split_by_adapter(adapter, wanted, T)]
            wanted = wanted, of_wanted
        for i, block in enumerate(self.model.layers):
            how = {"mask": mask, "wanted": wanted if i == last else None}
            if recompute:
                x = checkpoint(block, x, cos, sin, adapter, use_reentrant=False, preserve_rng_state=False, **how)
            else:
                x = block(x, cos, sin, adapter, cache, i, **how)
        return self.model.norm(x)

    def logits(self, h, adapter=None):
        """Next-token logits, fp32: (…, C) -> (…, V). adapter: whose states these are; the head is the same for all."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(h, head.weight).float()

    def scalar(self, h, adapter):
        """The scalar head of an adapter, fp32: (…, C) -> (…,)."""
        return F.linear(h.float(), self.score[adapter]).squeeze(-1)

    def has_head(self, adapter):
        """Whether an adapter has a scalar head."""
        return adapter in self.score

    def to_sample(self, adapter):
        """(model, adapter) to sample from under an adapter; beyond.full has whole models in place of adapters."""
        return self, adapter

    # Adapters: lora.py knows the layers, the model knows the heads.

    def add_adapter(self, name, r, alpha, targets, generator, head=None):
        """A new adapter. head: None, "zero" (values), or "normal", std 1/sqrt(C+1) (rewards; Huang et al. 2024)."""
        add_adapter(self, name, r, alpha, targets, generator)
        if head is not None:
            self.add_head(name, head, generator)

    def add_head(self, name, kind, generator):
        """A new scalar head for an adapter; kind: as in `add_adapter`."""
        self.score[name] = self.new_head(kind, generator)

    def new_head(self, kind, generator):
        C = self.config.hidden_size
        weight = torch.zeros(1, C)
        if kind == "normal":
            weight.normal_(0, (C + 1) ** -0.5, generator=generator)
        return nn.Parameter(weight.to(self.device))

    def adapter_parameters(self, name):
        """All trainable tensors of an adapter, its head included: a list."""
        found = list(adapter_parameters(self, name).values())
        if name in self.score:
            found.append(self.score[name])
        return found

    def save_adapter(self, name, folder, base_name):
        """Write an adapter, with its head, in PEFT's format. base_name: --model, which PEFT wants to know."""
        head = self.score[name] if name in self.score else None
        peft_adapter.write(self, name, folder, base_name, head, self.hash)

    def load_adapter(self, name, folder, head=False):
        """Load a saved adapter, frozen. head: whether it must have a scalar head."""
        self.take_head(name, folder, peft_adapter.read(self, name, folder, self.hash), head)

    def take_head(self, name, folder, weight, head):
        """Take the scalar head that a folder has, weight (1, C), or None. head: whether it must have one."""
        peft_adapter.check_head(folder, name, weight, (1, self.config.hidden_size) if head else None)
        if head:
            self.score[name] = nn.Parameter(weight.float().to(self.device), requires_grad=False)

    def add_eos(self, token):
        """Let one more token id end outputs."""
        ends = tuple(dict.fromkeys((*self.config.eos_token_id, token)))
        self.config = replace(self.config, eos_token_id=ends)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.inference_mode()
def sample(
    llama,
    prompts,
    adapter=None,
    max_new_tokens=100,
    temperature=1.0,
    generator=None,
    top_k=0,
    top_p=1.0,
    uniform=None,
    each=None,
    with_logp=False,
    copies=1,
):
    """Continue prompts until EOS or the cap.

    prompts: list of lists of ids, of any lengths. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing, as PPO
    needs: it must sample from the very distribution whose probabilities it then takes.
    generator: on the model's device; without one, the global generator. uniform: (B, max_new_tokens) random numbers in
    its place, one for each token of each row. each: a function of the tokens, (rows,), that is called at every step.
    Returns a list of token lists, each ending with EOS unless the cap cut it; with_logp: of (tokens, log-probability of
    each token under the distribution it was drawn from), which is pi_old of the paper's equation 1.
    copies: how many continuations of each prompt, one after the other; the prompt is read once.
    """
    llama, adapter = llama.to_sample(adapter)
    B, device = len(prompts) * copies, llama.device
    eos = torch.tensor(llama.config.eos_token_id, device=device)
    cache, logits = prefill(llama, prompts, adapter, max_new_tokens, copies)  # (B, V)
    step = partial(decode, llama, adapter, cache)
    if device.type == "cuda":
        step = capture(step, cache)
    elif max_new_tokens > 8:
        step = cpu_decoder.decoder(llama, adapter, cache, rope_table, rotate) or step
    row = torch.arange(B, device=device)  # which prompt each row of the cache belongs to
    done = torch.zeros(B, dtype=torch.bool, device=device)
    answers = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logp = torch.zeros(B, max_new_tokens, device=device)
    for i in range(max_new_tokens):
        # One number for every prompt: what a row draws does not depend on which other rows have ended.
        u = torch.rand(B, 1, generator=generator, device=device) if uniform is None else uniform[:, i : i + 1]
        u = u[row]  # (rows, 1)
        logits = shape(logits, temperature, top_k, top_p)  # (rows, V)
        token = logits.argmax(-1) if temperature == 0 else draw(logits, u)  # (rows,)
        answers[row, i] = token
        if with_logp:
            logp[row, i] = -F.cross_entropy(logits, token, reduction="none")
        if each is not None:
            each(token)
        done |= torch.isin(token, eos)
        if done.all() or i == max_new_tokens - 1:
            break
        if device.type == "cpu" and 2 * done.sum() >= len(done):  # half of the rows have ended: continue without them
            cache.keep(~done)
            row, token, done = row[~done], token[~done], done[~done]
        logits = step(token)  # (rows, V)
    responses = [cut_after_eos(answer, llama.config.eos_token_id) for answer in answers[:, : i + 1].tolist()]
    if not with_logp:
        return responses
    return [(response, numbers[: len(response)]) for response, numbers in zip(responses, logp.tolist(), strict=True)]


def prefill(llama, prompts, adapter, max_new_tokens, copies=1):
    """Pass the right-padded prompts once. Returns the cache and the logits of each first new token, (B, V).

    B: `copies` rows of each prompt.
    """
    device = llama.device
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    T = int(length.max())
    tokens = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)  # (B, T)
    dtype = llama.model.embed_tokens.weight.dtype
    cache = KVCache(llama.config, len(prompts), T + max_new_tokens, device, dtype)
    last = torch.arange(len(prompts), device=device) * T + length - 1  # (B,)
    h = llama(tokens.to(device), adapter, cache, wanted=last)  # (B, C)
    logits = llama.logits(h)  # (B, V)
    cache.length = length
    if copies > 1:
        cache.repeat(copies)
        logits = logits.repeat_interleave(copies, 0)
    return cache, logits


def decode(llama, adapter, cache, token):
    """One step: append a token to each row, (B,) -> logits of the next, (B, V)."""
    h = llama(token[:, None], adapter, cache)[:, 0]  # (B, C)
    cache.length += 1
    return llama.logits(h)


def cut_after_eos(row, eos):
    """[5, 6, 2, 9, 9] -> [5, 6, 2] where 2 is EOS."""
    for i, token in enumerate(row):
        if token in eos:
            return row[: i + 1]
    return row


def shape(logits, temperature, top_k, top_p):
    """Logits of the distribution to draw from, what is cut being -inf: (B, V) -> (B, V). temperature 0 changes none."""
    if temperature == 0:
        return logits
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)  # (B, V)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the tokens before this one already reach top_p; the first always stays
        logits = logits.scatter(-1, index, ordered.masked_fill(beyond, -torch.inf))
    return logits


def draw(logits, u):
    """One token a row, u (B, 1) being uniform in [0, 1): (B, V) -> (B,).

    Inverse of the cumulative distribution: one uniform number a row, far faster than torch.multinomial on a CPU.
    """
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def load(folder, device="cpu", dtype=torch.float32, weights=True, with_head=False, kind=Llama):
    """Load a Llama from a Hugging Face folder: dense or 4-bit GPTQ, one safetensors file or shards.

    Weights of any float type become `dtype`; packed weights and their scales stay as they are. All are frozen.
    weights=False reads names, types and shapes only, from the files' headers: a model on the meta device.
    with_head: the folder may hold a scalar head in place of the language head; returns (Llama, head (1, C) or None).
    kind: the class of the model.
    Raises FileNotFoundError or UserError with the folder, the tensor and the remedy.
    """
    folder = Path(folder)
    with torch.device("meta"):
        llama = kind(LlamaConfig(**llama_folder.read_config(folder)))
    head = llama_weights.fill(llama, folder, dtype, weights, with_head)
    llama.folder = folder
    llama = llama.to(device if weights else "meta").requires_grad_(False)
    return (llama, head) if with_head else llama


def save(llama, folder, quantization=None):
    """Write a Hugging Face folder: config.json and model.safetensors. quantization: its quantization_config."""
    llama_folder.write(folder, asdict(llama.config), llama_weights.checkpoint_tensors(llama), quantization)


@torch.no_grad()
def quantize(
    llama,
    calibration,
    group_size=128,
    act_order=False,
    damp=0.01,
    progress=iter,
    scale_search=False,
    true_sequential=False,
):
    """Quantise every projection of a dense Llama to 4 bits by GPTQ, in place; embeddings, norms and head stay.

    calibration: a list of lists of token ids. scale_search: see quant.symmetric_scale. true_sequential: calibrate
    o_proj on the quantised q, k and v of its block, and so on. Returns the quantization_config of the result.
    """
    hidden = [llama.model.embed_tokens(torch.tensor([row], device=llama.device)) for row in calibration]  # (1, T, C)

    def run(block, x):
        cos, sin = rope_table(torch.arange(x.shape[1], device=x.device), llama.config)
        return block(x, cos, sin)

    stages = None
    if true_sequential:
        stages = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
    how = {"group_size": group_size, "act_order": act_order, "damp": damp, "scale_search": scale_search}
    quantize_blocks(llama.model.layers, hidden, run, stages, progress, **how)
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": act_order, "sym": True,
        "damp_percent": damp, "true_sequential": true_sequential, "checkpoint_format": "gptq",
    }  # fmt: skip


def initialize(config, generator):
    """A dense Llama with fresh weights, ready for pretraining.

    Projections: normal, std 1/sqrt(inputs), the two that write to the residual stream smaller by sqrt(2 x blocks).
    Embeddings: std 1, so that a small model distinguishes its tokens from the first step; with the usual 0.02 it
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
