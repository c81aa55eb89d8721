"""Whether --dry-run's estimate of the memory is right, and what it says fits on which card.

Measured: the peak memory of real steps of reward, mle and ppo at the paper's batch sizes, a 4-bit random Llama of 15M
parameters, 200 + 50 tokens, on the CPU, against dry_run.dry_run's estimate of the same. Twice: with memory freed given
back at once, which is what the estimate means; and with glibc's allocator left alone.

Then the same estimate for Llama-2's real shapes, 4-bit with groups of 128, on a GPU in bf16, 400 + 100 tokens.

    .venv-bench/bin/python tests/bench/memory.py [--fits-only]      -> results/memory.json and .md
"""

import argparse

import common
import steps
import torch

BATCH = {"reward": 14, "mle": 7, "ppo": 7}  # the paper's
CARDS = (12, 16, 24, 48, 80)  # GB
OVERHEAD = 0.6e9, 1.05  # CUDA's context and workspaces; what the caching allocator wastes: assumed, not measured here
LLAMA2 = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # width, MLP width, blocks, heads


def measured():
    """Rows of the first table, and its numbers."""
    table, numbers = [["15M, 4-bit, on the CPU", "estimate, MB", "peak, MB", "ratio", "as glibc has it", "ratio"]], {}
    for stage, B in BATCH.items():
        for checkpointed in (False, True):
            sampled = {"max_new_tokens": 50} if stage == "ppo" else {}  # as long as the outputs below
            s = steps.settings(stage, batch_size=B, grad_checkpoint=checkpointed, **sampled)
            rows = common.random_rows(B, 200, 50)
            memory = steps.estimate(stage, s, rows, steps.meta_llama(common.tiny_config("15M"), 32))
            peaks = [steps.measure(stage, s, rows, laps=2, returned=r)["peak"] for r in (True, False)]
            guess, name = sum(memory.values()), f"{stage}{', --grad-checkpoint' if checkpointed else ''}"
            numbers[name] = {"estimate": memory, "peak": peaks[0], "glibc": peaks[1]}
            cells = [f"{guess / 1e6:.0f}"]
            for peak in peaks:
                cells += [f"{peak / 1e6:.0f}", f"{peak / guess:.2f}"]
            table.append([name, *cells])
            print(" | ".join(table[-1]), flush=True)
    return table, numbers


def ways(stage):
    """From the plainest to the most frugal: (what it is called, settings)."""
    yield "plain", {}
    yield "checkpoint", dict(grad_checkpoint=True)
    for size in (4, 2, 1):
        yield f"and micro {size}", dict(grad_checkpoint=True, micro_batch_size=size)


def fits():
    """Rows of the second table, and its numbers: the plainest way that fits on each card."""
    header = ["Llama-2, 4-bit, bf16, 400 + 100 tokens", "plain, GB", "checkpoint, GB", *(f"{c} GB" for c in CARDS)]
    table, numbers = [header], {}
    for size, (C, F, L, H) in LLAMA2.items():
        llama = steps.meta_llama(common.model.LlamaConfig(32000, C, F, L, H, H, C // H), 128, torch.bfloat16)
        for stage, B in BATCH.items():
            needs = {}
            for way, changes in ways(stage):
                s = steps.settings(stage, batch_size=B, device="cuda", dtype="bfloat16", **changes)
                if s.micro_batch_size:  # what passes at once is all that the estimate's batch size means
                    s = steps.settings(stage, batch_size=s.micro_batch_size, device="cuda", dtype="bfloat16",
                                       grad_checkpoint=True)  # fmt: skip
                memory = steps.estimate(stage, s, common.random_rows(s.batch_size, 400, 100), llama)
                needs[way] = sum(memory.values()) * OVERHEAD[1] + OVERHEAD[0]
                numbers[f"{size} {stage} {way}"] = memory
            cells = [f"{needs[way] / 1e9:.1f}" for way in ("plain", "checkpoint")]
            cells += [next((way for way, need in needs.items() if need < card * 1e9), "no") for card in CARDS]
            table.append([f"{size} {stage}, {B} rows", *cells])
            print(" | ".join(table[-1]), flush=True)
    return table, numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits-only", action="store_true", help="the second table alone: no step is run")
    fits_only = parser.parse_args().fits_only
    torch.set_num_threads(1)
    common.cpu_speed.prefer_onednn()
    found = common.facts()
    table, numbers = ([], {}) if fits_only else measured()
    second, estimates = fits()
    note = f"GB with {OVERHEAD[1] - 1:.0%} and {OVERHEAD[0] / 1e9} GB on top of the estimate, for allocator and CUDA"
    common.write("fits", found | {"note": note}, second, estimates=estimates)
    if table:
        common.write("memory", found, table, measured=numbers)


if __name__ == "__main__":
    main()
