"""Hallucinations, a class of negatives beyond the paper: the true output with ONE edit, so its false tokens are known.

Words and grammar are English. Where no edit of a kind fits, another kind is drawn. Zhou et al. 2021 (arXiv 2011.02593),
CLIFF (2109.09209), ConFiT (2112.08713).
"""

import os
import re

KINDS = "speaker", "name", "number", "time", "negation", "object"
CALENDAR = [  # each line: words that can replace one another
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday", "today tonight tomorrow yesterday",
    "January February March April May June July August September October November December",
    "morning afternoon evening", "noon midnight dawn dusk", "week weekend month year", "hour day",
]  # fmt: skip
NUMBERS = ["two three four five six seven eight nine ten eleven twelve", "twenty thirty forty", "hundred thousand"]
COMMON = [
    "about after again also because been before both could does doing done down during each from have having here into "
    "just like more most much only other over same should some such than that their them then there these they this "
    "those through together under until very want wants were what when where which while will with would your"
]
PLAIN = set(" ".join(CALENDAR + NUMBERS + COMMON).split())  # neither a name nor a thing
DIGITS = r"(?P<hour>[0-9]{1,2}(?=[:.][0-9]{2}\b| ?[ap]\.?m\b| o['’]clock))([:.][0-9]{2})?|[0-9]+\b"
VERBS = "(want|like|need|love|know|think|agree|believe|plan|hope|feel|work|live|remember)"
NEGATIONS = [  # (pattern, what it becomes)
    (r"\b(is|are|was|were|would|could|should|must)\b(?! not\b|['’])", r"\1 not"),
    (r"\b(is|are|was|were|would|could|should|must|does|do|did|has|have|had|will)(?: not|n['’]t)\b", r"\1"),
    (r"\bwill\b(?! not\b|['’])", "won't"), (r"\bwon['’]t\b", "will"),
    (r"\bcan\b(?! not\b|['’])", "can't"), (r"\b(?:can['’]t|cannot|can not)\b", "can"),
    (rf"\b{VERBS}s\b", r"doesn't \1"), (rf"\bdoes(?: not|n['’]t) {VERBS}\b", r"\1s"),
]  # fmt: skip


def swaps(text, words, pool):
    """Each place of one of the words in a text, with each other word of the pool: (start, end, other)."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    places = re.finditer(rf"(?<!\w)(?:{either})(?!\w)", text) if words else ()
    return [(*place.span(), word) for place in places for word in pool if word != place[0]]


def speakers(datum):
    return sorted(set(re.findall(r"^([^\s:][^:\n]{0,30}):", datum.source, re.M)))


def names(datum):
    """Who speaks, and the capitalised words inside sentences."""
    words = re.findall(r"(?<=[\w,;] )[^\W\d_]{2,}\b", f"{datum.source}\n{datum.target}")
    return sorted({*speakers(datum), *(word for word in words if word.istitle())} - PLAIN)


def content(datum):
    """[(start, end, word, the word before)] of the target's words that the source has too, and that mean something."""
    words = set(re.findall(r"\w+", datum.source)) - PLAIN
    places = [place for place in re.finditer(r"\b[^\W\d_]{4,}\b", datum.target) if place[0] in words]
    return [(*p.span(), p[0], datum.target[: p.start()].split()[-1:]) for p in places if p[0].islower()]


def edits(datum, other):
    """{kind: [(start, end, new)]}: characters of the target, and what takes their place; `other` lends words."""
    text, who, own = datum.target, speakers(datum), names(datum)
    digits = list(re.finditer(DIGITS, text))
    hours, ends = [d for d in digits if d["hour"]], [d.end() for d in digits if not d["hour"]]
    negations = [(place, new) for pattern, new in NEGATIONS for place in re.finditer(pattern, text)]
    foreign = [found for found in content(other) if not re.search(rf"\b{found[2]}\b", datum.source)]
    in_words = lambda lines: [edit for line in lines for edit in swaps(text, line.split(), line.split())]  # noqa: E731
    return {
        "speaker": swaps(text, who, who),
        "name": swaps(text, own, sorted({*own, *names(other)})),
        "number": [(end - 1, end, new) for end in ends for new in "123456789" if new != text[end - 1]]  # the last digit
        + in_words(NUMBERS),
        "time": [(*d.span("hour"), str(h)) for d in hours for h in range(1, 13) if h != int(d["hour"])]
        + in_words(CALENDAR),
        "negation": [(*place.span(), place.expand(new)) for place, new in negations],
        # behind the same word ("the park", "the cake"), or grammar would give it away
        "object": [(*old[:2], new[2]) for old in content(datum) for new in foreign if old[3] == new[3]],
    }


def hallucinated(datum, other, tokenizer, limit, rng):
    """The true output with one edit, of a kind drawn among those that apply: (kind, response, span), or three None."""
    found = edits(datum, other)
    for kind in (kind for kind in rng.sample(KINDS, len(KINDS)) if found[kind]):
        start, end, new = rng.choice(found[kind])
        text, rest = datum.target[:start] + new, datum.target[end:]
        response = [*tokenizer.encode(text + rest), tokenizer.eos]
        if response != datum.response and len(response) <= limit:
            return kind, response, touched(datum.response, response, len(rest), tokenizer.decode)
    return None, None, None


def touched(truth, response, rest, decode):
    """(start, end): the tokens of a response that an edit of its truth has touched; both end with EOS.

    It starts at the first token that differs, since up to there the two are one text, and ends with the last that
    differs or holds a character of the edit; rest: how many characters follow it. Where the edit only takes away, what
    differs is the token after the seam.
    """
    start = len(os.path.commonprefix([truth, response]))
    kept = len(os.path.commonprefix([truth[start:][::-1], response[start:][::-1]]))
    while len(decode(response)) - len(decode(response[: len(response) - kept])) > rest:
        kept -= 1
    return start, max(start + 1, len(response) - kept)
