"""Losses and speed of a training for TensorBoard, while it runs."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from offrl_models import storage

FLUSHED_S = 1.0  # seconds between flushes, which wait for the disk


class Curves:
    """Event files of one training: in the folder itself the mean loss of each network over the seeds that go on, and steps per
    second; in a folder for each seed, where there are several, its own losses. A network is one chart, with a line for each.

    Whoever trains again, or goes on, begins with new files and tells the history from the start, so that no step is told twice.
    The speed of what was trained before it went on is not known any more.
    """

    def __init__(self, folder: Path, seeds: Sequence[int]):
        if folder.exists():
            storage.remove(folder)
        self.all = _Events(folder)
        self.each = [_Events(folder / f"seed-{seed}") for seed in seeds] if len(seeds) > 1 else []
        self.told = 0  # entries of the history
        self.last: tuple[int, float] | None = None  # gradient steps, and when they were done
        self.flushed = 0.0

    def __call__(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Tell what is new in a history of losses."""
        for entry in history[self.told :]:
            steps = entry["gradient_steps"]
            losses = {f"loss/{name}": values for name, values in entry.items() if name != "gradient_steps"}
            known = {name: [each for each in values if each is not None] for name, values in losses.items()}
            self.all.add(steps, {name: sum(values) / len(values) for name, values in known.items() if values})
            for place, events in enumerate(self.each):
                events.add(steps, {name: values[place] for name, values in losses.items() if values[place] is not None})
        self.told = len(history)
        done, now = history[-1]["gradient_steps"] if history else 0, time.monotonic()
        if self.last is not None and done > self.last[0] and now > self.last[1]:
            self.all.add(done, {"speed/steps_per_s": (done - self.last[0]) / (now - self.last[1])})
        self.last = done, now
        if now > self.flushed + FLUSHED_S:
            self.flushed = now
            for events in (self.all, *self.each):
                events.writer.flush()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for events in (self.all, *self.each):
            events.writer.close()


class _Events:
    """One event file."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        # A TensorBoard that is open forgets what it has seen of the files before.
        self._write(Event(step=0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            summary = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            self._write(Event(step=step, summary=Summary(value=summary)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write_event(event)
