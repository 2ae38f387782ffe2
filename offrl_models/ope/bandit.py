"""What horizon 1 adds to the sequential estimators: the direct method, logarithmic smoothing, and logs of several policies.

A bandit log is a set of episodes of one row. There IPW is `tis`, SNIPW is `wis`, and DR and its self-normalised form are
`dr` and `wdr`. Where several policies logged the data, IPW with each row's own propensity is the naive estimator of
Agarwal, Basu, Schnabel & Joachims (2017), https://arxiv.org/abs/1703.06180; `balanced` and `weighted` are the other two.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.ope.doubly_robust import dr, wdr
from offrl_models.ope.eprocess import gains
from offrl_models.ope.importance import Terms, tis, wis
from offrl_models.ope.sequences import finite
from offrl_models.schema import Episodes, InputError


def _one_step(episodes: Episodes) -> None:
    longer = int((episodes.length > 1).sum())
    if longer:
        raise InputError(f"{longer} episodes have more than one step; this estimator is for bandit logs.")


def dm(episodes: Episodes, v: Float64[np.ndarray, "rows"]) -> Terms:
    """The direct method: mean of v(s_0), the modelled value of each episode's first observation."""
    finite("the state value", v)
    return Terms((v if episodes.n_rows == episodes.n_episodes else v[episodes.offsets[:-1]])[:, None])


def bandit_terms(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    *,
    low: float,
    high: float,
) -> dict[str, Terms]:
    """Every estimator of a bandit log by the name it has there; rewards lie between `low` and `high`.

    Raises InputError for longer episodes, and for rewards under `low`.
    """
    _one_step(episodes)
    return {
        "IPW": tis(episodes, ratio),
        "SNIPW": wis(episodes, ratio),
        "DM": dm(episodes, v),
        "DR": dr(episodes, ratio, q, v),
        "SNDR": wdr(episodes, ratio, q, v),
        "LS": logarithmic_smoothing(episodes, ratio, low=low, high=high),
    }


def _smoothing(episodes: Episodes, low: float, high: float | None, smoothing: float | None) -> float:
    chosen = smoothing
    if chosen is None:
        if high is None or not low < high:
            raise InputError(
                f"smoothing is by one over a reward: give it, or the highest reward that can occur, above {low}."
            )
        chosen = 1.0 / (math.sqrt(episodes.n_episodes) * (high - low))
    if not 0 < chosen < math.inf:
        raise InputError(f"the smoothing must be positive and finite, not {chosen}.")
    return chosen


def logarithmic_smoothing(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    *,
    low: float,
    high: float | None = None,
    smoothing: float | None = None,
) -> Terms:
    """low + mean of log(1 + lambda w (r - low)) / lambda: IPW whose large terms grow like their logarithm only.

    Sakhi, Aouali, Alquier & Chopin (2024), https://arxiv.org/abs/2405.14335. The paper speaks of a risk, with costs c in
    [-1, 0] and terms -log(1 - lambda w c) / lambda; a reward in [0, 1] is r = -c, so this is minus the paper's estimator.
    `low` is the lowest reward that can occur, from the contract; without it, a shift of all rewards would change the
    smoothing. `smoothing` (lambda) is 1 / (sqrt(n) (high - low)) when left out, the paper's choice; towards 0 the estimate
    becomes IPW.
    The estimate is biased towards `low`.

    Raises InputError for episodes of several steps, rewards under `low`, and a smoothing that is not positive or, with `high`,
    left out.
    """
    _one_step(episodes)
    scale = _smoothing(episodes, low, high, smoothing)
    gain = finite("the reward", episodes.reward - low)
    if (gain < 0).any():
        raise InputError(f"{int((gain < 0).sum())} rewards lie under {low}, the lowest one that was said to occur.")
    return Terms(low + np.log1p(scale * finite("the ratio", ratio) * gain)[:, None] / scale)


