"""Files of JSON lines that outlive their process: a killed run is continued at the last whole line."""

import fcntl
import json
import os

from formats.errors import UserError


class Lines:
    """A .jsonl file, new or continued, and locked. `rows` are those that it had.

    A kill leaves half a line, a power failure zeros: the file is cut before the first line that is not whole.
    """

    def __init__(self, path, keep=None):
        """keep: row -> bool; the file is also cut before the first row that it refuses. None: keeps all."""
        self.rows, self.ends, self.waiting = [], [0], b""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for it to end") from None
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                whole = line.endswith(b"\n") and (keep is None or keep(row))
            except (ValueError, LookupError, TypeError):
                break
            if not whole:
                break
            self.rows.append(row)
            self.ends.append(self.ends[-1] + len(line))
        self.cut(len(self.rows))

    def cut(self, n):
        """Keep the first n rows only."""
        self.rows = self.rows[:n]
        self.file.truncate(self.ends[n])

    def add(self, *rows):
        """Add rows; they wait for `flush`."""
        for row in rows:
            self.waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def flush(self):
        """Write the rows that wait. On a full disk what is left waits for the next call, and OSError is raised."""
        while self.waiting:
            self.waiting = self.waiting[os.write(self.file.fileno(), self.waiting) :]

    def sync(self):
        """Write the rows that wait, and wait until they are on the disk."""
        self.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
