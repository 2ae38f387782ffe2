"""The benchmark of known answers: optima of a log, and both sides' view of it."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import known_answers as answers
from benchmarks.harness import Cost
from offrl_models.ope.tabular import TabularModel
from tests.test_known_answers import LADDER, best, log_of


def test_the_optimum_of_a_log_is_that_of_the_best_policy_in_it() -> None:
    """At a discount of 1 as well, where who goes round in circles gets nothing."""
    log = log_of(LADDER, 400)
    model = TabularModel.fit(log, LADDER.n_states)
    assert model is not None and model.visits[:-1].min() > 0
    optimum = answers.best_value(model, LADDER.mask)
    assert optimum == pytest.approx(model.value(best(model))) == pytest.approx(answers.value_of(model, best(model)))
    worse = answers.table(np.zeros(LADDER.n_states, int), LADDER)
    assert answers.value_of(model, worse) < optimum
    only = np.zeros_like(LADDER.mask)
    only[:, 0] = True
    assert answers.best_value(model, only) == pytest.approx(answers.value_of(model, worse))


def test_states_are_columns_on_both_sides() -> None:
    world, log = answers.clinician(5)
    hot = answers.columns(log, world)
    assert (hot.observation.argmax(1) == log.observation[:, 0]).all() and (hot.observation.sum(1) == 1).all()
    assert (hot.final_observation.argmax(1) == log.final_observation[:, 0]).all()
    assert len(hot.features) == hot.observation.shape[1] == world.n_states
    assert world.mask.all() and hot.action is log.action


def test_the_greedy_action_is_told_of_every_state_and_seed() -> None:
    world, log = answers.tried(40)
    how: dict[str, Any] = {"seeds": [0, 1], "gradient_steps": 3, "batch_size": 16}
    chosen = answers.trained("double_dqn", {"hidden": (8,)}, world, log, **how)
    assert chosen.shape == (2, world.n_states) and (chosen[0] != chosen[1]).any()
    assert world.mask[np.arange(world.n_states), chosen].all()


def test_rows_are_told_beside_the_optimum_and_beside_the_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr(answers, "ENOUGH", 40)
    monkeypatch.setattr(answers, "TRAINING_TRIED", {"seeds": [0], "gradient_steps": 3, "batch_size": 16})
    (line,) = answers.beside_the_optimum(["dqn"], {})
    value, *_ = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert 0 < value["ratio"] < 1 and value["target"] == 0.99 and f"{value['ratio']:.4f}" in line

    monkeypatch.setattr(answers, "FEW", 30)
    monkeypatch.setattr(answers, "STEPS", 3)
    log = answers.clinician(30)[1]
    uniform = [[0] * 716] * 5
    monkeypatch.setattr(answers, "kept", lambda path, command: Cost(1.0, 1.0, 1.0, 1.0, 0.0, {"actions": uniform}))
    row, alone, _ = answers.beside_d3rlpy(["bc", "iql"], tmp_path, "python", {})
    figures = {each["name"]: each for each in map(json.loads, capsys.readouterr().out.splitlines())}
    ours, theirs, apart = (figures[f"known_answers/clinician/bc/{name}"] for name in ("offrl", "d3rlpy", "difference"))
    assert apart["value"] == pytest.approx(ours["value"] - theirs["value"])
    world = answers.clinician(1)[0]
    assert theirs["value"] == pytest.approx(world.value(answers.table(np.zeros(716, int), world)))
    assert row.count("|") == 6 and alone.endswith("|  |  |  |")
    assert (np.load(tmp_path / "state.npy") == log.observation[:, 0]).all()
