"""Reading files that others wrote: limits on their size, strict JSON, one line about what is wrong."""

import json
from pathlib import Path

from formats.errors import UserError


class BadJson(ValueError):
    """JSON that Python's json reads although the standard forbids it."""


def parse_json(text):
    """JSON as the standard has it: no NaN, no key twice, no nesting or number without end."""

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise BadJson("duplicate key")
        return found

    def refuse(name):
        raise BadJson(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise BadJson("nested too deep") from None
    except (json.JSONDecodeError, BadJson):
        raise
    except ValueError as error:  # a whole number of more than 4300 digits
        raise BadJson(str(error)) from None


def within(file, limit):
    """The file, unless it is larger than any of its kind is."""
    if file.stat().st_size > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise UserError(f"{file}: over {size}, larger than any such file is; name or download the right one")
    return file


def read_text(file, limit):
    try:
        return within(file, limit).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; download it again or convert it") from None


def read_json(file):
    """The object in a JSON file of at most 64 MiB, the largest index of shards being well below."""
    try:
        if Path(file).stat().st_size > 64 << 20:
            raise UserError("over 64 MiB")
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; a model folder needs it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); download the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object; download the file again")
    return found
