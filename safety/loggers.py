"""--report-to: the log's numbers to TensorBoard or Weights & Biases while training."""

from dataclasses import asdict
from pathlib import Path

from formats.errors import UserError
from safety.files import clear


def open_loggers(settings, stage):
    """[(write(numbers, step), close), …] for the services that --report-to names."""
    services = {"tensorboard": open_tensorboard, "wandb": open_wandb}
    return [services[name](settings, stage) for name in settings.report_to.split(",") if name]


def open_tensorboard(settings, stage):
    """Event files in <output-dir>/tensorboard/<stage>."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(settings.output_dir) / "tensorboard" / stage
    if not settings.resume:
        clear(folder)
    writer = SummaryWriter(folder)

    def write(numbers, step):
        for name, x in numbers.items():
            writer.add_scalar(name, x, step)

    return write, writer.close


def open_wandb(settings, stage):
    """A run of the project "lastmile"."""
    import wandb

    folder = Path(settings.output_dir)
    try:
        run = wandb.init(project="lastmile", name=f"{folder.name} {stage}", dir=folder, config=asdict(settings))
    except wandb.Error as error:
        raise UserError(f"--report-to wandb: {error}; run wandb login, or set WANDB_MODE=offline") from None
    return run.log, run.finish
