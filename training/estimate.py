"""How much memory a training pass needs, counted by running it on the meta device: no weights, no work."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from speed.shared_prompts import SharedPrompts


class Fused(TorchFunctionMode):
    """Attention and norms that keep no more than the kernels of CPU and GPU do; those of the meta device keep several
    (T, T) matrices and fp32 copies.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask")
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(*args[:3], is_causal=mask is None, attn_mask=mask)[0]
        if function is F.rms_norm:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        return function(*args, **(kwargs or {}))


def all_tensors(llama):
    """Parameters and buffers, of whole copies too."""
    models = [llama, *getattr(llama, "copies", {}).values()]
    return [tensor for one in models for tensor in (*one.parameters(), *one.buffers())]


def kept_bytes(llama, B, T, adapter, recompute=False, shared=False, wanted=None):
    """Bytes that autograd keeps from a pass over (B, T) tokens until its backward, in addition to the parameters.

    Counted by running the pass on the meta device. llama: loaded with weights=False. recompute: count what
    --grad-checkpoint keeps, the input of every block and the inside of one. shared: in the layout of shared prompts.
    wanted: how many of a row's states are asked for; None: all.
    """
    if not recompute:
        return bytes_of_pass(llama, B, T, adapter, shared, wanted)
    everything = bytes_of_pass(llama, B, T, adapter, shared)
    blocks = llama.config.num_hidden_layers
    inputs = blocks * B * T * llama.config.hidden_size * llama.model.embed_tokens.weight.element_size()
    return everything // blocks + inputs


def bytes_of_pass(llama, B, T, adapter, shared=False, wanted=None):
    """Bytes of the tensors that one pass saves for its backward, each storage once."""
    if wanted is not None:
        wanted = torch.arange(B * T).view(B, T)[:, T - wanted :].flatten()  # the last of each row
    constant = {t.untyped_storage()._cdata for t in all_tensors(llama)}
    kept = {}  # storage -> a tensor of it

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def unpack(tensor):
        return tensor

    layout = None
    if shared:
        place = torch.empty(B, T, dtype=torch.long, device="meta")
        layout = SharedPrompts(place, place, torch.empty(B, 1, T - 1, T, dtype=torch.bool, device="meta"), place, place)
    recompute = llama.recompute
    llama.recompute = False
    try:
        with Fused(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            h = llama(torch.empty(B, T, dtype=torch.long, device="meta"), adapter, None, wanted, layout)
        del h
    finally:
        llama.recompute = recompute
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in constant)
