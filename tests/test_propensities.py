"""Propensities that are not those of whoever acted, where no policy's own ratios show it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from benchmarks.calibration.judging import CONFIG, asked
from offrl_models import assess
from offrl_models.assess.log import make_contract
from offrl_models.assess.propensities import FEWEST, propensity_check
from offrl_models.evaluation import measure_rungs
from offrl_models.gate import Status, findings
from offrl_models.measures import misfit
from offrl_models.ope import behavior
from offrl_models.schema import Episodes, Feature, InputError
from tests import test_assess_traps
from tests.test_assess import FEW_STEPS
from tests.test_assess_traps import broken
from tests.test_surprises import never


def rows(
    action: np.ndarray,
    prob: np.ndarray,
    seen: np.ndarray,
    categories: int | None = None,
    mask: np.ndarray | None = None,
) -> Episodes:
    """Decisions that stand alone, with one observed column."""
    n, continuous = len(prob), action.ndim == 2
    observation = seen[:, None].astype(np.float32)
    actions = 0 if continuous else int(action.max()) + 1
    return Episodes(
        episode_id=np.arange(n), offsets=np.arange(n + 1), observation=observation, final_observation=observation,
        action=action.astype(np.float32) if continuous else action,
        mask=np.ones((n, actions), bool) if mask is None else mask,
        reward=np.zeros(n), terminated=np.ones(n, bool), truncated=np.zeros(n, bool), action_prob=prob, gamma=1.0,
        features=(Feature("x", categories),),
        bounds=np.tile([-100.0, 100.0], (action.shape[1], 1)) if continuous else None,
    )  # fmt: skip


def drawn(chances: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    action = (chances.cumsum(1) > rng.random((len(chances), 1))).argmax(1)
    return action, chances[np.arange(len(chances)), action]


def normal(rng: np.random.Generator, n: int = 4000, columns: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seen, noise = rng.normal(size=n), rng.normal(size=(n, columns))
    return seen[:, None] + 0.5 * noise, (stats.norm.pdf(noise) / 0.5).prod(1), seen


@pytest.mark.parametrize("seed", range(5))
def test_the_propensities_of_whoever_acted_are_never_too_small(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for columns in (1, 2):
        assert propensity_check(rows(*normal(rng, columns=columns))).holds
    seen, noise = rng.normal(size=4000), rng.standard_t(2, size=4000)
    assert propensity_check(rows((seen + noise)[:, None], stats.t.pdf(noise, 2), seen)).holds
    on_a_grid = np.round(seen + 0.3 * noise, 1)  # each value stands for what lies around it
    density = stats.t.pdf((on_a_grid - seen) / 0.3, 2) / 0.3
    assert propensity_check(rows(on_a_grid[:, None], density, seen)).holds
    state = rng.integers(0, 4, 4000)
    chances = rng.dirichlet([0.5, 0.5, 0.5], 4)[state]
    assert propensity_check(rows(*drawn(chances, rng), state, 4)).holds
    mask = np.ones((4000, 3), bool)
    mask[state == 1, 0] = False
    allowed = np.where(mask, chances + 0.01, 0.0)
    assert propensity_check(rows(*drawn(allowed / allowed.sum(1, keepdims=True), rng), state, 4, mask)).holds


@pytest.mark.parametrize("columns", [1, 2])
def test_densities_that_are_too_small_somewhere_show(columns: int) -> None:
    action, density, seen = normal(np.random.default_rng(0), 20_000, columns)
    found = propensity_check(rows(action, np.full_like(density, 0.2**columns), seen))
    assert found.value > 4 and found.grave and "logged more often than their propensities allow (z = " in found.sentence
    assert not propensity_check(rows(action, density / 2**columns, seen)).holds  # of an action in other units


def test_the_density_of_another_observation_shows_where_that_is_low_or_high() -> None:
    """All in all, the actions have the density that is logged."""
    action, _, seen = normal(np.random.default_rng(0))
    marginal = stats.norm.pdf(action[:, 0], scale=np.sqrt(1.25))
    assert propensity_check(rows(action, marginal, np.zeros_like(seen))).holds
    assert not propensity_check(rows(action, marginal, seen)).holds


def test_probabilities_that_are_too_small_show_in_one_category() -> None:
    rng, n = np.random.default_rng(0), 4000
    state = rng.integers(0, 40, n)
    chances = np.where(state[:, None] == 7, [[0.8, 0.1, 0.1]], 1 / 3)
    action, prob = drawn(chances, rng)
    assert propensity_check(rows(action, prob, state, 40)).holds
    assert not propensity_check(rows(action, np.full(n, 1 / 3), state, 40)).holds
    few = np.flatnonzero(state == 7)[: FEWEST - 1]  # of so few rows nothing is known
    kept = np.sort(np.append(np.flatnonzero(state != 7), few))
    assert propensity_check(rows(action[kept], np.full(len(kept), 1 / 3), state[kept], 40)).holds


def test_an_action_that_a_mask_forbids_is_not_expected() -> None:
    """Action 0 may be taken in half of the rows, and is, always, at a logged half."""
    state = np.arange(2000) % 2
    mask = np.stack([state == 0, state == 1, np.ones(2000, bool)], 1)
    action = np.where(state == 0, 0, np.where(np.arange(2000) % 4 == 1, 1, 2))
    half = np.full(2000, 0.5)
    assert not propensity_check(rows(action, half, state, None, mask)).holds
    assert propensity_check(rows(action, np.where(state == 0, 1.0, 0.5), state, None, mask)).holds
    everything = replace(rows(action, half, np.zeros(2000), None, mask), mask=np.ones((2000, 3), bool))
    assert propensity_check(everything).holds


def told(folder: Path, frame: pl.DataFrame) -> dict[str, Any]:
    """What a log of numbers between -1 and 1 with logged densities says of the policy whose density is its column `pi`."""
    frame.write_parquet(folder / "log.parquet")
    contract: dict[str, Any] = {
        "horizon": 1, "observation": ["x"], "action": {"columns": ["a"], "low": -1, "high": 1},
        "action_prob": {"column": "p", "of": "density"}, "reward": {"column": "r", "range": [0, 1]}, "gamma": 1.0,
    }  # fmt: skip
    target = assess.target_of({"policy_column": "pi"})
    return assess.assess([folder / "log.parquet"], make_contract(contract, "here"), target, FEW_STEPS)


def test_a_constant_density_makes_no_policy_better(tmp_path: Path) -> None:
    """The policy is the one that wrote the log: its ratios to a density of 1 have the mean 1, as right ones would."""
    rng = np.random.default_rng(0)
    a = rng.normal(0, 0.28, 5000).clip(-0.9999, 0.9999)
    reward = (rng.random(5000) < np.clip(0.9 - 1.5 * np.abs(a), 0, 1)).astype(float)
    frame = pl.DataFrame({"x": rng.normal(size=5000), "a": a, "p": 1.0, "pi": stats.norm.pdf(a, 0, 0.28), "r": reward})
    found = told(tmp_path, frame)
    assert found["answer"] == "unusable" and broken(found) == {"propensities"}
    assert found["difference"]["lower_bound"] > 0.08
    found = told(tmp_path, frame.with_columns(p="pi"))
    assert found["answer"] == "unsettled" and not broken(found)


def test_single_values_that_recur_are_refused_beside_logged_densities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 0.6, 1000).clip(-1, 1)
    density = stats.norm.pdf(a, 0, 0.6)
    with pytest.raises(InputError, match=r"rows have exactly the action -?1; no density describes values that recur"):
        told(
            tmp_path,
            pl.DataFrame({"x": rng.normal(size=1000), "a": a, "p": density, "pi": density, "r": rng.random(1000)}),
        )


def test_a_clone_that_misfits_settles_nothing(tmp_path: Path) -> None:
    assert misfit(1.9, -1.9) == ""
    for z in ((2.0, 0.0), (0.0, -2.0), (np.nan, 0.0), (0.0, np.nan)):
        assert "a clone that does not fit" in misfit(*z)
    rng = np.random.default_rng(0)
    seen = rng.normal(size=300)
    frame = pl.DataFrame({
        "x": seen, "s": rng.integers(0, 2, 300), "a": (seen + rng.normal(size=300) > 0).astype(int), "pi": 0.5, "r": rng.random(300)
    })  # fmt: skip
    for observation, cloned in (("x", True), ("s:2", False)):  # beside counts, the ratios are those of the log itself
        found = test_assess_traps.asked(tmp_path, frame, observation=observation, action_prob=None, horizon=1)
        assert ("fit of the propensities" in {check["name"] for check in found["checks"]}) == cloned


def masked_visits(number: int, seed: int) -> Episodes:
    """Decisions in one state of a world of two, where action 2 is allowed or not, and what happens hangs on that."""
    rng = np.random.default_rng(seed)
    allowed = rng.random(number) < 0.5
    chances = np.where(allowed[:, None], [[0.1, 0.1, 0.8]], [[0.9, 0.1, 0.0]])
    mask = np.ones((number, 3), bool)
    mask[:, 2] = allowed
    state = np.zeros((number, 1), np.float32)
    return Episodes(
        episode_id=np.arange(number), offsets=np.arange(number + 1), observation=state, final_observation=state + 1,
        action=(chances.cumsum(1) > rng.random((number, 1))).argmax(1), mask=mask,
        reward=np.where(allowed, 0.1, 0.9), terminated=np.ones(number, bool), truncated=np.zeros(number, bool),
        action_prob=np.ones(number), gamma=1.0, features=(Feature("state", 2),),
    )  # fmt: skip


def test_what_was_allowed_is_part_of_what_a_decision_was_made_by() -> None:
    """Counted by state alone, a policy that does as well looks better by .18, for what was allowed tells what comes next."""
    log = masked_visits(4000, 0)
    allowed = log.mask[:, 2]
    found = behavior.estimate_propensities(log, 2)
    for what in (allowed, ~allowed):
        for action in range(3):
            mine = what & (log.action == action)
            assert not mine.any() or found[mine] == pytest.approx(mine.sum() / what.sum(), abs=1e-12)
    policy = np.array([0.5, 0.5, 0.0])
    assert (policy[log.action] / found) @ log.reward / 4000 == pytest.approx(log.reward.mean(), abs=1e-9)
    twice = np.where(np.arange(4000) < 2000, 2.0, 0.0)
    alone = behavior.estimate_propensities(log.take(twice > 0), 2)
    assert behavior.estimate_propensities(log, 2, twice)[:2000] == pytest.approx(alone, abs=1e-12)
    always = replace(log, mask=np.ones((4000, 3), bool))
    assert (always.situation == 0).all() and set(log.situation) == {0, 1}


@pytest.mark.parametrize(
    ("states", "propensities", "off", "doubted"),
    [
        (None, "estimated", 1.1, True),
        (None, "estimated", 1.0, False),
        (None, "logged", 1.1, False),
        (3, "estimated", 1.1, False),
    ],
)
def test_the_gate_doubts_clones_that_misfit(states: int | None, propensities: str, off: float, doubted: bool) -> None:
    """Counts have the mean ratio 1 by construction, and logged propensities have a limit of their own."""
    found = never(1)
    weighed = replace(found, ratio={name: off * ratio for name, ratio in found.ratio.items()})
    (rung,) = measure_rungs(["never"], weighed, CONFIG, asked(states, propensities=propensities))
    assert ("a clone that does not fit" in rung.measures.doubt) == doubted
    (trust,) = (each for each in findings(rung.measures, CONFIG) if each.name == "trust")
    assert trust.holds != doubted and trust.otherwise is Status.INCONCLUSIVE
