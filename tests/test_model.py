"""The Llama against transformers, its sampler against the uncached forward pass, and strict loading."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import model

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


def theirs(**shape):
    """A random Llama of transformers, its weights large enough that the logits differ by more than a tolerance."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    found = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, initializer_range=0.3, **shape)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 1:  # norms: all ones would hide a norm that is left out
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


def test_rope_parameters_of_transformers_5(tmp_path):
    """transformers 5 moved rope_theta into rope_parameters; overlooked, the default 10000 would be taken in silence."""
    reference, tokens = theirs(rope_theta=500.0), tokens_of(2, 12)
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert model.read_config(tmp_path).rope_theta == 500
    with torch.no_grad():
        torch.testing.assert_close(logits(model.load(tmp_path), tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)


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
    drawn = model.pick(p.log().expand(20000, 6), temperature, top_k, top_p, u)
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
    assert model.pick(logits, 1.0, 2, 1.0, torch.full((1, 1), u)).tolist() == [token]


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
            alone.append(model.pick(last, 1.0, 0, 1.0, luck[len(alone), b : b + 1]).item())
        assert rows[b] == alone


def test_sampling_stops_when_all_rows_have_ended():
    """The model is called once a token of the longest row and no more: the rest of the cap would be wasted work."""
    llama, calls = ours(eos_token_id=tuple(range(32))), []
    llama.register_forward_hook(lambda *_: calls.append(1))
    rows = model.sample(llama, RAGGED, max_new_tokens=50, generator=torch.Generator().manual_seed(0))
    assert len(calls) == max(map(len, rows)) < 50


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load_are_inverse(tmp_path):
    """Config and weights come back as they were; a config.json that lost a field would change the next load's maths."""
    llama = ours(rope_theta=500.0, rms_norm_eps=0.1, eos_token_id=(2, 5))
    model.save(llama, tmp_path)
    again = model.load(tmp_path)
    assert again.config == llama.config and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), again.parameters(), strict=True))


def test_what_is_saved_opens_in_transformers(tmp_path):
    """Our files are Hugging Face's: other tools can read a base that was pretrained here."""
    transformers = pytest.importorskip("transformers")
    llama, tokens = ours(head_dim=24, rope_theta=500.0), tokens_of(2, 12)
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
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
DAMAGE = {  # what is wrong with a folder's (config, tensors): how to make it so, what the message must say
    "missing tensor": (lambda c, t: t.pop(UP), f"{UP} is missing"),
    "extra tensor": (lambda c, t: t.update({"model.layers.2.x": torch.ones(2)}), "model.layers.2.x is not part"),
    "other shape": (lambda c, t: t.update({NORM: torch.ones(31)}), f"{NORM} is of shape (31,), expected (32,)"),
    "bias": (lambda c, t: t.update({UP.replace("weight", "bias"): torch.ones(48)}), "up_proj.bias is not part"),
    "4 bits without a word": (lambda c, t: t.update({UP.replace("weight", "qweight"): torch.ones(4, 48)}), "qweight"),
    "other family": (lambda c, t: c.update(model_type="mistral"), "'mistral'"),
    "awq": (lambda c, t: c.update(quantization_config=AWQ), "'awq'"),
    "8 bits": (lambda c, t: c.update(quantization_config=AWQ | {"quant_method": "gptq", "bits": 8}), "8 bits"),
    "attention bias": (lambda c, t: c.update(attention_bias=True), "attention_bias"),
    "rope scaling": (lambda c, t: c.update(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    "other activation": (lambda c, t: c.update(hidden_act="gelu"), "'gelu'"),
    "no width": (lambda c, t: c.pop("hidden_size"), "hidden_size"),
    "heads that do not divide": (lambda c, t: c.update(num_key_value_heads=3), "num_key_value_heads 3"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_folders_that_do_not_fit_are_refused(tmp_path, damage, message):
    """A model that loads in part, or that needs maths we do not have, would run and be wrong. The message names the
    folder and the cause.
    """
    model.save(ours(), tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    damage(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
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
