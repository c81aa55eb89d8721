"""The command line: flags and TOML files to settings, a command to its function, an error to one line and a code.

    read      flags (interface/flags.py) and --config (interface/settings_files.py) -> settings
    resolve   fills in what depends on the data, the run's folder and the machine
    main      runs the command

Exit codes: 0 done; 2 bad input; 1 disk full or broken; 3 numbers not finite; 4 out of memory; 130 and 143
stopped by Ctrl-C or SIGTERM. Every error that is not a bug is one line on standard error.
"""

import errno
import importlib.util
import json
import math
import os
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

from formats.errors import UserError
from interface.commands import COMMANDS
from interface.flags import parse
from interface.settings import LLAMA2, Common
from interface.settings_files import read_settings
from safety.terminal import DryRun, LostRank, Stopped, Stream, say, visible

XSUM_SIZES = {"train_examples": 15000, "test_examples": 3000}  # paper, 4.2
LARGE_BASE = 64 << 20  # bytes of weights from which --dtype auto takes bf16 on a CPU
RESUME = "if training had started, add --resume to continue it; eval and predict continue when called again"


def check_early(arguments, description=None):
    """Answer --help, and refuse wrong flags and settings files, before torch is imported, which takes seconds."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("No module named 'torch'; install what lastmile needs: make setup")
    command, given, _ = parse(arguments, description)
    if given.get("config"):
        try:
            read_settings(given["config"], command)
        except (UserError, OSError) as error:
            say(f"lastmile.py: {as_line(diagnosis(error)[1])}", file=sys.stderr)
            sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def read(arguments):
    """(command, settings, text) of a command line: flags, then the file of --config, then the defaults."""
    command, given, text = parse(arguments)
    if given.get("config"):
        given = read_settings(given["config"], command) | given
    return command, resolve(command, given), text


def resolve(command, given):
    """Settings from the values given; the rest depends on the data, the run's folder and the machine."""
    known = {f.name: f.metadata["toy"] for f in fields(COMMANDS[command])}
    if given.get("data", "toy") == "toy":
        given = {name: toy for name, toy in known.items() if toy is not None} | given
    if given.get("data") == "xsum":
        given = {name: size for name, size in XSUM_SIZES.items() if name in known} | given
    s = COMMANDS[command](**given)
    output = Path(s.output_dir or Path("runs") / Path(s.data).stem)
    found = {"output_dir": str(output), "model": s.model or default_model(command, s.data, output)}
    if command in ("mle", "ppo", "judge"):
        found["reward"] = s.reward or str(output / "reward")
    check_loggers(getattr(s, "report_to", ""))
    if getattr(s, "keep", "last") == "best" and not s.eval_every:
        raise UserError("--keep best: which is best is not known without validation; add --eval-every N")
    if getattr(s, "temperature", 1) == 0 and (s.top_k or s.top_p < 1):
        raise UserError("--top-k and --top-p choose among samples, and --temperature is 0; add --temperature 1")
    found["device"] = choose_device(s.device)
    found["dtype"] = s.dtype
    if s.dtype == "auto":
        before = dtype_before(output / f"{command}.partial", getattr(s, "resume", ""))
        found["dtype"] = choose_dtype(command, found["device"], found["model"], before)
    if found["dtype"] == "float16" and (command == "pretrain" or getattr(s, "tune", "lora") == "full"):
        raise UserError("--dtype float16: gradients vanish without loss scaling; use bfloat16 or float32")
    return replace(s, **found)


def default_model(command, data, output):
    """The base of the run's folder, if there is one or the data are the toy; else the paper's, which is 4-bit."""
    base = output / ("pretrain" if command == "quantize" else "base")
    if data == "toy" or base.exists():
        return str(base)
    if command == "quantize":
        raise UserError("quantize: which model? name an fp16 or fp32 one: --model FOLDER, or OWNER/NAME of the Hub")
    return LLAMA2


def check_loggers(report_to):
    """Raise UserError unless --report-to names services that are installed."""
    for name in filter(None, report_to.split(",")):
        if name not in ("tensorboard", "wandb") or importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: choose tensorboard, wandb or both; .venv/bin/pip install {name}")


