"""Drift of the newest rows: however few the last batch has, and of what is missing."""

from pathlib import Path
from typing import Any

import numpy as np

from offrl_models.reports.shift import log_drift
from tests.hand_made import BANDIT, log_of, observing

RED = 0.25


def batch(rows: int, start: int, mean: float, missing: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(start)
    x = np.where(rng.random(rows) < missing, np.nan, rng.normal(mean, 1.0, rows))
    action = rng.integers(0, 2, rows)
    return {"id": np.arange(start, start + rows), "x": x, "a": action, "r": rng.random(rows), "t": np.zeros(rows, int),
            "end": np.ones(rows, bool)}  # fmt: skip


def drift(folder: Path, *batches: dict[str, Any]) -> dict[str, float]:
    roles = {**BANDIT, **observing(missing="mean")}
    return {row["column"]: row["index"] for row in log_drift(log_of(folder, roles, *batches), 0)[0]}


def test_a_drift_is_not_cleared_by_a_handful_of_rows(tmp_path: Path) -> None:
    shifted = drift(tmp_path / "one", batch(4000, 0, 0.0), batch(900, 10_000, 2.0))
    assert shifted["x"] > RED > max(shifted["a"], shifted["r"])
    again = drift(tmp_path / "two", batch(4000, 0, 0.0), batch(900, 10_000, 2.0), batch(2, 20_000, 2.0))
    assert again["x"] > RED
    over = drift(tmp_path / "three", batch(4000, 0, 0.0), batch(900, 10_000, 2.0), batch(2000, 20_000, 0.0))
    assert over["x"] < RED  # the newest 1,000 rows are like the rest
    only = drift(
        tmp_path / "four", batch(30, 0, 0.0), batch(5, 10_000, 0.0)
    )  # the first batch is always what was before
    assert set(only) >= {"x", "a", "r"}


def test_what_goes_missing_drifts(tmp_path: Path) -> None:
    found = drift(tmp_path / "some", batch(3000, 0, 0.0, 0.05), batch(1500, 10_000, 0.0, 0.6))
    assert found["x missing"] > RED > found["x"]
    gone = drift(tmp_path / "all", batch(3000, 0, 0.0), batch(1500, 10_000, 0.0, 1.0))
    assert gone["x missing"] > RED and "x" not in gone
    same = drift(tmp_path / "same", batch(3000, 0, 0.0, 0.3), batch(1500, 10_000, 0.0, 0.3))
    assert same["x missing"] < 0.1
    assert "x missing" not in drift(tmp_path / "none", batch(3000, 0, 0.0), batch(1500, 10_000, 0.0))
