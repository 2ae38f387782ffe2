"""The behavior policy where propensities were not logged: estimated on the split that evaluates, calibrated, and said so."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl_models import stages
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.ope import behavior
from offrl_models.ope.importance import wis
from offrl_models.ope.sequences import ratios
from offrl_models.policies import BehaviorTable, probs_of
from offrl_models.schema import Episodes
from tests.conftest import attributes, chain_world, write_batches

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
    assert np.abs(probs_of(behavior.Calibrated(table, 1.0), masked) - probs_of(table, masked)).max() < 1e-9
    hot = behavior.Calibrated(table, 3.0)
    with torch.no_grad():
        probs = hot(torch.as_tensor(masked.observation), torch.as_tensor(mask)).numpy()
    assert (probs[~mask] == 0).all() and np.abs(probs.sum(1) - 1).max() < 1e-12


def test_smoothing_is_chosen_by_what_was_not_counted() -> None:
    """States seen once are certain of nothing."""
    few, other = unlogged(12, 1), unlogged(2000, 2)
    table = behavior.estimate_table(few, WORLD.n_states, other)
    counted = behavior.estimate_table(unlogged(4000, 3), WORLD.n_states, other)
    assert probs_of(table, other).max() < 1.0
    assert np.abs(probs_of(counted, other) - 1 / 3).max() < 0.1


@pytest.mark.parametrize("numeric", [False, True])
def test_a_log_without_propensities_goes_the_whole_way_and_is_amber(tmp_path: Path, numeric: bool) -> None:
    configured = attributes(None if numeric else WORLD.n_states, 3)
    del configured["logs"]["action_prob"]
    configured["gate"] = {"first_look": 100, "effective_transitions": 10, "effective_episodes": 10}
    write_batches(tmp_path, WORLD.simulate(600, seed=3), numeric=numeric)
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    judged, released = stages.run(pipeline)
    evidence = json.loads((pipeline.folder / "evidence" / "evidence.json").read_text())
    assert judged.summary["certificate"] == "AMBER"
    assert evidence["behavior"]["propensities"] == "estimated" and evidence["behavior"]["ece"] < 0.15
    assert {rung["measures"]["alpha"] for rung in evidence["ladder"]} == {0.025}
    assert "AMBER" in (pipeline.reports / "evidence.html").read_text()
    checks = {result.check: result for result in stages.coverage(pipeline)[1]}
    assert checks["C15"].sentence.startswith("not applicable: no propensities are logged")
    if released is not None:
        verdict = json.loads((released.folder / "verdict.json").read_text())
        assert verdict["measures"]["propensities"] == "estimated"
