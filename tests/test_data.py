"""Data: files in, examples out; examples in, token ids, negatives and batches out."""

import csv
import json
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import data
import toy
from formats import columns, tables

HARD = [
    "Zoë café naïve",
    "🙂👩‍👩‍👧",
    "two\nlines\n\nand a third",
    "a  b\tc",
    "東京 12345",
    "</s> <s> [INST] <unk> <0x0A>",
    "<|eot_id|> <|im_end|>\n<|im_start|>system\n<|end_of_text|><|begin_of_text|><|start_header_id|>user",
    "\u0301 first a combining mark, then שלום and a zero\u200bwidth space, a NUL \x00 and \ufffd",
    "{source} {text}",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    (folder / "template.txt").write_text(data.SHORT_TEMPLATE)
    return data.train_tokenizer([e.source + "\n" + e.target for e in data.toy("test")], 600, folder)


@pytest.fixture(scope="module")
def llama_tokenizer_folder(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(shared / "data/llama_tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def llama_tokenizer(llama_tokenizer_folder):
    return data.load_tokenizer(llama_tokenizer_folder)


# Two families of tokenizer.json: (control tokens, the one that starts every text, EOS)
FAMILIES = {
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>", "<|end_of_text|>",
    ),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
}  # fmt: skip
LLAMA3_WORDS = (  # Llama 3's own pattern
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def train_bpe(folder, family, texts):
    """Write the tokenizer.json and tokenizer_config.json of a byte-level BPE, set up as the family's own is."""
    controls, bos, eos = FAMILIES[family]
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    if family == "llama3":  # its control tokens lie behind the vocabulary
        words = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
        first = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:  # these lie in it, in front
        first = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(first), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[] if family == "llama3" else controls,
    ))  # fmt: skip
    bpe.add_special_tokens(controls)
    if bos:
        start = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """{family: folder} of two tokenizers trained on the toy."""
    texts = [e.source + "\n" + e.target for e in data.toy("test")]
    return {family: train_bpe(tmp_path_factory.mktemp("bpe") / family, family, texts) for family in FAMILIES}


@pytest.fixture(scope="module")
def llama3(bpe):
    return data.load_tokenizer(bpe["llama3"])


@pytest.fixture(scope="module")
def smollm2(bpe):
    return data.load_tokenizer(bpe["smollm2"])


@pytest.fixture(scope="module")
def folders(bpe, tokenizer, tmp_path_factory):
    """{name: folder} of the two and of the toy's SentencePiece, without a template of its own."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(tokenizer.file, folder)
    return bpe | {"sentencepiece": folder}


@pytest.fixture
def brought(tmp_path, folders):
    """A function that loads a tokenizer anew, with the template that is given as the text of a user's file."""

    def load(which, text):
        (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
        return data.load_tokenizer(folders[which], str(tmp_path / "mine.txt"))

    return load


@pytest.fixture(scope="module")
def positives(tokenizer):
    """100 encoded dialogues, the last ten with the summary of the first: duplicates are what real data has."""
    examples = data.toy("test")[:100]
    examples[90:] = [replace(e, id=f"again-{e.id}", target=examples[0].target) for e in examples[90:]]
    return data.encode(examples, tokenizer)[0]


def negatives(positives, tokenizer, limit, kind, seed=0):
    """[(positive, its negative of one class)]"""
    by_id = {datum.id: datum for datum in positives}
    return [(by_id[d.id], d) for d in data.with_negatives(positives, tokenizer, limit, seed) if d.kind == kind]


# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def test_stream_seed():
    """The golden number pins the results of every run made so far; streams must differ, or draws would be coupled."""
    assert data.stream_seed(1337, "rollout", 0) == 557421766207105059
    seeds = [data.stream_seed(seed, name, step) for seed in (0, 1) for name in ("order", "lora") for step in range(50)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)


# ----------------------------------------------------------------------------------------------------------------------
# The toy


def test_toy_is_the_same_everywhere():
    """Results on the toy can be compared only if its text never changes: sizes and one example are pinned."""
    assert {split: len(data.toy(split)) for split in toy.TOY_SIZES} == toy.TOY_SIZES
    assert data.toy("test") == data.toy("test") == data.load("toy", "test")
    assert data.toy("test")[2] == data.Example(
        "toy-test-2",
        "Ben: Shall we paint a picture at the office tomorrow?\nZoe: Sorry, I have no time.",
        "Zoe does not want to paint a picture with Ben tomorrow.",
    )


def test_toy_splits_share_no_dialogue():
    """A test dialogue seen in training, or in pretraining, would make the test score a memory test."""
    sources = [example.source for split in toy.TOY_SIZES for example in data.toy(split)]
    assert len(set(sources)) == len(sources) == sum(toy.TOY_SIZES.values())


def test_toy_summary_tells_the_final_plan():
    """The toy's one difficulty: a later line overrules an earlier one, and the summary must follow the later one."""
    changed = 0
    for example in data.toy("train"):
        lines = example.source.split("\n")
        assert 2 <= len(lines) <= 8 and all(re.match(r"[A-Z][a-z]+: \S", line) for line in lines)
        change = re.search(r"(?:What about|Better at the) (.+?)[.?]", example.source)
        if change:
            changed += 1
            place, time = re.search(rf" at the (\w+) ({'|'.join(toy.TIMES)})\?", example.source).groups()
            overruled = time if "What about" in example.source else f"at the {place}"
            assert change[1] in example.target and overruled not in example.target
    assert changed > 1000


def test_toy_base_corpus_is_wordy():
    """The base must fail the way the paper's base does, an opening and too many words, or nothing is to be cured."""
    chatter, summaries = ([e.target for e in data.toy(split)] for split in ("pretrain", "test"))
    assert sum(text.startswith("Sure,") for text in chatter) > 0.7 * len(chatter)
    assert sum(len(text.split()) for text in chatter) > 30 * len(chatter)
    assert sum(len(text.split()) for text in summaries) < 20 * len(summaries)


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(("source", "target"), [*columns.PAIRS, ("frage", "antwort")])
def test_load_finds_the_columns(tmp_path, source, target, suffix):
    """Every pair of column names found unasked, and a named one, in both formats and beside other columns."""
    rows = [{"id": f"n{i}", "other": "x", source: f"in {i}", target: f"out {i}"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == "csv":
        text = "\n".join(",".join(cells) for cells in [rows[0], *(row.values() for row in rows)])
    (tmp_path / f"test.{suffix}").write_text(text)
    named = (source, target) if source == "frage" else ()
    assert data.load(tmp_path, "test", *named) == [data.Example(f"n{i}", f"in {i}", f"out {i}") for i in range(3)]


def test_load_deals_a_single_file(tmp_path):
    """One file becomes three splits, 8:1:1: a row in two of them would leak, a row in none would be lost."""
    (tmp_path / "toy.csv").write_text("input,output\n" + "".join(f"in {i},out {i}\n" for i in range(30)))
    dealt = [data.load(tmp_path / "toy.csv", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in dealt] == [24, 3, 3]
    assert len({example.source for part in dealt for example in part}) == 30


@pytest.mark.parametrize("name", ["validation.csv", "valid.csv", "val.csv", "dev.csv"])
def test_load_knows_the_names_of_the_validation_file(tmp_path, name):
    """Public data sets name this split in four ways."""
    (tmp_path / name).write_text("input,output\na,b\n")
    assert data.load(tmp_path, "validation") == [data.Example("2", "a", "b")]


def test_load_keeps_the_text(tmp_path):
    """What pandas or splitlines would mangle: a BOM, CRLF inside quotes, NA and null as words, long fields, U+2028."""
    long = "word " * 60_000
    (tmp_path / "train.csv").write_bytes(
        f'\ufeffdialogue,summary\r\n"A: hi\r\nB: ""yo""\rC: x",NA\r\nNone, null \r\n{long},nan\r\n'.encode()
    )
    assert [(e.source, e.target) for e in data.load(tmp_path, "train")] == [
        ('A: hi\nB: "yo"\nC: x', "NA"), ("None", "null"), (long.strip(), "nan"),
    ]  # fmt: skip
    (tmp_path / "test.jsonl").write_text(
        '\ufeff{"input": "a\u2028b\u0085c", "output": "NA"}\n\n{"input": "d", "output": "e"}\n'
    )
    assert [(e.source, e.target) for e in data.load(tmp_path, "test")] == [("a\u2028b\u0085c", "NA"), ("d", "e")]


@pytest.fixture
def parquet():
    """pyarrow's writer: a function of a file and a list of dicts; skips, aloud, where there is no pyarrow."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow.parquet import write_table

    def write(file, rows, schema=None, **options):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(pyarrow.Table.from_pylist(rows, schema), file, **options)

    write.pyarrow = pyarrow
    return write


@pytest.fixture
def write(parquet):
    """A function that writes a list of dicts to a file in the format of its suffix, as other tools write it."""

    def write(file, rows):
        if file.suffix == ".parquet":
            parquet(file, rows, row_group_size=2)
        elif file.suffix in (".csv", ".tsv"):
            with open(file, "w", encoding="utf-8-sig", newline="") as opened:  # as Excel: BOM and CRLF
                writer = csv.DictWriter(opened, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif file.suffix == ".jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            file.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
        else:
            file.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")

    return write


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_load_reads_every_format_alike(tmp_path, write, suffix):
    """The same rows in five formats are the same examples: words that pandas drops, quotes, line ends, U+2028, id 0."""
    pairs = [
        ("NA", "None"), ("null", "nan"), ("N/A", "NaN"), ("true", "0"), ('A: "hi", you\r\nB: yo', "a\u2028b\u0085c"),
        ("<NA>", "''"), (" \tx ", "\n y\n"),
    ]  # fmt: skip
    write(tmp_path / f"test{suffix}", [{"id": i, "dialogue": a, "summary": b} for i, (a, b) in enumerate(pairs)])
    expected = [data.Example(str(i), *(columns.strip(text) for text in pair)) for i, pair in enumerate(pairs)]
    assert data.load(tmp_path, "test") == expected and expected[4].source == 'A: "hi", you\nB: yo'


def says(role, content):
    return {"role": role, "content": content}


TRL = {  # a row as TRL documents it: the input and the target that it means
    "strings": ({"prompt": "in", "completion": " out"}, "in", "out"),
    "lists": ({"prompt": [says("user", "in")], "completion": [says("assistant", " out")]}, "in", "out"),
    "messages": (
        {"messages": [says("system", "Be brief."), says("user", "in"), says("assistant", "out")]},
        "Be brief.\n\nin", "out",
    ),
    "turns": (
        {"messages": [says("user", "a"), says("assistant", "b"), says("user", "c\nd"), says("assistant", "out")]},
        "user: a\nassistant: b\nuser: c\nd", "out",
    ),
    "system and turns": (
        {"prompt": [says("system", "S"), says("user", "a"), says("assistant", "b"), says("user", "c")],
         "completion": [says("assistant", "out")]},
        "S\n\nuser: a\nassistant: b\nuser: c", "out",
    ),
    "messages beside a prompt": (  # as in HuggingFaceH4/no_robots
        {"prompt": "c", "prompt_id": "7", "messages": [says("user", "in"), says("assistant", "out")], "category": "QA"},
        "in", "out",
    ),
    "list and string": ({"prompt": [says("user", "in")], "completion": "out"}, "in", "out"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("row", "source", "target"), TRL.values(), ids=TRL)
def test_load_reads_conversations(tmp_path, write, suffix, row, source, target):
    """Data prepared for TRL needs no conversion; every word of a conversation reaches the prompt, in its order."""
    write(tmp_path / f"test{suffix}", [row, row])
    found = data.load(tmp_path, "test")
    assert [(e.source, e.target) for e in found] == [(source, target)] * 2


BAD_CONVERSATIONS = {
    "last is the user": ({"messages": [says("user", "a"), says("assistant", "b"), says("user", "c")]}, "'assistant'"),
    "last is the system": ({"messages": [says("user", "a"), says("system", "b")]}, "'assistant'"),
    "two answers": (
        {"prompt": [says("user", "a")], "completion": [says("assistant", "b"), says("assistant", "c")]}, "'assistant'"
    ),
    "no answer": ({"messages": [says("user", "a")]}, "is empty or not text"),
    "no messages": ({"messages": []}, "is empty or not text"),
    "null content": ({"messages": [says("user", "a"), says("assistant", None)]}, "is empty or not text"),
    "an image": (
        {"messages": [says("user", [{"type": "image", "url": "a"}]), says("assistant", "b")]}, "is empty or not text"
    ),
    "no role": ({"messages": [{"content": "a"}, says("assistant", "b")]}, "is empty or not text"),
    "no dict": ({"messages": ["a", "b"]}, "is empty or not text"),
    "blank answer": ({"messages": [says("user", "a"), says("assistant", " \n")]}, "is empty or not text"),
    "a number": ({"prompt": 5, "completion": "b"}, "'prompt' is empty or not text"),
    "half a pair": ({"messages": [says("user", "a\ud83d"), says("assistant", "b")]}, "an unpaired surrogate"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS)
def test_load_refuses_conversations(tmp_path, row, said):
    """Learning the user's words, or a part of an answer, would be silent and wrong: the row is named instead."""
    good = {"messages": [says("user", "a"), says("assistant", "b")]}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: .*{said}.* remove that row"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize("column", ["dialogue", "summary"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_load_refuses_half_a_pair_of_surrogates(tmp_path, suffix, column):
    """JSON can spell it, no tokenizer takes it: found with its row here, not by a traceback an hour later."""
    rows = [{"dialogue": "a \U0001f642", "summary": "b"}, {"dialogue": "c", "summary": "d"} | {column: "e\ud83d"}]
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
    (tmp_path / f"train{suffix}").write_text(text)
    with pytest.raises(ValueError, match=rf"train\{suffix}:2: column '{column}' contains an unpaired surrogate"):
        data.load(tmp_path, "train")


def test_load_reads_parquet(tmp_path, parquet):
    """Dictionary columns and several row groups, as other tools write them; every row once and in order."""
    pa = parquet.pyarrow
    rows = [{"id": f"n{i}", "document": f"in {i % 3}", "summary": f"out {i}", "other": [i]} for i in range(11)]
    words = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [("id", pa.string()), ("document", words), ("summary", pa.large_string()), ("other", pa.list_(pa.int64()))]
    )
    parquet(tmp_path / "test.parquet", rows, schema, row_group_size=4, compression="zstd")
    with pa.parquet.ParquetFile(tmp_path / "test.parquet") as opened:
        assert opened.num_row_groups == 3
    expected = [data.Example(f"n{i}", f"in {i % 3}", f"out {i}") for i in range(11)]
    assert data.load(tmp_path, "test") == expected
    dealt = [data.load(tmp_path / "test.parquet", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in dealt] == [9, 1, 1] and sorted(sum(dealt, []), key=expected.index) == expected


def test_load_refuses_parquet(tmp_path, parquet):
    """A parquet file cut short, one that is none, one whose text is Latin-1, and null rows: named, with the remedy."""
    pa, file = parquet.pyarrow, tmp_path / "train.parquet"
    rows = [{"document": "in " * 500, "summary": f"out {i}"} for i in range(50)]
    parquet(file, rows)
    whole = file.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"document,summary\na,b\n", b"PAR1" + whole[4:200]):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"train\.parquet: not a readable parquet file .* download it again"
        ) as error:
            data.load(tmp_path, "train")
        assert "\n" not in str(error.value)
    table = pa.table({"document": pa.array([b"caf\xe9"]).view(pa.string()), "summary": ["b"]})
    pa.parquet.write_table(table, file)
    with pytest.raises(ValueError, match=r"train\.parquet: not a readable parquet file .*utf-8"):
        data.load(tmp_path, "train")
    parquet(file, [{"document": "a", "summary": "b"}, {"document": "c", "summary": None}])
    with pytest.raises(ValueError, match=r"train\.parquet:2: column 'summary' is empty .* remove that row"):
        data.load(tmp_path, "train")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    """pyarrow is large and few need it: where it lacks, one line says how to get it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train\.parquet: parquet needs pyarrow; .*: pip install 'pyarrow==[\d.]+'$"):
        data.load(tmp_path, "train")


BAD_JSON = {  # name: (content of train.json, what the message must say)
    "object": ('{"train": [{"input": "a", "output": "b"}]}', r": expected a list .* call it \.jsonl"),
    "string": ('"a"', r": expected a list"),
    "lines": ('{"input": "a", "output": "b"}\n{"input": "c", "output": "d"}\n', r":2: .*one object a line.*\.jsonl"),
    "torn": ('[{"input": "a", "output": "b"},\n {"input": "c",', r":2: .* fix"),
    "list of lists": ('[{"input": "a", "output": "b"}, ["a", "b"]]', r":2: expected an object"),
    "empty": ("", r":1: "),
    "no rows": ("[]", r": no rows"),
    "deep": ("[" * 200_000, r".*nested|.*recursion"),
    "a number of 5000 digits": ('[{"input": ' + "9" * 5000 + "}]", r".*digits"),
}


@pytest.mark.parametrize(("content", "said"), BAD_JSON.values(), ids=BAD_JSON)
def test_load_refuses_json(tmp_path, content, said):
    """A .json that is no list of objects is named with its remedy; the commonest is JSON lines under that name."""
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=rf"train\.json{said}") as error:
        data.load(tmp_path, "train")
    assert "\n" not in str(error.value)


GOOD = '{"dialogue": "a", "summary": "b"}\n'
BAD_FILES = {  # name: (content, what the message must say: where, and what to do)
    "empty": ("", r"train\.csv: no rows; expected a header line"),
    "header only": ("dialogue,summary\n", r"train\.csv: no rows; expected a header line"),
    "no target in csv": ("dialogue,summary\na,b\nc\n", r"train\.csv:3: column 'summary'.* remove that row"),
    "no target in jsonl": (GOOD + '{"dialogue": "c"}\n', r"train\.jsonl:2: "),
    "null target": (GOOD + '{"dialogue": "c", "summary": null}', r"train\.jsonl:2: .* remove that row"),
    "blank source": ("dialogue,summary\n  ,b\n", r"train\.csv:2: column 'dialogue'.* remove that row"),
    "unquoted comma": ("dialogue,summary\na,b\nhi, you,bye\n", r"train\.csv:3: "),
    "ambiguous": ("input,output,prompt,completion\na,b,c,d\n", r"train\.csv.* more than one .* --input-column"),
    "unguessable": ("title,topic\na,b\n", r"train\.csv.* title, topic; .* --input-column"),
    "unclosed quote": ('dialogue,summary\na,b\nc,"d\ne,f\n', r"train\.csv:3: .* fix"),
    "bad json": (GOOD + "{'dialogue': 1}\n" + GOOD, r"train\.jsonl:2: .* fix"),
    "array": (GOOD + '["a", "b"]\n', r"train\.jsonl:2: expected an object"),
    "nesting bomb": (GOOD + '{"dialogue": ' + "[" * 200_000 + "\n", r"train\.jsonl:2: .* fix"),
    "a number of 5000 digits": (GOOD + '{"dialogue": ' + "9" * 5000 + "}\n", r"train\.jsonl:2: .* fix"),
}


@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_load_refuses_rows(tmp_path, content, said):
    """A bad file is refused with its name, the row and the remedy; learning from it in silence would be far worse."""
    (tmp_path / ("train.jsonl" if content.startswith("{") else "train.csv")).write_text(content)
    with pytest.raises(ValueError, match=said):
        data.load(tmp_path, "train")


def test_load_refuses_latin1(tmp_path):
    """The byte named is that of the file, so that it can be found with an editor, however long the file."""
    head = b"dialogue,summary\n" + b"a,b\n" * 10_000 + b"n"
    (tmp_path / "train.csv").write_bytes(head + b"\xe9,b\n")
    with pytest.raises(ValueError, match=rf"train\.csv: not UTF-8 at byte {len(head)}; .*iconv"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("few.csv", ValueError, r"few\.csv: 9 rows; .* at least 10"),
        ("notes.txt", ValueError, r"notes\.txt: .* \.csv, \.jsonl, \.json, \.parquet"),
        ("absent.csv", FileNotFoundError, r"absent\.csv: no such file"),
        (".", FileNotFoundError, r"no file for the train split; expected one of train\.csv, train\.jsonl"),
    ],
)
def test_load_refuses_places(tmp_path, monkeypatch, place, error, said):
    """What is missing is named, and so is where it should be."""
    (tmp_path / "few.csv").write_text("input,output\n" + "a,b\n" * 9)
    (tmp_path / "notes.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        data.load(place, "train")


@pytest.mark.parametrize("column", ["input_column", "target_column"])
def test_load_refuses_half_a_pair_of_columns(tmp_path, column):
    """One column named and the other not: guessing both would train on a column that the user did not name."""
    (tmp_path / "train.csv").write_text("title,dialogue,summary\na,b,c\n")
    with pytest.raises(ValueError, match="--input-column"):
        data.load(tmp_path, "train", **{column: "title"})


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("which", ["tokenizer", "llama_tokenizer", "llama3", "smollm2"])
def test_tokenizer_round_trip(which, request):
    """Any text comes back from its ids, and no text can spell a control token: an EOS inside would end a row early."""
    tokenizer = request.getfixturevalue(which)
    for text, ids in zip(HARD, tokenizer.encode(HARD), strict=True):
        assert tokenizer.encode(text) == ids and not set(tokenizer.controls.values()) & set(ids)
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eos, *ids]) == text
    assert tokenizer.encode([]) == [] and tokenizer.decode([tokenizer.eos]) == ""


@pytest.mark.parametrize("which", ["tokenizer", "llama_tokenizer", "llama3", "smollm2"])
def test_ordinary_ids_are_text(which, request):
    """Random negatives draw from them: a control token, a piece of a character or nothing at all would be a tell."""
    tokenizer = request.getfixturevalue(which)
    texts = [tokenizer.decode([i]) for i in tokenizer.ordinary]
    assert len(texts) > tokenizer.vocab_size / 2
    assert not set(tokenizer.controls.values()) & set(tokenizer.ordinary)
    if which in FAMILIES:  # SentencePiece drops a first space, and Llama's has a piece that is this very character
        assert all(texts) and "\ufffd" not in "".join(texts)


TEMPLATE_OF = [  # tokenizer, --template, the template meant, the token that ends an answer
    ("llama3", "", "llama3", "<|eot_id|>"),
    ("llama3", "llama3", "llama3", "<|eot_id|>"),
    ("llama3", "plain", "plain", "<|end_of_text|>"),
    ("llama3", "llama2", "llama2", "<|end_of_text|>"),
    ("smollm2", "", "chatml", "<|im_end|>"),
    ("smollm2", "chatml", "chatml", "<|im_end|>"),
    ("smollm2", "plain", "plain", "<|im_end|>"),
    ("sentencepiece", "", "llama2", "</s>"),
    ("sentencepiece", "llama2", "llama2", "</s>"),
    ("sentencepiece", "plain", "plain", "</s>"),
]


@pytest.mark.parametrize(("which", "flag", "name", "eos"), TEMPLATE_OF)
def test_template_of_a_tokenizer(folders, which, flag, name, eos):
    """Unasked, a model gets the template it was trained with; answers end as the template, else the tokenizer, says."""
    tokenizer = data.load_tokenizer(folders[which], flag)
    assert tokenizer.template == data.TEMPLATES[name][0] and tokenizer.eos == tokenizer.controls[eos]
    assert tokenizer.own_eos == (name in ("llama2", "plain"))
    (datum,), _ = data.encode([data.Example("", "a", "b")], tokenizer, 1000)
    assert datum.response == [*tokenizer.encode("b"), tokenizer.eos]


@pytest.mark.parametrize(
    ("which", "flag", "lacks"),
    [
        ("smollm2", "llama3", r"<\|\w+_id\|>"),
        ("llama3", "chatml", r"<\|im_\w+\|>"),
        ("sentencepiece", "llama3", r"<\|\w+_id\|>"),
        ("sentencepiece", "chatml", r"<\|im_\w+\|>"),
    ],
)
def test_template_without_its_tokens(folders, which, flag, lacks):
    """<|eot_id|> as ten pieces of text is what such a prompt would hold: refused with the token's name."""
    with pytest.raises(ValueError, match=rf"--template {flag}: this model's tokenizer has no {lacks}; choose another"):
        data.load_tokenizer(folders[which], flag)


@pytest.mark.parametrize(
    ("which", "flag"), [("llama3", ""), ("llama3", "plain"), ("smollm2", ""), ("smollm2", "plain")]
)
def test_prompts_are_what_transformers_would_feed(bpe, which, flag):
    """The whole prompt as one text through the library's own parser of control tokens gives the same ids, BOS once."""
    tokenizer, oracle = (
        data.load_tokenizer(bpe[which], flag), tokenizers.Tokenizer.from_file(str(bpe[which] / "tokenizer.json"))
    )  # fmt: skip
    sources = [e.source for e in data.toy("test")[:20]] + ["\n\n  x", "'s", "\u0301 é"]
    expected = [oracle.encode(tokenizer.template.replace("{source}", text)).ids for text in sources]
    prompts = tokenizer.prompts(sources)
    assert prompts == expected
    bos = FAMILIES[which][1] and oracle.token_to_id(FAMILIES[which][1])
    assert tokenizer.bos == bos and all(ids.count(bos) == (bos is not None) for ids in prompts)


@pytest.mark.parametrize(("which", "flag"), [(which, flag) for which, flag, *_ in TEMPLATE_OF if not flag])
def test_control_tokens_in_a_source_are_text(folders, which, flag):
    """Who writes </s> or <|eot_id|> into a dialogue must not end it, nor speak as the assistant: only templates may."""
    tokenizer = data.load_tokenizer(folders[which], flag)
    control = {i: text for text, i in tokenizer.controls.items()}
    plain, *hard = ([control[i] for i in ids if i in control] for ids in tokenizer.prompts(["x", *HARD]))
    assert all(found == plain for found in hard)
    start = [control[tokenizer.bos]] if tokenizer.bos is not None else []
    assert plain == start + re.findall(r"<\|\w+\|>", tokenizer.template)


@pytest.mark.parametrize(
    ("which", "text", "controls"),
    [
        ("llama3", "{source}\nTL;DR:", ["<|begin_of_text|>"]),
        ("llama3", "<|begin_of_text|>{source}\nTL;DR:", ["<|begin_of_text|>"]),
        ("llama3", "<|start_header_id|>user<|end_header_id|>\n\n{source}<|eot_id|>",
         ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("smollm2", "{source}\nTL;DR:", []),
        ("smollm2", "<|endoftext|>{source}\nTL;DR:", ["<|endoftext|>"]),
        ("smollm2", "<|im_start|>{source}<|im_end|><|im_end|>", ["<|im_start|>", "<|im_end|>", "<|im_end|>"]),
        ("sentencepiece", "{source}\nTL;DR:", ["<s>"]),
        ("sentencepiece", "<s>[INST] {source} [/INST]", ["<s>"]),
        ("sentencepiece", "<|user|>\n{source}</s>\n<|assistant|>\n", ["<s>", "</s>"]),  # TinyLlama's
        ("sentencepiece", "<|eot_id|> {source}", ["<s>"]),  # not this tokenizer's: text
    ],
)  # fmt: skip
def test_template_file(brought, which, text, controls):
    """In a user's own template control tokens count, BOS comes once, written there or not; the source stays text."""
    tokenizer = brought(which, text)
    control = {i: name for name, i in tokenizer.controls.items()}
    eos = FAMILIES[which][2] if which in FAMILIES else "</s>"
    assert tokenizer.own_eos and control[tokenizer.eos] == eos
    for source in ("hello", "".join(tokenizer.controls)):
        (prompt,) = tokenizer.prompts([source])
        assert [control[i] for i in prompt if i in control] == controls
        assert prompt[: len(tokenizer.start)] == tokenizer.start
        pieces = re.split("|".join(map(re.escape, tokenizer.controls)), text)
        spelled = [i for part in pieces if part for i in tokenizer.encode(part.replace("{source}", source), True)]
        assert [i for i in prompt if i not in control] == spelled


def test_template_file_of_an_editor(brought):
    """A byte order mark and CRLF, as Windows' editors write them, are no part of the prompt."""
    tokenizer = brought("llama3", "\ufeff<|begin_of_text|>A:\r\n{source}\r\nB:")
    assert tokenizer.prompts(["x"]) == [[tokenizer.bos, *tokenizer.encode("A:\nx\nB:")]]


def test_two_readers_of_one_tokenizer(tokenizer, tmp_path):
    """Llama 2's tokenizer comes in both formats, and some models bring one only: both give the same ids and prompts."""
    from transformers import LlamaTokenizerFast

    for name in ("spm", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "template.txt").write_text("<s>[INST] {source} [/INST] Well:</s>\n")
    shutil.copy(tokenizer.file, tmp_path / "spm")
    LlamaTokenizerFast(vocab_file=str(tmp_path / "spm/tokenizer.model")).save_pretrained(tmp_path / "json")
    (tmp_path / "json/tokenizer.model").unlink(missing_ok=True)
    raw = json.loads((tmp_path / "json/tokenizer.json").read_text())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # as in Meta's own tokenizer.json
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    raw["decoder"] = {"type": "Sequence", "decoders": [
        space | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]}  # fmt: skip
    (tmp_path / "json/tokenizer.json").write_text(json.dumps(raw))
    a, b = (data.load_tokenizer(tmp_path / name) for name in ("spm", "json"))
    assert (a.file.suffix, b.file.suffix) == (".model", ".json")
    assert (a.bos, a.eos, a.vocab_size, a.start) == (b.bos, b.eos, b.vocab_size, b.start)
    texts = HARD + [e.source for e in data.toy("test")[:50]]
    ids = a.encode(texts)
    assert ids == b.encode(texts) and a.prompts(texts) == b.prompts(texts)
    assert [a.decode(row) for row in ids] == [b.decode(row) for row in ids] == texts


@pytest.mark.parametrize("eos", ["<|im_end|>", {"__type": "AddedToken", "content": "<|im_end|>", "special": True}])
def test_eos_is_spelled_in_two_ways(bpe, tmp_path, eos):
    """tokenizer_config.json holds the token's text, or, from older transformers, a dict around it."""
    shutil.copytree(bpe["smollm2"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "chat_template": "{{ 1/0 }}"}))
    tokenizer = data.load_tokenizer(tmp_path, "plain")
    assert tokenizer.eos == tokenizer.controls["<|im_end|>"] and tokenizer.bos is None


def test_tokenizer_refuses(tmp_path):
    """A folder without a tokenizer, and a file that is none, are named."""
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model or tokenizer\.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        data.load_tokenizer(tmp_path)


BAD_TOKENIZERS = {  # name: (file, its content or None, what the message must say)
    "an error page": ("tokenizer.json", "<html>404", r"tokenizer\.json: not a valid tokenizer .*; download it again"),
    "other JSON": ("tokenizer.json", '{"a": 1}', r"tokenizer\.json: not a valid tokenizer .*; download it again"),
    "empty": ("tokenizer.json", "", r"tokenizer\.json: not a valid tokenizer .*; download it again"),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe{", r"tokenizer\.json: not UTF-8 at byte 0"),
    "no config": ("tokenizer_config.json", None, r"tokenizer_config\.json: eos_token None is no control token"),
    "torn config": ("tokenizer_config.json", '{"eos', r"tokenizer_config\.json: needed .* unreadable .*; download it"),
    "config is a list": ("tokenizer_config.json", "[]", r"tokenizer_config\.json: needed .* unreadable"),
    "config not UTF-8": ("tokenizer_config.json", b'{"a": "\xe9"}', r"tokenizer_config\.json: not UTF-8 at byte 7"),
    "no EOS": ("tokenizer_config.json", "{}", r"tokenizer_config\.json: eos_token None is no control token"),
    "null EOS": ("tokenizer_config.json", '{"eos_token": null}', r"eos_token None is no control token"),
    "EOS is a list": ("tokenizer_config.json", '{"eos_token": ["a"]}', r"tokenizer\.json: not a valid .*eos_token"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_json_tokenizer_refuses(bpe, tmp_path, name, content, said):
    """Without the right EOS a model never stops, so a broken tokenizer.json or its config is named, in one line."""
    shutil.copytree(bpe["llama3"], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        data.load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_encode_borders(tokenizer):
    """A row of exactly the limit stays, one token more and it goes: BOS counts as input, EOS as output."""
    example = data.toy("test")[0]
    n = 1 + len(tokenizer.encode(data.SHORT_TEMPLATE.format(source=example.source)))
    m = len(tokenizer.encode(example.target)) + 1
    for limits, outcome in [((n, m), "kept"), ((n - 1, m), "long_input"), ((n, m - 1), "long_output")]:
        kept, counts = data.encode([example], tokenizer, *limits)
        assert counts == {"kept": 0, "long_input": 0, "long_output": 0} | {outcome: 1} and len(kept) == counts["kept"]
    (datum,), _ = data.encode([example], tokenizer, n, m)
    assert datum.prompt[0] == tokenizer.bos and len(datum.prompt) == n
    assert datum.response[-1] == tokenizer.eos and len(datum.response) == m
    assert tokenizer.decode(datum.prompt[1:]) == data.SHORT_TEMPLATE.format(source=example.source)
    (bare,), _ = data.encode([example], tokenizer, n, m, append_eos=False)
    assert bare.response == datum.response[:-1] and bare.prompt == datum.prompt


def test_samsum_loses_what_the_paper_lost(shared, llama_tokenizer):
    """Paper, 4.2: the filter at 400 tokens costs SAMSum's train or test split at most 13.4 %, and it does so here."""
    shares = []
    for split in ("train", "test"):
        examples = data.load(shared / "data/samsum", split)
        _, counts = data.encode(examples, llama_tokenizer)
        assert counts["long_output"] == 0
        shares.append(1 - counts["kept"] / len(examples))
    assert 0.129 < max(shares) <= 0.134


@pytest.fixture(scope="module")
def real_texts(shared):
    """1,000 examples each of SAMSum and XSum; of long sources the last 500 characters, which is where targets join."""
    rows = [json.loads(line) for line in (shared / "data/xsum_test_1000.jsonl").read_text().split("\n") if line]
    found = data.load(shared / "data/samsum", "train")[:1000]
    found += [data.Example(row["id"], columns.strip(row["document"]), columns.strip(row["summary"])) for row in rows]
    assert len(found) == 2000
    return [data.replace(e, source=e.source[-500:]) for e in found]


@pytest.fixture(scope="module")
def real_tokenizers(real_texts, llama_tokenizer_folder, tmp_path_factory):
    """{name: folder}: Llama's tokenizer, and the two byte-level BPEs trained on what they are to tokenize."""
    texts = [e.source + "\n" + e.target for e in real_texts]
    found = {family: train_bpe(tmp_path_factory.mktemp("real") / family, family, texts) for family in FAMILIES}
    return found | {"sentencepiece": llama_tokenizer_folder}


# First words that a tokenizer might glue to what stands before them.
OPENINGS = [
    "\u0301a",
    "\u200bx",
    "123",
    "'s",
    '"Hi"',
    "- x",
    "...",
    "\ufeffx",
    "🙂",
    "\x00a",
    "(x)",
    "éa",
    "שלום",
    "<|x",
]


@pytest.mark.parametrize(
    ("which", "template"),
    [
        ("sentencepiece", "llama2"), ("sentencepiece", "plain"), ("llama3", "llama3"), ("llama3", "plain"),
        ("smollm2", "chatml"), ("smollm2", "plain"),
    ],
)  # fmt: skip
def test_parts_tokenize_as_the_whole(real_texts, real_tokenizers, which, template):
    """Prompt and target are tokenized apart; the ids must be those of the joint text, which a chat model has seen.

    Joint is with one space between for SentencePiece and llama2, which does not end in white space, and with none for
    the others, which end in a line end. Without exception, because targets are stripped. Not so for llama2 on BPE,
    which nothing picks for a model that has chat tokens: "/INST]" and a target that begins with a quote share a piece.
    """
    tokenizer = data.load_tokenizer(real_tokenizers[which], template)
    examples = real_texts + [data.Example("", "Amy: hi", text) for text in OPENINGS]
    prompts, targets = (tokenizer.prompts([e.source for e in examples]), tokenizer.encode([e.target for e in examples]))
    between = " " if template == "llama2" else ""
    texts = [tokenizer.template.replace("{source}", e.source) + between + e.target for e in examples]
    if which == "sentencepiece":
        joint = [[tokenizer.bos, *ids] for ids in tokenizer.encode(texts, prefix=True)]
    else:
        oracle = tokenizers.Tokenizer.from_file(str(real_tokenizers[which] / "tokenizer.json"))
        joint = [row.ids for row in oracle.encode_batch(texts)]
    apart = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
    assert [text for text, a, b in zip(texts, joint, apart, strict=True) if a != b] == []


def test_load_template(tmp_path):
    """A model folder may bring its own template; one without a place for the text, or with two, trains nonsense."""
    assert data.load_template("", tmp_path, {}) == data.TEMPLATES["llama2"]
    (tmp_path / "template.txt").write_text("Été: {source}\n", encoding="utf-8")
    assert data.load_template("", tmp_path, {}) == ("Été: {source}\n", "")
    (tmp_path / "template.txt").write_text(data.TEMPLATES["chatml"][0])  # as a stage writes it: the same end of answers
    assert data.load_template("", tmp_path, {"<|im_start|>": 1, "<|im_end|>": 2}) == data.TEMPLATES["chatml"]
    (tmp_path / "template.txt").unlink()
    both = {"<|start_header_id|>": 1, "<|end_header_id|>": 2, "<|eot_id|>": 3, "<|im_start|>": 4, "<|im_end|>": 5}
    assert data.load_template("", tmp_path, both) == data.TEMPLATES["llama3"]
    learned = "{{ '<|im_start|>' + message }}"  # ChatML, by a fine-tuned Llama 3
    assert data.load_template("", tmp_path, both, learned) == data.TEMPLATES["chatml"]
    for text in ("Summarise this.", "{source} {source}"):
        (tmp_path / "template.txt").write_text(text)
        with pytest.raises(ValueError, match=r"template\.txt.*\{source\} exactly once"):
            data.load_template("", tmp_path, {})


# ----------------------------------------------------------------------------------------------------------------------
# Negatives


def test_negatives_as_a_set(positives, tokenizer):
    """Five classes of equal size, label 0, weight 1/5 (paper, 3.2); at most `limit` tokens, EOS only at the end."""
    rows = data.with_negatives(positives, tokenizer, 60, 0)
    assert Counter(row.kind for row in rows) == dict.fromkeys(("positive", *data.NEGATIVES), 100)
    assert [row for row in rows if row.kind == "positive"] == positives
    assert {(row.label, row.weight) for row in rows if row.kind == "positive"} == {(1.0, 1.0)}
    assert {(row.label, row.weight) for row in rows if row.kind != "positive"} == {(0.0, 0.2)}
    assert all(row.prompt == rows[i - i % 6].prompt and row.id == rows[i - i % 6].id for i, row in enumerate(rows))
    assert all(1 <= len(row.response) <= 60 and tokenizer.eos not in row.response[:-1] for row in rows)


def test_negatives_depend_on_the_seed_alone(positives, tokenizer):
    """A resumed or repeated run must see the same negatives, a run with another seed others in every random class."""
    rows, again, other = (data.with_negatives(positives, tokenizer, 60, seed) for seed in (7, 7, 8))
    assert rows == again
    changed = {row.kind for row, another in zip(rows, other, strict=True) if row.response != another.response}
    assert changed == set(data.NEGATIVES) - {"copied_input"}


def test_random_tokens(positives, tokenizer):
    """Noise of the true length: were it longer or shorter, length alone would give it away."""
    for positive, negative in negatives(positives, tokenizer, 60, "random_tokens"):
        *ids, last = negative.response
        assert len(negative.response) == len(positive.response) and last == tokenizer.eos
        assert not [i for i in ids if re.fullmatch(r"<unk>|</?s>|<0x..>", tokenizer.with_prefix.id_to_token(i))]


def test_mismatched(positives, tokenizer):
    """Each true response is used once, under an input whose own text differs: else a truth would be labelled 0."""
    pairs = negatives(positives, tokenizer, 60, "mismatched")
    assert all(negative.response != positive.response for positive, negative in pairs)
    assert sorted(negative.response for _, negative in pairs) == sorted(positive.response for positive, _ in pairs)


def test_shuffled(positives, tokenizer):
    """The same words, never in the same order; where no other order exists there is no such negative."""
    for positive, negative in negatives(positives, tokenizer, 60, "shuffled"):
        words = tokenizer.decode(negative.response).split()
        assert words != positive.target.split() and sorted(words) == sorted(positive.target.split())
        assert negative.response[-1] == tokenizer.eos
    for text in ("小明中午在公园下棋。", "今天 下雨", "ฉันรักแมว"):  # without blanks, or with few
        datum = data.Datum("", "", text, [1], [*tokenizer.encode(text), 2])
        mixed = tokenizer.decode(data.shuffled(datum, None, tokenizer, 60, random.Random(0)))
        assert mixed != text and sorted(mixed.replace(" ", "")) == sorted(text.replace(" ", ""))
    for text in ("Hello", "no no no", "猫"):
        datum = data.Datum("", "", text, [1], [*tokenizer.encode(text), 2])
        assert data.shuffled(datum, None, tokenizer, 60, random.Random(0)) is None


def test_repetitive(positives, tokenizer):
    """A true beginning, then a loop of at most 8 tokens; without EOS exactly where the cap cut it, and both occur."""
    ends = Counter()
    for positive, negative in negatives(positives, tokenizer, 60, "repetitive"):
        cut = negative.response[-1] != tokenizer.eos
        body = negative.response if cut else negative.response[:-1]
        assert len(body) == 60 if cut else len(body) < 60
        loops = [
            (k, n) for k in range(1, len(body)) if body[:k] == positive.response[:k] for n in range(1, min(8, k) + 1)
            if body[k:] == body[k - n : -n]
        ]  # fmt: skip
        assert loops, body
        ends[cut] += 1
    assert ends[True] > 20 and ends[False] > 20


def test_copied_input(positives, tokenizer):
    """The input itself, cut at the cap; EOS exactly where the cap did not cut, and both occur."""
    ends = Counter()
    for positive, negative in negatives(positives, tokenizer, 60, "copied_input"):
        text = tokenizer.encode(positive.source)
        assert negative.response == (text[:60] if len(text) >= 60 else [*text, tokenizer.eos])
        ends[len(text) >= 60] += 1
    assert ends[True] > 20 and ends[False] > 20


def test_derangement_of_labels():
    """Outputs yes and no at 2 : 1, as a task of labels has them: as many rows as can be re-paired are, each response is
    used once, the rest has no partner, and which rows these are is random.
    """
    texts = ["yes"] * 40 + ["no"] * 20
    found = [data.derangement(texts, random.Random(seed)) for seed in range(20)]
    for p in found:
        pairs = [(i, partner) for i, partner in enumerate(p) if partner is not None]
        assert len(pairs) == 40 and all(texts[i] != texts[partner] for i, partner in pairs)
        assert sorted(i for i, _ in pairs) == sorted(partner for _, partner in pairs)
    assert len({tuple(p) for p in found}) == 20
    assert data.derangement(["a"] * 3, random.Random(0)) == [None] * 3


@pytest.mark.parametrize("texts", ["ab", "aabb", "aaabbc", "abcdefgh", "aaaaabcdef"])
def test_derangement(texts):
    """A permutation without a clash, up to the hardest case that has one: a text that fills exactly half."""
    for seed in range(50):
        p = data.derangement(list(texts), random.Random(seed))
        assert sorted(p) == list(range(len(texts))) and all(texts[p[i]] != texts[i] for i in range(len(texts)))


# ----------------------------------------------------------------------------------------------------------------------
# Negatives that contradict the data, and those that the data bring


def labelled(tokenizer, rows):
    examples = [data.Example(str(i), *row) for i, row in enumerate(rows)]
    return data.encode(examples, tokenizer)[0]


def test_no_negative_reads_as_a_truth(tokenizer):
    """In copy-editing data the copied input IS the truth; a loop of "ha ha ha" may be, too; and another truth of the
    same source is no mismatch. Labelled 0, they would teach the reward model that truths are bad.
    """
    rows = [(f"Sam will go at {i}.", f"Sam will go at {i}.") for i in range(30)]
    rows += [(f"who called {i}", "ha ha ha") for i in range(30)]
    rows += [("What is 2?", answer) for answer in ("two", "a number", "a prime") for _ in range(10)]
    data_rows = labelled(tokenizer, rows)
    truths = {(row.source, row.target) for row in data_rows}
    made = data.with_negatives(data_rows, tokenizer, 60, 0)
    for row in made:
        assert row.label == 1 or (row.source, tokenizer.decode(row.response).strip()) not in truths
    kinds = Counter((row.kind, row.source == row.target) for row in made)
    assert kinds["copied_input", True] == 0 and kinds["copied_input", False] == 60
    assert 60 < kinds["mismatched", True] + kinds["mismatched", False] < 90


def test_no_negative_has_the_ids_of_a_truth(tmp_path, bpe):
    """A tokenizer that lowers letters and joins blanks: an input that differs from the output in nothing else is the
    output to the model, and two inputs may be one prompt. As text they differ, and were negatives.
    """
    shutil.copytree(bpe["smollm2"], tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    lower = [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}]
    raw["normalizer"] = {"type": "Sequence", "normalizers": lower}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = data.load_tokenizer(tmp_path, "plain")
    rows = [(f"sam  will go at {i}.", f"Sam will go at {i}.") for i in range(30)]
    rows += [("SAM will go at 1.", f"no, at {i}", 0.0) for i in range(2)] + [
        ("sam will go at 1.", "sam will GO at 1.", 0.0)
    ]
    rows = labelled(tokenizer, rows)
    truths = {(*row.prompt, *row.response) for row in rows if row.label}
    made = data.with_negatives(rows, tokenizer, 60, 0)
    assert not [row for row in made if not row.label and (*row.prompt, *row.response) in truths]
    assert Counter(row.kind for row in made)["copied_input"] == 0 and Counter(row.kind for row in made)["rejected"] == 2


def test_bad_outputs_of_the_data_are_a_class(tokenizer):
    """They follow as a class of their own that weighs no more than another, however many they are; one that is a truth
    of the same source contradicts it and is left out.
    """
    rows = [(f"in {i}", f"out {i} is this") for i in range(10)] + [(f"in {i}", f"bad {i}", 0.0) for i in range(5)]
    made = data.with_negatives(labelled(tokenizer, rows), tokenizer, 60, 0)
    rejected = [row for row in made if row.kind == "rejected"]
    assert [row.target for row in rejected] == [f"bad {i}" for i in range(5)]
    assert {row.label for row in rejected} == {0.0} and {row.weight for row in made if not row.label} == {1 / 6}
    rows += [(f"in {i % 10}", f"worse {i}", 0.0) for i in range(15)] + [("in 1", "out 1 is this", 0.0)]
    made = data.with_negatives(labelled(tokenizer, rows), tokenizer, 60, 0)
    rejected = [row for row in made if row.kind == "rejected"]
    assert len(rejected) == 20 and sum(row.weight for row in rejected) == pytest.approx(10 / 6)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_collate():
    """The mask covers response and EOS and nothing else, also where the text holds id 0, which is the padding's too."""
    rows = [data.Datum("", "", "", [1, 0, 5], [0, 7, 0, 2]), data.Datum("", "", "", [1, 6], [2], 0.0, 0.2, "x")]
    batch = data.collate(rows)
    assert batch.tokens.tolist() == [[1, 0, 5, 0, 7, 0, 2], [1, 6, 2, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert batch.prompt_len.tolist() == [3, 2] and batch.ref_len.tolist() == [4, 1]
    assert batch.label.tolist() == [1.0, 0.0] and torch.equal(batch.weight, torch.tensor([1.0, 0.2]))
    assert torch.equal(batch.judged, batch.mask)


def test_batches():
    """Each row once an epoch, in an order that (seed, epoch) alone decides, with half a plain shuffle's padding."""
    rng = random.Random(0)
    lengths = [rng.randint(10, 400) for _ in range(1003)]
    dealt = data.batches(lengths, 7, seed=1, epoch=0)
    assert sorted(i for rows in dealt for i in rows) == list(range(1003))
    assert Counter(map(len, dealt)) == {7: 143, 2: 1}
    assert dealt == data.batches(lengths, 7, 1, 0)
    orders = [dealt, data.batches(lengths, 7, 1, 1), data.batches(lengths, 7, 2, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])

    def padding(batches):
        return sum(max(lengths[i] for i in rows) - lengths[i] for rows in batches for i in rows)

    plain = rng.sample(range(1003), 1003)
    assert padding(dealt) < padding([plain[i : i + 7] for i in range(0, 1003, 7)]) / 2
    longer = sum(lengths[a[0]] < lengths[b[0]] for a, b in zip(dealt, dealt[1:], strict=False))
    assert 0.3 < longer / len(dealt) < 0.7  # no drift from short to long


# ----------------------------------------------------------------------------------------------------------------------
# Delimiters and encodings


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_the_delimiter_is_that_of_the_header(tmp_path, delimiter):
    """Excel writes `;` in half of the world: read as one column, such a file was refused without a reason. A comma in
    the header decides for the comma, whatever else is in it.
    """
    file = tmp_path / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    lines = [f"id{delimiter}input{delimiter}output"]
    lines += [f"{i}{delimiter}in {i} of; them{delimiter}out {i}" for i in range(10)]
    if delimiter == ";":
        lines = [line.replace("of; them", "of, them") for line in lines]
    file.write_text("\n".join(lines) + "\n")
    rows = data.load(file, "train")
    assert [row.target for row in rows] == [f"out {i}" for i in range(8)]
    assert rows[3].source.startswith("in 3 of")


def test_a_semicolon_in_a_cell_is_text(tmp_path):
    """A header with commas keeps the comma, though its cells contain other delimiters."""
    file = tmp_path / "rows.csv"
    file.write_text("input,output\n" + "a;b|c,d;e\n" * 10)
    assert {(row.source, row.target) for row in data.load(file, "train")} == {("a;b|c", "d;e")}


@pytest.mark.parametrize(("encoding", "named"), [("cp1252", "CP1252"), ("utf-16", "UTF-16")])
def test_the_remedy_names_the_encoding(tmp_path, encoding, named):
    """iconv -f LATIN1, the former remedy, turns Excel's quotes into control characters, and UTF-16 into rubbish."""
    file = tmp_path / "rows.csv"
    text = "input,output\n" + "she said \u201chi\u201d,hi\n" * 10
    file.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f"not UTF-8 at byte .*iconv -f {named} -t UTF-8 rows.csv"):
        data.load(file, "train")
    file.write_bytes(file.read_bytes().decode(named.lower()).encode())  # what the command does
    assert data.load(file, "train")[0].source == "she said \u201chi\u201d"
