"""Ratios of visits where the observation is not one category: minimax weight learning in closed form.

Weighted rows are visits of the policy exactly where what enters also leaves: for every function f,

    E[ sum_t gamma^t w_t (f(s_t, a_t) - discount_t f(s_{t+1}, pi)) ] = E[ f(s_0, pi) ].

Uehara, Huang & Jiang (2020), https://arxiv.org/abs/1910.12809, take the w for which the worst f of a ball violates this least;
with w and f linear in the same random features, the ball being that of their kernel, it solves linear equations. Where
propensities were logged, w = omega(s) ratio and f depends on the state alone: Liu, Li, Tang & Zhou (2018),
https://arxiv.org/abs/1810.12429. The penalty E[sum_t gamma^t (omega - 1)^2] is that of GenDICE, Zhang, Dai, Li & Schuurmans
(2020), https://arxiv.org/abs/2002.09072; without it the regularised forms of this family solve the same equations: Yang,
Nachum, Dai, Li & Schuurmans (2020), https://arxiv.org/abs/2007.03438.

Weights are only returned with two checks passed on the very rows that they are for; otherwise a sentence says why not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import stats

from offrl_models.logs.tally import zero_mean_z
from offrl_models.ope.flow import Features, Flow, block, chunks
from offrl_models.ope.minimax import solve
from offrl_models.ope.tabular import RATIO_LIMIT
from offrl_models.ope.units import entities_of, summed

FOURIER = 150  # random features to fit with
CHECKED = 50  # other random features to check with
LEVEL = 0.01  # probability with which weights that are right are refused
TOLERANCE = 0.005  # imbalance that counts as a standard error, in root mean squares of the function
NOISE = 0.5  # largest standard error of omega, root mean square
RESOLUTION = 0.2  # largest standard error of the mean weight with which it counts as checked


@dataclass(frozen=True)
class Checks:
    """How well weights balance on the rows that they are for. z-scores that the fitting error is part of."""

    mean: float  # of the weights, over what enters: 1 where they are right
    mean_error: float  # its standard error
    mean_z: float
    worst_z: float  # of what enters less what leaves, over the functions checked
    ratio_z: float  # of the logged ratios where the policy goes: 1 on average where the propensities are right
    noise: float  # standard error of omega, root mean square over the log that it was fitted to
    limit: float  # of every |z|, at which weights that are right are refused with probability `level` at most
    level: float
    functions: int


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of rows that passed their checks."""

    weight: Float64[np.ndarray, "rows"]
    omega: Float64[np.ndarray, "rows"]  # of the weight, without the ratio of the action
    checks: Checks


@dataclass(frozen=True)
class Refusal:
    """Why there are no weights, in one sentence."""

    reason: str
    checks: Checks


@dataclass(frozen=True, eq=False)
class FittedRatios:
    """A function omega, linear in features, that says how often a policy visits what the log shows once."""

    features: Features
    checked: Features  # other functions than those fitted with
    by_step: bool
    coefficients: Float64[np.ndarray, "functions"]
    covariance: Float64[np.ndarray, "functions functions"]  # of the coefficients, over logs like the one fitted to
    noise: float  # standard error of omega, root mean square over the log
    ridge: float  # in squares of the largest singular value

    def weights(self, flow: Flow, *, level: float = LEVEL) -> Weights | Refusal:
        """The weights of these rows, or a sentence that says why they cannot be trusted.

        omega is kept between 0 and RATIO_LIMIT, and what is left of it is checked. What enters has to leave: altogether,
        which is the mean weight, and in terms of every function checked; and the ratios that omega weighs have to average 1.
        Bonferroni's correction is over all of them. A standard error is at least TOLERANCE of the size of its function, since
        the ridge leaves an imbalance that is small, but not as small as what can be seen.
        """
        log = flow.episodes
        found = _balance(flow, self.features, self.coefficients, self.checked, by_step=self.by_step, limited=True)
        covariance = found.covariance + found.slope @ self.covariance @ found.slope.T
        altogether = np.tile(self.checked.constant, flow.here.shape[1])
        directions = np.vstack([altogether, np.eye(len(altogether))])
        missing = directions @ found.mean
        error = np.sqrt(((directions @ covariance) * directions).sum(1).clip(min=0.0))
        z = missing / np.hypot(error, TOLERANCE * np.append(1.0, np.where(found.size > 0, found.size, 1.0)))
        drift = summed(log.sum_per_episode(log.time_discount * found.omega * (flow.factor - 1.0)), entities_of(log))
        checks = Checks(
            mean=float(1.0 - missing[0]),
            mean_error=float(error[0]),
            mean_z=float(-z[0]),
            worst_z=float(max(z[1:], key=abs)),
            ratio_z=zero_mean_z(drift),
            noise=self.noise,
            limit=float(stats.norm.isf(level / 2 / (len(z) + 1))),
            level=level,
            functions=len(altogether),
        )
        reason = _objection(checks, log.n_episodes)
        return Weights(found.omega * flow.factor, found.omega, checks) if reason is None else Refusal(reason, checks)


