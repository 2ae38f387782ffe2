"""The calibration study as people read it: docs/calibration.md, and its plots beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from offrl_models.reports.plots import BLUE, GRAY, ORANGE, save

Found = Mapping[int, Mapping[str, Any]]  # seed of the log -> policy -> what was found
COMMAND = "make calibrate"
FALSE_ALLOWED = 0.05
LIMIT = (
    "5,000 gate stays, looked at after every 500. At most 12 of 400 logs may pass a null policy for the promise (at most 5%, at\n"
    "95% confidence) to hold."
)


def clopper_pearson(passes: int, logs: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a share."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, passes, logs - passes + 1)) if passes else 0.0
    high = float(stats.beta.ppf(1 - tail, passes + 1, logs - passes)) if passes < logs else 1.0
    return low, high


def count(found: Found, policy: str, passed: str | int = "ever") -> int:
    """Logs in which a policy passed: at any look, at look number `passed`, or by a rule of another name."""
    logs = (one[policy] for one in found.values() if policy in one)
    if passed == "ever":
        return sum(any(one["passes"]) for one in logs)
    if isinstance(passed, int):
        return sum(one["passes"][passed] for one in logs)
    return sum(one["rules"][passed] for one in logs)


def _cell(passes: int, logs: int) -> str:
    low, high = clopper_pearson(passes, logs)
    return f"{passes} of {logs} ({low:.1%} to {high:.1%})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(*rows: tuple[str, ...]) -> list[str]:
    head, *body = rows
    return [_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in body), ""]


def size_table(found: Found) -> list[str]:
    logs, names = len(found), list(next(iter(found.values())))
    rules = list(next(iter(found.values()))[names[0]]["rules"])
    rows = [("null policy", "gate, at any of 10 looks", *(f"{rule}, one look" for rule in rules))]
    for name in names:
        others = (f"{count(found, name, rule)} of {logs}" for rule in rules)
        rows.append((name, _cell(count(found, name), logs), *others))
    return _table(*rows)


def power_table(found: Found, sizes: tuple[int, ...]) -> list[str]:
    logs, gains = len(found), list(next(iter(found.values())))
    rows = [("exact gain", *(f"{n:,} episodes" for n in sizes))]
    rows += [(gain, *(_cell(count(found, gain, place), logs) for place in range(len(sizes)))) for gain in gains]
    return _table(*rows)


def ever_table(found: Found) -> list[str]:
    logs = len(found)
    return _table(("null policy", "logs with a false pass"), *(
        (name, _cell(count(found, name), logs)) for name in next(iter(found.values()))
    ))  # fmt: skip


def size_plot(found: Found, path: Path) -> None:
    """False passes of every null family with their intervals, beside the rules of today."""
    names = list(next(iter(found.values())))
    rules = list(next(iter(found.values()))[names[0]]["rules"])
    logs, figure = len(found), plt.figure(figsize=(8, 4.6))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        low, high = clopper_pearson(count(found, name), logs)
        axes.plot([low, high], [place, place], color=BLUE, linewidth=2)
        axes.plot(count(found, name) / logs, place, "o", color=BLUE, label="gate, 10 looks" if place == 0 else None)
        for rule, marker in zip(rules, "sx^", strict=True):
            share = count(found, name, rule) / logs
            axes.plot(share, place, marker, color=ORANGE, label=f"{rule}, one look" if place == 0 else None)
    axes.axvline(FALSE_ALLOWED, color=GRAY, linestyle="--", linewidth=1)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of logs in which a policy that is no better passes; dashed: what is promised", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, path)


def write_report(results: Mapping[str, Found], path: Path, about: Mapping[str, Any]) -> None:
    """What is known by now; experiments without a finished log are left out."""
    from benchmarks.calibrate import SIZES

    known = {name: found for name, found in results.items() if found}
    lines = [
        "# How often the gate is wrong", "",
        "Policies whose exact difference to the behavior is known are judged by the gate on logs simulated from ICU-Sepsis",
        "(716 states, 25 actions), with nuisances fitted on 11,667 other stays; exact values are by dynamic programming.",
        "In brackets: Clopper-Pearson intervals of 95%. Fitted Q evaluation (leg D) is tabular here, on three resamples.",
        f"Regenerate with `{COMMAND}`; it can be stopped and started at will. Logs are seeded 1, 2, 3, ...", "",
        f"Machine: {about['cpu']}, {about['cores']} cores, numpy {about['numpy']}, {about['date']}.", "",
    ]  # fmt: skip
    if "size" in known:
        lines += ["## Policies that are exactly no better", "", LIMIT, f"Logs so far: {len(known['size'])} of 400.", ""]
        lines += size_table(known["size"])
        lines += ["![False passes by family](calibration-size.png)", ""]
        size_plot(known["size"], path.with_name("calibration-size.png"))
    if "power" in known:
        lines += ["## Policies that are better", "", "Logs in which they pass, at one look.", ""]
        lines += power_table(known["power"], SIZES)
    if "anytime" in known:
        lines += ["## Twenty looks at one policy that is no better", "", "From 500 to 10,000 stays.", ""]
        lines += ever_table(known["anytime"])
    if "retraining" in known:
        lines += ["## A new policy every week for a year, none of them better", ""]
        lines += ["Each at the error rate that the ledger gives it.", "", *ever_table(known["retraining"])]
    path.write_text("\n".join(lines).rstrip() + "\n")
