"""Folds of a log, for what may not be fitted on the episodes that it is used on."""

import numpy as np
from jaxtyping import Int64

from offrl_models.schema import Episodes, InputError


def fold_of(episodes: Episodes, folds: int) -> Int64[np.ndarray, "episodes"]:
    """A fold 0 to folds - 1 of every episode, the same for all episodes of an entity and in whatever order they come.

    Raises InputError where there are fewer entities than folds.
    """
    entity = episodes.episode_id if episodes.entity is None else episodes.entity
    distinct, place = np.unique(entity, return_inverse=True)
    if not 2 <= folds <= len(distinct):
        raise InputError(f"{len(distinct)} entities cannot be cut into {folds} folds; ask for 2 at least.")
    return place.ravel() % folds
