"""Data: from a name or a file to batches of token ids.

    load  ->  encode (template, tokenizer, filter)  ->  with_negatives  ->  epochs  ->  collate  ->  Batch

An `Example` is text, a `Datum` is one prompt and one response in token ids, a `Batch` is a rectangle of them.
Every row of a batch reads `prompt, response, padding`; EOS is the last token of a response, unless the cap cut it.
Everything that follows depends on two conventions:

* Column t of every (B, T) tensor belongs to token t.
* Masks come from lengths, never from comparing ids: Llama-2 has no padding token, and its EOS is an action.

Prompt and response are tokenized separately and their ids joined, so that training and sampling see the same ids.

Paper: Solway 2024, arXiv 2408.16753; sections 3.2 (negatives) and 4.2 (data sets).
Dimensions: B batch, T time (longest row of the batch).
"""

import hashlib
import itertools
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import toy as corpus
from formats import tables
from formats import tokenizer as tokenizers
from formats.chat_template import prompt as own_prompt
from formats.errors import UserError
from formats.files import read_text

# ----------------------------------------------------------------------------------------------------------------------
# Randomness: every random draw is a pure function of (seed, stream, step), so no generator's state is ever saved.


def stream_seed(seed, *stream):
    """A 63-bit seed for one named stream, for example `stream_seed(1337, "rollout", step)`.

    Streams do not disturb each other: sampling one more token changes neither the data order nor the negatives.
    """
    key = ":".join(map(str, (seed, *stream))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed, *stream, device="cpu"):
    """The random numbers of one named stream."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *stream))


# ----------------------------------------------------------------------------------------------------------------------
# Example: one pair of texts


@dataclass(frozen=True)
class Example:
    id: str
    source: str
    target: str
    label: float = 1.0  # 0: labelled bad in the data set


def load(name_or_path, split, input_column=None, target_column=None, negative_column=None, delimiter=None):
    """All examples of one split: a list of Example, texts stripped and line ends as "\\n".

    name_or_path: "toy" (made on the spot), a data set of the Hub by its short name, a folder with a file for each
    split, or one file, of whose rows each split gets its share; see formats/tables.py and, for the columns,
    formats/columns.py. split: "train", "validation" or "test"; toy also has "pretrain".
    Raises FileNotFoundError or UserError with the file, the row and the remedy.
    """
    if name_or_path == "toy":
        return toy(split)
    rows = tables.read(name_or_path, split, input_column, target_column, negative_column, delimiter)
    return [Example(*row) for row in rows]


def toy(split):
    """The embedded data set, the same on every machine; see toy/."""
    rng = random.Random(stream_seed(0, "toy", split))
    return [Example(*row) for row in corpus.pairs(split, rng)]


# ----------------------------------------------------------------------------------------------------------------------
# Datum: prompt and response in token ids

SYSTEM = (
    "You are a helpful assistant who writes short and accurate summaries. You always keep to the facts of the text and "
    "add nothing of your own."
)
TASK = """Read the following text and summarize it in one or two short sentences. Output the summary only: do not \
begin with an introduction such as "Sure, here is a summary", and do not end with a comment.

