"""What no gate that sees the log alone can notice: a trait that nobody logs, steers the actions, and flatters a policy."""

from pathlib import Path

from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.stress import ODDS, confounded, rows_of
from benchmarks.calibration.tables import cost, prose


def flattered(seed: int) -> Found:
    """One log for each trait: those of `stress` turned round, so that policies look better than they are, and not worse."""
    return {f"odds {odds:g}": confounded(1 / odds, seed, seed) for odds in ODDS}


def report(lines: Lines, path: Path) -> list[str]:
    intro = (
        "The hidden confounders of the first table make its policies look worse than they are. Turned round they make them look "
        "better, and the gate passes them: nothing in the log tells such a trait from a gain. The error rates of this page are "
        f"those of logs in which all that steers the actions is observed. {cost(lines)}"
    )
    return ["### Hidden confounders that flatter", "", *prose(intro), *rows_of(lines)]


EXPERIMENTS = {"flattered": Experiment(flattered, 200, report)}
