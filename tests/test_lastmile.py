"""The command line: the demo's path in small, what the settings do, and what bad input gets."""

import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from helpers import contents, dense_twin, exit_code, journal, learned
from hub import Hub
from safetensors.torch import load_file

import lastmile
from formats.errors import UserError
from interface import command_line, folders, plan
from interface import commands as settings_module
from interface.training_settings import Mle
from safety import ranks, terminal
from safety import run as run_module
from safety.memory import FreeMemory, resident_memory, return_free_memory
from speed import cpu

SMALL = ["--train-examples", 14, "--max-steps", 2, "--max-new-tokens", 24]


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def test_the_demo(fresh_run, capsys):
    """All stages in order, as in the README: each finds what the one before wrote, and the files lie where it says."""
    run = fresh_run.folder
    assert fresh_run("reward", *SMALL, "--eval-examples", 8) == 0
    assert "AUC of positives against it" in capsys.readouterr().out
    fast = [*SMALL, "--learning-rate", 0.1]
    assert fresh_run("mle", *fast) == fresh_run("ppo", *fast) == 0
    assert fresh_run("eval", "--test-examples", 6, "--max-new-tokens", 24) == 0
    assert fresh_run("tables") == 0
    assert (run / "eval/tables.md").read_text() in capsys.readouterr().out
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    for stage in ("reward", "mle", "ppo"):
        config = json.loads((run / stage / "config.json").read_text())
        assert config["stage"] == stage and config["seed"] == 1337 and config["commit"]
        assert [line["step"] for line in journal(run / stage)] == [0, 1]
    assert all(
        (run / place / name).is_file() for place in ("reward", "mle", "ppo/policy", "ppo/value") for name in adapter
    )
    scores = json.loads((run / "eval/scores.json").read_text())
    assert list(scores) == list(lastmile.evaluation.COLUMNS)
    assert not list(run.rglob("*.partial"))

    answers = {}
    for name in ("base", "mle", "policy"):
        rows = [json.loads(line) for line in (run / f"eval/{name}.jsonl").read_text().split("\n")[:-1]]
        assert len(rows) == 6 and all(row["source"] and row["reference"] for row in rows)
        answers[name] = rows[0]["prediction"]
    assert len(set(answers.values())) == 3
    for name, text in answers.items():  # alone, the prompt gets the answer that it got in its batch
        assert fresh_run("sample", rows[0]["source"], "--adapter", name, "--max-new-tokens", 24) == 0
        assert capsys.readouterr().out == terminal.visible(text) + "\n"


@pytest.mark.parametrize(
    ("stage", "flags", "number", "factor"),
    [
        ("reward", "--train-examples 2 --batch-size 12 --learning-rate 1e-2 --eval-examples 4", "loss", 0.15),
        ("mle", "--train-examples 2 --batch-size 2 --learning-rate 1e-2", "loss", 0.5),
        ("ppo", "--train-examples 4 --batch-size 4 --learning-rate 1e-2 --ground-truth-fraction 1", "value_loss", 0.2),
    ],
    ids=["reward", "mle", "ppo"],
)
def test_each_stage_overfits_one_batch(fresh_run, reward, stage, flags, number, factor):
    """The oldest check of a training loop: shown one batch again and again, it must learn it."""
    flags = [*flags.split(), *(["--reward", reward] if stage == "ppo" else [])]
    assert fresh_run(stage, *flags, "--max-steps", 80 if stage == "ppo" else 40) == 0
    numbers = [line[number] for line in journal(fresh_run.folder / stage)]
    assert numbers[-1] < factor * numbers[0]


def test_ppo_raises_the_return(fresh_run, reward):
    """Sampling its own outputs, the policy finds what the reward model likes; each token's credit is its own reward."""
    flags = "--train-examples 16 --batch-size 16 --max-steps 32 --learning-rate 3e-2 --max-new-tokens 20"
    flags += " --ground-truth-fraction 0 --length-penalty 0 --gamma 0.01"
    assert fresh_run("ppo", *flags.split(), "--reward", reward) == 0
    returns = [line["return"] for line in journal(fresh_run.folder / "ppo")]
    assert sum(returns[-4:]) > 1.2 * sum(returns[:4]) > 0


def test_ratio_is_one_at_one_update_a_batch(fresh_run, reward):
    """Paper, 3.3: one update a batch, so the policy is the one that acted: to the bit where the truth counts as its own
    actions, and but for the sampler's rounding on samples.
    """
    assert fresh_run("ppo", *SMALL, "--reward", reward, "--max-steps", 4) == 0
    lines = journal(fresh_run.folder / "ppo")
    assert [line["ground_truth"] for line in lines] == [False, True, False, True]
    for line in lines:
        found = line["ratio"], line["ratio_max"], line["clip_fraction"]
        assert found == ((1.0, 1.0, 0.0) if line["ground_truth"] else pytest.approx((1.0, 1.0, 0.0), abs=1e-3))


def test_ratio_leaves_one_at_more_updates(fresh_run, reward):
    """--ppo-epochs 2 keeps the logp of the first pass; were it taken anew, the ratio would be 1 and clipping dead."""
    assert fresh_run("ppo", *SMALL, "--reward", reward, "--ppo-epochs", 2, "--clip-range", 1e-4) == 0
    assert all(line["ratio"] != 1.0 and line["clip_fraction"] > 0 for line in journal(fresh_run.folder / "ppo"))


def test_value_warmup_leaves_the_policy_alone(fresh_run, reward):
    """--value-warmup-steps: in these steps the value learns, as it would beside the policy, and the policy does not
    move by a bit; the step after them moves it.
    """
    flags = ["--reward", reward, "--max-steps", 3, "--overwrite", "--entropy-coef", 0.1]
    moved = {}
    for steps in (3, 2):
        assert fresh_run("ppo", *SMALL, *flags, "--value-warmup-steps", steps) == 0
        for name in ("policy", "value"):
            tensors = load_file(fresh_run.folder / "ppo" / name / "adapter_model.safetensors")
            largest = max(tensor.abs().max() for key, tensor in tensors.items() if "lora_B" in key)
            moved[steps, name] = largest.item()
    assert moved[3, "policy"] == 0 < moved[3, "value"] and moved[2, "value"] > 0
    # AdamW's first update of a weight has the size of the rate; counted as its third, it was half of that.
    assert moved[2, "policy"] == pytest.approx(lastmile.learning_rate(2, 3, 3e-3), rel=1e-3)


def test_auto_is_bf16_where_the_cpu_multiplies_it(tmp_path, monkeypatch):
    """--dtype auto on a CPU with faster bf16 products: over large bases and the Hub's, in what trains adapters or
    answers; a small base, and what makes a base, stay fp32. So does all where they are slower, as on some Xeons.
    """
    (tmp_path / "model.safetensors").write_bytes(b"")
    os.truncate(tmp_path / "model.safetensors", 65 << 20)
    small = tmp_path / "small"
    small.mkdir()
    (small / "model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr("speed.cpu.multiplies_bf16", lambda: True)
    monkeypatch.setattr("speed.cpu.bf16_is_faster", lambda: True)
    choose = command_line.choose_dtype
    assert choose("mle", "cpu", str(tmp_path)) == choose("ppo", "cpu", "OWNER/NAME") == "bfloat16"
    assert choose("mle", "cpu", str(small)) == choose("quantize", "cpu", str(tmp_path)) == "float32"
    assert choose("mle", "cuda", str(small)) == "bfloat16"
    monkeypatch.setattr("speed.cpu.bf16_is_faster", lambda: False)
    assert choose("mle", "cpu", str(tmp_path)) == "float32"
    monkeypatch.setattr("speed.cpu.multiplies_bf16", lambda: False)
    assert choose("mle", "cpu", str(tmp_path), "bfloat16") == "float32"


def test_a_resumed_run_keeps_its_dtype(fresh_run, monkeypatch):
    """A clock chose the dtype when the run started; asked again it may say otherwise, and the bits would differ."""
    monkeypatch.setattr("speed.cpu.multiplies_bf16", lambda: True)
    monkeypatch.setattr("interface.command_line.LARGE_BASE", 0)
    flags = ["mle", *SMALL, "--max-steps", 2]
    monkeypatch.setattr("speed.cpu.bf16_is_faster", lambda: True)
    assert fresh_run(*flags, "--max-time", 1e-9) == 143
    monkeypatch.setattr("speed.cpu.bf16_is_faster", lambda: False)
    place = fresh_run.folder / "mle.partial/checkpoints/step-00000001"
    assert command_line.dtype_before(fresh_run.folder / "ppo.partial", str(place)) == "bfloat16"
    (fresh_run.folder / "state.json").write_text("[" * 100_000)  # torn, nested without end: no checkpoint says anything
    assert command_line.dtype_before(fresh_run.folder / "ppo.partial", str(fresh_run.folder)) is None
    assert fresh_run(*flags, "--resume") == 0
    assert json.loads((fresh_run.folder / "mle/config.json").read_text())["dtype"] == "bfloat16"


def test_bf16_is_timed():
    """The answer of a clock, whichever, in no more time than a user would notice."""
    start = time.perf_counter()
    assert cpu.bf16_is_faster() in (True, False) and time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("steps", "rate", "said"),
    [(60, 1e-5, "--learning-rate 3e-04"), (15, 1e-5, "--learning-rate 1e-03"), (60, 1e-4, ""), (1800, 1e-5, "")],
)
def test_a_run_that_cannot_learn_says_so(steps, rate, said, capsys):
    """The paper's rate is for its 1,800 steps: a first run on a few hundred rows ended where it began, in silence."""
    plan.warn_of_little_training(Mle(learning_rate=rate), steps)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == bool(said)
    plan.warn_of_little_training(Mle(learning_rate=rate, tune="full"), steps)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("stage", ["reward", "mle", "ppo"])
