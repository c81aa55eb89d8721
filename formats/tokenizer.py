"""Tokenizers of model folders: SentencePiece's tokenizer.model, and tokenizer.json of Hugging Face's `tokenizers`."""

import io
import json
import os
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import sentencepiece

from formats.errors import UserError
from formats.files import BadJson, parse_json, read_text, within


class Tokenizer:
    """Text to token ids and back, and the prompt around a text: what both file formats share.

    Control tokens count in the template, in a source or a target they are text: nobody's data can end a row early.
    """

    def __init__(self, vocab_size, controls, bos, eos):
        """controls: {text: id} of the control tokens; bos: id that starts every prompt, or None; eos: ends a target."""
        self.vocab_size = vocab_size
        self.controls = controls
        self.bos = bos
        self.eos = eos
        self.set_template("{source}")

    def set_template(self, template, end=""):
        """Set the prompt around a source; end: the control token that ends an answer, "" for the tokenizer's EOS."""
        self.template = template
        self.end = end
        self.own_eos = not end
        if end:
            self.eos = self.controls[end]
        texts = sorted(filter(None, self.controls), key=len, reverse=True)
        pattern = "|".join(re.escape(text) for text in texts)
        self.parts = [part for part in re.split(f"({pattern})", template) if part]
        has_bos = self.controls.get(self.parts[0]) == self.bos
        self.start = [] if self.bos is None or has_bos else [self.bos]  # never twice

    def prompts(self, sources):
        """Ids of the prompts around a list of texts: BOS, template, source."""
        prompts = [list(self.start) for _ in sources]
        for part in self.parts:
            if part in self.controls:
                found = [[self.controls[part]]] * len(sources)
            else:
                found = self.encode([part.replace("{source}", source) for source in sources])
            for prompt, ids in zip(prompts, found, strict=True):
                prompt += ids
        if not all(prompts):
            raise UserError("the tokenizer finds no tokens in a prompt; use the model's own tokenizer")
        return prompts

    def strip_eos(self, ids):
        """The ids before the first EOS."""
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, of Llama 2, TinyLlama and Mistral."""

    def __init__(self, folder):
        file = within(Path(folder) / "tokenizer.model", 16 << 20)
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.Load(str(file))
        except (RuntimeError, OSError, ValueError):  # the last: a message that is not UTF-8
            raise UserError(f"{file}: not a SentencePiece model; download it again") from None
        controls = {self.sp.IdToPiece(i): i for i in range(self.sp.vocab_size()) if self.sp.IsControl(i)}
        bos, eos = self.sp.bos_id(), self.sp.eos_id()  # -1: there is none
        super().__init__(self.sp.vocab_size(), controls, bos if bos >= 0 else None, eos)

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
        return self.sp.decode([i for i in self.strip_eos(ids) if i < self.vocab_size])


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
        raise UserError(f"{file}: not a valid tokenizer ({error}); download it again") from None
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


class JsonTokenizer(Tokenizer):
    """tokenizer.json, of Llama 3 and SmolLM2, through Hugging Face's `tokenizers`."""

    def __init__(self, folder):
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
        super().__init__(vocab_size, controls, bos, controls[eos])

    @staticmethod
    def name_of_eos(folder):
        file = folder / "tokenizer_config.json"
        try:
            eos = parse_json(read_text(file, 64 << 20)).get("eos_token")
        except (json.JSONDecodeError, BadJson, AttributeError, OSError) as error:
            raise UserError(f"{file}: needed to know the EOS token, but unreadable ({error}); download it") from None
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
            return self.tokenizer.decode(self.strip_eos(ids))


TOKENIZERS = {"tokenizer.model": SentencePieceTokenizer, "tokenizer.json": JsonTokenizer}


def read(folder):
    """The tokenizer of a model folder, SentencePiece's where it has both."""
    for name, kind in TOKENIZERS.items():
        if (Path(folder) / name).is_file():
            return kind(folder)
    raise FileNotFoundError(f"{folder}: no tokenizer.model or tokenizer.json; copy the model's tokenizer there")


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
