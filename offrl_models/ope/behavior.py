"""The behavior policy as a whole distribution, from the propensities of the actions that were logged.

Importance ratios use the logged propensity itself; the model here is what a capped policy is capped by.
"""

from typing import Any

import numpy as np
from jaxtyping import Float64

from offrl_models.policies import BehaviorTable
from offrl_models.schema import Episodes, InputError


def fit_table(episodes: Episodes, states: int) -> BehaviorTable:
    """Mean logged propensity of every visited state-action cell.

    Raises InputError when a state's propensities add up to clearly more than 1, which no policy's do.
    """
    state = episodes.observation[:, 0].astype(np.int64)
    total, visits = np.zeros((states, episodes.n_actions)), np.zeros((states, episodes.n_actions))
    np.add.at(total, (state, episodes.action), episodes.action_prob)
    np.add.at(visits, (state, episodes.action), 1.0)
    known = total / np.maximum(visits, 1.0)
    excess = known.sum(1) > 1.0 + 1e-3
    if excess.any():
        first = int(np.flatnonzero(excess)[0])
        raise InputError(
            f"the logged propensities of state {first} add up to {known[first].sum():.4f} over its actions, and so do those "
            f"of {int(excess.sum()) - 1} other states to more than 1; they were not drawn by one policy of this observation."
        )
    return BehaviorTable(known)


def calibration(episodes: Episodes, probs: Float64[np.ndarray, "rows actions"], bins: int = 10) -> dict[str, Any]:
    """How well modelled probabilities match the actions taken and the logged propensities, on episodes not fitted.

    `ece` is the expected calibration error over all (row, allowed action) pairs; `reliability` has one entry per bin.
    """
    taken = np.zeros_like(probs, bool)
    taken[np.arange(len(probs)), episodes.action] = True
    predicted, happened = probs[episodes.mask], taken[episodes.mask]
    which = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    mean = np.bincount(which, predicted, bins) / np.maximum(count, 1)
    frequency = np.bincount(which, happened, bins) / np.maximum(count, 1)
    logged = probs[np.arange(len(probs)), episodes.action]
    return {
        "ece": float((count * np.abs(mean - frequency)).sum() / count.sum()),
        "mean_absolute_error_to_logged": float(np.abs(logged - episodes.action_prob).mean()),
        "reliability": [
            {"predicted": float(m), "frequency": float(f), "pairs": int(c)}
            for m, f, c in zip(mean, frequency, count, strict=True)
            if c
        ],
    }
