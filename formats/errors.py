"""The errors that end a command in one line: input that the user can fix, and numbers that are not finite."""

from contextlib import contextmanager


class UserError(ValueError):
    """Input that cannot be used. Its message is one line: what is wrong, where, and the command or edit that fixes it.

    `lastmile.py` prints the message and exits with code 2. Any other ValueError is a bug and keeps its traceback.
    """


class NotFinite(FloatingPointError):
    """NaN or infinite numbers for a prompt, a list of ids. Exit code 3, as in training."""

    def __init__(self, cause, prompt):
        super().__init__(cause)
        self.prompt = prompt


@contextmanager
def name_row(rows):
    """Add a row's id to a NotFinite. rows: [(id, prompt)]."""
    try:
        yield
    except NotFinite as error:
        ids = [id for id, prompt in rows if prompt == error.prompt]
        raise FloatingPointError(f"row {ids[0]}: {error}") from None
