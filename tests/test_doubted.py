"""Estimates whose weights speak against their intervals: few, or without the large ones that there should be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks.calibration import small
from offrl_models import storage
from offrl_models.assess import _found, values
from offrl_models.assess.target import Target
from offrl_models.ope.estimates import ESTIMATORS, Estimates, doubted
from offrl_models.ope.intervals import Interval
from offrl_models.ope.units import entities_of
from offrl_models.reports import assessment, plots
from offrl_models.schema import Episodes
from tests.test_entities import COPIES, copied

WORLD = small.world()
ANY = {name: Interval(0.5, 0.4, 0.6, 0.95, "") for name in ESTIMATORS}
BY_STEPS = ["PDIS", "WPDIS", "DR", "WDR"]
ALL_BUT_FQE = [name for name in ESTIMATORS if name != "FQE"]


def two_steps(first: list[float], second: list[float]) -> tuple[Episodes, np.ndarray]:
    """Episodes of two steps, and the ratio of every row: of the first steps, and of the second ones."""
    log = WORLD.simulate(4 * len(first), 1)
    log = log.take(np.flatnonzero(np.diff(log.offsets) > 1)[: len(first)])
    ratio = np.ones(log.n_rows)
    ratio[log.offsets[:-1]], ratio[log.offsets[:-1] + 1] = first, second
    return log, ratio


@pytest.mark.parametrize(
    ("n", "carried", "wanted"),
    [
        (4000, 201, []),
        (4000, 200, []),
        (4000, 199, ALL_BUT_FQE),
        (4500, 225, []),
        (4500, 224, ALL_BUT_FQE),  # a twentieth of all
    ],
)
def test_intervals_that_rest_on_few_effective_episodes_are_doubted(n: int, carried: int, wanted: list[str]) -> None:
    """So many episodes carry all the weight, whose mean is 1."""
    weight = np.where(np.arange(n) < carried, n / carried, 0.0)
    log, ratio = two_steps([1.0] * n, weight.tolist())
    found = Estimates.of(ANY, log, ratio, None)
    assert found.effective_episodes == pytest.approx(carried, rel=1e-3)
    assert found.doubted == found.to_json()["doubted"] == wanted


def test_weights_may_be_worth_the_fewest_at_a_step_before_the_last() -> None:
    n = 1000
    weight = np.where(np.arange(n) < 100, n / 100, 1e-9)
    log, ratio = two_steps(weight.tolist(), (1.0 / weight).tolist())
    found = Estimates.of(ANY, log, ratio, None)
    assert found.effective_episodes == pytest.approx(n) and found.doubted == BY_STEPS
    log, ratio = two_steps([1.0] * n, weight.tolist())
    assert Estimates.of(ANY, log, ratio, None).doubted == ALL_BUT_FQE


@pytest.mark.parametrize(("missed", "wanted"), [(1.9, []), (2.1, ALL_BUT_FQE), (-9.0, [])])
def test_weights_whose_mean_is_too_small_are_doubted(missed: float, wanted: list[str]) -> None:
    """By so many standard errors: then large ones are missing. Too large a mean says nothing of that kind."""
    n, spread = 1000, 0.5
    even = np.where(np.arange(n) % 2 == 0, 1 - spread, 1 + spread)
    log, ratio = two_steps([1.0] * n, (even - missed * spread / np.sqrt(n)).tolist())
    assert Estimates.of(ANY, log, ratio, None).doubted == wanted
    log, ratio = two_steps((even - missed * spread / np.sqrt(n)).tolist(), (1 / ratio[ratio != 1.0]).tolist())
    assert Estimates.of(ANY, log, ratio, None).doubted == [name for name in wanted if name in BY_STEPS]


@pytest.mark.parametrize(("clicks", "wanted"), [(19, list(ESTIMATORS)), (21, [])])
def test_rewards_so_rare_that_few_are_seen_leave_everything_in_doubt(clicks: int, wanted: list[str]) -> None:
    """With a dozen clicks intervals of 95% cover 90%, whatever the weights."""
    log, ratio = two_steps([1.0] * 5000, [1.0] * 5000)
    clicked = np.isin(np.arange(log.n_rows), log.offsets[:clicks])
    log = dataclasses.replace(log, reward=clicked.astype(float), gamma=1.0)
    assert log.return_.sum() == clicks
    assert doubted(ESTIMATORS, log, ratio, None) == wanted


@pytest.mark.parametrize("ratio", [1e200, 0.0])
def test_weights_that_overflow_or_vanish_are_doubted(ratio: float) -> None:
    log, each = two_steps([ratio] * 500, [ratio] * 500)
    assert doubted(ESTIMATORS, log, each, None) == doubted(ESTIMATORS, log, each, np.arange(500)) == ALL_BUT_FQE


def test_copies_of_an_episode_are_doubted_as_one_is() -> None:
    for n, carried, missed in ((600, 150, 0.0), (600, 300, 0.0), (600, 600, 1.5), (600, 600, 2.5), (1100, 210, 0.0)):
        even = np.where(np.arange(n) % 2 == 0, 0.5, 1.5) if carried == n else n / carried * (np.arange(n) < carried)
        log, ratio = two_steps([1.0] * n, (even - missed * 0.5 / np.sqrt(n)).tolist())
        pooled = copied(log)
        each = np.concatenate([np.tile(rows, COPIES) for rows in np.split(ratio, log.offsets[1:-1])])
        once, many = Estimates.of(ANY, log, ratio, None), Estimates.of(ANY, pooled, each, entities_of(pooled))
        assert (
            once.doubted
            == many.doubted
            == ([] if (carried, missed) in {(300, 0.0), (600, 1.5), (210, 0.0)} else ALL_BUT_FQE)
        )
        assert many.effective_episodes == pytest.approx(once.effective_episodes)


def test_what_is_doubted_is_pale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    rows = [{"policy": "a", **Estimates(ANY, 300.0, BY_STEPS).to_json()}]
    plots.forest(rows, ESTIMATORS, 0.5, tmp_path / "forest.png", {})
    pale = {lines.get_ydata()[0] for lines in drawn[0].axes[0].lines if lines.get_alpha() == 0.25}
    plt.close(drawn[0])
    assert pale == {ESTIMATORS.index(name) for name in BY_STEPS}


def test_evaluate_doubts_by_entities_and_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 entities with two episodes each, 120 carry all the weight."""
    log = dataclasses.replace(WORLD.simulate(400, 1), entity=np.arange(400) // 2)
    ratio = np.ones(log.n_rows)
    ratio[log.offsets[:-1]] = np.where(np.arange(400) < 240, 400 / 240, 0.0)

    def told(episodes: Episodes) -> dict[str, Any]:
        target = Target({}, ratio * log.action_prob, None, None)
        return _found(episodes, target, ratio, None, "logged", None, values.Effort(1, 0))

    assert told(dataclasses.replace(log, entity=None))["doubted"] == []
    found = json.loads(json.dumps(storage.plain(told(log))))
    assert found["doubted"] == list(found["estimates"]) == ["TIS", "PDIS", "WIS", "WPDIS"]
    drawn = []
    monkeypatch.setattr(assessment, "_png", lambda figure: drawn.append(figure) or "")
    assessment._forest({**found, "doubted": ["PDIS"]})
    faint = {line.get_ydata()[0] for line in drawn[0].axes[0].lines if line.get_alpha() == 0.25}
    plt.close(drawn[0])
    assert faint == {2}  # after the logs and TIS
    rows = assessment.table({**found, "doubted": ["PDIS"], "policy": {"name": "a"}}).rows
    assert [row.style for row in rows] == [None, None, "dim", None, None]
