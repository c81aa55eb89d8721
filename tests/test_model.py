"""The Llama against transformers, its sampler against the uncached forward pass, and strict loading."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import damage_folder, packed_folder
from safetensors.torch import load_file, save_file

import model
from formats import llama_folder
from interface import folders
from interface.use import merge_adapter
from speed import cpu as cpu_speed

RAGGED = [[1], [5, 6, 7, 8], [3, 9] * 5, [4, 11]]
SHAPES = {
    "plain": dict(),
    "grouped": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(num_key_value_heads=2, head_dim=24),  # 4 x 24 is not the width
    "odd constants": dict(rope_theta=500.0, rms_norm_eps=0.1),
}
BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def tokens_of(B, T, seed=0, V=64):
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def theirs(family="Llama", **shape):
    """A random Llama of transformers, its weights large enough that the logits differ by more than a tolerance."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE | {"initializer_range": 0.3} | shape)
    found = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 1:  # norms and biases: all ones, all zeros would hide one that is left out
                parameter.uniform_(0.5, 1.5)
    return found


def ours(seed=0, **shape):
    """A random Llama of our own, in memory."""
    shape = BASE | dict(num_key_value_heads=2, head_dim=8) | shape
    return model.initialize(model.LlamaConfig(**shape), torch.Generator().manual_seed(seed)).requires_grad_(False)


def logits(llama, tokens, adapter=None):
    return llama.logits(llama(tokens, adapter))


def greedy(llama, prompt, max_new_tokens, adapter=None):
    """Greedy decoding as slow and plain as it gets: one row, no cache, no padding."""
    row = list(prompt)
    while len(row) < len(prompt) + max_new_tokens:
        row.append(logits(llama, torch.tensor([row]), adapter)[0, -1].argmax().item())
        if row[-1] in llama.config.eos_token_id:
            break
    return row[len(prompt) :]


# ----------------------------------------------------------------------------------------------------------------------
# The forward pass


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(tmp_path, shape, shard):
    """The reference implementation's folder loads and gives its logits: rope layout, head sharing, norms and tying are
    all of the kind that loads in silence and computes nonsense.
    """
    reference, tokens = theirs(**shape), tokens_of(2, 12)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(model.load(tmp_path), tokens), expected, rtol=1e-4, atol=1e-4)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