def test_the_seed_decides(fresh_run, reward, stage):
    """Two runs of one seed agree in every byte of adapters and log, else no result could be repeated; seeds differ."""
    found = []
    for seed in (5, 5, 6):
        flags = {"reward": ["--eval-examples", 4], "mle": [], "ppo": ["--reward", reward]}[stage]
        assert fresh_run(stage, *SMALL, *flags, "--seed", seed, "--overwrite") == 0
        found.append(learned(fresh_run.folder / stage))
    assert found[0] == found[1] and found[0].keys() == found[2].keys()
    weights = [name for name in found[0] if not name.endswith("config.json")]
    assert len(weights) == (3 if stage == "ppo" else 2) and all(found[0][name] != found[2][name] for name in weights)


# ----------------------------------------------------------------------------------------------------------------------
# The settings


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("reward", dict(batch_size=14, lora_r=16, lora_alpha=16.0, learning_rate=1e-5, epochs=1, max_input_tokens=400)),
        ("mle", dict(batch_size=7, lora_r=32, lora_alpha=16.0, learning_rate=1e-5, epochs=1, max_new_tokens=100)),
        ("ppo", dict(batch_size=7, lora_r=32, lora_alpha=16.0, learning_rate=1e-5, epochs=1, ppo_epochs=1)),
        ("ppo", dict(gamma=0.99999, lam=0.95, length_penalty=2.5, ground_truth_fraction=0.5, init="base")),
        ("ppo", dict(kl_coef=0.0, entropy_coef=0.0, whiten=False, value_clip=0.0, reward_clamp=0.0)),
    ],
)
def test_the_defaults_are_the_paper_s(command, expected):
    """Without flags, on any data but the toy, a run is the paper's."""
    _, settings, _ = command_line.read([command, "--data", "samsum"])
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_toy_has_its_own_rates():
    """The paper's 1e-5 would teach the tiny base nothing; the toy's 3e-3 would ruin Llama. A flag beats both."""
    for flags, rate in [([], 3e-3), (["--data", "samsum"], 1e-5), (["--learning-rate", "0.5"], 0.5)]:
        assert all(command_line.read([stage, *flags])[1].learning_rate == rate for stage in ("mle", "ppo"))
    assert command_line.read(["reward"])[1].learning_rate == 2e-3
    assert command_line.read(["reward", "--data", "samsum"])[1].learning_rate == 1e-5
    assert command_line.read(["eval"])[1].bleurt == "none"
    assert command_line.read(["eval", "--data", "xsum"])[1].test_examples == 3000  # paper, 4.2
    assert command_line.read(["ppo", "--data", "xsum"])[1].train_examples == 15000
    assert command_line.read(["ppo", "--data", "xsum", "--train-examples", "5"])[1].train_examples == 5


def test_underscores_are_dashes():
    """Many tools write --batch_size: it means the same, and a value with underscores or dashes stays as it is."""
    dashed = command_line.read(["mle", "--batch-size", "3", "--output-dir=a_b", "--data=c_d-e", "--no-eos-in-labels"])
    assert dashed == command_line.read(
        ["mle", "--batch_size", "3", "--output_dir=a_b", "--data=c_d-e", "--no_eos_in_labels"]
    )
    assert (dashed[1].batch_size, dashed[1].output_dir, dashed[1].data) == (3, "a_b", "c_d-e")


@pytest.mark.parametrize("command", lastmile.COMMANDS)
def test_help_lists_every_setting(command, capsys):
    """A setting that --help does not show does not exist for its user."""
    assert exit_code(lastmile.main, [command, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(settings_module.COMMANDS[command]):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown) and len(field.metadata["help"]) > 3


def test_the_readme_s_commands_parse(monkeypatch):
    """Every `python lastmile.py` line of the README is typed by somebody, so every flag in it must exist."""
    readme = folders.ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    blocks = "\n".join(re.findall(r"^```.*?\n(.*?)^```", readme.read_text(), re.M | re.S)).replace("\\\n", " ")
    commands = re.findall(r"""python3? lastmile\.py +((?:"[^"]*"|'[^']*'|[^\n|;&<>#"'])+)""", blocks)
    assert commands
    for line in commands:
        arguments = shlex.split(line)
        assert arguments[0] in lastmile.COMMANDS and exit_code(command_line.read, arguments) != 2, line


@pytest.fixture(scope="module")
def plain(run_folder, reward, tmp_path_factory):
    """What `ppo` and `ppo --ppo-epochs 2` learn without further flags."""
    found = {}
    for epochs in ("1", "2"):
        folder = tmp_path_factory.mktemp("plain")
        flags = ["--model", run_folder / "base", "--output-dir", folder, "--reward", reward, "--ppo-epochs", epochs]
        assert lastmile.main(["ppo", *map(str, [*SMALL, *flags])]) == 0
        found[epochs] = learned(folder / "ppo")
    return found


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--whiten", "policy"),
        ("--kl-coef 0.5", "policy value"),
        ("--entropy-coef 0.5", "policy"),
        ("--reward-clamp 0.01", "policy value"),
        ("--value-clip 0.001 --ppo-epochs 2", "value"),  # at one update the value has not moved: nothing to clip
        ("--clip-range 0.0001 --ppo-epochs 2", "policy"),
        ("--length-penalty 0", "policy value"),
        ("--lam 0.5", "policy"),
        ("--gamma 0.5", "policy value"),
        ("--max-grad-norm 0.0001", "policy value"),
        ("--lora-targets q_proj,v_proj", "policy value"),
    ],
)
def test_ppo_flags_change_the_first_updates(fresh_run, reward, plain, flags, changed):
    """A flag that does nothing is worse than none. Two steps with it must change the adapters it is about."""
    assert fresh_run("ppo", *SMALL, "--reward", reward, *flags.split()) == 0
    found, before = learned(fresh_run.folder / "ppo"), plain["2" if "epochs" in flags else "1"]
    for name in changed.split():
        assert found[f"{name}/adapter_model.safetensors"] != before[f"{name}/adapter_model.safetensors"]


def test_whiten_and_clamp_show_in_the_log(fresh_run, reward):
    """Whitened advantages have mean 0; a clamped score stays within the clamp: both have reached the loss."""
    flags = ["--whiten", "--reward-clamp", 0.01, "--length-penalty", 0]
    assert fresh_run("ppo", *SMALL, "--reward", reward, *flags) == 0
    assert all(
        abs(line["advantage"]) < 1e-5 and abs(line["reward"]) <= 0.01001 for line in journal(fresh_run.folder / "ppo")
    )


def test_init_mle(fresh_run, reward):
    """--init mle starts where mle ended: at a rate that changes next to nothing, the policy is the mle adapter."""
    assert fresh_run("mle", *SMALL) == 0
    flags = ["--reward", reward, "--init", "mle", "--max-steps", 1, "--learning-rate", 1e-12]
    assert fresh_run("ppo", *SMALL, *flags) == 0
    run = fresh_run.folder
    mle, policy = (load_file(run / folder / "adapter_model.safetensors") for folder in ("mle", "ppo/policy"))
    assert mle.keys() == policy.keys() and any(tensor.any() for name, tensor in mle.items() if "lora_B" in name)
    assert all(torch.allclose(mle[name], policy[name], atol=1e-9) for name in mle)


def test_init_keeps_its_rank(fresh_run, tmp_path, capsys):
    """An adapter that --init names has a rank and layers already: flags that ask for others are said to do nothing, and
    the card does not claim them. A new value takes them.
    """
    assert fresh_run("mle", *SMALL, "--lora-r", 4) == 0
    shutil.move(fresh_run.folder / "mle", tmp_path / "first")
    flags = ["--init", tmp_path / "first", "--lora-r", 8, "--lora-targets", "q_proj"]
    assert fresh_run("mle", *SMALL, *flags) == 0
    assert "mle keeps its own rank, alpha and targets; no effect: --lora-r, --lora-targets" in capsys.readouterr().err
    assert json.loads((fresh_run.folder / "mle/adapter_config.json").read_text())["r"] == 4
    assert "--lora-r" not in (fresh_run.folder / "mle/README.md").read_text()
    assert fresh_run("ppo", *SMALL, "--reward", "rouge", *flags) == 0
    ranks_of = {
        name: json.loads((fresh_run.folder / f"ppo/{name}/adapter_config.json").read_text())["r"]
        for name in ("policy", "value")
    }
    assert ranks_of == {"policy": 4, "value": 8}
    assert "- `--lora-r 8`" in (fresh_run.folder / "ppo/value/README.md").read_text()


def test_no_git(fresh_run, monkeypatch):
    """A slim container has no git; hours of training must not end at the question which commit this is."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fresh_run("mle", *SMALL) == 0
    assert json.loads((fresh_run.folder / "mle/config.json").read_text())["commit"] == "unknown"


def test_no_eos_in_labels(fresh_run, monkeypatch):
    """The paper's XSum control likely never learned to stop; the flag brings that about: no batch holds an EOS."""
    seen = []
    collate = lastmile.data.collate
    monkeypatch.setattr(lastmile.data, "collate", lambda rows, device: seen.extend(rows) or collate(rows, device))
    for flag, ends in (("--eos-in-labels", True), ("--no-eos-in-labels", False)):
        seen.clear()
        assert fresh_run("mle", *SMALL, flag, "--overwrite") == 0
        assert len(seen) == 14 and all((2 in row.response) == ends for row in seen)


