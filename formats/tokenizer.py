"""Tokenizers of model folders: tokenizer.json of Hugging Face's `tokenizers`, and SentencePiece's tokenizer.model.

What a control token is, where a text ends and whether BOS comes first is also said by the files beside them, see
`Beside`. Where a folder has both, tokenizer.json is read: fine-tuned models add their tokens there.
"""

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

# Classes of transformers that put BOS first unless add_bos_token is false, whatever the post-processor does.
LLAMA_CLASSES = {
    "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast",
    "GemmaTokenizer", "GemmaTokenizerFast",
}  # fmt: skip


class Beside:
    """What the files beside a tokenizer say of its special tokens.

    config: tokenizer_config.json. added: {text: id} of tokens beyond the vocabulary, from there and from
    added_tokens.json. named: the texts that config or special_tokens_map.json give a role. template: the chat template,
    which is never run.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.config = read_object(folder / "tokenizer_config.json")
        self.map = read_object(folder / "special_tokens_map.json")
        self.added = {}
        decoder = self.config.get("added_tokens_decoder")
        for i, token in decoder.items() if isinstance(decoder, dict) else ():
            if i.isdecimal() and len(i) < 10 and text_of(token):
                self.added[text_of(token)] = int(i)
        file = folder / "added_tokens.json"
        for text, i in read_object(file).items():
            if type(i) is not int or not 0 <= i < 2**31 or not text:
                raise UserError(f"{file}: the id of {text!r:.40} is {i!r:.40}; download it again")
            self.added[text] = i
        self.named = set()
        for said in (self.map, self.config):
            more = said.get("additional_special_tokens")
            values = [value for name, value in said.items() if name.endswith("_token")]
            values += more if isinstance(more, list) else []
            self.named |= {text_of(value) for value in values} - {None}
        file = folder / "chat_template.jinja"
        found = read_text(file, 1 << 20) if file.is_file() else self.config.get("chat_template")
        self.template = found if isinstance(found, str) else json.dumps(found)

    def token(self, role):
        """The text that has a role, for example "eos_token"; whatever is there in its place, None included."""
        value = self.config.get(role)
        value = self.map.get(role) if value is None else value
        return text_of(value) or value

    def is_control(self, text):
        """Whether a token is no text: it is named, or it reads <|…|>, or <…> or […] and is in the chat template."""
        in_template = re.fullmatch(r"<\S+>|\[\S+\]", text) and text in self.template
        return bool(text in self.named or re.fullmatch(r"<\|\S+\|>", text) or in_template)


def text_of(token):
    """The text of a token that is spelled as a text or, by older transformers, as a dict around it; else None."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


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
    return found


class Tokenizer:
    """Text to token ids and back, and the prompt around a text: what both file formats share.

    Control tokens count in the template, in a source or a target they are text: nobody's data can end a row early.
    """

    def __init__(self, vocab_size, controls, bos, eos, chat_template=""):
        """controls: {text: id} of the control tokens; bos: id that starts every prompt, or None; eos: ends a target.

        chat_template: the folder's Jinja template, which is looked at and never run.
        """
        self.chat_template = chat_template
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
        self.parts = [part for part in re.split(f"({pattern})", template) if part] if texts else [template]
        self.prefix = not template[-1:].isspace()  # whether an output begins like a text of its own
        has_bos = self.controls.get(self.parts[0]) == self.bos
        self.start = [] if self.bos is None or has_bos else [self.bos]  # never twice

    def prompts(self, sources):
        """Ids of the prompts around a list of texts: BOS, template, source."""
        prompts = [list(self.start) for _ in sources]
        for n, part in enumerate(self.parts):
            if part in self.controls:
                found = [[self.controls[part]]] * len(sources)
            else:
                texts = [part.replace("{source}", source) for source in sources]
                found = self.encode(texts, prefix=n == 0 or self.prefix_of_parts)
            for prompt, ids in zip(prompts, found, strict=True):
                prompt += ids
        if not all(prompts):
            raise UserError("the tokenizer finds no tokens in a prompt; use the model's own tokenizer")
        return prompts

    def encode(self, texts, prefix=None):
        """Ids of a text or, in one call, of a list of texts; without BOS and EOS.

        prefix: whether the blank is put first that Llama's tokenizers put before a text; by default as for an output:
        not behind a prompt that ends in white space, where a model of this prompt does not write it either.
        """
        processor = self.with_prefix if (self.prefix if prefix is None else prefix) else self.without_prefix
        if isinstance(texts, str):
            return self.encode_batch(processor, [texts])[0]
        return self.encode_batch(processor, texts)

    def ids_of_prompts(self):
        """The special ids that prompts and outputs contain."""
        ids = {self.eos, *self.start}
        return ids | {self.controls[part] for part in self.parts if part in self.controls}

    def strip_eos(self, ids):
        """The ids before the first EOS."""
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


