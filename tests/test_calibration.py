"""The calibration study: its smoke version, which fails when the gate is broken, and what it counts with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calibrate
from benchmarks.calibration import small, tables
from benchmarks.calibration.cartpole import CartPole, controller, fallen, step
from benchmarks.calibration.judging import (
    KnownPolicy,
    asked,
    measured,
    on_a_log,
    resampled,
)
from benchmarks.calibration.judging import first as prefix
from benchmarks.calibration.rules import RULES, all_rules
from benchmarks.calibration.sepsis import has_all_rules
from benchmarks.calibration.store import Experiment, Line, Lines, done, run
from benchmarks.calibration.stress import pairs, trait_world
from offrl_models.ope.nulls import EXACT
from offrl_models.ope.tabular import TabularModel


def test_the_gate_seldom_passes_what_is_no_better_and_mostly_passes_what_is() -> None:
    """At most 9 of 60 logs, in which either of two nulls passes at either of two looks; the gate's own promise is 5%."""
    wrong, right = small.smoke()
    assert wrong <= small.SMOKE_LIMIT
    assert right >= small.SMOKE_NEEDED


def test_nulls_are_null() -> None:
    world = small.world()
    base = world.value(world.behavior)
    assert abs(world.value(small.better(world, small.SMOKE_GAIN)) - base - small.SMOKE_GAIN) < EXACT
    shown = pairs()
    for policy in shown.nulls(shown.value(shown.behavior)).values():
        assert abs(shown.world.value(policy[shown.group]) - shown.world.value(shown.world.behavior)) < EXACT
    trait = trait_world(1.5)
    assert trait.reward.max() * small.STEPS <= 1.0 + 1e-12


def test_a_prefix_measures_what_a_shorter_log_would() -> None:
    """Leg A is one number per episode, so that what was computed on the whole holds for the first ones."""
    world = small.world()
    found = on_a_log(world, {"better": small.better(world, 0.02)}, 1, 800, 900)
    model = TabularModel.fit(found.fitted_on, world.n_states)
    early = prefix(found, 600, {"better": found.paired("better", model)})
    (by_look,) = measured(found, asked(world.n_states), [600])["better"]
    shorter = on_a_log(world, {"better": small.better(world, 0.02)}, 1, 800, 900)
    gate = shorter.episodes.take(np.arange(900) < 600)
    assert early.episodes.n_episodes == 600 and early.ratio["better"].shape[0] == gate.n_rows
    (whole,) = measured(found, asked(world.n_states))["better"]
    assert by_look.episodes == 600 and whole.episodes == 900 and by_look.fqe_differences != whole.fqe_differences
    outcome = found.paired("better", model)
    assert not isinstance(outcome, str)
    assert by_look.difference == pytest.approx(float(outcome.outcome[:600].mean()))


def test_every_rule_answers_and_a_much_better_policy_convinces_most() -> None:
    world = small.world()
    found = on_a_log(world, {"best": 0.7 * world.behavior + 0.3 * world.optimal()}, 1, 500, 2000)
    assert all_rules(found, "best", 0.05, 1) == {**dict.fromkeys(RULES, True), "HCOPE": False}


def test_a_resample_holds_whole_episodes() -> None:
    log = small.world().simulate(50, 1)
    other = resampled(log, 3)
    assert other.n_episodes == 50 and set(other.return_) <= set(log.return_)
    assert other.terminated[other.offsets[1:] - 1].all() and other.terminated.sum() == 50


def test_a_known_policy_is_its_table() -> None:
    log, table = small.world().simulate(20, 1), small.world().behavior
    assert np.array_equal(KnownPolicy.of(table).on(log), table[log.observation[:, 0].astype(int)])


def work(seed: int) -> dict[str, Any]:
    return {"square": seed**2}


def read(lines: Lines, path: Path) -> list[str]:
    return []


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    """A line that was cut short, or lacks a rule that came later, is computed again, and nothing is deleted."""
    path = tmp_path / "squares.jsonl"
    path.write_text('{"seed": 1, "found": {"square": 99}}\n{"seed": 3, "found": {"old": 1}}\n{"seed": 2, "fo')
    path.write_text(path.read_text() + "\n")
    run("squares", Experiment(work, 3, read, lambda found: "square" in found), 3, tmp_path, processes=1)
    lines = done(path, lambda found: "square" in found)
    assert {seed: line.found["square"] for seed, line in lines.items()} == {1: 99, 2: 4, 3: 9}
    assert lines[1].cpu_s is None and lines[2].cpu_s is not None
    assert len(path.read_text().splitlines()) == 5
    assert json.loads(path.read_text().splitlines()[-1])["found"] == {"square": 9}


