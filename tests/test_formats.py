"""File formats: what a format's own library wrote is read back exactly, in chunks of any size, and damage is never skipped."""

import csv
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from offrl_models.logs import formats
from offrl_models.logs.contract import matches_kind
from offrl_models.schema import InputError

ROWS = 23
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
    for number in (10, 9, 100):
        (tmp_path / f"week-{number}.jsonl").touch()
    assert [path.name for path in formats.batches(tmp_path, "jsonl")] == [
        f"week-{number}.jsonl" for number in (9, 10, 100)
    ]
    with pytest.raises(InputError, match=r"unknown format 'parket' \(did you mean 'parquet'\?\)"):
        formats.batches(tmp_path, "parket")


def test_chunks_of_no_rows_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path, format = write(tmp_path, "log.parquet")
    with pytest.raises(ValueError, match="at least one row"):
        formats.chunks(path, format, ["stay"], {}, 0)
