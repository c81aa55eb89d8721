"""Several processes against one: the same updates, outputs and logs; and one end for all, whatever happens to one.

The ranks are started as torchrun starts them, by its environment variables and a store that outlives them, on the
loopback device; one test goes through torchrun itself.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import journal
from safetensors.torch import load_file

import lastmile
from formats.errors import UserError
from safety import ranks, terminal

ROOT = Path(__file__).resolve().parents[1]
# Runs commands one after the other, each by a store of its own, and ends with the largest of their codes.
DRIVER = """
import json, os, sys
import lastmile
code = 0
for port, command in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    code = max(code, lastmile.main(command))
sys.exit(code)
"""
# The last batch of mle and ppo holds one row: fewer than there are ranks.
SMALL = "--max-steps 6 --learning-rate 3e-5 --max-new-tokens 24 --log-every 1"
STAGES = {
    "reward": f"{SMALL} --train-examples 8 --eval-examples 4 --eval-every 3 --batch-size 14 --micro-batch-size 4",
    "mle": f"{SMALL} --train-examples 22 --batch-size 7 --epochs 2 --eval-every 3 --eval-examples 5",
    "ppo": f"{SMALL} --train-examples 22 --batch-size 7 --epochs 2 --whiten --kl-coef 0.1 --eval-every 6 "
           "--eval-examples 5",
    "eval": "--test-examples 5 --max-new-tokens 24",
}  # fmt: skip


class Ranks:
    """Processes that run the same commands as the ranks of one world; they wait for each other."""

    def __init__(self, size, *commands, folders=None, before=""):
        """folders: the working directory of each rank. before: code that each rank runs first."""
        self.stores = [dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False) for _ in commands]
        lines = json.dumps([[store.port, list(map(str, c))] for store, c in zip(self.stores, commands, strict=True)])
        self.processes = []
        for rank in range(size):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RUN_ID": "test",
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", before + DRIVER, lines], env=env, cwd=folders[rank] if folders else ROOT,
                    text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def end(self):
        """(exit codes, what each rank wrote to standard error), progress bars and warnings left out."""
        found = [process.communicate(timeout=120) for process in self.processes]
        errors = [[line for line in err.splitlines() if re.match("lastmile.py: (?!warning)", line)] for _, err in found]
        return [process.returncode for process in self.processes], errors


def commands(folder):
    found = [[stage, *flags.split(), "--output-dir", folder] for stage, flags in STAGES.items()]
    full = f"mle {STAGES['mle']} --tune full --batch-size 6 --model {folder}/dense --output-dir {folder}/full"
    return [*found, full.split()]


def copy_of(run_folder, folder):
    folder.mkdir()
    (folder / "base").symlink_to(run_folder / "base")
    (folder / "dense").symlink_to(run_folder / "pretrain")
    return folder


@pytest.fixture(scope="module")
def alone(run_folder, tmp_path_factory):
    """A run's folder, made by one process."""
    folder = copy_of(run_folder, tmp_path_factory.mktemp("alone") / "toy")
    for command in commands(folder):
        assert lastmile.main(list(map(str, command))) == 0
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(run_folder, tmp_path_factory, request):
    """The same by two processes, and by three."""
    folder = copy_of(run_folder, tmp_path_factory.mktemp("together") / "toy")
    codes, errors = Ranks(request.param, *commands(folder)).end()
    assert codes == [0] * request.param, errors
    return folder


@pytest.mark.parametrize("adapter", ["reward", "mle", "ppo/policy", "ppo/value", "full/mle"])
def test_adapters_are_those_of_one_process(alone, together, adapter):
    """After six steps, with sampled batches, whitening, KL, micro-batches and last batches smaller than the world, an
    adapter is that of one process: gradients are sums of what each rank's rows add, divided by what the batch holds.
    """
    file = "model.safetensors" if adapter.startswith("full") else "adapter_model.safetensors"
    one, other = [load_file(folder / adapter / file) for folder in (alone, together)]
    assert one.keys() == other.keys()
    assert (
        max((one[name] - other[name]).abs().max().item() for name in one) < 3e-6
    )  # fp32; the ratio takes the rounding of the sampler, too
    if adapter.startswith("full"):
        start = load_file(alone / "dense" / file)
        one = {name + "lora_B": tensor - start[name] for name, tensor in one.items()}
    assert any(tensor.abs().max() > 3e-5 for name, tensor in one.items() if "lora_B" in name)  # they did learn


