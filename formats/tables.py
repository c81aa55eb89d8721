"""Tables of text: CSV, JSON, JSONL and parquet files, folders of them, and data sets of the Hub, as pairs of texts.

    read("samsum", "train") -> [(id, source, target, label), ...]

The words NA and None stay text. Every error names the file, the row and the remedy. What the columns mean is decided in
formats/columns.py.
"""

import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from formats import columns
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
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet", ".tsv")  # all but parquet also as .csv.gz and so on
DELIMITERS = ";\t|"  # of a .csv whose header has no comma
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_SHARE = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}  # of ten rows of a single file
ARROW = "what `save_to_disk` wrote; convert each split: datasets.load_from_disk(FOLDER).to_parquet('train.parquet')"
ROW_LIMIT = 10_000_000
FILE_LIMIT = 2 << 30  # bytes of a text file, which is read whole
INFLATION_LIMIT = 100  # times its own size that a parquet file may decompress to; texts reach about 5


def read(name_or_path, split, input_column=None, target_column=None, negative_column=None, delimiter=None):
    """All rows of one split: a list of (id, source, target, label), texts stripped and line ends as "\n".

    name_or_path: a preset (the folder data/<name> where there is one, else the Hub), a folder with files for each
    split, or one file, of whose rows each ten are split 8:1:1. delimiter: of .csv files, found from the header by
    default. label: 1, or 0 for an output that the data call bad (`rejected`, KTO's label, negative_column).
    Prints which columns are not used. Raises FileNotFoundError or UserError with the file, the row and the remedy.
    """
    names = columns.Names(input_column, target_column, negative_column)
    delimiter = read_delimiter(delimiter)
    files = find_files(name_or_path, split)
    rows = []  # of lists: what one row of the file contains
    empty = 0
    unused = {}  # names in the order of the file
    without_weight = several = 0
    for file in files:
        for number, row in read_rows(file, delimiter):
            where = f"{file}:{number}"
            layout = columns.find_layout(where, row, names)
            unused |= dict.fromkeys(columns.unused(row, layout))
            if name_or_path in PRESETS and not all(str(row[name] or "").strip() for name in layout.used if name):
                empty += 1  # XSum has a few, which its user cannot fix
                continue
            name = row.get("id")
            name = str(number) if name in (None, "") else str(name)
            pairs = columns.pairs_of(where, row, layout)
            without_weight += not pairs
            several += columns.has_several_answers(where, row, layout)
            rows.append([(name, pair.source, pair.target, pair.label) for pair in pairs])
            if len(rows) > ROW_LIMIT:
                raise UserError(f"{file}: over {ROW_LIMIT} rows; cut it")
    if empty:
        print(f"{split}: skipped {empty} rows of {name_or_path} with an empty text", file=sys.stderr)
    if unused:
        names = ", ".join(repr(str(name))[1:-1] for name in [*unused][:8]) + (", …" if len(unused) > 8 else "")
        print(f"{split}: columns of {name_or_path} that are not used: {names}", file=sys.stderr)
    if any(re.search(columns.RATINGS, str(name).lower()) for name in unused):
        print(
            f"{split}: if one of these rates an output, that does not count: all are learned as good", file=sys.stderr
        )
    ends = [name[0] for pair in itertools.chain(*rows) if (name := re.search(r"(</s>|<\|\w+\|>)$", pair[2]))]
    if ends:
        print(f"{split}: {len(ends)} outputs end with the text {ends[0]}; remove it: EOS is added", file=sys.stderr)
    if without_weight:
        print(f"{split}: skipped {without_weight} rows whose output has weight 0", file=sys.stderr)
    if several:
        print(f"{split}: {several} conversations have several answers: the last one is the output", file=sys.stderr)
    if Path(name_or_path).is_file():
        rows = share_of_file(name_or_path, split, rows)
    if not any(rows):
        raise UserError(f"{files[0]}: no rows; expected a header line and data (CSV) or one object a line (JSONL)")
    return [pair for row in rows for pair in row]


def read_inputs(path, input_column=None, delimiter=None):
    """All inputs of a file, whose rows need no target: a list of (id, source)."""
    file = Path(path)
    if not path:
        raise UserError("predict: which inputs? Add --input FILE")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --input takes a file of inputs: {', '.join(SUFFIXES)}")
    names = columns.Names(input_column)
    rows = []
    for number, row in read_rows(file, read_delimiter(delimiter)):
        where = f"{file}:{number}"
        source = columns.input_of(where, row, columns.find_inputs(where, row, names))
        name = row.get("id")
        rows.append((str(number) if name in (None, "") else str(name), source))
    if not rows:
        raise UserError(f"{file}: no rows; expected a header line and data (CSV) or one object a line (JSONL)")
    return rows


def check_there(name_or_path):
    """Raise FileNotFoundError unless --data names a preset, or a file or folder that exists."""
    if name_or_path not in ("toy", *PRESETS) and not Path(name_or_path).exists():
        raise FileNotFoundError(
            f"{name_or_path}: no such file or folder; --data takes toy, {', '.join(PRESETS)}, or the path of your own "
            f"data"
        )


def find_files(name_or_path, split):
    """The files of one split."""
    check_there(name_or_path)
    preset = PRESETS.get(str(name_or_path))
    path = Path("data") / name_or_path if preset else Path(name_or_path)
    if path.is_dir():
        return find_split(path, split)
    if path.exists():
        return [path]
    pattern = preset.files.format(split=split)
    return sorted(fetch(preset.repo, preset.revision, [pattern], "dataset").glob(pattern))


