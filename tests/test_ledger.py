"""The ledger of looks: nothing in it can be rewritten, and what all looks spend together stays within three budgets."""

import json
import math
from dataclasses import asdict, replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models import bundle, ledger, stages, storage
from offrl_models.config import BehaviorConfig, DriftConfig, Pipeline, parse_pipeline
from offrl_models.gate import GateConfig, Status
from offrl_models.ledger import Look, level
from offrl_models.ope.eprocess import elond_level
from offrl_models.schema import InputError
from offrl_models.stages import judging
from tests.conftest import as_table, attributes, chain_world, write_batches

pytestmark = pytest.mark.usefixtures("no_pages")

CONFIG = GateConfig()
DAY = date(2026, 3, 1)


def look(name: str, data: str = "d", *, spent: float = 0.01, day: date = DAY, verdict: str = "INCONCLUSIVE") -> Look:
    return Look(name, "champion", data, day.isoformat(), 0.01, spent, verdict, None)


def test_the_first_hypothesis_gets_its_share_of_the_long_run() -> None:
    found = level([], "h", "d", CONFIG, DAY)
    assert found.alpha == found.spends == elond_level(0.05, 1, 0) == pytest.approx(0.02187, abs=1e-5)
    assert (found.number, found.looks) == (1, 0)


def test_later_looks_at_a_hypothesis_cost_nothing() -> None:
    looks = [look("h"), look("other"), look("h", "e", spent=0.0)]
    found = level(looks, "h", "new data", CONFIG, DAY)
    assert (found.alpha, found.spends, found.number, found.looks) == (0.01, 0.0, 1, 2)


def test_a_look_at_new_data_is_entered_and_its_hypothesis_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    both = [look("a", verdict=Status.PASS), look("a", "e", spent=0.0, verdict=Status.PASS)]
    assert [ledger.enter(path, entry) for entry in both] == [True, True]
    found = level(ledger.read(path), "b", "d", CONFIG, DAY)
    assert found.number == 2 and found.alpha == elond_level(0.05, 2, 1)


def test_a_look_that_is_taken_again_is_given_what_it_was_given(tmp_path: Path) -> None:
    """A kill between the ledger and the verdict's folder must change nothing."""
    before = [look("a"), look("b", verdict=Status.PASS)]
    first = level(before, "h", "d", CONFIG, DAY)
    taken = Look("h", "champion", "d", DAY.isoformat(), first.alpha, first.spends, "PASS", 3.0)
    after = [*before, taken, look("later")]
    assert level(after, "h", "d", CONFIG, DAY + timedelta(days=400)) == first
    path = tmp_path / "ledger.jsonl"
    assert [ledger.enter(path, entry) for entry in after] == [True] * 4
    written = path.read_bytes()
    assert ledger.enter(path, taken) is False and path.read_bytes() == written
    assert ledger.read(path) == after


