"""Model cards, and the upload of what a stage made to a small Hub on 127.0.0.1."""

import json
import re

import pytest
import yaml
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import load

from interface import outputs
from interface.training_settings import Mle

FEW = ["--train-examples", "12", "--max-steps", "2"]


def parts(folder):
    """(metadata, text) of a folder's card."""
    _, about, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(about), text


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The small Hub, empty, and this process turned to it, with a token that it knows."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    with Hub({"models": {}, "datasets": {}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", hub.url, raising=False)
        yield hub


def test_each_folder_has_a_card(fresh_run, reward):
    """Policy and value of PPO, the control and the merged model: metadata that the Hub reads, the settings that are not
    the defaults, and no path of this machine.
    """
    assert fresh_run("mle", *FEW) == 0
    assert fresh_run("ppo", *FEW, "--reward", reward, "--kl-coef", 0.25) == 0
    assert fresh_run("eval", "--test-examples", 3) == 0
    assert fresh_run("merge") == 0
    run = fresh_run.folder
    for folder, library in ((run / "mle", "peft"), (run / "ppo/policy", "peft"), (run / "merge", "transformers")):
        about, text = parts(folder)
        assert about["library_name"] == library and about["pipeline_tag"] == "text-generation"
        assert "lastmile" in about["tags"] and "license" not in about  # the toy's base names none
        assert str(run.parent) not in text + json.dumps(about)
    assert "- `--kl-coef 0.25`" in parts(run / "ppo/policy")[1]
    assert "--kl-coef" not in parts(run / "mle")[1]
    assert "pipeline_tag" not in parts(run / "ppo/value")[0]
    scores = json.loads((run / "eval/scores.json").read_text())
    assert re.search(rf"policy +\| +{scores['policy']['la-rouge1-F1']:.3f} ", parts(run / "merge")[1])
    held, (about, text) = json.loads((reward / "heldout.json").read_text()), parts(reward)
    assert "reward-model" in about["tags"] and re.search(rf"mismatched +\| +{held['mismatched']['auc']:.3f}", text)


def test_the_license_is_the_base_s(tmp_path):
    """From the metadata of its card, else none: a damaged card, or a license that the text speaks of, names none."""
    cases = [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("# x\nlicense: mit\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {mit\n---\n", None),
        ("---\n- mit\n---\n", None),
    ]
    assert outputs.license_of(tmp_path) is None
    for readme, expected in cases:
        (tmp_path / "README.md").write_text(readme)
        assert outputs.license_of(tmp_path) == expected


def test_hostile_names_stay_text(run_folder, tmp_path):
    """A folder's name with a quote, a colon and a line end is a string of the YAML and nothing else."""
    settings = Mle(model="owner/x@a/../y", data='x"\n- y: [1', push="")
    outputs.write_card(settings, run_folder / "base", tmp_path, "mle")
    about, _ = parts(tmp_path)
    assert about["base_model"] == "owner/x" and about["tags"] == ["lastmile", "lora"] and "datasets" not in about


def test_push_uploads_the_folder(fresh_run, hub, capsys):
    """--push creates a private repository and sends what the folder holds, the adapter to the byte; the warning says
    that the base is only here.
    """
    assert fresh_run("mle", *FEW, "--push", "owner/mine") == 0
    sent = hub.repos["models"]["owner/mine"]["main"]
    folder = fresh_run.folder / "mle"
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert here.pop("trained_on.txt")  # hashes of the data stay here
    assert {name: content for name, content in sent.items() if name != ".gitattributes"} == here
    assert load(sent["adapter_model.safetensors"]) and "owner/mine" in hub.private
    said = capsys.readouterr()
    assert "uploaded: " in said.out and "is a folder of this machine" in said.err


@pytest.mark.parametrize(
    ("push", "token", "message"),
    [
        ("mine", "hf_known", "is no repository of the Hub; name one as OWNER/NAME"),
        ("owner/mine", "", "no token of the Hub"),
        ("owner/mine", "hf_other", "the Hub refuses the token"),
    ],
)
def test_what_would_stop_an_upload_is_said_first(fresh_run, hub, monkeypatch, capsys, push, token, message):
    """A name without an owner, no token, or one that the Hub does not know: one line before anything is trained."""
    monkeypatch.setenv("HF_TOKEN", token)
    assert fresh_run("mle", *FEW, "--push", push) == 2
    assert message in capsys.readouterr().err
    assert not (fresh_run.folder / "mle").exists() and not (fresh_run.folder / "mle.partial").exists()


def test_a_hub_that_is_down_is_said_first(fresh_run, hub, monkeypatch, capsys):
    """No way to the Hub at the start: one line, nothing trained."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert fresh_run("mle", *FEW, "--push", "owner/mine") == 2
    assert "cannot be reached" in capsys.readouterr().err and not (fresh_run.folder / "mle").exists()


def test_a_failed_upload_loses_nothing(fresh_run, hub, capsys):
    """The Hub that knew the token refuses the upload: the finished folder stays, and the line names the command that
    sends it.
    """
    hub.refuses = 403
    assert fresh_run("mle", *FEW, "--push", "owner/mine") == 2
    folder = fresh_run.folder / "mle"
    assert (folder / "adapter_model.safetensors").exists()
    assert f"huggingface-cli upload owner/mine {folder}" in capsys.readouterr().err
