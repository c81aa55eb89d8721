"""`make gpu`: everything that only a GPU can show, in one call of at most 9 minutes.

1. tests    the tests marked gpu
2. stages   20 steps of each of the demo's stages on the GPU and on the CPU, from the same base, in fp32: losses step by
            step to 1e-3, then in bf16, then PPO with sampled batches, whose random numbers differ from the CPU's
3. bench    make bench-gpu

OUT/gpu-check.json is written after each part, so that a call cut short has written something.

    python3 tests/bench/gpu_check.py --output-dir OUT
    make gpu FLAGS="--tiny --output-dir OUT"           every line of it without a GPU
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import common
import torch

STAGES = {  # name: flags; losses of the first three are compared, for PPO on the ground truth alone
    "reward": "--eval-examples 20",
    "mle": "",
    "ppo": "--ground-truth-fraction 1 --reward {cpu}/reward",
}
COMPARED = {"pretrain": ["loss"], "reward": ["loss"], "mle": ["loss"], "ppo": ["policy_loss", "value_loss", "return"]}


class Check:
    """What was found so far, where it is written, and the time that is left."""

    def __init__(self, folder, minutes, device, steps):
        self.folder, self.device, self.steps = folder, device, steps
        self.begin, self.limit = time.monotonic(), 60 * minutes
        self.found = {"facts": common.facts()}

    def left(self):
        return max(10, self.limit - (time.monotonic() - self.begin))

    def write(self, part, what):
        self.found[part] = what
        self.found["seconds"] = round(time.monotonic() - self.begin)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu-check.json").write_text(json.dumps(self.found, indent=2) + "\n")
        print(f"{part}: {what}", flush=True)

    def call(self, *command):
        """(exit code, the last lines of its output) of a command, stopped when no time is left."""
        begin = time.monotonic()
        try:
            done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=self.left())
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as stopped:
            code, said = "out of time", str(stopped.stdout)
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
        return {"exit": code, "seconds": round(time.monotonic() - begin, 1), "said": lines[-4:]}

    def stage(self, name, out, device, *flags):
        command = ["lastmile.py", name, "--output-dir", str(out), "--device", device, "--overwrite", *flags]
        if name != "quantize":
            command += ["--max-steps", str(self.steps), "--log-every", "1"]
        return self.call(sys.executable, *command)


def tests(check):
    """The tests marked gpu."""
    check.write("tests", check.call(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"))


def stages(check):
    """The demo's stages on both devices."""
    devices = {"cpu": "cpu", "gpu": check.device}  # with --tiny, the CPU twice
    cpu, gpu = check.folder / "cpu", check.folder / "gpu"
    fp32 = ["--dtype", "float32"]
    for name, device in devices.items():
        check.write(f"pretrain {name}", check.stage("pretrain", check.folder / name, device, *fp32))
    check.write("pretrain compared", compare("pretrain", cpu, gpu))
    check.write("quantize", check.stage("quantize", cpu, "cpu", "--calibration-examples", "16"))
    base = ["--model", str(cpu / "base")]
    for name, flags in STAGES.items():
        flags = flags.format(cpu=cpu).split()
        for where, device in devices.items():
            run = check.stage(name, check.folder / where, device, *base, *fp32, *flags)
            check.write(f"{name} {where}", run)
        check.write(f"{name} compared", compare(name, cpu, gpu))
        out = check.folder / "bf16"
        check.write(f"{name} bf16", check.stage(name, out, check.device, *base, "--dtype", "bfloat16", *flags))
        check.write(f"{name} bf16 compared", compare(name, cpu, out))
    sampled = ["--reward", str(cpu / "reward"), *base]
    out = check.folder / "sampled"
    check.write("ppo sampled", check.stage("ppo", out, check.device, *sampled) | {"last": journal("ppo", out)[-1:]})


def journal(stage, out):
    """metrics.jsonl of a stage as a list; empty where there is none."""
    file = Path(out) / stage / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def compare(stage, first, second):
    """The largest difference of each compared number over all steps, relative where it is above 1."""
    pairs = list(zip(journal(stage, first), journal(stage, second), strict=False))
    differences = {}
    for name in COMPARED[stage]:
        values = [abs(a[name] - b[name]) / max(1, abs(a[name])) for a, b in pairs]
        differences[name] = max(values, default=None)
    return {"steps": len(pairs), "largest difference": differences}


def bench(check, tiny):
    """make bench-gpu, within the time that is left."""
    flags = ["--output-dir", str(check.folder), "--minutes", f"{(check.left() - 60) / 60:.1f}", *(["--tiny"] * tiny)]
    check.write("bench", check.call(sys.executable, "tests/bench/gpu.py", *flags))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default=str(common.RESULTS / "gpu"))
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--tiny", action="store_true", help="the CPU in the GPU's place: to see that all runs")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.exit(2, "gpu_check.py: this machine shows no GPU; --tiny runs every line of it without one\n")
    device, steps = ("cpu", 3) if arguments.tiny else ("cuda", 20)
    check = Check(Path(arguments.output_dir), arguments.minutes, device, steps)
    tests(check)
    stages(check)
    bench(check, arguments.tiny)


if __name__ == "__main__":
    main()
