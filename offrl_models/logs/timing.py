"""When things happened: clocks, volume per day, late rewards, policy versions over time, rewards per batch.

Each measure returns a small frame that an expectation can assert on. Times are UTC, as datetime64; a missing one is an error.
"""

from datetime import date

import numpy as np
import polars as pl
from jaxtyping import Float64, Shaped

from offrl_models.logs.sample import Sample, joint
from offrl_models.schema import InputError

SKEW_MIN = 5.0  # minutes by which an event may be ingested before it happened
RECENT_DAYS = 7
FEWEST_DAYS = 3  # recorded before a day, below which there is nothing to hold it against
VOLUME_FACTOR = 5.0
FEWEST_EPISODES = 10  # on either side of a comparison of batches
ALL = "all"


def clock_skew(
    decided_at: Shaped[np.ndarray, "rows"], ingested_at: Shaped[np.ndarray, "rows"], source: Shaped[np.ndarray, "rows"]
) -> pl.DataFrame:
    """C32: per source, ingestion minus event time in minutes (median and 99% quantile).

    `share_early` is the share of rows ingested more than 5 minutes before they happened, which only a wrong clock can do.
    Raises InputError when a time is missing.
    """
    skew = _minutes(_times(decided_at, "decided_at"), _times(ingested_at, "ingested_at"))
    value = pl.col("skew")
    return (
        pl.DataFrame({"source": source.astype(str), "skew": skew})
        .group_by("source")
        .agg(
            pl.len().cast(pl.Int64).alias("rows"),
            value.median().alias("median_min"),
            value.quantile(0.99, "linear").alias("q99_min"),
            (value < -SKEW_MIN).mean().alias("share_early"),
        )
        .sort("source")
    )


def daily_volume(decided_at: Shaped[np.ndarray, "rows"]) -> pl.DataFrame:
    """C33: rows of each recorded day (UTC) against the median of the 7 recorded days before it.

    `flagged` when the ratio lies outside [1/5, 5]. The first and the last day may be partial: the first is never part of a
    reference, and the last is flagged for too many rows only. `reference` and `ratio` are null where fewer than 3 days
    precede. A day without any row is not listed. Raises InputError when a time is missing.
    """
    days, counts = np.unique(_times(decided_at, "decided_at").astype("datetime64[D]"), return_counts=True)
    found: list[tuple[date, int, float | None, float | None, bool, bool]] = []
    for i, (day, rows) in enumerate(zip(days.tolist(), counts.tolist(), strict=True)):
        recent = counts[max(1, i - RECENT_DAYS) : i]
        partial = i in (0, len(days) - 1)
        if len(recent) < FEWEST_DAYS:
            found.append((day, rows, None, None, partial, False))
            continue
        reference = float(np.median(recent))
        ratio = rows / reference
        flagged = ratio > VOLUME_FACTOR or (ratio < 1 / VOLUME_FACTOR and not partial)
        found.append((day, rows, reference, ratio, partial, flagged))
    schema = {"day": pl.Date, "rows": pl.Int64, "reference": pl.Float64, "ratio": pl.Float64}
    return pl.DataFrame(found, schema=schema | {"partial": pl.Boolean, "flagged": pl.Boolean}, orient="row")


def reward_delay(
    decided_at: Shaped[np.ndarray, "rows"], reward_at: Shaped[np.ndarray, "rows"], window_hours: float
) -> pl.DataFrame:
    """C31: share of rewards that arrive later than `window_hours` after their decision; quantiles of the delay in hours.

    `share_early` is the share that arrives before the decision. One row; raises InputError when a time is missing.
    """
    delay_h = _minutes(_times(decided_at, "decided_at"), _times(reward_at, "reward_at")) / 60
    row = {"rows": len(delay_h), "share_late": float((delay_h > window_hours).mean())}
    row["share_early"] = float((delay_h < 0).mean())
    row |= {f"delay_q{int(q * 100):02d}_h": float(np.quantile(delay_h, q)) for q in (0.5, 0.9, 0.99)}
    return pl.DataFrame([row | {"delay_max_h": float(delay_h.max())}])


