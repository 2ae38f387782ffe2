"""Rare rewards: clicks of a bandit, of which a short log may show none just where two policies differ."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration.judging import CONFIG, asked, measured, on_a_log
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import allowed, cell, cost, count, ever, names, prose, table
from offrl_models.gate import Status, judge
from offrl_models.measures import Measures
from offrl_models.ope.worlds import World

FITTED_ON, LOOKS = 7_000, (500, 1_000, 2_000, 3_000)
NULLS = {
    "never": 0.0,
    "half as often": 0.5,
    "twice as often": 2.0,
}  # times as often as the behavior, of the rare action
WORLDS = ((0.01, 0.03), (0.0067, 0.05), (0.03, 0.03))  # chance of a click, and of the rare action
CLICKS, SHARE = (0.06, 0.02), 0.3  # of the two actions where one is worse, and how often the behavior plays that one
BETTER = f"never the worse one, better by {SHARE * (CLICKS[0] - CLICKS[1]):g}"


@cache
def world(first: float, second: float, share: float) -> World:
    """One context and two actions, of these chances of a click; the behavior plays the second one in this share of all."""
    transition, reward = np.zeros((2, 3, 2, 3))
    transition[0, :, 1] = first, second
    transition[0, :, 2] = 1.0 - transition[0, :, 1]
    transition[[1, 2], :, [1, 2]] = 1.0
    reward[0, :, 1] = 1.0
    return World(
        transition=transition, reward=reward, initial=np.array([1.0, 0.0, 0.0]), terminal=np.array([False, True, True]),
        mask=np.ones((3, 2), bool), gamma=1.0, behavior=np.tile([1.0 - share, share], (3, 1)),
    )  # fmt: skip


def _found(measures: list[Measures]) -> dict[str, Any]:
    """At each look: the verdict, and on which side of 0 the interval is, as it is and without what is added to it."""
    verdicts = [judge("", each, CONFIG).status for each in measures]
    plain = [each.difference - (each.difference - each.lower_bound) / each.widened for each in measures]
    return {
        "passes": [int(verdict is Status.PASS) for verdict in verdicts],
        "fails": [int(verdict is Status.FAIL) for verdict in verdicts],
        "above": [int(each.lower_bound > 0) for each in measures],
        "below": [int(each.upper_bound < 0) for each in measures],
        "plain": [int(bound > 0) for bound in plain],
    }


def _on(of: World, shares: Mapping[str, float], seed: int) -> Found:
    tables = {name: np.tile([1.0 - share, share], (3, 1)) for name, share in shares.items()}
    found = on_a_log(of, tables, seed, FITTED_ON, LOOKS[-1])
    return {name: _found(each) for name, each in measured(found, asked(of.n_states), LOOKS).items()}


def rare(seed: int) -> Found:
    """Policies that are exactly as good as the behavior, whose actions all have the same chance, and one that is better."""
    found: Found = {}
    for click, share in WORLDS:
        shares = {f"{name}; {click:.2%} clicks, {share:.0%} of the log": share * way for name, way in NULLS.items()}
        found |= _on(world(click, click, share), shares, seed)
    return found | _on(world(*CLICKS, SHARE), {BETTER: 0.0}, seed)


def _any(what: str) -> Callable[[dict[str, Any]], bool]:
    return lambda one: any(one[what])


def report(lines: Lines, path: Path) -> list[str]:
    rows: list[tuple[str, ...]] = [("policy", "passes", "fails", "leg A above 0", "below 0", "above 0, not widened")]
    for name in names(lines):
        parts = (cell(*count(lines, name, _any(what))) for what in ("fails", "above", "below", "plain"))
        rows.append((name, cell(*count(lines, name, ever)), *parts))
    looks = ", ".join(f"{look:,}" for look in LOOKS)
    intro = (
        f"Two actions and no context, nuisances fitted on {FITTED_ON:,} episodes; at any of the looks after {looks}. All policies "
        f"but the last are exactly as good as the behavior, and play the rare action never, or half or twice as often: at most "
        f"{allowed(len(lines))} of {len(lines)} logs may pass one. A log may show no click of the rare action. Leg A's outcomes "
        "then vary too little, and its interval is widened by what few surprises leave out of their variance; the last column is "
        f"without that. {cost(lines)}"
    )
    return ["## Rare rewards", "", *prose(intro), *table(*rows)]


EXPERIMENTS = {"rare": Experiment(rare, 400, report)}
