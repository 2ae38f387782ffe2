"""Coverage measures of support: each is tripped by a log made to trip it, silent on a clean one, and right by known answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.logs import support
from offrl_models.schema import InputError
from tests.conftest import chain_world
from tests.samples import WORLD, sample_from, sample_of

# --- C11, C18, C21, C23, C26, C36 -------------------------------------------------------------------------------------


def test_outliers_by_hand() -> None:
    values = np.concatenate(
        [np.arange(-5.0, 6.0), [100.0, np.nan]]
    )  # median 0.5, distances .5, .5, 1.5, 1.5, ...: MAD 3
    frame = support.outliers(sample_from(values[:, None]))
    assert frame.row(0) == ("x0", 12, 0.5, pytest.approx(1.4826 * 3.0), pytest.approx(1 / 12))


def test_clean_and_mostly_constant_columns_have_no_outliers() -> None:
    rng = np.random.default_rng(0)
    rare_flag = (rng.random(10_000) < 0.01).astype(float)
    stray = rare_flag.copy()
    stray[np.flatnonzero(stray)[:3]] = 1e6
    columns = np.stack([rng.normal(size=10_000), np.full(10_000, 37.1), rare_flag, stray], 1)
    assert support.outliers(sample_from(columns))["share"].to_list() == [0.0, 0.0, 0.0, 3 / 10_000]


@given(st.floats(-100, 100), st.floats(0.01, 100))
def test_outliers_do_not_depend_on_units(shift: float, scale: float) -> None:
    values = np.random.default_rng(0).standard_t(2, size=(500, 1))
    share = support.outliers(sample_from(values))["share"]
    assert share[0] > 0 and support.outliers(sample_from(values * scale + shift))["share"].equals(share)


def test_visits_of_a_table_are_counts() -> None:
    episodes = WORLD.simulate(300, seed=2)
    sample = sample_of(episodes, WORLD.n_states)
    frame = support.cell_visits(sample)
    count = np.zeros((WORLD.n_states, 3))
    np.add.at(count, (episodes.observation[:, 0].astype(int), episodes.action), 1)
    assert {(s, a): v for s, a, v, _ in frame.rows()} == {
        (s, a): count[s, a] for s, a in zip(*count.nonzero(), strict=True)
    }
    assert frame["mean_action_prob"].to_numpy() == pytest.approx(WORLD.behavior[frame["state"], frame["action"]])
    missing = sample_of(episodes, WORLD.n_states, action_prob=None)
    assert support.cell_visits(missing)["mean_action_prob"].null_count() == frame.height


def test_cells_of_several_small_categories_are_their_product() -> None:
    codes = np.array([[a, b] for a in range(3) for b in (0.0, 1.0, np.nan)])
    sample = sample_from(codes, categories=(3, 2))
    assert len(set(support.state_cells(sample, seed=0).tolist())) == 9


def test_hashed_cells_depend_on_the_seed_alone_and_keep_neighbors_together() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6))
    sample = sample_from(np.concatenate([x, x + 1e-6 * rng.normal(size=x.shape), x], 0))
    cell = support.state_cells(sample, seed=1)
    assert np.array_equal(cell[:2000], cell[4000:]) and (cell[:2000] == cell[2000:4000]).mean() > 0.999
    assert np.array_equal(cell, support.state_cells(sample, seed=1))
    assert not np.array_equal(cell, support.state_cells(sample, seed=2))
    assert len(np.unique(cell)) > 200 and cell.max() < 1024
    assert support.state_cells(sample, seed=1, cells=16).max() == 15


def test_continuous_actions_are_cut_at_their_quartiles() -> None:
    rng = np.random.default_rng(0)
    sample = sample_from(np.zeros((4000, 1)), action=rng.normal(size=(4000, 2)), n_actions=None)
    visits = support.cell_visits(sample)["visits"].to_numpy()
    assert len(visits) == 16 and visits.sum() == 4000 and visits.min() > 150


def test_dataset_quality_by_hand() -> None:
    state = np.array([0, 1, 0, 1, 2, 3])
    sample = sample_from(
        state[:, None],
        steps=2,
        names=("state",),
        categories=(4,),
        reward=np.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
        gamma=0.5,
        batch=np.array([0, 0, 0, 0, 1, 1]),
    )
    frame = support.dataset_quality(sample, low=0.0, high=2.0)
    assert frame.select("batch", "episodes", "rows", "unique_cells", "saco", "cells_per_row").rows() == [
        ("all", 3, 6, 4, 1.0, pytest.approx(4 / 6)),
        ("0", 2, 4, 2, 0.5, 0.5),
        ("1", 1, 2, 2, 0.5, 1.0),
    ]
    assert frame["return_mean"].to_list() == pytest.approx([2 / 3, 0.25, 1.5])  # returns .5, 0 and 1.5
    assert frame["tq"].to_list() == pytest.approx([1 / 3, 0.125, 0.75])
    assert support.dataset_quality(sample, low=0, high=2, reference_cells=8)["saco"][0] == 0.5
    with pytest.raises(InputError, match="lower return below"):
        support.dataset_quality(sample, low=1.0, high=1.0)


def test_trajectory_quality_of_logged_and_optimal_behavior_is_0_and_1() -> None:
    world = chain_world()
    low, high = world.value(world.behavior), world.value(world.optimal())
    for policy, expected in ((world.behavior, 0.0), (world.optimal(), 1.0)):
        sample = sample_of(replace(world, behavior=policy).simulate(4000, seed=0), world.n_states)
        assert support.dataset_quality(sample, low=low, high=high)["tq"][0] == pytest.approx(expected, abs=0.05)


def test_states_of_a_table_never_seen_are_outside_the_support() -> None:
    state = np.array([0, 1, 2, 0, 1, 2, 3, 4])
    whole = sample_from(state[:, None], names=("state",), categories=(5,))
    train, gate = whole.take(np.arange(8) < 3), whole.take(np.arange(8) >= 4)
    assert support.outside_support(train, gate, seed=0).row(0) == ("exact", 4, None, 0.5)
    assert support.outside_support(train, train, seed=0)["share_outside"][0] == 0.0


@pytest.mark.parametrize("columns", [2, 20])
def test_shifted_states_are_outside_the_support_and_fresh_ones_are_not(columns: int) -> None:
    rng = np.random.default_rng(0)
    train = sample_from(rng.normal(size=(6000, columns)), steps=3)
    fresh = sample_from(rng.normal(size=(3000, columns)), steps=3)
    assert support.outside_support(train, fresh, seed=0)["share_outside"][0] < 0.012
    moved = sample_from(rng.normal(size=(3000, columns)) + np.append(6.0, np.zeros(columns - 1)), steps=3)
    assert support.outside_support(train, moved, seed=0)["share_outside"][0] > 0.5


def test_neighbors_of_the_same_episode_do_not_make_training_look_dense() -> None:
    rng = np.random.default_rng(0)

    def walks(seed: int) -> np.ndarray:  # 20 nearly equal rows per episode
        start = np.random.default_rng(seed).normal(size=(150, 3))
        return np.repeat(start, 20, 0) + 1e-3 * rng.normal(size=(3000, 3))

    train, gate = sample_from(walks(1), steps=20), sample_from(walks(2), steps=20)
    frame = support.outside_support(train, gate, seed=0)
    assert frame["radius"][0] > 0.3 and frame["share_outside"][0] < 0.05


def test_discretized_numbers_equal_to_training_ones_are_inside() -> None:
    rng = np.random.default_rng(0)
    train = sample_from(rng.integers(0, 3, (3000, 3)) * 0.1 + 7.3)
    gate = sample_from(rng.integers(0, 3, (1000, 3)) * 0.1 + 7.3)
    assert support.outside_support(train, gate, seed=0).row(0) == ("neighbors", 1000, pytest.approx(0, abs=1e-6), 0.0)


def test_a_category_that_training_never_has_is_outside() -> None:
    rng = np.random.default_rng(0)
    train = np.stack([rng.normal(size=2000), rng.integers(0, 100, 2000)], 1)
    gate = np.stack([rng.normal(size=1000), np.where(np.arange(1000) < 100, 199, 7)], 1)
    pair = (sample_from(values, categories=(None, 200)) for values in (train, gate))
    assert 0.1 <= support.outside_support(*pair, seed=0)["share_outside"][0] < 0.13


def test_a_gap_where_training_has_none_is_outside() -> None:
    rng = np.random.default_rng(0)
    train, gate = rng.normal(size=(4000, 2)), rng.normal(size=(1000, 2))
    gate[:300, 1] = np.nan
    assert support.outside_support(sample_from(train), sample_from(gate), seed=0)["share_outside"][0] == pytest.approx(
        0.3, abs=0.02
    )


def test_subgroup_sizes_count_episodes() -> None:
    sex = np.array(["f", "f", "m", "m", "m", "m"])
    ward = np.array(["a", "b", "a", "a", "a", "a"])
    frame = support.subgroup_sizes(sample_from(np.zeros((6, 1)), steps=2, subgroups={"sex": sex, "ward": ward}))
    assert frame.rows() == [("sex", "f", 1), ("sex", "m", 2), ("ward", "a", 3), ("ward", "b", 1)]
