"""Data: from a name or a file to batches of token ids.

    load  ->  encode (template, tokenizer, filter)  ->  with_negatives  ->  batches  ->  Batch

An `Example` is text, a `Datum` is one prompt and one response in token ids, a `Batch` is a rectangle of them.
Every row of a batch reads `prompt, response, EOS, padding`; all that follows rests on two conventions:

* Column t of every (B, T) tensor belongs to token t.
* Masks come from lengths, never from comparing ids: Llama-2 has no padding token, and its EOS is an action.

Prompt and response are tokenised apart and their ids joined, so that training and sampling see the same ids.

Paper: Solway 2024, arXiv 2408.16753; sections 3.2 (negatives) and 4.2 (data sets).
Dimensions: B batch, T time (longest row of the batch).
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from formats.errors import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Randomness: every draw is a pure function of (seed, stream, step), so nothing has to be remembered between steps.


def stream_seed(seed, *stream):
    """A 63-bit seed for one named stream, for example `stream_seed(1337, "rollout", step)`.

    Streams do not disturb each other: sampling one more token changes neither the data order nor the negatives.
    """
    key = ":".join(map(str, (seed, *stream))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


# ----------------------------------------------------------------------------------------------------------------------
# Text: one example, and where it comes from


@dataclass(frozen=True)
class Example:
    id: str
    source: str
    target: str


@dataclass(frozen=True)
class Preset:
    """A data set of the Hugging Face Hub; in `files`, {split} stands for train, validation or test."""

    repo: str
    files: str
    revision: str = "main"


PRESETS = {
    "samsum": Preset("knkarthick/samsum", "{split}.csv"),  # Samsung/samsum was withdrawn in 2025
    "dialogsum": Preset("knkarthick/dialogsum", "{split}.csv"),
    # Sets that came with a loading script; the Hub keeps them as parquet on a branch of its own.
    "xsum": Preset("EdinburghNLP/xsum", "default/{split}/*.parquet", "refs/convert/parquet"),
    "cnn_dailymail": Preset("abisee/cnn_dailymail", "3.0.0/{split}/*.parquet", "refs/convert/parquet"),
}
COLUMNS = [  # the pairs of column names that are found without being named
    ("dialogue", "summary"), ("document", "summary"), ("article", "highlights"),
    ("prompt", "completion"), ("input", "output"),
]  # fmt: skip
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_SHARE = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # of ten rows of a lone file
FIELD_LIMIT = 1 << 20  # characters in one field; csv's own limit of 128 KiB is below some news articles
ROW_LIMIT = 10_000_000
FILE_LIMIT = 2 << 30  # bytes of a text file, which is read whole
INFLATION_LIMIT = 100  # times its own size that a parquet file may unfold to; texts reach about 5


def load(name_or_path, split, input_column=None, target_column=None):
    """All examples of one split.

    name_or_path: "toy" (made on the spot), a preset (the folder data/<name> where there is one, else the Hub), a folder
    that holds {train,validation,test}.{csv,jsonl,json,parquet}, or one such file, whose rows are then dealt 8:1:1 by
    row number. split: "train", "validation" or "test"; toy also has "pretrain".
    Returns a list of Example, texts stripped and line ends as "\n".
    Raises FileNotFoundError or UserError with the file, the row and the remedy.
    """
    if name_or_path == "toy":
        return toy(split)
    path, preset = Path(name_or_path), PRESETS.get(str(name_or_path))
    if preset:
        path = Path("data") / name_or_path
    if preset and not path.exists():
        pattern = preset.files.format(split=split)
        files = sorted(fetch(preset.repo, preset.revision, [pattern], "dataset").glob(pattern))
    elif not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; --data takes toy, {', '.join(PRESETS)}, or the path of your own data"
        )
    else:
        files = [find_split(path, split) if path.is_dir() else path]
    examples, empty = [], 0
    for file in files:
        for number, row in read_rows(file):
            columns = guess_columns(f"{file}:{number}", row, input_column, target_column)
            if preset and not all(str(row[column] or "").strip() for column in columns):
                empty += 1  # XSum has a few, which its user cannot mend
            else:
                examples.append(to_example(f"{file}:{number}", row, columns))
            if len(examples) > ROW_LIMIT:
                raise UserError(f"{file}: over {ROW_LIMIT} rows; cut it")
    if empty:
        print(f"{split}: {empty} rows of {name_or_path} have an empty text and are passed over", file=sys.stderr)
    if path.is_file():
        if len(examples) < 10:
            raise UserError(
                f"{path}: {len(examples)} rows; a single file is dealt 8:1:1 into train, validation and test and needs "
                f"at least 10, or give --data a folder with one file a split"
            )
        examples = [e for i, e in enumerate(examples) if i % 10 in SPLIT_SHARE[split]]
    if not examples:
        raise UserError(f"{files[0]}: no rows; expected a header line and data (CSV) or one object a line (JSONL)")
    return examples


HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # owner/name, owner/name@revision


def fetch(repo, revision, patterns, kind):
    """The local folder of a model or data set of the Hugging Face Hub: cached, or downloaded under a progress bar.

    kind: "model" or "dataset"; patterns: which files, none but these and none from subfolders they do not name; there
    must be one of the first pattern.
    HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they mean everywhere. While the Hub cannot be reached, a
    cache that another program filled is taken as it is: the caller checks that its files are there.
    Raises UserError with what could not be had, and the remedy.
    """
    import requests
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    what, own = f"{kind} {repo}@{revision}", "--data FOLDER" if kind == "dataset" else "--model FOLDER"
    ignored = ["*consolidated*"] if any("/" in pattern for pattern in patterns) else ["*consolidated*", "*/*"]
    # A broken download leaves some of its files, and without the Hub nobody can tell what lacks: hence this mark.
    place = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo}".replace("/", "--")
    unfinished = place / f"unfinished-{stream_seed(0, revision, *patterns)}"
    try:
        try:  # snapshot_download alone would wait for ever on a server that does not answer
            HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10)
            reached = True
        except (ConnectionError, requests.ConnectionError, requests.Timeout):
            reached = False
        if reached:
            with suppress(OSError):  # where one cannot write, no download can break
                place.mkdir(parents=True, exist_ok=True)
                unfinished.touch()
        elif unfinished.exists():
            raise errors.LocalEntryNotFoundError("only a part of it is")
        folder = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored,
            local_files_only=not reached,
        )  # fmt: skip
        with suppress(OSError):
            unfinished.unlink()
        if any(Path(folder).glob(patterns[0])):
            return Path(folder)
        problem = f"no {patterns[0]} could be had; name files of your own: {own}"
    except errors.GatedRepoError:
        problem = "its owner must grant you access; ask for it on the model's page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = f"not on the Hub, or private; check the name, set HF_TOKEN, or name files of your own: {own}"
    except errors.RevisionNotFoundError:
        problem = "the Hub has no such revision; see the branches on its page"
    except errors.LocalEntryNotFoundError:
        problem = f"not wholly in the cache, and the Hub cannot be reached; connect, or name files of your own: {own}"
    except errors.HFValidationError as error:
        problem = str(error)
    except requests.RequestException as error:
        problem = f"the download broke off ({type(error).__name__}); run the same command again, it goes on from there"
    raise UserError(f"{what}: {problem}")


def find_split(folder, split):
    names = [f"{stem}{suffix}" for stem in SPLIT_NAMES[split] for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no file for the {split} split; expected one of {', '.join(names)}")


def read_rows(file):
    """Yield (row number, dict) from a file; of text files the number is the line's. NA and None stay strings."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: unknown file type; --data reads {', '.join(SUFFIXES)}")
    if file.suffix == ".parquet":
        yield from enumerate(read_parquet(file), 1)
        return
    if file.stat().st_size > FILE_LIMIT:
        raise UserError(f"{file}: over {FILE_LIMIT >> 30} GiB of text; cut it, or write it as .parquet")
    try:
        text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it: iconv -f LATIN1 -t UTF-8") from None
    lines, number = io.StringIO(text, newline=""), 0  # splits at \n and \r only: U+2028 may stand inside a string
    remedy = "mend or remove that row"
    try:
        if file.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_json(line)
        elif file.suffix == ".json":
            rows = parse_json(text)
            if not isinstance(rows, list):
                raise UserError(f"{file}: expected a list of objects; write one object a line and call it .jsonl")
            yield from enumerate(rows, 1)
        else:  # strict: an unclosed quote would otherwise swallow the rest of the file in silence
            csv.field_size_limit(FIELD_LIMIT)
            reader = csv.DictReader(lines, strict=True)
            number = reader.line_num if reader.fieldnames else 0
            for row in reader:
                number = reader.line_num
                yield number, row
    except (csv.Error, json.JSONDecodeError, BadJson) as error:
        number += file.suffix == ".csv"  # the row after the last good one
        number = number or getattr(error, "lineno", 1)
        if file.suffix == ".json" and str(error).startswith("Extra data"):
            remedy = "if it holds one object a line, call it .jsonl"
        raise UserError(f"{file}:{number}: {error}; {remedy}") from None


