"""Adapters in PEFT's file format: `peft.PeftModel.from_pretrained` opens what is written here, and the reverse."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from formats.errors import UserError
from lora import add_adapter, lora_layers, named_parameters

PREFIX = "base_model.model."  # PEFT's name for "the model under the adapter"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What else a PEFT config may say that would change the maths; each must be as here, absent or empty.
REQUIRED = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "use_qalora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "exclude_modules": None, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "alora_invocation_tokens": None, "arrow_config": None,
}  # fmt: skip
INITS = "none", "true", "false", "gaussian", "eva", "orthogonal"  # that leave the base alone, unlike PiSSA


def write(module, name, folder, base_name, head=None, base_hash=""):
    """Write adapter_config.json and adapter_model.safetensors, fp32, with PEFT's names.

    base_name: the base's folder, or owner/name[@revision] of the Hub, which PEFT wants apart.
    head: (1, C) parameter of a scalar head, saved as `score` of a SEQ_CLS adapter; None for a language model.
    base_hash: identifies this base among others of its shape; written to base.sha256.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{path}.weight": p for path, p in named_parameters(module, name).items()}
    layers = [(path, layer) for path, layer in lora_layers(module) if name in layer.lora_A]
    targets = {path.rpartition(".")[2] for path, _ in layers}
    if any(path.rpartition(".")[2] in targets and name not in layer.lora_A for path, layer in lora_layers(module)):
        targets = {path for path, _ in layers}  # a layer of one of these names does not have it
    r = layers[0][1].lora_A[name].shape[0]
    base, revision = str(base_name), None
    if "@" in base and not Path(base).is_dir():
        base, _, revision = base.partition("@")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS", "r": r,
        "lora_alpha": round(layers[0][1].scaling[name] * r, 6), "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": None if head is None else ["score"], "base_model_name_or_path": base,
        "revision": revision, "inference_mode": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    if head is not None:
        tensors[f"{PREFIX}score.weight"] = head
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if base_hash:
        (folder / "base.sha256").write_text(base_hash + "\n")


def read(module, name, folder, base_hash=""):
    """Add the adapter of a folder, ours or PEFT's, under the given name, frozen. Returns its head (1, C), or None.

    The keys must be exactly those that the config promises for this model: a file that fits in part would leave
    layers silently unadapted. base_hash: as in `write`; where both sides know it, it must be the same.
    Raises FileNotFoundError or UserError with the file and what is wrong.
    """
    folder = Path(folder)
    place, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (place, file):
        if not needed.is_file():
            why = f"{folder} is not an adapter folder"
            if (folder / "adapter_model.bin").is_file():
                why = "adapter_model.bin is a pickle and never opened; save it again with a current PEFT"
            raise FileNotFoundError(f"{needed}: no such file; {why}")
    try:
        config, tensors = dict(json.loads(place.read_text(encoding="utf-8-sig"))), load_file(file)
    except (ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: unreadable adapter ({error!r}); train or download it again") from None
    trained_on = folder / "base.sha256"
    if base_hash and trained_on.is_file() and base_hash != trained_on.read_text(errors="replace").strip():
        raise UserError(f"{folder}: trained on another base model than this one; name that one, or train it again")
    for flag, plain in REQUIRED.items():
        if config.get(flag) not in (None, plain, [], {}):
            raise UserError(f"{place}: {flag}={config[flag]!r} changes the maths; not supported, train it without")
    init = config.get("init_lora_weights")
    if str(init).lower() not in INITS:
        raise UserError(
            f"{place}: init_lora_weights={init!r:.80} may have changed the base as well; save it as a plain LoRA by "
            f"PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    # A model's own state_dict has the adapter's name in its keys, which PEFT leaves out of files.
    tensors = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", key): tensor for key, tensor in tensors.items()}
    try:
        r, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
        ranks = {t.shape[:1] for key, t in tensors.items() if key.endswith("lora_A.weight") and t.numel()}
        if r < 1 or (r,) not in ranks or not math.isfinite(alpha):
            raise TypeError(
                f"r {r} and lora_alpha {alpha} in the config, ranks {sorted(map(tuple, ranks))} in the file"
            )
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise TypeError(f"target_modules {targets!r:.80}: a list of names is needed")
        extra = set(config.get("modules_to_save") or []) - {"score", "classifier"}  # PEFT names both for any SEQ_CLS
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{place}: unreadable adapter ({error!r}); train or download it again") from None
    if extra:
        raise UserError(f"{place}: modules_to_save={sorted(extra)}: lastmile trains LoRA only; train it without")
    if config.get("use_rslora"):  # Kalajdzievski 2023: alpha / sqrt(r) instead of alpha / r
        alpha *= math.sqrt(r)
    try:
        add_adapter(module, name, r, alpha, targets, torch.Generator())
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    head = f"{PREFIX}score.weight"
    parameters = {f"{PREFIX}{path}.weight": p for path, p in named_parameters(module, name).items()}
    wrong = (set(tensors) - {head}) ^ set(parameters)
    wrong |= {key for key in set(tensors) & set(parameters) if tensors[key].shape != parameters[key].shape}
    wrong |= {key for key, t in tensors.items() if t.dtype not in FLOATS or not t.isfinite().all()}
    if wrong:
        raise UserError(
            f"{file}: {len(wrong)} tensors are missing, extra, not finite floats, or of another shape than this base "
            f"needs, first {min(wrong)}; was it trained on another model?"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
            parameter.requires_grad_(False)
    return tensors[head].float() if head in tensors else None


def has_head(folder):
    """Whether the adapter of a folder, or the whole model in its place, has a scalar head."""
    for file in Path(folder).glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            if any(name.endswith("score.weight") for name in opened.keys()):  # noqa: SIM118
                return True
    return False


def check_head(folder, name, weight, shape):
    """Raise UserError unless a file's scalar head, or None, has the shape that its use needs; None: no head at all."""
    found = None if weight is None else tuple(weight.shape)
    if found != shape:
        needs = f"needs a score head of {shape}" if shape else "must not have a score head"
        raise UserError(f"{folder}: a {name} adapter {needs}; is it the adapter of another stage?")
