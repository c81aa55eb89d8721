"""Hallucinations, a class of negatives beyond the paper: the true output with ONE edit, so its false tokens are known.

Words and grammar are English. Where no edit of a kind fits, another kind is drawn. Zhou et al. 2021 (arXiv 2011.02593),
CLIFF (2109.09209), ConFiT (2112.08713).
"""

import os
import re

KINDS = ("speaker", "name", "number", "time", "negation", "object")
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


def swaps_in_lines(text, lines):
    """The swaps of each word of a line with the other words of that line."""
    found = []
    for line in lines:
        found += swaps(text, line.split(), line.split())
    return found


def speakers(datum):
    """The names at the beginning of the source's lines, as in "Anna: Hello"."""
    return sorted(set(re.findall(r"^([^\W\d][^:\n]{0,30}):(?=\s)", datum.source, re.M)))


def names(datum):
    """The speakers, and the capitalised words inside sentences."""
    words = re.findall(r"(?<=[\w,;] )[^\W\d_]{2,}\b", f"{datum.source}\n{datum.target}")
    return sorted({*speakers(datum), *(word for word in words if word.istitle())} - PLAIN)


def content(datum):
    """[(start, end, word, the word before)] of the target's words that the source has too, and that mean something."""
    words = set(re.findall(r"\w+", datum.source)) - PLAIN
    found = []
    for place in re.finditer(r"\b[^\W\d_]{4,}\b", datum.target):
        if place[0] in words and place[0].islower():
            before = datum.target[: place.start()].split()[-1:]
            found.append((place.start(), place.end(), place[0], before))
    return found


# One function a kind: (datum, other) -> [(start, end, new)], characters of the target and what replaces them. `other`
# is another example, which lends words.


def other_speaker(datum, other):
    return swaps(datum.target, speakers(datum), speakers(datum))


def other_name(datum, other):
    own = names(datum)
    return swaps(datum.target, own, sorted({*own, *names(other)}))


def other_number(datum, other):
    """Another last digit, or another number word."""
    found = []
    for place in re.finditer(DIGITS, datum.target):
        if not place["hour"]:
            last = place.end() - 1
            found += [(last, last + 1, digit) for digit in "123456789" if digit != datum.target[last]]
    return found + swaps_in_lines(datum.target, NUMBERS)


def other_time(datum, other):
    """Another hour of a clock time, or another word of the calendar."""
    found = []
    for place in re.finditer(DIGITS, datum.target):
        if place["hour"]:
            start, end = place.span("hour")
            found += [(start, end, str(hour)) for hour in range(1, 13) if hour != int(place["hour"])]
    return found + swaps_in_lines(datum.target, CALENDAR)


def negation(datum, other):
    """Is becomes is not, and the reverse."""
    found = []
    for pattern, new in NEGATIONS:
        for place in re.finditer(pattern, datum.target):
            found.append((place.start(), place.end(), place.expand(new)))
    return found


def other_object(datum, other):
    """A word that target and source share, by one of the other example that is not in this source.

    Both follow the same word ("the park", "the cake"): otherwise grammar would show the edit.
    """
    foreign = [word for word in content(other) if not re.search(rf"\b{word[2]}\b", datum.source)]
    found = []
    for start, end, _, before in content(datum):
        found += [(start, end, new) for _, _, new, before_new in foreign if before_new == before]
    return found


EDITS = {
    "speaker": other_speaker,
    "name": other_name,
    "number": other_number,
    "time": other_time,
    "negation": negation,
    "object": other_object,
}


def edits(datum, other):
    """{kind: [(start, end, new)]} of every kind."""
    return {kind: find(datum, other) for kind, find in EDITS.items()}


def hallucinated(datum, other, tokenizer, limit, rng, whole=False):
    """The true output with one edit, of a kind drawn among those that apply: (kind, response, judged), or three None.

    judged: see data.Datum; the edit's tokens, or with `whole` None: all.
    """
    found = edits(datum, other)
    for kind in rng.sample(KINDS, len(KINDS)):
        if not found[kind]:
            continue
        start, end, new = rng.choice(found[kind])
        text = datum.target[:start] + new
        rest = datum.target[end:]
        response = [*tokenizer.encode(text + rest), tokenizer.eos]
        if response != datum.response and len(response) <= limit:
            span = touched(datum.response, response, len(rest), tokenizer.decode)
            return kind, response, None if whole else tuple(range(*span))
    return None, None, None


def touched(truth, response, rest, decode):
    """(start, end): the tokens of a response that an edit of its truth has touched; both end with EOS.

    It starts at the first token that differs, since before it the two are the same text, and ends with the last token
    that differs or contains a character of the edit. rest: how many characters follow the edit. Where the edit only
    removes text, the span is the token after it.
    """
    start = len(os.path.commonprefix([truth, response]))
    kept = len(os.path.commonprefix([truth[start:][::-1], response[start:][::-1]]))
    while len(decode(response)) - len(decode(response[: len(response) - kept])) > rest:
        kept -= 1
    return start, max(start + 1, len(response) - kept)
