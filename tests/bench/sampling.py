"""Sampling with a real model on one CPU thread: model.sample beside transformers' generate, and beside the reading of
the weights, which each new token needs at least once.

    .venv-bench/bin/python tests/bench/sampling.py --model FOLDER [--dtype float32] [--new 40] [--laps 3]

Seven prompts of 100 to 240 tokens in the model's own template, greedy, with and without a LoRA adapter of rank 32 (for
transformers PEFT's). FOLDER: a dense Llama folder, for example HuggingFaceTB/SmolLM2-135M-Instruct, downloaded. No EOS
ends an output, so that both take the same steps. First asserted: the same tokens (fp32).
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path

import common
import peft
import torch
import transformers

import data
import model

WORDS = "Amy Ben the a cat dog says will go to park at noon and bring cake but not today because".split()  # noqa: SIM905
HEADER = [
    "one CPU thread", "ours, s", "theirs, s", "speedup", "a token of ours, ms", "the weights once, ms", "ratio",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--laps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = common.facts() | {"model": Path(options.model).name, "dtype": options.dtype, "new tokens": options.new}
    dtype = getattr(torch, options.dtype)
    llama = model.load(options.model, dtype=dtype)
    tokenizer = data.load_tokenizer(options.model)
    llama.config = data.replace(llama.config, eos_token_id=(-1,))
    rng = random.Random(0)
    prompts = tokenizer.prompts([" ".join(rng.choices(WORDS, k=rng.randint(10, 140))) for _ in range(7)])
    weights = list(llama.parameters())
    reading = min(common.race({"read": lambda: [w.sum() for w in weights]}, most=5)["read"])
    rows, results = [HEADER], {"reading, s": reading, "bytes": sum(w.numel() * w.element_size() for w in weights)}
    common.add_adapter(llama, "policy")
    for what, adapter in (("base", None), ("adapter", "policy")):
        theirs = transformers.LlamaForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        theirs.config.eos_token_id = theirs.generation_config.eos_token_id = None
        if adapter:
            with tempfile.TemporaryDirectory() as folder:
                llama.save_adapter(adapter, folder, options.model)
                theirs = peft.PeftModel.from_pretrained(theirs, folder)
        ours, peers = functions(llama, adapter, theirs, prompts, options.new)
        if dtype == torch.float32:
            assert ours() == peers(), "not the same tokens"
        laps = common.race({"ours": ours, "theirs": peers}, seconds=0, least=options.laps)

        speed = common.speedup(laps["ours"], laps["theirs"])
        with torch.inference_mode():
            prefill = min(common.race({"": partial(model.prefill, llama, prompts, adapter, 1)}, most=3, least=3)[""])
        token = (min(laps["ours"]) - prefill) / options.new
        results[what] = laps | {"speedup": speed, "prefill, s": prefill, "token, s": token}
        rows.append([
            f"{what}, {options.dtype}", f"{min(laps['ours']):.2f}", f"{min(laps['theirs']):.2f}",
            f"{speed['of minima']:.2f}x", f"{1e3 * token:.0f}", f"{1e3 * reading:.0f}", f"{token / reading:.1f}x",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    common.write(f"sampling-{options.dtype}", found, rows, results=results)


def functions(llama, adapter, theirs, prompts, new):
    """(ours, peers): each returns the new tokens of all prompts, as lists."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts])  # padded on the left
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None
    )

    def ours():
        return model.sample(llama, prompts, adapter, new, 0)

    def peers():
        found = theirs.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return found[:, T:].tolist()

    return common.by_onednn(ours), peers


if __name__ == "__main__":
    main()