# ----------------------------------------------------------------------------------------------------------------------
# A file of settings: --config


def written(folder, text, name="settings.toml"):
    """A settings file with that text, to the byte."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def test_a_settings_file_sets_what_flags_do_not(tmp_path):
    """Keys before the first table are for every command that has such a setting, a table's for its command alone and
    before those; a flag goes before the file, a dash means an underscore, and a whole number will do for a number.
    """
    text = 'seed = 7\nbatch-size = 3\nlora_alpha = 8\noutput_dir = "a-b_c"\n[ppo]\nbatch_size = 5\nwhiten = true\n'
    file = written(tmp_path, text + '[mle]\neos-in-labels = false\n[sample]\nadapter = "x"\n')
    ppo = command_line.read(["ppo", "--config", file, "--seed", "8", "--no-whiten"])[1]
    assert (ppo.seed, ppo.batch_size, ppo.lora_alpha, ppo.output_dir, ppo.whiten) == (8, 5, 8.0, "a-b_c", False)
    assert (
        type(ppo.lora_alpha) is float and ppo.config == file and command_line.read(["ppo", "--config", file])[1].whiten
    )
    mle = command_line.read(["mle", "--config", file])[1]
    assert (mle.seed, mle.batch_size, mle.eos_in_labels) == (7, 3, False)
    assert command_line.read(["sample", "hello", "--config", file])[1].adapter == "x"
    assert command_line.read(["tables", "--config", file])[1].seed == 7  # has neither batch size nor alpha


def test_ppo_s_own_settings_are_not_the_reward_model_s(tmp_path):
    """A config.json has the settings of one stage, under the names that others have, too: a reward model that ppo
    trains keeps the paper's batch and rank, not ppo's.
    """
    file = written(tmp_path, '{"stage": "ppo", "batch_size": 7, "lora_r": 32, "init": "mle", "seed": 5}', "config.json")
    ppo = command_line.read(["ppo", "--config", file])[1]
    reward = command_line.reward_settings(ppo)
    assert (ppo.batch_size, ppo.lora_r, ppo.init, ppo.seed) == (7, 32, "mle", 5)
    assert (reward.batch_size, reward.lora_r, reward.init, reward.seed) == (14, 16, "base", 5)


@pytest.mark.parametrize("text", ["\ufeffseed = 7\n[mle]\nbatch_size = 3\n", "seed = 7\r\n\r\n[mle]\r\nbatch_size = 3"])
def test_settings_files_of_windows(tmp_path, text):
    """Editors there put a byte order mark in front and end lines with CRLF: neither is part of a key or a value."""
    mle = command_line.read(["mle", "--config", written(tmp_path, text)])[1]
    assert (mle.seed, mle.batch_size) == (7, 3)


@pytest.mark.parametrize(
    ("text", "flags", "rate", "examples"),
    [
        ("", [], 3e-3, 0),
        ('data = "samsum"', [], 1e-5, 0),
        ('data = "xsum"', [], 1e-5, 15000),
        ('[mle]\ndata = "xsum"', [], 1e-5, 15000),
        ('[ppo]\ndata = "xsum"', [], 3e-3, 0),
        ('data = "xsum"', ["--data", "toy"], 3e-3, 0),
        ('data = "xsum"\ntrain_examples = 5\nlearning_rate = 1', [], 1.0, 5),
    ],
)
def test_defaults_follow_the_data_of_the_file(tmp_path, text, flags, rate, examples):
    """Which defaults hold, the toy's or the paper's, is decided by the data that will be used, wherever it is named."""
    mle = command_line.read(["mle", "--config", written(tmp_path, text), *flags])[1]
    assert (mle.learning_rate, mle.train_examples) == (rate, examples)


BAD_FILES = {  # text of the file: what the one line on stderr must say behind the file's name
    'batch_size = "3"': "batch_size: '3' is not of type int",
    "batch_size = 3.0": "batch_size: 3.0 is not of type int",
    "batch_size = true": "batch_size: True is not of type int",
    "learning_rate = true": "learning_rate: True is not of type float",
    "overwrite = 1": "overwrite: 1 is not of type bool",
    "data = 1979-05-27": "data: datetime.date(1979, 5, 27) is not of type str",
    "batch_size = 0": "batch_size: 0 is out of range: must be at least 1",
    "learning-rate = 0": "learning-rate: 0.0 is out of range: must be above 0",
    "learning_rate = nan": "learning_rate: nan is out of range",
    "learning_rate = inf": "learning_rate: inf is out of range",
    f"learning_rate = 1{'0' * 400}": "learning_rate: inf is out of range",
    "[ppo]\nlam = 1.5": "[ppo] lam: 1.5 is out of range: must be at most 1",
    'dtype = "int8"': "dtype: 'int8' is not one of auto, float32, bfloat16, float16",
    "bach_size = 3": "bach_size: no such setting; did you mean batch_size?",
    "[ppo]\nlength_penality = 1": "[ppo] length_penality: no such setting; did you mean length_penalty?",
    "[mle]\ngamma = 0.5": "[mle] gamma: no such setting",  # PPO's, and so allowed before the first table
    "text = 'hello'": "text: no such setting",
    "stage = 'mle'": "stage: no such setting",  # only a stage's config.json says which it was
    "[trainer]\nbatch_size = 3": "no command [trainer]; tables are named pretrain, quantize,",
    "batch_size = 3\nbatch_size = 4": "unreadable settings: Cannot overwrite a value",
    "batch_size = 3\nbatch-size = 4": "batch-size: given twice, with a dash and with an underscore",
    "[mle]\nseed = 3\n[mle]\nseed = 4": "unreadable settings: Cannot declare ('mle',) twice",
    "batch_size: 3": "unreadable settings: Expected '=' after a key",
    b"data = '\xff'": "unreadable settings: 'utf-8' codec",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_settings_files(fresh_run, text, tmp_path, capsys):
    """A file is checked as flags are, whole, whichever command it is for: one line with file, key and cause, code 2."""
    file = written(tmp_path, text)
    before = contents(tmp_path)
    assert exit_code(fresh_run, "mle", "--config", file) == 2
    error = capsys.readouterr().err
    assert f"{file}: {BAD_FILES[text]}" in error and error.count("\n") == 1, error
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "unreadable settings"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"batch_size": NaN}', "batch_size: nan is not of type int"),
        ('{"learning_rate": Infinity}', "learning_rate: inf is out of range"),
        ('{"data": null}', "data: None is not of type str"),
        ('{"attention_bias": false}', "attention_bias: no such setting"),  # a model's config.json instead of a stage's
    ],
)
def test_bad_config_json(fresh_run, tmp_path, text, problem, capsys):
    """A config.json edited by hand, or one that belongs to a model: the same line, and no traceback."""
    file = written(tmp_path, text, "config.json")
    assert exit_code(fresh_run, "mle", "--config", file) == 2
    error = capsys.readouterr().err
    assert file in error and problem in error and error.count("\n") == 1, error


def test_an_absent_settings_file(fresh_run, tmp_path, capsys):
    """A mistyped name, or a folder instead of the file in it, must not train a night with defaults."""
    for file in (tmp_path / "absent.toml", tmp_path):
        assert exit_code(fresh_run, "mle", "--config", file) == 2
        error = capsys.readouterr().err
        assert str(file) in error and error.count("\n") == 1
    assert not (fresh_run.folder / "mle").exists()


@pytest.mark.parametrize("stage", ["reward", "mle", "ppo"])
def test_a_saved_config_repeats_its_stage(fresh_run, reward, tmp_path, stage, capsys):
    """The config.json beside an adapter brings it forth again, to the byte, in another folder and from nothing else;
    that the first run might replace a folder is no leave for the second.
    """
    flags = {"reward": ["--eval-examples", 4], "mle": ["--no-eos-in-labels"], "ppo": ["--reward", reward, "--whiten"]}
    odd = ["--seed", 5, "--lora-r", 3, "--learning-rate", 0.01, "--overwrite", "--resume", *flags[stage]]
    assert fresh_run(stage, *SMALL, *odd) == 0
    config = str(fresh_run.folder / stage / "config.json")
    assert lastmile.main([stage, "--config", config]) == 2 and "--overwrite" in capsys.readouterr().err
    assert lastmile.main([stage, "--config", config, "--output-dir", str(tmp_path / "again")]) == 0
    assert not json.loads((tmp_path / "again" / stage / "config.json").read_text())["resume"]
    first, again = learned(fresh_run.folder / stage), learned(tmp_path / "again" / stage)
    assert first == again and len(first) >= 3


def test_saved_settings_repeat_a_quantization(fresh_run, run_folder, tmp_path):
    """Beside a model the settings are called settings.json, as config.json is Hugging Face's; they do the same."""
    assert lastmile.main(
        ["quantize", "--config", str(run_folder / "base/settings.json"), "--output-dir", str(tmp_path / "again")]
    ) == 0  # fmt: skip
    for name in ("model.safetensors", "config.json", "tokenizer.model", "template.txt"):
        assert (tmp_path / "again/base" / name).read_bytes() == (run_folder / "base" / name).read_bytes()


