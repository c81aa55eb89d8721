"""AdamW as every stage uses it: fp32 weights, a gradient clip for each adapter, a state that is saved and restored.

Weight decay 0, gradient clip 1.0 for each adapter: our choices where the paper is silent.
AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101.
"""

import itertools
import math

import torch

from formats.errors import UserError
from training import ranks


class Optimizer:
    """AdamW over one or more groups of parameters, each group with its own gradient clip.

    optimizer.backward(loss, share)   once for each micro-batch
    optimizer.step(learning_rate)     once for each batch
    """

    def __init__(self, *groups, max_grad_norm):
        """groups: lists of parameters, for example those of the policy and those of the value adapter."""
        self.groups = groups
        self.parameters = list(itertools.chain(*groups))
        self.max_grad_norm = max_grad_norm
        self.loss = 0.0  # of the batch, summed over its micro-batches
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.adamw = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)

    def backward(self, loss, share=1.0):
        """Add the gradients of one micro-batch. share: its part in the loss of the whole batch."""
        (loss * share).backward()
        self.loss += loss.item() * share

    def step(self, learning_rate):
        """One update, by the gradients of all ranks. Returns the gradient norm of the first group before clipping.

        Raises FloatingPointError, and makes no update, where the loss or a norm is not finite.
        """
        self.loss = ranks.sum_gradients(self.parameters, self.loss)
        norms = [torch.nn.utils.clip_grad_norm_(group, self.max_grad_norm).item() for group in self.groups]
        loss = self.loss
        self.loss = 0.0
        if not all(math.isfinite(number) for number in (loss, *norms)):
            raise FloatingPointError(f"loss {loss}, gradient norms {norms}: not finite, no update made")
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norms[0]

    def start_again(self, group):
        """Forget a group's moments and how many updates it had, as if its next were its first."""
        for parameter in group:
            self.adamw.state.pop(parameter, None)

    def state(self):
        """{name: tensor} of everything the next update depends on: the weights, AdamW's moments and step counts."""
        tensors = {f"weight.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        for i, moments in self.adamw.state_dict()["state"].items():
            for key, tensor in moments.items():
                tensors[f"{key}.{i}"] = tensor
        return tensors

    def restore(self, tensors):
        """Load what `state` returned. Raises UserError where the tensors belong to another model or are invalid."""
        self.check(tensors)
        state = {}
        for name, tensor in tensors.items():
            key, _, i = name.rpartition(".")
            if key == "weight":
                self.parameters[int(i)].detach().copy_(tensor)
            else:
                state.setdefault(int(i), {})[key] = tensor
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})

    def check(self, tensors):
        """Raise UserError unless the tensors have the names, shapes and values of a state of these parameters."""
        expected = {}
        for i, parameter in enumerate(self.parameters):
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                expected[f"{key}.{i}"] = parameter.shape
            expected[f"step.{i}"] = torch.Size([])
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise UserError("its tensors are not those of this model")
        least = {"step": 1, "exp_avg_sq": 0}
        for name, tensor in tensors.items():
            low = least.get(name.rpartition(".")[0], -math.inf)
            if tensor.dtype != torch.float32 or not tensor.isfinite().all() or tensor.min() < low:
                raise UserError(f"{name} contains invalid values")