# ----------------------------------------------------------------------------------------------------------------------
# SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model, of Llama 2, TinyLlama, Mistral and Yi, with the tokens that files beside it add.

    All of the added ones are control tokens here: what a prompt may contain and data may not.
    """

    def __init__(self, folder):
        file = within(Path(folder) / "tokenizer.model", 16 << 20)
        beside = Beside(folder)
        self.sp = self.open(file, beside)
        pieces = {self.sp.IdToPiece(i): i for i in range(self.sp.vocab_size()) if self.sp.IsControl(i)}
        beyond = {text: i for text, i in beside.added.items() if i >= self.sp.vocab_size()}
        controls = pieces | beyond
        bos = controls.get(beside.token("bos_token"), self.sp.bos_id())  # -1: there is none
        if bos < 0 or beside.config.get("add_bos_token", True) is False:
            bos = None
        eos = controls.get(beside.token("eos_token"), self.sp.eos_id())
        self.with_prefix = self.sp
        proto = self.sp.serialized_model_proto() + NO_DUMMY_PREFIX
        self.without_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.prefix_of_parts = beside.config.get("legacy") is not False  # transformers' word for it
        super().__init__(self.sp.vocab_size(), controls, bos, eos, beside.template)

    @staticmethod
    def open(file, beside):
        """The processor of a file, in which user-defined pieces that are control tokens match no text any more."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.Load(str(file))
        except (RuntimeError, OSError, ValueError):  # the last: a message that is not UTF-8
            raise UserError(f"{file}: not a SentencePiece model; download it again") from None
        proto = bytearray(file.read_bytes())
        try:
            places = [place for text, place in user_defined_pieces(proto) if beside.is_control(text)]
        except IndexError:
            raise UserError(f"{file}: not a SentencePiece model; download it again") from None
        for place in places:
            proto[place] = CONTROL
        if places:
            processor = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
        return processor

    @cached_property
    def ordinary(self):
        """Ids that stand for text: no control, unknown, unused or byte pieces."""
        sp = self.sp
        special = sp.IsControl, sp.IsUnknown, sp.IsUnused, sp.IsByte
        return [i for i in range(self.vocab_size) if not any(check(i) for check in special)]

    @property
    def text_size(self):
        """The ids of text are below this."""
        return self.vocab_size

    def encode_batch(self, processor, texts):
        return processor.encode(texts)

    def decode(self, ids):
        """Text of a list of ids, up to the first EOS. Some models have more ids than their tokenizer has pieces."""
        return self.sp.decode([i for i in self.strip_eos(ids) if i < self.vocab_size])


# Of sentencepiece_model.proto: two types of a piece, and a second normalizer_spec (field 3) whose add_dummy_prefix
# (field 3) is false: where a message comes twice, its fields are merged and the last ones count.
USER_DEFINED, CONTROL = 4, 3
NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


def user_defined_pieces(proto):
    """Yield (text, place of its type's byte) of a SentencePiece file's user-defined pieces.

    The file is a protocol buffer whose field 1 is a piece: 1 its text, 2 its score (4 bytes), 3 its type.
    """
    if bytes([3 << 3, USER_DEFINED]) not in proto:
        return  # most models have none, and 32,000 pieces take a while
    for number, start, end in fields_of(proto, 0, len(proto)):
        if number == 1:
            text = b""
            for inner, first, last in fields_of(proto, start, end):
                if inner == 1:
                    text = bytes(proto[first:last])
                elif inner == 3 and proto[first] == USER_DEFINED:
                    yield text.decode("utf-8", "replace"), first


