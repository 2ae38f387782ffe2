"""Finished logs, one line of JSON each: a study that is stopped goes on where it was."""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Found = dict[str, Any]  # of one log, by policy or case


class Line(NamedTuple):
    """What was found on one simulated log, and what that cost."""

    found: Found
    cpu_s: float | None  # None where it was not measured
    day: str | None = None  # on which it was computed


Lines = Mapping[int, Line]  # by seed


def anything(found: Found) -> bool:
    return True


@dataclass(frozen=True)
class Experiment:
    """What is done with the log of one seed, how often, and how people read it."""

    run: Callable[[int], Found]
    logs: int
    report: Callable[[Lines, Path], list[str]]  # Markdown; plots go beside the file of this path
    complete: Callable[[Found], bool] = anything  # a line that is not, from an earlier version, is computed again


def done(path: Path, complete: Callable[[Found], bool] = anything) -> dict[int, Line]:
    """The finished logs by seed. A line that was cut short or lacks something does not count, and a later one goes first."""
    lines: dict[int, Line] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if complete(entry["found"]):
            lines[entry["seed"]] = Line(entry["found"], entry.get("cpu_s"), entry.get("day"))
    return dict(sorted(lines.items()))


def run(name: str, experiment: Experiment, logs: int, folder: Path, processes: int | None = None) -> None:
    """Whatever of `logs` logs is not done yet, one process per core unless it is said how many."""
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    finished = done(path, experiment.complete)
    left = [seed for seed in range(1, logs + 1) if seed not in finished]
    work = partial(_one_thread, experiment.run)
    with path.open("a") as file, contextlib.ExitStack() as stack:
        processes = min(processes or os.cpu_count() or 1, len(left))
        each = map(work, left)
        if processes > 1:
            context = multiprocessing.get_context("spawn")  # a fork inherits the locks of threads that it does not have
            each = stack.enter_context(ProcessPoolExecutor(processes, context)).map(work, left)
        for count, (seed, line) in enumerate(zip(left, each, strict=True), len(finished) + 1):
            file.write(json.dumps({"seed": seed, **line._asdict()}) + "\n")
            file.flush()
            print(f"{name}: {count} of {logs} logs, {line.cpu_s:.1f} s", file=sys.stderr, flush=True)


def _one_thread(work: Callable[[int], Found], seed: int) -> Line:
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    found = work(seed)
    return Line(found, round(time.process_time() - started, 3), date.today().isoformat())
