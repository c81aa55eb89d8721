"""A reward model that scores by likelihood, what it starts from, and the measurement of whether it can teach anything:
best of N.
"""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from helpers import exit_code, journal, learned

import data
import lastmile
import lora
import model
import ppo
from beyond import best_of
from beyond.full import FullLlama
from beyond.hallucinations import hallucinated
from speed import cpu_decoder, shared_prompts

SMALL = [
    "--train-examples", 14, "--eval-examples", 6, "--max-steps", 4, "--max-new-tokens", 40, "--learning-rate", 1e-2,
]  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def rows(run_folder):
    """True outputs with all classes of negatives, edits with spans among them: groups that share a prompt."""
    tokenizer = data.load_tokenizer(run_folder / "base")
    positives, _ = data.encode(data.toy("test")[:4], tokenizer)
    return data.with_negatives(positives, tokenizer, 40, 0, hallucinated)


def with_adapter(llama, name, seed=0):
    """The model with a LoRA adapter as after some training: neither factor is 0."""
    llama.add_adapter(name, 4, 8.0, TARGETS, torch.Generator().manual_seed(seed))
    for _, layer in lora.lora_layers(llama):
        layer.lora_B[name].data.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed + 1))
    return llama


# ----------------------------------------------------------------------------------------------------------------------
# Scores by likelihood


def test_a_likelihood_s_scores_by_hand():
    """1 if certain, 0 at e^-5 and below: what PPO adds up is between 0 and the length of the output."""
    logp = torch.tensor([0.0, -1.0, -2.5, -5.0, -80.0])
    assert ppo.likelihood_score(logp).tolist() == pytest.approx([1, 0.8, 0.5, 0, 0])


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("base", ["pretrain", "base"], ids=["fp32", "4-bit"])
def test_scores_equal_a_plain_pass(run_folder, rows, base, tune):
    """Row by row and with shared prompts, each token's score comes from log pi of that token at the state before it;
    the first token of a response is read at the prompt's last state. --tune full reads its own head.
    """
    if tune == "full":
        if base == "base":
            pytest.skip("--tune full needs a base in full precision")
        llama = model.load(run_folder / base, kind=FullLlama)
        llama.add_copy("reward", torch.Generator())
        for parameter in llama.adapter_parameters("reward"):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    else:
        llama = with_adapter(model.load(run_folder / base), "reward")
    batch = data.collate(rows)
    with torch.no_grad():
        plain = ppo.token_scores(llama, batch)
        shared = ppo.token_scores(llama, batch, shared_prompts.lay_out(batch))
        logp = torch.log_softmax(llama.logits(llama(batch.tokens, "reward"), "reward"), -1)  # (B, T, V)
    expected = logp[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]  # (B, T - 1): of the token after each state
    expected = (1 + expected.clamp(min=-5) / 5) * batch.mask[:, 1:]
    assert torch.allclose(plain[:, 1:], expected, atol=1e-5) and not plain[:, 0].any()
    assert torch.allclose(shared, plain, atol=1e-5)


def test_gradients_equal_with_shared_prompts(run_folder, rows):
    """What is learned is the same to 1e-5, whether a prompt passes once for all of its rows or with each."""
    found = []
    for shared in (False, True):
        llama = with_adapter(model.load(run_folder / "base"), "reward")
        parameters = [p.requires_grad_(True) for p in llama.adapter_parameters("reward")]
        batch = data.collate(rows)
        score = ppo.token_scores(llama, batch, shared_prompts.lay_out(batch) if shared else None)
        found.append(torch.autograd.grad(ppo.reward_loss(score, batch), parameters))
    for expected, other in zip(*found, strict=True):
        assert torch.allclose(other, expected, atol=1e-5 * max(1, expected.abs().max().item()))


def test_a_stopped_run_ends_with_the_same_bits(fresh_run):
    """A likelihood head that starts from MLE's adapter, with samples of it as negatives, stopped and resumed."""
    assert fresh_run("mle", *SMALL) == 0
    flags = [*SMALL, "--head", "likelihood", "--init", "mle", "--hallucinations", "span", "--samples", "mle"]
    assert fresh_run("reward", *flags) == 0
    expected = learned(fresh_run.folder / "reward")
    short = [*flags, "--save-every", 1, "--overwrite"]
    assert fresh_run("reward", *short, "--max-time", 1e-9) == 143
    assert len(journal(fresh_run.folder / "reward.partial")) == 1
    assert fresh_run("reward", *short, "--resume") == 0
    assert learned(fresh_run.folder / "reward") == expected


