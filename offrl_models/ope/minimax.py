"""Minimax weight learning in closed form: the coefficients of omega, and the ridge that they are fitted with.

In terms of features phi, what omega = phi'c leaves out of balance is start - system c, one number per function. The worst
function of a ball is the norm of that; minimizing its square is least squares. Uehara, Huang & Jiang (2020), section 4,
https://arxiv.org/abs/1910.12809. The ball is of functions whose mean square over the log is at most 1, rounded off by
the norm of the kernel, without which directions that the log hardly knows would count as much as any.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.ope.flow import Features, Flow, block, chunks
from offrl_models.ope.tabular import RATIO_LIMIT
from offrl_models.ope.units import fold_of

ROUNDING = 1e-3  # of the ball, in units of the largest mean square
RIDGES = np.logspace(1, -10, 12)  # in squares of the largest singular value
UNDERSMOOTHED = 0.1  # of the ridge that balances best is used: its bias is then small beside the noise
FOLDS = 3  # few, so that what is left out of balance in each is seen above its noise
RANK = 1e-12  # of the largest eigenvalue or singular value, under which a direction is taken not to exist


@dataclass(frozen=True, eq=False)
class Solution:
    """Coefficients of omega, how they answer to what is out of balance, and the ridge."""

    second: Float64[np.ndarray, "functions functions"]  # mean squares and products of the functions over the log
    coefficients: Float64[np.ndarray, "functions"]
    gain: Float64[np.ndarray, "functions functions"]
    ridge: float


def solve(
    flow: Flow,
    features: Features,
    *,
    by_step: bool,
    ridge: float | None,
    share: Float64[np.ndarray, "episodes"],
) -> Solution:
    """The minimizer of |start - system c|^2 + ridge E[sum_t gamma^t (omega - 1)^2], with each episode counted by its share.

    Where no ridge is given, it is UNDERSMOOTHED times the one under which folds that were not fitted to are least out of
    balance.
    Raises InputError where there are fewer entities than folds.
    """
    fold = fold_of(flow.episodes, FOLDS) if ridge is None else np.zeros(flow.episodes.n_episodes, np.int64)
    moments = _moments(flow, features, by_step, share, fold)
    whole = _mean(moments)
    ball = _ball(whole.second)
    path = _Path.of(whole, ball)
    if ridge is None:
        left_out = [_Path.of(_mean(moments, without=number), ball) for number in range(FOLDS)]
        chosen = np.stack([[each.coefficients(value) for value in RIDGES] for each in left_out])
        best = RIDGES[np.argmin(_violations(flow, features, by_step, chosen, fold, ball))]
        ridge = float(UNDERSMOOTHED * best)
    return Solution(whole.second, path.coefficients(ridge), path.gain(ridge), ridge)


class _Moments(NamedTuple):
    """Means over the log: of departures times basis, of starts, of the basis squared and of itself; and what they count."""

    system: Float64[np.ndarray, "*folds functions functions"]
    start: Float64[np.ndarray, "*folds functions"]
    second: Float64[np.ndarray, "*folds functions functions"]
    first: Float64[np.ndarray, "*folds functions"]
    share: Float64[np.ndarray, "*folds"]


def _moments(
    flow: Flow,
    features: Features,
    by_step: bool,
    share: Float64[np.ndarray, "episodes"],
    fold: Int64[np.ndarray, "episodes"],
) -> _Moments:
    """The sums of every fold, counted by share."""
    log, k = flow.episodes, features.size * flow.here.shape[1]
    worth = log.time_discount * share[log.episode_of_row]
    folds = range(int(fold.max()) + 1)
    sums = [_Moments(np.zeros((k, k)), np.zeros(k), np.zeros((k, k)), np.zeros(k), np.zeros(())) for _ in folds]
    for chosen in chunks(log, k):
        part = block(flow, features, by_step, chosen)
        for number, total in enumerate(sums):
            mine = fold[chosen] == number
            rows = np.flatnonzero(fold[log.episode_of_row[part.rows]] == number)
            basis, counted = part.basis[rows], worth[part.rows][rows, None]
            total.system[:] += (counted * part.departure[rows]).T @ basis
            total.second[:] += (counted * basis).T @ basis
            total.first[:] += (counted * basis).sum(0)
            total.start[:] += share[chosen][mine] @ part.start[mine]
            total.share[...] += share[chosen][mine].sum()
    return _Moments._make(np.stack(each) for each in zip(*sums, strict=True))


def _mean(moments: _Moments, without: int | None = None) -> _Moments:
    """Means over all folds, or all but one."""
    kept = np.arange(len(moments.share)) != without
    share = moments.share[kept].sum()
    return _Moments._make([*(each[kept].sum(0) / share for each in moments[:4]), share])


def _ball(second: Float64[np.ndarray, "functions functions"]) -> Float64[np.ndarray, "functions functions"]:
    """What turns functions into coordinates in which the ball is round."""
    values, vectors = np.linalg.eigh(second)
    return (vectors / np.sqrt(values.clip(min=0.0) + ROUNDING * values[-1])).T


@dataclass(frozen=True, eq=False)
class _Path:
    """The minimizers for all ridges at once."""

    anchor: Float64[np.ndarray, "functions"]  # what they come to as the ridge grows: omega = 1
    into: Float64[np.ndarray, "functions rank"]
    singular: Float64[np.ndarray, "rank"]
    out: Float64[np.ndarray, "rank functions"]
    missing: Float64[np.ndarray, "functions"]  # what the anchor leaves out of balance

    @classmethod
    def of(cls, means: _Moments, ball: Float64[np.ndarray, "functions functions"]) -> "_Path":
        """By the singular values of the system, in coordinates in which ball and penalty are round."""
        values, vectors = np.linalg.eigh(means.second)
        seen = values > RANK * values[-1]
        white = vectors[:, seen] / np.sqrt(values[seen])
        anchor = white @ (white.T @ means.first)
        left, singular, right = np.linalg.svd(ball @ means.system @ white, full_matrices=False)
        kept = singular > RANK * singular[0]
        out = left[:, kept].T @ ball
        return cls(anchor, white @ right[kept].T, singular[kept], out, means.start - means.system @ anchor)

    def gain(self, ridge: float) -> Float64[np.ndarray, "functions functions"]:
        """How the coefficients answer to what is missing."""
        return (self.into * (self.singular / (self.singular**2 + ridge * self.singular[0] ** 2))) @ self.out

    def coefficients(self, ridge: float) -> Float64[np.ndarray, "functions"]:
        return self.anchor + self.gain(ridge) @ self.missing


def _violations(
    flow: Flow,
    features: Features,
    by_step: bool,
    coefficients: Float64[np.ndarray, "folds ridges functions"],
    fold: Int64[np.ndarray, "episodes"],
    ball: Float64[np.ndarray, "functions functions"],
) -> Float64[np.ndarray, "ridges"]:
    """Squared imbalance of each fold under the coefficients that were fitted without it, by ridge, summed over folds.

    Over pairs of different episodes, so that its expectation has no part of the noise of the fold itself, which would
    speak for small weights.
    """
    log, (folds, ridges, k) = flow.episodes, coefficients.shape
    total, squares = np.zeros((ridges, folds, k)), np.zeros((ridges, folds))
    for chosen in chunks(log, k):
        part = block(flow, features, by_step, chosen)
        member = (np.arange(folds)[:, None] == fold[chosen]).astype(np.float64)
        omega = np.empty((len(part.basis), ridges))
        for number, mine in enumerate(coefficients):
            rows = fold[log.episode_of_row[part.rows]] == number
            omega[rows] = np.clip(part.basis[rows] @ mine.T, 0.0, RATIO_LIMIT)
        departure, start = log.time_discount[part.rows, None] * part.departure @ ball.T, part.start @ ball.T
        for place in range(ridges):
            left = start - np.add.reduceat(omega[:, place, None] * departure, part.first, axis=0)
            total[place] += member @ left
            squares[place] += member @ np.square(left).sum(1)
    n = np.bincount(fold, minlength=folds)
    return ((np.square(total).sum(2) - squares) / (n * (n - 1.0))).sum(1)
