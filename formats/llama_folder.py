"""Llama folders in Hugging Face's layout: config.json, safetensors in one file or in shards, strict about names."""

import errno
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from formats.errors import UserError
from formats.files import read_json
from formats.gptq import read_quantize_config

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
ATTENTION = (*QKV, "o_proj")


@dataclass(frozen=True)
class Family:
    """What sets a model_type apart from a Llama.

    silent: what transformers takes where a config.json of that family does not say.
    biases: {field of config.json: the projections that have a bias where it is true; under "" those that always have}.
    head_norm: whether each head of q and k is normalized before it is rotated, by q_norm and k_norm.
    """

    silent: dict = field(default_factory=dict)
    biases: dict = field(default_factory=dict)
    head_norm: bool = False


QWEN = {
    "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
FAMILIES = {  # model_type: what of the Llama is different
    "llama": Family(biases={"attention_bias": ATTENTION, "mlp_bias": MLP}),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(QWEN, {"": QKV}),
    "qwen3": Family(QWEN | {"head_dim": 128}, {"attention_bias": ATTENTION}, head_norm=True),
    "seed_oss": Family(
        {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        {"attention_bias": QKV, "attention_out_bias": ("o_proj",), "mlp_bias": MLP},
    ),
}
OTHERS = {  # what is in a model_type, and what to take instead
    "moe|mixtral|_v[23]$": "a mixture of experts; take a dense model such as Qwen/Qwen3-0.6B",
    "vl|vision|llava|mllama|omni|audio": "no model of text alone; take one such as Qwen/Qwen2.5-0.5B-Instruct",
}
SIZES = dict.fromkeys(  # whole numbers and the most they may be, checked before anything is allocated
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
     "max_position_embeddings"), 1 << 24) | {"num_hidden_layers": 1000}  # fmt: skip
ROPE_SCALING = {"factor": float, "low_freq_factor": float, "high_freq_factor": float,
                "original_max_position_embeddings": int}  # fmt: skip


def is_model(folder):
    """Whether a folder holds a whole model and not an adapter."""
    return (
        (Path(folder) / "config.json").is_file()
        and not (Path(folder) / "adapter_config.json").is_file()
        and any(Path(folder).glob("model*.safetensors"))
    )


def read_config(folder):
    """The fields of model.LlamaConfig, as a dict, of a model folder.

    Raises FileNotFoundError or UserError naming file, field and remedy.
    """
    folder, file = Path(folder), Path(folder) / "config.json"
    if folder.suffix == ".gguf" or (folder.is_dir() and not file.exists() and any(folder.glob("*.gguf"))):
        raise UserError(f"{folder}: GGUF is not read; take the model's safetensors version")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--model {folder}: no such model folder; name one that contains config.json, *.safetensors and a "
            f"tokenizer, or a model of the Hub: OWNER/NAME"
        )
    has_adapter = (folder / "adapter_config.json").is_file()  # a model may lie beside one
    if has_adapter and not (file.is_file() and "model_type" in read_json(file)):
        raise UserError(f"{folder}: is an adapter, not a model; name the model that it was trained on")
    raw = read_json(file)
    family = family_of(file, raw)
    raw = family.silent | raw
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; take a model with 'silu'")
    check_positive(file, raw, (*SIZES, "rms_norm_eps", "rope_theta"))
    try:
        refuse_sliding_window(file, family, raw)
        heads = int(raw["num_attention_heads"])
        width = int(raw["hidden_size"])
        theta, scaling = read_rope(file, raw)
        config = {
            "model_type": raw["model_type"],
            "vocab_size": int(raw["vocab_size"]),
            "hidden_size": width,
            "intermediate_size": int(raw["intermediate_size"]),
            "num_hidden_layers": int(raw["num_hidden_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(raw.get("num_key_value_heads") or heads),
            "head_dim": int(raw.get("head_dim") or width // heads),
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "max_position_embeddings": int(raw.get("max_position_embeddings", 2048)),
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "biases": biases_of(family, raw),
            "head_norm": family.head_norm,
            "bos_token_id": raw.get("bos_token_id", 1),
            "eos_token_id": read_eos(folder, raw),
            "quantization": read_quantization(folder, raw),
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{file}: missing or malformed field: {error}; download the file again") from None
    kv_heads = config["num_key_value_heads"]
    head_dim = config["head_dim"]
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise UserError(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}, or head_dim "
            f"{head_dim} is odd or 0; download the file again"
        )
    return config


def family_of(file, raw):
    """The Family of a config.json, or the UserError that says what to take instead."""
    name = raw.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    remedy = f"lastmile reads {', '.join(FAMILIES)}"
    for pattern, what in OTHERS.items():
        if re.search(pattern, str(name)):
            remedy = what
    raise UserError(f"{file}: model_type {name!r} is not supported; {remedy}")


def refuse_sliding_window(file, family, raw):
    """Raise UserError where a layer sees only the last tokens."""
    name, in_use = "sliding_window", raw.get("sliding_window") is not None
    if "use_sliding_window" in family.silent:  # the first max_window_layers of Qwen see all
        in_use = in_use and raw["use_sliding_window"] and raw["max_window_layers"] < raw["num_hidden_layers"]
    if raw.get("layer_types") is not None:
        name, in_use = "layer_types", any(kind != "full_attention" for kind in raw["layer_types"])
    if in_use:
        raise UserError(
            f"{file}: {name} {raw[name]!r:.60} is not supported; take a version without, as Mistral is from v0.2 on, "
            f"and Qwen2.5 and Qwen3 are"
        )


def biases_of(family, raw):
    """The projections that have a bias, by the fields of a config.json."""
    found = ()
    for name, projections in family.biases.items():
        if not name or raw.get(name):
            found += projections
    return found


def check_positive(file, raw, names):
    """Refuse sizes and factors that are not numbers above 0, or too large. Absent and null ones are fine."""
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        most = SIZES.get(name, 1e12)
        types = (int,) if name in SIZES else (int, float)
        if type(value) not in types or not 0 < value <= most:
            kind = "whole number" if name in SIZES else "number"
            raise UserError(
                f"{file}: {name} is {value!r:.40}, expected a {kind} above 0, at most {most}; download the file again"
            )


def read_rope(file, raw):
    """(theta, {} or Llama 3's scaling), in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters)."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    check_positive(file, found, ("rope_theta", *ROPE_SCALING))
    theta = found.get("rope_theta", raw.get("rope_theta", 10000.0))
    if raw.get("rope_theta", theta) != theta:
        raise UserError(f"{file}: rope_theta {raw['rope_theta']}, but rope_parameters says {theta}; keep the true one")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rope type {kind!r} is not supported; take a model with 'default' or 'llama3'")
    scaling = ROPE_SCALING.items() if kind == "llama3" else ()
    return float(theta), {name: number(found[name]) for name, number in scaling}


def read_eos(folder, raw):
    """All ids that end an output: those of config.json and those of generation_config.json."""
    file = folder / "generation_config.json"
    named = [raw.get("eos_token_id", 2)]
    if file.is_file():
        named.append(read_json(file).get("eos_token_id"))
    eos = []
    for ids in named:
        if ids is not None:
            eos += ids if isinstance(ids, list) else [ids]
    if not eos or not all(type(token) is int and abs(token) < 1 << 31 for token in eos):
        raise UserError(f"{folder}/config.json: eos_token_id {eos} is no token; set it to the id that ends an output")
    return tuple(dict.fromkeys(eos))


def read_quantization(folder, raw):
    """{} for an unquantized model, else its settings; several files may contain them, and must then agree."""
    names = ("quantize_config.json", "quant_config.json")
    found = {folder / "config.json": raw.get("quantization_config") or {}}
    found |= {folder / name: read_json(folder / name) for name in names if (folder / name).is_file()}
    return read_quantize_config(found)


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_tensors(folder):
    """{name: tensor} of a folder's safetensors files."""
    files, weight_map = weight_files(folder)
    tensors = {}
    places = set()  # (name, file) as found
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    places.add((name, file.name))
                    tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            problem = identify_file(file) or f"not a readable safetensors file ({error})"
            raise UserError(f"{file}: {problem}; download it again") from None
    if weight_map:
        check_index(folder, weight_map, places)
    return tensors


def check_index(folder, weight_map, places):
    """Refuse shards that contain other tensors than their index says."""
    wrong = weight_map.items() ^ places
    if wrong:
        name = min(wrong)[0]
        found = " and ".join(sorted(file for other, file in places if other == name))
        raise UserError(
            f"{folder}: tensor {name} should be in {weight_map.get(name, 'no file')} and is in {found or 'none'}; "
            f"download the model again"
        )


def check_tensors(folder, found, expected, model_type):
    """Raise UserError unless the tensors of a folder are exactly those that the model expects, {name: tensor} both."""
    for name in sorted(set(expected) | set(found)):
        problem = tensor_error(found.get(name), expected.get(name))
        if problem == "missing" and name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            problem += f", and the config.json of a {model_type} promises it (model_type): correct that,"
            raise UserError(f"{folder}: tensor {name} is {problem} or download the model again")
        if problem:
            raise UserError(f"{folder}: tensor {name} is {problem}; download the model again")


def tensor_error(found, expected):
    """How a tensor of a file differs from what the model needs, or ""."""
    if found is None:
        return "missing"
    if expected is None:
        return "not part of this model"
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if expected.is_floating_point() and found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"of type {found.dtype}, expected floats"
    if not expected.is_floating_point() and found.dtype != expected.dtype:
        return f"of type {found.dtype}, expected {expected.dtype}"
    return ""


def weight_files(folder):
    """([file, ...], {tensor: its file's name} or None): model.safetensors, or an index's shards, or a lone file."""
    names = sorted(path.name for path in folder.iterdir())
    ours = [name for name in names if not name.startswith(("consolidated", "adapter_"))]  # no parts of the model
    files = [name for name in ours if name.endswith(".safetensors")]
    indices = [name for name in ours if name.endswith(".safetensors.index.json")]
    if "model.safetensors" in files:
        return [folder / "model.safetensors"], None
    if indices:
        index = folder / indices[0]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map; download it again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):  # never a path
                raise UserError(f"{index}: {shard!r:.80} is not the name of a safetensors file; download it again")
            if shard not in files:
                raise FileNotFoundError(f"{folder}: shard {shard} named in {index.name} is missing; download it")
        return [folder / shard for shard in sorted(set(weight_map.values()))], weight_map
    if len(files) == 1:
        return [folder / files[0]], None
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files, no model.safetensors.index.json; download it, too")
    remedy = "download the model's *.safetensors"
    if any(name.endswith(".gguf") for name in names):
        remedy = "GGUF is not read; take the model's safetensors version"
    elif any(name.startswith("consolidated") for name in names):
        remedy = "Meta's own files are laid out differently; take the Hugging Face version"
    elif any(name.endswith(PICKLES) for name in names):
        remedy = "pickles can run code and are never opened; write safetensors with save_pretrained of transformers"
    raise FileNotFoundError(f"{folder}: no *.safetensors among {', '.join(names) or 'nothing'}; {remedy}")


def identify_file(file):
    """What a file is that should contain weights and does not, by its first bytes; "" where they do not tell."""
    with open(file, "rb") as opened:
        head = opened.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file it points to"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML page"
    return "is a pickle, and never opened" if head.startswith((b"\x80", b"PK")) else ""


# What is not copied to a model made from this one: weights, code, documentation, logs, and what is written again.
NOT_COPIED = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack", ".py",
    ".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".jsonl", ".sha256",
)  # fmt: skip
WRITTEN_AGAIN = ("config.json", "settings.json", "heldout.json", "quantize_config.json", "quant_config.json")
DOCUMENTS = ("readme", "adapter_", "consolidated", ".")


def copy_companions(source, target, eos_ids, eos_text=None):
    """Copy the files beside the weights that turn text into tokens and end answers: tokenizer, chat template, ...

    eos_ids: the ids that end an output; eos_text: the token that the prompt ends answers with, where it is not the
    tokenizer's own. Files that name the EOS are changed to say the same, or readers of the copy would generate to their
    limit.
    """
    for file in sorted(source.iterdir()):
        name = file.name.lower()
        skip = name.endswith(NOT_COPIED) or name in WRITTEN_AGAIN or name.startswith(DOCUMENTS)
        if file.is_file() and not skip:
            shutil.copyfile(file, target / file.name)
    change(target / "generation_config.json", "eos_token_id", list(eos_ids))
    if eos_text:
        change(target / "tokenizer_config.json", "eos_token", eos_text)
        change(target / "special_tokens_map.json", "eos_token", eos_text)


def change(file, key, value):
    """Set one key of a JSON file, if there is such a file."""
    if file.is_file():
        raw = read_json(file)
        raw[key] = value
        file.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


SHARD = 5 * 10**9  # bytes of weights in one file, as transformers counts them; the Hub takes at most 50 GB in one


def write(folder, config, tensors, quantization=None):
    """Write config.json and the weights with Hugging Face's names. config: the fields of model.LlamaConfig.

    Weights are one model.safetensors or, above SHARD bytes, model-00001-of-00003.safetensors ... with an index.
    """
    raw = {name: value for name, value in config.items() if name not in ("quantization", "biases", "head_norm")}
    scaling = config["rope_scaling"]
    has_head = "score.weight" in tensors
    name = config["model_type"].title().replace("_", "")  # seed_oss: SeedOssForCausalLM
    for field_name, projections in FAMILIES[config["model_type"]].biases.items():
        raw |= {field_name: set(projections) <= set(config["biases"])} if field_name else {}
    raw |= {
        "architectures": [f"{name}For{'SequenceClassification' if has_head else 'CausalLM'}"],
        "sliding_window": None,
        "hidden_act": "silu",
        "eos_token_id": list(config["eos_token_id"]),
        "rope_scaling": scaling | {"rope_type": "llama3"} if scaling else None,
        "torch_dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
    }
    if has_head:
        raw |= {"num_labels": 1, "pad_token_id": config["eos_token_id"][0]}
    if quantization:
        raw["quantization_config"] = quantization
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    shards = split(tensors, SHARD)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(bytes_of, tensors.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def bytes_of(tensor):
    return tensor.numel() * tensor.element_size()


def split(tensors, limit):
    """[{name: tensor}, ...]: the tensors in their order, as many in one as fit into `limit` bytes."""
    shards = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + bytes_of(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_of(tensor)
    return shards


def write_tensors(file, tensors):
    """Write one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error), str(file)) from None