{source}"""

# name: (the prompt, the token that ends an answer; "": the tokenizer's EOS). With the Llama tokenizer the words of
# llama2 around {source}, BOS included, cost 98 tokens: the filter at 400 then drops 12.4 % of SAMSum's training split
# and 13.2 % of its test split (paper, 4.2: at most 13.4 %).
TEMPLATES = {
    "llama2": (f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{TASK} [/INST]", ""),
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{TASK}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "chatml": (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{TASK}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "plain": ("{source}\n\nSummary:\n", ""),
}

MARKS = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "llama2": "[INST]"}  # what only that one has

# What `pretrain` gives its small models, whose time would otherwise go into reading the same 98 tokens again and again.
SHORT_TEMPLATE = "[INST] {source} [/INST]"


def default_template(folder, controls, chat_template=""):
    """The template of a model folder: its template.txt, or the one whose control tokens its tokenizer has; where it has
    those of two (ChatML learned by a Llama 3), the one whose tokens its own chat template has. A chat template with
    none of them, or that switches thinking off, is the model's own.
    """
    if (folder / "template.txt").is_file():
        return folder / "template.txt"
    found = [name for name, mark in MARKS.items() if mark in controls]
    named = [name for name in (*found, "llama2") if MARKS[name] in chat_template]
    if chat_template not in ("", "null") and (not named or "enable_thinking" in chat_template):
        return "model"
    return [*named, *found, "llama2"][0]


def load_template(name, folder, controls, chat_template=""):
    """(prompt, token that ends an answer or "") for the value of --template.

    name: one of TEMPLATES, "model" for its own chat template, or a text file with {source} where the input goes; ""
    takes the folder's template.txt, or else the one whose control tokens the tokenizer has (controls), or else its own.
    """
    if not name:
        name = default_template(Path(folder), controls, chat_template)
    if name == "model":
        return own_prompt(folder, chat_template, controls, SYSTEM, TASK)
    if name not in TEMPLATES:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"{name}: no such file; --template takes {', '.join(TEMPLATES)}, model, or a text file with {{source}}"
            )
        text = read_text(Path(name), 1 << 16)
        if text.count("{source}") != 1:
            raise UserError(f"{name}: the template must contain {{source}} exactly once, where the input text goes")
        names = {prompt: name for name, (prompt, _) in TEMPLATES.items()}
        if text not in names:
            return text, ""
        name = names[text]  # as a stage has written it: answers end as those of the template
    missing = sorted(set(re.findall(r"<\|\w+\|>", TEMPLATES[name][0])) - set(controls))
    if missing:
        raise UserError(f"--template {name}: this model's tokenizer has no {missing[0]}; choose another --template")
    return TEMPLATES[name]


def load_tokenizer(folder, template=""):
    """The tokenizer of a model folder with the prompt that --template names."""
    tokenizer = tokenizers.Tokenizer(folder)
    tokenizer.set_template(*load_template(template, folder, tokenizer.controls, tokenizer.chat_template))
    return tokenizer


def train_tokenizer(texts, vocab_size, folder):
    """Train a SentencePiece BPE like Llama's on texts, and write it to <folder>/tokenizer.model."""
    tokenizers.train(texts, vocab_size, folder)
    return load_tokenizer(folder)


@dataclass(frozen=True)
class Datum:
    """One prompt with one response. `kind` is "positive" or the name of a class of negatives, `label` 1 or 0.

    judged: indices of the response tokens that the label applies to; the others are good. None: all of them.
    """

    id: str
    source: str
    target: str
    prompt: list  # token ids: BOS, template around the source
    response: list  # token ids: of a true output target and EOS
    label: float = 1.0
    weight: float = 1.0
    kind: str = "positive"
    judged: tuple | None = None


def encode(examples, tokenizer, max_input_tokens=400, max_new_tokens=100, append_eos=True):
    """Tokenize examples and drop those that are too long.

    max_input_tokens counts BOS, template and source (paper, 4.2); max_new_tokens counts target and EOS: a response
    that the sampler cannot finish is no example to learn from (choice; it drops none of SAMSum).
    append_eos=False leaves EOS out of the labels: `mle --no-eos-in-labels`. An example that is labelled bad becomes
    a Datum with label 0 and of kind "rejected".
    Returns (list of Datum, {"kept", "long_input", "long_output"}).
    """
    prompts = tokenizer.prompts([example.source for example in examples])
    targets = tokenizer.encode([example.target for example in examples])
    kept = []
    counts = {"kept": 0, "long_input": 0, "long_output": 0}
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        if not target:
            raise UserError(f"the tokenizer finds no tokens in the output {example.target!r:.80}; fix or remove it")
        if len(prompt) > max_input_tokens:
            counts["long_input"] += 1
        elif len(target) + 1 > max_new_tokens:
            counts["long_output"] += 1
        else:
            counts["kept"] += 1
            response = [*target, tokenizer.eos] if append_eos else target
            datum = Datum(example.id, example.source, example.target, prompt, response)
            kept.append(datum if example.label else replace(datum, label=0.0, kind="rejected"))
    return kept, counts


