"""The Llama: one forward pass that every stage shares, a KV-cached sampler, and loading by Hugging Face names.

So are Mistral, Qwen2.5 (biases on q, k and v) and Qwen3 (normalized heads); see formats.llama_folder.FAMILIES.

    h = llama(tokens, adapter)             (B, T) -> (B, T, C)   the trunk under an adapter (see lora.py)
    h = llama(tokens, adapter, indices)    (B, T) -> (n, C)      the same at n indices into the flattened (B T)
    h = llama.prefill(tokens, adapter, cache, indices)           the same, and the cache keeps keys and values
    h = llama.decode(token, adapter, cache)  (B,) -> (B, C)      one more token a row
    llama.logits(h)                        (…, C) -> (…, V)      only where they are asked for
    llama.scalar(h, "reward")              (…, C) -> (…,)        a scalar head: rewards and values

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
from formats.errors import NotFinite
from lora import LoRALinear, add_adapter, named_parameters, project, rows_of_indices
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
    model_type: str = "llama"  # see formats.llama_folder.FAMILIES
    biases: tuple = ()  # the projections that have one, as in ("q_proj", "k_proj", "v_proj")
    head_norm: bool = False  # whether each head of q and k is normalized
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


class Rope:
    """The rotation of queries and keys at given positions, (T,) or (B, T): rope(x) of x (B, H, T, D).

    Dimension i and i + D/2 are a pair (a, b), which becomes (a cos - b sin, b cos + a sin). Angles are fp32: a bf16 one
    is off by radians.
    """

    def __init__(self, positions, config):
        frequency = rope_frequency(config, positions.device)  # (D/2,)
        angle = positions.float()[..., None, :, None] * frequency  # (…, 1, T, D/2)
        cos, sin = angle.cos(), angle.sin()
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # (…, 1, T, D)

    def __call__(self, x):
        swapped = x.roll(x.shape[-1] // 2, -1)  # (b, a)
        return torch.addcmul(x * self.cos, swapped, self.sin).to(x.dtype)


class KVCache:
    """Keys and values of the tokens so far: (B, J, S, D) a layer, and how many tokens each row has.

    Row b's next token goes to column length[b]. Columns beyond contain padding or nothing, and are never read.
    """

    def __init__(self, config, B, S, device, dtype):
        shape = config.num_hidden_layers, B, config.num_key_value_heads, S, config.head_dim
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(B, dtype=torch.long, device=device)  # (B,)
        self.row = torch.arange(B, device=device)

    def prefill(self, q, k, v, layer):
        """Causal attention over the prompts, whose keys and values are stored: q (B, H, T, D), k, v (B, J, T, D)."""
        self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : v.shape[2]] = k, v
        return attend(q, k, v)

    def decode(self, q, k, v, layer):
        """Attention of one new token a row, q (B, H, 1, D), to its row's past and to itself, k, v (B, J, 1, D)."""
        k, v = self.append(k, v, layer)
        return attend_last(q, k, v, self.length)

    def append(self, k, v, layer):
        """Store one token a row: k, v (B, J, 1, D). Returns all keys and values of the layer, (B, J, S, D)."""
        self.k[layer, self.row, :, self.length] = k[:, :, 0]
        self.v[layer, self.row, :, self.length] = v[:, :, 0]
        return self.k[layer], self.v[layer]

    def repeat(self, copies):
        """Have each row `copies` times, one after the other."""
        self.k, self.v = self.k.repeat_interleave(copies, 1), self.v.repeat_interleave(copies, 1)
        self.length = self.length.repeat_interleave(copies)
        self.row = torch.arange(len(self.length), device=self.length.device)

    def keep(self, rows):
        """Drop all rows but those of a (B,) mask."""
        self.k, self.v, self.length = self.k[:, rows], self.v[:, rows], self.length[rows]
        self.row = self.row[: len(self.length)]