def share_of_file(path, split, rows):
    """The rows of one split of a single file: of each ten rows 8 for training, 1 for validation, 1 for test."""
    if len(rows) < 10:
        raise UserError(
            f"{path}: {len(rows)} rows; a single file is split 8:1:1 into train, validation and test and needs at "
            f"least 10, or give --data a folder with one file for each split"
        )
    return [row for i, row in enumerate(rows) if i % 10 in SPLIT_SHARE[split]]


def find_split(folder, split):
    """The file of a split, or its numbered parts as the Hub names them: train-00000-of-00002.parquet, also in data/."""
    found = {}  # what one split is made of: {name without numbers: files}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else []:
            name = re.fullmatch(r"([a-z]+)(-\d{5}-of-(\d{5}))?(\.\w+)(\.gz)?", file.name)
            if name and name[1] in SPLIT_NAMES[split] and is_table(file) and file.is_file():
                key = (place, name[1], name[4], name[5], name[3])
                found.setdefault(key, []).append(file)
    if len(found) > 1:
        names = " and ".join(str(files[0].relative_to(folder)) for files in found.values())
        raise UserError(f"{folder}: more than one table for the {split} split: {names}; remove or rename all but one")
    for (*_, parts), files in found.items():
        if parts and len(files) != int(parts):
            raise UserError(f"{folder}: {len(files)} of {int(parts)} parts of the {split} split; download the others")
        return files
    if any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow")):
        raise UserError(f"{folder}: {ARROW}")
    names = ", ".join(f"{stem}{suffix}" for stem in SPLIT_NAMES[split] for suffix in SUFFIXES)
    raise FileNotFoundError(f"{folder}: no file for the {split} split; expected one of {names}")


def is_table(file):
    """Whether --data reads files of this name."""
    return suffix_of(file) in SUFFIXES and file.suffixes[-2:] != [".parquet", ".gz"]


def suffix_of(file):
    """The suffix that tells the format: .csv of train.csv and of train.csv.gz."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def read_rows(file, delimiter=None):
    """Yield (row number, dict) from a file; of text files the number is the line's. NA and None stay strings."""
    if file.suffix == ".arrow":
        raise UserError(f"{file}: {ARROW}")
    if not is_table(file):
        raise UserError(f"{file}: unknown file type; --data reads {', '.join(SUFFIXES)}, and .csv.gz and so on")
    suffix = suffix_of(file)
    if suffix == ".parquet":
        yield from enumerate(read_parquet(file), 1)
        return
    text = decode(file)
    lines = io.StringIO(text, newline="")  # splits at \n and \r only: U+2028 may be inside a string
    number = 0
    remedy = "fix or remove that row"
    try:
        if suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_json(line)
        elif suffix == ".json":
            rows = parse_json(text)
            if not isinstance(rows, list):
                raise UserError(f"{file}: expected a list of objects; write one object a line and call it .jsonl")
            yield from enumerate(rows, 1)
        else:  # CSV; strict: an unclosed quote would otherwise swallow the rest of the file in silence
            csv.field_size_limit(columns.TEXT_LIMIT)
            if named := re.match(r'"?sep=(.)"?\r?\n', text, re.IGNORECASE):  # Excel's first line
                text, delimiter = text[named.end() :], delimiter or named[1]
                lines.readline()
            delimiter = delimiter or delimiter_of(suffix, text)
            reader = csv.DictReader(lines, strict=True, delimiter=delimiter, skipinitialspace=True)
            header = reader.fieldnames or []
            twice = [name for i, name in enumerate(header) if name.strip() and name in header[:i]]
            if twice:
                raise UserError(f"{file}: two columns are called {twice[0]!r}; rename one")
            number = reader.line_num if header else 0
            for row in reader:
                number = reader.line_num + bool(named)
                if None in row:  # where csv puts the cells for which the header has no name
                    raise UserError(
                        f"{file}:{number}: more cells than the header has; put quotes around text that contains "
                        f"{delimiter!r}, or name another --delimiter"
                    )
                yield number, row
    except (csv.Error, json.JSONDecodeError, BadJson) as error:
        number += suffix in (".csv", ".tsv")  # the row after the last good one
        number = number or getattr(error, "lineno", 1)
        if suffix == ".json" and str(error).startswith("Extra data"):
            remedy = "if it contains one object a line, call it .jsonl"
        raise UserError(f"{file}:{number}: {error}; {remedy}") from None


def decode(file):
    """The text of a UTF-8 file, unpacked from .gz. Raises UserError with the command that converts another encoding."""
    content = read_bytes(file)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        encoding = "CP1252"  # Windows'; its quotes would become control characters as LATIN1
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            encoding = "UTF-16"
        unpacked = f"gzip -dc {file.name} | iconv" if file.suffix == ".gz" else "iconv"
        source = "" if file.suffix == ".gz" else f" {file.name}"
        command = f"{unpacked} -f {encoding} -t UTF-8{source} > NEW{suffix_of(file)}"
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; convert it: {command}") from None


def read_bytes(file):
    """What a file contains, of a .gz what it unpacks to."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as opened:
            content = opened.read(FILE_LIMIT + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: not a readable gzip file ({error}); download it again") from None
    if len(content) > FILE_LIMIT:
        raise UserError(f"{file}: over {FILE_LIMIT >> 30} GiB of text; cut it, or write it as .parquet")
    return content


def read_delimiter(value):
    """The character that --delimiter names, \\t as two characters included; None where it names none."""
    value = "\t" if value in ("\\t", "tab") else value
    if value and (len(value) > 1 or value in '"\r\n'):
        raise UserError(f"--delimiter {value!r}: must be one character, or \\t for a tab")
    return value or None


def delimiter_of(suffix, text):
    """What separates the cells: a tab in .tsv; a comma in .csv, unless the header has none but another delimiter."""
    if suffix == ".tsv":
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
