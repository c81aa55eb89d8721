"""--tune full: every weight trains, through the same loops, and each stage writes a whole model."""

import json

import pytest
import torch
import transformers
from helpers import contents, exit_code, journal, run_over
from safetensors.torch import load_file

import data
import lastmile
import model
import ppo
from beyond.full import FullLlama

SMALL = [
    "--tune",
    "full",
    "--train-examples",
    "12",
    "--max-steps",
    "4",
    "--learning-rate",
    "1e-3",
    "--max-new-tokens",
    "20",
]


@pytest.fixture
def dense_run(run_folder, tmp_path):
    """A run's folder whose base is dense: a function that calls a stage in it with the given flags."""
    return run_over(run_folder / "pretrain", tmp_path / "dense" / "toy")


@pytest.fixture(scope="module")
def full_reward(run_folder, tmp_path_factory):
    """A reward model of which every weight was trained."""
    folder = tmp_path_factory.mktemp("full") / "toy"
    folder.mkdir()
    (folder / "base").symlink_to(run_folder / "pretrain")
    assert lastmile.main(["reward", *SMALL, "--eval-examples", "4", "--output-dir", str(folder)]) == 0
    return folder / "reward"


def rows_of(folder, n=5):
    tokenizer = data.load_tokenizer(folder)
    return data.encode(data.toy("train")[:n], tokenizer, 400, 100)[0]


