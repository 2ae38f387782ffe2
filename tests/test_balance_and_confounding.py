"""Balance by enumeration, and bounds under hidden confounding against every vertex."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.diagnostics import balance_z, confounded_bounds, gamma_star, gamma_star_of_bound, imbalance
from offrl_models.ope.importance import wis
from offrl_models.ope.units import per_unit
from offrl_models.ope.worlds import World, random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import cut_after_one_step
from tests.test_diagnostics import bandit, ratio_of, some_policy, states

# Balance


def occupancy(world: World, policy: np.ndarray) -> np.ndarray:
    """Expected discounted visits of every state before the end."""
    live = ~world.terminal
    onward = np.einsum("sa,sat->st", policy, world.transition) * live
    return np.linalg.solve(np.eye(world.n_states) - world.gamma * onward.T, world.initial)


def state_ratio(world: World, policy: np.ndarray) -> np.ndarray:
    seen = occupancy(world, world.behavior)
    return np.where(seen > 0, occupancy(world, policy) / np.where(seen > 0, seen, 1.0), 1.0)


def state_features(world: World, episodes: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    each = np.eye(world.n_states)
    now, following = each[states(episodes)], each[episodes.next_observation[:, 0].astype(int)]
    return now[episodes.offsets[:-1]], now, following


WORLDS = [random_world(2, 2, 3, 0.9, seed=1), random_world(3, 2, 2, 0.5, 3, masked=True)]


@pytest.mark.parametrize("world", WORLDS)
def test_exact_weights_are_balanced_over_every_trajectory(world: World) -> None:
    """By state, and by state and action; the behavior's own weights and stale ratios are not."""
    episodes, probability = world.enumerate(3)
    policy = some_policy(world)
    ratio, omega = ratio_of(world, policy, episodes), state_ratio(world, policy)[states(episodes)]
    features = state_features(world, episodes)
    assert probability @ imbalance(episodes, omega * ratio, *features) == pytest.approx(0.0, abs=1e-9)
    assert np.abs(probability @ imbalance(episodes, ratio, *features)).max() > 0.01
    assert np.abs(probability @ imbalance(episodes, omega, *features)).max() > 0.01
    assert probability @ imbalance(episodes, np.ones(episodes.n_rows), *features) == pytest.approx(0.0, abs=1e-9)
    pairs = np.eye(world.n_states * world.n_actions)
    policy_pairs = np.zeros((world.n_states, len(pairs)))
    for s, a in itertools.product(range(world.n_states), range(world.n_actions)):
        policy_pairs[s, s * world.n_actions + a] = policy[s, a]
    here, following = states(episodes), episodes.next_observation[:, 0].astype(int)
    q_features = policy_pairs[here[episodes.offsets[:-1]]], pairs[here * world.n_actions + episodes.action]
    left = imbalance(episodes, omega * ratio, *q_features, policy_pairs[following])
    assert probability @ left == pytest.approx(0.0, abs=1e-9)


def test_balance_scores_find_wrong_weights_in_a_sample(tiny: World) -> None:
    episodes = tiny.simulate(4000, 0)
    policy = some_policy(tiny)
    ratio, omega = ratio_of(tiny, policy, episodes), state_ratio(tiny, policy)[states(episodes)]
    features = state_features(tiny, episodes)
    live = ~tiny.terminal
    right = balance_z(imbalance(episodes, omega * ratio, *features))[live]
    wrong = balance_z(imbalance(episodes, np.sqrt(omega) * ratio, *features))[live]
    assert np.abs(right).max() < 4 < np.abs(wrong).max()