def attend_last(q, k, v, length):
    """Attention of one new token a row to its columns 0 … length[b]: q (B, H, 1, D), k, v (B, J, S, D) -> q's shape.

    Two small products: on a CPU a tenth of the time of the fused kernel, which is made for many queries. The queries
    that share a key head are rows of one product.
    """
    (B, H, _, D), (_, J, S, _) = q.shape, k.shape
    beyond = torch.arange(S, device=q.device) > length[:, None]  # (B, S): padding, or nothing yet
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


def attend_causal(q, k, v, layer):
    """Attention of every token to itself and those before it: q (B, H, T, D), k, v (B, J, T, D) -> q's shape."""
    return attend(q, k, v)


def attend_shared(q, k, v, layer, mask):
    """Attention of rows of shared prompts: q (B, H, T, D), k, v (B, J, T, D) -> q's shape.

    Causal for the first P columns, which are prompt in every row; mask (B, 1, T - P, T) says what the rest see.
    """
    P = q.shape[2] - mask.shape[2]
    prompts = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P])  # (B, H, P, D)
    return torch.cat([prompts, attend(q[:, :, P:], k, v, mask)], dim=2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.H, self.J, self.D = config.num_attention_heads, config.num_key_value_heads, D
        self.q_proj = LoRALinear(nn.Linear(C, self.H * D, "q_proj" in config.biases))
        self.k_proj = LoRALinear(nn.Linear(C, self.J * D, "k_proj" in config.biases))
        self.v_proj = LoRALinear(nn.Linear(C, self.J * D, "v_proj" in config.biases))
        self.o_proj = LoRALinear(nn.Linear(self.H * D, C, "o_proj" in config.biases))
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.head_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.head_norm else nn.Identity()

    def forward(self, x, rope, adapter, attention, layer):
        """The heads' outputs, before o_proj: (B, T, C) -> (B, T, H D). attention: (q, k, v, layer) -> q's shape."""
        B, T, _ = x.shape
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x, adapter)
        q = rope(self.q_norm(q.view(B, T, self.H, self.D)).transpose(1, 2))  # (B, H, T, D)
        k = rope(self.k_norm(k.view(B, T, self.J, self.D)).transpose(1, 2))  # (B, J, T, D)
        v = v.view(B, T, self.J, self.D).transpose(1, 2)  # (B, J, T, D)
        y = attention(q, k, v, layer)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, self.H * self.D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = LoRALinear(nn.Linear(C, inner, "gate_proj" in config.biases))
        self.up_proj = LoRALinear(nn.Linear(C, inner, "up_proj" in config.biases))
        self.down_proj = LoRALinear(nn.Linear(inner, C, "down_proj" in config.biases))

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

    def forward(self, x, rope, adapter=None, attention=attend_causal, layer=0):  # (B, T, C) -> (B, T, C)
        return self.feed(x, self.attend(x, rope, adapter, attention, layer), adapter)

    def attend(self, x, rope, adapter, attention, layer):
        """What the block's tokens read of one another: (B, T, C) -> (B, T, H D)."""
        return self.self_attn(self.input_layernorm(x), rope, adapter, attention, layer)

    def feed(self, x, y, adapter):
        """The rest of the block, each token by itself: x (…, C), y (…, H D) -> (…, C)."""
        x = x + self.self_attn.o_proj(y, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


def called(function, *inputs):
    return function(*inputs)


def recomputed(function, *inputs):
    """The same value, but backward computes what is inside again instead of keeping it."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Llama(nn.Module):
    """A Llama with named adapters and scalar heads.

    recompute: whether backward recomputes each block's activations instead of keeping them (--grad-checkpoint).
    folder: that it was loaded from. hash: of this model, where the caller knows it; adapters remember their base by it.
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

    def forward(self, tokens, adapter=None, indices=None, layout=None):
        """Hidden states after the final norm: (B, T) long -> (B, T, C).

        indices: (n,) long, into the flattened (B T), of the tokens whose states are asked for, grouped by adapter. The
        last block then skips the others, and the result is (n, C).
        layout: a speed.shared_prompts.SharedPrompts, whose tokens these are: several rows that continue one prompt.
        """
        if layout is None:
            return self.trunk(tokens, self.first_positions(tokens), attend_causal, adapter, indices)
        attention = partial(attend_shared, mask=layout.mask(self.dtype))
        return self.trunk(tokens, layout.positions, attention, adapter, indices)

    def prefill(self, tokens, adapter, cache, indices):
        """The same for right-padded prompts (B, T), whose keys and values an empty KVCache keeps: -> (n, C)."""
        return self.trunk(tokens, self.first_positions(tokens), cache.prefill, adapter, indices)

    def decode(self, token, adapter, cache):
        """Append one token to each row of the cache: (B,) -> its hidden state (B, C)."""
        h = self.trunk(token[:, None], cache.length[:, None], cache.decode, adapter)  # (B, 1, C)
        cache.length += 1  # in place: a CUDA graph reads it
        return h[:, 0]

    @staticmethod
    def first_positions(tokens):
        return torch.arange(tokens.shape[1], device=tokens.device)  # (T,)

    def rope(self, positions):
        return Rope(positions, self.config)

    def trunk(self, tokens, positions, attention, adapter, indices=None):
        """All blocks: tokens (B, T), positions (T,) or (B, T), attention as in `Attention.forward` -> (B, T, C)."""
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        rope = self.rope(positions)
        *blocks, last = self.model.layers
        run = recomputed if self.recompute and torch.is_grad_enabled() else called
        for layer, block in enumerate(blocks):
            x = run(block, x, rope, adapter, attention, layer)
        y = run(last.attend, x, rope, adapter, attention, len(blocks))  # (B, T, H D)
        if indices is not None:  # keys and values were needed of every token, what follows is not
            x, y = x.flatten(0, 1)[indices], y.flatten(0, 1)[indices]  # (n, C), (n, H D)
            adapter = rows_of_indices(adapter, indices, tokens.shape[1])
        return self.model.norm(run(last.feed, x, y, adapter))

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

    def resolve(self, adapter):
        """(model, adapter) that compute under a name; beyond.full has whole models in place of adapters."""
        return self, adapter

    # Adapters: lora.py knows the layers, the model knows the heads.

    def add_adapter(self, name, r, alpha, targets, generator, head=None):
        """A new adapter. head: None, "zero" (values), or "normal", std 1/sqrt(C+1) (rewards; Huang et al. 2024)."""
        add_adapter(self, name, r, alpha, targets, generator)
        if head is not None:
            self.add_head(name, head, generator)

    def add_head(self, name, kind, generator):
        """A new scalar head for an adapter; kind: as in `add_adapter`."""
        C = self.config.hidden_size
        weight = torch.zeros(1, C)
        if kind == "normal":
            weight.normal_(0, (C + 1) ** -0.5, generator=generator)
        self.score[name] = nn.Parameter(weight.to(self.device))

    def adapter_parameters(self, name):
        """All trainable tensors of an adapter, its head included: a list."""
        found = list(named_parameters(self, name).values())
        if name in self.score:
            found.append(self.score[name])
        return found

    def save_adapter(self, name, folder, base_name):
        """Write an adapter, with its head, in PEFT's format. base_name: --model, which PEFT wants to know."""
        head = self.score[name] if name in self.score else None
        peft_adapter.write(self, name, folder, base_name, head, self.hash)

    def load_adapter(self, name, folder, head=False, any_base=False):
        """Load a saved adapter, frozen. head: whether it must have a scalar head.

        any_base: also one that was trained over another base, such as the 4-bit form of this one.
        """
        self.take_head(name, folder, peft_adapter.read(self, name, folder, "" if any_base else self.hash), head)

    def take_head(self, name, folder, weight, head):
        """Take the scalar head that a folder has, weight (1, C), or None. head: whether it must have one."""
        peft_adapter.check_head(folder, name, weight, (1, self.config.hidden_size) if head else None)
        if head:
            self.score[name] = nn.Parameter(weight.float().to(self.device), requires_grad=False)

    def add_eos(self, token):
        """Let one more token id end outputs."""
        ends = tuple(dict.fromkeys((*self.config.eos_token_id, token)))
        self.config = replace(self.config, eos_token_id=ends)

    def why_not_finite(self):
        """The cause of NaN or infinite activations, and the remedy, in words."""
        return llama_weights.why_not_finite(self)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype


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
    llama, adapter = llama.resolve(adapter)
    B, device = len(prompts) * copies, llama.device
    eos = torch.tensor(llama.config.eos_token_id, device=device)
    cache, logits = prefill(llama, prompts, adapter, max_new_tokens, copies)  # (B, V)
    step = partial(decode, llama, adapter, cache)
    if device.type == "cuda":
        step = capture(step, cache)
    elif max_new_tokens > 8:
        step = cpu_decoder.decoder(llama, adapter, cache) or step
    row = torch.arange(B, device=device)  # which prompt each row of the cache belongs to
    done = torch.zeros(B, dtype=torch.bool, device=device)
    answers = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logp = torch.zeros(B, max_new_tokens, device=device)
    for i in range(max_new_tokens):
        # One number for every prompt: what a row draws does not depend on which other rows have ended.
        u = torch.rand(B, 1, generator=generator, device=device) if uniform is None else uniform[:, i : i + 1]
        u = u[row]  # (rows, 1)
        finite = logits.amax(-1).isfinite() | done  # (rows,): the largest is NaN if any is
        if not finite.all():
            raise NotFinite(llama.why_not_finite(), prompts[int(row[~finite][0]) // copies])
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
    cache = KVCache(llama.config, len(prompts), T + max_new_tokens, device, llama.dtype)
    last = torch.arange(len(prompts), device=device) * T + length - 1  # (B,)
    h = llama.prefill(tokens.to(device), adapter, cache, last)  # (B, C)
    cache.length = length
    logits = llama.logits(h)
    if copies > 1:
        cache.repeat(copies)
        logits = logits.repeat_interleave(copies, 0)
    return cache, logits


def decode(llama, adapter, cache, token):
    """One step: append a token to each row, (B,) -> logits of the next, (B, V)."""
    return llama.logits(llama.decode(token, adapter, cache))


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


def load(folder, device="cpu", dtype=torch.float32, with_head=False, kind=Llama):
    """Load a Llama from a Hugging Face folder: dense or 4-bit GPTQ, one safetensors file or shards.

    Weights of any float type become `dtype`; packed weights and their scales stay as they are. All are frozen.
    with_head: the folder may hold a scalar head in place of the language head; returns (Llama, head (1, C) or None).
    kind: the class of the model.
    Raises FileNotFoundError or UserError with the folder, the tensor and the remedy.
    """
    folder = Path(folder)
    with torch.device("meta"):
        llama = kind(LlamaConfig(**llama_folder.read_config(folder)))
    head = llama_weights.fill(llama, folder, dtype, with_head)
    llama.folder = folder
    llama = llama.to(device).requires_grad_(False)
    return (llama, head) if with_head else llama


def save(llama, folder, quantization=None):
    """Write a Hugging Face folder: config.json and model.safetensors. quantization: its quantization_config."""
    llama_folder.write(folder, asdict(llama.config), llama_weights.checkpoint_tensors(llama), quantization)


@torch.no_grad()
def quantize(llama, calibration, recipe, progress=iter):
    """Quantize every projection of a dense Llama to 4 bits by GPTQ, in place; embeddings, norms and head stay.

    calibration: a list of lists of token ids. recipe: quant.Recipe. Returns the quantization_config of the result.
    """
    hidden = [llama.model.embed_tokens(torch.tensor([row], device=llama.device)) for row in calibration]  # (1, T, C)

    def run(block, x):
        return block(x, llama.rope(torch.arange(x.shape[1], device=x.device)))

    quantize_blocks(llama.model.layers, hidden, run, recipe, progress)
    return {
        "quant_method": "gptq", "bits": 4, "group_size": recipe.group_size, "desc_act": recipe.act_order, "sym": True,
        "damp_percent": recipe.damp, "true_sequential": recipe.true_sequential, "checkpoint_format": "gptq",
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
