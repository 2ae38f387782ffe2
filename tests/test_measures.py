"""The sample that coverage measures read, those of time, versions and rewards, and what all of them promise."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.logs import independence, support, timing
from offrl_models.logs.sample import Sample, features, group_means, joint, ridge_residuals, table_residuals
from offrl_models.schema import InputError
from tests.samples import WORLD, sample_from, sample_of, split_names

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
