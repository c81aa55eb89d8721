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


def known(folder, column):
    """The inputs (column 0) that an adapter has learned from, or inputs with outputs (1), as hashes; None: unknown."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    return {line.split()[column] for line in file.read_text(errors="replace").splitlines() if len(line.split()) == 2}


def seen(folder, rows, column):
    """How many rows an adapter has learned from, see `known`; None: unknown."""
    found = known(folder, column)
    return None if found is None else sum(hashes(row)[column] in found for row in rows)


def warn_of_other_data(folder, rows):
    """Warn if less than half of an adapter's data, or of the rows that it is to be used with, is in the other."""
    rows = [row for row in rows if row.label]
    found = seen(folder, rows, 1)
    if found is not None and 2 * found < min(len(rows), len(known(folder, 1))):
        seen_of = f"it has seen {found} of these {len(rows)} examples"
        warn(f"{folder}: trained on other data: {seen_of}; train another, if that is not meant")
