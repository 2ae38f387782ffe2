"""Known answers of every interval, by hand and by other implementations, and of differences and many candidates at once."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope import resampling
from offrl_models.ope.eprocess import betting_lower_bound, betting_sequence_lower_bound
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import (
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
    resampled,
    student_t,
    student_t_lower_bound,
    two_sided,
)
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.schema import InputError
from tests.test_interval_coverage import LEVEL

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
    values, place = 5.0 + np.random.default_rng(3).exponential(size=60), np.random.default_rng(7).permutation(60)
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
        assert 0 < hcope_lower_bound(values, alpha=0.1, seed=7) == pytest.approx(total / (n / c))
    assert c > rest.max()
    assert hcope_lower_bound(np.arange(10.0), alpha=0.05, seed=0) == 0.0  # which no mean of such values is below


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
    monkeypatch.setattr(resampling, "STRETCH", stretch)
    monkeypatch.setattr(resampling, "ABREAST", math.gcd(stretch, resampling.ABREAST))
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
        patch.setattr(resampling, "STRETCH", stretch)
        patch.setattr(resampling, "ABREAST", math.gcd(stretch, resampling.ABREAST))
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
