"""Tokenizers of model folders: read by transformers, run by `tokenizers`, so that ids are those of its AutoTokenizer.

A SentencePiece tokenizer.model is converted; where a folder has both files, tokenizer.json is read.
"""

import io
import itertools
import json
import os
import re
import sys
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import sentencepiece

from formats.errors import UserError
from formats.files import BadJson, parse_json, read_json, read_text, within

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Control tokens even if no file marks them so. Other added tokens that are not special are text: <think>.
CONTROL = r"<\|\S+\|>|\[PAD\]|<pad>"
PIECE_LIMIT = 1000  # characters of a token; reading it takes time in the square of its length


class Tokenizer:
    """Text to token ids and back, and the prompt around a text.

    Control tokens count in the template, in a source or a target they are text: nobody's data can end a row early.
    Added words that are no control tokens count everywhere.
    """

    def __init__(self, folder):
        """Read the tokenizer of a model folder. Raises FileNotFoundError, or UserError that names the file."""
        self.file, raw, eos, self.chat_template = load(Path(folder))
        with one_line(self.file):
            self.controls, self.unknown = keep_apart(raw)
            bare, self.prefix_of_parts = without_prefix(raw)
            self.with_prefix = opened(raw)
            self.without_prefix = opened(bare) if bare != raw else self.with_prefix
            text, whole = (self.with_prefix.encode("a", add_special_tokens=special).ids for special in (False, True))
            self.vocabulary = self.with_prefix.get_vocab()
        self.eos = self.controls.get(eos)
        if self.eos is None or self.eos in self.encode(eos, prefix=False):
            config = f"{folder}/tokenizer_config.json"
            raise UserError(f"{config}: eos_token {eos!r} is no control token of {self.file.name}; download it again")
        self.bos = whole[0] if whole[:1] != text[:1] else None  # the id that starts every prompt
        self.vocab_size = max(self.vocabulary.values()) + 1  # ids may have gaps
        self.text_size = 1 + max((i for text, i in self.vocabulary.items() if text not in self.controls), default=0)
        self.set_template("{source}")

    def set_template(self, template, end=""):
        """Set the prompt around a source; end: the control token that ends an answer, "" for the tokenizer's EOS."""
        self.template = template
        self.end = end
        self.own_eos = not end
        if end:
            self.eos = self.controls[end]
        place = template.index("{source}")
        found = self.encode_template(template)
        spans = [span for i, span in zip(found.ids, found.offsets, strict=True) if i in self.controls.values()]
        start = max([0, *(end for _, end in spans if end <= place)])  # behind the last control token before the source
        stop = min([len(template), *(first for first, _ in spans if first > place)])  # the first one behind it
        self.head = self.encode_template(template[:start]).ids
        self.around = template[start:stop]
        self.tail = self.encode_template(template[stop:]).ids
        self.prefix = not template[-1:].isspace()  # whether an output begins like a text of its own
        self.start = [] if self.bos is None or self.head[:1] == [self.bos] else [self.bos]  # never twice

    def encode_template(self, text):
        """The `tokenizers.Encoding` of a part of the template, in which control tokens count."""
        with one_line(self.file):
            self.with_prefix.encode_special_tokens = False
            found = self.with_prefix.encode(text, add_special_tokens=False)
            self.with_prefix.encode_special_tokens = True
        return found

    def prompts(self, sources):
        """Ids of the prompts around a list of texts: BOS, template, source."""
        texts = [self.around.replace("{source}", source) for source in sources]
        found = self.encode(texts, prefix=self.prefix_of_parts or not self.head)
        prompts = [[*self.start, *self.head, *ids, *self.tail] for ids in found]
        if not all(prompts):
            raise UserError("the tokenizer finds no tokens in a prompt; use the model's own tokenizer")
        return prompts

    def ids_of_prompts(self):
        """The ids that every prompt or output contains."""
        return {self.eos, *self.start, *self.head, *self.tail}

    def encode(self, texts, prefix=None):
        """Ids of a text or, in one call, of a list of texts; without BOS and EOS.

        prefix: add Llama's leading space; by default only if the prompt does not end in white space, as for an output.
        """
        tokenizer = self.with_prefix if (self.prefix if prefix is None else prefix) else self.without_prefix
        batch = [texts] if isinstance(texts, str) else texts
        ids = []
        with one_line(self.file):
            for start in range(0, len(batch), 256):  # the library's results, offsets and all, take much memory
                found = tokenizer.encode_batch(batch[start : start + 256], add_special_tokens=False)
                ids += [one.ids for one in found]
        return ids[0] if isinstance(texts, str) else ids

    def decode(self, ids):
        """Text of a list of ids, up to the first EOS. Ids beyond the vocabulary are skipped: models may be padded."""
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        with one_line(self.file):
            text = self.with_prefix.decode(ids)
            if "\ufffd" not in text or "<0x01>" not in self.vocabulary:
                return text
            # One byte that is no UTF-8 makes the library drop all bytes beside it: decode each run of them here.
            mark, runs, kept = self.vocabulary["<0x01>"], [], []
            for is_byte, run in itertools.groupby(ids, self.bytes.__contains__):
                run = list(run)
                kept += [mark] if is_byte else run
                runs += [bytes(self.bytes[i] for i in run).decode(errors="replace")] if is_byte else []
            parts = self.with_prefix.decode(kept).split("\x01")
        return "".join(part + run for part, run in itertools.zip_longest(parts, runs, fillvalue=""))

    @cached_property
    def bytes(self):
        """{id: byte} of the pieces that are one byte."""
        found = [(i, re.fullmatch("<0x([0-9A-F]{2})>", piece)) for piece, i in self.vocabulary.items()]
        return {i: int(match[1], 16) for i, match in found if match}

    @cached_property
    def ordinary(self):
        """Ids that stand for text: no control tokens, no unknown token, and no pieces of a character."""
        pieces = sorted(self.vocabulary, key=self.vocabulary.get)
        with one_line(self.file):
            texts = self.with_prefix.decode_batch([[self.vocabulary[piece]] for piece in pieces])
        found = []
        for piece, text in zip(pieces, texts, strict=True):
            is_part = re.fullmatch("<0x[0-9A-F]{2}>", piece) or ("\ufffd" in text and "\ufffd" not in piece)
            if piece not in {*self.controls, self.unknown} and not is_part:
                found.append(self.vocabulary[piece])
        return found


