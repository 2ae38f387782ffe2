"""Whether logged propensities are those of whoever acted, whatever the policy that is judged.

Divided by its propensity, each action counts as often as if all were equally likely. Nobody takes an action more often than that:
where some are, in all of the log or where one observed column is low, high or one category, their propensities are too small.
Where they are less often, whoever acted may not have had them, which the checks of the overlap ask for.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from offrl_models.assess.overlap import THRESHOLDS, Check, check
from offrl_models.logs.tally import ROUNDED, holm_z
from offrl_models.schema import Episodes

CELLS = 10  # that each dimension of a continuous action is cut into, with as many rows each
FEWEST = 25  # rows of a cell, below which no z-score is normal


def propensity_check(episodes: Episodes) -> Check:
    """The z-score of what is logged too often, after Holm's correction for all that is looked at."""
    z, most = _largest(episodes), THRESHOLDS.mean_ratio_z
    return check("propensities", z < most, z, f"z under {most:g}",
                 f"some actions are logged more often than their propensities allow (z = {z:.1f}): they are not those of whoever "
                 "acted", grave=True)  # fmt: skip


def _largest(episodes: Episodes) -> float:
    found = [_z(episodes, *cells, group) for cells in _cells(episodes) for group in _groups(episodes)]
    return float(holm_z(np.maximum(np.concatenate(found), 0.0)).max(initial=0.0))


def _cells(episodes: Episodes) -> Iterator[tuple[Int64[np.ndarray, "rows"], Shaped[np.ndarray, "_ cells"]]]:
    """Which cell the action of each row is in, -1 for none; and what the inverse propensities of each cell should add up to, in
    each row or in all alike: 1 where a discrete action is allowed, the volume of a cell of continuous ones."""
    if episodes.n_actions:
        yield episodes.action, np.ones((1, episodes.n_actions)) if episodes.mask.all() else episodes.mask
        return
    action = episodes.action.astype(np.float64)
    # The lowest value of all is in no cell, so that those of a grid, each for what lies around it, fill the cells exactly.
    edges = [np.unique(column) for column in np.quantile(action, np.linspace(0, 1, CELLS + 1), axis=0).T]
    middle = np.quantile(action, [0.25, 0.75], axis=0)
    central = (action > middle[0]) & (action <= middle[1])
    for dimension, edge in enumerate(edges):
        others = np.arange(action.shape[1]) != dimension
        cell = np.searchsorted(edge, action[:, dimension]) - 1
        yield (
            np.where(central[:, others].all(1), cell, -1),
            np.diff(edge)[None] * np.diff(middle[:, others], axis=0).prod(),
        )


def _groups(episodes: Episodes) -> Iterator[Int64[np.ndarray, "rows"]]:
    """The group of each row, -1 for none: one of all; and by every observed column, its categories, or where it is low or high."""
    yield np.zeros(episodes.n_rows, np.int64)
    for column, feature in zip(
        episodes.observation.T, episodes.features, strict=False
    ):  # episodes made by hand have no features
        if feature.categories is None:
            yield (column > np.median(column)).astype(np.int64)
        else:
            rows = np.bincount(column.astype(np.int64))
            yield np.where(rows >= FEWEST, np.arange(len(rows)), -1)[column.astype(np.int64)]


def _z(
    episodes: Episodes,
    cell: Int64[np.ndarray, "rows"],
    expected: Shaped[np.ndarray, "_ cells"],
    group: Int64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "z"]:
    """Of each cell in each group that has enough rows. Errors are martingale differences, so that their variances add up."""
    cells, grouped = expected.shape[1], group >= 0
    known = grouped & (cell >= 0)
    inverse = 1.0 / episodes.action_prob[known]
    place, back, count = np.unique(group[known] * cells + cell[known], return_inverse=True, return_counts=True)
    enough = count >= FEWEST
    total, squares = (np.bincount(back, weights, len(place))[enough] for weights in (inverse, np.square(inverse)))
    of, column = np.divmod(place[enough], cells)
    rows = np.bincount(group[grouped])[of]
    meant = expected[0, column] * rows
    if len(expected) > 1:
        for each in np.unique(column):
            mine = column == each
            meant[mine] = np.bincount(group[grouped], expected[grouped, each])[of[mine]]
    error = np.sqrt(np.maximum(squares - total * meant / rows, 0.0))
    return (total - meant) / np.maximum(error, ROUNDED * rows)