@pytest.mark.parametrize("stage", ["reward", "mle", "ppo"])
def test_logs_are_those_of_one_process(alone, together, stage):
    """Every number of metrics.jsonl and validation.jsonl is one of the whole batch, to rounding: a mean of the ranks'
    means would be another wherever they hold different numbers of tokens.
    """
    for name in ("metrics.jsonl", "validation.jsonl"):
        one, other = [journal(folder / stage, name) for folder in (alone, together)]
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_outputs_are_those_of_one_process(alone, together):
    """The predictions and scores of eval, and the held-out report, whose rows are dealt over the ranks, in order."""
    for name in ("base.jsonl", "mle.jsonl", "policy.jsonl", "scores.json"):
        assert (alone / "eval" / name).read_text() == (together / "eval" / name).read_text()
    one, other = [json.loads((folder / "reward/heldout.json").read_text()) for folder in (alone, together)]
    assert one.keys() == other.keys() and all(one[kind] == pytest.approx(other[kind], abs=1e-5) for kind in one)


def test_predict_draws_the_same_by_any_number_of_ranks(run_folder, tmp_path):
    """A sampled output depends on the seed and the row, not on the rank that draws it; the first alone writes, and
    torchrun itself starts them.
    """
    texts = [{"source": f"Ann: {word}\nBob: yes"} for word in ("hi", "cake", "no", "at noon, in the park", "why")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    flags = ["--input", tmp_path / "in.jsonl", "--output-dir", run_folder, "--adapter", "base", "--temperature", 1]
    flags = [*map(str, flags), "--max-new-tokens", "12", "--batch-size", "4", "--output"]
    assert lastmile.main(["predict", *flags, str(tmp_path / "one.jsonl")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "lastmile.py"]
    done = subprocess.run([*torchrun, "predict", *flags, tmp_path / "two.jsonl"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert done.stdout.count(b"predict: 5 rows") == 1


LONG = "--max-steps 4000 --learning-rate 1e-4 --train-examples 22 --save-every 1000"


def started(running, file, lines=3):
    """Wait until a log has some lines."""
    for _ in range(600):
        if file.exists() and len(file.read_bytes().splitlines()) >= lines:
            return
        assert all(process.poll() is None for process in running.processes), running.end()
        time.sleep(0.05)
    raise AssertionError("never started")


def test_a_signal_to_one_rank_stops_all_and_any_number_resumes(run_folder, tmp_path):
    """SIGTERM to the second of two ranks: both end with 143 after the same step, whose checkpoint says nothing of two.
    Three ranks resume it as one process does.
    """
    folder = copy_of(run_folder, tmp_path / "toy")
    running = Ranks(2, ["mle", *LONG.split(), "--output-dir", folder])
    started(running, folder / "mle.partial/metrics.jsonl")
    running.processes[1].send_signal(signal.SIGTERM)
    codes, errors = running.end()
    assert codes == [143, 143] and "stopped; if training had started" in errors[0][-1] and len(errors[1]) <= 1
    (saved,) = (folder / "mle.partial/checkpoints").iterdir()
    step = int(saved.name[5:])
    assert len(journal(folder / "mle.partial")) == step
    flags = f"mle {LONG} --max-time 0.0001 --resume".split()  # one more step each
    adapters = []
    for size in (1, 3):
        place = tmp_path / f"by {size}" / "toy"
        shutil.copytree(folder, place, symlinks=True)
        command = [*flags, "--output-dir", str(place)]
        codes = Ranks(size, command).end()[0] if size > 1 else [lastmile.main(command)]
        assert codes == [143] * size
        last = sorted((place / "mle.partial/checkpoints").iterdir())[-1]
        assert last.name == f"step-{step + 1:08}"
        adapters.append(load_file(last / "state.safetensors"))
    assert all((adapters[0][name] - tensor).abs().max() < 1e-6 for name, tensor in adapters[1].items())


def test_a_killed_rank_ends_the_others(run_folder, tmp_path):
    """kill -9 leaves no word: the others notice the closed connection, say so in one line, and end with 1."""
    folder = copy_of(run_folder, tmp_path / "toy")
    running = Ranks(2, ["mle", *LONG.split(), "--output-dir", folder])
    started(running, folder / "mle.partial/metrics.jsonl")
    running.processes[1].kill()
    codes, errors = running.end()
    assert codes == [1, -9]
    assert len(errors[0]) == 1 and "another rank has ended without a word" in errors[0][0]


def test_what_the_first_does_alone_fails_for_all(run_folder, tmp_path):
    """While the first rank scores, the others wait without a limit; that it failed ends them, too."""
    folder = copy_of(run_folder, tmp_path / "toy")
    before = "from interface import results\ndef score(*a): raise MemoryError\nresults.score = score\n"
    command = ["eval", *STAGES["eval"].split(), "--adapters", "base", "--output-dir", folder]
    codes, errors = Ranks(2, command, before=before).end()
    assert codes == [4, 4] and [len(lines) for lines in errors] == [1, 0], errors


# The second rank fails in its third step.
FAULT = """
import os, ppo
loss, calls = ppo.mle_loss, []
def failing(logp, mask):
    calls.append(None)  # two a step: the loss, and the one that is logged
    if os.environ["RANK"] == "1" and len(calls) == 5:
        {fault}
    return loss(logp, mask)
ppo.mle_loss = failing
"""


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [("raise MemoryError", 4, "out of memory"), ("logp = logp * float('nan')", 3, "not finite")],
)
def test_a_fault_of_one_rank_ends_all(run_folder, tmp_path, fault, code, said):
    """Out of memory, or a loss that is not finite, on the second rank alone: both end with the code that one process
    has for it, by one line of the first, and nothing but the steps before is kept.
    """
    folder = copy_of(run_folder, tmp_path / "toy")
    command = ["mle", *LONG.split(), "--log-every", 1, "--save-every", 1, "--output-dir", folder]
    codes, errors = Ranks(2, command, before=FAULT.format(fault=fault)).end()
    assert codes == [code, code] and [len(lines) for lines in errors] == [1, 0], errors
    assert said in errors[0][0]
    assert len(journal(folder / "mle.partial")) == 2


def test_ranks_that_differ_are_refused(run_folder, tmp_path):
    """Another --seed, another data file, or an --output-dir that only the first rank sees: one line from the first rank
    that names it, exit code 2 of all, and nothing is left behind.
    """
    folders = [tmp_path / str(rank) for rank in range(2)]
    for rank, folder in enumerate(folders):
        (folder / "out").mkdir(parents=True)
        (folder / "seed.toml").write_text(f"seed = {rank}\n")
        for name, other in ("same", 0), ("other", rank):
            texts = [f"{i + other} and {i}" for i in range(12)]
            rows = "".join(json.dumps({"source": text, "target": text}) + "\n" for text in texts)
            (folder / f"{name}.jsonl").write_text(rows)
    (tmp_path / "out").mkdir()
    flags = ["mle", "--model", run_folder / "base", "--max-steps", 2, "--output-dir"]
    cases = {
        "in seed": [tmp_path / "out", "--data", "same.jsonl", "--config", "seed.toml"],
        "in data": [tmp_path / "out", "--data", "other.jsonl"],
        "rank 1: out: the first rank writes to it": ["out", "--data", "same.jsonl"],
    }
    codes, errors = Ranks(2, *(flags + case for case in cases.values()), folders=folders).end()
    assert codes == [2, 2], errors
    assert len(errors[0]) == len(cases) and errors[1] == []
    assert all(said in line for said, line in zip(cases, errors[0], strict=True))
    assert not list(tmp_path.glob("**/mle"))


def test_a_scheduler_s_variables_start_no_ranks(monkeypatch):
    """WORLD_SIZE alone, as a scheduler may set it, starts nothing: torchrun's own mark counts."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks.start("mle", {"device": "cpu"})
    assert ranks.world.size == 1 and ranks.first()


@pytest.mark.parametrize(
    ("command", "device", "message"),
    [("merge", "cpu", "merge runs in one process"), ("mle", "cuda", "2 processes on a machine of 1 GPUs")],
)
def test_what_ranks_cannot_do_is_refused(monkeypatch, command, device, message):
    """A command that shares no work, and more processes than GPUs, are refused before anything waits."""
    variables = {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    try:
        with pytest.raises(UserError, match=message):
            ranks.start(command, {"device": device})
    finally:
        ranks.finish()


def test_only_the_first_rank_speaks(monkeypatch):
    """Notes on columns and weights come from readers that know no ranks: eight ranks printed each eight times."""
    monkeypatch.setattr(terminal.Shown, "anything", False)
    stream = io.StringIO()
    print("train: columns that are not used: id", file=terminal.Stream(stream))
    assert not stream.getvalue()
