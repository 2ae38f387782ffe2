"""The course of a gain: halves and parts of the log, and what has to be left of a gain in the newer half."""

import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models import course
from offrl_models.ope.intervals import confidence_sequence_width

ALPHA = 0.05


def test_halves_are_told_by_what_was_recorded_first() -> None:
    outcome, oldest_first = np.array([5.0, 1.0, 2.0, 9.0, 4.0]), np.array([3, 0, 2, 4, 1])  # 9, 5, then 2, 4, 1
    older, newer = course.halves(outcome, oldest_first, 0.1)
    error = np.std([2.0, 4.0, 1.0], ddof=1) / np.sqrt(3)
    assert (newer.episodes, newer.difference) == (3, pytest.approx(7 / 3))
    assert newer.lower_bound == pytest.approx(7 / 3 - stats.t.ppf(0.9, 2) * error)
    assert newer.upper_bound == pytest.approx(7 / 3 + stats.t.ppf(0.9, 2) * error)
    assert (older.name, older.episodes, older.difference) == ("older half", 2, 7.0)
    assert math.isinf(course.halves(outcome[:1], np.array([0]), 0.1)[1].lower_bound)


def test_the_course_is_told_oldest_first_and_leaves_no_episode_out() -> None:
    rng = np.random.default_rng(0)
    outcome, oldest_first = rng.normal(size=37), rng.permutation(37)
    found = course.parts(outcome, oldest_first, 0.05)
    assert len(found) == 10 and sum(part.episodes for part in found) == 37
    assert found[0].difference == pytest.approx(outcome[oldest_first[:4]].mean())
    assert found[-1].difference == pytest.approx(outcome[oldest_first[-3:]].mean())
    assert all(part.lower_bound < part.difference < part.upper_bound for part in found)
    assert [part.episodes for part in course.parts(outcome[:5], np.arange(5), 0.05)] == [3, 2]


def chance(gain: float, level: float, width: float, ratio: float) -> float:
    """Of both bounds above 0 where the older half gains `gain` and the newer one 3% of it, by the bivariate normal
    distribution; the errors of their means are `ratio` and 1."""
    whole = np.array([0.5, 0.5])  # of older and newer
    rest = np.array([-course.KEPT, 1.0])
    error = np.diag([ratio**2, 1.0])
    of_whole, of_rest = (math.sqrt(part @ error @ part) for part in (whole, rest))
    correlation = whole @ error @ rest / (of_whole * of_rest)
    gains = gain * np.array([1.0, 0.03])
    mean = np.array([whole @ gains / of_whole - width, rest @ gains / of_rest - level])
    both = stats.multivariate_normal(np.zeros(2), cast(Any, [[1, correlation], [correlation, 1]]))
    return float(both.cdf(mean))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("alpha", "width"), [(0.1, 1.281552), (0.05, 1.644854), (0.05, 2.78), (0.005, 3.6)])
