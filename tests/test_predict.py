"""`predict`: outputs for a file of inputs, continued where it was stopped, and nobody's file overwritten."""

import json
import multiprocessing
import random
import shutil
import time

import pytest
import torch
from helpers import contents, damage_folder

import data
import lastmile
import model
from safety.terminal import visible


@pytest.fixture
def inputs(tmp_path):
    """23 dialogues, without targets."""
    file = tmp_path / "in.jsonl"
    rows = [{"id": f"d{i}", "dialogue": e.source} for i, e in enumerate(data.toy("test")[:23])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def predict(run_folder, inputs, tmp_path):
    """A function of an output's name and flags that calls predict over the base."""

    def call(name="out.jsonl", *flags):
        place = ["--model", run_folder / "base", "--output-dir", tmp_path / "run", "--adapter", "base"]
        words = ["--input", inputs, "--output", tmp_path / name, "--batch-size", 4, "--max-new-tokens", 12]
        call.command = ["predict", *map(str, (*place, *words, *flags))]
        return lastmile.main(call.command)

    return call


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--temperature", 1]], ids=["greedy", "sampled"])
def test_outputs_are_those_of_sample(predict, inputs, tmp_path, capsys, flags):
    """Every input has its line, in order, with its id; greedy outputs are those of `sample`; a row's luck does not
    depend on the batch it is in.
    """
    assert predict("out.jsonl", *flags) == 0
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == [f"d{i}" for i in range(23)]
    assert "predict: 23 rows in" in capsys.readouterr().out
    if flags:
        assert predict("other.jsonl", *flags, "--batch-size", "7") == 0
        assert lines_of(tmp_path / "other.jsonl") == found
        assert predict("another.jsonl", *flags, "--seed", "1") == 0
        assert lines_of(tmp_path / "another.jsonl") != found
    else:
        words = [word for word in predict.command if word not in ("predict", "--input", str(inputs), "--output")]
        words = [word for word in words if word not in (str(tmp_path / "out.jsonl"), "--batch-size", "4")]
        assert lastmile.main(["sample", *words, found[5]["source"]]) == 0
        assert capsys.readouterr().out.strip().endswith(visible(found[5]["prediction"].strip()))


@pytest.mark.parametrize("text", ["input,other\na,b\nc,d\n", "Question\na\nc\n", "instruction,input\nx,a\nx,c\n"])
def test_inputs_need_no_target(predict, inputs, tmp_path, text):
    """Files in every form that --data reads, the target's column left out."""
    table = tmp_path / "table.csv"
    table.write_text(text)
    assert predict("out.jsonl", "--input", table) == 0
    expected = ["x\n\na", "x\n\nc"] if "instruction" in text else ["a", "c"]
    assert [line["source"] for line in lines_of(tmp_path / "out.jsonl")] == expected


def test_a_conversation_ends_before_its_answer(predict, tmp_path):
    """messages with and without the assistant's last turn are the same input."""
    user = {"role": "user", "content": "hello"}
    table = tmp_path / "chat.jsonl"
    turns = [[user], [user, {"role": "assistant", "content": "hi"}]]
    table.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    assert predict("out.jsonl", "--input", table) == 0
    assert [line["source"] for line in lines_of(tmp_path / "out.jsonl")] == ["hello", "hello"]


def test_an_input_that_does_not_fit(predict, inputs, tmp_path, capsys):
    """It keeps its line, without an output, and is counted: a file of 10,000 rows is not lost for one."""
    with open(inputs, "a") as opened:
        opened.write(json.dumps({"id": "long", "dialogue": "word " * 5000}) + "\n")
    assert predict() == 0
    *others, last = lines_of(tmp_path / "out.jsonl")
    assert (
        last["id"] == "long" and last["prediction"] is None and all(line["prediction"] is not None for line in others)
    )
    assert "1 of them over" in capsys.readouterr().out


def slowly(words):
    """predict, with a pause in each batch."""
    sample = model.sample

    def slow(*args, **options):
        time.sleep(0.2)
        return sample(*args, **options)

    model.sample = slow
    lastmile.main(words)


def test_killed_at_random_moments(predict, tmp_path):
    """Five times killed, five times continued: the bytes of a run never stopped."""
    assert predict("whole.jsonl", "--temperature", 1) == 0
    words = [word.replace("whole.jsonl", "cut.jsonl") for word in predict.command]
    rng = random.Random(0)
    for _ in range(5):
        child = multiprocessing.get_context("fork").Process(target=slowly, args=(words,))
        child.start()
        while not (tmp_path / "cut.jsonl").exists() and child.is_alive():
            time.sleep(0.01)  # a busy machine may take seconds to come to the first batch
        time.sleep(0.3 + rng.random() / 2)  # a batch takes 0.2 s
        child.kill()
        child.join()
    with open(tmp_path / "cut.jsonl", "a") as opened:
        opened.write('{"id": "torn')  # as a crash in the middle of a write leaves it
    assert lastmile.main(words) == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_that_is_done_stays(predict, tmp_path, capsys):
    """Called again, predict reads that all is there."""
    assert predict() == 0
    before = contents(tmp_path)
    assert predict() == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", 1], "differs from this call in --temperature"),
        (["--max-new-tokens", 13], "differs from this call in --max-new-tokens"),
        (["--input", "other"], "differs from this call in the inputs"),
        (["--template", "plain"], "differs from this call in the template"),
    ],
)
def test_another_work_s_file_is_kept(predict, inputs, tmp_path, capsys, flags, said):
    """Half of a file from other settings would be a file that nobody can explain."""
    assert predict() == 0
    if flags[0] == "--input":
        flags = ["--input", tmp_path / "other.jsonl"]
        flags[1].write_text(inputs.read_text().replace("d0", "e0"))
    before = contents(tmp_path)
    assert predict("out.jsonl", *flags) == 2
    assert said in capsys.readouterr().err and contents(tmp_path) == before


