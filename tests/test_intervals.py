"""Intervals: identities of their widths, the inequality behind the confidence sequence, and measured coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.diagnostics import effective_sample_size, mean_ratio_z
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import bootstrap, bootstrap_lower_bound, confidence_sequence_lower_bound, ensemble
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.schema import InputError


@given(st.integers(2, 100_000), st.floats(0.001, 0.4), st.integers(500, 100_000))
def test_the_confidence_sequence_boundary_crosses_the_half_normal_mixture(n: int, alpha: float, planned: int) -> None:
    """At the boundary the mixture supermartingale is at least 1/alpha, which is what makes it valid at any stopping time.

    For standard normal increments it is 2 / sqrt(n r + 1) exp(r S^2 / (2 (n r + 1))) Phi(S sqrt(r / (n r + 1))).
    """
    values = np.array([0.0, 2.0] * (n // 2))  # mean 1, standard deviation 1
    n = len(values)
    boundary = n * (1.0 - confidence_sequence_lower_bound(values, alpha=alpha, planned=planned))
    tuned = 2 * min(alpha, 0.05)
    r = (-2 * np.log(tuned) + np.log(1 - 2 * np.log(tuned))) / planned
    scale = n * r + 1
    mixture = 2 / np.sqrt(scale) * np.exp(r * boundary**2 / (2 * scale)) * stats.norm.cdf(boundary * np.sqrt(r / scale))
    assert mixture >= 1 / alpha * (1 - 1e-9)
    assert mixture <= 2.5 / alpha  # and not much more, so the bound is not needlessly wide


def test_the_confidence_sequence_is_rarely_ever_wrong_over_many_looks() -> None:
    """400 sequences of 5,000 values with mean 0, looked at every 100 values from 500 on: at most 5% may ever exclude 0."""
    rng = np.random.default_rng(0)
    ever = 0
    for _ in range(400):
        values = rng.normal(size=5000)
        looks = range(500, 5001, 100)
        ever += any(confidence_sequence_lower_bound(values[:n], alpha=0.05, planned=5000) > 0 for n in looks)
    assert ever <= stats.binom.ppf(0.95, 400, 0.05)


def test_a_percentile_interval_covers_about_as_often_as_it_says() -> None:
    """Means of 60 exponential values, 500 repetitions: coverage of a 90% interval, within its binomial error."""
    rng = np.random.default_rng(1)
    shares = bootstrap_shares(60, 300, 0)
    covered = 0
    for _ in range(500):
        found = bootstrap(Terms(rng.exponential(size=(60, 1))), shares, 0.9)
        covered += found.low <= 1.0 <= found.high
    assert covered >= stats.binom.ppf(0.001, 500, 0.9)
    assert covered <= 500 * 0.97


def test_constant_returns_have_an_interval_of_no_width() -> None:
    found = bootstrap(Terms(np.full((40, 1), 3.0)), bootstrap_shares(40, 200, 0), 0.95)
    assert (found.low, found.estimate, found.high) == pytest.approx((3.0, 3.0, 3.0), abs=1e-12)
    assert confidence_sequence_lower_bound(np.full(600, 3.0), alpha=0.05, planned=600) == pytest.approx(3.0)


def test_width_falls_like_the_square_root_of_the_number_of_episodes() -> None:
    rng = np.random.default_rng(0)

    def width(n: int) -> float:
        found = bootstrap(Terms(rng.normal(size=(n, 1))), bootstrap_shares(n, 2000, 0), 0.95)
        return found.high - found.low

    assert width(400) / width(6400) == pytest.approx(4.0, rel=0.15)


@given(st.integers(0, 1000), st.integers(100, 50_000))
def test_a_lower_error_rate_never_raises_the_bound(seed: int, planned: int) -> None:
    values = np.random.default_rng(seed).exponential(size=1000)
    rates = (0.001, 0.01, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 0.49)
    bounds = [confidence_sequence_lower_bound(values, alpha=alpha, planned=planned) for alpha in rates]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, math.nan])
def test_a_sequence_needs_an_error_rate_below_a_half(alpha: float) -> None:
    with pytest.raises(InputError, match="give one between 0 and 0.5"):
        confidence_sequence_lower_bound(np.arange(9.0), alpha=alpha, planned=9)
    with pytest.raises(InputError, match="the values holds 1 values that are NaN"):
        confidence_sequence_lower_bound(np.array([1.0, math.nan]), alpha=0.05, planned=9)


def test_a_bootstrap_forms_self_normalised_ratios_again_in_every_sample() -> None:
    """With equal returns a self-normalised estimate is that return in every sample, however the weights vary."""
    weight = np.random.default_rng(0).exponential(size=(50, 1))
    found = bootstrap(Terms(2.0 * weight, weight), bootstrap_shares(50, 200, 0), 0.95)
    assert found.high - found.low < 1e-12


def test_the_bound_on_a_difference_uses_the_same_episodes_for_both() -> None:
    values = np.random.default_rng(0).normal(size=(300, 1))
    difference, bound = bootstrap_lower_bound(Terms(values + 1), Terms(values), bootstrap_shares(300, 200, 0), 0.95)
    assert (difference, bound) == pytest.approx((1.0, 1.0), abs=1e-9)


def test_an_ensemble_interval_is_a_t_interval_and_needs_two_members() -> None:
    found = ensemble([1.0, 2.0, 3.0], np.array([0.0, 2.0] * 5), 0.95)  # initial values of variance 1, in 10 episodes
    assert found.estimate == 2.0
    assert found.high - 2.0 == pytest.approx(stats.t.ppf(0.975, 2) * np.sqrt(1 + 1 / 3 + 1 / 10))
    with pytest.raises(InputError, match="at least 2 members"):
        ensemble([1.0], np.zeros(3), 0.95)


def test_effective_sample_sizes() -> None:
    assert effective_sample_size(np.full(7, 0.3)) == pytest.approx(7.0)
    assert effective_sample_size(np.array([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_sample_size(np.zeros(3)) == 0.0


def test_the_mean_ratio_test_sees_a_constant_error() -> None:
    """Ratios that are all 2 have no spread at all; that must not look like no error."""
    assert mean_ratio_z(np.ones(100)) == 0.0
    assert abs(mean_ratio_z(np.full(100, 2.0))) > 4