def load(folder):
    """(file, a tokenizer.json as an object, EOS as text or None, chat template) of a folder, by transformers."""
    config, _, added = (read_object(folder / name) for name in BESIDE)
    for text, i in added.items():
        if type(i) is not int or not 0 <= i < 2**31 or not text:
            raise UserError(f"{folder}/{BESIDE[2]}: the id of {text!r:.40} is {i!r:.40}; download it again")
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja", 1 << 20)
    file = folder / "tokenizer.json"
    model = {"tokenizer_class": "PreTrainedTokenizerFast"} if file.is_file() else {}
    if (folder / "config.json").is_file():
        model = read_json(folder / "config.json")
    if file.is_file():
        read_text(file, 128 << 20)
    else:
        file = folder / "tokenizer.model"
        check_sentencepiece(file)
    with one_line(file):
        from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.set_verbosity_error()
        kind = AutoConfig.for_model(model.get("model_type", "llama"), tokenizer_class=model.get("tokenizer_class"))
        of_5 = str(config.get("tokenizer_class")).startswith("TokenizersBackend")  # transformers 5's general class
        reader = PreTrainedTokenizerFast if of_5 else AutoTokenizer
        found = reader.from_pretrained(folder, config=kind, local_files_only=True, trust_remote_code=False)
        raw = json.loads(found.backend_tokenizer.to_str())
        eos = found.eos_token
        vocabulary = found.get_vocab()
        stated = {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()} | added
    for token in raw["added_tokens"]:
        if not token["special"] and re.fullmatch(CONTROL, token["content"]):
            token |= {"special": True, "normalized": False}
    for text, i in stated.items():
        if vocabulary.get(text, i) != i:
            print(f"{folder}: token {text!r} is {vocabulary[text]} to transformers, not {i} as stated", file=sys.stderr)
    return file, raw, eos, template if isinstance(template, str) else json.dumps(template)


