"""The behavior policy where propensities were logged, by one policy or by several: what is written is held against counts."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from offrl_models import stages, storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.ope import behavior
from offrl_models.ope.worlds import bandit, simulate_each
from offrl_models.schema import Episodes, InputError
from tests.conftest import as_table, attributes
from tests.test_behavior import WORLD, bandit_of, context_free

pytestmark = pytest.mark.usefixtures("no_pages")


def test_the_shares_of_logging_policies_are_of_the_column_that_names_them(tmp_path: Path) -> None:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"]["policy_version"] = "logger"
    log = as_table(WORLD.simulate(600, seed=3))
    newer = np.asarray(log["episode"]) % 3 == 0
    named = log.append_column("logger", pa.array(np.where(newer, "newer", "older")))
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    storage.write_parquet(pipeline.raw / "b.parquet", named)
    stages.ingest(pipeline)
    stages.coverage(pipeline)
    stages.episodes(pipeline)
    train = np.array([number for number in range(600) if bucket(number, pipeline.config.salt) in SPLITS["train"]])
    share = float((train % 3 == 0).mean())
    assert stages.behavior_policy(pipeline).summary["versions"] == pytest.approx({"newer": share, "older": 1 - share})


def test_of_several_policies_the_table_is_their_mixture() -> None:
    """Two policies in turn, each with its own propensities; the first wrote three quarters of the log."""
    first, second = bandit(1, 3, 1, seed=0), bandit(1, 3, 1, seed=5)
    writer = (np.random.default_rng(0).random(40_000) < 0.25).astype(np.int64)
    worlds = [first, dataclasses.replace(first, behavior=second.behavior)]
    log = simulate_each(worlds, writer, 1)
    log = dataclasses.replace(log, observation=np.zeros_like(log.observation))
    mixture = 0.75 * first.behavior[0] + 0.25 * second.behavior[0]
    found = behavior.fit_table(log, 1).known.numpy()[0]
    assert found == pytest.approx(mixture, abs=0.01)
    arithmetic = np.array([log.action_prob[log.action == action].mean() for action in range(3)])
    assert np.abs(arithmetic - mixture).max() > 0.05
    assert behavior.fit_table(log.take(writer == 0), 1).known.numpy()[0] == pytest.approx(first.behavior[0], abs=1e-12)


def test_equal_propensities_that_add_up_to_more_than_one_are_refused() -> None:
    log, _ = context_free(300, 0)
    log = dataclasses.replace(log, action_prob=log.action_prob * 1.02)
    with pytest.raises(InputError, match="add up to 1.0200 over its actions"):
        behavior.fit_table(log, 1)


def test_of_several_policies_propensities_may_add_up_to_more_than_one() -> None:
    """Each was logged with what it plays most, 0.9, and once with the 0.5 of the other: harmonic means of 9/14."""
    log, _ = context_free(4, 0)
    log = dataclasses.replace(log, action=np.array([0, 0, 1, 1]), action_prob=np.array([0.9, 0.5, 0.9, 0.5]))
    assert behavior.fit_table(log, 1).known.numpy()[0] == pytest.approx([9 / 14, 9 / 14, 0.0])


def test_what_calibrates_and_what_is_held_against_are_different_episodes() -> None:
    log = WORLD.simulate(7, 0)
    even, odd = behavior.halves(log)
    assert even.episode_id.tolist() == log.episode_id[::2].tolist()
    assert odd.episode_id.tolist() == log.episode_id[1::2].tolist()


def versioned(seed: int) -> Episodes:
    """Two policies in turn, each named and with its own propensities."""
    first, second = bandit(1, 3, 1, seed=0), bandit(1, 3, 1, seed=5)
    writer = np.random.default_rng(seed).integers(0, 2, 6000)
    log = simulate_each([first, dataclasses.replace(first, behavior=second.behavior)], writer, seed)
    log = dataclasses.replace(log, observation=np.zeros_like(log.observation))
    return dataclasses.replace(log, labels={"logger": np.where(writer == 0, "older", "newer")})


@pytest.mark.parametrize(("wrong", "holds"), [(False, True), (True, False)])
def test_counts_of_each_logging_policy_find_the_one_that_writes_wrong_propensities(wrong: bool, holds: bool) -> None:
    train, other = versioned(1), versioned(2)
    if wrong:
        newer = other.labels["logger"] == "newer"
        other = dataclasses.replace(other, action_prob=np.where(newer, 1.0, other.action_prob))
    newer, older = behavior.held_against_logged(behavior.counted_ratios(train, other, 1, "logger"), least=1.0)
    assert (newer["version"], older["version"]) == ("newer", "older")
    assert abs(older["z"]) < 4 and older["mean_ratio"] == pytest.approx(1.0, abs=0.05)
    assert (abs(newer["z"]) < 4) is holds and (newer["mean_ratio"] == pytest.approx(1.0, abs=0.05)) is holds
    assert (newer["shortfall_z"] > -4) is holds


def shy(episodes: int, wrong: bool) -> tuple[Episodes, np.ndarray]:
    """Bandit rounds of two policies, each of which never plays an action that the other one plays most often; and who wrote them.
    One may log 1.5 times its propensities."""
    rng = np.random.default_rng(0)
    newer, seen = np.arange(episodes) % 2 == 1, rng.normal(size=(episodes, 1)).astype(np.float32)
    often = 0.6 + 0.05 * np.sign(seen[:, 0]).astype(float)  # of the action that the other one never plays
    other = rng.random(episodes) > often
    action = np.where(other, 1, np.where(newer, 2, 0))
    log = bandit_of(np.zeros((episodes, 3)), np.ones((episodes, 3), bool), action)
    prob = np.where(other, 1.0 - often, often) * np.where(newer & wrong, 1.5, 1.0)
    return dataclasses.replace(log, observation=seen, final_observation=0 * seen, action_prob=prob), newer


def modelled(root: Path, log: Episodes, logger: np.ndarray, gradient_steps: int) -> storage.Stage:
    """The behavior policy of a log of numbers and of who wrote each round, learned."""
    configured = attributes(None, 3, training={"gradient_steps": gradient_steps, "batch_size": 256})
    configured["logs"]["policy_version"] = "logger"
    pipeline = Pipeline(parse_pipeline(configured, "toy"), root)
    named = as_table(log, numeric=True).append_column("logger", pa.array(logger))
    storage.write_parquet(pipeline.raw / "b.parquet", named)
    for stage in (stages.ingest, stages.coverage, stages.episodes):
        stage(pipeline)
    return stages.behavior_policy(pipeline)


def test_logging_policies_that_training_has_never_seen_are_held_against_nothing(tmp_path: Path) -> None:
    log, newer = shy(400, wrong=False)
    salt = parse_pipeline(attributes(None, 3), "toy").salt
    held_out = np.array([bucket(number, salt) in SPLITS["selection"] for number in range(400)])
    found = modelled(tmp_path, log, np.where(held_out, "newest", np.where(newer, "newer", "older")), 20)
    c15 = next(result for result in stages.check_results(found) if result.check == "C15")
    assert not c15.applies and c15.passed and "no logging policy" in c15.sentence


@pytest.mark.parametrize("wrong", [False, True])
def test_each_of_two_logging_policies_is_held_against_a_model_of_its_own(tmp_path: Path, wrong: bool) -> None:
    """The mixture alone would play .3 where a policy has 0, and its mean ratio be .7 of right propensities."""
    log, newer = shy(4000, wrong)
    found = modelled(tmp_path, log, np.where(newer, "newer", "older"), 600)
    assert {row["version"]: row["mean_ratio"] for row in found.summary["mean_ratios"]} == pytest.approx(
        {"newer": 1 / 1.5 if wrong else 1.0, "older": 1.0}, abs=0.07
    )
    c15 = next(result for result in stages.check_results(found) if result.check == "C15")
    assert (c15.blocking and not c15.passed) is wrong
    assert not wrong or "logged propensities of newer is 0.6" in c15.sentence


def test_mean_ratios_of_many_policies_are_corrected_for_their_number() -> None:
    """Holm: of one policy that is off and 19 that are not, the probability counts 20 times."""
    rng = np.random.default_rng(0)
    off = rng.normal(0.8, 1.0, 400)
    alone = behavior.held_against_logged({"off": off}, least=0.9)[0]
    right = {str(name): rng.normal(1.0, 1.0, 400) for name in range(19)}
    among = behavior.held_against_logged({"off": off, **right}, least=0.9)[0]
    assert alone["mean_ratio"] == among["mean_ratio"] == pytest.approx(off.mean())
    assert alone["z"] == pytest.approx((off.mean() - 1.0) / (off.std() / 20))
    assert alone["shortfall_z"] == pytest.approx((off.mean() - 0.9) / (off.std() / 20))
    for key in ("z", "shortfall_z"):
        assert 2 * stats.norm.sf(abs(among[key])) == pytest.approx(20 * 2 * stats.norm.sf(abs(alone[key])))
    (above,) = behavior.held_against_logged({"off": off + 0.2}, least=0.9)
    assert above["shortfall_z"] == 0.0


def test_a_policy_that_is_new_in_other_episodes_is_held_against_nothing() -> None:
    """And the others keep their code, whatever their place in the alphabet."""
    log = dataclasses.replace(versioned(1), labels={"logger": np.array(["c", "a", "b"])[np.arange(6000) % 3]})
    found = behavior.version_observed(log, "logger", ["b", "c"])
    assert found.n_episodes == 4000 and found.features[-1].categories == 2
    assert found.observation[:2, -1].tolist() == [1.0, 0.0] and found.final_observation[:2, -1].tolist() == [1.0, 0.0]


def test_states_that_were_not_counted_say_nothing_of_propensities() -> None:
    """Sure choices in states half of which the other log has not seen."""
    choice = np.random.default_rng(0).integers(0, 4, 40)

    def sure(states: np.ndarray) -> Episodes:
        rows = len(states)
        log = bandit_of(np.zeros((rows, 4)), np.ones((rows, 4), bool), choice[states])
        seen = states[:, None].astype(np.float32)
        return dataclasses.replace(log, observation=seen, final_observation=0 * seen, action_prob=np.ones(rows))

    ratio = behavior.counted_ratios(sure(np.arange(20).repeat(5)), sure(np.arange(40).repeat(5)), 40, None)["all rows"]
    assert len(ratio) == 100 and (ratio == 1.0).all()
    assert behavior.counted_ratios(sure(np.arange(20)), sure(np.arange(20, 40)), 40, None) == {}
