"""The studies of calibration: what each of them measures is what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calibrate
from benchmarks.calibration import coverage, retraining, sepsis, small, tables
from benchmarks.calibration.judging import (
    KnownPolicy,
    asked,
    known_policies,
    measured,
    on_a_log,
    split,
    with_values,
)
from benchmarks.calibration.store import Line
from benchmarks.calibration.stress import ALL, GAIN, WIDE, drifted, verdict_of
from offrl_models import course
from offrl_models.assess import _found, overlap
from offrl_models.assess.target import Target
from offrl_models.assess.values import Effort, tabular_values
from offrl_models.choices import Probabilities
from offrl_models.evaluation import BEHAVIOR, measure_rungs
from offrl_models.gate import GateConfig, Status
from offrl_models.ope.doubly_robust import Model
from offrl_models.ope.estimates import all_terms
from offrl_models.ope.nulls import EXACT
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import faded, simulate_each
from offrl_models.schema import Episodes
from tests.conftest import chain_world


def test_wrong_propensities_of_an_action_that_only_the_champion_plays_are_found() -> None:
    """The candidate plays the other actions, so that nothing in its own ratios tells."""
    world = chain_world()
    candidate = np.where(np.arange(3) < 2, world.behavior, 0.0)
    policies = {"candidate": candidate / candidate.sum(1, keepdims=True), "champion": world.behavior}
    found = on_a_log(world, policies, 1, 700, 600)
    wrong = found.episodes.action_prob * np.where(found.episodes.action == 2, 0.5, 1.0)
    gate = replace(found.episodes, action_prob=wrong)
    known = {name: KnownPolicy.of(table) for name, table in {**policies, BEHAVIOR: world.behavior}.items()}
    found = with_values(known, found.fitted_on, gate, found.fqe)
    z = {}
    for champion in (BEHAVIOR, "champion"):
        question = replace(asked(world.n_states), champion=champion)
        measures = measure_rungs(["candidate"], found, GateConfig(), question)[0].measures
        z[champion] = abs(measures.mean_ratio_z), abs(measures.worst_action_z)
    assert max(z[BEHAVIOR]) < 4 < min(z["champion"])


def test_what_is_hardly_shown_is_weighed_by_where_the_policy_comes() -> None:
    """A ward that the log has 1 episode of 20 in, and the policy 1 of 4: what it does there counts for a quarter of its steps."""
    world = chain_world()
    to = np.zeros_like(world.transition)
    to[0, 0, 1] = to[0, 1:, 2] = 1.0
    to[1:, :, -1] = 1.0
    mu, pi = np.full((world.n_states, 3), 1 / 3), np.full((world.n_states, 3), 1 / 3)
    mu[0], pi[0] = [0.05, 0.475, 0.475], [0.25, 0.375, 0.375]
    mu[1], pi[1] = [0.95, 0.02, 0.03], [0.9, 0.02, 0.08]
    start = np.eye(world.n_states)[0]
    wards = replace(world, transition=to, initial=start, behavior=mu)
    found = on_a_log(wards, {"candidate": pi}, 1, 2000, 4000)
    config = GateConfig(rare_prob=0.04, few_visits=30)  # 300 rows in the ward: of its last two actions 6 and 9
    measures = measure_rungs(["candidate"], found, config, asked(world.n_states))[0].measures
    occupancy = wards.model().occupancy(pi)
    exact = float(occupancy @ (pi * (mu < 0.04)).sum(1) / occupancy.sum())
    assert exact == pytest.approx(0.25 * 0.1 / 2)
    assert measures.unsupported_mass == pytest.approx(exact, rel=0.25)
    assert measures.few_visits_mass == pytest.approx(measures.unsupported_mass)


def test_the_newer_half_is_measured_beside_the_bound_of_the_whole() -> None:
    world = small.world()
    log = simulate_each([world, faded(world, 1.0)], np.arange(1200) % 2, 1)
    log = replace(log, recorded=np.arange(1200) % 2)
    found = split(log, world.mask, {"better": small.better(world, 0.02)}, 1, 600)
    measures = measure_rungs(["better"], found, GateConfig(), asked(world.n_states))[0].measures
    paired = found.paired("better", TabularModel.fit(found.fitted_on, world.n_states))
    assert not isinstance(paired, str)
    outcome, oldest_first = paired.outcome, found.episodes.oldest_first
    width = (measures.difference - measures.lower_bound) / (outcome.std() / np.sqrt(600))
    kept = course.kept(outcome, oldest_first, alpha=0.05, width=width)
    assert (measures.kept, measures.kept_bound) == pytest.approx((kept.difference, kept.lower_bound), rel=1e-6)
    assert measures.kept == pytest.approx(measures.newer_half.difference - measures.older_half.difference / 5)
    assert measures.newer_half.difference == pytest.approx(outcome[oldest_first[300:]].mean())


def test_a_gain_that_is_gone_since_the_middle_of_the_log_does_not_pass() -> None:
    found = drifted(GAIN, 1, 1)
    assert {(one["passes"][0], one["decided_by"]) for one in found.values()} == {(0, "newer half")}
    world = small.world()
    steady = known_policies(world, GAIN / 2, WIDE)  # as much better, over the whole log
    assert all(one["passes"] == [1] for one in verdict_of(world.simulate(ALL, 1), steady, world.mask, 1).values())


def test_what_passes_is_the_champion_of_the_next_week_and_writes_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked in weeks 2, 3 and 5 of six passes; a better policy is there from the third week on."""
    monkeypatch.setattr(retraining, "WEEKS", 6)
    monkeypatch.setattr(retraining, "BETTER_FROM", 2)
    offers = retraining.Offers(small.world(), 0.03)
    asked: list[tuple[str, str, tuple[Episodes, Episodes], float]] = []

    def told(offers: retraining.Offers, name: str, champion: str, log: Any, alpha: float, seed: int) -> Status:
        asked.append((name, champion, log, alpha))
        return Status.PASS if len(asked) in (2, 3, 5) else Status.INCONCLUSIVE

    monkeypatch.setattr(retraining, "_status", told)
    found = retraining.year(1, offers)[retraining.YEAR]
    names, champions = [each[0] for each in asked], [each[1] for each in asked]
    assert champions == [BEHAVIOR, BEHAVIOR, names[1], names[2], names[2], names[4]]
    assert set(names[:2]) <= set(offers.before) and names[2] in offers.better and set(names[3:]) <= set(offers.after)
    assert found["passes"] == [0, 1, 0, 0, 1, 0] and found["released"]
    assert found["verdicts"] == ["INCONCLUSIVE", "PASS", "PASS", "INCONCLUSIVE", "PASS", "INCONCLUSIVE"]
    for week, (_, champion, log, _) in enumerate(asked):
        for part, first, weekly in zip(log, retraining.FIRST, retraining.WEEKLY, strict=True):
            assert part.n_episodes == first + week * weekly
            new = part.take(np.arange(part.n_episodes) >= part.n_episodes - weekly)
            state = new.observation[:, 0].astype(int)
            assert np.array_equal(new.action_prob, offers.tables[champion][state, new.action])
    alphas = [each[3] for each in asked]
    assert (
        alphas[0] == pytest.approx(0.05 / 2.2858, rel=1e-3) and alphas[2] > alphas[1] > 0
    )  # a release gives some back


