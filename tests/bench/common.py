"""What the benchmarks share: random Llamas and batches, timing side by side, ceilings, facts, and how results are kept.

The rules, the same for all: contestants take turns in one process (A B A B …) after a warm-up, on the same random
weights and data; that they compute the same is asserted before anything is timed; a ceiling of the machine, measured in
the same call, says how much a number means there. Every result is written with its spread, hardware, versions, commit
and the load of the machine, to results/NAME.json, and as a markdown table to results/NAME.md.

`import common` comes first in every benchmark: it makes the engine's files importable from this folder.
"""

import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
from rounding import round_to_nearest  # noqa: E402

import data  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import quant  # noqa: E402
from eval import markdown  # noqa: E402
from interface import commands as settings_module  # noqa: E402
from interface import folders  # noqa: E402
from safety.memory import resident_memory  # noqa: E402
from speed import cpu as cpu_speed  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = settings_module.Mle.lora_targets.split(",")
SIZES = {  # name: width, MLP width, blocks, heads; embeddings tied, as in llama2.c's models of stories
    "15M": (288, 768, 6, 6),
    "42M": (512, 1376, 8, 8),
}

# ----------------------------------------------------------------------------------------------------------------------
# Models and data, all random


def tiny_config(size, V=32000):
    C, F, L, H = SIZES[size]
    return model.LlamaConfig(V, C, F, L, H, H, C // H, tie_word_embeddings=True, eos_token_id=(-1,))  # never ends


def tiny_llama(size, packed=False, dtype=torch.float32):
    """A random Llama, frozen; packed: its projections in 4 bits, groups of 32, their scales in fp16."""
    llama = model.initialize(tiny_config(size), torch.Generator().manual_seed(0))
    llama.model.embed_tokens.weight.data.mul_(0.02)  # else a tied head repeats the last token, whatever went before
    if packed:
        for _, layer in lora.lora_layers(llama):
            N, K = layer.base.weight.shape
            packed_layer = quant.QuantLinear(K, N, 32)
            names = ("qweight", "qzeros", "scales", "g_idx")
            for name, tensor in zip(names, round_to_nearest(layer.base.weight.detach(), 32), strict=True):
                setattr(packed_layer, name, tensor)
            layer.base = packed_layer
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(dtype)
    return llama.requires_grad_(False)


def pack_layers(llama, group_size):
    """Put an empty 4-bit layer in the place of every projection."""
    for _, layer in lora.lora_layers(llama):
        N, K = layer.base.weight.shape
        layer.base = quant.QuantLinear(K, N, group_size)


def add_adapter(llama, name, r=32, head=None):
    """An adapter as after some training: neither factor is 0."""
    g = torch.Generator().manual_seed(len(name))
    llama.add_adapter(name, r, 16.0, TARGETS, g, head)
    for p in llama.adapter_parameters(name):
        if p.device.type != "meta":
            p.data.normal_(0, p.shape[1] ** -0.5 / 4, generator=None if p.is_cuda else g)


def random_rows(B, prompt, response, V=32000, seed=0):
    """A list of Datum, all of the same lengths: what is timed is work, not padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, prompt + response), generator=g).tolist()
    return [data.Datum(str(i), "", "", row[:prompt], row[prompt:]) for i, row in enumerate(ids)]


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def wall(run):
    """Seconds that run() takes by the clock on the wall."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def by_onednn(run):
    """run, its fp32 products done as lastmile.py has them done on a CPU; what takes turns with it has torch's own."""
    matmul = torch.backends.mkldnn.matmul
    chosen = "bf16" if cpu_speed.prefer_onednn() else "none"
    matmul.fp32_precision = "none"

    def switched():
        matmul.fp32_precision = chosen
        try:
            return run()
        finally:
            matmul.fp32_precision = "none"

    return switched


def on_device(run):
    """Seconds that run() takes on the GPU, between two events in its stream; without a GPU, by the clock."""
    if not torch.cuda.is_available():
        return wall(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def race(contestants, seconds=60, most=20, least=5, clock=wall):
    """{name: [seconds of each lap]}: contestants ({name: function}) take turns, after two rounds of warm-up.

    `most` laps each; fewer, but `least`, where they would take longer than `seconds` together.
    """
    one_round = lambda: {name: clock(run) for name, run in contestants.items()}  # noqa: E731
    one_round()
    laps = max(least, min(most, int(seconds / sum(one_round().values()))))
    gc.collect()
    gc.disable()
    laps = [one_round() for _ in range(laps)]
    gc.enable()
    return {name: [lap[name] for lap in laps] for name in contestants}


def summary(values):
    """Minimum, quartiles and number of a list of measurements."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "n": len(values)}


def speedup(ours, theirs):
    """How many times as fast we are: of the minima, and the quartiles of the ratios lap by lap."""
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    return summary(ratios) | {"of minima": min(theirs) / min(ours)}


def ceilings():
    """What one thread of this CPU can do: a large fp32 product in GFLOP/s, a large copy in GB/s, read plus written."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source = torch.randn(64 << 20)  # 256 MiB, beyond any cache
    target = torch.empty_like(source)
    laps = race({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, seconds=10)
    return {
        "fp32 product, GFLOP/s": round(2 * 2048**3 / min(laps["product"]) / 1e9, 1),
        "copy, GB/s": round(2 * 4 * len(source) / min(laps["copy"]) / 1e9, 1),
    }


def in_child(function, *arguments):
    """function(*arguments) in a forked process of its own: what one measurement leaves behind moves no other."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def warm_up():
    """Have torch's own first-time costs behind us: libraries opened, buffers taken."""
    x = torch.randn(64, 64, requires_grad=True)
    torch.optim.AdamW([x]).step()
    (x @ x).sum().backward()


def rss():
    """Bytes of memory that this process holds now, and the most that it ever held (Linux)."""
    return resident_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ----------------------------------------------------------------------------------------------------------------------
# Facts and results


def cpu_name():
    """As the kernel names it; family and model too, for where a virtual machine says little more than the maker."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"


def load():
    """Processes that wanted a core, on average of 1, 5 and 15 minutes: beyond the number of cores, distrust timings."""
    return ", ".join(f"{x:.2f}" for x in os.getloadavg())


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts():
    """Where and with what a benchmark ran. Call it at its start: it takes the load of the machine before."""
    found = {"commit": folders.commit(), "cpu": cpu_name(), "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "torch cpu capability": torch.backends.cpu.get_cpu_capability()}
    found |= {"python": platform.python_version(), "load before": load()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "gpu memory, GB": round(p.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    names = ("torch", "triton", "numpy", "transformers", "peft", "trl")
    return found | {name: version(name) for name in names if version(name)}


def write(name, found, table, folder=RESULTS, **numbers):
    """Print the table, and write it and everything measured to a folder. found: of `facts`; table: rows of strings."""
    found |= {"load after": load()}
    lines = [f"{key}: {value}" for key, value in (found | numbers.get("ceilings", {})).items()]
    text = markdown(table) + "\n\n" + "; ".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"facts": found, **numbers}, indent=2) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten: {name}.json and {name}.md in {folder}", flush=True)