def fields_of(proto, place, end):
    """Yield (number, start, end) of the fields of a protocol buffer's message."""
    while place < end:
        key, place = varint(proto, place)
        start = place
        if key & 7 == 0:
            _, place = varint(proto, place)
        elif key & 7 == 1:
            place += 8
        elif key & 7 == 2:
            size, start = varint(proto, place)
            place = start + size
        else:
            place += 4
        yield key >> 3, start, place


def varint(proto, place):
    """(number, place behind it): 7 bits a byte, the lowest first."""
    number = shift = 0
    while True:
        byte = proto[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.json


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
    """tokenizer.json, of Llama 3, SmolLM2 and most newer models, through Hugging Face's `tokenizers`."""

    def __init__(self, folder):
        self.file = file = Path(folder) / "tokenizer.json"
        beside = Beside(folder)
        text = read_text(file, 128 << 20)
        with one_line(file):
            raw = json.loads(text)
            for token in raw.get("added_tokens") or ():
                token["special"] = token["special"] or beside.is_control(token["content"])
            self.tokenizer = self.with_prefix = self.without_prefix = self.open(raw)
            bare, self.prefix_of_parts = without_prefix(raw)
            if bare:
                self.without_prefix = self.open(bare)
        special = self.tokenizer.get_added_tokens_decoder().items()
        controls = {token.content: i for i, token in special if token.special}
        eos = beside.token("eos_token")
        kind = beside.config.get("tokenizer_class")
        if eos is None and kind in {None, *LLAMA_CLASSES} and "</s>" in controls:
            eos = "</s>"
        if not isinstance(eos, str) or eos not in controls:
            raise UserError(f"{folder}/tokenizer_config.json: eos_token {eos!r} is no control token of {file.name}")
        bos = self.first_id(controls[eos])
        if kind in LLAMA_CLASSES:
            wanted = beside.config.get("add_bos_token", True) is not False
            bos = controls.get(beside.token("bos_token") or "<s>") if wanted else None
        vocabulary = self.tokenizer.get_vocab()
        self.text_size = 1 + max((i for text, i in vocabulary.items() if text not in controls), default=0)
        size = max(vocabulary.values()) + 1  # ids may have gaps
        super().__init__(size, controls, bos, controls[eos], beside.template)

    def open(self, raw):
        """A `tokenizers.Tokenizer` for which control tokens in a text are text."""
        import tokenizers

        opened = tokenizers.Tokenizer.from_str(json.dumps(raw))
        opened.encode_special_tokens = True
        opened.no_padding()
        opened.no_truncation()
        return opened

    def first_id(self, eos):
        """The id that the file's post-processor puts before every text, or None."""
        with one_line(self.file):
            first = self.tokenizer.encode("").ids[:1]
        return first[0] if first and first[0] != eos else None

    @cached_property
    def ordinary(self):
        """Ids that stand for text: no control tokens, and no pieces of a character."""
        with one_line(self.file):
            texts = self.tokenizer.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        bytes_of_text = [i for piece, i in self.tokenizer.get_vocab().items() if re.fullmatch("<0x[0-9A-F]{2}>", piece)]
        others = {*self.controls.values(), *bytes_of_text}
        return [i for i, text in enumerate(texts) if text and "\ufffd" not in text and i not in others]

    def encode_batch(self, tokenizer, texts):
        with one_line(self.file):
            ids = []
            for start in range(0, len(texts), 256):  # the library's results, offsets and all, take much memory
                found = tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False)
                ids += [one.ids for one in found]
            return ids

    def decode(self, ids):
        """Text of a list of ids, up to the first EOS."""
        with one_line(self.file):
            return self.tokenizer.decode(self.strip_eos(ids))


def without_prefix(raw):
    """(a tokenizer.json that puts no blank before a text, made from one that does, or None; whether that one puts it
    before every part of a prompt or only before the first).
    """
    normalizer = raw.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    others = [step for step in steps if step.get("type") != "Prepend"]
    if len(others) < len(steps):
        return raw | {"normalizer": {"type": "Sequence", "normalizers": others}}, True
    step = raw.get("pre_tokenizer") or {}
    if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
        bare = raw | {"pre_tokenizer": step | {"prepend_scheme": "never"}}
        return bare, step.get("prepend_scheme", "always") == "always"
    return None, True


def read(folder):
    """The tokenizer of a model folder, tokenizer.json where it has both."""
    if (Path(folder) / "tokenizer.json").is_file():
        return JsonTokenizer(folder)
    if (Path(folder) / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
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
