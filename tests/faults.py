"""Faults F1 to F20: what was done to the program, and whether it stood. `make faults`, or python tests/faults.py

Most are tests of the suite; here they are run together, the kills five times as often, and beside them what takes too
long for a suite. Exit code 1 if one of them fails.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if __name__ != "__main__":  # the script only starts pytest, which imports this file once conftest.py is there
    from test_resume import command, disturbed, material, result, whole, worker  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]

KILLS = 50  # of mle, and as many of ppo

RESUME, HERE = "tests/test_resume.py", "tests/faults.py"
FAULTS = [  # (fault, what was done, tests)
    ("F1", f"kill -9 at {KILLS} random moments of mle and {KILLS} of ppo, every other one inside a save; resumed",
     f"{HERE}::test_killed"),
    ("F2", "stopped after each step of 12, four stages, three epochs, sampled and true batches",
     f"{RESUME}::test_stopped_at_every_step {RESUME}::test_stopped_after_every_step"),
    ("F3", f"SIGTERM at {KILLS} random moments; in data, training, save, eval; SIGINT; a second signal; --max-time",
     f"{HERE}::test_terminated {RESUME}::test_a_signal_ends_a_training_within_a_step "
     f"{RESUME}::test_a_second_signal_ends_at_once {RESUME}::test_a_signal_while_data_are_loaded "
     f"{RESUME}::test_a_signal_during_eval {RESUME}::test_a_signal_after_the_last_step {RESUME}::test_max_time"),
    ("F4", "disk full for a while, to the end, and for the result: a mounted disk of 2 MiB, and half-done writes",
     f"{RESUME}::test_disk_full_for_a_while {RESUME}::test_disk_full_to_the_end "
     f"{RESUME}::test_disk_full_after_the_training"),
    ("F5", "output folder read-only, or removed, under a running training",
     f"{RESUME}::test_the_folder_becomes_read_only {RESUME}::test_the_folder_vanishes"),
    ("F6", "newest checkpoint with a flipped bit, cut, emptied, without manifest, of a newer version; then all of them",
     f"{RESUME}::test_damaged_checkpoints {RESUME}::test_what_a_killed_run_leaves"),
    ("F7", "infinity or NaN in loss, gradient, reward and one weight; a reward model with a NaN",
     f"{RESUME}::test_not_finite {RESUME}::test_a_reward_model_that_is_not_finite"),
    ("F8", "a gradient times a million", f"{RESUME}::test_exploding_gradients_are_clipped"),
    ("F9", "torch's errors for no memory, of a CPU (a real one) and of a GPU", f"{RESUME}::test_out_of_memory"),
    ("F10", "data, tokenizer, base, reward model, template and seed changed between save and resume",
     f"{RESUME}::test_what_must_not_change"),
    ("F11", "resumed with another dtype, batch size, LoRA rank and stage; and with what may change",
     f"{RESUME}::test_what_must_not_change {RESUME}::test_what_may_change {RESUME}::test_resume_elsewhere"),
    ("F12", "two runs on one folder", f"{RESUME}::test_two_runs_on_one_folder"),
    ("F13", "Hub down, offline, a download that breaks off, half a cache, on a small local Hub (not: a slow one)",
     "tests/test_hub.py"),
    ("F14", "killed between the renames, between rename and clearing up; two checkpoints at any time",
     f"{RESUME}::test_killed_between_the_renames {RESUME}::test_two_checkpoints_are_kept "
     f"{RESUME}::test_resume_from_before"),
    ("F15", "trained without pyarrow, rouge_score and triton; without transformers or torch one line",
     f"{HERE}::test_without_packages tests/test_lastmile.py::test_a_missing_package_is_named"),
    ("F16", "standard output and error closed by `2>&1 | head -1`; both on a full disk",
     f"{RESUME}::test_nobody_reads_on {RESUME}::test_a_full_disk_under_the_output "
     f"{RESUME}::test_no_escape_sequence_reaches_the_terminal"),
    ("F17", "1,000 damaged configs, weights, tokenizers and data files", f"{HERE}::test_fuzz"),
    ("F18", "4-bit kernels against the readable definition; gradients too",
     "tests/test_quant.py::test_kernels_equal_dequantize tests/test_quant.py::test_kernel_takes_strided_rows "
     "tests/test_quant.py::test_gradient_equals_the_dense_layers"),
    ("F19", "cached decoding against full passes, rows of any length; the ratio of the first update is 1",
     "tests/test_model.py::test_cached_equals_uncached_greedy "
     "tests/test_model.py::test_cached_equals_uncached_under_an_adapter "
     "tests/test_lastmile.py::test_ratio_is_one_at_one_update_a_batch"),
    ("F20", "one seed in two processes that share no hash seed, time zone, language or folder (not: two machines)",
     f"{HERE}::test_one_seed_in_two_processes"),
]  # fmt: skip


@pytest.mark.parametrize("stage", ["mle", "ppo"])
def test_killed(worker, material, whole, stage, tmp_path):  # noqa: F811
    """F1: what a kill leaves is enough to come to the same end, with no hand lent; two checkpoints a second or so."""
    arguments = command(material, stage, "", "--save-every", 1)
    ends, caught = disturbed(worker, arguments, tmp_path, signal.SIGKILL, KILLS, random.Random(stage))
    assert all(end == whole(stage) for end in ends)
    assert caught > KILLS / 10, "too few kills have come inside a save to say anything about it"


def test_terminated(worker, material, whole, tmp_path):  # noqa: F811
    """F3: the same with SIGTERM, which reaches data, forward, rollout and save alike."""
    arguments = command(material, "ppo", "", "--save-every", 1)
    ends, _ = disturbed(worker, arguments, tmp_path, signal.SIGTERM, KILLS, random.Random(3))
    assert all(end == whole("ppo") for end in ends)


def python(*arguments, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_without_packages(material, whole, tmp_path):  # noqa: F811
    """F15: what only some commands need is imported by those alone."""
    start = "import sys; sys.modules.update({}); import lastmile; sys.exit(lastmile.main())"
    absent = dict.fromkeys(("pyarrow", "rouge_score", "triton"))
    done = python("-c", start.format(absent), *command(material, "mle", tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and result(tmp_path / "mle") == whole("mle"), done.stderr
    done = python(
        "-c", start.format({"transformers": None}), *command(material, "mle", tmp_path / "2"), PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 2 and "install what lastmile needs: make setup" in done.stderr, done.stderr


def test_one_seed_in_two_processes(material, whole, tmp_path):  # noqa: F811
    """F20: order of sets, clock, language of messages and current folder have no part in a result."""
    surroundings = [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8"},
        {"PYTHONHASHSEED": "2", "TZ": "UTC", "LC_ALL": "C", "HOME": str(tmp_path)},
    ]
    for number, environment in enumerate(surroundings):
        done = python(ROOT / "lastmile.py", *command(material, "ppo", tmp_path / str(number)), **environment)
        assert done.returncode == 0 and result(tmp_path / str(number) / "ppo") == whole("ppo"), done.stderr


def test_fuzz():
    """F17: each ends well, or in one line and exit code 2, within 10 seconds and 2 GB."""
    program = ROOT / "tests/fuzz.py"
    if not program.is_file():
        pytest.skip("tests/fuzz.py is not there")
    done = python(program, "--count", 1000)
    assert done.returncode == 0, done.stdout + done.stderr


class Outcomes:
    """What became of each test, under its name without parameters."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("[")[0]
        if report.when == "call" or not report.passed:
            self.found.setdefault(name, []).append(report.outcome)
            self.found.setdefault(name.partition("::")[0], []).append(report.outcome)


def verdict(outcomes):
    if not outcomes or "failed" in outcomes:
        return "FAIL"
    return "pass" if "passed" in outcomes else "skipped"


def main():
    os.chdir(ROOT)
    outcomes, tests = Outcomes(), dict.fromkeys(" ".join(names for _, _, names in FAULTS).split())
    pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *tests], plugins=[outcomes])
    print("\n| fault | what was done | |\n| --- | --- | --- |")
    failed = False
    for fault, done, names in FAULTS:
        found = verdict([outcome for name in names.split() for outcome in outcomes.found.get(name, ["failed"])])
        failed |= found == "FAIL"
        print(f"| {fault} | {done} | {found} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
