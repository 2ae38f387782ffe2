"""Doubly robust estimators: a model of the values, corrected by importance sampling where it was wrong.

`q` and `v` belong to the evaluation policy: v(s) = sum_a pi(a|s) q(s, a). They must not be fitted on these episodes.
Truncated episodes are to be completed first (`sequences.completed`).
"""

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.importance import Terms
from offrl_models.ope.sequences import by_step, finite, weights_by_step
from offrl_models.schema import Episodes


def _parts(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights after and before each step, the discounted r - q there, and discounted v."""
    discount = episodes.time_discount
    error = by_step(episodes, finite("the q-value", discount * (episodes.reward - q)), 0.0)
    value = by_step(episodes, finite("the state value", discount * v), 0.0)
    after = weights_by_step(episodes, ratio)
    before = np.concatenate([np.ones((episodes.n_episodes, 1)), after[:, :-1]], axis=1)
    return after, before, error, value


def dr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> Terms:
    """sum_t gamma^t [ w_t (r_t - q(s_t, a_t)) + w_{t-1} v(s_t) ]: Jiang & Li (2016), eq. 10, unrolled."""
    after, before, error, value = _parts(episodes, ratio, q, v)
    return Terms((after * error + before * value).sum(1, keepdims=True))


def wdr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
) -> Terms:
    """DR with the weights of each step normalised over all episodes: Thomas & Brunskill (2016), section 5."""
    after, before, error, value = _parts(episodes, ratio, q, v)
    return Terms(np.concatenate([after * error, before * value], 1), np.concatenate([after, before], 1))
