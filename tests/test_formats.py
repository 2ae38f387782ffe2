"""File formats: what a format's own library wrote is read back exactly, in chunks of any size, and damage is never skipped."""

import csv
import gzip
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from pyarrow import feather

from offrl_models.logs import formats
from offrl_models.logs.contract import matches_kind
from offrl_models.logs.hdf5 import number_steps
from offrl_models.logs.minari import write_minari
from offrl_models.schema import Episodes, InputError
from tests.conftest import chain_world

ROWS = 23
NUMBERS = pa.list_(pa.float64())
TYPES: dict[str, pa.DataType] = {
    "stay": pa.string(),
    "step": pa.int64(),
    "note": pa.string(),
    "reward": pa.float64(),
    "died": pa.bool_(),
    "at": pa.timestamp("us"),
}


def log() -> pa.Table:
    """A log with what goes wrong easily: ids with leading zeros, line ends in text, nulls beside NaN."""
    step = np.arange(ROWS) % 5
    reward = [None if i == 3 else math.nan if i == 4 else i / 7 for i in range(ROWS)]
    columns = {
        "stay": [f"{i // 5:03d}" for i in range(ROWS)],
        "step": step,
        "note": [None if i % 4 == 0 else f'said "{i}",\nthen é' for i in range(ROWS)],
        "reward": reward,
        "died": [None if i == 9 else bool(s == 4) for i, s in enumerate(step)],
        "at": [pd.Timestamp("2024-02-29T23:59:58.123456") + pd.Timedelta(hours=i) for i in range(ROWS)],
    }
    return pa.table({name: pa.array(columns[name], dtype, from_pandas=False) for name, dtype in TYPES.items()})


def read(path: Path, format: str, columns: Sequence[str], types: dict[str, pa.DataType], rows: int = 10**6) -> pa.Table:
    """All chunks joined; none is longer than `rows`, and only the last has less than half as many."""
    found = list(formats.chunks(path, format, columns, types, rows))
    assert all(rows <= 2 * len(chunk) for chunk in found[:-1]) and all(0 < len(chunk) <= rows for chunk in found)
    assert all(chunk.column_names == list(columns) for chunk in found)
    return pa.concat_tables(found)


def same(found: pa.Table, expected: pa.Table) -> bool:
    """Equality in which NaN equals NaN and null does not."""
    floats = [name for name in expected.column_names if pa.types.is_floating(expected.schema.field(name).type)]
    nan_kept = all(
        found[name].is_nan().combine_chunks().equals(expected[name].is_nan().combine_chunks()) for name in floats
    )
    return nan_kept and found.schema.equals(expected.schema) and repr(found.to_pylist()) == repr(expected.to_pylist())


def write_parquet(path: Path) -> None:
    pq.write_table(log(), path, row_group_size=10, write_page_checksum=True)


def write_arrow(path: Path) -> None:
    with pa.ipc.new_file(str(path), log().schema) as writer:
        writer.write_table(log(), max_chunksize=10)


def write_stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), log().schema) as writer:
        writer.write_table(log(), max_chunksize=10)


def write_feather(path: Path) -> None:
    feather.write_feather(log(), str(path))


def write_csv(path: Path) -> None:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, log().column_names)
        writer.writeheader()
        writer.writerows(log().to_pylist())


def write_pandas_csv(path: Path) -> None:
    frame = pd.DataFrame({name: pd.Series(log()[name].to_pylist(), dtype=object) for name in TYPES})
    frame.to_csv(path, index=False)


def write_jsonl(path: Path) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        for row in log().to_pylist():
            file.write(json.dumps({**row, "at": row["at"].isoformat(), "unasked": [row["step"]]}) + "\n")


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "log.parquet": ("parquet", write_parquet),
    "log.arrow": ("arrow", write_arrow),
    "log.arrows": ("arrow", write_stream),
    "log.feather": ("arrow", write_feather),
    "log.csv": ("csv", write_csv),
    "log.csv.gz": ("csv", write_csv),
    "pandas.csv": ("csv", write_pandas_csv),
    "log.jsonl": ("jsonl", write_jsonl),
    "log.jsonl.gz": ("jsonl", write_jsonl),
    "log.ndjson": ("jsonl", write_jsonl),
}
written = pytest.mark.parametrize("name", WRITERS)


