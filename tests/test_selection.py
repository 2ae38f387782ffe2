"""What a ranking is worth, by hand, and the two stages of a selection."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.evaluation import BEHAVIOR, Evaluation
from offrl_models.ope.estimates import LEVEL, Estimates
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.intervals import ensemble
from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import World
from offrl_models.schema import InputError
from offrl_models.selection import (
    beats,
    draw_gains,
    error_rates,
    first_order_gain,
    order,
    rank,
    regret_at_k,
    sharpe_ratio_at_k,
    spearman,
    two_stage,
    worth,
)

VALUE = np.array([1.0, 4.0, 2.0, 3.0])
ESTIMATE = np.array([9.0, 2.0, 8.0, 7.0])  # the best policy is thought to be the worst


def test_rank_correlation_by_hand() -> None:
    """Ranks 4 1 3 2 against 1 4 2 3: opposite. Swapping the middle two leaves 1 - 6 * 2 / (4 * 15)."""
    assert spearman(ESTIMATE, VALUE) == pytest.approx(-1.0)
    assert spearman(np.array([1.0, 4.0, 3.0, 2.0]), VALUE) == pytest.approx(0.8)
    assert math.isnan(spearman(np.ones(4), VALUE))
    with pytest.raises(InputError, match="NaN"):
        spearman(np.array([1.0, np.nan, 2.0, 3.0]), VALUE)


@given(st.integers(0, 10_000))
def test_rank_correlation_with_ties_is_that_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimate, value = rng.integers(0, 6, size=(2, 12)).astype(float)
    assert spearman(estimate, value) == pytest.approx(stats.spearmanr(estimate, value)[0])


def test_regret_by_hand() -> None:
    assert [regret_at_k(ESTIMATE, VALUE, k) for k in (1, 2, 3, 4)] == [3.0, 2.0, 1.0, 0.0]
    assert regret_at_k(VALUE, VALUE, 1) == 0.0
    assert regret_at_k(np.ones(4), VALUE, 2) == 0.0  # of equal estimates those that come first
    for k in (0, 5):
        with pytest.raises(InputError, match="from 1 to 4"):
            regret_at_k(ESTIMATE, VALUE, k)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_regret_never_rises_with_more_tries_and_does_not_depend_on_scale(seed: int, k: int) -> None:
    estimate, value = np.random.default_rng(seed).normal(size=(2, 9))
    found = regret_at_k(estimate, value, k)
    assert 0.0 <= regret_at_k(estimate, value, k + 1) <= found
    assert regret_at_k(np.exp(estimate), 2 * value + 1, k) == pytest.approx(2 * found)


def test_errors_of_a_rule_by_hand() -> None:
    """Champion 2: policies of 1 and 2 are no better, 4 and 3 are. One of each kind is judged wrongly, then none or all."""
    assert error_rates(np.array([True, True, False, False]), VALUE, 2.0) == (0.5, 0.5)
    assert error_rates(np.array([True, True, True, True]), VALUE, 2.0) == (1.0, 0.0)
    assert error_rates(np.array([False, True, False, True]), VALUE, 2.0) == (0.0, 0.0)
    assert error_rates(np.array([True, False, False, False]), VALUE, 3.5) == pytest.approx((1 / 3, 1.0))
    nobody_worse, nobody_better = error_rates(np.ones(4, bool), VALUE, 0.0), error_rates(np.ones(4, bool), VALUE, 4.0)
    assert math.isnan(nobody_worse[0]) and nobody_worse[1] == 0.0
    assert nobody_better[0] == 1.0 and math.isnan(nobody_better[1])


def test_sharpe_ratio_by_hand() -> None:
    """The two that are thought best are worth 1 and 2: deviation 1/2. Over a champion of 1.5 the better gains 1/2."""
    assert sharpe_ratio_at_k(ESTIMATE, VALUE, 1.5, 2) == pytest.approx(1.0)
    assert sharpe_ratio_at_k(ESTIMATE, VALUE, 1.5, 4) == pytest.approx(2.5 / np.sqrt(1.25))
    assert sharpe_ratio_at_k(ESTIMATE, VALUE, 3.0, 2) == pytest.approx(-2.0)
    assert math.isnan(sharpe_ratio_at_k(ESTIMATE, VALUE, 1.5, 1))
    assert math.isnan(sharpe_ratio_at_k(ESTIMATE, np.full(4, 0.1), 0.0, 3))


def test_what_a_ranking_was_worth_by_hand() -> None:
    """Of the champion, worth 2, it is estimated 7.5: policies of 1 and 2 seem better, and those of 4 and 3 do not."""
    found = worth(ESTIMATE, VALUE, (7.5, 2.0))
    assert found.pop("sharpe_ratio_at_k") == pytest.approx(1.0 / np.std([1.0, 2.0, 3.0]))
    assert found.pop("spearman") == pytest.approx(-1.0)
    assert found == {"regret_at_1": 3.0, "regret_at_k": 1.0, "type_1_error": 1.0, "type_2_error": 1.0}
    two = worth(np.array([1.0, 2.0]), np.array([5.0, 5.0]), (0.0, 1.0))
    untold = dict.fromkeys(("spearman", "sharpe_ratio_at_k", "type_1_error"))
    assert two == {**untold, "regret_at_1": 0.0, "regret_at_k": 0.0, "type_2_error": 0.0}


def scorer(scores: dict[str, float], asked: list[list[str]]):
    def score(names: Sequence[str]) -> list[float]:
        asked.append(list(names))
        return [scores[name] for name in names]

    return score


def test_the_second_stage_sees_what_the_first_kept_and_decides() -> None:
    asked: list[list[str]] = []
    cheap = scorer({"a": 1.0, "b": 5.0, "c": 3.0, "d": 4.0}, asked)
    full = scorer({"b": 0.1, "c": 0.9, "d": 0.5}, asked)
    found = two_stage(["a", "b", "c", "d"], cheap, full, keep=3)
    assert asked == [["a", "b", "c", "d"], ["b", "d", "c"]]
    assert list(found.cheap.items()) == [("b", 5.0), ("d", 4.0), ("c", 3.0), ("a", 1.0)]
    assert list(found.full.items()) == [("c", 0.9), ("d", 0.5), ("b", 0.1)]


@given(st.permutations(["a", "b", "c", "d"]))
def test_equal_scores_are_ranked_by_name_whatever_the_order(names: list[str]) -> None:
    found = two_stage(names, scorer(dict.fromkeys("abcd", 1.0), []), scorer(dict.fromkeys("abcd", 2.0), []), keep=2)
    assert list(found.cheap) == ["a", "b", "c", "d"] and list(found.full) == ["a", "b"]


def test_a_score_that_is_no_number_is_an_error() -> None:
    good, bad = scorer({"a": 1.0, "b": 2.0}, []), scorer({"a": math.nan, "b": 2.0}, [])
    for first, second in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match="1 candidates have no score that is a number: a"):
            two_stage(["a", "b"], first, second, keep=2)
    for keep in (0, 3):
        with pytest.raises(InputError, match="cannot be kept"):
            two_stage(["a", "b"], good, good, keep=keep)
    with pytest.raises(InputError, match="name each once"):
        two_stage(["a", "a"], good, good, keep=1)


def test_the_best_of_every_family_is_kept_while_there_are_places() -> None:
    """By the cheap score c1 and b1 are the last; each is all that its family has."""
    names = ["a1", "a2", "a3", "b1", "c1"]
    cheap = scorer({"a1": 5.0, "a2": 4.0, "a3": 3.0, "b1": 2.0, "c1": 1.0}, [])
    full = scorer(dict(zip(names, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True)), [])

    def kept(keep: int) -> list[str]:
        return list(two_stage(names, cheap, full, keep, family=lambda name: name[0]).full)

    assert kept(3) == ["c1", "b1", "a1"] and kept(4) == ["c1", "b1", "a2", "a1"]
    assert kept(2) == ["a2", "a1"]  # three families and two places: by the score alone


def test_an_order_by_hand() -> None:
    """Four draws of three candidates; in the last one the first two are equal."""
    draws = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0]])
    found = order(draws, level=0.0)  # the median rank
    assert found.best == pytest.approx([2.5 / 4, 0.5 / 4, 1 / 4])
    assert beats(draws, 0, 1) == 2.5 / 4 and beats(draws, 1, 0) == 1.5 / 4
    assert found.low_rank.tolist() == [1, 2, 3] and found.high_rank.tolist() == [1, 2, 3]
    whole = order(draws, level=1.0 - 1e-9)
    assert whole.low_rank.tolist() == [1, 1, 1] and whole.high_rank.tolist() == [3, 2, 3]
    with pytest.raises(InputError, match="NaN"):
        order(np.array([[1.0, np.nan]]))


def test_two_independent_normals_have_the_order_that_is_known() -> None:
    """A ~ N(1, 1) and B ~ N(0, 4), on the grid of all pairs of their quantiles: P(A > B) = Phi(1 / sqrt(5))."""
    at = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    first, second = np.meshgrid(1.0 + at, 2.0 * at)
    draws = np.stack([first.ravel(), second.ravel()], 1)
    exact = stats.norm.cdf(1 / np.sqrt(5.0))
    assert beats(draws, 0, 1) == pytest.approx(exact, abs=1e-3)
    assert order(draws).best == pytest.approx([exact, 1 - exact], abs=1e-3)


@given(st.integers(2, 5))
def test_candidates_that_are_the_same_share_everything(n: int) -> None:
    one = np.random.default_rng(n).normal(size=(50, 1))
    draws = np.repeat(one, n, axis=1) * (1 + 1e-12 * np.arange(n))  # rounding tells nothing apart
    found = order(draws)
    assert found.best == pytest.approx([1 / n] * n) and beats(draws, 0, n - 1) == 0.5
    assert found.low_rank.tolist() == [1] * n and found.high_rank.tolist() == [n] * n


def test_what_is_far_apart_is_surely_in_order() -> None:
    draws = np.random.default_rng(0).uniform(size=(200, 3)) + np.array([4.0, 2.0, 0.0])
    found = order(draws)
    assert found.best.tolist() == [1.0, 0.0, 0.0] and beats(draws, 0, 1) == 1.0
    assert found.low_rank.tolist() == found.high_rank.tolist() == [1, 2, 3]


def test_the_error_of_the_fits_is_that_of_a_t_distribution() -> None:
    """No spread over episodes: P(gain > 0) = T(mean / (s sqrt(1 + 1/3))) with 2 degrees of freedom, and its interval is that
    of the ensemble."""
    members = np.array([0.1, 0.3, 0.7])
    gains = np.repeat(np.stack([members, np.zeros(3)])[:, :, None], 5, axis=2)
    draws = draw_gains(gains, BootstrapSamples(5, 40_000, seed=1))
    scale = members.std(ddof=1) * np.sqrt(1 + 1 / 3)
    assert beats(draws, 0, 1) == pytest.approx(stats.t.cdf(members.mean() / scale, 2), abs=0.01)
    interval = ensemble(members.tolist(), np.full(5, 0.7), 0.5)
    assert np.quantile(draws[:, 0], [0.25, 0.75]) == pytest.approx([interval.low, interval.high], abs=0.01)
    with pytest.raises(InputError, match="at least 2 members"):
        draw_gains(gains[:, :1], BootstrapSamples(5, 100, seed=1))


def test_the_error_of_the_episodes_is_theirs_and_what_is_in_common_cancels() -> None:
    """Members agree, so that only episodes vary: the standard error is sd / sqrt(n), and a constant lead is never lost."""
    luck = np.random.default_rng(2).normal(size=400)
    gains = np.repeat(np.stack([luck + 0.01, luck])[:, None, :], 3, axis=1)
    draws = draw_gains(gains, BootstrapSamples(400, 4_000, seed=3))
    assert draws.mean(0) == pytest.approx(gains[:, 0].mean(1), abs=0.005)
    assert draws.std(0) == pytest.approx([luck.std() / 20] * 2, rel=0.05)
    assert beats(draws, 0, 1) == 1.0 and np.ptp(draws[:, 0] - draws[:, 1]) < 1e-12


def test_candidates_are_ranked_by_the_least_gain_of_a_member_and_by_name_where_that_is_equal(tiny: World) -> None:
    """Whatever the mean of the members, or the value of the behavior, which stands among the candidates."""
    gains = {"z": [1.5, 1.6], "a": [1.0, 3.0], "b": [1.0, 9.0], "c": [-2.0, 7.0]}
    names, log = ["b", "c", BEHAVIOR, "z", "a"], tiny.simulate(30, 0)
    rng = np.random.default_rng(0)
    base, luck = rng.normal(size=(2, 30)), 0.1 * rng.normal(size=(5, 2, 30))
    luck -= luck.mean(2, keepdims=True)
    initial = base + luck + np.array([gains.get(name, [0.0, 0.0]) for name in names])[:, :, None]
    rows, samples = np.zeros((5, log.n_rows)), BootstrapSamples(30, 200, 1)
    estimates = {name: Estimates({}, float(place), []) for place, name in enumerate(names)}
    values = FQEValues(rows, rows, rows, initial)
    found = rank(Evaluation(names, {}, log, log, {}, {}, values, samples, estimates))
    assert [(row["rank"], row["candidate"]) for row in found] == [(1, "z"), (2, "a"), (3, "b"), (4, "c")]
    assert [row["effective_episodes"] for row in found] == [3.0, 4.0, 0.0, 1.0]
    places = [names.index(name) for name in gains]
    draws = draw_gains(initial[places] - initial[2], samples)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    sure = order(draws)
    for place, row in enumerate(found):
        mine = gains[row["candidate"]]
        assert row["gain_by_member"] == pytest.approx(mine, abs=1e-12)
        assert (row["score"], row["gain"]) == pytest.approx((min(mine), np.mean(mine)), abs=1e-12)
        assert row["gain_interval"] == [low[place], high[place]] and row["probability_best"] == sure.best[place]
        assert row["rank_interval"] == [sure.low_rank[place], sure.high_rank[place]]
        assert row["beats_next"] == (beats(draws, place, place + 1) if place < 3 else None)


def test_the_first_order_gain_is_the_slope_of_the_value(tiny: World) -> None:
    """All trajectories of the behavior, by their probability, against values a little on either side of it."""
    episodes, probability = tiny.enumerate(3)
    policy = np.random.default_rng(5).dirichlet([1.0, 1.0], size=tiny.n_states)
    q, state = tiny.q_values(tiny.behavior), states_of(episodes)[0]
    v, base = ((each * q).sum(1)[state] for each in (policy, tiny.behavior))

    def value(share: float) -> float:
        return tiny.value((1 - share) * tiny.behavior + share * policy)

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    assert probability @ first_order_gain(episodes, v, base) == pytest.approx(slope, abs=1e-7) and abs(slope) > 0.01
    assert not first_order_gain(episodes, base, base).any()
