"""Outputs that are on the disk batch by batch and outlive their process: the file of `predict`, the columns of `eval`.

    OUT.jsonl                one line a row, in the order of the inputs: id, prediction, source; where the input is too
                             long for the model, prediction is null
    OUT.jsonl.settings.json  what the rows depend on: only the same inputs, model and settings continue a file

    eval.partial/checkpoints/mle.jsonl   what its responses depend on, then one line a batch, until eval is finished

A batch is appended and synced as a whole. A run that was killed is continued at the last whole batch, so that its
batches, and with them the last bits of its logits, are those of a run never stopped.
"""

import fcntl
import hashlib
import itertools
import json
import os
from pathlib import Path

import torch

from data import stream_seed
from formats.errors import UserError
from interface.inputs import adapter_folder
from safety import ranks
from safety.checkpoint import adapter_hash
from safety.files import sync, write_json
from safety.terminal import say


def row_uniform(settings, rows):
    """The random numbers of rows, whatever batch they are in: (rows, max_new_tokens); None for greedy sampling."""
    if settings.temperature == 0 or not rows:
        return None
    found = []
    for i in rows:
        generator = torch.Generator().manual_seed(stream_seed(settings.seed, "predict", i))
        found.append(torch.rand(settings.max_new_tokens, generator=generator))
    return torch.stack(found).to(settings.device)


class Predictions:
    """The file of --output, new or continued."""

    def __init__(self, settings, inputs, llama, tokenizer):
        """inputs: list of (id, source)."""
        self.inputs, self.batch_size = inputs, settings.batch_size
        name = Path(settings.input).name.split(".")[0]
        self.path = Path(settings.output or Path(settings.output_dir) / "predict" / f"{name}.jsonl")
        if self.path.suffix != ".jsonl":
            raise UserError(f"--output {self.path}: is written as JSON lines; give it a name that ends in .jsonl")
        beside = self.path.with_name(f"{self.path.name}.settings.json")
        facts = depends_on(settings, inputs, llama, tokenizer, settings.adapter)
        self.done = kept = 0
        if self.path.exists():
            check_own(self.path, beside, facts)
            lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is half a line
            whole = len(lines) if len(lines) == len(inputs) else len(lines) // self.batch_size * self.batch_size
            self.done = min(whole, len(inputs))
            kept = sum(len(line) + 1 for line in lines[: self.done])
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, facts)
            sync(beside)
        self.handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another predict is writing it; wait for it to end") from None
        os.ftruncate(self.handle, kept)
        os.lseek(self.handle, kept, os.SEEK_SET)

    def batches(self):
        """The batches that remain, as ranges of row numbers."""
        n = len(self.inputs)
        return [range(i, min(i + self.batch_size, n)) for i in range(self.done, n, self.batch_size)]

    def append(self, rows, texts):
        """Write the lines of a batch and wait until they are on the disk. texts: {row: output}."""
        lines = []
        for i in rows:
            id, source = self.inputs[i]
            line = {"id": id, "prediction": texts.get(i), "source": source}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write(self.handle, "".join(lines))

    def close(self):
        os.close(self.handle)


def continued(sample, file, facts):
    """A sampler that writes the responses of each batch to a file, and begins with those that it finds there.

    sample: list of prompts -> list of responses. A file whose first line is not these facts starts from the beginning.
    """
    kept = ranks.from_first(read_kept(file, facts) if ranks.first() else None)
    if kept:
        say(f"eval {file.stem}: {len(kept)} batches of a run that was stopped are kept")

    def sample_or_take(prompts):
        if kept:
            return kept.pop(0)
        responses = sample(prompts)
        if ranks.first():
            append(file, responses)
        return responses

    return sample_or_take


def read_kept(file, facts):
    """The responses of the batches that a file has; incomplete lines are removed from it, and all if facts differ."""
    first = (json.dumps(facts) + "\n").encode()
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines[:1] != [first]:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(first)
        return []
    whole = list(itertools.takewhile(is_batch, lines[1:]))
    os.truncate(file, len(first) + sum(map(len, whole)))
    return [json.loads(line) for line in whole]


def is_batch(line):
    """Whether a line is whole: a kill leaves half of one, a power failure zeros."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), list)
    except ValueError:
        return False


def append(file, thing):
    """Append a thing to a file, as a line of JSON."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        write(handle, json.dumps(thing) + "\n")
    finally:
        os.close(handle)


def write(handle, text):
    """Write a text to an open file and wait until it is on the disk."""
    content = text.encode()
    while content:
        content = content[os.write(handle, content) :]
    os.fsync(handle)


def depends_on(settings, inputs, llama, tokenizer, adapter):
    """{name: value} of all that the outputs for inputs, a list of (id, source), depend on; adapter: base, mle, ….

    eval is greedy and has no temperature, top_k and top_p.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "dtype", "device")
    facts = {f"--{name.replace('_', '-')}": getattr(settings, name) for name in names if hasattr(settings, name)}
    facts["the inputs"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    facts["the model"] = llama.hash
    facts["the template"] = tokenizer.template
    facts["the adapter"] = "none"
    if adapter != "base":
        facts["the adapter"] = adapter_hash(adapter_folder(settings, adapter))
    return facts


def check_own(file, beside, facts):
    """Raise UserError where a file that exists is not an earlier part of the same work."""
    remedy = "name another --output, or remove it"
    if not beside.is_file():
        raise UserError(f"{file}: exists and was not written by predict; {remedy}")
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [name for name in facts if before.get(name) != facts[name]]
    except (ValueError, AttributeError):
        raise UserError(f"{beside}: not readable; {remedy}") from None
    if changed:
        raise UserError(f"{file}: exists, and differs from this call in {', '.join(changed)}; {remedy}")
