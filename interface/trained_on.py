"""What an adapter has learned from: beside it a line a row, by which other data, and test rows among it, are noticed.

trained_on.txt    the hash of a row's input, and that of its input and output; never uploaded
"""

import hashlib
from pathlib import Path

from safety.terminal import warn

FILE = "trained_on.txt"


def hashes(row):
    """(hash of a row's input, hash of input and output), 16 characters each."""
    return [hashlib.sha256(repr(texts).encode()).hexdigest()[:16] for texts in (row.source, (row.source, row.target))]


def write(folder, rows):
    """Write the hashes of the true outputs among the rows, a list of Datum, beside their adapter."""
    lines = {" ".join(hashes(row)) for row in rows if row.label}
    (folder / FILE).write_text("".join(f"{line}\n" for line in sorted(lines)))


def seen(folder, rows, column):
    """How many rows an adapter has learned from, by their inputs (column 0) or outputs, too (1); None: unknown."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    known = {tuple(line.split())[column:][:1] for line in file.read_text(errors="replace").splitlines()}
    return sum((hashes(row)[column],) in known for row in rows)


def warn_of_other_data(folder, rows):
    """Warn if an adapter has learned from fewer than half of the rows that it is to be used with."""
    rows = [row for row in rows if row.label]
    found = seen(folder, rows, 1)
    if found is not None and 2 * found < len(rows):
        seen_of = f"it has seen {found} of these {len(rows)} examples"
        warn(f"{folder}: trained on other data: {seen_of}; train another, if that is not meant")
