"""The direct method by a learned model: linear-Gaussian dynamics, or linear dynamics of features of any observation.

Both are fitted to single transitions and then followed by algebra, without rollouts. `bandit.dm` makes the estimate of the
values, and the doubly robust estimators correct them. Where the observation is one category, `tabular.TabularModel` is the
model. What a model gets wrong no interval of these estimates covers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from offrl_models.ope.flow import Features, Flow, block, chunks
from offrl_models.ope.sequences import finite
from offrl_models.ope.tabular import LONGEST_STAY
from offrl_models.ope.units import fold_of
from offrl_models.schema import Episodes, InputError

FOURIER = 150  # random features
RIDGES = np.logspace(-1, -10, 10)  # in units of the largest mean square of the features
FOLDS = 5
RANK = 1e-12  # of the largest singular value or mean square, under which a direction is taken not to exist


class Values(NamedTuple):
    """A policy's values in a model: of the logged action, of the observation, and past the end of truncated rows."""

    q: Float64[np.ndarray, "rows"]
    v: Float64[np.ndarray, "rows"]
    next_v: Float64[np.ndarray, "rows"]


@dataclass(frozen=True, eq=False)
class AffinePolicy:
    """a has mean gain @ [1, observation] and a covariance that is the same everywhere.

    A continuous action is itself; of a discrete one, a is the indicators of all codes but 0. There, a policy that looks at
    nothing is affine: its mean is p and its covariance diag(p) - p p'.
    """

    gain: Float64[np.ndarray, "dimensions seen"]
    covariance: Float64[np.ndarray, "dimensions dimensions"]


@dataclass(frozen=True, eq=False)
class LinearGaussianModel:
    """s' = dynamics' [1, s, a] + noise, reward [1, s, a]' R [1, s, a], and an end that strikes with a fixed probability.

    Episodes have at most `steps` decisions; None where nothing but the discount and the end bounds them.
    """

    dynamics: Float64[np.ndarray, "inputs columns"]
    noise: Float64[np.ndarray, "columns columns"]
    reward: Float64[np.ndarray, "inputs inputs"]
    discount: float  # gamma times the probability of going on
    steps: int | None

    @classmethod
    def fit(cls, episodes: Episodes, *, steps: int | None) -> "LinearGaussianModel":
        """Least squares on single transitions. What was observed where the task had ended is not used.

        Raises InputError for categories, missing numbers, decisions that are not equally far apart, longer episodes than
        `steps`, and where no row goes on.
        """
        _check(episodes, steps)
        inputs = _inputs(episodes, episodes.observation)
        onward = ~episodes.terminated
        if not onward.any():
            raise InputError("every episode ends with its first row, so that there are no dynamics to learn.")
        following = finite("the next observation", episodes.next_observation[onward].astype(np.float64))
        dynamics, *_ = np.linalg.lstsq(inputs[onward], following, rcond=RANK)
        error = following - inputs[onward] @ dynamics
        above, across = np.triu_indices(inputs.shape[1])
        squares = inputs[:, above] * inputs[:, across]
        coefficient, *_ = np.linalg.lstsq(squares, finite("the reward", episodes.reward), rcond=RANK)
        reward = np.zeros((inputs.shape[1],) * 2)
        reward[above, across] = coefficient
        may_go_on = episodes.step < (np.inf if steps is None else steps - 1)
        survival = 1.0 - float(episodes.terminated[may_go_on].mean()) if may_go_on.any() else 1.0
        covariance = error.T @ error / len(error)
        return cls(dynamics, covariance, (reward + reward.T) / 2, episodes.gamma * survival, steps)

    def values(self, episodes: Episodes, policy: AffinePolicy) -> Values:
        """Values in closed form: quadratic in the observation, by the policy-evaluation form of the Riccati recursion.

        Bertsekas, Dynamic Programming and Optimal Control I, section 3.1.

        Raises InputError where an endless horizon has no values, for longer episodes than `steps`, and as `fit` does.
        """
        _check(episodes, self.steps)
        q, v = self._quadratics(policy)
        left = np.zeros(episodes.n_rows, np.int64) if self.steps is None else self.steps - episodes.step
        inputs, width = _inputs(episodes, episodes.observation), 1 + episodes.observation.shape[1]
        ahead, cut = np.zeros(episodes.n_rows), episodes.truncated
        observed = finite("the final observation", episodes.next_observation[cut].astype(np.float64))
        past = np.column_stack([np.ones(len(observed)), observed])
        ahead[cut] = _squares(past, v, np.maximum(left[cut] - 1, 0))
        return Values(_squares(inputs, q, left), _squares(inputs[:, :width], v, left), ahead)

    def _quadratics(
        self, policy: AffinePolicy
    ) -> tuple[Float64[np.ndarray, "left inputs inputs"], Float64[np.ndarray, "left seen seen"]]:
        """Q and V as quadratic forms of [1, s, a] and [1, s], by how many decisions are left; one of each if endless."""
        d = self.dynamics.shape[1] + 1
        acting = np.vstack([np.eye(d), policy.gain])
        moving = np.vstack([np.eye(1, len(self.reward)), self.dynamics.T])
        if self.steps is None:
            v = self._endless(acting, moving, policy.covariance)
            return self._ahead(v, moving)[None], v[None]
        q, v = [np.zeros_like(self.reward)], [np.zeros((d, d))]
        for _ in range(self.steps):
            q.append(self._ahead(v[-1], moving))
            v.append(acting.T @ q[-1] @ acting + _corner(d, np.trace(q[-1][d:, d:] @ policy.covariance)))
        return np.stack(q), np.stack(v)

    def _ahead(
        self, v: Float64[np.ndarray, "seen seen"], moving: Float64[np.ndarray, "seen inputs"]
    ) -> Float64[np.ndarray, "inputs inputs"]:
        """Q of the value that the next observation has."""
        going_on = moving.T @ v @ moving + _corner(len(self.reward), np.trace(v[1:, 1:] @ self.noise))
        return self.reward + self.discount * going_on

    def _endless(
        self,
        acting: Float64[np.ndarray, "inputs seen"],
        moving: Float64[np.ndarray, "seen inputs"],
        covariance: Float64[np.ndarray, "dimensions dimensions"],
    ) -> Float64[np.ndarray, "seen seen"]:
        """The fixed point, by doubling: after k rounds 2^k decisions are counted. Only its corner depends on noise."""
        pace = np.sqrt(self.discount) * moving @ acting
        if np.abs(np.linalg.eigvals(pace)).max() >= 1.0 - 1e-9:
            raise InputError("the policy's values grow without bound in the model; say how many steps an episode has.")
        total = acting.T @ self.reward @ acting
        while np.abs(pace).max() > 1e-18:
            total, pace = total + pace.T @ total @ pace, pace @ pace
        q = self._ahead(total, moving)
        d = len(total)
        shaken = np.trace(q[d:, d:] @ covariance) + self.discount * np.trace(total[1:, 1:] @ self.noise)
        return total + _corner(d, shaken / (1.0 - self.discount))


