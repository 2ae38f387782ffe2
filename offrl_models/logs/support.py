"""What a log covers: outliers, exploration, visited cells, dataset quality, states outside the support, subgroup sizes.

Each measure takes a `Sample` and returns a small frame that an expectation can assert on.
"""

import math

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from offrl_models.logs.sample import Sample, features, joint, standardized
from offrl_models.schema import InputError

OUTLIER_MADS = 6.0
NORMAL_MAD = 1.4826  # standard deviations of a normal distribution per median absolute deviation
NEAR_CERTAIN = 0.999
REFERENCE_ROWS = 20_000  # of the training sample, among which neighbors are looked for
QUERY_ROWS = 5_000
MULTIPLICATIONS = 1e10  # of one search among neighbors; wide observations get fewer queries
FEWEST_QUERIES = 500
SUPPORT_QUANTILE = 0.995
CHUNK = 256  # queries at a time
ROUNDING = 0.01  # standard deviations within which two values count as equal
STREAMS = 8  # numeric columns that count as evidence of a copy; more could only repeat each other
ALL = "all"


def outliers(sample: Sample) -> pl.DataFrame:
    """C11: per numeric column, the share of its values further than 6 scaled MAD from their median.

    Where more than half of the values equal the median, the MAD is 0 and says nothing. The spread is then the median
    distance of the values that do differ: a rare flag is no outlier, but a value far beyond the other rare ones is. A column
    that is never anything but one value has scale 0 and no outliers; one without any value has no row.
    """
    found = []
    for column in sample.numeric:
        values = sample.observation[:, column].astype(np.float64)
        values = values[~np.isnan(values)]
        if len(values) == 0:
            continue
        median = float(np.median(values))
        distance = np.abs(values - median)
        scale = NORMAL_MAD * float(np.median(distance))
        if scale == 0 and distance.any():
            scale = NORMAL_MAD * float(np.median(distance[distance > 0]))
        share = float((distance > OUTLIER_MADS * scale).mean())
        found.append((sample.names[column], len(values), median, scale, share))
    columns = {"column": pl.String, "rows": pl.Int64, "median": pl.Float64, "scale": pl.Float64, "share": pl.Float64}
    return pl.DataFrame(found, schema=columns, orient="row")


def state_cells(sample: Sample, *, seed: int, cells: int = 1024) -> Int64[np.ndarray, "rows"]:
    """C21: a cell for each row's observation.

    One categorical column is its own code, a few are their mixed-radix number. Anything else is hashed into `cells` cells
    (rounded down to a power of 2): each bit is the side of the mean on which a random projection falls, so that nearby
    observations share most bits (SimHash: Charikar 2002, https://doi.org/10.1145/509907.509965).
    """
    if sample.is_tabular:
        cell = np.zeros(sample.n_rows, np.int64)
        for code, radix in zip(sample.codes.T, sample.radices, strict=True):
            cell = cell * radix + code
        return cell
    inputs = features(sample)
    directions = np.random.default_rng(seed).normal(size=(inputs.shape[1], int(math.log2(cells))))
    sides = (inputs - inputs.mean(0)) @ directions > 0
    return sides @ (1 << np.arange(sides.shape[1]))


def action_cells(sample: Sample) -> Int64[np.ndarray, "rows"]:
    """Discrete actions as they are; each dimension of a continuous one is cut at its quartiles."""
    if sample.n_actions is not None:
        return sample.action
    cuts = np.quantile(sample.action, [0.25, 0.5, 0.75], axis=0).T
    return joint(*(np.searchsorted(c, a, side="left") for c, a in zip(cuts, sample.action.T, strict=True)))


def cell_visits(sample: Sample, *, seed: int = 0) -> pl.DataFrame:
    """C21: visits and mean propensity of each visited state-action cell; the mean is null where none was logged."""
    probability = pl.Series("p", sample.action_prob if sample.action_prob is not None else [None] * sample.n_rows)
    rows = pl.DataFrame(
        {
            "state": state_cells(sample, seed=seed),
            "action": action_cells(sample),
            "p": probability.cast(pl.Float64),
        }
    )
    visits = (pl.len().cast(pl.Int64).alias("visits"), pl.col("p").mean().alias("mean_action_prob"))
    return rows.group_by("state", "action").agg(*visits).sort("state", "action")


