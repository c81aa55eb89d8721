"""The one error that is the user's to fix."""


class UserError(ValueError):
    """Input that cannot be used. Its message is one line: what is wrong, where, and the command or edit that fixes it.

    `lastmile.py` prints the message and exits with code 2. Any other ValueError is a bug and keeps its traceback.
    """