def choose_device(name):
    """cpu or cuda for a value of --device."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name.startswith("cuda") and not has_gpu:
        raise UserError(f"--device {name}: this machine shows no GPU; use --device cpu")
    found = {"auto": "cuda" if has_gpu else "cpu", "cpu": "cpu", "cuda": "cuda"}
    if name not in found:
        raise UserError(f"--device {name}: choose cpu, cuda or auto")
    return found[name]


def choose_dtype(command, device, model, before=None):
    """The dtype of --dtype auto: bfloat16 on a GPU, and on a CPU that multiplies it faster, over a large base.

    What makes a base (pretrain, quantize, merge) stays fp32 on a CPU. before: what was found when the run started.
    """
    if device == "cuda":
        return "bfloat16"
    from formats.hub import on_hub
    from speed.cpu import bf16_is_faster, multiplies_bf16

    if command in ("pretrain", "quantize", "merge") or not multiplies_bf16():
        return "float32"
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if size <= LARGE_BASE and not on_hub(model):
        return "float32"
    return before or ("bfloat16" if bf16_is_faster() else "float32")


def dtype_before(partial, resume=""):
    """The dtype of a stopped run, or None: from its checkpoints, or the first line of a file that eval has kept."""
    place = partial / "checkpoints"
    named = [Path(resume) / "state.json"]
    for file in (*named, *sorted(place.glob("step-*/state.json")), *sorted(place.glob("*.jsonl"))):
        with (
            suppress(OSError, ValueError, LookupError, TypeError, RecursionError),
            open(file, encoding="utf-8") as opened,
        ):
            return json.loads(opened.readline())["--dtype"]
    return None


def be_deterministic():
    """--deterministic: the same bits in every run on a GPU; before the first product, which cuBLAS prepares for."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)


# What a reward model that PPO trains takes over from PPO besides all of Common: how long and how, not how well.
SHARED_WITH_REWARD = (
    "train_examples", "log_every", "grad_checkpoint", "micro_batch_size", "save_every",
    "keep_checkpoints", "max_time", "report_to", "deterministic",
)  # fmt: skip
ROWS_PER_EXAMPLE = 6  # of the reward stage: the true output and one negative of each class


def reward_settings(ppo):
    """The settings of the reward model that `ppo` trains if there is none; --config's [reward] comes before PPO's."""
    given = {name: getattr(ppo, name) for name in SHARED_WITH_REWARD}
    given["resume"] = "auto" if ppo.resume else ""
    if ppo.config and not ppo.config.endswith(".json"):  # a stage's config.json has that stage's settings alone
        given = read_settings(ppo.config, "reward", given)
    common = {f.name: getattr(ppo, f.name) for f in fields(Common)}
    found = resolve("reward", given | common)
    if ppo.max_steps and not found.max_steps:  # the same number of examples
        steps = ppo.max_steps * ppo.batch_size * ROWS_PER_EXAMPLE / found.batch_size
        found = replace(found, max_steps=math.ceil(steps))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Running a command


def diagnosis(error):
    """(exit code, message) of an error that is not a bug; None for a bug."""
    if isinstance(error, KeyboardInterrupt | Stopped):
        return 128 + getattr(error, "signal", signal.SIGINT), f"stopped; {RESUME}"
    if isinstance(error, FloatingPointError):
        return 3, error
    if isinstance(error, LostRank):
        return None, f"another rank has ended without a word, or was silent for too long; {RESUME} ({error})"
    if isinstance(error, MemoryError) or re.search("out of memory|(can't|cannot) allocate memory", str(error), re.I):
        return 4, (
            "out of memory; --grad-checkpoint or a smaller --micro-batch-size changes no result; a smaller "
            "--batch-size, --max-input-tokens or --max-new-tokens does; --dry-run measures the need"
        )
    if isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
        return (1, f"{message}; fix that; {RESUME}") if error.errno in disk else (2, message)
    if isinstance(error, ModuleNotFoundError):
        return 2, f"{error}; install what lastmile needs: make setup"
    return (2, error) if isinstance(error, UserError) else None


def as_line(message):
    """A message as one line of at most about 900 characters: it may quote what it was given."""
    line = visible(" ".join(str(message).split()))
    return line if len(line) < 1000 else f"{line[:600]} … {line[-300:]}"


def main(functions, arguments=None):
    """Run a command. functions: {command: function of its settings}. Returns the exit code."""
    from safety import ranks

    finished = False  # once the outcome is settled, a signal has nothing to stop

    def stop(number, frame):
        if not finished:
            raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)  # trainings catch it themselves, and finish their step first
    with redirect_stdout(Stream(sys.stdout)), redirect_stderr(Stream(sys.stderr)):
        try:
            command, settings, text = read(sys.argv[1:] if arguments is None else arguments)
            if settings.device == "cpu":
                from speed.cpu import prefer_onednn

                prefer_onednn()
            if getattr(settings, "deterministic", False):
                be_deterministic()
            ranks.start(command, asdict(settings))
            texts = (text,) if command == "sample" else ()
            with suppress(DryRun):
                functions[command](settings, *texts)
            finished = True
            return 0
        except (Exception, KeyboardInterrupt, Stopped) as error:
            finished = True
            found = diagnosis(error)
            if found is None or os.environ.get("LASTMILE_TRACEBACK"):
                ranks.failure(1, f"{type(error).__name__}: {error}")
                raise
            code, message = ranks.failure(*found)
            if message:
                print(f"lastmile.py: {as_line(message)}", file=sys.stderr)
            return code
        finally:
            ranks.finish()
            signal.signal(signal.SIGTERM, before)