def test_another_tokenizer_continues_no_file(predict, run_folder, inputs, tmp_path, capsys):
    """It reads the inputs and writes the outputs; only its template was compared."""
    shutil.copytree(run_folder / "base", tmp_path / "base")
    assert predict("out.jsonl", "--model", tmp_path / "base") == 0
    data.train_tokenizer([e.source for e in data.toy("test")], 700, tmp_path / "base")
    assert predict("out.jsonl", "--model", tmp_path / "base") == 2
    assert "differs from this call in the tokenizer;" in capsys.readouterr().err


BAD = {  # flags after the good ones: what is said
    "mine.jsonl": (["--output", "mine.jsonl"], "exists and was not written by predict"),
    "a name": (["--output", "mine.csv"], "JSON lines; give it a name that ends in .jsonl"),
    "no input": (["--input", "absent.csv"], "absent.csv: no such file; --input takes"),
    "no column": (["--input", "odd.csv"], "cannot tell the input column among a, b; name it: --input-column NAME"),
    "two columns": (["--input", "two.csv"], "more than one column may be the input"),
    "a folder": (["--input", "."], "no such file; --input takes"),
}


@pytest.mark.parametrize(("flags", "said"), BAD.values(), ids=BAD)
def test_bad_input(predict, tmp_path, monkeypatch, capsys, flags, said):
    """One line, exit code 2, and what was there stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("mine\n")
    (tmp_path / "odd.csv").write_text("a,b\nc,d\n")
    (tmp_path / "two.csv").write_text("input,question\nc,d\n")
    assert predict("new.jsonl", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "mine.jsonl").read_text() == "mine\n" and not (tmp_path / "new.jsonl").exists()


def not_a_number(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan


def beyond_fp16(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e4
    tensors["model.layers.1.mlp.down_proj.weight"] /= 3e4


@pytest.mark.parametrize(
    ("damage", "dtype", "cause"),
    [(not_a_number, "float32", "tensor model.layers.1.mlp.down_proj.weight contains NaN or infinity; download"),
     (beyond_fp16, "float16", "activations beyond what torch.float16 can represent; use --dtype bfloat16 or float32")],
)  # fmt: skip
def test_numbers_that_are_not_finite(run_folder, reward, tmp_path, inputs, damage, dtype, cause, capsys):
    """The likeliest of NaN is some token: garbage, written with exit code 0. Every command that samples or scores ends
    as training does, with code 3, the cause and the row's id; merge writes no NaN.
    """
    shutil.copytree(run_folder / "pretrain", tmp_path / "model")
    damage_folder(tmp_path / "model", lambda config, tensors: damage(tensors))
    llama = model.load(tmp_path / "model")
    llama.add_adapter("mle", 4, 8.0, ["q_proj"], torch.Generator())
    llama.save_adapter("mle", tmp_path / "mle", "base")
    shared = ["--model", tmp_path / "model", "--output-dir", tmp_path / "run", "--dtype", dtype]
    shared += ["--max-new-tokens", 24]
    shutil.copytree(reward, tmp_path / "reward")
    (tmp_path / "reward/base.sha256").unlink()
    commands = {
        "sample --adapter base hello": "",
        f"predict --adapter base --input {inputs} --output {tmp_path}/out.jsonl": "row d",
        "eval --adapters base --test-examples 4": "row toy-test-",
        f"judge --adapter base --reward {tmp_path}/reward --eval-examples 2": "row toy-validation-",
        f"reward --samples base --train-examples 4 --eval-examples 2 --init {tmp_path}/reward": "row toy-train-",
        f"merge --adapter {tmp_path}/mle --dtype float32": "",
    }
    for line, row in commands.items():
        if damage == beyond_fp16 and line.split()[0] in ("merge", "reward"):  # it fits fp32; fp16 trains nothing
            continue
        capsys.readouterr()
        command, *flags = line.split()
        assert lastmile.main([command, *map(str, shared), *flags]) == 3, line
        error = capsys.readouterr().err.splitlines()[-1]
        assert row in error, error
        assert cause in error or command == "merge" and "down_proj.weight has no finite" in error, error
    assert not list((tmp_path / "run").glob("*/model.safetensors"))
