"""What behavior cloning is known to find on a small world that is covered, and the exact values that fitted Q evaluation finds."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.exported import OnnxPolicy
from offrl_models.ope.fqe import FQE, FQEConfig
from offrl_models.ope.worlds import World
from offrl_models.policies import Mixture
from offrl_models.schema import Episodes
from offrl_models.training import fit, fit_fqe
from tests.conftest import codes
from tests.test_algorithms import WORLD


def exact(world: World, algorithm: Any, seeds: int) -> float:
    states = torch.arange(float(world.n_states))[:, None]
    with torch.no_grad():
        return world.value(Mixture(algorithm, seeds)(states, torch.as_tensor(world.mask)).numpy())


def test_behavior_cloning_stays_at_the_behavior() -> None:
    """What the others find, tests/test_known_answers.py and tests/test_weighted.py."""
    config = make_config("bc", {"hidden": (32,), "learning_rate": 0.005})
    encoder, episodes = Encoder(codes(WORLD.n_states)), WORLD.simulate(2000, seed=2)
    algorithm, _ = fit("bc", config, episodes, encoder, seeds=[0, 1], gradient_steps=400, batch_size=128)
    assert exact(WORLD, algorithm, 2) == pytest.approx(WORLD.value(WORLD.behavior), abs=0.02)


class Tabled(OnnxPolicy):
    """A policy given as a table, in place of an exported one."""

    def __init__(self, table: np.ndarray):
        self.table = table

    def on(self, episodes: Episodes) -> np.ndarray:
        return self.table[episodes.observation[:, 0].astype(int)]

    def distinct_probs(self, observation: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.table, observation[:, 0].astype(int)

    def probs(self, observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.table[observation[:, 0].astype(int)]


def test_fitted_q_evaluation_finds_the_exact_values_of_several_policies_at_once() -> None:
    policies: list[Any] = [
        Tabled(WORLD.behavior),
        Tabled(WORLD.optimal()),
        Tabled(0.5 * WORLD.behavior + 0.5 * WORLD.optimal()),
    ]
    config = FQEConfig(hidden=(32,), learning_rate=0.005, gradient_steps=600, polyak=0.05, members=2)
    fitted_on, evaluated_on = WORLD.simulate(3000, seed=1), WORLD.simulate(500, seed=2)
    found = fit_fqe(config, Encoder(codes(WORLD.n_states)), policies, fitted_on, evaluated_on, seed=0)
    for position, policy in enumerate(policies):
        initial = float((policy.table * WORLD.q_values(policy.table)).sum(1)[
            evaluated_on.observation[evaluated_on.offsets[:-1], 0].astype(int)
        ].mean())  # fmt: skip
        assert found.members(position) == pytest.approx([initial] * 2, abs=0.03)
    alone = fit_fqe(config, Encoder(codes(WORLD.n_states)), policies[1:2], fitted_on, evaluated_on, seed=0)
    assert alone.members(0) == pytest.approx(found.members(1), abs=1e-4)
    small = dataclasses.replace(fitted_on, reward=fitted_on.reward * 2.0**-13)  # a power of 2 rounds alike
    again = fit_fqe(config, Encoder(codes(WORLD.n_states)), policies[1:2], small, evaluated_on, seed=0)
    assert again.members(0) == pytest.approx([each * 2.0**-13 for each in alone.members(0)], rel=1e-9)
    cut = dataclasses.replace(
        evaluated_on, terminated=np.zeros(evaluated_on.n_rows, bool), truncated=evaluated_on.terminated
    )
    assert (
        np.abs(fit_fqe(config, Encoder(codes(WORLD.n_states)), policies[:1], fitted_on, cut, seed=0).next_v).max() < 1.0
    )


def test_fitted_q_evaluation_compiles_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda losses, **how: compiled.append(how["mode"]) or losses)
    log, policies = WORLD.simulate(50, seed=1), [Tabled(WORLD.optimal())]

    def members(**more: Any) -> list[float]:
        config = FQEConfig(hidden=(8,), gradient_steps=20, members=2, **more)
        return fit_fqe(config, Encoder(codes(WORLD.n_states)), policies, log, log, seed=0).members(0)  # pyright: ignore[reportArgumentType]

    plain = members()
    assert not compiled and members(compile=True) == plain and compiled == ["default"]


def test_values_of_fitted_q_evaluation_do_not_depend_on_the_order_of_what_is_evaluated() -> None:
    config = FQEConfig(hidden=(16,), gradient_steps=60, members=2)
    fitted_on, whole = WORLD.simulate(300, seed=1), WORLD.simulate(80, seed=2)
    cut = np.arange(whole.n_rows) % 3 == 0  # some episodes are truncated, so that next_v is read
    whole = dataclasses.replace(whole, terminated=whole.terminated & ~cut, truncated=whole.terminated & cut)
    order = np.random.default_rng(0).permutation(80)
    rows = np.concatenate([np.flatnonzero(whole.episode_of_row == i) for i in order])
    before, after = (
        fit_fqe(config, Encoder(codes(WORLD.n_states)), [Tabled(WORLD.optimal())], fitted_on, log, seed=0)
        for log in (whole, whole.take(order))
    )
    for name in ("q", "v", "next_v"):
        assert getattr(after, name) == pytest.approx(getattr(before, name)[:, rows], rel=1e-6, abs=1e-9), name
    assert after.initial == pytest.approx(before.initial[..., order], rel=1e-6)


def test_fqe_is_trainable_like_an_algorithm() -> None:
    fqe = FQE(FQEConfig(hidden=(4,)), Encoder(codes(WORLD.n_states)), policies=2, actions=3, start=1.5)
    assert fqe.learning_rates() == {"q": 1e-3} and fqe.q.last_bias().shape == (6, 1, 3)
    assert float(fqe.q.last_bias().detach().min()) > 0.9
