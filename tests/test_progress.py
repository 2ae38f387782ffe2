"""How far a task has come, where there is no terminal: a line for each quarter, with the time that is left."""

import pytest

from offrl_models import progress


def test_a_log_tells_how_far_a_task_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress() as update:
        for done in (1000, 2000, 3000, 5000, 6000, 8000):  # two seconds for each thousand; gone on with at 1,000
            now[0] = 2.0 * done / 1000
            update("cql", done, 8000, f"{done // 1000}")
            update("reading", 1, 1, "all of it")
    assert capsys.readouterr().out.splitlines() == [
        "reading: 1 of 1 all of it",
        "cql: 2,000 of 8,000, 12 s left 2",
        "cql: 5,000 of 8,000, 6 s left 5",
        "cql: 6,000 of 8,000, 4 s left 6",
        "cql: 8,000 of 8,000 8",
    ]
