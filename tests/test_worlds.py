"""Exact values of finite worlds and linear control: published and closed forms; solving, simulating and enumerating agree."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.worlds import (
    LinearGaussianPolicy,
    World,
    icu_sepsis,
    icu_tables,
    point_mass,
    random_policy,
    random_world,
)
from offrl_models.ope.worlds.tabular import cumulative, draw
from offrl_models.schema import Episodes

# --- finite worlds ----------------------------------------------------------------------------------------------------


def test_published_values_of_icu_sepsis() -> None:
    """At gamma 1 and .99: optimal .8751 and .8013, expert .7818 and .7222, uniform .7801 and .7191; masked expert .7820."""
    undiscounted, discounted = icu_sepsis(1.0), icu_sepsis(0.99)
    uniform = undiscounted.mask / undiscounted.mask.sum(1, keepdims=True)
    masked = (undiscounted.behavior - 0.2 * uniform) / 0.8
    expert = icu_tables()["expert_policy"]
    for world, of_optimal, of_expert, of_uniform in (
        (undiscounted, 0.8751, 0.7818, 0.7801),
        (discounted, 0.8013, 0.7222, 0.7191),
    ):
        assert world.value(world.optimal()) == pytest.approx(of_optimal, abs=5e-5)
        assert world.value(expert) == pytest.approx(of_expert, abs=5e-5)
        assert world.value(uniform) == pytest.approx(of_uniform, abs=5e-5)
    assert undiscounted.value(masked) == pytest.approx(0.7820, abs=5e-5)
    assert undiscounted.value(undiscounted.behavior) == pytest.approx(0.7817, abs=5e-5)


def test_simulated_icu_stays_follow_the_tables() -> None:
    world = icu_sepsis()
    stays = world.simulate(4000, seed=0)
    assert stays.return_.mean() == pytest.approx(world.value(world.behavior), abs=4 * 0.413 / np.sqrt(4000))
    assert stays.mask[np.arange(stays.n_rows), stays.action].all()
    assert stays.terminated[stays.offsets[1:] - 1].all() and stays.terminated.sum() == 4000
    state, following = stays.observation[:, 0].astype(int), stays.next_observation[:, 0].astype(int)
    assert (world.transition[state, stays.action, following] > 0).all()
    assert icu_tables()["sofa_scores"].shape == (716,)
    start = time.process_time()
    world.simulate(5000, seed=1)
    assert time.process_time() - start < 0.5  # all episodes at once


def test_the_simulated_log_of_a_seed_never_changes() -> None:
    """The example's raw logs, their split and all that is measured on them follow from these draws."""
    stays = icu_sepsis().simulate(1000, seed=2026)
    digest = hashlib.sha256()
    for values in (
        stays.offsets,
        stays.observation,
        stays.final_observation,
        stays.action,
        stays.reward,
        stays.action_prob,
    ):
        digest.update(np.ascontiguousarray(values).tobytes())
    assert digest.hexdigest() == "3c0c7138c5479fddb594c7198398a562ec9e4230bea5ae72b82f650a386fc39d"


def test_a_simulation_depends_on_its_seed_alone() -> None:
    world = random_world(3, 3, 3, 0.9, seed=0)
    first, again, other = world.simulate(50, 1), world.simulate(50, 1), world.simulate(50, 2)
    assert np.array_equal(first.action, again.action)
    assert first.n_rows != other.n_rows or not np.array_equal(first.action, other.action)


def test_simulated_and_enumerated_trajectories_are_the_same() -> None:
    """Every trajectory comes as often as it should: a chi-square test over all of them."""
    world = random_world(1, 2, 2, 0.9, seed=3)

    def names(episodes: Episodes) -> np.ndarray:
        return episodes.sum_per_episode(
            10.0 ** (2 * episodes.step) * (10 * episodes.next_observation[:, 0] + episodes.action)
        ).astype(int)

    every, probability = world.enumerate(2)
    drawn = names(world.simulate(20_000, seed=0))
    assert set(drawn) <= set(names(every))
    count = np.array([(drawn == name).sum() for name in names(every)])
    assert stats.chisquare(count, 20_000 * probability).pvalue > 0.001


def test_a_draw_never_runs_past_the_last_value() -> None:
    """Probabilities that sum to less than 1 stand for what rounding does."""
    short = cumulative(np.array([[0.5, 0.25], [0.0, 0.5]]))
    drawn = draw(np.random.default_rng(0), short, np.repeat([0, 1], 1000))
    assert drawn[:1000].mean() == pytest.approx(0.5, abs=0.06) and drawn.max() == 1 and drawn[1000:].min() == 1