def dataset_quality(
    sample: Sample, *, low: float, high: float, reference_cells: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """C23: SACo and trajectory quality of each batch and of all together, to report and to trend.

    Schweighofer et al. (2022), https://arxiv.org/abs/2111.04714. `saco` is the number of distinct state-action cells
    relative to `reference_cells`; by default those of the whole sample, so that it is 1 for "all". It grows with the rows of
    a batch; `cells_per_row` stands beside it. `tq` is the mean discounted return scaled so that `low` is 0 and `high` 1:
    the returns of a random and an expert policy where they are known (it may then leave [0, 1]), else the lowest and
    highest return that the contract allows. Raises InputError unless low < high.
    """
    if not low < high:
        raise InputError(
            f"trajectory quality (C23) needs a lower return below the higher one, not {low:g} and {high:g}."
        )
    cell = joint(state_cells(sample, seed=seed), action_cells(sample))
    reference = reference_cells or int(cell.max()) + 1
    batches = [(ALL, np.ones(sample.n_rows, bool))]
    batches += [(str(b), sample.batch == b) for b in np.unique(sample.batch)]
    found = []
    for name, rows in batches:
        return_ = sample.return_[np.unique(sample.episode[rows])]
        unique, n, mean = len(np.unique(cell[rows])), int(rows.sum()), float(return_.mean())
        quality = (unique / reference, unique / n, mean, (mean - low) / (high - low))
        found.append((name, len(return_), n, unique, *quality))
    columns = {"batch": pl.String, "episodes": pl.Int64, "rows": pl.Int64, "unique_cells": pl.Int64}
    columns |= dict.fromkeys(("saco", "cells_per_row", "return_mean", "tq"), pl.Float64)
    return pl.DataFrame(found, schema=columns, orient="row")


def outside_support(train: Sample, gate: Sample, *, seed: int) -> pl.DataFrame:
    """C26: share of gate states that are further from the training states than training episodes are from each other.

    With categorical columns only: states of which training has no example. Otherwise the distance to the nearest of at most
    20,000 training states against `radius`, the 99.5% quantile of the distance from a training state to the nearest one of
    another episode. Numeric columns are standardized by training; another category counts like the mean squared difference
    of a numeric column, and one that training never has is outside. At most 5,000 states of each side are looked up, fewer
    where there are hundreds of features. No row when training has one episode: it has no neighbor.
    """
    rng = np.random.default_rng(seed)
    schema = {"method": pl.String, "rows": pl.Int64, "radius": pl.Float64, "share_outside": pl.Float64}
    if not train.numeric:
        outside = _never_seen(train.codes, gate.codes)
        return pl.DataFrame([("exact", gate.n_rows, None, float(outside.mean()))], schema=schema, orient="row")
    chosen = _draw(train.n_rows, REFERENCE_ROWS, rng)
    reference, others = features(train)[chosen], features(gate, train)
    used = reference.any(0) | others.any(0)
    reference, others, episode = reference[:, used], others[:, used], train.episode[chosen]
    most = int(np.clip(MULTIPLICATIONS / (reference.shape[0] * max(reference.shape[1], 1)), FEWEST_QUERIES, QUERY_ROWS))
    asked = _draw(len(chosen), most, rng)
    inside = _nearest(reference[asked], reference, (episode[asked], episode))
    inside = inside[np.isfinite(inside)]
    if len(inside) == 0:
        return pl.DataFrame(schema=schema)
    radius = float(np.quantile(inside, SUPPORT_QUANTILE))
    queries = _draw(gate.n_rows, most, rng)
    # Squared distances of equal rows differ from 0 by rounding.
    outside = _nearest(others[queries], reference, None) > radius + 1e-9 * reference.shape[1]
    for column in range(len(train.categorical)):
        outside |= _never_seen(train.codes[:, [column]], gate.codes[queries][:, [column]])
    row = ("neighbors", len(queries), math.sqrt(radius), float(outside.mean()))
    return pl.DataFrame([row], schema=schema, orient="row")


def _draw(rows: int, most: int, rng: np.random.Generator) -> Int64[np.ndarray, "drawn"]:
    return np.sort(rng.permutation(rows)[:most])


def _never_seen(known: Int64[np.ndarray, "a columns"], asked: Int64[np.ndarray, "b columns"]) -> Bool[np.ndarray, "b"]:
    both = joint(*np.concatenate([known, asked]).T)
    return ~np.isin(both[len(known) :], both[: len(known)])


def _nearest(
    asked: Float64[np.ndarray, "queries features"],
    reference: Float64[np.ndarray, "rows features"],
    episodes: tuple[Int64[np.ndarray, "queries"], Int64[np.ndarray, "rows"]] | None,
) -> Float64[np.ndarray, "queries"]:
    """Squared distance to the nearest reference row, of another episode where `episodes` of both are given, else inf.

    Brute force: a tree looks at nearly every row once there are dozens of features.
    """
    squares, found, doubled = (reference**2).sum(1), np.empty(len(asked)), -2.0 * reference.T
    for start in range(0, len(asked), CHUNK):
        block = slice(start, start + CHUNK)
        distance = asked[block] @ doubled
        distance += squares
        if episodes is not None:
            distance[episodes[0][block, None] == episodes[1]] = np.inf
        found[block] = distance.min(1) + (asked[block] ** 2).sum(1)
    return found.clip(0)


def subgroup_sizes(sample: Sample) -> pl.DataFrame:
    """C36: episodes that each value of each subgroup column occurs in."""
    found = []
    for group, values in sample.subgroups.items():
        pairs = pl.DataFrame({"value": values.astype(str), "episode": sample.episode}).unique()
        found += [(group, value, n) for value, n in pairs["value"].value_counts().sort("value").iter_rows()]
    return pl.DataFrame(found, schema={"group": pl.String, "value": pl.String, "episodes": pl.Int64}, orient="row")


def episode_content(sample: Sample) -> Int64[np.ndarray, "rows streams"]:
    """What an episode is compared by: first one code of all that is categorical, then the rounded numbers."""
    discrete = [*sample.codes.T] + ([sample.action] if sample.n_actions is not None else [])
    numbers = sample.observation[:, sample.numeric].astype(np.float64)
    if sample.n_actions is None:
        numbers = np.concatenate([numbers, sample.action], 1)
    rounded = np.rint(standardized(numbers, numbers) / ROUNDING).astype(np.int64)
    rounded[np.isnan(numbers)] = np.iinfo(np.int64).min
    code = joint(*discrete) if discrete else np.zeros(sample.n_rows, np.int64)
    return np.ascontiguousarray(np.column_stack([code, rounded]))


def _visits_expected(visits: Int64[np.ndarray, "transitions"]) -> float:
    """How often a transition that is seen once comes in as many rows again, at most once: 2 N2 / N1, one added to both for
    logs in which nothing repeats. Good (1953), https://doi.org/10.1093/biomet/40.3-4.237."""
    once, twice = int((visits == 1).sum()), int((visits == 2).sum())
    return min((2 * twice + 1) / (once + 1), 1.0)


def episode_bits(
    sample: Sample, content: Int64[np.ndarray, "rows streams"], distinct: Int64[np.ndarray, "kept"]
) -> Float64[np.ndarray, "kept"]:
    """-log2 of each distinct episode's probability under a first-order Markov model of the other distinct ones.

    A transition that is seen once falls back on the frequency of where it leads, or on what Good & Turing say of transitions
    seen once where that is more. An episode that is one code and nothing else has 0 bits: that it is there says nothing of
    how often it should be.
    """
    chosen = np.isin(np.arange(sample.n_episodes), distinct)
    rows = chosen[sample.episode]
    episode, start = sample.episode[rows], np.isin(np.flatnonzero(rows), sample.first)
    streams = [np.unique(column, return_inverse=True)[1] for column in content[rows].T]
    numeric = sorted(streams[1:], key=lambda code: -int(code.max()))[:STREAMS]
    bits = np.zeros(sample.n_episodes)
    for code in (streams[0], *numeric):
        before = np.where(start, code.max() + 1, np.roll(code, 1))
        pair = joint(before, code)
        n_pair, n_before = np.bincount(pair)[pair], np.bincount(before)[before]
        once = np.maximum(np.bincount(code)[code] / len(code), _visits_expected(np.bincount(pair)))
        bits -= np.bincount(episode, np.log2((n_pair - 1 + once) / n_before), sample.n_episodes)
    if not numeric:
        bits[sample.length == 1] = 0.0
    return bits[distinct]
