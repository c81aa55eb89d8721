"""`sample` in a terminal: texts in, outputs token by token, until Ctrl-D or until the terminal is gone."""

import fcntl
import json
import multiprocessing
import os
import pty
import select
import signal
import sys
import termios
import time

import pytest
import torch

import lastmile
import model
from interface.use import converse, printer, read_text

TEXT = "Amy: Shall we go?\nBen: Yes, at six!"


def child_of(side, terminal, command, output=None):
    """What the forked process does: run a command with the terminal as its standard input, output and error."""
    os.close(side)
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # the terminal that SIGHUP and Ctrl-C come from
    signal.alarm(60)  # whatever happens, nothing is left behind
    os.dup2(terminal, 0)
    os.dup2(terminal, 2)
    os.dup2(terminal if output is None else output, 1)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ["TERM"] = "dumb"
    code = lastmile.main(command)
    sys.stdout.flush()
    os._exit(code)


class Terminal:
    """A pseudo-terminal and a command in it."""

    def __init__(self, command, output=None):
        self.side, inner = pty.openpty()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=child_of, args=(self.side, inner, command, output))
        self.process.start()
        os.close(inner)
        self.seen = ""

    def type(self, text):
        os.write(self.side, text.encode())

    def wait_for(self, text, seconds=10):
        """Read until a text is there, beyond what an earlier call has waited for. Returns what came before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.side], [], [], max(0, end - time.monotonic()))[0], (text, self.seen)
            self.seen += os.read(self.side, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self):
        """Wait for the process, reading on. Returns (exit code, all that was left to read)."""
        while select.select([self.side], [], [], 5)[0]:
            try:
                found = os.read(self.side, 4096).decode()
            except OSError:  # the other side is closed
                break
            if not found:
                break
            self.seen += found
        self.process.join(5)
        return self.process.exitcode, self.seen


@pytest.fixture
def flags(run_folder):
    """sample over the small base; its few tokens are printed as they come."""
    return ["sample", "--output-dir", str(run_folder), "--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def adapter(run_folder, tmp_path):
    """An adapter that changes the outputs."""
    llama = model.load(run_folder / "base")
    llama.add_adapter("mle", 4, 64.0, ["q_proj", "up_proj"], torch.Generator().manual_seed(0))
    for parameter in llama.adapter_parameters("mle"):
        torch.nn.init.normal_(parameter.data, 0, 0.5, generator=torch.Generator().manual_seed(1))
    llama.save_adapter("mle", tmp_path / "adapter", "base")
    return str(tmp_path / "adapter")


def shown(text):
    """What a terminal shows of a text: its line ends are CR LF."""
    return text.replace("\n", "\r\n")


def test_a_conversation(flags, capsys):
    """Two texts, the first of two lines: each gets the output that `sample TEXT` gives, and Ctrl-D ends it with 0."""
    outputs = []
    for text in (TEXT, "Zoe: Hello."):
        assert lastmile.main([*flags, "--adapter", "base", text]) == 0
        outputs.append(capsys.readouterr().out)
    terminal = Terminal([*flags, "--adapter", "base"])
    terminal.wait_for("Ctrl-D ends")
    for text, output in zip((TEXT, "Zoe: Hello."), outputs, strict=True):
        terminal.wait_for("> ")
        terminal.type(f"{text}\n\n")
        terminal.wait_for(shown(output))
    terminal.wait_for("> ")
    terminal.type("\x04")
    code, rest = terminal.end()
    assert (code, "Traceback" in rest) == (0, False), rest


def test_outputs_side_by_side(flags, adapter, capsys):
    """--adapter base,FOLDER: both outputs, labelled, each what it is alone, sampled ones too."""
    flags += ["--temperature", "1"]
    alone = {}
    for name in ("base", adapter):
        assert lastmile.main([*flags, "--adapter", name, TEXT]) == 0
        alone[name] = capsys.readouterr().out
    assert alone["base"] != alone[adapter]
    assert lastmile.main([*flags, "--adapter", f"base,{adapter}", TEXT]) == 0
    assert capsys.readouterr().out == "".join(f"{name}: {output}" for name, output in alone.items())
    assert lastmile.main([*flags, "--adapter", "base,base", TEXT]) == 2
    assert "base is named twice" in capsys.readouterr().err


def test_a_text_that_is_too_long_ends_nothing(flags, run_folder):
    """It is refused in one line, and the next text is asked for."""
    context = json.loads((run_folder / "base/config.json").read_text())["max_position_embeddings"]
    terminal = Terminal([*flags, "--adapter", "base", "--max-new-tokens", str(context - 8)])
    terminal.wait_for("> ")
    terminal.type("one two three four five six\n\n")
    assert "lastmile.py: " in terminal.wait_for("shorten the text")
    terminal.wait_for("> ")
    terminal.type("\x04")
    code, rest = terminal.end()
    assert code == 0, rest


@pytest.mark.parametrize("moment", ["at the prompt", "in an output"])
def test_a_terminal_that_closes(flags, moment, tmp_path):
    """The window is closed: the process ends by SIGHUP, as a shell's do, or at the end of its input; no traceback."""
    log = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    terminal = Terminal([*flags, "--adapter", "base"], log)
    terminal.wait_for("Ctrl-D ends")
    if moment == "in an output":
        terminal.type(f"{TEXT}\n\n")
    os.close(terminal.side)
    terminal.process.join(10)
    assert terminal.process.exitcode in (0, -signal.SIGHUP)
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_ctrl_c_ends_an_output_only(monkeypatch, capsys):
    """An output that is interrupted is cut short, and the next text is asked for."""
    lines = iter(["a", "", "b", ""])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    answered = []

    def answer(text):
        answered.append(text)
        if text == "a":
            raise KeyboardInterrupt

    converse(answer)
    assert answered == ["a", "b"]


def test_parts_of_a_character_wait(capsys):
    """An emoji of four byte tokens is printed once it is whole, never as question marks; control characters are not
    sent to the terminal.
    """
    encoded = "a😀\x1b[2J".encode()
    show = printer(lambda ids: bytes(ids).decode("utf-8", "replace"))
    steps = []
    for byte in encoded:
        show(torch.tensor([byte]))
        steps.append(capsys.readouterr().out)
    show()
    assert steps == ["a", "", "", "", "😀", "\\x1b", "[", "2", "J"]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("typed", "text"),
    [(["", " ", "a", "b", ""], "a\nb"), (["a", EOFError], "a"), ([EOFError], ""), (["a", OSError], "a")],
)
def test_texts_end_with_an_empty_line(monkeypatch, typed, text):
    """Empty lines before a text are skipped; what was typed before Ctrl-D, or before the terminal closed, counts."""
    lines = iter(typed)

    def read(prompt):
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert read_text() == text
