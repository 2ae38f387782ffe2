"""Derived coverage measures: each is tripped by a log made to trip it, silent on a clean one, and right by known answers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.logs import independence, support, timing
from offrl_models.logs.sample import Sample, features, group_means, joint, ridge_residuals, table_residuals
from offrl_models.ope.worlds import random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import chain_world

WORLD = random_world(4, 3, 4, 0.9, seed=5)


def sample_of(episodes: Episodes, states: int, **more: object) -> Sample:
    """A tabular sample of simulated episodes, in one batch."""
    fields = {
        "episode": episodes.episode_of_row,
        "observation": episodes.observation,
        "names": ("state",),
        "categories": (states,),
        "action": episodes.action,
        "n_actions": episodes.n_actions,
        "mask": episodes.mask,
        "reward": episodes.reward,
        "terminated": episodes.terminated,
        "action_prob": episodes.action_prob,
        "gamma": episodes.gamma,
        "batch": np.zeros(episodes.n_rows, np.int64),
    }
    return Sample(**{**fields, **more})  # pyright: ignore[reportArgumentType]


def sample_from(observation: np.ndarray, steps: int = 1, **more: object) -> Sample:
    """A sample of numeric columns x0, x1, ... in episodes of `steps` rows; everything else is constant unless given."""
    rows = len(observation)
    fields = {
        "episode": np.arange(rows) // steps,
        "observation": observation.astype(np.float64),
        "names": tuple(f"x{i}" for i in range(observation.shape[1])),
        "categories": (None,) * observation.shape[1],
        "action": np.zeros(rows, np.int64),
        "n_actions": 2,
        "mask": None,
        "reward": np.zeros(rows),
        "terminated": np.arange(rows) % steps == steps - 1,
        "action_prob": np.full(rows, 0.5),
        "gamma": 1.0,
        "batch": np.zeros(rows, np.int64),
    }
    return Sample(**{**fields, **more})  # pyright: ignore[reportArgumentType]


def only(frame: pl.DataFrame, column: str, **where: object) -> float:
    """The one value of a column in the rows that match."""
    found = frame.filter(*(pl.col(name) == value for name, value in where.items()))[column]
    assert len(found) == 1, frame
    return found[0]


# --- the sample itself ------------------------------------------------------------------------------------------------


def test_a_sample_refuses_rows_out_of_order_and_infinite_numbers() -> None:
    x = np.zeros((4, 1))
    with pytest.raises(ValueError, match="numbered 0, 1, 2"):
        sample_from(x, episode=np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="numbered 0, 1, 2"):
        sample_from(x, episode=np.array([1, 1, 2, 2]))
    with pytest.raises(ValueError, match="infinite"):
        sample_from(np.array([[0.0], [np.inf]]))
    with pytest.raises(ValueError, match="missing action or reward"):
        sample_from(x, reward=np.array([0.0, np.nan, 0.0, 0.0]))
    with pytest.raises(ValueError, match="propensity"):
        sample_from(x, action_prob=np.array([0.5, 0.0, 0.5, 0.5]))
    with pytest.raises(InputError, match="column 'state' has 2 rows holding a category outside 0 to 2"):
        _ = sample_from(np.array([[3.0], [0.0], [-1.0], [np.nan]]), names=("state",), categories=(3,)).codes


def test_take_keeps_whole_episodes_and_at_most_fits() -> None:
    whole = sample_of(WORLD.simulate(200, seed=0), WORLD.n_states)
    chosen = np.arange(200) % 3 == 0
    part = whole.take(chosen)
    assert part.n_episodes == 67 and np.array_equal(part.length, whole.length[chosen])
    assert np.array_equal(part.return_, whole.return_[chosen])
    assert np.array_equal(part.reward, whole.reward[chosen[whole.episode]])
    few = whole.at_most(100, np.random.default_rng(0))
    assert 90 < few.n_rows <= 100
    assert whole.at_most(whole.n_rows, np.random.default_rng(0)) is whole


def test_returns_are_those_of_the_episodes() -> None:
    episodes = WORLD.simulate(50, seed=1)
    assert sample_of(episodes, WORLD.n_states).return_ == pytest.approx(episodes.return_)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1))
def test_a_joint_code_is_equal_exactly_where_all_codes_are(pairs: list[tuple[int, int]]) -> None:
    left, right = np.array(pairs).T
    code = joint(left, right)
    assert len(set(code.tolist())) == len(set(pairs)) == code.max() + 1
    assert len({(c, *pair) for c, pair in zip(code.tolist(), pairs, strict=True)}) == len(set(pairs))


def test_features_are_in_the_units_of_the_reference_and_mark_gaps() -> None:
    like = sample_from(np.array([[0.0, 5.0], [2.0, 5.0], [np.nan, 5.0]]))
    other = sample_from(np.array([[3.0, 6.0], [np.nan, 5.0]]))
    # mean 1 and standard deviation 1 of what is known; a constant column is only centered
    assert features(other, like) == pytest.approx(np.array([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))


def test_ridge_residuals_are_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    y = np.stack([x @ [1.0, -2.0, 0.0] + 3.0, rng.normal(size=2000)], 1)
    left = ridge_residuals(x, y, np.arange(2000) % 5)
    assert np.abs(left[:, 0]).max() < 0.01  # exactly linear
    assert (left[:, 1] ** 2).mean() >= (y[:, 1] ** 2).mean() * 0.999  # noise is not predicted
    tiny = ridge_residuals(rng.normal(size=(40, 200)), rng.normal(size=(40, 1)), np.arange(40) % 5)
    assert (tiny**2).mean() > 0.5  # more inputs than rows do not fit the held-out rows


def test_table_residuals_find_group_means_and_leave_noise() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 20, 4000)
    signal, noise = rng.normal(size=20)[group], rng.normal(size=4000)
    left = table_residuals(group[:, None], np.stack([signal, noise], 1), np.arange(4000) % 5)
    assert np.abs(left[:, 0]).max() < 1e-6
    assert (left[:, 1] ** 2).mean() == pytest.approx((noise**2).mean(), rel=0.005)
    assert group_means(signal[:, None], group)[:, 0] == pytest.approx(signal)


def test_table_residuals_are_out_of_fold_and_shrunk_as_far_as_they_should() -> None:
    """Three rows a group, effect and noise of variance 1: no prediction from the other two beats 1 + 1 / (1 + 2)."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4000), 3)
    values = rng.normal(size=4000)[group] + rng.normal(size=12_000)
    left = table_residuals(group[:, None], values[:, None], np.arange(12_000) % 3)
    assert (left**2).mean() == pytest.approx(4 / 3, rel=0.03)


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


