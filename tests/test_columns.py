"""What a table means: which columns are input, target and bad outputs, and which files make up a split."""

import csv
import gzip
import json

import pytest

import data
from data import Example

Q, A = {"role": "user", "content": "in"}, {"role": "assistant", "content": "out"}
BAD = {"role": "assistant", "content": "bad"}
PART = {"type": "text", "text": "in"}
FORMS = {  # a row as other tools write it: what it means as (source, target, label) of one or more examples
    "Alpaca": ({"instruction": "Do", "input": "in", "output": "out"}, [("Do\n\nin", "out", 1)]),
    "Alpaca, no input": ({"instruction": "Do", "input": "", "output": "out"}, [("Do", "out", 1)]),
    "Alpaca, null input": ({"instruction": "Do", "input": None, "output": "out"}, [("Do", "out", 1)]),
    "instruction alone": ({"instruction": "Do", "output": "out"}, [("Do", "out", 1)]),
    "Dolly": ({"instruction": "Do", "context": "in", "response": "out"}, [("Do\n\nin", "out", 1)]),
    "question about a passage": ({"context": "in", "question": "Who?", "answer": "out"}, [("Who?\n\nin", "out", 1)]),
    "system": ({"system": "S", "prompt": "in", "completion": "out"}, [("S\n\nin", "out", 1)]),
    "system, empty": ({"system": "", "prompt": "in", "completion": "out"}, [("in", "out", 1)]),
    "system beside messages": ({"messages": [Q, A], "system": "S"}, [("S\n\nin", "out", 1)]),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "in"},
                           {"from": "gpt", "value": "out"}]},
        [("S\n\nin", "out", 1)],
    ),
    "ShareGPT, turns": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                           {"from": "human", "value": "c"}, {"from": "gpt", "value": "out"}]},
        [("user: a\nassistant: b\nuser: c", "out", 1)],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "!"}]}, A]}, [("in!", "out", 1)]
    ),
    "any case": ({" Question ": "in", "ANSWER": "out"}, [("in", "out", 1)]),
    "KTO, good": ({"prompt": "in", "completion": "out", "label": True}, [("in", "out", 1)]),
    "KTO, bad": ({"prompt": "in", "completion": "out", "label": False}, [("in", "out", 0)]),
    "KTO, messages": ({"prompt": [Q], "completion": [BAD], "label": False}, [("in", "bad", 0)]),
    "KTO, response": ({"prompt": "in", "response": "out", "label": False}, [("in", "out", 0)]),
    "response, a class": ({"prompt": "in", "response": "out", "label": "news"}, [("in", "out", 1)]),
    "preferences": ({"prompt": "in", "chosen": "out", "rejected": "bad"}, [("in", "out", 1), ("in", "bad", 0)]),
    "preferences, messages": (
        {"prompt": [Q], "chosen": [A], "rejected": [BAD]}, [("in", "out", 1), ("in", "bad", 0)]
    ),
    "preferences, whole": (
        {"prompt": "in", "chosen": [Q, A], "rejected": [Q, BAD]}, [("in", "out", 1), ("in", "bad", 0)]
    ),
    "preferences, implicit prompt": (
        {"chosen": [Q, A], "rejected": [Q, BAD]}, [("in", "out", 1), ("in", "bad", 0)]
    ),
    "preferences, Alpaca": (
        {"instruction": "Do", "input": "in", "chosen": "out", "rejected": "bad"},
        [("Do\n\nin", "out", 1), ("Do\n\nin", "bad", 0)],
    ),
    "preferences, messages as objects": (
        {"conversations": [{"from": "human", "value": "in"}], "chosen": {"from": "gpt", "value": "out"},
         "rejected": {"from": "gpt", "value": "bad"}},
        [("in", "out", 1), ("in", "bad", 0)],
    ),
    "KTO, kto_tag": ({"messages": [Q, BAD], "kto_tag": False}, [("in", "bad", 0)]),
    "KTO, label beside messages": ({"messages": [Q, BAD], "label": False}, [("in", "bad", 0)]),
    "KTO, a word": ({"prompt": "in", "completion": "out", "label": "bad"}, [("in", "out", 0)]),
    "a role with a capital": ({"messages": [{"role": "User", "content": "in"}, A | {"role": "Assistant"}]},
                              [("in", "out", 1)]),
    "an object": ({"input": "in", "output": {"a": ["é", 1]}}, [("in", '{"a": ["é", 1]}', 1)]),
    "a system text in the middle": (
        {"messages": [{"role": "system", "content": "S"}, Q, {"role": "system", "content": "T"}, Q, A]},
        [("S\n\nuser: in\nsystem: T\nuser: in", "out", 1)],
    ),
    "no rejected": ({"prompt": "in", "chosen": "out", "rejected": ""}, [("in", "out", 1)]),
    "several rejected": (
        {"input": "in", "output": "out", "rejected": ["b", "c"]}, [("in", "out", 1), ("in", "b", 0), ("in", "c", 0)]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "means"), FORMS.values(), ids=FORMS)
