"""Every interval against values that are known: measured coverage, coverage by enumeration, known answers, identities of width."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope import importance
from offrl_models.ope.diagnostics import effective_sample_size, largest_share
from offrl_models.ope.eprocess import betting_lower_bound, betting_sequence_lower_bound
from offrl_models.ope.importance import Terms, trajectory_weights
from offrl_models.ope.intervals import (
    Interval,
    bca,
    bca_lower_bound,
    bootstrap,
    bootstrap_all,
    bootstrap_lower_bound,
    confidence_sequence,
    confidence_sequence_lower_bound,
    delta_method,
    delta_method_lower_bound,
    difference,
    empirical_bernstein_lower_bound,
    hcope_lower_bound,
    hcope_threshold,
    hoeffding_lower_bound,
    in_unit_range,
    resampled,
    student_t,
    student_t_lower_bound,
    two_sided,
)
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.worlds import random_world
from offrl_models.schema import InputError

LEVEL, ALPHA = 0.9, 0.05
REPLICATIONS, SAMPLES = 300, 300
BOUNDED = [
    hoeffding_lower_bound,
    empirical_bernstein_lower_bound,
    betting_lower_bound,
    betting_sequence_lower_bound,
]


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """Logs of n episodes each of one world, and what is known of a policy in it."""

    weight: np.ndarray  # [replications, episodes]
    values: np.ndarray  # [replications, episodes], weighted returns
    truth: float
    largest: float  # that a weighted return can be


OVERLAP = {"near": 0.2, "far": 0.6}  # share of the best policy in the one evaluated; the rest is the behavior
GRID = list(itertools.product((100, 400), (1, 4), OVERLAP))
WITHIN_REACH = [cell for cell in GRID if cell[1:] != (4, "far")]  # of the interval that rests on many episodes


@functools.cache
def logs(n: int, horizon: int, overlap: str) -> Cell:
    """Returns lie in [0, 1]; every replication is another log."""
    world = random_world(2, 3, horizon, 1.0, seed=4)
    coin = np.random.default_rng(0).random(world.reward.shape) < 0.5
    world = dataclasses.replace(world, reward=np.where(world.terminal[:, None, None], 0.0, coin / horizon))
    policy = (1 - OVERLAP[overlap]) * world.behavior + OVERLAP[overlap] * world.optimal()
    episodes = world.simulate(n * REPLICATIONS, seed=1)
    ratio = policy[episodes.observation[:, 0].astype(int), episodes.action] / episodes.action_prob
    weight = trajectory_weights(episodes, ratio)
    return Cell(
        weight.reshape(REPLICATIONS, n),
        (weight * episodes.return_).reshape(REPLICATIONS, n),
        world.value(policy),
        float((policy / world.behavior).max()) ** horizon,
    )


def at_least(covered: int, level: float) -> bool:
    """Whether a true coverage of `level` or more is within the 99.9% Clopper-Pearson limit of what was measured."""
    return covered == REPLICATIONS or float(stats.beta.ppf(0.999, covered + 1, REPLICATIONS - covered)) >= level


def covered(intervals: list[Interval], truth: float) -> int:
    return sum(interval.low <= truth <= interval.high for interval in intervals)


def terms_of(cell: Cell, *, normalized: bool) -> list[Terms]:
    pairs = zip(cell.values[..., None], cell.weight[..., None], strict=True)
    return [Terms(x, w if normalized else None) for x, w in pairs]


@functools.cache
def many_episodes(cell: Cell) -> dict[str, list[Interval]]:
    """Intervals that rest on many episodes, by method, one for each log."""
    n = cell.values.shape[1]
    shares = bootstrap_shares(n, SAMPLES, 0)
    found = {
        "t": [student_t(x, LEVEL) for x in cell.values],
        "sequence": [confidence_sequence(x, LEVEL, planned=n) for x in cell.values],
    }
    for name, normalized in (("TIS", False), ("WIS", True)):
        terms = terms_of(cell, normalized=normalized)
        named = {str(i): t for i, t in enumerate(terms)}
        found[f"delta {name}"] = [delta_method(t, LEVEL) for t in terms]
        found[f"percentile {name}"] = list(bootstrap_all(named, shares, LEVEL).values())
        found[f"BCa {name}"] = list(bootstrap_all(named, shares, LEVEL, corrected=True).values())
    return found


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_intervals_from_the_true_range_cover_whatever_the_overlap(cell: tuple[int, int, str]) -> None:
    log = logs(*cell)
    for bound in BOUNDED:
        intervals = [two_sided(bound, x, LEVEL, low=0.0, high=log.largest) for x in log.values]
        assert at_least(covered(intervals, log.truth), LEVEL), bound.__name__
    below = sum(hcope_lower_bound(x, alpha=ALPHA, seed=0) <= log.truth for x in log.values)
    assert at_least(below, 1 - ALPHA)


@pytest.mark.parametrize("cell", WITHIN_REACH, ids=str)
def test_intervals_that_rest_on_many_episodes_cover_where_weights_have_light_tails(cell: tuple[int, int, str]) -> None:
    log = logs(*cell)
    for name, intervals in many_episodes(log).items():
        count = covered(intervals, log.truth)
        assert at_least(count, LEVEL), (name, count)
        assert name == "sequence" or count <= stats.binom.ppf(0.999, REPLICATIONS, 0.95), (name, "far too wide", count)


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_lower_bounds_hold_for_weights_with_long_right_tails_too(cell: tuple[int, int, str]) -> None:
    """A log that holds none of the large weights says too little, not too much: the mean is then too low."""
    log = logs(*cell)
    shares = bootstrap_shares(log.values.shape[1], SAMPLES, 0)
    bounds = {
        "t": [student_t_lower_bound(x, alpha=ALPHA) for x in log.values],
        "sequence": [confidence_sequence_lower_bound(x, alpha=ALPHA, planned=len(x)) for x in log.values],
    }
    for name, normalized in (("TIS", False), ("WIS", True)):
        terms = terms_of(log, normalized=normalized)
        bounds[f"delta {name}"] = [delta_method_lower_bound(t, alpha=ALPHA) for t in terms]
        bounds[f"BCa {name}"] = [bca_lower_bound(t, shares, alpha=ALPHA) for t in terms]
    for name, found in bounds.items():
        below = int((np.array(found) <= log.truth).sum())
        assert at_least(below, 1 - ALPHA), (name, below)


def test_where_intervals_do_not_cover_the_diagnostics_say_so() -> None:
    """With poor overlap over four steps a t-interval of 90% covers far less; few episodes then carry most of the evidence."""
    log, reliable = logs(100, 4, "far"), logs(400, 1, "near")
    assert covered([student_t(x, LEVEL) for x in log.values], log.truth) < stats.binom.ppf(0.001, REPLICATIONS, 0.8)
    assert np.median([effective_sample_size(w) for w in log.weight]) < 20
    assert np.median([largest_share(x) for x in log.values]) > 0.2
    assert np.median([effective_sample_size(w) for w in reliable.weight]) > 300
    assert np.median([largest_share(x) for x in reliable.values]) < 0.01


def test_the_error_rate_of_a_betting_bound_is_at_most_alpha_over_every_sequence() -> None:
    """All 2^9 sequences of a coin with probability 0.3 and their probabilities: no simulation, for both kinds of bets."""
    sequences = np.array(list(itertools.product((0.0, 1.0), repeat=9)))
    probability = np.prod(np.where(sequences == 1.0, 0.3, 0.7), axis=1)
    for bound in (betting_lower_bound, betting_sequence_lower_bound):
        wrong = np.array([bound(x, low=0.0, high=1.0, alpha=0.2) > 0.3 for x in sequences])
        assert 0.0 < probability @ wrong <= 0.2


def test_a_betting_sequence_is_rarely_ever_wrong_over_many_looks() -> None:
    rng = np.random.default_rng(0)
    ever = 0
    for _ in range(120):
        values = rng.beta(0.3, 1.2, size=300)  # mean 0.2
        looks = range(30, 301, 30)
        ever += any(betting_sequence_lower_bound(values[:n], low=0.0, high=1.0, alpha=0.1) > 0.2 for n in looks)
    assert ever <= stats.binom.ppf(0.99, 120, 0.1)


# Known answers


def test_hoeffding_by_hand() -> None:
    """n = 8 and alpha = e^-4: sqrt(4 / 16) = 1/2 of the range on either side."""
    values = np.array([0.0, 10.0] * 4)
    assert hoeffding_lower_bound(values, low=0.0, high=20.0, alpha=np.exp(-4)) == pytest.approx(5.0 - 10.0)
    found = two_sided(hoeffding_lower_bound, values, 1 - 2 * np.exp(-4), low=0.0, high=20.0)
    assert (found.low, found.estimate, found.high) == pytest.approx((-5.0, 5.0, 15.0))
    assert found.method == "hoeffding"


def test_empirical_bernstein_by_hand() -> None:
    """alpha = 2 e^-3, so log(2 / alpha) = 3; a standard deviation of 1 after scaling the range of 4 to 1 is 1/4."""
    values = np.array([-1.0, 1.0]) * np.sqrt(0.5)
    expected = 0.0 - 1.0 * np.sqrt(2 * 3 / 2) - 4.0 * 7 * 3 / (3 * 1)
    found = empirical_bernstein_lower_bound(values, low=-2.0, high=2.0, alpha=2 * np.exp(-3))
    assert found == pytest.approx(expected)


def test_a_betting_bound_by_hand() -> None:
    """One value of 1 and alpha 1/4: the bet is sqrt(2 log 4 / (1/4)), and 1 + bet (1 - m) = 4 gives the bound."""
    bet = np.sqrt(8 * np.log(4))
    assert betting_lower_bound(np.ones(1), low=0.0, high=1.0, alpha=0.25) == pytest.approx(1 - 3 / bet)
    assert betting_lower_bound(np.ones(1), low=-3.0, high=1.0, alpha=0.25) == pytest.approx(-3 + 4 * (1 - 3 / bet))


def test_a_betting_bound_is_where_a_search_over_all_means_ends() -> None:
    values = np.random.default_rng(0).beta(2, 5, size=80)
    count = np.arange(1, 81)
    mean = (0.5 + values.cumsum()) / (count + 1)
    variance = np.append(0.25, (0.25 + ((values - mean) ** 2).cumsum()) / (count + 1))[:-1]
    for bound, horizon in ((betting_lower_bound, 80.0), (betting_sequence_lower_bound, count * np.log(count + 1.0))):
        bet = np.sqrt(2 * np.log(20) / (horizon * variance))
        grid = np.linspace(1e-4, 1, 10_001)
        wealth = np.cumprod(1 + np.minimum(bet, 0.5 / grid[:, None]) * (values - grid[:, None]), axis=1).max(1)
        assert (np.diff(wealth) <= 1e-12).all()  # so that there is one place to end at
        expected = grid[wealth < 20].min()
        assert bound(values, low=0.0, high=1.0, alpha=0.05) == pytest.approx(expected, abs=1e-4)


def test_a_betting_sequence_takes_nothing_back() -> None:
    """What was once excluded stays so, even when all that follows speaks for it."""
    values = np.append(np.ones(40), np.zeros(40))
    bounds = [betting_sequence_lower_bound(values[:n], low=0.0, high=1.0, alpha=0.05) for n in (10, 20, 40, 60, 80)]
    assert bounds == sorted(bounds) and bounds[0] < bounds[2] == pytest.approx(bounds[4], abs=1e-9)


def test_the_clipped_bound_is_the_one_of_the_theorem() -> None:
    """Written out as in the paper, with the sum over all pairs."""
    values, place = np.random.default_rng(3).exponential(size=60), np.random.default_rng(7).permutation(60)
    for last in (
        values[place[:3]],
        5.0 + values.max(),
    ):  # of the second kind no other value is as large as the threshold
        values[place[:3]] = last
        chosen, rest = values[place[:3]], values[place[3:]]
        c, n, penalty = hcope_threshold(chosen, planned=57, alpha=0.1), 57, np.log(2 / 0.1)
        y = np.minimum(rest, c)
        pairs = ((y[:, None] / c - y / c) ** 2).sum()
        total = (y / c).sum() - 7 * n * penalty / (3 * (n - 1)) - np.sqrt(penalty / (n - 1) * pairs)
        assert hcope_lower_bound(values, alpha=0.1, seed=7) == pytest.approx(total / (n / c))
    assert c > rest.max()


def test_the_threshold_is_the_best_of_the_values_seen() -> None:
    values = np.random.default_rng(1).pareto(1.5, size=50)

    def predicted(c: float) -> float:
        y = np.minimum(values, c)
        spread = np.sqrt(2 * np.log(40) * y.var(ddof=1) / 950)
        return float(y.mean() - 7 * c * np.log(40) / (3 * 949) - spread)

    assert hcope_threshold(values, planned=950, alpha=0.05) == max(values, key=predicted)


def test_the_clipped_bound_knows_values_no_lower_than_0_only() -> None:
    assert hcope_lower_bound(np.zeros(100), alpha=0.05, seed=0) == 0.0
    with pytest.raises(InputError, match="none below 0"):
        hcope_lower_bound(np.array([1.0, -0.1, 1.0, 1.0]), alpha=0.05, seed=0)
    with pytest.raises(InputError, match="at least 4"):
        hcope_lower_bound(np.ones(3), alpha=0.05, seed=0)


def test_student_t_by_hand() -> None:
    """Mean 2, standard error 1 / sqrt(3), quantiles of 2 degrees of freedom: 4.302653 two-sided, 2.919986 one-sided."""
    found = student_t(np.array([1.0, 2.0, 3.0]), 0.95)
    assert found.high - 2.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert 2.0 - found.low == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    bound = student_t_lower_bound(np.array([1.0, 2.0, 3.0]), alpha=0.05)
    assert bound == pytest.approx(2.0 - 2.919986 / np.sqrt(3), rel=1e-6)


def test_the_delta_method_by_hand() -> None:
    """Weights 1 and 3, returns 0 and 1: WIS is 3/4, influences -+3/8, standard error 3/8 (3/4 with a frozen denominator)."""
    terms = Terms(np.array([[0.0], [3.0]]), np.array([[1.0], [3.0]]))
    found = delta_method(terms, 0.95)
    assert (found.low, found.high) == pytest.approx((0.75 - 1.95996398 * 0.375, 0.75 + 1.95996398 * 0.375), rel=1e-6)
    assert delta_method_lower_bound(terms, alpha=0.05) == pytest.approx(0.75 - 1.64485363 * 0.375, rel=1e-6)


def test_the_delta_method_agrees_with_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    weight = rng.gamma(2.0, size=(2000, 3))
    terms = Terms(weight * rng.normal(size=(2000, 3)), weight)
    left_out = (1 - np.eye(2000)) / 1999
    jackknife = np.sqrt(1999 * terms.resampled(left_out).var())
    width = delta_method(terms, LEVEL).high - terms.estimate()
    assert width == pytest.approx(stats.norm.ppf(0.95) * jackknife, rel=0.01)


def test_bca_agrees_with_another_implementation() -> None:
    """SciPy resamples on its own and takes the acceleration from the jackknife; percentile limits are elsewhere."""
    values = np.random.default_rng(0).exponential(size=40) ** 2
    shares = bootstrap_shares(40, 20_000, 0)
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="BCa", rng=1)
    found, percentile = bca(Terms(values[:, None]), shares, 0.9), bootstrap(Terms(values[:, None]), shares, 0.9)
    assert found.low == pytest.approx(other.confidence_interval.low, rel=0.02)
    assert found.high == pytest.approx(other.confidence_interval.high, rel=0.02)
    assert percentile.high < 0.93 * found.high
    assert bca_lower_bound(Terms(values[:, None]), shares, alpha=0.05) == pytest.approx(found.low, rel=1e-5)


def test_the_two_sided_sequence_has_a_mixture_of_exactly_one_over_alpha_at_its_boundary() -> None:
    """For standard normal increments the mixture is exp(r S^2 / (2 (n r + 1))) / sqrt(n r + 1)."""
    for n, planned, level in ((100, 5000, 0.95), (5000, 5000, 0.9), (20_000, 500, 0.99)):
        values = np.array([0.0, 2.0] * (n // 2))  # standard deviation 1
        boundary = n * (confidence_sequence(values, level, planned=planned).high - 1.0)
        r = (-2 * np.log(1 - level) + np.log(1 - 2 * np.log(1 - level))) / planned
        mixture = np.exp(r * boundary**2 / (2 * (n * r + 1))) / np.sqrt(n * r + 1)
        assert mixture == pytest.approx(1 / (1 - level), rel=1e-9)


def test_a_sequence_is_tightest_at_the_planned_number() -> None:
    """No other plan gives a sequence that is more than 1% tighter there, one-sided or two-sided."""
    values = np.array([0.0, 2.0] * 500)
    plans = np.geomspace(50, 20_000, 60).astype(int).tolist()
    two = [confidence_sequence(values, 0.95, planned=p).high - 1 for p in plans]
    one = [1 - confidence_sequence_lower_bound(values, alpha=0.05, planned=p) for p in plans]
    assert confidence_sequence(values, 0.95, planned=1000).high - 1 < 1.01 * min(two)
    assert 1 - confidence_sequence_lower_bound(values, alpha=0.05, planned=1000) < 1.01 * min(one)


def test_a_two_sided_sequence_is_a_little_tighter_than_two_one_sided_ones() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    both = confidence_sequence(values, 0.9, planned=1000).low
    one = confidence_sequence_lower_bound(values, alpha=0.05, planned=1000)
    assert one < both < one + 0.01


# Identities

MEAN_INTERVALS: dict[str, Callable[[np.ndarray, float], Interval]] = {
    "t": student_t,
    "delta": lambda x, level: delta_method(Terms(x[:, None]), level),
    "percentile": lambda x, level: bootstrap(Terms(x[:, None]), bootstrap_shares(len(x), SAMPLES, 0), level),
    "BCa": lambda x, level: bca(Terms(x[:, None]), bootstrap_shares(len(x), SAMPLES, 0), level),
    "sequence": lambda x, level: confidence_sequence(x, level, planned=len(x)),
}
RANGE_INTERVALS: dict[str, Callable[[np.ndarray, float], Interval]] = {
    bound.__name__: lambda x, level, bound=bound: two_sided(bound, x, level, low=0.0, high=4.0) for bound in BOUNDED
}
ALL = MEAN_INTERVALS | RANGE_INTERVALS


@pytest.mark.parametrize("name", MEAN_INTERVALS)
def test_constant_returns_have_no_width(name: str) -> None:
    found = MEAN_INTERVALS[name](np.full(50, 3.1), LEVEL)
    assert (found.low, found.estimate, found.high) == pytest.approx((3.1, 3.1, 3.1), abs=1e-12)


@pytest.mark.parametrize("name", RANGE_INTERVALS)
def test_constant_returns_prove_nothing_of_what_was_not_seen(name: str) -> None:
    """A range from the data would be empty here; the true one leaves room, more of it on the side where there is more."""
    found = RANGE_INTERVALS[name](np.full(50, 3.0), LEVEL)
    assert found.low < 3.0 - 0.1 and found.high > 3.0 + 0.1


SLOWER_OR_FASTER = {  # what the logarithm of a sequence without a plan costs, and what terms of 1/n save
    "betting_sequence_lower_bound": 0.7,
    "betting_lower_bound": 1.3,
    "empirical_bernstein_lower_bound": 1.7,
}


@pytest.mark.parametrize("name", ALL)
def test_width_falls_like_the_square_root_of_the_number(name: str) -> None:
    """Of the bootstraps to a quarter for 16 times the episodes, of the others to a tenth for 100 times."""
    n = 3200 if name in ("percentile", "BCa") else 20_000
    rng = np.random.default_rng(0)
    found = [ALL[name](rng.uniform(0.0, 4.0, size=k), LEVEL) for k in (200, n)]
    expected = np.sqrt(n / 200) * SLOWER_OR_FASTER.get(name, 1.0)
    assert (found[0].high - found[0].low) / (found[1].high - found[1].low) == pytest.approx(expected, rel=0.18)


@pytest.mark.parametrize("name", ALL)
def test_a_higher_level_never_narrows_an_interval(name: str) -> None:
    values = np.random.default_rng(2).uniform(0.0, 4.0, size=120)
    found = [ALL[name](values, level) for level in (0.5, 0.8, 0.95, 0.99)]
    assert [f.low for f in found] == sorted((f.low for f in found), reverse=True)
    assert [f.high for f in found] == sorted(f.high for f in found)
    assert len({f.low for f in found}) == 4


@given(st.sampled_from(list(ALL)), st.integers(0, 1000))
def test_an_interval_mirrors_with_its_values_and_shifts_and_scales_with_them(name: str, seed: int) -> None:
    values = np.random.default_rng(seed).beta(0.5, 2.0, size=30) * 4.0
    found = ALL[name](values, LEVEL)
    assert found.low <= found.estimate <= found.high
    if name not in RANGE_INTERVALS:
        moved = ALL[name](7.0 - 2.0 * values, LEVEL)
    else:
        bound = next(bound for bound in BOUNDED if bound.__name__ == name)
        moved = two_sided(bound, 7.0 - 2.0 * values, LEVEL, low=-1.0, high=7.0)
    expected = (7.0 - 2.0 * found.high, 7.0 - 2.0 * found.low)
    assert (moved.low, moved.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bound", BOUNDED)
def test_a_value_outside_the_range_is_an_error(bound: Callable[..., float]) -> None:
    with pytest.raises(InputError, match="1 of 3 values lie outside 0 to 1"):
        bound(np.array([0.1, 0.2, 1.1]), low=0.0, high=1.0, alpha=0.05)
    with pytest.raises(InputError, match="1 of 3 values lie outside 0 to 1"):
        bound(np.array([-0.1, 0.2, 1.0]), low=0.0, high=1.0, alpha=0.05)
    with pytest.raises(InputError, match="is empty"):
        bound(np.array([0.1, 0.2]), low=1.0, high=1.0, alpha=0.05)
    with pytest.raises(InputError, match="NaN or infinite"):
        bound(np.array([0.1, np.nan]), low=0.0, high=1.0, alpha=0.05)


def test_a_sum_that_misses_its_range_by_rounding_is_no_error() -> None:
    assert in_unit_range(np.array([0.1 + 0.2, -1e-12]), 0.0, 0.3).tolist() == [1.0, 0.0]


def test_one_episode_has_no_interval() -> None:
    for interval in (student_t, MEAN_INTERVALS["delta"]):
        with pytest.raises(InputError, match="at least 2 episodes"):
            interval(np.ones(1), LEVEL)


def test_no_overlap_is_no_bound() -> None:
    nothing = Terms(np.zeros((10, 1)), np.zeros((10, 1)))
    shares = bootstrap_shares(10, 50, 0)
    with pytest.raises(InputError, match="does not overlap"):
        bca_lower_bound(nothing, shares, alpha=0.05)
    with pytest.raises(InputError, match="does not overlap"):
        delta_method_lower_bound(nothing, alpha=0.05)
    rare = Terms(np.eye(10)[:, :1], np.eye(10)[:, :1])  # a sample without the first episode has no estimate
    with pytest.raises(InputError, match="does not overlap"):
        bca_lower_bound(rare, shares, alpha=0.05)
    with pytest.raises(InputError, match="does not overlap"):
        bootstrap_lower_bound(rare, Terms(np.zeros((10, 1))), shares, 0.95)
    assert bca(nothing, shares, 0.9).to_json()["low"] is None
    assert delta_method(nothing, 0.9).to_json()["high"] is None


# Differences, and many candidates at once


def some_terms(seed: int, n: int = 80) -> list[Terms]:
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=(n, 3))
    return [
        Terms(weight[:, 2:] * rng.normal(size=(n, 1)), weight[:, 2:]),  # the weights of the next but one in part
        Terms(rng.normal(size=(n, 1))),
        Terms(weight * rng.normal(size=(n, 3)), weight),
        Terms(rng.normal(size=(n, 2))),
        Terms(weight[:, :1] * rng.normal(size=(n, 1)), weight[:, :1]),
        Terms(rng.normal(size=(n, 3)), weight, weighted=True),
    ]


def test_terms_by_their_weights_are_those_of_the_product() -> None:
    """Whole, and a few episodes at a time."""
    rng = np.random.default_rng(0)
    gain, weight = rng.normal(size=(80, 3)), rng.exponential(size=(80, 3))
    found, expected = Terms(gain, weight, weighted=True), Terms(weight * gain, weight)
    assert np.array_equal(found.numerator, expected.numerator) and found.episodes == 80
    assert found.estimate() == pytest.approx(expected.estimate(), rel=1e-14)
    assert found.deviation() == pytest.approx(expected.deviation(), abs=1e-14)
    assert found.influence() == pytest.approx(expected.influence(), abs=1e-14)
    for terms in (found, expected, Terms(gain)):
        part = np.empty((30, 3))
        terms.deviation(slice(20, 50), part)
        assert part == pytest.approx(terms.deviation()[20:50], abs=1e-14)
    shares = bootstrap_shares(80, 40, 0)
    assert found.resampled(shares) == pytest.approx(expected.resampled(shares), rel=1e-14)


@pytest.mark.parametrize("stretch", [7, 512])
def test_resampling_together_is_resampling_each(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "STRETCH", stretch)
    candidates, shares = some_terms(0), bootstrap_shares(80, 40, 0)
    expected = np.stack([terms.resampled(shares) for terms in candidates])
    rounding = 1e-5 * expected.std(1, keepdims=True)  # of single precision
    for samples in (shares, 80 * shares, [80 * shares[:7], shares[7:]]):  # shares or counts, at once or not
        assert (np.abs(resampled(candidates, samples) - expected) < rounding).all()
    named = {str(i): terms for i, terms in enumerate(candidates)}
    for corrected, single in ((False, bootstrap), (True, bca)):
        for name, found in bootstrap_all(named, shares, LEVEL, corrected=corrected).items():
            other = single(named[name], shares, LEVEL)
            assert (found.low, found.high) == pytest.approx((other.low, other.high), rel=1e-5)


@given(st.integers(0, 1000), st.floats(-30, 30), st.floats(-30, 30), st.integers(2, 5000))
def test_single_precision_costs_no_precision(seed: int, size: float, shift: float, n: int) -> None:
    """Whatever the units are, however far the values lie from zero, and however heavy the tail of the weights is."""
    rng = np.random.default_rng(seed)
    weight = np.exp(rng.normal(scale=rng.uniform(0, 8), size=(n, 3)))
    values = 10.0**size * (rng.normal(size=(n, 3)) + 10.0 ** (shift / 10))
    shares = bootstrap_shares(n, 30, seed)
    for terms in (Terms(values), Terms(weight * values, weight), Terms(weight * weight)):
        expected = terms.resampled(shares)
        error = np.abs(resampled([terms], shares)[0] - expected)
        deviations = np.abs(terms.influence()).mean() / np.sqrt(n) + 1e-13 * np.abs(expected)
        assert (error < 1e-4 * np.maximum(deviations, expected.std())).all()


def test_sums_over_many_ordered_episodes_do_not_drift_off() -> None:
    """One sample at a time, as of millions of episodes, a product in single precision would add up row by row."""
    n = 300_000
    drifting = (np.random.default_rng(0).random(n) < np.where(np.arange(n) < n / 2, 0.30, 0.25)).astype(float)
    blocks = [bootstrap_shares(n, 3, 0)[i : i + 1] for i in range(3)]
    terms = Terms(drifting[:, None])
    expected = np.hstack([terms.resampled(block) for block in blocks])
    assert (np.abs(resampled([terms], blocks)[0] - expected) < 1e-4 * drifting.std() / np.sqrt(n)).all()


@given(st.integers(0, 1000), st.integers(2, 12), st.sampled_from([30, 60, 200]), st.sampled_from([3, 512]))
def test_weights_over_more_orders_than_single_precision_has(seed: int, n: int, orders: int, stretch: int) -> None:
    """Also where every stretch of episodes has a scale of its own."""
    rng = np.random.default_rng(seed)
    weight = 10.0 ** rng.uniform(-orders, 0, size=(n, 2)) * (rng.random((n, 2)) < 0.7)
    gain, shares = rng.random((n, 2)), bootstrap_shares(n, 50, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "STRETCH", stretch)
        for terms in (Terms(weight * gain, weight), Terms(gain, weight, weighted=True)):
            found = resampled([terms], shares)[0]
            assert found == pytest.approx(terms.resampled(shares), rel=1e-5, nan_ok=True)


def test_samples_that_reproduce_the_estimate_are_ties_of_the_corrected_bootstrap() -> None:
    """Counted in integers, where they are ties exactly."""
    clicks = np.repeat([1.0, 0.0], [20, 1980])
    shares = bootstrap_shares(2000, 1000, 0)
    counts = np.rint(shares @ clicks * 2000)  # exact
    below = ((counts < 20).sum() + 0.5 * (counts == 20).sum() + 0.5) / 1001
    pull = clicks - 0.01
    acceleration = (pull**3).sum() / (6 * (pull @ pull) ** 1.5)
    bias = stats.norm.ppf(below)
    shifted = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(counts / 2000, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    found = bca(Terms(clicks[:, None]), shares, 0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-5)


def test_what_does_not_vary_has_no_width_in_single_precision() -> None:
    weight = np.random.default_rng(0).exponential(size=(500, 4))
    shares = bootstrap_shares(500, 30, 0)
    found = resampled([Terms(np.full((500, 1), 0.1)), Terms(0.1 * weight, weight)], shares)
    assert found[0] == pytest.approx(np.full(30, 0.1), abs=1e-16) and found[1] == pytest.approx(
        np.full(30, 0.4), abs=1e-15
    )


def test_a_sample_without_any_weight_has_no_estimate() -> None:
    weight = np.r_[1e-30, np.zeros(9)][:, None]
    shares = np.eye(10)[:3]
    alone = np.array([5.0, np.nan, np.nan])
    assert resampled([Terms(5.0 * weight, weight)], shares)[0] == pytest.approx(alone, nan_ok=True)


@pytest.mark.parametrize("pair", list(itertools.combinations(range(6), 2)))
def test_a_difference_of_terms_is_the_difference_of_estimates(pair: tuple[int, int]) -> None:
    shares = bootstrap_shares(80, 40, 0)
    one, other = (some_terms(1)[i] for i in pair)
    both = difference(one, other)
    assert both.resampled(shares) == pytest.approx(one.resampled(shares) - other.resampled(shares), abs=1e-12)
    assert both.influence() == pytest.approx(one.influence() - other.influence(), abs=1e-12)
    expected = bootstrap_lower_bound(one, other, shares, 0.95)[1]
    assert bootstrap(both, shares, 0.9).low == pytest.approx(expected, rel=1e-5)


def test_pairing_by_episode_makes_a_difference_precise() -> None:
    values = np.random.default_rng(0).normal(size=(300, 1))
    found = delta_method(difference(Terms(values + 1.0), Terms(values)), LEVEL)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0), abs=1e-12)
