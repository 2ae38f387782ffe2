"""What processes that train together are given to do in tests; apart, so that they start fast."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from offrl_models import parallel


def averages() -> list[Any]:
    """A mean over rows whose square is differentiated, its gradient, and the average place."""
    rows = torch.arange(8.0).reshape(2, 4)[:, parallel.share(4)].requires_grad_()
    mean = parallel.batch_mean(rows * rows)
    mean.square().sum().backward()
    assert rows.grad is not None
    found = parallel.average([mean.detach(), torch.full((1, 2), float(parallel.place()))])
    return [rows.grad.tolist(), *(each.tolist() for each in found)]


def dies(folder: Path, update: Any) -> None:
    """The second process is killed while the first waits for it, and the third does something else."""
    note_pid(folder)
    if parallel.place() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if parallel.place() == 2:
        time.sleep(600)
    parallel.average([torch.zeros(1)])


def waits(folder: Path, update: Any) -> None:
    note_pid(folder)
    time.sleep(600)


def note_pid(folder: Path) -> None:
    (folder / f"{parallel.place()}.part").write_text(str(os.getpid()))
    (folder / f"{parallel.place()}.part").rename(folder / f"{parallel.place()}.pid")


if __name__ == "__main__":  # whoever starts them, to be killed
    from tests import jobs

    parallel.together(jobs.waits, Path(sys.argv[1]), 2, print)
