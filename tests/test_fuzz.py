"""Broken files: some of the thousands of mutants that fuzz.py tries, and by name what it found that users may meet."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lastmile

SMALL = ["--train-examples", 8, "--max-steps", 1]


def test_two_hundred_mutants():
    """Whatever is wrong with a file, a command ends well or with one line, and loses nothing."""
    fuzz = [sys.executable, Path(__file__).with_name("fuzz.py"), "--count", "200"]
    done = subprocess.run(fuzz, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rows(file, outputs):
    file.write_text("".join(json.dumps({"input": f"text {i}", "output": out}) + "\n" for i, out in enumerate(outputs)))
    return file


def test_outputs_of_one_word(fresh_run, tmp_path):
    """They cannot be shuffled; the held-out report used to look for such negatives, when the training was done."""
    file = rows(tmp_path / "rows.jsonl", [f"w{i}" for i in range(40)])
    assert fresh_run("reward", "--data", file, *SMALL) == 0
    assert "shuffled" not in json.loads((fresh_run.folder / "reward/heldout.json").read_text())


def test_one_row_to_validate_with_is_enough(fresh_run, tmp_path):
    """Ten rows leave one to validate with, which cannot be re-paired: the report leaves that class out."""
    file = rows(tmp_path / "rows.jsonl", [f"output number {i}" for i in range(10)])
    assert fresh_run("reward", "--data", file, *SMALL) == 0
    report = json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    assert "mismatched" not in report and "copied_input" in report


def test_adapters_of_any_float_type_and_of_no_other(fresh_run, capsys):
    """PEFT may save fp16, score head included; of floats of eight bits torch cannot tell whether they are finite."""
    assert fresh_run("reward", *SMALL, "--eval-examples", 4) == 0
    file = fresh_run.folder / "reward/adapter_model.safetensors"
    tensors = load_file(file)
    for dtype, code in ((torch.float16, 0), (torch.float8_e4m3fn, 2)):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
        assert fresh_run("ppo", *SMALL, "--max-new-tokens", 60, "--overwrite") == code
    assert "not finite floats" in capsys.readouterr().err


def test_ids_beyond_the_tokenizer_are_no_text(run_folder):
    """Embeddings padded to a round number hold more ids than the tokenizer has pieces; a model may sample one."""
    tokenizer = lastmile.data.load_tokenizer(run_folder / "base")
    ids = tokenizer.encode("play chess")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "play chess"


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path, capfd):
    """Its Rust code panics at some files: no Exception, so nothing caught it, and it writes to the terminal itself."""
    broken = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    broken["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="tokenizer.json: not a valid tokenizer"):
        lastmile.data.load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_long_prompt_is_refused_and_a_long_message_cut(fresh_run, capsys):
    """Attention over a book takes hours and all memory; an error line that quotes one hides what it says."""
    assert fresh_run("sample", "chess " * 5000, "--adapter", "base") == 2
    assert "the limit is 3996" in capsys.readouterr().err
    assert fresh_run("sample", "hello", "--adapter", "x" * 5000) == 2
    assert len(capsys.readouterr().err) < 1000
