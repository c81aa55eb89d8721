"""Adapters: named, side by side in one batch, over a 4-bit base, and in PEFT's files."""

import json
import re
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import damage_folder, dense_twin, packed_folder
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import lora
import model
from formats.errors import UserError
from safety.checkpoint import model_hash
from safety.files import digest
from safety.run import changes
from speed import cpu as cpu_speed

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 51).view(2, 24)


def train(parameters, seed=0):
    """Give adapters random values everywhere, as training would: B is 0 at the start and hides mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.2, generator=g)


def trained_layer(*names):
    """LoRALinear over a dense 8 -> 6 layer with trained adapters of rank 4."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(8, 6).requires_grad_(False))
    for name in names:
        layer.add(name, r=4, alpha=2.0, generator=torch.Generator().manual_seed(0))
    train([*layer.lora_A.values(), *layer.lora_B.values()])
    return layer


def with_adapters(llama, *names, targets=SEVEN, head=None):
    for seed, name in enumerate(names):
        llama.add_adapter(name, 4, 8.0, targets, torch.Generator().manual_seed(seed), head)
        train(llama.adapter_parameters(name), seed)
    return llama


def gradients(llama, name):
    return [parameter.grad for parameter in llama.adapter_parameters(name)]


# ----------------------------------------------------------------------------------------------------------------------
# One layer


def test_untrained_adapter_changes_nothing(run_folder):
    """B starts at 0, so training starts at the base, to the bit; A must not be 0, or nothing would ever learn."""
    llama = model.load(run_folder / "base")
    before = llama(TOKENS)
    llama.add_adapter("policy", 4, 8.0, SEVEN, torch.Generator().manual_seed(0))
    assert torch.equal(llama(TOKENS, "policy"), before)
    parameters = lora.named_parameters(llama, "policy")
    assert all(p.any() == name.endswith("lora_A") for name, p in parameters.items())


def test_forward_is_the_formula():
    """y = base(x) + alpha / r (x A^T) B^T, here with alpha / r = 1/2; without a name the base alone."""
    layer, x = trained_layer("a"), torch.randn(2, 3, 8)
    expected = layer.base(x) + 0.5 * (x @ layer.lora_A["a"].T) @ layer.lora_B["a"].T
    torch.testing.assert_close(layer(x, "a"), expected)
    assert torch.equal(layer(x), layer.base(x)) and not torch.equal(layer(x), layer(x, "a"))


def test_small_products_leave_the_cpu_as_it_was():
    """Decoding has its small products done by another library; what comes after, an error included, must not be."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        for small, inside in ((True, "none"), (False, "bf16")):
            with pytest.raises(KeyError), cpu_speed.by_mkl(small):
                assert matmul.fp32_precision == inside
                raise KeyError
            assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_rows_carry_their_own_adapters():
    """A batch of mixed rows gives the values and the gradients of one call per adapter: the stacked pass of PPO rests
    on it. Rows without an adapter, or with one that this layer does not have, are the base's.
    """
    mixed, apart = trained_layer("a", "b"), trained_layer("a", "b")
    x, dy = torch.randn(5, 3, 8), torch.randn(5, 3, 6)
    parts = (("a", 2), (None, 1), ("b", 1), ("stranger", 1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = mixed(one, parts)
    rows = other.split([n for _, n in parts])
    expected = torch.cat(
        [apart(r, None if name == "stranger" else name) for r, (name, _) in zip(rows, parts, strict=True)]
    )
    torch.testing.assert_close(y, expected)
    assert torch.equal(mixed(x, "stranger"), mixed.base(x))
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(one.grad, other.grad)
    for name in "ab":
        torch.testing.assert_close(mixed.lora_A[name].grad, apart.lora_A[name].grad)
        torch.testing.assert_close(mixed.lora_B[name].grad, apart.lora_B[name].grad)


@pytest.mark.parametrize("rows", [(("a", 2), ("b", 2)), (("a", 2), ("b", 4))], ids=["too few", "too many"])
def test_rows_must_add_up(rows):
    """Row counts that are not the batch's would hand rows to the wrong adapter or drop them."""
    with pytest.raises(RuntimeError):
        trained_layer("a", "b")(torch.randn(5, 3, 8), rows)


