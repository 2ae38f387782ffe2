"""Columns of a file: whatever the order in which rows are written, what is read is what was written."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.mapped import Columns, open_columns

COLUMNS = {"matrix": (np.float32, 3), "number": (np.float64, None), "flag": (np.bool_, None)}


def content(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "matrix": rng.standard_normal((rows, 3), np.float32),
        "number": rng.random(rows),
        "flag": rng.random(rows) < 0.5,
    }


@given(rows=st.integers(1, 3000), pieces=st.integers(1, 9), stretch=st.integers(1, 200), seed=st.integers(0, 99))
def test_rows_in_any_order_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: int, pieces: int, stretch: int, seed: int
) -> None:
    path, wanted = tmp_path_factory.mktemp("columns") / "x.arrow", content(rows)
    piece = np.random.default_rng(seed).integers(0, pieces, rows // stretch + 1).repeat(stretch)[:rows]
    with Columns(path, COLUMNS, rows) as file:
        for number in range(pieces):
            at = np.flatnonzero(piece == number)
            file.write(at, {name: values[at] for name, values in wanted.items()})
        assert np.array_equal(file.read("matrix", rows // 2, rows), wanted["matrix"][rows // 2 :])
    found = open_columns(path)
    assert all(np.array_equal(found[name], values) for name, values in wanted.items())


def test_scattered_rows_are_given_back_to_the_file(tmp_path: Path) -> None:
    """Mapped pages must not stay: a log larger than the memory is written so."""
    rows = 400_000
    with Columns(tmp_path / "x.arrow", {"number": (np.float64, None)}, rows) as file:
        before = _resident_file_pages()
        for start in range(8):
            at = np.arange(start, rows, 8)
            file.write(at, {"number": at.astype(np.float64)})
            assert _resident_file_pages() - before < rows * 8 / 2
    assert np.array_equal(open_columns(tmp_path / "x.arrow")["number"], np.arange(rows))


def _resident_file_pages() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile:"))


def test_a_file_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Columns(tmp_path / "x.arrow", COLUMNS, 5) as file:
        file.fill("no such column", 0, np.zeros(5))
    assert list(tmp_path.iterdir()) == []
