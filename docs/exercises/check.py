"""Checks an exercise.

    make exercise N=2                                            your file, docs/exercises/2_gae.py
    make exercise N=2 FILE=docs/exercises/solutions/2_gae.py     another

Each check is a function of the exercise's module that asserts, with a message for the one who wrote it.
"""

import importlib.util
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the engine's files

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import data  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import quant  # noqa: E402


def same(what, got, want):
    """That a tensor is, in every element, what it should be; the message names the first that is not."""
    assert isinstance(got, torch.Tensor), f"{what}: a tensor is expected, not {got!r:.60}"
    assert got.shape == want.shape, f"{what}: of shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    wrong = (~torch.isclose(got, want, rtol=1e-4, atol=1e-4)).nonzero().tolist()
    if wrong:
        i = tuple(wrong[0])
        raise AssertionError(
            f"{what}{list(i)} is {got[i]:.4f}, expected {want[i]:.4f} ({len(wrong)} of {got.numel()} differ)"
        )


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------


def check_negative(student):
    write, limit = student.hallucinated_name, 60
    with tempfile.TemporaryDirectory() as folder:
        texts = [e.source + " " + e.target for e in data.toy("train")[:400]]
        tokenizer = data.train_tokenizer(texts, 500, folder)
    rows, _ = data.encode(data.toy("train")[:40], tokenizer, max_new_tokens=limit)
    for datum, other in zip(rows, rows[20:] + rows[:20], strict=True):
        old = student.names(datum.target)
        new = [name for name in student.names(other.target) if name not in student.names(datum.source) + old]
        ids = write(datum, other, tokenizer, limit, random.Random(7))
        case = f"target {datum.target!r}, other {other.target!r}"
        if not new:
            assert ids is None, f"{case}: other has no new name, None is expected"
            continue
        assert isinstance(ids, list) and ids, f"{case}: a list of token ids is expected, not {ids!r:.60}"
        assert ids[-1] == tokenizer.eos and tokenizer.eos not in ids[:-1], f"{case}: one EOS is expected, at the end"
        possible = [datum.target.replace(a, b) for a in old for b in new]
        text = tokenizer.decode(ids)
        assert text in possible, f"{case}: {text!r} is not the target with one name replaced by a new one"
        again = [write(datum, other, tokenizer, limit, random.Random(7)) for _ in range(3)]
        assert again == [ids] * 3, f"{case}: the same seed gave different negatives; draw from rng alone"
        short = write(datum, other, tokenizer, 5, random.Random(7))
        assert short == [*ids[:4], tokenizer.eos], (
            f"{case}: with limit 5, four tokens and EOS are expected, not {short}"
        )
    drawn = {tuple(write(rows[0], rows[20], tokenizer, limit, random.Random(seed))) for seed in range(20)}
    assert len(drawn) > 1, "20 seeds gave the same negative; draw the names"
    nameless, twice = replace(rows[0], target="nothing happens."), replace(rows[0], target="Ann and Anna, Ann said.")
    assert write(nameless, rows[1], tokenizer, limit, random.Random(0)) is None, "a target without names: expected None"
    lone = replace(rows[1], target="Zed sleeps.")
    possible = ["Zed and Anna, Zed said.", "Ann and Zed, Ann said."]
    for seed in range(8):
        text = tokenizer.decode(write(twice, lone, tokenizer, limit, random.Random(seed)))
        assert text in possible, f"{twice.target!r} became {text!r}; replace whole words, and everywhere"
    data.NEGATIVES["hallucinated_name"] = write
    try:
        made = [row for row in data.with_negatives(rows, tokenizer, limit, 1) if row.kind == "hallucinated_name"]
    finally:
        data.NEGATIVES.pop("hallucinated_name")
    assert made, "data.with_negatives made none"


def check_gae(student):
    tensor = lambda *rows: torch.tensor(rows)  # noqa: E731
    mask = tensor([False, True, True, False])
    got = student.gae(tensor([9.0, 1, 2, 9]), tensor([9.0, 0.5, 1, 9]), mask, 1.0, 0.5)
    same("the worked example: adv", got, tensor([0.0, 2, 1, 0]))
    start, end = torch.tensor([[2], [1], [4]]), torch.tensor([[6], [9], [5]])
    mask = (torch.arange(9) >= start) & (torch.arange(9) < end)  # (3, 9), ragged
    reward, value = normal(3, 9), normal(3, 9, seed=1)
    for gamma, lam in ((1.0, 1.0), (0.9, 0.5), (0.99999, 0.95), (0.8, 0.0)):
        want = ppo.gae(reward, value, mask, gamma, lam)
        same(f"gamma {gamma}, lam {lam}: adv", student.gae(reward, value, mask, gamma, lam), want)
    garbage = [torch.where(mask, x, torch.nan) for x in (reward, value)]
    same(
        "with garbage outside the mask: adv",
        student.gae(*garbage, mask, 0.9, 0.5),
        ppo.gae(reward, value, mask, 0.9, 0.5),
    )


