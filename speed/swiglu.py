"""The MLP's gate, silu(gate) * up, with an eighth less memory for activations: backward recomputes silu(gate)."""

import torch
import torch.nn.functional as F


def swiglu(gate, up):
    """silu(gate) * up, (…, F) each."""
    return SwiGLU.apply(gate, up) if gate.requires_grad else F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
