"""Checkpoints, and the fingerprint that a resumed run must share with them.

Data order, negatives and sampling are pure functions of (seed, stream, step). Weights, AdamW's moments and the step
number are therefore all that a checkpoint contains, with --keep best the best weights, too. A resumed run ends with the
same bits as one never stopped.

    <stage>.partial/checkpoints/step-00000100/state.safetensors   tensors
                                              state.json          the step and the fingerprint
                                              manifest.json       SHA-256 of both, and the version of this layout
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from formats.errors import UserError
from formats.llama_folder import is_model, read_config, weight_files
from model import LlamaConfig
from safety.files import clear, digest, pieces, sync
from safety.terminal import flag

FILES = ("state.safetensors", "state.json")  # those that manifest.json has the hashes of
VERSION = 1  # of this layout
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json")


def checkpoints(folder):
    """All checkpoints of a stage's folder, valid or not, the most recent last."""
    return sorted((folder / "checkpoints").glob("step-*"))


def write_checkpoint(place, tensors, facts):
    """Write a checkpoint that is complete or absent: into a hidden folder, manifest last, then renamed."""
    hidden = place.with_name(f".{place.name}")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    contents = {"state.safetensors": safetensors.torch.save(tensors), "state.json": json.dumps(facts).encode()}
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents["manifest.json"] = json.dumps(manifest | {"version": VERSION}).encode()
    try:
        place.parent.mkdir(exist_ok=True)
        clear(*place.parent.glob(".step-*"))  # left by a run that was killed here
        hidden.mkdir()
        for name, content in contents.items():
            (hidden / name).write_bytes(content)
            sync(hidden / name)
        sync(hidden)
        shutil.rmtree(place, ignore_errors=True)  # the same step of a run that was resumed from an earlier one
        hidden.rename(place)
        sync(place.parent)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def read_checkpoint(place):
    """(tensors, facts) of a checkpoint. Raises UserError with the reason if it is damaged or too new."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        if manifest["version"] > VERSION:
            raise ValueError("it was written by a newer lastmile")
        for name in FILES:
            with open(place / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest[name]:
                    raise ValueError(f"{name} is damaged")
        facts = json.loads((place / "state.json").read_text())
        if type(facts["step"]) is not int or facts["step"] < 0:
            raise ValueError(f"step {facts['step']!r:.80} is not a number of steps")
        return safetensors.torch.load_file(place / "state.safetensors"), facts
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{place}: not a valid checkpoint: {error}") from None


def fingerprint(stage, settings, rows, base=None, depends_on=None):
    """What a checkpoint must share with the run that resumes from it: {name: hash or value}, causes first.

    base: the model's folder, or None. depends_on: {name: hash or text} of everything else that changes the result.
    """
    found = {"stage": stage}
    for name, value in result_settings(settings).items():
        found[flag(name)] = value
    if base:
        found["base model"] = model_hash(base)
        found["tokenizer"] = tokenizer_hash(base)  # its settings show in the ids of the rows
    found |= depends_on or {}
    texts = rows_hash(rows, ("id", "source", "target"))
    return found | {"data": texts, "prompt template or negatives": rows_hash(rows, ("kind", "prompt", "response"))}


def result_settings(settings):
    """{name: value} of the settings that can change a result. Paths are not among them: what they contain is hashed."""
    values = asdict(settings)
    return {f.name: values[f.name] for f in fields(settings) if f.metadata["result"]}


def setting_defaults(settings):
    """What a fingerprint made before a setting existed implies for it: {name in a fingerprint: the default}."""
    return {flag(f.name): f.default for f in fields(settings) if f.metadata["result"]}


def rows_hash(rows, names):
    """SHA-256 of the named fields of a list of Datum."""
    found = hashlib.sha256()
    for datum in rows:
        found.update(repr(tuple(getattr(datum, name) for name in names)).encode())
    return found.hexdigest()


def tokenizer_hash(folder, names=TOKENIZER_FILES):
    """SHA-256 of those of a tokenizer's files that a folder has."""
    return digest(*(folder / name for name in names if (folder / name).is_file()))


class ModelHash(str):
    """The hash of a model. It also equals `old`, that of the same folder by the rule of older versions."""

    old = None

    def __eq__(self, other):
        return str.__eq__(self, other) or other == self.old

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


def model_hash(folder):
    """SHA-256 of what a model computes with: the tensors that are read, and the fields of its config that count.

    Other files and fields do not count, nor how the tensors are distributed over files.
    """
    config = asdict(LlamaConfig(**read_config(folder)))
    config = {f.name: config[f.name] for f in fields(LlamaConfig) if config[f.name] != f.default}
    tensors = tensor_hashes(folder)
    if tensors.get("lm_head.weight") == tensors.get("model.embed_tokens.weight"):
        tensors.pop("lm_head.weight", None)  # a tied head may be written twice
    found = ModelHash(hashlib.sha256(json.dumps([config, tensors], sort_keys=True).encode()).hexdigest())
    found.old = digest(*sorted(Path(folder).glob("*.safetensors")), Path(folder) / "config.json")
    return found


def tensor_hashes(folder):
    """{name: SHA-256} of the tensors that a model folder is read from; of a tensor above 1 MiB, of 64 pieces of it."""
    found = {}
    for file in weight_files(Path(folder))[0]:
        with open(file, "rb") as opened:
            first = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(first - 8))
            for name, tensor in header.items():
                if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                    continue
                hash = hashlib.sha256(f"{tensor['dtype']} {tensor['shape']}".encode())
                start, end = tensor["data_offsets"]
                for piece in pieces(opened, first + start, first + end, 1 << 20):
                    hash.update(piece)
                found[name] = hash.hexdigest()
    return found


def adapter_hash(folder):
    """SHA-256 of an adapter folder, or of the whole model that --tune full makes in its place."""
    names = "adapter_model.safetensors", "adapter_config.json"
    return model_hash(folder) if is_model(folder) else digest(*(folder / name for name in names))


# ----------------------------------------------------------------------------------------------------------------------
# The state of lastmile.Optimizer


def state_of(optimizer):
    """{name: tensor} of everything the next update depends on: the weights, AdamW's moments and step counts."""
    tensors = {f"weight.{i}": parameter.detach() for i, parameter in enumerate(optimizer.parameters)}
    for i, moments in optimizer.adamw.state_dict()["state"].items():
        for key, tensor in moments.items():
            tensors[f"{key}.{i}"] = tensor
    return tensors


def restore_state(optimizer, tensors):
    """Load what `state_of` returned. Raises UserError if the tensors belong to another model or are invalid."""
    check_state(optimizer, tensors)
    state = {}
    for name, tensor in tensors.items():
        key, _, i = name.rpartition(".")
        if key == "weight":
            optimizer.parameters[int(i)].detach().copy_(tensor)
        else:
            state.setdefault(int(i), {})[key] = tensor
    optimizer.adamw.load_state_dict(optimizer.adamw.state_dict() | {"state": state})


def check_state(optimizer, tensors):
    """Raise UserError unless the tensors have the names, shapes and values of a state of these parameters."""
    expected = {}
    for i, parameter in enumerate(optimizer.parameters):
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
