"""--report-to: the log's numbers to TensorBoard or Weights & Biases while training."""

from dataclasses import asdict
from pathlib import Path

from formats.errors import UserError
from safety.files import clear


def open_loggers(settings, stage, first):
    """[(write(numbers, step), close), …] for the services that --report-to names. first: the step that comes next."""
    services = {"tensorboard": open_tensorboard, "wandb": open_wandb}
    return [services[name](settings, stage, first) for name in settings.report_to.split(",") if name]


def open_tensorboard(settings, stage, first):
    """Event files in <output-dir>/tensorboard/<stage>; a resumed run hides an earlier one's from `first` on."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(settings.output_dir) / "tensorboard" / stage
    if not settings.resume:
        clear(folder)
    writer = SummaryWriter(folder, purge_step=first)

    def write(numbers, step):
        for name, x in numbers.items():
            writer.add_scalar(name, x, step)

    return write, writer.close


def open_wandb(settings, stage, first):
    """A run of the project "lastmile"; a resumed one goes on under its id, and wandb ignores the steps that it has."""
    import wandb

    folder = Path(settings.output_dir)
    file = folder / "wandb" / f"{stage}.id"
    same = {"id": file.read_text(), "resume": "allow"} if first and file.is_file() else {}
    name = f"{folder.name} {stage}"
    try:
        run = wandb.init(project="lastmile", name=name, dir=folder, config=asdict(settings), **same)
    except wandb.Error as error:
        raise UserError(f"--report-to wandb: {error}; run wandb login, or set WANDB_MODE=offline") from None
    file.parent.mkdir(exist_ok=True)
    file.write_text(run.id)
    return run.log, run.finish