# --- C09 --------------------------------------------------------------------------------------------------------------


def test_a_perfect_predictor_has_auc_1_and_noise_one_half() -> None:
    rng = np.random.default_rng(0)
    reward = rng.normal(size=2000)
    recorded_when_bad = np.where(reward > np.median(reward), np.nan, rng.normal(size=2000))
    columns = [np.exp(reward), -reward, rng.normal(size=2000), recorded_when_bad, np.full(2000, 3.0)]
    frame = independence.leakage(sample_from(np.stack(columns, 1), reward=reward), seed=0)
    assert frame["auc"].to_list() == pytest.approx([1.0, 1.0, 0.5, 1.0, 0.5], abs=0.05)
    assert frame["auc"].to_list()[:2] == [1.0, 1.0] and frame["positives"][0] == frame["negatives"][0] == 1000


def test_auc_by_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    value, positive = rng.integers(0, 6, 60).astype(float), np.arange(60) < 25
    left, right = value[positive][:, None], value[~positive][None, :]
    pairs = float((left > right).mean() + 0.5 * (left == right).mean())
    frame = independence.leakage(sample_from(value[:, None], reward=positive.astype(float)), seed=0)
    assert frame["auc"][0] == pytest.approx(max(pairs, 1 - pairs))


def test_many_categories_do_not_overfit_but_a_leaking_one_is_seen() -> None:
    rng = np.random.default_rng(0)
    survived = rng.random(2000) < 0.8
    noise, constant = rng.integers(0, 716, 2000), np.zeros(2000)
    leak = 2 * rng.integers(0, 20, 2000) + survived
    columns = np.stack([noise, constant, leak], 1).astype(float)
    frame = independence.leakage(sample_from(columns, categories=(716, 1, 40), reward=survived.astype(float)), seed=0)
    assert frame["auc"][0] == pytest.approx(0.5, abs=0.05)
    assert frame["auc"][1] == 0.5 and frame["auc"][2] > 0.999
    assert frame["positives"][0] == survived.sum()  # the median is the highest reward: positive means at it