# ----------------------------------------------------------------------------------------------------------------------
# Negatives (paper, 3.2). Each class: (datum, other, tokenizer, limit, rng) -> response ids, or None where it has none.
# `other` is the datum this one is re-paired with or None, `limit` the cap on output tokens. A new class is one function
# here and one line in NEGATIVES.


def random_tokens(datum, other, tokenizer, limit, rng):
    """Uniform over ordinary ids, as long as the true response: so that length is no clue."""
    return [*rng.choices(tokenizer.ordinary, k=len(datum.response) - 1), tokenizer.eos]


def mismatched(datum, other, tokenizer, limit, rng):
    """The true response of another input: fluent, well formed, irrelevant."""
    return other.response if other else None


NO_BLANKS = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"  # between words, as in Chinese or Thai
)


def shuffled(datum, other, tokenizer, limit, rng):
    """The right words in the wrong order; the characters in languages that put no blanks between words."""
    words, blank = datum.target.split(), " "
    if len(re.findall(NO_BLANKS, datum.target)) > len(words):
        words, blank = list(datum.target), ""
    if len(set(words)) < 2:
        return None  # one word, or one word repeated: no other order exists
    mixed = words
    while mixed == words:
        mixed = rng.sample(words, len(words))
    return [*tokenizer.encode(blank.join(mixed))[: limit - 1], tokenizer.eos]


