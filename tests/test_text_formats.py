"""CSV, JSON lines and the Open Bandit Dataset: values are of the type asked for or counted as misfits, and no cell is lost."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.logs import formats
from offrl_models.schema import InputError
from tests.test_formats import read

NUMBERS = pa.list_(pa.float64())


# Values that are not of the type asked for: text, type, (how many, first row, first value) or the values that are read.
CSV_VALUES: list[tuple[str, pa.DataType, Any]] = [
    ("1|x|3|y", pa.int64(), (2, 2, "'x'")),
    ("1||2.0", pa.int64(), (1, 3, "'2.0'")),
    ("1|99999999999999999999", pa.int64(), (1, 2, "'99999999999999999999'")),
    ("0.5|1,5", pa.float64(), (1, 2, "'1,5'")),
    ("true|FALSE|1|0|", pa.bool_(), [True, False, True, False, None]),
    ("1|2", pa.bool_(), (1, 2, "'2'")),
    ("1|yes", pa.bool_(), (1, 2, "'yes'")),
    ("007|NaN|null|", pa.string(), ["007", "NaN", "null", None]),
    ("1|-inf|", pa.float64(), [1.0, -math.inf, None]),
    ("2024-01-01|soon", pa.timestamp("us"), (1, 2, "'soon'")),
    ("2024-01-01T12:00:00|2024-01-01T12:00:00Z", pa.timestamp("us"), (1, 2, "'2024-01-01T12:00:00Z'")),
    ("2024-01-01T12:00:00Z|2024-01-01T12:00:00", pa.timestamp("us"), (1, 2, "'2024-01-01T12:00:00'")),
    ("2024-01-01T12:00:00", pa.timestamp("us", "UTC"), (1, 1, "'2024-01-01T12:00:00'")),
    ("|2024-01-01 12:00:00+02:00", pa.timestamp("us"), [None, pd.Timestamp("2024-01-01 10:00:00")]),
    ("2024-01-01|2024-01-01 12:00", pa.timestamp("us"), [pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-01 12:00")]),
]
JSON_VALUES: list[tuple[str, pa.DataType, Any]] = [
    ('"007"|null|"7"', pa.string(), ["007", None, "7"]),
    ("17|18", pa.string(), ["17", "18"]),
    ('17|"18"', pa.string(), (1, 2, "'18'")),
    ('1|"x"|2|"y"', pa.int64(), (2, 2, "'x'")),
    ("1|2.5", pa.int64(), (1, 2, "2.5")),
    ("1|99999999999999999999", pa.int64(), (1, 2, "99999999999999999999")),
    ("1|2.5|NaN|null", pa.float64(), [1.0, 2.5, math.nan, None]),
    ('1|"2"', pa.float64(), (1, 2, "'2'")),
    ("true|false|null", pa.bool_(), [True, False, None]),
    ("1|0|null", pa.bool_(), [True, False, None]),
    ("1|2", pa.bool_(), (1, 2, "2")),
    ("true|1", pa.bool_(), (1, 2, "1")),
    ("[true, false]|[true]", pa.list_(pa.bool_()), [[True, False], [True]]),
    ("[1, 0]|[1]", pa.list_(pa.bool_()), [[True, False], [True]]),
    ("[1, 0]|[2]", pa.list_(pa.bool_()), (1, 2, r"\[2\]")),
    ("[1, 2.5]|[]|null", NUMBERS, [[1.0, 2.5], [], None]),
    ("[1, 2]|3", NUMBERS, (1, 2, "3")),
    ("[1, 2]|[3, 4]", pa.list_(pa.float32(), 2), [[1.0, 2.0], [3.0, 4.0]]),
    ("[1, 2]|[3]", pa.list_(pa.float32(), 2), (1, 2, r"\[3.0\]")),
    ('[1]|["x"]', NUMBERS, (1, 2, r"\['x'\]")),
    ('"2024-01-01T12:00:00+02:00"', pa.timestamp("us"), [pd.Timestamp("2024-01-01 10:00:00")]),
    ('"2024-01-01T12:00:00"|1704110400', pa.timestamp("us"), (1, 2, "1704110400")),
    ("true|false", pa.float64(), [1.0, 0.0]),
]  # fmt: skip


def check_values(path: Path, format: str, dtype: pa.DataType, expected: Any) -> None:
    if isinstance(expected, tuple):
        count, row, value = expected
        said = (
            rf"column 'a' has {count} values that are not {re.escape(str(dtype))}.*, the first in row {row} \({value}\)"
        )
        with pytest.raises(InputError, match=said):
            read(path, format, ["a"], {"a": dtype})
    else:
        found = read(path, format, ["a"], {"a": dtype}, 2)
        assert found.schema == pa.schema({"a": dtype}) and repr(found["a"].to_pylist()) == repr(
            pa.array(expected, dtype).to_pylist()
        )


@pytest.mark.parametrize(("text", "dtype", "expected"), CSV_VALUES)
def test_values_of_csv(tmp_path: Path, text: str, dtype: pa.DataType, expected: Any) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], *([value, "x"] for value in text.split("|"))])
    check_values(tmp_path / "x.csv", "csv", dtype, expected)


@pytest.mark.parametrize(("text", "dtype", "expected"), JSON_VALUES)
def test_values_of_json_lines(tmp_path: Path, text: str, dtype: pa.DataType, expected: Any) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"b": "x", "a": {value}}}\n' for value in text.split("|")))
    check_values(tmp_path / "x.jsonl", "jsonl", dtype, expected)


def test_misfits_are_counted_over_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offrl_models.logs.text.BLOCK", 100)
    values = ["x" if row in (170, 171, 199) else row for row in range(200)]
    (tmp_path / "x.csv").write_text("a\n" + "".join(f"{value}\n" for value in values))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"a": value}) + "\n" for value in values))
    for format in ("csv", "jsonl"):
        with pytest.raises(InputError, match=r"has 3 values that are not int64, the first in row 171 \('x'\)"):
            read(tmp_path / f"x.{format}", format, ["a"], {"a": pa.int64()}, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\n1,"x\n2,y\n3,z\n', "a quote is never closed"),
        ("a,b\n1,2\n3,0.12", "its last line has no end"),
        ("a,b\n1,2\n3\n", "Expected 2 columns, got 1"),
        ("a,b\n1,2\n3,4,5\n", "Expected 2 columns, got 3"),
        ("a,b,a\n1,2,3\n", "2 columns are called 'a'"),
        ("a,b\n\xff,2\n", "invalid UTF8"),
    ],
)
def test_csv_that_would_lose_rows_or_cells_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        read(tmp_path / "x.csv", "csv", ["a"], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": 2\n', "line 2 is not valid JSON"),
        ('{"a": 1}\n[1]\n', "line 2 is no JSON object"),
        ('[{"a": 1}]\n', "line 1 is no JSON object"),
        ('{"a": 1}\n{"a": 2, "a": 3}\n', "specified twice"),
        ('{"a": 1, "s": "\xff"}\n', "line 1 is not valid JSON"),
        ('{"a": 1, "s": "x"}\n{"a": 1, "s": "\xff"}\n', "line 2 is not valid JSON"),
    ],
)
def test_json_lines_that_others_would_take_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        read(tmp_path / "x.jsonl", "jsonl", ["a", "s"] if '"s"' in text else ["a"], {"a": pa.int64(), "s": pa.string()})


def test_a_key_that_comes_late_is_found_and_one_that_never_comes_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offrl_models.logs.text.BLOCK", 200)
    path, types = tmp_path / "x.jsonl", {"a": pa.int64(), "läte": pa.string()}
    path.write_text('{"a": 1}\n' * 100 + '{"a": 2, "l\\u00e4te": 5}\n{"a": 2, "läte": 6}\n')
    assert formats.schema(path, "jsonl", types) == pa.schema(types)
    assert read(path, "jsonl", ["läte", "a"], types).to_pylist()[-3:] == [
        {"läte": None, "a": 1}, {"läte": "5", "a": 2}, {"läte": "6", "a": 2},
    ]  # fmt: skip
    assert formats.schema(path, "jsonl", {**types, "never": pa.string()}).names == ["a", "läte"]


@given(
    rows=st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.integers(-9, 9))
    )
)
def test_any_text_survives_csv_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("text")
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("s", "i"), *rows])
    types = {"s": pa.string(), "i": pa.int64()}
    found = [
        tuple(row.values())
        for t in formats.chunks(folder / "x.csv", "csv", ["s", "i"], types, 3)
        for row in t.to_pylist()
    ]
    assert found == [(text or None, number) for text, number in rows]
    if rows:
        (folder / "x.jsonl").write_text("".join(json.dumps({"i": i, "s": s}) + "\n" for s, i in rows))
        assert [tuple(row.values()) for row in read(folder / "x.jsonl", "jsonl", ["s", "i"], types).to_pylist()] == rows


def test_cells_and_records_may_lie_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offrl_models.logs.text.BLOCK", 64)
    texts = [f"{i}\n{'x' * (i % 40)}\n" for i in range(100)]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["s"], *([text] for text in texts)])
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"s": text}) + "\n" for text in texts))
    for format in ("csv", "jsonl"):
        assert read(tmp_path / f"x.{format}", format, ["s"], {"s": pa.string()}, 9)["s"].to_pylist() == texts


def test_a_csv_cell_holds_no_list(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('mask\n"[1, 0]"\n')
    with pytest.raises(InputError, match="column 'mask' is asked as list<.*but a cell holds one value"):
        formats.schema(tmp_path / "x.csv", "csv", {"mask": pa.list_(pa.bool_())})


# Open Bandit Dataset

BANDIT = """\
,timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user-item_affinity_0,user-item_affinity_1
0,2019-11-24 00:00:34.762830+00:00,14,3,0,0.0125,81ce123cbb5bd8ce,03a5648a76832f83,0.0,2.0
1,2019-11-24 00:00:53+00:00,7,1,1,0.5,0012300000000000,03a5648a76832f83,1.5,0.0
"""


def test_open_bandit(tmp_path: Path) -> None:
    (tmp_path / "men.csv").write_text(BANDIT)
    (tmp_path / "item_context.csv").write_text(",item_id,item_feature_0\n0,0,-0.5\n")
    assert formats.batches(tmp_path, "open_bandit") == [tmp_path / "men.csv"]
    path, names = tmp_path / "men.csv", BANDIT.partition("\n")[0].split(",")
    found = read(path, "open_bandit", names, {}, 1)
    times = [pd.Timestamp("2019-11-24 00:00:34.762830"), pd.Timestamp("2019-11-24 00:00:53")]
    expected = {
        "": [0, 1], "timestamp": [at.tz_localize("UTC") for at in times], "item_id": [14, 7], "position": [3, 1], "click": [0, 1],
        "propensity_score": [0.0125, 0.5], "user_feature_0": ["81ce123cbb5bd8ce", "0012300000000000"],
        "user_feature_1": ["03a5648a76832f83"] * 2, "user-item_affinity_0": [0.0, 1.5], "user-item_affinity_1": [2.0, 0.0],
    }  # fmt: skip
    assert found.to_pydict() == expected
    types = {"timestamp": pa.timestamp("us"), "click": pa.float64(), "item_id": pa.string()}
    asked = read(path, "open_bandit", list(types), types)
    assert asked.schema == pa.schema(types)
    assert asked.to_pydict() == {"timestamp": times, "click": [0.0, 1.0], "item_id": ["14", "7"]}
