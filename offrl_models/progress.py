"""Progress that a person can follow: bars on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Update = Callable[[str, int, int, str], None]  # task, done, total (less where it ended early), note

LINES_PER_TASK = 4  # when the output is not a terminal


@contextlib.contextmanager
def progress() -> Iterator[Update]:
    """Yields a function that reports how far each named task has come."""
    console = Console(stderr=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.completed:>6}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bars:
            ids = {}

            def draw(task: str, done: int, total: int, note: str) -> None:
                if task not in ids:
                    ids[task] = bars.add_task(task, total=total, note=note)
                bars.update(ids[task], completed=done, total=total, note=note)

            yield draw
        return
    printed: dict[str, int] = {}
    begun: dict[str, tuple[float, int]] = {}  # when a task was first heard of, and how far it was

    def write(task: str, done: int, total: int, note: str) -> None:
        since, before = begun.setdefault(task, (time.monotonic(), done))
        mark = done * LINES_PER_TASK // max(total, 1)
        if mark > printed.get(task, 0):
            printed[task] = mark
            left = (
                f", {_duration((time.monotonic() - since) * (total - done) / (done - before))} left"
                if before < done < total
                else ""
            )
            print(f"{task}: {done:,} of {total:,}{left} {note}", file=sys.stdout, flush=True)

    yield write


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, without those that say nothing.

    >>> _duration(4.2), _duration(125.0), _duration(7384.0)
    ('4 s', '2 min 5 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
