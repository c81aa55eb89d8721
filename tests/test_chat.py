"""`sample` on a terminal: texts in, tokens out as they come, until Ctrl-D."""

import os
import pty
import re
import sys
import time

import pytest

import data
import lastmile

SOURCE = data.toy("test")[0].source


@pytest.fixture
def terminal(run_folder, fresh_run):
    """A function that runs `sample` on a pseudo-terminal, types a text and returns (what it showed, exit status)."""
    children = []

    def run(typed, *flags, hang_up=False):
        child, handle = pty.fork()
        if child == 0:
            code = 99
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 -- not pytest's
            try:
                words = ["--model", str(run_folder / "base"), "--output-dir", str(fresh_run.folder)]
                code = lastmile.main(["sample", *words, "--max-new-tokens", "12", *flags])
            finally:
                os._exit(code)
        children.append(child)
        shown = read_until(handle, b"> ")
        os.write(handle, typed.encode())
        if hang_up:
            os.close(handle)
        else:
            shown += read_until(handle, None)
        deadline = time.monotonic() + 30
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        return shown.decode("utf-8", "replace").replace("\r\n", "\n"), status

    return run


def read_until(handle, mark):
    """What a terminal shows until a mark, or until it ends."""
    shown = b""
    while mark is None or mark not in shown:
        try:
            part = os.read(handle, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    return shown


def test_a_conversation(terminal, run_folder, fresh_run, capsys):
    """Two texts, the first of two lines, each answered as `sample "text"` answers it; Ctrl-D ends with exit code 0."""
    shown, (_, status) = terminal(f"{SOURCE}\n\nx\n\n\x04", "--adapter", "base")
    assert os.waitstatus_to_exitcode(status) == 0 and "Traceback" not in shown
    for text in (SOURCE, "x"):
        words = ["--model", str(run_folder / "base"), "--output-dir", str(fresh_run.folder), "--adapter", "base"]
        assert lastmile.main(["sample", *words, "--max-new-tokens", "12", text]) == 0
        assert capsys.readouterr().out.strip().split("\n")[-1] in shown


def test_adapters_side_by_side(terminal, fresh_run):
    """`--adapter base,mle` answers twice, each under its name."""
    assert fresh_run("mle", "--train-examples", "7", "--max-steps", "1") == 0
    shown, (_, status) = terminal("x\n\n\x04", "--adapter", "base,mle")
    assert os.waitstatus_to_exitcode(status) == 0
    assert re.search(r"base:\n.*mle:\n", shown, re.S)


def test_a_terminal_that_closes(terminal):
    """A window closed in the middle of a text leaves no process behind."""
    _, (child, status) = terminal("half a te", "--adapter", "base", hang_up=True)
    assert child != 0


def test_a_text_that_is_too_long_ends_with_one_line(terminal):
    """The limit is said, with the remedy."""
    shown, (_, status) = terminal("word " * 500 + "\n\n", "--adapter", "base", "--max-new-tokens", "4000")
    assert os.waitstatus_to_exitcode(status) == 2 and "shorten the text, or lower --max-new-tokens" in shown
