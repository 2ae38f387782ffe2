"""More robust doubly robust estimation: the value model that makes the variance of DR smallest, fitted on other episodes.

Farajtabar, Chow & Ghavamzadeh (2018), https://arxiv.org/abs/1802.03493. DR is unbiased with any model, so the model may as well be
the one that DR is least variable with, rather than the one that predicts best. It is no estimate of q: adding a multiple of
mu(a|s) / pi(a|s) to every action of a state changes nothing in DR, and so that multiple is left open.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.importance import Terms
from offrl_models.ope.multistep import following
from offrl_models.ope.sequences import finite, weights_by_step
from offrl_models.schema import Episodes, InputError

RANK_TOLERANCE = 1e-10  # directions of the model that change the variance by less, relative to the steepest, stay at 0


@dataclass(frozen=True)
class Basis:
    """What q(s, a) is linear in, for every action: columns of numbers, with coefficients of their own in every group."""

    group: Int64[np.ndarray, "rows"]
    columns: Float64[np.ndarray, "rows columns"]
    groups: int

    @classmethod
    def of_states(cls, state: Int64[np.ndarray, "rows"], states: int) -> "Basis":
        """A table: one number per state and action."""
        return cls(state, np.ones((len(state), 1)), states)

    @classmethod
    def of_columns(cls, columns: Float64[np.ndarray, "rows columns"]) -> "Basis":
        """A linear model of columns of the observation; a constant is to be among them where one is wanted."""
        return cls(np.zeros(len(columns), np.int64), finite("the basis", columns), 1)

    def q_values(
        self, coefficients: Float64[np.ndarray, "groups actions columns"]
    ) -> Float64[np.ndarray, "rows actions"]:
        return np.einsum("rc,rac->ra", self.columns, coefficients[self.group])


def fit(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    probs: Float64[np.ndarray, "rows actions"],
    behavior: Float64[np.ndarray, "rows actions"],
    basis: Basis,
    *,
    ridge: float = 0.0,
    share: Float64[np.ndarray, "episodes"] | None = None,
) -> Float64[np.ndarray, "groups actions columns"]:
    """Coefficients of the q that minimizes the variance of DR on these episodes.

    The objective is sum_t E[ gamma^2t w_{t-1} w_t (D q(s_t) - e R_t)' Omega (D q(s_t) - e R_t) ] with D = diag(pi),
    Omega = diag(1/mu) - 1 1', e the indicator of the logged action and R_t the per-decision importance-weighted return
    from step t on: weighted least squares, Farajtabar et al. (2018), the reinforcement-learning objective. `behavior` is mu
    as a whole distribution. Each episode counts `share`, equally when left out; `ridge` times |coefficients|^2 is added to the
    mean over episodes. Of several minimizers the shortest is returned.

    Raises InputError when the policy plays what the behavior never does, or `ratio` was formed with another behavior.
    """
    _checked(episodes, ratio, probs, behavior)
    shares = np.full(episodes.n_episodes, 1.0 / episodes.n_episodes) if share is None else share
    after = weights_by_step(episodes, ratio)
    before = np.concatenate([np.ones((episodes.n_episodes, 1)), after[:, :-1]], axis=1)
    squared = (before * after)[episodes.episode_of_row, episodes.step] * episodes.time_discount**2
    weight = finite("the weight", shares[episodes.episode_of_row] * squared)
    to_go = episodes.accumulated(
        finite("the reward", episodes.reward), episodes.step_discount * following(episodes, ratio)
    )
    actions, width = probs.shape[1], basis.columns.shape[1]
    found = np.zeros((basis.groups, actions, width))
    order = np.argsort(basis.group, kind="stable")
    present, starts = np.unique(basis.group[order], return_index=True)
    for group, rows in zip(present, np.split(order, starts[1:]), strict=True):
        curvature, slope = _normal_equations(
            weight[rows], to_go[rows], episodes.action[rows], probs[rows], behavior[rows], basis.columns[rows]
        )
        curvature += ridge * np.eye(actions * width)
        found[group] = (np.linalg.pinv(curvature, RANK_TOLERANCE, hermitian=True) @ slope).reshape(actions, width)
    return found


def _checked(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    probs: Float64[np.ndarray, "rows actions"],
    behavior: Float64[np.ndarray, "rows actions"],
) -> None:
    finite("the evaluation policy", probs)
    never = ((finite("the behavior policy", behavior) <= 0) & (probs > 0)).any(1)
    if never.any():
        raise InputError(
            f"the evaluation policy plays actions that the behavior policy never takes in {int(never.sum())} rows; "
            "no model of the values makes DR's variance finite there."
        )
    row = np.arange(episodes.n_rows)
    other = np.abs(ratio * behavior[row, episodes.action] - probs[row, episodes.action]) > 1e-5
    if other.any():
        raise InputError(
            f"the ratio is not pi / mu of the behavior distribution in {int(other.sum())} rows; "
            "give the distribution that the logged propensities belong to."
        )


def _normal_equations(
    weight: Float64[np.ndarray, "rows"],
    to_go: Float64[np.ndarray, "rows"],
    action: Int64[np.ndarray, "rows"],
    probs: Float64[np.ndarray, "rows actions"],
    behavior: Float64[np.ndarray, "rows actions"],
    columns: Float64[np.ndarray, "rows columns"],
) -> tuple[np.ndarray, np.ndarray]:
    """H and g such that coefficients' H coefficients - 2 g' coefficients is the objective of one group, up to a constant."""
    actions, width = probs.shape[1], columns.shape[1]
    ratio = np.divide(probs, behavior, out=np.zeros_like(probs), where=probs > 0)
    design = (probs[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    curvature = (-weight * design.T) @ design
    diagonal = curvature.reshape(actions, width, actions, width)
    each = np.arange(actions)
    diagonal[each, :, each, :] += np.einsum("r,ra,ri,rj->aij", weight, ratio * probs, columns, columns, optimize=True)
    taken = np.eye(actions)[action] * ratio
    slope = np.einsum("r,ra,rc->ac", weight * to_go, taken, columns, optimize=True).ravel()
    return curvature, slope - design.T @ (weight * to_go)


def mrdr(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    probs: Float64[np.ndarray, "rows actions"],
    behavior: Float64[np.ndarray, "rows actions"],
    basis: Basis,
    fold: Int64[np.ndarray, "episodes"],
    *,
    ridge: float = 0.0,
) -> Terms:
    """DR of every fold of episodes with the model that `fit` finds on all the other folds.

    Truncated episodes are to be completed first. Raises InputError when there are fewer than 2 folds.
    """
    labels = np.unique(fold)
    if len(labels) < 2:
        raise InputError("cross-fitting needs at least 2 folds of episodes.")
    q = np.zeros_like(probs)
    for label in labels:
        others = (fold != label) / (fold != label).sum()
        here = (fold == label)[episodes.episode_of_row]
        coefficients = fit(episodes, ratio, probs, behavior, basis, ridge=ridge, share=others)
        q[here] = basis.q_values(coefficients)[here]
    return dr(episodes, ratio, q[np.arange(episodes.n_rows), episodes.action], (probs * q).sum(1))