def test_balance_knows_what_a_recording_that_stopped_would_have_reached(tiny: World) -> None:
    """Every episode cut after one step: weights of visits over recorded rows carry on into the next state."""
    whole, probability = tiny.enumerate(3)
    cut = cut_after_one_step(whole)
    policy = some_policy(tiny)
    rows = np.bincount(states(cut), probability, tiny.n_states)
    recorded = np.where(rows > 0, occupancy(tiny, policy) / np.where(rows > 0, rows, 1.0), 0.0)
    weight = recorded[states(cut)] * ratio_of(tiny, policy, cut)
    left = probability @ imbalance(cut, weight, *state_features(tiny, cut))
    started = tiny.initial > 0
    first_layer = left[started]
    assert first_layer == pytest.approx(0.0, abs=1e-9)
    assert left[~started & ~tiny.terminal].max() > 0.01  # later states were never recorded: nothing leaves them


# Hidden confounding


@given(st.integers(0, 10_000), st.floats(1.0, 20.0))
def test_the_bounds_are_those_of_every_vertex_of_the_box(seed: int, odds_ratio: float) -> None:
    """A ratio of linear functions is extreme at a vertex: all 2^7 combinations of least and greatest weights."""
    rng = np.random.default_rng(seed)
    probs = rng.uniform(0.05, 1.0, size=7)
    policy = rng.uniform(0.05, 1.0, size=7)
    episodes = bandit(rng.normal(size=7).tolist(), probs.tolist())
    low, high = (policy * (1 + (1 / probs - 1) * factor) for factor in (1 / odds_ratio, odds_ratio))
    weight = np.where(np.array(list(itertools.product((False, True), repeat=7))), low, high)
    means = weight @ episodes.reward / weight.sum(1)
    found = confounded_bounds(episodes, policy / probs, odds_ratio)
    assert found == pytest.approx((means.min(), means.max()), abs=1e-9)


def test_the_odds_are_within_the_factor_at_the_ends() -> None:
    """The propensity that gives the end of a weight has odds exactly Gamma times less, or more, than the logged one."""
    mu, odds_ratio = 0.2, 3.0
    for factor, odds in ((odds_ratio, 0.25 / 3), (1 / odds_ratio, 0.25 * 3)):
        hidden = 1 / (1 + (1 / mu - 1) * factor)
        assert hidden / (1 - hidden) == pytest.approx(odds)


@pytest.mark.parametrize("world", WORLDS)
def test_over_several_steps_weights_range_between_the_products_of_the_ends(world: World) -> None:
    episodes = world.simulate(8, 3)
    ratio = ratio_of(world, some_policy(world), episodes)
    pi = ratio * episodes.action_prob
    low, high = (np.multiply.reduceat(pi + (ratio - pi) * factor, episodes.offsets[:-1]) for factor in (0.5, 2.0))
    weight = np.where(np.array(list(itertools.product((False, True), repeat=8))), low, high)
    means = weight @ episodes.return_ / weight.sum(1)
    assert confounded_bounds(episodes, ratio, 2.0) == pytest.approx((means.min(), means.max()), abs=1e-9)


def test_without_confounding_the_bounds_are_the_estimate_and_they_widen(tiny: World) -> None:
    episodes = tiny.simulate(300, 0)
    ratio = ratio_of(tiny, some_policy(tiny), episodes)
    estimate = wis(episodes, ratio).estimate()
    found = np.array([confounded_bounds(episodes, ratio, odds) for odds in (1.0, 1.1, 1.5, 3.0, 1e4)])
    assert found[0] == pytest.approx((estimate, estimate), abs=1e-9)
    assert (np.diff(found[:, 0]) < 0).all() and (np.diff(found[:, 1]) > 0).all()
    assert found[-1, 0] >= episodes.return_.min() and found[-1, 1] <= episodes.return_.max()


def test_gamma_star_by_hand() -> None:
    """Propensities 1/2, returns 0 and 1, ratios 1: the least mean is 1 / (1 + Gamma), the greatest Gamma / (1 + Gamma)."""
    episodes = bandit([0.0, 1.0], [0.5, 0.5])
    assert gamma_star(episodes, np.ones(2), 0.25) == pytest.approx(3.0)
    assert gamma_star(episodes, np.ones(2), 0.9) == pytest.approx(9.0)
    assert gamma_star(episodes, np.ones(2), 0.5) == pytest.approx(1.0)
    assert gamma_star(episodes, np.ones(2), -0.1) == math.inf


