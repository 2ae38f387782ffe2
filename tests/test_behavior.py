"""The behavior policy where propensities were not logged: estimated on the split that evaluates, calibrated, and said so."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models import stages, storage
from offrl_models.config import Pipeline, parse_pipeline, read_pipeline
from offrl_models.ope import behavior
from offrl_models.ope.eprocess import elond_level
from offrl_models.ope.estimates import refitted
from offrl_models.ope.importance import Terms, tis, wis
from offrl_models.ope.intervals import bootstrap_all
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import bandit, random_policy
from offrl_models.policies import BehaviorTable, probs_of
from offrl_models.schema import Episodes
from tests.conftest import attributes, chain_world, write_batches
from tests.walks import ROOT, script

pytestmark = pytest.mark.usefixtures("no_pages")

WORLD = chain_world()


def unlogged(episodes: int, seed: int) -> Episodes:
    logged = WORLD.simulate(episodes, seed)
    return dataclasses.replace(logged, action_prob=np.full(logged.n_rows, np.nan))


@given(st.integers(0, 1000))
def test_with_estimated_propensities_the_mean_ratio_is_exactly_one(seed: int) -> None:
    """Counting makes sum_i pi(a_i|s_i) / mu(a_i|s_i) the number of rows, for any policy of the visited actions."""
    episodes = unlogged(300, seed)
    state = episodes.observation[:, 0].astype(int)
    visits = np.zeros((WORLD.n_states, 3))
    np.add.at(visits, (state, episodes.action), 1.0)
    policy = (visits > 0) * np.random.default_rng(seed).random(visits.shape)
    policy /= np.maximum(policy.sum(1, keepdims=True), 1e-300)
    estimated = dataclasses.replace(episodes, action_prob=behavior.estimate_propensities(episodes, WORLD.n_states))
    assert estimated.action_prob.min() > behavior.FLOOR  # else the floor would break the identity
    assert ratios(estimated, policy[state]).mean() == pytest.approx(1.0, abs=1e-9)


def test_estimated_propensities_cost_no_precision() -> None:
    """Estimates on the split itself: the WIS of many logs spreads no more than with the true propensities."""
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(3), WORLD.n_states)
    found = []
    for seed in range(60):
        logged = WORLD.simulate(200, seed)
        probs = policy[logged.observation[:, 0].astype(int)]
        estimate = behavior.estimate_propensities(logged, WORLD.n_states)
        both = (logged, dataclasses.replace(logged, action_prob=estimate))
        found.append([wis(episodes, ratios(episodes, probs)).estimate() for episodes in both])
    true, estimated = np.std(found, axis=0)
    assert estimated <= true * 1.05
    assert np.mean(found, axis=0)[1] == pytest.approx(WORLD.value(policy), abs=4 * true / np.sqrt(60))


@given(st.floats(0.4, 3.0), st.integers(0, 100))
def test_the_temperature_is_found_again(temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), 6000)
    mask = rng.random(probs.shape) < 0.8
    mask[:, 0] = True
    probs = probs * mask / (probs * mask).sum(1, keepdims=True)
    warmed = np.where(mask, probs, 0.0) ** (1 / temperature)
    warmed = warmed * mask / (warmed * mask).sum(1, keepdims=True)
    action = (warmed.cumsum(1) < rng.random((len(probs), 1))).sum(1)
    assert behavior.fit_temperature(probs, mask, action) == pytest.approx(temperature, rel=0.2)


def test_temperature_one_changes_nothing_and_the_mask_holds() -> None:
    table = BehaviorTable(np.random.default_rng(0).dirichlet(np.ones(3), WORLD.n_states))
    episodes = WORLD.simulate(50, 1)
    mask = np.array(episodes.mask)
    mask[:, 0] &= episodes.action == 0
    masked = dataclasses.replace(episodes, mask=mask)
    assert np.abs(probs_of(behavior.Warmed(table, 1.0), masked) - probs_of(table, masked)).max() < 1e-9
    hot = behavior.Warmed(table, 3.0)
    with torch.no_grad():
        probs = hot(torch.as_tensor(masked.observation), torch.as_tensor(mask)).numpy()
    assert (probs[~mask] == 0).all() and np.abs(probs.sum(1) - 1).max() < 1e-12
    powered = np.where(mask, np.cbrt(probs_of(table, masked)), 0.0)
    assert probs == pytest.approx(powered / powered.sum(1, keepdims=True), abs=1e-9)


def test_smoothing_is_chosen_by_what_was_not_counted() -> None:
    """States seen once are certain of nothing."""
    few, other = unlogged(12, 1), unlogged(2000, 2)
    table = behavior.estimate_table(few, WORLD.n_states, other)
    counted = behavior.estimate_table(unlogged(4000, 3), WORLD.n_states, other)
    assert probs_of(table, other).max() < 1.0
    assert np.abs(probs_of(counted, other) - 1 / 3).max() < 0.1


def curved(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, a mask, and actions drawn with other probabilities: a curve that no temperature straightens."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), rows)
    mask = rng.random(probs.shape) < 0.8
    mask[:, 0] = True
    probs = probs * mask / (probs * mask).sum(1, keepdims=True)
    true = np.where(probs > 0.5, 0.5 * probs + 0.1, probs)
    return probs, mask, ((true / true.sum(1, keepdims=True)).cumsum(1) < rng.random((rows, 1))).sum(1)


class Known(torch.nn.Module):
    """A policy whose probabilities are the observation."""

    def forward(self, observation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return observation.double()


def test_an_isotonic_curve_straightens_what_a_temperature_cannot() -> None:
    errors = {}
    for method in ("temperature", "isotonic"):
        found = []
        for seed in (0, 1):
            probs, mask, action = curved(20_000, seed)
            found.append(bandit_of(probs, mask, action))
        tuned_on, other = found
        model = behavior.calibrated(Known(), tuned_on, method)
        calibrated = probs_of(model, other)
        assert np.abs(calibrated.sum(1) - 1).max() < 1e-9 and (calibrated[~other.mask] == 0).all()
        errors[method] = behavior.calibration(other, calibrated)["ece"]
    assert errors["isotonic"] < 0.01 < errors["temperature"]


def bandit_of(probs: np.ndarray, mask: np.ndarray, action: np.ndarray) -> Episodes:
    rows = len(action)
    return Episodes(
        episode_id=np.arange(rows), offsets=np.arange(rows + 1), observation=probs.astype(np.float32),
        final_observation=np.zeros_like(probs, np.float32), action=action, mask=mask, reward=np.zeros(rows),
        terminated=np.ones(rows, bool), truncated=np.zeros(rows, bool), action_prob=np.full(rows, np.nan), gamma=1.0,
    )  # fmt: skip


def test_calibration_by_hand() -> None:
    """Bins of 0.05 twice, of 0.15 and of 0.95 and 1: off by 0.45, 0.15 and 0.025."""
    predicted, happened = np.array([0.05, 0.05, 0.15, 0.95, 1.0]), np.array([False, True, False, True, True])
    found = behavior.expected_calibration(predicted, happened)
    assert found["ece"] == pytest.approx((2 * 0.45 + 0.15 + 2 * 0.025) / 5)
    assert found["brier"] == pytest.approx((0.05**2 + 0.95**2 + 0.15**2 + 0.05**2) / 5)
    rows = [tuple(row.values()) for row in found["reliability"]]
    assert [row[2] for row in rows] == [2, 1, 2] and [row[1] for row in rows] == [0.5, 0.0, 1.0]
    assert [row[0] for row in rows] == pytest.approx([0.05, 0.15, 0.975])


def test_calibration_is_of_the_actions_that_were_allowed() -> None:
    probs, mask, action = curved(200, 0)
    told = behavior.calibration(bandit_of(probs, mask, action), probs)
    assert sum(row["pairs"] for row in told["reliability"]) == mask.sum() < mask.size


@given(st.integers(0, 1000), st.integers(2, 400))
def test_a_calibration_curve_rises_and_makes_nothing_impossible(seed: int, rows: int) -> None:
    probs, mask, action = curved(rows, seed)
    knots, levels = behavior.fit_curve(probs, mask, action)
    assert knots[0] == 0 and knots[-1] == 1 and (np.diff(knots) > 0).all() and len(knots) <= behavior.MOST_KNOTS + 2
    assert (np.diff(levels) >= 0).all() and levels[0] > 0 and levels[-1] <= 1


def test_a_curve_of_two_predictions_is_their_frequencies() -> None:
    probs = np.repeat([[0.25, 0.75], [0.75, 0.25]], 50, axis=0)
    action = np.r_[np.zeros(10, int), np.ones(40, int), np.zeros(40, int), np.ones(10, int)]
    knots, levels = behavior.fit_curve(probs, np.ones_like(probs, bool), action)
    assert knots.tolist() == [0, 0.25, 0.75, 1] and levels == pytest.approx([0.2, 0.2, 0.8, 0.8])


def test_a_curve_that_has_to_rise_counts_every_row() -> None:
    """Taken at 0.1 in 6 of 10 rows and at 0.4 in 9 of 30: together in 15 of 40, at 0.325 on average; the others mirror it."""
    probs = np.repeat([[0.1, 0.9], [0.4, 0.6]], [10, 30], axis=0)
    action = np.repeat([0, 1, 0, 1], [6, 4, 9, 21])
    knots, levels = behavior.fit_curve(probs, np.ones_like(probs, bool), action)
    assert knots == pytest.approx([0, 0.325, 0.675, 1]) and levels == pytest.approx([0.375, 0.375, 0.625, 0.625])


@pytest.mark.parametrize(("numeric", "calibration"), [(False, "temperature"), (True, "isotonic")])
def test_a_log_without_propensities_goes_the_whole_way_and_is_amber(
    tmp_path: Path, numeric: bool, calibration: str
) -> None:
    algorithms = {"bc": {"hidden": [16], "learning_rate": 0.01}}
    configured = attributes(None if numeric else WORLD.n_states, 3, algorithms=algorithms)
    configured["behavior"] = {"calibration": calibration}
    del configured["logs"]["action_prob"]
    configured["gate"] = {"first_look": 100, "effective_transitions": 10, "caps": [2.0]}
    write_batches(tmp_path, WORLD.simulate(600, seed=3), numeric=numeric)
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    judged, released = stages.run(pipeline)
    evidence = json.loads((pipeline.folder / "evidence" / "evidence.json").read_text())
    assert judged.summary["certificate"] == "AMBER"
    assert evidence["behavior"]["propensities"] == "estimated" and evidence["behavior"]["ece"] < 0.15
    assert {rung["measures"]["alpha"] for rung in evidence["ladder"]} == {elond_level(0.05, 1, 0) / 2}
    assert "AMBER" in (pipeline.reports / "evidence.html").read_text()
    checks = {result.check: result for result in stages.coverage(pipeline)[1]}
    assert checks["C15"].sentence.startswith("not applicable: no propensities are logged")
    if released is not None:
        verdict = json.loads((released.folder / "verdict.json").read_text())
        assert verdict["measures"]["propensities"] == "estimated"


def test_icu_sepsis_without_its_propensities_is_calibrated(tmp_path: Path) -> None:
    """On as many stays as the example has."""
    shipped = read_pipeline(ROOT / "orchestration" / "defs" / "icu_sepsis" / "defs.yaml").model_dump()
    del shipped["logs"]["action_prob"]
    logged, _ = script(Path("data") / "icu_sepsis" / "simulate.py").raw_log(20_000, 1)
    raw = tmp_path / "data" / "icu_sepsis" / "raw" / "batch-001.parquet"
    storage.write_parquet(raw, logged.drop_columns(["action_prob"]))
    pipeline = Pipeline(parse_pipeline(shipped, "icu_sepsis"), tmp_path)
    for stage in (stages.ingest, stages.coverage, stages.episodes):
        stage(pipeline)
    fitted = stages.behavior_policy(pipeline).summary
    assert (fitted["propensities"], fitted["kind"]) == ("estimated", "table") and fitted["ece"] < 0.02


def context_free(rounds: int, seed: int) -> tuple[Episodes, np.ndarray]:
    """Rounds of a bandit with one context and three arms, without propensities, and a policy."""
    world = bandit(1, 3, 1, seed=0)
    log = world.simulate(rounds, seed)
    return dataclasses.replace(log, observation=np.zeros_like(log.observation)), random_policy(world, 4)


def importance_terms(log: Episodes, policy: np.ndarray) -> Callable[[np.ndarray], dict[str, Terms]]:
    taken = policy[0][log.action]
    return lambda action_prob: {"TIS": tis(log, taken / action_prob), "WIS": wis(log, taken / action_prob)}


def test_fitted_again_with_every_episode_once_propensities_are_the_same() -> None:
    log = WORLD.simulate(200, 3)
    once = behavior.estimate_propensities(log, WORLD.n_states)
    assert behavior.estimate_propensities(log, WORLD.n_states, np.full(200, 3.0)) == pytest.approx(once, abs=1e-12)
    half = (np.arange(200) < 100).astype(float)
    alone = behavior.estimate_propensities(log.take(half > 0), WORLD.n_states)
    assert behavior.estimate_propensities(log, WORLD.n_states, half)[: len(alone)] == pytest.approx(alone, abs=1e-12)


def test_no_estimated_propensity_is_below_a_hundredth() -> None:
    """One action in 200, and in a sample without it none."""
    log, _ = context_free(200, 0)
    log = dataclasses.replace(log, action=(np.arange(200) == 7).astype(int))
    for copies, often in ((None, 0.995), ((np.arange(200) != 7).astype(float), 1.0)):
        found = behavior.estimate_propensities(log, 1, copies)
        assert found == pytest.approx(np.where(log.action == 1, 0.01, often), abs=1e-12)


def test_with_propensities_fitted_again_weights_need_no_normalising_in_any_sample() -> None:
    """In one context the fitted weights average 1 exactly, so TIS and WIS agree in every bootstrap sample."""
    log, policy = context_free(400, 4)
    log = dataclasses.replace(log, action_prob=behavior.estimate_propensities(log, 1))
    shares = bootstrap_shares(400, 200, 0)
    terms = importance_terms(log, policy)
    found = refitted(terms, lambda copies: behavior.estimate_propensities(log, 1, copies), log, shares, 0.9)
    assert found["TIS"].estimate == pytest.approx(found["WIS"].estimate, abs=1e-12)
    assert (found["TIS"].low, found["TIS"].high) == pytest.approx((found["WIS"].low, found["WIS"].high), abs=1e-12)
    given = bootstrap_all(terms(log.action_prob), shares, 0.9)
    assert given["TIS"].high - given["TIS"].low > 1.1 * (found["TIS"].high - found["TIS"].low)


def test_the_interval_is_as_wide_as_estimates_spread_and_covers() -> None:
    """Over 60 logs, the width of TIS's interval is that of a normal distribution of its own spread, and it holds the value as
    often as it says. Rewards are 1 or 2: with propensities that are not fitted again in the samples the interval would be more than
    twice as wide."""
    points, widths, covered = [], [], 0
    for seed in range(60):
        log, policy = context_free(300, seed)
        estimated = behavior.estimate_propensities(log, 1)
        log = dataclasses.replace(log, reward=log.reward + 1.0, action_prob=estimated)
        refit = partial(behavior.estimate_propensities, log, 1)
        found = refitted(importance_terms(log, policy), refit, log, bootstrap_shares(300, 150, seed), 0.9)["TIS"]
        points.append(found.estimate)
        widths.append(found.high - found.low)
        covered += found.low <= 1.0 + bandit(1, 3, 1, seed=0).value(policy) <= found.high
    assert (
        covered == 60 or stats.beta.ppf(0.999, covered + 1, 60 - covered) >= 0.9
    )  # the Clopper-Pearson limit of the coverage
    assert np.mean(widths) == pytest.approx(2 * 1.645 * np.std(points), rel=0.15)
