"""--tune full: all weights are trained, in place of an adapter's.

A `FullLlama` takes a whole model under an adapter's name: `llama(tokens, "policy")` is then the pass of that model. The
stages, the sampler and the losses do not know the difference.

Weights and updates are fp32; products are in the base's dtype while training, in fp32 while sampling.
"""

import torch

import model
from formats import llama_folder, llama_weights
from lora import split_by_adapter


class FullLlama(model.Llama):
    """A Llama with whole models under some of its adapters' names: copies, {name: Llama}."""

    def __init__(self, config):
        super().__init__(config)
        self.copies = {}

    def forward(self, tokens, adapter=None, indices=None, layout=None):
        """As in model.Llama."""
        names = [adapter] if isinstance(adapter, str) else [name for name, _ in adapter or ()]
        if not any(name in self.copies for name in names):
            return super().forward(tokens, adapter, indices, layout)
        if not isinstance(adapter, str):
            parts = tokens.split([rows for _, rows in adapter])
            pairs = zip(parts, split_by_adapter(adapter, indices, tokens.shape[1]), strict=True)
            return torch.cat([self(part, name, index) for part, (name, index) in pairs])
        copy = self.copies[adapter]
        copy.recompute = self.recompute
        with self.precision():
            return copy(tokens, None, indices, layout)

    def precision(self):
        """The autocast under which fp32 weights are multiplied in the base's dtype."""
        dtype, kind = self.model.embed_tokens.weight.dtype, self.device.type
        return torch.autocast(kind if kind == "cuda" else "cpu", dtype, enabled=dtype != torch.float32)

    def logits(self, h, adapter=None):
        """As in model.Llama."""
        if adapter not in self.copies:
            return super().logits(h, adapter)
        with self.precision():
            return self.copies[adapter].logits(h)

    def scalar(self, h, adapter):
        """As in model.Llama."""
        return self.copies[adapter].scalar(h, adapter) if adapter in self.copies else super().scalar(h, adapter)

    def has_head(self, adapter):
        """As in model.Llama."""
        return (self.copies[adapter] if adapter in self.copies else self).score.get(adapter) is not None

    def to_sample(self, adapter):
        """As in model.Llama."""
        return (self.copies[adapter], None) if adapter in self.copies else (self, adapter)

    def add_copy(self, name, generator, head=None):
        """A copy of all weights under an adapter's name, in fp32 and read from the file again: the base's own may have
        been rounded to bf16. head: as in `add_adapter`.
        """
        copy = model.load(self.folder, self.device, torch.float32, weights=self.device.type != "meta")
        copy.config = self.config
        self.copies[name] = copy
        if head is not None:
            self.add_head(name, head, generator)

    def add_head(self, name, kind, generator):
        """As in model.Llama; a whole model has it in place of its language head."""
        if name not in self.copies:
            return super().add_head(name, kind, generator)
        self.copies[name].lm_head = None
        self.copies[name].score[name] = self.new_head(kind, generator)

    def adapter_parameters(self, name):
        """As in model.Llama."""
        return list(self.copies[name].parameters()) if name in self.copies else super().adapter_parameters(name)

    def load_adapter(self, name, folder, head=False):
        """Load a saved adapter or whole model, frozen. head: whether it must have a scalar head."""
        if not llama_folder.is_model(folder):
            super().load_adapter(name, folder, head)
            return
        weights = self.device.type != "meta"
        copy, weight = model.load(folder, self.device, torch.float32, weights, with_head=True)
        llama_weights.check_same_size(folder, copy.config, self.config)
        copy.config = self.config
        copy.take_head(name, folder, weight, head)
        self.copies[name] = copy
