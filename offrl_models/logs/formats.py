"""The file formats of raw logs: what a file holds, and its columns as Arrow tables of a few rows at a time.

A batch is one file; for Minari it is one dataset folder. This layer knows files, not what their columns mean. Text formats
have no types of their own, and none is guessed: a column is read as the type asked for, or as text. Binary formats give
their own types. A file that is damaged, cut short or without a column that was asked for raises InputError.
"""

import contextlib
import difflib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from offrl_models.logs import hdf5, minari, text
from offrl_models.logs.text import Types
from offrl_models.schema import InputError

AT_A_TIME = 6  # columns of a row group that are decoded together: the reader keeps pages of every one it was asked for
PAGE_BUFFER = 2**20  # bytes of a column chunk in memory, of which there is one per column
MANY = 64  # tables that are copied into one, for short episodes make one each and every table costs time
FIRST = 1024  # rows at a time until a value is met
DIGITS = 20  # of a number in a name, by which names are sorted
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow columnar format 1.5, IPC streaming format


@dataclass(frozen=True)
class Format:
    """How batches of one format are found and read."""

    title: str
    suffixes: tuple[str, ...]  # how names of batches end; where there are none, a batch is a folder
    schema: Callable[[Path, Types], pa.Schema]
    chunks: Callable[[Path, Sequence[str], Types, int], Iterator[pa.Table]]  # tables of any length
    not_batches: tuple[str, ...] = ()  # names of other files that lie beside them


def batches(folder: Path, format: str) -> list[Path]:
    """The batches of a folder by name, 9 before 10, hidden ones left out. Raises InputError for an unknown format."""
    suffixes, other = _known(format).suffixes, _known(format).not_batches
    found = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and path.name not in other
        and (path.is_file() and path.name.endswith(suffixes) if suffixes else path.is_dir())
    ]
    order = natural(pl.Series([path.name for path in found], dtype=pl.String))
    return [path for _, path in sorted(zip(order, found, strict=True))]


def natural(names: pl.Series) -> pl.Series:
    """Text that sorts as the names do where whole numbers in them count as numbers: batch-9 before batch-10."""
    return names.str.replace_all("([0-9]+)", "0" * DIGITS + "$1").str.replace_all(f"0*([0-9]{{{DIGITS}}})", "$1")


def schema(path: Path, format: str, types: Types) -> pa.Schema:
    """What a batch holds. Columns of text formats have the type that `types` asks for, or string.

    Records of JSON lines need not be alike: theirs are the keys that were met until all of `types` had been seen.
    Raises InputError when the file is damaged, or a type is asked for that the format cannot hold.
    """
    with _readable(path, format):
        return _known(format).schema(path, types)


def has_zone(path: Path, format: str, name: str, dtype: pa.DataType) -> bool | None:
    """Whether the times of a column say how far they are from UTC, by its type or, in text, its first value; None without one."""
    if format not in ("csv", "jsonl"):
        return getattr(dtype, "tz", None) is not None
    for table in chunks(path, format, [name], {name: pa.string()}, FIRST):
        if table[name].null_count < len(table):
            return bool(text.OFFSET.search(str(table[name].drop_null()[0].as_py())))
    return None


def chunks(path: Path, format: str, columns: Sequence[str], types: Types, rows: int) -> Iterator[pa.Table]:
    """Tables of exactly `columns`, each of `rows` rows at most and of half as many at least, but for the last.

    There is none where the file has no rows.

    Raises InputError at once when a column is missing or there twice, and while reading when the file is damaged or values
    do not have the type asked for.
    """
    if rows < 1:
        raise ValueError(f"chunks need at least one row, not {rows}")
    found = schema(path, format, {name: types[name] for name in columns if name in types})
    with _readable(path, format):  # names may be no UTF-8
        names = found.names
    for name in columns:
        if name not in names:
            hint = nearest_column(name, names)
            raise InputError(f"{path}: column {name!r} is missing{hint}; write the batch again with it.")
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are called {name!r}; give each a name of its own.")
    return _regroup(path, format, {name: found.field(name).type for name in columns}, rows)


def nearest_column(name: str, columns: Sequence[str]) -> str:
    """' (did you mean ...?)' where a column has a similar name, else nothing."""
    close = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known(format: str) -> Format:
    if format not in FORMATS:
        raise InputError(
            f"unknown format {format!r}{nearest_column(format, list(FORMATS))}; use one of {', '.join(FORMATS)}."
        )
    return FORMATS[format]


