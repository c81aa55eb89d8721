"""PPO on tokens: equations 1 to 4 of the paper, the trajectory they work on, and the losses of all stages.

An output token is an action, the tokens before it are the state. Column t of every (B, T) tensor belongs to token t:

    tokens    … prompt  p  | a    b    EOS |  pad
    logp                   | log pi(a|p) …  |        read at the hidden state of token t - 1, before the action
    value                  | V(p) …         |        read there too: the state before the action
    reward                 | r(p a) …       |        read at token t itself: the state after the action
    adv, ret               | eq. 2, eq. 4   |        the next state's value is in the next column

The paper counts states from s_0, the prompt: its r_{t'+1} and V(s_{t'}) are `reward` and `value` of the same column
here, V(s_{t'+1}) is the next column's value. Beyond the response all is 0, which makes V(s_T) = 0 after the last token,
be it EOS or the cap. Everything is fp32; values outside of the mask change nothing.

The equations take tensors only; "From hidden states to columns" calls the model, which is an argument, under the
adapters "policy", "value" and "reward".

Solway 2024, arXiv 2408.16753, section 3.3. PPO: Schulman et al. 2017, arXiv 1707.06347. GAE: arXiv 1506.02438.
Dimensions: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from data import collate


def unchanged(x):
    return x


@dataclass(frozen=True)
class Trajectory:
    """What one PPO update learns from; all (B, T), all constants: no gradient flows into them."""

    tokens: torch.Tensor
    mask: torch.Tensor  # bool: True on the response, EOS included
    logp_old: torch.Tensor
    value: torch.Tensor
    reward: torch.Tensor
    adv: torch.Tensor
    ret: torch.Tensor
    kl: torch.Tensor | None = None  # log-ratio of the policy to the base, where it was computed

    @staticmethod
    def cat(parts, whole=unchanged):
        """Join the trajectories of micro-batches into that of the batch. whole: applied to each joined tensor."""
        joined = {}
        for field in fields(Trajectory):
            columns = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if columns[0] is None else whole(torch.cat(columns))
        return Trajectory(**joined)


def masked_mean(x, mask):
    """Mean of x over mask: every token weighs the same, in short rows and in long ones."""
    return torch.where(mask, x, 0).sum() / mask.sum()


# ----------------------------------------------------------------------------------------------------------------------
# The equations


def ratio(logp, logp_old):
    """Equation 1: w = pi_theta(a|s) / pi_theta_old(a|s)."""
    return torch.exp(logp - logp_old)


def gae(reward, value, mask, gamma, lam):
    """Equation 2, generalized advantages: A_t = delta_t + gamma lam A_{t+1}, delta_t = r + gamma V(next) - V.

    reward, value (B, T) float, mask (B, T) bool; returns (B, T), 0 outside the mask.
    Example: gamma = lam = 1, reward [1, 1], value [0.5, 0.25] -> adv [1.5, 0.75] = return - value.
    """
    reward, value = torch.where(mask, reward, 0), torch.where(mask, value, 0)
    adv = torch.zeros_like(reward)
    next_adv = next_value = torch.zeros_like(reward[:, 0])  # (B,)
    for t in range(reward.shape[1] - 1, -1, -1):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        next_adv = torch.where(mask[:, t], delta + gamma * lam * next_adv, 0)
        next_value = value[:, t]
        adv[:, t] = next_adv
    return adv


def policy_loss(logp, traj, clip_eps):
    """Equation 3, to be minimized: minus the clipped objective, mean over all response tokens of the batch."""
    w = ratio(logp, traj.logp_old)
    objective = torch.minimum(w * traj.adv, w.clamp(1 - clip_eps, 1 + clip_eps) * traj.adv)
    return -masked_mean(objective, traj.mask)


def returns(reward, mask, gamma):
    """Equation 4, the value target: the Monte-Carlo return, NOT advantage + value as in almost every public PPO.

    (B, T) -> (B, T). It is GAE with lam = 1 and no values. Example: gamma 1, reward [1, 2, 3] -> [6, 5, 3].
    """
    return gae(reward, torch.zeros_like(reward), mask, gamma, 1.0)


def value_loss(value, traj, value_clip=0.0):
    """Squared error to the return, mean over response tokens. value_clip > 0: as OpenAI's PPO does."""
    error = (value - traj.ret).square()
    if value_clip > 0:
        near = traj.value + (value - traj.value).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (near - traj.ret).square())
    return masked_mean(error, traj.mask)


def length_penalty(batch, penalty):
    """-penalty on every response token beyond the length of the reference, EOS counted (paper, 3.2): (B, T)."""
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)  # (T,)
    late = column >= (batch.prompt_len + batch.ref_len)[:, None]  # (B, T)
    return -penalty * (late & batch.mask).float()


def whiten(adv, mask, total=unchanged):
    """Advantages with mean 0 and variance 1 over the response tokens (not in the paper: --whiten).

    adv, mask (B, T). total: sums a tensor over all ranks, where these are the rows of one.
    """
    tokens = total(mask.sum())
    mean = total(torch.where(mask, adv, 0).sum()) / tokens
    variance = total(torch.where(mask, adv - mean, 0).square().sum()) / tokens
    return torch.where(mask, (adv - mean) * torch.rsqrt(variance + 1e-8), 0)


