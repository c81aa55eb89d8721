"""Bad input, group by group: one line that says what and where, exit code 2, no traceback, nothing written.

The numbers are those of a list of 48 groups of bad inputs, gathered from what other tools get wrong. A group that is
tested at length elsewhere has one case here and the place: 7 and 47 test_lastmile.py, 10 to 25 test_model.py and
test_quant.py, 27 to 29 test_lora.py, 26 and 30 to 37 test_data.py, 39 test_hub.py, 42 test_eval.py, 45 test_resume.py.
"""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import lastmile

ROWS = [(f"Amy: Shall we meet at {i}?\nBen: Yes, at {i}.", f"Amy and Ben will meet at {i}.") for i in range(30)]


class Place:
    """What a user might have: a 4-bit base, a reward adapter, data of their own; each may be spoiled."""

    def __init__(self, folder, base, reward):
        self.base, self.reward, self.data, self.out = (folder / name for name in ("base", "reward", "data", "out"))
        shutil.copytree(base, self.base)
        shutil.copytree(reward, self.reward)
        self.data.mkdir()
        for split in ("train", "validation", "test"):
            lines = [json.dumps({"input": source, "output": target}) for source, target in ROWS]
            (self.data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

    def config(self, **changes):
        file = self.base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def quantization(self, **changes):
        found = json.loads((self.base / "config.json").read_text())["quantization_config"]
        self.config(quantization_config=found | changes)

    def tensors(self, folder, change):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def train(self, content, suffix="jsonl"):
        (self.data / "train.jsonl").unlink()
        (self.data / f"train.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())

    def weights(self, change):
        file = self.base / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    def only(self, name):
        for path in self.base.iterdir():
            if path.suffix == ".safetensors":
                path.rename(self.base / name)


@pytest.fixture
def place(run_folder, reward, tmp_path):
    (tmp_path / "a place").mkdir()
    return Place(tmp_path / "a place", run_folder / "base", reward)


def row(**cells):
    return json.dumps({"input": "a", "output": "b"} | cells) + "\n"


GOOD = row() * 3
LAYER = "model.layers.0.mlp.up_proj"
MLE = "mle --model BASE --data DATA --max-steps 1"
PPO = "ppo --model BASE --data DATA --max-steps 1 --reward REWARD"
CASES = [  # group, what is spoiled, the command, what the line must say
    (1, None, "mle --lerning-rate 1", "did you mean --learning-rate?"),
    (1, None, "eval --resume", "unrecognized arguments: --resume; other commands have it"),
    (3, None, "sample hi --model BASE --top-k 5", "--temperature is 0; add --temperature 1"),
    (10, None, "quantize --data DATA", "quantize: which model?"),
    (2, None, "mle --learning-rate nan", "--learning-rate: nan is out of range: must be between -1e+30 and"),
    (2, None, "mle --lora-alpha 1e300", "must be between -1e+30 and 1e+30"),
    (2, None, "mle --learning-rate inf", "out of range"),
    (2, None, "mle --learning-rate=-1", "-1 is out of range"),
    (2, None, "mle --learning-rate 1e999", "out of range"),
    (3, None, "mle --batch-size 0", "at least 1"),
    (3, None, "mle --batch-size=-3", "at least 1"),
    (3, None, "mle --batch-size 2.5", "invalid whole number value: '2.5'"),
    (3, None, "mle --batch-size abc", "invalid whole number value: 'abc'"),
    (3, None, "mle --max-new-tokens 0", "at least 1"),
    (3, None, "mle --lora-r 0", "at least 1"),
    (3, None, "sample hi --top-p 1.5", "at most 1"),
    (3, None, "sample hi --temperature=-1", "at least 0"),
    (4, None, "mle --micro-batch-size=-1", "at least 0"),
    (4, None, PPO + " --whiten --micro-batch-size 2", "remove --micro-batch-size"),
    (5, lambda p: p.out.write_text("a file"), MLE, "out"),
    (5, lambda p: (p.data / "c.toml").write_text('output_dir = "a\\u0000b"'), MLE + " --config DATA/c.toml", "NUL"),
    (6, None, MLE + " --resume DATA", "not a valid checkpoint"),
    (7, lambda p: (p.data / "c.toml").write_text("rate: 1"), MLE + " --config DATA/c.toml", "c.toml: unreadable"),
    (8, None, "ppo --model BASE --data DATA --reward absent", "run: python lastmile.py reward"),
    (8, lambda p: (p.reward / "base.sha256").write_text("0" * 64), PPO, "trained on another base"),
    (8, lambda p: (p.reward / "template.txt").write_text("{source}"), PPO, "trained with another prompt"),
    (7, None, MLE + " --config absent.toml", "--config absent.toml: no such file"),
    (10, None, "mle --model REWARD --data DATA", "is an adapter, not a model"),
    (10, None, "mle --model ./absent --data DATA", "--model absent: no such model folder"),
    (30, None, "mle --model ./absent --data ./missing", "./missing: no such file or folder"),
    (30, None, "predict --model BASE", "Add --input FILE"),
    (9, None, "mle --device cuda", "use --device cpu"),
    (10, lambda p: shutil.rmtree(p.base) or p.base.mkdir(), MLE, "config.json: no such file"),
    (10, lambda p: p.only("pytorch_model.bin"), MLE, "pickles can run code"),
    (10, lambda p: p.only("model.gguf"), MLE, "GGUF"),
    (10, lambda p: p.only("consolidated.00.pth"), MLE, "take the Hugging Face version"),
    (11, lambda p: (p.base / "config.json").unlink(), MLE, "config.json: no such file"),
    (11, lambda p: (p.base / "config.json").write_text(""), MLE, "config.json: not JSON"),
    (11, lambda p: (p.base / "config.json").write_text("[1]"), MLE, "expected a JSON object"),
    (11, lambda p: (p.base / "config.json").write_text("[" * 100_000), MLE, "config.json: not JSON"),
    (11, lambda p: (p.base / "config.json").write_bytes("{}".encode("utf-16")), MLE, "config.json: not JSON"),
    (12, lambda p: p.config(model_type="gpt2"), MLE, "model_type 'gpt2' is not supported"),
    (12, lambda p: p.config(model_type="qwen3_moe"), MLE, "'qwen3_moe' is not supported; a mixture of experts"),
    (12, lambda p: p.config(model_type=None), MLE, "None is not supported"),
    (13, lambda p: p.config(num_attention_heads=3, head_dim=None), MLE, "q_proj: 32 x 30"),
    (13, lambda p: p.config(num_key_value_heads=3), MLE, "not a multiple of num_key_value_heads 3"),
    (13, lambda p: p.config(vocab_size=0), MLE, "vocab_size is 0"),
    (13, lambda p: p.config(num_hidden_layers=-2), MLE, "num_hidden_layers is -2"),
    (13, lambda p: p.config(hidden_size="wide"), MLE, "hidden_size"),
    (13, lambda p: p.config(num_hidden_layers=10**9), MLE, "num_hidden_layers is 1000000000"),
    (14, lambda p: p.config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), MLE, "'yarn'"),
    (14, lambda p: p.config(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), MLE, "keep the true one"),
    (15, lambda p: p.config(eos_token_id=None), MLE, "eos_token_id"),
    (16, lambda p: p.quantization(quant_method="awq"), MLE, "'awq' is not supported"),
    (16, lambda p: p.quantization(bits=8), MLE, "bits 8 is not supported"),
    (16, lambda p: p.quantization(is_marlin_format=True), MLE, "marlin"),
    (18, lambda p: (p.base / "quantize_config.json").write_text('{"bits": 3}'), MLE, "3, but"),
    (19, lambda p: p.tensors(p.base, lambda t: t[f"{LAYER}.qzeros"].fill_(-1)), MLE, "15"),
    (20, lambda p: p.tensors(p.base, lambda t: t[f"{LAYER}.g_idx"].add_(9)), MLE, f"{LAYER}.g_idx"),
    (20, lambda p: p.tensors(p.base, lambda t: t.update({f"{LAYER}.g_idx": torch.ones(32)})), MLE, "of type"),
    (21, lambda p: p.quantization(group_size=0), MLE, "group_size 0"),
    (22, lambda p: p.tensors(p.base, lambda t: t[f"{LAYER}.scales"].fill_(torch.nan)), MLE, f"{LAYER}.scales"),
    (23, lambda p: p.weights(lambda b: b""), MLE, "not a readable safetensors file"),
    (23, lambda p: p.weights(lambda b: b[:-1]), MLE, "not a readable safetensors file"),
    (23, lambda p: p.weights(lambda b: b + b"x"), MLE, "not a readable safetensors file"),
    (23, lambda p: p.weights(lambda b: struct.pack("<Q", 2**62) + b[8:]), MLE, "not a readable safetensors file"),
    (23, lambda p: p.weights(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), MLE, "git-lfs pointer"),
    (23, lambda p: p.weights(lambda b: b"<!DOCTYPE html><p>404"), MLE, "HTML page"),
    (23, lambda p: p.weights(lambda b: b"\x80\x04\x95" + b"x" * 100), MLE, "is a pickle"),
    (24, lambda p: (p.only("a.safetensors"), (p.base / "m.safetensors.index.json").write_text(
        '{"weight_map": {"x": "../a.safetensors"}}')), MLE, "is not the name of a safetensors file"),
    (24, lambda p: (p.only("a.safetensors"), (p.base / "m.safetensors.index.json").write_text(
        '{"weight_map": {"x": "b.safetensors"}}')), MLE, "shard b.safetensors"),
    (25, lambda p: p.tensors(p.base, lambda t: t.pop("lm_head.weight")), MLE, "lm_head.weight is missing"),
    (26, lambda p: (p.base / "tokenizer.model").unlink(), MLE, "no tokenizer.model or tokenizer.json"),
    (26, lambda p: (p.base / "tokenizer.model").write_bytes(b""), MLE, "tokenizer.model: not a SentencePiece model"),
    (26, lambda p: (p.base / "tokenizer.model").write_bytes(bytes(range(256))), MLE, "not a SentencePiece model"),
    (26, lambda p: (p.base / "tokenizer.model").write_bytes(b"x" * (17 << 20)), MLE, "over 16 MiB"),
    (27, lambda p: p.tensors(p.reward, lambda t: t.update(
        {k.replace("base_model.model.", ""): t.pop(k) for k in list(t)})), PPO, "missing, extra"),
    (27, lambda p: p.tensors(p.reward, lambda t: next(iter(t.values())).fill_(torch.nan)), PPO, "not finite"),
    (28, lambda p: p.tensors(p.reward, lambda t: t.pop("base_model.model.score.weight")), PPO, "score head"),
    (29, lambda p: (p.reward / "adapter_model.safetensors").rename(p.reward / "adapter_model.bin"), PPO, "pickle"),
    (30, lambda p: (p.data / "train.jsonl").unlink(), MLE, "no file for the train split"),
    (30, lambda p: p.train(""), MLE, "no rows"),
    (30, lambda p: p.train("input,output\n", "csv"), MLE, "no rows"),
    (30, lambda p: p.train("\n\n \n"), MLE, "no rows"),
    (31, lambda p: p.train('input,output\na,b\nc,"d\n', "csv"), MLE, "train.csv:3"),
    (31, lambda p: p.train("input,output\na,b,c\n", "csv"), MLE, "train.csv:2: more cells"),
    (31, lambda p: p.train("input,output\na\n", "csv"), MLE, "train.csv:2"),
    (31, lambda p: p.train(b"input,output\ncaf\xe9,b\n", "csv"), MLE, "not UTF-8 at byte 16"),
    (31, lambda p: p.train("input,output\n" + "a" * (1 << 21) + ",b\n", "csv"), MLE, "train.csv:2"),
    (32, lambda p: p.train(GOOD + "{'input': 1}\n"), MLE, "train.jsonl:4"),
    (32, lambda p: p.train(GOOD + '["a", "b"]\n'), MLE, "train.jsonl:4: expected an object"),
    (32, lambda p: p.train(GOOD + '{"input": "a"}\n'), MLE, "train.jsonl:4"),
    (32, lambda p: p.train(GOOD + row(output=3)), MLE, "train.jsonl:4: column 'output' is empty or not text"),
    (32, lambda p: p.train(GOOD + '{"input": "a", "output": "b", "input": "c"}\n'), MLE, "duplicate key"),
    (32, lambda p: p.train(GOOD + '{"input": "a", "output": "b", "id": NaN}\n'), MLE, "NaN is not JSON"),
    (32, lambda p: p.train(GOOD + row(input="x\ud800")), MLE, "an unpaired surrogate"),
    (32, lambda p: p.train(GOOD + '{"input": ' + "[" * 100_000), MLE, "nested too deep"),
    (32, lambda p: p.train(GOOD + row().strip() + row()), MLE, "train.jsonl:4: Extra data"),
    (32, lambda p: p.train(GOOD + row(input="a" * (1 << 21))), MLE, "longer than 1048576 characters"),
    (33, lambda p: p.train(b"PAR1 but no more", "parquet"), MLE, "not a readable parquet file"),
    (34, lambda p: p.train(row(dialogue="c", summary="d")), MLE, "more than one pair of columns fits"),
    (35, None, MLE + " --max-input-tokens 3", "raise --max-input-tokens"),
    (40, lambda p: p.train(row()), "reward --model BASE --data DATA --max-steps 1", "all outputs are the same text"),
    (40, lambda p: p.train(row() * 9), "reward --model BASE --data DATA --max-steps 1", "outputs are the same text"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, command, said", [c[1:] for c in CASES], ids=[str(c[0]) for c in CASES])
def test_one_line_and_nothing_written(place, tmp_path, monkeypatch, capsys, spoil, command, said):
    """Whoever reads the line knows what is wrong and where; what was there stays, and nothing new is left behind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(place)
    capsys.readouterr()
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    names = {"BASE": place.base, "DATA": place.data, "DATA/c.toml": place.data / "c.toml", "REWARD": place.reward}
    words = [str(names.get(word, word)) for word in command.split()]
    try:
        code = lastmile.main([*words, *(["--output-dir", str(place.out)] if "--model" in command else [])])
    except SystemExit as stop:
        code = stop.code
    line = capsys.readouterr().err
    assert code == 2 and said in line and line.count("\n") == 1 and line.startswith("lastmile.py"), line
    assert before == {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}


GOES_ON = [  # group, what is unusual, what may be said on stderr or stdout
    (11, lambda p: (p.base / "config.json").write_bytes(b"\xef\xbb\xbf" + (p.base / "config.json").read_bytes()), ""),
    (12, lambda p: p.config(auto_map={"AutoModel": "evil.Model"}), ""),
    (15, lambda p: p.config(eos_token_id=[2, 5]), ""),
    (26, lambda p: p.config(eos_token_id=7), "the tokenizer's EOS is 2, config.json's (7,): each ends an output"),
    (17, lambda p: p.quantization(is_marlin_format=False), ""),
    (19, lambda p: p.quantization(checkpoint_format="gptq_v2"), "zero points are those of gptq"),
    (36, lambda p: p.train(row(input="</s> [/INST] <<SYS>>", output="<s> </s>") * 4), ""),
    (37, lambda p: p.train(row(input="\u0000 \u202e\u05d0 🙂 e\u0301 \u200b" + "w" * 9000, output="🙂") + GOOD), ""),
    (38, lambda p: p.train(GOOD), "2 duplicates"),
    (47, lambda p: setattr(p, "base", p.base.rename(p.base.with_name("bäse 100% 🙂"))), ""),
]  # fmt: skip


@pytest.mark.parametrize("spoil, said", [c[1:] for c in GOES_ON], ids=[f"{c[0]}" for c in GOES_ON])
def test_unusual_input_is_taken(place, capsys, spoil, said):
    """What only looks wrong must not stop anybody: byte order marks, lists of EOS, control tokens and emoji."""
    spoil(place)
    flags = ["--model", place.base, "--data", place.data, "--output-dir", place.out]
    assert lastmile.main(["mle", "--max-steps", "1", *map(str, flags)]) == 0
    shown = capsys.readouterr()
    assert said in shown.out + shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("rows", [lambda n: [[2]] * n, lambda n: [[9] * 12] * n], ids=["EOS at once", "never EOS"])
def test_rollouts_of_nothing(place, monkeypatch, rows):
    """Group 41: a policy that stops at once, or never, gives finite losses and right lengths, not a division by 0."""
    sampled = lambda llama, prompts, *_, **__: [(row, [-1.0] * len(row)) for row in rows(len(prompts))]  # noqa: E731
    monkeypatch.setattr(lastmile.model, "sample", sampled)
    flags = ["--model", place.base, "--data", place.data, "--reward", place.reward, "--output-dir", place.out]
    assert lastmile.main(["ppo", "--max-steps", "2", "--max-new-tokens", "12", *map(str, flags)]) == 0
    first = json.loads((place.out / "ppo/metrics.jsonl").read_text().split("\n")[0])
    assert first["length"] == len(rows(1)[0]) and first["no_eos"] == (rows(1)[0][-1] != 2)
    assert all(value == value for value in first.values() if isinstance(value, float))


def test_bleurt_that_cannot_be_had(place, capsys):
    """Group 43: the other metrics are not lost with it; the line says why, and what to name."""
    flags = ["--model", place.base, "--data", place.data, "--output-dir", place.out, "--test-examples", 2]
    assert lastmile.main(["eval", "--adapters", "base", "--bleurt", "/nowhere/at/all", *map(str, flags)]) == 0
    assert "name a checkpoint folder: --bleurt FOLDER" in capsys.readouterr().err
    assert json.loads((place.out / "eval/scores.json").read_text())["base"]["excess_length"] is not None
