"""Whether a log can speak of a policy at all: it goes where the policy goes, its propensities are right, and often enough."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from offrl_models import assess
from offrl_models.assess import _found, answer, checks, log, overlap, target, values
from offrl_models.assess.log import make_contract
from offrl_models.choices import Choices, Draws, Probabilities
from offrl_models.densities import MixtureDensity
from offrl_models.ope.worlds import bandit
from offrl_models.schema import Episodes, InputError
from tests.conftest import attributes, chain_world
from tests.test_assess import FEW_STEPS, better, sequential
from tests.test_assess_command import release
from tests.test_density import Fixed, acting, logistic

SETTLED = answer.Gain("DR", 0.2, 0.1, 0.3, 0.95, 0.01)
SEVEN = (0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)  # who acted
BEYOND = (0.0, 0.9, 0.02, 0.02, 0.02, 0.02, 0.02)  # a tenth of it on what was never done


def decisions(mu: tuple[float, ...], rows: int, seed: int) -> Episodes:
    """Single decisions, the actions of which have these probabilities whatever is observed. The first one is a bad idea."""
    rng = np.random.default_rng(seed)
    action = rng.choice(len(mu), rows, p=mu)
    return Episodes(
        episode_id=np.arange(rows), offsets=np.arange(rows + 1), observation=np.zeros((rows, 1), np.float32),
        final_observation=np.zeros((rows, 1), np.float32), action=action, mask=np.ones((rows, len(mu)), bool),
        reward=np.where(action == 0, -1.0, 1.0) * rng.uniform(0.5, 1, rows), terminated=np.ones(rows, bool),
        truncated=np.zeros(rows, bool), action_prob=np.array(mu)[action], gamma=1.0,
    )  # fmt: skip


def playing(pi: tuple[float, ...], episodes: Episodes) -> target.Target:
    choices = Probabilities(episodes, np.tile(np.array(pi), (episodes.n_rows, 1)))
    return target.Target({}, choices.taken, choices, None)


def failing(episodes: Episodes, known: target.Target, found: values.Values | None = None) -> set[str]:
    said = checks.checks(episodes, known, known.ratio(episodes), found, SETTLED, 0.1)
    assert all(check.sentence for check in said if not check.holds)
    return {check.name for check in said if not check.holds}


def assessed(folder: Path, episodes: Episodes, pi: tuple[float, ...], logged: np.ndarray | None) -> dict[str, Any]:
    """What the command finds for a log of single decisions, with a number as the observation and `logged` propensities."""
    rng, actions = np.random.default_rng(0), episodes.n_actions
    frame = pl.DataFrame({"x": rng.normal(size=episodes.n_rows), "a": episodes.action, "r": episodes.reward})
    frame = frame.with_columns(pi=pl.Series([list(pi)] * len(frame)))
    if logged is not None:
        frame = frame.with_columns(p=pl.Series(logged[episodes.action]))
    frame.write_parquet(folder / "log.parquet")
    given: dict[str, Any] = {"log": [folder / "log.parquet"], "horizon": 1, "observation": "x", "action": "a"}
    given |= {"actions": str(actions), "reward": "r", "reward_range": (-10.0, 1.0)}
    given |= {"action_prob": "p"} if logged is not None else {}
    return assess.assess(given["log"], assess.contract_of(given), assess.target_of({"policy_column": "pi"}), FEW_STEPS)


# Support


def test_mass_on_actions_that_the_log_never_shows_leaves_nothing_to_say(tmp_path: Path) -> None:
    """The mean ratios are too noisy to tell, and by its own numbers the policy is better: what is lost might cost 10 a time."""
    found = assessed(tmp_path, decisions(SEVEN, 700, 1), BEYOND, np.array(SEVEN))
    assert found["difference"]["lower_bound"] > 0
    assert [check["name"] for check in found["checks"] if check["grave"] and not check["holds"]] == ["support"]
    assert found["answer"] == "unusable"
    assert (
        "at least 10.0% of the policy's mass lies where whoever acted plays with probability under 0.01"
        in found["sentence"]
    )


@pytest.mark.parametrize(
    ("mu", "pi", "rows"),
    [
        ((0.02, 0.08, 0.9), (0.9, 0.05, 0.05), 2000),
        (
            (0.012, 0.488, 0.5),
            (1.0, 0.0, 0.0),
            500,
        ),  # by the spread of so few large ratios alone, one of the logs fails
        ((1 / 46,) * 46, (0.5, 0.5) + (0.0,) * 44, 1000),
    ],
)
def test_heavy_weights_of_a_log_that_covers_the_policy_are_no_lack_of_support(
    mu: tuple[float, ...], pi: tuple[float, ...], rows: int
) -> None:
    short = 0
    for seed in range(20):
        episodes = decisions(mu, rows, seed)
        known = playing(pi, episodes)
        assert "support" not in failing(episodes, known)
        assert "support" not in failing(episodes, dataclasses.replace(known, choices=None))
        short += known.ratio(episodes).mean() < 0.95
    assert short > 2  # by noise alone


def test_many_actions_may_go_unseen_by_chance() -> None:
    """Every context has 100 actions of its own: few of them all are ever taken, and all of them are supported."""
    context, actions, rows = np.arange(500) // 10, 5000, 500
    action = 100 * context + np.random.default_rng(0).integers(0, 100, rows)
    episodes = dataclasses.replace(
        decisions((0.5, 0.5), rows, 0),
        action=action,
        mask=np.ones((rows, actions), bool),
        action_prob=np.full(rows, 0.01),
    )
    probs = 0.01 * (np.arange(actions) // 100 == context[:, None])
    choices = Probabilities(episodes, probs)
    assert probs[:, np.setdiff1d(np.arange(actions), action)].sum(1).mean() > 0.8
    assert overlap.unsupported_mass(episodes, target.Target({}, choices.taken, choices, None), np.ones(rows), None) == 0


def test_what_is_hardly_ever_done_is_no_support_either() -> None:
    """Ratios average 1, as the propensities are right: the policy plays with 0.1 what the log does with 0.005."""
    episodes = decisions((0.005, 0.495, 0.5), 20_000, 0)
    known = playing((0.1, 0.4, 0.5), episodes)
    assert failing(episodes, known) == failing(episodes, dataclasses.replace(known, choices=None)) == {"support"}
    few = decisions((0.006, 0.497, 0.497), 2000, 0)  # whose ratios are too noisy to tell
    known = playing((0.1, 0.9, 0.0), few)
    assert (few.action == 0).any()
    assert overlap.unsupported_mass(few, known, known.ratio(few), None) == pytest.approx(0.1)


def test_where_only_logged_actions_are_known_ratios_tell_what_they_miss() -> None:
    episodes = decisions(SEVEN, 20_000, 0)
    known = dataclasses.replace(playing(BEYOND, episodes), choices=None)
    assert 0.05 < overlap.unsupported_mass(episodes, known, known.ratio(episodes), None) < 0.1
    moved = acting(lambda uniform: 0.8 * uniform, 4000, 0)  # a density of 1.25 up to 0.8, and a policy that is uniform
    moved = dataclasses.replace(moved, action_prob=np.full(4000, 1.25))
    known = target.Target({}, np.ones(4000), None, None)
    assert overlap.unsupported_mass(moved, known, known.ratio(moved), None) == pytest.approx(0.2)


def test_an_estimated_behavior_says_where_it_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = decisions(SEVEN, 700, 1)
    for pi, mass in ((BEYOND, 0.1), ((0.1, 0.9) + (0.0,) * 5, 0.0)):
        _, _, rare = values.with_propensities(episodes, playing(pi, episodes), 1, FEW_STEPS, lambda *_: None)
        assert rare is not None and rare.mean() == pytest.approx(mass)
    known = playing(BEYOND, episodes)
    rare = np.full(700, 0.2)  # more than the ratios show
    said = checks.checks(episodes, known, known.ratio(episodes), None, SETTLED, 0.1, rare)
    assert [check.sentence[:5] for check in said if check.grave and not check.holds] == ["20.0%"]
    number = dataclasses.replace(known, choices=None)
    assert values.with_propensities(episodes, number, 1, FEW_STEPS, lambda *_: None)[2] is None
    # Continuous actions, cloned
    monkeypatch.setattr(values, "_clone", lambda *_: MixtureDensity(Fixed(0.4, 0.05), 1, 1))
    drawn = acting(logistic(0.05), 2000, 0)
    for center, low, high in ((0.4, 0.0, 0.03), (0.9, 0.5, 1.0)):
        density = values._CloneDensity(MixtureDensity(Fixed(center, 0.05), 1, 1))
        choices: Choices = Draws(drawn, density)
        known = target.Target({}, np.ones(2000), choices, None)
        rare = values.with_propensities(drawn, known, None, FEW_STEPS, lambda *_: None)[2]
        assert rare is not None and low <= rare.mean() <= high


def test_without_propensities_the_answer_rests_on_what_was_counted(tmp_path: Path) -> None:
    world = chain_world()
    behavior = np.tile([0.5, 0.5, 0.0], (world.n_states, 1))
    sequential(tmp_path, dataclasses.replace(world, behavior=behavior), 1500, pi=lambda e: [[0.1, 0.8, 0.1]] * e.n_rows)
    contract = {name: value for name, value in attributes(world.n_states, 3)["logs"].items() if name != "action_prob"}
    paths, way = [tmp_path / "logs"], assess.target_of({"policy_column": "pi"})
    found = assess.assess(paths, make_contract(contract, "here"), way, FEW_STEPS)
    (said,) = (check for check in found["checks"] if check["name"] == "support")
    assert (
        said["value"] == pytest.approx(0.1) and said["sentence"].startswith("10.0%") and found["answer"] == "unusable"
    )


# Propensities


def test_wrong_propensities_of_one_action_are_seen_where_all_together_hide_them() -> None:
    episodes = decisions((0.45, 0.45, 0.1), 2000, 0)
    known = playing((0.85, 0.05, 0.1), episodes)
    assert failing(episodes, known) == set()
    wrong = dataclasses.replace(episodes, action_prob=np.where(episodes.action == 2, 0.14, episodes.action_prob))
    assert failing(wrong, known) == {"mean ratio per action"}


@pytest.mark.parametrize(
    ("order", "pi", "sentence"),
    [
        ([2, 0, 1], (0.6, 0.2, 0.2), "the mean importance ratio is"),
        ([1, 0, 2], (0.3, 0.5, 0.2), "the mean ratio of one action"),
    ],
)
def test_propensities_in_another_order_than_the_actions_leave_nothing_to_say(
    order: list[int], pi: tuple[float, ...], sentence: str, tmp_path: Path
) -> None:
    """Columns of a propensity table were mixed up before the one of the logged action was read off. The second policy is one
    whose ratios average 1 all the same."""
    mu = np.array([0.5, 0.3, 0.2])
    episodes = decisions(tuple(mu), 3000, 0)
    right = assessed(tmp_path, episodes, pi, mu)
    assert right["answer"] != "unusable"
    found = assessed(tmp_path, episodes, pi, mu[order])
    assert found["answer"] == "unusable" and sentence in found["sentence"] and "propensities" in found["sentence"]


def test_a_bundle_whose_actions_are_in_another_order_is_refused(tmp_path: Path) -> None:
    world = chain_world()
    sequential(tmp_path, world, 200)
    frame, file = pl.read_parquet(tmp_path / "logs" / "a.parquet"), tmp_path / "logs" / "a.parquet"
    frame.with_columns(action=pl.Series(np.array(["hold", "less", "more"])[frame["action"].to_numpy()])).write_parquet(
        file
    )
    coded = {"column": "action", "values": ["hold", "less", "more"], "mask": "allowed"}
    contract = make_contract(attributes(world.n_states, 3)["logs"] | {"action": coded}, "here")
    given = log.read([tmp_path / "logs"], contract, lambda *_: None)
    same = release(tmp_path / "same", world, better(world), action=coded)
    assert target.of_graph(same, given).choices is not None
    other = release(tmp_path / "other", world, better(world), action=coded | {"values": ["less", "hold", "more"]})
    with pytest.raises(InputError, match="coded or ordered otherwise"):
        target.of_graph(other, given)


# Effective sizes


def test_too_few_effective_transitions_leave_it_open() -> None:
    world = chain_world()
    episodes = world.simulate(3000, 1)
    probs = better(world)[episodes.observation[:, 0].astype(int)]
    choices = Probabilities(episodes, probs)
    known = target.Target({}, choices.taken, choices, None)
    found = values.tabular_values(episodes, known, known.ratio(episodes), world.n_states)
    assert found is not None and failing(episodes, known, found) == set()
    for number, fails in ((499, {"effective transitions"}), (501, set())):
        few = dataclasses.replace(found, weight=(np.arange(episodes.n_rows) < number).astype(float))
        assert failing(episodes, known, few) == fails
        said = checks.checks(episodes, known, known.ratio(episodes), few, SETTLED, 0.1)
        assert answer.answer(SETTLED, said)[0] == ("unsettled" if fails else "better")


@pytest.mark.parametrize(
    ("sequential", "episodes", "effective", "holds"),
    [
        (True, 1000, 199, False), (True, 1000, 201, True), (True, 8000, 399, False), (True, 8000, 401, True),
        (False, 1000, 499, False), (False, 20_000, 501, True),
    ],
)  # fmt: skip
def test_weights_of_whole_episodes_have_the_floor_of_the_gate(
    sequential: bool, episodes: int, effective: int, holds: bool
) -> None:
    """200, and a twentieth of all; single decisions are no products of ratios and have the floor of transitions, 500."""
    drawn = (chain_world() if sequential else bandit(6, 3, 2, 1)).simulate(episodes, 0)
    ratio = (drawn.episode_of_row < effective).astype(float)
    found = overlap.effective_check(drawn, ratio, None)
    assert found.name == "effective episodes" and found.value == pytest.approx(effective)
    assert found.holds is holds and bool(found.sentence) is not holds
    paired = overlap.effective_check(dataclasses.replace(drawn, entity=np.arange(episodes) // 2), ratio, None)
    assert paired.name == "effective entities" and paired.value == pytest.approx(effective / 2, abs=1)


def test_weights_alone_show_no_loss() -> None:
    """Without a model of the values; with one, and for gains, the answer is what the bounds say."""
    world = chain_world()
    log = world.simulate(3000, 0)
    poor = np.where(world.optimal() > 0, 0.2, 0.4)
    for table, modelled, word in (
        (poor, False, "unsettled"),
        (poor, True, "worse"),
        (world.optimal(), False, "better"),
    ):
        probs = (0.5 * world.behavior + 0.5 * table / table.sum(1, keepdims=True))[world.states(log.observation)]
        choices = Probabilities(log, probs)
        known = target.Target({}, choices.taken, choices, None)
        ratio = known.ratio(log)
        found = values.tabular_values(log, known, ratio, world.n_states) if modelled else None
        told = _found(log, known, ratio, found, "logged", world.n_states if modelled else None, FEW_STEPS)
        assert told["answer"] == word, told["sentence"]
        if word == "unsettled":
            assert "show no loss" in told["sentence"] and told["difference"].upper_bound < 0