def _objection(checks: Checks, episodes: int) -> str | None:
    if not checks.noise <= NOISE:
        return (
            f"the log tells how often the policy visits what it shows to a standard error of {checks.noise:.2f} times only, "
            f"and {NOISE} at most is allowed: it holds too little of where the policy goes."
        )
    if not abs(checks.ratio_z) <= checks.limit:
        return (
            f"the ratios do not average 1 where the policy goes (z = {checks.ratio_z:.1f}, and at most {checks.limit:.1f} is "
            "allowed): the logged propensities are not those of the policy that acted."
        )
    if not abs(checks.mean_z) <= checks.limit:
        return (
            f"the fitted weights have a mean of {checks.mean:.3f} instead of 1 (z = {checks.mean_z:.1f}, and at most "
            f"{checks.limit:.1f} is allowed): the policy's visits cannot be told from this log."
        )
    if not abs(checks.worst_z) <= checks.limit:
        return (
            f"the fitted weights are out of balance: in one of {checks.functions} functions of the observation, what enters "
            f"differs from what leaves by z = {checks.worst_z:.1f}, and at most {checks.limit:.1f} is allowed."
        )
    if not checks.mean_error <= RESOLUTION:
        return (
            f"{episodes} episodes tell the mean of the fitted weights to a standard error of {checks.mean_error:.2f} only, "
            f"and {RESOLUTION} at most counts as checked."
        )
    return None


def fit_ratios(
    flow: Flow,
    *,
    by_step: bool = False,
    fourier: int = FOURIER,
    ridge: float | None = None,
    seed: int = 0,
    share: Float64[np.ndarray, "episodes"] | None = None,
) -> FittedRatios:
    """The omega whose weighted rows balance best, and the ridge with which the folds left out balance best.

    Without `by_step` the process is taken to be the same at every step, and a truncated episode to go on. With it, omega
    depends on the step as well and a truncated episode ends: its reward is to be completed (`sequences.completed`), and
    only then has an undiscounted task that never terminates any weights. Each episode counts `share`, equally when left out
    and in the choice of the ridge.

    Raises InputError where the columns are not described, or there are fewer entities than folds.
    """
    log = flow.episodes
    counted = np.full(log.n_episodes, 1.0 / log.n_episodes) if share is None else share
    features = Features.fit(log, fourier=fourier, by_step=by_step, seed=seed)
    checked = Features.fit(log, fourier=CHECKED, by_step=by_step, seed=seed + 1)
    found = solve(flow, features, by_step=by_step, ridge=ridge, share=counted)
    spread = _balance(flow, features, found.coefficients, features, by_step=by_step, limited=False, share=counted)
    covariance = found.gain @ spread.covariance @ found.gain.T
    one = np.tile(features.constant, flow.here.shape[1])
    noise = float(np.sqrt((found.second * covariance).sum() / (one @ found.second @ one)))
    return FittedRatios(features, checked, by_step, found.coefficients, covariance, noise, found.ridge)


class _Balance(NamedTuple):
    """What enters less what leaves, in terms of some functions."""

    omega: Float64[np.ndarray, "rows"]
    mean: Float64[np.ndarray, "functions"]
    covariance: Float64[np.ndarray, "functions functions"]  # of the mean, over entities
    size: Float64[np.ndarray, "functions"]  # root mean squares of the functions over the rows
    slope: Float64[np.ndarray, "functions coefficients"]  # of what leaves


def _balance(
    flow: Flow,
    features: Features,
    coefficients: Float64[np.ndarray, "coefficients"],
    functions: Features,
    *,
    by_step: bool,
    limited: bool,
    share: Float64[np.ndarray, "episodes"] | None = None,
) -> _Balance:
    """The balance of the rows under omega, kept between 0 and RATIO_LIMIT where it is `limited`."""
    log, groups = flow.episodes, flow.here.shape[1]
    counted = np.full(log.n_episodes, 1.0 / log.n_episodes) if share is None else share
    m, k = functions.size * groups, len(coefficients)
    omega, mean, squares, second = np.empty(log.n_rows), np.zeros(m), np.zeros(m), np.zeros((m, m))
    unit = entities_of(log)
    totals = None if unit is None else np.zeros((int(unit.max()) + 1, m))
    slope, worth = np.zeros((m, k)), log.time_discount * counted[log.episode_of_row]
    for chosen in chunks(log, max(m, k)):
        mine = block(flow, features, by_step, chosen)
        theirs = mine if functions is features else block(flow, functions, by_step, chosen)
        raw = mine.basis @ coefficients
        omega[mine.rows] = np.clip(raw, 0.0, RATIO_LIMIT) if limited else raw
        free = omega[mine.rows] == raw
        departure = log.time_discount[mine.rows, None] * theirs.departure
        left = theirs.start - np.add.reduceat(omega[mine.rows, None] * departure, mine.first, axis=0)
        mean += counted[chosen] @ left
        if unit is None or totals is None:
            second += (counted[chosen, None] * left).T @ left
        else:
            np.add.at(totals, unit[chosen], counted[chosen, None] * left)
        squares += worth[mine.rows] @ np.square(theirs.basis)
        slope += ((free * worth[mine.rows])[:, None] * theirs.departure).T @ mine.basis
    covariance = (second - np.outer(mean, mean)) / log.n_episodes
    if unit is not None and totals is not None:  # an entity that is drawn several times counts as several
        share_of = np.bincount(unit, counted)
        times = share_of * log.n_episodes / np.bincount(unit)
        apart = (totals - np.outer(share_of, mean))[times > 0]
        covariance = (apart / times[times > 0, None]).T @ apart
    return _Balance(omega, mean, covariance, np.sqrt(squares / worth.sum()), slope)
