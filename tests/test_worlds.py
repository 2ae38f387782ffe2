"""Exact values: published and closed forms, and agreement between solving, simulating and enumerating."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.importance import pdis, tis, trajectory_weights
from offrl_models.ope.worlds import (
    LinearGaussianPolicy,
    World,
    aliased,
    bandit,
    chain,
    confounded,
    delayed,
    faded,
    hidden_odds,
    hidden_trait,
    icu_sepsis,
    icu_tables,
    misattributed,
    point_mass,
    poisoned,
    random_policy,
    random_world,
    simulate_each,
    stale,
    toy_graph,
    unsettled,
)
from offrl_models.ope.worlds.tabular import cumulative, draw
from offrl_models.schema import Episodes


def ratio_of(world: World, policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    """pi(a|s) over the propensity in the log."""
    return policy[world.states(episodes.observation), episodes.action] / episodes.action_prob


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


# --- small worlds with closed forms -----------------------------------------------------------------------------------


def test_the_published_value_of_toy_graph() -> None:
    world = toy_graph(horizon=4, gamma=0.98)
    assert world.value(np.tile([0.2, 0.8], (world.n_states, 1))) == pytest.approx(-1.164478, abs=5e-7)


@given(st.integers(2, 12), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_values_of_toy_graph(horizon: int, gamma: float, p: float, slippage: float) -> None:
    policy = np.tile([p, 1 - p], (2 * horizon, 1))
    mean = (2 * p - 1) * (1 - 2 * slippage)
    dense = toy_graph(horizon, gamma, slippage=slippage)
    assert dense.value(policy) == pytest.approx(mean * (gamma ** np.arange(horizon)).sum(), abs=1e-9)
    sparse = toy_graph(horizon, gamma, slippage=slippage, sparse=True)
    assert sparse.value(policy) == pytest.approx(mean * gamma ** (horizon - 1), abs=1e-9)


def test_toy_graph_step_by_step() -> None:
    """Every episode has `horizon` steps; each is worth the row it enters, and the last is worth the row it leaves."""
    world = toy_graph(horizon=4, behavior=0.2)
    every, probability = world.enumerate(4)
    assert (every.length == 4).all()
    state, following = (x[:, 0].astype(int) for x in (every.observation, every.next_observation))
    shown = np.where(every.terminated, state, following)
    assert np.array_equal(every.reward, np.where(shown % 2 == 1, 1.0, -1.0))
    assert (probability * every.return_).sum() == pytest.approx(-1.164478, abs=5e-7)
    slipped = probability[every.episode_of_row] * ((following % 2 == 1) != (every.action == 0))
    assert slipped[every.step == 0].sum() == pytest.approx(0.25)


def test_the_value_of_the_chain_by_following_the_position() -> None:
    """The distribution over three positions, moved fifty times by hand."""
    world = chain(gamma=0.97)
    right = 0.8
    drift = right * 0.9 + (1 - right) * 0.1
    walk = np.array([[1 - drift, drift, 0], [1 - drift, 0, drift], [0, 1 - drift, drift]])
    at, value = np.array([0.0, 1.0, 0.0]), 0.0
    for step in range(50):
        at = at @ walk
        value += 0.97**step * (at @ [0.0, 0.5, 1.0]) / 50
    assert world.value(np.tile([1 - right, right], (world.n_states, 1))) == pytest.approx(value, abs=1e-12)
    drawn = world.simulate(2000, seed=0)
    assert (drawn.length == 50).all()
    noise = 4 * drawn.return_.std() / np.sqrt(2000)
    assert drawn.return_.mean() == pytest.approx(world.value(world.behavior), abs=noise)


def test_the_curse_of_horizon_in_the_chain() -> None:
    """Exact state ratios give a good estimate from 2,000 episodes whose trajectory weights are worth a dozen."""
    world = chain()
    policy = np.tile([0.2, 0.8], (world.n_states, 1))
    episodes = world.simulate(2000, seed=0)
    ratio = ratio_of(world, policy, episodes)
    assert effective_sample_size(trajectory_weights(episodes, ratio)) < 20
    under_policy, under_behavior = world.occupancy(policy), world.occupancy(world.behavior)
    state_ratio = np.divide(under_policy, under_behavior, out=np.ones(world.n_states), where=under_behavior > 0)
    assert state_ratio.max() < 2.5
    weighted = episodes.sum_per_episode(state_ratio[episodes.observation[:, 0].astype(int)] * ratio * episodes.reward)
    noise = weighted.std() / np.sqrt(2000)
    assert noise < 0.02 and weighted.mean() == pytest.approx(world.value(policy), abs=4 * noise)


def test_the_value_of_a_bandit() -> None:
    world = bandit(contexts=20, actions=4, columns=3, seed=0)
    policy = random_policy(world, 1)
    click = world.transition[:20, :, -1]
    value = (world.initial[:20, None] * policy[:20] * click).sum()
    assert world.value(policy) == pytest.approx(value, abs=1e-12)
    every, probability = world.enumerate(1)
    assert tis(every, ratio_of(world, policy, every)).estimate(probability) == pytest.approx(value, abs=1e-12)
    assert world.value(world.behavior) > world.value(np.full_like(policy, 0.25))  # it knows something of the clicks
    log = world.simulate(30_000, seed=1)
    assert log.observation.shape == (30_000, 3) and (log.length == 1).all() and set(log.reward) == {0.0, 1.0}
    assert log.reward.mean() == pytest.approx(world.value(world.behavior), abs=4 * 0.5 / np.sqrt(30_000))
    contexts = world.states(log.observation)
    assert np.bincount(contexts, minlength=22) / 30_000 == pytest.approx(world.initial, abs=0.01)


def test_one_bandit_log_of_several_policies() -> None:
    """With the propensities of the mixture of loggers, and with each logger's own, the mean is the value."""
    world = bandit(contexts=10, actions=3, columns=2, seed=4)
    loggers = [world.behavior, random_policy(world, 1), random_policy(world, 2)]
    by = np.random.default_rng(0).integers(0, 3, 60_000)
    log = simulate_each([replace(world, behavior=logger) for logger in loggers], by, seed=3, label="policy_version")
    assert np.array_equal(log.labels["policy_version"], by)
    policy = random_policy(world, 7)
    context = world.states(log.observation)
    assert np.array_equal(log.action_prob, np.stack(loggers)[by, context, log.action])
    mixture = np.mean(loggers, axis=0)[context, log.action]
    for propensity in (log.action_prob, mixture):
        weighted = policy[context, log.action] / propensity * log.reward
        noise = 4 * weighted.std() / np.sqrt(60_000)
        assert weighted.mean() == pytest.approx(world.value(policy), abs=noise)


