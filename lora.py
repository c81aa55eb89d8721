"""LoRA: many small trainable adapters over one frozen base.

    y = x W + (alpha / r) (x A^T) B^T      A (R, K), B (N, R); B = 0 at the start: an untrained adapter changes nothing

Each adapter has a name, and the name is an ARGUMENT of forward, never a setting of the module: backward passes that
recompute a forward would otherwise use whichever adapter is set by then, and the gradient would be silently wrong.

The argument `adapter` is one of
    None                                     the base alone
    "policy"                                 every row of the batch under one adapter
    (("policy", 7), ("value", 7))            rows 0-6 under one, rows 7-13 under another: the base product, by far the
                                             largest part of the work, is done once for all of them

Adapters are saved in PEFT's file format, so `peft.PeftModel.from_pretrained` opens what is written here.

LoRA: Hu et al. 2021, arXiv 2106.09685.
Dimensions: B batch, T time, K input width, N output width, R rank.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.errors import UserError


class LoRALinear(nn.Module):
    """Any frozen linear layer, dense or 4-bit, with any number of named adapters.

    Adapter weights are fp32, whatever the base's dtype.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # name -> (R, K), name -> (N, R)
        self.scaling = {}  # name -> alpha / r

    def add(self, name, r, alpha, generator):
        """A new adapter: A uniform in +-1/sqrt(K) as in PEFT, B zero."""
        K, N = self.base.in_features, self.base.out_features
        bound = 1 / math.sqrt(K)
        A = torch.empty(r, K).uniform_(-bound, bound, generator=generator)
        device = next(t.device for t in (*self.base.parameters(), *self.base.buffers()))
        self.lora_A[name] = nn.Parameter(A.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(N, r, device=device))
        self.scaling[name] = alpha / r

    def base_weight(self, dtype):
        """The base's weight in a dtype, of a 4-bit base the dense one: (N, K)."""
        weight = self.base.weight
        return weight(dtype).T if callable(weight) else weight.to(dtype)

    def plus(self, y, x, name):
        """y + the adapter's term for x (…, K), where y (…, N) is the base's output: two products, the second onto y."""
        if name not in self.lora_A:
            return y
        A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        rows = x.flatten(0, -2)  # (M, K)
        return torch.addmm(y.flatten(0, -2), F.linear(rows, A), B.T, alpha=self.scaling[name]).view(y.shape)

    def merged(self, weight, name):
        """The base's weight with an adapter folded in: (N, K) fp32 -> (N, K) fp32."""
        if name not in self.lora_A:
            return weight
        return weight + self.scaling[name] * (self.lora_B[name] @ self.lora_A[name]).to(weight)

    def forward(self, x, adapter=None):  # (B, T, K) -> (B, T, N)
        return self.adapt(self.base(x), x, adapter)

    def adapt(self, y, x, adapter):
        """The base's output y (B, T, N) for x (B, T, K), plus the terms of an adapter argument (see above)."""
        if adapter is None or not self.lora_A:
            return y
        if isinstance(adapter, str):
            return self.plus(y, x, adapter)
        names = [name for name, _ in adapter]
        rows = [n for _, n in adapter]
        parts = zip(y.split(rows), x.split(rows), names, strict=True)
        return torch.cat([self.plus(y, x, name) for y, x, name in parts])  # (B, T, N)


def project(layers, x, adapter=None):
    """[layer(x, adapter) for layer in layers]; 4-bit bases share one product, see quant.Joined."""
    bases = [layer.base for layer in layers]
    if all(hasattr(base, "forward_joined") for base in bases):
        ys = bases[0].forward_joined(bases, x)
    else:
        ys = [base(x) for base in bases]
    return [layer.adapt(y, x, adapter) for layer, y in zip(layers, ys, strict=True)]


def split_by_adapter(adapter, index, T):
    """Split flat indices (n,) into (B T) by adapter: [(name, indices)], each relative to the adapter's first row.

    adapter: ((name, rows), …). Without an index: [(name, None)].
    """
    if index is None:
        return [(name, None) for name, _ in adapter]
    parts, start = [], 0
    for name, rows in adapter:
        end = start + rows * T
        parts.append((name, index[(index >= start) & (index < end)] - start))
        start = end
    return parts


def rows_of_indices(adapter, index, T):
    """The adapter argument under which every token of flat indices (n,) into (B T) is a row, as after x[index]."""
    if isinstance(adapter, str | None):
        return adapter
    return tuple((name, len(part)) for name, part in split_by_adapter(adapter, index, T))


# ----------------------------------------------------------------------------------------------------------------------
# Adapters over a whole model: `module` is any module that contains LoRALinear layers


def add_adapter(module, name, r, alpha, targets, generator):
    """Add adapter `name` to every LoRALinear whose path is, or ends in, one of targets, for example ["q_proj"].

    Raises UserError for a target that names no layer.
    """
    found = {}  # path -> layer: each once, even if two targets name it
    for target in targets or [""]:
        hits = {path: layer for path, layer in lora_layers(module) if f".{path}".endswith(f".{target}")}
        if not hits:
            raise UserError(f"LoRA targets: {target or 'none'}: no such projection in this model")
        found |= hits
    for layer in found.values():
        layer.add(name, r, alpha, generator)


def lora_layers(module):
    """[(path, layer)] of all LoRALinear in a module."""
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, LoRALinear)]


def named_parameters(module, name):
    """{path of the layer + ".lora_A" or ".lora_B": parameter} of one adapter."""
    found = {}
    for path, layer in lora_layers(module):
        if name in layer.lora_A:
            found[f"{path}.lora_A"], found[f"{path}.lora_B"] = layer.lora_A[name], layer.lora_B[name]
    return found