def repetitive(datum, other, tokenizer, limit, rng):
    """A correct beginning whose last 1 to 8 tokens then repeat, to the cap or to a random length."""
    target = datum.response[:-1]
    start = target[: rng.randint(1, len(target))]
    loop = start[-rng.randint(1, min(8, len(start))) :]
    length = limit if rng.random() < 0.5 else rng.randint(len(start) + 1, limit)
    text = start + loop * (limit // len(loop) + 1)
    return text[:limit] if length == limit else [*text[:length], tokenizer.eos]


def copied_input(datum, other, tokenizer, limit, rng):
    """The input text itself, cut at the cap."""
    text = tokenizer.encode(datum.source)
    return text[:limit] if len(text) >= limit else [*text, tokenizer.eos]


NEGATIVES = {
    "random_tokens": random_tokens,
    "mismatched": mismatched,
    "shuffled": shuffled,
    "repetitive": repetitive,
    "copied_input": copied_input,
}


def with_negatives(data, tokenizer, limit, seed, edit=None, samples=()):
    """The true outputs and, for each, one negative of every class: label 0, weight 1/5 (paper, 3.2).

    edit: one more class, a function (datum, other, tokenizer, limit, rng) -> (kind, response, judged), see
    beyond/hallucinations.py. samples: {one more class: a response for each true output}. Outputs labelled bad in the
    data set are one more, "rejected", which weighs no more than another. All classes of a datum together weigh at most
    1. A negative with the text or the ids of a true output of the same prompt is left out: the label would contradict
    itself. Returns a list of Datum, each true output followed by its negatives, then the rejected ones. The same seed
    makes the same negatives.
    """
    samples = dict(samples)
    positives = [datum for datum in data if datum.label]
    rejected = [datum for datum in data if not datum.label]
    weight = 1 / (len(NEGATIVES) + bool(edit) + len(samples) + bool(rejected))
    partners = derangement([datum.target for datum in positives], random.Random(stream_seed(seed, "mismatched")))
    truths = defaultdict(set)  # prompt -> its true outputs, as text and as ids
    for datum in positives:
        truths[tuple(datum.prompt)] |= {datum.target, tuple(datum.response)}
    rows = []
    for i, (datum, partner) in enumerate(zip(positives, partners, strict=True)):
        other = None if partner is None else positives[partner]
        made = []  # (kind, response or None, judged or None)
        for kind, make in NEGATIVES.items():
            rng = random.Random(stream_seed(seed, "negative", kind, i))
            made.append((kind, make(datum, other, tokenizer, limit, rng), None))
        if edit:
            rng = random.Random(stream_seed(seed, "negative", "hallucination", i))
            made.append(edit(datum, other or datum, tokenizer, limit, rng))
        for kind, responses in samples.items():
            made.append((kind, responses[i], None))
        rows.append(datum)
        for kind, response, judged in made:
            if response is None:
                continue
            same = {tokenizer.decode(response).strip(), tuple(response)} & truths[tuple(datum.prompt)]
            if not same:
                rows.append(replace(datum, response=response, label=0.0, weight=weight, kind=kind, judged=judged))
    rejected = [d for d in rejected if not {d.target, tuple(d.response)} & truths[tuple(d.prompt)]]
    weight *= min(1, len(positives) / max(1, len(rejected)))
    return rows + [replace(datum, weight=weight) for datum in rejected]


def derangement(texts, rng):
    """Partners p with texts[p[i]] != texts[i]: a random permutation, in which rows with equal texts are swapped away.

    A text that fills more than half of the rows, as "yes" may, leaves some of them without a partner: None, at random.
    """
    rows = list(range(len(texts)))
    text, most = Counter(texts).most_common(1)[0]
    if most > len(texts) - most:
        same = [i for i in rows if texts[i] == text]
        left_out = set(rng.sample(same, 2 * most - len(texts)))
        rows = [i for i in rows if i not in left_out]
    p = [None] * len(texts)
    for i, partner in zip(rows, rng.sample(rows, len(rows)), strict=True):
        p[i] = partner
    for i in rows:  # a swap never makes a new clash, so one pass over the rows clears them all
        while texts[p[i]] == texts[i]:
            j = rows[rng.randrange(len(rows))]
            if texts[p[j]] != texts[i] and texts[p[i]] != texts[j]:
                p[i], p[j] = p[j], p[i]
    return p


# ----------------------------------------------------------------------------------------------------------------------
# Batch: a rectangle of rows


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # (B, T) long: prompt, response, padding
    mask: torch.Tensor  # (B, T) bool: True on the response, EOS included
    prompt_len: torch.Tensor  # (B,) long
    ref_len: torch.Tensor  # (B,) long: tokens of the response, EOS included; ppo.rollout keeps the truth's
    judged: torch.Tensor  # (B, T) bool: the response tokens that the label applies to, nearly always all of them
    label: torch.Tensor  # (B,) float: 1 good, 0 bad
    weight: torch.Tensor  # (B,) float: 1, or 1/5 for a negative
    rows: tuple  # of B Datum: what the batch was made from
    logp: torch.Tensor | None = None  # (B, T) float: of sampled responses, as they were drawn; see ppo.rollout

    def __getitem__(self, rows):
        """The batch of some rows, a slice; padding is kept."""
        return Batch(*[None if column is None else column[rows] for column in vars(self).values()])

    def split(self, size):
        """Micro-batches of at most `size` rows. 0: one, the whole batch."""
        B = len(self.rows)
        size = size or B
        return [self[start : start + size] for start in range(0, B, size)]


def collate(data, device="cpu"):
    """Lay a list of Datum out as one Batch, padded on the right."""
    rows = [datum.prompt + datum.response for datum in data]
    prompt_len = torch.tensor([len(datum.prompt) for datum in data])  # (B,)
    row_len = torch.tensor([len(row) for row in rows])  # (B,)
    tokens = pad_sequence(list(map(torch.tensor, rows)), batch_first=True)  # (B, T); padding is never read
    column = torch.arange(tokens.shape[1])  # (T,)
    mask = (column >= prompt_len[:, None]) & (column < row_len[:, None])  # (B, T)
    judged = mask.clone()  # (B, T)
    for b, datum in enumerate(data):
        if datum.judged is not None:
            judged[b] = False
            judged[b, len(datum.prompt) + torch.tensor(datum.judged)] = True
    label = torch.tensor([datum.label for datum in data])  # (B,)
    weight = torch.tensor([datum.weight for datum in data])  # (B,)
    tensors = [tokens, mask, prompt_len, row_len - prompt_len, judged, label, weight]
    return Batch(*[tensor.to(device) for tensor in tensors], rows=tuple(data))


def fraction(part, whole):
    """Loss share of a micro-batch: its sum over that of the batch, both masks or weights. Exactly 1 for all of it."""
    return part.sum().item() / whole.sum().item()


# ----------------------------------------------------------------------------------------------------------------------
# Epochs: which rows are in which batch, as lists of row numbers, each row exactly once


def epochs(rows, batch_size, seed, rows_per_prompt=1):
    """The batches of epoch 0, 1, 2, … without end. A pure function of its arguments, so that a run can be resumed.

    rows: list of Datum. rows_per_prompt: how many rows of one prompt come together at most, so that they can share a
    pass over it (speed/shared_prompts.py); 0: all; 1: rows are shuffled one by one.
    """
    lengths = [len(row.prompt) + len(row.response) for row in rows]
    for epoch in itertools.count():
        if rows_per_prompt == 1:
            yield from batches(lengths, batch_size, seed, epoch)
        else:
            yield from grouped_batches(rows, batch_size, seed, epoch, rows_per_prompt)


def batches(lengths, batch_size, seed, epoch, pool=16):
    """One epoch of batches of rows of similar length.

    The rows are shuffled, cut into pools of 16 batches, sorted by length inside a pool, cut into batches, and the
    batches shuffled: little padding, and every row is still equally likely at any time. The last batch may be smaller.
    """
    rng = np.random.default_rng(stream_seed(seed, "order", epoch))
    order = rng.permutation(len(lengths)).tolist()
    found = []
    for start in range(0, len(order), pool * batch_size):
        rows = sorted(order[start : start + pool * batch_size], key=lengths.__getitem__)
        found += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [found[i] for i in rng.permutation(len(found))]


APART = {"positive": 0, "mismatched": 2}  # where in its group a row comes; the others: 1


def grouped_batches(rows, batch_size, seed, epoch, most, pool=16):
    """One epoch in which rows of one prompt come together, at most `most` (0: all) and half a batch.

    Of a datum's six rows by three, the truth comes apart from the mismatched output, which is most like it: with both
    in one batch a tiny reward model may learn worse to tell them (docs/speed.md). rows: list of Datum. Groups are
    shuffled, cut into pools, sorted and dealt as single rows are; as a group is not cut, a batch has batch_size rows
    on average.
    """

    def place(i):
        return APART.get(rows[i].kind, 1)

    rng = np.random.default_rng(stream_seed(seed, "order", epoch))
    size = min(most or batch_size, max(1, batch_size // 2))  # larger ones would leave batches empty
    groups = []
    for same in same_prompt(rows, rng.permutation(len(rows)).tolist()):
        same = sorted(same, key=place)
        groups += [same[i : i + size] for i in range(0, len(same), size)]
    groups = [groups[i] for i in rng.permutation(len(groups))]
    number = math.ceil(len(rows) / batch_size)
    pool_size = max(1, pool * len(groups) // number)
    found = [[] for _ in range(number)]
    done = 0
    for start in range(0, len(groups), pool_size):
        for group in sorted(groups[start : start + pool_size], key=partial(layout_length, rows)):
            found[int((done + len(group) / 2) * number / len(rows))] += group
            done += len(group)
    return [found[i] for i in rng.permutation(number)]


def same_prompt(rows, order):
    """The row numbers of `order`, those with the same prompt together: a list of lists."""
    groups = defaultdict(list)
    for i in order:
        groups[tuple(rows[i].prompt)].append(i)
    return list(groups.values())


def layout_length(rows, group):
    """Tokens of one prompt with the responses of a group of row numbers."""
    return len(rows[group[0]].prompt) + sum(len(rows[i].response) for i in group)
