"""Files that do not hold to their contract: each is refused in one sentence with the file, the column and the rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from offrl_models import storage
from offrl_models.logs.read import Log
from offrl_models.schema import InputError
from tests.hand_made import LOG, MASKED, Columns, contract_of, log_of, observing

# --- files that do not hold to the contract ---------------------------------------------------------------------------

MISFITS: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "a column is missing": (
        {"costs": ["harms"]},
        {"harm": [0] * 4},
        (
            r"column 'harms' is missing in all 4 rows \(did you mean 'harm'\?\) \(C01\); the contract needs it "
            r"once \(number\), so write the batch again with it\."
        ),
    ),
    "text for a number": (
        {},
        {"x": ["1"] * 4},
        r"column 'x' is string in all 4 rows where the contract needs a number \(C01\); convert it",
    ),
    "numbers for flags": (
        {},
        {"end": [0, 1, 1, 1]},
        r"column 'end' is int64 in all 4 rows where the contract needs a boolean \(C01\)",
    ),
    "halves for codes": (
        observing(categories=3),
        {},
        r"column 'x' is double in all 4 rows where the contract needs a integer \(C01\)",
    ),
    "numbers for a list": (
        observing(size=2),
        {},
        r"column 'x' is double in all 4 rows where the contract needs a numbers\[2\] \(C01\)",
    ),
    "text in a list": (observing(size=2), {"x": [["1", "2"]] * 4}, "column 'x' is list<.*string> in all 4 rows"),
    "text for a time": (
        {"decided_at": "at"},
        {"at": ["2026-01-01"] * 4},
        "column 'at' is string in all 4 rows where the contract needs a time",
    ),
    "numbers for a mask": (
        MASKED,
        {"m": [[1, 0]] * 4},
        "column 'm' is list<.*int64> in all 4 rows where the contract needs a mask",
    ),
    "halves for an id": ({}, {"id": [0.5] * 4}, "column 'id' is double in all 4 rows where the contract needs a key"),
    "halves for a label": (
        {"subgroups": "x"} | observing(categories=["a"]),
        {},
        "column 'x' is double in all 4 rows where the contract needs a label",
    ),
    "nothing at all": ({}, {"x": pa.nulls(4)}, "column 'x' is null in all 4 rows where the contract needs a number"),
}


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.table(LOG).append_column("x", [LOG["x"]])
    storage.write_parquet(tmp_path / "b.parquet", table)
    with pytest.raises(
        InputError, match=r"b\.parquet: column 'x' is there twice in all 4 rows \(C01\); the contract needs it once"
    ):
        Log.open([tmp_path / "b.parquet"], contract_of())


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_hold_to_the_contract_is_named_with_column_and_rows(tmp_path: Path, name: str) -> None:
    roles, columns, sentence = MISFITS[name]
    with pytest.raises(InputError, match=r"b0\.parquet: " + sentence):
        log_of(tmp_path, roles, columns)