def test_a_log_without_all_rules_is_not_complete() -> None:
    assert has_all_rules({"null": {"rules": dict.fromkeys(RULES, False)}})
    assert not has_all_rules({"null": {"rules": {"best FQE": True}}})


def test_as_many_passes_are_allowed_as_the_promise_bears() -> None:
    """The counts of the requirements: at most 5%, at 95% confidence."""
    assert [tables.allowed(n) for n in (200, 400, 500, 1000, 2000)] == [4, 12, 16, 38, 83]
    assert tables.allowed(20) == -1
    assert tables.clopper_pearson(0, 60)[1] == pytest.approx(1 - 0.025 ** (1 / 60))


def test_the_report_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    one = {"status": "PASS", "decided_by": "lower bound", "passes": [1] * 10, "rules": dict.fromkeys(RULES, True)}
    about = {"cpu": "c", "cores": 2, "numpy": "2", "date": "d"}
    results = {
        name: {1: Line({"null": one}, 2.0, "2026-11-28")} if name == "size" else {} for name in calibrate.EXPERIMENTS
    }
    calibrate.write_report(results, tmp_path / "report.md", about)
    written = (tmp_path / "report.md").read_text()
    assert "| null | 1 of 1 (2.5% to 100.0%) | 1 of 1 | 1 of 1 | 1 of 1 | 1 of 1 |" in written
    assert "1 logs, 2.0 s of one core each, 2026-11-28." in written and "Policies that are better" not in written
    assert (tmp_path / "calibration-size.png").stat().st_size > 1000


def test_a_section_stays_where_its_logs_are_gone(tmp_path: Path) -> None:
    """Studies take hours, and finished logs may be on another machine."""
    about, path = {"cpu": "c", "cores": 2, "numpy": "2"}, tmp_path / "report.md"
    judged = {"status": "FAIL", "decided_by": "lower bound", "passes": [0]}
    earlier, later = {1: Line({"a": judged}, 2.0, "2026-11-24")}, {1: Line({"b": judged}, 2.0, "2026-11-28")}
    calibrate.write_report({"chain": earlier, "bandit": earlier}, path, about)
    calibrate.write_report({"chain": {}, "bandit": later, "cartpole": {}}, path, about)
    written = path.read_text()
    assert written.index("<!-- chain -->") < written.index("| a |") < written.index("<!-- bandit -->")
    assert written.count("| a |") == 1 and "2026-11-28." in written and "### CartPole" not in written


def test_the_cart_pole_is_that_of_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    game = gymnasium.make("CartPole-v1").unwrapped
    game.reset(seed=0)
    state = np.array(game.state)[None]
    for action in np.random.default_rng(0).random(200) < 0.5:
        _, _, down, _, _ = game.step(int(action))
        state = step(state, np.array([action]))
        assert state[0] == pytest.approx(np.array(game.state), abs=1e-12)
        assert bool(fallen(state)[0]) == down
        if down:
            break


def test_a_log_of_the_cart_pole_agrees_with_its_value() -> None:
    """Without truncation, mean returns of a log and rollouts are the same number."""
    world = CartPole(controller(0.0, 0.0), horizon=150)
    log = world.simulate(3000, 1)
    assert not log.truncated.any() and (log.length > 5).all()
    error = log.return_.std() / np.sqrt(3000)
    assert abs(log.return_.mean() - world.value(world.behavior, 3000, 2)) < 4 * error
    assert np.allclose(log.action_prob, 0.5)


def test_the_smoke_version_of_the_command_fails_when_it_should(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for counted, code in (((0, 60), 0), ((10, 60), 1), ((9, 60), 0), ((0, 10), 1)):
        monkeypatch.setattr(small, "smoke", lambda counted=counted: counted)
        assert calibrate.main(["--smoke"]) == code
    assert "10 of 60 logs passed a policy that is no better" in capsys.readouterr().out