def version_mixture(sample: Sample) -> pl.DataFrame:
    """C17: rows of each policy version in each batch, and their share of the batch.

    Raises InputError when policy versions were not logged.
    """
    if sample.policy_version is None:
        raise _not_logged(sample, "policy_version", "C17")
    rows = pl.DataFrame({"batch": sample.batch, "policy_version": sample.policy_version.astype(str)})
    return (
        rows.group_by("batch", "policy_version")
        .agg(pl.len().cast(pl.Int64).alias("rows"))
        .with_columns((pl.col("rows") / pl.col("rows").sum().over("batch")).alias("share"))
        .sort("batch", "policy_version")
    )


def reward_facts(sample: Sample, low: float, high: float) -> pl.DataFrame:
    """C12: rewards of all batches together and of each: distinct values, share at each bound of the contract, mean.

    `z` compares the mean of a batch with that of all earlier ones (batches in order of their index; the newest is the last
    row), with a variance clustered by episode; an episode counts in each batch that has rows of it. It is null for "all",
    for the first batch, and where either side has fewer than 10 episodes.
    """
    reward = pl.col("reward")
    facts = (
        pl.len().cast(pl.Int64).alias("rows"),
        reward.n_unique().cast(pl.Int64).alias("distinct"),
        (reward <= low).mean().alias("share_low"),
        (reward >= high).mean().alias("share_high"),
        reward.mean().alias("mean"),
    )
    rows = pl.DataFrame({"batch": sample.batch, "reward": sample.reward})
    names = pl.col("batch").cast(pl.String)
    whole = rows.select(pl.lit(ALL).alias("batch"), *facts, pl.lit(None, pl.Float64).alias("z"))
    each = rows.group_by("batch").agg(*facts).sort("batch").with_columns(names, _drift_z(sample))
    return pl.concat([whole, each])


def _drift_z(sample: Sample) -> pl.Series:
    """z of each batch's mean reward against that of all earlier batches."""
    batch, of_row = np.unique(sample.batch, return_inverse=True)
    cluster = joint(of_row, sample.episode)
    index = of_row[np.unique(cluster, return_index=True)[1]]
    centered = np.bincount(cluster, sample.reward - sample.reward.mean())
    length = np.bincount(cluster).astype(np.float64)
    moments = (np.ones_like(length), length, centered, centered**2, centered * length, length**2)
    own = np.stack([np.bincount(index, values, len(batch)) for values in moments])
    earlier = own.cumsum(1) - own
    found: list[float | None] = []
    for mine, before in zip(own.T, earlier.T, strict=True):
        if min(mine[0], before[0]) < FEWEST_EPISODES:
            found.append(None)
            continue
        difference = mine[2] / mine[1] - before[2] / before[1]
        noise = np.sqrt(_variance_of_mean(mine) + _variance_of_mean(before))
        found.append(0.0 if abs(difference) <= 1e-12 else float(difference / max(noise, 1e-12)))
    return pl.Series("z", found, pl.Float64)


def _variance_of_mean(moments: Float64[np.ndarray, "6"]) -> float:
    """Of a mean over rows, clustered by episode, from sums over episodes: 1, n, S, S^2, S n, n^2 (rows n, reward sum S)."""
    episodes, rows, total, squares, cross, lengths = moments.tolist()
    mean = total / rows
    return max(squares - 2 * mean * cross + mean**2 * lengths, 0.0) / rows**2 * episodes / (episodes - 1)


def _minutes(start: Shaped[np.ndarray, "rows"], end: Shaped[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows"]:
    return (end - start) / np.timedelta64(1, "m")


def _times(values: Shaped[np.ndarray, "rows"], name: str) -> Shaped[np.ndarray, "rows"]:
    missing = int(np.isnat(values).sum())
    if missing:
        raise InputError(f"column {name!r} has {missing} rows without a time; fill them or leave their episodes out.")
    return values.astype("datetime64[us]")


def _not_logged(sample: Sample, column: str, check: str) -> InputError:
    return InputError(
        f"column {column!r} was not logged for any of the {sample.n_rows} rows, which {check} needs; "
        "name it in the contract or leave the check out."
    )
