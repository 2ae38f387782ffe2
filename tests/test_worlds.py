"""Exact values: published ones, and agreement between solving, simulating and enumerating."""

import numpy as np
import pytest

from offrl_models.ope.worlds import icu_sepsis, icu_tables, random_world


def test_published_values_of_icu_sepsis() -> None:
    """Optimal .8751 and .8013, expert .7820, uniform .7801 and .7191, at gamma 1 and .99."""
    undiscounted, discounted = icu_sepsis(1.0), icu_sepsis(0.99)
    uniform = undiscounted.mask / undiscounted.mask.sum(1, keepdims=True)
    expert = (undiscounted.behavior - 0.2 * uniform) / 0.8
    assert undiscounted.value(undiscounted.optimal()) == pytest.approx(0.8751, abs=5e-5)
    assert discounted.value(discounted.optimal()) == pytest.approx(0.8013, abs=5e-5)
    assert undiscounted.value(expert) == pytest.approx(0.7820, abs=5e-5)
    assert undiscounted.value(uniform) == pytest.approx(0.7801, abs=5e-5)
    assert discounted.value(uniform) == pytest.approx(0.7191, abs=5e-5)
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


def test_a_simulation_depends_on_its_seed_alone() -> None:
    world = random_world(3, 3, 3, 0.9, seed=0)
    first, again, other = world.simulate(50, 1), world.simulate(50, 1), world.simulate(50, 2)
    assert np.array_equal(first.action, again.action)
    assert first.n_rows != other.n_rows or not np.array_equal(first.action, other.action)


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
