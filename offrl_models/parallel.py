"""One training in several processes: each computes its share of the rows of every batch, and what they find is averaged.

All of them draw the same rows and random numbers, and hold the same weights at each step; so any of them is the training.
"""

import multiprocessing
import os
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from offrl_models.progress import Update
from offrl_models.schema import InputError

WAITED_S = 10.0  # for the process that is to blame, after another one has lost it

_place, _processes = 0, 1  # of this process among those that train together


class LostProcessError(InputError):
    """A process that trained together with others is gone."""


def place() -> int:
    """Which of the processes that train together this one is, from 0 on; the first one alone writes anything."""
    return _place


def processes() -> int:
    """How many train together."""
    return _processes


def require(count: int) -> None:
    """Raises InputError where this is not one of so many."""
    if count != _processes:
        raise InputError(
            f"{count} processes are to train together, and this is one of {_processes}; start them by `parallel.together`."
        )


def share(batch_size: int) -> slice:
    """The rows of a batch that this process computes."""
    rows = batch_size // _processes
    return slice(_place * rows, (_place + 1) * rows)


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of some tensors, averaged over the processes, in one exchange. All of them get the same bits."""
    flat = torch.cat([each.flatten() for each in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise LostProcessError(f"a process that trains together with this one is gone: {error}.") from error
    parts = flat.div_(_processes).split([each.numel() for each in tensors])
    return [part.view_as(each) for part, each in zip(parts, tensors, strict=True)]


def batch_mean(values: Float[Tensor, "*seed batch"]) -> Float[Tensor, "*seed"]:
    """The mean over all rows of a batch, of which other processes may have some.

    Its gradient is that of the rows of this process: averaged over all of them, it is that of the mean.
    """
    mean = values.mean(-1)
    if _processes == 1:
        return mean
    own = mean.detach()
    return mean + (average([own])[0] - own)


def together(job: Callable[[Any, Update], object], item: Any, count: int, update: Update) -> None:
    """`job(item, update)` in so many processes at once, which end together; progress is that of the first.

    On CUDA each has a device of its own where there are as many. Raises what one of them raised, or LostProcessError when one died.
    """
    context = multiprocessing.get_context("spawn")
    devices, backend = _devices(count)
    started: dict[Connection, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(count):
                listening, telling = context.Pipe(duplex=False)
                given = (number, count, devices[number], backend, folder, job, item, telling)
                process = context.Process(target=_run, args=given, name=f"{number + 1} of {count}")
                process.start()
                started[listening] = process
                telling.close()
            _listen(started, update)
        finally:
            for process in started.values():
                process.kill()
                process.join()


def _devices(count: int) -> tuple[list[str | None], str]:
    """The CUDA device of each process, and what they exchange tensors by."""
    found = torch.cuda.device_count()
    if not found:
        return [None] * count, "gloo"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(found)]
    return [names[number % found] for number in range(count)], "nccl" if count <= found else "gloo"


def _listen(started: dict[Connection, Any], update: Update) -> None:
    """Tell progress until every process has ended well. Raises what ended the first of them that did not."""
    open_ends, lost = dict(started), None
    while open_ends:
        ready = wait(list(open_ends), None if lost is None else WAITED_S)
        if not ready and lost is not None:
            raise lost
        for end in ready:
            assert isinstance(end, Connection)
            try:
                message = end.recv()
            except (EOFError, OSError):
                process = open_ends.pop(end)
                process.join()
                if process.exitcode:
                    raise LostProcessError(
                        f"process {process.name} that trained together died with exit code {process.exitcode}, and the others "
                        "were stopped; see whether memory ran out, and start again: training goes on from its checkpoint."
                    ) from None
                continue
            match message:
                case LostProcessError():
                    lost = message
                case InputError():
                    raise message
                case str():
                    raise RuntimeError(f"process {open_ends[end].name} that trained together failed:\n{message}")
                case _:
                    update(*message)
    if lost is not None:
        raise lost


def _run(
    number: int,
    count: int,
    device: str | None,
    backend: str,
    folder: str,
    job: Callable[[Any, Update], object],
    item: Any,
    telling: Connection,
) -> None:
    """One of the processes."""
    global _place, _processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with suppress(StopIteration):  # they talk within the machine alone
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.set_num_threads(1)

    def tell(*message: Any) -> None:
        if number == 0:
            telling.send(message)

    try:
        dist.init_process_group(backend, f"file://{folder}/store", rank=number, world_size=count)
        _place, _processes = number, count
        job(item, tell)
        dist.destroy_process_group()
    except InputError as error:
        telling.send(error)
    except Exception:
        telling.send(traceback.format_exc())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