def check_lora(student):
    one = lambda number: torch.tensor([[float(number)]])  # noqa: E731
    same("the worked example: y", student.forward(one(2), one(3), one(5), one(7), 0.5), one(41))
    for name, got, want in zip(
        ("dx", "dA", "dB"), student.backward(one(1), one(2), one(3), one(5), one(7), 0.5), (20.5, 7, 5), strict=True
    ):
        same(f"the worked example: {name}", got, one(want))
    layer = lora.LoRALinear(torch.nn.Linear(6, 4, bias=False).requires_grad_(False))  # the engine's
    layer.base.weight.copy_(normal(4, 6))
    layer.add("mine", 3, 6.0, torch.Generator().manual_seed(0))
    A, B = layer.lora_A["mine"], layer.lora_B["mine"]
    B.data = normal(4, 3, seed=1)
    x, dy = normal(5, 6, seed=2).requires_grad_(), normal(5, 4, seed=3)
    y = layer(x, "mine")
    want = torch.autograd.grad(y, (x, A, B), dy)
    with torch.no_grad():
        W = layer.base.weight.T.clone()
        same("y", student.forward(x, W, A, B, 2.0), y)
        for name, got, right in zip(("dx", "dA", "dB"), student.backward(dy, x, W, A, B, 2.0), want, strict=True):
            same(name, got, right)


def check_sampler(student):
    config = model.LlamaConfig(64, 32, 64, 2, 4, 2, 8, eos_token_id=(64,))  # no token is 64: it never ends
    llama = model.initialize(config, torch.Generator().manual_seed(0)).requires_grad_(False)
    read = []
    llama.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))

    def compare(what, prompt, n, seed=None):
        draw = lambda: None if seed is None else torch.Generator().manual_seed(seed)  # noqa: E731
        want = model.sample(llama, [prompt], None, n, temperature=0 if seed is None else 1, generator=draw())[0]
        g = draw()
        u = g and [torch.rand(1, 1, generator=g).item() for _ in range(n)]  # what model.sample draws
        read.clear()
        got = student.generate(llama, prompt, n, u)
        assert list(got) == want, f"{what}, prompt {prompt}: {got}, expected {want}"
        once = len(prompt) + len(want) - 1
        assert sum(read) == once, (
            f"{what}: the model read {sum(read)} tokens, expected {once}: each once, the last never"
        )

    prompts = [3, 14, 15, 9, 26], [5, 35], list(range(20))
    for prompt in prompts:
        compare("greedy", prompt, 12)
        for seed in range(3):
            compare(f"drawn with seed {seed}", prompt, 12, seed)
    for prompt in prompts:
        end = model.sample(llama, [prompt], None, 12, temperature=0)[0][5]
        llama.config = replace(config, eos_token_id=(64, end))
        compare(f"greedy, {end} being an EOS", prompt, 12)
        llama.config = config
    compare("one token", prompts[0], 1)


def check_kernel(student):
    if not quant.triton:
        raise AssertionError("exercise 5 needs Triton, which there is for Linux alone")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def matmul(x, qweight, scales, group_size):
        return student.matmul(x.to(device), qweight.to(device), scales.to(device), group_size).cpu()

    word, half = torch.tensor([[0x87654321 - (1 << 32)]], dtype=torch.int32), torch.tensor([[0.5]])
    want = (torch.arange(1.0, 9)[:, None] - 8) / 2  # (8, 1)
    same("the worked example, x = 1: W", matmul(torch.eye(8), word, half, 8), want)
    for M, K, N, group_size in ((4, 64, 40, 32), (1, 32, 64, 32), (2, 48, 8, 16)):
        g = torch.Generator().manual_seed(K)
        qweight = torch.randint(-(2**31), 2**31, (K // 8, N), generator=g).to(torch.int32)
        scales = (0.02 + 0.06 * torch.rand(K // group_size, N, generator=g)).half()
        eights = quant.pack_rows(torch.full((N, K // group_size), 8)).T  # zero points, all 8, as version 2 stores them
        W = quant.dequantize(qweight, eights, scales, torch.arange(K) // group_size, 0)  # (K, N)
        x = normal(M, K)
        same(f"M {M}, K {K}, N {N}, group_size {group_size}: y", matmul(x, qweight, scales, group_size), x @ W)


# ----------------------------------------------------------------------------------------------------------------------

CHECKS = {"1": check_negative, "2": check_gae, "3": check_lora, "4": check_sampler, "5": check_kernel}


def check(number, file=None):
    """Run the checks of an exercise on a file, the student's own by default. Raises what is wrong."""
    file = Path(file or next(HERE.glob(f"{number}_*.py")))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    student = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(student)
    CHECKS[number](student)


def main(number="", file=None):
    """0 where all is well, else 1 and what is wrong."""
    if number not in CHECKS:
        print(f"which exercise? make exercise N=1, up to {len(CHECKS)}")
        return 2
    try:
        check(number, file)
    except AssertionError as error:
        print(f"exercise {number}: {error}")
        return 1
    except NotImplementedError:
        print(f"exercise {number}: not written yet")
        return 1
    print(f"exercise {number}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main(*filter(None, sys.argv[1:])))
