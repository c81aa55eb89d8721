"""What leaves the house as a model folder: every file says the same, and other tools stop where we stop."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data import train_bpe

import data
import lastmile
import model
from formats import llama_folder

PROMPT = "Anna: Shall we meet at six?"
EXTRA = {
    "chat_template.jinja": "{{ '<|im_start|>' }}{{ messages }}",
    "added_tokens.json": "{}",
    "merges.txt": "#version: 0.2",
    "README.md": "# a card",
    "LICENSE.txt": "a licence",
    "modeling.py": "raise SystemExit",
    "pytorch_model.bin": "weights",
    "metrics.jsonl": "{}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny ChatML model whose own EOS is another token than the prompt's end: config and generation_config say 0."""
    folder = train_bpe(tmp_path_factory.mktemp("base") / "model", "smollm2", [e.source for e in data.toy("test")])
    tokenizer = data.load_tokenizer(folder)
    config = model.LlamaConfig(tokenizer.vocab_size, 64, 128, 2, 4, 4, 16, eos_token_id=(0,))
    llama = model.initialize(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        llama.lm_head.weight[tokenizer.eos] *= 3  # so that answers end soon
    model.save(llama, folder)
    for name, content in EXTRA.items():
        (folder / name).write_text(content)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "do_sample": False}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory):
    """The base with a fresh adapter folded in."""
    run = tmp_path_factory.mktemp("run")
    llama = model.load(base)
    llama.add_adapter("mle", 4, 8.0, ["q_proj"], torch.Generator().manual_seed(0))
    llama.save_adapter("mle", run / "adapter", str(base))
    flags = ["--model", str(base), "--output-dir", str(run), "--adapter", str(run / "adapter")]
    assert lastmile.main(["merge", *flags]) == 0
    return run / "merge"


def test_transformers_stops_where_sample_stops(base, merged):
    """config.json said [0, 2], generation_config.json still 0: transformers and vLLM then ran on to their limit."""
    transformers = pytest.importorskip("transformers")
    tokenizer = data.load_tokenizer(merged)
    llama = model.load(merged)
    prompt = tokenizer.prompts([PROMPT])[0]
    ours = model.sample(llama, [prompt], None, 60, temperature=0)[0]
    assert ours[-1] == tokenizer.eos and len(ours) < 60  # it does end
    twin = transformers.AutoModelForCausalLM.from_pretrained(merged)
    theirs = twin.float().generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :]
    assert theirs.tolist() == ours


def test_every_file_names_the_same_eos(merged):
    """Each reader looks into another file: all must name the token that ended the training targets."""
    read = lambda name: json.loads((merged / name).read_text())  # noqa: E731
    assert read("config.json")["eos_token_id"] == read("generation_config.json")["eos_token_id"] == [0, 2]
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert read("generation_config.json")["do_sample"] is False  # what else it says stays


def test_companions_are_copied_by_rule(base, merged):
    """A chat template in its own file, added tokens and the licence must not be lost; weights and code are not copied,
    and the card is the merged model's own.
    """
    copied = {"chat_template.jinja", "added_tokens.json", "merges.txt", "LICENSE.txt", "README.md"}
    assert {name for name in EXTRA if (merged / name).exists()} == copied
    assert (merged / "README.md").read_text() != EXTRA["README.md"]
    assert (merged / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_what_fp16_cannot_represent_is_an_error(base, tmp_path, capsys, name):
    """A norm or a head beyond 65,504 became inf in the merged model, unchecked; bfloat16 has room for it."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    llama = model.load(folder)
    llama.add_adapter("mle", 4, 8.0, ["q_proj"], torch.Generator().manual_seed(0))
    llama.save_adapter("mle", tmp_path / "adapter", str(folder))
    flags = ["merge", "--model", folder, "--output-dir", tmp_path, "--adapter", tmp_path / "adapter"]
    assert lastmile.main([str(flag) for flag in flags]) == 2
    assert f"{name} has values beyond float16's 65504" in capsys.readouterr().err
    assert lastmile.main([*map(str, flags), "--dtype", "bfloat16"]) == 0
    merged = load_file(tmp_path / "merge" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in merged.values())


def test_large_models_are_split(base, merged, tmp_path, monkeypatch):
    """Above 5 GB, here 100 kB: shards and an index that transformers and we read as the same numbers."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(llama_folder, "SHARD", 100_000)
    llama = model.load(merged)
    model.save(llama, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 110_000 for file in files)
    again = model.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in llama.state_dict().items())
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(twin["model.norm.weight"].float(), llama.model.norm.weight.float())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in llama.state_dict().values())