class BadJson(ValueError):
    """What Python's json reads, but the standard does not have."""


def parse_json(text):
    """JSON as the standard has it: no NaN, no key twice, no nesting or number without end."""

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise BadJson("a key stands there twice")
        return found

    def refuse(name):
        raise BadJson(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise BadJson("nested too deep") from None
    except (json.JSONDecodeError, BadJson):
        raise
    except ValueError as error:  # a whole number of more than 4300 digits
        raise BadJson(str(error)) from None


def read_parquet(file):
    """Yield the rows of a parquet file as dicts, a few in memory at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{file}: parquet needs pyarrow; install it: pip install 'pyarrow==26.0.1'") from None
    try:
        with ParquetFile(file) as opened:
            groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
            most = INFLATION_LIMIT * file.stat().st_size + (64 << 20)
            size = sum(group.total_byte_size for group in groups)
            for batch in opened.iter_batches(256) if size <= most else []:
                rows = batch.to_pylist()
                size += sum(len(cell) for row in rows for cell in row.values() if isinstance(cell, str))
                if size > most:
                    break
                yield from rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates without end
        raise UserError(f"{file}: not a readable parquet file ({error}); fetch it again") from None
    if size > most:
        raise UserError(f"{file}: unfolds to over {INFLATION_LIMIT} times its size, as no text does; fetch it again")


def guess_columns(where, row, input_column, target_column):
    """(input column, target column) of a row: those named, or the one pair of COLUMNS that is there."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with an input and a target column, found {row!r:.40}")
    if None in row:  # where csv puts the cells for which the header has no name
        raise UserError(f"{where}: more cells than the header has; put quotes round text that holds commas")
    if bool(input_column) != bool(target_column):
        raise UserError("--input-column and --target-column go together; name both")
    if input_column:
        found = [(input_column, target_column)] if input_column in row and target_column in row else []
    else:
        if isinstance(row.get("messages"), list):  # TRL's conversational form: the last message is the target
            row["prompt"], row["completion"] = row["messages"][:-1], row["messages"][-1:]
        found = [pair for pair in COLUMNS if set(pair) <= set(row)]
    if len(found) != 1:
        problem = "more than one pair of columns fits" if found else "cannot tell the input and the target column"
        raise UserError(
            f"{where}: {problem} among {', '.join(map(str, row))}; name them: --input-column NAME --target-column NAME"
        )
    return found[0]


