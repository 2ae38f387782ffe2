"""Training beside d3rlpy: the same networks on the same logs, for as many gradient steps, with one thread.

    python -m benchmarks.training --make-peers            # make the peers' environment first, where it is missing
    python -m benchmarks.training --row bc/8 --repeats 5  # one row only; may be repeated
    python -m benchmarks.training --corl ../CORL          # and CORL from a checkout; --offlinerl-kit, --unifloral likewise
    python -m benchmarks.training --compiled              # and ours with compiled losses, once they are

Each run is a process of its own: it trains for two steps before the clock starts, then `fit` is measured from logs in memory to
a trained policy. Where both sides add up the same terms, over discrete actions, their mean losses must agree. Ratios are of CPU
time, round by round: the median, and the least and the greatest of them. Our runs also say how near they are to the rate at which
this very process multiplies matrices, and what the trainer costs beside a bare loop over the same losses.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import checkouts, harness, ope
from benchmarks.checkouts import CHECKOUTS
from benchmarks.harness import Cost, Costs, Figure
from benchmarks.training_works import COMPILED, MEMORY, MEMORY_ROWS, OURS, ROWS, SEEDS, STEPS, make_log

SAME_LOSS = 0.07  # relative difference allowed between mean losses, which begin from other weights
AGREED_STEPS = 500  # gradient steps from which they have to agree
OVERHEAD = 0.03  # of the trainer beside a bare loop: target
FULL, FULL_STEPS = 50_000, 100  # episodes and gradient steps of runs whose memory is measured
MOST_GIB = 3.0


def require_same(name: str, found: float, other: str, wanted: float, steps: int) -> None:
    """Raises ValueError where the mean losses of two contenders differ by more than SAME_LOSS."""
    if steps >= AGREED_STEPS and not abs(found - wanted) <= SAME_LOSS * abs(wanted):
        raise ValueError(f"{name} and {other} differ in their mean losses: {found} and {wanted}")


def compete(
    name: str, log: Path, steps: int, peers: Path | None, others: Mapping[str, list[str]], repeats: int, compiled: bool
) -> Costs:
    """Run one row in turns. Raises ValueError when the losses differ."""
    row, given = ROWS[name], (str(steps), str(log))
    ours = {OURS: name, COMPILED: f"{name}/{COMPILED}"} if compiled else {OURS: name}
    measure = [sys.executable, "-m", "benchmarks.training_works"]
    commands = {who: [*measure, work, *given] for who, work in ours.items()}
    if peers and row.target:
        commands["d3rlpy"] = [str(peers / "bin" / "python"), "-m", "benchmarks.training_peers", name, *given]
    commands |= {who: [*start, name, *given] for who, start in others.items() if name in CHECKOUTS[who].files}
    first: list[tuple[str, float]] = []

    def check(who: str, cost: Cost) -> None:
        (loss,) = cost.result["loss"]
        first.append((who, loss))
        if row.same_loss:
            require_same(who, loss, *first[0], steps)

    return harness.alternate(commands, repeats, check, threads=1)


def compared(name: str, costs: Costs, steps: int, about: dict[str, Any]) -> list[Figure]:
    """Speed of every contender, our ratio with its spread, the share of the sgemm rate and the trainer's overhead."""
    row, title, ours = ROWS[name], f"training/{name}", costs[OURS]
    speeds = {who: steps / harness.median(runs, "cpu") for who, runs in costs.items()}
    found = [
        Figure(f"{title}/{who}/speed", speed, "steps/CPU s", None, None, None, about) for who, speed in speeds.items()
    ]
    for we, who in [
        (we, who) for we in costs for who in costs if we in (OURS, COMPILED) and who not in (OURS, COMPILED)
    ]:
        target = CHECKOUTS[who].target if who in CHECKOUTS else row.target
        ratios = [theirs.cpu_s / mine.cpu_s for mine, theirs in zip(costs[we], costs[who], strict=True)]
        for what, ratio in (("", statistics.median(ratios)), ("/from", min(ratios)), ("/to", max(ratios))):
            found.append(Figure(f"{title}/{we}/ratio{what}", speeds[we], "steps/CPU s", who, ratio, target, about))
    rates = [cost.result["flop"][0] * steps / cost.cpu_s / 1e9 for cost in ours]
    share = statistics.median(rate / cost.result["gflops"][0] for rate, cost in zip(rates, ours, strict=True))
    found.append(
        Figure(f"{title}/offrl/rate", statistics.median(rates), "GFLOP/CPU s", "sgemm 256", share, None, about)
    )
    bare = statistics.median(cost.result["bare_s"][0] for cost in ours)
    overhead = statistics.median(cost.cpu_s / cost.result["bare_s"][0] for cost in ours)
    found.append(Figure(f"{title}/offrl/overhead", bare, "CPU s", "a bare loop", overhead, 1 + OVERHEAD, about))
    return found


def memory(about: dict[str, Any]) -> list[Figure]:
    """Most memory of a process that trains SEEDS seeds on FULL episodes, the log in it."""
    found = []
    for name in MEMORY_ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            log, work = Path(temporary) / "log", f"{MEMORY}/{name}"
            make_log(log, FULL, ROWS[name].actions)
            for table in ("probs", "q"):  # for evaluation, and larger than the rest
                (log / f"{table}.npy").unlink()
            command = [sys.executable, "-m", "benchmarks.training_works", work, str(FULL_STEPS), str(log)]
            peak = harness.run(command, threads=1).peak_mib / 1024
        title = f"training/{work}/{SEEDS} seeds of {FULL * STEPS:,} transitions/peak"
        found.append(Figure(title, peak, "GiB", None, None, MOST_GIB, about))
    return found


def tell(figures: Sequence[Figure]) -> None:
    """As JSON, and one line each for people."""
    harness.print_figures(figures)
    for figure in figures:
        beside = "" if figure.ratio is None else f", {figure.ratio:.2f} of {figure.peer}"
        target = "" if figure.target is None else f" (target: {figure.target})"
        print(f"{figure.name}: {figure.value:.2f} {figure.unit}{beside}{target}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--row", action="append", choices=[*ROWS, MEMORY], help="only this one; may be repeated")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the environment of the peers")
    parser.add_argument("--make-peers", action="store_true", help="make that environment where it is missing")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every contender once")
    parser.add_argument("--gradient-steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=2000, help=f"of {STEPS} steps, in the log")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="run ours with compiled losses as well, of which no step is counted before they are",
    )
    checkouts.add_options(parser)
    options = parser.parse_args(arguments)
    try:
        paths = checkouts.given_paths(options)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    peers, steps = options.peers.absolute(), options.gradient_steps
    found = peers if ope.ready(peers, options.make_peers) else None
    others = checkouts.commands(paths, found, options.jax, options.make_peers)
    of_peers = (ope.PEERS if found else ()) + (checkouts.JAX if "unifloral" in others else ())
    about = {**harness.machine("numpy", "torch", "lightning"), "peers": of_peers}
    figures: list[Figure] = []
    for name in options.row or [*ROWS, MEMORY]:
        if name == MEMORY:
            tell(memory(about))
            continue
        with tempfile.TemporaryDirectory() as temporary:
            log = Path(temporary) / "log"
            make_log(log, options.episodes, ROWS[name].actions)
            costs = compete(name, log, steps, found, others, options.repeats, options.compiled)
        harness.print_table(f"training/{name}", costs, [])
        figures += (new := compared(name, costs, steps, about))
        tell(new)
    if any(figure.peer in CHECKOUTS for figure in figures):
        print(checkouts.ahead(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
