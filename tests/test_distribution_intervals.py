"""Intervals and bands around the distribution of the return, by hand and by coverage, and what is refused."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from scipy import stats

from offrl_models.ope.distribution import (
    band,
    band_interval,
    bootstrap_functional,
    cvar,
    dr_cdf,
    mean,
    quantile,
    tis_cdf,
    variance,
    wis_cdf,
)
from offrl_models.ope.importance import wis
from offrl_models.ope.intervals import bootstrap
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.worlds import random_policy
from offrl_models.schema import Episodes, InputError
from tests.test_distribution import FUNCTIONALS, HIGH, LOW, WORLDS, one_step, ratio_of, read

# Intervals


def test_a_bootstrap_forms_the_cdf_again_in_every_sample() -> None:
    world = WORLDS[0]
    episodes = world.simulate(200, 1)
    ratio, shares = ratio_of(random_policy(world, 3), episodes), bootstrap_shares(200, 100, 0)
    found = wis_cdf(episodes, ratio, low=LOW, high=HIGH)
    mine, theirs = bootstrap_functional(found, mean, shares, 0.9), bootstrap(wis(episodes, ratio), shares, 0.9)
    assert (mine.estimate, mine.low, mine.high) == pytest.approx((theirs.estimate, theirs.low, theirs.high))
    assert mine.level == 0.9
    for name, functional in FUNCTIONALS.items():
        by_sample = [read(found, functional, share) for share in shares]
        interval = bootstrap_functional(found, functional, shares, 0.8)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(by_sample, [0.1, 0.9]))), name
        assert interval.low <= interval.estimate <= interval.high, name


def test_constant_returns_have_intervals_of_no_width() -> None:
    rng = np.random.default_rng(0)
    episodes, ratio = one_step([2.5] * 40, list(rng.exponential(size=40)))
    found, shares = wis_cdf(episodes, ratio, low=0.0, high=9.0), bootstrap_shares(40, 50, 0)
    for name, functional in FUNCTIONALS.items():
        interval = bootstrap_functional(found, functional, shares, 0.95)
        value = 0.0 if name == "variance" else 2.5
        assert (interval.low, interval.estimate, interval.high) == pytest.approx((value,) * 3, abs=1e-12), name


def drawn(n: int, rng: np.random.Generator) -> tuple[Episodes, np.ndarray]:
    """Behavior 50:50, policy 90:10; action 0 returns a uniform number, action 1 twice one. Weights are 1.8 or 0.2."""
    action = rng.integers(0, 2, n)
    return one_step(list((1.0 + action) * rng.random(n)), list(np.where(action == 0, 1.8, 0.2)))


def drawn_cdf(x: np.ndarray) -> np.ndarray:
    return 0.9 * np.clip(x, 0, 1) + 0.1 * np.clip(x / 2, 0, 1)


def test_bootstrap_intervals_cover_about_as_often_as_they_say() -> None:
    """300 logs of 150 episodes: a 90% interval of the CVaR of the worst quarter."""
    u = np.linspace(0, 0.25, 100_001)
    true = np.interp(u, drawn_cdf(np.linspace(0, 2, 20_001)), np.linspace(0, 2, 20_001)).mean()
    rng, covered = np.random.default_rng(2), 0
    shares = bootstrap_shares(150, 150, 0)
    for _ in range(300):
        episodes, ratio = drawn(150, rng)
        found = bootstrap_functional(wis_cdf(episodes, ratio, low=0.0, high=2.0), partial(cvar, tail=0.25), shares, 0.9)
        covered += found.low <= true <= found.high
    assert stats.binom.ppf(0.001, 300, 0.9) <= covered <= 300 * 0.97


def test_the_band_by_hand() -> None:
    """sqrt(log(2 e / 0.05) / 8) is 0.765578: 4 episodes, weights up to 1; with twice the limit it is twice as wide."""
    episodes, ratio = one_step([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    found = tis_cdf(episodes, ratio, low=0.0, high=5.0)
    lower, upper = band(found, 1.0, 0.95)
    assert upper == pytest.approx(np.array([0.765578, 1.0, 1.0, 1.0, 1.0, 1.0]), abs=1e-6)
    assert lower == pytest.approx(np.array([0.0, 0.0, 0.0, 0.0, 0.234422, 1.0]), abs=1e-6)
    many, ratio = one_step([1.0, 2.0, 3.0, 4.0] * 100, [1.0] * 400)
    found = tis_cdf(many, ratio, low=0.0, high=5.0)
    for limit in (1.0, 2.0):
        lower, upper = band(found, limit, 0.95)
        assert upper[2] - 0.5 == pytest.approx(limit * 0.0765578, abs=1e-6)
        assert 0.5 - lower[2] == pytest.approx(limit * 0.0765578, abs=1e-6)


@pytest.mark.parametrize("level", [0.2, 0.5, 0.95])
def test_the_band_holds_the_whole_cdf_at_least_as_often_as_it_says(level: float) -> None:
    """400 logs of 80 episodes; and the estimate is sometimes further off than half the band, so it is not idle."""
    rng, held, half = np.random.default_rng(0), 0, 0
    for _ in range(400):
        episodes, ratio = drawn(80, rng)
        found = tis_cdf(episodes, ratio, low=0.0, high=2.0)
        lower, upper = band(found, 1.8, level)
        true, estimate = drawn_cdf(found.points), found.estimate()
        # Just before each jump the step functions still have the value of the point before.
        ok = (lower <= true + 1e-12) & (true <= upper + 1e-12)
        ok[1:] &= true[1:] <= upper[:-1] + 1e-12
        held += ok[:-1].all()
        half += np.abs(true - estimate)[:-1].max() > 0.25 * 1.8 * np.sqrt(np.log(2 * np.e / (1 - level)) / 160)
    assert held >= stats.binom.ppf(0.001, 400, level)
    assert half > 20


def test_the_inequality_of_the_band_for_weights_of_0_or_the_limit() -> None:
    """Where half the episodes have no weight the error is that of DKW with a limit of 2; the bound is e times DKW's."""
    rng = np.random.default_rng(1)
    n, t, runs = 60, np.array([0.08, 0.1, 0.12, 0.15]), 2000
    returns = np.sort(rng.random((runs, n)), axis=1)
    cdf = np.cumsum(2.0 * rng.integers(0, 2, (runs, n)), axis=1) / n
    before = np.concatenate([np.zeros((runs, 1)), cdf[:, :-1]], axis=1)
    error = np.maximum(np.abs(cdf - returns), np.abs(before - returns)).max(1)
    exceeded = (error[:, None] > 2 * t).mean(0)
    assert (exceeded <= 2 * np.e * np.exp(-2 * n * t**2)).all() and exceeded[0] > 0.1


