"""Distribution shift: training logs against the newest batch, and behavior actions against the candidate's.

The numbers that decide are population stability indices on all rows; Evidently draws a sample of them for people.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from offrl_models import storage
from offrl_models.exported import Exported, OnnxDensity
from offrl_models.logs import values
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH, Log
from offrl_models.schema import Episodes

SAMPLE_ROWS = 20_000
CATEGORIES = 10  # the most frequent ones, each a group of its own
POOLS = 20  # groups for the other categories
QUANTILES = 10
RECURRING = 0.05  # share from which on a single number is a group of its own
LEAST_ROWS = 1000  # of what is newest


def grouped(reference: pl.Series, current: pl.Series, *, categorical: bool) -> tuple[pl.Series, pl.Series]:
    """Both columns cut into the same few groups, the same for both.

    Frequent categories stand alone and the rest is pooled, in order of code, into groups of equal mass in the reference;
    numbers are cut at the deciles of the reference, and a decile that many of them are, such as 0, is a group of its own.
    """
    if categorical:
        counts = reference.value_counts(sort=True, name="count")
        top = counts.head(CATEGORIES)[reference.name].to_list()
        rest = counts.slice(CATEGORIES).sort(reference.name)
        name = {value: str(value) for value in top}
        mass = rest["count"].cum_sum().to_numpy() / max(int(rest["count"].sum()), 1)
        taken = set(name.values())
        for value, reached in zip(rest[reference.name].to_list(), mass, strict=True):
            name[value] = _other_than(taken, f"rest {min(int(reached * POOLS), POOLS - 1) + 1:02d}")
        new = _other_than(taken, "new")

        def label(column: pl.Series) -> pl.Series:
            return column.replace_strict(list(name), list(name.values()), default=new, return_dtype=pl.String)

    else:
        numbers = reference.cast(pl.Float64).to_numpy()
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, QUANTILES + 1)[1:-1]))
        many = [edge for edge in edges if (numbers == edge).mean() >= RECURRING]
        cuts = np.sort(np.append(edges, np.nextafter(many, np.inf)))

        def label(column: pl.Series) -> pl.Series:
            code = np.searchsorted(cuts, column.cast(pl.Float64).to_numpy(), side="right")
            return pl.Series(column.name, code).cast(pl.String)

    return label(reference), label(current)


def _other_than(taken: set[str], label: str) -> str:
    """A name for a group that no category has."""
    return label if label not in taken else _other_than(taken, f"({label})")


def stability_index(reference: pl.Series, current: pl.Series) -> float:
    """Population stability index, sum (p - q) ln(p / q), of two grouped columns, less what chance alone is expected to add.

    Empty groups count half a row. Under no shift the raw index is about (groups - 1) (1/n + 1/m).
    """
    count = [dict(c.value_counts(name="count").iter_rows()) for c in (reference, current)]
    groups = sorted(set(count[0]) | set(count[1]))
    p, q = (np.array([max(float(c.get(g, 0.0)), 0.5) for g in groups]) for c in count)
    p, q = p / p.sum(), q / q.sum()
    chance = (len(groups) - 1) * (1 / len(reference) + 1 / len(current))
    return max(float(((p - q) * np.log(p / q)).sum()) - chance, 0.0)


@dataclass(frozen=True)
class _Column:
    """One thing that may drift."""

    name: str
    value: pl.Expr
    read: tuple[str, ...]  # columns of the log that it is made of
    categorical: bool


def _columns(contract: Contract) -> list[_Column]:
    """Observations, action, reward and propensity. Timestamps always move and are left out."""
    found = []
    for column in contract.observation:
        name = column.column
        if column.size:
            each = pl.col(name).cast(pl.List(pl.Float64)).list
            found += [_Column(f"{name}[{i}]", each.get(i), (name,), False) for i in range(column.size)]
        elif not column.timestamp:
            found.append(_Column(name, pl.col(name), (name,), column.n_categories is not None or bool(column.labels)))
    if contract.action.size and contract.action.column:
        name = contract.action.column
        each = pl.col(name).cast(pl.List(pl.Float64)).list
        found += [_Column(f"{name}[{i}]", each.get(i), (name,), False) for i in range(contract.action.size)]
    found += [_Column(name, pl.col(name), (name,), False) for name in contract.action.columns]
    choices = tuple(choice.column for choice in contract.action.choices)
    found += [_Column(name, pl.col(name), (name,), True) for name in choices]
    terms = contract.reward.terms
    found.append(_Column(contract.reward.name, values.reward(contract), tuple(terms), False))
    if contract.action_prob:
        read = (contract.action_prob.column, *choices)
        found.append(_Column(contract.action_prob.column, values.propensity(contract), read, False))
    return found


def log_drift(log: Log, seed: int) -> tuple[list[dict[str, Any]], pl.DataFrame, pl.DataFrame]:
    """Index per column of the newest batch against all earlier ones, over all rows, and samples of both for the page.

    Batches before it count as newest as well until they have LEAST_ROWS, so that a handful of rows says nothing of the next
    ones' shift. What is missing has an index of its own. One column is in memory at a time. With a single batch there is
    nothing to compare; the list is empty.
    """
    contract, numbers = log.contract, [number for number, _ in log.decisions]
    rows, left, right = [], {}, {}
    if len(numbers) < 2:
        return rows, pl.DataFrame(), pl.DataFrame()
    for column in _columns(contract):
        part = log.frame(column.read).select(BATCH, column.value.alias(column.name))
        part = part.with_columns(newest=part[BATCH].is_in(_newest(part[BATCH], numbers)))
        known = pl.col(column.name).is_not_null()
        if part.schema[column.name].is_float():
            known = known & pl.col(column.name).is_finite()
        part = part.with_columns(known=known.fill_null(False))
        if not part["known"].all():
            told = part.select("newest", pl.col("known").cast(pl.String))
            index = stability_index(told.filter(~pl.col("newest"))["known"], told.filter("newest")["known"])
            rows.append({"column": f"{column.name} missing", "index": index})
        part = part.filter("known")
        reference, current = part.filter(~pl.col("newest"))[column.name], part.filter("newest")[column.name]
        if reference.len() == 0 or current.len() == 0:
            continue
        few = part[column.name].n_unique() <= QUANTILES
        before, after = grouped(reference, current, categorical=column.categorical or few)
        rows.append({"column": column.name, "index": stability_index(before, after)})
        shown = (before, after) if column.categorical or few else (reference, current)
        left[column.name], right[column.name] = (_sampled(series, seed) for series in shown)
    return rows, _side_by_side(left), _side_by_side(right)


def _newest(batch: pl.Series, numbers: Sequence[int]) -> list[int]:
    """The newest batch and those before it, until they have LEAST_ROWS; never the first one."""
    rows, found = dict(batch.value_counts(name="count").iter_rows()), [numbers[-1]]
    for number in numbers[-2:0:-1]:
        if sum(rows.get(each, 0) for each in found) >= LEAST_ROWS:
            break
        found.append(number)
    return found


def _sampled(column: pl.Series, seed: int) -> pl.Series:
    return column if column.len() <= SAMPLE_ROWS else column.sample(SAMPLE_ROWS, seed=seed)


def _side_by_side(columns: dict[str, pl.Series]) -> pl.DataFrame:
    """Samples as one frame, nulls below the shorter ones. Columns are compared one by one, so rows need not belong together."""
    longest = max((column.len() for column in columns.values()), default=0)
    return pl.DataFrame(
        [column.alias(name).extend_constant(None, longest - column.len()) for name, column in columns.items()]
    )


def action_shift(
    episodes: Episodes, candidate: Exported, names: Sequence[str], seed: int
) -> tuple[float, pl.DataFrame, pl.DataFrame]:
    """Index of the candidate's actions, drawn at the logged observations, against the logged actions, and both frames.

    Of continuous actions, whose dimensions have `names`, the index is that of the dimension that differs most.
    """
    if isinstance(candidate, OnnxDensity):
        played = candidate.draws(episodes.observation, len(names), 1, seed)[:, 0]
        return _dimensions_shift(np.asarray(episodes.action), played, names)
    probs, rng = candidate.on(episodes), np.random.default_rng(seed)
    drawn = (probs.cumsum(1) < rng.random(len(probs))[:, None]).sum(1).clip(max=probs.shape[1] - 1)
    before, after = grouped(pl.Series("action", episodes.action), pl.Series("action", drawn), categorical=True)
    return stability_index(before, after), before.to_frame(), after.to_frame()


def _dimensions_shift(
    logged: Float[np.ndarray, "rows dimensions"], played: Float[np.ndarray, "rows dimensions"], names: Sequence[str]
) -> tuple[float, pl.DataFrame, pl.DataFrame]:
    before, after = (
        pl.DataFrame(dict(zip(names, each.T.astype(np.float64), strict=True))) for each in (logged, played)
    )
    groups = [grouped(before[name], after[name], categorical=False) for name in names]
    return max(stability_index(*group) for group in groups), before, after


def write_report(reference: pl.DataFrame, current: pl.DataFrame, page: Path, seed: int) -> None:
    """An Evidently page over a sample of both frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Evidently and its own dependencies
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        categorical = [name for name, dtype in current.schema.items() if dtype == pl.String]
        definition = DataDefinition(
            numerical_columns=[name for name in current.columns if name not in categorical],
            categorical_columns=categorical,
        )
        frames = [
            frame.sample(min(SAMPLE_ROWS, frame.height), seed=seed)
            .to_pandas()
            .astype(dict.fromkeys(categorical, object))
            for frame in (current, reference)
        ]
        report = Report([DataDriftPreset(num_method="wasserstein", cat_method="psi")])
        now, before = (Dataset.from_pandas(frame, definition) for frame in frames)
        snapshot = report.run(current_data=now, reference_data=before)
        storage.write_bytes(page, snapshot.get_html_str(as_iframe=False).encode())
