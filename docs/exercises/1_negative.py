"""Exercise 1: a sixth class of negatives, the hallucinated name.

    make exercise N=1

The reward model learns from bad outputs what to dislike, and it knows none but the five classes of `data.NEGATIVES`.
None of them is a fluent sentence with one wrong fact in it. Write that one: the true target, in which one name has been
replaced by a name that the source does not mention.

    target        Noah and Kate will read poems at the cafe tomorrow.
    other.target  Rita does not want to have lunch with Olga at nine.
    response      Olga and Kate will read poems at the cafe tomorrow.  (as token ids, EOS at the end)

A name, here, is a capitalised word: `names` below finds them. What is asked for:

* Take one name of `datum.target`, replace it everywhere in the target, as a whole word. The new one is a name of
  `other.target` that stands neither in `datum.source` nor in `datum.target`.
* Choose both with `rng.choice`, never with Python's own `random`: the same seed must make the same negatives.
* Return token ids that end with `tokenizer.eos`, `limit` of them at most, EOS counted.
* Return None where there is no name to replace, or none to put in its place.

Where to look: `data.shuffled` is the nearest relative, `data.with_negatives` calls it. `re.sub(rf"\bNoah\b", …)`.
"""

import re


def names(text):
    """The capitalised words of a text, each once, in order: "Bob and Al met Bob." -> ["Bob", "Al"]."""
    return list(dict.fromkeys(re.findall(r"\b[A-Z]\w*", text)))


def hallucinated_name(datum, other, tokenizer, limit, rng):
    """datum, other: data.Datum, of which source and target matter here. Returns a list of token ids, or None."""
    raise NotImplementedError
