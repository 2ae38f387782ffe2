"""Off-policy evaluation beside SCOPE-RL, Open Bandit Pipeline and d3rlpy, on the same arrays and one thread.

    python -m benchmarks.ope --make-peers     # make their environment first, where it is missing
    python -m benchmarks.ope                  # with the peers that are there
    python -m benchmarks.ope --part bandit    # one part only; may be repeated

A run begins with logs, the candidate's probabilities pi(a|s) and a table Q(s, a) of every row, all in memory, and ends with
estimates or, where names end in `ci`, with intervals. Where names say `rows` or `ten`, it begins with the ratio, q and v of
each row, as a pipeline hands them on; each of the ten has its own. Each run has a process of its own, which does the work once
before the clock starts, with 2 bootstrap samples or gradient steps.

Estimates must agree to 1e-6 and, where both sides bootstrap the same thing, intervals to within the noise of their samples; our
self-normalised ratios are formed again in every bootstrap sample, which the peers do not do. Values of FQE are random on both
sides: they must agree to 0.1. Ratios are of CPU time, which varies less than wall time on a busy machine.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, ope_peers
from benchmarks.harness import Cost, Costs, Figure
from benchmarks.ope_peers import Values
from benchmarks.ope_works import SMALL, WORKS, Sizes, make_logs

SAMPLES = {"sequential": 1000, "bandit": 100}
SAME = 1e-6  # difference allowed between two libraries' estimates
FQE_TOLERANCE, FQE_STEPS = 0.1, 500  # and between two fitted values, from so many gradient steps on
NORMALISED = {"WIS", "WPDIS", "WDR", "SNIPW"}
PINNED = "torch==2.13.0"  # as in constraints.txt
REQUIRED = (
    *(PINNED, "numpy<2", "pandas<3", "scipy", "scikit-learn", "matplotlib", "seaborn", "pyyaml", "tqdm", "gym==0.26.2"),
    *(
        "gymnasium==1.0.0",
        "structlog",
        "colorama",
        "h5py",
        "dataclasses-json",
        "typing-extensions",
        "click",
        "hydra-core",
        "mujoco==3.3.7",
        "imageio==2.38.1",  # which gymnasium imports along with mujoco
        "onnxruntime==1.32.0",
    ),
)
# Without their dependencies, whose pins are old, and though OBP's metadata asks for a Python before 3.11.
PEERS = ("scope-rl==0.2.1", "obp==0.5.7", "d3rlpy==2.8.1", "pytorch-revgrad==0.2.0")


@dataclass(frozen=True)
class Contender:
    """Whose work on which log. `number`: bootstrap samples, or gradient steps; None: estimates alone."""

    peer: bool
    work: str
    log: str
    number: int | None = None


@dataclass(frozen=True)
class Bar:
    """What `ours` should reach beside `against`: times as fast, or at most so many times its cost where `most`."""

    ours: str
    against: str
    target: float
    most: bool = False


def contenders(part: str, sizes: Sizes) -> dict[str, Contender]:
    samples = SAMPLES.get(part)
    match part:
        case "sequential":
            return {
                "start": Contender(False, "nothing", "rows"),
                "offrl": Contender(False, "tables", part),
                "scope-rl": Contender(True, "scope_rl", part),
                "offrl-ci": Contender(False, "tables", part, samples),
                "scope-rl-ci": Contender(True, "scope_rl", part, samples),
                "rows": Contender(False, "rows", "rows"),
                "rows-ci": Contender(False, "rows", "rows", samples),
                "ten": Contender(False, "rows", "ten"),
                "ten-ci": Contender(False, "rows", "ten", samples),
            }
        case "bandit":
            return {
                "start": Contender(False, "nothing of a bandit", part),
                "offrl": Contender(False, "bandit", part),
                "obp": Contender(True, "obp", part),
                "offrl-ci": Contender(False, "bandit", part, samples),
                "obp-ci": Contender(True, "obp", part, samples),
            }
        case _:
            return {
                "offrl": Contender(False, "fqe", part, sizes.gradient_steps),
                "d3rlpy": Contender(True, "d3rlpy", part, sizes.gradient_steps),
                "ensemble": Contender(False, "ensemble", part, sizes.gradient_steps),
                "compiled": Contender(False, "compiled", part, sizes.gradient_steps),
            }


BARS = {
    "sequential": [
        Bar("offrl", "scope-rl", 12.0),
        Bar("offrl-ci", "scope-rl-ci", 10.0),
        Bar("rows", "scope-rl", 12.0),
        Bar("rows-ci", "scope-rl-ci", 10.0),
        Bar("ten", "rows", 5.0, most=True),
        Bar("ten-ci", "rows-ci", 5.0, most=True),
    ],
    "bandit": [Bar("offrl", "obp", 10.0), Bar("offrl-ci", "obp-ci", 10.0)],
    "fqe": [
        Bar("offrl", "d3rlpy", 3.0),
        Bar("compiled", "d3rlpy", 3.0),
        Bar("ensemble", "offrl", 4.0, most=True),
    ],
}
MEMORY_BARS = {"sequential": ("offrl", "offrl-ci", "rows", "rows-ci", "ten", "ten-ci"), "bandit": ("offrl", "offrl-ci")}
MEMORY = 2.0  # target: peak of the process, less what it holds before a log is read / arrays that it was given


def _python(peers: Path) -> Path:
    return peers / "bin" / "python"


def make_peers(folder: Path) -> None:
    """An environment for the peers. Raises subprocess.CalledProcessError where a step of it fails."""
    pip = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, *REQUIRED],
        [*pip, "--no-deps", "--ignore-requires-python", *PEERS],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)


def ready(peers: Path, make: bool) -> bool:
    """Whether the peers can run; says so once where they cannot."""
    check = [str(_python(peers)), "-c", "import scope_rl.ope.discrete, obp.ope, d3rlpy"]
    try:
        if make and not _python(peers).exists():
            make_peers(peers)
        subprocess.run(check, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"the peers are left out, for {peers} does not run them ({error}); --make-peers makes it", file=sys.stderr
        )
        return False
    return True


def require_same(name: str, found: Values, other: str, wanted: Values, samples: int | None) -> None:
    """Raises ValueError where two contenders give other numbers for the same thing.

    The ends of bootstrap intervals differ by their own noise: some 3.8 / sqrt(samples) of a standard error each.
    """
    for estimator in found.keys() & wanted.keys():
        mine, theirs = np.array(found[estimator]), np.array(wanted[estimator])
        if samples is None:
            allowed = SAME
        elif estimator == "FQE":
            allowed = FQE_TOLERANCE if samples >= FQE_STEPS else np.inf
        elif estimator in NORMALISED:
            continue  # the peers keep the weights' means of the whole log in every sample
        else:
            allowed = 5 / samples**0.5 * float(theirs[1] - theirs[0])
        if not (np.abs(mine - theirs) <= allowed).all():
            raise ValueError(f"{name} and {other} differ in {estimator}: {mine} and {theirs}")


def compete(part: str, sizes: Sizes, folder: Path, peers: Path | None, repeats: int) -> Costs:
    """Run the contenders of one part in turns. Raises ValueError when their numbers differ."""
    make_logs(part, sizes, folder)
    running = {name: each for name, each in contenders(part, sizes).items() if peers or not each.peer}
    first: dict[int | None, tuple[str, Values]] = {}

    def check(name: str, cost: Cost) -> None:
        number = running[name].number
        other, wanted = first.setdefault(number, (name, cost.result))
        require_same(name, cost.result, other, wanted, number)

    commands = {}
    for name, each in running.items():
        given = [each.work, str(each.number or 0), str(folder / each.log)]
        if each.peer and peers:
            commands[name] = [str(_python(peers)), "-m", "benchmarks.ope_peers", *given]
        else:
            commands[name] = [sys.executable, "-m", "benchmarks.ope", "--measure", *given]
    return harness.alternate(commands, repeats, check, threads=1)


def compared(
    part: str, title: str, costs: Costs, given_mib: Mapping[str, float], about: dict[str, Any]
) -> list[Figure]:
    """How we stand. `given_mib` is what each contender's arrays take."""
    found = []
    for bar in BARS[part]:
        if bar.ours not in costs or bar.against not in costs:
            continue
        if bar.most:
            cost, base = (harness.median(costs[name], "cpu") for name in (bar.ours, bar.against))
            found.append(Figure(f"{title}/{bar.ours}/cpu", cost, "CPU s", bar.against, cost / base, bar.target, about))
        else:
            found.append(harness.compare(title, costs, "cpu", bar.ours, bar.against, bar.target, about))
    for name in MEMORY_BARS.get(part, ()):
        peak = harness.median(costs[name], "peak") - harness.median(costs["start"], "peak")
        arrays = f"the {given_mib[name]:.0f} MiB of arrays it is given"
        found.append(Figure(f"{title}/{name}/peak", peak, "MiB", arrays, peak / given_mib[name], MEMORY, about))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ope", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", action="append", choices=list(BARS), help="only this one; may be repeated")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the environment of the peers")
    parser.add_argument("--make-peers", action="store_true", help="make that environment where it is missing")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every contender once")
    parser.add_argument("--small", action="store_true", help="on small logs, to try the benchmark out")
    parser.add_argument("--measure", nargs=3, metavar=("WORK", "NUMBER", "LOG"), help="one run, in this process")
    options = parser.parse_args(arguments)
    if options.measure:
        ope_peers.measured(WORKS, *options.measure)
        return
    peers, sizes = options.peers.absolute(), SMALL if options.small else Sizes()
    found = peers if ready(peers, options.make_peers) else None
    about = {**harness.machine("numpy", "torch"), "peers": PEERS if found else ()}
    for part in options.part or BARS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            costs = compete(part, sizes, folder, found, options.repeats)
            logs = {name: folder / each.log for name, each in contenders(part, sizes).items()}
            given = {name: sum(f.stat().st_size for f in log.glob("*.npy")) / harness.MIB for name, log in logs.items()}
        title = f"ope/{part}"
        figures = compared(part, title, costs, given, about)
        harness.print_figures([*harness.figures(title, costs, about), *figures])
        harness.print_table(title, costs, figures)


if __name__ == "__main__":
    main()