@contextlib.contextmanager
def _readable(path: Path, format: str) -> Iterator[None]:
    """What the libraries raise for damaged files, as an InputError."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        title = _known(format).title
        raise InputError(f"{path} cannot be read as {title} ({reason}); write the file again or remove it.") from error


def _regroup(path: Path, format: str, types: Types, rows: int) -> Iterator[pa.Table]:
    """Tables of about `rows` rows from tables of any length. None is kept once it was passed on."""
    columns, held = list(types), _Held()
    with _readable(path, format):
        for table in _known(format).chunks(path, columns, types, rows):
            held.add(table.select(columns))
            del table
            while held.rows * 2 >= rows:
                yield held.take(rows)
        if held.rows:
            yield held.take(rows)


class _Held:
    """Rows that were read and not passed on yet."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        self.tables.append(table)
        self.rows += len(table)

    def take(self, rows: int) -> pa.Table:
        """The first `rows` rows, or all."""
        joined, self.tables = _joined(self.tables), []
        if len(joined) > rows:
            self.tables = [joined.slice(rows)]
        self.rows = max(self.rows - rows, 0)
        return joined.slice(0, rows)


def _joined(tables: list[pa.Table]) -> pa.Table:
    joined = pa.concat_tables(tables)
    return joined.unify_dictionaries().combine_chunks() if len(tables) > MANY else joined


def _parquet_schema(path: Path, types: Types) -> pa.Schema:
    return pq.read_schema(path)


def _parquet_chunks(path: Path, columns: Sequence[str], types: Types, rows: int) -> Iterator[pa.Table]:
    """Page checksums are verified, where the file has them. Row groups of more than `rows` rows are read page by page."""
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    buffer = PAGE_BUFFER if max(sizes, default=0) > rows else 0
    with pq.ParquetFile(
        path, metadata=metadata, page_checksum_verification=True, pre_buffer=False, buffer_size=buffer
    ) as file:
        for group, size in enumerate(sizes):
            if size <= rows:
                yield _row_group(file, group, list(columns))
                continue
            for batch in file.iter_batches(rows, [group], list(columns)):
                yield pa.Table.from_batches([batch])


def _row_group(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    """A few columns at a time, which takes half the memory and no more time than all of them at once."""
    parts = [columns[start : start + AT_A_TIME] for start in range(0, len(columns), AT_A_TIME)]
    tables = [file.read_row_group(group, part) for part in parts]
    named = {field.name: table[field.name] for table in tables for field in table.schema}
    return pa.table([named[name] for name in columns], names=columns)


@contextlib.contextmanager
def _open_arrow(path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """A reader of an IPC file (Feather version 2 is one) or stream, memory mapped."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if not is_file and source.size() >= 8 and source.read_at(8, source.size() - 8) != END_OF_STREAM:
            raise InputError(f"{path} is cut short: its Arrow stream has no end; write the file again or remove it.")
        source.seek(0)
        open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        if columns is not None:
            names = open_reader(source).schema.names
            source.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
            yield open_reader(source, options=options)
        else:
            yield open_reader(source)


def _without_views(dtype: pa.DataType) -> pa.DataType:
    """The type with plain strings in the place of string views, as which polars writes them."""
    if pa.types.is_string_view(dtype):
        return pa.large_string()
    if pa.types.is_dictionary(dtype):
        return pa.dictionary(dtype.index_type, _without_views(dtype.value_type), dtype.ordered)
    if pa.types.is_large_list(dtype):
        return pa.large_list(_without_views(dtype.value_type))
    return pa.list_(_without_views(dtype.value_type)) if pa.types.is_list(dtype) else dtype


def _arrow_schema(path: Path, types: Types) -> pa.Schema:
    with _open_arrow(path) as reader:
        return pa.schema([field.with_type(_without_views(field.type)) for field in reader.schema])


def _arrow_chunks(path: Path, columns: Sequence[str], types: Types, rows: int) -> Iterator[pa.Table]:
    with _open_arrow(path, columns) as reader:
        plain = pa.schema([field.with_type(_without_views(field.type)) for field in reader.schema])
        is_file = hasattr(reader, "num_record_batches")
        found: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            batch.validate(full=True)  # the format has no checksums
            yield pa.Table.from_batches([batch]).cast(plain)


FORMATS: dict[str, Format] = {
    "parquet": Format("Parquet", (".parquet",), _parquet_schema, _parquet_chunks),
    "arrow": Format("Arrow", (".arrow", ".arrows", ".feather"), _arrow_schema, _arrow_chunks),
    "csv": Format("CSV", (".csv", ".csv.gz"), text.csv_schema, text.csv_chunks),
    "jsonl": Format("JSON lines", (".jsonl", ".jsonl.gz", ".ndjson"), text.jsonl_schema, text.jsonl_chunks),
    "d4rl": Format("D4RL HDF5", (".hdf5", ".h5"), hdf5.d4rl_schema, hdf5.d4rl_chunks),
    "d3rlpy": Format("d3rlpy HDF5", (".h5", ".hdf5"), hdf5.d3rlpy_schema, hdf5.d3rlpy_chunks),
    "minari": Format("Minari", (), minari.schema, minari.chunks),
    # Saito, Aihara, Matsutani & Narita (2021), Open Bandit Dataset, https://arxiv.org/abs/2008.07146
    "open_bandit": Format(
        "Open Bandit CSV", (".csv", ".csv.gz"), text.open_bandit_schema, text.csv_chunks, ("item_context.csv",)
    ),
}