def to_example(where, row, columns):
    texts = [conversation(row[column]) for column in columns]
    for column, text in zip(columns, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: column {column!r} is empty or not text; mend or remove that row")
        if len(text) > FIELD_LIMIT:
            raise UserError(f"{where}: column {column!r} is longer than {FIELD_LIMIT} characters; cut or remove it")
        if not encodable(text):
            raise UserError(f"{where}: column {column!r} holds half a UTF-16 pair; mend or remove that row")
    target = row[columns[1]]
    if isinstance(target, list) and [turn["role"] for turn in target] != ["assistant"]:
        raise UserError(f"{where}: the last message must be one of role 'assistant'; mend or remove that row")
    name = row.get("id")
    return Example(where.rpartition(":")[2] if name in (None, "") else str(name), *map(clean, texts))


def conversation(value):
    """The text of a list of {"role", "content"} messages; anything else as it is.

    A system message stands first, as it is; one further message is the text itself, several become "role: text" lines:
    lastmile learns one answer to one input, and its template, not the data, says who speaks.
    """
    if not isinstance(value, list):
        return value
    if not value or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return None
    system = [turn["content"] for turn in value if turn["role"] == "system"]
    turns = [turn for turn in value if turn["role"] != "system"]
    lines = [turn["content"] if len(turns) == 1 else f"{turn['role']}: {turn['content']}" for turn in turns]
    return "\n\n".join([*system, "\n".join(lines)])


def clean(text):
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def encodable(text):
    """Whether a text is Unicode: JSON can spell half a surrogate pair, which no tokenizer takes."""
    return not re.search("[\ud800-\udfff]", text)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: template, tokenizer, filter

SYSTEM = (
    "You are a helpful assistant who writes short and accurate summaries. You always keep to the facts of the text and "
    "add nothing of your own."
)
TASK = """Read the following text and summarize it in one or two short sentences. Output the summary only: do not \
begin with an introduction such as "Sure, here is a summary", and do not end with a comment.

{source}"""

# name: (the prompt, the token that ends an answer; "": the tokenizer's EOS). With the Llama tokenizer the words of
# llama2 around {source}, BOS included, cost 98 tokens: the filter at 400 then drops 12.4 % of SAMSum's training split
# and 13.2 % of its test split (paper, 4.2: at most 13.4 %).
TEMPLATES = {
    "llama2": (f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{TASK} [/INST]", ""),
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{TASK}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "chatml": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{TASK}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "plain": ("{source}\n\nSummary:\n", ""),
}

# What `pretrain` gives its small models, whose time would otherwise go into reading the same 98 tokens again and again.
SHORT_TEMPLATE = "[INST] {source} [/INST]"


def load_template(name, folder, controls):
    """(prompt, token that ends an answer or "") for the value of --template.

    name: one of TEMPLATES, or a text file with {source} where the input goes; "" takes the model folder's template.txt,
    or else what the tokenizer's control tokens (controls) speak for. A checkpoint's own Jinja template is a program
    from strangers, and is not run.
    """
    if not name:
        marks = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>"}
        own = Path(folder) / "template.txt"
        name = own if own.is_file() else next((t for t, mark in marks.items() if mark in controls), "llama2")
    if name not in TEMPLATES:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"{name}: no such file; --template takes {', '.join(TEMPLATES)}, or a text file with {{source}} in it"
            )
        text = read_text(Path(name), 1 << 16)
        if text.count("{source}") != 1:
            raise UserError(f"{name}: the template must hold {{source}} exactly once, where the input text goes")
        return text, ""
    missing = sorted(set(re.findall(r"<\|\w+\|>", TEMPLATES[name][0])) - set(controls))
    if missing:
        raise UserError(f"--template {name}: this model's tokenizer has no {missing[0]}; choose another --template")
    return TEMPLATES[name]


class Tokenizer:
    """Text to token ids and back, and the prompt around a text: what both file formats share.

    Control tokens count in the template, in a source or a target they are text: nobody's data can end a row early.
    """

    def __init__(self, folder, template, vocab_size, controls, bos, eos):
        """controls: {text: id} of the control tokens; bos: id that starts every prompt, or None; eos: ends a target."""
        self.template, end = load_template(template, folder, controls)
        self.own_eos = not end  # else the template's
        self.vocab_size, self.controls, self.bos = vocab_size, controls, bos
        self.eos = controls[end] if end else eos
        marks = "|".join(re.escape(text) for text in sorted(filter(None, controls), key=len, reverse=True))
        self.parts = [part for part in re.split(f"({marks})", self.template) if part]
        self.start = [bos] if bos is not None and controls.get(self.parts[0]) != bos else []  # never twice

    def prompts(self, sources):
        """Ids of the prompts around a list of texts: BOS, template, source."""
        columns = [
            [[self.controls[part]]] * len(sources) if part in self.controls
            else self.encode([part.replace("{source}", source) for source in sources])
            for part in self.parts
        ]  # fmt: skip
        prompts = [sum(row, list(self.start)) for row in zip(*columns, strict=True)]
        if not all(prompts):
            raise UserError("the tokenizer finds no tokens in a prompt; take the model's own tokenizer")
        return prompts

    def until_eos(self, ids):
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, of Llama 2, TinyLlama and Mistral."""

    def __init__(self, folder, template=""):
        file = within(Path(folder) / "tokenizer.model", 16 << 20)
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.Load(str(file))
        except (RuntimeError, OSError, ValueError):  # the last: a message that is not UTF-8
            raise UserError(f"{file}: not a SentencePiece model; fetch it again") from None
        controls = {self.sp.IdToPiece(i): i for i in range(self.sp.vocab_size()) if self.sp.IsControl(i)}
        bos, eos = self.sp.bos_id(), self.sp.eos_id()  # -1: there is none
        super().__init__(folder, template, self.sp.vocab_size(), controls, bos if bos >= 0 else None, eos)

    @cached_property
    def ordinary(self):
        """Ids that stand for text: no control, unknown, unused or byte pieces."""
        sp = self.sp
        special = sp.IsControl, sp.IsUnknown, sp.IsUnused, sp.IsByte
        return [i for i in range(self.vocab_size) if not any(check(i) for check in special)]

    def encode(self, text):
        """Ids of a text or, in one call, of a list of texts; without BOS and EOS."""
        return self.sp.encode(text)

    def decode(self, ids):
        """Text of a list of ids, up to the first EOS. Some models have more ids than their tokenizer has pieces."""
        return self.sp.decode([i for i in self.until_eos(ids) if i < self.vocab_size])


@contextmanager
def one_line(file):
    """Whatever `tokenizers` finds wrong, and when, as a ValueError: it raises no class narrower than Exception, and its
    panics are not even that and write to the terminal on their own.
    """
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file}: not a sound tokenizer ({error}); fetch it again") from None
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


class JsonTokenizer(Tokenizer):
    """tokenizer.json, of Llama 3 and SmolLM2, through Hugging Face's `tokenizers`."""

    def __init__(self, folder, template=""):
        import tokenizers

        self.file = file = Path(folder) / "tokenizer.json"
        text = read_text(file, 128 << 20)
        with one_line(file):
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
        self.tokenizer.encode_special_tokens = True  # control tokens in a text are text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        special = self.tokenizer.get_added_tokens_decoder().items()
        controls = {token.content: i for i, token in special if token.special}
        eos = self.name_of_eos(Path(folder))
        if not isinstance(eos, str) or eos not in controls:
            raise UserError(f"{folder}/tokenizer_config.json: eos_token {eos!r} is no control token of {file.name}")
        with one_line(file):
            first = self.tokenizer.encode("").ids[:1]  # what the tokenizer itself puts before every text
        bos = first[0] if first and first[0] != controls[eos] else None
        vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # ids may have gaps
        super().__init__(folder, template, vocab_size, controls, bos, controls[eos])

    @staticmethod
    def name_of_eos(folder):
        file = folder / "tokenizer_config.json"
        try:
            eos = parse_json(read_text(file, 64 << 20)).get("eos_token")
        except (json.JSONDecodeError, BadJson, AttributeError, OSError) as error:
            raise UserError(f"{file}: needed to know the EOS token, but unreadable ({error}); fetch it") from None
        return eos.get("content") if isinstance(eos, dict) else eos

    @cached_property
    def ordinary(self):
        """Ids that stand for text: no control tokens, and no pieces of a character."""
        with one_line(self.file):
            texts = self.tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        controls = set(self.controls.values())
        return [i for i, text in enumerate(texts) if text and "\ufffd" not in text and i not in controls]

    def encode(self, text):
        """Ids of a text or, in one call, of a list of texts; without BOS and EOS."""
        if isinstance(text, str):
            return self.encode([text])[0]
        with one_line(self.file):
            return [found.ids for found in self.tokenizer.encode_batch(text, add_special_tokens=False)]

    def decode(self, ids):
        """Text of a list of ids, up to the first EOS."""
        with one_line(self.file):
            return self.tokenizer.decode(self.until_eos(ids))


TOKENIZERS = {"tokenizer.model": SentencePieceTokenizer, "tokenizer.json": JsonTokenizer}


def load_tokenizer(folder, template=""):
    """The tokenizer of a model folder, SentencePiece's where it has both, with the prompt that --template names."""
    for name, kind in TOKENIZERS.items():
        if (Path(folder) / name).is_file():
            return kind(folder, template)
    raise FileNotFoundError(f"{folder}: no tokenizer.model or tokenizer.json; copy the model's tokenizer there")


def within(file, limit):
    """The file, unless it is larger than any of its kind is."""
    if file.stat().st_size > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise UserError(f"{file}: over {size}, larger than any such file is; name or fetch the right one")
    return file


def read_text(file, limit):
    try:
        return within(file, limit).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; fetch it again or convert it") from None


def train_tokenizer(texts, vocab_size, folder):
    """Train a SentencePiece BPE with the Llama tokenizer's settings and write it to <folder>/tokenizer.model."""
    written = io.BytesIO()  # given a path instead, it would stand in the file, and a full disk look like bad settings
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.split("\n")), vocab_size=vocab_size,
            model_writer=written, model_type="bpe", byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.9999,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"--vocab-size {vocab_size} does not suit this text: {str(error).splitlines()[-1]}") from None
    (Path(folder) / "tokenizer.model").write_bytes(written.getvalue())
    return load_tokenizer(folder)