def logarithmic_smoothing_lower_bound(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    *,
    low: float,
    high: float | None = None,
    alpha: float,
    smoothing: float | None = None,
) -> float:
    """A lower bound of the policy's value that fails with probability `alpha` at most, for any n and any tail of the weights.

    low + (exp(lambda (LS - low) - log(1 / alpha) / n) - 1) / lambda, at least `low`: minus the paper's upper bound
    of the risk. It is Markov's inequality for prod_i (1 + lambda w_i (r_i - low)), whose mean is
    (1 + lambda (V - low))^n. It needs independent episodes, the true propensities, and a `smoothing` that was chosen
    without these data.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, not {alpha}.")
    scale = _smoothing(episodes, low, high, smoothing)
    smoothed = logarithmic_smoothing(episodes, ratio, low=low, smoothing=scale).estimate() - low
    return low + max(_by_markov(scale * smoothed, episodes.n_episodes, alpha) / scale, 0.0)


def _by_markov(log_growth: float, n: int, alpha: float) -> float:
    """The least mean of lambda Y for which prod_i (1 + lambda Y_i), of this log per episode, is no surprise at `alpha`."""
    return math.expm1(log_growth + math.log(alpha) / n)


def smoothed_gain(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], reward_range: tuple[float, float], *, alpha: float
) -> float:
    """The lower bound of logarithmic smoothing for V(policy) - V(behavior), in units of reward, at most `alpha` of the time wrong.

    The same inequality for Y_i = (w_i - 1) G_i >= -1, G being the reward scaled to [0, 1] (`eprocess.gains`), with lambda =
    1 / sqrt(n): (exp(mean of log(1 + lambda Y_i) - log(1 / alpha) / n) - 1) / lambda. It holds for this number of episodes, any
    tail of the weights, and needs no model.

    Raises InputError for episodes of several steps, rewards outside their range, and an alpha that is not between 0 and 1.
    """
    _one_step(episodes)
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, not {alpha}.")
    low, high = reward_range
    scale = _smoothing(episodes, 0.0, 1.0, None) if episodes.n_episodes > 1 else 0.5
    growth = float(np.log1p(scale * gains(ratio, episodes.reward, reward_range)).mean())
    return (high - low) * _by_markov(growth, episodes.n_episodes, alpha) / scale


def _counts(logger: Int64[np.ndarray, "episodes"], loggers: int) -> Int64[np.ndarray, "loggers"]:
    unknown = int(((logger < 0) | (logger >= loggers)).sum())
    if unknown:
        raise InputError(f"{unknown} episodes name a logging policy outside 0 to {loggers - 1}.")
    return np.bincount(logger, minlength=loggers)


def balanced(
    episodes: Episodes, logger: Int64[np.ndarray, "episodes"], logger_probs: Float64[np.ndarray, "rows loggers"]
) -> Episodes:
    """The log as if the mixture of its logging policies had drawn every row: `action_prob` is the mixture's propensity.

    `logger` says which policy logged each row, `logger_probs` what probability each of them gives to the logged action; the
    mixture counts each policy by its share of the rows. Ratios made from these episodes are those of the balanced
    estimator of Agarwal et al. (2017), the balance heuristic of Veach & Guibas (1995); any estimator of a bandit log can
    use them. IPW then has no more variance than with the row's own propensity, and it is enough that one of the policies
    takes each action.

    Raises InputError for episodes of several steps, whose mixture is not one of single steps, and where
    `logger_probs` is no probability or contradicts the logged propensity.
    """
    _one_step(episodes)
    share = _counts(logger, logger_probs.shape[1]) / episodes.n_episodes
    if (finite("a logging policy's probability", logger_probs) < 0).any():
        raise InputError(f"a logging policy's probability is negative in {int((logger_probs < 0).any(1).sum())} rows.")
    own = logger_probs[np.arange(episodes.n_rows), logger]
    differs = ~np.isclose(own, episodes.action_prob, rtol=1e-5, atol=0.0)
    if differs.any():
        raise InputError(
            f"in {int(differs.sum())} rows the logged propensity is not the one of the policy that is said to have logged "
            "the row; check the order of the logging policies."
        )
    return dataclasses.replace(episodes, action_prob=logger_probs @ share)


def _per_episode(terms: Terms) -> Float64[np.ndarray, "episodes"]:
    if terms.denominator is not None:
        raise InputError("a self-normalised estimator has no terms per logging policy; use an unbiased one.")
    return terms.numerator.sum(1)


def logger_variances(terms: Terms, logger: Int64[np.ndarray, "episodes"]) -> Float64[np.ndarray, "loggers"]:
    """Sample variance of an estimator's terms among the episodes of each logging policy: the divergence of Agarwal et al.

    Raises InputError where a policy logged fewer than 2 episodes, or terms that are all equal: there is nothing to learn
    a variance from.
    """
    values, count = _per_episode(terms), _counts(logger, int(logger.max()) + 1)
    if count.min() < 2:
        raise InputError(f"logging policy {int(count.argmin())} has {count.min()} episodes; a variance needs 2.")
    mean = np.bincount(logger, values) / count
    variance = np.bincount(logger, np.square(values - mean[logger])) / (count - 1)
    if variance.min() <= 0:
        raise InputError(f"all terms of logging policy {int(variance.argmin())} are equal; state its variance instead.")
    return variance


def weighted(terms: Terms, logger: Int64[np.ndarray, "episodes"], variance: Float64[np.ndarray, "loggers"]) -> Terms:
    """The mean of each logging policy's own estimate, weighted by its precision: number of episodes over `variance`.

    The weighted estimator of Agarwal et al. (2017), for any estimator that is a mean over episodes (IPW, DR). With the true
    variances, or with ones from other data, it is unbiased; with `logger_variances` of the same data the weights are
    estimates, and resamples keep them. A policy that a resample leaves out leaves no estimate.

    Raises InputError for a self-normalised estimator, a policy without episodes and a variance that is not positive.
    """
    values, count = _per_episode(terms), _counts(logger, len(variance))
    if count.min() < 1:
        raise InputError(f"logging policy {int(count.argmin())} has no episodes; leave it out.")
    if not (finite("the variance", variance) > 0).all():
        raise InputError(f"the variance of logging policy {int(variance.argmin())} is not positive.")
    precision = count / variance
    logged_by = (logger[:, None] == np.arange(len(variance))).astype(np.float64)
    return Terms(values[:, None] * logged_by * (precision / precision.sum()), logged_by)