def test_gradients_are_those_of_transformers(run_folder):
    """The maximum-likelihood gradient of every weight, embeddings, norms and head included, equals that of
    transformers' own model and loss.
    """
    folder = run_folder / "pretrain"
    llama = model.load(folder, kind=FullLlama)
    llama.add_copy("mle", torch.Generator())
    copy = llama.copies["mle"].requires_grad_(True)
    batch = data.collate(rows_of(folder))
    ppo.mle_loss(ppo.response_logp(llama, batch, "mle"), batch.mask).backward()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    labels = batch.tokens.masked_fill(~batch.mask, -100)
    theirs(input_ids=batch.tokens, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name.replace(".base.", "."): p.grad for name, p in copy.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * max(1.0, gradient.abs().max()), name
        assert gradient.abs().max() > 0, name
    assert all(p.grad is None for p in llama.parameters())  # the base stays as it is


@pytest.mark.parametrize(
    ("stage", "flags", "number", "factor"),
    [
        ("reward", "--train-examples 2 --batch-size 12 --eval-examples 4", "loss", 0.15),
        ("mle", "--train-examples 2 --batch-size 2", "loss", 0.3),
        ("ppo", "--train-examples 4 --batch-size 4 --ground-truth-fraction 1", "value_loss", 0.3),
    ],
    ids=["reward", "mle", "ppo"],
)
def test_each_stage_overfits_one_batch(dense_run, full_reward, stage, flags, number, factor):
    """Shown one batch again and again, all weights together must learn it."""
    flags = [*flags.split(), *(["--reward", full_reward] if stage == "ppo" else [])]
    assert dense_run(stage, "--tune", "full", *flags, "--max-steps", 40, "--learning-rate", 3e-3) == 0
    numbers = [line[number] for line in journal(dense_run.folder / stage)]
    assert numbers[-1] < factor * numbers[0]


def test_what_is_written_opens_in_transformers(dense_run, full_reward):
    """Policy: a causal model with our logits. Reward and value: sequence classifiers with one label, whose head scores
    the last token as ours does. The tokenizer is in each folder, so that eval, sample and ppo take it by its name.
    """
    assert dense_run("ppo", *SMALL, "--reward", full_reward) == 0
    base = dense_run.folder / "base"
    row = rows_of(base)[0]
    tokens = torch.tensor([row.prompt + row.response])
    llama = model.load(base, kind=FullLlama)
    places = {"policy": dense_run.folder / "ppo/policy", "value": dense_run.folder / "ppo/value", "reward": full_reward}
    for name, folder in places.items():
        llama.load_adapter(name, folder, head=name != "policy")
        assert (folder / "tokenizer.model").exists() and (folder / "template.txt").read_text() == llama_template(base)
    with torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(places["policy"], dtype=torch.float32)
        assert torch.allclose(theirs(tokens).logits, llama.logits(llama(tokens, "policy"), "policy"), atol=1e-4)
        assert not torch.allclose(theirs(tokens).logits, llama.logits(llama(tokens)), atol=1e-4)
        for name in ("value", "reward"):
            load = transformers.AutoModelForSequenceClassification.from_pretrained
            theirs, said = load(places[name], dtype=torch.float32, output_loading_info=True)
            assert not said["missing_keys"] and not said["unexpected_keys"]
            ours = llama.scalar(llama(tokens[:, :-1], name), name)[0, -1]
            assert theirs(tokens[:, :-1]).logits.item() == pytest.approx(ours.item(), abs=1e-4)


def llama_template(base):
    return data.load_tokenizer(base).template


def test_a_stopped_run_ends_with_the_same_bits(dense_run, tmp_path):
    """Weights and moments of the copies are in the checkpoint: stopped after two steps and resumed, PPO of all weights
    ends as a run never stopped.
    """
    flags = [*SMALL, "--reward", "rouge"]
    assert dense_run("ppo", *flags) == 0
    whole = contents(dense_run.folder / "ppo/policy"), contents(dense_run.folder / "ppo/value")
    (dense_run.folder / "ppo").rename(tmp_path / "whole")
    assert dense_run("ppo", *flags, "--max-time", 1e-6) == 143
    while dense_run("ppo", *flags, "--resume", "--max-time", 1e-6) == 143:
        pass
    parts = contents(dense_run.folder / "ppo/policy"), contents(dense_run.folder / "ppo/value")
    assert [list(one.values()) for one in whole] == [list(one.values()) for one in parts]


@pytest.mark.parametrize("flags", ["--micro-batch-size 2", "--grad-checkpoint"])
def test_memory_saving_changes_nothing(dense_run, tmp_path, flags):
    """Micro-batches and recomputation give the same weights, to rounding."""
    found = []
    for more in ([], flags.split()):
        assert dense_run("mle", *SMALL, *more, "--overwrite") == 0
        found.append(load_file(dense_run.folder / "mle/model.safetensors"))
    assert max((found[0][name] - tensor).abs().max() for name, tensor in found[1].items()) < 1e-5


def test_bf16_keeps_fp32_weights(dense_run):
    """With --dtype bfloat16 the products are bf16's and the weights that learn stay fp32: updates far below bf16's
    last bit are kept, and the loss is that of fp32 to bf16's rounding.
    """
    losses = []
    for dtype in ("float32", "bfloat16"):
        assert dense_run("mle", *SMALL, "--learning-rate", 1e-5, "--dtype", dtype, "--overwrite") == 0
        losses.append([line["loss"] for line in journal(dense_run.folder / "mle")])
    tensors = load_file(dense_run.folder / "mle/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    before = load_file(dense_run.folder / "base/model.safetensors")
    moved = [(tensor - before[name].float()).abs() for name, tensor in tensors.items()]
    assert 0 < max(part.max() for part in moved) < 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


def test_dry_run_counts_all_weights(dense_run, capsys):
    """The plan names every weight of policy and value as trained, and measures an update of them."""
    assert dense_run("ppo", *SMALL, "--reward", "rouge", "--dry-run") == 0
    said = capsys.readouterr().out
    llama = model.load(dense_run.folder / "base", kind=FullLlama)
    n = sum(p.numel() for p in llama.parameters())
    C, V = llama.config.hidden_size, llama.config.vocab_size
    assert f"{2 * n - V * C + C:,} parameters" in said  # the value has a head of C in place of the language head
    assert "GB at most" in said


def test_a_reward_model_from_another_has_its_own_report(dense_run, full_reward):
    """What stands beside the weights of --init is copied, but for the AUCs, which the card and the report page show."""
    assert dense_run("reward", *SMALL, "--init", full_reward, "--eval-examples", 4) == 0
    of_first, own = (
        json.loads((folder / "heldout.json").read_text()) for folder in (full_reward, dense_run.folder / "reward")
    )
    assert own.keys() == of_first.keys() and own != of_first


def test_bad_uses_are_one_line(dense_run, fresh_run, full_reward, reward, capsys):
    """Over a 4-bit base, in fp16, from an adapter, merged, or as the base of a stage, a whole model is refused."""
    assert dense_run("mle", *SMALL) == 0
    cases = [
        (fresh_run, ["mle", *SMALL], "is 4-bit; name an unquantized model"),
        (dense_run, ["mle", *SMALL, "--dtype", "float16", "--overwrite"], "gradients vanish"),
        (dense_run, ["reward", *SMALL, "--init", reward], "is an adapter, and --tune full needs a whole model"),
        (dense_run, ["reward", "--init", full_reward], "is a whole model; add --tune full"),
        (dense_run, ["merge", "--adapter", "mle"], "nothing to merge"),
        (dense_run, ["mle", "--model", full_reward, "--overwrite"], "lm_head.weight is missing"),
    ]
    for run, command, message in cases:
        assert exit_code(lambda run=run, command=command: run(*command)) == 2
        assert message in capsys.readouterr().err, command
    assert json.loads((dense_run.folder / "mle/settings.json").read_text())["tune"] == "full"
