"""Any Python function as the reward: `ppo --reward rouge` or `--reward module:function`.

    function(source, reference, prediction) -> a number, or a list with one number for each word of prediction.split()

A number goes to the last token of the output, a list to the last token of each word.

Dimensions: B batch, T time.
"""

import functools
import importlib.util
import os
import re
import sys
import traceback
from numbers import Real
from pathlib import Path

import torch

import eval as evaluation
from formats.errors import UserError
from formats.words import choose_tokenizer


def rouge(source, reference, prediction, tokenizer="auto"):
    """la-rouge1-F1 of one prediction."""
    return evaluation.metrics([prediction], [reference], tokenizer)["la-rouge1-F1"]


BUILT_IN = {"rouge": rouge}


def is_function(name):
    """Whether a value of --reward names a function, as in "module:function", and not an adapter folder."""
    return name in BUILT_IN or re.fullmatch(r"[\w.]+:\w+", name) is not None


def load(name, references=()):
    """(function, file) for a value of --reward; file: the Path of its module, or None for a function built in.

    references: the true outputs of the data set, by which "rouge" chooses its tokenizer. Raises UserError if the
    function cannot be imported, and at the call that fails or returns anything but finite numbers.
    """
    function, file = (BUILT_IN[name], None) if name in BUILT_IN else import_function(name)
    if name == "rouge":
        function = functools.partial(function, tokenizer=choose_tokenizer(references))

    def checked(source, reference, prediction):
        where = f"--reward {name}, called with {source!r:.60}, {reference!r:.60}, {prediction!r:.60}"
        try:
            result = function(source, reference, prediction)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"{where}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})") from error
        words = len(prediction.split())
        numbers = result if isinstance(result, list) else [result]
        finite = all(isinstance(x, Real) and abs(x) <= torch.finfo(torch.float32).max for x in numbers)
        if not finite or (isinstance(result, list) and len(result) != words):
            raise UserError(f"{where}: {result!r:.60} is neither a finite number nor a list of {words}, one a word")
        return result

    return checked, file


def import_function(name):
    """(function, file) for "module:function"; the current folder is searched first, then the installed packages."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = import_module(module_name)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name}: cannot import it: {type(error).__name__}: {error}") from error
    file = getattr(module, "__file__", None)
    return function, Path(file) if file else None


def import_module(name):
    """A module by its name; one of the current folder also if lastmile has a module of that name, such as `model`."""
    file = Path(*name.split(".")).with_suffix(".py").resolve()
    if name.partition(".")[0] not in sys.modules or not file.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"reward_function_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def word_scores(function, batch, decode):
    """The function's reward of every response token: (B, T), 0 elsewhere. It replaces ppo.reward_scores."""
    score = torch.zeros(batch.mask.shape)  # (B, T)
    for b, row in enumerate(batch.rows):
        result = function(row.source, row.target, decode(row.response))
        pairs = [(len(row.response) - 1, result)]
        if isinstance(result, list):
            pairs = zip(word_ends(row.response, decode), result, strict=True)
        for end, number in pairs:
            score[b, len(row.prompt) + end] += float(number)  # one token can end two words
    return score.to(batch.tokens.device)


def word_ends(response, decode):
    """For each word of the decoded response, the index of the token that completes it; found by decoding prefixes."""
    words = decode(response).split()
    ends = []
    for i in range(len(response)):
        found = decode(response[: i + 1]).split()
        while len(ends) < len(found) and found[: len(ends) + 1] == words[: len(ends) + 1]:
            ends.append(i)
    return ends + [len(response) - 1] * (len(words) - len(ends))
