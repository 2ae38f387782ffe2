"""Policies over continuous actions: draws and densities belong together, caps hold, and what a pipeline says of them is true."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models import assess, bundle, stages
from offrl_models.assess.values import Effort
from offrl_models.choices import BINS, Draws, apart, choices_of, rare_mass, shares
from offrl_models.config import Pipeline, SelectionConfig, parse_pipeline
from offrl_models.densities import CappedDensity, MixtureDensity, spread_points, uniform_numbers
from offrl_models.exported import OnnxDensity, open_policy
from offrl_models.exporting import export_checked, export_ladder_checked
from offrl_models.ope import density
from offrl_models.schema import Episodes, InputError
from tests.test_density import BOUNDS, STEPS, Fixed, logged, pipeline_of, some_mixture

pytestmark = pytest.mark.usefixtures("no_pages")

NOTHING = torch.zeros(1, 1)  # an observation


def wave(seed: int = 0) -> np.ndarray:
    return density.fit_curves(np.random.default_rng(seed).beta(2, 3, (2000, 1)))


def numbers(of: MixtureDensity | CappedDensity, draws: int, seed: int = 0) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).random((1, draws, of.numbers)))


def at(of: MixtureDensity | CappedDensity, action: np.ndarray, seed: int = 0) -> np.ndarray:
    """Density of some actions of one dimension."""
    with torch.no_grad():
        asked = torch.as_tensor(action, dtype=torch.float64)[None, :, None]
        return of(NOTHING, asked, numbers(of, 1, seed))[0][0].exp().numpy()


PROPOSING, ACTING = MixtureDensity(Fixed(0.8, 0.02), 1, 1), MixtureDensity(Fixed(0.4, 0.1), 1, 1)
BENT = MixtureDensity(Fixed(0.4, 0.1), 1, 1, spread=1.3, curves=wave())
POLICIES = {
    "mixture": ACTING,
    "bent": BENT,
    "capped": CappedDensity(PROPOSING, ACTING, 2.0),
    "capped, bent": CappedDensity(PROPOSING, BENT, 5.0),
}
GRID = (np.arange(2000) + 0.5) / 2000


@given(st.integers(0, 200))
def test_the_distribution_function_is_inverted(seed: int) -> None:
    found = some_mixture(seed, 2)
    share = torch.as_tensor(np.random.default_rng(seed).uniform(0.01, 0.99, (1, 2)))
    action = found.at_shares(share)
    assert ((action >= found.low) & (action <= found.low + found.width)).all()
    assert found.conditionals(action)[1].numpy() == pytest.approx(share.numpy(), abs=1e-5)


def test_nothing_is_outside_the_bounds() -> None:
    """Where a candidate knows other bounds than the behavior model, the cap holds as well."""
    action = np.array([-0.1, 0.5, 1.1])
    for policy in POLICIES.values():
        found = at(policy, action)
        assert (found[[0, 2]] == 0).all() and found[1] > 0
    mixture = some_mixture(0, 1).of_each
    beyond = torch.tensor([[[-1.1], [3.1]]], dtype=torch.float64)
    assert (mixture.log_prob(beyond).exp() == 0).all() and (mixture.conditionals(beyond)[0].exp() == 0).all()


@given(st.integers(0, 100))
def test_unbending_undoes_bending(seed: int) -> None:
    share = torch.as_tensor(np.random.default_rng(seed).random((50, 1)))
    assert BENT.unbend(BENT.bend(share)[0]).numpy() == pytest.approx(share.numpy(), abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_what_is_drawn_has_the_density_that_is_told(policy: MixtureDensity | CappedDensity) -> None:
    """The density is that of the mean over the numbers that a capped policy takes."""
    with torch.no_grad():
        drawn = policy(NOTHING, torch.zeros(1, 1, 1), numbers(policy, 40_000))[1][0, :, 0].numpy()
    told = np.mean([at(policy, GRID, seed) for seed in range(60)], axis=0)
    assert told.mean() == pytest.approx(1.0, abs=0.004)
    counted = np.histogram(drawn, 20, (0, 1))[0] / len(drawn)
    assert counted == pytest.approx(told.reshape(20, -1).mean(1) / 20, abs=0.008)


@pytest.mark.parametrize("cap", [1.2, 2.0, 5.0])
def test_a_rung_is_nowhere_above_its_cap(cap: float) -> None:
    found = np.stack([at(CappedDensity(PROPOSING, BENT, cap), GRID, seed) for seed in range(20)])
    assert (found <= cap * at(BENT, GRID) * (1 + 1e-12)).all()
    # Nearly all of what a narrow candidate proposes is vetoed where the behavior model hardly plays.
    assert found.mean(0)[1590:1610].mean() == pytest.approx(cap * at(BENT, GRID)[1590:1610].mean(), rel=0.1)


def test_a_rung_of_the_behavior_model_is_the_behavior_model() -> None:
    assert at(CappedDensity(BENT, BENT, 2.0), GRID) == pytest.approx(at(BENT, GRID), rel=1e-12)
    narrow = at(CappedDensity(ACTING, ACTING, 1.2), GRID, 3)
    assert narrow == pytest.approx(at(ACTING, GRID), rel=1e-9)


def test_the_expectation_of_a_capped_density_is_exact() -> None:
    """By quadrature: min(pi, (cap - 1) mu) + (1 - accepted) mu."""
    pi, mu, room = at(PROPOSING, GRID), at(ACTING, GRID), 1.0
    accepted = np.minimum(pi, room * mu).mean()
    exact = np.minimum(pi, room * mu) + (1 - accepted) * mu
    found = np.stack([at(POLICIES["capped"], GRID, seed) for seed in range(400)])
    error = (found.mean(0) - exact) / np.maximum(found.std(0) / 20, 1e-9)
    assert np.abs(error[found.std(0) > 1e-9]).max() < 4


def test_spread_points_are_uniform_and_even() -> None:
    shifted = np.concatenate([uniform_numbers(1, 16, 3, seed)[0] for seed in range(3000)])
    assert stats.kstest(shifted[::16, 1], "uniform").pvalue > 0.01
    assert np.abs(np.corrcoef(shifted[::16].T) - np.eye(3)).max() < 0.06
    means = uniform_numbers(500, 64, 3, 0).prod(2).mean(1)
    alone = np.random.default_rng(0).random((500, 64, 3)).prod(2).mean(1)
    assert means.mean() == pytest.approx(1 / 8, abs=0.005) and means.std() < 0.5 * alone.std()
    assert len(np.unique(spread_points(64, 2), axis=0)) == 64


def of_one_dimension() -> Episodes:
    log = logged(100, 4)
    return Episodes(**{**log.__dict__, "action": log.action[:, :1], "bounds": BOUNDS[:1]})


def test_the_rungs_of_a_ladder_are_what_each_is_alone(tmp_path: Path) -> None:
    """At a cap of 2 the logarithm of what is left of it is 0, which the graph holds elsewhere, too."""
    one, caps = of_one_dimension(), (2.0, 5.0)
    export_ladder_checked(CappedDensity(PROPOSING, ACTING, 3.0), {tmp_path / str(cap): cap for cap in caps}, one)
    for cap in caps:
        rung, alone = OnnxDensity(tmp_path / str(cap) / "policy.onnx"), CappedDensity(PROPOSING, ACTING, cap)
        asked = (
            np.array(one.observation),
            np.array(one.action[:, None]),
            uniform_numbers(one.n_rows, 4, rung.numbers, 0),
        )
        with torch.no_grad():
            wanted = alone(*map(torch.as_tensor, asked))
        for found, meant in zip(rung.run(*asked), wanted, strict=True):
            assert found == pytest.approx(meant.numpy(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["bent", "capped"])
def test_the_exported_graph_gives_the_same(name: str, tmp_path: Path) -> None:
    one = of_one_dimension()
    exported = export_checked(POLICIES[name], one, tmp_path)  # raises where it does not
    assert isinstance(exported, OnnxDensity) and isinstance(open_policy(tmp_path / "policy.onnx"), OnnxDensity)
    exported.require_interface(1, 1)
    with pytest.raises(
        InputError, match="takes 1 observed columns and actions of 1 dimensions, and the logs have 1 and 2"
    ):
        exported.require_interface(1, 2)
    again = exported.draws(one.observation, 1, 4, 7)
    assert np.array_equal(again, exported.draws(one.observation, 1, 4, 7))
    assert not np.array_equal(again, exported.draws(one.observation, 1, 4, 8))


def choosing(policy: MixtureDensity, folder: Path, log: Episodes) -> Draws:
    found = choices_of(export_checked(policy, log, folder), log)
    assert isinstance(found, Draws)
    return found


def test_what_is_measured_of_densities_is_exact(tmp_path: Path) -> None:
    """One dimension, uniform propensities, and a policy that never looks at what it observes."""
    rng, rows = np.random.default_rng(0), 4000
    action = rng.random((rows, 1))
    log = logged(rows // STEPS, 0)
    log = Episodes(**{**log.__dict__, "action": action, "action_prob": np.ones(rows), "bounds": BOUNDS[:1]})
    mine = choosing(MixtureDensity(Fixed(0.3, 0.05), 1, 1), tmp_path / "mine", log)
    other = choosing(MixtureDensity(Fixed(0.5, 0.05), 1, 1), tmp_path / "other", log)
    p, q = (at(MixtureDensity(Fixed(center, 0.05), 1, 1), GRID) for center in (0.3, 0.5))
    assert mine.ratio() == pytest.approx(at(MixtureDensity(Fixed(0.3, 0.05), 1, 1), action[:, 0]), rel=1e-6)
    assert apart(mine, other).mean() == pytest.approx(0.5 * np.abs(p - q).mean(), abs=0.01)
    assert not apart(mine, mine).any()
    lowest = np.sort(q)[
        np.searchsorted(np.sort(q).cumsum() / q.sum(), 0.1)
    ]  # a tenth of the other one's mass is below it
    assert (
        rare_mass(mine, other, 0.1).mean()
        == pytest.approx((p * (q < lowest)).mean(), abs=0.02)
        != pytest.approx(0.0, abs=0.1)
    )
    assert rare_mass(other, other, 0.1).mean() == pytest.approx(0.1, abs=0.01)
    told = shares(mine, other, 99)
    assert len(told) == BINS and sum(share.policy for share in told) == pytest.approx(1.0)
    assert told[2].policy == pytest.approx(p[(GRID > 0.25) & (GRID < 0.375)].sum() / 2000, abs=0.02)
    assert abs(mine.worst_z(mine.ratio())) < 4
    # Propensities of one range of actions are wrong, and those of all together are right.
    skewed = mine.ratio() * np.where(action[:, 0] < 0.3, 1.4, 0.6)
    assert abs(skewed.mean() - 1) < 0.1 < 4 < abs(mine.worst_z(skewed))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline over continuous actions, from the log to a release."""
    pipeline = pipeline_of(tmp_path_factory.mktemp("continuous"), logged(3000, 6))
    settings = pipeline.config.model_dump() | {
        "algorithms": {"bc": {"hidden": [32], "learning_rate": 0.005}, "td3_bc": {"hidden": [32]}}, "seeds": 2,
        "training": {"gradient_steps": 400, "batch_size": 128}, "fqe": {"gradient_steps": 500, "hidden": [32]},
        "bootstrap_samples": 200,
        "gate": {"caps": [2.0], "planned_episodes": 900},
    }  # fmt: skip
    pipeline = Pipeline(parse_pipeline(settings, "toy"), pipeline.root)
    for stage in (stages.ingest, stages.coverage, stages.episodes, stages.behavior_policy, stages.candidates,
                  stages.leaderboard, stages.shift_report, stages.evidence):  # fmt: skip
        stage(pipeline)
    return pipeline, json.loads((pipeline.folder / "evidence" / "evidence.json").read_text())


