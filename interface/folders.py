"""The folder of a stage: locked while the stage runs, visible under its final name only once the stage is finished.

    runs/toy/mle.partial     while it runs, and after it was stopped
    runs/toy/mle             finished
    runs/toy/mle.replaced    for a moment, under --overwrite

A finished stage is never overwritten without --overwrite, and a killed one leaves nothing that looks finished.
"""

import fcntl
import os
import shlex
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from formats import tables
from formats.errors import UserError
from formats.llama_folder import is_model
from interface.outputs import check_push, push
from interface.settings import LLAMA2, changed
from safety import ranks
from safety.checkpoint import checkpoints
from safety.files import clear, sync, write_json
from safety.terminal import flag, say

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def stage_folder(settings, stage):
    """The folder that a stage writes to; a temporary one under --dry-run and on all ranks but the first."""
    check_push(settings)
    if stage != "merge":  # which reads no data
        tables.check_there(settings.data)
    say(f"{stage}: {' '.join(f'{flag(name)} {value}' for name, value in changed(settings).items())}")
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    final = Path(settings.output_dir) / stage
    if not ranks.first():
        ranks.wait()
        if not final.with_name(f"{stage}.partial").exists():
            raise UserError(
                f"{final.parent}: the first rank writes to it, and this one does not see it; name one that all share"
            )
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        ranks.wait()
        return
    partial = final.with_name(f"{stage}.partial")
    replaced = final.with_name(f"{stage}.replaced")
    new_run = not final.parent.exists()
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            make_room(settings, final, partial, replaced)
            ranks.wait()
            yield partial
            write_json(settings_file(partial), asdict(settings) | {"stage": stage, "commit": commit()})
            for path in (*partial.rglob("*"), partial):
                sync(path)
        except BaseException as error:
            with suppress(OSError):  # bad input leaves nothing behind
                partial.rmdir()
                if new_run:
                    partial.parent.rmdir()
            if isinstance(error, OSError) and error.errno and not error.filename:
                error.filename = str(partial)  # an error in writing does not name the file
            raise
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(final.parent)
        clear(replaced, final / "checkpoints")
    ranks.wait()
    push(settings, final / "policy" if stage == "ppo" else final)


def settings_file(folder):
    """Where a stage's folder keeps its settings: a model's config.json is Hugging Face's, there it is settings.json."""
    return folder / ("settings.json" if is_model(folder) else "config.json")


def make_room(settings, final, partial, replaced):
    """Refuse to overwrite results without being asked to, and remove what a killed run left behind."""
    if replaced.exists() and not final.exists():
        replaced.rename(final)  # the run was killed between the two renames of stage_folder
    clear(replaced, final / "checkpoints")
    if final.exists() and not settings.overwrite:
        raise FileExistsError(f"{final}: already exists; add --overwrite to replace it, or choose another --output-dir")
    resume = getattr(settings, "resume", "")
    saved = checkpoints(partial)
    if saved and not resume and not settings.overwrite:
        raise FileExistsError(f"{partial}: an interrupted run, saved at {saved[-1].name}; add --resume or --overwrite")
    if not resume:  # the checkpoints stay until the new run is sure to start, in Run.restore
        kept = "checkpoints", "metrics.jsonl", "validation.jsonl"
        clear(*(path for path in partial.iterdir() if path.name not in kept))


@contextmanager
def locked(folder):
    """Hold a lock on a folder. The kernel releases it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is using it; wait, or choose another --output-dir") from None
        yield
    finally:
        os.close(handle)


def commit():
    """The git commit of this checkout, with a + if files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # this machine has no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def require(folder, stage, settings):
    """The folder of an earlier stage, or the error that names the command that makes it."""
    if not Path(folder).exists():
        raise FileNotFoundError(f"{folder}: does not exist yet; run: python lastmile.py {command(stage, settings)}")
    return folder


def command(stage, settings):
    """How to run another stage of the same run: on its data, in its folder, from its base."""
    words = [stage, "--data", settings.data, "--output-dir", settings.output_dir]
    output = Path(settings.output_dir)
    for name in ("model", "input_column", "target_column", "negative_column", "delimiter", "template"):
        value = getattr(settings, name, "")
        implied = name == "model" and (value == LLAMA2 or Path(value) in (output / "base", output / "pretrain"))
        if value and not implied:
            words += [flag(name), value]
    return shlex.join(map(str, words))
