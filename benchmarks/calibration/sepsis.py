"""ICU-Sepsis: size, power, and looking again and again, on policies whose exact gain is known.

716 states, 25 actions, exact values by dynamic programming. Every log is drawn anew: 11,667 stays to fit the nuisances on and 5,000
to judge by, the shares of the permanent split.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from benchmarks.calibration.judging import (
    ALPHA,
    CONFIG,
    Table,
    asked,
    judged,
    known_policies,
    measured,
    on_a_log,
)
from benchmarks.calibration.rules import RULES, all_rules
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import allowed, cell, clopper_pearson, cost, count, ever, names, plain, prose, table
from offrl_models.evaluation import Evaluation
from offrl_models.legs import contrast
from offrl_models.ope.marginal import paired_differences
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
FALSE_ALLOWED = 0.05


@cache
def world() -> World:
    return icu_sepsis()


@cache
def truth() -> TabularModel:
    return world().model()


@cache
def tables(difference: float, families: tuple[Family, ...] = FAMILIES, seed: int = 0) -> dict[str, Table]:
    """Policies by name, each with this exact difference to the behavior."""
    return known_policies(world(), difference, families, seed)


@cache
def better() -> dict[str, Table]:
    """Policies that are better by so much."""
    return {
        _better(gain, cap): next(iter(tables(gain, (Family("random half", cap),)).values()))
        for cap, gains in GAINS.items()
        for gain in gains
    }


def _better(gain: float, cap: float) -> str:
    return f"{gain:g} within cap {cap:g}"


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
    """Policies that are better by a known gain, at one look after so many episodes, and the same without any error of fitting."""
    found = evaluated(better(), seed, max(SIZES))
    return {name: {**one, "exact": _by_truth(found, name)} for name, one in _judged(found, SIZES).items()}


def _by_truth(found: Evaluation, name: str) -> list[int]:
    """Whether leg A passes a policy at each size with the true weights and values in the place of fitted ones."""
    paired = paired_differences(truth(), better()[name], found.episodes, found.ratio[name])
    assert paired is not None
    bounds = (contrast(name, paired[0][:n], ALPHA, CONFIG.planned_episodes).lower_bound for n in SIZES)
    return [int(bound > 0) for bound in bounds]


def anytime(seed: int) -> Found:
    """Twenty looks at each of three nulls on a growing log."""
    some = tables(0.0, tuple(FAMILIES[place] for place in (1, 2, 4)))
    return _judged(evaluated(some, seed, max(LONG_LOOKS)), LONG_LOOKS)


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
    plot = path.with_name("calibration-power.png")
    _power_plot(lines, plot)
    rows = [("exact gain", *(f"{n:,} episodes" for n in SIZES), *(f"{n:,}, by the truth" for n in SIZES))]
    for gain in names(lines):
        by_truth = (plain(*_passes(lines, gain, place, "exact")) for place in range(len(SIZES)))
        rows.append((gain, *(cell(*_passes(lines, gain, place)) for place in range(len(SIZES))), *by_truth))
    least = ", ".join(f"{max(gains):g} within {cap:g}" for cap, gains in GAINS.items())
    return [
        "## Policies that are better", "",
        *prose(
            "Logs in which they pass, at one look. By the truth: leg A alone, with the true weights and values in the place of "
            "fitted ones, so that only the luck of the log is left. The ladder begins at the least cap, and the least within which "
            f"policies of this kind can gain so much are: up to {least}. Within looser ones the same gain takes more data. "
            f"{cost(lines)}"
        ),
        *table(*rows),
        f"![Passes by exact gain]({plot.name})",
        "",
    ]  # fmt: skip


def _passes(lines: Lines, gain: str, place: int, by: str = "passes") -> tuple[int, int]:
    return count(lines, gain, lambda one: one[by][place])


def _power_plot(lines: Lines, path: Path) -> None:
    """Passes by the number of episodes, a panel for each cap."""
    figure = plt.figure(figsize=(8, 4.6))
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, (cap, gains) in zip(panels, GAINS.items(), strict=True):
        for gain, color in zip(gains, (GRAY, BLUE, ORANGE), strict=False):
            name = _better(gain, cap)
            found = [_passes(lines, name, place) for place in range(len(SIZES))]
            for n, each in zip(SIZES, found, strict=True):
                axes.plot([n, n], clopper_pearson(*each), color=color, linewidth=2)
            axes.plot(
                SIZES, [passes / logs for passes, logs in found], "o-", color=color, label=f"{gain:g}", linewidth=1
            )
            truth = [_passes(lines, name, place, "exact") for place in range(len(SIZES))]
            axes.plot(SIZES, [passes / logs for passes, logs in truth], "--", color=color, linewidth=1)
        axes.set_title(f"within cap {cap:g}", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(800, 90_000)  # room for the legend
        axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="gain", loc="center right", fontsize=8, title_fontsize=8, frameon=False)
    figure.supxlabel("gate episodes; dashed: by the truth", fontsize=8)
    figure.supylabel("share of logs that pass", fontsize=8)
    figure.tight_layout()
    save(figure, path)


def _ever_table(lines: Lines) -> list[str]:
    rows = [(name, cell(*count(lines, name, ever))) for name in names(lines)]
    return table(("null policy", "logs with a false pass"), *rows)


def anytime_report(lines: Lines, path: Path) -> list[str]:
    intro = f"From 500 to 10,000 stays. {cost(lines)}"
    return ["## Twenty looks at one policy that is no better", "", intro, "", *_ever_table(lines)]


def has_all_rules(found: Found) -> bool:
    return all(set(RULES) <= set(one["rules"]) for one in found.values())


def has_all_gains(found: Found) -> bool:
    return set(better()) <= set(found) and all("exact" in one for one in found.values())


EXPERIMENTS = {
    "size": Experiment(size, 400, size_report, has_all_rules),
    "power": Experiment(power, 200, power_report, has_all_gains),
    "anytime": Experiment(anytime, 200, anytime_report),
}
