"""How the rows of a log make episodes: found in one pass over the keys, whatever the order of rows and batches.

A run is a stretch of rows that follow one another in one episode. A log in order has about one run per episode, so what is
kept in memory grows with the episodes and not with the rows; a shuffled one has up to one run per row.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool

from offrl_models.logs import values
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH, DamagedBatchError, Log

LAST_STEP = 2**31  # steps beyond it are a gap, whatever they are
GAPS_LEFT_OUT = (
    0.001  # most of a batch's episodes that may have gaps; they are left out, beyond it the batch is refused
)


@dataclass(frozen=True)
class Problem:
    """A structural rule and the rows of each batch that break it."""

    check: str
    column: str
    rows: dict[int, int]  # batch -> rows
    first: dict[int, int]  # batch -> the first of them, counted from 0 in its file
    problem: str  # completes "<n> rows ..."
    remedy: str


@dataclass(frozen=True)
class Index:
    """The episodes of a log."""

    runs: pl.DataFrame  # in order of reading: batch, row (of the batch), rows, episode, step, ...
    episodes: (
        pl.DataFrame
    )  # sorted by id: episode, entity, length, rows, gap, pending, terminated, truncated, open, labels
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
        other=pl.lit(False)
        if contract.entity is None
        else pl.col(contract.entity).ne_missing(pl.col(contract.entity).shift(1)),
    )
    starts = (
        np.ones(frame.height, bool)
        if alone
        else before.select(pl.any_horizontal(pl.all())).to_series().to_numpy().copy()
    )
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
        waiting = frame.select(values.reward(contract).is_null()).to_series().to_numpy()
        closes = frame.select(pl.when(pl.lit(waiting)).then(pl.col(str(contract.decided_at)))).to_series()
        latest = closes.to_frame("at").with_columns(run=pl.Series(np.repeat(np.arange(len(at)), rows)))
        runs = runs.with_columns(
            latest.group_by("run", maintain_order=True).agg(pl.col("at").max())["at"].alias("waits_from")
        )
    if contract.next_observation:
        now = [column.column for column in contract.observation]
        first = frame[at].select(now).rename(dict(zip(now, map(str, range(len(now))), strict=True)))
        last = frame[ends].select(contract.next_observation)
        runs = runs.with_columns(
            _hash_rows(first).alias("observed"),
            _hash_rows(last.rename(dict(zip(last.columns, first.columns, strict=True)))).alias("expected"),
        )
    return runs


def _hash_rows(frame: pl.DataFrame) -> pl.Series:
    """A hash per row that does not depend on the width of its numbers."""
    plain = [
        pl.col(name).cast(pl.Float64) if dtype.is_numeric() else pl.col(name) for name, dtype in frame.schema.items()
    ]
    return frame.select(plain).hash_rows(seed=0)


def index(log: Log) -> Index:
    """Find the episodes of a log and every rule of structure that its rows break."""
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
            raise DamagedBatchError(f"{batch.path}: the batch has 0 rows; leave it out or write it again.", batch.path)
    if not found:
        first = log.batches[0].path
        raise DamagedBatchError(
            f"{first}: it brings rewards only, and no batch has decisions; land those first.", first
        )
    return analyse(pl.concat((runs for runs, _ in found), how="vertical_relaxed"), rows, clock, log)


Found = tuple[dict[int, int], dict[int, int]]  # rows per batch, and the first of them in its file


def _per_batch(runs: pl.DataFrame, broken: pl.Expr, at: str = "row") -> Found:
    """Runs per batch whose first (or last) row breaks a rule."""
    found = runs.filter(broken.fill_null(False)).group_by("batch").agg(pl.len(), pl.col(at).min().alias("first"))
    rows, first = {}, {}
    for batch, n, row in found.iter_rows():
        rows[int(batch)], first[int(batch)] = int(n), int(row)
    return rows, first


def analyse(runs: pl.DataFrame, rows: dict[int, int], clock: datetime | None, log: Log) -> Index:
    """Episodes and broken rules from the runs of a log."""
    contract = log.contract
    runs = runs.with_columns(last=pl.col("row") + pl.col("rows") - 1)
    ordered = _in_order(runs.filter(pl.col("episode").is_not_null() & pl.col("step").is_not_null()))
    repeated, conflicts = _repeated_rows(ordered, log) if (ordered["overlap"] > 0).any() else ({}, ({}, {}))
    flags = pl.col("terminated") | pl.col("truncated")
    step = contract.step_column
    ordered = ordered.with_columns(gap=pl.col("missing") > 0)
    gaps = _gap_batches(ordered)
    problems = [
        Problem("C03", step, *conflicts, "contradicting another row of the same episode and step",
                "keep one row for each decision."),
        Problem("C04", step, *gaps, "following a gap in the steps of its episode", "steps must run 0, 1, 2, ...: add the "
                "missing decisions or leave the episode out."),
        Problem("C05", contract.terminated or contract.truncated or step,
                *_per_batch(ordered, (flags & ~pl.col("final")) | (pl.col("terminated") & pl.col("truncated")), "last"),
                "ending an episode wrongly", "only the last row of an episode may be terminated or truncated, and not both: "
                "correct the flags."),
        Problem("C27", contract.entity_column,
                *_per_batch(ordered, pl.col("same") & pl.col("entity").ne_missing(pl.col("entity").shift(1))),
                "belonging to another entity than the row before", "an episode belongs to one entity: correct its id."),
    ]  # fmt: skip
    if contract.next_observation:
        joins = pl.col("same") & (pl.col("step") == pl.col("end").shift(1))
        differs = pl.col("observed") != pl.col("expected").shift(1)
        problems.append(
            Problem("C07", contract.next_observation[0], *_per_batch(ordered, joins & differs),
                    "following a next observation that differs from what they observed", "the next observation must be what "
                    "was observed next.")
        )  # fmt: skip
    if log.late_rewards is not None:
        once = dict(log.late_rewards.group_by(BATCH).len().iter_rows())
        for number, batch in enumerate(log.batches):
            if batch.rewards_only and rows[number] > once.get(number, 0):
                repeated[number] = rows[number] - once.get(number, 0)
    return Index(runs, _episodes(ordered, contract, clock), tuple(p for p in problems if p.rows), repeated, rows, clock)


def _in_order(runs: pl.DataFrame) -> pl.DataFrame:
    """Runs by episode and step, with what they repeat (`overlap`) and the steps missing before them (`missing`).

    `same` says that the run before is of the same episode, `final` that no run of the episode reaches further.
    """
    if not _is_in_order(runs):
        runs = runs.sort("episode", "step", "batch", "row")
    same = _is_same(runs)
    step = runs["step"].clip(-1, LAST_STEP).to_numpy()
    end = step + runs["rows"].to_numpy()
    starts = np.flatnonzero(~same)
    number = (~same).cumsum() - 1
    far = number * (2 * LAST_STEP)  # keeps the running maximum of one episode out of the next
    before = np.append(0, np.maximum.accumulate(end + far)[:-1]) - far
    reached = np.where(same, before, 0)
    furthest = np.maximum.reduceat(end, starts)[number] if len(starts) else end
    return runs.with_columns(
        end=pl.Series(end),
        same=pl.Series(same),
        overlap=pl.Series(np.where(same, np.minimum(end, reached) - step, 0).clip(0)),
        missing=pl.Series(np.where(same, (step - reached).clip(0), np.abs(step))),
        final=pl.Series(end == furthest),
    )


def _is_same(runs: pl.DataFrame) -> Bool[np.ndarray, "runs"]:
    """Runs whose episode is that of the run before."""
    return runs.select(pl.col("episode").eq_missing(pl.col("episode").shift(1))).to_series().to_numpy()


def _is_in_order(runs: pl.DataFrame) -> bool:
    """Whether runs are sorted by episode and step already, as they are where logs are written in order."""
    if not runs["episode"].is_sorted():
        return False
    steps = np.diff(runs["step"].to_numpy())
    return bool((steps[_is_same(runs)[1:]] > 0).all())


def _gap_batches(ordered: pl.DataFrame) -> Found:
    """Rows after a gap, of the batches in which more than a few episodes have one."""
    share = ordered.group_by("batch", "episode").agg(pl.col("gap").any()).group_by("batch").agg(pl.col("gap").mean())
    too_many = share.filter(pl.col("gap") > GAPS_LEFT_OUT)["batch"].to_list()
    return _per_batch(ordered, pl.col("gap") & pl.col("batch").is_in(too_many))


def _repeated_rows(ordered: pl.DataFrame, log: Log) -> tuple[dict[int, int], Found]:
    """Per batch, the rows that repeat an earlier row exactly, and those that contradict one."""
    contract = log.contract
    keys = [contract.episode_column, contract.step_column]
    wanted = ordered.filter(pl.col("overlap") > 0).select(pl.col("episode").unique().alias(keys[0]))

    def of_chunk(number: int, first: int, chunk: pl.DataFrame) -> pl.DataFrame:
        numbered = chunk.with_columns(pl.int_range(first, first + chunk.height).alias("row"))
        return numbered.join(wanted, on=keys[0], how="semi")

    read = pl.concat(log.each(of_chunk), how="vertical_relaxed")
    marked = read.select(BATCH, "row", *keys).with_columns(content=_hash_rows(read.drop(BATCH, "row")))
    marked = marked.with_columns(first=pl.col("content").first().over(keys), place=pl.int_range(pl.len()).over(keys))
    later = marked.filter(pl.col("place") > 0).with_columns(equal=pl.col("content") == pl.col("first"))
    counted = later.group_by(BATCH, "equal").agg(pl.len(), pl.col("row").min().alias("at"))
    repeated, conflicts = {}, ({}, {})
    for batch, equal, n, row in counted.iter_rows():
        if equal:
            repeated[int(batch)] = int(n)
        else:
            conflicts[0][int(batch)], conflicts[1][int(batch)] = int(n), int(row)
    return repeated, conflicts


def _episodes(ordered: pl.DataFrame, contract: Contract, clock: datetime | None) -> pl.DataFrame:
    """One row per episode, sorted by id."""
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
    return (
        ordered[starts]
        .select(firsts)
        .with_columns(
            length=pl.Series(np.maximum.reduceat(ordered["end"].to_numpy(), starts)),
            rows=total("rows"),
            repeated=total("overlap"),
            gap=any_of(ordered["gap"].to_numpy()),
            terminated=any_of(terminated),
            truncated=any_of(truncated),
            pending=any_of(pending),
        )
        .with_columns(open=~(pl.col("terminated") | pl.col("truncated")))
    )