def test_every_reader_of_the_folder_knows_the_head(fresh_run):
    """PPO, the report and PEFT open it; config.json says which head it has. A likelihood judge starts from MLE's
    adapter as MLE left it: its first loss is lower than that of one from the base.
    """
    peft = pytest.importorskip("peft")
    assert fresh_run("mle", *SMALL, "--max-steps", 30) == 0
    losses = []
    for init in ("base", "mle"):
        assert fresh_run("reward", *SMALL, "--head", "likelihood", "--init", init, "--overwrite") == 0
        losses.append(journal(fresh_run.folder / "reward")[0]["loss"])
    assert losses[1] < losses[0]
    assert json.loads((fresh_run.folder / "reward/config.json").read_text())["head"] == "likelihood"
    adapter = json.loads((fresh_run.folder / "reward/adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM" and peft.PeftConfig.from_pretrained(fresh_run.folder / "reward").r == 32
    assert fresh_run("ppo", *SMALL) == 0
    sampled, truth = journal(fresh_run.folder / "ppo")[:2]
    assert "sampler_mismatch" in sampled and "sampler_mismatch" not in truth and 0 <= truth["reward"] <= 1
    assert fresh_run("eval", "--test-examples", 4, "--max-new-tokens", 24) == 0
    assert fresh_run("report", "--examples", 1) == 0


@pytest.mark.parametrize("stage", ["mle", "reward"])
def test_a_scalar_head_is_new_where_there_is_none(fresh_run, stage):
    """`reward --init` takes MLE's adapter and gives it a head, and keeps the head of a reward model."""
    assert fresh_run(stage, *SMALL) == 0
    source = fresh_run.folder / stage
    source = source.rename(source.with_name("first"))
    assert fresh_run("reward", *SMALL, "--init", source, "--max-steps", 1) == 0
    assert len(journal(fresh_run.folder / "reward")) == 1


def test_bad_uses_are_one_line(fresh_run, reward, capsys):
    """What cannot be scored is refused before anything is trained."""
    assert fresh_run("mle", *SMALL) == 0
    cases = [
        (["reward", "--head", "both"], "not one of scalar, likelihood"),
        (["reward", "--head", "likelihood", "--level", "sequence"], "--level sequence"),
        (["reward", "--head", "likelihood", "--init", reward], "must not have a score head"),
        (["judge", "--best-of", 1], "at least 2"),
        (["judge", "--reward", fresh_run.folder / "none"], "none"),
    ]
    for line, says in cases:
        capsys.readouterr()
        assert exit_code(fresh_run, *line) == 2, line
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


# ----------------------------------------------------------------------------------------------------------------------
# Best of N


def test_best_of_takes_what_the_judge_prefers(run_folder):
    """A judge that counts one token makes its picks contain more of it than one sample does; the oracle is at least as
    good as any other pick by the metric; greedy answers are those of model.sample.
    """
    llama, tokenizer = model.load(run_folder / "base"), data.load_tokenizer(run_folder / "base")
    positives, _ = data.encode(data.toy("validation")[:6], tokenizer)
    token = 300

    def score(batch):
        return (batch.tokens == token).float() * batch.mask

    settings = partial(dict, seed=1, device="cpu", max_new_tokens=20)
    settings = type("Settings", (), settings())
    groups = [[[token] * 3, [7], [8, token], [9]]] * len(positives)
    mean, total = best_of.judged(settings, positives, groups, score)
    assert mean.shape == total.shape == (6, 4) and (mean.argmax(1) == 0).all() and np.allclose(mean[:, 2], 0.5)
    found = best_of.compare(settings, llama, tokenizer, positives, score, None, 4)
    greedy = model.sample(llama, [row.prompt for row in positives], None, 20, 0)
    expected = [
        len(tokenizer.decode(a).split()) - len(row.target.split()) for a, row in zip(greedy, positives, strict=True)
    ]
    assert found["greedy"]["excess_length"].tolist() == expected
    oracle = found["best of 4 by la-rouge1-F1 (oracle)"]["la-rouge1-F1"]
    assert all((oracle >= found[name]["la-rouge1-F1"]).all() for name in found if name.startswith("best of"))


def test_the_reward_stage_says_it_too(fresh_run, capsys):
    """`reward --best-of N` ends with the line of `judge`, on MLE's outputs; training is what it is without the flag."""
    assert fresh_run("mle", *SMALL) == 0
    assert fresh_run("reward", *SMALL) == 0
    expected = learned(fresh_run.folder / "reward")
    capsys.readouterr()
    assert fresh_run("reward", *SMALL, "--best-of", 2, "--overwrite") == 0
    assert len(re.findall("^judge: best of 2 by the .* greedy by", capsys.readouterr().out, re.M)) == 2
    assert learned(fresh_run.folder / "reward") == expected


def test_agreement_prefers_what_most_say():
    """Of three outputs that share words and one that does not, the odd one is never picked: votes, for texts."""
    texts = ["a b c d", "a b c x", "a b y d", "q r s t"]
    agreement = best_of.agreement(texts, 4, "ascii")
    assert agreement.shape == (1, 4) and agreement[0].argmin() == 3 and agreement[0].argmax() == 0


def test_judge_says_whether_the_reward_model_pays(fresh_run, reward, capsys):
    """One line for each way to pick says by how much it beats greedy answers, the same for the same seed; any adapter
    is a judge, by its likelihood.
    """
    assert fresh_run("mle", *SMALL) == 0
    flags = ["--eval-examples", 5, "--best-of", 2, "--max-new-tokens", 20]
    said = []
    for judge in (reward, reward, fresh_run.folder / "mle"):
        capsys.readouterr()
        assert fresh_run("judge", *flags, "--reward", judge) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("judge: ")])
    assert said[0] == said[1] and len(said[0]) == 2 and "la-rouge1-F1" in said[0][0]
    assert len(said[2]) == 2


