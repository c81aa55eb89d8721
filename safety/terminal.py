"""What the user sees: messages, warnings, progress bars; and the signal that ends a run."""

import os
import re
import sys
from contextlib import suppress
from functools import partial

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Stopped(BaseException):  # like KeyboardInterrupt: no library's `except Exception` may swallow it
    """A signal or --max-time ended the run; `signal` is its number."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


class DryRun(Exception):
    """--dry-run has printed what it can; the command ends here, well."""


class LostRank(Exception):
    """An exchange with the other ranks failed (see safety/ranks.py): one has ended, or did not answer in time."""


class Shown:
    """Whether this process shows anything: the first rank does."""

    anything = True


class Stream:
    """Standard output or error, of the first rank. Ignores closed pipes and full disks.

    What its encoding lacks is escaped, as in \\xb1.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if not Shown.anything:
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with suppress(OSError):
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()

    def flush(self):
        pass


def flag(name):
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")


def visible(text):
    """Text of unknown origin with its control characters escaped: they could command, or reorder, a terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text, file=None):
    """Print a text that may contain data of unknown origin, on the first rank."""
    print(visible(text), file=file)


def warn(text):
    """Print a warning to standard error."""
    say(f"lastmile.py: warning: {text}", file=sys.stderr)


def progress(title, unit="batch"):
    """A progress bar around any iterable: progress("eval mle")(range(10))."""
    import tqdm

    return partial(tqdm.tqdm, desc=title, unit=unit, dynamic_ncols=True, disable=not Shown.anything)
