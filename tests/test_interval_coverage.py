"""Every interval against values that are known: measured coverage, coverage by enumeration, identities of width."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

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
    empirical_bernstein_lower_bound,
    hcope_lower_bound,
    hoeffding_lower_bound,
    in_unit_range,
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
