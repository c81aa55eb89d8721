"""A solution of exercise 1."""

import re


def names(text):
    return list(dict.fromkeys(re.findall(r"\b[A-Z]\w*", text)))


def hallucinated_name(datum, other, tokenizer, limit, rng):
    old = names(datum.target)
    new = [name for name in names(other.target) if name not in names(datum.source) + old]
    if not old or not new:
        return None
    text = re.sub(rf"\b{rng.choice(old)}\b", rng.choice(new), datum.target)
    return [*tokenizer.encode(text)[: limit - 1], tokenizer.eos]
