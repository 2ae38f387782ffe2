"""How the rows of a log make episodes: found in one pass over the keys, whatever the order of rows and batches.

A run is a stretch of rows that follow one another in one episode. A log in order has about one run per episode, so what is
kept in memory grows with the episodes and not with the rows; a shuffled one has up to one run per row.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64

from offrl_models.logs import formats, values
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH, DamagedBatchError, Log
from offrl_models.logs.rules import LAST_STEP
from offrl_models.logs.structure import Found, Problem, problems


@dataclass(frozen=True)
class Index:
    """The episodes of a log."""

    runs: pl.DataFrame  # in order of reading: batch, row (of the batch), rows, episode, step, ...
    episodes: pl.DataFrame  # sorted by id: see `_episodes`
    problems: tuple[Problem, ...]
    duplicates: dict[int, int]  # batch -> rows that repeat an earlier one exactly
    rows: dict[int, int]  # batch -> rows
    clock: datetime | None  # latest time that the log knows of

    @property
    def left_out(self) -> pl.DataFrame:
        """Episodes with a gap in few enough numbers that their batches stand."""
        return self.episodes.filter("gap")


def _key_columns(contract: Contract) -> list[str]:
    named = [contract.entity, contract.terminated, contract.truncated, contract.decided_at, *contract.labels]
    named += [contract.reward.arrived_at] if contract.reward.window_hours else []
    named += list(contract.reward.terms) if contract.reward.window_hours else []
    named += [name for name, _ in contract.observed()] if contract.next_observation else []
    return [contract.episode_column, contract.step_column, *(name for name in named if name)]


def _flag(column: str | None, default: bool) -> pl.Expr:
    return pl.col(column).fill_null(False) if column else pl.lit(default)


def _runs(frame: pl.DataFrame, contract: Contract, first_row: int) -> pl.DataFrame:
    """The runs of one chunk, which begins at `first_row` of its batch."""
    episode, step = pl.col(contract.episode_column), pl.col(contract.step_column).cast(pl.Int64)
    alone = contract.horizon == 1
    terminated, truncated = _flag(contract.terminated, alone), _flag(contract.truncated, False)
    before = frame.select(
        new=episode.ne_missing(episode.shift(1)) | (step != step.shift(1) + 1).fill_null(True),
        ended=(terminated | truncated).shift(1).fill_null(False),
        other=pl.col(contract.entity).ne_missing(pl.col(contract.entity).shift(1))
        if contract.entity
        else pl.lit(False),
    )
    starts = np.ones(frame.height, bool)
    if not alone:
        starts = before.select(pl.any_horizontal(pl.all())).to_series().to_numpy().copy()
    starts[0] = True
    at = np.flatnonzero(starts)
    rows = np.diff(np.append(at, frame.height))
    ends = at + rows - 1
    columns: dict[str, pl.Series] = {}
    facts = frame.select(
        batch=pl.col(BATCH), episode=episode, step=step, terminated=terminated, truncated=truncated,
        entity=pl.col(contract.entity_column), **{f"label.{name}": pl.col(name).cast(pl.String) for name in contract.labels},
    )  # fmt: skip
    for name in ("batch", "episode", "step", "entity", *(f"label.{name}" for name in contract.labels)):
        columns[name] = facts[name].gather(at)
    for name in ("terminated", "truncated"):
        columns[name] = facts[name].gather(ends)
    runs = pl.DataFrame(columns).with_columns(
        pl.Series("row", at + first_row), pl.Series("rows", rows), pl.lit(False).alias("pending")
    )
    if contract.reward.window_hours:
        waiting = frame.select(values.reward_sum(contract).is_null()).to_series().to_numpy()
        closes = frame.select(pl.when(pl.lit(waiting)).then(pl.col(str(contract.decided_at)))).to_series()
        latest = closes.to_frame("at").with_columns(run=pl.Series(np.repeat(np.arange(len(at)), rows)))
        runs = runs.with_columns(
            latest.group_by("run", maintain_order=True).agg(pl.col("at").max())["at"].alias("waits_from")
        )
    if contract.decided_at:
        decided = frame[contract.decided_at]
        runs = runs.with_columns(began=decided.gather(at), until=decided.gather(ends))
    if contract.next_observation:
        now = [column.column for column in contract.observation]
        first = frame[at].select(now).rename(dict(zip(now, map(str, range(len(now))), strict=True)))
        last = frame[ends].select(contract.next_observation)
        runs = runs.with_columns(
            values.row_hash(first).alias("observed"),
            values.row_hash(last.rename(dict(zip(last.columns, first.columns, strict=True)))).alias("expected"),
        )
    return runs


class Runs(NamedTuple):
    """The runs of a log, in order of reading, with the rows of each batch and the latest time that the log knows of."""

    frame: pl.DataFrame
    rows: dict[int, int]
    clock: datetime | None


def index(log: Log) -> Index:
    """Find the episodes of a log and every rule of structure that its rows break."""
    return analyse(read_runs(log), log)


def read_runs(log: Log) -> Runs:
    """One pass over the keys of a log. Raises DamagedBatchError for a batch without rows, and a log without decisions."""
    contract = log.contract
    times = [
        name for name in (contract.decided_at, contract.reward.arrived_at) if name and contract.reward.window_hours
    ]

    def of_chunk(number: int, first: int, frame: pl.DataFrame) -> tuple[pl.DataFrame, list[Any]]:
        return _runs(frame, contract, first), [frame[name].max() for name in times]

    found = list(log.each(of_chunk, _key_columns(contract)))
    clock = max((at for _, latest in found for at in latest if isinstance(at, datetime)), default=None)
    rows = dict.fromkeys(range(len(log.batches)), 0)
    for runs, _ in found:
        rows[int(runs["batch"][0])] += int(runs["rows"].sum())
    for number, batch in enumerate(log.batches):
        if batch.rewards_only:
            rows[number] = log.raw(number, list(contract.reward_keys)).height
    for number, batch in enumerate(log.batches):
        if rows[number] == 0:
            raise DamagedBatchError(
                f"{batch.path}: the batch has 0 rows (C01); leave it out or write it again.", batch.path
            )
    if not found:
        first = log.batches[0].path
        raise DamagedBatchError(
            f"{first}: it brings rewards only, and no batch has decisions; land those first.", first
        )
    frames = [runs for runs, _ in found]
    del found
    runs = pl.concat(frames, how="vertical_relaxed", rechunk=True)
    return Runs(runs, rows, clock)


def analyse(read: Runs, log: Log) -> Index:
    """Episodes and broken rules from the runs of a log."""
    (runs, rows, clock), contract = read, log.contract
    usable = runs.drop_nulls(["episode", "step"]) if runs["episode"].has_nulls() or runs["step"].has_nulls() else runs
    ordered = _in_order(usable, ["episode"])
    shared = (ordered["same"] & (ordered["batch"] != ordered["batch"].shift(1))).any()
    by_batch = _in_order(usable, ["batch", "episode"]) if shared else ordered
    found, repeated = problems(ordered, by_batch, contract), {}
    if (ordered["overlap"] > 0).any():
        repeated, *conflicts = _repeated_rows(ordered, log)
        order = "" if contract.horizon == 1 else " and step" if contract.step else " and time"
        column = str(contract.step or contract.decided_at) if order else contract.episode_column
        said, remedy = f"contradicting another row of the same episode{order}", "keep one row for each decision"
        remedy += ", or log a step: the time does not tell which came first." if order == " and time" else "."
        found += [
            Problem("C03", column, *rows, said, remedy, across)
            for across, rows in zip((False, True), conflicts, strict=True)
        ]
    if log.late_rewards is not None:
        once = dict(log.late_rewards.group_by(BATCH).len().iter_rows())
        for number, batch in enumerate(log.batches):
            if batch.rewards_only and rows[number] > once.get(number, 0):
                repeated[number] = rows[number] - once.get(number, 0)
    return Index(runs, _episodes(ordered, contract, clock), tuple(p for p in found if p.rows), repeated, rows, clock)


def _in_order(runs: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Runs of each group by step, with what they repeat (`overlap`) and the steps missing before them (`missing`).

    `same` says that the run before is of the same group, `final` that no run of the group reaches further, `gap` that steps are
    missing before it.
    """
    if not _is_in_order(runs, by):
        runs = _sorted(runs, by)
    same = _is_same(runs, by)
    step = runs["step"].clip(-1, LAST_STEP).to_numpy()
    end = step + runs["rows"].to_numpy()
    starts = np.flatnonzero(~same)
    far = (~same).cumsum()
    far *= 2 * LAST_STEP  # keeps the running maximum of one episode out of the next
    reached = end + far
    np.maximum.accumulate(reached, out=reached)
    reached[1:] = reached[:-1]
    reached -= far
    del far
    reached[starts] = 0
    furthest = np.repeat(np.maximum.reduceat(end, starts), np.diff(starts, append=len(end))) if len(starts) else end
    return runs.with_columns(
        end=pl.Series(end),
        same=pl.Series(same),
        overlap=pl.Series(np.where(same, np.minimum(end, reached) - step, 0).clip(0)),
        missing=pl.Series((step - reached).clip(0)),
        gap=pl.Series(step > reached),
        final=pl.Series(end == furthest),
    )