def test_settings_are_printed_once_and_saved(fresh_run, reward, capsys):
    """A stage prints the settings that are not the defaults, as flags, and saves all of them: no run is a riddle later.
    A path stays in one piece.
    """
    place = fresh_run.folder / ("a-long-folder-name-with-dashes-" * 6)
    places = ["--model", fresh_run.folder / "base", "--output-dir", place]
    for stage, flags in [("mle", []), ("ppo", ["--reward", reward]), ("eval", ["--adapters", "base"])]:
        own = ["--test-examples", 4] if stage == "eval" else SMALL[:-2]
        given = [*places, *own, *flags, "--max-new-tokens", 24]
        assert lastmile.main([stage, *map(str, given)]) == 0
        out = capsys.readouterr().out
        (shown,) = re.findall(rf"^{stage}: (--.*)$", out, re.M)
        assert set(map(str, given)) <= set(shown.split()) and "--seed" not in shown
        settings = json.loads((place / stage / "config.json").read_text())
        assert settings.pop("stage") == stage and settings.pop("commit")
        assert set(settings) == {f.name for f in dataclasses.fields(settings_module.COMMANDS[stage])}


# ----------------------------------------------------------------------------------------------------------------------
# Dry runs


def dry(run, stage, *flags, capsys):
    """What a dry run says of its sizes: {"rows", "steps", "trained"}, where it says it."""
    capsys.readouterr()
    assert run(stage, *flags, "--dry-run") == 0
    out = capsys.readouterr().out
    name = "fresh weights" if stage == "pretrain" else r"\S+"
    assert out.count("dry run: ") == 1 and re.search(rf"^  model +{name}: [\d.,]+ M parameters$", out, re.M)
    patterns = dict(rows=r"data +([\d,]+) rows", steps=r"steps +([\d,]+) of", trained=r"trained +([\d,]+) param")
    found = {name: re.search(pattern, out) for name, pattern in patterns.items()}
    has_memory = re.search(r"^  memory +[\d.]+ GB at most, in one update on the largest batch$", out, re.M)
    assert bool(has_memory) == bool(found["steps"])
    return {name: int(match[1].replace(",", "")) for name, match in found.items() if match}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pretrain --overwrite", {"rows", "steps", "trained"}),
        ("quantize --model PRETRAIN", {"rows"}),
        ("reward", {"rows", "steps", "trained"}),
        ("mle --overwrite", {"rows", "steps", "trained"}),
        ("ppo", {"rows", "steps", "trained"}),
        ("ppo --reward REWARD --init mle", {"rows", "steps", "trained"}),
        ("eval --adapters base,mle", {"rows"}),
        ("merge --adapter mle", set()),
        ("sample hello --adapter mle", set()),
    ],
)
def test_a_dry_run_leaves_no_trace(fresh_run, run_folder, reward, line, says, tmp_path, monkeypatch, capsys):
    """It answers within seconds what a night would have found out, and nothing on disk changes: no folder, no cache,
    nothing left of temporary files.
    """
    assert fresh_run("mle", *SMALL) == 0
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path), contents(run_folder)
    places = {"REWARD": reward, "PRETRAIN": run_folder / "pretrain"}
    stage, *flags = (places.get(word, word) for word in line.split())
    assert set(dry(fresh_run, stage, *flags, capsys=capsys)) == says
    assert (contents(tmp_path), contents(run_folder)) == before


@pytest.mark.parametrize(
    ("stage", "flags", "saved"),
    [
        ("pretrain", "--hidden-size 32 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1", ["."]),
        ("reward", "--eval-examples 4", ["."]),
        ("mle", "--lora-targets q_proj,v_proj", ["."]),
        ("ppo", "--reward REWARD", ["policy", "value"]),
        ("ppo", "--reward REWARD --init mle --lora-r 3", ["policy", "value"]),
    ],
)
def test_a_dry_run_s_numbers_are_the_run_s(fresh_run, reward, stage, flags, saved, capsys):
    """Its steps are the lines of metrics.jsonl, its parameters those of the saved files: a plan that counts for itself
    would drift from what is run.
    """
    if "mle" in flags:
        assert fresh_run("mle", *SMALL) == 0
    flags = [reward if word == "REWARD" else word for word in flags.split()]
    flags += ["--train-examples", 20, "--batch-size", 6, "--epochs", 2, "--max-new-tokens", 60]
    found = dry(fresh_run, stage, *flags, capsys=capsys)
    assert fresh_run(stage, *flags) == 0
    folder = fresh_run.folder / stage
    tensors = [load_file(path) for place in saved for path in (folder / place).glob("*.safetensors")]
    assert found["trained"] == sum(tensor.numel() for file in tensors for tensor in file.values()) > 0
    assert found["steps"] == len(journal(folder)) == 2 * -(-found["rows"] // 6)
    assert 60 < found["rows"] <= 120 if stage == "reward" else found["rows"] == 20


def test_a_dry_run_makes_one_update_on_the_largest_batch(fresh_run, reward, monkeypatch):
    """Its memory is that of the batch that decides whether the run fits, and its rate of 0 changes no weight."""
    seen, step = [], lastmile.Optimizer.step

    def watched(optimizer, rate):
        before = [p.detach().clone() for p in optimizer.parameters]
        norm = step(optimizer, rate)
        seen.append((rate, all(map(torch.equal, before, optimizer.parameters))))
        return norm

    longest, largest = [], lastmile.largest_batch

    def watched_largest(settings, rows):
        index = largest(settings, rows)
        lengths = [len(row.prompt) + len(row.response) for row in rows]
        longest.append(max(lengths[i] for i in index) >= sorted(lengths)[-6])  # batches hold rows of like length
        return index

    monkeypatch.setattr(lastmile, "largest_batch", watched_largest)
    monkeypatch.setattr(lastmile.Optimizer, "step", watched)
    flags = ["--train-examples", 20, "--batch-size", 6, "--reward", reward, "--max-new-tokens", 30]
    assert fresh_run("ppo", *flags, "--dry-run") == 0
    assert seen == [(0.0, True)] and longest == [True]


def test_free_memory_goes_back():
    """Freed blocks between live ones stay with the C library and add to the peak, unless they are returned."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has malloc_trim")
    blocks = [bytearray(b"1" * 100_000) for _ in range(2000)]
    kept, before = blocks[::50], resident_memory()
    del blocks
    return_free_memory()
    assert len(kept) == 40 and before - resident_memory() > 150e6


def test_memory_goes_back_only_when_the_process_has_grown(monkeypatch):
    """After every step it cost half a step on some CPUs, as the next one touches all pages again; never, the peak grew
    by 40 %. What a step needs is learned: a longer batch counts once.
    """
    held = iter([100, 110, 119, 121, 150, 160, 179, 181, 140, 170])
    monkeypatch.setattr("safety.memory.resident_memory", lambda: next(held))
    calls = []
    monkeypatch.setattr("safety.memory.return_free_memory", lambda: calls.append(memory.needed))
    memory = FreeMemory()
    for _ in range(10):
        memory.end_step()
    assert calls == [100, 150]


def test_a_dry_run_writes_no_tables(fresh_run, capsys):
    """`tables` writes a file too; and a dry run of it is no reason to."""
    assert fresh_run("eval", "--adapters", "base", "--test-examples", 4, "--max-new-tokens", 24) == 0
    assert fresh_run("tables", "--dry-run") == 0
    assert "rougeL-recall" in capsys.readouterr().out and not (fresh_run.folder / "eval/tables.md").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Models and adapters by name


@pytest.fixture(scope="module")
def trained(run_folder, tmp_path_factory):
    """A run's folder over the same base with an mle adapter that changes what the base says."""
    folder = tmp_path_factory.mktemp("trained") / "toy"
    flags = f"--output-dir {folder} --model {run_folder}/base --learning-rate 0.1 --lora-r 4"
    assert lastmile.main(["mle", *flags.split(), *map(str, SMALL)]) == 0
    return folder


def say(text, *flags, capsys):
    capsys.readouterr()
    assert lastmile.main(["sample", text, "--max-new-tokens", "24", *map(str, flags)]) == 0
    return capsys.readouterr().out


TEXTS = ["Amy: Shall we play chess at noon?\nBen: Sorry, I have no time.", "Zoe: Hi", "What about the beach tonight?"]


def test_merged_is_what_the_adapter_was(trained, run_folder, capsys):
    """`merge` folds mle into one dense fp16 folder. It answers as base and adapter do, with no adapter and no GPTQ, in
    here and in transformers; and it says what it is made of.
    """
    transformers = pytest.importorskip("transformers")
    at = ["--output-dir", str(trained), "--model", str(run_folder / "base")]
    assert lastmile.main(["merge", "--adapter", "mle", *at]) == 0
    folder = trained / "merge"
    ours, base = ([say(text, "--adapter", name, *at, capsys=capsys) for text in TEXTS] for name in ("mle", "base"))
    assert ours == [say(text, "--adapter", "base", "--model", folder, capsys=capsys) for text in TEXTS] != base
    names = {"config.json", "settings.json", "model.safetensors", "tokenizer.model", "template.txt", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "settings.json").read_text())["adapter"] == "mle"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}

    llama, tokens = lastmile.model.load(run_folder / "base"), torch.arange(3, 51).view(2, 24)
    llama.load_adapter("mle", trained / "mle")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected, found = llama.logits(llama(tokens, "mle")), theirs(tokens).logits
        assert (found - expected).norm() < 1e-3 * expected.norm()  # fp16 has 11 bits
        merged = lastmile.model.load(folder)
        torch.testing.assert_close(merged.logits(merged(tokens)), found, rtol=1e-4, atol=1e-4)


