"""Our 4-bit models against transformers, optimum, GPTQModel and PEFT: run by hand, in an environment of its own.

    python3 -m venv oracle && . oracle/bin/activate
    pip install torch==2.13.0
    pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 tokenicer==0.0.14 defuser==0.0.28
    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors sentencepiece protobuf \
        tokenizers pypcre logbar threadpoolctl device-smi pillow requests
    python tests/oracle_gptqmodel.py FOLDER [--write OUT]       FOLDER: what `python lastmile.py quantize` wrote

1. The logits of FOLDER in GPTQModel and in ours.
2. The gradients of a LoRA on all seven projections, which PEFT makes and saves and we load.
3. With --write, GPTQModel quantizes a small random Llama to every format that we read, and 1. is done for each.

All in fp32, and twice: GPTQModel multiplies q - z by the scale in the scale's own type, fp16, and so rounds each
weight to 11 bits, which we do not. With its scales made fp32 the two differ by the order of their sums alone.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else it compiles its unpacking: slow, and needs a C++ compiler
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # the least; its default, half of the cores, may be less
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOUNDS = {torch.float16: 1e-2, torch.float32: 1e-5}  # type of GPTQModel's scales -> difference / tensor's largest


def open_theirs(folder, scales):
    from transformers import AutoModelForCausalLM, GPTQConfig

    how = GPTQConfig(bits=4, backend="gptq_torch")  # its kernel in plain torch; all else comes from the folder
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).eval()
    layers = [module for module in theirs.modules() if hasattr(module, "qweight")]
    assert len(layers) == 7 * theirs.config.num_hidden_layers, f"{folder}: {len(layers)} layers are 4-bit"
    for layer in layers:
        layer.scales = layer.scales.to(scales)
    return theirs


def random_tokens(V, B, T, seed):
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))  # (B, T), no special token


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare_logits(folder, scales):
    """(what was compared, largest difference)."""
    import model

    theirs, llama = open_theirs(folder, scales), model.load(folder)
    tokens = random_tokens(llama.config.vocab_size, 2, 40, seed=0)
    with torch.no_grad():
        logits = theirs(tokens).logits  # (B, T, V)
        return f"logits, to {logits.abs().max():.2f}", relative(llama.logits(llama(tokens)), logits)


def compare_gradients(folder, scales):
    """(what was compared, largest difference): the gradient of a cross-entropy by each tensor of one LoRA."""
    from peft import LoraConfig, get_peft_model

    import lora
    import model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, lora_dropout=0.0, task_type="CAUSAL_LM")
    theirs, llama = get_peft_model(open_theirs(folder, scales), config).eval(), model.load(folder)
    adapter = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.values():
        torch.nn.init.normal_(parameter, 0, 0.05, generator=generator)  # PEFT's B = 0 leaves A without a gradient
    with tempfile.TemporaryDirectory() as saved:
        theirs.save_pretrained(saved)
        llama.load_adapter("oracle", saved)
    ours = {path: p.requires_grad_() for path, p in lora.named_parameters(llama, "oracle").items()}
    tokens = random_tokens(llama.config.vocab_size, 2, 40, seed=0)
    for logits in (theirs(tokens).logits, llama.logits(llama(tokens, "oracle"))):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    paths = {name.removeprefix("base_model.model.").removesuffix(".default.weight"): name for name in adapter}
    assert set(paths) == set(ours) and len(ours) == 14 * llama.config.num_hidden_layers
    found = {path: relative(ours[path].grad, adapter[name].grad) for path, name in paths.items()}
    worst = max(found, key=found.get)
    return f"{len(found)} gradients, worst {worst.removeprefix('model.layers.')}", found[worst]


def write_models(out, tokenizer_folder):
    """Let GPTQModel quantize one small random Llama to every format that we read. Returns the folders."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
    dense.save_pretrained(out / "dense")
    tokenizer.save_pretrained(out / "dense")
    rows = random_tokens(len(tokenizer), 16, 64, seed=2).split(1)
    formats = [(version, sym, act) for version in ("gptq", "gptq_v2") for sym in (True, False) for act in (False, True)]
    names = [f"{version}{'' if sym else '-asym'}{'-act' if act else ''}" for version, sym, act in formats]
    with contextlib.chdir(out):  # it writes ./logs
        for (version, sym, act), name in zip(formats, names, strict=True):
            how = QuantizeConfig(bits=4, group_size=32, sym=sym, desc_act=act, format=version)
            quantizer = GPTQModel.load("dense", how)
            quantizer.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
            quantizer.save(name)
    return [out / name for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="4-bit model folder")
    parser.add_argument("--write", type=Path, metavar="OUT", help="let GPTQModel write models there, and compare them")
    parser.add_argument("--tokenizer", type=Path, help="whose vocabulary the models written there have [FOLDER]")
    args = parser.parse_args()
    written = write_models(args.write, args.tokenizer or args.folder) if args.write else []
    pairs = [(args.folder, compare_gradients), *((folder, compare_logits) for folder in (args.folder, *written))]
    table = [(folder.name, *compare(folder, s), s) for folder, compare in pairs for s in BOUNDS]
    print(f"\n{'folder':<16} {'compared':<46} {'scales':<13} difference  bound")  # last: GPTQModel prints a lot itself
    for folder, what, difference, scales in table:
        verdict = "" if difference < BOUNDS[scales] else "  FAILED"
        print(f"{folder:<16} {what:<46} {scales!s:<13} {difference:<10.1e}  {BOUNDS[scales]:.0e}{verdict}")
    assert all(difference < BOUNDS[scales] for _, _, difference, scales in table)


if __name__ == "__main__":
    main()