def test_leakage_reads_the_last_decision_only() -> None:
    rng = np.random.default_rng(0)
    reward = np.where(np.arange(3000) % 3 == 2, rng.normal(size=3000), 0.0)
    x = np.where(np.arange(3000) % 3 == 2, reward, rng.normal(size=3000) * 100)
    assert independence.leakage(sample_from(x[:, None], steps=3, reward=reward), seed=0)["auc"][0] == 1.0


@pytest.mark.parametrize("positives", [0, 19, 500])
def test_too_few_of_a_class_give_no_row(positives: int) -> None:
    reward = (np.arange(1000) < positives).astype(float)
    frame = independence.leakage(sample_from(np.arange(1000.0)[:, None], reward=reward), seed=0)
    assert frame.height == (positives == 500)


# --- C28 --------------------------------------------------------------------------------------------------------------


def split_names(episodes: int) -> np.ndarray:
    return np.where(np.arange(episodes) % 4 == 0, "gate", "train")


def test_copied_episodes_with_numbers_are_found_and_counted() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5, 3))
    x[[0, 4, 8]] = x[[1, 5, 9]] + 1e-9  # copies into the other split
    x[2] = x[3]  # a copy within a split is not a leak
    frame = independence.near_duplicates(sample_from(x.reshape(-1, 3), steps=5), split_names(400))
    assert frame.rows() == [("gate", 100, 100, 3, 3, 0.03), ("train", 300, 300, 3, 3, 0.01)]
    clean = independence.near_duplicates(sample_from(rng.normal(size=(2000, 1)), steps=5), split_names(400))
    assert clean["matching"].to_list() == [0, 0] and clean["judged"].to_list() == [100, 300]


def test_short_episodes_of_few_categories_coincide_by_chance_and_do_not_count() -> None:
    world = chain_world()
    frame = independence.near_duplicates(sample_of(world.simulate(2000, seed=0), world.n_states), split_names(2000))
    assert frame["matching"].to_numpy().min() > 400 and frame["duplicates"].to_list() == [0, 0]


def test_long_categorical_episodes_are_judged() -> None:
    rng = np.random.default_rng(0)
    state = rng.integers(0, 30, (300, 12))
    state[0] = state[1]
    sample = sample_from(state.reshape(-1, 1), steps=12, names=("state",), categories=(30,))
    frame = independence.near_duplicates(sample, split_names(300))
    assert frame["judged"].to_list() == [75, 225] and frame["duplicates"].to_list() == [1, 1]


def test_a_state_that_never_changes_is_no_evidence_of_a_copy() -> None:
    state = np.repeat(np.arange(600) % 5, 40)  # 40 equal rows: long, but there are five such episodes only
    sample = sample_from(state[:, None], steps=40, names=("state",), categories=(5,))
    assert independence.near_duplicates(sample, split_names(600))["judged"].to_list() == [0, 0]


def test_what_is_seen_once_is_expected_as_often_as_good_and_turing_say() -> None:
    """Two episodes of 0, 1 and one of 2, 3: starts 0 (twice) and 2, transitions 0-1 (twice, of other actions later) and 2-3."""
    state, action = np.array([[0, 1], [0, 1], [2, 3]]), np.array([[0, 0], [0, 1], [0, 0]])
    more = {"names": ("state",), "categories": (4,), "action": action.ravel()}
    sample = sample_from(state.reshape(-1, 1), steps=2, **more)
    # Codes a = (0, 0), b = (1, 0), c = (1, 1), d = (2, 0), e = (3, 0). Seen twice: the start a; once: a-b, a-c, the start d, d-e.
    once = (2 * 1 + 1) / (4 + 1)  # more than any code's frequency of 1/6 or 2/6
    wanted = [((2 - 1 + once) / 3) * (once / 2)] * 2 + [(once / 3) * (once / 1)]
    content = support.episode_content(sample)
    assert support.episode_bits(sample, content, np.arange(3)) == pytest.approx(-np.log2(wanted))


def sparse(seed: int, states: int, episodes: int, steps: int) -> np.ndarray:
    """States of a chain that nearly always takes the same way on; most ways are met by few episodes."""
    rng = np.random.default_rng(seed)
    onward, state = rng.dirichlet(np.full(states, 0.002), states), np.empty((episodes, steps), np.int64)
    state[:, 0] = rng.choice(states, episodes, p=rng.dirichlet(np.full(states, 0.05)))
    for step in range(1, steps):
        drawn = rng.random((episodes, 1)) > onward[state[:, step - 1]].cumsum(1)[:, :-1]
        state[:, step] = drawn.sum(1)
    return state