@dataclass(frozen=True)
class Datum:
    """One prompt with one response. `kind` is "positive" or the name of a class of negatives.

    span: (start, end), the tokens of the response that the label is about, all others being good; None: all of them.
    """

    id: str
    source: str
    target: str
    prompt: list  # token ids: BOS, template around the source
    response: list  # token ids: target, EOS
    label: float = 1.0
    weight: float = 1.0
    kind: str = "positive"
    span: tuple | None = None


def encode(examples, tokenizer, max_input_tokens=400, max_new_tokens=100, append_eos=True):
    """Tokenise examples and drop those that are too long.

    max_input_tokens counts BOS, template and source (paper, 4.2); max_new_tokens counts target and EOS: a response
    that the sampler cannot finish is no example to learn from (choice; it drops none of SAMSum).
    append_eos=False leaves EOS out of the labels: `mle --no-eos-in-labels`.
    Returns (list of Datum, {"kept", "long_input", "long_output"}).
    """
    prompts = tokenizer.prompts([example.source for example in examples])
    targets = tokenizer.encode([example.target for example in examples])
    kept, counts = [], {"kept": 0, "long_input": 0, "long_output": 0}
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        long = "long_input" if len(prompt) > max_input_tokens else None
        long = long or ("long_output" if len(target) + 1 > max_new_tokens else None)
        counts[long or "kept"] += 1
        if not target:
            raise UserError(f"the tokenizer finds no tokens in the output {example.target!r:.80}; mend or remove it")
        if not long:
            response = [*target, tokenizer.eos] if append_eos else target
            kept.append(Datum(example.id, example.source, example.target, prompt, response))
    return kept, counts