def test_whatever_was_gained_before_both_bounds_are_above_0_with_alpha_at_most(
    alpha: float, width: float, ratio: float
) -> None:
    rng, n = np.random.default_rng(0), 4000
    outcome = np.empty(n)
    for place, scale in ((np.arange(n // 2), ratio), (np.arange(n // 2, n), 1.0)):
        drawn = rng.normal(size=n // 2)
        outcome[place] = scale * (drawn - drawn.mean()) / drawn.std(ddof=1) * np.sqrt(n / 2)
    found = course.kept(outcome, np.arange(n), alpha=alpha, width=width)
    assert found.difference == pytest.approx(0.0, abs=1e-9)
    level = -found.lower_bound / math.hypot(1.0, course.KEPT * ratio)
    worst = max(chance(gain, level, width, ratio) for gain in np.linspace(0, 20, 201))
    assert worst == pytest.approx(alpha, rel=0.02)


def test_what_is_kept_is_the_newer_half_less_a_fifth_of_the_older_one() -> None:
    rng = np.random.default_rng(1)
    outcome, oldest_first = rng.normal(size=1001), rng.permutation(1001)
    older, newer = outcome[oldest_first[:500]], outcome[oldest_first[500:]]
    found = course.kept(outcome, oldest_first, alpha=ALPHA, width=2.8)
    assert found.difference == pytest.approx(newer.mean() - older.mean() / 5)
    assert course.kept(outcome + 3, oldest_first, alpha=ALPHA, width=2.8).lower_bound == pytest.approx(
        found.lower_bound + 3 * 0.8
    )
    strict = [course.kept(outcome, oldest_first, alpha=alpha, width=2.8).lower_bound for alpha in (0.01, 0.05, 0.1)]
    assert strict == sorted(strict)
    narrow = course.kept(outcome, oldest_first, alpha=ALPHA, width=1.7).lower_bound
    assert narrow < found.lower_bound  # a bound of the whole that asks less leaves more to ask here


@pytest.mark.parametrize("apart", [False, True])
def test_episodes_of_one_unit_are_one_draw(apart: bool) -> None:
    """Every number stands there twice: side by side, or once in each half."""
    once = np.random.default_rng(2).normal(size=600)
    outcome = np.tile(once, 2) if apart else np.repeat(once, 2)
    unit = np.tile(np.arange(600), 2) if apart else np.repeat(np.arange(600), 2)
    found = course.kept(outcome, np.arange(1200), alpha=ALPHA, width=2.8, unit=unit)
    if apart:  # mean - mean / 5, as certain as the whole: only a large earlier gain could be told from the present one
        error = 0.8 * once.std() / np.sqrt(600)
        assert found.difference == pytest.approx(0.8 * once.mean())
        assert found.difference - 4 * error < found.lower_bound < found.difference
    else:
        alone = course.kept(once, np.arange(600), alpha=ALPHA, width=2.8)
        assert found.lower_bound == pytest.approx(alone.lower_bound, rel=0.02)
        assert course.kept(outcome, np.arange(1200), alpha=ALPHA, width=2.8).lower_bound > found.lower_bound + 0.005


@given(st.lists(st.floats(-1e6, 1e6), max_size=12), st.floats(0.001, 0.4), st.floats(0.5, 6))
def test_any_outcomes_have_a_bound_that_is_no_higher_than_the_mean_or_none(
    values: list[float], alpha: float, width: float
) -> None:
    outcome = np.array(values, float)
    found = course.kept(outcome, np.arange(len(outcome)), alpha=alpha, width=width)
    if len(outcome) < 4:
        assert found.lower_bound == -math.inf and math.isnan(found.difference) is (len(outcome) < 2)
    else:
        assert np.isfinite([found.difference, found.lower_bound]).all() and found.lower_bound <= found.difference


def test_however_noisy_the_older_half_is_its_gain_is_held_against_the_newer_one() -> None:
    rng, n = np.random.default_rng(3), 2000
    outcome = np.concatenate([rng.normal(scale=20.0, size=n // 2), rng.normal(size=n // 2)])
    found = course.kept(outcome, np.arange(n), alpha=ALPHA, width=2.8)
    assert found.lower_bound == found.difference  # and not above it


def test_simulated_gains_that_all_but_ended_pass_no_more_often_than_alpha() -> None:
    n, logs, passes = 1000, 300, {}
    width = confidence_sequence_width(n, alpha=ALPHA, planned=n) * np.sqrt(n)
    for gain in (0.0, 0.2, 0.4, 1.0):
        rng = np.random.default_rng(7)
        passes[gain] = 0
        for _ in range(logs):
            outcome = rng.normal(size=n)
            outcome[: n // 2] += gain
            outcome[n // 2 :] += 0.03 * gain
            whole = outcome.mean() > width * outcome.std() / np.sqrt(n)
            passes[gain] += whole and course.kept(outcome, np.arange(n), alpha=ALPHA, width=width).lower_bound > 0
    assert max(passes.values()) <= stats.binom.ppf(0.999, logs, ALPHA), passes
    assert passes[0.2] >= 4 and passes[1.0] == 0  # and no less often than it has to
