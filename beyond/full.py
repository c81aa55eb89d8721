"""--tune full: all weights are trained, in place of an adapter's.

A `FullLlama` takes a whole model under an adapter's name: `llama(tokens, "policy")` is then the pass of that model, and
`llama.resolve("policy")` the model itself. The stages, the sampler and the losses do not know the difference.

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

    def resolve(self, adapter):
        """As in model.Llama; (whole model, None) if the name is a whole model's. Its head is in place of lm_head."""
        copy = self.copies.get(adapter)
        if copy is None:
            return self, adapter
        if adapter in self.score:
            copy.lm_head, copy.score[adapter] = None, self.score[adapter]
        return copy, None

    def forward(self, tokens, adapter=None, indices=None, layout=None):
        """As in model.Llama."""
        names = [adapter] if isinstance(adapter, str) else [name for name, _ in adapter or ()]
        if not any(name in self.copies for name in names):
            return super().forward(tokens, adapter, indices, layout)
        if not isinstance(adapter, str):
            parts = tokens.split([rows for _, rows in adapter])
            pairs = zip(parts, split_by_adapter(adapter, indices, tokens.shape[1]), strict=True)
            return torch.cat([self(part, name, index) for part, (name, index) in pairs])
        copy, _ = self.resolve(adapter)
        copy.recompute = self.recompute
        with self.precision():
            return copy(tokens, None, indices, layout)

    def precision(self):
        """The autocast under which fp32 weights are multiplied in the base's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def logits(self, h, adapter=None):
        """As in model.Llama."""
        if adapter not in self.copies:
            return super().logits(h, adapter)
        with self.precision():
            return self.copies[adapter].logits(h)

    def adapter_parameters(self, name):
        """As in model.Llama."""
        return list(self.resolve(name)[0].parameters()) if name in self.copies else super().adapter_parameters(name)

    def add_copy(self, name, generator, head=None):
        """Add a copy of all weights, fp32, under an adapter's name. head: as in `add_adapter`.

        It is read from the file again: the base's own weights may have been rounded to bf16.
        """
        self.copies[name] = model.load(self.folder, self.device, torch.float32)
        self.copies[name].config = self.config
        if head is not None:
            self.add_head(name, head, generator)

    def load_adapter(self, name, folder, head=False, any_base=False):
        """As in model.Llama; the folder may contain a whole model."""
        if not llama_folder.is_model(folder):
            super().load_adapter(name, folder, head, any_base)
            return
        copy, weight = model.load(folder, self.device, torch.float32, with_head=True)
        llama_weights.check_same_size(folder, copy.config, self.config)
        copy.config = self.config
        self.copies[name] = copy
        self.take_head(name, folder, weight, head)