def test_adapters_leave_each_other_and_the_base_alone(run_folder):
    """A loss under one adapter reaches all of its tensors and no other, be it the base's or a neighbour's."""
    llama = with_adapters(model.load(run_folder / "pretrain"), "policy", "value")
    llama.logits(llama(TOKENS, "policy")).square().mean().backward()
    assert all(grad.any() for grad in gradients(llama, "policy"))
    learning = {id(p) for p in llama.adapter_parameters("policy")}
    assert all(p.grad is None for p in llama.parameters() if id(p) not in learning)


def test_adapter_in_some_layers_only(run_folder):
    """With --lora-targets q_proj the other six projections pass through; a name that fits nothing is refused."""
    llama = with_adapters(model.load(run_folder / "base"), "policy", targets=["q_proj"])
    assert len(llama.adapter_parameters("policy")) == 2 * 2  # A and B in two blocks
    assert not torch.equal(llama(TOKENS, "policy"), llama(TOKENS))
    with pytest.raises(ValueError, match="w_proj"):
        llama.add_adapter("other", 4, 8.0, ["q_proj", "w_proj"], torch.Generator())
    for targets in ([], [""]):
        with pytest.raises(ValueError, match="LoRA targets: none: no such projection"):
            llama.add_adapter("other", 4, 8.0, targets, torch.Generator())


# ----------------------------------------------------------------------------------------------------------------------
# Gradients through the whole model