def _corner(size: int, value: float) -> Float64[np.ndarray, "size size"]:
    """A constant as a quadratic form."""
    form = np.zeros((size, size))
    form[0, 0] = value
    return form


def _squares(
    vector: Float64[np.ndarray, "rows n"], form: Float64[np.ndarray, "forms n n"], which: Int64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "rows"]:
    """x' F x of every row, with the form that it names."""
    found = np.empty(len(vector))
    for number in np.unique(which):
        here = which == number
        found[here] = (vector[here] @ form[number] * vector[here]).sum(1)
    return found


def _check(episodes: Episodes, steps: int | None) -> None:
    categories = [feature.name for feature in episodes.features if feature.categories is not None]
    if categories:
        raise InputError(f"column {categories[0]} holds categories, of which there are no linear dynamics.")
    if episodes.interval is not None:
        raise InputError("decisions are not equally far apart, and the model has one discount for all of them.")
    if steps is not None and int(episodes.length.max()) > steps:
        longer = int((episodes.length > steps).sum())
        raise InputError(f"{longer} episodes have more than the {steps} steps of the model.")


def _inputs(episodes: Episodes, observation: Float[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "rows inputs"]:
    """[1, s, a] of every row."""
    action = episodes.action if episodes.action.ndim > 1 else np.eye(episodes.n_actions)[episodes.action][:, 1:]
    found = np.column_stack([np.ones(len(action)), observation.astype(np.float64), action.astype(np.float64)])
    return finite("the observation", found)


@dataclass(frozen=True, eq=False)
class FeatureModel:
    """Linear dynamics of features phi: discounted phi(s', pi) has mean phi(s, a)' dynamics, and the reward phi(s, a)' reward.

    The policy is part of the model, so that any policy's values are linear in the features, after any number of steps. With an
    endless horizon they are those of least-squares temporal differences and of linear FQE: Parr, Li, Taylor,
    Painter-Wakefield & Littman (2008); Duan, Jia & Wang (2020), https://arxiv.org/abs/2002.09516.
    """

    features: Features
    by_step: bool
    dynamics: Float64[np.ndarray, "functions functions"]
    reward: Float64[np.ndarray, "functions"]

    @classmethod
    def fit(
        cls, flow: Flow, *, by_step: bool = False, fourier: int = FOURIER, ridge: float | None = None, seed: int = 0
    ) -> "FeatureModel":
        """Ridge regression on single transitions, with the ridge that predicts the folds left out best.

        `flow` is by state and action (`Flow.by_state_action`). With `by_step` the step is a feature, and a truncated episode
        ends; its reward is to be completed.

        Raises InputError where the columns are not described, or there are fewer entities than folds.
        """
        log = flow.episodes
        features = Features.fit(log, fourier=fourier, by_step=by_step, seed=seed)
        fold = fold_of(log, FOLDS) if ridge is None else np.zeros(log.n_episodes, np.int64)
        sums = _sums(flow, features, by_step, fold)
        chosen = float(RIDGES[np.argmin(_errors(sums))]) if ridge is None else ridge
        dynamics, reward = _regression(_Sums._make(each.sum(0) for each in sums), chosen)
        return cls(features, by_step, dynamics, reward)

    def coefficients(self, steps: int | None = None) -> Float64[np.ndarray, "functions"]:
        """Of the action values with so many decisions left; None is an endless horizon.

        Raises InputError where an endless horizon has no values in the model.
        """
        if steps is not None:
            value = np.zeros_like(self.reward)
            for _ in range(steps):
                value = self.reward + self.dynamics @ value
            return value
        if np.abs(np.linalg.eigvals(self.dynamics)).max() >= 1.0 - 1.0 / LONGEST_STAY:
            raise InputError("the policy's values grow without bound in the model; say how many steps are left.")
        return np.linalg.solve(np.eye(len(self.reward)) - self.dynamics, self.reward)

    def values(self, flow: Flow, steps: int | None = None) -> Values:
        """Values of every row of other episodes, with `steps` decisions left at each of them."""
        log, coefficient = flow.episodes, self.coefficients(steps)
        q, ahead, v = np.empty(log.n_rows), np.empty(log.n_rows), np.empty(log.n_rows)
        for chosen in chunks(log, len(coefficient)):
            part = block(flow, self.features, self.by_step, chosen)
            q[part.rows] = part.basis @ coefficient
            ahead[part.rows] = part.onward @ coefficient
            v[part.rows][1:] = ahead[part.rows][:-1]
            v[part.rows][part.first] = part.start @ coefficient
        return Values(q, v, np.where(log.truncated, ahead, 0.0))


class _Sums(NamedTuple):
    """Sums over rows of squares and products: of the features here, those that follow, and the reward."""

    second: Float64[np.ndarray, "*folds functions functions"]
    onward: Float64[np.ndarray, "*folds functions functions"]
    reward: Float64[np.ndarray, "*folds functions"]
    squares: Float64[np.ndarray, "*folds 2"]  # of what is to be predicted: the features that follow, and the reward


def _sums(flow: Flow, features: Features, by_step: bool, fold: Int64[np.ndarray, "episodes"]) -> _Sums:
    log, k = flow.episodes, features.size * flow.here.shape[1]
    reward = finite("the reward", log.reward)
    sums = [_Sums(np.zeros((k, k)), np.zeros((k, k)), np.zeros(k), np.zeros(2)) for _ in range(int(fold.max()) + 1)]
    for chosen in chunks(log, k):
        part = block(flow, features, by_step, chosen)
        for number, total in enumerate(sums):
            rows = np.flatnonzero(fold[log.episode_of_row[part.rows]] == number)
            basis, earned = part.basis[rows], reward[part.rows][rows]
            ahead = log.discount[part.rows][rows, None] * part.onward[rows]
            total.second[:] += basis.T @ basis
            total.onward[:] += basis.T @ ahead
            total.reward[:] += earned @ basis
            total.squares[:] += np.square(ahead).sum(), np.square(earned).sum()
    return _Sums._make(np.stack(each) for each in zip(*sums, strict=True))


def _regression(
    sums: _Sums, ridge: float
) -> tuple[Float64[np.ndarray, "functions functions"], Float64[np.ndarray, "functions"]]:
    """Dynamics and reward. Directions that the log does not know predict 0."""
    values, vectors = np.linalg.eigh(sums.second)
    known = values > RANK * values[-1]
    solve = vectors[:, known] / (values[known] + ridge * values[-1]) @ vectors[:, known].T
    return solve @ sums.onward, solve @ sums.reward


def _errors(sums: _Sums) -> Float64[np.ndarray, "ridges"]:
    """Squared errors in the folds left out, of features and reward, each over what there was to predict; by ridge."""
    found = np.zeros(len(RIDGES))
    total = sums.squares.sum(0)
    for number in range(len(sums.reward)):
        mine = _Sums._make(each[number] for each in sums)
        others = _Sums._make(each.sum(0) - each[number] for each in sums)
        for place, ridge in enumerate(RIDGES):
            dynamics, reward = _regression(others, ridge)
            ahead = ((mine.second @ dynamics - 2 * mine.onward) * dynamics).sum()
            earned = (mine.second @ reward - 2 * mine.reward) @ reward
            found[place] += ahead / max(total[0], 1e-300) + earned / max(total[1], 1e-300)
    return found