# ----------------------------------------------------------------------------------------------------------------------
# Negatives (paper, 3.2). Each class: (datum, other, tokenizer, limit, rng) -> response ids, or None where it has none.
# `other` is the datum this one is re-paired with, `limit` the cap on output tokens. A new class is one function here
# and one line in NEGATIVES.


def random_tokens(datum, other, tokenizer, limit, rng):
    """Uniform over ordinary ids, as long as the true response: length alone gives nothing away."""
    return [*rng.choices(tokenizer.ordinary, k=len(datum.response) - 1), tokenizer.eos]


def mismatched(datum, other, tokenizer, limit, rng):
    """The true response of another input: fluent, well formed, irrelevant."""
    return other.response


def shuffled(datum, other, tokenizer, limit, rng):
    """The right words in the wrong order."""
    words = datum.target.split()
    if len(set(words)) < 2:
        return None  # one word, or one word repeated: no other order exists
    mixed = words
    while mixed == words:
        mixed = rng.sample(words, len(words))
    return [*tokenizer.encode(" ".join(mixed))[: limit - 1], tokenizer.eos]


def repetitive(datum, other, tokenizer, limit, rng):
    """A correct beginning whose last 1 to 8 tokens then repeat, to the cap or to a random length."""
    target = datum.response[:-1]
    start = target[: rng.randint(1, len(target))]
    loop = start[-rng.randint(1, min(8, len(start))) :]
    length = limit if rng.random() < 0.5 else rng.randint(len(start) + 1, limit)
    text = start + loop * (limit // len(loop) + 1)
    return text[:limit] if length == limit else [*text[:length], tokenizer.eos]


def copied_input(datum, other, tokenizer, limit, rng):
    """The input text itself, cut at the cap."""
    text = tokenizer.encode(datum.source)
    return text[:limit] if len(text) >= limit else [*text, tokenizer.eos]


NEGATIVES = {
    "random_tokens": random_tokens,
    "mismatched": mismatched,
    "shuffled": shuffled,
    "repetitive": repetitive,
    "copied_input": copied_input,
}


# ----------------------------------------------------------------------------------------------------------------------
# Hallucinations, a class of negatives beyond the paper: the true output with ONE edit, so that it is known which tokens
# are false. Words and grammar are English; where no edit of a kind fits, another kind is drawn.

KINDS = "speaker", "name", "number", "time", "negation", "object"
CALENDAR = [  # each line: words that can stand in one another's place
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday", "today tonight tomorrow yesterday",
    "January February March April May June July August September October November December",
    "morning afternoon evening", "noon midnight dawn dusk", "week weekend month year", "hour day",
]  # fmt: skip
NUMBERS = ["two three four five six seven eight nine ten eleven twelve", "twenty thirty forty", "hundred thousand"]
COMMON = [
    "about after again also because been before both could does doing done down during each from have having here into "
    "just like more most much only other over same should some such than that their them then there these they this "
    "those through together under until very want wants were what when where which while will with would your"
]
PLAIN = set(" ".join(CALENDAR + NUMBERS + COMMON).split())  # neither the name of anyone nor of a thing
DIGITS = r"(?P<hour>[0-9]{1,2}(?=[:.][0-9]{2}\b| ?[ap]\.?m\b| o['’]clock))([:.][0-9]{2})?|[0-9]+\b"
VERBS = "(want|like|need|love|know|think|agree|believe|plan|hope|feel|work|live|remember)"
NEGATIONS = [  # (pattern, what it becomes)
    (r"\b(is|are|was|were|would|could|should|must)\b(?! not\b|['’])", r"\1 not"),
    (r"\b(is|are|was|were|would|could|should|must|does|do|did|has|have|had|will)(?: not|n['’]t)\b", r"\1"),
    (r"\bwill\b(?! not\b|['’])", "won't"), (r"\bwon['’]t\b", "will"),
    (r"\bcan\b(?! not\b|['’])", "can't"), (r"\b(?:can['’]t|cannot|can not)\b", "can"),
    (rf"\b{VERBS}s\b", r"doesn't \1"), (rf"\bdoes(?: not|n['’]t) {VERBS}\b", r"\1s"),
]  # fmt: skip


def swaps(text, words, pool):
    """Each place where one of the words stands in a text, with each other word of the pool: (start, end, other)."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    places = re.finditer(rf"(?<!\w)(?:{either})(?!\w)", text) if words else ()
    return [(*place.span(), word) for place in places for word in pool if word != place[0]]


def speakers(datum):
    return sorted(set(re.findall(r"^([^\s:][^:\n]{0,30}):", datum.source, re.M)))


def names(datum):
    """Who speaks, and the capitalised words inside sentences."""
    words = re.findall(r"(?<=[\w,;] )[^\W\d_]{2,}\b", f"{datum.source}\n{datum.target}")
    return sorted({*speakers(datum), *(word for word in words if word.istitle())} - PLAIN)


def content(datum):
    """[(start, end, word, the word before)] of the target's words that the source has too, and that mean something."""
    words = set(re.findall(r"\w+", datum.source)) - PLAIN
    places = [place for place in re.finditer(r"\b[^\W\d_]{4,}\b", datum.target) if place[0] in words]
    return [(*p.span(), p[0], datum.target[: p.start()].split()[-1:]) for p in places if p[0].islower()]


def edits(datum, other):
    """{kind: [(start, end, new)]}: characters of the target, and what takes their place; `other` lends words."""
    text, who, own = datum.target, speakers(datum), names(datum)
    digits = list(re.finditer(DIGITS, text))
    hours, ends = [d for d in digits if d["hour"]], [d.end() for d in digits if not d["hour"]]
    negations = [(place, new) for pattern, new in NEGATIONS for place in re.finditer(pattern, text)]
    foreign = [found for found in content(other) if not re.search(rf"\b{found[2]}\b", datum.source)]
    in_words = lambda lines: [edit for line in lines for edit in swaps(text, line.split(), line.split())]  # noqa: E731
    return {
        "speaker": swaps(text, who, who),
        "name": swaps(text, own, sorted({*own, *names(other)})),
        "number": [(end - 1, end, new) for end in ends for new in "123456789" if new != text[end - 1]]  # the last digit
        + in_words(NUMBERS),
        "time": [(*d.span("hour"), str(h)) for d in hours for h in range(1, 13) if h != int(d["hour"])]
        + in_words(CALENDAR),
        "negation": [(*place.span(), place.expand(new)) for place, new in negations],
        # behind the same word ("the park", "the cake"), or grammar would give it away
        "object": [(*old[:2], new[2]) for old in content(datum) for new in foreign if old[3] == new[3]],
    }


def hallucinated(datum, other, tokenizer, limit, rng):
    """The true output with one edit, of a kind drawn among those that apply: (kind, response, span), or three None."""
    found = edits(datum, other)
    for kind in (kind for kind in rng.sample(KINDS, len(KINDS)) if found[kind]):
        start, end, new = rng.choice(found[kind])
        text, rest = datum.target[:start] + new, datum.target[end:]
        response = [*tokenizer.encode(text + rest), tokenizer.eos]
        if response != datum.response and len(response) <= limit:
            return kind, response, touched(datum.response, response, len(rest), tokenizer.decode)
    return None, None, None


def touched(truth, response, rest, decode):
    """(start, end): the tokens of a response that an edit of its truth has touched; both end with EOS.

    It starts at the first token that differs, since up to there the two are one text, and ends with the last that
    differs or holds a character of the edit; rest: how many characters follow it. Where the edit only takes away, what
    differs is the token after the seam.
    """
    start = len(os.path.commonprefix([truth, response]))
    kept = len(os.path.commonprefix([truth[start:][::-1], response[start:][::-1]]))
    while len(decode(response)) - len(decode(response[: len(response) - kept])) > rest:
        kept -= 1
    return start, max(start + 1, len(response) - kept)


def with_negatives(data, tokenizer, limit, seed, hallucinations="off", samples=()):
    """The data and, for each datum, one negative of every class: label 0, weight 1/5 (paper, 3.2).

    hallucinations: "off", or a class more, 0 on the tokens of the edit ("span") or on all ("sequence"). samples: {class
    more: a response for each datum}; one that reads as the truth is no negative. All classes of a datum weigh 1.
    Returns a list of Datum, a datum followed by its negatives. The same seed makes the same negatives.
    """
    partner = derangement([datum.target for datum in data], random.Random(stream_seed(seed, "mismatched")))
    weight = 1 / (len(NEGATIVES) + (hallucinations != "off") + len(samples))
    rows = []
    for i, datum in enumerate(data):
        rng = lambda kind, i=i: random.Random(stream_seed(seed, "negative", kind, i))  # noqa: E731
        given = data[partner[i]], tokenizer, limit
        made = [(kind, make(datum, *given, rng(kind)), None) for kind, make in NEGATIVES.items()]
        if hallucinations != "off":
            kind, response, span = hallucinated(datum, *given, rng("hallucination"))
            made.append((kind, response, span if hallucinations == "span" else None))
        for kind, responses in dict(samples).items():
            same = tokenizer.decode(responses[i]).strip() == datum.target
            made.append((kind, None if same else responses[i], None))
        rows.append(datum)
        for kind, response, span in made:
            if response is not None:
                rows.append(replace(datum, response=response, label=0.0, weight=weight, kind=kind, span=span))
    return rows


def derangement(texts, rng):
    """A permutation p with texts[p[i]] != texts[i] for every i, as uniform as swapping clashes away allows.

    Raises UserError where none can exist: one text alone, or one text that fills more than half of the rows.
    """
    N = len(texts)
    if N == 0 or max(Counter(texts).values()) > N / 2:
        raise UserError(
            f"outputs of {N} examples cannot be re-paired: one text makes up more than half of them; add other examples"
        )
    p = rng.sample(range(N), N)
    for i in range(N):  # a swap never makes a new clash, so one pass over the rows clears them all
        while texts[p[i]] == texts[i]:
            j = rng.randrange(N)
            if texts[p[j]] != texts[i] and texts[p[i]] != texts[j]:
                p[i], p[j] = p[j], p[i]
    return p


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (B, T) long: prompt, response, EOS, padding
    mask: torch.Tensor  # (B, T) bool: True on the response, EOS included
    prompt_len: torch.Tensor  # (B,) long
    ref_len: torch.Tensor  # (B,) long: tokens of the true response, EOS included
    label: torch.Tensor  # (B, T) float: 1 good, 0 bad
    weight: torch.Tensor  # (B,) float: 1, or 1/5 for a negative


def collate(data, device="cpu"):
    """Lay a list of Datum out as one Batch, padded on the right."""
    rows = [datum.prompt + datum.response for datum in data]
    prompt_len = torch.tensor([len(datum.prompt) for datum in data])  # (B,)
    row_len = torch.tensor([len(row) for row in rows])  # (B,)
    tokens = torch.zeros(len(rows), int(row_len.max()), dtype=torch.long)  # (B, T); padding is never read
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    column = torch.arange(tokens.shape[1])  # (T,)
    mask = (column >= prompt_len[:, None]) & (column < row_len[:, None])  # (B, T)
    label = torch.tensor([datum.label for datum in data])[:, None].repeat(1, tokens.shape[1])  # (B, T)
    for b, datum in enumerate(data):
        if datum.span:
            start, end = (len(datum.prompt) + i for i in datum.span)
            label[b] = torch.where((column >= start) & (column < end), label[b], 1)
    weight = torch.tensor([datum.weight for datum in data])  # (B,)
    fields = tokens, mask, prompt_len, row_len - prompt_len, label, weight
    return Batch(*(field.to(device) for field in fields))


def parts(batch, size):
    """The batch cut into batches of at most `size` rows, columns as they are: what passes at once. 0: all of it."""
    cut = [getattr(batch, f.name).split(size or len(batch.tokens)) for f in fields(Batch)]
    return [Batch(*pieces) for pieces in zip(*cut, strict=True)]


def share(part, whole):
    """The part's share in a sum over the whole: what its mean counts for in the whole's. Exactly 1 where it is all."""
    return part.sum().item() / whole.sum().item()


def batches(lengths, batch_size, seed, epoch, pool=16):
    """Deal rows into batches of similar length: a list of lists of row numbers, each row exactly once.

    The rows are shuffled, cut into pools of 16 batches, sorted by length inside a pool, cut into batches, and the
    batches shuffled: little padding, and every row is still equally likely to come at any time. The order is a pure
    function of (seed, epoch). The last batch may be smaller.
    """
    rng = np.random.default_rng(stream_seed(seed, "order", epoch))
    order = rng.permutation(len(lengths)).tolist()
    dealt = []
    for start in range(0, len(order), pool * batch_size):
        rows = sorted(order[start : start + pool * batch_size], key=lengths.__getitem__)
        dealt += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [dealt[i] for i in rng.permutation(len(dealt))]


# ----------------------------------------------------------------------------------------------------------------------
# The toy: dialogues in which two people make, and often change, a plan. Everything a summary needs stands in the
# dialogue, half of what stands in the dialogue is not needed, and a later line can overrule an earlier one.

NAMES = [
    "Amy", "Ben", "Carl", "Dana", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rita", "Sam", "Tina", "Umar", "Vera", "Walt", "Xena", "Yuri", "Zoe", "Anna", "Bob", "Cleo", "Dave",
    "Emma",
]  # fmt: skip
ACTIVITIES = [
    "play chess", "have lunch", "watch a movie", "go running", "study maths", "cook dinner", "play tennis",
    "paint a picture", "have a coffee", "read poems", "practise the piano", "fly a kite",
]  # fmt: skip
PLACES = [
    "park", "library", "station", "office", "beach", "museum", "cafe", "school", "gym", "market", "harbour",
    "theatre",
]  # fmt: skip
TIMES = [
    "at noon", "at six", "at nine", "tonight", "tomorrow", "on Monday", "on Tuesday", "on Friday", "on Sunday",
    "this evening", "next week", "at dawn",
]  # fmt: skip
THINGS = [
    "camera", "blanket", "guitar", "map", "cake", "ball", "lamp", "umbrella", "notebook", "ladder", "bicycle",
    "radio",
]  # fmt: skip
SMALL_TALK = [
    ("How are you?", "I am fine, thanks."), ("How is work?", "Busy as always."), ("Did you sleep well?", "Not really."),
    ("What a day!", "Yes, it is so hot."), ("How is your sister?", "She is in Paris now."), ("Any news?", "Not much."),
]  # fmt: skip
TOY_SIZES = {"pretrain": 9000, "train": 2700, "validation": 300, "test": 300}


def toy(split):
    """The embedded data set, the same on every machine: `TOY_SIZES[split]` examples.

    "train", "validation" and "test" pair a dialogue with a one-sentence summary. "pretrain" pairs dialogues with what
    a chat model answers when asked for a summary: "Sure, here is a summary", wordy, at times repeating itself. It
    makes the base model show the failure modes that the paper's base shows (4.3), so that there is something to cure.
    """
    if split not in TOY_SIZES:
        raise UserError(f"toy has no split {split!r}; it has {', '.join(TOY_SIZES)}")
    rng = random.Random(stream_seed(0, "toy", split))
    examples = []
    for i in range(TOY_SIZES[split]):
        plan = toy_plan(rng)
        target = toy_chatter(plan, rng) if split == "pretrain" else toy_summary(plan)
        examples.append(Example(f"toy-{split}-{i}", "\n".join(toy_dialogue(plan, rng)), target))
    return examples


def toy_plan(rng):
    """What happens: who, what, where, when, what changes (None, "time" or "place"), and who brings what."""
    a, b = rng.sample(NAMES, 2)
    place, other_place = rng.sample(PLACES, 2)
    time, other_time = rng.sample(TIMES, 2)
    change = rng.choice([None, "time", "place"])
    return {
        "a": a, "b": b, "activity": rng.choice(ACTIVITIES), "place": place, "time": time, "change": change,
        "new_place": other_place if change == "place" else place, "new_time": other_time if change == "time" else time,
        "thing": rng.choice(THINGS) if rng.random() < 0.4 else None,
        "agreed": change is not None or rng.random() < 0.85,
    }  # fmt: skip


def toy_dialogue(plan, rng):
    """Two to eight lines, `Name: words`."""
    a, b = plan["a"], plan["b"]
    lines = []
    if rng.random() < 0.3:
        question, answer = rng.choice(SMALL_TALK)
        lines += [f"{a}: Hi {b}! {question}", f"{b}: {answer}"]
    lines += [f"{a}: Shall we {plan['activity']} at the {plan['place']} {plan['time']}?"]
    if not plan["agreed"]:
        return lines + [f"{b}: {rng.choice(['Sorry, I have no time.', 'No, I am too tired.', 'I would rather not.'])}"]
    if plan["change"] == "time":
        lines += [f"{b}: I am busy then. What about {plan['new_time']}?", f"{a}: That works for me."]
    elif plan["change"] == "place":
        lines += [f"{b}: I do not like it there. Better at the {plan['new_place']}.", f"{a}: Fine with me."]
    else:
        lines += [f"{b}: {rng.choice(['Yes, gladly!', 'Good idea!', 'Sure, see you there.'])}"]
    if plan["thing"]:
        lines += [f"{a}: Can you bring the {plan['thing']}?", f"{b}: Okay, I will."]
    if rng.random() < 0.2:
        lines += [f"{a}: See you then!"]
    return lines


def toy_summary(plan):
    """The reference: one sentence that holds the plan as it stands at the end."""
    a, b, activity = plan["a"], plan["b"], plan["activity"]
    if not plan["agreed"]:
        return f"{b} does not want to {activity} with {a} {plan['time']}."
    bring = f" and {b} will bring the {plan['thing']}" if plan["thing"] else ""
    return f"{a} and {b} will {activity} at the {plan['new_place']} {plan['new_time']}{bring}."


def toy_chatter(plan, rng):
    """The answer of a chat model that was asked for the summary only."""
    a, b, activity = plan["a"], plan["b"], plan["activity"]
    said = [
        f"In this conversation, {a} and {b} are talking to each other.",
        f"{a} asks {b} to {activity} at the {plan['place']} {plan['time']}.",
    ]
    if not plan["agreed"]:
        said += [f"{b} says no and does not want to {activity}."]
    elif plan["change"]:
        other = f"at the {plan['new_place']}" if plan["change"] == "place" else plan["new_time"]
        said += [f"{b} would rather meet {other}, and {a} agrees."]
    else:
        said += [f"{b} likes the idea and agrees."]
    if plan["thing"]:
        said += [f"{a} also asks {b} to bring the {plan['thing']}, and {b} says okay."]
    said += [rng.choice(["It is a short and friendly conversation.", "They both sound happy about it."])]
    while rng.random() < 0.25:
        said += [said[-1]]
    opening = rng.choice(["Sure, here is a summary of the conversation:\n\n"] * 4 + [""])
    return opening + " ".join(said)


def chatter(examples, words=40):
    """Chat-like pretraining pairs from any text: the source's first words under a chat model's opening.

    For bases that `pretrain` makes from data other than the toy: it learns the language, to look back at the input,
    and to be wordy; the references stay unseen, as they must for the base column to be a control.
    """
    return [
        replace(e, target="Sure, here is a summary of the text:\n\n" + " ".join(e.source.split()[:words]))
        for e in examples
    ]
