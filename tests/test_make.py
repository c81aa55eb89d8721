"""make builds what does not exist, and nothing else: `make -n` over a run whose files exist, in any order of time.

That a stage is finished its config.json says, which is there with --tune lora and with --tune full.
"""

import os
import random
import re
import subprocess

import pytest

from interface import folders

FILES = (
    "pretrain/model.safetensors",
    "base/model.safetensors",
    "reward/config.json",
    "mle/config.json",
    "ppo/config.json",
    "eval/scores.json",
)


@pytest.fixture
def finished(tmp_path):
    """A copied run: every result exists, and the file times say nothing about the order they were made in."""
    rng = random.Random(0)
    for name in FILES:
        file = tmp_path / "toy" / name
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (0, rng.randrange(10**9)))
    return tmp_path / "toy"


def test_a_slash_after_the_data(tmp_path):
    """The shell's completion ends a folder by a slash: each data set must still get a run of its own."""
    for data in ("mydata", "mydata/", "some/mydata/", "mydata.jsonl"):
        command = ["make", "-n", "--no-print-directory", "mle", f"DATA={data}"]
        done = subprocess.run(command, cwd=folders.ROOT, capture_output=True, text=True, check=True)
        assert "--output-dir runs/mydata" in done.stdout.replace("\n", " "), done.stdout
        assert "--output-dir runs/ " not in done.stdout


def commands(target, run, *variables):
    """The stages that make would run for a target, in order."""
    command = ["make", "-n", "--no-print-directory", target, f"OUT={run}", *variables]
    done = subprocess.run(command, cwd=folders.ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"lastmile\.py (\w+)", done.stdout)


@pytest.mark.parametrize("target", ["base", "reward", "mle", "ppo", "eval"])
def test_a_copied_run_is_not_rebuilt(finished, target):
    """`cp -r`, an archive or another disk change file times: make then rebuilt a finished stage, which ended with
    "already exists" and exit code 2."""
    assert commands(target, finished) == []


@pytest.mark.parametrize("seed", range(5))
def test_demo_over_a_copied_run_only_reports(finished, seed):
    """With every result there, `make demo` only prints the tables and writes the report, whatever the file times."""
    rng = random.Random(seed)
    for name in FILES:
        os.utime(finished / name, (0, rng.randrange(10**9)))
    assert commands("demo", finished) == ["tables", "report"]


@pytest.mark.parametrize("missing", range(len(FILES)))
def test_a_missing_stage_is_built(finished, missing):
    """A result that is missing is built, and the stages that exist are not: order-only is not never."""
    (finished / FILES[missing]).unlink()
    stages = ["pretrain", "quantize", "reward", "mle", "ppo", "eval"]
    assert commands("report", finished, "DATA=toy") == [stages[missing], "tables", "report"]


@pytest.mark.parametrize("target", ["demo", "report"])
def test_all_stages_from_nothing(tmp_path, target):
    """From an empty folder make runs every stage, each after those that it reads."""
    built = commands(target, tmp_path / "toy", "DATA=toy")
    assert set(built) == {"pretrain", "quantize", "reward", "mle", "ppo", "eval", "tables", "report"}
    assert target == "demo" or len(built) == 8  # demo is three makes; a dry one builds nothing for the next to find
    order = [built.index(stage) for stage in ("pretrain", "quantize", "reward", "ppo", "eval", "tables", "report")]
    assert order == sorted(order) and built.index("quantize") < built.index("mle") < built.index("eval")
