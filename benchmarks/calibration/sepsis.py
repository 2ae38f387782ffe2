"""ICU-Sepsis: size, power, looking again and again, and retraining, on policies whose exact gain is known.

716 states, 25 actions, exact values by dynamic programming. Every log is drawn anew: 11,667 stays to fit the nuisances on and 5,000
to judge by, the shares of the permanent split.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.calibration.judging import (
    ALPHA,
    CONFIG,
    Table,
    asked,
    first,
    judged,
    known_policies,
    measured,
    on_a_log,
)
from benchmarks.calibration.rules import RULES, all_rules
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import allowed, cell, clopper_pearson, cost, count, ever, names, plain, prose, table
from offrl_models.evaluation import Evaluation, measure_rungs
from offrl_models.ope.eprocess import elond_level
from offrl_models.ope.nulls import FAMILIES, Family
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World, icu_sepsis
from offrl_models.reports.plots import BLUE, GRAY, ORANGE, save

FITTED_ON, JUDGED_ON = 11_667, 5_000
LOOKS = tuple(range(500, 5_001, 500))
LONG_LOOKS = tuple(range(500, 10_001, 500))
GAINS = {  # by cap: what it can reach
    1.2: (0.002, 0.004),
    1.5: (0.002, 0.004, 0.008),
    2.0: (0.004, 0.008, 0.016),
    5.0: (0.016, 0.03),
}
SIZES = (1_000, 5_000, 20_000)
WEEKS, FIRST_WEEK, PER_WEEK = 52, 500, 90
FALSE_ALLOWED = 0.05


@cache
def world() -> World:
    return icu_sepsis()


@cache
def tables(difference: float, families: tuple[Family, ...] = FAMILIES, seed: int = 0) -> dict[str, Table]:
    """Policies by name, each with this exact difference to the behavior."""
    return known_policies(world(), difference, families, seed)


@cache
def better() -> dict[str, Table]:
    """Policies that are better by so much."""
    return {
        f"{gain:g} within cap {cap:g}": next(iter(tables(gain, (Family("random half", cap),)).values()))
        for cap, gains in GAINS.items()
        for gain in gains
    }


def evaluated(candidates: dict[str, Table], seed: int, judged_on: int = JUDGED_ON) -> Evaluation:
    """Some policies on a log of its own."""
    return on_a_log(world(), candidates, seed, FITTED_ON, judged_on)


def _judged(found: Evaluation, looks: Sequence[int]) -> dict[str, Any]:
    measures = measured(found, asked(world().n_states), looks)
    return {name: judged(each) for name, each in measures.items()}


def size(seed: int) -> Found:
    """Every null family on one log, at ten looks, beside the rules of today."""
    found = evaluated(tables(0.0), seed)
    verdicts = _judged(found, LOOKS)
    return {name: {**one, "rules": all_rules(found, name, ALPHA, seed)} for name, one in verdicts.items()}


def power(seed: int) -> Found:
    """Policies that are better by a known gain, at one look after so many episodes."""
    return _judged(evaluated(better(), seed, max(SIZES)), SIZES)


def anytime(seed: int) -> Found:
    """Twenty looks at each of three nulls on a growing log."""
    some = tables(0.0, tuple(FAMILIES[place] for place in (1, 2, 4)))
    return _judged(evaluated(some, seed, max(LONG_LOOKS)), LONG_LOOKS)


def retraining(seed: int) -> Found:
    """A new null every week on a growing log, each at the error rate that e-LOND would give it."""
    nulls = {f"{name}, {half}": each for half in range(2) for name, each in tables(0.0, FAMILIES[:5], half).items()}
    found = evaluated(nulls, seed, FIRST_WEEK + WEEKS * PER_WEEK)
    model = TabularModel.fit(found.fitted_on, world().n_states)
    known = {name: found.paired(name, model) for name in nulls}
    passes: list[int] = []
    for week in range(WEEKS):
        level = min(elond_level(ALPHA, week + 1, sum(passes)), ALPHA)
        name = list(nulls)[week % len(nulls)]
        now = first(found, FIRST_WEEK + week * PER_WEEK, known)
        (measures,) = measure_rungs([name], now, CONFIG, asked(world().n_states, level))
        passes += judged([measures])["passes"]
    return {"weekly": {"passes": passes}}


def size_report(lines: Lines, path: Path) -> list[str]:
    plot = path.with_name("calibration-size.png")
    _size_plot(lines, plot)
    rows = [("null policy", "gate, at any of 10 looks", *(f"{rule}, one look" for rule in RULES))]
    for name in names(lines):
        others = (plain(*count(lines, name, lambda one, rule=rule: one["rules"][rule])) for rule in RULES)
        rows.append((name, cell(*count(lines, name, ever)), *others))
    most = max(allowed(len(lines)), 0)
    return [
        "## Policies that are exactly no better",
        "",
        *prose(
            f"{JUDGED_ON:,} gate stays, looked at after every 500. For the promise (at most 5%, at 95% confidence) to hold, at "
            f"most 12 of 400 logs may pass a null policy; of {len(lines)}, at most {most}. {cost(lines)}"
        ),
        *table(*rows),
        *prose(
            "HCOPE is the clipped bound of Thomas et al. (2015) on importance sampling, held against the mean return. SPIBB "
            "(Laroche et al., 2019) is no column here: it shapes a policy while it is trained, keeping the behavior in rare cells, "
            "and has nothing to say of a fixed one. Its policies stand beside the gate where policies are trained, below."
        ),
        f"![False passes by family]({plot.name})",
        "",
    ]


def _size_plot(lines: Lines, path: Path) -> None:
    """False passes of every null family with their intervals, beside the rules of today."""
    figure = plt.figure(figsize=(8, 4.6))
    axes = figure.add_subplot()
    for place, name in enumerate(names(lines)):
        passes, logs = count(lines, name, ever)
        axes.plot(clopper_pearson(passes, logs), [place, place], color=BLUE, linewidth=2)
        axes.plot(passes / logs, place, "o", color=BLUE, label="gate, 10 looks" if place == 0 else None)
        for rule, marker in zip(RULES, "sx^+", strict=True):
            wrong, logs = count(lines, name, lambda one, rule=rule: one["rules"][rule])
            axes.plot(wrong / logs, place, marker, color=ORANGE, label=f"{rule}, one look" if place == 0 else None)
    axes.axvline(FALSE_ALLOWED, color=GRAY, linestyle="--", linewidth=1)
    axes.set_yticks(np.arange(len(names(lines))), names(lines), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of logs in which a policy that is no better passes; dashed: what is promised", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, path)


def power_report(lines: Lines, path: Path) -> list[str]:
    rows = [("exact gain", *(f"{n:,} episodes" for n in SIZES))]
    for gain in names(lines):
        shares = (count(lines, gain, lambda one, place=place: one["passes"][place]) for place in range(len(SIZES)))
        rows.append((gain, *(cell(*share) for share in shares)))
    least = ", ".join(f"{max(gains):g} within {cap:g}" for cap, gains in GAINS.items())
    intro = prose(
        "Logs in which they pass, at one look. The ladder begins at the least cap, and the least within which policies of this "
        f"kind can gain so much are: up to {least}. Within looser ones the same gain takes more data. {cost(lines)}"
    )
    return ["## Policies that are better", "", *intro, "", *table(*rows)]


def _ever_table(lines: Lines) -> list[str]:
    rows = [(name, cell(*count(lines, name, ever))) for name in names(lines)]
    return table(("null policy", "logs with a false pass"), *rows)


def anytime_report(lines: Lines, path: Path) -> list[str]:
    intro = f"From 500 to 10,000 stays. {cost(lines)}"
    return ["## Twenty looks at one policy that is no better", "", intro, "", *_ever_table(lines)]


def retraining_report(lines: Lines, path: Path) -> list[str]:
    intro = f"Each at the error rate that the ledger's long-run budget gives it. {cost(lines)}"
    return ["## A new policy every week for a year, none of them better", "", intro, "", *_ever_table(lines)]


def has_all_rules(found: Found) -> bool:
    return all(set(RULES) <= set(one["rules"]) for one in found.values())


def has_all_gains(found: Found) -> bool:
    return set(better()) <= set(found)


EXPERIMENTS = {
    "size": Experiment(size, 400, size_report, has_all_rules),
    "power": Experiment(power, 200, power_report, has_all_gains),
    "anytime": Experiment(anytime, 200, anytime_report),
    "retraining": Experiment(retraining, 100, retraining_report),
}
