"""The rules that set the rows of an episode against each other, wherever they lie: C03, C04, C05, C07, C08 and C27.

They see runs in order, not rows. Some hold within one batch. The others set batches against each other, and there the batch
that came later is blamed; they count once no batch is refused for what it is by itself, for the earlier one may be.
"""

from dataclasses import dataclass

import polars as pl

from offrl_models.logs.contract import Contract
from offrl_models.logs.rules import BACKWARDS, CORRECT_CLOCKS

GAPS_LEFT_OUT = 0.001  # most of a batch's episodes that may have gaps; beyond it the batch is refused
Found = tuple[dict[int, int], dict[int, int]]  # rows per batch, and the first of them in its file


@dataclass(frozen=True)
class Problem:
    """A structural rule and the rows of each batch that break it."""

    check: str
    column: str
    rows: dict[int, int]  # batch -> rows
    first: dict[int, int]  # batch -> the first of them, counted from 0 in its file
    problem: str  # completes "<n> rows ..."
    remedy: str
    across: bool = False  # it sets batches against each other


def problems(ordered: pl.DataFrame, by_batch: pl.DataFrame, contract: Contract) -> list[Problem]:
    """Every rule but C03 that runs break. `ordered` has them by episode and step, `by_batch` those of each batch apart."""
    same_frame, last = by_batch is ordered, pl.col("row") + pl.col("rows") - 1
    ordered = ordered.with_columns(last=last)
    by_batch = ordered if same_frame else by_batch.with_columns(last=last)
    mixed = ordered.filter(pl.col("same") & (pl.col("batch") != pl.col("batch").shift(1)))["episode"].unique()
    mixed = ordered.filter(pl.col("episode").is_in(mixed.implode())) if len(mixed) else ordered.clear()
    flags = pl.col("terminated") | pl.col("truncated")
    wrong_end = by_batch.filter((flags & ~pl.col("final")) | (pl.col("terminated") & pl.col("truncated")))
    ends = contract.terminated or contract.truncated or contract.step_column
    found = [
        Problem("C04", contract.step_column, *_gaps(ordered), "following a gap in the steps of its episode", "steps must run "
                "0, 1, 2, ...: add the missing decisions or leave the episode out."),
        Problem("C05", ends, *_count(wrong_end, rows=1, first="last"), "ending an episode wrongly", "only the last row of an "
                "episode may be terminated or truncated, and not both: correct the flags."),
        Problem("C05", ends, *_count(_overrun(mixed)), "at odds with an earlier batch about where their episode ends",
                "only the last row of an episode may be terminated or truncated: correct the flags or the id.", True),
    ]  # fmt: skip
    for across, runs in ((False, by_batch), (True, mixed)):
        if contract.entity:
            strangers = _strangers(runs, across)
            found.append(Problem("C27", contract.entity, *_count(strangers), "belonging to another entity than their episode",
                         "an episode belongs to one entity: correct its id.", across))  # fmt: skip
        if not (contract.next_observation or contract.decided_at):
            continue
        joined = _joined(runs, across)
        if contract.next_observation:
            differs = joined.filter(pl.col("observed") != pl.col("expected_before"))
            found.append(Problem("C07", contract.next_observation[0], *_count(differs, rows=1), "where an observation differs "
                         "from the next observation of the row before", "the next observation must be what was observed next.",
                         across))  # fmt: skip
        if contract.decided_at:
            back = joined.filter(pl.col("began") < pl.col("until_before"))
            found.append(Problem("C08", contract.decided_at, *_count(back, rows=1), BACKWARDS, CORRECT_CLOCKS, across))
    return found


def _count(runs: pl.DataFrame, rows: str | int = "rows", first: str = "row") -> Found:
    """Rows per batch, and the first of them."""
    counted = runs.with_columns(n=pl.lit(rows) if isinstance(rows, int) else pl.col(rows))
    found = counted.group_by("batch").agg(pl.col("n").sum(), pl.col(first).min().alias("first")).rows(named=True)
    return {int(r["batch"]): int(r["n"]) for r in found}, {int(r["batch"]): int(r["first"]) for r in found}


def _gaps(ordered: pl.DataFrame) -> Found:
    """Rows after a gap, of the batches in which more than a few episodes have one."""
    concerned = ordered.filter("gap")["batch"].unique().to_list()
    episodes = ordered.filter(pl.col("batch").is_in(concerned)).group_by("batch", "episode").agg(pl.col("gap").any())
    share = episodes.group_by("batch").agg(pl.col("gap").mean())
    too_many = share.filter(pl.col("gap") > GAPS_LEFT_OUT)["batch"].to_list()
    return _count(ordered.filter(pl.col("gap") & pl.col("batch").is_in(too_many)), rows=1)


def _overrun(mixed: pl.DataFrame) -> pl.DataFrame:
    """Rows after the end that an earlier batch gave their episode, and ends before a row that an earlier batch has."""
    step, end, episode = pl.col("step"), pl.col("end"), "episode"
    flagged = pl.col("terminated") | pl.col("truncated")
    ended = pl.when(flagged).then(end).otherwise(2**62)
    found = mixed.sort(episode, "batch", "row").with_columns(
        ended=ended.cum_min().shift(1).over(episode), reached=end.cum_max().shift(1).over(episode)
    )
    start = pl.max_horizontal("step", "ended")
    beyond = found.filter(end > pl.col("ended")).with_columns(row=pl.col("row") + start - step, rows=end - start)
    early = found.filter(flagged & (end < pl.col("reached")) & ~(end > pl.col("ended")))
    early = early.with_columns(row=pl.col("last"), rows=pl.lit(1, pl.Int64))
    return pl.concat([beyond, early])


def _strangers(runs: pl.DataFrame, across: bool) -> pl.DataFrame:
    """Runs of another entity than the first of their episode, in their own batch or in all of them."""
    found = runs.sort("episode", "batch", "row") if across else runs
    first = pl.col("entity").first().over("episode" if across else ["batch", "episode"])
    return found.filter(pl.col("entity").ne_missing(first))


def _joined(runs: pl.DataFrame, across: bool) -> pl.DataFrame:
    """Runs that follow on another of their episode, with what the earliest batch says of that one (`..._before`).

    `batch` and `row` are those of the row to blame: of the two that meet, the one that came later.
    """
    by = ["episode"] if across else ["batch", "episode"]
    follow = runs.filter(pl.col("same") & (pl.col("overlap") == 0) & (pl.col("missing") == 0))
    if follow.is_empty():
        runs = runs.clear()
    ends = runs.join(follow.select(by).unique(), on=by, how="semi", maintain_order="left").sort("batch", "row")
    told = [name for name in ("batch", "last", "expected", "until") if name in runs.columns]
    ends = ends.unique([*by, "end"], keep="first").select(*by, "end", pl.col(told).name.suffix("_before"))
    found = follow.join(ends, left_on=[*by, "step"], right_on=[*by, "end"])
    if across:
        found = found.filter(pl.col("batch") != pl.col("batch_before"))
    later = pl.col("batch") >= pl.col("batch_before")
    return found.with_columns(
        row=pl.when(later).then("row").otherwise("last_before"), batch=pl.max_horizontal("batch", "batch_before")
    )
