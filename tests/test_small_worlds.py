"""Small worlds with closed forms, and worlds and logs that are spoiled: the truth stays known, whatever an estimate says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.importance import pdis, tis, trajectory_weights
from offrl_models.ope.worlds import (
    World,
    aliased,
    bandit,
    chain,
    confounded,
    delayed,
    faded,
    hidden_odds,
    hidden_trait,
    misattributed,
    poisoned,
    random_policy,
    random_world,
    simulate_each,
    stale,
    toy_graph,
    unsettled,
)
from offrl_models.schema import Episodes


def ratio_of(world: World, policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    """pi(a|s) over the propensity in the log."""
    return policy[world.states(episodes.observation), episodes.action] / episodes.action_prob


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
