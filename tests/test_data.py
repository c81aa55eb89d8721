"""Data: files in, examples out; examples in, token ids, negatives and batches out."""

import json
import random
import re
import shutil
from collections import Counter

import pytest
import torch

import data

HARD = [
    "Zoë café naïve",
    "🙂👩‍👩‍👧",
    "two\nlines\n\nand a third",
    "a  b\tc",
    "東京 12345",
    "</s> <s> [INST] <unk> <0x0A>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    (folder / "template.txt").write_text(data.SHORT_TEMPLATE)
    return data.train_tokenizer([e.source + "\n" + e.target for e in data.toy("test")], 600, folder)


@pytest.fixture(scope="module")
def llama_tokenizer(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(shared / "data/llama_tokenizer.model", folder / "tokenizer.model")
    return data.load_tokenizer(folder)


@pytest.fixture(scope="module")
def positives(tokenizer):
    """100 encoded dialogues, the last ten with the summary of the first: duplicates are what real data has."""
    examples = data.toy("test")[:90]
    examples += [data.Example(f"again-{i}", e.source, examples[0].target) for i, e in enumerate(examples[:10])]
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
    assert {split: len(data.toy(split)) for split in data.TOY_SIZES} == data.TOY_SIZES
    assert data.toy("test") == data.toy("test") == data.load("toy", "test")
    assert data.toy("test")[2] == data.Example(
        "toy-test-2",
        "Ben: Shall we paint a picture at the office tomorrow?\nZoe: Sorry, I have no time.",
        "Zoe does not want to paint a picture with Ben tomorrow.",
    )


def test_toy_splits_share_no_dialogue():
    """A test dialogue seen in training, or in pretraining, would make the test score a memory test."""
    sources = [example.source for split in data.TOY_SIZES for example in data.toy(split)]
    assert len(set(sources)) == len(sources) == sum(data.TOY_SIZES.values())


def test_toy_summary_tells_the_final_plan():
    """The toy's one difficulty: a later line overrules an earlier one, and the summary must follow the later one."""
    changed = 0
    for example in data.toy("train"):
        lines = example.source.split("\n")
        assert 2 <= len(lines) <= 8 and all(re.match(r"[A-Z][a-z]+: \S", line) for line in lines)
        change = re.search(r"(?:What about|Better at the) (.+?)[.?]", example.source)
        if change:
            changed += 1
            place, time = re.search(rf" at the (\w+) ({'|'.join(data.TIMES)})\?", example.source).groups()
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
@pytest.mark.parametrize(("source", "target"), [*data.COLUMNS, ("frage", "antwort")])
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
    "unguessable": ("text,label\na,b\n", r"train\.csv.* text, label; .* --input-column"),
    "unclosed quote": ('dialogue,summary\na,b\nc,"d\ne,f\n', r"train\.csv:3: .* mend"),
    "bad json": (GOOD + "{'dialogue': 1}\n" + GOOD, r"train\.jsonl:2: .* mend"),
    "array": (GOOD + '["a", "b"]\n', r"train\.jsonl:2: expected an object"),
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


@pytest.mark.parametrize("which", ["tokenizer", "llama_tokenizer"])
def test_tokenizer_round_trip(which, request):
    """Any text comes back from its ids, and no text can spell a control token: an EOS inside would end a row early."""
    tokenizer = request.getfixturevalue(which)
    for text, ids in zip(HARD, tokenizer.encode(HARD), strict=True):
        assert tokenizer.encode(text) == ids and not {0, tokenizer.bos, tokenizer.eos} & set(ids)
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eos, *ids]) == text


def test_tokenizer_refuses(tmp_path):
    """A folder without a tokenizer, and a file that is none, are named."""
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.model or tokenizer\.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        data.load_tokenizer(tmp_path)


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


def test_parts_tokenise_as_the_whole(shared, llama_tokenizer):
    """Prompt and target are tokenised apart; the ids must be those of the joint text, which a chat model has seen."""
    for example in data.load(shared / "data/samsum", "test")[:300]:
        prompt = data.TEMPLATES["llama2"][0].replace("{source}", example.source)
        apart = llama_tokenizer.encode(prompt) + llama_tokenizer.encode(example.target)
        assert llama_tokenizer.encode(f"{prompt} {example.target}") == apart


def test_load_template(tmp_path):
    """A model folder may bring its own template; one without a place for the text, or with two, trains nonsense."""
    assert data.load_template("", tmp_path, {}) == data.TEMPLATES["llama2"]
    (tmp_path / "template.txt").write_text("Été: {source}\n", encoding="utf-8")
    assert data.load_template("", tmp_path, {}) == ("Été: {source}\n", "")
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
        assert not [i for i in ids if re.fullmatch(r"<unk>|</?s>|<0x..>", tokenizer.sp.id_to_piece(i))]


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
    for text in ("Hello", "no no no"):
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


@pytest.mark.parametrize("texts", [["a"], ["a", "a", "b"], ["a", "a"], []], ids=str)
def test_derangement_refuses(texts):
    """More than half of the texts alike: someone would be paired with the truth. Say so instead of looping for ever."""
    with pytest.raises(ValueError, match=f"outputs of {len(texts)} examples cannot be re-paired"):
        data.derangement(texts, random.Random(0))


@pytest.mark.parametrize("texts", ["ab", "aabb", "aaabbc", "abcdefgh", "aaaaabcdef"])
def test_derangement(texts):
    """A permutation without a clash, up to the hardest case that has one: a text that fills exactly half."""
    for seed in range(50):
        p = data.derangement(list(texts), random.Random(seed))
        assert sorted(p) == list(range(len(texts))) and all(texts[p[i]] != texts[i] for i in range(len(texts)))


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_collate():
    """The mask covers response and EOS and nothing else, also where the text holds id 0, which is the padding's too."""
    rows = [data.Datum("", "", "", [1, 0, 5], [0, 7, 0, 2]), data.Datum("", "", "", [1, 6], [2], 0.0, 0.2, "x")]
    batch = data.collate(rows)
    assert batch.tokens.tolist() == [[1, 0, 5, 0, 7, 0, 2], [1, 6, 2, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert batch.prompt_len.tolist() == [3, 2] and batch.ref_len.tolist() == [4, 1]
    assert torch.equal(batch.label, torch.tensor([1.0, 0.0])) and torch.equal(batch.weight, torch.tensor([1.0, 0.2]))


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