def _sorted(runs: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """By group and step; what has the same stays in order of reading."""
    if by == ["episode"] and runs.schema["episode"] == pl.Int64:  # sorting by one number takes a third of the time
        episode, step = runs["episode"], runs["step"].clip(-1, LAST_STEP) + 1
        low, high = (int(value) for value in (episode.min(), episode.max()) if isinstance(value, int))
        if (high - low + 1) * (LAST_STEP + 2) < 2**63:
            key = (episode - low) * (LAST_STEP + 2) + step
            order = key.arg_sort()
            if not (key.gather(order).diff() == 0).any():
                return runs[order]
    return runs.sort(*by, "step", "batch", "row")


def _is_same(runs: pl.DataFrame, by: list[str]) -> Bool[np.ndarray, "runs"]:
    """Runs whose group is that of the run before."""
    return runs.select(pl.all_horizontal(pl.col(by).eq_missing(pl.col(by).shift(1)))).to_series().to_numpy()


def _is_in_order(runs: pl.DataFrame, by: list[str]) -> bool:
    """Whether runs are sorted by episode and step already, as they are where logs are written in order."""
    if by != ["episode"] or not runs["episode"].is_sorted():
        return False
    steps = np.diff(runs["step"].to_numpy())
    return bool((steps[_is_same(runs, by)[1:]] > 0).all())


def _repeated_rows(ordered: pl.DataFrame, log: Log) -> tuple[dict[int, int], Found, Found]:
    """Per batch, rows that repeat an earlier row exactly, that contradict one of their batch, and one of an earlier batch."""
    contract = log.contract
    keys = [contract.episode_column, contract.step_column]
    wanted = ordered.filter(pl.col("overlap") > 0).select(pl.col("episode").unique().alias(keys[0]))

    def of_chunk(number: int, first: int, chunk: pl.DataFrame) -> pl.DataFrame:
        numbered = chunk.with_columns(pl.int_range(first, first + chunk.height).alias("row"))
        return numbered.join(wanted, on=keys[0], how="semi", maintain_order="left")

    read = pl.concat(log.each(of_chunk), how="vertical_relaxed")
    content = values.row_hash(read.drop(BATCH, "row"))
    marked = read.select(BATCH, "row", *keys).with_columns(content=content).drop_nulls(keys)
    first, place = pl.col("content").first(), pl.int_range(pl.len()).over(keys)
    repeats = (place > 0) & (pl.col("content") == first.over(keys))

    def count(broken: pl.Expr) -> Found:
        counted = marked.filter(broken).group_by(BATCH).agg(pl.len(), pl.col("row").min().alias("first")).rows()
        return {int(batch): int(n) for batch, n, _ in counted}, {int(batch): int(row) for batch, _, row in counted}

    own, any_batch = (pl.col("content") != first.over(over) for over in ([*keys, BATCH], keys))
    return count(repeats)[0], count(own), count(any_batch & ~own)


def _episodes(ordered: pl.DataFrame, contract: Contract, clock: datetime | None) -> pl.DataFrame:
    """One row per episode, sorted by id: entity, length, rows, repeated, gap, pending, terminated, truncated, open, recorded,
    labels."""
    starts = np.flatnonzero(~ordered["same"].to_numpy())
    firsts = ["episode", "entity", *(f"label.{name}" for name in contract.labels)]
    final = ordered["final"].to_numpy()

    def total(column: str) -> pl.Series:
        return pl.Series(np.add.reduceat(ordered[column].to_numpy(), starts, dtype=np.int64))

    def any_of(flags: Bool[np.ndarray, "runs"]) -> pl.Series:
        return pl.Series(np.logical_or.reduceat(flags, starts))

    pending = np.zeros(ordered.height, bool)
    if contract.reward.window_hours and clock is not None:
        closes = pl.col("waits_from") + pl.duration(seconds=int(contract.reward.window_hours * 3600))
        pending = ordered.select((closes > pl.lit(clock)).fill_null(False)).to_series().to_numpy()
    terminated, truncated = (ordered[flag].to_numpy() & final for flag in ("terminated", "truncated"))
    first = ordered[starts]
    return (
        first.select(firsts)
        .with_columns(
            length=pl.Series(np.maximum.reduceat(ordered["end"].to_numpy(), starts)),
            rows=total("rows"),
            repeated=total("overlap"),
            gap=any_of(ordered["gap"].to_numpy()),
            terminated=any_of(terminated),
            truncated=any_of(truncated),
            pending=any_of(pending),
            recorded=_recorded(first),
        )
        .with_columns(open=~(pl.col("terminated") | pl.col("truncated")))
    )


def _recorded(first: pl.DataFrame) -> Int64[np.ndarray, "episodes"]:
    """The place of each episode in the order in which they began: by time where it is known, else by batch, and then by id."""
    key = first["began" if "began" in first.columns else "batch"].to_physical().to_numpy()
    place = np.empty(first.height, np.int64)
    ids = first["episode"]
    of_id = formats.natural(ids).rank("ordinal").to_numpy() if ids.dtype == pl.String else np.arange(first.height)
    place[np.lexsort((of_id, key))] = np.arange(first.height)
    return place
