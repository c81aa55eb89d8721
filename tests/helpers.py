"""What several test files share: folders of small models, and what a stage wrote."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import lastmile
import model
import quant


def exit_code(run, *arguments):
    """What the process would end with: argparse raises it, the stages return it."""
    try:
        return run(*arguments)
    except SystemExit as stop:
        return stop.code


def run_over(base, folder):
    """A new run's folder over a base: a function that calls a stage in it with the given flags; its `folder`."""
    folder.mkdir(parents=True)
    (folder / "base").symlink_to(base)

    def run(command, *flags):
        return lastmile.main([command, "--output-dir", str(folder), *map(str, flags)])

    run.folder = folder
    return run


def journal(folder, name="metrics.jsonl"):
    """A log as a list; NaN is refused, as it is no JSON and most readers could not open the file."""
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in {folder}")) for line in lines]


def contents(folder):
    """{path: bytes} of everything in a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def learned(folder):
    """What training leaves: adapters and log, without config.json, in which the output folder is named."""
    names = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.rglob(name)}


def int32(word):
    return torch.tensor(word).to(torch.int32) if word < 2**31 else torch.tensor(word - 2**32).to(torch.int32)


def words(nibbles, axis):
    """A second packer, in numpy: eight numbers of 0..15 along an axis share an int32, the first in the lowest bits."""
    eights = np.moveaxis(nibbles, axis, -1).astype(np.uint32)
    eights = eights.reshape(*eights.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return torch.from_numpy(np.moveaxis(eights.sum(-1, dtype=np.uint32).view(np.int32), -1, axis).copy())


def packed_folder(folder, data="gptq", z=8, act_order=False, group_size=32, bias=False, scales=torch.float16,
                  rest=torch.float16, g_idx=True, family="Llama", **said):  # fmt: skip
    """Write a 4-bit Llama in any form there is, of random weights, and return its dense twin: transformers' model over
    W = (q - z) s, the published formula. None of it is the engine's.

    data: how the zero points are stored; z: the zero point, or None for one a group and column; rest: the dtype of what
    is not packed; said: what quantization_config says beyond or against the truth, None to leave a key out.
    """
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, rms_norm_eps=1e-5, head_dim=16)
    if family == "Llama":
        shape |= dict(attention_bias=bias, mlp_bias=bias)
    torch.manual_seed(0)
    rng, tensors = np.random.default_rng(0), {}
    config = getattr(transformers, f"{family}Config")(**shape)
    twin = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False).eval()
    for name, layer in twin.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            N, K = layer.weight.shape
            g = (rng.permutation(K) if act_order else np.arange(K)) // (K if group_size == -1 else group_size)
            G, q = g.max() + 1, rng.integers(0, 16, (K, N))
            zero = rng.integers(1, 16, (G, N)) if z is None else np.full((G, N), z)
            s = torch.from_numpy(rng.uniform(0.02, 0.08, (G, N))).to(scales)
            layer.weight.copy_(torch.from_numpy((q - zero[g]) * s.double().numpy()[g]).T)
            tensors |= {f"{name}.qweight": words(q, 0), f"{name}.qzeros": words(zero - (data == "gptq"), 1)}
            tensors |= {f"{name}.scales": s, **({f"{name}.g_idx": torch.from_numpy(g).int()} if g_idx else {})}
    for name, parameter in twin.named_parameters():
        if not name.endswith("proj.weight"):
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            tensors[name] = parameter.to(rest)
            parameter.copy_(tensors[name])
    found = dict(quant_method="gptq", bits=4, group_size=group_size, desc_act=act_order, sym=z is not None)
    found = {key: value for key, value in (found | {"checkpoint_format": data} | said).items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(shape | {"model_type": config.model_type, "quantization_config": found})
    )
    save_file(tensors, folder / "model.safetensors")
    return twin


def damage_folder(folder, damage):
    """Change a folder's (config, tensors)."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    damage(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def dense_twin(folder):
    """The model of a quantized folder with every packed layer written out as an nn.Linear: what 4 bits must equal."""
    packed = model.load(folder)
    dense = model.Llama(replace(packed.config, quantization={})).requires_grad_(False)
    state = {name: tensor for name, tensor in packed.state_dict().items() if name in dense.state_dict()}
    for name, layer in packed.named_modules():
        if isinstance(layer, quant.QuantLinear):
            parts = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
            state[f"{name}.weight"] = quant.dequantize(*parts, layer.zero_offset).T
    dense.load_state_dict(state, strict=True)
    return dense
