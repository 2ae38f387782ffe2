"""Drift of the newest rows: however few the last batch has, and of what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from offrl_models.reports.shift import grouped, log_drift, stability_index, write_report
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


def index(before: np.ndarray | list[str], after: np.ndarray | list[str]) -> float:
    reference, current = (pl.Series("x", each) for each in (before, after))
    return stability_index(*grouped(reference, current, categorical=isinstance(before, list)))


@pytest.mark.parametrize("zeros", [0.6, 0.95, 1.0])
def test_a_number_that_is_mostly_0_and_no_longer_is_drifts(zeros: float) -> None:
    rng = np.random.default_rng(0)

    def column(rows: int, zeros: float) -> np.ndarray:
        return np.where(rng.random(rows) < zeros, 0.0, rng.exponential(50.0, rows))

    reference = column(20_000, zeros)
    assert index(reference, column(5000, zeros)) < 0.02
    assert index(reference, column(5000, 0.1)) > RED
    assert index(reference, -column(5000, 0.1)) > RED
    whole = reference.astype(np.int64)
    assert index(whole, column(5000, 0.1).astype(np.int64)) > RED


def test_no_category_is_mistaken_for_those_that_are_pooled_or_unknown() -> None:
    known = ["new"] * 500 + ["rest 01"] * 400 + [f"city {i:02d}" for i in range(50)] * 10
    assert index(known, known) == 0.0
    assert index(known, ["vip" if each == "new" else each for each in known]) > 1.0
    assert index(known, ["city 09" if each == "rest 01" else each for each in known]) > RED


def test_a_column_that_is_hardly_known_shortens_no_other_on_the_page(tmp_path: Path) -> None:
    first, newest = batch(3000, 0, 0.0), batch(1500, 10_000, 0.0)
    newest["x"] = np.where(np.arange(1500) == 7, 0.5, np.nan)
    _, before, after = log_drift(log_of(tmp_path / "log", {**BANDIT, **observing(missing="mean")}, first, newest), 0)
    assert (before.height, after.height, after["x"].count()) == (3000, 1500, 1)
    write_report(before, after, tmp_path / "page.html", 0)
    assert (tmp_path / "page.html").stat().st_size > 100_000
