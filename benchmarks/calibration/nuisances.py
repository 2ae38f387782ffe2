"""Nuisances from few stays of ICU-Sepsis: leg A rests on them, and what they get wrong does not go away with more gate stays."""

from pathlib import Path

from benchmarks.calibration.judging import asked, judged, measured, on_a_log
from benchmarks.calibration.sepsis import tables, world
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import cell, cost, count, prose, table, verdicts
from offrl_models.ope.nulls import Family

SIZES = (
    (1_167, 500),
    (2_333, 1_000),
    (4_667, 2_000),
    (350, 5_000),
    (1_167, 5_000),
    (3_500, 5_000),
)  # fitted on, judged on
SOME = (Family("random half", 1.2), Family("random half", 2.0), Family("severe half", 2.0), Family("action swap", 1.5))


def few(seed: int) -> Found:
    """Four nulls at each size: the verdict, and whether leg A's bounds alone exclude the truth, which is 0."""
    nulls, found = tables(0.0, SOME), {}
    for place, (fitted_on, judged_on) in enumerate(SIZES):
        log = on_a_log(world(), nulls, seed * len(SIZES) + place, fitted_on, judged_on)
        for name, (measures,) in measured(log, asked(world().n_states)).items():
            bounds = {"above": int(measures.lower_bound > 0), "below": int(measures.upper_bound < 0)}
            found[f"{fitted_on}, {judged_on}, {name}"] = {**judged([measures]), **bounds}
    return found


def report(lines: Lines, path: Path) -> list[str]:
    rows = [
        ("fitted on", "judged on", "passes", "lower bound of leg A above the truth", "upper bound below it", "verdicts")
    ]
    for fitted_on, judged_on in SIZES:
        names = [f"{fitted_on}, {judged_on}, {family}" for family in SOME]
        shares = []
        for kind in ("passes", "above", "below"):
            pooled = [count(lines, name, lambda one, kind=kind: one[kind] in (1, [1])) for name in names]
            shares.append(cell(*max(pooled)))
        every = [line.found[name] for line in lines.values() for name in names]
        rows.append((f"{fitted_on:,}", f"{judged_on:,}", *shares, verdicts(every)))
    return [
        "## Nuisances from few stays",
        "",
        *prose(
            "Four null policies of ICU-Sepsis, one look. The first three sizes have the shares of the permanent split. With the "
            "next two leg A is not believed, for its nuisances come from less than half as many stays, and the bounds are those "
            f"of leg C. Shares are of the worst of the four policies, verdicts of all of them. {cost(lines)}"
        ),
        *table(*rows),
    ]


EXPERIMENTS = {"nuisances": Experiment(few, 200, report)}