def test_merge_takes_any_adapter(fresh_run, trained, reward, capsys):
    """The run's own policy, or a folder: the same adapter merges to the same bytes however it is named; a reward model
    answers nothing and is refused.
    """
    shutil.copytree(trained / "mle", fresh_run.folder / "ppo/policy")
    found = []
    for name in ("policy", trained / "mle"):
        assert fresh_run("merge", "--adapter", name, "--overwrite") == 0
        found.append((fresh_run.folder / "merge/model.safetensors").read_bytes())
    assert found[0] == found[1]
    capsys.readouterr()
    assert fresh_run("merge", "--adapter", reward, "--overwrite") == 2
    assert f"{reward}: a merged adapter must not have a score head" in capsys.readouterr().err
    assert (fresh_run.folder / "merge/model.safetensors").read_bytes() == found[0]


COPIED = ["merges.txt", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]


def test_what_a_model_brings_travels(fresh_run, run_folder, trained, tmp_path):
    """A model folder made from another must be as usable: every file of the tokenizer, its settings, those of
    generation, and the prompt go along, a --template file in the place of the model's own.
    """
    whole = tmp_path / "whole"
    shutil.copytree(run_folder / "pretrain", whole)
    for name in COPIED:
        (whole / name).write_text(f'{{"{name}": "ä"}}', encoding="utf-8")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Text: {source}\nGist: ", encoding="utf-8")
    at = ["--output-dir", str(tmp_path / "new")]
    assert lastmile.main(["quantize", "--model", str(whole), "--calibration-examples", "8", *at]) == 0
    template = ["--template", str(prompt), *at]
    shutil.copytree(trained / "mle", tmp_path / "adapter")
    shutil.copyfile(prompt, tmp_path / "adapter/template.txt")
    assert lastmile.main(["merge", "--adapter", str(tmp_path / "adapter"), *template]) == 0
    for folder, own in ((tmp_path / "new/base", whole / "template.txt"), (tmp_path / "new/merge", prompt)):
        for name in [*COPIED, "tokenizer.model"]:
            if name == "generation_config.json":  # it said nothing of EOS: transformers would never stop
                said = json.loads((whole / name).read_text(encoding="utf-8")) | {"eos_token_id": [2]}
                assert json.loads((folder / name).read_text(encoding="utf-8")) == said
            else:
                assert (folder / name).read_bytes() == (whole / name).read_bytes()
        assert (folder / "template.txt").read_bytes() == own.read_bytes()
    shutil.rmtree(tmp_path / "new/base")
    assert lastmile.main(["quantize", "--model", str(whole), "--calibration-examples", "8", *template]) == 0
    assert (tmp_path / "new/base/template.txt").read_bytes() == prompt.read_bytes()
    assert not [name for name in COPIED if (run_folder / "base" / name).exists()]  # nothing is made up


