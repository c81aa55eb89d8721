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
import math
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

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
from safety.lines import Lines
from safety.loggers import open_loggers
from safety.memory import FreeMemory, peak_memory
from safety.terminal import Stopped, say, warn
from safety.validation import BEST


class Run:
    """The state of one training; see the top of this file. Its `first` step is 0, or the step of a checkpoint.

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
        self.first = self.restore() if ranks.first() else 0
        self.take_over()
        self.loggers = open_loggers(settings, stage, self.first) if ranks.first() else []

    # Resume

    def restore(self):
        """Load the checkpoint that --resume names, or the latest valid one. Returns how many steps are done."""
        resume = self.settings.resume
        if not resume:
            clear(*checkpoints(self.folder))
            return 0
        places = checkpoints(self.folder) if resume == "auto" else [Path(resume).resolve()]
        for place in reversed(places):
            try:
                tensors, facts = read_checkpoint(place)
            except UserError as error:
                if resume != "auto":
                    raise UserError(f"{error}; name another checkpoint, or use --resume auto") from None
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
        facts.pop("--eval-examples", None)  # counted in older versions
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
        self.metrics = Lines(self.folder / "metrics.jsonl", lambda row: row["step"] < self.first)
        self.logs = [self.metrics]
        if self.validate:  # that of the checkpoint's step belongs to it
            self.validations = Lines(self.folder / "validation.jsonl", lambda row: row["step"] <= self.first)
            self.logs.append(self.validations)
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
        for close in (*[lines.close for lines in self.logs], self.bar.close, *[close for _, close in self.loggers]):
            with suppress(OSError):
                close()
        if kind and issubclass(kind, FloatingPointError):
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
        """Print what this process did for the run, and what a whole epoch would take if --max-steps cuts it."""
        done, minutes, cost = self.step + 1 - self.first, (time.monotonic() - self.started) / 60, self.cost()
        if done < 1:
            return
        epoch, whole = math.ceil(len(self.rows) / self.settings.batch_size), ""
        if 0 < self.settings.max_steps < epoch:
            whole = f"; an epoch has {epoch} steps: about {minutes / done * epoch:.1f} minutes"
        say(
            f"{self.stage}: {done} steps, {self.tokens} tokens, {cost['tokens_per_second']:.0f} tokens/s, "
            f"{minutes:.1f} minutes, peak memory {cost['peak_memory_gb']:.2f} GB{whole}"
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
        self.validations.add({"step": done} | self.validated)
        with suppress(OSError):  # a full disk: `save` reports it
            self.validations.flush()
        for write, _ in self.loggers:
            write(self.validated, done)
        if self.keeps_best:
            name, choose = BEST[self.stage]
            value = self.validated[name]
            if self.best is None or choose(value, self.best[0]) != self.best[0]:
                self.best = value, done, [p.detach().clone() for p in self.optimizer.parameters]

    def end_step(self):
        """Validate and save when it is time; raise Stopped if a signal or --max-time asks for it."""
        done, steps = self.step + 1, self.steps
        self.bar.update()
        if self.validate and (done % self.settings.eval_every == 0 or done == steps):
            self.validate_now(done)
        if 0 < self.settings.max_time * 60 < time.monotonic() - ranks.world.started:
            self.stop = self.stop or signal.SIGTERM
        stop = ranks.most(self.stop)
        if stop:  # do not store 0: a signal may have arrived meanwhile; the next step handles it
            self.stop = stop
        must = done == steps or bool(stop)
        if ranks.first() and (must or done % self.settings.save_every == 0):
            self.save(done, must)
        if must:
            ranks.wait()  # if the first rank could not save, all end as it does
        if stop:
            raise Stopped(stop)
        self.free_memory.end_step()

    def save(self, done, must):
        """Write a checkpoint and delete the oldest. A full disk is an error only if there is no next attempt (must)."""
        place = self.folder / "checkpoints" / f"step-{done:08}"
        try:
            for lines in self.logs:
                lines.sync()
            tensors, facts = state_of(self.optimizer), self.facts | {"step": done}
            if self.best:
                facts["best"] = self.best[:2]
                tensors |= {f"best.{i:06}": tensor for i, tensor in enumerate(self.best[2])}
            write_checkpoint(place, tensors, facts)
        except OSError as error:
            if must:
                raise OSError(errno.EIO, f"not saved ({error.strerror})", str(place)) from error
            return warn(f"{place}: not saved ({error.strerror}); the run continues, older checkpoints remain")
        saved = checkpoints(self.folder)
        if later := [old.name for old in saved if old > place]:
            say(f"\n{self.stage}: removes {', '.join(later)}: this run was resumed from an earlier step")
        earlier = [old for old in saved if old <= place]  # later ones: damaged, or of a run that was taken back
        recent = earlier[-self.settings.keep_checkpoints :]
        clear(*(old for old in saved if old not in recent))

    # Log

    def log(self, step, batch, **numbers):
        """Write a line of metrics.jsonl, and every --log-every steps the progress bar."""
        tokens = (batch.prompt_len.sum() + batch.mask.sum()).item()  # without padding
        self.tokens += tokens
        numbers["padding"] = round(1 - tokens / batch.tokens.numel(), 4)
        self.metrics.add({"step": step} | numbers)
        with suppress(OSError):  # a full disk: the lines wait for the next call, and `save` reports it
            self.metrics.flush()
            for write, _ in self.loggers:  # the log itself is the same in every run, and has no clock
                write({name: float(x) for name, x in (numbers | self.cost()).items() if x is not None}, step)
        if step % self.settings.log_every == 0:
            self.show(numbers)

    def show(self, numbers):
        """Update the progress bar."""
        shown = {name: f"{numbers[name]:.3g}" for name in self.bar_columns if numbers[name] is not None}
        shown |= {name: f"{value:.3g}" for name, value in self.validated.items() if "auc" not in name}
        speed, memory = self.cost().values()
        self.bar.set_postfix(shown | {"tok/s": f"{speed:.0f}", "GB": f"{memory:.1f}"})


def changes(then, now):
    """What differs between the fingerprints of a checkpoint and of this run, in words, causes first.

    A setting that the checkpoint has and this run has not does no longer change a result.
    """
    changed = []
    for name in now | {name: value for name, value in then.items() if not name.startswith("--") or name in now}:
        before, after = then.get(name), now.get(name)
        if before != after:
            changed.append(f"{name} ({before} then, {after} now)" if name.startswith("--") else name)
    return changed