@pytest.mark.parametrize("side", [-0.05, 0.05])
def test_at_gamma_star_the_bound_is_the_champions_value(tiny: World, side: float) -> None:
    episodes = tiny.simulate(400, 0)
    ratio = ratio_of(tiny, some_policy(tiny), episodes)
    champion = wis(episodes, ratio).estimate() + side
    found = gamma_star(episodes, ratio, champion)
    assert found > 1.0
    assert confounded_bounds(episodes, ratio, found)[0 if side < 0 else 1] == pytest.approx(champion, abs=1e-8)
    assert gamma_star(episodes, ratio, champion + side) > found


def test_a_confounder_of_known_strength_is_within_the_bounds() -> None:
    """A hidden trait doubles or halves the odds of the better action and moves the reward: WIS is wrong, its bounds are not."""
    rng = np.random.default_rng(0)
    n, odds_ratio = 40_000, 2.0
    trait = rng.random(n) < 0.5
    prob = np.where(trait, 2 / 3, 1 / 3)  # odds 2 and 1/2
    action = (rng.random(n) < prob).astype(np.int64)
    reward = 1.0 * trait + 0.1 * action  # whoever gets action 1 would have fared better anyway
    logged = np.full(n, 0.5)  # what the log knows: the average over the trait
    episodes = dataclasses.replace(bandit(reward.tolist(), logged.tolist()), action=action)
    ratio = np.where(action == 1, 1.0, 0.0) / 0.5  # always action 1: worth 0.6
    low, high = confounded_bounds(episodes, ratio, odds_ratio)
    assert wis(episodes, ratio).estimate() == pytest.approx(0.1 + 2 / 3, abs=0.02)
    assert low == pytest.approx(0.1 + 0.5, abs=0.02) and high > 0.75  # the truth is the very end of the range
    assert confounded_bounds(episodes, ratio, 1.5)[0] > 0.62


def test_gamma_star_of_a_mean_by_hand() -> None:
    """Propensities 1/2: a gain of 1 in one row may be (1 + 1 / Gamma) / 2 of it, a loss of .2 in the other (1 + Gamma) / 2 times
    as much; the mean is 0 where 1 + 1 / Gamma = .2 (1 + Gamma), at Gamma = 5."""
    episodes, correction = bandit([1.0, 0.0], [0.5, 0.5]), np.array([1.0, -0.2])
    assert gamma_star_of_bound(episodes, correction, correction, 0.0) == pytest.approx(5.0)
    assert gamma_star_of_bound(episodes, correction, correction, 0.1) < 4.9
    sure = gamma_star_of_bound(episodes, correction + 1.0, np.array([1.0, 0.0]), 0.0)
    assert sure == math.inf  # what does not hang on propensities is not confounded
    assert gamma_star_of_bound(episodes, -correction, -correction, 0.0) == 1.0


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_no_vertex_of_a_smaller_box_takes_the_bound_down(seed: int, width: float) -> None:
    """All 2^6 combinations of ends, at the odds ratio told: the bound stays above 0; without a width it is 0 at worst."""
    rng = np.random.default_rng(seed)
    probs, correction = rng.uniform(0.05, 0.9, size=6), rng.normal(size=6)
    episodes = dataclasses.replace(
        bandit([0.0] * 6, probs.tolist()), episode_id=np.arange(3), offsets=np.array([0, 2, 4, 6]),
        final_observation=np.zeros((3, 1), np.float32), terminated=np.arange(6) % 2 == 1,
    )  # fmt: skip
    outcome = rng.normal(size=3)
    outcome += 0.3 + width * outcome.std() - outcome.mean()
    odds = gamma_star_of_bound(episodes, outcome, correction, width)
    assert 1.0 < odds < math.inf
    ends = probs + (1 - probs) / odds, probs + (1 - probs) * odds
    factor = np.where(np.array(list(itertools.product((False, True), repeat=6))), *ends)
    moved = outcome + ((factor - 1.0) * correction).reshape(-1, 3, 2).sum(2)
    bounds = moved.mean(1) - width * moved.std(1)
    assert bounds.min() > -1e-7
    low, high = (
        moved.min(0),
        moved.max(0),
    )  # of each episode; what is told is the bound at the least mean and greatest spread
    away = np.maximum(high - (middle := (low.mean() + high.mean()) / 2), middle - low)
    assert low.mean() - width * np.sqrt(np.square(away).mean()) == pytest.approx(0.0, abs=1e-7)
    whole = gamma_star_of_bound(
        episodes, outcome, correction, 0.0, np.array([0, 1, 0])
    )  # the mean is that of the episodes
    assert whole == pytest.approx(gamma_star_of_bound(episodes, outcome, correction, 0.0))
    if width == 0.0:
        assert bounds.min() == pytest.approx(0.0, abs=1e-7)


