"""Raw logs as text: CSV and JSON lines, plain or compressed by gzip.

Text has no types of its own, and none is guessed: a column is read as the type asked for, or as text. In CSV an empty cell is
null. Times are ISO 8601: those with an offset become UTC, those without keep what their clock showed. Booleans are true and
false, or 1 and 0. In JSON a number may stand for the text of an id, and true and false for 1 and 0.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv
from pyarrow import json as json_lines

from offrl_models.schema import InputError

Types = Mapping[str, pa.DataType]

BLOCK = 8 * 2**20  # bytes parsed at a time; a row must be shorter
OFFSET = re.compile(r"[T ].*(Z|[+-]\d\d(:?\d\d)?)$")  # the end of a time that says how far it is from UTC


class _Quotes:
    """Sees the bytes of a CSV file go by, for Arrow takes a quote that is never closed as a cell up to the end of the file."""

    def __init__(self) -> None:
        self.open = False
        self.last = b"\n"

    def __call__(self, buffer: pa.Buffer) -> bytes:
        data = buffer.to_pybytes()
        self.open ^= data.count(b'"') % 2 == 1
        self.last = data[-1:] or self.last
        return data


def _open_csv(path: Path, columns: Sequence[str], quotes: _Quotes) -> csv.CSVStreamingReader:
    stream = pa.TransformInputStream(pa.input_stream(str(path), compression="detect"), quotes)
    return csv.open_csv(
        stream,
        read_options=csv.ReadOptions(block_size=BLOCK),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def csv_schema(path: Path, types: Types) -> pa.Schema:
    """The columns of the header. Raises InputError when one is asked for as a list."""
    with _open_csv(path, [], _Quotes()) as reader:
        names = reader.schema.names
    for name in names:
        if pa.types.is_nested(types.get(name, pa.string())):
            raise InputError(
                f"{path}: column {name!r} is asked as {types[name]}, but a cell holds one value; log JSON lines."
            )
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


def csv_chunks(path: Path, columns: Sequence[str], types: Types, rows: int) -> Iterator[pa.Table]:
    """An empty cell is null; NaN, in a column of floats, is not. Raises InputError at the end of a file that was cut."""
    quotes = _Quotes()
    with _open_csv(path, columns, quotes) as reader:
        yield from _typed(path, (pa.Table.from_batches([batch]) for batch in reader), types)
    if quotes.open or quotes.last not in (b"\n", b"\r"):
        wrong = "a quote is never closed" if quotes.open else "its last line has no end"
        raise InputError(f"{path} may be cut short: {wrong}; write the file again, or mend that if it is whole.")


def _typed(path: Path, tables: Iterator[pa.Table], types: Types) -> Iterator[pa.Table]:
    """Columns of text and JSON in the types asked for. Raises InputError with how many values do not fit, and the first."""
    steps: dict[str, list[pa.DataType]] = {}  # each column is cast to one after the other
    done = 0
    for table in tables:
        fitting = {}
        for name, asked in types.items():
            values = table[name].drop_null()
            if name not in steps and len(values):
                steps[name] = [*_between(values[0].as_py(), values.type, asked), asked]
            try:
                fitting[name] = _cast(table[name], steps.get(name, [asked]))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                columns = (later[name] for later in chain([table], tables))
                raise _misfit(path, name, str(asked), _misfits(columns, steps[name], done)) from None
        done += len(table)
        yield pa.table(fitting)


def _between(first: Any, stored: pa.DataType, asked: pa.DataType) -> list[pa.DataType]:
    """What values are cast to before the type asked for, so that none of them changes: 2 is no boolean."""
    if pa.types.is_timestamp(asked):
        return [pa.timestamp(asked.unit, "UTC")] if OFFSET.search(first) else []
    if pa.types.is_list(stored):
        return [pa.list_(inner) for inner in _between(None, stored.value_type, asked.value_type)]
    return [pa.string()] if pa.types.is_integer(stored) and pa.types.is_boolean(asked) else []


def _cast(column: pa.ChunkedArray, steps: Sequence[pa.DataType]) -> pa.ChunkedArray:
    for dtype in steps:
        column = column.cast(dtype)
    return column


def _misfits(columns: Iterable[pa.ChunkedArray], steps: Sequence[pa.DataType], done: int) -> Iterator[tuple[int, Any]]:
    """(row, value) of what cannot be cast, in columns that follow on row `done`; halved until it stands alone."""
    for column in columns:
        try:
            _cast(column, steps)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            rows = range(len(column))
            if len(rows) == 1:
                yield done, column[0].as_py()
            else:  # a slice will not do: casts of it look at all items of its lists
                halves = (column.take(list(part)) for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
                yield from _misfits(halves, steps, done)
        done += len(column)


def _misfit(path: Path, name: str, asked: str, found: Iterable[tuple[int, Any]]) -> InputError:
    (row, first), *others = found
    return InputError(
        f"{path}: column {name!r} has {len(others) + 1} values that are not {asked}, the first in row {row + 1} ({first!r}); "
        "correct them or what the contract says of the column."
    )


def _records(path: Path, wanted: Callable[[int, bytes], bool] = lambda *_: True) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, without the lines that `wanted`, given how many bytes come before them, leaves out."""
    before = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and wanted(before, line):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}: line {number} is not valid JSON ({error}); write it again.") from error
                if not isinstance(record, dict):
                    raise InputError(f"{path}: line {number} is no JSON object; write one object per line.")
                yield record
            before += len(line)


