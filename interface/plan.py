"""What --dry-run does in place of the work: sizes and steps, and of a training one update on its largest batch.

The update has a rate of 0 and is not kept. Its memory is measured, not estimated: what does not fit ends here.
"""

from pathlib import Path

from safety.memory import peak_memory
from safety.terminal import DryRun, say, warn


def end_dry_run(settings, llama=None, rows=(), steps=0, learning=(), update=None):
    """Under --dry-run print the plan of a command and raise DryRun; otherwise do nothing.

    rows: list of Datum. learning: the parameters that are trained, in `steps` steps. update: a function without
    arguments that makes one of them.
    """
    if not settings.dry_run:
        return
    say("\ndry run: nothing is written")
    if llama is not None:
        name = Path(settings.model).name if llama.folder else "fresh weights"
        say(f"  model    {name}: {number_of_weights(llama) / 1e6:,.1f} M parameters")
    if rows:
        lengths = [len(datum.prompt) + len(datum.response) for datum in rows]
        say(f"  data     {len(rows):,} rows, {sum(lengths) / 1e6:,.2f} M tokens, the longest {max(lengths)}")
    if learning:
        say(f"  trained  {sum(p.numel() for p in learning):,} parameters")
        say(f"  steps    {steps:,} of {settings.batch_size} rows")
    if update is not None:
        update()
        say(f"  memory   {peak_memory(settings.device) / 1e9:.2f} GB at most, in one update on the largest batch")
    raise DryRun


PAPER = 1800 * 1e-5  # steps times learning rate (P 3.1); a tenth of it lowers the toy's loss by 1.5 %


def warn_of_little_training(settings, steps):
    """Warn if so few steps at this rate hardly change an adapter, whose B starts at 0."""
    if getattr(settings, "tune", "") != "lora" or steps * settings.learning_rate >= 0.1 * PAPER:
        return
    rate = min(PAPER / steps, 1e-3)
    warn(
        f"{steps} steps at a learning rate of {settings.learning_rate:g} hardly change an adapter (the paper: 1800 at "
        f"1e-05); set --learning-rate {rate:.0e}, or more --epochs"
    )


def number_of_weights(llama):
    """Of the base: neither adapters nor heads, packed weights counted one by one."""
    dense = sum(p.numel() for name, p in llama.named_parameters() if "lora_" not in name and "score" not in name)
    packed = [layer for layer in llama.modules() if hasattr(layer, "qweight")]
    return dense + sum(layer.in_features * layer.out_features for layer in packed)
