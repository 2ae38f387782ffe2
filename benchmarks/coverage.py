"""Every row-level and derived check of a raw log, Data Docs included; there is no peer that does the same.

python -m benchmarks.coverage [--rows 10000000]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import polars as pl

from benchmarks import harness
from benchmarks.data import cached_log, contract
from benchmarks.harness import Figure

SECONDS, GIB = 60.0, 3.0  # targets at 10 million rows


def check(log: Path, docs: Path) -> int:
    """The coverage stage, without its pictures. Returns the number of checks; the made-up propensities fail one (C15)."""
    from offrl_models.config import CoverageConfig
    from offrl_models.logs.coverage import measure
    from offrl_models.logs.read import Log
    from offrl_models.reports.checks import check_logs

    files = sorted(log.glob("*.parquet"))
    measured = measure(Log.open(files, contract()))
    unchanged = pl.DataFrame({"file": [file.name for file in files], "unchanged": 1})
    return len(check_logs(measured, contract(), CoverageConfig(), unchanged, docs))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the logs here; a temporary folder otherwise")
    parser.add_argument("--measure", nargs=2, metavar=("LOG", "DOCS"), help="one run, in this process")
    options = parser.parse_args()
    if options.measure:
        log, docs = map(Path, options.measure)
        harness.measure(lambda: check(log, docs))
        return
    with tempfile.TemporaryDirectory() as temporary:
        log = cached_log(options.folder or Path(temporary), options.rows, interleaved=False)
        command = [
            sys.executable,
            "-m",
            "benchmarks.coverage",
            "--measure",
            str(log[0].parent),
            str(Path(temporary) / "docs"),
        ]
        costs = harness.alternate({"offrl": command}, options.repeats, lambda *_: None)
    about, name = harness.machine("polars", "numpy", "great-expectations"), f"coverage/{options.rows}"
    seconds, memory = harness.median(costs["offrl"], "wall"), harness.median(costs["offrl"], "peak") / 1024
    figures = [
        Figure(f"{name}/offrl/wall", seconds, "s", None, None, SECONDS, about),
        Figure(f"{name}/offrl/peak", memory, "GiB", None, None, GIB, about),
    ]
    harness.print_figures(figures)
    harness.print_table(name, costs, figures)


if __name__ == "__main__":
    main()
