"""Models and data sets of the Hub, from a small one on 127.0.0.1: what is asked for, and what goes wrong."""

import json
import os
import re
import subprocess
import sys

import pytest
from hub import Hub, sha
from huggingface_hub import constants, file_download, utils
from huggingface_hub.utils import _http

import data
import lastmile
from interface import folders

WANTED = {
    "config.json", "quantize_config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
    "README.md",  # names the licence, for the cards of what is made from it
}  # fmt: skip
UNWANTED = {  # what repositories hold besides: pickles, other people's formats, folders with a second copy of it all
    "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "model.gguf", "modeling.py",
    "original/params.json", "original/consolidated.00.pth", "onnx/model.safetensors", "onnx/config.json",
    "sub/tokenizer.model", "runs/train.json",
}  # fmt: skip
TEXT = "Amy: Shall we go?"
SAMPLE = ["sample", TEXT, "--adapter", "base", "--template", "plain", "--max-new-tokens", "4"]
ROWS = [{"id": str(i), "dialogue": f"Amy: go at {i}?", "summary": f"Amy goes at {i}."} for i in range(12)]


def sheet(rows):
    """CSV of a list of dicts."""
    return "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows), ""]).encode()


@pytest.fixture
def hub(run_folder, tmp_path, monkeypatch):
    """The small Hub with the tiny base and SAMSum's name on it, and this process turned to it, its cache empty."""
    model = {path.name: path.read_bytes() for path in (run_folder / "base").iterdir() if path.name != "template.txt"}
    model |= {"quantize_config.json": json.dumps(json.loads(model["config.json"])["quantization_config"]).encode()}
    model |= {"generation_config.json": b'{"eos_token_id": [2, 5]}'}
    model["README.md"] = b"---\nlicense: mit\n---\n"
    assert model.keys() >= WANTED
    model = {name: model[name] for name in WANTED} | dict.fromkeys(UNWANTED, b"{}")
    split = {f"{name}.csv": sheet(ROWS) for name in ("train", "validation", "test")}
    models = {
        "owner/tiny": {"main": model, "gptq-4bit-32g": model},
        "owner/pickles": {"main": {"pytorch_model.bin": b"x"}},
    }
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    utils.disable_progress_bars()
    with Hub({"models": models, "datasets": {"knkarthick/samsum": {"main": split}}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.cache = tmp_path / "cache"
        yield hub
    _http.reset_sessions()
    utils.enable_progress_bars()


@pytest.fixture
def offline(monkeypatch):
    """A function that sets HF_HUB_OFFLINE=1 from here on."""

    def switch():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        _http.reset_sessions()  # sessions learn of it when they are opened

    yield switch
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _http.reset_sessions()


def files_asked(hub):
    """Names of the files that were downloaded."""
    return {path.split("/resolve/")[1].partition("/")[2] for method, path in hub.requests if "/resolve/" in path}


def one_line(capsys, *arguments):
    """The line on stderr of a command that must end with exit code 2 and say nothing else there."""
    assert lastmile.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lastmile.py: ") and error.count("\n") == 1, error
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize(("name", "revision"), [("owner/tiny", "main"), ("owner/tiny@gptq-4bit-32g", "gptq-4bit-32g")])
def test_model_of_the_hub(hub, name, revision, capsys):
    """Safetensors, JSON and tokenizer of that branch are fetched, once; never a pickle, which could run code.

    The answer is the one that the same files in a folder give.
    """
    assert lastmile.main([*SAMPLE, "--model", name]) == 0
    assert files_asked(hub) == WANTED
    assert all(f"/resolve/{sha('owner/tiny', revision)}/" in path for _, path in hub.requests if "/resolve/" in path)
    hub.requests.clear()
    assert lastmile.main([*SAMPLE, "--model", name]) == 0
    assert hub.requests and not files_asked(hub)
    (folder,) = (hub.cache / "models--owner--tiny/snapshots").iterdir()
    assert {path.name for path in folder.rglob("*")} == WANTED
    assert lastmile.main([*SAMPLE, "--model", str(folder)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert others == [first] * 2


def test_a_process_of_its_own(hub, tmp_path):
    """With the environment that people set, cold and then offline: the same sizes printed, nothing said on stderr."""
    (tmp_path / "here/rows.csv").write_bytes(sheet(ROWS))
    command = [sys.executable, folders.ROOT / "lastmile.py", "mle", "--dry-run", "--model", "owner/tiny@gptq-4bit-32g"]
    command += ["--template", "plain", "--data", "rows.csv", "--output-dir", "out"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    shown = []
    for offline in ("0", "1"):
        hub.requests.clear()
        done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and "dry run: nothing is written" in done.stdout
        shown.append(done.stdout.split("  memory ")[0])  # the process is as large as it happens to be
        assert files_asked(hub) == (set() if hub.requests == [] else WANTED) and bool(hub.requests) == (offline == "0")
    assert shown[0] == shown[1] and not (tmp_path / "here/out").exists()


def test_offline_with_a_full_cache(hub, offline, capsys):
    """HF_HUB_OFFLINE=1, as compute nodes set it: the cached model answers, without one request."""
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    hub.requests.clear()
    offline()
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and hub.requests == []
    assert "owner/tiny@gptq-4bit-32g: only partly cached" in one_line(
        capsys, *SAMPLE, "--model", "owner/tiny@gptq-4bit-32g"
    )


def test_a_cache_that_another_program_filled(hub, offline, capsys):
    """`hf download` on the login node, HF_HUB_OFFLINE=1 on the compute node: no mark of ours is needed."""
    from huggingface_hub import snapshot_download

    snapshot_download("owner/tiny")
    offline()
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0


def test_the_hub_is_down(hub, capsys):
    """Nothing listens: a cached model is used, an uncached one refused with the way out."""
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    hub.__exit__()
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    capsys.readouterr()
    error = one_line(capsys, *SAMPLE, "--model", "owner/other")
    assert "model owner/other@main: only partly cached, and the Hub cannot be reached; connect" in error
    assert "--model FOLDER" in error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/none", "owner/none@main: not on the Hub, or private; check the name, set HF_TOKEN, or name files of"),
        ("owner/tiny@none", "owner/tiny@none: the Hub has no such revision; see the branches"),
        ("owner/shut", "owner/shut@main: not on the Hub, or private; check the name, set HF_TOKEN"),
        (
            "owner/gated",
            "owner/gated@main: its owner must grant you access; ask for it on the model's page and set HF_",
        ),
        ("owner/pickles", "owner/pickles@main: no *.safetensors was found; name files of your own: --model FOLDER"),
        ("owner/bad--name", "owner/bad--name@main: Cannot have -- or .. in repo_id"),
        ("../owner", "../owner: no such model folder"),
        ("./tiny", "tiny: no such model folder"),
        ("tiny", "tiny: no such model folder"),
        ("a/b/c", "a/b/c: no such model folder"),
    ],
)
def test_models_that_cannot_be_had(hub, name, said, capsys):
    """Exit code 2 and one line: which repository, what is wrong, what to do. A path that is none is not asked for."""
    tiny = hub.repos["models"]["owner/tiny"]
    hub.repos["models"] |= {"owner/shut": tiny, "owner/gated": tiny}
    hub.private, hub.gated = {"owner/shut"}, {"owner/gated"}
    error = one_line(capsys, *SAMPLE, "--model", name)
    assert said in error and (hub.requests != []) == (name.startswith("owner/") and "--" not in name)


def test_offline_without_a_cache(hub, offline, capsys):
    """HF_HUB_OFFLINE=1 and nothing cached: refused with the repository's name, at once and without a request."""
    offline()
    error = one_line(capsys, *SAMPLE, "--model", "owner/tiny")
    assert "model owner/tiny@main: only partly cached, and the Hub cannot be reached; connect" in error
    assert hub.requests == []


@pytest.mark.parametrize("cut", [100, 2000, 60_000])
def test_a_download_that_breaks_off(hub, offline, cut, capsys):
    """Half a model is never loaded, on the spot or offline; the same command, run again, fetches what lacks."""
    hub.cut = cut
    sizes = [len(content) for name, content in hub.repos["models"]["owner/tiny"]["main"].items() if name in WANTED]
    assert min(sizes) < cut < max(sizes)
    error = one_line(capsys, *SAMPLE, "--model", "owner/tiny")
    assert "model owner/tiny@main: the download broke off" in error and "run the same command again" in error
    hub.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        _http.reset_sessions()
        error = one_line(capsys, *SAMPLE, "--model", "owner/tiny")
        assert "model owner/tiny@main: only partly cached" in error and hub.requests == []
    _http.reset_sessions()
    hub.cut = None
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    assert "model.safetensors" in files_asked(hub)
    offline()
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0


def test_a_half_model_has_other_ends(hub, offline, capsys):
    """All but generation_config.json in the cache would load and answer, but with fewer tokens that end an answer."""
    files = hub.repos["models"]["owner/tiny"]["main"]
    files["generation_config.json"] = b'{"eos_token_id": [2, 5]}' + b" " * max(map(len, files.values()))
    hub.cut = len(files["generation_config.json"]) - 1
    assert "the download broke off" in one_line(capsys, *SAMPLE, "--model", "owner/tiny")
    (folder,) = (hub.cache / "models--owner--tiny/snapshots").iterdir()
    offline()
    assert "only partly cached" in one_line(capsys, *SAMPLE, "--model", "owner/tiny")
    assert not (folder / "generation_config.json").exists()


def test_a_folder_wins_over_the_hub(hub, run_folder, tmp_path, capsys):
    """A folder of one's own that is named like a repository is the one that is meant: nothing is asked for."""
    (tmp_path / "here/owner").mkdir()
    (tmp_path / "here/owner/tiny").symlink_to(run_folder / "base")
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny"]) == 0
    assert hub.requests == []
    assert lastmile.main([*SAMPLE, "--model", "owner/tiny@gptq-4bit-32g"]) == 0
    assert files_asked(hub) == WANTED


def test_the_token(hub, tmp_path, monkeypatch, capsys):
    """HF_TOKEN opens a private model, and is written nowhere: run folders are shared, tokens must not be."""
    hub.private, token = {"owner/tiny"}, "hf_neverwritethisdown"
    monkeypatch.setenv("HF_TOKEN", token)
    (tmp_path / "here/rows.csv").write_bytes(sheet(ROWS))
    flags = "--data rows.csv --template plain --max-steps 1 --output-dir out --model owner/tiny"
    assert lastmile.main(["mle", *flags.split()]) == 0
    assert hub.tokens == {token}
    written = [path for place in ("here", "cache") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert tmp_path / "here/out/mle/adapter_model.safetensors" in written
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in "".join(capsys.readouterr())


def test_what_a_model_of_the_hub_leaves(hub, tmp_path):
    """Adapters name their base as it was typed; a merged model has its tokenizer, ends, prompt; few look-ups."""
    (tmp_path / "here/rows.csv").write_bytes(sheet(ROWS))
    flags = ["--data", "rows.csv", "--template", "plain", "--output-dir", "out", "--model", "owner/tiny"]
    assert lastmile.main(["mle", "--max-steps", "1", *flags]) == 0
    base = json.loads((tmp_path / "here/out/mle/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "owner/tiny"
    hub.requests.clear()
    assert lastmile.main(["merge", "--adapter", "mle", *flags]) == 0
    assert not files_asked(hub) and len(hub.requests) <= 4  # a look-up of ours and one of the library's, twice
    names = {path.name for path in (tmp_path / "here/out/merge").iterdir()}
    assert names == {*WANTED, "settings.json", "template.txt"} - {"quantize_config.json"}


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


def test_samsum_of_the_hub(hub, offline):
    """--data samsum: the one file of the split that is asked for, then from the cache."""
    expected = [data.Example(row["id"], row["dialogue"], row["summary"]) for row in ROWS]
    assert data.load("samsum", "train") == expected
    assert files_asked(hub) == {"train.csv"}
    hub.requests.clear()
    offline()
    assert data.load("samsum", "train") == expected and hub.requests == []
    with pytest.raises(ValueError, match=r"dataset knkarthick/samsum@main: no test\.csv was found; .*--data FOLDER"):
        data.load("samsum", "test")


@pytest.fixture
def xsum(hub, tmp_path):
    """XSum as the Hub keeps it: parquet on a branch of its own, several files a split, a document that is empty."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow.parquet import write_table

    files = {}
    for split in ("train", "validation", "test"):
        for part in range(3):
            rows = [{"document": f"{split} {part} {i}", "summary": "NA", "id": f"{part}{i}"} for i in range(4)]
            rows[1]["document"] = ["", " \n", "\n"][part]
            write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part.parquet", row_group_size=3)
            files[f"default/{split}/000{part}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    hub.repos["datasets"]["EdinburghNLP/xsum"] = {
        "refs/convert/parquet": files | {"README.md": b"", "default/partial-train/0000.parquet": b"no"},
        "main": {"xsum.py": b"print('code of strangers')"},
    }
    return hub


def test_xsum_of_the_hub(xsum, capsys):
    """--data xsum: all files of the split, in order, and no other; rows without a text are passed over and counted."""
    found = data.load("xsum", "test")
    expected = [(part, i) for part in range(3) for i in range(4) if i != 1]
    assert found == [data.Example(f"{part}{i}", f"test {part} {i}", "NA") for part, i in expected]
    assert files_asked(xsum) == {f"default/test/000{part}.parquet" for part in range(3)}
    assert "test: skipped 3 rows of xsum with an empty text" in capsys.readouterr().err


def test_half_a_data_set(xsum, offline, capsys):
    """Two of a split's three files in the cache look like a whole split: offline it is refused, not trained on."""
    files = xsum.repos["datasets"]["EdinburghNLP/xsum"]["refs/convert/parquet"]
    whole = files["default/test/0002.parquet"]
    files["default/test/0002.parquet"] = whole + b" " * 10_000
    xsum.cut = len(whole) + 5_000
    for switch in (lambda: None, offline):
        switch()
        with pytest.raises(ValueError, match=r"dataset EdinburghNLP/xsum@refs/convert/parquet: "):
            data.load("xsum", "test")
    assert list(xsum.cache.rglob("0000.parquet"))


def test_data_sets_that_cannot_be_had(hub, offline, capsys):
    """A data set that was withdrawn, a split that is not there, no network: named, with the remedy."""
    flags = ["mle", "--data", "dialogsum", "--model", "owner/tiny", "--template", "plain"]
    error = one_line(capsys, *flags)
    assert "dataset knkarthick/dialogsum@main: not on the Hub, or private" in error and "--data FOLDER" in error
    hub.repos["datasets"]["knkarthick/dialogsum"] = {"main": {"test.csv": b"dialogue,summary\na,b\n"}}
    error = one_line(capsys, *flags)
    assert "dataset knkarthick/dialogsum@main: no train.csv was found; name files of your own: --data FOLDER" in error
    hub.repos["datasets"]["knkarthick/dialogsum"]["main"]["train.csv"] = b"<html>"
    assert re.search(r"train\.csv: no rows|train\.csv.*cannot tell", one_line(capsys, *flags))
    offline()
    error = one_line(capsys, *flags[:2], "samsum", *flags[3:])
    assert "dataset knkarthick/samsum@main: only partly cached, and the Hub cannot be reached" in error


def test_a_folder_of_data_wins_over_the_hub(hub, tmp_path):
    """data/samsum in the working directory is what --data samsum means, as before there was a Hub in this program."""
    (tmp_path / "here/data/samsum").mkdir(parents=True)
    (tmp_path / "here/data/samsum/train.csv").write_text("dialogue,summary\nmine,own\n")
    said = [{"role": "user", "content": "mine"}, {"role": "assistant", "content": "own"}]
    (tmp_path / "here/data/samsum/validation.jsonl").write_text(json.dumps({"messages": said}))
    assert data.load("samsum", "train") == [data.Example("2", "mine", "own")]
    assert data.load("samsum", "validation") == [data.Example("1", "mine", "own")]
    with pytest.raises(FileNotFoundError, match=r"data/samsum: no file for the test split"):
        data.load("samsum", "test")
    assert hub.requests == []
