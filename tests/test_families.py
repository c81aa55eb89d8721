"""Qwen2.5 and Qwen3 on every path, against transformers and PEFT.

Their logits are compared in test_model.py, with a merged model's; gradients over 4 bits in test_lora.py.
"""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import damage_folder, dense_twin
from test_model import RAGGED, config_of, logits, theirs, tokens_of

import data
import lastmile
import lora
import model
import ppo
import quant
from formats import llama_folder
from speed import cpu_decoder, shared_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "qwen2": dict(family="Qwen2", num_key_value_heads=2),
    "qwen2, tied": dict(family="Qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": dict(family="Qwen3", num_key_value_heads=2, head_dim=24),
    "qwen3, tied": dict(family="Qwen3", num_key_value_heads=4, head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A random model as transformers writes it."""
    found = tmp_path_factory.mktemp("model")
    theirs(**MODELS[request.param], eos_token_id=2, initializer_range=0.2).save_pretrained(found)
    return found


def with_adapter(folder, name="policy", head=None, dtype=torch.float32):
    """The model with an adapter as after some training."""
    llama = model.load(folder, dtype=dtype)
    llama.add_adapter(name, 4, 8.0, TARGETS, torch.Generator().manual_seed(0), head)
    for _, layer in lora.lora_layers(llama):
        layer.lora_B[name].data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return llama


def opened(folder):
    """transformers' model of a folder, of the class that its config.json names."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generated(reference):
    """The greedy tokens of a model of transformers after each prompt."""
    found = []
    for prompt in RAGGED:
        row = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(row[0, len(prompt) :].tolist())
    return found


def sampled(llama, adapter=None):
    """Ours, by the CPU's fast decoder."""
    rows = model.sample(llama, RAGGED, adapter, 12, temperature=0)
    assert llama.prepared is not None
    return rows


def test_an_adapter_goes_to_peft_and_back(folder, tmp_path):
    """Over a model of transformers it gives the same tokens, and a loss the same gradients to 1e-5."""
    peft = pytest.importorskip("peft")
    llama = with_adapter(folder)
    llama.save_adapter("policy", tmp_path, str(folder))
    reference = peft.PeftModel.from_pretrained(opened(folder), tmp_path, is_trainable=True).eval()
    assert sampled(llama, "policy") == generated(reference)
    reference.save_pretrained(tmp_path / "again")
    again = model.load(folder)
    again.load_adapter("policy", tmp_path / "again")
    tokens = tokens_of(2, 24)
    found = logits(llama, tokens, "policy")
    assert torch.equal(logits(again, tokens, "policy"), found)
    F.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    reference(tokens, labels=tokens).loss.backward()
    expected = {key: p.grad for key, p in reference.named_parameters() if "lora_" in key}
    for path, parameter in lora.named_parameters(llama, "policy").items():
        gradient = expected[f"base_model.model.{path}.default.weight"]
        assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_shared_prompts_equal_single_rows(folder):
    """One pass over the prompt of four rows gives their loss and its gradients, to 1e-5."""
    llama = with_adapter(folder, "reward", "normal")
    rows = [data.Datum(str(i), "", "", RAGGED[2], response, i % 2) for i, response in enumerate(RAGGED)]
    batch = data.collate(rows)
    found = []
    for layout in (None, shared_prompts.lay_out(batch)):
        llama.zero_grad()
        loss = ppo.reward_loss(ppo.token_scores(llama, batch, layout), batch, "token")
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in llama.adapter_parameters("reward"))])
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fast_decoder_has_biases_and_head_norms(folder, monkeypatch, dtype):
    """Its logits are those of `decode`, also where products are of bf16 weights with the adapter beside them."""
    monkeypatch.setattr(cpu_decoder, "multiplies_bf16", lambda: True)
    llama = with_adapter(folder, dtype=dtype)
    exact = with_adapter(folder)
    with torch.inference_mode():
        cache, _ = model.prefill(exact, RAGGED, "policy", 4)
        expected = model.decode(exact, "policy", cache, torch.tensor([5, 6, 7, 8]))
        cache, _ = model.prefill(llama, RAGGED, "policy", 4)
        step = cpu_decoder.decoder(llama, "policy", cache)
        found = step(torch.tensor([5, 6, 7, 8]))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (found - expected).norm() < tolerance * expected.norm()


