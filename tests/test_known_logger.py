"""Leg A where the policy that wrote the log is known: its own choices leave the spread, and nothing else changes."""

import dataclasses

import numpy as np
import pytest

from benchmarks.calibration.judging import asked, on_a_log
from benchmarks.calibration.small import world as small_world
from offrl_models.ope.marginal import paired_differences, value_gains
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import World, chain, random_policy, random_world
from offrl_models.schema import Episodes
from tests.conftest import circling_world, ratio_of, recorded_paths

EXACT = 1e-9
RNG = np.random.default_rng(0)


def modeled(log: Episodes, judged: Episodes, world: World) -> TabularModel:
    model = TabularModel.fit(log, world.n_states)
    assert model is not None
    return model.logged_by(log, judged)


def gains(model: TabularModel, policy: np.ndarray, log: Episodes) -> np.ndarray:
    found = paired_differences(model, policy, log, ratio_of(policy, log))
    assert found is not None
    return found[0]


def exactly(world: World, episodes: Episodes, probability: np.ndarray) -> TabularModel:
    """The model of infinitely many recordings, and of wrong rewards."""
    model = TabularModel.fit(episodes, world.n_states)
    assert model is not None
    recorded = np.zeros((world.n_states, world.n_actions))
    cell = states_of(episodes)[0], episodes.action
    np.add.at(recorded, cell, episodes.time_discount * probability[episodes.episode_of_row])
    live = ~world.terminal
    return dataclasses.replace(
        model,
        transition=world.gamma * np.where(world.terminal, 0.0, world.transition) * live[:, None, None],
        reward=RNG.normal(size=recorded.shape) * live[:, None],
        initial=world.initial,
        visits=world.behavior * live[:, None],
        recorded=recorded,
    )


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_with_exact_weights_the_mean_is_the_difference_whatever_the_values(gamma: float) -> None:
    """By enumeration, truncations included; and what it is with another logger's probabilities is no difference at all."""
    world = circling_world(gamma)
    episodes, probability = recorded_paths(world, 3)
    policy = random_policy(world, 1)
    model = exactly(world, episodes, probability)
    exact = world.value(policy) - world.value(world.behavior)
    for logger in (None, world.behavior):
        assert probability @ gains(dataclasses.replace(model, logger=logger), policy, episodes) == pytest.approx(
            exact, abs=EXACT
        )
    other = dataclasses.replace(model, logger=random_policy(world, 2))
    assert abs(probability @ gains(other, policy, episodes) - exact) > 0.001


def test_the_gain_by_hand() -> None:
    """Two steps, gamma 0.5: what was earned, 1 and then 2, less what the two choices were worth."""
    world = random_world(1, 2, 2, 0.5, seed=0)
    episode = dataclasses.replace(world.simulate(1, 1), reward=np.array([1.0, 2.0]))
    one, zero = np.ones(2), np.zeros(2)
    q, v = np.array([0.7, 0.4]), np.array([0.1, 0.6])
    realised = 1 + 0.5 * 2.0
    assert value_gains(episode, zero, zero, zero, zero, one, v, v, zero) == pytest.approx(-realised)
    assert value_gains(episode, zero, zero, zero, zero, one, q, v, zero) == pytest.approx(
        -realised + (0.7 - 0.1) + 0.5 * (0.4 - 0.6)
    )


def test_the_spread_is_that_of_the_policy_and_not_of_the_logger() -> None:
    """A policy like the behavior: no episode says of it what its return was; its interval is a third as wide, and as right."""
    world = chain(5, 4)
    policy = 0.95 * world.behavior + 0.05 * random_policy(world, 3)
    fitted_on, exact = world.simulate(4000, 1), world.value(policy) - world.value(world.behavior)
    off, spreads = [], []
    for seed in range(2, 42):
        log = world.simulate(500, seed)
        model = modeled(fitted_on, log, world)
        if model.logger is None:
            continue
        known = gains(model, policy, log)
        spread = known.std() / np.sqrt(500)
        off.append((known.mean() - exact) / spread)
        spreads.append(known.std() / gains(dataclasses.replace(model, logger=None), policy, log).std())
    assert len(off) >= 38 and np.mean(spreads) < 1 / 3
    assert np.std(off) == pytest.approx(1.0, abs=0.3) and abs(np.mean(off)) < 4 / np.sqrt(len(off))


def test_what_the_propensities_leave_goes_to_actions_that_were_never_seen() -> None:
    """Their values are one number in the model, so that it does not matter how."""
    world = random_world(3, 2, 4, 0.9, seed=4)
    fitted_on, judged = world.simulate(12, 1), world.simulate(40, 2)
    model = modeled(fitted_on, judged, world)
    assert model.logger is not None
    seen, visited = model.visits > 0, model.visits.any(1)
    assert (~seen[visited]).any() and model.logger.sum(1) == pytest.approx(1.0)
    assert model.logger[seen] == pytest.approx(world.behavior[seen])
    q = model.q_values(world.behavior)
    assert (model.logger * q).sum(1)[visited] == pytest.approx((world.behavior * q).sum(1)[visited])


def changed(log: Episodes, rows: np.ndarray, factor: float) -> Episodes:
    return dataclasses.replace(log, action_prob=np.where(rows, factor * log.action_prob, log.action_prob))


@pytest.mark.parametrize(
    "what", ["another policy", "in the judged log", "sums to less", "sums to more", "chosen otherwise"]
)
def test_a_logger_that_its_propensities_do_not_show_is_not_known(what: str) -> None:
    world = small_world()
    fitted_on, judged = world.simulate(2000, 1), world.simulate(3000, 2)
    assert modeled(fitted_on, judged, world).logger is not None
    first = fitted_on.episode_of_row < 1000
    if what == "another policy":
        fitted_on = changed(fitted_on, first, 0.99)
    elif what == "in the judged log":
        judged = changed(judged, np.arange(judged.n_rows) == 7, 0.99)
    elif what == "chosen otherwise":  # than the propensities say, in both logs
        other = dataclasses.replace(world, behavior=0.8 * world.behavior + 0.2 * world.optimal())
        fitted_on, judged = (
            dataclasses.replace(log, action_prob=world.behavior[states_of(log)[0], log.action])
            for log in (other.simulate(2000, 1), other.simulate(3000, 2))
        )
    else:
        factor = 0.99 if what == "sums to less" else 1.01
        fitted_on, judged = (changed(log, log.action >= 0, factor) for log in (fitted_on, judged))
    assert modeled(fitted_on, judged, world).logger is None


def test_estimated_propensities_do_not_make_the_logger_known() -> None:
    """The logger's value is then one more thing to find out, and the gain is as uncertain."""
    world = small_world()
    found = on_a_log(world, {"some": random_policy(world, 1)}, 1, 800, 900)
    for propensities, known in (("logged", True), ("estimated", False)):
        model = found.model(asked(world.n_states, propensities=propensities))
        assert model is not None and (model.logger is not None) is known