def _first_values(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The keys of a JSON lines file until all `names` were seen, each with its first value; None if null in the first block."""
    keys = {name: {json.dumps(name).encode(), json.dumps(name, ensure_ascii=False).encode()} for name in names}
    found: dict[str, Any] = {}

    def wanted(before: int, line: bytes) -> bool:
        return before < BLOCK or any(key in line for name in keys if name not in found for key in keys[name])

    for record in _records(path, wanted):
        found |= {key: value for key, value in record.items() if found.get(key) in (None, [])}
        if not any(found.get(name) in (None, []) for name in keys):
            break
    return found


def _json_type(asked: pa.DataType, first: Any) -> pa.DataType:
    """What a column is parsed as: its values as they are written, which may be numbers where text or booleans are wanted."""
    if pa.types.is_fixed_size_list(asked) or pa.types.is_list(asked):
        return pa.list_(_json_type(asked.value_type, first[0] if isinstance(first, list) and first else None))
    if pa.types.is_dictionary(asked):
        return _json_type(asked.value_type, first)
    if isinstance(first, bool):
        return pa.bool_()
    if isinstance(first, int) and (pa.types.is_boolean(asked) or pa.types.is_string(asked)):
        return pa.int64()
    return pa.string() if pa.types.is_timestamp(asked) else asked


def _fits(value: Any, dtype: pa.DataType) -> bool:
    """Whether Arrow takes a JSON value for one of this type."""
    if pa.types.is_list(dtype):
        return value is None or (isinstance(value, list) and all(_fits(item, dtype.value_type) for item in value))
    if pa.types.is_struct(dtype):
        return value is None or (
            isinstance(value, dict) and all(_fits(value.get(each.name), each.type) for each in dtype)
        )
    if pa.types.is_boolean(dtype) or isinstance(value, bool):
        return value is None or (pa.types.is_boolean(dtype) and isinstance(value, bool))
    if pa.types.is_integer(dtype):
        return value is None or (isinstance(value, int) and value.bit_length() < dtype.bit_width)
    return value is None or isinstance(value, (int, float) if pa.types.is_floating(dtype) else str)


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # the parser does not look whether text is UTF-8
    return batch


def jsonl_schema(path: Path, types: Types) -> pa.Schema:
    """The keys that were met until all of `types` had been seen. Raises InputError when there is no record."""
    found = _first_values(path, types)
    if not found:
        raise InputError(f"{path} holds no record; write it again with its decisions or remove it.")
    return pa.schema([(name, types.get(name, pa.string())) for name in found])


def jsonl_chunks(path: Path, columns: Sequence[str], types: Types, rows: int) -> Iterator[pa.Table]:
    """A key that a record leaves out is null. What values are written as is read off the first of their column."""
    first = _first_values(path, columns)
    parsed = {name: _json_type(asked, first.get(name)) for name, asked in types.items()}
    options = json_lines.ParseOptions(explicit_schema=pa.schema(parsed), unexpected_field_behavior="ignore")
    try:
        with json_lines.open_json(str(path), json_lines.ReadOptions(block_size=BLOCK), options) as reader:
            yield from _typed(path, (pa.Table.from_batches([batch]) for batch in map(_valid, reader)), types)
    except pa.ArrowInvalid:  # it names neither the column nor, in a file of several blocks, the row
        for name, dtype in parsed.items():
            wanted = str(types[name]) if dtype == types[name] else f"{types[name]} written as {dtype} like the first"
            found = ((n, r[name]) for n, r in enumerate(_records(path)) if not _fits(r.get(name), dtype))
            if (misfit := next(found, None)) is not None:
                raise _misfit(path, name, wanted, chain([misfit], found)) from None
        raise


def _open_bandit_types(names: Iterable[str], types: Types) -> dict[str, pa.DataType]:
    own = {"": pa.int64(), "timestamp": pa.timestamp("us", "UTC"), "propensity_score": pa.float64()}
    own |= dict.fromkeys(("item_id", "position", "click"), pa.int64())
    affinity = {name: pa.float64() for name in names if name.startswith("user-item_affinity_")}
    return own | affinity | dict(types)


def open_bandit_schema(path: Path, types: Types) -> pa.Schema:
    """The columns of the header, those that every log of the dataset has in types of their own unless asked otherwise."""
    return csv_schema(path, _open_bandit_types(csv_schema(path, {}).names, types))
