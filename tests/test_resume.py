"""Exact resume: whatever ends a training, --resume brings it to the bits that it would have reached in one go.

Most tests stop a training inside this process, where a step can be named. Those that need a process of its own to kill
start it from a `Worker`, which imports torch once and forks for every command line.
"""

import errno
import functools
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import contents, exit_code, journal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lastmile
from formats import llama_folder
from interface import folders
from interface.training_settings import Reward
from safety import checkpoint as checkpoint_files
from safety import files as training_files
from safety import run as run_module
from safety import terminal

BASE = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 1"
STAGES = {  # 14 rows in batches of 4: three epochs, each with a smaller last batch, in 12 steps
    "pretrain": f"--vocab-size 400 --warmup-steps 3 --max-new-tokens 200 {BASE}",
    "reward": "--eval-examples 4 --lora-r 4",
    "mle": "--lora-r 4",
    "ppo": "--lora-r 4 --ppo-epochs 2 --kl-coef 0.1 --entropy-coef 0.01 --log-every 4",
}
COMMON = "--device cpu --max-new-tokens 24 --learning-rate 1e-2 --batch-size 4 --max-steps 12 --save-every 3"


@pytest.fixture(scope="module")
def material(run_folder, tmp_path_factory):
    """A folder with what all trainings here start from: data (14 rows), base, and reward, an adapter."""
    folder = tmp_path_factory.mktemp("material")
    write_data(folder / "data")
    shutil.copytree(run_folder / "base", folder / "base")
    flags = f"--data {folder}/data --model {folder}/base --output-dir {folder} {COMMON} {STAGES['reward']}"
    assert lastmile.main(["reward", *flags.split(), "--save-every", "99"]) == 0
    return folder


def write_data(folder, change=lambda text: text):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {"id": e.id, "input": change(e.source), "output": change(e.target)} for e in lastmile.data.toy(split)[:14]
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(material, stage, folder, *flags):
    """A short training's command line; later flags win."""
    places = ["--data", material / "data", "--output-dir", folder]
    places += [] if stage == "pretrain" else ["--model", material / "base"]
    places += ["--reward", material / "reward"] if stage == "ppo" else []
    return [stage, *map(str, [*places, *COMMON.split(), *STAGES[stage].split(), *flags])]


@pytest.fixture
def train(material, tmp_path, monkeypatch):
    """train(stage, *flags) runs a short training in `train.folder` and returns its exit code."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for when the power fails, which no test here brings about

    def run(stage, *flags, folder=tmp_path / "run"):
        return exit_code(lastmile.main, command(material, stage, folder, *flags))

    run.folder, run.data = tmp_path / "run", material / "data"
    return run


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """whole(stage): what a training leaves that nothing has disturbed."""
    found = {}

    def run(stage):
        if stage not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert lastmile.main(command(material, stage, folder)) == 0
            found[stage] = result(folder / stage)
        return found[stage]

    return run


def result(folder):
    """All that a finished stage has left, to the byte, apart from settings and card: they name flags and folders."""
    own = "settings.json" if folder.name == "pretrain" else "config.json"
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if path != folder / own and path.name != "README.md"}  # fmt: skip


@pytest.fixture
def after(monkeypatch):
    """after({4: action}) has action(run) done when 4 steps are logged, before their checkpoint."""
    log = run_module.Run.log

    def plan(actions):
        def logged(run, step, batch, **numbers):
            log(run, step, batch, **numbers)
            if step + 1 in actions:
                actions[step + 1](run)

        monkeypatch.setattr(run_module.Run, "log", logged)

    return plan


def terminate(run):
    os.kill(os.getpid(), signal.SIGTERM)


def saved(folder, stage):
    """The steps of the checkpoints of an unfinished stage, each of which must hold."""
    places = checkpoint_files.checkpoints(folder / f"{stage}.partial")
    return [checkpoint_files.read_checkpoint(place)[1]["step"] for place in places]


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_every_step(train, whole, after, stage, tmp_path):
    """Sampled and true batches, ends of epochs, steps with a checkpoint and without: after any of them it goes on.
    Of PPO, the slowest, one of each kind; the next test stops it after every step.
    """
    for k in (1, 3, 4, 12) if stage == "ppo" else range(1, 13):
        folder = tmp_path / str(k)
        after({k: terminate})
        assert train(stage, folder=folder) == 143
        assert saved(folder, stage)[-1] == k and len(journal(folder / f"{stage}.partial")) == k
        after({})
        assert train(stage, "--resume", folder=folder) == 0
        assert result(folder / stage) == whole(stage), f"stopped after step {k}"
        assert sorted(path.name for path in folder.iterdir()) == [stage]


def test_stopped_after_every_step(train, whole, after):
    """Twelve stops in one run: what a resume brought back is itself saved and brought back."""
    after({k: terminate for k in range(1, 13)})
    assert [train("ppo", "--resume") for _ in range(13)] == [143] * 12 + [0]
    assert result(train.folder / "ppo") == whole("ppo")


class Worker:
    """A process that imports torch once and forks for every command line: a start costs 0.1 s in place of 2."""

    def __init__(self, log):
        self.log, path = log, os.pathsep.join([str(folders.ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, arguments, slow=0.0, log=None):
        """Run lastmile with these arguments. slow: seconds that every save waits in its hidden folder."""
        self.log.write_text("")
        self.process.stdin.write(json.dumps([arguments, slow, str(log or self.log)]) + "\n")
        self.pid = int(self.process.stdout.readline())

    def kill(self, number):
        with suppress(ProcessLookupError):  # it came to its end just now
            os.kill(self.pid, number)

    def wait(self):
        """The exit code; -9 of a process killed by signal 9."""
        return int(self.process.stdout.readline())


def slowed(sync, seconds, path):
    time.sleep(seconds)
    sync(path)


def serve():
    """The worker's side."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])
    for line in sys.stdin:
        arguments, slow, log = json.loads(line)
        pid = os.fork()
        if not pid:
            for number in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
            slow_sync = functools.partial(slowed, training_files.sync, slow)
            checkpoint_files.sync = folders.sync = slow_sync
            os._exit(lastmile.main(arguments))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker") / "log")
    yield worker
    worker.process.stdin.close()
    worker.process.wait()


