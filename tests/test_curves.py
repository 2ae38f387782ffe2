"""Event files of TensorBoard tell a history of losses, each step once. Those of a whole candidate are in test_resume."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from offrl_models.curves import Curves

Points = dict[str, list[tuple[int, float]]]  # tag -> steps and values, in the order of the files


def events(folder: Path) -> Iterator[Event]:
    """Every record of the event files of a folder: a length and its checksum, the data and its checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def points(folder: Path) -> Points:
    found: Points = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_a_history_is_told_once_with_a_line_for_each_seed_that_goes_on(tmp_path: Path) -> None:
    history = [
        {"gradient_steps": 5, "q": [1.0, 3.0], "policy": [None, None]},
        {"gradient_steps": 9, "q": [2.0, None], "policy": [4.0, None]},
    ]
    for _ in range(2):  # the second time in place of the first
        with Curves(tmp_path / "cql", [7, 8]) as shown:
            shown([])
            shown(history[:1])
            shown(history)
    mean, one, other = (points(tmp_path / folder) for folder in ("cql", "cql/seed-7", "cql/seed-8"))
    assert [step for step, _ in mean.pop("speed/steps_per_s")] == [5, 9]
    assert mean == {"loss/q": [(5, 2.0), (9, 2.0)], "loss/policy": [(9, 4.0)]}
    assert one == {"loss/q": [(5, 1.0), (9, 2.0)], "loss/policy": [(9, 4.0)]} and other == {"loss/q": [(5, 3.0)]}
    assert [event.session_log.status for event in events(tmp_path / "cql")][:3] == [0, 1, 0]  # START, after the version
    with Curves(tmp_path / "cql", [7]) as shown:
        shown(history)
    assert [path.name for path in (tmp_path / "cql").iterdir() if path.is_dir()] == []  # one seed is its own mean
