"""`sample` as a conversation in a terminal: texts are typed, outputs are printed token by token.

Every text is an input of its own: lastmile's models answer one input, and remember none. A text may have several lines
and ends with an empty one. Ctrl-C ends an output, Ctrl-D the conversation.
"""

import sys
from contextlib import suppress

from formats.columns import encodable, strip
from formats.errors import UserError
from safety.terminal import say, visible


def given_text(text):
    """The text of the command line, or of a pipe or file on standard input; None where a terminal is to be asked."""
    if text is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        text = strip(text if text is not None else sys.stdin.read())
    except (AttributeError, UnicodeDecodeError):  # no standard input at all, or bytes
        text = ""
    if not text or not encodable(text):
        raise UserError("no text to summarize, or not UTF-8; give it as an argument or on standard input")
    return text


def converse(answer):
    """Read texts from the terminal until Ctrl-D, and call `answer` with each. What it refuses is said in one line."""
    with suppress(ImportError):
        import readline  # noqa: F401  a line may then be edited, and have more than the terminal's 4096 characters
    say("Type or paste a text, then an empty line; Ctrl-D ends.", file=sys.stderr)
    for text in iter(read_text, None):
        try:
            if not encodable(text):
                raise UserError("not UTF-8; type it again")
            answer(text)
        except UserError as error:
            say(f"lastmile.py: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            say("")


def read_text():
    """The lines up to an empty one, as one text; None at the end of the input, or where the terminal is gone."""
    prompt = "> " if sys.stdout.isatty() else ""  # a file of outputs stays one
    lines = []
    with suppress(EOFError, OSError, UnicodeDecodeError):
        while not lines or lines[-1].strip():
            lines.append(input(prompt))
            if not strip(lines[0]):
                lines.clear()
    return strip("\n".join(lines)) or None


class Output:
    """One output on its way to the terminal."""

    def __init__(self, decode, label=""):
        """decode: list of ids -> text. label: what comes before the text."""
        self.decode = decode
        self.ids = []
        self.shown = ""  # of the text
        print(visible(label), end="", flush=True)

    def add(self, token):
        """Print what a token, (1,), adds to the text. A part of a character waits for the rest of it."""
        self.ids.append(token.item())
        self.show(self.decode(self.ids).rstrip("\ufffd"))

    def show(self, text):
        """Print the rest of a text."""
        if text.startswith(self.shown):
            print(visible(text[len(self.shown) :]), end="", flush=True)
            self.shown = text

    def end(self, ids):
        """Print what is left of the whole output, and the end of the line."""
        self.show(self.decode(ids))
        print(flush=True)