def wait_for(condition):
    """Wait until condition() holds; what it looks for may not be there yet."""
    for _ in range(60_000):
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.0005)
    pytest.fail("waited for 30 seconds")


def saving(folder):
    return [name for name in os.listdir(folder / "checkpoints") if name.startswith(".step-")]


def disturbed(worker, arguments, folder, number, kills, draw):
    """Run a training again and again, ended by signal `number` at random moments, every other one inside a save.

    Returns (results of the trainings that came to their end, number of saves that were caught half-way).
    """
    ends, caught, stage = [], 0, arguments[0]
    while kills >= 0:
        final = folder / str(len(ends)) / stage
        partial = final.with_name(f"{stage}.partial")
        resume = ["--resume"] if partial.exists() else []
        worker.start([*arguments, "--output-dir", str(final.parent), *resume])
        if kills and kills % 2:
            wait_for(lambda final=final, partial=partial: final.exists() or saving(partial))
            time.sleep(draw.random() * 0.01)
            worker.kill(number)
        elif kills:
            time.sleep(draw.uniform(0, 0.4))
            worker.kill(number)
        code, ended = worker.wait(), final.exists()
        assert code in (0 if ended else 128 + number, -number, 128 + number), worker.log.read_text()
        if ended and code:  # while it cleared up
            worker.start([*arguments, "--output-dir", str(final.parent)])
            assert worker.wait() == 2 and "already exists" in worker.log.read_text()
        if ended:
            ends.append(result(final))
        elif (partial / "checkpoints").exists():
            caught += bool(saving(partial))
        kills -= bool(kills) or ended  # and once more, undisturbed
    return ends, caught


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 20), (signal.SIGTERM, 10)])
def test_killed_at_random_moments(worker, material, whole, number, kills, tmp_path):
    """kill -9 at any moment, saves included, and a polite SIGTERM: resumed, it ends as if nothing had happened."""
    arguments = command(material, "ppo", "", "--save-every", 1)
    ends, caught = disturbed(worker, arguments, tmp_path, number, kills, random.Random(number))
    assert all(end == whole("ppo") for end in ends)
    assert caught or number != signal.SIGKILL


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint must agree on


@pytest.fixture
def interrupted(train, after):
    """interrupted(stage, steps): a training stopped there, with a checkpoint; returns its folder."""

    def run(stage, steps=7, *flags):
        after({steps: terminate})
        assert train(stage, *flags) == 143
        after({})
        return train.folder / f"{stage}.partial"

    return run