def test_the_optimal_policy_beats_every_deterministic_one() -> None:
    world = random_world(1, 2, 3, 0.9, seed=5)
    best = world.value(world.optimal())
    values = []
    for code in range(2**3):
        choice = np.append([(code >> i) & 1 for i in range(3)], 0)
        values.append(world.value(np.eye(2)[choice]))
    assert best == pytest.approx(max(values), abs=1e-12)


def test_enumeration_refuses_to_leave_probability_out() -> None:
    with pytest.raises(ValueError, match="not 1"):
        random_world(2, 2, 3, 0.9, seed=1).enumerate(2)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 1.0]))
def test_occupancy_times_reward_is_the_value(seed: int, gamma: float) -> None:
    world = random_world(2, 3, 3, gamma, seed=seed)
    policy = random_policy(world, seed + 1)
    expected = np.einsum("sat,sat->sa", world.transition, world.reward)
    assert world.occupancy(policy) @ (policy * expected).sum(1) == pytest.approx(world.value(policy), abs=1e-12)
    q = world.q_values(policy)
    assert (policy * q).sum(1) == pytest.approx(world.state_values(policy), abs=1e-12)


def test_occupancy_without_discount_counts_the_decisions_in_the_log(tiny: World) -> None:
    every, probability = tiny.enumerate(3)
    visits = np.bincount(every.observation[:, 0].astype(int), probability[every.episode_of_row], tiny.n_states)
    assert tiny.occupancy(tiny.behavior, gamma=1.0) == pytest.approx(visits, abs=1e-12)
    discounted = np.bincount(
        every.observation[:, 0].astype(int), every.time_discount * probability[every.episode_of_row], tiny.n_states
    )
    assert tiny.occupancy(tiny.behavior) == pytest.approx(discounted, abs=1e-12)


def test_random_policies_are_distributions_with_support_on_allowed_actions() -> None:
    world = random_world(3, 4, 2, 0.5, 3, masked=True)
    policy = random_policy(world, 1)
    assert policy.sum(1) == pytest.approx(np.ones(world.n_states))
    assert ((policy > 0) == world.mask).all() and policy[world.mask].min() > 0.1 / 4 - 1e-12
    assert not np.array_equal(policy, random_policy(world, 2))


# --- linear-Gaussian control ------------------------------------------------------------------------------------------

PLANE = point_mass(axes=2, horizon=8, gamma=0.95, survival=0.9)
OTHER = LinearGaussianPolicy(
    gain=np.array([[-0.6, 0.1, -0.5, 0.0], [0.0, -0.5, 0.1, -0.4]]), covariance=np.array([[0.4, 0.1], [0.1, 0.3]])
)


def gaussian(deviation: np.ndarray, covariance: np.ndarray) -> float:
    """The density as books have it."""
    shape = np.exp(-0.5 * deviation @ np.linalg.inv(covariance) @ deviation)
    return float(shape / np.sqrt(np.linalg.det(2 * np.pi * covariance)))


@pytest.mark.parametrize("policy", [PLANE.behavior, OTHER], ids=["behavior", "other"])
def test_the_closed_form_is_the_mean_of_200_000_rollouts(policy: LinearGaussianPolicy) -> None:
    drawn = replace(PLANE, behavior=policy).simulate(200_000, seed=1)
    noise = drawn.return_.std() / np.sqrt(200_000)
    assert noise < 0.003
    assert drawn.return_.mean() == pytest.approx(PLANE.value(policy), abs=4 * noise)
    mean, covariance = PLANE.marginals(policy)
    for t in (0, 3, 7):
        state = drawn.observation[drawn.step == t, :-1].astype(float)
        assert len(state) == pytest.approx(200_000 * 0.9**t, rel=0.01)
        assert state.mean(0) == pytest.approx(mean[t], abs=0.02)
        assert np.cov(state.T) == pytest.approx(covariance[t], abs=0.03)


def test_what_a_continuous_log_looks_like() -> None:
    log = PLANE.simulate(500, seed=0)
    assert log.action.dtype == np.float32 and log.action.shape == (log.n_rows, 2) and log.n_actions == 0
    assert np.array_equal(log.observation[:, -1], log.step)
    ends = np.zeros(log.n_rows, bool)
    ends[log.offsets[1:] - 1] = True
    assert np.array_equal(log.terminated, ends) and not log.truncated.any()
    assert set(log.length) == set(range(1, 9))
    state, action = log.observation[:, :-1].astype(float), log.action.astype(float)
    cost = np.einsum("ri,ij,rj->r", state, PLANE.state_cost, state)
    cost += np.einsum("ri,ij,rj->r", action, PLANE.action_cost, action)
    assert log.reward == pytest.approx(-cost)
    assert np.array_equal(PLANE.behavior.density(state, log.action), log.action_prob)  # what was logged is what acted
    row = 17
    expected = gaussian(action[row] - OTHER.gain @ state[row], OTHER.covariance)
    assert OTHER.density(state, log.action)[row] == pytest.approx(expected)
    again = PLANE.simulate(500, seed=0)
    assert np.array_equal(again.action, log.action)
    assert not np.array_equal(PLANE.simulate(500, seed=1).observation[:5], log.observation[:5])