def write(folder: Path, name: str) -> tuple[Path, str]:
    format, writer = WRITERS[name]
    writer(folder / name)
    return folder / name, format


@written
@pytest.mark.parametrize("rows", [1, 7, ROWS, 10**6])
def test_tables_are_read_as_they_were_written(tmp_path: Path, name: str, rows: int) -> None:
    path, format = write(tmp_path, name)
    expected = log()
    if name == "pandas.csv":  # it writes NaN and what is missing alike
        expected = expected.set_column(3, "reward", pa.array(log()["reward"].to_pylist(), from_pandas=True))
    assert same(read(path, format, list(TYPES), TYPES, rows), expected)
    assert same(read(path, format, ["died", "stay"], TYPES, rows), expected.select(["died", "stay"]))
    found = formats.schema(path, format, TYPES)
    assert [(name, found.field(name).type) for name in TYPES] == list(TYPES.items())


@written
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, name: str) -> None:
    path, format = write(tmp_path, name)
    with pytest.raises(InputError, match=rf"{name}: column 'rewrd' is missing \(did you mean 'reward'\?\)"):
        formats.chunks(path, format, ["stay", "rewrd"], {**TYPES, "rewrd": pa.float64()}, 5)


@written
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path, format = write(tmp_path, name)
    whole = path.read_bytes()
    for length in {*range(0, len(whole) - 1, max(len(whole) // 60, 1)), len(whole) - 2}:
        path.write_bytes(whole[:length])
        if format in ("csv", "jsonl") and path.suffix != ".gz" and b"\n" in whole[max(length - 1, 0) : length + 1]:
            continue  # whole rows, and nothing says how many there should be
        with pytest.raises(InputError, match=name):
            read(path, format, list(TYPES), TYPES)


@pytest.mark.parametrize("format", ["parquet", "arrow", "csv", "jsonl", "d4rl", "d3rlpy", "minari"])
def test_a_file_of_another_kind_or_none_is_refused(tmp_path: Path, format: str) -> None:
    for path in (tmp_path / "absent", tmp_path / "noise"):
        with pytest.raises(InputError, match=f"{path.name}.*(cannot be read as|cut short|is not|line 1|no record)"):
            read(path, format, ["x"], {})
        (tmp_path / "noise").write_bytes(bytes(range(256)) * 4)


def test_a_flipped_bit_of_a_parquet_page_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table, refused = pa.table({"x": np.arange(5000), "y": np.arange(5000) / 7}), 0
    pq.write_table(table, path, write_page_checksum=True)
    whole = path.read_bytes()
    for at in range(4, len(whole) - 8, 571):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert read(path, "parquet", ["x", "y"], {}, 1000).equals(table)  # not all bytes of a header matter
        except InputError:
            refused += 1
    assert refused > 95


def test_a_row_group_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path, rows = tmp_path / "x.parquet", 800_000
    noise = np.random.default_rng(0).random((4, rows))
    pq.write_table(pa.table({str(i): column for i, column in enumerate(noise)}), path, row_group_size=rows)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in formats.chunks(path, "parquet", ["0", "2", "3"], {}, 20_000)]
    assert len(held) == rows / 20_000 and max(held) < noise[:3].nbytes


def test_a_stream_cut_between_two_messages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrows"
    with pa.ipc.new_stream(str(path), log().schema) as writer:
        writer.write_table(log())
        length = path.stat().st_size
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="cut short: its Arrow stream has no end"):
        read(path, "arrow", ["stay"], {})


def test_arrow_buffers_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 9, 3], np.int32)), pa.py_buffer(b"abc")]
    )
    with pa.ipc.new_file(str(path), pa.schema({"a": pa.string()})) as writer:
        writer.write(pa.record_batch([text], ["a"]))
    with pytest.raises(InputError, match="cannot be read as Arrow"):
        read(path, "arrow", ["a"], {})


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_what_polars_writes_is_read(tmp_path: Path, name: str) -> None:
    """Its strings are views, on their own, in lists and as categories."""
    values = {"id": ["a", "one that is longer", None], "shown": [["a"], ["b", None], None], "kind": ["u", "v", "u"]}
    frame = pl.DataFrame(values).with_columns(pl.col("kind").cast(pl.Categorical))
    frame.write_parquet(tmp_path / name) if name == "x.parquet" else frame.write_ipc(tmp_path / name)
    format = "parquet" if name == "x.parquet" else "arrow"
    assert read(tmp_path / name, format, list(values), {}).to_pydict() == values
    found = formats.schema(tmp_path / name, format, {})
    kinds = {"id": "key", "shown": "labels", "kind": "label"}
    assert all(matches_kind(kind, found.field(column).type) for column, kind in kinds.items())


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_labels_stay_dictionaries(tmp_path: Path, name: str) -> None:
    table = pa.table({"label": pa.array(["a", "b", None, "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "x.parquet")
    feather.write_feather(table, str(tmp_path / "x.arrow"))
    found = read(tmp_path / name, name[2:], ["label"], {}, 3)
    assert pa.types.is_dictionary(found.schema.field("label").type) and found.to_pylist() == table.to_pylist()


def test_many_small_tables_become_few(tmp_path: Path) -> None:
    path, labels = tmp_path / "x.arrows", [str(i % 7) for i in range(300)]
    one = pa.array(["0"]).dictionary_encode()
    with pa.ipc.new_stream(str(path), pa.schema({"label": one.type})) as writer:
        for label in labels:
            writer.write_batch(pa.record_batch([pa.array([label]).dictionary_encode()], ["label"]))
    found = list(formats.chunks(path, "arrow", ["label"], {}, 200))
    assert [chunk["label"].num_chunks for chunk in found] == [1, 1, 1]
    assert [label for chunk in found for label in chunk["label"].to_pylist()] == labels


@pytest.mark.parametrize("format", ["parquet", "arrow", "csv"])
def test_a_file_without_rows_gives_no_chunk(tmp_path: Path, format: str) -> None:
    path, empty = tmp_path / f"x.{format}", pa.table({"a": pa.array([], pa.string())})
    pq.write_table(empty, path) if format == "parquet" else feather.write_feather(empty, str(path))
    if format == "csv":
        path.write_text("a\n")
    assert list(formats.chunks(path, format, ["a"], {}, 5)) == []


@pytest.mark.parametrize(("name", "format"), [("x.csv", "csv"), ("x.jsonl", "jsonl"), ("x.jsonl.gz", "jsonl")])
def test_an_empty_text_file_is_refused(tmp_path: Path, name: str, format: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(InputError, match="Empty CSV file|holds no record"):
        formats.schema(path, format, {})


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


# Episodes


@given(ends=st.lists(st.booleans(), min_size=1, max_size=30), cut=st.integers(1, 30))
def test_steps_are_numbered_alike_in_one_piece_and_in_several(ends: list[bool], cut: int) -> None:
    expected, episode, step = [], 0, 0
    for end in ends:
        expected.append((episode, step))
        episode, step = (episode + 1, 0) if end else (episode, step + 1)
    found, episode, step = [], 0, 0
    for start in range(0, len(ends), cut):
        part = np.array(ends[start : start + cut])
        ids, steps = number_steps(part, episode, step)
        found += zip(ids.tolist(), steps.tolist(), strict=True)
        episode, step = (int(ids[-1]) + 1, 0) if part[-1] else (int(ids[-1]), int(steps[-1]) + 1)
    assert found == expected


LENGTHS = (4, 1, 7, 3)
EPISODES = np.repeat(np.arange(4), LENGTHS)
STEPS = np.concatenate([np.arange(n) for n in LENGTHS])
LAST = np.append(EPISODES[1:] != EPISODES[:-1], True)
TERMINATED = LAST & np.isin(EPISODES, (0, 2))  # the others were cut off
RNG = np.random.default_rng(5)
OBSERVATION = RNG.normal(size=(15, 3)).astype(np.float32)
NEXT = RNG.normal(size=(15, 3)).astype(np.float32)
VECTOR = RNG.normal(size=(15, 2)).astype(np.float32)
CODE = RNG.integers(0, 5, 15)
REWARD = RNG.normal(size=15).astype(np.float32)
LOG_PROB = -RNG.random(15).astype(np.float32)
ALL = (1, 2, 7, 15, 100)


def vectors(values: np.ndarray) -> pa.Array:
    dtype = pa.list_(pa.from_numpy_dtype(values.dtype), values.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=dtype)


def episodic(action: np.ndarray, truncated: np.ndarray, **more: Any) -> pa.Table:
    """What every format with a layout of its own must give."""
    return pa.table(
        {
            "episode_id": EPISODES,
            "step": STEPS,
            "observation": vectors(OBSERVATION),
            "action": vectors(action) if action.ndim == 2 else pa.array(action, pa.int64()),
            "reward": REWARD.astype(np.float64),
            "terminated": TERMINATED,
            "truncated": truncated,
            **more,
        }
    )


def check_episodes(path: Path, format: str, expected: pa.Table) -> None:
    assert formats.schema(path, format, {}) == expected.schema
    for rows in ALL:
        assert read(path, format, expected.column_names, {}, rows).equals(expected)
    assert read(path, format, ["reward", "step"], {}, 4).equals(expected.select(["reward", "step"]))


def hdf5(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name.replace("__", "/"), data=values)
    return path


def d4rl(path: Path, **changed: Any) -> Path:
    datasets: dict[str, Any] = {
        "observations": OBSERVATION,
        "actions": VECTOR,
        "rewards": REWARD,
        "terminals": TERMINATED,
        "timeouts": LAST & ~TERMINATED,
        "next_observations": NEXT,
        "infos__action_log_probs": LOG_PROB,
        "infos__qpos": OBSERVATION,
        "metadata__algorithm": "SAC",
        **changed,
    }
    return hdf5(path, **{name: values for name, values in datasets.items() if values is not None})


def test_d4rl(tmp_path: Path) -> None:
    more = {"next_observation": vectors(NEXT), "action_prob": np.exp(LOG_PROB.astype(np.float64))}
    check_episodes(d4rl(tmp_path / "x.hdf5"), "d4rl", episodic(VECTOR, LAST & ~TERMINATED, **more))


def test_d4rl_without_timeouts_ends_at_terminals_only_and_its_tail_stays_open(tmp_path: Path) -> None:
    path = d4rl(tmp_path / "x.hdf5", timeouts=None, next_observations=None, infos__action_log_probs=None)
    for rows in ALL:
        found = read(path, "d4rl", ["episode_id", "step", "terminated", "truncated"], {}, rows)
        assert found["episode_id"].to_pylist() == [0] * 4 + [1] * 8 + [2] * 3  # lengths 1 and 7 run together
        assert found["step"].to_pylist() == [*range(4), *range(8), *range(3)]
        assert found["terminated"].to_pylist() == TERMINATED.tolist() and not any(found["truncated"].to_pylist())
    assert formats.schema(path, "d4rl", {}).names[-1] == "truncated"


def test_a_step_that_ended_both_ways_is_terminated(tmp_path: Path) -> None:
    found = read(d4rl(tmp_path / "x.hdf5", timeouts=LAST), "d4rl", ["terminated", "truncated"], {})
    assert found["terminated"].to_pylist() == TERMINATED.tolist()
    assert found["truncated"].to_pylist() == (LAST & ~TERMINATED).tolist()


@pytest.mark.parametrize("actions", [CODE, CODE[:, None].astype(np.int32), CODE.astype(np.uint8)])
def test_integer_actions_are_codes(tmp_path: Path, actions: np.ndarray) -> None:
    found = read(d4rl(tmp_path / "x.hdf5", actions=actions), "d4rl", ["action"], {}, 4)
    assert found.equals(pa.table({"action": pa.array(CODE, pa.int64())}))


def test_numbers_keep_their_precision(tmp_path: Path) -> None:
    exact = RNG.normal(size=(15, 2))
    found = read(
        d4rl(tmp_path / "x.hdf5", observations=exact, actions=exact[:, :1]), "d4rl", ["observation", "action"], {}
    )
    assert found.equals(pa.table({"observation": vectors(exact), "action": vectors(exact[:, :1])}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rewards": None}, "dataset 'rewards' is missing"),
        ({"rewards": REWARD[:9]}, "dataset 'rewards' has 9 rows where 15 are needed"),
        ({"rewards": VECTOR}, "dataset 'rewards' has 2 values per row where one is needed"),
        ({"timeouts": STEPS}, "dataset 'timeouts' has 8 rows that are neither 0 nor 1"),
        ({"observations": np.array([b"x"] * 15)}, "dataset 'observations' holds .* where rows of numbers are needed"),
    ],
)
def test_d4rl_that_is_not_what_it_should_be_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"x\.hdf5: {said}"):
        read(d4rl(tmp_path / "x.hdf5", **changed), "d4rl", ["truncated"], {})


def mdp_dataset(path: Path, **changed: Any) -> Path:
    """As `MDPDataset.dump` of d3rlpy 1.1 writes it."""
    datasets: dict[str, Any] = {
        "observations": OBSERVATION,
        "actions": CODE.astype(np.int32),
        "rewards": REWARD,
        "terminals": TERMINATED.astype(np.float32),
        "episode_terminals": LAST.astype(np.float32),
        "discrete_action": True,
        "version": "1.0",
        **changed,
    }
    return hdf5(path, **{name: values for name, values in datasets.items() if values is not None})


def replay_buffer(path: Path, actions: np.ndarray, **changed: Any) -> Path:
    """As `ReplayBuffer.dump` of d3rlpy 2.8 writes it."""
    keys = ("observations", "actions", "rewards", "terminated")
    datasets: dict[str, Any] = {"columns": list(keys), "num_episodes": len(LENGTHS)}
    for number, (start, stop) in enumerate(pairwise(np.cumsum((0, *LENGTHS)))):
        values = (OBSERVATION[start:stop], actions[start:stop], REWARD[start:stop, None], bool(TERMINATED[stop - 1]))
        datasets |= {f"{key}_{number}": value for key, value in zip(keys, values, strict=True)}
    return hdf5(path, **{**datasets, "version": "2.1", **changed})


def test_d3rlpy_1(tmp_path: Path) -> None:
    check_episodes(mdp_dataset(tmp_path / "x.h5"), "d3rlpy", episodic(CODE, LAST & ~TERMINATED))
    path = mdp_dataset(
        tmp_path / "open.h5", actions=VECTOR, episode_terminals=(LAST & (EPISODES < 3)).astype(np.float32)
    )
    check_episodes(path, "d3rlpy", episodic(VECTOR, LAST & ~TERMINATED))


def test_d3rlpy_2(tmp_path: Path) -> None:
    check_episodes(replay_buffer(tmp_path / "x.h5", VECTOR), "d3rlpy", episodic(VECTOR, LAST & ~TERMINATED))
    check_episodes(replay_buffer(tmp_path / "y.h5", CODE[:, None]), "d3rlpy", episodic(CODE, LAST & ~TERMINATED))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: mdp_dataset(p, version=None), "d3rlpy before 1.0 logged each reward one row later"),
        (
            lambda p: hdf5(p, columns=["rewards"], total_size=4, rewards=REWARD, version="2.0"),
            "no dump of d3rlpy 1 or 2.1",
        ),
        (lambda p: d4rl(p, observations=None), "no dump of d3rlpy 1 or 2.1"),
        (lambda p: replay_buffer(p, VECTOR, num_episodes=5), "dataset 'rewards_4' is missing"),
        (lambda p: replay_buffer(p, VECTOR, observations_2=NEXT[:7, :2]), "episode 2 has other shapes or types"),
        (lambda p: replay_buffer(p, VECTOR, observations_0_0=NEXT), "observations are tuples of arrays"),
    ],
)
def test_a_dump_that_cannot_be_trusted_is_refused(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(InputError, match=rf"x\.h5.*{said}"):
        read(make(tmp_path / "x.h5"), "d3rlpy", ["observation", "reward"], {})


@pytest.mark.parametrize(("format", "make"), [("d4rl", d4rl), ("d3rlpy", mdp_dataset)])
def test_a_cut_hdf5_file_is_refused(tmp_path: Path, format: str, make: Callable[[Path], Path]) -> None:
    whole = make(tmp_path / "x.h5").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (tmp_path / "x.h5").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read as HDF5"):
            read(tmp_path / "x.h5", format, ["reward"], {})


# Minari

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
quiet = pytest.mark.filterwarnings(
    "ignore:.*(is set to None|env_spec is None):UserWarning"
)  # who made it is not asked here


def minari_dataset(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    buffers: list[EpisodeBuffer],
    observation: Any,
    action: Any,
    **options: Any,
) -> Path:
    """A dataset that Minari wrote into `folder`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    minari.create_dataset_from_buffers("toy-v0", buffers, observation_space=observation, action_space=action, **options)
    return folder / "toy-v0"


def buffers(actions: np.ndarray, **infos: np.ndarray) -> list[EpisodeBuffer]:
    """The episodes above; the observation after a step is that of the following row, or of `NEXT` after the last one."""
    made = []
    for start, stop in pairwise(np.cumsum((0, *LENGTHS))):
        made.append(
            EpisodeBuffer(
                observations=[*OBSERVATION[start:stop], NEXT[stop - 1]],
                actions=list(actions[start:stop]),
                rewards=REWARD[start:stop].tolist(),
                terminations=TERMINATED[start:stop].tolist(),
                truncations=(LAST & ~TERMINATED)[start:stop].tolist(),
                infos={name: values[start:stop].tolist() for name, values in infos.items()},
            )
        )
    return made


def following() -> pa.Array:
    return vectors(np.where(LAST[:, None], NEXT, np.roll(OBSERVATION, -1, axis=0)))


@quiet
def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = minari_dataset(tmp_path, monkeypatch, buffers(VECTOR), BOX, gymnasium.spaces.Box(-9, 9, (2,), np.float32))
    check_episodes(path, "minari", episodic(VECTOR, LAST & ~TERMINATED, next_observation=following()))


@quiet
def test_minari_codes_and_propensities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probability = np.exp(LOG_PROB.astype(np.float64))
    made = buffers(CODE, action_prob=probability)
    path = minari_dataset(tmp_path, monkeypatch, made, BOX, gymnasium.spaces.Discrete(5))
    more = {"next_observation": following(), "action_prob": probability}
    check_episodes(path, "minari", episodic(CODE, LAST & ~TERMINATED, **more))


@quiet
def test_spaces_are_flattened_as_gymnasium_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = gymnasium.spaces
    parts = [
        ("zeta", spaces.Box(0, 1, (2, 2), np.float32)),
        ("alpha", spaces.Tuple((spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 4])))),
        ("mid", spaces.Dict({"b": spaces.MultiBinary(3), "a": spaces.Discrete(2)})),
    ]
    space = spaces.Dict(OrderedDict(parts), seed=3)
    assert list(space) == ["zeta", "alpha", "mid"]  # gymnasium keeps this order until Minari has stored the space
    seen = [space.sample() for _ in range(7)]

    def column(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: column([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], tuple):
            return tuple(column(list(part)) for part in zip(*values, strict=True))
        return values

    buffer = EpisodeBuffer(
        observations=column(seen), actions=column(seen[:6]), rewards=[0.0] * 6, terminations=[False] * 5 + [True],
        truncations=[False] * 6,
    )  # fmt: skip
    path = minari_dataset(tmp_path, monkeypatch, [buffer], space, space)
    loaded = minari.load_dataset("toy-v0").observation_space
    assert list(loaded) == ["alpha", "mid", "zeta"]
    flat = np.array([spaces.flatten(loaded, value) for value in seen], np.float32)
    expected = pa.table(
        {"observation": vectors(flat[:6]), "action": vectors(flat[:6]), "next_observation": vectors(flat[1:])}
    )
    for rows in (1, 4, 9):
        assert read(path, "minari", expected.column_names, {}, rows).equals(expected)


@quiet
def test_a_discrete_observation_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = EpisodeBuffer(
        observations=[3, 1, 4],
        actions=[0, 1],
        rewards=[0.0, 1.0],
        terminations=[False, True],
        truncations=[False, True],
    )
    space = gymnasium.spaces.Discrete(5)
    columns = {"observation": [3, 1], "next_observation": [1, 4], "terminated": [False, True], "truncated": [False] * 2}
    found = read(minari_dataset(tmp_path, monkeypatch, [buffer], space, space), "minari", list(columns), {})
    assert found.to_pydict() == columns  # a step that ended both ways is terminated


@quiet
def test_spaces_without_a_fixed_row_of_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {"actions": [0], "rewards": [0.0], "terminations": [True], "truncations": [False]}
    text, image = gymnasium.spaces.Text(5), gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    code = gymnasium.spaces.Discrete(2)
    told = EpisodeBuffer(observations=["ab", "cd"], **plain)
    with pytest.raises(InputError, match="'observations' is a space of type Text"):
        formats.schema(minari_dataset(tmp_path / "a", monkeypatch, [told], text, code), "minari", {})
    one, other = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    for name, pictures, said in (("b", [one, one], "with `jpeg_encoding=False`"), ("c", [one, other], "holds object")):
        seen = EpisodeBuffer(observations=pictures, **plain)
        with pytest.raises(InputError, match=said):  # as JPEG, of one length or of several
            read(minari_dataset(tmp_path / name, monkeypatch, [seen], image, code), "minari", ["observation"], {})
        raw = minari_dataset(tmp_path / f"{name}-raw", monkeypatch, [seen], image, code, jpeg_encoding=False)
        found = read(raw, "minari", ["observation", "next_observation"], {}).to_pylist()
        assert [list(row.values()) for row in found] == [[picture.ravel().tolist() for picture in pictures]]


@quiet
def test_minari_that_is_not_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = gymnasium.spaces.Discrete(5)
    path = minari_dataset(tmp_path, monkeypatch, buffers(CODE), BOX, code)
    data, described = path / "data" / "main_data.hdf5", path / "data" / "metadata.json"
    whole, metadata = data.read_bytes(), json.loads(described.read_text())
    for length in range(0, len(whole), len(whole) // 20):
        data.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read as HDF5"):
            read(path, "minari", ["reward"], {})
    data.write_bytes(whole)
    with h5py.File(data, "a") as file:
        del file["episode_2"]
    with pytest.raises(InputError, match="episode 2 of 4 is missing"):
        read(path, "minari", ["reward"], {})
    described.write_text(json.dumps({**metadata, "data_format": "arrow"}))
    with pytest.raises(InputError, match="Minari's format 'arrow'"):
        formats.schema(path, "minari", {})
    described.unlink()
    with pytest.raises(InputError, match="toy-v0 is not a Minari dataset"):
        formats.schema(path, "minari", {})


@pytest.fixture(scope="module")
def simulated() -> Episodes:
    return chain_world().simulate(30, seed=4)


def test_minari_reads_what_is_written_and_so_do_we(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    path = tmp_path / "lab" / "toy-v3"
    write_minari(simulated, path, dataset_id="lab/toy-v3")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "lab", "main_data.hdf5", "metadata.json", "toy-v3"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("lab/toy-v3")
    assert dataset.total_episodes == 30 and dataset.total_steps == simulated.n_rows
    assert dataset.action_space == gymnasium.spaces.Discrete(simulated.n_actions)
    second = dataset[1]
    own = slice(*simulated.offsets[1:3])
    assert (second.observations[1:] == simulated.next_observation[own]).all() and len(second.observations) == len(
        second
    ) + 1
    assert (
        math.isnan(second.infos["action_prob"][0])
        and (second.infos["action_prob"][1:] == simulated.action_prob[own]).all()
    )
    expected = pa.table(
        {
            "episode_id": simulated.episode_of_row,
            "step": simulated.step,
            "observation": vectors(simulated.observation),
            "action": simulated.action,
            "reward": simulated.reward,
            "terminated": simulated.terminated,
            "truncated": simulated.truncated,
            "next_observation": vectors(simulated.next_observation),
            "action_prob": simulated.action_prob,
        }
    )
    for rows in (1, 7, 10**6):
        assert read(path, "minari", expected.column_names, {}, rows).equals(expected)


def test_continuous_actions_of_unknown_propensity_are_written(tmp_path: Path, simulated: Episodes) -> None:
    rows = simulated.n_rows
    continuous = replace(
        simulated,
        action=np.random.default_rng(0).normal(size=(rows, 2)),
        mask=np.ones((rows, 0), bool),
        action_prob=np.full(rows, np.nan),
    )
    write_minari(continuous, tmp_path / "x", dataset_id="x-v0")
    assert "action_prob" not in formats.schema(tmp_path / "x", "minari", {}).names
    assert read(tmp_path / "x", "minari", ["action"], {})["action"].combine_chunks().equals(vectors(continuous.action))


@quiet
def test_values_outside_their_space_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)})
    buffer = EpisodeBuffer(
        observations={"a": [0, 2, 5, 1]},
        actions=[0] * 3,
        rewards=[0.0] * 3,
        terminations=[False] * 3,
        truncations=[False] * 3,
    )
    path = minari_dataset(tmp_path, monkeypatch, [buffer], space, gymnasium.spaces.Discrete(1))
    with pytest.raises(InputError, match="'observations/a' has 2 rows outside its space"):
        read(path, "minari", ["observation"], {})


def test_minari_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    with pytest.raises(InputError, match="'not an id' is no Minari dataset id"):
        write_minari(simulated, tmp_path / "x", dataset_id="not an id")
    write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    with pytest.raises(InputError, match="x exists"):
        write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    monkeypatch.setattr("offrl_models.storage.sync_tree", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_minari(simulated, tmp_path / "y", dataset_id="y-v0")
    assert not (tmp_path / "y").exists() and formats.batches(tmp_path, "minari") == [tmp_path / "x"]


def test_packages_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    path = d4rl(tmp_path / "x.hdf5")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match="pip install minari h5py"):
        write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="pip install h5py"):
        formats.schema(path, "d4rl", {})


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


# Folders


def test_batches_come_in_order_of_their_names(tmp_path: Path) -> None:
    for name in (
        "b.parquet",
        "a.parquet",
        ".c.parquet",
        "d.reason.json",
        "e.csv",
        "f.csv.gz",
        "g.csv.reason.json",
        "h.PARQUET",
    ):
        (tmp_path / name).touch()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / ".hidden").mkdir()
    assert [path.name for path in formats.batches(tmp_path, "parquet")] == ["a.parquet", "b.parquet"]
    assert [path.name for path in formats.batches(tmp_path, "csv")] == ["e.csv", "f.csv.gz"]
    assert [path.name for path in formats.batches(tmp_path, "minari")] == ["folder.parquet"]
    with pytest.raises(InputError, match=r"unknown format 'parket' \(did you mean 'parquet'\?\)"):
        formats.batches(tmp_path, "parket")


def test_chunks_of_no_rows_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path, format = write(tmp_path, "log.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        formats.chunks(path, format, ["stay"], {}, 0)
