"""A conversation on a terminal: texts as they are typed, outputs as they are sampled."""

import sys

from formats.columns import encodable, strip
from formats.errors import UserError
from training.terminal import say, visible

NO_TEXT = "no text to answer, or not UTF-8; give it as an argument or on standard input"


def texts(argument):
    """The texts to answer: the argument; or standard input; or, on a terminal, what is typed until Ctrl-D.

    Raises UserError, before any model is loaded, where there is none.
    """
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        return typed()
    text = strip(argument if argument is not None else sys.stdin.read())
    if not text or not encodable(text):
        raise UserError(NO_TEXT)
    return [text]


def typed():
    """Yield texts, each of lines up to an empty one, until the terminal ends."""
    say("Type a text of one or more lines, and an empty line behind it; Ctrl-D ends.")
    lines = []
    while True:
        try:
            line = input("> " if not lines else "  ")
        except (EOFError, OSError):  # Ctrl-D, or the terminal was closed
            say("")
            return
        except UnicodeDecodeError:
            say("that was not UTF-8; it is left out")
            lines = []
            continue
        if line.strip():
            lines.append(line)
        elif lines:
            text, lines = strip("\n".join(lines)), []
            if encodable(text):
                yield text


class Typewriter:
    """Prints an output while it is sampled: called with each token of the one row."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, token):
        self.ids.append(int(token[0]))
        self.show(self.tokenizer.decode(self.ids).rstrip("\ufffd"))  # which the next token may complete

    def show(self, text):
        print(visible(text[self.shown :]), end="", flush=True)
        self.shown = max(self.shown, len(text))

    def end(self):
        self.show(self.tokenizer.decode(self.ids))
        print()
