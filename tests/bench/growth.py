"""How the time and the memory of a step grow with batch, length and rank: a maximum-likelihood step and a PPO update.

One quantity moves at a time, the others stay at 7 rows, 250 tokens (50 of them response) and rank 32, on a 4-bit random
Llama of 15M parameters, one CPU thread. Every point runs in processes of its own: time is the least of its laps; memory
is taken in another that gives freed tensors back at once, its peak less what was held before the model was there.
The slope of a straight line through the logarithms is the exponent: 1 is linear, 2 quadratic, 0 no dependence.

    .venv-bench/bin/python tests/bench/growth.py [--quick]      -> results/growth.json, .md and .svg
"""

import argparse

import common
import numpy as np
import steps
import torch

BASE = {"batch": 7, "length": 250, "rank": 32}
AXES = {"batch": [1, 2, 4, 7, 10, 14], "length": [64, 128, 250, 384, 512], "rank": [4, 8, 16, 32, 64]}
STAGES = {"mle": "maximum-likelihood step", "ppo": "PPO update"}
RESPONSE = 50


def point(stage, batch, length, rank, laps):
    s = steps.settings(stage, batch_size=batch, lora_r=rank)
    rows = common.random_rows(batch, length - RESPONSE, RESPONSE)
    found = steps.measure(stage, s, rows, laps=laps)
    found["glibc"] = found["peak"]  # with what glibc kept for later
    found["peak"] = steps.measure(stage, s, rows, laps=1, returned=True)["peak"]
    return found


def exponent(values, measured):
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def sentence(stage, curves):
    """What the curves of a stage say, in words."""
    fit = lambda axis, key: exponent([p["value"] for p in curves[axis]], [p[key] for p in curves[axis]])  # noqa: E731
    grows = lambda key: ", ".join(f"{axis}^{fit(axis, key):.2f}" for axis in curves)  # noqa: E731
    here = next(p for p in curves["batch"] if p["value"] == BASE["batch"])
    return (
        f"A {STAGES[stage]} of {BASE['batch']} x {BASE['length']} tokens takes {here['time']:.2f} s and "
        f"{here['peak'] / 1e6:.0f} MB; its time grows as {grows('time')}, its memory as {grows('peak')}."
    )


def plot(curves, file):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), sharey="row", layout="constrained")
    for column, axis in enumerate(AXES):
        for color, stage in zip(("tab:blue", "tab:orange"), STAGES, strict=True):
            points = curves[stage][axis]
            x = [p["value"] for p in points]
            axes[0, column].plot(x, [p["time"] for p in points], "o-", color=color, label=STAGES[stage])
            axes[1, column].plot(x, [p["peak"] / 1e6 for p in points], "o-", color=color)
        axes[1, column].set_xlabel({"batch": "rows a batch", "length": "tokens a row", "rank": "rank of LoRA"}[axis])
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend(frameon=False)
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends of each axis only, one lap: to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    common.cpu_speed.prefer_onednn()
    found, curves = common.facts(), {stage: {} for stage in STAGES}
    table = [["7 rows, 250 tokens, rank 32, but", "mle, s", "mle, MB", "ppo, s", "ppo, MB"]]
    for axis, values in AXES.items():
        for value in [values[0], BASE[axis], values[-1]] if quick else values:
            row = [f"{axis} {value}"]
            for stage in STAGES:
                p = point(stage, **(BASE | {axis: value}), laps=1 if quick else 3)
                p |= {"value": value, "time": min(p["seconds"])}
                curves[stage].setdefault(axis, []).append(p)
                row += [f"{p['time']:.2f}", f"{p['peak'] / 1e6:.0f}"]
            table.append(row)
            print(" | ".join(row), flush=True)
    words = [sentence(stage, curves[stage]) for stage in STAGES]
    common.write("growth", found, table, curves=curves, sentences=words)
    plot(curves, common.RESULTS / "growth.svg")
    print("\n".join(words))


if __name__ == "__main__":
    main()
