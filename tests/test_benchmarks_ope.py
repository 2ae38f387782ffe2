"""The benchmark of evaluation: estimates are what their formulas say, and numbers that differ are noticed."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import harness, ope, ope_peers, ope_works
from benchmarks.harness import Cost
from offrl_models import training
from offrl_models.ope import resampling
from offrl_models.ope.bandit import dm
from offrl_models.ope.doubly_robust import Model, dr, dros, switch_dr
from offrl_models.ope.estimates import all_terms
from offrl_models.ope.importance import tis, wis
from offrl_models.ope.intervals import bootstrap_all
from offrl_models.ope.resampling import bootstrap_shares


def plain_values(given: dict[str, Any]) -> ope_peers.Values:
    """The seven estimators as their formulas read, episode by episode and step by step."""
    steps, gamma, n = int(given["steps"]), float(given["gamma"]), len(given["reward"]) // int(given["steps"])
    rows = np.arange(len(given["reward"]))
    ratio = given["probs"][rows, given["action"]] / given["action_prob"]
    q, v = given["q"][rows, given["action"]], (given["q"] * given["probs"]).sum(1)
    reward, ratio, q, v = (array.reshape(n, steps) for array in (given["reward"], ratio, q, v))
    found = dict.fromkeys(("DM", "TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR"), 0.0)
    weight = np.array([[ratio[i, : t + 1].prod() for t in range(steps)] for i in range(n)])
    for i in range(n):
        found["DM"] += v[i, 0] / n
        for t in range(steps):
            gain, before = gamma**t * reward[i, t], weight[i, t - 1] if t else 1.0
            share, share_before = weight[i, t] / weight[:, t].sum(), before / (weight[:, t - 1].sum() if t else n)
            found["TIS"] += weight[i, -1] * gain / n
            found["PDIS"] += weight[i, t] * gain / n
            found["WIS"] += weight[i, -1] * gain / weight[:, -1].sum()
            found["WPDIS"] += share * gain
            error = gamma**t * (reward[i, t] - q[i, t])
            found["DR"] += (weight[i, t] * error + before * gamma**t * v[i, t]) / n
            found["WDR"] += share * error + share_before * gamma**t * v[i, t]
    return {name: [value] for name, value in found.items()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ope")
    ope_works.make_logs("sequential", ope_works.Sizes(episodes=40), folder)
    ope_works.make_logs("bandit", ope_works.Sizes(rounds=300), folder)
    return folder


def test_the_log_of_the_evaluation_is_one(evaluated: Path) -> None:
    given = ope_peers.load(evaluated / "sequential")
    assert given["probs"].shape == given["q"].shape == (40 * ope_works.STEPS, 25)
    np.testing.assert_allclose(given["probs"].sum(1), 1.0, rtol=1e-12)
    assert (given["action_prob"] > 0).all() and len(np.unique(given["action"])) == 25
    assert given["terminated"].sum() == 40 and given["terminated"][ope_works.STEPS - 1]


def test_the_evaluation_gives_what_its_formulas_say(evaluated: Path) -> None:
    wanted = plain_values(ope_peers.load(evaluated / "sequential"))
    for work, log in (("tables", "sequential"), ("rows", "rows")):
        found = {
            name.partition(" ")[0]: value for name, value in ope_works.WORKS[work](evaluated / log, None)().items()
        }
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name


def test_the_estimates_of_the_bandit_log_are_those_of_the_library(evaluated: Path) -> None:
    given = ope_peers.load(evaluated / "bandit")
    episodes = ope_works.logged(given)
    rows = ope_works.per_row(episodes, given)
    ratio = rows[0]
    wanted = {
        "DM": dm(episodes, rows[2]),
        "IPW": tis(episodes, ratio),
        "SNIPW": wis(episodes, ratio),
        "DR": dr(episodes, *rows),
        "Switch-DR": switch_dr(episodes, *rows, ope_works.TAU),
        "DRos": dros(episodes, *rows, ope_works.SHRINKAGE),
    }
    found = ope_works.WORKS["bandit"](evaluated / "bandit", None)()
    assert found == {name: [pytest.approx(terms.estimate(), rel=1e-12)] for name, terms in wanted.items()}
    assert (ratio > ope_works.TAU).any() and (ratio < ope_works.TAU).any()  # the switch does something


def test_intervals_are_the_same_whether_samples_are_drawn_at_once_or_in_blocks(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ope_peers.load(evaluated / "rows")
    episodes = ope_works.logged(given)
    terms = all_terms(episodes, given["ratio"][0], Model.of(episodes, given["q"][0], given["v"][0]))
    shares = bootstrap_shares(40, 50, 0)
    monkeypatch.setattr(resampling, "BLOCK", 7 * 40)
    drawn = [block.copy() for block in resampling.BootstrapSamples(40, 50, 0)]
    assert [len(block) for block in drawn] == [7] * 7 + [1] and np.array_equal(np.vstack(drawn), 40 * shares)
    dense, blocks = (bootstrap_all(terms, s, 0.9) for s in (shares, resampling.BootstrapSamples(40, 50, 0)))
    for name, each in terms.items():
        samples = each.resampled(shares)
        allowed = 1e-5 * samples.std()
        assert (dense[name].low, dense[name].high) == pytest.approx(np.quantile(samples, [0.05, 0.95]), abs=allowed)
        assert (blocks[name].low, blocks[name].high) == pytest.approx((dense[name].low, dense[name].high), abs=allowed)


def test_several_candidates_get_estimates_from_tables_of_their_own(evaluated: Path) -> None:
    found, given = ope_works.WORKS["rows"](evaluated / "ten", None)(), ope_peers.load(evaluated / "sequential")
    assert len(found) == 7 * ope_works.CANDIDATES
    for number in (0, 3, 9):
        for name, value in plain_values({**given, **ope_works.candidate(given, number)}).items():
            assert found[f"{name} {number}"] == pytest.approx(value, rel=1e-12), name
    for name in ("DM", "TIS", "DR"):
        assert len({found[f"{name} {number}"][0] for number in range(ope_works.CANDIDATES)}) == ope_works.CANDIDATES


@pytest.mark.parametrize(
    ("mine", "theirs", "number", "same"),
    [
        ({"DR": [1.0]}, {"DR": [1.0 + 9e-7]}, None, True),
        ({"DR": [1.0]}, {"DR": [1.0 + 2e-6]}, None, False),
        ({"DR": [0.0, 1.0]}, {"DR": [0.1, 1.1]}, 1000, True),
        ({"DR": [0.0, 1.0]}, {"DR": [0.2, 1.0]}, 1000, False),
        ({"WIS": [0.0, 1.0]}, {"WIS": [0.5, 2.0]}, 1000, True),  # another interval, on purpose
        ({"FQE": [1.0]}, {"FQE": [1.05]}, 1000, True),
        ({"FQE": [1.0]}, {"FQE": [1.2]}, 1000, False),
        ({"DR": [float("nan")]}, {"DR": [1.0]}, None, False),
    ],
)
def test_other_numbers_are_noticed(
    mine: ope_peers.Values, theirs: ope_peers.Values, number: int | None, same: bool
) -> None:
    with nullcontext() if same else pytest.raises(ValueError, match="differ in"):
        ope.require_same("offrl", mine, "peer", theirs, number)


def test_evaluation_runs_without_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ope.main(["--small", "--part", "bandit", "--repeats", "1", "--peers", str(tmp_path / "none")])
    printed = capsys.readouterr()
    figures = [json.loads(line) for line in printed.out.splitlines()]
    assert {figure["name"].split("/")[2] for figure in figures} == {"start", "offrl", "offrl-ci"}
    peaks = {figure["name"]: figure["peer"] for figure in figures if figure["peer"]}
    assert peaks.keys() == {"ope/bandit/offrl/peak", "ope/bandit/offrl-ci/peak"}
    assert all(peer.endswith("MiB of arrays it is given") for peer in peaks.values())
    assert printed.err.count("the peers are left out") == 1


def test_costs_and_memory_of_the_evaluation_have_bars() -> None:
    def cost(cpu: float, peak: float = 100.0) -> list[Cost]:
        return [Cost(1.0, cpu, peak, 1.0, 0.0, None)]

    costs = {
        "start": cost(0.0, 50.0),
        "offrl": cost(2.0, 250.0),
        "offrl-ci": cost(4.0),
        "rows": cost(1.0),
        "rows-ci": cost(3.0),
        "scope-rl": cost(30.0),
        "scope-rl-ci": cost(60.0),
        "ten": cost(4.0),
        "ten-ci": cost(9.0),
    }
    found = ope.compared("sequential", "t", costs, dict.fromkeys(costs, 100.0), {})
    speed = {(figure.name, figure.peer): (figure.ratio, figure.target) for figure in found}
    assert speed["t/offrl/cpu", "scope-rl"] == (15.0, 12.0) and speed["t/offrl-ci/cpu", "scope-rl-ci"] == (15.0, 10.0)
    assert speed["t/ten/cpu", "rows"] == (4.0, 5.0) and speed["t/ten-ci/cpu", "rows-ci"] == (3.0, 5.0)
    assert speed["t/offrl/peak", "the 100 MiB of arrays it is given"] == (2.0, 2.0)


def test_the_first_chunk_of_steps_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, 1.0, 11.0, 14.0, 15.0])  # begun, training, a chunk of 10 s, one of 3, done

    def train(*, watch: Any) -> None:
        for _ in range(3):
            watch([])

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    harness.measure(ope_works.but_first_chunk(lambda: training.train() or {"FQE": [2.0]}))  # pyright: ignore[reportCallIssue]
    told = json.loads(capsys.readouterr().out)
    assert (told["cpu_s"], told["result"]) == (5.0, {"FQE": [2.0]})