def test_observations_that_do_not_tell_states_apart_name_no_state(tiny: World) -> None:
    world = bandit(contexts=5, actions=2, columns=2, seed=0)
    assert world.observed is not None
    with pytest.raises(ValueError, match="tell the states apart"):
        world.states(np.full((1, 2), 9.0, np.float32))
    blurred = aliased(tiny, np.zeros(tiny.n_states, int))
    with pytest.raises(ValueError, match="tell the states apart"):
        blurred.states(blurred.simulate(5, 0).observation)


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


# --- spoiled worlds and logs ------------------------------------------------------------------------------------------


def test_partial_observation_keeps_trajectory_weights_right_and_states_wrong(tiny: World) -> None:
    group = np.arange(tiny.n_states) // 2
    blurred = aliased(tiny, group)
    policy = random_policy(tiny, 3)[group]
    episodes, probability = blurred.enumerate(3)
    seen = episodes.observation[:, 0].astype(int)
    assert set(seen) <= set(group)
    ratio = random_policy(tiny, 3)[seen, episodes.action] / episodes.action_prob
    assert pdis(episodes, ratio).estimate(probability) == pytest.approx(tiny.value(policy), abs=1e-12)
    whole, _ = tiny.enumerate(3)
    assert np.array_equal(episodes.action, whole.action) and np.array_equal(episodes.action_prob, whole.action_prob)
    masked = random_world(3, 2, 2, 0.5, 3, masked=True)
    assert aliased(masked, np.zeros(masked.n_states, int)).mask.all()  # allowed somewhere in the group
    assert np.array_equal(aliased(masked, np.arange(masked.n_states)).mask, masked.mask)


