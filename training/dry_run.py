"""What --dry-run prints instead of working: sizes, steps, and an estimate of the peak memory.

The model comes without weights (meta device). The largest batch decides; what its forward pass keeps for the backward
is counted by running it without weights (training/estimate.py). Three things are measured, not counted: `CACHE`,
`BACKWARD` and, on a CPU, `KERNELS` (docs/memory.md).
"""

import itertools
import math

import torch
import torch.nn as nn

from speed import cpu_decoder, shared_prompts
from training.estimate import all_tensors, kept_bytes
from training.run import number_of_steps, resident_memory, return_free_memory
from training.terminal import say

FP32 = 4  # bytes
CACHE = {"cpu": 4, "cuda": 1}  # with the prompts' hidden states and gaps, over keys and values: measured; assumed
# The peak of a training step over what its forward keeps: temporary tensors, and gaps between them that fit no other.
BACKWARD = {"cpu": 1.35, "cuda": 1.1}  # measured; assumed, for want of a GPU
KERNELS = 17e6, 0.65e9  # bytes of oneDNN's compiled kernels: for each new length of a batch, and at most


def dry_run(settings, llama, rows=(), trained=(), has_logits=True, samples=False, extra=()):
    """Print the plan of a stage. Returns the estimate, {what: bytes}.

    rows: list of Datum. trained: names of the adapters that learn and share one pass; ["base"] for pretraining.
    has_logits: whether the loss needs logits (the reward model's does not). samples: whether outputs are
    sampled. extra: {what: bytes} of what only this stage needs.
    """
    learning = trained_parameters(llama, trained)
    memory = process_memory(settings, rows, samples) | base_memory(settings, llama) | dict(extra)
    if learning:
        memory |= training_memory(settings, llama, rows, trained, learning, has_logits)
    elif rows and samples:
        memory["keys and values"] = cache_bytes(settings, llama.config, rows)
    if samples and settings.device == "cpu" and cpu_decoder.size(llama.config) <= cpu_decoder.LARGEST:
        memory["weights for decoding"] = cpu_decoder.size(llama.config)
    show(settings, llama, rows, trained, learning, memory)
    return memory


def process_memory(settings, rows, samples):
    """{what: bytes} of a process on a CPU without its model: libraries and data as they are now, kernels to come.

    samples: every token of an output is one more length. A GPU's memory holds neither.
    """
    if settings.device != "cpu":
        return {}
    return_free_memory()
    each, most = KERNELS
    lengths = len({len(datum.prompt) + len(datum.response) for datum in rows})
    batches = math.ceil(len(rows) / getattr(settings, "batch_size", 1))
    if hasattr(settings, "epochs"):
        batches = number_of_steps(settings, rows)
    kernels = most if samples else min(each * min(batches, lengths), most)
    return {"process": resident_memory(), "kernels": int(kernels)}


def calibration_memory(llama, rows):
    """{what: bytes} of GPTQ beside the model: hidden states of a block's two sides, Hessians, and the 4-bit layers."""
    config = llama.config
    itemsize = llama.model.embed_tokens.weight.element_size()
    hidden = 2 * itemsize * config.hidden_size * sum(len(row.prompt) + len(row.response) for row in rows)
    linears = [module for module in llama.model.layers[0].modules() if isinstance(module, nn.Linear)]
    hessians = 2 * FP32 * sum(linear.in_features**2 for linear in linears)  # the sum over rows, and the mean
    largest = max(linears, key=lambda linear: linear.in_features * linear.out_features)
    factors = 5 * FP32 * largest.in_features**2  # of one Hessian: in order, inverse, Cholesky factors
    copies = 4 * FP32 * largest.in_features * largest.out_features
    packed = sum(linear.weight.numel() for linear in linears) * config.num_hidden_layers * 5 // 8  # and scales
    return {"calibration": hidden + hessians + factors + copies + packed}


def merged_memory(settings, llama):
    """{what: bytes} of the dense weights that `merge` makes of 4-bit ones."""
    return {"merged weights": getattr(torch, settings.dtype).itemsize * sum(packed_sizes(llama))}


def base_parameters(llama):
    """The parameters of the base: neither adapters nor heads."""
    return [p for name, p in llama.named_parameters() if "lora_" not in name and "score" not in name]


def trained_parameters(llama, trained):
    """All parameters that learn."""
    learning = []
    for name in trained:
        learning += base_parameters(llama) if name == "base" else llama.adapter_parameters(name)
    return learning


