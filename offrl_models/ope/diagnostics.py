"""How much an off-policy estimate can be believed: effective sample sizes, tails, balance, agreement, hidden confounding."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from scipy import optimize, special, stats

from offrl_models.logs.tally import ROUNDED, zero_mean_z
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval
from offrl_models.ope.sequences import finite, weights_by_step
from offrl_models.ope.units import Units, summed
from offrl_models.schema import Episodes, InputError

FEWEST_IN_TAIL = 5  # values that a distribution can be fitted to
LARGEST_ODDS = 1e6  # odds ratio beyond which nothing hidden is thought to change the sign


def effective_sample_size(weight: Float64[np.ndarray, "n"]) -> float:
    """(sum w)^2 / sum w^2: how many equal weights would carry as much. Kong (1992). 0 when all weights are 0.

    Beside infinite weights the others are nothing. Raises InputError for NaN.
    """
    top = weight.max(initial=0.0)
    if not np.isfinite(top):
        finite("the weight", np.where(np.isinf(weight), 0.0, weight))
        return float(np.isinf(weight).sum())
    unit = weight / top if top > 0 else weight  # so that no square overflows or vanishes
    return float(unit.sum() ** 2 / np.square(unit).sum()) if top > 0 else 0.0


def effective_sample_size_by_step(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "steps"]:
    """The effective sample size of the weights up to and including each step: how far the log reaches into the future."""
    return np.array([effective_sample_size(weight) for weight in weights_by_step(episodes, ratio).T])


def effective_sample_size_by_group(
    weight: Float64[np.ndarray, "n"], label: Shaped[np.ndarray, "n"]
) -> dict[str, float]:
    """The effective sample size within each subgroup, of trajectory weights by episode or of marginal ones by row."""
    return {str(group): effective_sample_size(weight[label == group]) for group in np.unique(label)}


def largest_share(values: Float64[np.ndarray, "n"]) -> float:
    """What the largest of some values, in size, contributes to the sum of all sizes; 0 where all are 0."""
    size = np.abs(finite("the values", values))
    return float(size.max() / size.sum()) if size.any() else 0.0


def pareto_k(weight: Float64[np.ndarray, "n"]) -> float:
    """Shape of the generalized Pareto distribution of the largest weights: their moments of order 1/k and above are infinite.

    The tail is the min(n / 5, 3 sqrt(n)) largest weights, and the estimate is drawn towards 0.5 as by 10 further weights there:
    Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling", https://arxiv.org/abs/1507.02646.
    -inf where the largest weights are all equal, and inf where fewer than 5 stand out, which show nothing about a tail.
    """
    n, ordered = len(weight), np.sort(finite("the weight", weight))
    tail = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    excess = ordered[-tail:] - ordered[max(n - tail - 1, 0)]
    excess = excess[excess > 1e-12 * ordered[-1]]  # products of equal ratios differ by rounding
    if len(excess) < FEWEST_IN_TAIL:
        return math.inf if len(excess) else -math.inf
    return (generalized_pareto_shape(excess) * len(excess) + 0.5 * 10) / (len(excess) + 10)


def pareto_k_limit(n: int) -> float:
    """The k up to which n weights can be relied on, in the paper named above: min(1 - 1 / log10(n), 0.7)."""
    return min(1 - 1 / math.log10(n), 0.7) if n > 1 else -math.inf


def generalized_pareto_shape(excess: Float64[np.ndarray, "n"]) -> float:
    """Shape of the generalized Pareto distribution of sorted positive values: the posterior mean over a grid.

    Zhang & Stephens (2009), "A new and efficient estimation method for the generalized Pareto distribution", with the sign of
    the shape turned and 10 more points on the grid, as in Pareto smoothed importance sampling.
    """
    n = len(excess)
    points = 30 + math.isqrt(n)
    quartile = excess[math.floor(n / 4 + 0.5) - 1]
    position = np.arange(1, points + 1) - 0.5
    theta = 1 / excess[-1] + (1 - np.sqrt(points / position)) / (3 * quartile)
    shape = np.log1p(-np.multiply.outer(theta, excess)).mean(1)
    log_likelihood = n * (np.log(-theta / shape) - shape - 1)
    return float(np.log1p(-(special.softmax(log_likelihood) @ theta) * excess).mean())


def clip_sensitivity(
    terms_of: Callable[[Float64[np.ndarray, "n"]], Terms], weight: Float64[np.ndarray, "n"], clips: Sequence[float]
) -> Float64[np.ndarray, "clips"]:
    """The estimate with weights, of rows or of episodes, clipped at each of some limits.

    One that hangs on the limit hangs on the tail of the weights. Ionides (2008), "Truncated importance sampling".
    """
    return np.array([terms_of(np.minimum(weight, clip)).estimate() for clip in clips])


@dataclass(frozen=True)
class Gap:
    """Two estimates of the same value, and how many standard errors lie between them."""

    standardized: float
    first: str
    second: str


def largest_gap(intervals: Mapping[str, Interval]) -> Gap:
    """The two estimators that agree the least. Standard errors are read off the intervals, as if they were normal.

    They are added as if the two were independent. On the same episodes they mostly rise and fall together, so that a gap of 2
    is more than it seems. NaN where an estimator has no estimate. Raises InputError for fewer than two estimators.
    """
    if len(intervals) < 2:
        raise InputError(f"agreement is between at least 2 estimators, not {len(intervals)}.")
    gaps = []
    for (first, a), (second, b) in combinations(intervals.items(), 2):
        errors = [(i.high - i.low) / (2 * stats.norm.ppf((1 + i.level) / 2)) for i in (a, b)]
        apart, error = abs(a.estimate - b.estimate), math.hypot(*errors)
        gaps.append(Gap(float(apart / error) if error else (math.inf if apart else 0.0), first, second))
    return max(gaps, key=lambda gap: (math.isnan(gap.standardized), gap.standardized))


def imbalance(
    episodes: Episodes,
    weight: Float64[np.ndarray, "rows"],
    initial: Float64[np.ndarray, "episodes features"],
    features: Float64[np.ndarray, "rows features"],
    next_features: Float64[np.ndarray, "rows features"],
) -> Float64[np.ndarray, "episodes features"]:
    """Per episode f_0 + sum_t gamma^t w_t (gamma f' - f): weighted visits less starts and arrivals, 0 on average for any f.

    That is so if w_t is the visits under the policy over the rows of the log. f is of the state, or of state and action with
    f_0 and f' averaged over the policy's actions. Uehara, Huang & Jiang (2020), https://arxiv.org/abs/1910.12809.
    """
    flow = episodes.discount[:, None] * next_features - features
    return initial + episodes.sum_per_episode((episodes.time_discount * weight)[:, None] * flow)


def balance_z(left: Float64[np.ndarray, "episodes features"]) -> Float64[np.ndarray, "features"]:
    """z-scores of the `imbalance` of weights that were fitted on other episodes, one for each feature."""
    return np.array([zero_mean_z(column) for column in finite("the imbalance", left).T])


def mean_ratio_z(ratio: Float64[np.ndarray, "rows"]) -> float:
    """z-score of the mean ratio against 1, its expectation when the logged propensities are right, but for their rounding.

    The errors are martingale differences, so their variances add over rows.
    """
    return zero_mean_z(ratio - 1.0, ROUNDED)


def without_most_influential(minuend: Terms, subtrahend: Terms, share: float = 0.005) -> float:
    """The difference of two estimates without the episodes that pull it most in its own direction.

    `share` of the episodes are left out, at least one. Broderick, Giordano & Meager (2020), https://arxiv.org/abs/2011.14999.
    """
    n = minuend.episodes
    dropped = max(math.ceil(share * n), 1)
    if dropped >= n:
        return math.nan
    sign = 1.0 if minuend.estimate() >= subtrahend.estimate() else -1.0
    kept = np.argsort(sign * (minuend.influence() - subtrahend.influence()), kind="stable")[: n - dropped]
    weight = np.zeros(n)
    weight[kept] = 1.0 / len(kept)
    return minuend.estimate(weight) - subtrahend.estimate(weight)


def worst_action_z(
    action: Int64[np.ndarray, "rows"],
    ratio: Float64[np.ndarray, "rows"],
    probs: Float64[np.ndarray, "rows actions"],
    draws: int | None = None,
) -> float:
    """The mean-ratio test of each single action, or range of them: 1(a_t = a) ratio - pi(a|s_t) has mean 0. The z-score
    furthest from 0.

    The variance is the larger one of two: that of the errors, and that which is expected of an action of this ratio when the
    propensities are right. By the first alone, an action that happens to be seen too rarely looks certain to be too rare.
    Where `probs` are shares of so many draws in each row, the variance of their sum is added, as if one more had been drawn.
    """
    typical = np.square(ratio).sum() / max(ratio.sum(), 1e-12)  # what the ratio is where the policy acts
    scores = []
    for each in range(probs.shape[1]):
        seen, expected = np.where(action == each, ratio, 0.0), probs[:, each]
        error = seen - expected
        usual = (np.square(seen).sum() + typical) / (seen.sum() + 1.0)  # as if seen once more, with the typical ratio
        variance = max(len(error) * error.var(), usual * expected.sum() - np.square(expected).sum())
        variance += (expected.sum() * draws + 1.0) / draws**2 if draws else 0.0
        spread = max(np.sqrt(variance), ROUNDED * max(seen.sum(), expected.sum()))
        scores.append(0.0 if abs(error.mean()) <= 1e-12 else error.sum() / spread)
    return float(max(scores, key=abs))


def confounded_bounds(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], odds_ratio: float) -> tuple[float, float]:
    """Least and greatest self-normalised estimate (WIS) that hidden confounding of a given strength could have turned out.

    The marginal sensitivity model at every step: given all that was observed and all that was not, the odds of the logged action
    are within a factor `odds_ratio` of those of its logged propensity mu. Then 1 / mu may be anything from 1 + (1/mu - 1) / Gamma
    to 1 + (1/mu - 1) Gamma, and the weight of an episode anything between the products of pi times these ends. Over that box
    the bounds are sharp: Zhao, Small & Bhattacharya (2019), https://arxiv.org/abs/1711.11286, after Tan (2006). They are
    wider than the model itself allows, in which weights also average to 1 given the past, and at a long horizon by much, as
    the box lets every step be confounded at once: Kallus & Zhou (2020), https://arxiv.org/abs/2002.04518.

    Raises InputError for continuous actions, whose densities have no odds, for missing propensities, and without overlap.
    """
    returns, low, high = _weight_ends(episodes, ratio, odds_ratio)
    return _least_mean(returns, low, high), -_least_mean(-returns[::-1], low[::-1], high[::-1])


def gamma_star(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], champion_value: float) -> float:
    """The smallest odds ratio of hidden confounding at which the policy's WIS estimate might lie on the other side of a value.

    The champion's value is taken as known: of the policy that wrote the log it is the mean return, which nothing hidden can
    bias. The model is that of `confounded_bounds`; inf beyond LARGEST_ODDS, and 1 where the estimate is that value already.
    """
    estimate = confounded_bounds(episodes, ratio, 1.0)[0]
    side = 0 if estimate >= champion_value else 1

    def excess(log_odds: float) -> float:
        return confounded_bounds(episodes, ratio, math.exp(log_odds))[side] - champion_value

    if excess(0.0) == 0.0:
        return 1.0
    if excess(0.0) * excess(math.log(LARGEST_ODDS)) > 0:
        return math.inf
    return math.exp(optimize.root_scalar(excess, bracket=(0.0, math.log(LARGEST_ODDS)), xtol=1e-10).root)


def gamma_star_of_bound(
    episodes: Episodes,
    outcome: Float64[np.ndarray, "episodes"],
    correction: Float64[np.ndarray, "rows"],
    width: float,
    unit: Units | None = None,
) -> float:
    """An odds ratio of hidden confounding under which a lower bound stays above 0: mean less `width` standard deviations.

    `correction` is what each row adds to its episode's `outcome` in proportion to 1 / mu, the inverse of the logged propensity:
    gamma^t omega rho [r + gamma V(s') - Q]. By the model of `confounded_bounds` it may have been anything from
    mu + (1 - mu) / Gamma to mu + (1 - mu) Gamma times that. The bound is taken at the least mean and the greatest spread that
    any choice in every row leaves, which no single choice has at once: what confounding it takes may be more, never less. Values
    and visits are taken as they were fitted. `unit` is the entity of each episode, where entities have several: deviations are
    those of `per_unit`. inf beyond LARGEST_ODDS, and 1 where the bound is not above 0 to begin with.

    Raises InputError for continuous actions, whose densities have no odds.
    """
    if not episodes.n_actions:
        raise InputError("hidden confounding is bounded by odds, which densities of continuous actions do not have.")
    hidden = (1.0 - episodes.action_prob) * finite("the correction", correction)
    gained, lost = (episodes.sum_per_episode(np.maximum(sign * hidden, 0.0)) for sign in (1.0, -1.0))
    episodes_of = summed(np.ones(episodes.n_episodes), unit)
    outcome, gained, lost = (summed(each, unit) for each in (outcome, gained, lost))

    def left(log_odds: float) -> float:
        less, more = -math.expm1(-log_odds), math.expm1(log_odds)
        low, high = outcome - less * gained - more * lost, outcome + more * gained + less * lost
        middle = (low.sum() + high.sum()) / (2 * episodes.n_episodes) * episodes_of
        spread = math.sqrt(np.square(np.maximum(high - middle, middle - low)).mean()) / episodes_of.mean()
        return float(low.sum() / episodes.n_episodes - width * spread)

    if not left(0.0) > 0.0:
        return 1.0
    if left(math.log(LARGEST_ODDS)) > 0.0:
        return math.inf
    return math.exp(optimize.root_scalar(left, bracket=(0.0, math.log(LARGEST_ODDS)), xtol=1e-10).root)


def _weight_ends(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], odds_ratio: float
) -> tuple[Float64[np.ndarray, "episodes"], Float64[np.ndarray, "episodes"], Float64[np.ndarray, "episodes"]]:
    """Returns in rising order, and the least and greatest weight of their episodes, both over the greatest of all."""
    if not episodes.n_actions:
        raise InputError("hidden confounding is bounded by odds, which densities of continuous actions do not have.")
    prob = finite("the logged propensity", ratio * episodes.action_prob)
    ends = np.stack([prob + (ratio - prob) / odds_ratio, prob + (ratio - prob) * odds_ratio])
    with np.errstate(divide="ignore"):
        log_low, log_high = (episodes.sum_per_episode(np.log(end)) for end in ends)
    if not np.isfinite(log_high.max()):
        raise InputError("the policy does not overlap with the log: the weight of every episode is 0.")
    order = np.argsort(episodes.return_, kind="stable")
    low, high = (np.exp(log_weight[order] - log_high.max()) for log_weight in (log_low, log_high))
    return finite("the return", episodes.return_)[order], low, high


def _least_mean(
    returns: Float64[np.ndarray, "n"], low: Float64[np.ndarray, "n"], high: Float64[np.ndarray, "n"]
) -> float:
    """Least weighted mean of rising values with weights between two ends: the greatest for the smallest values, up to one."""
    extra = np.append(0.0, (high - low).cumsum())
    top = np.append(0.0, ((high - low) * returns).cumsum()) + low @ returns
    bottom = extra + low.sum()
    return float((top[bottom > 0] / bottom[bottom > 0]).min())