@pytest.mark.parametrize(("states", "episodes", "steps"), [(300, 300, 4), (100, 1000, 4), (40_000, 40_000, 1)])
def test_chance_in_a_sparse_log_is_not_taken_for_copies(states: int, episodes: int, steps: int) -> None:
    """All episodes are drawn one by one: what coincides does so by chance, and next to none of it may count."""
    found = []
    for seed in range(4 if steps > 1 else 1):
        state = (
            sparse(seed, states, episodes, steps)
            if steps > 1
            else np.random.default_rng(seed).integers(0, states, episodes)
        )
        sample = sample_from(state.reshape(-1, 1), steps=steps, names=("state",), categories=(states,))
        found.append(independence.near_duplicates(sample, split_names(episodes)).sum())
    total = pl.concat(found)
    assert total["matching"].sum() > total["episodes"].sum() / 4
    assert total["duplicates"].sum() / total["episodes"].sum() < 0.001


# --- C29 --------------------------------------------------------------------------------------------------------------


def hidden_cause_log(strength: float, seed: int, *, numeric: bool, logged: bool, episodes: int = 1500) -> Sample:
    """Episodes of 6 steps in which a cause that is not observed drives both the action and the reward."""
    rng = np.random.default_rng(seed)
    cause, state = rng.integers(0, 2, episodes) - 0.5, rng.integers(0, 5, episodes)
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for _ in range(6):
        observed = state + 0.3 * rng.normal(size=episodes) if numeric else state.astype(float)
        p = 1 / (1 + np.exp(-0.5 * (observed - 2) - strength * 2 * cause))
        action = (rng.random(episodes) < p).astype(np.int64)
        reward = 0.3 * observed * action + strength * cause + 0.5 * rng.normal(size=episodes)
        for column, value in zip(columns, (observed, action, reward, np.where(action == 1, p, 1 - p)), strict=True):
            column.append(value)
        state = np.where(rng.random(episodes) < 0.5, (state + action) % 5, rng.integers(0, 5, episodes))
    observed, action, reward, prob = (np.stack(column, 1).ravel() for column in columns)
    kind = {} if numeric else {"names": ("state",), "categories": (5,)}
    more = {"action": action, "reward": reward, "action_prob": prob if logged else None}
    return sample_from(observed[:, None], steps=6, **more, **kind)


@pytest.mark.parametrize("numeric", [False, True])
def test_a_hidden_cause_of_action_and_reward_is_flagged(numeric: bool) -> None:
    frame = independence.confounding(hidden_cause_log(1.0, 0, numeric=numeric, logged=True), seed=0)
    assert frame["test"].to_list() == ["logged propensity", "earlier decisions"]
    z, gain, p_value = (frame[name].to_numpy() for name in ("z", "r2_gain", "p_value"))
    assert z.min() > 8 and gain.min() > 0.01 and p_value.max() < 1e-8
    unlogged = independence.confounding(hidden_cause_log(1.0, 0, numeric=numeric, logged=False), seed=0)
    assert unlogged["test"].to_list() == ["earlier decisions"] and unlogged["z"][0] > 8


@pytest.mark.parametrize("numeric", [False, True])
def test_without_a_hidden_cause_nothing_is_flagged(numeric: bool) -> None:
    frame = independence.confounding(hidden_cause_log(0.0, 1, numeric=numeric, logged=True), seed=0)
    assert frame["z"].to_numpy().max() < 3.5 and frame["r2_gain"].to_numpy().max() < 0.002


def test_scores_are_calibrated_where_cells_have_few_rows() -> None:
    """60 states a layer and 6 actions: a handful of visits of each cell. The z of an actor who does nothing is standard normal."""
    z = []
    for seed in range(20):
        world = random_world(60, 6, 4, 0.9, seed=seed)
        episodes = world.simulate(600, seed=seed)
        actor = np.random.default_rng(seed).integers(0, 9, 600).astype(str)[episodes.episode_of_row]
        z += independence.confounding(sample_of(episodes, world.n_states, actor=actor), seed=seed)["z"].to_list()[1:]
    assert abs(np.mean(z)) < 0.35 and 0.7 < np.std(z) < 1.3