def packed_sizes(llama):
    """The number of weights of each 4-bit layer."""
    return [layer.in_features * layer.out_features for layer in llama.modules() if hasattr(layer, "qweight")]


def base_memory(settings, llama):
    """{what: bytes} of the model alone."""
    itemsize = getattr(torch, settings.dtype).itemsize
    packed = packed_sizes(llama)
    memory = {"weights": sum(t.numel() * t.element_size() for t in all_tensors(llama))}
    if packed and settings.device == "cuda":
        memory["unpacked weights"] = itemsize * 2 * max(packed)  # one scratch; gate and up are unpacked side by side
    elif packed:
        memory["unpacked weights"] = itemsize * sum(packed)  # a CPU keeps them all
    return memory


def training_memory(settings, llama, rows, trained, learning, has_logits):
    """{what: bytes} that training adds."""
    for parameter in learning:
        parameter.requires_grad_(True)
    shared = getattr(settings, "share_prompts", False)
    responses = [settings.max_new_tokens if "policy" in trained else len(datum.response) for datum in rows]
    B, T, wanted = largest_layout(settings, rows) if shared else largest_batch(settings, rows, responses)
    adapters = () if trained == ["base"] else tuple((name, B) for name in trained)
    passes = max(len(adapters), 1)  # policy and value are two rows of one pass
    memory = {"gradients and AdamW": 3 * FP32 * sum(p.numel() for p in learning)}
    factor = BACKWARD[torch.device(settings.device).type]
    kept = kept_bytes(llama, B * passes, T, adapters or None, settings.grad_checkpoint, shared, wanted)
    memory["activations"] = int(factor * kept)
    if has_logits:  # logits, their log-softmax and their gradient, on response tokens only
        memory["logits"] = int(factor * 3 * FP32 * llama.config.vocab_size * B * max(responses))
    return memory


def largest_batch(settings, rows, responses):
    """(B, T) of the largest pass, and of how many tokens of a row the states are asked for.

    responses: how many tokens of each row are its response.
    """
    B = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    T = max(len(datum.prompt) + length for datum, length in zip(rows, responses, strict=True))
    return B, T, max(responses)


def largest_layout(settings, rows):
    """`largest_batch` for the layout of shared prompts, (G, S), of an epoch."""
    shapes = []
    batches = shared_prompts.epochs(rows, settings.batch_size, settings.seed, settings.rows_per_prompt)
    for index in itertools.islice(batches, math.ceil(len(rows) / settings.batch_size)):
        size = settings.micro_batch_size or len(index)
        for start in range(0, len(index), size):
            groups = shared_prompts.same_prompt(rows, index[start : start + size])
            S = max(shared_prompts.layout_length(rows, group) for group in groups)
            responses = sum(len(rows[i].response) for group in groups for i in group)
            shapes.append((len(groups), S, math.ceil(responses / len(groups))))
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def cache_bytes(settings, config, rows):
    """Bytes of the keys and values of one sampling batch."""
    itemsize = getattr(torch, settings.dtype).itemsize
    S = max(len(datum.prompt) for datum in rows) + settings.max_new_tokens
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return CACHE[torch.device(settings.device).type] * 2 * itemsize * settings.batch_size * S * width


def show(settings, llama, rows, trained, learning, memory):
    """Print sizes, steps and the estimate."""
    name = "fresh weights" if "base" in trained else settings.model
    parameters = sum(p.numel() for p in base_parameters(llama)) + sum(packed_sizes(llama))
    say("\ndry run: no weights are read, nothing is trained")
    say(f"  model    {name}: {parameters / 1e6:,.1f} M parameters")
    if rows:
        lengths = [len(datum.prompt) + len(datum.response) for datum in rows]
        say(f"  data     {len(rows):,} rows, {sum(lengths) / 1e6:,.2f} M tokens, the longest {max(lengths)}")
    if learning:
        say(f"  trained  {', '.join(trained)}: {sum(p.numel() for p in learning):,} parameters")
        say(f"  steps    {number_of_steps(settings, rows):,} of {settings.batch_size} rows")
    parts = " + ".join(f"{what} {amount / 1e9:.2f}" for what, amount in memory.items())
    say(f"  memory   {parts} = {sum(memory.values()) / 1e9:.2f} GB, an estimate")