def test_every_form_means_what_its_writer_meant(tmp_path, row, means):
    """Alpaca's instruction, a system text and KTO's label were dropped in silence: "Translate" and "Summarise" looked
    alike, and bad outputs were learned as truths.
    """
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert [(e.source, e.target, e.label) for e in data.load(tmp_path, "train")] == means


def test_a_label_counts_beside_named_columns(tmp_path):
    """A file with prompt, completion and response asks for names; KTO's label must not be lost by giving them."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "in", "completion": "out", "response": "x", "label": false}\n')
    rows = data.load(tmp_path, "train", "prompt", "completion")
    assert [(e.source, e.target, e.label) for e in rows] == [("in", "out", 0)]


def test_a_written_eos_is_told(tmp_path, capsys):
    """</s> at the end of an output is text here, of several tokens, which the model would learn to write before EOS."""
    rows = [{"input": "a", "output": text} for text in ("b</s>", "c <|im_end|>", "d")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(data.load(tmp_path, "train")) == 3
    assert capsys.readouterr().err == "train: 2 outputs end with the text </s>; remove it: EOS is added\n"


def test_tables_written_by_hand_and_by_excel(tmp_path):
    """A blank after the comma does not make quotes part of the text; columns without a name are none with one name."""
    (tmp_path / "train.csv").write_text('dialogue, summary,,\n"Hi, Anna", "She greets.",,\n')
    assert [(e.source, e.target) for e in data.load(tmp_path, "train")] == [("Hi, Anna", "She greets.")]


REFUSED = {  # a row and what the message must say
    "messages beside a pair": ({"messages": [Q, A], "prompt": "a", "completion": "b"}, "more than one pair"),
    "two targets": ({"prompt": "a", "completion": "b", "chosen": "c"}, "more than one pair"),
    "a label that is none": ({"prompt": "a", "completion": "b", "label": 0.5}, "'label' is 0.5, neither true nor"),
    "a missing label": ({"prompt": "a", "completion": "b", "label": None}, "'label' is None, neither"),
    "nothing but a system": ({"system": "", "prompt": "", "completion": "b"}, "'prompt' is empty"),
    "a system and nothing to do": ({"system": "S", "dialogue": "", "summary": "b"}, "'dialogue' is empty"),
    "a system and an empty input": ({"system": "S", "input": "", "output": "b"}, "'input' is empty"),
    "an instruction that is a list": ({"instruction": ["a"], "input": "b", "output": "c"}, "'instruction' is empty"),
    "a class number": ({"text": "a", "label": 1}, r"'label' is empty or not text \(a number"),
    "rejected by the user": ({"prompt": "a", "chosen": "b", "rejected": [Q]}, "of role 'assistant'"),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_rows_that_could_mean_two_things_are_refused(tmp_path, row, said):
    """A guess here is a wrong model without a word."""
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: .*{said}"):
        data.load(tmp_path, "train")


def test_a_csv_says_true_and_false(tmp_path):
    """KTO's label as pandas writes it, and as a spreadsheet does."""
    (tmp_path / "train.csv").write_text("prompt,completion,label\na,b,False\nc,d,TRUE\ne,f,0\n")
    assert [e.label for e in data.load(tmp_path, "train")] == [0, 1, 0]