def exact_value(graph: Path) -> float:
    """Each step pays the first dimension of the action, whatever is observed: STEPS times its mean."""
    seen = np.random.default_rng(9).normal(size=(20_000, 1)).astype(np.float32)
    return STEPS * float(open_policy(graph).draws(seen, 2, 4, 1)[..., 0].mean())  # pyright: ignore[reportAttributeAccessIssue]


def test_estimates_of_continuous_candidates_hold_the_exact_value(released: tuple[Pipeline, dict[str, Any]]) -> None:
    pipeline, found = released
    (capped,) = found["ladder"]
    exact = exact_value(pipeline.folder / "evidence" / "rung-1" / "policy.onnx")
    assert exact > 2.1  # the log's own is 2
    for name in ("TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR"):
        told = capped["estimates"][name]
        error = (told["high"] - told["low"]) / 3.92
        assert abs(told["estimate"] - exact) < 3 * error, name
    assert (
        capped["status"] == "PASS"
        and capped["measures"]["lower_bound"] < exact - 2.0 < capped["measures"]["upper_bound"]
    )
    assert abs(capped["measures"]["mean_ratio_z"]) < 4 and abs(capped["measures"]["worst_action_z"]) < 4
    assert capped["measures"]["unsupported_mass"] < 0.02  # twice the behavior's own 1% is what the cap allows
    assert found["behavior"]["propensities"] == "logged" and found["detail"]["gamma_star"] is None
    assert all(row["action"].startswith("[0] ") for row in found["detail"]["actions"])  # the one that pays
    assert (pipeline.reports / "evidence.html").exists() and (pipeline.reports / "shift-actions.html").exists()


