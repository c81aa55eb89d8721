"""Break every file that lastmile reads, in thousands of ways, and see that lastmile itself never breaks.

    python tests/fuzz.py --count 5000 --seed 0        all targets in turn; a table, exit code 1 if anything failed
    python tests/fuzz.py --only adapter --count 500   one target
    python tests/fuzz.py --mutant 1234                one mutant once more, with all that it printed

A mutant is a small run (models, adapters, a checkpoint, data, settings) with one file of it broken, by `mutate.py`, and
one command over it. The promise: exit code 0; or 3, where numbers were changed and something is no longer finite; or 2
with one short line on stderr, warnings apart, and not a byte written, changed or lost. Never a traceback, a dead
process, more than 10 seconds or 2 GB.

What a mutant is follows from --seed and its number. Commands run in one process, for speed, that is watched from
outside and replaced when it dies. Not covered: two broken files at once, files that change while they are read, the
Hub, GPUs, flags, and sound settings that ask for much work.
"""

import argparse
import hashlib
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutate import mutate

ROOT = Path(__file__).resolve().parents[1]
SECONDS, BYTES = 10, 2 << 30
FAULTS = ("traceback", "hang", "crash", "other fault")

# ----------------------------------------------------------------------------------------------------------------------
# What is broken, and by which commands it is read. The folder with the broken file is `it`, the file itself FILE.


@dataclass(frozen=True)
class Target:
    folders: str  # of sound files, of which one is copied to `it`
    files: str  # of which one is broken
    commands: tuple  # of which one is run
    model: str = "seeds/packed"
    numbers: bool = False  # whether the file holds numbers that may become NaN


TRAIN = "--max-steps 1 --batch-size 2 --train-examples 4 --max-new-tokens 40 --lora-r 4"
EVAL = "eval --adapters base --test-examples 2 --bleurt none --max-new-tokens 40"
SAMPLE = "sample hello --max-new-tokens 3 --adapter"
REWARD, PPO = f"reward {TRAIN} --eval-examples 2", f"ppo {TRAIN} --reward"
SOME = (f"{SAMPLE} base", "mle --dry-run", f"mle {TRAIN}", REWARD, f"{PPO} seeds/adapter/reward", EVAL)
ALL = (*SOME, "quantize --calibration-examples 2 --group-size 8", "merge --adapter seeds/adapter/mle")
DATA = ("mle --dry-run --data FILE", f"{REWARD} --data FILE", f"{EVAL} --data FILE", "pretrain --dry-run --data FILE")
RESUME = f"mle {TRAIN} --max-steps 3 --output-dir it --resume"
STEP = "mle.partial/checkpoints/step-00000002"
TARGETS = {
    "config": Target("packed dense sharded", "config.json generation_config.json", ALL, "it", numbers=True),
    "quantize_config": Target("apart", "quantize_config.json", SOME, "it", numbers=True),
    "index": Target("sharded", "model.safetensors.index.json", SOME, "it"),
    "weights": Target("packed dense sharded", "model.safetensors model-2.safetensors", ALL, "it", numbers=True),
    "tokenizer.model": Target("packed", "tokenizer.model", SOME, "it"),
    "tokenizer.json": Target("dense", "tokenizer.json tokenizer_config.json", SOME, "it"),
    "template": Target("packed", "template.txt", (*SOME, "mle --dry-run --template FILE"), "it"),
    "adapter mle": Target("adapter", "mle/adapter_config.json mle/adapter_model.safetensors", (
        f"{SAMPLE} it/mle", "merge --adapter it/mle", f"{PPO} seeds/adapter/reward --init it/mle"), numbers=True),
    "adapter reward": Target("adapter", "reward/adapter_config.json reward/adapter_model.safetensors", (
        f"{PPO} it/reward", f"{PPO} it/reward --dry-run"), numbers=True),
    "checkpoint": Target("run", f"{STEP}/state.json {STEP}/state.safetensors {STEP}/manifest.json",
                         (RESUME, f"{RESUME} it/{STEP}"), numbers=True),
    **{kind: Target("data", f"rows.{kind}", DATA) for kind in ("csv", "jsonl", "json", "parquet")},
    "settings": Target("settings", "settings.toml settings.json", tuple(f"{command} --config FILE" for command in (
        f"mle {TRAIN}", f"{PPO} seeds/adapter/reward", "mle --dry-run", f"{SAMPLE} base")), numbers=True),
    "tables": Target("eval", "eval/scores.json eval/intervals.json eval/facts.json", ("tables --output-dir it",)),
}  # fmt: skip


