"""Raw batches as a stream of frames in one set of types; a file that cannot be trusted is named, not skipped.

A batch brings decisions, or only rewards that came later than theirs.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from offrl_models.logs import formats, values
from offrl_models.logs.contract import EPISODE, STEP, Contract, arrow_type, matches_kind
from offrl_models.schema import InputError

BATCH = "_batch"  # index of the file a row came from, in the order in which the batches are read
CHUNK = 262_144  # rows that are in memory at a time
WORKERS = min(2, os.cpu_count() or 1)  # batches that are worked on at a time; each takes memory of its own
T = TypeVar("T")


def batch_files(folder: Path, format: str = "parquet") -> list[Path]:
    """Batches of a folder in the order of their names, which is the order of their arrival."""
    return formats.batches(folder, format) if folder.is_dir() else []


class DamagedBatchError(InputError):
    """A batch that cannot be read to its end."""

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Batch:
    """One file that holds to the contract (check C01)."""

    path: Path
    kinds: dict[str, str]  # the contract's columns in it -> kind of type
    integer_keys: bool
    rewards_only: bool
    zoned: dict[str, bool | None]  # columns of times -> whether they say how far they are from UTC


def open_batch(path: Path, contract: Contract) -> Batch:
    """Hold a file's schema against the contract.

    Raises InputError naming the file and the column when the file is damaged, or a column is missing or of the wrong type.
    """
    wanted = contract.kinds
    schema = formats.schema(path, contract.format, {name: arrow_type(kind) for name, kind in wanted.items()})
    decisions = {column for column, _ in contract.observed()} | {choice.column for choice in contract.action.choices}
    decisions |= {*contract.action.columns, *([contract.action.column] if contract.action.column else [])}
    late = [*contract.reward_keys, *contract.reward.terms]
    rewards_only = bool(contract.reward_keys) and not decisions & set(schema.names) and set(late) <= set(schema.names)
    if rewards_only:
        arrived = contract.reward.arrived_at
        wanted = {name: wanted[name] for name in [*late, *([arrived] if arrived in schema.names else [])] if name}
    for name, kind in wanted.items():
        if schema.names.count(name) != 1:
            there = "there twice" if name in schema.names else "missing"
            hint = formats.nearest_column(name, schema.names) if name not in schema.names else ""
            raise InputError(
                f"{path}: column {name!r} is {there} in all {count_rows(path, contract)} rows{hint} (C01); the contract needs "
                f"it once ({kind}), so write the batch again with it."
            )
        dtype = schema.field(name).type
        if not matches_kind(kind, dtype):
            raise InputError(
                f"{path}: column {name!r} is {dtype} in all {count_rows(path, contract)} rows where the contract needs a {kind} "
                "(C01); convert it and write the batch again."
            )
    keys = [schema.field(name).type for name, kind in wanted.items() if kind == "key"]
    integer_keys = all(pa.types.is_integer(dtype) and dtype != pa.uint64() for dtype in keys)
    times = [(name, schema.field(name).type) for name, kind in wanted.items() if kind == "time"]
    zoned = {name: formats.has_zone(path, contract.format, name, dtype) for name, dtype in times}
    return Batch(path, wanted, integer_keys, rewards_only, zoned)


def _in_one_type(frame: pl.DataFrame, name: str, kind: str, *, integer_keys: bool) -> pl.Expr:
    """A column in the type that it has in every batch."""
    column, dtype = pl.col(name), frame.schema[name]
    match kind:
        case "key":
            return column.cast(pl.Int64 if integer_keys else pl.String)
        case "label":
            return column.cast(pl.String)
        case "integer":
            # from 2**63 on they turn negative, which neither a step nor a code may be
            return column.reinterpret(signed=True) if dtype == pl.UInt64 else column.cast(pl.Int64)
        case "number" if dtype == pl.UInt64:
            return column.cast(pl.Float64)
        case "number" if dtype.is_unsigned_integer() or dtype == pl.Boolean:
            return column.cast(pl.Int64)
        case "mask":
            return column.cast(pl.List(pl.Boolean))
        case "labels":
            return column.cast(pl.List(pl.String))
        case "time":
            at = (
                column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
                if getattr(dtype, "time_zone", None)
                else column
            )
            return at.cast(pl.Datetime("us"))
    return column


def _in_batch(path: Path, number: pl.Expr) -> pl.Expr:
    """Ids of what a batch counts from 0. No two batches have one name, and a batch keeps its own."""
    return pl.concat_str(pl.lit(f"{path.name}/"), number.cast(pl.String))


@dataclass(frozen=True)
class Log:
    """Batches that hold to the contract, in order. Iterating reads them again each time; nothing is kept in memory."""

    contract: Contract
    batches: list[Batch]
    derived_steps: dict[int, np.ndarray] | None = field(default=None, repr=False)  # per batch, where the log names none

    @classmethod
    def open(cls, paths: Sequence[Path], contract: Contract) -> "Log":
        """Raises InputError for the first batch that cannot be used, or when there is none."""
        if not paths:
            raise InputError(
                f"no {contract.format} batch lies in {contract.source}; put one there, or run `dvc pull` or `dvc repro` to "
                "fetch it."
            )
        log, first = cls(contract, [open_batch(path, contract) for path in paths]), dict[str, Batch]()
        for batch in log.batches:
            for name, zoned in batch.zoned.items():
                if zoned is not None and first.setdefault(name, batch).zoned[name] is not zoned:
                    mine, theirs = ("with", "without") if zoned else ("without", "with")
                    raise DamagedBatchError(
                        f"{batch.path}: the times of column {name!r} are {mine} their offset from UTC, and those of "
                        f"{first[name].path} are {theirs} it; write both alike.",
                        batch.path,
                    )
        return log.with_steps()

    @property
    def decisions(self) -> list[tuple[int, Batch]]:
        return [(number, batch) for number, batch in enumerate(self.batches) if not batch.rewards_only]

    @property
    def integer_keys(self) -> bool:
        return all(batch.integer_keys for batch in self.batches)

    def _read(self, number: int, columns: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
        batch = self.batches[number]
        types = {name: arrow_type(kind) for name, kind in batch.kinds.items()}
        for table in _whole(formats.chunks(batch.path, self.contract.format, columns, types, rows), batch.path):
            frame = pl.DataFrame(table)
            typed = [
                _in_one_type(frame, name, batch.kinds[name], integer_keys=self.integer_keys) for name in frame.columns
            ]
            frame = frame.with_columns(*typed, pl.lit(number, pl.Int32).alias(BATCH))
            if self.contract.numbers_episodes_by_batch and (name := self.contract.episode_column) in frame.columns:
                frame = frame.with_columns(_in_batch(batch.path, pl.col(name)).alias(name))
            del table  # none of this is kept while the next chunk is read
            yield frame
            del frame

    def chunks_of(
        self, number: int, columns: Iterable[str] | None = None, rows: int = CHUNK
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """The decisions of one batch, `rows` at a time, with late rewards in place; and the row at which each chunk begins.

        Columns are the contract's (or those of `columns`), `_batch`, and `_episode` and `_step` where the log names none.
        """
        contract, first = self.contract, 0
        wanted = list(contract.kinds) if columns is None else list(dict.fromkeys(columns))
        stored = [name for name in wanted if name not in (EPISODE, STEP)]
        late = self.late_rewards if set(stored) & set(contract.reward.terms) else None
        read = dict.fromkeys([*stored, *(contract.reward_keys if late is not None else ())])
        if contract.terminated and set(stored) & set(contract.next_observation or ()):
            read |= dict.fromkeys([*(column.column for column in contract.observation), contract.terminated])
        for frame in self._read(number, list(read) or list(contract.kinds)[:1], rows):
            row = pl.int_range(first, first + frame.height, dtype=pl.Int64, eager=True)
            if late is not None:
                frame = self._with_late_rewards(frame, late)
            frame = values.with_any_next_after_the_end(frame, contract)
            if contract.episode_id is None:
                frame = frame.with_columns(_in_batch(self.batches[number].path, pl.lit(row)).alias(EPISODE))
            if contract.step is None:
                steps = 0 if self.derived_steps is None else pl.Series(self.derived_steps[number][row.to_numpy()])
                frame = frame.with_columns(pl.lit(steps).cast(pl.Int64).alias(STEP))
            frame = frame.select(BATCH, *(n for n in frame.columns if n in wanted or n in (EPISODE, STEP)))
            first += frame.height
            yield first - frame.height, frame
            del frame

    def chunks(self, columns: Iterable[str] | None = None, rows: int = CHUNK) -> Iterator[pl.DataFrame]:
        """All decisions, in order of batch and row; see `chunks_of`."""
        for number, _ in self.decisions:
            for _, frame in self.chunks_of(number, columns, rows):
                yield frame

    def each(self, work: Callable[[int, int, pl.DataFrame], T], columns: Iterable[str] | None = None) -> Iterator[T]:
        """`work(batch, first row, chunk)` of every chunk, several batches at a time; the results in order.

        Columns are those of `columns`, or all that say what was decided.
        """
        wanted = self.contract.content if columns is None else list(columns)

        def whole(number: int) -> list[T]:
            results = []
            for first, frame in self.chunks_of(number, wanted):
                if frame.height:
                    results.append(work(number, first, frame))
                del frame
            return results

        with ThreadPoolExecutor(WORKERS) as pool:
            for results in pool.map(whole, [number for number, _ in self.decisions]):
                yield from results

    def frame(self, columns: Iterable[str] | None = None) -> pl.DataFrame:
        """All decisions at once."""
        return pl.concat(self.chunks(columns), how="vertical_relaxed")

    def raw(self, number: int, columns: Sequence[str]) -> pl.DataFrame:
        """One batch as it stands, late rewards not in place; without columns where it has no rows."""
        return pl.concat([pl.DataFrame(), *self._read(number, columns, CHUNK)], how="diagonal_relaxed")

    @cached_property
    def late_rewards(self) -> pl.DataFrame | None:
        """Rewards of the batches that bring nothing else, one row per decision; None where there are none.

        What is out of range is left out, for it is a fault of the batch that brings it and not of the decision's.
        """
        numbers = [number for number, batch in enumerate(self.batches) if batch.rewards_only]
        read = [frame for n in numbers for frame in self._read(n, list(self.batches[n].kinds), CHUNK)]
        if not read:
            return None
        good = values.within(values.reward_sum(self.contract), *self.contract.reward.range)
        keys = list(self.contract.reward_keys)
        return pl.concat(read, how="diagonal_relaxed").filter(good).unique(keys, keep="first", maintain_order=True)

    def _with_late_rewards(self, frame: pl.DataFrame, late: pl.DataFrame) -> pl.DataFrame:
        """Rewards that had not come yet, from the batches that brought them."""
        names = [
            name for name in late.columns if name in frame.columns and name not in (*self.contract.reward_keys, BATCH)
        ]
        renamed = late.select(*self.contract.reward_keys, *(pl.col(name).alias(f"_late_{name}") for name in names))
        joined = frame.join(renamed, on=list(self.contract.reward_keys), how="left", maintain_order="left")
        filled = [pl.coalesce(name, f"_late_{name}").alias(name) for name in names]
        return joined.with_columns(filled).drop(f"_late_{name}" for name in names)

    def with_steps(self) -> "Log":
        """Number the decisions of every episode by time, where the log names no step. Rows of one time are one decision; that
        they agree is asked where rows are held against each other (C03)."""
        contract = self.contract
        if contract.horizon == 1 or contract.step is not None or self.derived_steps is not None:
            return self
        keys = [contract.episode_column, str(contract.decided_at)]
        read = [frame.select(BATCH, *keys) for frame in self.chunks(keys)]
        if not read:
            return self
        rows = pl.concat(read, how="vertical_relaxed").with_row_index("row").sort(*keys, "row")
        later = pl.any_horizontal(pl.col(key).ne_missing(pl.col(key).shift(1)) for key in keys)
        step = later.cast(pl.Int64).cum_sum().over(keys[0]) - 1
        numbered = rows.with_columns(step=step).sort("row").partition_by(BATCH, as_dict=True)
        return replace(self, derived_steps={int(n): part["step"].to_numpy() for (n,), part in numbered.items()})


def _whole(tables: Iterator[pa.Table], path: Path) -> Iterator[pa.Table]:
    """The same tables; an error on the way names the batch."""
    try:
        yield from tables
    except InputError as error:
        raise DamagedBatchError(str(error), path) from error


def count_rows(path: Path, contract: Contract) -> int:
    """Rows of a batch whatever its columns are; 0 where it cannot be read."""
    try:
        names = formats.schema(path, contract.format, {}).names
        single = [name for name in names if names.count(name) == 1][:1]
        return sum(table.num_rows for table in formats.chunks(path, contract.format, single, {}, CHUNK))
    except InputError:
        return 0


def ahead(items: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same items, the next of them made in another thread while one is being worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