# ----------------------------------------------------------------------------------------------------------------------
# The losses of the other two stages


def scored_tokens(mask, level):
    """The tokens that carry a reward, (B, T): all of the response ("token"), or its last one only ("sequence")."""
    if level == "token":
        return mask
    next_is_response = F.pad(mask[:, 1:], (0, 1))  # (B, T)
    return mask & ~next_is_response


def learned_tokens(batch, level):
    """The tokens that the reward model learns from, (B, T): those that are judged, or the last ones ("sequence")."""
    return batch.judged if level == "token" else scored_tokens(batch.mask, level)


def reward_loss(score, batch, level="token"):
    """Weighted squared error of the token scores (B, T) to the labels (paper, 3.2).

    A datum's loss is the mean over its tokens that carry the reward and are judged, so that long negatives do not drown
    short ones; the batch's is sum(w l) / sum(w), w = 1 for positives and 1/5 for negatives. Tokens that are not judged,
    around an edit, are the truth's: good, and a mean of their own, so that they do not drown the edit.
    """
    datum = row_mean((score - batch.label[:, None]).square(), learned_tokens(batch, level))  # (B,)
    if level == "token":
        datum = datum + row_mean((score - 1).square(), batch.mask & ~batch.judged)
    return (batch.weight * datum).sum() / batch.weight.sum()


def row_mean(x, mask):
    """Mean of each row over a mask, 0 if the mask is empty: (B, T) -> (B,)."""
    return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)


def mle_loss(logp, mask):
    """Cross entropy of the response tokens, logp (B, T)."""
    return -masked_mean(logp, mask)


# ----------------------------------------------------------------------------------------------------------------------
# From hidden states to columns


def indices_of(mask):
    """Where a mask is True, as indices into the flattened (B T): (B, T) bool -> (n,) long, row by row."""
    return mask.flatten().nonzero().squeeze(1)


def indices_before(mask):
    """Indices of the hidden states from which the n response tokens were chosen, one column before each: (n,).

    Every row begins with at least one prompt token, so that there is a state before its first response token.
    """
    return indices_of(mask) - 1


