"""What a second process gains on a CPU: tokens per second of reward, mle and ppo by one rank and by two, a thread each.

The all-reduce's share is the time that the first rank spends in it, waiting for the other included. Steps whose rows
cannot be halved (7: 4 and 3) leave one rank waiting for an eighth of the time.

    python tests/bench/ranks.py --model FOLDER [--data samsum] [--steps 6]           -> results/ranks.json and .md
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import common

STAGES = {"reward": "--eval-examples 2", "mle": "", "ppo": "--reward rouge"}
DRIVER = """
import sys, time
import torch.distributed as dist
import lastmile

spent, all_reduce = 0.0, dist.all_reduce

def timed(*arguments, **keywords):
    global spent
    begin = time.perf_counter()
    found = all_reduce(*arguments, **keywords)
    spent += time.perf_counter() - begin
    return found

dist.all_reduce = timed
code = lastmile.main(sys.argv[1:])
print(f"all-reduce {spent:.3f} s")
sys.exit(code)
"""


def run(ranks, line):
    """(seconds, tokens a second, seconds in all-reduce) of a command by so many ranks, as its first rank says."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as driver:
        driver.write(DRIVER)
        driver.flush()
        torchrun = "-m torch.distributed.run --standalone --local-ranks-filter 0 --nproc-per-node"
        start = [*torchrun.split(), str(ranks)] if ranks > 1 else []
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(common.ROOT)}
        whole = [sys.executable, *start, driver.name, *line]
        done = subprocess.run(whole, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.stderr[-1500:])
    cost = re.search(r"steps, (\d+) tokens, (\d+) tokens/s", done.stdout)
    tokens, speed = int(cost[1]), int(cost[2])
    return tokens / speed, speed, float(re.search(r"all-reduce ([\d.]+) s", done.stdout)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="samsum")
    parser.add_argument("--steps", default="6")
    args = parser.parse_args()
    table = [["stage", "one rank, tokens/s", "two ranks, tokens/s", "ratio", "all-reduce and waiting"]]
    found = {}
    for stage, flags in STAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            line = [stage, *flags.split(), "--data", args.data, "--model", args.model, "--max-steps", args.steps]
            line += ["--max-input-tokens", "200", "--output-dir", folder]
            one, two = run(1, line), run(2, [*line, "--overwrite"])
        found[stage] = {"one": one, "two": two}
        share = two[2] / two[0]
        table.append([stage, f"{one[1]}", f"{two[1]}", f"{two[1] / one[1]:.2f}", f"{share:.0%}"])
        print(json.dumps(found[stage]), " | ".join(table[-1]), flush=True)
    common.write("ranks", common.facts() | vars(args), table, measured=found)


if __name__ == "__main__":
    main()
