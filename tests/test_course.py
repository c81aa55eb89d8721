"""The course: its page shows what the engine does today, its exercises tell right answers from plausible wrong ones."""

import importlib.util
import re
from pathlib import Path

import pytest

import quant

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


walkthrough, exercises = load(DOCS / "walkthrough.py"), load(DOCS / "exercises/check.py")

# ----------------------------------------------------------------------------------------------------------------------
# The walkthrough

NUMBER = re.compile(r"-?\d+\.\d+")


def differences(shown, found):
    """Lines of two texts that differ in more than spaces and the rounding of another CPU."""
    lines = [text.splitlines() for text in (shown, found)]
    if len(lines[0]) != len(lines[1]):
        return [f"{len(lines[0])} lines shown, {len(lines[1])} printed"]
    wrong = []
    for a, b in zip(*lines, strict=True):
        numbers = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
        near = all(abs(float(x) - float(y)) <= 0.2 + 0.03 * abs(float(y)) for x, y in numbers)
        if not near or NUMBER.sub("", a).replace("-", "").split() != NUMBER.sub("", b).replace("-", "").split():
            wrong.append(f"shown   {a}\nprinted {b}")
    return wrong


def test_the_walkthrough_shows_what_the_engine_prints():
    """A page of pasted numbers rots: print them anew and compare, words exactly, numbers within what another CPU's
    rounding does in 60 steps of training. Each number worked out by hand is compared, far more closely, where it is
    printed. If the engine was meant to change: make walkthrough FLAGS=--write, and read the page again."""
    page = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
    shown, found = dict(walkthrough.FENCE.findall(page)), walkthrough.blocks()
    assert list(shown) == list(found)
    wrong = [line for name in shown for line in differences(shown[name], found[name])]
    assert not wrong, "\n".join(["make walkthrough FLAGS=--write mends it, if this was meant:", *wrong])


def test_a_walkthrough_that_has_rotted_is_found():
    """What the comparison above must not let pass: another word, another number, a line too many."""
    line = "| 36 |  </s> | -7.98 | 1.06 |"
    assert not differences(line, "| 36 | </s> | -7.97 | 1.07 |")
    for other in ("| 36 |  _It | -7.98 | 1.06 |", "| 35 |  </s> | -7.98 | 1.06 |", "| 36 |  </s> | -7.98 | 1.56 |",
                  "| 36 |  </s> | -7.98 |", f"{line}\n{line}"):  # fmt: skip
        assert differences(line, other), other


def test_the_walkthrough_names_functions_that_exist():
    """Functions move and are renamed; a student who looks for one that is gone has lost the thread."""
    name_of = re.compile(r"`((?:data|model|lora|quant|ppo|eval|lastmile)\.\w+(?:\.\w+)?)`")
    pages = [DOCS / "walkthrough.md", *(DOCS / "exercises").glob("*.py")]
    named = {name for page in pages for name in name_of.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 30
    for name in named:
        module, *path = name.split(".")
        found = __import__(module)
        for part in path:
            assert hasattr(found, part), name
            found = getattr(found, part)


# ----------------------------------------------------------------------------------------------------------------------
# The exercises

WRONG = [  # exercise, what is wrong, a piece of the solution, what stands there instead
    (1, "no EOS", ", tokenizer.eos]", "]"),
    (1, "a draw without the seed", "rng.choice(new)", "__import__('random').choice(new)"),
    (1, "a name that the source knows", " if name not in names(datum.source) + old", ""),
    (1, "parts of words", r'rf"\b{rng.choice(old)}\b"', "rng.choice(old)"),
    (1, "longer than the limit", "[: limit - 1]", ""),
    (2, "a value beyond the mask", "gamma * next_value", "gamma * (value[b, t + 1] if t + 1 < len(value[b]) else 0)"),
    (2, "the advantage not discounted by gamma", "gamma * lam * next_adv", "lam * next_adv"),
    (2, "TD error alone", "delta + gamma * lam * next_adv", "delta"),
    (2, "returns", "- value[b, t]", ""),
    (3, "no scaling", "x @ W + scaling *", "x @ W +"),
    (3, "no scaling in the gradient", "dlow = scaling *", "dlow ="),
    (3, "layers below learn through the adapter alone", "dy @ W.T + dlow @ A", "dlow @ A"),
    (3, "layers below learn through the base alone", "dy @ W.T + dlow @ A", "dy @ W.T"),
    (4, "the cache one token short", "cache.length[:] = len(prompt)", "cache.length[:] = len(prompt) - 1"),
    (
        4,
        "a cache that never grows",
        "h = llama.decode(torch.tensor(answer[-1:]), None, cache)",
        "h = llama.decode(torch.tensor(answer[-1:]), None, cache); cache.length -= 1",
    ),
    (4, "EOS ignored", "if token in llama.config.eos_token_id", "if False"),
    (4, "one token too low", "(cdf <= u[i]).sum().item()", "(cdf <= u[i]).sum().item() - 1"),
    (
        4,
        "the prompt read again and again",
        "h = llama.decode(torch.tensor(answer[-1:]), None, cache)",
        "h = llama.prefill(torch.tensor([prompt + answer]), None, cache, last + i)",
    ),
    (5, "the sign of the word", "((word >> (4 * j)) & 15)", "(word >> (4 * j))"),
    (5, "version 1 read as it stands", "- 8).to", "- 7).to"),
    (5, "one group's scale for all", "(8 * r // group_size) * N", "0"),
    (5, "nibbles from the top", "(4 * j)", "(28 - 4 * j)"),
]
NUMBERS = sorted(exercises.CHECKS)


def solution(number):
    return next((DOCS / "exercises/solutions").glob(f"{number}_*.py"))


@pytest.fixture(autouse=True)
def needs_triton(request):
    if "5" in request.node.name and not quant.triton:
        pytest.skip("exercise 5 needs Triton")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_passes_and_a_blank_does_not(number, capsys):
    """A check that refuses the right answer, or passes an empty file, teaches nothing."""
    assert exercises.main(number) == 1
    assert exercises.main(number, solution(number)) == 0
    assert capsys.readouterr().out == f"exercise {number}: not written yet\nexercise {number}: right\n"


@pytest.mark.parametrize("number, problem, right, wrong", WRONG, ids=[f"{n}: {problem}" for n, problem, *_ in WRONG])
def test_a_plausible_wrong_answer_fails(number, problem, right, wrong, tmp_path, capsys):
    """The mistakes that these exercises are there to teach: each must be found, and said in one line."""
    text = solution(number).read_text()
    assert text.count(right) == 1
    (tmp_path / "answer.py").write_text(text.replace(right, wrong))
    assert exercises.main(str(number), tmp_path / "answer.py") == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"exercise {number}: ") and printed.count("\n") == 1 and "not written" not in printed


def test_an_exercise_that_is_not_there(capsys):
    """`make exercise` alone, as everybody types it once."""
    assert exercises.main() == 2
    assert capsys.readouterr().out == "which exercise? make exercise N=1, up to 5\n"