def test_a_policy_is_better_than_the_champion_or_its_pass_is_false() -> None:
    offers = retraining.small_offers()
    base = offers.value[BEHAVIOR]
    gains = {name: offers.value[name] - base for name in offers.tables if name != BEHAVIOR}
    assert all(abs(gains[name]) < EXACT for name in offers.before) and len(offers.before) == 12
    assert {round(gains[name] / 0.03, 3) for name in offers.after} == {0.5, 1.0}
    log = small.world().simulate(1500, 1), small.world().simulate(900, 2)
    (better,) = offers.better
    assert retraining._status(offers, better, BEHAVIOR, log, 0.05, 1) is Status.PASS
    assert retraining._status(offers, better, better, log, 0.05, 1) is not Status.PASS


def test_power_by_the_truth_has_no_error_of_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 20 episodes a model knows next to nothing; with the truth a policy that is much better passes all the same."""
    world = small.world()
    policies = {"better": small.better(world, 0.03), "same": world.behavior}
    monkeypatch.setattr(sepsis, "truth", world.model)
    monkeypatch.setattr(sepsis, "better", lambda: policies)
    monkeypatch.setattr(sepsis, "SIZES", (50, 2000))
    found = on_a_log(world, policies, 1, 20, 2000)
    assert sepsis._by_truth(found, "better") == [0, 1] and sepsis._by_truth(found, "same") == [0, 0]
    exact = small.world().model()
    assert exact.value(policies["better"]) == pytest.approx(world.value(policies["better"]), abs=EXACT)


def test_the_sections_of_power_and_of_retraining_count_what_was_found(tmp_path: Path) -> None:
    about, path = {"cpu": "c", "cores": 2, "numpy": "2"}, tmp_path / "report.md"
    gains = [sepsis._better(gain, cap) for cap, gains in sepsis.GAINS.items() for gain in gains]
    powers, years, first = {}, {}, retraining.BETTER_FROM
    later = retraining.WEEKS - first
    for seed in (1, 2):
        each = {"passes": [0, seed - 1, 1], "exact": [1, 1, seed - 1]}
        powers[seed] = Line(dict.fromkeys(gains, each), 1.0)
        passes, verdicts = [0] * (first + later - 1) + [seed - 1], ["FAIL"] * first + ["PASS"] * later
        year = {"passes": passes, "verdicts": verdicts, "released": seed == 1}
        years[seed] = Line({retraining.YEAR: year}, 1.0)
    calibrate.write_report({"power": powers, "retraining": years, "retraining_small": {}}, path, about)
    written = path.read_text()
    one = tables.cell(1, 2)
    assert (
        f"| 0.008 within cap 2 | {tables.cell(0, 2)} | {one} | {tables.cell(2, 2)} | 2 of 2 | 2 of 2 | 1 of 2 |"
        in written
    )
    assert f"| until a better one is there | {tables.cell(0, 2)} | FAIL 52 |" in written
    assert f"| from then on | {one} | PASS 52 |" in written and f"| ever | {one} | FAIL 52, PASS 52 |" in written
    assert "gains 0.016, and was released on 1 of 2 logs. 2 logs, 1.0 s" in written and "small exact" not in written
    assert (tmp_path / "calibration-power.png").stat().st_size > 1000


def test_coverage_is_measured_of_the_bounds_that_the_gate_and_evaluate_read() -> None:
    world, policy = coverage.setting(5, "near")
    found = on_a_log(world, {"policy": policy}, 1, 900, 600)
    gate, ratio = found.episodes, found.ratio["policy"]
    terms = all_terms(gate, ratio, Model.of(gate, found.fqe.q[0], found.fqe.v[0]))
    leg_c, by_wdr, by_wpdis = (bounds(0.05) for bounds in coverage.differences(found, terms))
    measures = measured(found, asked(world.n_states))["policy"][0]
    assert (leg_c.lower_bound, leg_c.upper_bound) == measures.trajectory_bounds and measures.trajectory_informs
    for gain, name in ((by_wdr, "WDR"), (by_wpdis, "WPDIS")):
        assert gain.lower_bound < terms[name].estimate() - gate.return_.mean() < gain.upper_bound
    cells = {f"n {n}": coverage.covered(5, "near", n, 1) for n in (100, 500)}
    assert [set(digits[coverage.ENOUGH]) for digits in cells.values()] == [{"0"}, {"1"}]
    assert all(digits[name][0] + digits[name][-1] == "-1" for digits in cells.values() for name in coverage.BOUNDS)
    assert coverage.has_all(cells)
    for name in (coverage.ENOUGH, *coverage.BOUNDS, *coverage.SOLID.values()):  # a line of an earlier version
        assert not coverage.has_all({**cells, "n 500": {k: v for k, v in cells["n 500"].items() if k != name}})
    solid = [{name for name, flag in coverage.SOLID.items() if digits[flag][0] == "1"} for digits in cells.values()]
    assert solid == [set(), set(coverage.SHOWN)] and coverage.SHOWN.keys() <= cells["n 500"].keys()
    digits = coverage.covered(20, "near", 280, 14)  # 202 effective episodes at the end, and 194 before it
    assert [name for name, flag in coverage.SOLID.items() if digits[flag][0] == "1"] == [
        "percentile bootstrap, TIS",
        "percentile bootstrap, WIS",
    ]
    older = {cell: {k: v for k, v in digits.items() if k not in coverage.FOLD_BOUNDS} for cell, digits in cells.items()}
    assert not coverage.has_all(older)


def test_coverage_is_measured_of_two_folds_as_evaluate_cuts_them() -> None:
    world, policy = coverage.setting(5, "near")
    found = on_a_log(world, {"policy": policy}, 1, 900, 600)
    gate, ratio = found.episodes, found.ratio["policy"]
    bounds = coverage.on_two_folds(found, policy)
    assert bounds is not None
    target = Target({}, ratio * gate.action_prob, Probabilities(gate, policy[gate.observation[:, 0].astype(int)]), None)
    fitted = tabular_values(gate, target, ratio, world.n_states)
    wanted = _found(gate, target, ratio, fitted, "logged", world.n_states, Effort(1, 0))["difference"]
    mine = bounds(overlap.THRESHOLDS.alpha)
    assert wanted.estimator == mine.estimator == "MDR"
    assert (mine.lower_bound, mine.estimate, mine.upper_bound) == pytest.approx(
        (wanted.lower_bound, wanted.estimate, wanted.upper_bound)
    )
    bandit = on_a_log(coverage.setting(1, "near")[0], {"policy": coverage.setting(1, "near")[1]}, 1, 90, 60)
    assert coverage.on_two_folds(bandit, coverage.setting(1, "near")[1]) is None


def test_coverage_is_told_of_the_logs_that_are_asked(tmp_path: Path) -> None:
    """Of 40 logs, 30 have enough effective episodes in one regime and 10 in another; only the other logs err in the first."""
    lines, (lower, *_, upper), (by_tis, by_pdis, *_) = {}, coverage.BOUNDS, coverage.SHOWN
    names = [coverage.GATE, *coverage.FOLD_BOUNDS, *coverage.BOUNDS]
    for seed in range(1, 41):
        cells = {cell: dict.fromkeys(names, "-111111") for cell in ("n 500, a", "n 2000, b")}
        for digits in cells.values():
            digits |= {**dict.fromkeys(coverage.SHOWN, "1111111"), **dict.fromkeys(coverage.SOLID.values(), "0000000")}
        for cell, most in (("n 500, a", 30), ("n 2000, b", 10)):
            cells[cell][coverage.ENOUGH] = cells[cell][coverage.SOLID[by_tis]] = (
                "1111111" if seed <= most else "0000000"
            )
        cells["n 2000, b"][by_pdis] = "1111111" if seed <= 30 else "1111101"
        if not 3 < seed <= 30:
            cells["n 500, a"][by_tis] = "1111101"
        cells["n 500, a"][lower] = "-111111" if seed <= 30 else "-000000"
        cells["n 2000, b"][upper] = "-000000"
        lines[seed] = Line(cells, 1.0)
    written = "\n".join(coverage.report(lines, tmp_path / "report.md"))
    assert f"| {lower} | 75.0% to 100.0% | n 500, a: 75.0% |" in written
    assert "| n 500, a | 30 of 40 | 100.0% and 100.0% | 100.0% and 100.0% | 100.0% and 100.0% |" in written
    assert f"| {by_tis} | 92.5% of 40 | n 500, a: 90.0% | 75.0% of 40 | n 2000, b: 100.0% |" in written
    assert f"| {by_pdis} | - | - | 87.5% of 80 | n 2000, b: 75.0% |" in written
    assert "| n 2000, b | 10 of 40 | not asked | not asked | not asked |" in written
    assert "2 of 2 regimes" in " ".join(written.split()) and "what it says at every level." in written
    for seed in range(1, 21):
        lines[seed].found["n 500, a"][lower] = "-111101"
    written = "\n".join(coverage.report(lines, tmp_path / "report.md"))
    for seed in range(1, 11):
        lines[seed].found["n 500, a"][coverage.FOLD_BOUNDS[1]] = "-111101"
    told = "\n".join(coverage.report(lines, tmp_path / "report.md"))
    assert f"\n- {coverage.FOLD_BOUNDS[1]}, n 500, a: 30 of 40 at 95%\n" in told
    assert (
        "| 33.3% and 100.0% |" in written
        and f"but for:\n\n- {lower}, n 500, a: 10 of 30 at 95%\n\nPages show" in written
    )
