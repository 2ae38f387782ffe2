"""Coverage measures of leaks, copies, hidden causes and history: tripped by a log made to trip them, silent on a clean one."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from offrl_models.logs import independence, support
from offrl_models.logs.sample import Sample
from offrl_models.ope.worlds import random_world
from tests.conftest import chain_world
from tests.samples import only, sample_from, sample_of, split_names

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
