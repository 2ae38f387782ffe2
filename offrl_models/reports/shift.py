"""Distribution shift: training logs against the newest batch, and behavior actions against the candidate's.

The numbers that decide are population stability indices on all rows; Evidently draws a sample of them for people.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64

from offrl_models import storage
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH
from offrl_models.schema import Episodes

SAMPLE_ROWS = 20_000
CATEGORIES = 10  # the most frequent ones, each a group of its own
POOLS = 20  # groups for the other categories
QUANTILES = 10


def grouped(reference: pl.Series, current: pl.Series, *, categorical: bool) -> tuple[pl.Series, pl.Series]:
    """Both columns cut into the same few groups, the same for both.

    Frequent categories stand alone and the rest is pooled, in order of code, into groups of equal mass in the reference;
    numbers are cut at the deciles of the reference.
    """
    if categorical:
        counts = reference.value_counts(sort=True, name="count")
        top = counts.head(CATEGORIES)[reference.name].to_list()
        rest = counts.slice(CATEGORIES).sort(reference.name)
        name = {value: str(value) for value in top}
        mass = rest["count"].cum_sum().to_numpy() / max(int(rest["count"].sum()), 1)
        for value, reached in zip(rest[reference.name].to_list(), mass, strict=True):
            name[value] = f"rest {min(int(reached * POOLS), POOLS - 1) + 1:02d}"

        def label(column: pl.Series) -> pl.Series:
            return pl.Series(column.name, [name.get(value, "new") for value in column.to_list()])

    else:
        edges = np.unique(np.quantile(reference.to_numpy(), np.linspace(0, 1, QUANTILES + 1)[1:-1]))

        def label(column: pl.Series) -> pl.Series:
            return pl.Series(column.name, np.searchsorted(edges, column.to_numpy(), side="right").astype(str))

    return label(reference), label(current)


def stability_index(reference: pl.Series, current: pl.Series) -> float:
    """Population stability index, sum (p - q) ln(p / q), of two grouped columns, less what chance alone is expected to add.

    Empty groups count half a row. Under no shift the raw index is about (groups - 1) (1/n + 1/m).
    """
    groups = sorted(set(reference.to_list()) | set(current.to_list()))
    count = [dict(zip(*np.unique(c.to_numpy(), return_counts=True), strict=True)) for c in (reference, current)]
    p, q = (np.array([max(float(c.get(g, 0.0)), 0.5) for g in groups]) for c in count)
    p, q = p / p.sum(), q / q.sum()
    chance = (len(groups) - 1) * (1 / len(reference) + 1 / len(current))
    return max(float(((p - q) * np.log(p / q)).sum()) - chance, 0.0)


def log_drift(log: pl.DataFrame, contract: Contract) -> tuple[list[dict[str, Any]], pl.DataFrame, pl.DataFrame]:
    """Index per column of the newest batch against all earlier ones, and both as grouped frames.

    With a single batch there is nothing to compare; the list is empty.
    """
    newest = log[BATCH].max()
    reference, current = log.filter(pl.col(BATCH) != newest), log.filter(pl.col(BATCH) == newest)
    if reference.height == 0:
        return [], reference, current
    columns = {column.column: column.categories is not None for column in contract.observation}
    columns |= {contract.action.column: True, contract.reward.column: False, contract.action_prob: False}
    rows, left, right = [], {}, {}
    for name, categorical in columns.items():
        few = log[name].n_unique() <= QUANTILES
        before, after = grouped(reference[name], current[name], categorical=categorical or few)
        rows.append({"column": name, "index": stability_index(before, after)})
        left[name], right[name] = (before, after) if categorical or few else (reference[name], current[name])
    return rows, pl.DataFrame(left), pl.DataFrame(right)


def action_shift(
    episodes: Episodes, probs: Float64[np.ndarray, "rows actions"], seed: int
) -> tuple[float, pl.DataFrame, pl.DataFrame]:
    """Index of the candidate's actions, drawn at the logged observations, against the logged actions, and both frames."""
    rng = np.random.default_rng(seed)
    drawn = (probs.cumsum(1) < rng.random(len(probs))[:, None]).sum(1).clip(max=probs.shape[1] - 1)
    logged, candidate = pl.Series("action", episodes.action), pl.Series("action", drawn)
    before, after = grouped(logged, candidate, categorical=True)
    return stability_index(before, after), before.to_frame(), after.to_frame()


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