def poke(file, name):
    """Change one number of a tensor of a safetensors file; the metadata are those of our own files."""
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key].view(-1)[0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def other_data(material, folder):
    write_data(folder / "data", lambda text: text.replace(" the ", " a "))
    return ["--data", folder / "data"]


def other_tokenizer(material, folder):
    shutil.copytree(material / "base", folder / "base")
    lastmile.data.train_tokenizer([e.source for e in lastmile.data.toy("test")], 700, folder / "base")
    return ["--model", folder / "base"]


def other_base(material, folder):
    shutil.copytree(material / "base", folder / "base")
    poke(folder / "base/model.safetensors", "embed_tokens")
    return ["--model", folder / "base"]


def other_template(material, folder):
    (folder / "template.txt").write_text("Summary of {source}:")
    return ["--template", folder / "template.txt"]


def other_reward(material, folder):
    shutil.copytree(material / "reward", folder / "reward")
    poke(folder / "reward/adapter_model.safetensors", "score")
    return ["--reward", folder / "reward"]


def other_stage(material, folder):
    assert lastmile.main(command(material, "reward", folder / "other", "--max-time", 1e-9)) == 143
    return ["--resume", folder / "other/reward.partial/checkpoints/step-00000001"]


CHANGES = {  # what the line must say: (stage, flags or what makes them)
    "changed since: data, prompt template": ("mle", other_data),
    "changed since: --max-new-tokens (24 then, 23 now)": ("mle", ["--max-new-tokens", 23]),
    "changed since: tokenizer, ": ("mle", other_tokenizer),
    "changed since: base model;": ("mle", other_base),
    "prompt template or negatives;": ("mle", other_template),
    "changed since: reward adapter;": ("ppo", other_reward),
    "changed since: stage, ": ("mle", other_stage),
    "changed since: --seed (1337 then, 5 now);": ("mle", ["--seed", 5]),
    "--learning-rate (0.01 then, 0.02 now)": ("mle", ["--learning-rate", 0.02]),
    "--lora-r (4 then, 8 now)": ("mle", ["--lora-r", 8]),
    "--batch-size (4 then, 7 now)": ("mle", ["--batch-size", 7]),
    "--dtype (float32 then, bfloat16 now)": ("mle", ["--dtype", "bfloat16"]),
    "--max-steps (12 then, 24 now)": ("mle", ["--max-steps", 24]),
    "--gamma (0.99999 then, 0.5 now)": ("ppo", ["--gamma", 0.5]),
    "changed since: data, prompt template or negatives;": ("pretrain", other_data),
}  # fmt: skip


@pytest.mark.parametrize("said", CHANGES)
def test_what_must_not_change(train, interrupted, material, whole, tmp_path, capsys, said):
    """A run that goes on with other data or settings is neither of two experiments: refused, naming what is other."""
    stage, flags = CHANGES[said]
    folder = interrupted(stage)
    flags = flags if isinstance(flags, list) else flags(material, tmp_path)
    before = contents(folder)
    capsys.readouterr()
    assert train(stage, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    if stage != "pretrain":  # which makes its tokenizer before it can compare
        assert contents(folder) == before
    assert train(stage, "--resume") == 0
    assert result(train.folder / stage) == whole(stage)


def test_what_may_change(train, interrupted, material, whole, tmp_path):
    """How often to save, how long to run, and where things lie have no part in the result."""
    interrupted("mle")
    shutil.copytree(material / "data", tmp_path / "moved")
    flags = "--save-every 2 --log-every 1 --max-time 9 --keep-checkpoints 3 --grad-checkpoint --data"
    assert train("mle", "--resume", *flags.split(), tmp_path / "moved") == 0
    assert result(train.folder / "mle") == whole("mle")


def test_resume_elsewhere(train, interrupted, whole, tmp_path):
    """--resume PATH goes on in another folder, log included, and leaves the run that it started from as it was."""
    folder = interrupted("ppo")
    before = contents(folder)
    assert train("ppo", "--resume", folder / "checkpoints/step-00000006", folder=tmp_path / "new") == 0
    assert result(tmp_path / "new/ppo") == whole("ppo") and contents(folder) == before


def test_resume_a_lone_checkpoint(train, interrupted, whole, tmp_path):
    """A checkpoint that was saved from a dead machine alone: its log is lost, and that of the steps from there on has
    each step once, however often the run is stopped.
    """
    shutil.move(interrupted("mle") / "checkpoints/step-00000006", tmp_path / "rescued")
    folder = tmp_path / "new"
    assert train("mle", "--resume", tmp_path / "rescued", "--max-time", 1e-9, folder=folder) == 143
    with open(folder / "mle.partial/metrics.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 1}\n{"st')  # logged, and killed before it was saved
    assert train("mle", "--resume", folder=folder) == 0
    assert [line["step"] for line in journal(folder / "mle")] == [6, 7, 8, 9, 10, 11]
    weights = "adapter_model.safetensors"
    assert (folder / "mle" / weights).read_bytes() == whole("mle")[weights]


def test_a_log_that_cannot_be_read_is_no_obstacle(train, interrupted, whole):
    """A power failure leaves zeros in a log: what is before them stays, and --overwrite needs none of it."""
    for flag in ("--resume", "--overwrite"):
        log = interrupted("mle") / "metrics.jsonl"
        log.write_bytes(log.read_bytes() + b'\0\0\0{"step": 0}\n[]\n')
        assert train("mle", flag) == 0
        assert result(train.folder / "mle") == whole("mle")
        shutil.rmtree(train.folder / "mle")


def test_resume_from_before(train, interrupted, after, whole):
    """From the older of two checkpoints: the newer one, of a future taken back, is not what a later resume finds."""
    folder = interrupted("mle", 10)
    assert saved(train.folder, "mle") == [9, 10]
    shutil.move(folder / "checkpoints/step-00000009", folder / "checkpoints/step-00000005")  # its own step stays 9
    after({10: lambda run: assert_saved(run, [5, 10])})
    assert train("mle", "--resume", folder / "checkpoints/step-00000005", "--save-every", 1) == 0
    assert result(train.folder / "mle") == whole("mle")


def test_later_checkpoints_are_named_when_they_go(train, interrupted, after, whole, capsys):
    """Hours may be in them; whoever named the wrong checkpoint sees at the first save which are gone."""
    folder = interrupted("mle", 10, "--keep-checkpoints", 3)
    after({7: lambda run: assert_saved(run, [6, 9, 10])})
    assert train("mle", "--resume", folder / "checkpoints/step-00000006", "--save-every", 1) == 0
    removed = "mle: removes step-00000009, step-00000010: this run was resumed from an earlier step"
    assert capsys.readouterr().out.count(removed) == 1
    assert result(train.folder / "mle") == whole("mle")


def test_the_held_out_report_can_be_smaller(train, whole, monkeypatch, capsys):
    """It comes after hours of training, whose last step is saved; if it does not fit into memory, fewer examples do."""
    with monkeypatch.context() as patch:
        patch.setattr(lastmile.validation, "reward_report", lambda *_: no_memory_on_a_cpu())
        assert train("reward") == 4
    assert train("reward", "--resume", "--eval-examples", 3) == 0
    found = result(train.folder / "reward")
    assert found.pop("heldout.json") != whole("reward")["heldout.json"]
    assert found == {name: content for name, content in whole("reward").items() if name != "heldout.json"}


def assert_saved(run, steps):
    assert [int(place.name[5:]) for place in checkpoint_files.checkpoints(run.folder)] == steps


# ----------------------------------------------------------------------------------------------------------------------
# What may be found on the disk


def flip(place):
    file = place / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(place):
    file = place / "state.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def newer(place):
    file = place / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": checkpoint_files.VERSION + 1}))


DAMAGE = {  # name: (what is done to a checkpoint's folder, what is said of it)
    "bit flip": (flip, "state.safetensors is damaged"),
    "truncation": (truncate, "state.safetensors is damaged"),
    "other settings": (lambda place: (place / "state.json").write_text("{}"), "state.json is damaged"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda place: os.truncate(place / "manifest.json", 30), "not a valid checkpoint"),
    "empty": (lambda place: (shutil.rmtree(place), place.mkdir()), "manifest.json"),
    "newer version": (newer, "written by a newer lastmile"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(train, interrupted, whole, name, capsys):
    """Disks lie. What the manifest does not vouch for is passed over aloud, and if nothing else is left, refused."""
    damage, said = DAMAGE[name]
    folder = interrupted("mle", 7)
    older, newest = checkpoint_files.checkpoints(folder)
    damage(newest)
    before = contents(folder)
    assert train("mle", "--resume", newest) == 2
    error = capsys.readouterr().err
    assert said in error and "step-00000007: not a valid checkpoint" in error and contents(folder) == before
    shutil.copytree(older, folder / "kept")
    damage(older)
    before = contents(folder)
    assert train("mle", "--resume") == 2
    error = capsys.readouterr().err
    assert error.count(said) == 2 and "no valid checkpoint" in error and contents(folder) == before
    shutil.rmtree(older)
    shutil.move(folder / "kept", older)
    assert train("mle", "--resume") == 0
    captured = capsys.readouterr()
    assert "step-00000007: not a valid checkpoint" in captured.err and f"resumes from {older}" in captured.out
    assert result(train.folder / "mle") == whole("mle")


def test_what_a_killed_run_leaves(train, interrupted, whole, after):
    """Lines beyond the checkpoint, half a line, half a checkpoint, an old report: gone or mended, without a hand."""
    folder = interrupted("mle", 5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    (folder / "bad_batch.json").write_text("{}")
    stale = folder / "checkpoints/.step-00000099"
    stale.mkdir()
    (stale / "state.safetensors").write_bytes(b"half")
    seen = []
    after({8: lambda run: seen.append(stale.exists())})
    assert train("mle", "--resume") == 0
    assert seen == [False] and result(train.folder / "mle") == whole("mle")


def test_two_checkpoints_are_kept(train, after):
    """Two at least, the newest, each valid: one may be lost to the disk. A finished stage needs none."""
    seen = {}
    after({k: lambda run, k=k: seen.update({k: saved(train.folder, "mle")}) for k in range(1, 13)})
    assert train("mle", "--save-every", 2, "--keep-checkpoints", 3) == 0
    assert [seen[k] for k in (2, 4, 6, 8, 12)] == [[], [2], [2, 4], [2, 4, 6], [6, 8, 10]]
    assert not (train.folder / "mle/checkpoints").exists()


def test_an_interrupted_run_is_not_lost(train, interrupted, whole, capsys):
    """Neither by the same command again, nor by --overwrite with a slip in it: hours may lie there."""
    folder = interrupted("mle")
    before = contents(folder)
    assert train("mle") == 2
    error = capsys.readouterr().err
    assert "step-00000007; add --resume" in error and "--overwrite" in error and contents(folder) == before
    assert train("mle", "--overwrite", "--data", "nowhere") == 2 and contents(folder) == before
    assert train("mle", "--overwrite") == 0
    assert "resumes from" not in capsys.readouterr().out and result(train.folder / "mle") == whole("mle")


def test_no_checkpoint_yet(train, whole, capsys):
    """--resume in the job script from the first start on: it begins, and says so."""
    assert train("mle", "--resume") == 0
    assert "no checkpoint to resume from; starts at step 0" in capsys.readouterr().out
    assert result(train.folder / "mle") == whole("mle")


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_the_renames(train, whole, monkeypatch, renamed, capsys):
    """--overwrite puts the old result aside before the new one comes: a kill in between loses neither."""
    assert train("mle", "--seed", 5) == 0
    rename, done = Path.rename, []

    def renaming(path, target):
        if path.suffix == ".partial" or target.suffix == ".replaced":
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(folders, "clear", lambda *paths: None)
    assert train("mle", "--overwrite") == (130 if renamed < 2 else 0)
    monkeypatch.undo()
    assert train("mle") == 2 and "already exists" in capsys.readouterr().err
    old = renamed < 2
    assert json.loads((train.folder / "mle/config.json").read_text())["seed"] == (5 if old else 1337)
    assert train("mle", "--overwrite", "--resume") == 0
    assert result(train.folder / "mle") == whole("mle")
    assert [path.name for path in train.folder.iterdir()] == ["mle"]


# ----------------------------------------------------------------------------------------------------------------------
# The disk is full


@pytest.fixture
def full_disk(monkeypatch):
    """Two functions, fill and free: in between, half of a write succeeds, as on a disk that fills up, and no more."""
    write_bytes, write, full = Path.write_bytes, os.write, []

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_a_file(place, content):
        write_bytes(place, content[: len(content) // 2] if full else content)
        return fail() if full else None

    def half_a_line(file, text):
        if file < 3 or not full:
            return write(file, text)
        full.append(text)
        return write(file, text[: len(text) // 2]) if len(full) == 2 else fail()

    monkeypatch.setattr(Path, "write_bytes", half_a_file)
    monkeypatch.setattr(os, "write", half_a_line)
    return lambda run: full.append(""), lambda run: full.clear()


@pytest.fixture
def small_disk(tmp_path):
    """A real one of 2 MiB, mounted as `tmp_path/run`, with the same two functions."""
    folder = tmp_path / "run"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")

    def fill(run):
        with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"0" * 4096)

    yield fill, lambda run: (folder / "filler").unlink()
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("disk", ["full_disk", "small_disk"])
def test_disk_full_for_a_while(train, whole, after, request, disk, capsys):
    """The training goes on, and so do its older checkpoints; the log is whole once there is space again."""
    fill, free = request.getfixturevalue(disk)
    after({5: fill, 8: lambda run: (assert_saved(run, [3]), saved(train.folder, "ppo"), free(run))})
    assert train("ppo") == 0
    error = capsys.readouterr().err
    assert error.count("step-00000006: not saved (No space left on device)") == 1 and "the run continues" in error
    assert result(train.folder / "ppo") == whole("ppo")


@pytest.mark.parametrize("disk", ["full_disk", "small_disk"])
def test_disk_full_to_the_end(train, whole, after, request, disk, capsys):
    """Exit code 1 and a line that names the place; what was saved before is resumed from once there is space."""
    fill, free = request.getfixturevalue(disk)
    after({8: fill})
    assert train("ppo") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ppo.partial/checkpoints/step-00000012: not saved (No space left on device)" in error and "--resume" in error
    assert saved(train.folder, "ppo") == [3, 6] and not saving(train.folder / "ppo.partial")
    free(None)
    after({})
    assert train("ppo", "--resume") == 0
    assert result(train.folder / "ppo") == whole("ppo")


def test_the_log_is_whole_before_a_checkpoint(train, whole, after, full_disk, monkeypatch):
    """A line that waits for space must not be missing for ever when the process is killed right after the save."""
    fill, free = full_disk
    write = run_module.write_checkpoint

    def killed(place, *content):
        write(place, *content)
        if place.name == "step-00000006":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", killed)
        after({5: fill, 6: free})
        assert train("mle") == 130
    after({})
    assert train("mle", "--resume") == 0 and result(train.folder / "mle") == whole("mle")


@pytest.mark.parametrize("stage", ["pretrain", "mle", "ppo"])
def test_disk_full_after_the_training(train, whole, full_disk, monkeypatch, stage, capsys):
    """The result itself does not fit: exit code 1, the place, and no training twice."""
    fill, free = full_disk
    leave = run_module.Run.__exit__
    monkeypatch.setattr(run_module.Run, "__exit__", lambda run, *error: leave(run, *error) or fill(run))
    monkeypatch.setattr(llama_folder, "save_file", save_nothing)
    assert train(stage) == 1
    assert f"{stage}.partial" in (error := capsys.readouterr().err.splitlines()[-1]) and "No space left" in error
    monkeypatch.undo()
    assert train(stage, "--resume") == 0 and f"step-{12:08}" in capsys.readouterr().out
    assert result(train.folder / stage) == whole(stage)


def save_nothing(tensors, file, metadata):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_the_folder_vanishes(train, after, capsys):
    """Somebody removes it, or its disk, under a running training: an error, and no half result under the old name."""
    after({5: lambda run: shutil.rmtree(run.folder)})
    assert train("mle") == 1
    error = capsys.readouterr().err
    assert "step-00000006: not saved (No such file or directory)" in error and "step-00000012: not saved" in error
    assert not list(train.folder.rglob("*"))


@pytest.fixture
def read_only():
    """A function that takes from this process the right to write checkpoints, and one that gives it back."""
    places = []

    def take(run):
        places.append(run.folder / "checkpoints")
        os.seteuid(65534) if os.getuid() == 0 else places[0].chmod(0o500)  # root may write wherever it likes

    def give():
        os.seteuid(0) if os.getuid() == 0 else places[0].chmod(0o700)

    yield take, give
    give()


def test_the_folder_becomes_read_only(train, whole, after, read_only, capsys):
    """As a disk does after an error: what was saved before stays, and is resumed from once it can be written again."""
    take, give = read_only
    after({8: take})
    assert train("mle") == 1
    give()
    assert "step-00000012: not saved (Permission denied)" in capsys.readouterr().err
    assert saved(train.folder, "mle") == [3, 6]
    after({})
    assert train("mle", "--resume") == 0 and result(train.folder / "mle") == whole("mle")


# ----------------------------------------------------------------------------------------------------------------------
# Two at once, and signals


LONG = ["--max-steps", 5000, "--save-every", 5000]


def steps_done(folder):
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


def test_two_runs_on_one_folder(worker, train, material, tmp_path, capsys):
    """Both would write the same files. The second is refused at once; the lock goes with the process that held it."""
    worker.start(command(material, "mle", tmp_path / "run", *LONG))
    wait_for(lambda: steps_done(tmp_path / "run/mle.partial") > 2)
    start = time.monotonic()
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert train("mle", *flags) == 2
        assert "mle.partial: another run is using it" in capsys.readouterr().err
    assert time.monotonic() - start < 2
    worker.kill(signal.SIGKILL)
    assert worker.wait() == -9
    assert train("mle") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_within_a_step(worker, material, tmp_path, number):
    """Ctrl-C and a cluster's notice cost no step: the running one is finished and saved."""
    folder = tmp_path / "run/ppo.partial"
    worker.start(command(material, "ppo", tmp_path / "run", *LONG))
    wait_for(lambda: steps_done(folder) > 2)
    start, done = time.monotonic(), steps_done(folder)
    worker.kill(number)
    assert worker.wait() == 128 + number and time.monotonic() - start < 2
    assert [steps_done(folder)] == saved(tmp_path / "run", "ppo") and steps_done(folder) - done <= 2
    assert "add --resume to continue it" in worker.log.read_text() and "Traceback" not in worker.log.read_text()


def test_a_second_signal_ends_at_once(worker, material, tmp_path):
    """Who presses Ctrl-C twice does not want to wait for a slow disk; the checkpoint before stays valid."""
    folder = tmp_path / "run/mle.partial"
    worker.start(command(material, "mle", tmp_path / "run", *LONG, "--save-every", 3), slow=0.3)
    wait_for(lambda: saved(tmp_path / "run", "mle"))
    wait_for(lambda: saving(folder))
    worker.kill(signal.SIGTERM)
    wait_for(lambda: "press Ctrl-C again to quit now" in worker.log.read_text())
    start = time.monotonic()
    worker.kill(signal.SIGINT)
    assert worker.wait() == 130 and time.monotonic() - start < 0.6
    assert saving(folder) and saved(tmp_path / "run", "mle")


def test_a_signal_while_data_are_loaded(worker, material, tmp_path):
    """Before the first step there is nothing to save: it ends there and then, and leaves nothing behind."""
    os.mkfifo(tmp_path / "never.jsonl")
    worker.start(command(material, "mle", tmp_path / "run", "--data", tmp_path / "never.jsonl"))
    wait_for((tmp_path / "run/mle.partial").exists)
    time.sleep(0.3)
    worker.kill(signal.SIGTERM)
    assert worker.wait() == 143 and "stopped" in worker.log.read_text()
    assert not (tmp_path / "run").exists()


def test_a_signal_during_eval(worker, material, tmp_path):
    """Minutes of sampling: it ends at once, without a result that looks finished."""
    flags = ["--adapters", "base", "--max-new-tokens", "100", "--batch-size", "2", "--bleurt", "none"]
    worker.start(["eval", "--model", str(material / "base"), "--output-dir", str(tmp_path / "run"), *flags])
    wait_for(lambda: "batch" in worker.log.read_text())
    worker.kill(signal.SIGTERM)
    assert worker.wait() == 143 and not (tmp_path / "run/eval").exists()


def test_a_signal_when_nobody_reads(train, after, monkeypatch):
    """Ctrl-C ends all of `lastmile.py … 2>&1 | tee log`: what it has to say reaches nobody, the checkpoint the disk."""
    write = os.write

    def closed(file, text):
        if file == 2:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return write(file, text)

    monkeypatch.setattr(os, "write", closed)
    after({5: terminate})
    assert train("mle") == 143 and saved(train.folder, "mle") == [3, 5]


def test_a_signal_during_the_exchange(train, monkeypatch):
    """Ranks tell each other after each step whether to stop; a signal that comes meanwhile counts at the next one."""
    most, asked = run_module.ranks.most, []

    def interrupted(stop):
        asked.append(stop)
        if len(asked) == 5:
            terminate(None)
        return most(stop)

    monkeypatch.setattr(run_module.ranks, "most", interrupted)
    assert train("mle") == 143 and asked == [0] * 5 + [signal.SIGTERM] and saved(train.folder, "mle") == [3, 6]


def test_a_terminal_that_lacks_a_letter():
    """A Latin-1 or ASCII terminal has no place for every letter of a model's output, or for the ± of the tables."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.Stream(stream).write("0.36 \u00b1 0.02, \u20ac 5\n")
    assert stream.buffer.getvalue() == rb"0.36 \xb1 0.02, \u20ac 5" + b"\n"


def test_no_library_swallows_a_signal():
    """`except Exception: pass` stands in many libraries; a signal that comes there must still end the process."""
    assert not issubclass(terminal.Stopped, Exception)


def test_a_signal_after_the_last_step(train, whole, monkeypatch):
    """It finds nobody asking for it any more; it must not be forgotten, as the held-out report may take minutes."""
    leave = run_module.Run.__exit__
    monkeypatch.setattr(run_module.Run, "__exit__", lambda run, *error: terminate(run) or leave(run, *error))
    assert train("reward") == 143
    monkeypatch.undo()
    assert train("reward", "--resume") == 0 and result(train.folder / "reward") == whole("reward")


def test_max_time(train, whole):
    """A job that knows its end saves before it, and says by its exit code that it is not done."""
    assert train("mle", "--max-time", 1e-9) == 143 and saved(train.folder, "mle") == [1]
    assert train("mle", "--max-time", 1e-9, "--resume") == 143 and saved(train.folder, "mle") == [1, 2]
    assert train("mle", "--max-time", 10, "--resume") == 0
    assert result(train.folder / "mle") == whole("mle")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none, and memory that is not there


def bad_loss(run, monkeypatch):
    monkeypatch.setattr(lastmile.ppo, "masked_mean", lambda x, mask: x.sum() * torch.inf)


def bad_gradient(run, monkeypatch):
    run.optimizer.groups[0][0].register_hook(lambda gradient: gradient * torch.nan)


def bad_reward(run, monkeypatch):
    monkeypatch.setattr(lastmile.ppo, "token_scores", lambda llama, batch: torch.full(batch.mask.shape, torch.nan))


def bad_weight(run, monkeypatch):
    run.optimizer.groups[0][1].data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("stage", "fault"),
    [("mle", bad_loss), ("mle", bad_gradient), ("mle", bad_weight), ("ppo", bad_loss), ("ppo", bad_gradient),
     ("ppo", bad_weight), ("ppo", bad_reward)],
)  # fmt: skip
def test_not_finite(train, whole, after, monkeypatch, stage, fault, capsys):
    """One NaN, let through, is in every weight after the next step. The run ends before that step, and says where."""
    steps, rows, step, collate = [], [], torch.optim.AdamW.step, lastmile.data.collate
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
        patch.setattr(lastmile.data, "collate", lambda data, device: rows.append(data) or collate(data, device))
        after({8: lambda run: (fault(run, patch), steps.clear())})
        assert train(stage) == 3 and not steps
    after({})
    error, folder = capsys.readouterr().err.splitlines()[-1], train.folder / f"{stage}.partial"
    assert "step 8" in error and "bad_batch.json" in error and "step-00000006" in error
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert bad == {"step": 8, "ids": [datum.id for datum in rows[-1]]}
    for place in checkpoint_files.checkpoints(folder):
        assert all(tensor.isfinite().all() for tensor in checkpoint_files.read_checkpoint(place)[0].values())
    assert train(stage, "--resume") == 0
    assert result(train.folder / stage) == whole(stage)


def test_exploding_gradients_are_clipped(train, after):
    """A million times too long is cut to --max-grad-norm; the log shows how long it was."""
    longer = lambda run: run.optimizer.groups[0][1].register_hook(lambda gradient: gradient * 1e6)  # noqa: E731
    after({1: longer, 2: terminate})
    assert train("mle") == 143
    before, exploded = (line["grad_norm"] for line in journal(train.folder / "mle.partial"))
    assert exploded > 1e4 * before
    tensors, _ = checkpoint_files.read_checkpoint(checkpoint_files.checkpoints(train.folder / "mle.partial")[-1])
    moments = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.startswith("exp_avg.")])
    assert moments.norm() < 0.1 * 1.0 + 0.09 * 1.0  # AdamW's 1 - beta of each of two gradients, of norm 1 at most


@pytest.mark.parametrize("name", ["lora_B", "score"])
def test_a_reward_model_that_is_not_finite(train, material, tmp_path, name, capsys):
    """It would be found at the first loss, too, but there nobody could tell whose fault it is."""
    shutil.copytree(material / "reward", tmp_path / "reward")
    file = tmp_path / "reward/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if name in key)].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert train("ppo", "--reward", tmp_path / "reward") == 2
    assert f"{file}: 1 tensors are missing, extra, not finite" in capsys.readouterr().err


def no_memory_on_a_cpu(*_):
    torch.empty(1 << 60, dtype=torch.uint8)


def no_memory_on_a_gpu(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")


@pytest.mark.parametrize("fault", [no_memory_on_a_cpu, no_memory_on_a_gpu])
def test_out_of_memory(train, whole, after, monkeypatch, fault, capsys):
    """Exit code 4 and the settings that help; the last checkpoint stays, and smaller parts give the same update."""
    with monkeypatch.context() as patch:
        after({8: lambda run: patch.setattr(lastmile.ppo, "value_loss", fault)})
        assert train("ppo") == 4
    after({})
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(flag in error for flag in ("--micro-batch-size", "--batch-size", "--max-new-tokens", "--dry-run"))
    assert saved(train.folder, "ppo") == [3, 6]
    assert train("ppo", "--resume") == 0 and result(train.folder / "ppo") == whole("ppo")


# ----------------------------------------------------------------------------------------------------------------------
# Rows that pass apart


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_change_no_update(train, after, tmp_path, stage, size):
    """--micro-batch-size saves memory and nothing else: log and AdamW's mean gradient as of the whole batch."""
    after({2: terminate})
    found = []
    for rows in (0, size):
        folder = tmp_path / str(rows)
        assert train(stage, "--micro-batch-size", rows, "--learning-rate", 1e-5, folder=folder) == 143
        tensors, _ = checkpoint_files.read_checkpoint(checkpoint_files.checkpoints(folder / f"{stage}.partial")[-1])
        found.append((tensors, journal(folder / f"{stage}.partial")))
    (tensors, log), (others, other_log) = found
    moments = [name for name in tensors if name.startswith("exp_avg.")]
    expected, other = (torch.cat([t[name].flatten() for name in moments]) for t in (tensors, others))
    assert (other - expected).norm() < 1e-5 * expected.norm()
    for line, other in zip(log, other_log, strict=True):
        for name in line:  # a reward batch may hold no positive: None
            assert line[name] == other[name] or line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)


def test_whiten_needs_the_whole_batch(train, capsys):
    """The mean and variance of a part are not those of the batch: refused rather than a little wrong."""
    assert train("ppo", "--whiten", "--micro-batch-size", 2) == 2
    assert "--whiten needs the advantages of the whole batch" in capsys.readouterr().err and not train.folder.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Who reads along


def test_nobody_reads_on(material, whole, tmp_path):
    """`| head -1` closes the pipe after a line, and Ctrl-C ends `| tee`: the training goes on to its end."""
    line = shlex.join([sys.executable, str(folders.ROOT / "lastmile.py"), *command(material, "mle", tmp_path / "run")])
    done = subprocess.run(
        ["bash", "-c", f"{line} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and not done.stderr
    assert result(tmp_path / "run/mle") == whole("mle")


def test_a_full_disk_under_the_output(worker, material, whole, tmp_path):
    """`> log` on the disk that is full: output is lost, the training is not."""
    worker.start(command(material, "mle", tmp_path / "run"), log="/dev/full")
    assert worker.wait() == 0 and result(tmp_path / "run/mle") == whole("mle")


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp"


def test_no_escape_sequence_reaches_the_terminal(train, material, monkeypatch, tmp_path, capsys):
    """Text is other people's: written raw, it could clear the screen, retitle it, or turn words round."""
    write_data(tmp_path / "data", lambda text: f"{HOSTILE} {text}")
    (tmp_path / "columns.csv").write_text(f"{HOSTILE},b\n1,2\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps([HOSTILE]) + "\n")
    base = ["--model", material / "base", "--output-dir", tmp_path / "run"]
    tokenizer = lastmile.data.load_tokenizer(material / "base")
    said = tokenizer.encode([HOSTILE])[0]

    def sample(llama, prompts, *more, each=None, **options):
        for token in said if each else ():
            each(lastmile.torch.tensor([token]))
        return [said for _ in prompts]

    monkeypatch.setattr(lastmile.model, "sample", sample)
    commands = [
        ["eval", *base, "--data", tmp_path / "data", "--adapters", "base", "--bleurt", "none", "--max-new-tokens", 200],
        ["sample", "hello", *base, "--adapter", "base"],
        ["mle", *base, "--data", tmp_path / "columns.csv"],
        ["mle", *base, "--data", tmp_path / "rows.jsonl"],
    ]
    for line, code in zip(commands, (0, 0, 2, 2), strict=True):
        assert lastmile.main([*map(str, line)]) == code
        shown = "".join(capsys.readouterr())
        assert "owned" in shown and not set("\x1b\x07\x9b\u202e") & set(shown), line


if __name__ == "__main__":
    serve()


# The settings of a reward model in a checkpoint of commit 0020ad4, which had no --head.
RECORDED = {
    "--max-input-tokens": 400, "--max-new-tokens": 24, "--seed": 1337, "--device": "cpu", "--dtype": "float32",
    "--batch-size": 14, "--learning-rate": 0.002, "--epochs": 1, "--max-steps": 4, "--train-examples": 28,
    "--max-grad-norm": 1.0, "--deterministic": False, "--eval-examples": 4, "--tune": "lora", "--lora-r": 16,
    "--lora-alpha": 16.0, "--share-prompts": True, "--rows-per-prompt": 0, "--level": "token", "--hallucinations":
    "off",
    "--lora-targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "--samples": "", "--rounds": 1,
}  # fmt: skip


def test_a_setting_that_is_new_counts_as_its_default():
    """A checkpoint of an earlier version, which lacks a setting, continues with its default and no other value."""
    names = {name.removeprefix("--").replace("-", "_"): value for name, value in RECORDED.items()}
    for head, expected in ("scalar", []), ("likelihood", ["--head (scalar then, likelihood now)"]):
        settings = Reward(**names, head=head)
        now = checkpoint_files.fingerprint("reward", settings, [], depends_on={})
        then = RECORDED | {name: value for name, value in now.items() if not name.startswith("--")}
        assert run_module.changes(checkpoint_files.setting_defaults(settings) | then, now) == expected