def test_the_user_names_the_columns(tmp_path):
    """Names of the user's win over names that are known, in any case; bad outputs may have any name."""
    (tmp_path / "train.csv").write_text("input,output,Frage,antwort,falsch\na,b,c,d,e\n")
    found = data.load(tmp_path, "train", "frage", "antwort", "falsch")
    assert found == [Example("2", "c", "d"), Example("2", "c", "e", 0.0)]
    with pytest.raises(ValueError, match="no column 'wrong' among input, output.*--negative-column"):
        data.load(tmp_path, "train", negative_column="wrong")


def test_unused_columns_are_named(tmp_path, capsys):
    """One line says what of the data reaches no model; the id and the columns that are used are not in it."""
    row = {"id": 1, "system": "s", "instruction": "i", "input": "a", "output": "b", "topic": "t", "score": 1}
    (tmp_path / "train.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    data.load(tmp_path, "train")
    assert capsys.readouterr().err == (
        f"train: columns of {tmp_path} that are not used: topic, score\n"
        "train: if one of these rates an output, that does not count: all are learned as good\n"
    )


def test_what_messages_say_beside_their_text(tmp_path, capsys):
    """An answer of weight 0 is not to be learned; a field that is left out is named, and so are earlier answers."""
    rows = [[Q, A | {"weight": 0}], [Q, A | {"weight": 1, "reasoning_content": "Hm."}], [Q, BAD | {"weight": 0}, Q, A]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = data.load(tmp_path, "train")
    assert [(e.source, e.target) for e in found] == [("in", "out"), ("user: in\nassistant: bad\nuser: in", "out")]
    assert capsys.readouterr().err == (
        f"train: columns of {tmp_path} that are not used: messages.reasoning_content\n"
        "train: skipped 1 rows whose output has weight 0\n"
        "train: 1 conversations have several answers: the last one is the output\n"
    )
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": rows[0]}) + "\n")
    with pytest.raises(ValueError, match="no rows"):
        data.load(tmp_path, "train")


# ----------------------------------------------------------------------------------------------------------------------
# Files of a split


def test_two_tables_of_one_split_are_refused(tmp_path):
    """train.csv beat train.jsonl, and nobody knew which had been read."""
    (tmp_path / "train.csv").write_text("input,output\na,b\n")
    (tmp_path / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=r"more than one table for the train split: train\.csv and train\.jsonl; rem"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize("place", [".", "data"])
def test_numbered_parts_are_one_split(tmp_path, place):
    """The Hub's names, as `git clone` of a data set leaves them, in order; a part that lacks is no small matter."""
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    for i in range(3):
        (folder / f"train-0000{i}-of-00003.jsonl").write_text(json.dumps({"input": f"in {i}", "output": "out"}) + "\n")
    assert [e.source for e in data.load(tmp_path, "train")] == ["in 0", "in 1", "in 2"]
    (folder / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(ValueError, match="2 of 3 parts of the train split"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize("name", ["train.csv.gz", "train.jsonl.gz", "train.json.gz", "train.tsv.gz"])
def test_compressed_tables(tmp_path, name):
    """What is read is what was compressed; half a file is none."""
    text = {"csv": "input,output\na,b\n", "tsv": "input\toutput\na\tb\n"}.get(name.split(".")[1])
    row = {"input": "a", "output": "b"}
    text = text or json.dumps([row] if ".json." in name else row)
    content = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(content)
    assert [(e.source, e.target) for e in data.load(tmp_path, "train")] == [("a", "b")]
    (tmp_path / name).write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"{name}: not a readable gzip file .* download it again"):
        data.load(tmp_path, "train")
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=rf"{name}: not a readable gzip file"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize("delimiter", ["#", ":", "\\t"])
def test_the_user_names_the_delimiter(tmp_path, delimiter):
    """One that no header gives away, and a tab in a file called .csv."""
    file = tmp_path / "train.csv"
    cells = "\t" if delimiter == "\\t" else delimiter
    file.write_text(f"input{cells}output\na, b; c{cells}d\n")
    assert [(e.source, e.target) for e in data.load(tmp_path, "train", delimiter=delimiter)] == [("a, b; c", "d")]
    for wrong in (";;", '"', "\n"):
        with pytest.raises(ValueError, match="--delimiter .*must be one character"):
            data.load(tmp_path, "train", delimiter=wrong)


def test_a_header_that_is_one_cell_is_explained(tmp_path):
    """With the wrong delimiter, the message names the right one; an unquoted one inside a cell is named, too."""
    (tmp_path / "train.csv").write_text("input;output\na;b;c\n")
    with pytest.raises(ValueError, match=r"header's one cell is several: --delimiter ';'"):
        data.load(tmp_path, "train", delimiter=",")
    with pytest.raises(ValueError, match=r"train\.csv:2: more cells than the header has; .*contains ';'"):
        data.load(tmp_path, "train")


def test_the_first_line_of_excel(tmp_path):
    """sep=; names the delimiter and is no header; line numbers count it."""
    (tmp_path / "train.csv").write_text("sep=;\r\ninput;output\r\na, b;c\r\n")
    assert data.load(tmp_path, "train") == [Example("3", "a, b", "c")]
    (tmp_path / "train.csv").write_text("sep=;\ninput;output\na;b;c\n")
    with pytest.raises(ValueError, match=r"train\.csv:3: more cells than the header has"):
        data.load(tmp_path, "train")


def test_what_save_to_disk_wrote_is_named(tmp_path):
    """Nobody who has such a folder knows what a table for the train split is; the remedy is one command."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    for path in (tmp_path, tmp_path / "train", tmp_path / "train/data-00000-of-00001.arrow"):
        with pytest.raises(ValueError, match=r"what `save_to_disk` wrote; convert each split: .*to_parquet"):
            data.load(path, "train")


def test_two_columns_of_one_name_are_refused(tmp_path):
    """csv keeps the last of them: half of the inputs would be lost."""
    (tmp_path / "train.csv").write_text("input,output,input\na,b,c\n")
    with pytest.raises(ValueError, match="two columns are called 'input'"):
        data.load(tmp_path, "train")


def test_the_encoding_of_a_compressed_table(tmp_path):
    """The remedy unpacks it first."""
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress("input,output\ncafé,b\n".encode("cp1252")))
    with pytest.raises(ValueError, match=r"gzip -dc train\.csv\.gz \| iconv -f CP1252 -t UTF-8 > NEW\.csv"):
        data.load(tmp_path, "train")


CASES = {  # a file of ../shared/cases: the first training example, or what is said
    "alpaca_alpaca.json": Example("1", "Summarise in one sentence\n\nthe cat 0 sat on a mat", "cat 0 sat"),
    "alpaca_emptyin.jsonl": Example("1", "Summarise\n\nx", "y"),
    "alpaca_kto.jsonl": Example("1", "q 0", "a 0", 0.0),
    "alpaca_parts.jsonl": Example("1", "hi", "yo"),
    "alpaca_system.jsonl": Example("1", "Answer in French.\n\nq 0", "a 0"),
    "chosen_rejected.jsonl": Example("1", "0+1?", "1"),
    "formats_cp.csv": "not UTF-8 at byte 26; convert it: iconv -f CP1252",
    "labels.jsonl": Example("1", "Is 0 below 40?", "yes"),
    "negatives_equal_truth_rows.json": Example("0", *2 * ["Sam will go to the park at noon 0."]),
    "rouge_texts.json": "expected a list of objects",
    "semicolon.csv": "more cells than the header has; put quotes around text that contains ';'",
    "sharegpt.jsonl": Example("1", "0+1", "1"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_that_users_brought(shared, name):
    """Each does the right thing or says the right thing."""
    file = shared / "cases" / name
    if isinstance(CASES[name], Example):
        assert data.load(file, "train")[0] == CASES[name]
    else:
        with pytest.raises(ValueError) as error:
            data.load(file, "train")
        assert CASES[name] in str(error.value)


def test_quoted_semicolons_are_text(tmp_path):
    """The remedy of the last but one case works: with quotes, the trailing `;` of the SQL is a part of the target."""
    with open(tmp_path / "train.csv", "w", newline="") as opened:
        csv.writer(opened, delimiter=";").writerows([["question", "sql"], ["How many?", "SELECT 1;"]])
    assert data.load(tmp_path, "train", "question", "sql") == [Example("2", "How many?", "SELECT 1;")]
