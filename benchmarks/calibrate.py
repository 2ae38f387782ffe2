"""How often the gate is wrong: policies whose exact difference to the behavior is known, judged on simulated logs.

    python -m benchmarks.calibrate                      # the whole study, in docs/calibration.md; stop and start it at will
    python -m benchmarks.calibrate --smoke              # 60 small logs, in seconds: fails above 9 false passes
    python -m benchmarks.calibrate --experiment size    # one experiment; may be repeated

Each finished log is one line of a file in `.calibration`, and a line is never computed twice. Logs are seeded 1, 2, 3, ...
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.calibration import (
    cloned,
    confounders,
    coverage,
    elsewhere,
    learned,
    nuisances,
    rare,
    retraining,
    sepsis,
    small,
    stress,
)
from benchmarks.calibration.store import Experiment, Lines, done, run
from benchmarks.calibration.tables import prose

EXPERIMENTS: dict[str, Experiment] = {
    **sepsis.EXPERIMENTS,
    **retraining.EXPERIMENTS,
    **nuisances.EXPERIMENTS,
    **coverage.EXPERIMENTS,
    **learned.EXPERIMENTS,
    **stress.EXPERIMENTS,
    **confounders.EXPERIMENTS,
    **elsewhere.EXPERIMENTS,
    **cloned.EXPERIMENTS,
    **rare.EXPERIMENTS,
}


def sections(report: str) -> dict[str, list[str]]:
    """The lines of each experiment in a report, by its name."""
    _, *parts = re.split(r"^<!-- (\w+) -->$", report, flags=re.MULTILINE)
    return {name: text.strip("\n").splitlines() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def write_report(results: Mapping[str, Lines], path: Path, about: Mapping[str, Any]) -> None:
    """What is known by now; an experiment without a finished log keeps the section that it has."""
    kept = sections(path.read_text()) if path.exists() else {}
    lines = [
        "# How often the gate is wrong", "",
        *prose(
            "Policies whose exact difference to the behavior is known are judged on simulated logs by the gate's own functions, at "
            "its default thresholds and alpha .05 unless it says otherwise. Most logs are of ICU-Sepsis (716 states, 25 actions), "
            "with nuisances fitted on 11,667 other stays; exact values are by dynamic programming. Fitted Q evaluation (leg D) is "
            "tabular, on three resamples, where the observation is one category. In brackets: Clopper-Pearson intervals of 95%. "
            "Regenerate with `make calibrate`; it can be stopped and started at will. Logs are seeded 1, 2, 3, ... A table is of "
            "the gate at its date. What it has learned since changes nothing here: it counts entities where one has several "
            "episodes, and refuses equal returns, and none of these logs has any. The test of a Markov state asks for the step as "
            "well since, and of clones the gate asks that no mean ratio is 2 standard errors from 1: with these the tables were "
            "not made again, and they can only take verdicts of PASS away. Its bounds know of surprises that did not come "
            "in the tables of rare rewards, of the point mass, and of December: the others are by narrower ones, on one log of "
            "5,000 stays by 0.2% to 1.3% within a cap and by up to 14% without one. Of 200 fresh logs of 5,000 stays 178 pass a "
            "gain of .004 within cap 1.2, and 197 one of .008 within cap 1.5."
        ),
        f"Machine of the newest: {about['cpu']}, {about['cores']} cores, numpy {about['numpy']}.", "",
    ]  # fmt: skip
    for name, found in results.items():
        if found:
            lines += [f"<!-- {name} -->", "", *EXPERIMENTS[name].report(found, path)]
        elif name in kept:
            lines += [f"<!-- {name} -->", "", *kept[name], ""]
    path.write_text("\n".join(lines).rstrip() + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--experiment", action="append", choices=EXPERIMENTS, help="only this one; may be repeated")
    parser.add_argument("--logs", type=int, help="simulated logs of each experiment, when fewer are enough")
    parser.add_argument("--folder", type=Path, default=Path(".calibration"), help="finished logs are kept here")
    parser.add_argument("--report", type=Path, default=Path("docs/calibration.md"))
    options = parser.parse_args(arguments)
    if options.smoke:
        wrong, right = small.smoke()
        print(f"{wrong} of {small.SMOKE_LOGS} logs passed a policy that is no better; at most {small.SMOKE_LIMIT} may")
        print(f"{right} of {small.SMOKE_LOGS} logs passed one that is better; at least {small.SMOKE_NEEDED} have to")
        return int(wrong > small.SMOKE_LIMIT or right < small.SMOKE_NEEDED)
    for name in options.experiment or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        run(name, experiment, min(options.logs or experiment.logs, experiment.logs), options.folder)
    results = {
        name: done(options.folder / f"{name}.jsonl", experiment.complete) for name, experiment in EXPERIMENTS.items()
    }
    write_report(results, options.report, harness.machine("numpy", "scipy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
