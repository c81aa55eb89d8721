"""Best of N: what a reward model knows that the model it is to teach does not. Measured before hours of PPO.

N outputs of each input are sampled and the reward model picks one. If its picks are no better than greedy answers, PPO
against it cannot pay either. The oracle, which picks by the metric itself, says how much there is to gain.
Maximum likelihood on the picks is a control for PPO: RAFT (Dong et al. 2023, arXiv 2304.06767).

Dimensions: B batch, T time, R rows, N outputs of one row.
"""

from dataclasses import replace

import numpy as np

import data
import eval as evaluation
import model
import ppo
from formats.words import choose_tokenizer
from safety.terminal import progress, say

METRIC = "la-rouge1-F1"
SHOWN = (METRIC, "la-rouge2-F1", "la-rougeL-F1", "exact", "excess_length")
BATCH_SIZE = 32  # outputs in one sampling batch
LENGTH_PENALTY = 2.5  # for each token beyond the reference, as PPO's default


def sampled(settings, llama, rows, adapter, n):
    """n samples of each row at temperature 1: a list of R lists of n responses. The prompt is read once."""
    rng = data.generator(settings.seed, "best of", device=settings.device)

    def sample(prompts):
        responses = model.sample(llama, prompts, adapter, settings.max_new_tokens, generator=rng, copies=n)
        return [responses[start : start + n] for start in range(0, len(responses), n)]

    return evaluation.predict(rows, sample, max(1, BATCH_SIZE // n), list, progress(f"{n} samples"))


def judged(settings, rows, groups, score, penalty=0.0):
    """(mean score, return) of each row's responses: two arrays (R, N). penalty: of each token of
    the return that is beyond the reference's length, as in PPO.

    groups: R lists of N responses. score: Batch -> (B, T), see interface.inputs.open_reward.
    """
    means, returns = [], []
    for row, responses in zip(rows, groups, strict=True):
        truth = data.collate([row] * len(responses), settings.device)
        sampled_rows = [replace(row, response=response) for response in responses]
        batch = replace(data.collate(sampled_rows, settings.device), ref_len=truth.ref_len)
        scores = score(batch)  # (N, T)
        means.append((scores.sum(1) / batch.mask.sum(1)).tolist())
        returns.append(ppo.token_rewards(batch, scores, penalty).sum(1).tolist())
    return np.array(means), np.array(returns)


def picked(settings, rows, score, groups):
    """The rows with the best of their samples, by the mean score, in place of the true output: RAFT's targets."""
    means, _ = judged(settings, rows, groups, score)
    best = means.argmax(1)  # (R,)
    return [replace(row, response=groups[i][best[i]], kind="picked") for i, row in enumerate(rows)]


def compare(settings, llama, tokenizer, rows, score, adapter, n):
    """{way to choose: {metric: array of one number a row}}: greedy answers, one sample, the best of n by each judge."""
    greedy = evaluation.predict(
        rows, lambda prompts: model.sample(llama, prompts, adapter, settings.max_new_tokens, 0), BATCH_SIZE,
        tokenizer.decode, progress("greedy"),
    )  # fmt: skip
    groups = sampled(settings, llama, rows, adapter, n)
    means, returns = judged(settings, rows, groups, score, LENGTH_PENALTY)
    texts = [tokenizer.decode(response) for responses in groups for response in responses]
    words = choose_tokenizer([row.target for row in rows])
    measured = measure(texts, [row.target for row in rows for _ in range(n)], words)
    measured = {metric: values.reshape(-1, n) for metric, values in measured.items()}  # (R, N)
    choices = {
        "one sample": np.zeros(len(rows), int),
        f"best of {n} by the mean score": means.argmax(1),
        f"best of {n} by the return": returns.argmax(1),
        f"best of {n} by agreement": agreement(texts, n, words).argmax(1),
        f"best of {n} by {METRIC} (oracle)": measured[METRIC].argmax(1),
    }
    found = {"greedy": measure(greedy, [row.target for row in rows], words)}
    for name, choice in choices.items():
        found[name] = {metric: values[np.arange(len(rows)), choice] for metric, values in measured.items()}
    return found


def measure(texts, references, words):
    """`eval.metrics_by_example`, and whether a text is the reference."""
    found = evaluation.metrics_by_example(texts, references, words)
    return found | {"exact": np.array([a == b for a, b in zip(texts, references, strict=True)], float)}


def agreement(texts, n, words):
    """How much each of n outputs agrees with the others, by the metric: (R, N). It asks no reward model.

    Minimum Bayes risk decoding: Eikema and Aziz 2020, arXiv 2005.10283.
    """
    found = []
    for start in range(0, len(texts), n):
        group = texts[start : start + n]
        one, other = zip(*[(a, b) for a in group for b in group], strict=True)
        found.append(evaluation.metrics_by_example(list(one), list(other), words)[METRIC].reshape(n, n).mean(1))
    return np.array(found)


def show(settings, found):
    """Print a way to choose a line, and whether the reward model's picks beat greedy answers."""
    lines = [["", *SHOWN]]
    for name, values in found.items():
        cells = []
        for metric in SHOWN:
            low, high = evaluation.interval(values[metric], settings.seed)
            cells.append(f"{values[metric].mean():.3f} ±{(high - low) / 2:.3f}")
        lines.append([name, *cells])
    say(f"\nbest of N, {len(found['greedy'][METRIC])} examples:")
    say(evaluation.markdown(lines))
    for name, values in found.items():
        if " by the " in name:
            less = values[METRIC] - found["greedy"][METRIC]
            low, high = evaluation.interval(less, settings.seed)
            above = "above" if less.mean() > 0 else "below"
            say(f"judge: {name} is {above} greedy by {abs(less.mean()):.3f} {METRIC} ({low:+.3f} to {high:+.3f})")