FAMILIES = {
    "Llama-2": dict(),
    "TinyLlama": dict(hidden_size=64, head_dim=16, num_key_value_heads=2),
    "Mistral": dict(family="Mistral", num_key_value_heads=2, rope_theta=1e6, sliding_window=None),
    "Llama-3.x": dict(
        num_key_value_heads=2, rope_theta=5e5, tie_word_embeddings=True, eos_token_id=[7, 8, 9], head_dim=16,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64},  # of 8 frequencies 1 stays, 1 is mixed, 6 slow
    ),
    "SmolLM2": dict(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5, tie_word_embeddings=True
    ),
    "attention bias": dict(attention_bias=True, num_key_value_heads=2),
    "MLP bias": dict(mlp_bias=True),
    "Qwen2.5": dict(family="Qwen2", num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-6),
    "Qwen2.5, tied": dict(family="Qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "Qwen3": dict(family="Qwen3", num_key_value_heads=2, head_dim=24, rope_theta=1e6),
    "Qwen3, tied": dict(family="Qwen3", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    "Qwen3, biases": dict(family="Qwen3", num_key_value_heads=4, head_dim=8, attention_bias=True),
    "Seed-OSS": dict(family="SeedOss", num_key_value_heads=2, head_dim=16),
    "Seed-OSS, all biases": dict(
        family="SeedOss", num_key_value_heads=4, head_dim=8, attention_out_bias=True, mlp_bias=True
    ),
}  # fmt: skip


def old_spelling(raw):
    """config.json as transformers up to 4.55 wrote it."""
    raw["torch_dtype"] = raw.pop("dtype")


def new_spelling(raw):
    """config.json as transformers 5 writes it: no rope_theta and no rope_scaling."""
    scaling = raw.pop("rope_scaling", None) or {"rope_type": "default"}
    raw["rope_parameters"] = scaling | {"rope_theta": raw.pop("rope_theta")}


@pytest.mark.parametrize("spell", [old_spelling, new_spelling])
@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES.keys())
def test_families_equal_transformers(tmp_path, shape, spell):
    """Every family that shares the forward pass, in both spellings of its config: a field overlooked, rope_parameters
    above all, takes a default in silence. 48 positions, at which each kind of rope differs from the others.
    """
    reference, tokens = theirs(**shape), tokens_of(2, 48)
    reference.save_pretrained(tmp_path)
    damage_folder(tmp_path, lambda config, tensors: spell(config))
    llama = model.load(tmp_path)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(llama, tokens), expected, rtol=1e-4, atol=1e-4)
    eos = shape.get("eos_token_id", 2)
    assert llama.config.eos_token_id == (tuple(eos) if isinstance(eos, list) else (eos,))
    if llama.config.rope_scaling or llama.config.rope_theta != 10000:  # would the test notice their absence?
        llama.config = model.LlamaConfig(**asdict(llama.config) | {"rope_scaling": {}, "rope_theta": 10000.0})
        assert (logits(llama, tokens) - expected).abs().max() > 0.1
    if "rope_scaling" in shape:
        llama.config = model.LlamaConfig(**asdict(llama.config) | {"rope_theta": shape["rope_theta"]})
        assert (logits(llama, tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("factor, D", [(8.0, 128), (32.0, 64)], ids=["3.1", "3.2"])
def test_llama_3_frequencies(factor, D):
    """The constants of the real checkpoints, against the function of transformers: three regimes of frequencies."""
    transformers = pytest.importorskip("transformers")
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    shape = dict(head_dim=D, rope_theta=5e5, max_position_embeddings=131072)
    config = transformers.LlamaConfig(**BASE | shape, rope_scaling=scaling)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = model.rope_frequency(ours(rope_scaling=scaling, **shape).config, "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = model.rope_frequency(ours(**shape).config, "cpu")
    assert (found == plain).any() and (found < plain).any()


@pytest.mark.parametrize("name", ["gq_10", "hfq_01_gptq", "hfq_11_gptq_v2"])
def test_gptq_fixtures(shared, name):
    """Checkpoints that other tools wrote, of both versions and with act-order, give the logits recorded beside them."""
    folder = shared / "fixtures" / name
    expected = load_file(folder / "expected.safetensors")
    found = logits(model.load(folder), expected["tokens"])
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)


def test_padding_is_never_seen():
    """Other ids in the padded columns change no real column by a single bit, so batches need no attention mask."""
    llama, tokens = ours(), tokens_of(3, 12)
    real = torch.arange(12) < torch.tensor([[1], [7], [12]])  # (B, T)
    garbage = torch.where(real, tokens, tokens_of(3, 12, seed=1))
    assert not torch.equal(tokens, garbage)
    assert torch.equal(llama(tokens)[real], llama(garbage)[real])


def test_padded_row_equals_the_row_alone():
    """Neither the padding nor the other rows of a batch take part in a row's result."""
    llama, tokens = ours(), tokens_of(3, 12)
    together = llama(tokens)
    for b, length in enumerate((1, 7, 12)):
        alone = llama(tokens[b : b + 1, :length])[0]
        torch.testing.assert_close(together[b, :length], alone, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("prompts", [RAGGED, [[1]], [[1], [5]], [[7, 7, 7]]], ids=["ragged", "1", "1 and 1", "3"])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_cached_equals_uncached_greedy(heads, prompts):
    """Each row of a ragged batch continues as it does alone and without a cache. Prompts of one token are a trap: their
    prefill looks like a decoding step.
    """
    llama = ours(num_key_value_heads=heads)
    expected = [greedy(llama, prompt, 12) for prompt in prompts]
    assert model.sample(llama, prompts, max_new_tokens=12, temperature=0) == expected
    assert len({token for row in expected for token in row}) > 3  # not one token over and over


def test_one_new_token_attends_as_many_do():
    """The two products that decoding uses are attention: over its own past only, query heads sharing a key head."""
    B, H, J, S, D = 3, 6, 2, 9, 8
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, J, S, D), torch.randn(B, J, S, D)
    length = torch.tensor([0, 4, 8])
    y = model.attend_last(q, k, v, length)
    for b, n in enumerate(length.tolist()):
        seen = k[b : b + 1, :, : n + 1], v[b : b + 1, :, : n + 1]
        expected = torch.nn.functional.scaled_dot_product_attention(q[b : b + 1], *seen, enable_gqa=True)
        torch.testing.assert_close(y[b : b + 1], expected)


def test_a_scalar_head_is_fp32_whatever_its_file():
    """A whole model saved in bf16 has its head in bf16, too: rewards are computed in fp32."""
    llama = ours()
    llama.take_head("reward", "a folder", torch.ones(1, llama.config.hidden_size, dtype=torch.bfloat16), head=True)
    states = torch.ones(2, llama.config.hidden_size, dtype=torch.bfloat16)
    assert llama.scalar(states, "reward").tolist() == [llama.config.hidden_size] * 2


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torch_s_and_by_mkl(monkeypatch, heads, masked):
    """A CPU's attention and its gradients are those of F.scaled_dot_product_attention, to the last bit where the same
    library multiplies; in both directions it is MKL, whatever the products around it use.
    """
    B, H, T, D = 3, 6, 20, 16
    q, k, v = (torch.randn(B, n, T, D).requires_grad_() for n in (H, heads, heads))
    mask = torch.full((B, 1, T, T), -torch.inf).triu(1) if masked else None
    matmul = torch.backends.mkldnn.matmul
    chosen = matmul.fp32_precision
    used, ops = [], torch.ops.aten
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        kernel = getattr(ops, name)
        spy = lambda *a, kernel=kernel, **k: used.append(matmul.fp32_precision) or kernel(*a, **k)  # noqa: E731
        monkeypatch.setattr(ops, name, spy)
    try:
        matmul.fp32_precision = "bf16"
        y = model.attend(q, k, v, mask)
        ours = y, *torch.autograd.grad(y.sin().sum(), (q, k, v))
        assert used == ["none", "none"] and matmul.fp32_precision == "bf16"
        matmul.fp32_precision = "none"
        how = {"is_causal": not masked, "attn_mask": mask, "enable_gqa": True}
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, **how)
        theirs = y, *torch.autograd.grad(y.sin().sum(), (q, k, v))
    finally:
        matmul.fp32_precision = chosen
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_large_blocks_come_in_large_pages():
    """A CPU step takes and frees gigabytes; in pages of 4 KB up to a third of its time is the kernel's. Counted in page
    faults, in a process of its own, as torch reads the switch once.
    """
    code = """
import lastmile, resource
lastmile.torch.ones(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    lastmile.torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for pages, more in (("small", {"THP_MEM_ALLOC_ENABLE": "0"}), ("ours", {})):
        place = dict(cwd=folders.ROOT, env=environment | more)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **place)
        faults[pages] = int(run.stdout)
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.is_file() or "[never]" in mode.read_text() or faults["small"] < 1e5:
        pytest.skip("this kernel has no large pages to give, or no small ones")
    assert faults["ours"] < faults["small"] / 10, faults


def test_onednn_only_where_it_is_exact(monkeypatch):
    """The switch that makes CPU products faster may round to bf16 on some CPUs: there it must be taken back, or every
    number would silently lose two thirds of its digits.
    """
    matmul = torch.backends.mkldnn.matmul
    try:
        matmul.fp32_precision = "none"
        taken = cpu_speed.prefer_onednn()
        assert matmul.fp32_precision == ("bf16" if taken else "none")
        x = torch.randn(300, 500)
        exact = x.double() @ x.T.double()
        assert (x @ x.T - exact).norm() < 1e-6 * exact.norm()
        plain = torch.Tensor.__matmul__

        def rounded(x, W):
            return plain(x.bfloat16(), W.bfloat16()).float() if x.dtype == torch.float32 else plain(x, W)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", rounded)
            assert not cpu_speed.prefer_onednn() and matmul.fp32_precision == "none"
    finally:
        matmul.fp32_precision = "none"


def test_cached_equals_uncached_under_an_adapter():
    """Prefill and decoding both pass the adapter on: PPO would else sample from one policy and train another."""
    llama = ours()
    llama.add_adapter("policy", 4, 8.0, ["q_proj", "v_proj", "down_proj"], torch.Generator().manual_seed(0))
    for parameter in llama.adapter_parameters("policy"):
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    expected = [greedy(llama, prompt, 12, "policy") for prompt in RAGGED]
    assert model.sample(llama, RAGGED, "policy", 12, temperature=0) == expected
    assert expected != [greedy(llama, prompt, 12) for prompt in RAGGED]


def test_the_seed_decides():
    """The same generator state gives the same tokens, another one others: a run can be repeated, and still explores."""
    llama = ours()
    first, same, other = (model.sample(llama, RAGGED, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("cut", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_the_sharpest_cuts_are_greedy(cut):
    """One token of the top, a nucleus of no mass, and a temperature near 0 all leave the most likely token only."""
    llama = ours()
    expected = model.sample(llama, RAGGED, max_new_tokens=12, temperature=0)
    assert model.sample(llama, RAGGED, max_new_tokens=12, generator=torch.Generator().manual_seed(0), **cut) == expected


@pytest.mark.parametrize(
    "temperature, top_k, top_p, kept",
    [(1.0, 0, 1.0, 6), (0.5, 0, 1.0, 6), (1.0, 3, 1.0, 3), (1.0, 0, 0.8, 3)],
    ids=["plain", "cold", "top 3", "nucleus 0.8"],
)
def test_tokens_are_drawn_at_their_probabilities(temperature, top_k, top_p, kept):
    """Frequencies over 20,000 draws fit the softmax, of the kept tokens where some are cut (chi-square, 1 in 1000).
    PPO takes the probabilities at their word, so a biased sampler would be a biased gradient.
    """
    p = torch.tensor([0.05, 0.4, 0.03, 0.3, 0.2, 0.02])
    u = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
    drawn = model.draw(model.shape(p.log().expand(20000, 6), temperature, top_k, top_p), u)
    expected = p ** (1 / temperature)
    expected[p.argsort(descending=True)[kept:]] = 0
    expected *= 20000 / expected.sum()
    count = drawn.bincount(minlength=6)
    assert (count[expected == 0] == 0).all()
    chi_square = ((count - expected).square() / expected)[expected > 0].sum()
    assert chi_square < {6: 20.5, 3: 13.8}[kept]  # 5 and 2 degrees of freedom


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_distribution(u, token):
    """The least and the greatest number that torch.rand can draw pick the first and the last token of those kept, not
    a neighbour of probability 0.
    """
    logits = torch.tensor([[-9.0, 1, 0, 1, -9]])
    assert model.draw(model.shape(logits, 1.0, 2, 1.0), torch.full((1, 1), u)).tolist() == [token]


def test_rows_end_with_eos_or_at_the_cap():
    """EOS is kept, for it is an action with a reward, and nothing comes after it; the rest stop at the cap."""
    llama = ours(eos_token_id=tuple(range(10)))
    rows = model.sample(llama, RAGGED * 8, max_new_tokens=9, generator=torch.Generator().manual_seed(0))
    ended = [row for row in rows if row[-1] < 10]
    assert all(token >= 10 for row in rows for token in row[:-1])
    assert all(len(row) == 9 for row in rows if row[-1] >= 10)
    assert len(rows) == 32 and 0 < len(ended) < 32 and min(map(len, rows)) < 9


def test_ended_rows_leave_the_batch(monkeypatch):
    """Rows that have ended cost no further work, and their leaving changes nobody's luck: each row's tokens are those
    of a plain loop over that row alone, with the same uniform numbers.
    """
    llama, prompts, left = ours(eos_token_id=tuple(range(12))), RAGGED * 3, []
    keep = model.KVCache.keep
    monkeypatch.setattr(model.KVCache, "keep", lambda cache, rows: left.append(len(rows)) or keep(cache, rows))
    rows = model.sample(llama, prompts, max_new_tokens=30, generator=torch.Generator().manual_seed(5))
    assert len(left) > 1 and left[0] == len(prompts) and left[-1] <= len(prompts) // 2
    generator = torch.Generator().manual_seed(5)
    luck = torch.stack([torch.rand(len(prompts), 1, generator=generator) for _ in range(30)])  # (step, B, 1)
    for b, prompt in enumerate(prompts):
        alone = []
        while len(alone) < 30 and not (alone and alone[-1] < 12):
            last = logits(llama, torch.tensor([[*prompt, *alone]]))[:, -1]
            alone.append(model.draw(last, luck[len(alone), b : b + 1]).item())
        assert rows[b] == alone


def test_sampling_stops_when_all_rows_have_ended(monkeypatch):
    """The model is called once a token of the longest row and no more: the rest of the cap would be wasted work."""
    monkeypatch.setattr(model.cpu_decoder, "prepare", lambda *_: None)  # its calls cannot be counted
    llama, calls = ours(eos_token_id=tuple(range(32))), []
    llama.model.norm.register_forward_hook(lambda *_: calls.append(1))
    rows = model.sample(llama, RAGGED, max_new_tokens=50, generator=torch.Generator().manual_seed(0))
    assert len(calls) == max(map(len, rows)) < 50


# ----------------------------------------------------------------------------------------------------------------------
# config.json

PLAIN = BASE | dict(model_type="llama", num_key_value_heads=2, rms_norm_eps=1e-5)


def config_of(folder, generation=None, **changes):
    """read_config of a folder with these fields; a field of ... is left out."""
    raw = {name: value for name, value in (PLAIN | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return model.LlamaConfig(**llama_folder.read_config(folder))


def test_what_a_silent_config_means(tmp_path):
    """Where a file is silent, transformers' defaults count, and they differ from family to family."""
    config = config_of(tmp_path, num_key_value_heads=..., rms_norm_eps=...)
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (4, 8, 1e-6)
    assert (config.rope_theta, config.eos_token_id, config.tie_word_embeddings) == (10000, (2,), False)
    assert config_of(tmp_path, num_key_value_heads=None, head_dim=None) == config_of(tmp_path, num_key_value_heads=4)
    mistral = dict(model_type="mistral", sliding_window=None, num_attention_heads=16)
    assert config_of(tmp_path, **mistral, num_key_value_heads=...).num_key_value_heads == 8
    assert config_of(tmp_path, **mistral, num_key_value_heads=None).num_key_value_heads == 16


@pytest.mark.parametrize(
    "config, generation, eos",
    [
        (2, None, (2,)),
        (..., None, (2,)),
        ([7, 8], None, (7, 8)),
        (2, {}, (2,)),
        (2, {"eos_token_id": 2}, (2,)),
        (2, {"eos_token_id": [2, 7, 8]}, (2, 7, 8)),
        ([7, 8], {"eos_token_id": 9}, (7, 8, 9)),
        (None, {"eos_token_id": 9}, (9,)),
        (5, {"eos_token_id": None}, (5,)),
    ],
    ids=str,
)
def test_every_eos_ends_an_output(tmp_path, config, generation, eos):
    """Llama-3 instruct ends with <|eot_id|>, which only generation_config.json names: overlooked, no answer ends."""
    assert config_of(tmp_path, generation, eos_token_id=config).eos_token_id == eos


YARN, LINEAR = {"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2.0}
MISTRAL = dict(model_type="mistral")
REFUSED = {  # what config.json says: the message
    **{f"model_type {name!r}": (dict(model_type=name), f"model_type {name!r} is not supported")
       for name in ("gpt2", "olmo", "gemma", "", None, ["llama"], 7)},
    "no model_type": (dict(model_type=...), "model_type None is not supported"),
    "Mistral-7B-v0.1": (MISTRAL | dict(sliding_window=4096), "sliding_window 4096"),
    "a Mistral that does not say": (MISTRAL, "sliding_window 4096"),
    "two rope_theta": (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta 10000.0, but rope_para"),
    "yarn": (dict(rope_scaling=YARN), "rope type 'yarn'"),
    "yarn of transformers 5": (dict(rope_parameters=YARN | {"rope_theta": 1e4}), "rope type 'yarn'"),
    "linear": (dict(rope_scaling=LINEAR), "rope type 'linear'"),
    "dynamic": (dict(rope_scaling=LINEAR | {"type": "dynamic"}), "rope type 'dynamic'"),
    "longrope": (dict(rope_scaling={"type": "longrope", "long_factor": [1.0]}), "rope type 'longrope'"),
    "half of llama3": (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    "llama3 of factor 0": (dict(rope_scaling=LLAMA3 | {"factor": 0}), "factor is 0"),
    "rope_scaling of text": (dict(rope_scaling="llama3"), "malformed"),
    "gelu": (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    **{f"{name} {value!r}": ({name: value}, f"{name} is {value!r}")
       for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
       for value in (0, -8, "8", True)},
    "half a head": (dict(num_key_value_heads=0.5), "num_key_value_heads is 0.5, expected a whole number"),
    "2^70 words": (dict(vocab_size=2**70), "vocab_size is 1180591620717411303424"),
    "endless": (dict(rope_theta=float("inf")), "rope_theta is inf"),
    "no number": (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "null width": (dict(hidden_size=None), "malformed"),
    "more heads than width": (dict(num_attention_heads=64), "head_dim 0"),
    "odd heads": (dict(head_dim=7), "head_dim 7"),
    "heads that do not divide": (dict(num_key_value_heads=3), "num_key_value_heads 3"),
    "no eos": (dict(eos_token_id=None), "eos_token_id [] is no token"),
    "eos of text": (dict(eos_token_id="</s>"), "eos_token_id ['</s>'] is no token"),
    "empty eos": (dict(eos_token_id=[]), "eos_token_id [] is no token"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_configs_that_need_other_maths_are_refused(tmp_path, changes, message):
    """What is not computed is named, and so is what cannot be: never a default in its place, never a traceback."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        config_of(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_eos_null_everywhere_is_refused(tmp_path):
    """Without an end every sample runs to the cap, and PPO learns from cut texts."""
    with pytest.raises(ValueError, match="is no token; set it to the id"):
        config_of(tmp_path, {"eos_token_id": None}, eos_token_id=None)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100000, "\xff"], ids=lambda text: repr(text[:3]))
def test_configs_that_are_no_object(tmp_path, text):
    """An empty, torn or foreign file is named."""
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="download the file again") as error:
        model.LlamaConfig(**llama_folder.read_config(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_byte_order_mark(tmp_path):
    """Some editors on Windows put one before the first brace."""
    (tmp_path / "config.json").write_text(json.dumps(PLAIN), encoding="utf-8-sig")
    assert model.LlamaConfig(**llama_folder.read_config(tmp_path)).num_key_value_heads == 2


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load_are_inverse(tmp_path):
    """Config and weights come back as they were; a config.json that lost a field would change the next load's maths."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    llama = ours(rope_theta=500.0, rms_norm_eps=0.1, eos_token_id=(2, 5), rope_scaling=scaling, biases=llama_folder.MLP)
    model.save(llama, tmp_path)
    again = model.load(tmp_path)
    assert type(again.config.rope_scaling["original_max_position_embeddings"]) is int  # else transformers warns
    assert again.config == llama.config and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters(), strict=True))


def test_what_is_saved_opens_in_transformers(tmp_path):
    """Our files are Hugging Face's: other tools can read a base that was pretrained here."""
    transformers = pytest.importorskip("transformers")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    shape = dict(head_dim=24, rope_theta=500.0, rope_scaling=scaling, tie_word_embeddings=True)
    llama = ours(**shape, biases=llama_folder.ATTENTION)
    tokens = tokens_of(2, 48)
    model.save(llama, tmp_path)
    with torch.no_grad():
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits
    torch.testing.assert_close(found, logits(llama, tokens), rtol=1e-4, atol=1e-4)


def test_dtype_is_the_callers(tmp_path):
    """All floats become the dtype that was asked for, whatever the file holds; logits stay fp32 for the losses."""
    model.save(ours(), tmp_path)
    llama = model.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    h = llama(tokens_of(1, 4))
    assert h.dtype == torch.bfloat16 and llama.logits(h).dtype == torch.float32


def test_redundant_tensors_are_passed_over(tmp_path):
    """Old checkpoints carry rotary frequencies and a copy of a tied head: both known and no reason to refuse."""
    llama, tokens = ours(tie_word_embeddings=True), tokens_of(2, 12)
    model.save(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(logits(model.load(tmp_path), tokens), logits(llama, tokens))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGE = {  # what is wrong with a folder's (config, tensors): how to make it so, what the message must say
    "missing tensor": (lambda c, t: t.pop(UP), f"{UP} is missing"),
    "extra tensor": (lambda c, t: t.update({"model.layers.2.x": torch.ones(2)}), "model.layers.2.x is not part"),
    "other shape": (lambda c, t: t.update({NORM: torch.ones(31)}), f"{NORM} is of shape (31,), expected (32,)"),
    "whole numbers": (lambda c, t: t.update({NORM: torch.ones(32).int()}), f"{NORM} is of type torch.int32"),
    "64-bit floats": (lambda c, t: t.update({NORM: torch.ones(32).double()}), f"{NORM} is of type torch.float64"),
    "8-bit floats": (
        lambda c, t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} is of type torch.float8_e4m3fn"
    ),
    "bias": (lambda c, t: t.update({UP.replace("weight", "bias"): torch.ones(48)}), "up_proj.bias is not part"),
    "no bias": (lambda c, t: c.update(attention_bias=True), "self_attn.k_proj.bias is missing"),
    "4 bits without a word": (lambda c, t: t.update({UP.replace("weight", "qweight"): torch.ones(4, 48)}), "qweight"),
    "untied without a head": (lambda c, t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "fewer layers": (lambda c, t: c.update(num_hidden_layers=1), "model.layers.1.input_layernorm.weight is not part"),
    "more layers": (lambda c, t: c.update(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "10^9 layers": (lambda c, t: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected"),
    "other vocabulary": (lambda c, t: c.update(vocab_size=65), "lm_head.weight is of shape (64, 32), expected"),
    "other family": (lambda c, t: c.update(model_type="gemma"), "'gemma'"),
    "no width": (lambda c, t: c.pop("hidden_size"), "hidden_size"),
    "bitsandbytes": (lambda c, t: c.update(quantization_config={"load_in_4bit": True}), "bitsandbytes"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_folders_that_do_not_fit_are_refused(tmp_path, damage, message):
    """A model that loads in part, or that needs maths we do not have, would run and be wrong. The message names the
    folder and the cause, and a dry run says the same.
    """
    model.save(ours(), tmp_path)
    damage_folder(tmp_path, damage)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_absent_files_are_named(tmp_path):
    """No folder, no config, no weights, or pickles only, which are never opened: each says what is missing."""
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        model.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        model.load(tmp_path)
    model.save(ours(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors among config.json, pytorch_model.bin"):
        model.load(tmp_path)


def split(folder, name="model"):
    """Two shards and an index in place of model.safetensors. Returns the index's path and its content."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: files[key > "model.layers.1"] for key in tensors}
    for file in files:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, weight_map


def lone(folder, name):
    (folder / "model.safetensors").rename(folder / name)


def beside(folder, name):
    save_file({"x": torch.ones(1)}, folder / name)


LAYOUTS = {
    "older AutoGPTQ": lambda folder: lone(folder, "gptq_model-4bit-128g.safetensors"),
    "older AutoGPTQ's shards": lambda folder: split(folder, "gptq_model-4bit-128g"),
    "shards": split,
    "a shard without an index": lambda folder: lone(folder, "model-00001-of-00001.safetensors"),
    "Meta's files beside": lambda folder: (split(folder), beside(folder, "consolidated.safetensors")),
    "Meta's index beside": lambda folder: (
        split(folder), (folder / "consolidated.safetensors.index.json").write_text("{}")
    ),
    "an adapter beside": lambda folder: (
        beside(folder, "adapter_model.safetensors"), (folder / "adapter_config.json").write_text("{}")
    ),
    "an adapter beside an odd name": lambda folder: (
        lone(folder, "x.safetensors"), beside(folder, "adapter_model.safetensors")
    ),
    "an adapter beside shards": lambda folder: (split(folder), beside(folder, "adapter_model.safetensors")),
    "pickles beside": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80"),
}  # fmt: skip


@pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_files_are_found_however_they_are_called(tmp_path, arrange):
    """The names of older quantizers, shards, and what else lies in a folder: adapters and Meta's files are no part."""
    llama, tokens = ours(), tokens_of(2, 12)
    model.save(llama, tmp_path)
    arrange(tmp_path)
    assert torch.equal(logits(model.load(tmp_path), tokens), logits(llama, tokens))


def reindex(change):
    """Damage that changes the index of two shards: a function of weight_map and of a tensor's name in the second."""

    def damage(folder):
        index, weight_map = split(folder)
        index.write_text(json.dumps({"weight_map": change(weight_map, UP)}))

    return damage


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {  # how to damage shards: the message
    **{f"{shard!r}": (reindex(lambda m, name, shard=shard: m | {name: shard}), "is not the name of a safetensors file")
       for shard in ("../x.safetensors", "/x.safetensors", "a\\b.safetensors", "C:\\x.safetensors", "a/b.safetensors",
                     "pytorch_model.bin", "", "x.safetensors\n", 3, None, [FIRST], {})},
    "absent shard": (lambda f: (split(f), (f / SECOND).unlink()), f"shard {SECOND} named in"),
    "unknown shard": (reindex(lambda m, name: m | {name: "x.safetensors"}), "shard x.safetensors named in"),
    "wrong shard": (reindex(lambda m, name: m | {name: FIRST}), f"{UP} should be in {FIRST} and is in {SECOND}"),
    "not in the index": (reindex(lambda m, name: {k: m[k] for k in m if k != name}), f"{UP} should be in no file and"),
    "in the index alone": (reindex(lambda m, name: m | {"x": FIRST}), f"x should be in {FIRST} and is in none"),
    "in both": (lambda f: (split(f), save_file(load_file(f / FIRST) | {UP: torch.ones(48, 32)}, f / FIRST)),
                f"{UP} should be in {SECOND} and is in {FIRST} and {SECOND}"),
    "empty index": (reindex(lambda m, name: {}), "no weight_map"),
    "a list": (reindex(lambda m, name: list(m)), "no weight_map"),
    "no index": (lambda f: split(f)[0].unlink(), "2 safetensors files, no model.safetensors.index.json"),
    "torn index": (lambda f: split(f)[0].write_text("{"), "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", SHARDS.values(), ids=SHARDS.keys())
def test_shards_that_do_not_fit_are_refused(tmp_path, damage, message):
    """An index is a stranger's list of file names: it must name this folder's files and the tensors that are in them.
    Followed blindly it reads any file of the disk, and a tensor that it omits would stay random.
    """
    model.save(ours(), tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        model.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "files, remedy",
    [
        (["pytorch_model.bin"], "pickles can run code and are never opened"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickles can run code"),
        (["gptq_model-4bit-128g.pt"], "pickles can run code"),
        (["llama-2-7b-chat.Q4_K_M.gguf"], "GGUF is not read; take the model's safetensors version"),
        (["consolidated.00.pth", "params.json"], "Meta's own files are laid out differently; take the Hugging Face"),
        (["consolidated.safetensors"], "Meta's own files are laid out differently; take the Hugging Face"),
        (["adapter_model.safetensors", "adapter_config.json"], "download the model's *.safetensors"),
        ([], "download the model's *.safetensors"),
    ],
    ids=str,
)
def test_folders_without_safetensors_are_told_apart(tmp_path, files, remedy):
    """Each other format that a folder may hold instead has its own way out. None of the files is opened."""
    model.save(ours(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=re.escape(remedy)) as error:
        model.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: no *.safetensors among ")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3903000000\n"
IMPOSTORS = {  # what the file begins with: what it is called
    "git-lfs pointer": (POINTER, "is a git-lfs pointer"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML page"),
    "bare web page": (b"\n <html><body>404</body></html>", "is an HTML page"),
    "storage's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an HTML page"),
    "old pickle": (b"\x80\x02}q\x00.", "is a pickle"),
    "new pickle": (b"PK\x03\x04archive/data.pkl", "is a pickle"),
    "nothing": (b"", "not a readable safetensors file"),
    "zeros": (bytes(1000), "not a readable safetensors file"),
    "text": (b"Not Found", "not a readable safetensors file"),
}


@pytest.mark.parametrize("content, message", IMPOSTORS.values(), ids=IMPOSTORS.keys())
def test_files_that_are_something_else_are_called_so(tmp_path, content, message):
    """A clone without git-lfs, a log-in page saved as weights, a renamed pickle: the library says HeaderTooLarge."""
    model.save(ours(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'model.safetensors'}: {message}")):
        model.load(tmp_path)


def test_missing_and_broken_shards_are_named(tmp_path):
    """A download that was cut off, before a shard or within one, is told from a wrong model."""
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name}: not a readable"):
        model.load(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} named in"):
        model.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Merging

BASES = {  # writes a base into a folder
    "dense": lambda folder: theirs(num_key_value_heads=2).save_pretrained(folder),
    "dense, biases": lambda folder: theirs(attention_bias=True, mlp_bias=True).save_pretrained(folder),
    "dense, tied": lambda folder: theirs(tie_word_embeddings=True).save_pretrained(folder),
    "4-bit": lambda folder: packed_folder(folder, z=None, act_order=True),
    "4-bit, biases": lambda folder: packed_folder(folder, "gptq_v2", bias=True),
    "qwen2": lambda folder: theirs("Qwen2", num_key_value_heads=1, tie_word_embeddings=True).save_pretrained(folder),
    "qwen3": lambda folder: theirs("Qwen3", num_key_value_heads=2, head_dim=24).save_pretrained(folder),
    "qwen2, 4-bit": lambda folder: packed_folder(folder, family="Qwen2"),
    "qwen3, 4-bit": lambda folder: packed_folder(folder, family="Qwen3"),
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
def test_merged_model_equals_base_and_adapter(tmp_path, make):
    """The merged folder, read here and by transformers, computes what base and adapter do, but for the rounding of its
    weights to fp16, and without that rounding exactly so; nothing of LoRA or 4 bits is left in it.
    """
    transformers, tokens = pytest.importorskip("transformers"), tokens_of(2, 24)
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    merged.mkdir()
    make(base)
    apart = model.load(base)
    apart.add_adapter("policy", 4, 8.0, ["q_proj", "o_proj", "down_proj"], torch.Generator().manual_seed(0))
    for parameter in apart.adapter_parameters("policy"):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    apart.save_adapter("policy", tmp_path / "adapter", "base")
    llama = model.load(base, dtype=torch.float16)
    llama.load_adapter("policy", tmp_path / "adapter")
    llama.add_adapter("other", 4, 8.0, ["k_proj"], torch.Generator())
    merge_adapter(llama, "policy")
    model.save(llama, merged)
    expected, bare = logits(apart, tokens, "policy"), logits(apart, tokens)
    found = logits(model.load(merged), tokens)
    assert (expected - bare).abs().max() > 0.5
    assert (found - expected).norm() < 5e-3 * expected.norm()
    reference = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert type(reference).__name__.lower().startswith(llama.config.model_type)
    tensors = load_file(merged / "model.safetensors")
    assert set(tensors) == set(reference.state_dict()) - ({"lm_head.weight"} if llama.lm_head is None else set())
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    with torch.no_grad():
        torch.testing.assert_close(reference(tokens).logits, found, rtol=1e-4, atol=1e-4)
    merge_adapter(apart, "policy", torch.float32)
    torch.testing.assert_close(logits(apart, tokens), expected, rtol=1e-4, atol=1e-4)


def test_merged_weights_that_fit_no_fp16_are_refused(tmp_path):
    """fp16 ends at 65,504; an infinite weight would be written without a word and answer NaN to everything."""
    llama = ours()
    llama.add_adapter("policy", 4, 8.0, ["up_proj"], torch.Generator().manual_seed(0))
    llama.model.layers[1].mlp.up_proj.lora_B["policy"].data.fill_(1e6)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.weight has no finite torch.float16"):
        merge_adapter(llama, "policy")
