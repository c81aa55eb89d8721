"""Outputs that are on the disk batch by batch and outlive their process: the file of `predict`, the columns of `eval`.

    OUT.jsonl                one line a row, in the order of the inputs: id, prediction, source; prediction is null if
                             the input is too long for the model
    OUT.jsonl.settings.json  what the rows depend on: only the same inputs, model and settings continue a file

    eval.partial/checkpoints/mle.jsonl   what its responses depend on, then one line a batch, until eval is finished

A batch is appended and synced as a whole. A run that was killed is continued at the last whole batch, so that its
batches, and with them the last bits of its logits, are those of a run never stopped.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch

from data import stream_seed
from formats.errors import UserError
from interface.inputs import adapter_folder
from safety import ranks
from safety.checkpoint import TOKENIZER_FILES, TOKENIZER_SETTINGS, adapter_hash, tokenizer_hash
from safety.files import sync, write_json
from safety.lines import Lines
from safety.terminal import flag, say


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
        facts = facts_of_outputs(settings, inputs, llama, tokenizer, settings.adapter)
        if self.path.exists():
            check_own(self.path, beside, facts)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, facts)
            sync(beside)
        self.lines = Lines(self.path)
        self.done = len(self.lines.rows)
        if self.done < len(inputs):
            self.done -= self.done % self.batch_size
            self.lines.cut(self.done)

    def batches(self):
        """The batches that remain, as ranges of row numbers."""
        n = len(self.inputs)
        return [range(i, min(i + self.batch_size, n)) for i in range(self.done, n, self.batch_size)]

    def append(self, rows, texts):
        """Write the lines of a batch and wait until they are on the disk. texts: {row: output}."""
        for i in rows:
            id, source = self.inputs[i]
            self.lines.add({"id": id, "prediction": texts.get(i), "source": source})
        self.lines.sync()


def continued(sample, path, facts):
    """A sampler that writes the responses of each batch to a file, and begins with those that it finds there.

    sample: list of prompts -> list of responses. A file whose first line is not these facts starts from the beginning.
    """
    kept = []
    if ranks.first():
        lines = Lines(path, lambda row: row == facts or isinstance(row, list))
        if lines.rows[:1] != [facts]:
            lines.cut(0)
            lines.add(facts)
        kept = lines.rows[1:]
    kept = ranks.from_first(kept)
    if kept:
        say(f"eval {path.stem}: {len(kept)} batches of a run that was stopped are kept")

    def sample_or_take(prompts):
        if kept:
            return kept.pop(0)
        responses = sample(prompts)
        if ranks.first():
            lines.add(responses)
            lines.sync()
        return responses

    return sample_or_take


def keeper(settings, folder, llama, tokenizer):
    """A function (adapter, rows, name, make) -> make(), samples of the rows that a stage keeps until it ends.

    A resumed run takes them from there: sampled again, on another machine, one token may differ.
    """

    def keep(adapter, rows, name, make):
        facts = facts_of_outputs(settings, [(row.id, row.source) for row in rows], llama, tokenizer, adapter)
        name += f"-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        file = folder / "checkpoints" / name
        found = None
        if ranks.first():
            with suppress(OSError, ValueError):
                found = json.loads(file.read_text(encoding="utf-8"))
        found = ranks.from_first(found)
        if found is None:
            found = make()
            if ranks.first():
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(found), encoding="utf-8")
        return found

    return keep


def facts_of_outputs(settings, inputs, llama, tokenizer, adapter):
    """{name: value} of all that the outputs for inputs, a list of (id, source), depend on; adapter: base, mle, ….

    eval is greedy and has no temperature, top_k and top_p.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "dtype", "device")
    facts = {flag(name): getattr(settings, name) for name in names if hasattr(settings, name)}
    facts["the inputs"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    facts["the model"] = llama.hash
    facts["the template"] = tokenizer.template
    facts["the tokenizer"] = tokenizer_hash(llama.folder, TOKENIZER_FILES + TOKENIZER_SETTINGS)
    facts["the adapter"] = "none"
    if adapter != "base":
        facts["the adapter"] = adapter_hash(adapter_folder(settings, adapter))
    return facts


def check_own(file, beside, facts):
    """Raise UserError unless a file that exists is an earlier part of the same work."""
    remedy = "name another --output, or remove it"
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [name for name in facts if before.get(name) != facts[name]]
    except FileNotFoundError:
        raise UserError(f"{file}: exists and was not written by predict; {remedy}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{beside}: not readable; {remedy}") from None
    if changed:
        raise UserError(f"{file}: exists, and differs from this call in {', '.join(changed)}; {remedy}")
