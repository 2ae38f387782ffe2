"""Marginalised importance sampling and the tabular direct method against exact values, by enumeration where that is possible."""

import dataclasses

import numpy as np
import pytest

from offrl_models.ope.drl import drl
from offrl_models.ope.importance import tis
from offrl_models.ope.marginal import (
    mis,
    paired_differences,
    pseudo_outcomes,
    state_action_weights,
    state_weights,
    step_ratios,
    step_weights,
    tabular_dm,
    value_gains,
    wmis,
)
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import World, chain, random_policy, random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import circling_world, ratio_of, recorded_paths

EXACT = 1e-9
WORLDS = [
    random_world(2, 2, 3, 0.9, seed=1),
    random_world(2, 3, 3, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, seed=3, masked=True),
]
worlds = pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])


def values(policy: np.ndarray, q: np.ndarray, episodes: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q of the logged action, v, and v of the next state, from a table."""
    state, next_state = states_of(episodes)
    v = (policy * q).sum(1)
    return q[state, episodes.action], v[state], v[next_state]


def random_q(world: World, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(world.n_states, world.n_actions)) * ~world.terminal[:, None]


def positions_only(world: World, positions: int) -> World:
    """A layered world whose log shows the position within the layer, so that it differs from step to step."""
    shown = (np.arange(world.n_states) % positions).astype(np.float32)[:, None]
    return dataclasses.replace(world, observed=shown)


# --- importance sampling -------------------------------------------------------------------------------------------------


@worlds
def test_exact_ratios_make_every_form_exact_over_every_trajectory(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy, model = random_policy(world, 5), world.model()
    by_state = state_weights(model, policy, episodes, ratio_of(policy, episodes))
    by_pair = state_action_weights(model, policy, episodes)
    mass = float(world.occupancy(policy).sum())
    for weight in (by_state, by_pair):
        assert mis(episodes, weight).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
        assert wmis(episodes, weight, mass).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    assert by_state == pytest.approx(by_pair, abs=EXACT)


@worlds
def test_step_ratios_are_the_ratios_of_the_states_probabilities_at_each_step(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 6)
    ratio = ratio_of(policy, episodes)
    omega, mass = step_ratios(episodes, ratio, world.n_states, probability)
    mine, theirs = world.initial, world.initial
    for step in range(len(omega)):
        seen = theirs > 0
        assert omega[step, seen] == pytest.approx((mine / np.where(seen, theirs, 1.0))[seen], abs=EXACT)
        assert (omega[step, ~seen] == 1.0).all() and mass[step] == pytest.approx(mine.sum(), abs=EXACT)
        mine, theirs = (d @ world._onward(p) for d, p in ((mine, policy), (theirs, world.behavior)))
    weight = step_weights(omega, episodes, ratio)
    assert mis(episodes, weight).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    assert wmis(episodes, weight, mass).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


def test_a_process_that_changes_with_the_step_needs_step_ratios() -> None:
    """The log shows positions; dynamics, rewards and policies differ by step. By step it is exact, pooled it is not."""
    world = positions_only(random_world(2, 2, 3, 0.9, seed=1), 2)
    hidden, _ = dataclasses.replace(world, observed=None).enumerate(3)
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    ratio = ratio_of(policy, hidden)
    omega, mass = step_ratios(episodes, ratio, 2, probability)
    weight = step_weights(omega, episodes, ratio)
    assert mis(episodes, weight).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    assert wmis(episodes, weight, mass).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    pooled = state_weights(world.model(), policy, hidden, ratio)
    by_position = np.array([pooled[episodes.observation[:, 0] == s].mean() for s in (0, 1)])
    wrong = by_position[episodes.observation[:, 0].astype(int)] * ratio
    assert abs(mis(episodes, wrong).estimate(probability) - world.value(policy)) > 0.01


def test_in_a_log_step_ratios_average_to_the_mass_that_is_left() -> None:
    """Whatever the ratios happen to average: nothing is lost on the way, and all of it is left until somebody ends."""
    world = chain(6, 3)
    episodes, policy = world.simulate(80, 0), random_policy(world, 3)
    omega, mass = step_ratios(episodes, ratio_of(policy, episodes), world.n_states)
    assert mass == pytest.approx(np.ones(6), abs=EXACT)
    by_row = omega[episodes.step, states_of(episodes)[0]]
    assert np.bincount(episodes.step, by_row) / 80 == pytest.approx(mass, abs=EXACT)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_weights_over_a_recording_that_stops_stand_for_the_visits_past_its_end(gamma: float) -> None:
    """Rewards as they are, whatever the truncation left out: exact by enumeration, and so is the doubly robust form."""
    world = circling_world(gamma)
    episodes, probability = recorded_paths(world, 3)
    assert episodes.truncated.any() and episodes.terminated.any()
    policy = random_policy(world, 1)
    recorded, visited = np.zeros((3, 2)), world.initial
    for step in range(3):
        recorded += gamma**step * visited[:, None] * world.behavior * ~world.terminal[:, None]
        visited = visited @ world._onward(world.behavior)
    model = dataclasses.replace(world.model(), recorded=recorded)
    ratio = ratio_of(policy, episodes)
    for weight in (state_weights(model, policy, episodes, ratio), state_action_weights(model, policy, episodes)):
        assert mis(episodes, weight).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
        x = pseudo_outcomes(episodes, weight, *values(policy, random_q(world), episodes))
        assert probability @ x == pytest.approx(world.value(policy), abs=EXACT)
    wrong = dataclasses.replace(model, reward=random_q(world))  # no matter: the weights are right
    paired = paired_differences(wrong, policy, episodes, ratio)
    assert paired is not None
    assert probability @ paired[0] == pytest.approx(world.value(policy) - world.value(world.behavior), abs=EXACT)
    every_visit = dataclasses.replace(wrong, recorded=None)  # their ratio is not that of the rows
    paired = paired_differences(every_visit, policy, episodes, ratio)
    assert paired is not None
    assert abs(probability @ paired[0] - world.value(policy) + world.value(world.behavior)) > 0.01


def test_a_fitted_model_knows_the_rows_of_its_log() -> None:
    episodes, _ = recorded_paths(circling_world(0.9), 3)
    model = TabularModel.fit(episodes, 3)
    assert model is not None and model.recorded is not None
    state = states_of(episodes)[0]
    counted = np.zeros((3, 2))
    for s, a, discount in zip(state, episodes.action, 0.9**episodes.step, strict=True):
        counted[s, a] += discount / episodes.n_episodes
    assert model.recorded == pytest.approx(counted, abs=1e-12)


def test_an_action_that_was_never_taken_is_given_what_its_state_does_on_average() -> None:
    """In state 0 that is what the other action does, which was always taken there."""
    log = circling_world(0.9).simulate(60, 0)
    model = TabularModel.fit(dataclasses.replace(log, action=np.where(states_of(log)[0] == 0, 0, log.action)), 3)
    assert model is not None and model.visits[0, 1] == 0
    assert model.reward[0, 1] == model.reward[0, 0] != 0 and model.reward[1, 1] != model.reward[1, 0]
    assert np.array_equal(model.transition[0, 1], model.transition[0, 0]) and model.transition[0, 0].sum() > 0.5
    assert (model.reward[2] == log.return_.mean()).all() and not model.transition[2].any()
    assert model.behavior[0].tolist() == [1.0, 0.0] and model.behavior[2].tolist() == [0.5, 0.5]  # 2 is never acted in


@pytest.mark.parametrize("steps", [1, 2])
def test_step_ratios_take_a_truncation_for_the_end_of_a_completed_episode(steps: int) -> None:
    world = circling_world(0.9)
    episodes, probability = recorded_paths(world, steps)
    policy = random_policy(world, 1)
    *_, next_v = values(policy, world.q_values(policy), episodes)
    ratio = ratio_of(policy, episodes)
    omega, mass = step_ratios(episodes, ratio, 3, probability)
    weight = step_weights(omega, episodes, ratio)
    whole = completed(episodes, next_v)
    assert mis(whole, weight).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)
    assert wmis(whole, weight, mass).estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


def test_a_step_that_the_policy_never_reaches_adds_nothing_to_a_self_normalised_estimate() -> None:
    """Action 1 goes on, action 0 ends: under a policy that always ends, nothing is left to normalise at step 1."""
    world = circling_world(1.0)
    episodes, probability = recorded_paths(world, 2)
    stays = np.where(episodes.step == 0, np.where(episodes.length[episodes.episode_of_row] == 2, 0.0, 2.0), 0.0)
    omega, mass = step_ratios(episodes, stays, 3, probability)
    assert mass == pytest.approx([1.0, 0.0], abs=EXACT)
    found = wmis(episodes, step_weights(omega, episodes, stays), mass)
    assert found.numerator.shape == (episodes.n_episodes, 1) and np.isfinite(found.estimate(probability))


def test_episodes_longer_than_those_of_the_ratios_are_refused(tiny: World) -> None:
    episodes = tiny.simulate(50, 0)
    with pytest.raises(InputError, match="up to 3 steps, but the ratios are of 2"):
        step_weights(np.ones((2, tiny.n_states)), episodes, np.ones(episodes.n_rows))


def test_marginal_weights_by_hand() -> None:
    """One state, two actions, two steps. Rewards 1 and 2 with weights 0.5 and 3; gamma 0.5."""
    world = random_world(1, 2, 2, 0.5, seed=0)
    episode = dataclasses.replace(world.simulate(1, 1), reward=np.array([1.0, 2.0]))
    assert episode.n_rows == 2
    weight = np.array([0.5, 3.0])
    assert mis(episode, weight).estimate() == pytest.approx(0.5 + 0.5 * 3.0 * 2.0)
    assert wmis(episode, weight, 1.5).estimate() == pytest.approx(1.5 * (0.5 + 3.0) / (0.5 + 1.5))
    assert wmis(episode, weight, np.array([1.0, 0.8])).estimate() == pytest.approx(1.0 + 0.8 * 0.5 * 2.0)
    q, v = np.array([0.3, 0.4]), np.array([0.1, 0.2])
    x = pseudo_outcomes(episode, weight, q, v, np.array([9.0, 9.0]))
    assert x == pytest.approx([0.1 + 0.5 * (1 + 0.5 * 0.2 - 0.3) + 0.5 * 3.0 * (2 - 0.4)])
    one = np.ones(2)
    assert value_gains(episode, weight, q, v, v, one, q, v) == pytest.approx(x - (1 + 0.5 * 2.0))
    cut = dataclasses.replace(episode, terminated=np.zeros(2, bool), truncated=np.array([False, True]))
    x = pseudo_outcomes(cut, weight, q, v, np.array([9.0, 10.0]))
    assert x == pytest.approx([0.1 + 0.5 * (1 + 0.5 * 0.2 - 0.3) + 0.5 * 3.0 * (2 + 0.5 * 10.0 - 0.4)])
    gains = value_gains(cut, weight, q, v, np.array([9.0, 10.0]), one, q, np.array([9.0, 4.0]))
    assert gains == pytest.approx(x - (1 + 0.5 * (2.0 + 0.5 * 4.0)))
    gains = value_gains(cut, weight, q, v, np.array([9.0, 10.0]), np.array([1.0, 3.0]), q, np.array([9.0, 4.0]))
    assert gains == pytest.approx(x - (1 + 0.5 * 0.4 + 0.5 * 3.0 * (2.0 + 0.5 * 4.0 - 0.4)))


def test_marginal_weights_escape_the_curse_of_the_horizon() -> None:
    """50 steps: the spread of a trajectory-weighted estimate is orders of magnitude above the marginalised one's."""
    world = chain(50, 3)
    policy = np.tile([0.25, 0.75], (world.n_states, 1))
    episodes, fitted_on = world.simulate(1000, 0), world.simulate(1000, 1)
    ratio = ratio_of(policy, episodes)
    model = TabularModel.fit(fitted_on, world.n_states)
    assert model is not None
    omega, mass = step_ratios(fitted_on, ratio_of(policy, fitted_on), world.n_states)
    by_step = step_weights(omega, episodes, ratio)
    exact = world.value(policy)
    for terms in (
        mis(episodes, state_weights(model, policy, episodes, ratio)),
        mis(episodes, state_action_weights(model, policy, episodes)),
        mis(episodes, by_step),
        wmis(episodes, by_step, mass),
        drl(episodes, ratio, policy, form="markov"),
        tabular_dm(episodes, policy),
    ):
        error = terms.influence().std() / np.sqrt(1000)
        assert error < 0.015 and abs(terms.estimate() - exact) < 0.03
        assert tis(episodes, ratio).influence().std() / np.sqrt(1000) > 10 * error


# --- the tabular direct method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_the_tabular_direct_method_is_the_value_in_the_empirical_process(gamma: float) -> None:
    """Truncated recordings included: the mean of the terms is the model's value, to the last digit."""
    world = circling_world(gamma)
    episodes, _ = recorded_paths(world, 4)
    policy = random_policy(world, 2)
    model = TabularModel.fit(episodes, 3)
    assert model is not None
    assert tabular_dm(episodes, policy).estimate() == pytest.approx(model.value(policy), abs=EXACT)


def test_the_direct_method_by_hand() -> None:
    """One state; action 0 was taken 3 times and ended each time with 1, 2 and 3, action 1 once and ended with 10."""
    world = random_world(1, 2, 1, 1.0, seed=0)
    four = dataclasses.replace(
        world.simulate(4, 0), action=np.array([0, 0, 0, 1]), reward=np.array([1.0, 2.0, 3.0, 10.0])
    )
    policy = np.array([[0.25, 0.75], [0.5, 0.5]])
    found = tabular_dm(four, policy)
    assert found.estimate() == pytest.approx(0.25 * 2.0 + 0.75 * 10.0)
    # influence: (pi / share) (r - mean)
    assert found.influence() == pytest.approx([-1 / 3, 0.0, 1 / 3, 0.0])


def test_marginal_weights_of_the_same_episodes_give_the_direct_method() -> None:
    """Yin & Wang (2020): without discount or truncation, tabular MIS by state and action is the plug-in value."""
    world = circling_world(1.0)
    episodes, policy = world.simulate(200, 0), random_policy(world, 1)
    model = TabularModel.fit(episodes, 3)
    assert model is not None
    weighted = mis(episodes, state_action_weights(model, policy, episodes))
    assert weighted.estimate() == pytest.approx(model.value(policy), abs=EXACT)


def test_the_spread_of_the_direct_methods_terms_is_its_standard_error() -> None:
    world = circling_world(0.9)
    policy = random_policy(world, 1)
    found = [tabular_dm(world.simulate(150, seed), policy) for seed in range(300)]
    estimates = np.array([terms.estimate() for terms in found])
    stated = np.mean([terms.influence().std() / np.sqrt(150) for terms in found])
    assert estimates.std() == pytest.approx(stated, rel=0.12)
    assert abs(estimates.mean() - world.value(policy)) < 4 * estimates.std() / np.sqrt(300)


def test_a_policy_without_an_end_or_a_table_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = circling_world(1.0)
    transition = world.transition.copy()
    transition[:2, 1] = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]  # action 1 never ends
    world = dataclasses.replace(world, transition=transition)
    episodes, circling = world.simulate(100, 0), np.array([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    with pytest.raises(InputError, match="never ends an episode"):
        tabular_dm(episodes, circling)
    with pytest.raises(InputError, match="never ends an episode"):
        drl(episodes, np.ones(episodes.n_rows), circling, form="markov")
    rounded = TabularModel(np.full((1, 1, 1), 1.0 + 2.0**-52), np.ones((1, 1)), np.ones(1), np.ones((1, 1)))
    assert not rounded.ends(np.ones((1, 1)))  # though it leaves with a probability that is not exactly 0
    monkeypatch.setattr("offrl_models.ope.tabular.LARGEST_TABLE", 3 * 2 * 3)
    assert np.isfinite(tabular_dm(episodes, world.behavior).estimate())
    monkeypatch.setattr("offrl_models.ope.tabular.LARGEST_TABLE", 3 * 2 * 3 - 1)
    with pytest.raises(InputError, match="too large"):
        tabular_dm(episodes, world.behavior)