def test_rows_of_an_episode_do_not_count_as_independent() -> None:
    """Policies of two temperatures, and rewards that differ by episode: by row, z would be inflated by the 10 steps."""
    z, p_value = np.zeros(20), np.zeros(20)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prob = np.repeat(rng.choice([0.5, 0.6], 300), 10)
        action = (rng.random(3000) > prob).astype(np.int64)
        reward = np.repeat(rng.normal(size=300), 10)
        more = {"action": action, "reward": reward, "action_prob": np.where(action == 0, prob, 1 - prob)}
        frame = independence.confounding(sample_from(np.zeros((3000, 1)), 10, categories=(1,), **more), seed=0)
        z[seed], p_value[seed] = (only(frame, name, test="logged propensity") for name in ("z", "p_value"))
    assert abs(z.mean()) < 0.6 and z.max() < 3.5
    upper = z > -1.0  # where the normal equivalent is close
    assert stats.norm.isf(p_value[upper]) == pytest.approx(z[upper], abs=0.1)


def actor_log(effect: float, *, numeric: bool) -> Sample:
    """Four sites see different states; with an effect, they also act differently in the same state."""
    rng = np.random.default_rng(2)
    site = np.repeat(rng.integers(0, 4, 1500), 4)
    x = rng.normal(size=6000) + 0.5 * site
    x = x if numeric else np.floor(x.clip(-3, 4.9)) + 3
    action = (rng.random(6000) < 1 / (1 + np.exp(-(x - x.mean()) - effect * (site - 1.5)))).astype(np.int64)
    kind = {} if numeric else {"names": ("state",), "categories": (8,)}
    return sample_from(x[:, None], steps=4, action=action, actor=np.char.add("site ", site.astype(str)), **kind)


@pytest.mark.parametrize("numeric", [False, True])
def test_an_action_that_depends_on_who_acted_is_flagged_and_case_mix_is_not(numeric: bool) -> None:
    flagged = independence.confounding(actor_log(0.4, numeric=numeric), seed=0)
    clean = independence.confounding(actor_log(0.0, numeric=numeric), seed=0)
    assert only(flagged, "z", test="actor") > 6 and only(flagged, "r2_gain", test="actor") > 0.005
    assert only(clean, "z", test="actor") < 3 and only(clean, "degrees", test="actor") in (3, 4)


def test_continuous_actions_have_no_propensity_test_but_the_others() -> None:
    rng = np.random.default_rng(0)
    actor = np.repeat(np.arange(400) % 2, 5)
    action = rng.normal(size=(2000, 2)) + 0.5 * actor[:, None]
    sample = sample_from(rng.normal(size=(2000, 2)), 5, action=action, n_actions=None, actor=actor.astype(str))
    frame = independence.confounding(sample, seed=0)
    assert frame["test"].to_list() == ["earlier decisions", "actor"] and only(frame, "z", test="actor") > 6


# --- C30 --------------------------------------------------------------------------------------------------------------


def test_a_markov_table_gains_nothing_from_history_and_an_aliased_one_does() -> None:
    world = random_world(6, 3, 5, 0.9, seed=3)
    episodes = world.simulate(4000, seed=1)
    clean = independence.markov(sample_of(episodes, world.n_states), seed=0)
    assert clean["target"].to_list() == ["reward", "terminated", "state"]
    assert np.abs(clean["gain"].to_numpy()).max() < 0.003
    aliased = sample_of(episodes, world.n_states, observation=np.floor(episodes.observation / 2))
    frame = independence.markov(aliased, seed=0)
    assert only(frame, "gain", target="reward") > 0.015 and only(frame, "z", target="reward") > 5


def moving_log(*, speed_observed: bool) -> Sample:
    """A position that moves with a speed; the reward is a nonlinear function of both. Markov only if the speed is observed."""
    rng = np.random.default_rng(0)
    place, speed, rows = rng.normal(size=1500), rng.normal(size=1500), []
    for _ in range(8):
        action = rng.integers(0, 2, 1500)
        reward = np.sin(2 * place) + action * np.tanh(speed) + 0.3 * rng.normal(size=1500)
        rows.append(np.stack([place, speed, action, reward], 1))
        place = np.tanh(place + 0.7 * speed) + 0.1 * rng.normal(size=1500)
        speed = 0.8 * speed + 0.4 * (action - 0.5) + 0.3 * rng.normal(size=1500)
    place, speed, action, reward = np.stack(rows, 1).reshape(-1, 4).T
    observed = np.stack([place, speed], 1) if speed_observed else place[:, None]
    return sample_from(observed, steps=8, action=action.astype(np.int64), reward=reward)