def test_the_same_look_cannot_say_something_else(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert ledger.enter(path, look("a")) and ledger.enter(path, look("b"))
    written = path.read_bytes()
    with pytest.raises(
        InputError, match=r"judged on these logs on 2026-03-01, .* INCONCLUSIVE; now it would be PASS\. The first"
    ):
        ledger.enter(path, look("a", verdict=Status.PASS))
    assert path.read_bytes() == written and ledger.enter(path, look("a", "more", verdict=Status.PASS))


def test_a_clock_that_was_set_back_gives_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for entry in (look("a"), replace(look("b", spent=0.1), date="1970-01-01")):
        ledger.enter(path, entry)
    assert [entry.date for entry in ledger.read(path)] == ["2026-03-01"] * 2
    with pytest.raises(InputError, match="possible on 2027-03-01"):
        level(ledger.read(path), "c", "d", CONFIG, DAY)


def test_a_look_that_another_one_overtook_is_not_entered(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert ledger.enter(path, look("a"), 0)
    with pytest.raises(InputError, match="another look was entered while this one was taken"):
        ledger.enter(path, look("b"), 0)
    assert ledger.enter(path, look("b"), 1) and not ledger.enter(path, look("b"), 0)


def test_who_asks_the_same_logs_by_another_name_pays_as_well(toy: Pipeline) -> None:
    other = Pipeline(toy.config.model_copy(update={"dataset": "copy"}), toy.root)
    assert other.ledger == toy.ledger and other.folder != toy.folder


def test_a_release_earns_error_rate_and_the_year_bounds_it() -> None:
    passed = [look("a", spent=0.02, verdict=Status.PASS)]
    assert level(passed, "b", "d", CONFIG, DAY).alpha == elond_level(0.05, 2, 1)
    tight = GateConfig(yearly_alpha=0.021)
    assert level(passed, "b", "d", tight, DAY).alpha == pytest.approx(0.001)
    with pytest.raises(InputError, match="possible on 2027-03-01, and the champion stays"):
        level([look("a", spent=0.1)], "b", "d", CONFIG, DAY)
    assert level([look("a", spent=0.1)], "b", "d", CONFIG, DAY + timedelta(days=365)).alpha > 0
    many = [look(str(place), spent=0.0) for place in range(1000)]
    with pytest.raises(
        InputError, match=r"budget of the long run leaves an error rate of .* for hypothesis 1001, and no look"
    ):
        level(many, "b", "d", CONFIG, DAY)


def test_no_look_gets_more_than_one_release_may_cost() -> None:
    assert level([], "h", "d", GateConfig(alpha=0.001), DAY).alpha == 0.001


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_budgets_hold_whatever_happens(history: list[tuple[bool, int]]) -> None:
    """Every 365 days together spend at most the year's budget; without a release, all of them at most the long run's."""
    looks: list[Look] = []
    today = DAY
    for number, (passes, days) in enumerate(history):
        today += timedelta(days=days)
        try:
            given = level(looks, f"h{number}", "d", CONFIG, today)
        except InputError:
            continue
        assert 0 < given.alpha <= CONFIG.alpha
        verdict = Status.PASS if passes else Status.INCONCLUSIVE
        looks.append(Look(f"h{number}", "c", "d", today.isoformat(), given.alpha, given.spends, verdict, None))
    for end in looks:
        last = date.fromisoformat(end.date)
        window = [x.spent for x in looks if last - timedelta(days=365) < date.fromisoformat(x.date) <= last]
        assert sum(window) <= CONFIG.yearly_alpha + 1e-12
    if not any(x.verdict == Status.PASS for x in looks):
        assert sum(x.spent for x in looks) <= CONFIG.long_run_alpha


@pytest.mark.parametrize("damage", ["altered", "taken out", "cut short", "swapped"])
def test_what_was_rewritten_is_seen(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    for number in range(4):
        ledger.enter(path, look(f"h{number}"))
    lines = path.read_text().splitlines()
    if damage == "altered":
        lines[1] = json.dumps({**json.loads(lines[1]), "verdict": "PASS"})
    elif damage == "taken out":
        del lines[1]
    elif damage == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines[1] = lines[1][:-20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"ledger\.jsonl: entry 2 is not what was written"):
        ledger.read(path)
    with pytest.raises(InputError):
        ledger.enter(path, look("next"))


def test_a_retrained_candidate_has_to_beat_the_policy_that_was_released(tmp_path: Path) -> None:
    world = chain_world()
    configured = attributes(world.n_states, 3)
    configured["logs"]["action"] = {"components": [{"column": "action", "values": 3}], "mask": "allowed"}
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    write_batches(tmp_path, world.simulate(3000, seed=3))
    first, released = stages.run(pipeline)
    assert released is not None and first.summary["champion"] == "the behavior policy"
    again = stages.evidence(pipeline)  # what was released is not held against itself
    assert again.reused and again.summary["status"] == "PASS"
    later = as_table(world.simulate(600, seed=4), first_id=10_000)
    storage.write_parquet(pipeline.folders.landing / "later.parquet", later)
    second, _ = stages.run(pipeline)
    assert second.summary["champion"] == "version 1"
    evidence = json.loads((pipeline.folder / "evidence" / "evidence.json").read_text())
    assert evidence["detail"]["influence"][0] == pytest.approx(evidence["verdict"]["measures"]["largest_share"])
    assert {share["action"] for share in evidence["detail"]["actions"]} <= {"action 0", "action 1", "action 2"}
    caps = [math.inf if rung["cap"] is None else rung["cap"] for rung in evidence["ladder"]]
    assert min(caps) >= (math.inf if first.summary["cap"] is None else first.summary["cap"])
    looks = ledger.read(pipeline.ledger)
    assert [look.verdict for look in looks] == [first.summary["status"], second.summary["status"]]
    assert looks[0].hypothesis != looks[1].hypothesis and looks[1].alpha == elond_level(0.05, 2, 1)
    assert looks[1].champion == released_policy(pipeline, 1)
    assert {look.split_by for look in looks} == {pipeline.config.split_by}
    assert looks[1].rungs == [rung["sha256"] for rung in evidence["ladder"]]


def test_what_has_judged_is_not_split_by_another_salt(toy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else episodes of the gate would be trained on. Entries of before the salt was entered name none."""
    path = toy.ledger
    ledger.enter(path, look("old"))
    ledger.enter(path, replace(look("new"), split_by=toy.config.split_by))
    monkeypatch.chdir(toy.root)
    here = Pipeline(toy.config, Path())  # as library callers may have it; the pages about the log need the whole path
    stages.ingest(here)
    stages.coverage(here)
    stages.episodes(toy)
    other = Pipeline(toy.config.model_copy(update={"salt": "pepper"}), toy.root)
    with pytest.raises(
        InputError, match=r"split by salt 'offrl' and episode, and they are split by salt 'pepper' and episode now"
    ):
        stages.episodes(other)
    logs = toy.config.logs.model_copy(update={"entity": "patient"})
    assert toy.config.model_copy(update={"logs": logs}).split_by == "salt 'offrl' and patient"
    with pytest.raises(InputError, match="made from other logs or settings"):
        stages.behavior_policy(other)


def test_thresholds_of_coverage_count_for_every_later_step(toy: Pipeline) -> None:
    stages.ingest(toy)
    stages.coverage(toy)
    stages.episodes(toy)
    stricter = toy.config.coverage.model_copy(update={"leakage_auc": 0.5})
    other = Pipeline(toy.config.model_copy(update={"coverage": stricter}), toy.root)
    with pytest.raises(InputError, match="coverage was made from other logs or settings"):
        stages.behavior_policy(other)
    stages.coverage(other)
    with pytest.raises(InputError, match="check C09 blocks the log"):
        stages.behavior_policy(other)


def test_an_entry_of_before_the_salt_is_still_what_was_written(tmp_path: Path) -> None:
    entry = {name: value for name, value in asdict(look("a")).items() if name not in ("split_by", "rungs")}
    entry["hash"] = storage.sha256_bytes(b"\n" + storage.canonical_json(entry))
    (tmp_path / "ledger.jsonl").write_text(json.dumps(entry) + "\n")
    assert ledger.read(tmp_path / "ledger.jsonl") == [look("a")]
    assert ledger.enter(tmp_path / "ledger.jsonl", look("b")) and len(ledger.read(tmp_path / "ledger.jsonl")) == 2


def test_another_way_to_test_is_another_hypothesis() -> None:
    """Else a look could be repeated with other settings until it passes, at the error rate of the first one."""
    config = parse_pipeline(attributes(10, 3), "toy")
    changed = [
        {"fqe": config.fqe.model_copy(update={"gradient_steps": 7})},
        {"seed": 1},
        {"behavior": BehaviorConfig(calibration="isotonic")},
        {"drift": DriftConfig(red=0.9)},
        {"gate": GateConfig(margin=0.1)},
        {"logs": config.logs.model_copy(update={"gamma": 0.5})},
        {"logs": config.logs.model_copy(update={"reward": config.logs.reward.model_copy(update={"column": "other"})})},
    ]
    claims = {
        judging.hypothesis(config.model_copy(update=change), ["a", "b"], "champion") for change in [{}, {}, *changed]
    }
    assert len(claims) == 8
    moved = {"logs": config.logs.model_copy(update={"source": "elsewhere", "landing": "elsewhere/new"})}
    assert judging.hypothesis(config.model_copy(update=moved), ["a", "b"], "champion") in claims
    assert judging.hypothesis(config, ["a"], "champion") not in claims
    gate = config.gate.model_copy(update={"canary_loss": 0.1})
    canary = config.model_copy(update={"gate": gate})
    assert judging.hypothesis(canary, ["a", "b"], "champion") in claims  # it tests nothing
    assert judging.hypothesis(config, ["a", "b"], "other") not in claims


def released_policy(pipeline: Pipeline, version: int) -> str:
    return storage.sha256_file(pipeline.folder / "policies" / str(version) / bundle.POLICY)