def test_quantized_it_is_still_of_its_family(folder, tmp_path):
    """The 4-bit folder's config.json makes transformers' model of the family, over whose dense form it gives the same
    tokens; all its biases and norms are there.
    """
    transformers = pytest.importorskip("transformers")
    llama = model.load(folder)
    said = model.quantize(llama, [row.tolist() for row in tokens_of(4, 16)], quant.Recipe(16))
    model.save(llama, tmp_path, said)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {name.replace(".base.", "."): tensor for name, tensor in dense_twin(tmp_path).state_dict().items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    reference.load_state_dict(state, strict=True)
    assert sampled(model.load(tmp_path)) == generated(reference)


@pytest.mark.parametrize(
    "family",
    [dict(model_type="qwen2", biases=llama_folder.QKV), dict(model_type="qwen3", head_norm=True)],
    ids=["qwen2", "qwen3"],
)
def test_whole_models_are_of_their_family(run_folder, tmp_path, family):
    """--tune full writes folders that transformers opens as what they are: a Qwen, and a classifier over one. A dry run
    counts biases and norms.
    """
    transformers = pytest.importorskip("transformers")
    config = model.LlamaConfig(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, head_dim=8, **family)  # fmt: skip
    (tmp_path / "base").mkdir()
    model.save(model.initialize(config, torch.Generator().manual_seed(0)), tmp_path / "base")
    shutil.copyfile(run_folder / "base/tokenizer.model", tmp_path / "base/tokenizer.model")
    (tmp_path / "base/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')  # not a Qwen's
    flags = ["--model", f"{tmp_path}/base", "--output-dir", f"{tmp_path}/run", "--template", "plain", "--tune", "full"]
    flags += ["--train-examples", "14", "--max-steps", "2"]
    assert lastmile.main(["mle", *flags, "--dry-run"]) == 0
    for stage, kind, few in (
        ("mle", "ForCausalLM", []),
        ("reward", "ForSequenceClassification", ["--eval-examples", "4"]),
    ):
        assert lastmile.main([stage, *flags, *few]) == 0
        said = json.loads((tmp_path / "run" / stage / "config.json").read_text())
        assert said["architectures"] == [family["model_type"].title() + kind]
        found, loading = getattr(transformers, said["architectures"][0]).from_pretrained(
            tmp_path / "run" / stage, output_loading_info=True
        )
        assert not any(loading.values())
    llama, tokens = model.load(tmp_path / "run/mle"), tokens_of(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(logits(llama, tokens), opened(tmp_path / "run/mle")(tokens).logits)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

QWEN2 = dict(model_type="qwen2")
REFUSED = {  # what config.json says: the message
    "Qwen3-30B-A3B": (dict(model_type="qwen3_moe"), "model_type 'qwen3_moe' is not supported; a mixture of experts"),
    "Qwen1.5-MoE": (dict(model_type="qwen2_moe"), "take a dense model such as Qwen/Qwen3-0.6B"),
    "Qwen2-VL": (dict(model_type="qwen2_vl"), "no model of text alone; take one such as Qwen/Qwen2.5-0.5B-Instruct"),
    "another": (dict(model_type="gemma3"), "lastmile reads llama, mistral, qwen2, qwen3, seed_oss"),
    "a window": (QWEN2 | dict(use_sliding_window=True, max_window_layers=1), "sliding_window 4096 is not supported"),
    "a window by layers": (
        QWEN2 | dict(layer_types=["full_attention", "sliding_attention"]), "layer_types ['full_attention', 'sliding_"
    ),
    "layers of text": (QWEN2 | dict(use_sliding_window=True, max_window_layers="1"), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    """Field, file and what to take instead: computed as a Llama, it would be nonsense."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        config_of(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    "changes",
    [
        dict(sliding_window=32768, use_sliding_window=False, max_window_layers=1),
        dict(use_sliding_window=True, max_window_layers=2),
        dict(layer_types=["full_attention"] * 2, sliding_window=None),
        dict(),
    ],
    ids=str,
)
def test_windows_that_no_layer_uses(tmp_path, changes):
    """Published Qwen2.5 name a window that is not in use."""
    config = config_of(tmp_path, model_type="qwen2", num_key_value_heads=4, **changes)
    assert config.biases == ("q_proj", "k_proj", "v_proj") and not config.head_norm


@pytest.mark.parametrize("family, name", [("Qwen2", "k_proj.bias"), ("Qwen3", "k_norm.weight")])
def test_missing_biases_and_norms_are_named(tmp_path, family, name):
    """A Llama labelled Qwen, or a Qwen whose converter dropped them: what is missing, and which field promises it."""
    theirs(family, num_key_value_heads=2).save_pretrained(tmp_path)
    name = f"model.layers.1.self_attn.{name}"
    damage_folder(tmp_path, lambda config, tensors: tensors.pop(name))
    message = f": tensor {name} is missing, and the config.json of a {family.lower()} promises it (model_type)"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}{message}")):
        model.load(tmp_path)


@pytest.mark.parametrize("own", [True, False], ids=["its own", "the embeddings"])
def test_a_head_that_config_calls_tied(tmp_path, capsys, own):
    """Where the file has another head than the embeddings, that one is used and a line says so; it was dropped without
    a word, and the model wrote nonsense. A copy of the embeddings is no reason for a line.
    """
    reference, tokens = theirs(num_key_value_heads=2), tokens_of(2, 12)
    if not own:
        reference.lm_head.weight.data.copy_(reference.model.embed_tokens.weight.data)
    reference.save_pretrained(tmp_path)
    damage_folder(tmp_path, lambda config, tensors: config.update(tie_word_embeddings=True))
    llama = model.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(llama, tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)
    assert ("the model's own head is used" in capsys.readouterr().err) == own
    assert llama.config.tie_word_embeddings != own
