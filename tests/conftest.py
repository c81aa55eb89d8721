"""Shared by all tests: the Triton interpreter where there is no GPU, and one small base model made once a run."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

from helpers import run_over  # noqa: E402

import lastmile  # noqa: E402

torch.set_num_threads(1)  # models this small only wait for a second thread

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    """Tests marked gpu skip, aloud, where there is none."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and checkpoints that lies beside some checkouts."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder of real data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run's folder with a base in it: a 2-layer toy Llama of width 32, pretrained for 8 steps and quantized."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    small = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 2"
    small += " --num-key-value-heads 1 --vocab-size 700 --max-steps 8 --batch-size 8 --train-examples 64"
    assert lastmile.main(["pretrain", "--output-dir", str(folder), *small.split()]) == 0
    assert lastmile.main(["quantize", "--output-dir", str(folder), "--calibration-examples", "8"]) == 0
    return folder


@pytest.fixture
def fresh_run(run_folder, tmp_path):
    """A new run's folder over the same base: a function that calls a stage in it with the given flags."""
    return run_over(run_folder / "base", tmp_path / "toy")


@pytest.fixture(scope="session")
def reward(run_folder, tmp_path_factory):
    """A reward model trained for 30 steps, for all tests that need one."""
    folder = tmp_path_factory.mktemp("reward")
    flags = (
        f"--model {run_folder}/base --output-dir {folder} --train-examples 28 --learning-rate 1e-2 --eval-examples 8"
    )
    assert lastmile.main(["reward", *flags.split(), "--max-steps", "30"]) == 0
    return folder / "reward"
