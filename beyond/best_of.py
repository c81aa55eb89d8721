"""Best of N: what a reward model knows that the model it is to teach does not. Measured before hours of PPO.

N outputs of each input are sampled and the reward model picks one. Where its picks are no better than greedy answers,
PPO against it cannot pay either. The oracle, which picks by the metric itself, says how much there is to gain.

Dimensions: B batch, T time, N outputs of one input.
"""

from functools import partial

import numpy as np

import data
import eval as evaluation
import model
import ppo
from training import ranks
from training.inputs import generator
from training.terminal import progress, say

METRIC = "la-rouge1-F1"


def best_of(settings, llama, tokenizer, rows, score, adapter, n):
    """{selection: {metric: array of one number an example}} for greedy answers, one sample and the best of n.

    rows: list of Datum. score: Batch -> (B, T), see training.inputs.open_reward. adapter: that answers, see lora.py.
    """
    s = settings
    limits = {"adapter": adapter, "max_new_tokens": s.max_new_tokens}
    greedy = ranks.sharded(partial(model.sample, llama, temperature=0, **limits))
    prompts = [row for row in rows for _ in range(n)]
    rng = generator(s, "best of", device=s.device)
    sampler = partial(model.sample, llama, generator=rng, temperature=s.temperature, **limits)
    bar = progress("judge: greedy"), progress(f"judge: {n} samples")
    answers = evaluation.predict(rows, greedy, 32, list, bar[0])
    groups = evaluation.predict(rows, lambda p: in_groups(sampler(p, copies=n), n), 8, list, bar[1])
    samples = [sample for group in groups for sample in group]
    mean, total = score_responses(s, rows, samples, score, n)
    texts = [tokenizer.decode(response) for response in samples]
    references = [row.target for row in rows]
    words = evaluation.choose_tokenizer(references)
    by_sample = evaluation.metrics_by_example(texts, [target for target in references for _ in range(n)], words)
    by_sample["exact"] = np.array([text == row.target for text, row in zip(texts, prompts, strict=True)], float)
    by_sample = {metric: values.reshape(-1, n) for metric, values in by_sample.items()}  # (rows, N)
    agreement = consensus(texts, n, words)
    picks = {
        "one sample": np.zeros(len(rows), int),
        f"best of {n} by the mean score": mean.argmax(1),
        f"best of {n} by the return": total.argmax(1),
        f"best of {n} by agreement": agreement.argmax(1),
        f"best of {n} by {METRIC} (oracle)": by_sample[METRIC].argmax(1),
    }
    found = {"greedy": evaluation.metrics_by_example([tokenizer.decode(a) for a in answers], references, words)}
    found["greedy"]["exact"] = np.array(
        [tokenizer.decode(a) == target for a, target in zip(answers, references, strict=True)], float
    )
    for name, pick in picks.items():
        found[name] = {metric: values[np.arange(len(rows)), pick] for metric, values in by_sample.items()}
    return found


def in_groups(items, n):
    return [items[start : start + n] for start in range(0, len(items), n)]


def score_responses(settings, rows, responses, score, n):
    """(mean score, return) of n responses to each row: two arrays (rows, N). The return has PPO's length penalty."""
    means, totals = [], []
    for start in range(0, len(responses), 32):
        part = range(start, min(start + 32, len(responses)))
        truth = data.collate([rows[i // n] for i in part], settings.device)
        batch = ppo.rollout(truth, lambda prompts, part=part: [(responses[i], [0.0] * len(responses[i])) for i in part])
        scores = score(batch)  # (B, T)
        means += (scores.sum(1) / batch.mask.sum(1)).tolist()
        totals += ppo.token_rewards(batch, scores, settings.length_penalty).sum(1).tolist()
    return np.array(means).reshape(-1, n), np.array(totals).reshape(-1, n)


def consensus(texts, n, words):
    """How much each of n outputs agrees with the others, by the metric: (rows, N). It asks no reward model."""
    found = []
    for start in range(0, len(texts), n):
        group = texts[start : start + n]
        one, other = zip(*[(a, b) for a in group for b in group], strict=True)
        agreement = evaluation.metrics_by_example(list(one), list(other), words)[METRIC].reshape(n, n)
        found.append(agreement.mean(1))
    return np.array(found)


def show(settings, found):
    """Print a selection a line, and whether the reward model's picks beat greedy answers."""
    metrics = (METRIC, "la-rouge2-F1", "la-rougeL-F1", "exact", "excess_length")
    lines = [["", *metrics]]
    for name, values in found.items():
        cells = []
        for metric in metrics:
            low, high = evaluation.interval(values[metric], settings.seed)
            cells.append(f"{values[metric].mean():.3f} ±{(high - low) / 2:.3f}")
        lines.append([name, *cells])
    n = len(next(iter(found.values()))[METRIC])
    say(f"\nbest of N, {n} examples:")
    say(evaluation.markdown(lines))
    for name, values in found.items():
        if " by " in name or name == "one sample":
            less = values[METRIC] - found["greedy"][METRIC]
            low, high = evaluation.interval(less, settings.seed)
            above = "above" if less.mean() > 0 else "below"
            say(f"judge: {name} is {above} greedy by {abs(less.mean()):.3f} {METRIC} ({low:+.3f} to {high:+.3f})")