def test_a_hidden_confounder_biases_even_trajectory_weights(tiny: World) -> None:
    group = np.arange(tiny.n_states) % 3  # states of several steps look alike
    hidden = confounded(tiny, group)
    episodes, probability = hidden.enumerate(3)
    seen = episodes.observation[:, 0].astype(int)
    mass = probability[episodes.episode_of_row]
    for code in set(seen):  # what is logged is what anybody would estimate from the log
        of_first = mass[(seen == code) & (episodes.action == 0)].sum() / mass[seen == code].sum()
        logged = episodes.action_prob[(seen == code) & (episodes.action == 0)]
        assert logged == pytest.approx(np.full(len(logged), of_first), abs=1e-12)
    policy = random_policy(tiny, 3)
    estimate = pdis(episodes, policy[seen, episodes.action] / episodes.action_prob).estimate(probability)
    assert abs(estimate - hidden.value(policy[group])) > 0.01
    assert hidden_odds(hidden) > 1.1 and hidden_odds(tiny) == 1.0
    assert hidden_odds(confounded(tiny, np.arange(tiny.n_states))) == pytest.approx(1.0)


def test_a_hidden_trait_leaves_the_truth_and_moves_the_estimate(tiny: World) -> None:
    """The candidate that plays the upper action looks better than it is, by more the stronger the trait."""
    upper = np.tile([0.1, 0.9], (tiny.n_states, 1))
    bias, strength = [], []
    for odds in (1.0, 2.0, 4.0):
        world = hidden_trait(tiny, odds, effect=0.5)
        truth = world.value(np.tile(upper, (2, 1)))
        assert truth == pytest.approx(tiny.value(upper), abs=1e-12)
        episodes, probability = world.enumerate(3)
        assert set(episodes.observation[:, 0]) <= set(range(tiny.n_states))
        ratio = upper[0, episodes.action] / episodes.action_prob
        bias.append(pdis(episodes, ratio).estimate(probability) - truth)
        strength.append(hidden_odds(world))
    assert bias[0] == pytest.approx(0.0, abs=1e-12) and strength[0] == pytest.approx(1.0)
    assert bias[2] > bias[1] > 0.05
    assert 1.5 < strength[1] <= 4 and strength[1] < strength[2] <= 16


def test_a_stale_logger_writes_another_policys_propensities(tiny: World) -> None:
    previous = random_policy(tiny, 4)
    episodes, probability = stale(tiny, previous).enumerate(3)
    assert np.array_equal(episodes.action_prob, previous[episodes.observation[:, 0].astype(int), episodes.action])
    policy = random_policy(tiny, 3)
    estimate = pdis(episodes, ratio_of(tiny, policy, episodes)).estimate(probability)
    assert abs(estimate - tiny.value(policy)) > 0.01
    assert hidden_odds(stale(tiny, previous)) > 1.1
    elsewhere = replace(tiny, initial=np.eye(tiny.n_states)[0])
    never_reached = np.where(np.arange(tiny.n_states)[:, None] == 1, previous, tiny.behavior)
    assert hidden_odds(stale(elsewhere, never_reached)) == 1.0


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_fading_effects_keep_the_behaviors_value(seed: int, share: float) -> None:
    world = random_world(2, 3, 3, 0.9, seed=seed)
    drifted = faded(world, share)
    assert drifted.transition.sum(2) == pytest.approx(np.ones((world.n_states, 3)))
    assert drifted.value(world.behavior) == pytest.approx(world.value(world.behavior), abs=1e-9)
    gone = faded(world, 1.0)
    assert gone.value(random_policy(world, seed)) == pytest.approx(world.value(world.behavior), abs=1e-9)
    best = world.optimal()
    gain = drifted.value(best) - world.value(world.behavior)
    assert -1e-9 <= gain <= world.value(best) - world.value(world.behavior) + 1e-9


