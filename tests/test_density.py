"""The behavior policy over continuous actions, on logs whose density is known exactly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from offrl_models import stages, storage
from offrl_models.algorithms.bc import BC, BCConfig
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import MixtureDensity, log_density_of
from offrl_models.distributions import COMPONENTS, LogisticMixture, MixtureHead
from offrl_models.mapped import open_columns
from offrl_models.ope import behavior, density
from offrl_models.schema import Episodes, InputError
from offrl_models.stages.behavior import current_behavior, read_evaluated
from offrl_models.training import fit
from tests.conftest import codes

pytestmark = pytest.mark.usefixtures("no_pages")

BOUNDS = np.array([[0.0, 1.0], [-1.0, 1.0]])
STEPS, WIDTH, RELATED = 4, 0.1, 0.25


def cut(value: np.ndarray, center: np.ndarray, scale: float, low: float, high: float) -> np.ndarray:
    """Density of a normal distribution that is cut off at two bounds."""
    return stats.truncnorm.pdf(value, (low - center) / scale, (high - center) / scale, center, scale)


def drawn(rng: np.random.Generator, center: np.ndarray, scale: float, low: float, high: float) -> np.ndarray:
    found: Any = stats.truncnorm.rvs((low - center) / scale, (high - center) / scale, center, scale, random_state=rng)
    return found


def logged(episodes: int, seed: int) -> Episodes:
    """Two modes of the first dimension, whose weights depend on the observation; the second follows the first."""
    rng, rows = np.random.default_rng(seed), episodes * STEPS
    seen = rng.normal(size=(rows, 1)).astype(np.float32)
    upper = 1 / (1 + np.exp(-2.0 * seen[:, 0].astype(float)))
    first = drawn(rng, np.where(rng.random(rows) < upper, 0.75, 0.25), WIDTH, 0, 1)
    second = drawn(rng, first - 0.5, RELATED, -1, 1)
    modes = upper * cut(first, np.array(0.75), WIDTH, 0, 1) + (1 - upper) * cut(first, np.array(0.25), WIDTH, 0, 1)
    last = np.arange(1, rows + 1) % STEPS == 0
    return Episodes(
        episode_id=np.arange(episodes), offsets=np.arange(0, rows + 1, STEPS), observation=seen,
        final_observation=np.zeros((episodes, 1), np.float32), action=np.stack([first, second], 1).astype(np.float32),
        mask=np.ones((rows, 0), bool), reward=first, terminated=last, truncated=np.zeros(rows, bool),
        action_prob=modes * cut(second, first - 0.5, RELATED, -1, 1), gamma=1.0, features=tuple(codes(None)),
        bounds=BOUNDS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cloned() -> MixtureDensity:
    log = logged(3000, 0)
    clone, _ = fit("bc", BCConfig(hidden=(64,), learning_rate=3e-3), log, Encoder.fit(log), seeds=[0, 1],
                   gradient_steps=1500, batch_size=256)  # fmt: skip
    assert isinstance(clone, BC)
    return MixtureDensity(clone, 2, 2)


def some_mixture(seed: int, dimensions: int) -> LogisticMixture:
    """Components narrow and wide, inside the bounds and beyond them."""
    generator = torch.Generator().manual_seed(seed)
    head = MixtureHead(np.array([[-1.0, 3.0], [0.0, 0.5]])[:dimensions]).double()
    return head(2.0 * torch.randn(1, head.outputs, generator=generator, dtype=torch.float64))


@given(st.integers(0, 200))
def test_a_density_integrates_to_its_distribution_function(seed: int) -> None:
    found = some_mixture(seed, 1)
    grid = torch.linspace(-1.0, 3.0, 10_001, dtype=torch.float64)[:, None]
    weight, center, log_scale = (part.expand(len(grid), *part.shape[1:]) for part in found[:3])
    wide = LogisticMixture(weight, center, log_scale, found.low, found.width)
    share = wide.conditionals(grid)[1][:, 0].numpy()
    steps = integrate.cumulative_simpson(wide.log_prob(grid).exp().numpy(), x=grid[:, 0].numpy(), initial=0)
    assert share[0] == pytest.approx(0, abs=1e-12) and share[-1] == pytest.approx(1, abs=1e-12)
    assert steps == pytest.approx(share, abs=1e-4)


@given(st.integers(0, 200))
def test_the_density_is_the_product_of_its_conditionals(seed: int) -> None:
    found, action = some_mixture(seed, 2), torch.tensor([[0.3, 0.2]], dtype=torch.float64)
    assert float(found.conditionals(action)[0].sum()) == pytest.approx(float(found.log_prob(action)), abs=1e-10)
    assert found.center.shape == (1, COMPONENTS, 2)


def test_a_clone_finds_the_density_that_was_logged(cloned: MixtureDensity) -> None:
    """Held against the exact density: two modes, cut off, and one dimension that follows the other."""
    other = logged(3000, 1)
    log_density = log_density_of(cloned, other)
    assert np.abs(log_density - np.log(other.action_prob)).mean() < 0.25
    ratios = behavior.learned_ratios(np.exp(log_density), other, None)
    assert abs(behavior.held_against_logged(ratios, least=0.9)[0]["z"]) < 4
    told = density.calibration(other, cloned)
    assert told["ece"] < 0.02 and sum(row["pairs"] for row in told["reliability"]) == other.n_rows * 2 * 9


class Fixed(torch.nn.Module):
    """A clone that has learned one logistic density, whatever is observed."""

    def __init__(self, center: float, scale: float):
        super().__init__()
        self.center, self.scale = center, scale

    def distribution(self, observation: torch.Tensor, mask: torch.Tensor | None = None) -> LogisticMixture:
        one = torch.ones(*observation.shape[:2], 1, 1, dtype=torch.float64)
        return LogisticMixture(
            0.0 * one[..., 0], self.center * one, float(np.log(self.scale)) * one, torch.zeros(1), torch.ones(1)
        )


def acting(share: Callable[[np.ndarray], np.ndarray], rows: int, seed: int) -> Episodes:
    """Actions of one dimension by the inverse of their distribution function."""
    action = share(np.random.default_rng(seed).random(rows))
    log = logged(rows // STEPS, seed)
    return dataclasses.replace(log, action=action[:, None].astype(np.float32), bounds=BOUNDS[:1])


def logistic(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """Around 0.4, cut off at 0 and 1."""
    low, high = stats.logistic.cdf([0, 1], 0.4, scale)
    return lambda uniform: stats.logistic.ppf(low + uniform * (high - low), 0.4, scale)


@given(st.floats(0.3, 3.0), st.integers(0, 50))
def test_the_spread_is_found_again(spread: float, seed: int) -> None:
    found = density.calibrated(
        MixtureDensity(Fixed(0.4, 0.05 / spread), 1, 1), acting(logistic(0.05), 4000, seed), "temperature"
    )
    assert float(found.spread) == pytest.approx(spread, rel=0.1)


def test_curves_mend_what_no_spread_can() -> None:
    """A density that is nearly uniform, and actions that are not."""

    def skewed(uniform: np.ndarray) -> np.ndarray:
        return stats.beta.ppf(uniform, 2, 5)

    tuned_on, other, model = acting(skewed, 8000, 0), acting(skewed, 8000, 1), MixtureDensity(Fixed(0.5, 5.0), 1, 1)
    errors = {
        method: density.calibration(other, density.calibrated(model, tuned_on, method))["ece"]
        for method in ("temperature", "isotonic")
    }
    assert errors["isotonic"] < 0.015 < 0.05 < errors["temperature"]
    mended = density.calibrated(model, tuned_on, "isotonic")
    exact = stats.beta.logpdf(other.action[:, 0], 2, 5)
    assert np.abs(log_density_of(mended, other) - exact).mean() < 0.15


@given(st.integers(0, 100), st.integers(1, 5000))
def test_curves_rise_and_a_uniform_share_leaves_them_straight(seed: int, rows: int) -> None:
    share = np.random.default_rng(seed).random((rows, 2))
    curves = density.fit_curves(share)
    assert (np.diff(curves) > 0).all() and (curves[:, 0] == 0).all() and curves[:, -1] == pytest.approx(1.0)
    assert np.abs(curves - np.linspace(0, 1, curves.shape[1])).max() < 4 * 0.5 / np.sqrt(rows) + 1e-9


def test_curves_make_nothing_impossible() -> None:
    """No action lay in the upper half of the distribution."""
    curves = density.fit_curves(np.random.default_rng(0).random((2000, 1)) / 2)
    assert (np.diff(curves) > 0).all() and curves[0, 16] == pytest.approx(1.0, abs=0.02)


def test_a_bent_density_still_integrates_to_one() -> None:
    curves = density.fit_curves(np.random.default_rng(0).beta(2, 3, (2000, 1)))
    model = MixtureDensity(Fixed(0.4, 0.1), 1, 1, spread=1.3, curves=curves)
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_density, share = model.of(model.mixture(torch.zeros(len(grid), 1)), grid)
    total = integrate.cumulative_trapezoid(log_density.exp().numpy(), grid[:, 0].numpy(), initial=0)
    assert total == pytest.approx(share[:, 0].numpy(), abs=1e-3)


@pytest.mark.parametrize(("share", "refused"), [(0.015, False), (0.03, True)])
def test_actions_that_recur_have_no_density(share: float, refused: bool) -> None:
    log = logged(500, 5)
    log.action[: int(share * log.n_rows), 1] = 0.0
    if not refused:
        return density.require_density(log, ["drip[0]", "drip[1]"])
    with pytest.raises(InputError, match=r"'drip\[1\]': 60 of 2000 rows have exactly the action 0; no density"):
        density.require_density(log, ["drip[0]", "drip[1]"])
    return None


def test_no_estimated_density_is_below_a_hundredth_of_the_median() -> None:
    assert density.floored(np.array([0.0, 2.0, 3.0])).tolist() == [0.01 * 2, 2.0, 3.0]


def pipeline_of(root: Path, log: Episodes, **logs: Any) -> Pipeline:
    """Over a log of continuous actions and of `log.labels`; keys of `logs` that are None are left out."""
    table = {name: values[log.episode_of_row] for name, values in log.labels.items()} | {
        "episode": log.episode_of_row, "step": log.step, "seen": log.observation[:, 0], "a": log.action[:, 0],
        "b": log.action[:, 1], "density": log.action_prob, "reward": log.reward, "terminated": log.terminated,
        "truncated": log.truncated,
    }  # fmt: skip
    storage.write_parquet(root / "data" / "toy" / "raw" / "b.parquet", pa.table(table))
    contract = {
        "source": "data/toy/raw", "episode_id": "episode", "step": "step", "observation": ["seen"],
        "action": {"columns": ["a", "b"], "low": BOUNDS[:, 0].tolist(), "high": BOUNDS[:, 1].tolist()},
        "action_prob": {"column": "density", "of": "density"}, "reward": {"column": "reward", "range": [0, 1]},
        "terminated": "terminated", "truncated": "truncated", "gamma": 1.0, **logs,
    }  # fmt: skip
    settings = {
        "dataset": "toy", "algorithms": {"bc": {"hidden": [32], "learning_rate": 0.005}}, "seeds": 2,
        "training": {"gradient_steps": 600, "batch_size": 128},
    }  # fmt: skip
    given = {name: value for name, value in contract.items() if value is not None}
    return Pipeline(parse_pipeline({**settings, "logs": given}, "toy"), root)


def behaved(pipeline: Pipeline) -> storage.Stage:
    for stage in (stages.ingest, stages.coverage, stages.episodes):
        stage(pipeline)
    return stages.behavior_policy(pipeline)


def test_a_log_of_densities_has_a_behavior_model_that_agrees(tmp_path: Path) -> None:
    pipeline = pipeline_of(tmp_path, logged(1500, 6))
    found = behaved(pipeline).summary
    assert (found["kind"], found["propensities"]) == ("behavior cloning, density", "logged")
    assert found["ece"] < 0.05 and abs(found["mean_ratios"][0]["z"]) < 4
    assert {check["check"]: check["passed"] for check in found["checks"]}["C15"] is True
    assert (pipeline.reports / "behavior.png").exists() and (pipeline.folder / "behavior" / "policy.onnx").exists()


def test_each_of_two_logging_policies_is_held_against_its_own_model(tmp_path: Path) -> None:
    """One never plays above 0 where the other never plays below: of their mixture, half lies where each has nothing. One of them
    logs 1.4 times its densities."""
    log = logged(2000, 6)
    newer = np.arange(2000) % 2 == 1
    of_row, first = newer[log.episode_of_row], log.action[:, 0].astype(float)
    of_first = log.action_prob / cut(log.action[:, 1], first - 0.5, RELATED, -1, 1)
    log.action[:, 1] = np.where(of_row, -1.0, 1.0) * np.abs(log.action[:, 1])
    folded = cut(log.action[:, 1], first - 0.5, RELATED, -1, 1) + cut(-log.action[:, 1], first - 0.5, RELATED, -1, 1)
    log = dataclasses.replace(
        log, action_prob=of_first * folded * np.where(of_row, 1.4, 1.0), labels={"logger": np.where(newer, "newer", "older")}
    )  # fmt: skip
    found = behaved(pipeline_of(tmp_path, log, policy_version="logger")).summary
    newer_row, older_row = found["mean_ratios"]
    assert newer_row["mean_ratio"] == pytest.approx(1 / 1.4, abs=0.1) and newer_row["shortfall_z"] < -4
    assert older_row["mean_ratio"] == pytest.approx(1.0, abs=0.1) and older_row["shortfall_z"] > -4
    (c15,) = [check for check in found["checks"] if check["check"] == "C15"]
    assert not c15["passed"] and c15["blocking"] and "logged propensities of newer is 0." in c15["sentence"]


@pytest.mark.parametrize(("factor", "said"), [(1 / 50, "is 4"), (50.0, "is 0.0")])
def test_densities_of_another_scale_block_the_behavior_policy(tmp_path: Path, factor: float, said: str) -> None:
    """Logged for an action in other units."""
    log = logged(1500, 6)
    pipeline = pipeline_of(tmp_path, dataclasses.replace(log, action_prob=log.action_prob * factor))
    found = {check["check"]: check for check in behaved(pipeline).summary["checks"]}["C15"]
    assert not found["passed"] and found["blocking"]
    assert f"the mean ratio of the behavior model to the logged propensities of all rows {said}" in found["sentence"]
    with pytest.raises(InputError, match="check C15 blocks the behavior policy: the mean ratio"):
        current_behavior(pipeline)


@pytest.mark.parametrize("calibration", ["temperature", "isotonic"])
def test_densities_that_were_not_logged_are_estimated(tmp_path: Path, calibration: str) -> None:
    log = logged(1500, 7)
    pipeline = pipeline_of(tmp_path, log, action_prob=None)
    settings = pipeline.config.model_dump() | {"behavior": {"calibration": calibration}}
    pipeline = Pipeline(parse_pipeline(settings, "toy"), tmp_path)
    found = behaved(pipeline).summary
    assert found["propensities"] == "estimated" and found["calibration"] == calibration and found["ece"] < 0.05
    exact = dict(zip(log.action[:, 0].tolist(), log.action_prob, strict=True))
    gate = read_evaluated(pipeline, "gate")
    apart = np.log(gate.action_prob) - np.log([exact[value] for value in gate.action[:, 0].tolist()])
    assert np.abs(apart).mean() < 0.35
    assert open_columns(pipeline.folder / "behavior" / "gate.arrow")["action_prob"].min() >= 0.005