def test_gradient_below_4_bit_layers(run_folder):
    """Every adapter tensor gets the gradient it gets over the dequantized dense model: nothing is lost on the way down
    through the packed layers.
    """
    packed = with_adapters(model.load(run_folder / "base"), "policy")
    dense = with_adapters(dense_twin(run_folder / "base"), "policy")
    for llama in (packed, dense):
        llama.logits(llama(TOKENS, "policy")).logsumexp(-1).mean().backward()
    for ours, theirs in zip(gradients(packed, "policy"), gradients(dense, "policy"), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_recomputation_uses_the_right_adapter(run_folder):
    """Two adapters, forwards first and backwards last, with activation checkpointing: were the adapter a setting of the
    module, the recomputed forward would use the last one set and the gradient would be silently wrong.
    """
    plain, recomputed = (with_adapters(model.load(run_folder / "base"), "policy", "value") for _ in range(2))
    sum(plain(TOKENS, name).logsumexp(-1).mean() for name in ("policy", "value")).backward()
    both = [checkpoint(recomputed, TOKENS, name, use_reentrant=False) for name in ("policy", "value")]
    sum(h.logsumexp(-1).mean() for h in both).backward()
    for name in ("policy", "value"):
        torch.testing.assert_close(gradients(recomputed, name), gradients(plain, name), rtol=0, atol=0)


def test_grad_checkpoint_changes_no_gradient(run_folder):
    """--grad-checkpoint computes each block anew in the backward: the same bits of gradient, with rows of two adapters
    in one pass, and far less kept until then.
    """
    found, kept = [], []
    for recompute in (False, True):
        llama = with_adapters(model.load(run_folder / "base"), "policy", "value")
        llama.recompute, sizes = recompute, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            h = llama(TOKENS, adapter=(("policy", 1), ("value", len(TOKENS) - 1)))
        h.logsumexp(-1).mean().backward()
        found.append([*gradients(llama, "policy"), *gradients(llama, "value")])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))
    assert kept[1] < kept[0] / 2


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("head", [None, "normal"])
def test_save_and_load_are_inverse(run_folder, tmp_path, head):
    """An adapter comes back to the bit, scaling and head included, also under another name, and frozen: PPO must not
    train its judge.
    """
    llama = with_adapters(model.load(run_folder / "base"), "reward", head=head)
    llama.save_adapter("reward", tmp_path, "base")
    again = model.load(run_folder / "base")
    again.load_adapter("judge", tmp_path, head=head is not None)
    ours, theirs = llama.adapter_parameters("reward"), again.adapter_parameters("judge")
    assert len(ours) == 2 * 2 * 7 + (head is not None)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(llama(TOKENS, "reward"), again(TOKENS, "judge"))


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
DAMAGE = {  # what is wrong with an adapter's (config, tensors): how to make it so, what the message must say
    "missing tensor": (lambda c, t: t.pop(KEY), KEY),
    "extra tensor": (lambda c, t: t.update({KEY.replace(".1.", ".2."): torch.zeros(4, 32)}), "layers.2"),
    "another layer's tensor": (lambda c, t: t.update({KEY.replace("up_proj.lora_A", "up_proj"): t[KEY] + 0}), "1 tens"),
    "other rank": (lambda c, t: t.update({KEY: torch.zeros(3, 32)}), KEY),
    "NaN": (
        lambda c, t: t[KEY][0, :1].fill_(torch.nan),
        f"not finite floats, or of another shape than this base needs, first {KEY}",
    ),
    "infinity": (lambda c, t: t[KEY][3, -1:].fill_(-torch.inf), KEY),
    "no prefix": (
        lambda c, t: t.update({key.removeprefix("base_model.model."): t.pop(key) for key in list(t)}),
        "56 t",
    ),
    "other rank in the config": (lambda c, t: c.update(r=2), "r 2 and lora_alpha 8.0 in the config, ranks [(4,)] in"),
    "10^12 ranks": (lambda c, t: c.update(r=10**12), "r 1000000000000 and"),
    "modules_to_save of lists": (lambda c, t: c.update(modules_to_save=[["score"]]), "unreadable adapter"),
    "no rank": (lambda c, t: c.pop("r"), "'r'"),
    "rank 0": (lambda c, t: c.update(r=0), "r 0"),
    "endless rank": (lambda c, t: c.update(r=float("inf")), "infinity"),
    "alpha of nothing": (lambda c, t: c.update(lora_alpha=float("nan")), "lora_alpha nan"),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora=True"),
    "rank pattern": (lambda c, t: c.update(rank_pattern={"q_proj": 2}), "rank_pattern={'q_proj': 2}"),
    "alpha pattern": (lambda c, t: c.update(alpha_pattern={"q_proj": 2}), "alpha_pattern={'q_proj': 2}"),
    "biases": (lambda c, t: c.update(bias="all"), "bias='all'"),
    "biases of LoRA": (lambda c, t: c.update(lora_bias=True), "lora_bias=True"),
    "some layers": (lambda c, t: c.update(layers_to_transform=[1]), "layers_to_transform=[1]"),
    "the first layer": (lambda c, t: c.update(layers_to_transform=0), "layers_to_transform=0"),
    "embeddings": (lambda c, t: c.update(modules_to_save=["embed_tokens"]), "modules_to_save=['embed_tokens']"),
    "head": (lambda c, t: c.update(modules_to_save=["score", "lm_head"]), "modules_to_save=['lm_head']"),
    "transposed": (lambda c, t: c.update(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "pissa": (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "lora_ga": (lambda c, t: c.update(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' may have changed"),
    "olora": (lambda c, t: c.update(init_lora_weights="OLoRA"), "init_lora_weights='OLoRA'"),
    "other method": (lambda c, t: (c.update(peft_type="IA3"), c.pop("r")), "peft_type='IA3'"),
    "fewer targets": (lambda c, t: c.update(target_modules=["q_proj"]), "extra"),
    "unknown target": (lambda c, t: c.update(target_modules=[*SEVEN, "w_proj"]), "w_proj"),
    "a regex for targets": (lambda c, t: c.update(target_modules=r".*_proj"), "target_modules '.*_proj'"),
    "no targets": (lambda c, t: c.update(target_modules=[]), "LoRA targets: none"),
    "half a name": (lambda c, t: c.update(target_modules=["proj"]), "LoRA targets: proj: no such projection"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_adapters_that_do_not_fit_are_refused(run_folder, tmp_path, damage, message):
    """An adapter that fits in part would leave layers silently unadapted, one of another method would compute something
    else; PEFT itself loads several of these with a warning or none. The message names the file and the cause.
    """
    with_adapters(model.load(run_folder / "base"), "policy").save_adapter("policy", tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model.load(run_folder / "base").load_adapter("policy", tmp_path)
    assert str(tmp_path) in str(error.value)


HARMLESS = {
    "the adapter's name in a key": lambda c, t: t.update({KEY.replace("A.", "A.default."): t.pop(KEY)}),
    "nothing is excluded": lambda c, t: c.update(exclude_modules=[], layers_to_transform=[], rank_pattern=None),
    "eva": lambda c, t: c.update(init_lora_weights="eva"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_adapters_that_compute_the_same_are_read(run_folder, tmp_path, change):
    """What changes no number is no reason to refuse: keys as in a model's state_dict, empty lists, an initialization
    that left the base alone.
    """
    llama = with_adapters(model.load(run_folder / "base"), "policy")
    llama.save_adapter("policy", tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = model.load(run_folder / "base")
    again.load_adapter("policy", tmp_path)
    assert torch.equal(again(TOKENS, "policy"), llama(TOKENS, "policy"))


@pytest.mark.parametrize(
    "head, message",
    [
        (torch.full((1, 32), torch.nan), "not finite floats, or of another shape"),
        (torch.zeros(1, 31), "needs a score head of (1, 32)"),
        (torch.zeros(2, 32), "needs a score head of (1, 32)"),
        (torch.zeros(32), "needs a score head of (1, 32)"),
    ],
    ids=["NaN", "narrow", "two labels", "flat"],
)
def test_heads_that_do_not_fit_are_refused(run_folder, tmp_path, head, message):
    """A reward of NaN, or of two numbers, would surface as a crash in the middle of PPO."""
    with_adapters(model.load(run_folder / "base"), "reward", head="normal").save_adapter("reward", tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": head}, file)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model.load(run_folder / "base").load_adapter("reward", tmp_path, head=True)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", "[" * 100000], ids=lambda text: text[:2])
def test_configs_that_are_no_adapters(run_folder, tmp_path, text):
    """Valid JSON of another kind ends in one line too."""
    llama = with_adapters(model.load(run_folder / "base"), "policy")
    llama.save_adapter("policy", tmp_path, "base")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="unreadable adapter") as error:
        llama.load_adapter("again", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_pickled_adapters_are_not_opened(run_folder, tmp_path):
    """Old versions of PEFT wrote pickles, which can run code: the message says how to get a file that cannot."""
    llama = with_adapters(model.load(run_folder / "base"), "policy")
    llama.save_adapter("policy", tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle and never opened; save it again"):
        llama.load_adapter("again", tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_broken_and_absent_files_are_named(run_folder, tmp_path, file):
    """A half-copied folder ends in one line that names it, not in a traceback from a library."""
    llama = with_adapters(model.load(run_folder / "base"), "policy")
    llama.save_adapter("policy", tmp_path, "base")
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        llama.load_adapter("again", tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / file}: no such file")):
        llama.load_adapter("again", tmp_path)


@pytest.mark.parametrize("head, wanted", [(None, True), ("zero", False)])
def test_the_adapter_of_another_stage_is_refused(run_folder, tmp_path, head, wanted):
    """A policy has no scalar head and a reward model has one: mixing up the folders must not go unnoticed."""
    llama = with_adapters(model.load(run_folder / "base"), "mle", head=head)
    llama.save_adapter("mle", tmp_path, "base")
    with pytest.raises(ValueError, match="score head"):
        llama.load_adapter("again", tmp_path, head=wanted)


# ----------------------------------------------------------------------------------------------------------------------
# PEFT


@pytest.mark.parametrize("targets", [SEVEN, ["layers.1.self_attn.q_proj", "up_proj"]], ids=["names", "paths"])
def test_language_adapters_open_in_peft(run_folder, tmp_path, targets):
    """peft.PeftModel over transformers' Llama computes our logits from our files: what we write is of use elsewhere. So
    it does where only one layer of a name has the adapter, and we read it again.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = with_adapters(model.load(run_folder / "pretrain"), "policy", targets=targets)
    llama.save_adapter("policy", tmp_path, "base")
    again = model.load(run_folder / "pretrain")
    again.load_adapter("policy", tmp_path)
    assert torch.equal(again(TOKENS, "policy"), llama(TOKENS, "policy"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(run_folder / "pretrain")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        ours, bare = llama.logits(llama(TOKENS, "policy")), llama.logits(llama(TOKENS))
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 0.1  # the adapter does something


def test_scalar_heads_open_in_peft(run_folder, tmp_path):
    """A reward model is a SEQ_CLS adapter: transformers' one-label classifier gives our score of the last token."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = with_adapters(model.load(run_folder / "pretrain"), "reward", head="normal")
    llama.save_adapter("reward", tmp_path, "base")
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(run_folder / "pretrain", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        scores = llama.scalar(llama(TOKENS, "reward"), "reward")  # (B, T)
        for row, score in zip(TOKENS, scores, strict=True):  # one by one: without a padding token it takes no batch
            for length in (1, 10, 24):
                logits = theirs(row[None, :length]).logits
                torch.testing.assert_close(logits.item(), score[length - 1].item(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ("runs/toy/base", "runs/toy/base", None),
        ("FOLDER@2", "FOLDER@2", None),  # one that is there: a name, not a revision
    ],
)
@pytest.mark.parametrize("head", [None, "zero"])
def test_the_base_is_named_as_peft_names_it(run_folder, tmp_path, base, name, revision, head):
    """AutoPeftModel loads the base that the config names, at its revision: OWNER/NAME@REVISION is no name on the Hub,
    so the two stand apart; the @ in a folder's name stays where it is.
    """
    peft = pytest.importorskip("peft")
    (tmp_path / "folder@2").mkdir()
    base, name = (text.replace("FOLDER", str(tmp_path / "folder")) for text in (base, name))
    llama = with_adapters(model.load(run_folder / "base"), "policy", head=head)
    llama.save_adapter("policy", tmp_path / "adapter", base)
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
    model.load(run_folder / "base").load_adapter("policy", tmp_path / "adapter", head=head is not None)


def peft_adapter(base, folder, name="LlamaForCausalLM", **config):
    """A trained adapter over the base as PEFT makes and saves it. Returns PEFT's model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = getattr(transformers, name).from_pretrained(base, num_labels=1)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, **config)).eval()
    train([parameter for key, parameter in theirs.named_parameters() if "lora_" in key])
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=SEVEN),
        dict(target_modules=SEVEN, use_rslora=True),
        dict(target_modules=["self_attn.q_proj", "mlp.up_proj"]),
        dict(target_modules=["model.layers.1.self_attn.v_proj", "q_proj"]),
        dict(target_modules="all-linear"),
        dict(target_modules=["v_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
    ],
    ids=str,
)
def test_adapters_of_peft_open_here(run_folder, tmp_path, config):
    """The other way round: what peft writes, with all the keys of its config, computes the same in our model, whether
    it scales by alpha / r or alpha / sqrt(r), and names its targets in full or in part.
    """
    theirs = peft_adapter(run_folder / "pretrain", tmp_path, task_type="CAUSAL_LM", **config)
    llama = model.load(run_folder / "pretrain")
    llama.load_adapter("policy", tmp_path)
    with torch.no_grad():
        ours, bare = llama.logits(llama(TOKENS, "policy")), llama.logits(llama(TOKENS))
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 0.1


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_reward_models_of_peft_open_here(run_folder, tmp_path, dtype, tolerance, use_rslora):
    """A one-label classifier, of the kind that TRL trains for rewards, judges here token by token; a head that was
    saved in bf16 too, although heads are computed in fp32.
    """
    theirs = peft_adapter(
        run_folder / "pretrain", tmp_path, "LlamaForSequenceClassification", task_type="SEQ_CLS",
        target_modules=SEVEN, use_rslora=use_rslora,
    )  # fmt: skip
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    llama = model.load(run_folder / "pretrain")
    llama.load_adapter("reward", tmp_path, head=True)
    with torch.no_grad():
        scores = llama.scalar(llama(TOKENS, "reward"), "reward")  # (B, T)
        for row, score in zip(TOKENS, scores, strict=True):
            for length in (1, 10, 24):
                logits = theirs(row[None, :length]).logits.item()
                torch.testing.assert_close(logits, score[length - 1].item(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "form",
    [
        dict(),
        dict(data="gptq_v2", act_order=True, z=None),
        dict(bias=True, z=None),
        dict(family="Qwen2"),
        dict(family="Qwen3"),
    ],
    ids=str,
)
def test_gradients_equal_pefts(tmp_path, form):
    """The gradient of a real loss with respect to every adapter tensor, over packed weights, is PEFT's over the same
    weights written out: the whole chain, 4-bit backward, adapters, attention and loss, against another implementation.
    """
    (tmp_path / "base").mkdir()
    twin = packed_folder(tmp_path / "base", **form)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=8, target_modules=SEVEN, task_type="CAUSAL_LM"))
    learning = {key: p for key, p in theirs.named_parameters() if "lora_" in key}
    train(learning.values())
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # it looks for the base on the disk
    llama = model.load(tmp_path / "base")
    llama.load_adapter("policy", tmp_path / "adapter")
    ours = {f"base_model.model.{path}.default.weight": p for path, p in lora.named_parameters(llama, "policy").items()}
    assert set(ours) == set(learning) and len(ours) == 2 * 2 * 7
    for parameter in ours.values():
        parameter.requires_grad_(True)
    theirs(TOKENS, labels=TOKENS).loss.backward()
    logits = llama.logits(llama(TOKENS, "policy"))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for key, parameter in learning.items():
        assert parameter.grad.norm() > 1e-3
        assert (ours[key].grad - parameter.grad).norm() < 1e-3 * parameter.grad.norm()


def reindented(folder):
    raw = json.loads((folder / "config.json").read_text()) | {"transformers_version": "9"}
    (folder / "config.json").write_text(json.dumps(raw))


def other_eps(folder):
    damage_folder(folder, lambda config, tensors: config.update(rms_norm_eps=0.5))


def in_two_files(folder):
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    weight_map = {name: file for file, part in parts.items() for name in part}
    for file, part in parts.items():
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (reindented, True),
        (in_two_files, True),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors"), True),
        (other_eps, False),
        (lambda folder: damage_folder(folder, lambda _, tensors: tensors["model.norm.weight"][3:4].add_(1)), False),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 9}'), False),
    ],
    ids=["config re-indented", "in two files", "an unused file", "another epsilon", "another weight", "another EOS"],
)  # fmt: skip
def test_what_makes_another_base(run_folder, tmp_path, change, same):
    """An adapter knows its base by what that computes: not by blanks in config.json, which a download may change, but
    by an EOS in another file. What older versions wrote, the hash of whole files, is still taken for those files.
    """
    folder = tmp_path / "base"
    shutil.copytree(run_folder / "base", folder)
    before = model_hash(folder)
    old = digest(folder / "model.safetensors", folder / "config.json")
    assert before == old and old == before and before != "another"
    assert changes({"base model": old}, {"base model": before}) == []  # a checkpoint of an older version resumes
    assert json.loads(json.dumps({"base model": before})) == {"base model": before}
    change(folder)
    assert (model_hash(folder) == str(before)) is same
    llama = model.load(folder)
    llama.hash = model_hash(folder)
    llama.add_adapter("mle", 4, 8.0, ["q_proj"], torch.Generator())
    llama.save_adapter("mle", tmp_path / "adapter", "base")
    for known, taken in ((str(before), same), (llama.hash.old, True), (str(llama.hash), True)):
        (tmp_path / "adapter/base.sha256").write_text(f"{known}\n")
        if taken:
            llama.load_adapter("mle", tmp_path / "adapter")
        else:
            with pytest.raises(UserError, match="another base model"):
                llama.load_adapter("mle", tmp_path / "adapter")