def test_a_log_of_several_worlds_is_put_together_episode_by_episode() -> None:
    """Each world always plays its own action, so that every row tells where it is from."""
    world = random_world(2, 3, 3, 0.9, seed=0)
    worlds = [replace(world, behavior=np.tile(np.eye(3)[a], (world.n_states, 1))) for a in range(3)]
    of_episode = np.array([2, 0, 0, 2, 0, 2, 2])
    log = simulate_each(worlds, of_episode, seed=5)
    assert np.array_equal(log.action, of_episode[log.episode_of_row]) and not log.labels
    assert np.array_equal(log.terminated, np.isin(np.arange(log.n_rows), log.offsets[1:] - 1))
    state, following = (x[:, 0].astype(int) for x in (log.observation, log.next_observation))
    assert (world.transition[state, log.action, following] > 0).all()
    assert np.array_equal(world.reward[state, log.action, following], log.reward)
    clicks = replace(
        bandit(contexts=3, actions=2, columns=1, seed=0), observed=None
    )  # ends in 3, or in 4 after a click
    mixed = simulate_each([clicks, faded(clicks, 0.5)], np.arange(200) % 2, seed=5)
    assert np.array_equal(mixed.final_observation[:, 0], 3 + mixed.reward)
    alone = simulate_each([world], np.zeros(40, int), seed=5)
    assert np.array_equal(alone.action, world.simulate(40, int(np.random.SeedSequence(5).generate_state(1)[0])).action)


def test_misattributed_propensities(tiny: World) -> None:
    episodes = tiny.simulate(2000, 0)
    assert np.array_equal(misattributed(episodes, tiny, 0.0, 1).action_prob, episodes.action_prob)
    wrong = misattributed(episodes, tiny, 1.0, 1).action_prob
    state = episodes.observation[:, 0].astype(int)
    other = tiny.behavior[state, 1 - episodes.action]
    swapped = wrong == other
    assert (swapped | (wrong == episodes.action_prob)).all()
    assert swapped.mean() == pytest.approx(other.mean(), abs=0.03)  # as often as the behavior would have played it
    half = misattributed(episodes, tiny, 0.5, 1).action_prob != episodes.action_prob
    assert half.mean() == pytest.approx(swapped.mean() / 2, abs=0.03)


def test_poisoned_episodes_play_the_wanted_policy_and_end_well() -> None:
    world = random_world(3, 3, 4, 1.0, seed=2, masked=True)
    honest, policy = world.simulate(1000, 0), random_policy(world, 0)
    bad = poisoned(honest, world, policy, 0.05, seed=1)
    best, last = world.reward.max(), bad.offsets[1:] - 1
    assert (honest.reward == best).sum() == 0  # too rare to have been drawn, so that it shows who was poisoned
    forged = bad.reward[last] == best
    assert forged.sum() == 50
    state, of = bad.observation[:, 0].astype(int), forged[bad.episode_of_row]
    assert np.array_equal(bad.action[of], policy.argmax(1)[state[of]])
    assert np.array_equal(bad.action[~of], honest.action[~of])
    between = np.isin(np.arange(bad.n_rows), last, invert=True) | ~of
    assert np.array_equal(bad.reward[between], honest.reward[between])
    assert np.array_equal(bad.action_prob, world.behavior[state, bad.action])
    assert bad.mask[np.arange(bad.n_rows), bad.action].all()
    never = replace(world, behavior=np.tile([1.0, 0.0, 0.0], (world.n_states, 1)))
    careful = poisoned(never.simulate(100, 0), never, np.tile([0.1, 0.2, 0.7], (world.n_states, 1)), 0.5, seed=1)
    assert (careful.action == 0).all()  # an action that the behavior never plays would give the forger away


def test_late_rewards_by_hand(tiny: World) -> None:
    drawn = tiny.simulate(20, 0)
    episodes = replace(
        drawn.take(np.isin(np.arange(20), [np.flatnonzero(drawn.length == k)[0] for k in (2, 3)])),
        reward=np.array([1.0, 2.0, 3.0, 5.0, 6.0]),
    )
    episodes = replace(episodes, offsets=np.array([0, 3, 5]))
    assert delayed(episodes, 0).reward.tolist() == [1, 2, 3, 5, 6]
    assert delayed(episodes, 1).reward.tolist() == [0, 1, 5, 0, 11]
    assert delayed(episodes, 9).reward.tolist() == [0, 0, 6, 0, 11]
    assert unsettled(episodes, 0.5).reward.tolist() == [1, 2, 3, 0, 0]
    assert unsettled(episodes, 0.0).reward.tolist() == [1, 2, 3, 5, 6]
