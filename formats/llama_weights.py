"""The weights of a Hugging Face folder into a Llama, dense or 4-bit, and the names under which they go out again."""

import sys
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn

from formats.errors import UserError
from formats.gptq import inspect_layers
from formats.llama_folder import check_tensors, read_tensors
from lora import lora_layers
from quant import QuantLinear


def fill(llama, folder, dtype, with_head=False):
    """Give a Llama on the meta device the tensors of a folder, and QuantLinear layers where they are packed.

    Every tensor that the model needs must be there, in its shape, and nothing else but what is known to be redundant.
    dtype, with_head: see model.load. Returns the weight of the scalar head, or None.
    """
    tensors = read_tensors(folder)
    with torch.device("meta"):
        packed = use_packed_layers(llama, tensors, folder)
    head = tensors.pop("score.weight", None) if with_head else None
    if head is not None:
        llama.lm_head = None
    elif llama.config.tie_word_embeddings:
        use_own_head(llama, tensors, folder)
    config = llama.config
    for name in list(tensors):
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied or name.endswith("rotary_emb.inv_freq"):
            del tensors[name]  # redundant
    check_tensors(folder, tensors, checkpoint_tensors(llama), config.model_type)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(".scales"):
            tensors[name] = cast(tensor, dtype, f"{folder}: tensor {name}")
    state = {name: tensors[name_in_files(name)] for name in llama.state_dict()}
    llama.load_state_dict(state, strict=True, assign=True)
    if packed:
        inspect_layers(folder, packed, config.quantization, partial(has_bias, config))
    return head


def use_own_head(llama, tensors, folder):
    """Where config.json says that head and embeddings are one, and the file has another head: use that, and say so."""
    head, embed = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embed is None or torch.equal(head, embed.to(head.dtype)):
        return
    print(
        f"lastmile.py: warning: {folder}: config.json says tie_word_embeddings, but lm_head.weight differs from the "
        f"embeddings; the model's own head is used",
        file=sys.stderr,
    )
    llama.config = replace(llama.config, tie_word_embeddings=False)
    llama.lm_head = nn.Linear(llama.config.hidden_size, llama.config.vocab_size, bias=False, device="meta")


def tensor_not_finite(llama):
    """The name of a tensor with NaN or infinity, or None."""
    tensors = checkpoint_tensors(llama).items()
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def why_not_finite(llama):
    """The cause of NaN or infinite activations, and the remedy, in words."""
    if name := tensor_not_finite(llama):
        return f"{llama.folder}: tensor {name} contains NaN or infinity; download or train the model again"
    remedy = {torch.float16: "use --dtype bfloat16 or float32", torch.bfloat16: "use --dtype float32"}
    remedy = remedy.get(llama.dtype, "train with a smaller --learning-rate")
    return f"activations beyond what {llama.dtype} can represent; {remedy}"


def check_same_size(folder, found, base):
    """Raise UserError unless a whole model (--tune full) has the sizes of its base; both LlamaConfig."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "biases", "head_norm"):
        if getattr(found, name) != getattr(base, name):
            raise UserError(f"{folder}: its {name} is not that of the base; name the base it was trained from")


def cast(tensor, dtype, where):
    """A tensor in another float type. Raises UserError where fp16 has no such number: it would silently become inf."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and not found.isfinite().all():
        raise UserError(f"{where} has values beyond float16's 65504, or not finite; use --dtype bfloat16 or float32")
    return found


def use_packed_layers(llama, tensors, folder):
    """Put a QuantLinear under every adapter layer whose tensors are packed. Returns them, {name: QuantLinear}."""
    quantization = llama.config.quantization
    packed = [name for name in tensors if name.endswith(".qweight")]
    if packed and not quantization:
        raise UserError(
            f"{folder}: {packed[0]} is 4-bit, but no quantization_config says how; download the model again"
        )
    if quantization and not packed:
        raise UserError(f"{folder}: quantization_config says 4-bit, but no tensor is; download the model again")
    layers = {}
    for name, layer in lora_layers(llama):
        if f"{name}.qweight" not in tensors:
            continue
        K, N = layer.base.in_features, layer.base.out_features
        if K % 8 or N % 8:
            raise UserError(
                f"{folder}: {name}: {K} x {N} 4-bit weights do not fill int32 words; use the unquantized model"
            )
        if not quantization["act_order"]:  # then a file may leave out the order of the groups
            group_size = quantization["group_size"] if quantization["group_size"] > 0 else K
            g_idx = torch.arange(K, dtype=torch.int32, device="cpu") // group_size
            tensors.setdefault(f"{name}.g_idx", g_idx)
        bias = f"{name}.bias" in tensors or has_bias(llama.config, name)
        layer.base = QuantLinear(K, N, quantization["group_size"], bias, quantization["zero_offset"])
        layers[name] = layer.base
    return layers


def has_bias(config, name):
    """Whether config.json gives a projection a bias; name as in "model.layers.0.mlp.up_proj"."""
    return name.rpartition(".")[2] in config.biases


def checkpoint_tensors(llama):
    """{name in a checkpoint: tensor} of the base.

    The scalar head of a whole model (--tune full) has the name of a classifier's, as transformers reads it.
    """
    heads = {f"score.{name}": "score.weight" for name in llama.score}
    return {heads.get(name) or name_in_files(name): tensor for name, tensor in llama.state_dict().items()}


def name_in_files(name):
    """The name of one of our tensors in a checkpoint: adapter layers add a ".base." that files do not have."""
    return name.replace(".base.", ".")
