"""The arithmetic of reinforcement learning: equations 1 to 4, the columns they stand in, and what follows from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import model
import ppo

TARGETS = ["q_proj", "v_proj", "down_proj"]
GAMMA, LAM = 0.99999, 0.95  # the paper's
FIELDS = "logp_old", "value", "reward", "adv", "ret"  # of a Trajectory, beside tokens and mask


def random_batch(*lengths, seed=0, prompts=(5, 2, 7, 3)):
    """A ragged batch of random ids with responses of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, 600, (n,), generator=g).tolist()  # noqa: E731
    return data.collate([data.Datum("", "", "", ids(p), ids(n)) for p, n in zip(prompts, lengths, strict=False)])


def noise(batch, seed=0):
    """Random numbers in every column, those outside the mask included."""
    return torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed))


def trajectory_of(batch, seed=1, **fields):
    """A Trajectory of random numbers, with the given fields instead."""
    drawn = {name: noise(batch, seed + i) * batch.mask for i, name in enumerate(FIELDS)}
    return ppo.Trajectory(batch.tokens, batch.mask, **(drawn | fields))


@pytest.fixture(scope="module")
def actors(run_folder):
    """The quantized base with policy, value and reward adapters as if trained: every tensor random, none 0."""
    llama = model.load(run_folder / "base")
    for seed, (name, head) in enumerate({"policy": None, "value": "zero", "reward": "normal"}.items()):
        g = torch.Generator().manual_seed(seed)
        llama.add_adapter(name, 4, 8.0, TARGETS, g, head)
        for parameter in llama.adapter_parameters(name):
            parameter.data.normal_(0, 0.2, generator=g)
    return llama


# ----------------------------------------------------------------------------------------------------------------------
# The equations


