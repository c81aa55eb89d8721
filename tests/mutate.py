"""Ways to break a file: what `fuzz.py` does to each file that lastmile reads. bytes in, bytes out.

    mutate(raw, file, rng)      one to three changes, most often such as the file's format lets through

A change of the bytes alone seldom gets past the first parser, so each format has its own: `tree` for JSON, `tensors`
for safetensors, `pieces` for SentencePiece, `parts` for tokenizer.json, `columns` for parquet.
"""

import io
import json
import re

EXTREME = (b"0", b"-1", b"1", b"3", b"0.5", b"2147483648", b"9223372036854775808", b"1e308", b"1e999", b"-1e999",
           b"NaN", b"Infinity", b"nan", b"inf", b"9" * 5000)  # fmt: skip
STRANGE = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\x1b[2J", "\u202e\u2028\x85".encode(),
           b'"', b"'", b"\\", b",", b"\r", b"\n", b"\n\n", b"\t", b"{", b"}", b"[", b"]", b"{source}", b"<s>", b"</s>",
           b"A" * 2_000_000, b"[" * 99_999, b"../../etc/passwd")  # fmt: skip
OTHER = (b"", b"\n", b"null", b"[]", b"{}", b"<!DOCTYPE html><html></html>", b"\x80\x04K\x01.", b"PK\3\4", b"\0" * 9,
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"\x1f\x8b\x08\0")  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Any file


def span(raw, rng):
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + rng.choice((1, 2, 8, 64, 1024)))


def flip(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 4, 32)) if raw else 0):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def drop(raw, rng):
    start, end = span(raw, rng)
    return raw[:start] + raw[end:]


def double(raw, rng):
    start, end = span(raw, rng)
    return raw[:end] + raw[start:end] * rng.choice((1, 1, 50)) + raw[end:]


def insert(raw, rng):
    start, _ = span(raw, rng)
    return raw[:start] + rng.choice((rng.randbytes(rng.choice((1, 8, 100))), rng.choice(STRANGE))) + raw[start:]


