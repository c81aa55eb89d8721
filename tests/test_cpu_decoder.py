"""The fast decoding step of a CPU against the plain one: the same logits and the same tokens."""

from functools import partial

import pytest
import torch

import data
import lastmile
import lora
import model
import quant
from speed import cpu_decoder

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def loaded(folder, dtype=torch.float32):
    llama = model.load(folder, dtype=dtype)
    llama.add_adapter("policy", 4, 8.0, TARGETS, torch.Generator().manual_seed(0))
    for _, layer in lora.lora_layers(llama):
        if "policy" in layer.lora_B:
            layer.lora_B["policy"].data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return llama


@pytest.fixture(scope="module")
def prompts(run_folder):
    tokenizer = data.load_tokenizer(run_folder / "base")
    return tokenizer.prompts([e.source for e in data.toy("test")[:5]])


def plain(monkeypatch):
    monkeypatch.setattr(cpu_decoder, "prepare", lambda *args: None)


@pytest.mark.parametrize("large", [1, 1 << 40], ids=["oneDNN's layout", "columns"])
@pytest.mark.parametrize("adapter", [None, "policy"])
@pytest.mark.parametrize("base", ["pretrain", "base"], ids=["dense", "4-bit"])
def test_logits_are_those_of_decode(run_folder, prompts, monkeypatch, base, adapter, large):
    """Folding the adapter in, joining matrices and another layout change a logit by rounding only, over a dense and a
    4-bit base with grouped heads, also when rows have ended and were dropped.
    """
    monkeypatch.setattr(cpu_decoder, "LARGE", large)
    llama = loaded(run_folder / base)
    with torch.inference_mode():
        caches = []
        for _ in range(2):
            cache, logits = model.prefill(llama, prompts, adapter, 20)
            caches.append(cache)
        fast = cpu_decoder.decoder(llama, adapter, caches[1])
        for i in range(12):
            token = logits.argmax(-1)
            if i == 6:
                keep = torch.tensor([True, False, True, True, False])
                token = token[keep]
                for cache in caches:
                    cache.keep(keep)
            logits = model.decode(llama, adapter, caches[0], token)
            assert torch.allclose(fast(token), logits, atol=1e-4, rtol=1e-5)
            assert torch.equal(caches[0].length, caches[1].length)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_those_of_decode(run_folder, prompts, monkeypatch, temperature):
    """The same tokens from the same random numbers, up to the cap."""
    llama = loaded(run_folder / "base")
    draw = partial(model.sample, llama, prompts, "policy", 40, temperature)
    fast = draw(generator=torch.Generator().manual_seed(0))
    assert llama.prepared is not None
    plain(monkeypatch)
    assert draw(generator=torch.Generator().manual_seed(0)) == fast


def test_an_update_is_seen(run_folder, prompts):
    """The prepared weights are kept while the adapter stays as it is, and made anew after an optimizer's step: PPO
    samples from the policy of this step, not of the last.
    """
    llama = loaded(run_folder / "base")
    model.sample(llama, prompts, "policy", 10, 0)
    first = llama.prepared
    model.sample(llama, prompts, "policy", 10, 0)
    assert llama.prepared is first
    parameters = llama.adapter_parameters("policy")
    for parameter in parameters:
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    lastmile.Optimizer(parameters, max_grad_norm=1.0).step(0.1)
    model.sample(llama, prompts, "policy", 10, 0)
    assert llama.prepared is not first


@pytest.mark.parametrize("base", ["pretrain", "base"], ids=["dense", "4-bit"])
@pytest.mark.parametrize("hardware", [False, True], ids=["fp32", "bf16"])
def test_a_bf16_base_is_decoded_no_less_exactly_than_by_decode(run_folder, prompts, monkeypatch, base, hardware):
    """Over a bf16 base the step is as near to the fp32 model's logits as bf16 is, with fp32 weights and, where the CPU
    multiplies bf16, with bf16 ones.
    """
    monkeypatch.setattr(cpu_decoder, "multiplies_bf16", lambda: hardware)
    llama = loaded(run_folder / base, torch.bfloat16)
    exact = loaded(run_folder / base)
    found = {}
    with torch.inference_mode():
        for name, one in (("bf16", llama), ("fp32", exact)):
            cache, _ = model.prefill(one, prompts, "policy", 20)
            step = cpu_decoder.decoder(one, "policy", cache)
            found[name] = step(torch.tensor([5, 6, 7, 8, 9]))
    assert found["bf16"].dtype == torch.float32
    assert (found["bf16"] - found["fp32"]).abs().max() < 0.05 * found["fp32"].abs().max()


def test_a_small_adapter_is_not_rounded_away(run_folder, monkeypatch):
    """An adapter whose changes are below a bf16 weight's last bit, as after PPO's first steps, moves products of bf16
    weights by what it should: over many products, whose sums are rounded to bf16, it moves them so far on average.
    Folded into the weights it would be rounded away, and move nothing.
    """
    monkeypatch.setattr(cpu_decoder, "multiplies_bf16", lambda: True)
    llama = loaded(run_folder / "pretrain", torch.bfloat16)
    attention = llama.model.layers[0].self_attn
    projections = attention.q_proj, attention.k_proj, attention.v_proj  # of which k_proj has none
    for layer in (attention.q_proj, attention.v_proj):
        layer.lora_B["policy"].data.mul_(1e-3)
    x = torch.randn(4096, llama.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with_it, without = [cpu_decoder.layers_of(llama, adapter, 4096)[0].qkv(x) for adapter in ("policy", None)]
    moved = (with_it - without).split([layer.base.out_features for layer in projections], dim=1)
    for layer, by in zip(projections, moved, strict=True):
        expected = layer.plus(torch.zeros_like(by), x, "policy")
        if layer is attention.k_proj:
            assert (by == 0).all() and (expected == 0).all()
        else:
            folded = layer.merged(layer.base.weight.float(), "policy").bfloat16()
            assert (folded == layer.base.weight).float().mean() > 0.9
            assert float((by * expected).sum().detach() / expected.detach().square().sum()) == pytest.approx(1, abs=0.1)


def test_a_4bit_base_is_not_dequantized_again(run_folder, prompts, monkeypatch):
    """Over a 4-bit base in bf16, sampling and training use one dense weight a layer. The sampler once asked for it in
    fp32: with each switch between the two, both made it again, 0.4 s and 440 MB with 135M parameters.
    """
    monkeypatch.setattr(cpu_decoder, "multiplies_bf16", lambda: True)
    llama = loaded(run_folder / "base", torch.bfloat16)
    llama(torch.tensor(prompts[:1]))
    calls = []
    monkeypatch.setattr(quant, "dequantize", calls.append)
    model.sample(llama, prompts, max_new_tokens=12)
    llama(torch.tensor(prompts[:1]))
    assert calls == []


@pytest.mark.parametrize("reason", ["two adapters", "size"])
def test_what_it_does_not_do_is_done_plainly(run_folder, monkeypatch, reason):
    """Where there is no fast step, there is None, and model.sample calls decode."""
    llama = loaded(run_folder / "base")
    adapter = "policy"
    if reason == "two adapters":
        adapter = (("policy", 3), ("policy", 2))
    if reason == "size":
        monkeypatch.setattr(cpu_decoder, "LARGEST", 1000)
    assert cpu_decoder.prepare(llama, adapter, 5) is None