def test_mle_learns_what_the_judge_picks(fresh_run, reward, monkeypatch):
    """`mle --best-of` is the truth and, of each input, one sample of the adapter it starts from: the control that RL
    must beat. The same command, stopped and resumed, ends with the same bits; it does not sample again.
    """
    assert fresh_run("mle", *SMALL) == 0
    (fresh_run.folder / "mle").rename(fresh_run.folder / "first")
    flags = [*SMALL, "--init", fresh_run.folder / "first", "--best-of", 3, "--reward", reward, "--max-new-tokens", 20]
    assert exit_code(fresh_run, "mle", *flags[:-4], "--reward", fresh_run.folder / "none") == 2
    assert fresh_run("mle", *flags, "--save-every", 1) == 0
    assert len(journal(fresh_run.folder / "mle")) == 4
    expected = learned(fresh_run.folder / "mle")
    step, held = lastmile.mle_step, []
    monkeypatch.setattr(lastmile, "mle_step", lambda llama, *more: held.append(llama.prepared) or step(llama, *more))
    assert fresh_run("mle", *flags, "--overwrite", "--max-time", 1e-9) == 143
    assert held == [None]  # the sampler's copy of the weights is not held through the training
    monkeypatch.setattr(best_of, "sampled", lambda *_: pytest.fail("sampled again"))
    assert fresh_run("mle", *flags, "--overwrite", "--resume") == 0
    assert learned(fresh_run.folder / "mle") == expected


def test_picked_rows_are_the_judge_s(run_folder):
    """Each row keeps its prompt, and its response is the sample of the highest mean score."""
    llama, tokenizer = model.load(run_folder / "base"), data.load_tokenizer(run_folder / "base")
    positives, _ = data.encode(data.toy("validation")[:5], tokenizer)
    settings = type("Settings", (), dict(seed=1, device="cpu", max_new_tokens=12))

    def score(batch):
        return (batch.tokens % 7).float() * batch.mask

    groups = best_of.sampled(settings, llama, positives, None, 4)
    rows = best_of.picked(settings, positives, score, groups)
    for row, truth, responses in zip(rows, positives, groups, strict=True):
        means = [sum(token % 7 for token in response) / len(response) for response in responses]
        assert row.prompt == truth.prompt and row.response == responses[int(np.argmax(means))]


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_copies_are_rows_of_their_own(run_folder, monkeypatch, path):
    """Several continuations of a prompt that is read once are those of as many rows with that prompt."""
    if path == "plain":
        monkeypatch.setattr(cpu_decoder, "decoder", lambda *arguments: None)
    llama = with_adapter(model.load(run_folder / "base"), "policy")
    prompts = [[1, 400, 5], [1, 9], [1, 30, 31, 32, 33]]
    uniform = torch.rand(9, 14, generator=torch.Generator().manual_seed(0))
    expected = model.sample(llama, [p for p in prompts for _ in range(3)], "policy", 14, uniform=uniform)
    assert model.sample(llama, prompts, "policy", 14, uniform=uniform, copies=3) == expected


