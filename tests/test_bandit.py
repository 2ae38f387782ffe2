"""Horizon 1: estimators under their bandit names, and logarithmic smoothing."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.bandit import (
    balanced,
    bandit_terms,
    dm,
    logarithmic_smoothing,
    logarithmic_smoothing_lower_bound,
    smoothed_gain,
)
from offrl_models.ope.importance import Terms, tis
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError

EXACT = 1e-9
LOWEST = -10.0


def states(episodes: Episodes) -> np.ndarray:
    return episodes.observation[:, 0].astype(int)


def ratio_of(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states(episodes)])


def log(action: list[int], reward: list[float], action_prob: list[float]) -> Episodes:
    """A bandit log with one observation and two actions."""
    n = len(action)
    return Episodes(
        episode_id=np.arange(n),
        offsets=np.arange(n + 1),
        observation=np.zeros((n, 1), np.float32),
        final_observation=np.zeros((n, 1), np.float32),
        action=np.array(action),
        mask=np.ones((n, 2), bool),
        reward=np.array(reward, np.float64),
        terminated=np.ones(n, bool),
        truncated=np.zeros(n, bool),
        action_prob=np.array(action_prob, np.float64),
        gamma=0.9,
    )


def picked(episodes: Episodes, rows: np.ndarray) -> Episodes:
    """Some rows of a bandit log, in some order, any of them several times."""
    names = ("observation", "final_observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    return dataclasses.replace(
        episodes,
        episode_id=np.arange(len(rows)),
        offsets=np.arange(len(rows) + 1),
        **{name: getattr(episodes, name)[rows] for name in names},
    )


BANDITS = [
    random_world(2, 2, 1, 0.9, seed=1),
    random_world(3, 3, 1, 1.0, seed=2),
    random_world(3, 2, 1, 0.5, 3, masked=True),
]


def model_of(world: World, policy: np.ndarray, seed: int) -> np.ndarray:
    """A value model that is wrong."""
    return np.random.default_rng(seed).normal(size=policy.shape)


def every_term(world: World, policy: np.ndarray, episodes: Episodes, q: np.ndarray) -> dict[str, Terms]:
    s = states(episodes)
    v = (policy * q).sum(1)
    return bandit_terms(
        episodes, ratio_of(policy, episodes), q[s, episodes.action], v[s], low=LOWEST, high=LOWEST + 1.0
    )


@pytest.mark.parametrize("world", BANDITS, ids=["two-by-two", "three-by-three", "masked"])
def test_the_sum_over_every_outcome_is_the_exact_value(world: World) -> None:
    episodes, probability = world.enumerate(1)
    policy = random_policy(world, 5)
    found = every_term(world, policy, episodes, model_of(world, policy, 0))
    for name in ("IPW", "SNIPW", "DR", "SNDR"):
        assert found[name].estimate(probability) == pytest.approx(world.value(policy), abs=EXACT), name
    exact = every_term(world, policy, episodes, world.q_values(policy))["DM"]
    assert exact.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    assert found["DM"].estimate(probability) != pytest.approx(world.value(policy), abs=1e-3)


def test_the_direct_method_reads_the_first_observation_of_each_episode(tiny: World) -> None:
    """At any horizon: with the true values, the exact value."""
    episodes, probability = tiny.enumerate(3)
    policy = random_policy(tiny, 5)
    v = (policy * tiny.q_values(policy)).sum(1)[states(episodes)]
    assert dm(episodes, v).estimate(probability) == pytest.approx(tiny.value(policy), abs=EXACT)
    with pytest.raises(InputError, match="NaN"):
        dm(episodes, v * np.nan)


@given(st.integers(0, 10_000))
def test_on_policy_every_estimator_but_the_smoothed_one_is_the_mean_reward(seed: int) -> None:
    world = random_world(2, 3, 1, 0.9, seed=seed)
    episodes = world.simulate(25, seed)
    found = every_term(world, world.behavior, episodes, np.zeros((world.n_states, 3)))
    for name in ("IPW", "SNIPW", "DR", "SNDR"):
        assert found[name].estimate() == pytest.approx(episodes.reward.mean(), abs=EXACT), name
    assert found["LS"].estimate() <= episodes.reward.mean() + EXACT


def test_every_name_means_its_estimator() -> None:
    """Ratios 3 and 1, rewards 1 and 0.5, q 0.5 and 0, v 0.4 and 0.2, by hand; lambda is 1 / sqrt(2)."""
    episodes, ratio = log([0, 1], [1.0, 0.5], [0.2, 0.8]), np.array([3.0, 1.0])
    found = bandit_terms(episodes, ratio, np.array([0.5, 0.0]), np.array([0.4, 0.2]), low=0.0, high=0.0 + 1.0)
    assert {name: terms.estimate() for name, terms in found.items()} == pytest.approx(
        {
            "IPW": 3.5 / 2,
            "SNIPW": 3.5 / 4,
            "DM": 0.3,
            "DR": (3 * 0.5 + 0.5) / 2 + 0.3,
            "SNDR": (3 * 0.5 + 0.5) / 4 + 0.3,
            "LS": np.sqrt(0.5) * (np.log1p(3 * np.sqrt(0.5)) + np.log1p(0.5 * np.sqrt(0.5))),
        }
    )


def test_longer_episodes_are_no_bandit_log(tiny: World) -> None:
    episodes = tiny.simulate(20, 0)
    ones = np.ones(episodes.n_rows)
    for call in (
        lambda: bandit_terms(episodes, ones, ones, ones, low=LOWEST, high=LOWEST + 1.0),
        lambda: logarithmic_smoothing(episodes, ones, low=LOWEST, high=LOWEST + 1.0),
        lambda: balanced(episodes, np.zeros(20, int), ones[:, None]),
    ):
        with pytest.raises(InputError, match="more than one step"):
            call()


# Logarithmic smoothing


def test_logarithmic_smoothing_by_hand() -> None:
    """Ratios 4 and 0.5, rewards 1 and 0.6, lambda 0.5: (log 3 / 0.5 + log 1.15 / 0.5) / 2; with 4 rewards lambda is 1/2."""
    episodes = log([0, 1], [1.0, 0.6], [0.2, 0.8])
    ratio = np.array([4.0, 0.5])
    found = logarithmic_smoothing(episodes, ratio, low=0.0, smoothing=0.5)
    assert found.estimate() == pytest.approx(np.log(3.0) + np.log(1.15), abs=1e-12)
    bound = logarithmic_smoothing_lower_bound(episodes, ratio, low=0.0, alpha=0.5, smoothing=0.5)
    assert bound == pytest.approx((np.sqrt(3.0 * 1.15 * 0.5) - 1) / 0.5, abs=1e-12)
    sure = logarithmic_smoothing_lower_bound(episodes, ratio, low=0.0, alpha=1e-6, smoothing=0.5)
    assert sure == 0.0  # no policy is worth less than the lowest reward
    four = log([0] * 4, [1.0] * 4, [0.5] * 4)
    assert logarithmic_smoothing(four, np.full(4, 2.0), low=0.0, high=0.0 + 1.0).estimate() == pytest.approx(
        2 * np.log(2.0)
    )
    by_rule = logarithmic_smoothing_lower_bound(four, np.full(4, 2.0), low=0.0, high=0.0 + 1.0, alpha=0.3)
    assert by_rule == pytest.approx(2.0 * (2.0 * 0.3**0.25 - 1.0))


def test_minus_the_reward_is_the_papers_cost() -> None:
    """In its own terms: risk -mean(log(1 - lambda w c)) / lambda, bounded by psi(risk + log(1 / delta) / (lambda n))."""
    world = random_world(2, 3, 1, 1.0, seed=4)
    episodes = world.simulate(40, 1)
    episodes = dataclasses.replace(episodes, reward=np.random.default_rng(0).random(40))
    ratio, cost, smoothing, delta = ratio_of(random_policy(world, 2), episodes), -episodes.reward, 0.3, 0.05
    risk = -np.log(1 - smoothing * ratio * cost).mean() / smoothing
    upper = (1 - np.exp(-smoothing * (risk + np.log(1 / delta) / (smoothing * 40)))) / smoothing
    found = logarithmic_smoothing(episodes, ratio, low=0.0, smoothing=smoothing).estimate()
    bound = logarithmic_smoothing_lower_bound(episodes, ratio, low=0.0, alpha=delta, smoothing=smoothing)
    assert (found, bound) == pytest.approx((-risk, max(-upper, 0.0)), abs=1e-12)
    assert bound > 0


@given(st.integers(0, 10_000))
def test_smoothing_only_lowers_and_vanishes_towards_zero(seed: int) -> None:
    world = random_world(2, 3, 1, 0.9, seed=seed)
    episodes = world.simulate(30, seed)
    ratio = ratio_of(random_policy(world, seed + 1), episodes)
    lowest = float(world.reward.min())
    shifted = lowest + tis(dataclasses.replace(episodes, reward=episodes.reward - lowest), ratio).estimate()
    found = [logarithmic_smoothing(episodes, ratio, low=lowest, smoothing=s).estimate() for s in (1e-7, 0.01, 0.3, 5.0)]
    assert found[0] == pytest.approx(shifted, abs=1e-4)
    assert found == sorted(found, reverse=True) and found[-1] >= lowest


@given(st.integers(0, 10_000), st.floats(0.1, 50.0), st.floats(-5.0, 5.0))
def test_smoothing_scales_and_shifts_with_rewards(seed: int, scale: float, shift: float) -> None:
    """With lambda in units of 1 / reward."""
    world = random_world(2, 2, 1, 0.9, seed=seed)
    episodes, lowest = world.simulate(20, seed), float(world.reward.min())
    ratio = ratio_of(random_policy(world, 2), episodes)
    moved = dataclasses.replace(episodes, reward=scale * episodes.reward + shift)
    for function in (
        lambda e, low, s: logarithmic_smoothing(e, ratio, low=low, smoothing=s).estimate(),
        lambda e, low, s: logarithmic_smoothing_lower_bound(e, ratio, low=low, alpha=0.2, smoothing=s),
    ):
        before, after = function(episodes, lowest, 0.4), function(moved, scale * lowest + shift - 1e-12, 0.4 / scale)
        assert after == pytest.approx(scale * before + shift, rel=1e-8, abs=1e-8)
    low, high = lowest - 0.1, float(world.reward.max())
    for function in (
        lambda e, low, high: logarithmic_smoothing(e, ratio, low=low, high=high).estimate(),
        lambda e, low, high: logarithmic_smoothing_lower_bound(e, ratio, low=low, high=high, alpha=0.2),
    ):
        after = function(moved, scale * low + shift, scale * high + shift)
        assert after == pytest.approx(scale * function(episodes, low, high) + shift, rel=1e-8, abs=1e-8)
    with pytest.raises(InputError, match="smoothing is by one over a reward"):
        logarithmic_smoothing(episodes, ratio, low=lowest)


def every_sample(world: World, size: int) -> tuple[list[Episodes], np.ndarray]:
    """Every data set of so many independent rows, and its probability."""
    single, probability = world.enumerate(1)
    draws = [np.array(draw) for draw in itertools.product(range(single.n_episodes), repeat=size)]
    return [picked(single, draw) for draw in draws], np.array([probability[draw].prod() for draw in draws])


def test_the_smoothed_product_has_its_mean_and_the_bound_holds_over_every_sample() -> None:
    """E exp(n lambda LS) is (1 + lambda V)^n by enumeration, and the bound exceeds V with probability alpha at most."""
    world = random_world(1, 3, 1, 1.0, seed=6)
    world = dataclasses.replace(world, reward=np.abs(world.reward), behavior=np.array([[0.9, 0.08, 0.02], [1, 0, 0]]))
    policy = np.array([[0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    value, ever_tight = world.value(policy), False
    samples, probability = every_sample(world, 4)
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    for smoothing in (0.05, 0.5, 3.0):
        smoothed = np.array(
            [logarithmic_smoothing(s, ratio_of(policy, s), low=0.0, smoothing=smoothing).estimate() for s in samples]
        )
        expected = (1 + smoothing * value) ** 4
        assert probability @ np.exp(4 * smoothing * smoothed) == pytest.approx(expected, rel=1e-9)
        for alpha in (0.05, 0.2, 0.5, 0.9):
            bounds = [
                logarithmic_smoothing_lower_bound(s, ratio_of(policy, s), low=0.0, alpha=alpha, smoothing=smoothing)
                for s in samples
            ]
            wrong = probability[np.array(bounds) > value].sum()
            assert wrong <= alpha
            ever_tight |= wrong > 0.05 * alpha
    assert ever_tight  # a bound that is never wrong would say nothing


def test_the_bound_rises_with_alpha_and_stays_under_the_estimate() -> None:
    world = random_world(2, 3, 1, 1.0, seed=4)
    episodes, lowest = world.simulate(300, 1), float(world.reward.min())
    ratio = ratio_of(random_policy(world, 2), episodes)
    bounds = [
        logarithmic_smoothing_lower_bound(episodes, ratio, low=lowest, high=lowest + 1.0, alpha=alpha)
        for alpha in (0.01, 0.05, 0.5)
    ]
    assert bounds == sorted(bounds) and bounds[-1] < tis(episodes, ratio).estimate() and bounds[0] >= lowest


def test_a_smoothed_gain_by_hand() -> None:
    """Rewards 0 to 2, so halves; lambda is 1 / sqrt(2); (4 - 1) .5 = 1.5 and (.5 - 1) .3 = -.15."""
    episodes, scale = log([0, 1], [1.0, 0.6], [0.2, 0.8]), np.sqrt(0.5)
    found = smoothed_gain(episodes, np.array([4.0, 0.5]), (0.0, 2.0), alpha=0.5)
    assert found == pytest.approx(2 * (np.sqrt((1 + 1.5 * scale) * (1 - 0.15 * scale) * 0.5) - 1) / scale)


def test_a_smoothed_gain_is_rarely_above_the_gain_over_every_sample() -> None:
    """A policy that is worth what the behavior is, and one that is worth more: the bound exceeds the difference too seldom."""
    world = random_world(1, 3, 1, 1.0, seed=6)
    world = dataclasses.replace(world, reward=np.abs(world.reward), behavior=np.array([[0.9, 0.08, 0.02], [1, 0, 0]]))
    ceiling, ever_tight = float(world.reward.max()), False
    samples, probability = every_sample(world, 4)
    for policy in (world.behavior, np.array([[0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])):
        gain = world.value(policy) - world.value(world.behavior)
        for alpha in (0.05, 0.5, 0.9):
            bounds = [smoothed_gain(s, ratio_of(policy, s), (0.0, ceiling), alpha=alpha) for s in samples]
            wrong = probability[np.array(bounds) > gain + 1e-12].sum()
            assert wrong <= alpha
            ever_tight |= wrong > 0.01 * alpha
    assert ever_tight


def test_a_smoothed_gain_scales_and_shifts_with_rewards_and_needs_their_range() -> None:
    world = random_world(2, 3, 1, 1.0, seed=4)
    episodes, low, high = world.simulate(300, 1), float(world.reward.min()), float(world.reward.max())
    ratio = ratio_of(random_policy(world, 2), episodes)
    found = smoothed_gain(episodes, ratio, (low, high), alpha=0.05)
    moved = dataclasses.replace(episodes, reward=3 * episodes.reward - 7)
    assert smoothed_gain(moved, ratio, (3 * low - 7, 3 * high - 7), alpha=0.05) == pytest.approx(3 * found)
    assert smoothed_gain(episodes, ratio, (low, high), alpha=0.2) > found
    with pytest.raises(InputError, match="outside"):
        smoothed_gain(moved, ratio, (low, high), alpha=0.05)
    with pytest.raises(InputError, match="alpha"):
        smoothed_gain(episodes, ratio, (low, high), alpha=0.0)


def test_what_smoothing_refuses() -> None:
    episodes, ones = log([0, 1], [1.0, 0.5], [0.5, 0.5]), np.ones(2)
    with pytest.raises(InputError, match="1 rewards lie under 0.6"):
        logarithmic_smoothing(episodes, ones, low=0.6, high=0.6 + 1.0)
    for smoothing in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(InputError, match="smoothing must be positive"):
            logarithmic_smoothing(episodes, ones, low=0.0, smoothing=smoothing)
    with pytest.raises(InputError, match="alpha"):
        logarithmic_smoothing_lower_bound(episodes, ones, low=0.0, high=0.0 + 1.0, alpha=1.0)
    with pytest.raises(InputError, match="NaN or infinite"):
        logarithmic_smoothing(log([0], [np.inf], [0.5]), np.ones(1), low=0.0, high=0.0 + 1.0)
    with pytest.raises(InputError, match="ratio holds 1 values"):
        logarithmic_smoothing(episodes, np.array([1.0, np.nan]), low=0.0, high=0.0 + 1.0)
