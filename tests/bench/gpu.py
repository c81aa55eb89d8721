"""`make bench-gpu`: 4-bit kernels, sampling and the PPO update on one GPU, random weights of Llama-2-7B's shapes.

K1 to K5 are in gpu_kernels.py, D1 to D3, P1 to P3 and M1 in gpu_steps.py: each says what it measures, and against whom.
Ceilings, a copy of 4 GiB and an 8192-cubed bf16 product, are measured in the same call; all floors follow from them.
Contestants take turns; medians and quartiles of up to 20 laps; times are between CUDA events, small kernels in a CUDA
graph. Correctness is asserted before anything is timed.

    python3 tests/bench/gpu.py --output-dir "$OUT"          9 minutes at most; needs the checkout, torch and triton
    python tests/bench/gpu.py --tiny                        every line of it without a GPU; its numbers mean nothing
"""

import argparse
import gc
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on a CPU

import common
import gpu_kernels
import gpu_steps
import torch

HEADER = ["GPU", "measured", "quartiles", "goal", "stretch", "met"]


class Bench:
    """What every part needs: sizes, device, ceilings, the clock; and where lines are collected."""

    def __init__(self, tiny, device):
        self.tiny, self.device = tiny, device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.C, self.F = (256, 384) if tiny else (4096, 11008)
        self.rotate = 1 << 20 if tiny else 512 << 20  # bytes of weights that take turns
        self.begin, self.rows, self.results, self.ceilings = time.monotonic(), [HEADER], {}, {}

    def race(self, contestants, seconds=10, **limits):
        limits = dict(most=2, least=2) if self.tiny else limits
        return common.race(contestants, seconds, clock=common.on_device, **limits)

    def line(self, id, what, values, goal=None, stretch=None, least=True, unit="", laps=None):
        """A row of the table: the median of values; least: whether the goal is a least value or a greatest."""
        found = common.summary(values) if len(values) > 1 else dict.fromkeys(("min", "q1", "median", "q3"), values[0])
        met = lambda limit: limit is not None and (found["median"] >= limit) == least  # noqa: E731
        word = "" if goal is None else "stretch" if met(stretch) else "goal" if met(goal) else "no"
        limits = ["" if x is None else f"{'>=' if least else '<='} {x:g}{unit}" for x in (goal, stretch)]
        shown = f"{found['q1']:.3g}-{found['q3']:.3g}" if len(values) > 1 else ""
        self.rows.append([f"{id} {what}", f"{found['median']:.3g}{unit}", shown, *limits, word])
        self.results[f"{id} {what}"] = found | {"goal": goal, "stretch": stretch, "laps": laps}
        print(" | ".join(self.rows[-1]), f"  [{time.monotonic() - self.begin:.0f} s]", flush=True)


def measure_ceilings(bench):
    """Bytes a second of a large copy, read plus written; FLOP a second of a large product, on random data."""
    n, size = (1 << 20, 256) if bench.tiny else (1 << 30, 8192)
    source = torch.randn(n, device=bench.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    laps = bench.race({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    bench.copy = 8 * n / common.summary(laps["copy"])["median"]
    bench.flops = 2 * size**3 / common.summary(laps["product"])["median"]
    bench.ceilings = {"copy, TB/s": round(bench.copy / 1e12, 3), "bf16 product, TFLOP/s": round(bench.flops / 1e12, 1)}
    print(bench.ceilings, flush=True)


def clocks():
    """What nvidia-smi says of clocks and limits now, right after work; asked, never set."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known ({type(error).__name__})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="K,D,P,D3", help="parts: kernels, sampling, PPO and its memory, transformers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: to see that every line runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda; cpu with --tiny")
    parser.add_argument("--output-dir", default=str(common.RESULTS), help="where gpu.json and gpu.md go")
    parser.add_argument("--commit", help="where the checkout knows no git")
    parser.add_argument("--minutes", type=float, default=7, help="after which no further part begins")
    arguments = parser.parse_args()
    device = arguments.device or ("cpu" if arguments.tiny else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: this machine shows no GPU; --tiny runs every line of it without one\n")
    bench, found, failed = Bench(arguments.tiny, device), common.facts(), []
    found |= {"commit": arguments.commit} if arguments.commit else {}
    torch.manual_seed(0)
    measure_ceilings(bench)
    found |= {"clocks": clocks()} if device == "cuda" else {}
    found |= {"note": "tiny shapes: numbers mean nothing"} if bench.tiny else {}
    parts = {"K": gpu_kernels.kernels, "D": gpu_steps.sampling, "P": gpu_steps.updates,
             "D3": gpu_steps.against_transformers}  # fmt: skip
    for part in arguments.only.split(","):
        if time.monotonic() - bench.begin > 60 * arguments.minutes:
            print(f"{part}: skipped, out of time", flush=True)
            continue
        try:
            parts[part](bench)
        except Exception:  # what the other parts measure is not lost with it
            traceback.print_exc()
            failed.append(part)
        gc.collect()
        torch.cuda.empty_cache()
        found |= {"seconds in all": round(time.monotonic() - bench.begin)} | ({"FAILED": failed} if failed else {})
        name = "gpu-tiny" if bench.tiny else "gpu"  # after every part, so that a call cut short has written something
        common.write(name, dict(found), bench.rows, Path(arguments.output_dir), ceilings=bench.ceilings,
                     results=bench.results)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
