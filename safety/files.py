"""Small file operations that all of training shares."""

import hashlib
import json
import os
import shutil
from pathlib import Path


def clear(*paths):
    """Remove files and folders, those that exist."""
    for path in paths:
        if path.is_file() or path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def sync(path):
    """Wait until a file's contents, or a rename in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(file, value):
    """Write a value as indented JSON."""
    Path(file).write_text(json.dumps(value, indent=2) + "\n")


def digest(*paths, sample=1 << 26):
    """SHA-256 of files. Of a file above 64 MiB: of its size and of 64 pieces of 1 MiB spread over it."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for piece in pieces(file, 0, size, sample):
                found.update(piece)
    return found.hexdigest()


def pieces(file, start, end, sample):
    """The bytes of an open file from start to end; of more than `sample`, 64 pieces spread over them."""
    for place in range(start, end, max(sample // 64, (end - start) // 64, 1)):
        file.seek(place)
        yield file.read(min(max(sample // 64, 1), end - place))
