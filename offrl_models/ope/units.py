"""What is independent: entities, for the episodes of one patient or user may depend on each other."""

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.ope.importance import Terms
from offrl_models.schema import Episodes, InputError

Units = Int64[np.ndarray, "episodes"]


def numbered(episodes: Episodes) -> tuple[int, Units]:
    """How many entities there are, and the number of each episode's; without entities each episode is one of its own."""
    entity = episodes.episode_id if episodes.entity is None else episodes.entity
    distinct, place = np.unique(entity, return_inverse=True)
    return len(distinct), place.ravel()


def entities_of(episodes: Episodes) -> Units | None:
    """The number of the entity of every episode, from 0 on; None where each entity has one episode."""
    if episodes.entity is None:
        return None
    number, place = numbered(episodes)
    return place if number < episodes.n_episodes else None


def independent(episodes: Episodes) -> int:
    """How many entities there are, or episodes where each is one of its own."""
    unit = entities_of(episodes)
    return episodes.n_episodes if unit is None else int(unit.max()) + 1


def pooled(terms: Terms, unit: Units) -> Terms:
    """The same estimate with one row per unit, in their order: a ratio of sums over units, in which larger ones count for more."""
    order = np.argsort(unit, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(unit[order]) > 0))
    if len(starts) == len(unit):
        bottom = None if terms.denominator is None else terms.denominator[order]
        return Terms(terms.top[order], bottom, terms.weighted)
    bottom = np.ones_like(terms.numerator) if terms.denominator is None else terms.denominator
    numerator, denominator = (np.add.reduceat(part[order], starts, axis=0) for part in (terms.numerator, bottom))
    return Terms(numerator, denominator)


def by(terms: Terms, unit: Units | None) -> Terms:
    return terms if unit is None else pooled(terms, unit)


def per_unit(values: Float64[np.ndarray, "episodes"], unit: Units | None) -> Float64[np.ndarray, "units"]:
    """One number per unit with the same mean, and the deviations from it that the mean has by the units: to first order, what the
    mean would change by as a unit is left out, as in cluster-robust standard errors (Liang & Zeger, 1986)."""
    if unit is None:
        return values
    terms = pooled(Terms(values[:, None]), unit)
    return terms.estimate() + terms.influence()


def summed(values: Float64[np.ndarray, "episodes"], unit: Units | None) -> Float64[np.ndarray, "units"]:
    return values if unit is None else np.bincount(unit, values)


def planned_units(planned: int, episodes: int, units: int) -> int:
    """How many units so many planned episodes are of, when they are to the episodes as now."""
    return planned if units == episodes else max(round(planned * units / episodes), 1)


def fold_of(episodes: Episodes, folds: int) -> Int64[np.ndarray, "episodes"]:
    """A fold 0 to folds - 1 of every episode, for what may not be fitted on the episodes that it is used on: the same for all
    episodes of an entity, in whatever order they come.

    Raises InputError where there are fewer entities than folds.
    """
    number, place = numbered(episodes)
    if not 2 <= folds <= number:
        raise InputError(f"the episodes of {number} entities cannot be cut into {folds} folds; ask for 2 at least.")
    return place % folds
