"""Progress that a person can follow: bars on a terminal, plain lines in a log."""

import contextlib
import sys
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

    def write(task: str, done: int, total: int, note: str) -> None:
        mark = done * LINES_PER_TASK // max(total, 1)
        if mark > printed.get(task, 0):
            printed[task] = mark
            print(f"{task}: {done:,} of {total:,} {note}", file=sys.stdout, flush=True)

    yield write