@given(st.integers(0, 10_000), st.booleans())
def test_without_confounding_it_is_the_bound_that_decides(seed: int, above: bool) -> None:
    """By entities of unequal size, whose deviations are those of `per_unit`: above 0 it takes some confounding, below none."""
    rng, width = np.random.default_rng(seed), 0.3
    episodes, unit = bandit([0.0] * 60, [0.5] * 60), rng.integers(0, 12, 60)
    unit = np.unique(unit, return_inverse=True)[1]
    outcome = rng.normal(size=60) + 0.3 * np.bincount(unit)[unit]
    each = per_unit(outcome, unit)
    outcome += width * each.std() - each.mean() + (1e-6 if above else -1e-6)
    odds = gamma_star_of_bound(episodes, outcome, outcome, width, unit)
    assert 1.0 < odds < 1.01 if above else odds == 1.0


def test_outliers_among_gains_do_not_hide_what_confounding_can_do() -> None:
    """Two episodes with large corrections: shrinking them lowers mean and spread, growing them raises both, which is worse."""
    n = 2000
    episodes = bandit([0.0] * n, [0.1] * n)
    correction, outcome = np.full(n, -0.02), np.full(n, 0.03)
    correction[:2], outcome[:2] = 5.0, 5.0
    odds = gamma_star_of_bound(episodes, outcome, correction, 0.05)
    grown = outcome + (0.1 + 0.9 * odds - 1.0) * correction
    assert grown.mean() - 0.05 * grown.std() > 0


def test_what_has_no_odds_is_an_error() -> None:
    episodes = bandit([0.0, 1.0], [0.5, 0.5])
    with pytest.raises(InputError, match="does not overlap"):
        confounded_bounds(episodes, np.zeros(2), 2.0)
    with pytest.raises(InputError, match="NaN or infinite"):
        confounded_bounds(dataclasses.replace(episodes, action_prob=np.array([0.5, np.nan])), np.ones(2), 2.0)
    continuous = dataclasses.replace(episodes, action=np.zeros((2, 1)), mask=np.ones((2, 0), bool))
    with pytest.raises(InputError, match="continuous"):
        confounded_bounds(continuous, np.ones(2), 2.0)
    with pytest.raises(InputError, match="continuous"):
        gamma_star_of_bound(continuous, np.ones(2), np.ones(2), 1.0)


def test_weights_of_zero_stay_zero_and_long_products_do_not_overflow() -> None:
    episodes = bandit([5.0, 0.0, 1.0], [0.5] * 3)
    found = confounded_bounds(episodes, np.array([0.0, 1.0, 1.0]), 3.0)
    assert found == pytest.approx((0.25, 0.75))
    long = dataclasses.replace(
        bandit([0.0] * 399 + [1.0] + [0.0] * 400, [0.01] * 800),
        episode_id=np.arange(2),
        offsets=np.array([0, 400, 800]),
        final_observation=np.zeros((2, 1), np.float32),
        terminated=np.arange(800) % 400 == 399,
    )
    assert confounded_bounds(long, np.full(800, 50.0), 1.0) == pytest.approx((0.5, 0.5))
