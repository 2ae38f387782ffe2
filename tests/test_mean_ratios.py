"""Mean importance ratios (C15): what they prove of logged propensities, and what they do not."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from offrl_models.config import parse_pipeline
from offrl_models.logs.contract import Contract
from offrl_models.logs.tally import Sums, Tally
from offrl_models.ope.diagnostics import mean_ratio_z, worst_action_z
from tests.conftest import as_table, attributes, chain_world, check_log

WORLD = chain_world()


@pytest.fixture
def contract() -> Contract:
    return parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs


@pytest.mark.parametrize(("prob", "blocks"), [(0.2, True), (0.5, False)])
def test_propensities_of_another_policy_fail_the_mean_ratio_test(
    contract: Contract, tmp_path: Path, prob: float, blocks: bool
) -> None:
    """Drawn with probability 1/3: plausible row by row, wrong together. Too large they may be for want of support, which
    the behavior model tells apart."""
    log = pl.DataFrame(as_table(WORLD.simulate(500, seed=3)))
    found = check_log(contract, log.with_columns(prob=pl.lit(prob)), tmp_path)
    assert not found["C15"].passed and found["C15"].blocking is blocks
    assert "mean ratio of" in found["C15"].sentence


def test_an_action_that_is_hardly_ever_played_blocks_no_log(contract: Contract, tmp_path: Path) -> None:
    """The third action has a probability of 1 in 10,000 wherever it is allowed, and was not drawn once."""
    rare = np.array([0.4999, 0.5, 0.0001])
    log = dataclasses.replace(WORLD, behavior=np.tile(rare, (WORLD.n_states, 1))).simulate(800, seed=3)
    assert (log.action < 2).all()
    found = check_log(contract, pl.DataFrame(as_table(log)), tmp_path)
    assert not found["C15"].blocking and "hardly ever played" in found["C15"].sentence


RARE = np.array([0.4999, 0.5, 0.0001])


@pytest.mark.parametrize(
    ("drawn", "logged", "allowed", "blocks"),
    [
        (RARE, RARE, None, False),  # the rare action is seen less often than it should be, as it mostly is
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], None, False),
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [True, True, True], False),
        ([0.4, 0.5, 0.1], [0.55, 0.35, 0.1], None, True),  # too large on the one, too small on the other
        ([0.5, 0.5, 0.0], [0.4, 0.4, 0.2], None, True),
        ([0.5, 0.5, 0.0], [0.49, 0.49, 0.02], [True, True, True], True),
        ([0.5, 0.5, 0.0], [0.49, 0.49, 0.02], [True, True, False], True),  # what is not allowed is not drawn
    ],
)
def test_where_the_whole_vector_is_logged_too_large_propensities_block(
    tmp_path: Path, drawn: Sequence[float], logged: Sequence[float], allowed: list[bool] | None, blocks: bool
) -> None:
    rows = 5000
    spec = {
        "source": "logs", "horizon": 1, "gamma": 1.0, "observation": [{"column": "x", "categories": 2}],
        "reward": {"column": "r", "range": [0.0, 1.0]},
        "action": {"column": "a", "values": 3, **({"mask": "m"} if allowed else {})},
        "action_prob": {"column": "p", "of": "vector"},
    }  # fmt: skip
    contract = parse_pipeline(attributes(2, 3) | {"logs": spec}, "toy").logs
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({
        "x": rng.integers(0, 2, rows), "r": rng.random(rows), "a": rng.choice(3, rows, p=drawn),
        "p": [list(logged)] * rows, **({"m": [allowed] * rows} if allowed else {}),
    })  # fmt: skip
    result = check_log(contract, frame, tmp_path)["C15"]
    assert (result.blocking and not result.passed) is blocks, result.sentence


def test_rare_actions_never_prove_too_large_propensities() -> None:
    """Enumerated: the exact chance of every count of a rare action against what the z-score claims of it."""
    n, p = 400, 0.002
    for taken, chance in enumerate(stats.binom.cdf(np.arange(4), n, p)):
        sums = Sums()
        sums.add(n, taken / p - n, np.nan, n / p)
        assert sums.lower_z <= 0 and chance <= 2 * stats.norm.sf(-sums.lower_z)
    assert np.isnan(Sums(4.0, -2.0, 1.0).lower_z)


def test_mean_ratios_do_not_depend_on_how_a_log_is_cut() -> None:
    """A chunk in which an allowed action was not taken counts as one in which it was."""
    rows = 40_000
    rng = np.random.default_rng(0)
    p = np.array([0.5995, 0.4, 0.0005])
    action = rng.choice(3, rows, p=p)
    contract = parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs
    contract = contract.model_copy(
        update={"action": contract.action.model_copy(update={"mask": None}), "next_observation": ()}
    )
    log = pl.DataFrame({
        "episode": np.arange(rows), "step": 0, "state": 0, "action": action, "prob": p[action], "reward": 0.5,
        "terminated": True, "truncated": False,
    })  # fmt: skip
    found = []
    for size in (rows, 1000):
        tally = Tally(contract)
        for start in range(0, rows, size):
            tally.add(log[start : start + size], np.full(size, 0.5))
        found.append(tally.mean_ratios())
    whole, cut = found
    assert whole["policy"].to_list() == ["always 0", "always 1", "always 2", "uniform"]
    assert whole["rows"].to_list() == cut["rows"].to_list() == [rows] * 4
    for column in ("mean_error", "z"):
        assert cut[column].to_numpy() == pytest.approx(whole[column].to_numpy(), rel=1e-6)
    assert np.abs(whole["z"].to_numpy()).max() < 4


@pytest.mark.parametrize("digits", [None, 4])
def test_rounded_propensities_are_no_proof_of_wrong_ones(digits: int | None) -> None:
    """Uniform ones in single precision, or in four digits: the ratio of uniform choice is the same number just off 1 everywhere."""
    actions, rows = 25, 4000
    prob = np.full(rows, np.float32(1 / actions) if digits is None else round(1 / 3, digits) * 3 / actions, np.float64)
    action = np.random.default_rng(0).integers(0, actions, rows)
    ratio, probs = (1 / actions) / prob, np.full((rows, actions), 1 / actions)
    assert 1e-9 < abs(ratio.mean() - 1) < 2e-4
    assert abs(mean_ratio_z(ratio)) < 2 and abs(worst_action_z(action, ratio, probs)) < 4
    sums = Sums()
    sums.add(rows, float((ratio - 1).sum()), float(np.square(ratio - 1).sum()))
    assert abs(sums.z()) < 2
    assert mean_ratio_z(np.full(rows, 1.01)) > 50  # a constant beyond rounding is wrong for sure


def test_a_log_of_one_action_is_as_sure_as_a_policy_that_takes_no_other() -> None:
    always, prob = np.zeros(1000, int), np.float64(np.float32(0.1) * 10)
    assert abs(worst_action_z(always, np.full(1000, 1 / prob), np.ones((1000, 1)))) < 1
