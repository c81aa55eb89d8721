"""The command line: the demo's path in small, what the settings do, and what bad input gets."""

import dataclasses
import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lastmile

SMALL = ["--train-examples", 14, "--max-steps", 2, "--max-new-tokens", 24]


@pytest.fixture(scope="module")
def reward(run_folder, tmp_path_factory):
    """A reward model trained for 30 steps, for all tests that need one."""
    folder = tmp_path_factory.mktemp("reward")
    flags = (
        f"--model {run_folder}/base --output-dir {folder} --train-examples 28 --learning-rate 1e-2 --eval-examples 8"
    )
    assert lastmile.main(["reward", *flags.split(), "--max-steps", "30"]) == 0
    return folder / "reward"


def exit_code(run, *arguments):
    """What the process would end with: argparse raises it, the stages return it."""
    try:
        return run(*arguments)
    except SystemExit as stop:
        return stop.code


def journal(folder):
    """metrics.jsonl as a list; NaN is refused, as it is no JSON and most readers could not open the file."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in {folder}")) for line in lines]


def contents(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def learned(folder):
    """What training leaves: adapters and log, without config.json, in which the output folder is named."""
    names = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.rglob(name)}


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
        assert capsys.readouterr().out == lastmile.visible(text) + "\n"


@pytest.mark.parametrize(
    ("stage", "flags", "number", "factor"),
    [
        ("reward", "--train-examples 2 --batch-size 12 --learning-rate 1e-2 --eval-examples 4", "loss", 0.15),
        ("mle", "--train-examples 2 --batch-size 2 --learning-rate 1e-2", "loss", 0.5),
        ("ppo", "--train-examples 4 --batch-size 4 --learning-rate 3e-2 --ground-truth-fraction 1", "value_loss", 0.1),
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
    flags = "--train-examples 16 --batch-size 16 --max-steps 24 --learning-rate 3e-2 --max-new-tokens 20"
    flags += " --ground-truth-fraction 0 --length-penalty 0 --gamma 0.01"
    assert fresh_run("ppo", *flags.split(), "--reward", reward) == 0
    returns = [line["return"] for line in journal(fresh_run.folder / "ppo")]
    assert sum(returns[-4:]) > 1.2 * sum(returns[:4]) > 0


def test_ratio_is_one_at_one_update_a_batch(fresh_run, reward):
    """Paper, 3.3: one update a batch, so the policy is the one that acted, to the bit, on samples and on truth."""
    assert fresh_run("ppo", *SMALL, "--reward", reward, "--max-steps", 4) == 0
    lines = journal(fresh_run.folder / "ppo")
    assert [line["ground_truth"] for line in lines] == [False, True, False, True]
    assert all((line["ratio"], line["ratio_max"], line["clip_fraction"]) == (1.0, 1.0, 0.0) for line in lines)


def test_ratio_leaves_one_at_more_updates(fresh_run, reward):
    """--ppo-epochs 2 keeps the logp of the first pass; were it taken anew, the ratio would be 1 and clipping dead."""
    assert fresh_run("ppo", *SMALL, "--reward", reward, "--ppo-epochs", 2, "--clip-range", 1e-4) == 0
    assert all(line["ratio"] != 1.0 and line["clip_fraction"] > 0 for line in journal(fresh_run.folder / "ppo"))


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
    _, settings, _ = lastmile.parse([command, "--data", "samsum"])
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_toy_has_its_own_rates():
    """The paper's 1e-5 would teach the tiny base nothing; the toy's 3e-3 would ruin Llama. A flag beats both."""
    for flags, rate in [([], 3e-3), (["--data", "samsum"], 1e-5), (["--learning-rate", "0.5"], 0.5)]:
        assert all(lastmile.parse([stage, *flags])[1].learning_rate == rate for stage in ("reward", "mle", "ppo"))
    assert lastmile.parse(["eval"])[1].bleurt == "none"
    assert lastmile.parse(["eval", "--data", "xsum"])[1].test_examples == 3000  # paper, 4.2
    assert lastmile.parse(["ppo", "--data", "xsum"])[1].train_examples == 15000
    assert lastmile.parse(["ppo", "--data", "xsum", "--train-examples", "5"])[1].train_examples == 5


def test_underscores_are_dashes():
    """Many tools write --batch_size: it means the same, and a value with underscores or dashes stays as it is."""
    dashed = lastmile.parse(["mle", "--batch-size", "3", "--output-dir=a_b", "--data=c_d-e", "--no-eos-in-labels"])
    assert dashed == lastmile.parse(
        ["mle", "--batch_size", "3", "--output_dir=a_b", "--data=c_d-e", "--no_eos_in_labels"]
    )
    assert (dashed[1].batch_size, dashed[1].output_dir, dashed[1].data) == (3, "a_b", "c_d-e")


@pytest.mark.parametrize("command", lastmile.COMMANDS)
def test_help_lists_every_setting(command, capsys):
    """A setting that --help does not show does not exist for its user."""
    assert exit_code(lastmile.main, [command, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(lastmile.COMMANDS[command][0]):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown) and len(field.metadata["help"]) > 3


def test_the_readme_s_commands_parse(monkeypatch):
    """Every `python lastmile.py` line of the README is typed by somebody, so every flag in it must exist."""
    readme = lastmile.ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    blocks = "\n".join(re.findall(r"^```.*?\n(.*?)^```", readme.read_text(), re.M | re.S)).replace("\\\n", " ")
    commands = re.findall(r"""python3? lastmile\.py +((?:"[^"]*"|'[^']*'|[^\n|;&<>#"'])+)""", blocks)
    assert commands
    for line in commands:
        arguments = shlex.split(line)
        assert arguments[0] in lastmile.COMMANDS and exit_code(lastmile.parse, arguments) != 2, line


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
# Bad input


BAD = {  # command line: what the one line on stderr must say
    "ppo --no-such-flag 1": "--no-such-flag",
    "nonsense": "nonsense",
    "mle --batch-size 0": "--batch-size: 0 is out of range: must be finite, at least 1",
    "mle --batch-size 2.5": "invalid whole number",
    "mle --learning-rate nan": "--learning-rate: nan is out of range",
    "mle --learning-rate inf": "out of range",
    "mle --learning-rate 0": "above 0",
    "ppo --lam 1.5": "at most 1",
    "sample hello --top-p 0": "--top-p: 0 is out of range",
    "ppo --init nowhere": "nowhere: no adapter",
    "mle --data absent/folder": "absent/folder: no such file",
    "mle --max-new-tokens 2": "--max-new-tokens",
    "mle --max-input-tokens 2": "--max-input-tokens",
    "mle --lora-targets q_proj,nose": "nose",
    "ppo --reward absent": "absent: not there yet; run: python lastmile.py reward",
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
    "quantize --overwrite --model BASE": "quantised already",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input(fresh_run, reward, line, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that says what is wrong and what to do, and no folder left behind to stumble over."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(fresh_run.folder / "base/config.json", tmp_path / "empty")
    places = {"REWARD": reward, "EMPTY": tmp_path / "empty", "BASE": fresh_run.folder / "base"}
    before = contents(tmp_path)
    assert exit_code(fresh_run, *(places.get(word, word) for word in line.split())) == 2
    error = capsys.readouterr().err
    assert BAD[line] in error and error.count("\n") == 1 and error.endswith("\n"), error
    assert contents(tmp_path) == before


def test_sample_refuses_an_empty_text(fresh_run, monkeypatch, capsys):
    """Nothing on the command line and nothing on standard input: say so, rather than summarise the template."""
    monkeypatch.setattr("sys.stdin.read", lambda: " \n", raising=False)
    assert fresh_run("sample", "") == fresh_run("sample", "--adapter", "base") == 2
    assert capsys.readouterr().err.count("no text to summarise") == 2


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
