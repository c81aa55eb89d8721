"""Validation while training: right numbers, no change to what is learned, the best adapter kept, exact resume."""

import json
import os
import signal

import pytest
from helpers import contents, exit_code, journal, learned
from safetensors.torch import load_file

import data
import eval as evaluation
import lastmile
import model
import ppo
from safety import run as run_module

FLAGS = {  # stage: a short training that learns, and after which validation gets worse again
    "reward": "--train-examples 8 --batch-size 6 --max-steps 7 --max-new-tokens 40 --learning-rate 1e-2",
    "mle": "--train-examples 8 --max-steps 7 --max-new-tokens 40 --learning-rate 2e-2",
    "ppo": "--train-examples 8 --max-steps 7 --max-new-tokens 16 --learning-rate 1e-2",
}


@pytest.fixture
def train(fresh_run, reward):
    """train(stage, *flags): a short training, validated on 6 examples."""

    def run(stage, *flags):
        words = [*FLAGS[stage].split(), "--eval-examples", "6", *(["--reward", reward] if stage == "ppo" else [])]
        return exit_code(lambda: fresh_run(stage, *words, *flags))

    run.folder = fresh_run.folder
    return run


def validations(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", FLAGS)
def test_validation_changes_nothing_that_is_learned(train, stage):
    """With and without it: the same updates, to the bit. It comes every N steps, and after the last."""
    assert train(stage) == 0
    plain = learned(train.folder / stage)
    assert not (train.folder / stage / "validation.jsonl").exists()
    assert train(stage, "--eval-every", 3, "--overwrite") == 0
    assert learned(train.folder / stage) == plain
    assert [line["step"] for line in validations(train.folder / stage)] == [3, 6, 7]


def test_mle_s_loss_is_that_of_its_rows(train, run_folder):
    """val_loss is the mean negative log-likelihood of the validation tokens, here from one row at a time."""
    assert train("mle", "--eval-every", 7, "--eval-examples", 300) == 0
    (line,) = validations(train.folder / "mle")
    llama = model.load(run_folder / "base")
    llama.load_adapter("mle", train.folder / "mle")
    rows, _ = data.encode(data.toy("validation"), data.load_tokenizer(run_folder / "base"), max_new_tokens=40)
    total = tokens = 0
    for row in rows:
        batch = data.collate([row])
        total -= ppo.response_logp(llama, batch, "mle").sum().item()
        tokens += len(row.response)
    assert line["val_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_reward_model_s_auc_is_that_of_its_report(train):
    """The last validation and the held-out report judge the same model on the same rows."""
    assert train("reward", "--eval-every", 7) == 0
    (line,) = validations(train.folder / "reward")
    report = json.loads((train.folder / "reward/heldout.json").read_text())
    assert {kind: line[f"val_auc_{kind}"] for kind in data.NEGATIVES} == {
        kind: report[kind]["auc"] for kind in data.NEGATIVES
    }
    assert 0 < line["val_loss"] < 2


def test_ppo_is_judged_by_its_greedy_outputs(train, run_folder):
    """val_la-rouge1-F1 and val_excess_length are the metrics of what `sample` answers to the validation inputs."""
    assert train("ppo", "--eval-every", 7, "--eval-examples", 300) == 0
    (line,) = validations(train.folder / "ppo")
    llama, tokenizer = model.load(run_folder / "base"), data.load_tokenizer(run_folder / "base")
    llama.load_adapter("policy", train.folder / "ppo/policy")
    rows, _ = data.encode(data.toy("validation"), tokenizer, max_new_tokens=16)
    texts = evaluation.predict(
        rows, lambda prompts: model.sample(llama, prompts, "policy", 16, temperature=0), 32, tokenizer.decode
    )
    scores = evaluation.metrics(texts, [row.target for row in rows])
    for name in ("la-rouge1-F1", "excess_length"):
        assert line[f"val_{name}"] == pytest.approx(scores[name], abs=0.02)
    assert line["val_return"] != 0


@pytest.mark.parametrize("stage", FLAGS)
def test_the_best_adapter_is_kept(train, stage, monkeypatch, capsys):
    """The numbers of validation are replaced by ones whose best is at step 4 of 7: the adapter of step 4 remains."""
    values = {2: 0.5, 4: 0.2, 6: 0.9, 7: 0.4}
    sign = -1 if stage == "ppo" else 1
    snapshots = {}
    validate_now = run_module.Run.validate_now

    def replaced(run, done):
        run.validate = lambda: {run_module.BEST[stage][0]: sign * values[done]}
        snapshots[done] = [p.detach().clone() for p in run.optimizer.parameters]
        validate_now(run, done)

    monkeypatch.setattr(run_module.Run, "validate_now", replaced)
    assert train(stage, "--eval-every", 2, "--keep", "best") == 0
    assert f"{stage}: keeps step 4" in capsys.readouterr().out
    folder = train.folder / ("ppo/policy" if stage == "ppo" else stage)
    kept = sorted(tensor.double().sum().item() for tensor in load_file(folder / "adapter_model.safetensors").values())
    best = sorted(tensor.double().sum().item() for tensor in snapshots[4])
    last = sorted(tensor.double().sum().item() for tensor in snapshots[7])
    if stage == "ppo":  # the value adapter's are not in this file
        best, last = ([x for x in sums if any(abs(x - y) < 1e-9 for y in kept)] for sums in (best, last))
    assert kept == pytest.approx(best, abs=1e-9) and kept != pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize("stage", FLAGS)
def test_the_best_is_the_best_on_the_same_rows(train, stage, capsys):
    """Losses on other validation rows cannot be compared: --keep best resumes over the same rows or not at all."""
    flags = ["--eval-every", 1, "--keep", "best", "--eval-examples"]
    assert train(stage, *flags, 6, "--max-time", 1e-9) == 143
    assert train(stage, *flags, 5, "--resume") == 2
    assert "changed since: " in (said := capsys.readouterr().err) and "validation data" in said
    assert train(stage, *flags, 6, "--resume") == 0


@pytest.mark.parametrize("stage", FLAGS)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stopped_run_ends_with_the_same_bits(train, stage, stop, monkeypatch):
    """Stopped before, at and between two validations and resumed: the same adapter, the best's, and the same lines."""
    flags = ["--eval-every", 3, "--keep", "best", "--save-every", 1]
    assert train(stage, *flags) == 0
    folder = train.folder / stage
    names = ("validation.jsonl", "heldout.json")
    whole = learned(folder) | {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    folder.rename(train.folder / "whole")
    log = run_module.Run.log

    def logged(run, step, batch, **numbers):
        log(run, step, batch, **numbers)
        if step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module.Run, "log", logged)
    assert train(stage, *flags) == 143
    monkeypatch.setattr(run_module.Run, "log", log)
    assert train(stage, *flags, "--resume") == 0
    again = learned(folder) | {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    assert again == whole and len(journal(folder)) == 7


BAD = {  # flags: what is said
    "--keep best": "--keep best: which is best is not known without validation; add --eval-every N",
    "--keep first": "not one of last, best",
    "--eval-every -1": "out of range",
    "--eval-every 2 --eval-examples 1": "out of range",
    "--eval-every x": "invalid",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(train, flags, capsys):
    assert train("mle", *flags.split()) == 2
    assert BAD[flags] in capsys.readouterr().err and not (train.folder / "mle").exists()


def test_a_validation_split_is_needed(train, tmp_path, capsys):
    """Without one, a training that is to be validated does not begin."""
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [json.dumps({"input": f"in {i}", "output": "out"}) for i in range(9)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    before = contents(folder)
    assert train("mle", "--data", folder, "--eval-every", 2) == 2
    assert "no file for the validation split" in capsys.readouterr().err and contents(folder) == before


def test_the_report_draws_validation(train):
    """Each validated number has a curve beside the training ones; a stage that was not validated has none."""
    assert train("mle", "--eval-every", 2) == 0
    assert lastmile.main(["report", "--output-dir", str(train.folder), "--examples", "0"]) == 0
    page = (train.folder / "report.html").read_text()
    last = validations(train.folder / "mle")[-1]["val_loss"]
    assert "<b>val_loss</b>" in page and f"at the end {last:.3g}" in page and "val_return" not in page