def test_density_ratios_of_states_and_actions_are_exact() -> None:
    """Their mean is 1 at every step, and reweighted rewards have the other policy's value."""
    log = PLANE.simulate(50_000, seed=2)
    state = log.observation[:, :-1]
    action_ratio = OTHER.density(state, log.action) / log.action_prob
    ratio = PLANE.state_ratio(OTHER, log.observation) * action_ratio
    for t in range(8):
        here = ratio[log.step == t]
        assert here.mean() == pytest.approx(1.0, abs=4 * here.std() / np.sqrt(len(here)))
    weighted = log.sum_per_episode(log.time_discount * ratio * log.reward)
    noise = weighted.std() / np.sqrt(50_000)
    assert noise < 0.02 and weighted.mean() == pytest.approx(PLANE.value(OTHER), abs=4 * noise)
    unweighted = log.sum_per_episode(log.time_discount * action_ratio * log.reward)
    assert abs(unweighted.mean() - PLANE.value(OTHER)) > 4 * noise  # the states matter
    assert np.array_equal(PLANE.state_ratio(PLANE.behavior, log.observation), np.ones(log.n_rows))
    at = log.observation[:3]
    mean, covariance = PLANE.marginals(OTHER)
    step = at[:, -1].astype(int)
    expected = [gaussian(o[:-1] - mean[t], covariance[t]) for t, o in zip(step, at, strict=True)]
    assert PLANE.state_density(OTHER, at) == pytest.approx(expected)


def test_values_of_states_and_actions_satisfy_the_bellman_equations() -> None:
    """Expectations of quadratics over Gaussians are exact with three Gauss-Hermite nodes per dimension."""
    world = point_mass(axes=1, horizon=6, gamma=0.9, survival=0.8)
    policy = LinearGaussianPolicy(gain=np.array([[-0.7, -0.2]]), covariance=np.array([[0.3]]))
    node, weight = np.polynomial.hermite_e.hermegauss(3)
    weight = weight / weight.sum()
    state = np.random.default_rng(0).normal(size=(5, 2))
    for t in (0, 4, 5):
        now = np.column_stack([state, np.full(5, float(t))])
        value = 0.0
        for x, w in zip(node, weight, strict=True):
            value += w * world.q_values(policy, now, state @ policy.gain.T + np.sqrt(0.3) * x)
        assert value == pytest.approx(world.state_values(policy, now), abs=1e-12)
        action = np.full((5, 1), 0.4)
        ahead = np.zeros(5)
        for x, wx in zip(node, weight, strict=True):
            for y, wy in zip(node, weight, strict=True):
                following = state @ world.dynamics.T + action @ world.control.T + 0.1 * np.array([x, y])
                later = np.column_stack([following, np.full(5, t + 1.0)])
                ahead += wx * wy * world.state_values(policy, later)
        reward = -(0.1 * state[:, 0] ** 2 + 0.02 * state[:, 1] ** 2 + 0.02 * 0.4**2)
        assert world.q_values(policy, now, action) == pytest.approx(reward + 0.9 * 0.8 * ahead, abs=1e-12)
    start = np.column_stack([np.tile(world.initial_mean, (1, 1)), [0.0]])
    certain = replace(world, initial_covariance=np.zeros((2, 2)))
    assert certain.value(policy) == pytest.approx(world.state_values(policy, start)[0], abs=1e-12)


def test_the_regulator_is_best_over_a_long_horizon_and_needs_no_noise() -> None:
    world = point_mass(axes=1, horizon=400, gamma=0.97)
    none = np.zeros((1, 1))
    best = world.regulator(none)
    for change in np.array([[0.05, 0.0], [-0.05, 0.0], [0.0, 0.05], [0.0, -0.05]]):
        assert world.value(best) > world.value(LinearGaussianPolicy(gain=best.gain + change, covariance=none))
    assert world.value(best) > world.value(world.regulator(0.1 * np.eye(1))) > world.value(world.behavior)
    with pytest.raises(np.linalg.LinAlgError):
        best.density(np.zeros((1, 2)), np.zeros((1, 1)))
