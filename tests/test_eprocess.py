"""Leg B by enumeration: under a null policy the expectation of the e-process is 1, however and whenever one stops. And e-LOND."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special

from offrl_models.ope.eprocess import (
    BETS,
    e_value,
    elond,
    elond_level,
    gains,
    is_discovery,
    log_e_process,
    log_e_value,
    share,
)
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_world
from offrl_models.schema import Episodes, InputError

ALPHA = 0.05


def worst_policy(world: World) -> np.ndarray:
    return dataclasses.replace(world, reward=-world.reward).optimal()


def of_value(world: World, value: float) -> np.ndarray:
    """A policy of a wanted value, on the way from the worst one to the best."""
    best, worst = world.optimal(), worst_policy(world)

    def excess(share: float) -> float:
        return world.value((1 - share) * worst + share * best) - value

    found = float(optimize.root_scalar(excess, bracket=(0.0, 1.0), xtol=1e-15).root)
    return (1 - found) * worst + found * best


def weights(world: World, episodes: Episodes, policy: np.ndarray) -> np.ndarray:
    return trajectory_weights(episodes, ratios(episodes, policy[episodes.observation[:, 0].astype(int)]))


def return_range(episodes: Episodes) -> tuple[float, float]:
    return float(episodes.return_.min()), float(episodes.return_.max())


WORLDS = [
    random_world(2, 2, 2, 0.9, seed=1),
    random_world(2, 3, 2, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, 3, masked=True),
]


@pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
@pytest.mark.parametrize("scaled_margin", [0.0, 0.07, -0.07])
def test_under_a_null_policy_the_expectation_is_one(world: World, scaled_margin: float) -> None:
    """After one episode, after two, and when the second is only waited for after a bad start: every pair is enumerated."""
    episodes, probability = world.enumerate(2)
    limits = return_range(episodes)
    margin = scaled_margin * (limits[1] - limits[0])
    policy = of_value(world, world.value(world.behavior) + margin)
    assert np.abs(policy - world.behavior).max() > 0.1
    gain = gains(weights(world, episodes, policy), episodes.return_, limits, margin)
    assert gain.min() >= -1.0
    assert probability @ gain == pytest.approx(0.0, abs=1e-9)
    first, second = np.indices((len(gain), len(gain))).reshape(2, -1)
    process = np.exp(log_e_process(np.stack([gain[first], gain[second]], axis=1)))
    pair_probability = probability[first] * probability[second]
    assert pair_probability @ process[:, 0] == pytest.approx(1.0, abs=1e-9)
    assert pair_probability @ process[:, 1] == pytest.approx(1.0, abs=1e-9)
    stopped = np.where(process[:, 0] > 1.0, process[:, 0], process[:, 1])
    assert pair_probability @ stopped == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_the_worse_the_policy_the_smaller_the_expectation(world: World) -> None:
    episodes, probability = world.enumerate(2)
    limits = return_range(episodes)
    least, value = world.value(worst_policy(world)), world.value(world.behavior)
    expected = []
    for share_of_loss in (0.0, 0.3, 0.6, 0.99):
        policy = of_value(world, value - share_of_loss * (value - least))
        gain = gains(weights(world, episodes, policy), episodes.return_, limits)
        expected.append(probability @ np.exp(log_e_process(gain[:, None])[:, 0]))
    assert expected[0] == pytest.approx(1.0, abs=1e-9)
    assert expected == sorted(expected, reverse=True) and expected[-1] < 0.99


def test_it_ever_reaches_one_over_alpha_with_probability_alpha_at_most() -> None:
    """Every sequence of 14 episodes that gain 3 with probability 1/4 and lose everything otherwise, without simulation."""
    sequences = np.array(list(itertools.product((3.0, -1.0), repeat=14)))
    probability = np.prod(np.where(sequences > 0, 0.25, 0.75), axis=1)
    process = log_e_process(sequences)
    assert probability @ np.exp(process[:, -1]) == pytest.approx(1.0, abs=1e-9)
    for alpha in (0.5, 0.2, 0.05):
        ever = probability @ (process.max(1) >= -np.log(alpha))
        assert 0.0 < ever <= alpha


def test_by_hand() -> None:
    """Weight 3 and a return at the top of its range: the gain is 2. Twice: the mean of (1 + 2 bet)^2."""
    gain = gains(np.array([3.0, 3.0]), np.array([10.0, 10.0]), (-10.0, 10.0))
    assert gain.tolist() == [2.0, 2.0]
    process = log_e_process(gain)
    assert np.exp(process) == pytest.approx([np.mean(1 + 2 * BETS), np.mean((1 + 2 * BETS) ** 2)])
    assert e_value(np.array([3.0, 3.0]), np.array([10.0, 10.0]), (-10.0, 10.0)) == pytest.approx(np.exp(process[-1]))
    assert gains(np.array([0.0, 1.0]), np.array([10.0, 3.0]), (0.0, 10.0)).tolist() == [-1.0, 0.0]
    # The margin of 2 is 1/10 of the range: (2 - 0.1) / 1.1.
    assert gains(np.array([3.0]), np.array([10.0]), (-10.0, 10.0), 2.0) == pytest.approx([1.9 / 1.1])


@given(st.integers(0, 10_000))
def test_the_last_of_the_process_is_the_e_value_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gain = rng.uniform(-1.0, 4.0, size=(3, 40))
    process = log_e_process(gain)
    assert process.shape == (3, 40)
    assert log_e_value(gain) == pytest.approx(process[:, -1], abs=1e-9)
    assert log_e_value(rng.permutation(gain, axis=1)) == pytest.approx(process[:, -1], abs=1e-9)
    assert log_e_value(gain[1])[()] == pytest.approx(process[1, -1], abs=1e-9)


def test_a_policy_that_gains_is_found_out_and_one_that_does_not_is_not() -> None:
    world = WORLDS[1]
    episodes = world.simulate(5000, 0)
    limits = return_range(world.enumerate(2)[0])
    better, worse = (of_value(world, world.value(world.behavior) + gain) for gain in (0.3, -0.3))
    assert e_value(weights(world, episodes, better), episodes.return_, limits) > 1000
    assert e_value(weights(world, episodes, worse), episodes.return_, limits) < 1.0
    assert e_value(weights(world, episodes, better), episodes.return_, limits, margin=0.6) < 1.0
    assert e_value(weights(world, episodes, world.behavior), episodes.return_, limits) == pytest.approx(1.0, abs=1e-9)


def test_overwhelming_evidence_is_still_a_number() -> None:
    assert 1e300 < e_value(np.full(5000, 100.0), np.ones(5000), (0.0, 1.0)) < np.inf


def test_what_a_bet_could_not_pay_is_an_error() -> None:
    for low, high in ((0.0, 0.9), (0.1, 1.0)):
        with pytest.raises(InputError, match="1 of 2 values lie outside"):
            gains(np.ones(2), np.array([0.05, 0.95]), (low, high))
    with pytest.raises(InputError, match="1 importance weights are negative"):
        gains(np.array([1.0, -0.5]), np.ones(2), (0.0, 1.0))
    with pytest.raises(InputError, match="NaN or infinite"):
        gains(np.array([1.0, np.inf]), np.ones(2), (0.0, 1.0))
    with pytest.raises(InputError, match="below -1"):
        log_e_value(np.array([0.5, -1.01]))


# e-LOND


def test_the_shares_of_all_tests_add_up_to_one() -> None:
    rest = special.zeta(1.6, 1001) / special.zeta(1.6)  # of tests 1001 and on
    assert sum(share(t) for t in range(1, 1001)) + rest == pytest.approx(1.0, abs=1e-12)


def test_elond_by_hand() -> None:
    """zeta(1.6) = 2.2857656656801297, so the first level is 0.05 / 2.28577 = 1 / 45.7; a discovery doubles the next ones."""
    zeta = 2.2857656656801297
    assert elond_level(0.05, 1, 0) == pytest.approx(0.05 / zeta)
    assert elond_level(0.05, 2, 0) == pytest.approx(0.05 * 2**-1.6 / zeta)
    assert elond_level(0.05, 2, 1) == pytest.approx(2 * 0.05 * 2**-1.6 / zeta)
    assert elond_level(0.05, 3, 2) == pytest.approx(3 * 0.05 * 3**-1.6 / zeta)
    # Thresholds: 45.7; then 138.6 without a discovery and 69.3 with one; then 132.6 with one (265.1 without).
    assert elond(np.log([46.0, 70.0, 88.5]).tolist(), 0.05).tolist() == [True, True, True]
    assert elond(np.log([46.0, 69.0, 132.7]).tolist(), 0.05).tolist() == [True, False, True]
    assert elond(np.log([45.0, 138.0, 265.0]).tolist(), 0.05).tolist() == [False, False, False]
    assert elond(np.log([45.0, 139.0, 132.7]).tolist(), 0.05).tolist() == [False, True, True]
    assert is_discovery(np.log(20.0), 0.05) and not is_discovery(np.log(19.9), 0.05)


def test_the_false_discovery_rate_holds_for_e_values_that_depend_on_each_other() -> None:
    """Six nulls of which one at most has evidence, all sharing one draw: exact, and it uses the whole rate up."""
    alpha, tests = 0.5, 6
    level = [elond_level(alpha, t, 0) for t in range(1, tests + 1)]
    # With probability level[t] the evidence 1 / level[t] comes in test t, with what is left in none.
    found, rate = 0.0, 0.0
    for t, p in enumerate(level):
        e = np.full(tests, -np.inf)
        e[t] = -np.log(p)
        discovered = elond(e.tolist(), alpha)
        assert discovered.tolist() == [i == t for i in range(tests)]
        found, rate = found + p, rate + p * 1.0
    assert rate <= alpha and rate == pytest.approx(alpha * sum(share(t) for t in range(1, tests + 1)))