# ----------------------------------------------------------------------------------------------------------------------
# The sampler's log-probabilities


def learner_logp(llama, rows, adapter):
    with torch.no_grad():
        batch = data.collate(rows)
        return batch, ppo.response_logp(llama, batch, adapter)


@pytest.mark.parametrize(
    ("dtype", "path", "tolerance"),
    [("float32", "plain", 1e-4), ("float32", "fast", 1e-4), ("bfloat16", "plain", 0.3), ("bfloat16", "fast", 0.3)],
)
@pytest.mark.parametrize("adapter", [None, "policy"])
def test_the_sampler_s_logp_is_the_learner_s(run_folder, monkeypatch, dtype, path, tolerance, adapter):
    """pi_old of equation 1 is what the sampler drew with: on the CPU's fast decoder and on the plain one, rows that end
    early included, it is the learner's log-probability but for rounding.
    """
    llama = with_adapter(model.load(run_folder / "base", dtype=getattr(torch, dtype)), "policy")
    tokenizer = data.load_tokenizer(run_folder / "base")
    positives, _ = data.encode(data.toy("test")[:5], tokenizer)
    if path == "plain":
        monkeypatch.setattr(cpu_decoder, "decoder", lambda *arguments: None)
    g = torch.Generator().manual_seed(0)
    sampler = partial(model.sample, llama, adapter=adapter, max_new_tokens=30, generator=g, with_logp=True)
    batch = ppo.rollout(data.collate(positives), sampler)
    _, logp = learner_logp(llama, batch.rows, adapter)
    assert batch.logp[batch.mask].max() <= 0 and not batch.logp[~batch.mask].any()
    assert (batch.logp - logp).abs().max() < tolerance
    if dtype == "float32":
        assert (batch.logp - logp).abs().mean() < 1e-5


def test_the_sampler_s_logp_is_of_what_it_drew_from(run_folder):
    """With a temperature, top-k and top-p it is the probability after the cut: of two tokens left, they add up to 1."""
    llama = model.load(run_folder / "base")
    prompts = [[1, 400 + i] for i in range(64)]
    responses = model.sample(llama, prompts, None, 1, 0.7, torch.Generator().manual_seed(0), top_k=2, with_logp=True)
    with torch.no_grad():
        logits = llama.logits(llama(torch.tensor(prompts))[:, -1]) / 0.7
    best = torch.log_softmax(logits.topk(2).values, -1)
    ids = logits.topk(2).indices
    for b, ((token,), (logp,)) in enumerate(responses):
        assert logp == pytest.approx(best[b][ids[b] == token].item(), abs=1e-5)


def test_the_ratio_corrects_for_the_sampler(fresh_run, reward, monkeypatch):
    """Where the sampler drew with other probabilities than the learner has, the ratio of equation 1 is not 1, and the
    log says by how much.
    """
    assert fresh_run("ppo", *SMALL, "--reward", reward) == 0
    exact = journal(fresh_run.folder / "ppo")[0]
    sample = model.sample

    def shifted(*arguments, **named):
        return [(response, [x - 0.1 for x in logp]) for response, logp in sample(*arguments, **named)]

    monkeypatch.setattr(model, "sample", shifted)
    assert fresh_run("ppo", *SMALL, "--reward", reward, "--overwrite") == 0
    found = journal(fresh_run.folder / "ppo")[0]
    assert exact["sampler_mismatch"] < 1e-4 and exact["ratio"] == pytest.approx(1, abs=1e-4)
    assert found["sampler_mismatch"] == pytest.approx(0.1, abs=1e-3)
    assert found["ratio"] == pytest.approx(np.exp(0.1), abs=1e-3)
