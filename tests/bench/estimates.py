"""What --dry-run says a stage will need, beside the peak that the same command then reaches, on a CPU.

Whole epochs of few examples, so that the largest batch comes; each stage is a process of its own.

    python tests/bench/estimates.py [--model FOLDER] [--data samsum] [--dtype auto]    -> results/estimates.json and .md
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile

import common

STAGES = {
    "quantize": "--group-size 32 --calibration-examples 32",
    "reward": "--train-examples 70 --eval-examples 10",
    "mle": "--train-examples 70",
    "ppo": "--train-examples 70",
    "eval": "--test-examples 60 --adapters mle,policy --bleurt none",
}
COMMON = "--max-input-tokens 200"


def said(line):
    """The estimate in GB of a command."""
    run = subprocess.run([*line, "--dry-run"], capture_output=True, text=True, check=True)
    return float(re.search(r"= ([\d.]+) GB, an estimate", run.stdout + run.stderr)[1])


def peak(line):
    """The largest resident memory in GB of a command, as the kernel counts it."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(line)}: failed")
    return usage.ru_maxrss * 1024 / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="samsum")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    table, found = [["stage", "estimate, GB", "peak, GB", "ratio"]], {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, flags in STAGES.items():
            where = ["--model", args.model] if stage == "quantize" else ["--dtype", args.dtype]
            line = [sys.executable, str(common.ROOT / "lastmile.py"), stage, *flags.split(), *COMMON.split()]
            line += ["--data", args.data, "--output-dir", folder, *where]
            guess, real = said(line), peak(line)
            found[stage] = {"flags": f"{flags} {COMMON}", "estimate": guess, "peak": real}
            table.append([stage, f"{guess:.2f}", f"{real:.2f}", f"{guess / real:.2f}"])
            print(" | ".join(table[-1]), flush=True)
    common.write("estimates", common.facts() | vars(args), table, measured=found)


if __name__ == "__main__":
    main()
