"""One pass over a prompt for all rows that have it: the numbers of row by row, and every row once an epoch."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import journal
from safetensors.torch import load_file

import data
import lastmile
import lora
import model
import ppo
from beyond.hallucinations import hallucinated
from speed import shared_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def ragged(run_folder):
    """Rows as a reward model learns from them, with spans, in groups of 1 to 7; one prompt is there twice."""
    tokenizer = data.load_tokenizer(run_folder / "base")
    examples = data.toy("test")[:5]
    examples[4] = replace(examples[0], target="They read poems.")
    positives = data.encode(examples, tokenizer)[0]
    rows = data.with_negatives(positives, tokenizer, 40, 0, hallucinated)
    rng = random.Random(0)
    rows = [row for row in rows if row.source != examples[2].source or row.kind == "positive"]
    return rng.sample(rows, len(rows))


def loaded(folder, recompute=False):
    llama = model.load(folder)
    add_trained_adapter(llama)
    llama.recompute = recompute
    return llama


def add_trained_adapter(llama):
    """A reward adapter as after some training: neither factor is 0."""
    llama.add_adapter("reward", 4, 8.0, TARGETS, torch.Generator().manual_seed(0), head="normal")
    for _, layer in lora.lora_layers(llama):
        B = layer.lora_B["reward"]
        B.data = (torch.randn(B.shape, generator=torch.Generator().manual_seed(1)) * 0.05).to(B.device)
    for parameter in llama.adapter_parameters("reward"):
        parameter.requires_grad_(True)


def gradients(llama, batch, level, shared, micro_batch_size=0):
    """(loss, gradients) of a batch, in micro-batches."""
    llama.zero_grad()
    total = 0.0
    for part in batch.split(micro_batch_size):
        weight = data.fraction(part.weight, batch.weight)
        layout = shared_prompts.lay_out(part) if shared else None
        loss = ppo.reward_loss(ppo.token_scores(llama, part, layout), part, level) * weight
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in llama.adapter_parameters("reward")]


@pytest.mark.parametrize("base", ["pretrain", "base"], ids=["fp32", "4-bit"])
def test_scores_equal_those_of_single_rows(run_folder, ragged, base):
    """Positions restart after the prompt and no response sees another: each token's score is what its row alone gets,
    over a dense and over a 4-bit base with grouped heads.
    """
    llama = loaded(run_folder / base)
    batch = data.collate(ragged)
    layout = shared_prompts.lay_out(batch)
    assert len(layout.tokens) == 4 < len(batch.tokens) and layout.tokens.numel() < 0.7 * batch.tokens.numel()
    with torch.no_grad():
        shared = ppo.token_scores(llama, batch, layout)
        for b, row in enumerate(ragged):
            alone = data.collate([row])
            expected = ppo.token_scores(llama, alone)[alone.mask]
            assert torch.allclose(shared[b][batch.mask[b]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("base", "recompute", "micro"),
    [("pretrain", False, 0), ("base", False, 0), ("pretrain", True, 0), ("pretrain", False, 5)],
    ids=["fp32", "4-bit", "recomputed", "micro-batches"],
)
def test_loss_and_gradients_equal_those_of_single_rows(run_folder, ragged, level, base, recompute, micro):
    """What is learned is the same to 1e-5: spans, both levels of reward, recomputation, and groups that a micro-batch
    cuts in two included.
    """
    llama = loaded(run_folder / base, recompute)
    batch = data.collate(ragged)
    loss, grads = gradients(llama, batch, level, shared=False)
    shared_loss, shared_grads = gradients(llama, batch, level, True, micro)
    assert shared_loss == pytest.approx(loss, abs=1e-5)
    for expected, found in zip(grads, shared_grads, strict=True):
        assert torch.allclose(found, expected, atol=1e-5 * max(1, expected.abs().max().item()))


def test_a_response_moves_no_other(run_folder, ragged):
    """Changing one response changes no score of another row of its group: nothing leaks through the mask."""
    llama = loaded(run_folder / "pretrain")
    rows = [row for row in ragged if row.prompt == ragged[0].prompt]
    changed = [replace(rows[0], response=rows[0].response[::-1]), *rows[1:]]
    batches = [data.collate(rows), data.collate(changed)]
    with torch.no_grad():
        before, after = (ppo.token_scores(llama, batch, shared_prompts.lay_out(batch)) for batch in batches)
    mask = data.collate(rows).mask
    assert not torch.allclose(before[0][mask[0]], after[0][mask[0]])
    for b in range(1, len(rows)):
        assert torch.equal(before[b][mask[b]], after[b][mask[b]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6, 14, 100])
def test_groups_are_dealt_whole(batch_size):
    """Every row once an epoch, groups together, the number of batches that row-by-row has and none of them empty, in
    an order that (seed, epoch) alone decides.
    """
    rng = random.Random(batch_size)
    for trial in range(20):
        rows = []
        for i in range(rng.randint(1, 60)):
            prompt = [i] * rng.randint(1, 9)
            rows += [data.Datum("", "", "", prompt, [0] * rng.randint(1, 9)) for _ in range(rng.randint(1, 7))]
        most = rng.randint(0, 4)
        dealt = data.grouped_batches(rows, batch_size, trial, 0, most)
        assert sorted(i for batch in dealt for i in batch) == list(range(len(rows))) and all(dealt)
        assert len(dealt) == len(data.batches([1] * len(rows), batch_size, trial, 0))
        assert dealt == data.grouped_batches(rows, batch_size, trial, 0, most)
        if batch_size == 14 and most == 0:
            batches_of = Counter()
            for batch in dealt:
                batches_of.update({rows[i].prompt[0] for i in batch})
            assert set(batches_of.values()) == {1}
    assert dealt != data.grouped_batches(rows, batch_size, trial, 1, most) or len(rows) < 4


def test_fourteen_rows_a_step_on_average():
    """Of seven data, six rows each, three steps are made (paper, 3.1: 14 rows a step), positives and negatives mixed;
    by halves of a datum's rows, unless whole groups are asked for.
    """
    rows = [data.Datum("", "", "", [i], [0]) for i in range(70) for _ in range(6)]
    assert Counter(map(len, data.grouped_batches(rows, 14, 0, 0, most=3))) == {12: 10, 15: 20}
    assert Counter(map(len, data.grouped_batches(rows, 14, 0, 0, most=0))) == {12: 20, 18: 10}


def test_a_step_is_the_same_step(run_folder, ragged):
    """One update with shared prompts leaves the adapter that row by row leaves."""
    found = []
    for shared in (False, True):
        llama = loaded(run_folder / "pretrain")
        optimizer = lastmile.Optimizer(llama.adapter_parameters("reward"), max_grad_norm=1.0)
        numbers = lastmile.reward_step(llama, data.collate(ragged), optimizer, 1e-3, 5.0, shared=shared)
        found.append((numbers, llama.adapter_parameters("reward")))
    (plain, expected), (same, parameters) = found
    assert same == pytest.approx(plain, abs=1e-5)
    for a, b in zip(expected, parameters, strict=True):
        assert (a - b).abs().max() < 2e-4  # AdamW's first step is the rate times the sign of the gradient


def test_the_stage_shares_by_default(fresh_run):
    """`reward` and `reward --no-share-prompts` log as many steps and report the same held-out scores of one adapter."""
    flags = ["--train-examples", "14", "--eval-examples", "8", "--max-new-tokens", "40"]
    assert fresh_run("reward", *flags) == 0
    shared = json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    steps = len(journal(fresh_run.folder / "reward"))
    weights = load_file(fresh_run.folder / "reward/adapter_model.safetensors")
    assert fresh_run("reward", *flags, "--no-share-prompts", "--overwrite") == 0
    assert len(journal(fresh_run.folder / "reward")) == steps == 84 // 14
    plain = json.loads((fresh_run.folder / "reward/heldout.json").read_text())
    assert plain.keys() == shared.keys()
    other = load_file(fresh_run.folder / "reward/adapter_model.safetensors")
    assert any(not torch.equal(weights[name], other[name]) for name in weights)  # batches are composed otherwise


@pytest.mark.parametrize("most", [1, 3, 0])
def test_rows_per_prompt_says_how_many_share_a_batch(fresh_run, monkeypatch, most):
    """`reward --rows-per-prompt N` deals a datum's six rows to batches by N, 0: all of them to one; what the flag saves
    depends on it.
    """
    step, batches = lastmile.reward_step, []

    def watched(llama, batch, *rest):
        batches.append([row.source for row in batch.rows])
        return step(llama, batch, *rest)

    monkeypatch.setattr(lastmile, "reward_step", watched)
    flags = ["--train-examples", "14", "--eval-examples", "2", "--max-new-tokens", "40", "--rows-per-prompt", str(most)]
    assert fresh_run("reward", *flags) == 0
    together = {n for batch in batches for n in Counter(batch).values()}
    if most == 0:
        assert together == {6}
    else:  # two groups of a datum may meet
        assert most in together and all(n % most == 0 for n in together)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_shared_prompts_on_a_gpu(run_folder, ragged, dtype, tolerance):
    """The masked kernel of a GPU, forward and backward, against row by row on the CPU."""
    expected = gradients(loaded(run_folder / "pretrain"), data.collate(ragged), "token", shared=False)
    llama = model.load(run_folder / "pretrain", "cuda", dtype)
    add_trained_adapter(llama)
    found = gradients(llama, data.collate(ragged, "cuda"), "token", shared=True)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for a, b in zip(expected[1], found[1], strict=True):
        assert (a - b.cpu()).norm() <= tolerance * max(1e-3, a.norm())


@pytest.mark.gpu
def test_the_mask_makes_no_matrix_a_head_on_a_gpu():
    """64 heads of 2048 columns in fp32 would be 1 GiB of scores; the fused kernel keeps the mask and little more."""
    G, H, S, D = 1, 64, 2048, 64
    q, k, v = (torch.randn(G, H, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.full((G, 1, S, S), -torch.inf, dtype=q.dtype, device="cuda").triu(1)[:, :, 1:]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.attend_shared(q, k[:, :8], v[:, :8], mask)
    assert torch.cuda.max_memory_allocated() - before < 300 << 20