def test_a_markov_motion_gains_nothing_from_history_and_one_without_its_speed_does() -> None:
    clean = independence.markov(moving_log(speed_observed=True), seed=0)
    assert only(clean, "r2", target="reward") > 0.5 and only(clean, "r2", target="x0") > 0.9
    assert np.abs(clean["gain"].to_numpy()).max() < 0.003
    frame = independence.markov(moving_log(speed_observed=False), seed=0)
    assert only(frame, "gain", target="x0") > 0.03 and only(frame, "gain", target="reward") > 0.01


def test_mixed_columns_with_gaps_are_predicted_too() -> None:
    rng = np.random.default_rng(0)
    kind = np.repeat(rng.integers(0, 3, 400), 6)
    x = rng.normal(size=2400) + kind
    x[rng.random(2400) < 0.2] = np.nan
    frame = independence.markov(sample_from(np.stack([kind, x], 1), 6, categories=(3, None)), seed=0)
    assert only(frame, "r2", target="x0") > 0.99  # the kind of an episode never changes
    assert 0.2 < only(frame, "r2", target="x1") < 0.6 and abs(only(frame, "gain", target="x1")) < 0.01


# --- C12, C17, C31, C32, C33 ------------------------------------------------------------------------------------


def times(*minutes: float) -> np.ndarray:
    return np.datetime64("2025-03-01T10:00", "us") + (np.array(minutes) * 60e6).astype("timedelta64[us]")


def test_clock_skew_per_source() -> None:
    source = np.repeat(["ward", "web"], 100)
    decided = times(*range(200))
    lag = np.where(np.arange(200) < 100, 2.0, np.where(np.arange(200) % 4 == 0, -6.0, -4.0))
    frame = timing.clock_skew(decided, decided + (lag * 60e6).astype("timedelta64[us]"), source)
    assert frame.rows() == [("ward", 100, 2.0, 2.0, 0.0), ("web", 100, -4.0, -4.0, 0.25)]


def volumes(*rows: int) -> np.ndarray:
    day = np.repeat(np.arange(len(rows)), rows)
    return np.datetime64("2025-03-01T08:00", "us") + day * np.timedelta64(86_400_000_000, "us")


def test_daily_volume_flags_a_flood_and_a_trickle_but_no_partial_day() -> None:
    frame = timing.daily_volume(volumes(1, 10, 10, 10, 51, 10, 1, 50, 10, 1))
    assert frame["flagged"].to_list() == [False] * 4 + [True, False, True, False, False, False]
    assert frame["ratio"].to_list() == [None] * 4 + [5.1, 1.0, 0.1, 5.0, 1.0, 0.1]
    assert frame["partial"].to_list() == [True] + [False] * 8 + [True]
    assert timing.daily_volume(volumes(10, 10, 10, 10, 60))["flagged"].to_list() == [False] * 4 + [True]


def test_daily_volume_is_held_against_the_last_seven_days() -> None:
    frame = timing.daily_volume(volumes(5, *[60] * 8, *[20] * 9))
    assert frame["reference"].to_list() == [None] * 4 + [60.0] * 9 + [20.0] * 5


def test_reward_delay_by_hand() -> None:
    decided = times(*[0] * 10)
    frame = timing.reward_delay(decided, times(*[60] * 7, 120, 121, -1), 2.0)
    row = frame.row(0, named=True)
    assert (row["rows"], row["share_late"], row["share_early"], row["delay_q50_h"]) == (10, 0.1, 0.1, 1.0)
    assert row["delay_max_h"] == pytest.approx(121 / 60) and frame.height == 1
    with pytest.raises(InputError, match="column 'reward_at' has 1 rows"):
        timing.reward_delay(decided[:1], np.array(["NaT"], "datetime64[us]"), 2.0)


def test_version_mixture_adds_up_per_batch() -> None:
    version = np.array(["v1", "v1", "v2", "v2", "v2", "v2"])
    frame = timing.version_mixture(
        sample_from(np.zeros((6, 1)), batch=np.array([0, 0, 0, 0, 1, 1]), policy_version=version)
    )
    assert frame.rows() == [(0, "v1", 2, 0.5), (0, "v2", 2, 0.5), (1, "v2", 2, 1.0)]
    with pytest.raises(InputError, match="column 'policy_version' was not logged"):
        timing.version_mixture(sample_from(np.zeros((6, 1))))


