"""The calibration study: its smoke version, which fails when the gate is broken, and what it counts with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calibrate
from benchmarks.calibration import coverage, retraining, sepsis, small, tables
from benchmarks.calibration.cartpole import CartPole, controller, fallen, step
from benchmarks.calibration.judging import (
    KnownPolicy,
    asked,
    known_policies,
    measured,
    on_a_log,
    resampled,
    split,
    with_values,
)
from benchmarks.calibration.judging import first as prefix
from benchmarks.calibration.rules import RULES, all_rules
from benchmarks.calibration.sepsis import has_all_rules
from benchmarks.calibration.store import Experiment, Line, Lines, done, run
from benchmarks.calibration.stress import ALL, GAIN, WIDE, drifted, pairs, trait_world, verdict_of
from offrl_models import course
from offrl_models.evaluation import BEHAVIOR, measure_rungs
from offrl_models.gate import GateConfig, Status
from offrl_models.ope.doubly_robust import Model
from offrl_models.ope.estimates import all_terms
from offrl_models.ope.nulls import EXACT
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import faded, simulate_each
from offrl_models.schema import Episodes
from tests.conftest import chain_world


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
    assert written.count("| a |") == 1 and "2026-11-28." in written and "CartPole" not in written


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
    assert coverage.has_all_sequences(cells)
    for name in (coverage.ENOUGH, *coverage.BOUNDS):  # a line of an earlier version
        assert not coverage.has_all_sequences(
            {**cells, "n 500": {k: v for k, v in cells["n 500"].items() if k != name}}
        )


def test_coverage_is_told_of_the_logs_that_are_asked(tmp_path: Path) -> None:
    """Of 40 logs, 30 have enough effective episodes in one regime and 10 in another; only the other logs err in the first."""
    lines, (lower, *_, upper) = {}, coverage.BOUNDS
    for seed in range(1, 41):
        cells = {
            cell: dict.fromkeys([coverage.GATE, *coverage.BOUNDS], "-111111") for cell in ("n 500, a", "n 2000, b")
        }
        for cell, most in (("n 500, a", 30), ("n 2000, b", 10)):
            cells[cell][coverage.ENOUGH] = "1111111" if seed <= most else "0000000"
        cells["n 500, a"][lower] = "-111111" if seed <= 30 else "-000000"
        cells["n 2000, b"][upper] = "-000000"
        lines[seed] = Line(cells, 1.0)
    written = "\n".join(coverage.report(lines, tmp_path / "report.md"))
    assert f"| {lower} | 75.0% to 100.0% | n 500, a: 75.0% |" in written
    assert "| n 500, a | 30 of 40 | 100.0% and 100.0% | 100.0% and 100.0% | 100.0% and 100.0% |" in written
    assert "| n 2000, b | 10 of 40 | not asked | not asked | not asked |" in written
    assert "2 of 2 regimes" in " ".join(written.split()) and "what it says at every level." in written
    for seed in range(1, 21):
        lines[seed].found["n 500, a"][lower] = "-111101"
    written = "\n".join(coverage.report(lines, tmp_path / "report.md"))
    assert "| 33.3% and 100.0% |" in written and f"but for:\n\n- {lower}, n 500, a: 10 of 30 at 95%\n\n!" in written
