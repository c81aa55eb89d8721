"""What protects a training, from its first step or a checkpoint to its last: log, checkpoints, ways to stop.

    with Run(folder, "mle", settings, rows, optimizer, steps, llama.folder) as run:
        for step in range(run.first, steps):
            run.begin_step(step, batch)
            ...                                       one update: see lastmile.train
            run.log(step, batch, loss=loss)
            run.end_step()

A signal (Ctrl-C, SIGTERM) or --max-time ends the run after the step it is in: it saves a checkpoint and raises Stopped.
"""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import tqdm

from formats.errors import UserError
from safety import ranks
from safety.checkpoint import (
    checkpoints,
    fingerprint,
    read_checkpoint,
    restore_state,
    rows_hash,
    setting_defaults,
    state_of,
    write_checkpoint,
)
from safety.files import clear, write_json
from safety.loggers import open_loggers
from safety.memory import FreeMemory, peak_memory
from safety.terminal import Stopped, say
from safety.validation import BEST


class Run:
    """The state of one training; see the top of this file. Its `first` step is 0, or where a checkpoint was saved.

    rows: list of Datum. steps: how many there will be. base: the model's folder, or None. depends_on: {name: hash} of
    what else changes the result. bar: names of the metrics that the progress bar shows. validate: see
    safety/validation.py; its numbers go to validation.jsonl, a line each --eval-every steps, and with --keep best the
    parameters of the best are what remains.
    """

    def __init__(
        self, folder, stage, settings, rows, optimizer, steps, base=None, depends_on=None, bar=("loss",), validate=None
    ):
        self.folder, self.stage, self.settings = folder, stage, settings
        self.rows, self.optimizer, self.steps = rows, optimizer, steps
        self.facts = fingerprint(stage, settings, rows, base, depends_on)
        self.bar_columns = bar
        self.validate = validate
        self.validated = {}  # the numbers of the last validation
        self.best = None  # (value, step, tensors) of the best validation, with --keep best
        self.keeps_best = validate is not None and settings.keep == "best"
        if self.keeps_best:
            self.facts["--keep"] = f"best of every {settings.eval_every}"
            self.facts["validation data"] = rows_hash(validate.rows, ("kind", "prompt", "response"))
        self.batch_ids = []  # of the current batch
        self.step = -1  # the current step
        self.stop = 0  # the number of the signal that asks the run to stop
        self.tokens = 0  # processed since the start
        self.free_memory = FreeMemory()
        ranks.agree(self.facts)
        self.loggers = open_loggers(settings, stage) if ranks.first() else []
        self.first = self.restore() if ranks.first() else 0
        self.take_over()

    # Resume

    def restore(self):
        """Load the checkpoint that --resume names. Returns the number of steps already done."""
        if not self.settings.resume:
            clear(self.folder / "checkpoints")
            return 0
        if self.settings.resume != "auto":
            place = Path(self.settings.resume).resolve()
            try:
                tensors, facts = read_checkpoint(place)
            except UserError as error:
                raise UserError(f"{error}; name another checkpoint, or use --resume auto") from None
            return self.continue_from(place, tensors, facts)
        places = checkpoints(self.folder)
        for place in reversed(places):
            try:
                tensors, facts = read_checkpoint(place)
            except UserError as error:
                say(f"lastmile.py: {error}; trying the one before", file=sys.stderr)
                continue
            return self.continue_from(place, tensors, facts)
        if places:
            raise UserError(
                f"{self.folder / 'checkpoints'}: no valid checkpoint; restore one from a copy, or start again with "
                f"--overwrite instead of --resume"
            )
        say(f"{self.stage}: no checkpoint to resume from; starts at step 0")
        return 0

    def continue_from(self, place, tensors, facts):
        """Take over a checkpoint's state and log, if it belongs to this very run. Returns its number of steps."""
        step = facts.pop("step")
        best = facts.pop("best", None)  # (value, step)
        if best:
            names = sorted(name for name in tensors if name.startswith("best."))
            self.best = (*best, [tensors.pop(name) for name in names])
        if changed := changes(setting_defaults(self.settings) | facts, self.facts):
            raise UserError(
                f"{place}: changed since: {', '.join(changed)}; undo the change, or start again with --overwrite"
            )
        try:
            restore_state(self.optimizer, tensors)
        except UserError as error:
            raise UserError(f"{place}: {error}; name another checkpoint, or start again with --overwrite") from None
        for name in ("metrics.jsonl", "validation.jsonl"):  # --resume PATH may name another run's checkpoint
            with suppress(shutil.SameFileError, FileNotFoundError):
                shutil.copyfile(place.parents[1] / name, self.folder / name)
        say(f"{self.stage}: resumes from {place}")
        return step

    def take_over(self):
        """Give all ranks what the first has restored."""
        state = None
        if self.first and ranks.first() and ranks.world.size > 1:  # on the CPU: else every rank's copy goes to this GPU
            state = {name: tensor.cpu() for name, tensor in state_of(self.optimizer).items()}
        self.first, self.best, state = ranks.from_first((self.first, self.best, state))
        if state and not ranks.first():
            restore_state(self.optimizer, state)

    # Start and end

    def __enter__(self):
        """Open the log and catch signals."""
        log = self.folder / "metrics.jsonl"
        self.file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.unwritten = b""
        cut_log(log, self.first)
        cut_log(self.folder / "validation.jsonl", self.first + 1)  # that of the checkpoint's step belongs to it
        clear(self.folder / "bad_batch.json")
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.started = time.monotonic()
        self.bar = tqdm.tqdm(
            total=self.steps, initial=self.first, desc=self.stage, unit="step", dynamic_ncols=True,
            disable=not ranks.first(),
        )  # fmt: skip
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.file)
        self.bar.close()
        for _, close in self.loggers:
            with suppress(OSError):
                close()
        if kind is FloatingPointError:
            self.explain(error)
        if kind is None or kind is Stopped:
            self.say_cost()
        if kind is None and self.best:
            value, step, tensors = self.best
            for parameter, tensor in zip(self.optimizer.parameters, tensors, strict=True):
                parameter.detach().copy_(tensor)
            say(f"{self.stage}: keeps step {step}, the best validation ({BEST[self.stage][0]} {value:.4g})")
        if self.stop and kind is None:  # the signal came after the last step
            raise Stopped(self.stop)

    def say_cost(self):
        """Print what this process did for the run, and what a whole epoch would take where --max-steps cuts it."""
        seconds = time.monotonic() - self.started
        done = self.step + 1 - self.first
        if done < 1:
            return
        epoch = math.ceil(len(self.rows) / self.settings.batch_size)
        whole = ""
        if 0 < self.settings.max_steps < epoch:
            whole = f"; an epoch has {epoch} steps: about {seconds / done * epoch / 60:.1f} minutes"
        say(
            f"{self.stage}: {done} steps, {self.tokens} tokens, {self.tokens / seconds:.0f} tokens/s, "
            f"{seconds / 60:.1f} minutes, peak memory {peak_memory(self.settings.device) / 1e9:.2f} GB{whole}"
        )

    def cost(self):
        """Speed and memory so far: what loggers get beside a step's numbers."""
        per_second = self.tokens / (time.monotonic() - self.started)
        return {"tokens_per_second": per_second, "peak_memory_gb": peak_memory(self.settings.device) / 1e9}

    def explain(self, error):
        """Write the ids of the batch whose loss was not finite, and add them to the error's message."""
        file = self.folder / "bad_batch.json"
        write_json(file, {"step": self.step, "ids": self.batch_ids})
        last = [place.name for place in checkpoints(self.folder)[-1:]]
        error.args = (f"step {self.step}: {error}; the batch's ids are in {file}; last checkpoint: {last or 'none'}",)

    def on_signal(self, number, frame):
        if self.stop:
            os._exit(128 + number)
        self.stop = number
        with suppress(OSError):  # Ctrl-C ends `| tee`, too
            os.write(2, b"\nlastmile.py: finishing this step, then saving; press Ctrl-C again to quit now\n")

    # Steps

    def begin_step(self, step, batch):
        """Remember what is worked on, for the message if it fails."""
        self.step = step
        self.batch_ids = [row.id for row in batch.rows]

    def validate_now(self, done):
        """Validate after `done` steps: log the numbers, and remember the parameters if they are the best so far."""
        self.validated = self.validate()
        line = {"step": done} | self.validated
        with open(self.folder / "validation.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for write, _ in self.loggers:
            write(done, self.validated)
        if self.keeps_best:
            name, choose = BEST[self.stage]
            value = self.validated[name]
            if self.best is None or choose(value, self.best[0]) != self.best[0]:
                self.best = value, done, [p.detach().clone() for p in self.optimizer.parameters]

    def end_step(self):
        """Validate and save when it is time; raise Stopped where a signal or --max-time asks for it."""
        done, steps = self.step + 1, self.steps
        self.bar.update()
        if self.validate and (done % self.settings.eval_every == 0 or done == steps):
            self.validate_now(done)
        if 0 < self.settings.max_time * 60 < time.monotonic() - ranks.world.started:
            self.stop = self.stop or signal.SIGTERM
        stop = ranks.most(self.stop)
        if stop:  # 0 is not stored: it would erase a signal that came during the exchange, and counts at the next step
            self.stop = stop
        must = done == steps or bool(stop)
        if ranks.first() and (must or done % self.settings.save_every == 0):
            self.save(done, must)
        if must:
            ranks.wait()  # where the first rank could not save, all end as it does
        if stop:
            raise Stopped(stop)
        self.free_memory.end_step()

    def save(self, done, must):
        """Write a checkpoint and delete the oldest. A full disk is an error only if there is no next attempt (must)."""
        place = self.folder / "checkpoints" / f"step-{done:08}"
        try:
            self.flush()
            os.fsync(self.file)
            tensors, facts = state_of(self.optimizer), self.facts | {"step": done}
            if self.best:
                facts["best"] = self.best[:2]
                tensors |= {f"best.{i:06}": tensor for i, tensor in enumerate(self.best[2])}
            write_checkpoint(place, tensors, facts)
        except OSError as error:
            if must:
                raise OSError(errno.EIO, f"not saved ({error.strerror})", str(place)) from error
            say(
                f"\nlastmile.py: {place}: not saved ({error.strerror}); the run continues, older checkpoints remain",
                file=sys.stderr,
            )
            return
        saved = checkpoints(self.folder)
        earlier = [old for old in saved if old <= place]  # later ones: damaged, or of a run that was taken back
        recent = earlier[-self.settings.keep_checkpoints :]
        clear(*(old for old in saved if old not in recent))

    # Log

    def log(self, step, batch, **numbers):
        """Write a line of metrics.jsonl, and every --log-every steps the progress bar."""
        tokens = (batch.prompt_len.sum() + batch.mask.sum()).item()  # without padding
        self.tokens += tokens
        numbers["padding"] = round(1 - tokens / batch.tokens.numel(), 4)
        self.unwritten += json.dumps({"step": step} | numbers).encode() + b"\n"
        with suppress(OSError):  # a full disk: the lines wait for the next call, and `save` reports it
            self.flush()
            for write, _ in self.loggers:  # the log itself is the same in every run, and has no clock
                write(step, {name: float(x) for name, x in (numbers | self.cost()).items() if x is not None})
        if step % self.settings.log_every == 0:
            self.show(numbers)

    def flush(self):
        """Write the lines that are still waiting."""
        while self.unwritten:
            self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]

    def show(self, numbers):
        """Update the progress bar."""
        shown = {name: f"{numbers[name]:.3g}" for name in self.bar_columns if numbers[name] is not None}
        shown |= {name: f"{value:.3g}" for name, value in self.validated.items() if "auc" not in name}
        shown["tok/s"] = f"{self.cost()['tokens_per_second']:.0f}"
        if self.settings.device == "cuda":
            shown["GB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        self.bar.set_postfix(shown)


def changes(then, now):
    """What differs between the fingerprints of a checkpoint and of this run, in words, causes first."""
    changed = []
    for name in now | then:
        before, after = then.get(name), now.get(name)
        if before != after:
            changed.append(f"{name} ({before} then, {after} now)" if name.startswith("--") else name)
    return changed


def cut_log(file, step):
    """Cut a log before its first line of `step` or later: a killed run may have logged more than it saved, or half a
    line.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines:
        os.truncate(file, sum(map(len, itertools.takewhile(lambda line: is_before(line, step), lines))))


def is_before(line, step):
    """Whether a line of a log is whole and of an earlier step."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] < step
    except (ValueError, LookupError, TypeError):  # a power failure leaves zeros
        return False
