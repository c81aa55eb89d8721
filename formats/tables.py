"""Tables of text: CSV, JSON, JSONL and parquet files, folders of them, and data sets of the Hub, as pairs of texts.

    read("samsum", "train") -> [(id, source, target), ...]

The words NA and None stay text. Every error names the file, the row and the remedy.
"""

import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from formats.errors import UserError
from formats.files import BadJson, parse_json
from formats.hub import fetch


@dataclass(frozen=True)
class Preset:
    """A data set of the Hugging Face Hub; in `files`, {split} is replaced by train, validation or test."""

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
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet", ".tsv")
DELIMITERS = ";\t|"  # of a .csv whose header has no comma
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_SHARE = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # of ten rows of a single file
FIELD_LIMIT = 1 << 20  # characters in one field; csv's own limit of 128 KiB is below some news articles
ROW_LIMIT = 10_000_000
FILE_LIMIT = 2 << 30  # bytes of a text file, which is read whole
INFLATION_LIMIT = 100  # times its own size that a parquet file may decompress to; texts reach about 5


def read(name_or_path, split, input_column=None, target_column=None):
    """All rows of one split: a list of (id, source, target), texts stripped and line ends as "\n".

    name_or_path: a preset (the folder data/<name> where there is one, else the Hub), a folder that contains
    {train,validation,test}.{csv,jsonl,json,parquet}, or one such file, of whose rows each ten are split 8:1:1.
    Raises FileNotFoundError or UserError with the file, the row and the remedy.
    """
    files = find_files(name_or_path, split)
    rows = []
    empty = 0
    for file in files:
        for number, row in read_rows(file):
            where = f"{file}:{number}"
            columns = guess_columns(where, row, input_column, target_column)
            if name_or_path in PRESETS and not all(str(row[column] or "").strip() for column in columns):
                empty += 1  # XSum has a few, which its user cannot fix
            else:
                rows.append(to_example(where, row, columns))
            if len(rows) > ROW_LIMIT:
                raise UserError(f"{file}: over {ROW_LIMIT} rows; cut it")
    if empty:
        print(f"{split}: skipped {empty} rows of {name_or_path} with an empty text", file=sys.stderr)
    if Path(name_or_path).is_file():
        rows = share_of_file(name_or_path, split, rows)
    if not rows:
        raise UserError(f"{files[0]}: no rows; expected a header line and data (CSV) or one object a line (JSONL)")
    return rows


def find_files(name_or_path, split):
    """The files of one split."""
    preset = PRESETS.get(str(name_or_path))
    path = Path("data") / name_or_path if preset else Path(name_or_path)
    if path.is_dir():
        return [find_split(path, split)]
    if path.exists():
        return [path]
    if preset:
        pattern = preset.files.format(split=split)
        return sorted(fetch(preset.repo, preset.revision, [pattern], "dataset").glob(pattern))
    raise FileNotFoundError(
        f"{path}: no such file or folder; --data takes toy, {', '.join(PRESETS)}, or the path of your own data"
    )


def share_of_file(path, split, rows):
    """The rows of one split of a single file: of each ten rows 8 for training, 1 for validation, 1 for test."""
    if len(rows) < 10:
        raise UserError(
            f"{path}: {len(rows)} rows; a single file is split 8:1:1 into train, validation and test and needs at "
            f"least 10, or give --data a folder with one file for each split"
        )
    return [row for i, row in enumerate(rows) if i % 10 in SPLIT_SHARE[split]]


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
    text = decode(file)
    lines = io.StringIO(text, newline="")  # splits at \n and \r only: U+2028 may be inside a string
    number = 0
    remedy = "fix or remove that row"
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
            reader = csv.DictReader(lines, strict=True, delimiter=delimiter_of(file, text))
            number = reader.line_num if reader.fieldnames else 0
            for row in reader:
                number = reader.line_num
                yield number, row
    except (csv.Error, json.JSONDecodeError, BadJson) as error:
        number += file.suffix in (".csv", ".tsv")  # the row after the last good one
        number = number or getattr(error, "lineno", 1)
        if file.suffix == ".json" and str(error).startswith("Extra data"):
            remedy = "if it contains one object a line, call it .jsonl"
        raise UserError(f"{file}:{number}: {error}; {remedy}") from None


def decode(file):
    """The text of a UTF-8 file. Raises UserError with the command that converts another encoding."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "CP1252"  # Windows'; its quotes would become control characters as LATIN1
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            encoding = "UTF-16"
        command = f"iconv -f {encoding} -t UTF-8 {file.name} > NEW{file.suffix}"
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it: {command}") from None


def delimiter_of(file, text):
    """What separates the cells: a tab in .tsv; a comma in .csv, unless the header has none but another delimiter."""
    if file.suffix == ".tsv":
        return "\t"
    header = text.split("\n", 1)[0]
    if "," in header:
        return ","
    found = [delimiter for delimiter in DELIMITERS if delimiter in header]
    return found[0] if found else ","


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
        raise UserError(f"{file}: not a readable parquet file ({error}); download it again") from None
    if size > most:
        raise UserError(f"{file}: decompresses to over {INFLATION_LIMIT} times its size; refused; download it again")


def guess_columns(where, row, input_column, target_column):
    """(input column, target column) of a row: those named, or the one pair of COLUMNS that is there."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with an input and a target column, found {row!r:.40}")
    if None in row:  # where csv puts the cells for which the header has no name
        raise UserError(f"{where}: more cells than the header has; put quotes around text that contains commas")
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
            raise UserError(f"{where}: column {column!r} is empty or not text; fix or remove that row")
        if len(text) > FIELD_LIMIT:
            raise UserError(f"{where}: column {column!r} is longer than {FIELD_LIMIT} characters; cut or remove it")
        if not encodable(text):
            raise UserError(f"{where}: column {column!r} contains an unpaired surrogate; fix or remove that row")
    target = row[columns[1]]
    if isinstance(target, list) and [turn["role"] for turn in target] != ["assistant"]:
        raise UserError(f"{where}: the last message must be one of role 'assistant'; fix or remove that row")
    name = row.get("id")
    number = where.rpartition(":")[2]
    source, target = texts
    return number if name in (None, "") else str(name), clean(source), clean(target)


def conversation(value):
    """The text of a list of {"role", "content"} messages; anything else as it is.

    A system message comes first, unchanged; one further message is the text itself, several become "role: text" lines:
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