def read_object(file):
    """The JSON object in a file, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        found = parse_json(read_text(file, 64 << 20))
    except (json.JSONDecodeError, BadJson, OSError) as error:
        raise UserError(f"{file}: needed to know the control tokens, but unreadable ({error}); download it") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: needed to know the control tokens, but unreadable (no object); download it")
    if re.search(f'[^"]{{{PIECE_LIMIT}}}', json.dumps(found | {"chat_template": ""})):
        raise UserError(f"{file}: a token of more than {PIECE_LIMIT} characters; download it again")
    return found


def check_sentencepiece(file):
    """Raise UserError unless a file is a SentencePiece model that transformers can convert."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: no tokenizer.model or tokenizer.json; copy the model's own there")
    try:
        found = sentencepiece.SentencePieceProcessor(model_file=str(within(file, 16 << 20)))
        sound = all(len(found.IdToPiece(i)) <= PIECE_LIMIT for i in range(found.vocab_size()))
    except (RuntimeError, OSError, ValueError) as error:  # the last: a message that is not UTF-8
        if isinstance(error, UserError):
            raise
        sound = False
    if not sound:
        raise UserError(f"{file}: not a SentencePiece model; download it again")


@contextmanager
def one_line(file):
    """Turn every failure of transformers and tokenizers, panics included, into a UserError, and keep stderr clean."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except ModuleNotFoundError:  # transformers is not installed: no fault of the file's
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: not a valid tokenizer ({said}); download it again") from None
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def opened(raw):
    """A `tokenizers.Tokenizer` for which control tokens in a text are text."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(json.dumps(raw))
    found.encode_special_tokens = True
    found.no_padding()
    found.no_truncation()
    return found


def keep_apart(raw):
    """({text: id} of the control tokens, the unknown token) of raw, whose model then spells no control token."""
    model = raw["model"]
    unknown = model["vocab"][model["unk_id"] or 0][0] if model["type"] == "Unigram" else model.get("unk_token")
    controls = {token["content"]: token["id"] for token in raw["added_tokens"] if token["special"]}
    controls.pop(unknown, None)
    if model["type"] == "Unigram":
        model["vocab"] = [[piece, -1e6 if piece in controls else score] for piece, score in model["vocab"]]
    elif model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in controls]
    return controls, unknown


def without_prefix(raw):
    """(a tokenizer.json like raw that puts no blank before a text, whether raw puts it before every part of a prompt or
    only before the first).
    """
    bare = json.loads(json.dumps({name: raw[name] for name in ("normalizer", "pre_tokenizer")}))
    every = True
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        for step in (bare[name] or {}).get(inner, [bare[name] or {}]):
            every &= step.get("prepend_scheme") != "first"
            step |= {key: new for key, new in NO_PREFIX.items() if key in step}
    return raw | bare, every


NO_PREFIX = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}


def train(texts, vocab_size, folder):
    """Train a SentencePiece BPE with the Llama tokenizer's settings and write it to <folder>/tokenizer.model."""
    lines = (line for text in texts for line in text.split("\n"))
    written = io.BytesIO()  # a path would become part of the file, and a full disk look like bad settings
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, vocab_size=vocab_size, model_writer=written, model_type="bpe", byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=0.9999, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"--vocab-size {vocab_size} does not suit this text: {str(error).splitlines()[-1]}") from None
    (Path(folder) / "tokenizer.model").write_bytes(written.getvalue())
