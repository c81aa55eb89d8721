"""Several processes, one update: what the ranks of torchrun share.

    torchrun --nproc-per-node 2 lastmile.py ppo --data samsum

Every rank builds the same batch and passes its share of the rows. Losses are divided by what the whole batch holds, so
gradients are summed over the ranks, in one flat all-reduce; whatever else is needed of the whole batch (log
probabilities, advantages, outputs) is gathered, and each rank computes every number of the log from all of it. No mean
of means is taken anywhere, and the update is that of one process but for rounding.

The first rank alone locks, logs, shows and saves; the others write what a stage writes to a folder that is deleted.
If one rank fails, the others notice at their next exchange, and all end with its exit code.

In one process every function here returns at once what it was given. B rows of a batch, T time.
"""

import os
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from formats.errors import UserError
from safety.terminal import LostRank, Shown

COMMANDS = ("pretrain", "reward", "mle", "ppo", "eval", "predict")  # those that share their work
TIMEOUT = timedelta(minutes=10)  # for which a rank waits for another that is alive and silent
FAILURE = "lastmile failure"  # the key under which the first rank to fail leaves its code and message


class World:
    """The state of this process: its number, how many there are, and how they reach each other."""

    rank, size, store = 0, 1, None
    started = time.monotonic()  # the command of this process; --max-time counts from here


world = World()


def first():
    """Whether this is the rank that writes; the only process of one is."""
    return world.rank == 0


def start(command, settings):
    """Meet the other ranks, if torchrun has started some, and check that all have the same settings (a dict)."""
    world.started = time.monotonic()
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        return
    world.rank, world.size = int(os.environ["RANK"]), size
    Shown.anything = first()
    if command not in COMMANDS:
        raise UserError(f"{command} runs in one process; start it without torchrun")
    on_gpu, here = settings["device"] == "cuda", int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on a machine of {torch.cuda.device_count()} GPUs; use --nproc-per-node "
            f"{torch.cuda.device_count()}, or --device cpu"
        )
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with exchange():
        world.store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=size, timeout=TIMEOUT)
    agree(settings)


def finish():
    """Take leave of the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    world.rank, world.size, world.store = 0, 1, None
    Shown.anything = True


@contextmanager
def exchange():
    """Around everything that waits for other ranks."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise LostRank(str(error)) from error


def failure(code, message):
    """(exit code, message) of this rank: those of the rank that failed first, the message on the first rank alone.

    code: of this rank; None if it only lost the others.
    """
    if world.store is None:
        return code, message if first() else None
    with suppress(RuntimeError, dist.DistError):  # another rank ended without a word
        if code is not None:
            said = message if first() else f"rank {world.rank}: {message}"
            world.store.compare_set(FAILURE, "", f"{code} {said}")
        world.store.wait([FAILURE], timedelta(seconds=2))
        code, message = world.store.get(FAILURE).decode().split(" ", 1)
    return int(code or 1), message if first() else None


# ----------------------------------------------------------------------------------------------------------------------
# A batch, split over the ranks and put together again


def bounds(rows, rank=None):
    """(from, to) of a rank's share of a number of rows, by default this one's; the shares differ by one at most."""
    rank = world.rank if rank is None else rank
    return rows * rank // world.size, rows * (rank + 1) // world.size


def share(batch):
    """(this rank's rows of a data.Batch, 1), columns as they are.

    A rank without any gets the first row, so that it does what the others do, and 0: what its losses and sums count.
    """
    if world.size == 1:
        return batch, 1
    start, end = bounds(len(batch.rows))
    return (batch[start:end], 1) if start < end else (batch[:1], 0)


def whole(x, rows):
    """The values of all ranks' shares, in the order of the batch: (share, T) -> (rows, T)."""
    if world.size == 1:
        return x
    most = -(-rows // world.size)
    mine = x.new_zeros(most, *x.shape[1:])
    mine[: len(x)] = x[:most]
    found = [torch.empty_like(mine) for _ in range(world.size)]
    with exchange():
        dist.all_gather(found, mine)
    ends = [bounds(rows, rank) for rank in range(world.size)]
    return torch.cat([part[: end - start] for part, (start, end) in zip(found, ends, strict=True)])


def sharded(sample, uniform=None):
    """A sampler whose prompts are split over the ranks: list of prompts -> list of responses, the same on every rank.

    uniform: (B, max_new_tokens) random numbers; a row's own decide what it samples, on whichever rank.
    """

    def sample_all(prompts):
        start, end = bounds(len(prompts))
        given = {} if uniform is None else {"uniform": uniform[start:end]}
        responses = sample(prompts[start:end], **given) if start < end else []
        return sum(gather(responses), [])

    return sample_all


def total(x, counts=1):
    """The sum over all ranks of a tensor; counts: 0 if this rank's own counts nothing, see `share`."""
    if world.size == 1:
        return x
    summed = x * counts
    with exchange():
        dist.all_reduce(summed)
    return summed


def sum_gradients(parameters, loss):
    """Sum the gradients over all ranks in place, and a number: one flat all-reduce. Returns the number's sum."""
    if world.size == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor([loss])])
    with exchange():
        dist.all_reduce(flat)
    parts = flat[:-1].split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[-1].item()


# ----------------------------------------------------------------------------------------------------------------------
# Agreement


def gather(thing):
    """[thing of each rank]; anything that pickles."""
    if world.size == 1:
        return [thing]
    found = [None] * world.size
    with exchange():
        dist.all_gather_object(found, thing)
    return found


def from_first(thing):
    """The first rank's thing, on every rank."""
    found = [thing]
    if world.size > 1:
        with exchange():
            dist.broadcast_object_list(found, src=0)
    return found[0]


def most(x):
    """The largest number of all ranks."""
    return max(gather(x))


def wait():
    """Until all ranks are here."""
    gather(None)


def first_alone(work):
    """Call work() on the first rank; the others wait for as long as it takes, which may be longer than TIMEOUT."""
    if world.size == 1:
        return work()
    with exchange():
        group = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    if first():
        work()
    with exchange():
        dist.barrier(group)


def agree(facts):
    """Raise UserError, on all ranks, unless the dict is the same on all; it names what differs."""
    for rank, other in enumerate(gather(facts)):
        differs = [name for name in facts | other if facts.get(name) != other.get(name)]
        if differs:
            raise UserError(
                f"rank {rank} differs from rank {world.rank} in {', '.join(differs)}; give all ranks the same flags "
                f"and the same files"
            )