def command(line, model):
    """The arguments of a command: those that it names, and those that all have."""
    words = line.split()
    rest = {"--data": "seeds/data/rows.csv", "--output-dir": "out", "--model": model}
    return words + [word for flag, value in rest.items() if flag not in words for word in (flag, value)]


def make_seeds(lastmile):
    """Sound files of every kind under ./seeds, small, and made by lastmile itself where it writes such files."""
    import pyarrow.parquet
    import tokenizers
    import torch
    from safetensors.torch import load_file, save_file

    def run(line, model, code=0):
        assert lastmile.main(command(line, model)) == code, line

    seeds = Path("seeds")
    (seeds / "data").mkdir(parents=True)
    rows = [{"input": e.source, "output": e.target} for e in lastmile.data.toy("train")[:40]]
    (seeds / "data/rows.csv").write_text("input,output\n" + "".join('"{input}","{output}"\n'.format(**r) for r in rows))
    (seeds / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (seeds / "data/rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), seeds / "data/rows.parquet")

    shape = "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 2 --num-attention-heads 2 --vocab-size 700"
    run(f"pretrain {shape} --num-key-value-heads 1 --max-steps 8 --data toy --train-examples 64 --output-dir made", "")
    run("quantize --calibration-examples 8 --output-dir made", "made/pretrain")
    for line in (REWARD, f"mle {TRAIN}", EVAL):
        run(f"{line} --output-dir made", "made/base")
    for name in ("packed", "apart", "adapter/reward", "adapter/mle", "eval/eval"):
        shutil.copytree(f"made/{Path(name).name if '/' in name else 'base'}", seeds / name)
        (seeds / name / "base.sha256").unlink(missing_ok=True)  # so that the adapters go with every model
    config = json.loads((seeds / "apart/config.json").read_text())
    (seeds / "apart/quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (seeds / "apart/config.json").write_text(json.dumps(config))
    for line in (RESUME.removesuffix("--resume"), RESUME):  # two checkpoints, of a run that stops after every step
        run(f"{line} --max-time 1e-9".replace(" it ", " seeds/run "), "seeds/packed", 143)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(map(str, rows), tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizer.pre_tokenizer.alphabet(),
        show_progress=False))  # fmt: skip
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    config = lastmile.model.LlamaConfig(tokenizer.get_vocab_size(), 32, 64, 2, 2, 1, 16, eos_token_id=(1,))
    for folder in (seeds / "dense", seeds / "sharded"):
        folder.mkdir()
        lastmile.model.save(lastmile.model.initialize(config, torch.Generator().manual_seed(0)), folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
        (folder / "template.txt").write_text("<s>Text: {source}\nSummary:")
    tensors, place = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for shard, i in (("model-1.safetensors", 0), ("model-2.safetensors", 1)):
        place |= dict.fromkeys(sorted(tensors)[i::2], shard)
        save_file({name: tensors[name] for name in sorted(tensors)[i::2]}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))

    (seeds / "settings").mkdir()
    mine = {"max_input_tokens": 300, "learning_rate": 0.001, "seed": 5, "template": "plain", "input_column": "input",
            "target_column": "output", "lora_targets": "q_proj,v_proj", "lora_alpha": 8.0}  # fmt: skip
    (seeds / "settings/settings.json").write_text(json.dumps(mine | {"stage": "mle"}))
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in mine.items())
    lines += "[mle]\neos_in_labels = false\n[ppo]\ngamma = 0.9\nppo-epochs = 2\nwhiten = true\n"
    (seeds / "settings/settings.toml").write_text(lines)


# ----------------------------------------------------------------------------------------------------------------------
# One mutant, in the process that runs it


def prepare(n, seed):
    """Lay out ./it with one broken file. Returns (target, file, the command's arguments)."""
    name, rng = list(TARGETS)[n % len(TARGETS)], random.Random(f"{seed}:{n}")
    target = TARGETS[name]
    for folder in ("it", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(f"seeds/{rng.choice(target.folders.split())}", "it")
    file = rng.choice([path for path in map(Path("it").joinpath, target.files.split()) if path.exists()])
    file.write_bytes(mutate(file.read_bytes(), file, rng))
    if name == "checkpoint" and file.name != "manifest.json" and rng.random() < 0.6:  # signed anew: past its hash too
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in file.parent.glob("state.*")}
        file.with_name("manifest.json").write_text(json.dumps(sums))
    return target, file, command(rng.choice(target.commands).replace("FILE", str(file)), target.model)


def contents():
    paths = [path for top in ("seeds", "it", "out") for path in Path(top).rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def judge(target, words, code, error, before, after):
    """(outcome, what was wrong)."""
    lines = [line for line in error.splitlines() if line and not line.startswith("lastmile.py: warning:")]
    output = words[words.index("--output-dir") + 1]
    kept = {path: content for path, content in before.items() if path.parts[0] != output or code == 2}
    if isinstance(code, str) or "Traceback" in error or "panicked" in error:
        return "traceback", code if isinstance(code, str) else ""
    if not kept.items() <= after.items() or (code == 2 and before != after):
        return "other fault", f"exit code {code}, yet changed: {before.keys() ^ after.keys() or 'contents'}"
    if code == 0 or (code == 3 and target.numbers):
        return f"exit {code}", ""
    if code == 2 and len(lines) == 1 and lines[0].startswith("lastmile.py") and len(lines[0]) < 1500:
        return "exit 2", ""
    return "other fault", f"exit code {code} and {len(lines)} lines, the longest {max(map(len, ['', *lines]))}"


def serve(seed):
    """Run the mutants whose numbers come on standard input; answer a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.path.insert(0, str(ROOT))
    import lastmile

    make_seeds(lastmile)
    answers.write("ready\n")
    for n in map(int, sys.stdin):
        (target, file, words), before = prepare(n, seed), contents()
        os.ftruncate(2, 0)
        try:
            code = lastmile.main(words)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
        print(end="", flush=True)
        error = Path("stderr").read_text(errors="replace")
        outcome, why = judge(target, words, code, error, before, contents())
        answers.write(json.dumps([outcome, f"{file}: {' '.join(words)}\n{error[-5000:]}{why[-5000:]}"]) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# All mutants, watched


class Worker:
    """The process that runs mutants, started when there is none: at first, or after it had to be killed."""

    def __init__(self, seed):
        self.seed, self.process = seed, None

    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        this = [sys.executable, os.path.abspath(__file__), "--serve", "--seed", str(self.seed)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(this, cwd=self.folder.name, env=environment, **pipes)
        if self.answer(300) != "ready\n":
            sys.exit(f"the sound files could not be made: {self.printed()}")

    def printed(self):
        return Path(self.folder.name, "stderr").read_text(errors="replace")[-5000:]

    def answer(self, seconds):
        """Its next line, or the fault that kept it from one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done = select.select([self.process.stdout], [], [], 0.1)[0]
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
            if peak and int(peak[1]) << 10 > BYTES:  # None: it has just died
                return "other fault"
            if done:
                return self.process.stdout.readline() or "crash"
        return "hang"

    def ask(self, n):
        """[outcome, what was run and printed] of a mutant."""
        if self.process is None:
            self.start()
        print(n, file=self.process.stdin, flush=True)
        line = self.answer(SECONDS)
        if line not in FAULTS:
            return json.loads(line)
        printed = self.printed()
        self.stop()
        return [line, f"over {BYTES >> 30} GB" if line == "other fault" else printed or "nothing printed"]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process = None
        self.folder.cleanup()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--mutant", type=int)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.serve:
        return serve(a.seed)
    names, begun, worker = list(TARGETS), time.monotonic(), Worker(a.seed)
    numbers = range(names.index(a.only), a.count * len(names), len(names)) if a.only else range(a.count)
    numbers, table = numbers if a.mutant is None else [a.mutant], {name: Counter() for name in names}
    for n in numbers:
        outcome, printed = worker.ask(n)
        table[names[n % len(names)]][outcome] += 1
        if outcome in FAULTS or a.mutant is not None:
            first, *_, last = 2 * printed.strip().splitlines()
            shown = printed if a.mutant is not None else f"{first} ... {last:.300}"
            print(f"mutant {n} ({names[n % len(names)]}), {outcome}: {shown}", flush=True)
    if worker.process:
        worker.stop()
    total = sum(table.values(), Counter())
    print(f"{'target':16}{'tried':>9}{'ok':>9}{'refused':>9}{'exit 3':>9}{'failed':>9}")
    for name, found in ((name, found) for name, found in (table | {"all": total}).items() if found):
        counts = found.total(), *(found[f"exit {code}"] for code in (0, 2, 3)), sum(found[fault] for fault in FAULTS)
        print(f"{name:16}" + "".join(f"{count:9,}" for count in counts))
    faults = ", ".join(f"{total[fault]:,} {fault}{'es' if fault == 'crash' else 's'}" for fault in FAULTS)
    print(f"{len(numbers):,} tried, {faults}, {time.monotonic() - begun:.0f} seconds")
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