def fill(mask, flat):
    """(n,) values of the response tokens -> (B, T), 0 elsewhere; differentiable."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def token_logp(logits, batch):
    """log pi of the response tokens: (n, V) -> (B, T)."""
    return fill(batch.mask, -F.cross_entropy(logits, batch.tokens[batch.mask], reduction="none"))


def response_logp(llama, batch, adapter):
    """log pi of the response tokens under an adapter (None: the base), from one pass over the batch: (B, T)."""
    h = llama(batch.tokens, adapter, indices_before(batch.mask))  # (n, C)
    return token_logp(llama.logits(h, adapter), batch)


def token_entropy(logits, batch):
    """Entropy of the distributions that the response tokens were drawn from: (n, V) -> (B, T)."""
    logp = torch.log_softmax(logits, dim=-1)  # (n, V)
    return fill(batch.mask, -(logp.exp() * logp).sum(1))


def actor_critic(llama, batch, entropy_learns=False):
    """Policy and value in ONE pass: their rows are stacked in one batch over the shared base.

    The adapters differ, the base does not: each of its products (and each dequantization) is done once for both.
    Returns logp, value and entropy, all (B, T). entropy_learns: whether the loss has an entropy term; without, nothing
    of it is kept for backward.
    """
    B = len(batch.tokens)
    before = indices_before(batch.mask.repeat(2, 1))  # (2n,)
    h = llama(batch.tokens.repeat(2, 1), (("policy", B), ("value", B)), before)  # (2n, C)
    policy_h, value_h = h.chunk(2)  # each (n, C)
    logits = llama.logits(policy_h, "policy")  # (n, V)
    logp = token_logp(logits, batch)  # (B, T)
    entropy = token_entropy(logits if entropy_learns else logits.detach(), batch)  # (B, T)
    value = fill(batch.mask, llama.scalar(value_h, "value"))  # (B, T)
    return logp, value, entropy


LEAST_LOGP = -5.0  # of a token: what is less likely scores 0, and its exact probability is noise


def likelihood_score(logp):
    """The score of a token that has log-probability logp under the reward model: 1 if certain, 0 at LEAST_LOGP."""
    return 1 + logp.clamp(min=LEAST_LOGP) / -LEAST_LOGP


def token_scores(llama, batch, layout=None):
    """The reward model's score of every response token: (B, T), 0 elsewhere.

    With a scalar head (paper, 3.2) it is read at the state of the token itself. Without one it is a function of log pi
    of the token under the reward adapter (`reward --head likelihood`), read at the state before it.
    layout: the batch's rows with each prompt once, see speed/shared_prompts.py; the same scores, to rounding.
    """
    tokens = batch.tokens if layout is None else layout.tokens
    if llama.has_head("reward"):
        indices = indices_of(batch.mask) if layout is None else layout.indices  # (n,)
        score = fill(batch.mask, llama.scalar(llama(tokens, "reward", indices, layout), "reward"))
    else:
        indices = indices_before(batch.mask) if layout is None else layout.before  # (n,)
        h = llama(tokens, "reward", indices, layout)  # (n, C)
        logp = token_logp(llama.logits(h, "reward"), batch)  # (B, T)
        score = torch.where(batch.mask, likelihood_score(logp), 0)
    for row, finite in zip(batch.rows, score.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise FloatingPointError(f"row {row.id}: its score is NaN or infinite: {llama.why_not_finite()}")
    return score


@torch.no_grad()
def reward_scores(llama, batch, level="token"):
    """The reward model's score of every token that carries a reward: (B, T), 0 elsewhere.

    A separate pass, because its rows need no backward. Inside the pass of `actor_critic`, autograd would keep their
    activations and propagate through them: half more memory and backward work for nothing.
    """
    return token_scores(llama, batch) * scored_tokens(batch.mask, level)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


def rollout(batch, sample):
    """The batch with its responses replaced by sampled ones. Prompts and reference lengths stay.

    sample: list of prompts -> list of (response, log-probability of each of its tokens), as model.sample returns with
    with_logp. Batch -> Batch, so that "half sampled, half ground truth" (paper, 3.3) is one `if`.
    """
    device = batch.tokens.device
    responses, logp = zip(*sample([row.prompt for row in batch.rows]), strict=True)
    rows = [replace(row, response=response) for row, response in zip(batch.rows, responses, strict=True)]
    sampled = collate(rows, device)
    logp = fill(sampled.mask, torch.tensor(sum(logp, []), device=device))  # (B, T)
    return replace(sampled, ref_len=batch.ref_len, logp=logp)


def is_ground_truth(step, fraction):
    """Whether the batch of `step` shows the ground truth: evenly spread, 1/2 alternates sampled, truth, sampled, …"""
    return int((step + 1) * fraction) > int(step * fraction)


# ----------------------------------------------------------------------------------------------------------------------
# Trajectory and metrics


def token_rewards(batch, score, penalty, clamp=0.0, kl=None, kl_coef=0.0):
    """The reward of every response token: its score, minus the length penalty, minus kl_coef kl: (B, T).

    score, kl (B, T); clamp > 0 limits the score to [-clamp, clamp]. kl: log-ratio to the base.
    """
    if clamp > 0:
        score = score.clamp(-clamp, clamp)
    reward = score + length_penalty(batch, penalty)
    return reward - kl_coef * kl if kl_coef else reward


@torch.no_grad()
def trajectory(batch, logp, value, reward, gamma, lam, kl=None, whiten_advantages=False, total=unchanged):
    """The constants of an update, from the first pass over a batch: advantages (equation 2) and returns (equation 4).

    logp, value, reward (B, T); kl (B, T) or None: kept for the log. total: see `whiten`. Returns a Trajectory, whose
    logp_old is pi_old of equation 1: what the sampler drew with, or logp where the batch shows the truth.
    """
    value = value.detach()
    logp_old = logp.detach() if batch.logp is None else batch.logp  # the truth counts as the policy's own actions
    adv = gae(reward, value, batch.mask, gamma, lam)
    if whiten_advantages:
        adv = whiten(adv, batch.mask, total)
    ret = returns(reward, batch.mask, gamma)
    return Trajectory(batch.tokens, batch.mask, logp_old, value, reward, adv, ret, kl)


@torch.no_grad()
def statistics(traj, batch, logp, value, entropy, clip_eps, eos):
    """The metrics of one update as a dict of floats; docs/metrics.md explains each.

    logp, value, entropy (B, T): of the last pass over the batch. eos: the token ids that end a response.
    """
    mask = traj.mask
    length = mask.sum(1)  # (B,)
    w = ratio(logp, traj.logp_old)  # (B, T)
    error = masked_mean((traj.ret - value).square(), mask)
    variance = masked_mean((traj.ret - masked_mean(traj.ret, mask)).square(), mask)
    last_column = batch.prompt_len + length - 1  # (B,)
    last_token = batch.tokens.gather(1, last_column[:, None]).squeeze(1)  # (B,)
    ended = torch.isin(last_token, torch.tensor(eos, device=mask.device))  # (B,)
    numbers = {
        # Of a whole output, not discounted: not traj.ret, the discounted return from each token on.
        "return": (traj.reward * mask).sum().item() / len(mask),
        "reward": masked_mean(traj.reward, mask).item(),
        "advantage": masked_mean(traj.adv, mask).item(),
        "ratio": masked_mean(w, mask).item(),
        "ratio_max": torch.where(mask, w, 1).max().item(),
        "clip_fraction": masked_mean(((w - 1).abs() > clip_eps).float(), mask).item(),
        "entropy": masked_mean(entropy, mask).item(),
        "explained_variance": (1 - error / variance.clamp(min=1e-8)).item(),
        "length": length.sum().item() / len(mask),
        "reference_length": batch.ref_len.float().mean().item(),
        "no_eos": 1 - ended.float().mean().item(),
    }
    if traj.kl is not None:
        numbers["kl"] = masked_mean(traj.kl, mask).item()
    return numbers