def test_reward_facts_by_hand() -> None:
    sample = sample_from(np.zeros((6, 1)), reward=np.array([0, 1, 1, 0.5, 1, 1]), batch=np.array([0, 0, 0, 0, 1, 1]))
    frame = timing.reward_facts(sample, 0.0, 1.0)
    assert frame.rows() == [
        ("all", 6, 3, pytest.approx(1 / 6), pytest.approx(4 / 6), 0.75, None),
        ("0", 4, 3, 0.25, 0.5, 0.625, None),
        ("1", 2, 1, 0.0, 1.0, 1.0, None),
    ]


def test_drift_of_rewards_is_clustered_by_episode() -> None:
    """All rows of an episode share its reward: by row the z of two equal batches would be five times too large."""
    z = []
    for seed in range(40):
        reward = np.repeat(np.random.default_rng(seed).normal(size=200), 25)
        batch = np.repeat([0, 1], 2500)
        z.append(timing.reward_facts(sample_from(np.zeros((5000, 1)), 25, reward=reward, batch=batch), -9, 9)["z"][-1])
    assert 0.7 < np.std(z) < 1.3
    reward = np.random.default_rng(0).normal(size=5000) + np.repeat([0.0, 0.5], 2500)
    drifted = sample_from(np.zeros((5000, 1)), 25, reward=reward, batch=np.repeat([0, 1], 2500))
    expected = (reward[2500:].mean() - reward[:2500].mean()) / np.sqrt(2 / 2500)
    assert timing.reward_facts(drifted, -9, 9)["z"][-1] == pytest.approx(expected, rel=0.25) and expected > 10


# --- what all of them promise -----------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Sample], pl.DataFrame]] = {
    "C09": lambda s: independence.leakage(s, seed=0),
    "C11": support.outliers,
    "C12": lambda s: timing.reward_facts(s, 0.0, 1.0),
    "C17": timing.version_mixture,
    "C21": support.cell_visits,
    "C23": lambda s: support.dataset_quality(s, low=0.0, high=1.0),
    "C26": lambda s: support.outside_support(s, s, seed=0),
    "C28": lambda s: independence.near_duplicates(s, split_names(s.n_episodes)),
    "C29": lambda s: independence.confounding(s, seed=0),
    "C30": lambda s: independence.markov(s, seed=0),
    "C36": support.subgroup_sizes,
}


def degenerate(rows: int, steps: int, *, tabular: bool) -> Sample:
    """Constant everything, and one numeric column that was never recorded."""
    observation = np.zeros((rows, 1)) if tabular else np.stack([np.full(rows, 37.1), np.full(rows, np.nan)], 1)
    kind = {"categories": (3,)} if tabular else {}
    text = np.full(rows, "same")
    return sample_from(
        observation,
        steps,
        policy_version=text,
        actor=text,
        subgroups={"group": text},
        decided_at=times(*range(rows)),
        **kind,
    )


@pytest.mark.parametrize("check", MEASURES)
@pytest.mark.parametrize("tabular", [True, False])
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (6, 6), (60, 1), (120, 4)])
def test_degenerate_samples_give_finite_numbers_or_no_row(check: str, tabular: bool, rows: int, steps: int) -> None:
    frame = MEASURES[check](degenerate(rows, steps, tabular=tabular))
    numbers = frame.select(pl.col(pl.Float64).drop_nulls().is_finite().all())
    assert all(value for value in numbers.row(0)) if numbers.width else True


@pytest.mark.parametrize("check", MEASURES)
def test_measures_are_deterministic_and_leave_the_sample_alone(check: str) -> None:
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=900), rng.integers(0, 4, 900)], 1)
    text = rng.integers(0, 3, 900).astype(str)
    sample = sample_from(
        x,
        3,
        categories=(None, 4),
        action=rng.integers(0, 2, 900),
        reward=rng.random(900),
        policy_version=text,
        actor=text,
        subgroups={"group": text},
        decided_at=times(*range(900)),
    )
    for name in ("observation", "action", "reward", "episode", "batch"):
        getattr(sample, name).setflags(write=False)
    assert MEASURES[check](sample).equals(MEASURES[check](sample))