def test_pretrain_takes_a_template(tmp_path):
    """--template FILE is the prompt that a base from scratch learns, and keeps; control tokens it cannot have."""
    (tmp_path / "prompt.txt").write_text("Text: {source}\nGist: ")
    flags = "--hidden-size 16 --intermediate-size 16 --num-hidden-layers 1 --num-attention-heads 1 --vocab-size 500"
    flags = [*flags.split(), "--num-key-value-heads", "1", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    assert lastmile.main(["pretrain", *flags, "--template", "chatml"]) == 2 and not (tmp_path / "run").exists()
    assert lastmile.main(["pretrain", *flags, "--template", str(tmp_path / "prompt.txt")]) == 0
    assert (tmp_path / "run/pretrain/template.txt").read_text() == "Text: {source}\nGist: "


def test_pretrain_in_bfloat16(tmp_path, capsys):
    """--dtype bfloat16 halves the time of the products on new CPUs: the weights stay fp32 and learn the same, to
    bf16's three digits. float16 would lose its gradients to underflow, silently: refused.
    """
    flags = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 1 --num-attention-heads 2 --vocab-size 500"
    flags = [*flags.split(), "--num-key-value-heads", "2", "--max-steps", "5"]
    last = {}
    for dtype in ("float32", "bfloat16"):
        assert lastmile.main(["pretrain", *flags, "--dtype", dtype, "--output-dir", str(tmp_path / dtype)]) == 0
        weights = load_file(tmp_path / dtype / "pretrain/model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        lines = (tmp_path / dtype / "pretrain/metrics.jsonl").read_text().splitlines()
        last[dtype] = [json.loads(line)["loss"] for line in lines]
    assert last["float32"] != last["bfloat16"] and last["float32"] == pytest.approx(last["bfloat16"], rel=1e-2)
    assert last["bfloat16"][-1] < last["bfloat16"][0]
    assert lastmile.main(["pretrain", *flags, "--dtype", "float16", "--output-dir", str(tmp_path / "half")]) == 2
    assert "use bfloat16 or float32" in capsys.readouterr().err and not (tmp_path / "half").exists()


def test_eval_needs_rouge_first(fresh_run, monkeypatch, capsys):
    """Where rouge-score is not installed, eval says so before it predicts for hours, not after."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setattr(lastmile.model, "sample", Mock(side_effect=AssertionError))
    assert fresh_run("eval", "--adapters", "base") == 2
    error = capsys.readouterr().err
    assert "rouge_score" in error and error.endswith("make setup\n") and error.count("\n") == 1
    assert not list(fresh_run.folder.glob("eval*"))


def test_eval_continues_where_it_was_stopped(fresh_run, monkeypatch, capsys):
    """Three columns of thousands of outputs are hours: what a stopped eval has sampled is not sampled again, the rest
    is, with the same bytes at the end; a column whose adapter was trained anew begins anew.
    """
    flags = ["--adapters", "base,mle", "--test-examples", 5, "--max-new-tokens", 24, "--batch-size", 2]
    assert fresh_run("mle", *SMALL, "--max-steps", 1) == 0
    assert fresh_run("eval", *flags) == 0
    whole = contents(fresh_run.folder / "eval")
    partial, batches = fresh_run.folder / "eval.partial", []
    sample = lastmile.model.sample

    def stopped(*arguments, **named):
        if len(batches) == stops:
            raise KeyboardInterrupt
        batches.append(named["adapter"])
        return sample(*arguments, **named)

    monkeypatch.setattr(lastmile.model, "sample", stopped)
    shutil.rmtree(fresh_run.folder / "eval")
    stops = 4  # of three batches a column
    assert fresh_run("eval", *flags) == 130 and batches == [None] * 3 + ["mle"]
    with open(partial / "checkpoints/mle.jsonl", "a", encoding="utf-8") as file:
        file.write("\0\0\n[[3, 4")  # killed while it wrote, after a power failure
    stops = 5
    assert fresh_run("eval", *flags) == 130 and batches[4:] == ["mle"]
    said = capsys.readouterr().out
    assert "eval base: 3 batches of a run that was stopped are kept" in said and "eval mle: 1 batches" in said
    stops = 99
    assert fresh_run("eval", *flags) == 0 and batches[5:] == ["mle"]
    assert contents(fresh_run.folder / "eval") == whole and not partial.exists()

    shutil.rmtree(fresh_run.folder / "eval")
    stops, batches[:] = 5, []
    assert fresh_run("eval", *flags) == 130
    assert fresh_run("mle", *SMALL, "--max-steps", 2, "--overwrite") == 0
    stops, batches[:] = 99, []
    assert fresh_run("eval", *flags) == 0 and batches == ["mle"] * 3


def test_a_broken_bleurt_leaves_the_other_scores(fresh_run, monkeypatch, capsys):
    """Whatever a BLEURT checkpoint does to its reader, with a message or without, ROUGE scores the predictions."""
    for error in (KeyError(), ValueError(""), RuntimeError("out of memory\nat 0x1")):
        monkeypatch.setattr(lastmile.evaluation, "bleurt", Mock(side_effect=error))
        flags = ["--adapters", "base", "--test-examples", 2, "--max-new-tokens", 24, "--bleurt", "some/folder"]
        assert fresh_run("eval", *flags, "--overwrite") == 0
        scores = json.loads((fresh_run.folder / "eval/scores.json").read_text())
        assert "la-rouge1-F1" in scores["base"] and "bleurt" not in scores["base"]
        assert "bleurt: not computed (" in capsys.readouterr().err


def test_an_adapter_keeps_its_prompt(fresh_run, tmp_path, capsys):
    """An adapter that answers another prompt than it learned gives worse outputs, and nothing shows it: every folder
    has its prompt, and what would use it with another is refused, with the flag that helps.
    """
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Text: {source}\nGist: ", encoding="utf-8")
    for stage in ("reward", "mle"):
        assert fresh_run(stage, *SMALL, "--template", prompt) == 0
        assert (fresh_run.folder / stage / "template.txt").read_bytes() == prompt.read_bytes()
    lines = [
        ["eval", "--adapters", "base,mle", "--test-examples", 2, "--max-new-tokens", 24],
        ["sample", "Ann: hi", "--adapter", "mle", "--max-new-tokens", 8],
        ["merge", "--adapter", "mle"],
        ["ppo", *SMALL],
        ["ppo", *SMALL, "--reward", "rouge", "--init", "mle"],
    ]
    for line in lines:
        assert fresh_run(*line, "--overwrite") == 2
        said = capsys.readouterr().err
        file = re.search("trained with another prompt than this one; add --template (.*)", said)[1]
        assert fresh_run(*line, "--overwrite", "--template", file) == 0, line


def test_an_adapter_s_folder_is_as_good_as_its_name(fresh_run, trained, reward, capsys):
    """sample --adapter FOLDER and ppo --init FOLDER take adapters of other runs, and do with them what they do with
    their own.
    """
    shutil.copytree(trained / "mle", fresh_run.folder / "mle")
    elsewhere, base = trained / "mle", ["--model", fresh_run.folder / "base"]
    own = [say(text, "--output-dir", fresh_run.folder, "--adapter", "mle", capsys=capsys) for text in TEXTS]
    assert own == [say(text, *base, "--adapter", elsewhere, capsys=capsys) for text in TEXTS]
    assert own != [say(text, *base, "--adapter", "base", capsys=capsys) for text in TEXTS]
    found = []
    for start in ("mle", elsewhere, "base"):
        assert fresh_run("ppo", *SMALL, "--reward", reward, "--init", start, "--overwrite") == 0
        found.append(learned(fresh_run.folder / "ppo"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: shutil.rmtree(f), "no adapter"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK"), "unreadable adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "unreadable adapter"),
        (lambda f: shutil.copytree("reward", f, dirs_exist_ok=True), "must not have a score head"),
    ],
    ids=["no folder", "no config", "no weights", "no safetensors", "empty config", "a reward model"],
)
@pytest.mark.parametrize("command", ["sample hello --adapter", "merge --adapter", "ppo --init"])
def test_bad_adapter_folders(fresh_run, trained, reward, tmp_path, command, damage, problem, monkeypatch, capsys):
    """One line that names the folder; and PPO says so before it trains the reward model that is not there yet."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reward, "reward")
    shutil.copytree(trained / "mle", "adapter")
    damage(tmp_path / "adapter")
    before = contents(tmp_path)
    assert exit_code(fresh_run, *command.split(), "adapter") == 2
    out, error = capsys.readouterr()
    assert "adapter" in error and problem in error and error.count("\n") == 1, error
    assert "training it first" not in out and contents(tmp_path) == before


def test_ppo_refuses_an_init_of_another_base_first(fresh_run, trained, tmp_path, capsys):
    """Before it trains the reward model that is not there yet, not after."""
    shutil.copytree(trained / "mle", tmp_path / "adapter")
    (tmp_path / "adapter/base.sha256").write_text("another")
    assert fresh_run("ppo", *SMALL, "--init", tmp_path / "adapter") == 2
    out, error = capsys.readouterr()
    assert "trained on another base model" in error and "training it first" not in out


def test_ppo_makes_the_reward_model_it_lacks(fresh_run, tmp_path, run_folder, capsys):
    """`ppo` alone is `reward`, with that stage's own defaults and the same data, model and --train-examples,
    --max-steps for as many examples, and then `ppo`: the same bytes. It says so, and a [reward] table of the settings
    file counts.
    """
    file = written(tmp_path, "[reward]\neval_examples = 4\nlora_r = 2\n[ppo]\nlora_r = 3\n")
    flags = [*SMALL, "--config", file, "--seed", 4]
    assert fresh_run("ppo", *flags) == 0
    out, place = capsys.readouterr().out, fresh_run.folder
    assert f"ppo: no reward model in {place}/reward yet; training it first" in out
    settings = json.loads((place / "reward/config.json").read_text())
    expected = dict(batch_size=14, epochs=1, learning_rate=2e-3, max_steps=6, train_examples=14, max_new_tokens=24)
    expected |= dict(eval_examples=4, lora_r=2, seed=4, output_dir=str(place), model=f"{place}/base", stage="reward")
    assert {name: settings[name] for name in expected} == expected
    apart = ["--model", place / "base", "--output-dir", tmp_path / "apart"]
    for stage, steps in (("reward", 6), ("ppo", 2)):  # 2 steps of 7 examples, each 6 rows of the reward model
        assert lastmile.main([stage, *map(str, [*flags, *apart, "--max-steps", steps])]) == 0
        assert learned(tmp_path / "apart" / stage) == learned(place / stage)
    assert "training it first" not in capsys.readouterr().out


def test_max_time_counts_from_the_command(fresh_run, monkeypatch):
    """A batch system gives the command so many minutes, and not the reward model and PPO as many each."""
    train_reward = lastmile.train_reward

    def slow(settings):
        train_reward(settings)
        ranks.world.started -= 3600

    monkeypatch.setattr(lastmile, "train_reward", slow)
    assert fresh_run("ppo", *SMALL, "--max-time", 50) == 128 + 15
    assert [path.name for path in fresh_run.folder.glob("*/checkpoints/*")] == ["step-00000001"]
    assert fresh_run("ppo", *SMALL, "--max-time", 50, "--resume") == 0


def test_ppo_goes_on_with_the_reward_model_it_was_training(fresh_run, tmp_path, capsys):
    """What ends PPO while it trains its reward model is mended by the same command with --resume; how to train, in what
    portions and for how long, is said once for both.
    """
    flags = [
        *SMALL,
        "--micro-batch-size",
        3,
        "--save-every",
        1,
        "--config",
        written(tmp_path, "[reward]\nlora_r = 2\n"),
    ]
    assert fresh_run("ppo", *flags, "--max-time", 1e-9) == 128 + 15
    assert [path.name for path in fresh_run.folder.glob("*/checkpoints/*")] == ["step-00000001"]
    assert fresh_run("ppo", *flags) == 2 and "reward.partial: an interrupted run" in capsys.readouterr().err
    assert fresh_run("ppo", *flags, "--resume") == 0
    assert "reward: resumes from" in capsys.readouterr().out
    assert json.loads((fresh_run.folder / "reward/config.json").read_text())["micro_batch_size"] == 3
    apart = ["--model", fresh_run.folder / "base", "--output-dir", tmp_path / "apart"]
    assert lastmile.main(["ppo", *map(str, [*flags, *apart])]) == 0
    for stage in ("reward", "ppo"):
        assert learned(fresh_run.folder / stage) == learned(tmp_path / "apart" / stage)


def test_a_full_disk_ends_no_run_before_its_end(fresh_run, monkeypatch, capsys):
    """A checkpoint that cannot be written on the way is said to be missing, and the run goes on to its adapter."""
    write = run_module.write_checkpoint

    def full_once(place, *content):
        if place.name == "step-00000001":
            raise OSError(28, "No space left on device")
        write(place, *content)

    monkeypatch.setattr(run_module, "write_checkpoint", full_once)
    assert fresh_run("mle", *SMALL, "--save-every", 1) == 0
    assert "step-00000001: not saved (No space left on device)" in capsys.readouterr().err


def test_what_ppo_refuses_it_refuses_before_the_reward_model_trains(fresh_run, capsys):
    """An adapter target of no layer concerns PPO alone, so the reward model would be trained in vain."""
    before = contents(fresh_run.folder)
    assert fresh_run("ppo", *SMALL, "--lora-targets", "q_proj,nose") == 2
    assert "nose" in capsys.readouterr().err and contents(fresh_run.folder) == before


def test_the_paper_s_model_is_the_default(monkeypatch, tmp_path):
    """Section 4.1: on the paper's data sets `ppo` alone means its base model; one in the run's folder goes before."""
    monkeypatch.chdir(tmp_path)
    for name in ("samsum", "xsum"):
        assert command_line.read(["ppo", "--data", name])[1].model == "TheBloke/Llama-2-7B-Chat-GPTQ"
    (tmp_path / "runs/xsum/base").mkdir(parents=True)
    assert command_line.read(["ppo", "--data", "xsum"])[1].model == "runs/xsum/base"
    assert command_line.read(["ppo"])[1].model == "runs/toy/base"  # to be made, not fetched
    assert command_line.read(["ppo", "--data", "xsum", "--model", "a/b@c"])[1].model == "a/b@c"


def test_a_model_of_the_hub_brings_its_prompt(fresh_run, tmp_path):
    """A base of ours on the Hub is what it was in its folder: its template.txt is fetched with it, or training would
    silently show it another prompt. The adapter then names it as PEFT does.
    """
    files = {path.name: path.read_bytes() for path in (fresh_run.folder / "base").iterdir()}
    assert fresh_run("mle", *SMALL) == 0
    # A base of the Hub counts as large: on some CPUs --dtype auto would take bf16 for it.
    flags = ["--model", "owner/name@v1", "--output-dir", "run", "--dtype", "float32"]
    with Hub({"models": {"owner/name": {"v1": files}}}) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, folders.ROOT / "lastmile.py", "mle", *SMALL, *flags]
        subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, check=True, capture_output=True)
    ours, theirs = learned(fresh_run.folder / "mle"), learned(tmp_path / "run/mle")
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    config = json.loads(theirs["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")


def test_ppo_over_another_tool_s_checkpoint(shared, tmp_path):
    """4-bit weights as gptqmodel writes them, a tokenizer.json, real articles: PPO runs over them, and PEFT opens its
    policy and its value over transformers' Llama of the dequantized weights, with our logits and our scores.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = shared / "fixtures/gq_10"
    file = written(tmp_path, "learning_rate = 1e-2\nlora_r = 4\nmax_input_tokens = 250\n[reward]\neval_examples = 2\n")
    flags = f"--config {file} --model {base} --data {shared}/data/xsum_test_1000.jsonl --output-dir {tmp_path}/run"
    flags += " --max-steps 2 --train-examples 14 --max-new-tokens 24"
    assert lastmile.main(["ppo", *flags.split()]) == 0
    llama, tokens = lastmile.model.load(base), torch.arange(3, 51).view(2, 24)
    llama.load_adapter("policy", tmp_path / "run/ppo/policy")
    llama.load_adapter("value", tmp_path / "run/ppo/value", head=True)
    config = transformers.AutoConfig.from_pretrained(base)
    del config.quantization_config
    config.num_labels, config.dtype = 1, torch.float32
    state = {name.replace(".base.", "."): tensor for name, tensor in dense_twin(base).state_dict().items()}
    policy = transformers.LlamaForCausalLM(config)
    policy.load_state_dict(state)
    value = transformers.LlamaForSequenceClassification(config)
    missing = value.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["score.weight"] and missing.unexpected_keys == ["lm_head.weight"]
    policy = peft.PeftModel.from_pretrained(policy, tmp_path / "run/ppo/policy").eval()
    value = peft.PeftModel.from_pretrained(value, tmp_path / "run/ppo/value").eval()
    kinds = [model.peft_config["default"].task_type for model in (policy, value)]
    assert kinds == ["CAUSAL_LM", "SEQ_CLS"]
    with torch.no_grad():
        ours, bare = llama.logits(llama(tokens, "policy")), llama.logits(llama(tokens))
        torch.testing.assert_close(policy(tokens).logits, ours, rtol=1e-4, atol=1e-4)
        scores = llama.scalar(llama(tokens, "value"), "value")  # (B, T)
        for row, score in zip(tokens, scores, strict=True):
            for length in (1, 10, 24):  # a classifier scores its last token
                logits = value(row[None, :length]).logits
                torch.testing.assert_close(logits.item(), score[length - 1].item(), rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 1e-2 and scores.abs().max() > 1e-2  # both adapters do something


# ----------------------------------------------------------------------------------------------------------------------
# Start-up


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("--help", 0, "usage: lastmile.py"),
        ("ppo --help", 0, "--length-penalty"),
        ("ppo --lenght-penalty 1", 2, "--lenght-penalty"),
        ("ppo --lam 2", 2, "out of range"),
        ("ppo --config FILE", 2, "did you mean length_penalty?"),
    ],
)
def test_help_and_mistakes_need_no_torch(tmp_path, line, code, says):
    """Torch takes seconds to import: who asks for help, or mistypes, is answered without it. The lazy module object
    stands in sys.modules all the same, so what counts is what Python executed: its C part, and numpy's.
    """
    file = written(tmp_path, "[ppo]\nlength_penality = 1\n")
    command = [sys.executable, "-X", "importtime", "lastmile.py", *line.replace("FILE", file).split()]
    done = subprocess.run(command, cwd=folders.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and says in done.stdout + done.stderr
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M))
    assert "argparse" in imported and not {"torch._C", "torch", "numpy", "sentencepiece", "tqdm"} & imported


def test_a_missing_package_is_named():
    """Outside the virtual environment the line must say what to do; lazily, it once was an AttributeError of None."""
    command = [sys.executable, "-S", "lastmile.py", "--help"]  # -S: without site-packages
    done = subprocess.run(command, cwd=folders.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "No module named 'torch'; install what lastmile needs: make setup" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


BAD = {  # command line: what the one line on stderr must say
    "ppo --no-such-flag 1": "--no-such-flag",
    "nonsense": "nonsense",
    "mle --batch-size 0": "--batch-size: 0 is out of range: must be at least 1",
    "mle --batch-size 2.5": "invalid whole number",
    "mle --learning-rate nan": "--learning-rate: nan is out of range",
    "mle --learning-rate inf": "out of range",
    "mle --learning-rate 0": "above 0",
    "mle --tune full --dtype float16": "gradients vanish without loss scaling; use bfloat16 or float32",
    "ppo --lam 1.5": "at most 1",
    "sample hello --top-p 0": "--top-p: 0 is out of range",
    "ppo --init nowhere": "nowhere: no adapter",
    "mle --data absent/folder": "absent/folder: no such file",
    "mle --max-new-tokens 2": "--max-new-tokens",
    "mle --max-input-tokens 2": "--max-input-tokens",
    "mle --lora-targets q_proj,nose": "nose",
    "ppo --reward absent": "absent: no such folder; run: python lastmile.py reward --data",
    "ppo --init mle --reward REWARD": "run: python lastmile.py mle",
    "eval": "run: python lastmile.py mle",
    "eval --adapters policy": "run: python lastmile.py ppo",
    "eval --adapters base,best": "--adapters base,best: choose among base, mle and policy",
    "tables": "run: python lastmile.py eval",
    "sample hello": "run: python lastmile.py ppo",
    "mle --model EMPTY": "no *.safetensors",
    "mle --model absent": "absent",
    "mle --device cuda": "no GPU; use --device cpu",
    "mle --device gpu": "--device gpu",
    "quantize --overwrite --model BASE": "already quantized",
}  # fmt: skip


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize("line", BAD)
def test_bad_input(fresh_run, reward, line, dry, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that says what is wrong and what to do, and no folder left behind to stumble over. A dry
    run finds the same: it is there to find it.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(fresh_run.folder / "base/config.json", tmp_path / "empty")
    places = {"REWARD": reward, "EMPTY": tmp_path / "empty", "BASE": fresh_run.folder / "base"}
    before = contents(tmp_path)
    assert exit_code(fresh_run, *(places.get(word, word) for word in line.split()), *dry) == 2
    error = capsys.readouterr().err
    assert BAD[line] in error and error.count("\n") == 1 and error.endswith("\n"), error
    assert contents(tmp_path) == before


def test_eval_needs_no_training_split(fresh_run, tmp_path):
    """Data of which only the test is at hand: the look for test inputs in the training split must not ask for one."""
    (tmp_path / "only").mkdir()
    (tmp_path / "only/test.jsonl").write_text('{"input": "Zoe: Hi! Leo: Hi!", "output": "Zoe greets Leo."}\n' * 3)
    flags = "--adapters", "base", "--max-new-tokens", 24, "--bleurt", "none"
    assert fresh_run("eval", "--data", tmp_path / "only", "--model", fresh_run.folder / "base", *flags) == 0


def test_the_command_for_a_missing_stage_is_whole():
    """Typed as it is shown, it must run on the same data, from the same base; what is the default is left out."""
    asked = settings_module.Eval(
        data="my pairs.csv", output_dir="runs/my", model="some/base", input_column="q", target_column="a"
    )
    flags = "--data 'my pairs.csv' --output-dir runs/my --model some/base --input-column q --target-column a"
    assert folders.command("mle", asked) == f"mle {flags}"
    merged = settings_module.Eval(data="p.csv", output_dir="runs/p", model="runs/p/merge", delimiter=";")
    assert folders.command("mle", merged) == "mle --data p.csv --output-dir runs/p --model runs/p/merge --delimiter ';'"
    toy = settings_module.Eval(data="toy", output_dir="runs/toy", model="runs/toy/base")
    assert folders.command("mle", toy) == "mle --data toy --output-dir runs/toy"


def test_pretrain_refuses_data_without_a_short_example(tmp_path, capsys):
    """Found after the tokenizer is made, which counts the tokens; from no rows, steps would be dealt for ever."""
    (tmp_path / "train.jsonl").write_text('{"input": "One, two, three.", "output": "Four."}\n' * 9)
    flags = f"--data {tmp_path} --output-dir {tmp_path}/run --vocab-size 300 --max-new-tokens 2"
    assert lastmile.main(["pretrain", *flags.split()]) == 2
    assert "no pretrain example is short enough; raise" in capsys.readouterr().err


def test_sample_refuses_an_empty_text(fresh_run, monkeypatch, capsys):
    """Nothing on the command line and nothing on standard input: say so, rather than summarise the template."""
    monkeypatch.setattr("sys.stdin.read", lambda: " \n", raising=False)
    assert fresh_run("sample", "") == fresh_run("sample", "--adapter", "base") == 2
    assert capsys.readouterr().err.count("no text to summarize") == 2


def test_a_finished_stage_is_kept(fresh_run, capsys):
    """Hours of training are not to be lost to a command typed twice; --overwrite replaces them, by a success only."""
    assert fresh_run("mle", *SMALL) == 0
    before = contents(fresh_run.folder)
    assert fresh_run("mle", *SMALL, "--seed", 6) == 2 and "--overwrite" in capsys.readouterr().err
    assert contents(fresh_run.folder) == before
    assert fresh_run("mle", *SMALL, "--overwrite", "--learning-rate", 1e30) == 3  # the second step's loss is not finite
    assert "not finite" in capsys.readouterr().err
    assert contents(fresh_run.folder / "mle") == {
        k: v for k, v in before.items() if k.startswith(f"{fresh_run.folder}/mle/")
    }
    assert fresh_run("mle", *SMALL, "--seed", 6, "--overwrite") == 0
    assert contents(fresh_run.folder).keys() == before.keys() and contents(fresh_run.folder) != before


def test_a_failed_stage_leaves_no_result(fresh_run):
    """A folder under its final name means a finished stage: the next one, and make, rely on it."""
    assert fresh_run("mle", *SMALL, "--learning-rate", 1e30) == 3
    assert not (fresh_run.folder / "mle").exists()


def test_the_log_is_json_without_positives_in_a_batch(fresh_run):
    """A reward batch may hold no positive at all; its mean score is then null, as NaN is no JSON and breaks readers."""
    assert fresh_run("reward", *SMALL, "--batch-size", 1, "--max-steps", 6, "--eval-examples", 4) == 0
    lines = journal(fresh_run.folder / "reward")
    assert {None} < {line["positive"] for line in lines} | {line["negative"] for line in lines}


@pytest.mark.parametrize("stage, held", [("mle", lambda batch: batch.mask), ("reward", lambda batch: batch.weight)])
def test_no_datum_weighs_less_for_the_company_it_keeps(fresh_run, monkeypatch, stage, held):
    """Rows of like length share a batch, and a loss divided by its own batch's tokens or weights would make a long row
    among long ones count for less than a plain shuffle does. Each token (mle) or weight (reward) is divided by the same
    number in every batch, and a whole epoch adds up to its number of batches.
    """
    shares, batches = [], []
    add, log = lastmile.Optimizer.backward, run_module.Run.log
    monkeypatch.setattr(
        lastmile.Optimizer, "backward", lambda self, loss, share=1.0: shares.append(share) or add(self, loss, share)
    )
    monkeypatch.setattr(
        run_module.Run, "log", lambda self, step, batch, **n: batches.append(batch) or log(self, step, batch, **n)
    )
    flags = ["--train-examples", 20, "--epochs", 1, "--batch-size", 4]
    assert fresh_run(stage, *flags, *(["--eval-examples", 4] if stage == "reward" else [])) == 0
    each = [share / held(batch).sum().item() for share, batch in zip(shares, batches, strict=True)]
    assert len(each) > 4 and max(each) == pytest.approx(min(each))
    assert sum(shares) == pytest.approx(sum(len(batch.tokens) for batch in batches) / 4)
    lines = (fresh_run.folder / stage / "metrics.jsonl").read_text().splitlines()
    if stage == "mle":  # what is logged stays the mean over the batch: a fresh base's, at the start
        assert 0 < json.loads(lines[0])["loss"] < 20 and len(lines) == len(batches)


def test_only_user_errors_become_one_line(monkeypatch, capsys):
    """Pins that a UserError is one line and exit 2 whichever folder raised it, and that a bug keeps its traceback."""

    def fail(error):
        def load(*_):
            raise error

        monkeypatch.setattr(lastmile.data, "load", load)
        return lastmile.main(["pretrain", "--dry-run"])

    assert fail(UserError("file.csv: line 3 is empty; remove it")) == 2
    assert capsys.readouterr().err == "lastmile.py: file.csv: line 3 is empty; remove it\n"
    with pytest.raises(ValueError, match="a bug"):
        fail(ValueError("a bug"))


@pytest.mark.parametrize("stage", ["mle", "reward"])
def test_few_rows_learn_at_full_strength(fresh_run, stage):
    """5 rows under --batch-size 200 were divided by an average batch of 200: a 40th of the gradient, no clipping."""
    flags = ["--train-examples", 5, "--max-steps", 1, *(["--eval-examples", 4] if stage == "reward" else [])]
    assert fresh_run(stage, *flags, "--batch-size", 30 if stage == "reward" else 5) == 0
    [expected] = journal(fresh_run.folder / stage)
    assert fresh_run(stage, *flags, "--batch-size", 200, "--overwrite") == 0
    [found] = journal(fresh_run.folder / stage)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"])


def test_prompt_and_answer_fit_into_the_context(fresh_run, tmp_path, capsys):
    """One rule for all: prompt and --max-new-tokens must fit into the model's context. mle and eval once passed it in
    silence, and sample forgot the new tokens.
    """
    short = tmp_path / "short"
    shutil.copytree(fresh_run.folder / "base", short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 90}
    (short / "config.json").write_text(json.dumps(config))
    at = ["--model", short, "--max-new-tokens", 30]
    assert fresh_run("mle", *at, "--train-examples", 7, "--max-steps", 1) == 0
    found = capsys.readouterr().out
    assert re.search(r"train: 2700 examples, [1-9]\d* dropped .*: [1-9]\d* with inputs over 60 tokens", found)
    assert fresh_run("sample", "chess " * 80, *at, "--adapter", "base") == 2
    assert "the limit is 60; shorten the text" in capsys.readouterr().err
    assert fresh_run("eval", *at[:2], "--max-new-tokens", 90, "--adapters", "base") == 2
    assert "--max-new-tokens 90: the model reads 90 tokens; lower it" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Warm starts, costs, warnings


@pytest.mark.parametrize("stage", ["reward", "mle"])
def test_a_stage_starts_from_another_adapter(fresh_run, stage):
    """`--init FOLDER` continues from what another run learned: the first losses are far below that run's first, and the
    adapter that was named stays as it is.
    """
    flags = ["--train-examples", "7", "--learning-rate", "1e-2", "--max-new-tokens", "40", "--max-steps", "30"]
    flags += ["--eval-examples", "2"] if stage == "reward" else []
    assert fresh_run(stage, *flags) == 0
    first = [line["loss"] for line in journal(fresh_run.folder / stage)]
    kept = (fresh_run.folder / stage).rename(fresh_run.folder / "other")
    before = contents(kept)
    assert fresh_run(stage, *flags, "--init", kept) == 0
    again = [line["loss"] for line in journal(fresh_run.folder / stage)]
    assert sum(again[:6]) < 0.7 * sum(first[:6]) and contents(kept) == before


def test_init_wants_the_stage_s_own_kind(fresh_run, reward, capsys):
    """A reward adapter has a score head, a language adapter has none: the wrong one is named, in one line."""
    assert fresh_run("mle", "--init", reward, "--max-steps", "1") == 2
    assert "must not have a score head" in capsys.readouterr().err
    assert fresh_run("reward", "--init", fresh_run.folder / "nothing", "--max-steps", "1") == 2
    assert "nothing: no adapter" in capsys.readouterr().err


def test_a_stage_says_what_it_cost(fresh_run, capsys):
    """Steps, tokens, speed, time and memory; where --max-steps cut it, how long a whole epoch would take."""
    assert fresh_run("mle", "--train-examples", "28", "--max-steps", "2") == 0
    said = capsys.readouterr().out
    cost = r"mle: 2 steps, (\d+) tokens, \d+ tokens/s, [\d.]+ minutes, peak memory ([\d.]+) GB"
    line = re.search(cost + "; an epoch has 4 steps: about", said)
    assert line and int(line[1]) > 500 and 0.1 < float(line[2]) < 100
    assert fresh_run("mle", "--train-examples", "14", "--overwrite") == 0
    assert "mle: 2 steps, " in (said := capsys.readouterr().out) and "an epoch has" not in said


def test_groups_that_do_not_fit_are_warned_of(fresh_run, run_folder, capsys):
    """64 is no multiple of 40: other readers of GPTQ may refuse the short last group."""
    flags = ["--model", run_folder / "pretrain", "--calibration-examples", "2", "--overwrite"]
    (fresh_run.folder / "base").unlink()
    assert fresh_run("quantize", *flags, "--group-size", "40") == 0
    said = capsys.readouterr().err
    assert "--group-size 40 does not divide width 32, 64" in said and "name a divisor of 32" in said
    assert fresh_run("quantize", *flags, "--group-size", "32") == 0
    assert "does not divide" not in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "folder"])
def test_gguf_is_called_by_its_name(tmp_path, where, capsys):
    """People name what they have; "config.json: no such file" said nothing about why."""
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    place = file if where == "file" else tmp_path
    assert lastmile.main(["mle", "--model", str(place), "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "GGUF is not read; take the model's safetensors version" in said and said.count("\n") == 1


def test_every_command_is_in_the_docstring():
    """`lastmile.py`'s first lines are its table of contents; predict was once missing there."""
    assert all(f"python lastmile.py {name} " in lastmile.__doc__ for name in lastmile.COMMANDS)


def test_other_data_are_warned_of(fresh_run, tmp_path, capsys):
    """Two data sets of one name share a run's folder: a reward model of the one then judged the other, without a word
    before the hours. And what has trained an adapter is no test of it.
    """
    rows = [{"input": e.source, "output": e.target} for e in lastmile.data.toy("train")[:40]]
    for name, first in (("one", 0), ("two", 20)):
        (tmp_path / name).mkdir()
        for split, start, end in (("train", first, first + 14), ("validation", 34, 40), ("test", 0, 3)):
            text = "".join(json.dumps(row) + "\n" for row in rows[start:end])
            (tmp_path / name / f"{split}.jsonl").write_text(text)
    flags = ["--max-steps", 1, "--max-new-tokens", 24, "--eval-examples", 2, "--data"]
    one, two = [*flags, tmp_path / "one"], [*flags, tmp_path / "two"]
    assert fresh_run("reward", *one) == fresh_run("mle", *one) == fresh_run("ppo", *one, "--init", "mle") == 0
    assert "trained on" not in capsys.readouterr().err
    assert fresh_run("ppo", *two, "--init", "mle", "--overwrite") == 0
    error = capsys.readouterr().err
    for name in ("reward", "mle"):
        assert f"{fresh_run.folder}/{name}: trained on other data: it has seen 0 of these 14 examples" in error
    flags = ["--adapters", "base,mle", "--bleurt", "none", "--max-new-tokens", 24]
    assert fresh_run("eval", *flags, "--data", tmp_path / "one") == 0
    assert f"{fresh_run.folder}/mle: trained on 3 of these 3 test inputs" in capsys.readouterr().err