def test_what_the_band_says_about_functionals() -> None:
    """It contains the estimate, grows with the level, shrinks like n^-1/2, and holds the truth of all of them at once."""
    rng, right = np.random.default_rng(5), 0
    points = np.linspace(0, 2, 20_001)
    names = ("mean", "median", "lower decile", "CVaR 0.2")
    truth = {name: float(FUNCTIONALS[name](points, drawn_cdf(points)[None, :])[0]) for name in names}
    for _ in range(100):
        found = tis_cdf(*drawn(200, rng), low=0.0, high=2.0)
        intervals = {name: band_interval(found, FUNCTIONALS[name], 1.8, 0.9) for name in names}
        assert all(i.low <= i.estimate <= i.high for i in intervals.values())
        right += all(intervals[n].low - 1e-3 <= truth[n] <= intervals[n].high + 1e-3 for n in names)
    assert right >= stats.binom.ppf(0.001, 100, 0.9)

    def width(n: int, level: float) -> float:
        found = band_interval(tis_cdf(*drawn(n, np.random.default_rng(0)), low=0.0, high=2.0), mean, 1.8, level)
        return found.high - found.low

    assert width(1000, 0.8) < width(1000, 0.9) < width(1000, 0.99)
    assert width(1000, 0.9) / width(16_000, 0.9) == pytest.approx(4.0, rel=0.1)


# What is refused


def test_what_a_distribution_refuses() -> None:
    episodes, ratio = one_step([0.0, 1.0], [0.5, 1.5])
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        tis_cdf(episodes, ratio, low=0.0, high=0.5)
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        wis_cdf(episodes, ratio, low=0.5, high=1.0)
    with pytest.raises(InputError, match="2 episodes are truncated"):
        tis_cdf(dataclasses.replace(episodes, truncated=np.ones(2, bool)), ratio, low=0.0, high=1.0)
    with pytest.raises(InputError, match="ratio holds 1 values that are NaN"):
        tis_cdf(episodes, np.array([1.0, np.nan]), low=0.0, high=1.0)
    with pytest.raises(InputError, match="1 values that are NaN"):
        tis_cdf(dataclasses.replace(episodes, reward=np.array([np.inf, 1.0])), ratio, low=0.0, high=1.0)
    for estimator in (tis_cdf, wis_cdf):
        with pytest.raises(InputError, match="does not overlap"):
            estimator(episodes, np.zeros(2), low=0.0, high=1.0).estimate()
        with pytest.raises(InputError, match="does not overlap"):
            estimator(episodes, np.array([0.0, 2.0]), low=0.0, high=1.0).resampled(np.array([[0.5, 0.5], [1.0, 0.0]]))
    q, points = np.full((2, 2), 0.5), np.array([0.0, 1.0])
    with pytest.raises(InputError, match="must rise"):
        dr_cdf(episodes, ratio, q, q, points[::-1].copy() + 1)
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        dr_cdf(episodes, ratio, q, q, points - 0.5)
    with pytest.raises(InputError, match="v is no probability in 2 rows"):
        dr_cdf(episodes, ratio, q, 3 * q, points)
    with pytest.raises(InputError, match="q is no probability in 2 rows"):
        dr_cdf(episodes, ratio, q * np.nan, q, points)


def test_what_functionals_and_bands_refuse() -> None:
    episodes, ratio = one_step([0.0, 1.0], [0.5, 1.5])
    found = tis_cdf(episodes, ratio, low=0.0, high=1.0)
    with pytest.raises(InputError, match="1 importance weights exceed 1.2"):
        band(found, 1.2, 0.9)
    with pytest.raises(InputError, match="`tis_cdf`"):
        band(wis_cdf(episodes, ratio, low=0.0, high=1.0), 2.0, 0.9)
    with pytest.raises(InputError, match="variance"):
        band_interval(found, variance, 2.0, 0.9)
    for tail in (0.0, 1.1):
        with pytest.raises(InputError, match="tail"):
            read(found, partial(cvar, tail=tail))
        with pytest.raises(InputError, match="level of a quantile"):
            read(found, partial(quantile, level=tail))


def test_a_sum_of_rewards_may_exceed_the_range_by_its_rounding() -> None:
    episodes, ratio = one_step([0.1 + 0.2, -1e-17], [1.0, 1.0])
    assert tis_cdf(episodes, ratio, low=0.0, high=0.3).points.tolist() == [0.0, 0.3]
