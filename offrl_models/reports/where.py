"""Where a policy differs from another: the observed values at which it decides otherwise more often than elsewhere."""

from collections.abc import Mapping, Sequence
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


def where_apart(
    episodes: Episodes,
    apart: Float64[np.ndarray, "rows"],
    most: int,
    category_names: Mapping[str, Sequence[str]] | None = None,
) -> list[Place]:
    """The places that add the most to what differs beyond its mean, the greatest first; categories by their names, if they have
    some, and else by their codes."""
    found, overall = [], apart.mean()
    for place, feature in enumerate(episodes.features):
        value = np.asarray(episodes.observation[:, place], np.float64)
        called = (category_names or {}).get(feature.name)
        names, group = _categories(feature.name, value, called) if feature.categories else _ranges(feature.name, value)
        count = np.bincount(group, minlength=len(names))
        mean = np.bincount(group, apart, len(names)) / np.maximum(count, 1)
        excess = count * (mean - overall)
        found += [
            (excess[i], Place(names[i], count[i] / len(apart), float(mean[i])))
            for i in np.flatnonzero((count >= FEWEST) & (excess > 1e-9 * len(apart)))
        ]
    return [place for _, place in sorted(found, key=lambda each: -each[0])[:most]]


def _categories(
    name: str, value: Float64[np.ndarray, "rows"], called: Sequence[str] | None
) -> tuple[list[str], Int64[np.ndarray, "rows"]]:
    codes, group = np.unique(value.astype(np.int64), return_inverse=True)
    return [f"{name} = {called[code] if called else code}" for code in codes], group


def _ranges(name: str, value: Float64[np.ndarray, "rows"]) -> tuple[list[str], Int64[np.ndarray, "rows"]]:
    """Values that are as frequent as a range is are groups of their own, and so is what is missing."""
    group, names = np.full(len(value), -1), []
    distinct, count = np.unique(value[~np.isnan(value)], return_counts=True)
    for each in distinct[count >= (~np.isnan(value)).sum() / (2 * RANGES)]:
        group[value == each] = len(names)
        names.append(f"{name} = {each:.4g}")
    rest = (group < 0) & ~np.isnan(value)
    if rest.any():
        edges = np.unique(np.quantile(value[rest], np.linspace(0, 1, RANGES + 1)))
        between = np.searchsorted(edges[1:-1], value[rest], side="right")
        group[rest] = len(names) + between
        names += [f"{name} from {low:.3g} to {high:.3g}" for low, high in pairwise(edges)] or [
            f"{name} = {edges[0]:.4g}"
        ]
    group[np.isnan(value)] = len(names)
    return [*names, f"{name} missing"], group