def test_the_cheap_score_prunes_densities_as_well(released: tuple[Pipeline, dict[str, Any]], tmp_path: Path) -> None:
    pipeline, _ = released
    shutil.copytree(
        pipeline.folder, tmp_path / "data" / "toy", ignore=shutil.ignore_patterns("leaderboard", "policies")
    )
    one = pipeline.config.model_copy(update={"selection": SelectionConfig(finalists=1)})
    board = stages.leaderboard(Pipeline(one, tmp_path)).summary
    (first,), (second,) = board["ranking"], board["pruned"]
    assert board["best"] == first["candidate"] == "td3_bc" and second["candidate"] == "bc"
    assert first["first_order_gain"] > max(second["first_order_gain"], 0.05) and first["gain"] > 0


def test_what_is_released_says_what_it_takes_and_is_the_next_champion(
    released: tuple[Pipeline, dict[str, Any]],
) -> None:
    pipeline, _ = released
    release = stages.release(pipeline)
    manifest = json.loads((release.folder / "manifest.json").read_text())
    assert manifest["interface"] == {
        "inputs": ["observation", "action", "uniform"],
        "outputs": ["log_density", "drawn"],
    }
    exact, fresh = exact_value(release.folder / bundle.POLICY), logged(4000, 77)
    pipeline_of(pipeline.root / "fresh", fresh)
    contract = assess.contract_of({"contract": None, "policy": release.folder})
    found = assess.assess(
        [pipeline.root / "fresh" / "data" / "toy" / "raw" / "b.parquet"], contract,
        assess.target_of({"policy": release.folder}), Effort(300, 0),
    )  # fmt: skip
    for name in ("TIS", "WIS", "DR"):
        assert found["estimates"][name]["low"] - 0.05 < exact < found["estimates"][name]["high"] + 0.05, name
    assert 0 < found["difference"]["lower_bound"] < exact - 2.0 < found["difference"]["upper_bound"]
    assert (
        stages.evidence(pipeline).summary["champion"] == "the behavior policy"
    )  # a second look is at what it replaced


def test_the_next_candidate_is_held_against_the_released_one(released: tuple[Pipeline, dict[str, Any]]) -> None:
    """Trained from other seeds, on the same logs: of the champion, what is estimated has to be true as well."""
    pipeline, _ = released
    stages.release(pipeline)
    settings = {**pipeline.config.model_dump(), "seed": 7, "algorithms": {"td3_bc": {"hidden": [32], "alpha": 5.0}}}
    later = Pipeline(parse_pipeline(settings, "toy"), pipeline.root)
    for stage in (stages.behavior_policy, stages.candidates, stages.leaderboard, stages.shift_report, stages.evidence):
        stage(later)
    found = json.loads((later.folder / "evidence" / "evidence.json").read_text())
    assert found["champion"]["name"] == "version 1"
    exact = exact_value(later.folder / "policies" / "1" / bundle.POLICY)
    for name in ("PDIS", "WIS", "DR"):
        told = found["champion"]["estimates"][name]
        assert abs(told["estimate"] - exact) < 3 * (told["high"] - told["low"]) / 3.92, name
    assert [rung["cap"] for rung in found["ladder"]] == [2.0]
    assert 0 < found["detail"]["differs"] < 0.5  # both are at most twice as likely as the behavior anywhere