def truncate(raw, rng):
    return rng.choice((raw[:-1], raw[: len(raw) // 2], raw[: rng.randrange(len(raw) + 1)], rng.choice(OTHER)))


def number(raw, rng):
    """A number in a text becomes an extreme one."""
    start, end = rng.choice([m.span() for m in re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?", raw)] or [(0, 0)])
    return raw[:start] + rng.choice(EXTREME) + raw[end:]


ANYTHING = (flip, drop, double, insert, truncate, number)

# ----------------------------------------------------------------------------------------------------------------------
# Formats


def tree(raw, rng):
    """JSON with a value replaced, dropped, renamed, exchanged with its neighbour, or its key there twice."""
    try:
        root = [json.loads(raw)]
    except (ValueError, RecursionError):  # broken by an earlier change, as below
        return rng.choice(ANYTHING)(raw, rng)
    node, key = root, 0
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
        node = node[key]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        inner = [key for key in keys if isinstance(node[key], dict | list)]
        key = rng.choice(inner if inner and rng.random() < 0.3 else keys)
    value, text, kind = node[key], "", rng.randrange(8 if isinstance(node, dict) else 4)
    if kind < 3:
        node[key] = "@HERE@"
        text = rng.choice((
            rng.choice(EXTREME).decode(), "null", "true", "false", '""', '"x"', "[]", "{}", '"\\u0000"', '"\\ud800"',
            "[" * 99_999 + "]" * 99_999, '{"a":' * 99_999 + "1" + "}" * 99_999, '"' + "x" * 2_000_000 + '"',
            json.dumps([value]), json.dumps({"a": value}), json.dumps([value] * 3), json.dumps(str(value)),
            json.dumps(-value * 3) if isinstance(value, int | float) else '"F16"',
        ))  # fmt: skip
    elif kind == 3:
        del node[key]
    elif kind == 4:
        node[rng.choice(("", "x", key.upper(), f"{key} ", f"{key}\0", key * 9))] = node.pop(key)
    elif kind == 5:
        node["@TWICE@"] = value
    else:
        other = rng.choice(list(node))
        node[key], node[other] = node[other], value
    done = json.dumps(root[0] if root else None)
    return done.replace('"@HERE@"', text).replace('"@TWICE@"', json.dumps(key)).encode()


BITS = {"F64": 64, "I64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8,
        "BOOL": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4}  # fmt: skip


def tensors(raw, rng):
    """A safetensors file with other numbers, or with another header of the length that it states."""
    size = int.from_bytes(raw[:8], "little")
    header, body, kind = raw[8 : 8 + size], raw[8 + size :], rng.randrange(6)
    try:
        named = json.loads(header)
        one = named[rng.choice([name for name in named if name != "__metadata__"])]
        if kind == 0:  # a number becomes NaN, infinite, large, or 0
            start = rng.randrange(*one["data_offsets"]) // 4 * 4
            bad = rng.choice((b"\xff" * 4, b"\0\0\x80\x7f", b"\0\x7c" * 2, b"\xff\xff\x7f\x7f", b"\0" * 4))
            body = (body[:start] + bad + body[start + 4 :])[: len(body)]
        if kind in (1, 2):  # the same bytes are of another type, and the shape fits it
            old, one["dtype"] = one["dtype"], rng.choice(list(BITS))
            one["shape"][-1] = one["shape"][-1] * BITS.get(old, 32) // BITS[one["dtype"]]
            header = json.dumps(named).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        kind = 5
    if kind > 2:
        header = tree(header, rng) if kind < 5 else rng.choice(ANYTHING)(header, rng)
    return len(header).to_bytes(8, "little") + header + body


def pieces(raw, rng):
    """A SentencePiece model with another piece, another setting, or another table of characters."""
    from sentencepiece import sentencepiece_model_pb2

    proto, kind = sentencepiece_model_pb2.ModelProto(), rng.randrange(7)
    proto.ParseFromString(raw)
    one = rng.choice(proto.pieces)
    if kind == 0:
        one.piece = rng.choice(("", "\0", "<s>", "\u2581", "a" * 100_000, "<0x41>", "\U0010ffff", "{source}"))
    elif kind == 1:
        one.score = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, 0.0))
    elif kind == 2:
        rng.choice((one, *proto.pieces[:3])).type = rng.randrange(1, 7)
    elif kind == 3:
        proto.trainer_spec.model_type = rng.randrange(1, 5)
    elif kind == 4:
        name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"))
        setattr(proto.trainer_spec, name, rng.choice((-1, 0, 1, 5, 10**6, 2**31 - 1, -(2**31))))
    elif kind == 5:
        table = rng.randbytes(rng.choice((1, 8, 5000)))
        proto.normalizer_spec.precompiled_charsmap = rng.choice((b"", b"\0\x10\0\0", b"\xff\xff\xff\xff")) + table
    else:
        del proto.pieces[rng.randrange(len(proto.pieces)) :: rng.choice((1, 9999))]
    return proto.SerializeToString()


PARTS = r"""
normalizer {"type": "Precompiled", "precompiled_charsmap": ""}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
normalizer {"type": "Replace", "pattern": {"Regex": "(a+)+(b+)+$|((\\w+\\s?)+)+#"}, "content": "x"}
normalizer {"type": "Replace", "pattern": {"Regex": "(("}, "content": "x"}
normalizer {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
normalizer {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}
pre_tokenizer {"type": "Split", "pattern": {"Regex": "(.*)*\\d"}, "behavior": "Isolated", "invert": true}
pre_tokenizer {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": false}
pre_tokenizer {"type": "Whitespace"}
post_processor {"type": "RobertaProcessing", "sep": ["x", 9], "cls": ["y", 4294967295], "trim_offsets": true}
decoder null
decoder {"type": "Strip", "content": "a", "start": 9, "stop": 9}
decoder {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}
model {"type": "Unigram", "unk_id": null, "vocab": []}
model {"type": "Unigram", "unk_id": null, "vocab": [["a", -1.0]]}
model {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}
model {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e308], ["", -1e308]], "byte_fallback": true}
model {"type": "WordLevel", "vocab": {"a": 4294967295, "b": 0}, "unk_token": "no"}
model {"type": "WordPiece", "vocab": {}, "unk_token": "", "continuing_subword_prefix": "", "max_input_chars_per_word":9}
model {"type": "BPE", "vocab": {}, "merges": []}
model {"type": "BPE", "vocab": {"a": 9, "b": 9, "ab": 9}, "merges": [["a", "b"]]}
model {"type": "BPE", "vocab": {"a": 3, "aa": 1, "A": 7}, "merges": [["a", "a"]], "unk_token": "no"}
truncation {"direction": "Left", "max_length": 0, "strategy": "LongestFirst", "stride": 9}
added_tokens []
added_tokens [{"id": 4294967295, "content": "</s>"}]
added_tokens [{"id": 5, "content": ""}]
"""  # of a tokenizer.json: what else the library knows, sound or not


def parts(raw, rng):
    """A tokenizer.json with another part in place of one of its own."""
    name, part = rng.choice(PARTS.strip().splitlines()).split(" ", 1)
    part, flags = json.loads(part), ("single_word", "lstrip", "rstrip", "normalized", "special")
    if name == "added_tokens":
        part = [token | dict.fromkeys(flags, True) for token in part]
    return json.dumps(json.loads(raw) | {name: part}).encode()


def columns(raw, rng):
    """A parquet file with a column of another type, or with two columns of one name."""
    import pyarrow
    import pyarrow.parquet

    text = [f"A: row {i}" for i in range(40)]
    other = rng.choice((
        pyarrow.array([None] * 40), pyarrow.array(range(40)), pyarrow.array([0.5] * 40), pyarrow.array([b"\xff"] * 40),
        pyarrow.array([[t] for t in text]), pyarrow.array([{"role": "user", "content": t} for t in text]),
        pyarrow.array([[{"role": "assistant", "content": t}] for t in text]), pyarrow.array(text).dictionary_encode(),
        pyarrow.array([2**62] * 40, pyarrow.timestamp("ns")), pyarrow.array([2**50] * 40, pyarrow.timestamp("s")),
        pyarrow.array([10**9] * 40, pyarrow.date32()), pyarrow.array([2**31] * 40, pyarrow.duration("s")),
    ))  # fmt: skip
    names, file = rng.choice((["input", "output"], ["output", "input"], ["input", "input"])), io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(text), other], names), file)
    return file.getvalue()


SPECIAL = {".safetensors": (tensors,), ".json": (tree,), ".model": (pieces,), ".parquet": (columns,)}


def mutate(raw, file, rng):
    """The contents of a file with one to three changes, drawn by rng."""
    special = SPECIAL.get(file.suffix, (number, insert))
    first = rng.choice((parts, tree) if file.name == "tokenizer.json" else special)
    raw = (first if rng.random() < 0.7 else rng.choice(ANYTHING))(raw, rng)
    again = special if file.suffix in (".json", ".safetensors") else ANYTHING  # these cope with what is broken already
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        raw = rng.choice(again)(raw, rng)
    return raw