@pytest.mark.parametrize("gamma, lam", [(GAMMA, LAM), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_and_returns_are_the_papers_sums(gamma, lam):
    """Equations 2 and 4 as the paper writes them, a sum for every token, against our backward recursion."""
    batch = random_batch(4, 1, 9, 6)
    reward, value = noise(batch, 0), noise(batch, 1)
    adv, ret = ppo.gae(reward, value, batch.mask, gamma, lam), ppo.returns(reward, batch.mask, gamma)
    for b, start in enumerate(batch.prompt_len.tolist()):
        T = int(batch.mask[b].sum())
        r = [0, *reward[b, start : start + T].tolist()]  # r_1 .. r_T: the paper's reward of action t is r_{t+1}
        V = [*value[b, start : start + T].tolist(), 0]  # V(s_0) .. V(s_T) = 0
        for t in range(T):
            eq2 = sum((gamma * lam) ** (k - t) * (r[k + 1] + gamma * V[k + 1] - V[k]) for k in range(t, T))
            eq4 = sum(gamma ** (k - t) * r[k + 1] for k in range(t, T))
            assert adv[b, start + t].item() == pytest.approx(eq2, abs=1e-5)
            assert ret[b, start + t].item() == pytest.approx(eq4, abs=1e-5)
    assert not adv[~batch.mask].any() and not ret[~batch.mask].any()


def test_lambda_1_is_return_minus_value():
    """At lambda = 1 equation 2 telescopes: the one case where advantage + value is the return of equation 4."""
    batch = random_batch(4, 1, 9, 6)
    reward, value = noise(batch, 0), noise(batch, 1)
    ret = ppo.returns(reward, batch.mask, GAMMA)
    expected = torch.where(batch.mask, ret - value, 0)
    torch.testing.assert_close(ppo.gae(reward, value, batch.mask, GAMMA, 1.0), expected, rtol=1e-5, atol=1e-5)


def test_worked_examples():
    """The examples in the docstrings hold."""
    reward, value = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    assert ppo.gae(reward, value, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0).tolist() == [[1.5, 0.75]]
    assert ppo.returns(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool), 1.0).tolist() == [[6, 5, 3]]


@pytest.mark.parametrize("garbage", [1e9, -1e9, float("nan"), float("inf")])
def test_garbage_outside_the_mask_changes_nothing(garbage):
    """Whatever stands on prompts and padding, not-a-number included, no result changes by a single bit."""
    batch = random_batch(4, 1, 9, 6)
    spoil = lambda x: torch.where(batch.mask, x, garbage)  # noqa: E731
    x, y = noise(batch, 0), noise(batch, 1)
    traj = trajectory_of(batch)
    spoilt = replace(traj, **{name: spoil(getattr(traj, name)) for name in FIELDS})
    pairs = [
        (ppo.gae(x, y, batch.mask, GAMMA, LAM), ppo.gae(spoil(x), spoil(y), batch.mask, GAMMA, LAM)),
        (ppo.returns(x, batch.mask, GAMMA), ppo.returns(spoil(x), batch.mask, GAMMA)),
        (ppo.whiten(x, batch.mask), ppo.whiten(spoil(x), batch.mask)),
        (ppo.policy_loss(x, traj, 0.2), ppo.policy_loss(spoil(x), spoilt, 0.2)),
        (ppo.value_loss(x, traj), ppo.value_loss(spoil(x), spoilt)),
        (ppo.value_loss(x, traj, 0.1), ppo.value_loss(spoil(x), spoilt, 0.1)),
        (ppo.reward_loss(x, batch), ppo.reward_loss(spoil(x), batch)),
        (ppo.mle_loss(x, batch.mask), ppo.mle_loss(spoil(x), batch.mask)),
    ]
    assert all(torch.equal(clean, dirty) for clean, dirty in pairs)


@pytest.mark.parametrize(
    "w, adv, loss, moves",
    [
        (1.5, 1.0, -1.2, False),  # better than its old self by more than the clip: no more reward for going on
        (1.5, -1.0, 1.5, True),  # a bad action made likelier: it is pushed back however far it went
        (0.5, 1.0, -0.5, True),  # a good action made rarer: pulled back
        (0.5, -1.0, 0.8, False),  # a bad action made rarer by more than the clip: enough
        (1.1, 1.0, -1.1, True),  # within the clip, both signs learn
        (0.9, -1.0, 0.9, True),
    ],
)
def test_clipping_by_hand(w, adv, loss, moves):
    """Equation 3 with epsilon 0.2 on one token. A min and a max the wrong way round would still train, and diverge."""
    one = lambda x: torch.tensor([[x]])  # noqa: E731
    traj = ppo.Trajectory(one(5), one(True), one(-1.0), one(0.0), one(0.0), one(adv), one(0.0))
    logp = (traj.logp_old + np.log(w)).requires_grad_()
    found = ppo.policy_loss(logp, traj, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logp.grad.item() == pytest.approx(-w * adv if moves else 0)


def test_value_clip_by_hand():
    """The clipped error is taken where it is the larger: a value that ran from 0 to 1 counts as 0.2, 1.8 short of 2."""
    one = lambda x: torch.tensor([[x]])  # noqa: E731
    traj = ppo.Trajectory(one(5), one(True), one(0.0), one(0.0), one(0.0), one(0.0), one(2.0))
    assert ppo.value_loss(one(1.0), traj).item() == pytest.approx(1.0)
    assert ppo.value_loss(one(1.0), traj, value_clip=0.2).item() == pytest.approx(1.8**2)


def test_every_token_weighs_the_same():
    """The losses are means over all tokens of the batch. A mean of row means would give a token of a short answer many
    times the weight of one of a long answer, and reward brevity by itself.
    """
    batch = random_batch(1, 9)
    x = noise(batch).requires_grad_()
    traj = trajectory_of(batch, logp_old=x.detach(), adv=batch.mask.float(), ret=(x.detach() - 1) * batch.mask)
    for loss, gradient in ((ppo.policy_loss(x, traj, 0.2), -0.1), (ppo.mle_loss(x, batch.mask), -0.1),
                           (ppo.value_loss(x, traj), 0.2)):  # fmt: skip
        (found,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(found, gradient * batch.mask)


def test_whiten():
    """Mean 0 and variance 1 over the response tokens; padding neither counts nor becomes anything but 0."""
    batch = random_batch(4, 1, 9, 6)
    white = ppo.whiten(3 * noise(batch) + 7, batch.mask)
    found = white[batch.mask]
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert not white[~batch.mask].any()


# ----------------------------------------------------------------------------------------------------------------------
# The length penalty and the reward model's loss, in closed form


def test_stopping_on_time_costs_nothing():
    """2.5 for each token beyond the reference's length, EOS counted on both sides: a response as long as the reference
    costs nothing, one token more costs 2.5 once, on that token.
    """
    batch = replace(random_batch(4, 5, 8, 3), ref_len=torch.tensor([4, 4, 4, 4]))
    penalty = ppo.length_penalty(batch, 2.5)
    assert penalty.sum(1).tolist() == [0, -2.5, -10, 0]
    assert penalty[1, 2 + 4].item() == -2.5  # prompt of 2, the fifth token
    assert not penalty[~batch.mask].any()


@pytest.mark.parametrize("r", [0.3, 0.8, 1.3, 2.0])
def test_the_best_length_is_a_quantile(r):
    """The newsvendor: with reward r a token and 2.5 a late one, the best fixed length is the r / 2.5 quantile of the
    reference lengths. An off-by-one anywhere between EOS, mask and penalty would shift it.
    """
    reference = torch.tensor([3, 4, 4, 6, 7, 9, 10, 12, 13, 15, 16])
    total = []
    for L in range(1, 19):
        batch = replace(random_batch(*[L] * 11, prompts=[4] * 11), ref_len=reference)
        reward = r * batch.mask + ppo.length_penalty(batch, 2.5)
        total.append(ppo.returns(reward, batch.mask, 1.0)[:, 4].mean().item())  # from the first response token on
    assert 1 + int(np.argmax(total)) == np.quantile(reference, r / 2.5, method="inverted_cdf")


def test_reward_loss_by_hand():
    """A mean over each datum's tokens, then sum(w l) / sum(w): long negatives do not drown short positives."""
    label, weight = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.2])
    batch = replace(random_batch(2, 4), label=label, weight=weight)
    score = torch.zeros(batch.mask.shape)
    score[0, 5:7] = torch.tensor([1.0, 0.0])  # errors 0 and 1: mean 0.5
    score[1, 2:6] = torch.tensor([2.0, 0.0, 0.0, 0.0])  # errors 4, 0, 0, 0: mean 1
    assert ppo.reward_loss(score, batch).item() == pytest.approx((1 * 0.5 + 0.2 * 1) / 1.2)


@pytest.mark.parametrize("k, optimum", [(1, 0.8333), (2, 0.7143), (5, 0.5)])
def test_optimum_on_a_shared_prefix(k, optimum):
    """Where one positive and k negatives begin alike, the least loss is at 1 / (1 + k/5): what a perfect reward model
    says of a beginning it cannot tell apart yet. It pins label, weight and normalization together.
    """
    label = torch.tensor([1.0] + [0.0] * k)
    batch = replace(random_batch(*[3] * (1 + k), prompts=[2] * 6), weight=torch.where(label == 1, 1, 0.2))
    batch = replace(batch, label=label)
    score = torch.zeros((), requires_grad=True)
    for _ in range(60):  # the loss is s^2 + ..: each step halves the distance
        (gradient,) = torch.autograd.grad(ppo.reward_loss(score.expand(batch.mask.shape), batch), score)
        score = (score - 0.25 * gradient).detach().requires_grad_()
    assert score.item() == pytest.approx(optimum, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Columns, through the real model


def test_what_each_column_may_see(actors):
    """Another last token changes its own log-probability and reward, but no value, not its own either: values and
    probabilities are read before the token, rewards after it. The off-by-one that most codes have had.
    """
    batch = random_batch(4, 1, 9, 6)
    last = (batch.prompt_len + batch.mask.sum(1) - 1)[:, None]  # (B, 1)
    other = replace(batch, tokens=batch.tokens.scatter(1, last, 1 + batch.tokens.gather(1, last)))
    with torch.no_grad():
        before, after = ((*ppo.actor_critic(actors, b), ppo.reward_scores(actors, b)) for b in (batch, other))
    is_last = torch.zeros_like(batch.mask).scatter(1, last, True)
    for name, a, b in zip(("logp", "value", "entropy", "score"), before, after, strict=True):
        assert torch.equal(a[~is_last], b[~is_last])
        assert (a[is_last] != b[is_last]).all() == (name in ("logp", "score"))
        assert (a[is_last] == b[is_last]).all() == (name in ("entropy", "value"))


def test_columns_by_hand(actors):
    """Every column of one row against logits, value and score read at the position where they belong."""
    batch = random_batch(5)
    (logp, value, entropy), score = ppo.actor_critic(actors, batch), ppo.reward_scores(actors, batch)
    p = actors.logits(actors(batch.tokens, "policy")).softmax(-1)[0]  # (T, V)
    V, r = (actors.scalar(actors(batch.tokens, name), name)[0] for name in ("value", "reward"))
    for t in range(5, 10):
        assert logp[0, t].item() == pytest.approx(p[t - 1, batch.tokens[0, t]].log().item(), rel=1e-4)
        assert entropy[0, t].item() == pytest.approx(torch.special.entr(p[t - 1]).sum().item(), rel=1e-4)
        assert value[0, t].item() == pytest.approx(V[t - 1].item(), rel=1e-4)
        assert score[0, t].item() == pytest.approx(r[t].item(), rel=1e-4)
    assert not any(x[~batch.mask].any() for x in (logp, entropy, value, score))


def test_stacked_pass_equals_three(actors):
    """One pass over rows of three adapters gives the values and gradients of three passes; the reward gets none."""
    batch = random_batch(4, 1, 9, 6)
    (logp, value, _), score = ppo.actor_critic(actors, batch), ppo.reward_scores(actors, batch)
    h, V = actors(batch.tokens, "policy"), actors(batch.tokens, "value")  # (B, T, C): of every token
    apart = ppo.token_logp(actors.logits(h[:, :-1][batch.mask[:, 1:]]), batch)
    apart_value = ppo.fill(batch.mask, actors.scalar(V[:, :-1][batch.mask[:, 1:]], "value"))
    judged = actors.scalar(actors(batch.tokens, "reward"), "reward") * batch.mask
    for one, other in ((logp, apart), (value, apart_value), (score, judged)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not score.requires_grad
    parameters = [*actors.adapter_parameters("policy"), *actors.adapter_parameters("value")]
    ours = torch.autograd.grad((logp * value).sum(), parameters)
    theirs = torch.autograd.grad((apart * apart_value).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", [None, "policy", (("policy", 3), ("value", 1)), (("policy", 1), ("value", 3))])
def test_states_of_some_tokens_are_those_of_all(actors, adapter, recompute):
    """The last block skips the tokens that nobody asks for: those that are asked for, in the order asked, and all
    gradients, stay what they are when every token is computed.
    """
    tokens = random_batch(4, 1, 9, 6).tokens
    T = tokens.shape[1]
    wanted = torch.tensor([3, 1, T - 1, T + 5, 2 * T + 2, 3 * T, 4 * T - 1])
    parameters = [p for name in ("policy", "value") for p in actors.adapter_parameters(name)]
    actors.recompute = recompute
    try:
        some, every = actors(tokens, adapter, indices=wanted), actors(tokens, adapter).flatten(0, 1)[wanted]
    finally:
        actors.recompute = False
    torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-5)
    if adapter is None:
        return
    ours, theirs = (torch.autograd.grad(h.sin().sum(), parameters, allow_unused=True) for h in (some, every))
    assert any(g is not None for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("whitened", [False, True])
def test_first_update_is_the_plain_policy_gradient(actors, whitened):
    """On the first update the ratio is exactly 1 and nothing is clipped, so the gradient is that of -mean(adv logp). A
    ratio near 1 here is the mark of log-probabilities taken from the sampler's cache or another dtype.
    """
    batch = random_batch(4, 1, 9, 6)
    (logp, value, entropy), score = ppo.actor_critic(actors, batch), ppo.reward_scores(actors, batch)
    reward = ppo.token_rewards(batch, score, 2.5)
    traj = ppo.trajectory(batch, logp, value, reward, GAMMA, LAM, whiten_advantages=whitened)
    assert (ppo.ratio(logp, traj.logp_old)[batch.mask] == 1).all()
    numbers = ppo.statistics(traj, batch, logp, value, entropy, 0.2, eos=(2,))
    assert numbers["ratio"] == numbers["ratio_max"] == 1 and numbers["clip_fraction"] == 0
    assert not any(getattr(traj, name).requires_grad for name in FIELDS)
    parameters = actors.adapter_parameters("policy")
    plain = -(traj.adv * logp)[batch.mask].mean()
    ours = torch.autograd.grad(ppo.policy_loss(logp, traj, 0.2), parameters, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(plain, parameters), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_trajectory_adds_up():
    """Reward = clamped score - late tokens - KL; advantages from the values, returns without them (eq. 4)."""
    batch = replace(random_batch(4, 1, 9, 6), ref_len=torch.tensor([4, 4, 4, 4]))
    logp, value, score, kl = (noise(batch, seed) * batch.mask for seed in range(4))
    reward = ppo.token_rewards(batch, score, 2.5, clamp=0.3, kl=kl, kl_coef=1.0)
    assert torch.equal(reward, score.clamp(-0.3, 0.3) + ppo.length_penalty(batch, 2.5) - kl)
    traj = ppo.trajectory(batch, logp, value, reward, 0.9, 0.5, kl)
    assert (
        torch.equal(traj.reward, reward)
        and torch.equal(traj.kl, kl)
        and torch.equal(traj.logp_old, logp)
        and torch.equal(traj.value, value)
    )
    assert torch.equal(traj.adv, ppo.gae(reward, value, batch.mask, 0.9, 0.5))
    assert torch.equal(traj.ret, ppo.returns(reward, batch.mask, 0.9))
    plain, white = (ppo.trajectory(batch, logp, value, reward, 0.9, 0.5, whiten_advantages=w) for w in (False, True))
    assert torch.equal(white.adv, ppo.whiten(plain.adv, batch.mask)) and torch.equal(white.ret, plain.ret)


def test_statistics_by_hand():
    """The logged numbers worked out on paper for a row of one token, ended by EOS, and one of three that was cut."""
    batch = replace(random_batch(1, 3), ref_len=torch.tensor([2, 4]))
    batch.tokens[0, 5], batch.tokens[1, 4] = 2, 9
    fill = lambda *x: ppo.fill(batch.mask, torch.tensor(x))  # noqa: E731
    zero, one, ret = fill(0.0, 0, 0, 0), fill(1.0, 1, 1, 1), fill(1.0, 2, 3, 2)
    traj = ppo.Trajectory(batch.tokens, batch.mask, zero, zero, one, 3 * one, ret)
    found = ppo.statistics(traj, batch, fill(1.5, 1, 0.9, 1.1).log(), ret + 0.5, 2 * one, 0.2, eos=(2,))
    assert found == pytest.approx({
        "return": 2, "reward": 1, "advantage": 3, "ratio": 1.125, "ratio_max": 1.5, "clip_fraction": 0.25, "entropy": 2,
        "explained_variance": 0.5, "length": 2, "reference_length": 3, "no_eos": 0.5,
    })  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def test_rollout_replaces_the_responses_only():
    """Prompts and reference lengths stay: else the penalty would be measured against the sample."""
    batch = random_batch(4, 1, 9, 6)
    asked = []
    drawn = [([9] * n, [-float(n)] * n) for n in (1, 3, 2, 12)]  # (response, log-probability of each of its tokens)
    sampled = ppo.rollout(batch, lambda prompts: asked.extend(prompts) or drawn)
    assert asked == [row[:n] for row, n in zip(batch.tokens.tolist(), (5, 2, 7, 3), strict=True)]
    assert sampled.mask.sum(1).tolist() == [1, 3, 2, 12] and (sampled.tokens[sampled.mask] == 9).all()
    for b, prompt in enumerate(asked):
        assert sampled.tokens[b, : len(prompt)].tolist() == prompt
    assert torch.equal(sampled.prompt_len, batch.prompt_len) and torch.equal(sampled.ref_len, batch.ref_len)
    assert torch.equal(sampled.logp, -sampled.mask.float() * sampled.mask.sum(1, keepdim=True))


@pytest.mark.parametrize("fraction, first", [(0, [0] * 8), (1, [1] * 8), (0.5, [0, 1] * 4), (0.25, [0, 0, 0, 1] * 2)])
def test_ground_truth_batches_are_spread_evenly(fraction, first):
    """Half and half (paper, 3.3) alternates, from a sampled batch on; other shares are spread as evenly."""
    shown = [ppo.is_ground_truth(step, fraction) for step in range(1000)]
    assert shown[:8] == first and sum(shown) == 1000 * fraction


@pytest.mark.parametrize("learns", [False, True])
def test_entropy_keeps_nothing_unless_it_is_learned_from(run_folder, learns):
    """A bonus needs the entropy's gradient; without one its graph would hold three times the logits in vain."""
    llama = model.load(run_folder / "base")
    for name, head in (("policy", None), ("value", "zero")):
        llama.add_adapter(name, 4, 8.0, ["q_proj"], torch.Generator().manual_seed(0), head)
    batch = data.collate([data.Datum("", "", "", [1, 5, 6], [7, 8, 2])])
    logp, value, entropy = ppo.actor_critic(llama, batch, learns)
    assert logp.requires_grad and value.requires_grad and entropy.requires_grad == learns
    assert (entropy[batch.mask] > 0).all()
