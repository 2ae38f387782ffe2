"""Betting: evidence that needs neither a model nor many episodes, and bounds of bounded means that rest on nothing else.

A gambler who bets on what the null hypothesis denies cannot expect to gain while it is true, whenever he stops. What he has
made of 1 is the e-value; it exceeds 1 / alpha with probability alpha at most, at any stopping time: Ville (1939); Ramdas,
Grünwald, Vovk & Shafer (2023), https://arxiv.org/abs/2210.01948.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from scipy import optimize, special

from offrl_models.ope.intervals import in_unit_range
from offrl_models.ope.sequences import finite
from offrl_models.schema import InputError

BETS = np.array(
    [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9]
)  # shares of the wealth, tried side by side
LARGEST_LOG = 700.0  # of an e-value as a double: less than it is, so that it claims no more than it may
AT_STAKE = 0.5  # most of the wealth that a bet on a mean may lose; c of Waudby-Smith & Ramdas
DECAY = 1.6  # of the shares of the error rate that go to one test after the other


def gains(
    weight: Float64[np.ndarray, "episodes"],
    return_: Float64[np.ndarray, "episodes"],
    return_range: tuple[float, float],
    margin: float = 0.0,
) -> Float64[np.ndarray, "episodes"]:
    """Y_i = (w_i - 1) G_i with G scaled to [0, 1]: at least -1, and 0 on average where policy and behavior are worth the same.

    `weight` is the product of each episode's ratios. With a `margin`, in units of return, the gain must exceed it:
    Y_i = ((w_i - 1) G_i - m) / (1 + m), m being the scaled margin.
    Raises InputError for a return outside its range and for a weight that is negative or no number.
    """
    low, high = return_range
    if finite("the weight", weight).min() < 0:
        raise InputError(
            f"{int((weight < 0).sum())} importance weights are negative; ratios of probabilities never are."
        )
    scaled, least = in_unit_range(return_, low, high), margin / (high - low)
    return ((weight - 1.0) * scaled - least) / (1.0 + least)


def log_e_process(gain: Float64[np.ndarray, "*policies episodes"]) -> Float64[np.ndarray, "*policies episodes"]:
    """log E_n after each episode, in the order in which they were logged; E_n = mean over bets of prod_i (1 + bet Y_i).

    Under the null hypothesis, no gain, E exceeds 1 / alpha at any time with probability alpha at most: it may be looked at
    after every episode, and an e-value once reached stays evidence.
    """
    return _log_mean(_log_growth(gain).cumsum(-1))


def log_e_value(gain: Float64[np.ndarray, "*policies episodes"]) -> Float64[np.ndarray, "*policies"]:
    """log E_n after the last episode: the order of the episodes does not matter."""
    return _log_mean(_log_growth(gain).sum(-1))


def _log_growth(gain: Float64[np.ndarray, "*rest"]) -> Float64[np.ndarray, "bets *rest"]:
    if finite("the gain", gain).min() < -1.0 - 1e-9:
        raise InputError("a gain is below -1, more than a bet can lose; scale the returns to their true range.")
    return np.log1p(np.multiply.outer(BETS, gain))


def _log_mean(log_wealth: Float64[np.ndarray, "bets *rest"]) -> Float64[np.ndarray, "*rest"]:
    return np.asarray(special.logsumexp(log_wealth - math.log(len(BETS)), axis=0))


def e_value(
    weight: Float64[np.ndarray, "episodes"],
    return_: Float64[np.ndarray, "episodes"],
    return_range: tuple[float, float],
    margin: float = 0.0,
) -> float:
    """E_n against "the policy gains no more than `margin` on the one that wrote the log"; see `gains`.

    Holds at any stopping time, for weights of any size and without a Markov state: leg B of the gate.
    """
    return math.exp(min(float(log_e_value(gains(weight, return_, return_range, margin))), LARGEST_LOG))


def share(test: int) -> float:
    """gamma_t: the share of the error rate that test t (from 1) is given. All shares add up to 1."""
    return test**-DECAY / float(special.zeta(DECAY))


def elond_level(alpha: float, test: int, discoveries: int) -> float:
    """alpha_t = alpha gamma_t (R + 1) of test t (from 1), R being the number of discoveries before it.

    The false discovery rate stays below alpha at any time, however the e-values depend on each other, as long as each has
    an expectation of at most 1 whatever its level came to be. Xu & Ramdas (2024), "Online multiple testing with e-values".
    """
    return alpha * share(test) * (discoveries + 1)


def is_discovery(log_e: float, level: float) -> bool:
    """Whether an e-value, as its logarithm, is a discovery at alpha_t: E_t >= 1 / alpha_t."""
    return bool(log_e >= -math.log(level))


def elond(log_e: Sequence[float], alpha: float) -> Bool[np.ndarray, "tests"]:
    """Which of a sequence of e-values, as logarithms and in the order of their tests, are discoveries."""
    found = np.zeros(len(log_e), bool)
    for t, value in enumerate(log_e):
        found[t] = is_discovery(value, elond_level(alpha, t + 1, int(found[:t].sum())))
    return found


def betting_lower_bound(values: Float64[np.ndarray, "n"], *, low: float, high: float, alpha: float) -> float:
    """The least mean, of values from `low` to `high`, against which betting on more has at no time gained 1 / alpha.

    Holds for this number of values; it depends on their order. Two sides come from `intervals.two_sided`. Waudby-Smith & Ramdas
    (2024), "Estimating means of bounded random variables by betting", https://arxiv.org/abs/2010.09686, theorem 3.
    Raises InputError: see in_unit_range.
    """
    unit = in_unit_range(values, low, high)
    return low + (high - low) * _least_mean(unit, _bets(unit, alpha, np.full(len(unit), float(len(unit)))), alpha)


def betting_sequence_lower_bound(values: Float64[np.ndarray, "n"], *, low: float, high: float, alpha: float) -> float:
    """As `betting_lower_bound`, but a confidence sequence: the bounds after 1, 2, ... values hold all at once, for ever."""
    unit, count = in_unit_range(values, low, high), np.arange(1.0, len(values) + 1)
    return low + (high - low) * _least_mean(unit, _bets(unit, alpha, count * np.log1p(count)), alpha)


def _bets(unit: Float64[np.ndarray, "n"], alpha: float, horizon: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """How much to bet on each value, from those before it: sqrt(2 log(1/alpha) / (horizon variance)).

    That is about the best for so many values; the variance starts as if one had been seen at 1/2 with variance 1/4. The
    predictable plug-in of Waudby-Smith & Ramdas (2024).
    """
    count = np.arange(2.0, len(unit) + 2)
    variance = (0.25 + np.square(unit - (0.5 + unit.cumsum()) / count).cumsum()) / count
    return np.sqrt(-2 * math.log(alpha) / (horizon * np.append(0.25, variance[:-1])))


def _least_mean(unit: Float64[np.ndarray, "n"], bets: Float64[np.ndarray, "n"], alpha: float) -> float:
    """The mean at which the most that was ever gained is 1 / alpha: it falls as the mean rises."""
    least = 1e-12
    if _log_gain(least, unit, bets, alpha) <= 0:
        return 0.0
    return float(optimize.root_scalar(_log_gain, (unit, bets, alpha), bracket=(least, 1.0), xtol=1e-12).root)


def _log_gain(mean: float, unit: Float64[np.ndarray, "n"], bets: Float64[np.ndarray, "n"], alpha: float) -> float:
    """log of the largest wealth so far, prod_i (1 + bet_i (x_i - mean)), over 1 / alpha."""
    return float(np.log1p(np.minimum(bets, AT_STAKE / mean) * (unit - mean)).cumsum().max()) + math.log(alpha)
