"""What was observed after the task ended, and values of it, are junk in every log: no number of a report may read them."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.calibration.judging import CONFIG, KnownPolicy, asked, evaluation
from benchmarks.calibration.small import world as small_world
from offrl_models.datasets.encoding import Encoder
from offrl_models.evaluation import Evaluation, measure_rungs
from offrl_models.ope.drl import drl
from offrl_models.ope.estimates import ESTIMATORS, estimate
from offrl_models.ope.fqe import FQEConfig
from offrl_models.ope.marginal import tabular_dm
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.worlds.stress import joined
from offrl_models.schema import Episodes, Feature
from offrl_models.training import fit_fqe
from tests.conftest import cut_after_one_step
from tests.test_algorithms import LOGS, SPACES, Space, build, trained

WORLD = small_world(3, 3, 4)
POLICY = 0.7 * WORLD.behavior + 0.3 * WORLD.optimal()
JUNK = 1e6  # no state has this number


def log(seed: int, *, junk: bool) -> Episodes:
    """Episodes that end, and others that are cut after one step; what follows an end is a state, or no state at all."""
    whole = joined([WORLD.simulate(300, seed), cut_after_one_step(WORLD.simulate(200, seed + 1))])
    ended = whole.terminated[whole.offsets[1:] - 1][:, None]
    assert ended.any() and whole.truncated.any()
    final = np.where(ended & junk, np.float32(JUNK), whole.final_observation)
    return dataclasses.replace(whole, final_observation=final, features=(Feature("state"),))


def found(*, junk: bool) -> Evaluation:
    fitted, gate = log(1, junk=junk), log(3, junk=junk)
    known = evaluation({"policy": POLICY}, WORLD.behavior, fitted, gate, 1)
    after = np.where(gate.truncated, 0.3, JUNK if junk else 0.0)
    return dataclasses.replace(known, fqe=dataclasses.replace(known.fqe, next_v=np.tile(after, (2, 1))))


@pytest.fixture(scope="module")
def both() -> tuple[Evaluation, Evaluation]:
    return found(junk=False), found(junk=True)


def test_of_the_estimators(both: tuple[Evaluation, Evaluation]) -> None:
    shares = bootstrap_shares(500, 20, 0)
    clean, dirty = (estimate(each.episodes, list(each.ratio.values()), each.fqe, shares) for each in both)
    assert set(clean[0].intervals) == set(ESTIMATORS) and clean == dirty
    for of in (
        lambda each: tabular_dm(each.episodes, POLICY),
        lambda each: drl(each.episodes, each.ratio["policy"], POLICY, form="history"),
        lambda each: drl(each.episodes, each.ratio["policy"], POLICY, form="markov"),
    ):
        clean, dirty = (of(each).numerator for each in both)
        assert np.array_equal(clean, dirty)


def test_of_the_legs_of_the_gate(both: tuple[Evaluation, Evaluation]) -> None:
    clean, dirty = (measure_rungs(["policy"], each, CONFIG, asked(WORLD.n_states))[0] for each in both)
    assert "marginalised" in clean.leg.method and clean.measures.trajectory_lower is not None
    assert np.array_equal(clean.leg.outcome, dirty.leg.outcome)
    assert dataclasses.asdict(clean.measures) == dataclasses.asdict(dirty.measures)


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_of_any_algorithm(name: str, space: Space) -> None:
    """What was observed after an end may be no number at all."""
    found = []
    for junk in (False, True):
        whole = LOGS[space]
        cut = np.arange(whole.n_episodes) % 3 == 0  # some recordings stop: what they saw last is no junk
        last = whole.offsets[1:] - 1
        terminated, truncated = whole.terminated.copy(), whole.truncated.copy()
        terminated[last[cut]], truncated[last[cut]] = False, True
        final = np.where(junk & ~cut[:, None], np.float32(np.nan), whole.observation[last])
        log = dataclasses.replace(whole, final_observation=final, terminated=terminated, truncated=truncated)
        found.append(trained(build(name, [0], space), [0], 6, log))
    clean, dirty = (torch.cat([each.flatten() for each in algorithm.parameters()]) for algorithm in found)
    assert clean.isfinite().all() and torch.equal(clean, dirty)


def test_what_stands_ahead_of_an_end_is_the_last_observation() -> None:
    junk, clean = log(1, junk=True), log(1, junk=False)
    last = junk.offsets[1:] - 1
    ended, seen = junk.terminated[last], junk.observation_ahead
    assert np.array_equal(seen, clean.observation_ahead) and ended.any() and not ended.all()
    assert np.array_equal(seen[last[ended]], junk.observation[last[ended]])
    assert np.array_equal(seen[last[~ended]], clean.final_observation[~ended])


def test_of_fitted_q_evaluation() -> None:
    policy = KnownPolicy(lambda seen: (POLICY, np.where(seen[:, 0] == JUNK, 0, seen[:, 0]).astype(np.int64)))
    config = FQEConfig(hidden=(8,), gradient_steps=20, members=2)
    logs = [(log(1, junk=junk), log(3, junk=junk)) for junk in (False, True)]
    clean, dirty = (fit_fqe(config, Encoder.fit(fitted), [policy], fitted, gate, seed=1) for fitted, gate in logs)
    for name in ("q", "v", "next_v", "initial"):
        assert np.array_equal(getattr(clean, name), getattr(dirty, name)), name
