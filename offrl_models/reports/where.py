"""Where a policy differs from another: the observed values at which it decides otherwise more often than elsewhere."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.schema import Episodes

RANGES = 4  # that a number is cut into, equally often logged
FEWEST = 20  # decisions that a value is shown from


@dataclass(frozen=True)
class Place:
    """One value, or range of values, of one observed column."""

    where: str
    decisions: float  # share of all
    differs: float  # mean share of other decisions there


def where_apart(episodes: Episodes, apart: Float64[np.ndarray, "rows"], most: int) -> list[Place]:
    """The places that add the most to what differs beyond its mean, the greatest first."""
    found, overall = [], apart.mean()
    for place, feature in enumerate(episodes.features):
        value = np.asarray(episodes.observation[:, place], np.float64)
        names, group = _categories(feature.name, value) if feature.categories else _ranges(feature.name, value)
        count = np.bincount(group, minlength=len(names))
        mean = np.bincount(group, apart, len(names)) / np.maximum(count, 1)
        excess = count * (mean - overall)
        found += [
            (excess[i], Place(names[i], count[i] / len(apart), float(mean[i])))
            for i in np.flatnonzero((count >= FEWEST) & (excess > 0))
        ]
    return [place for _, place in sorted(found, key=lambda each: -each[0])[:most]]


def _categories(name: str, value: Float64[np.ndarray, "rows"]) -> tuple[list[str], Int64[np.ndarray, "rows"]]:
    codes, group = np.unique(value.astype(np.int64), return_inverse=True)
    return [f"{name} = {code}" for code in codes], group


def _ranges(name: str, value: Float64[np.ndarray, "rows"]) -> tuple[list[str], Int64[np.ndarray, "rows"]]:
    """Missing numbers are a group of their own."""
    known = value[~np.isnan(value)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, RANGES + 1))) if len(known) else np.zeros(1)
    names = [f"{name} from {low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    names = names or [f"{name} = {edges[0]:.3g}"]
    group = np.clip(np.searchsorted(edges, value, side="right") - 1, 0, len(names) - 1)
    return [*names, f"{name} missing"], np.where(np.isnan(value), len(names), group)
