"""Training beside d3rlpy: the same networks on the same logs, for as many gradient steps, with one thread.

    python -m benchmarks.training --make-peers            # make the peers' environment first, where it is missing
    python -m benchmarks.training --row bc/8 --repeats 5  # one row only; may be repeated

Each run is a process of its own: it trains for two steps before the clock starts, then `fit` is measured from logs in memory to
a trained policy. The mean losses of the two sides must agree, for they minimise the same thing. Ratios are of CPU time, round by
round: the median, and the least and the greatest of them. Our runs also say how near they are to the rate at which this very
process multiplies matrices, and what the trainer costs beside a bare loop over the same losses.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, ope, ope_peers
from benchmarks.harness import Cost, Costs, Figure
from benchmarks.ope import BATCH, HIDDEN
from benchmarks.ope_peers import Values, Work

OBSERVED, GAMMA, STEPS = 17, 0.95, 20
ACTIONS = (8, 25)
LEARNING_RATE = 1e-3
SAME_LOSS, AGREED_STEPS = 0.05, 500  # relative difference allowed between mean losses, from so many gradient steps on
OVERHEAD = 0.03  # of the trainer beside a bare loop: target
Outputs = Callable[[int], list[int]]  # number of actions -> outputs of each network


@dataclass(frozen=True)
class Row:
    """One algorithm. What it computes per gradient step: networks run forward, and those that it trains."""

    forward: Outputs
    trained: Outputs
    settings: Mapping[str, Any] = field(default_factory=dict)  # besides sizes and learning rate
    target: float | None = None  # times as fast as d3rlpy; None where it has no such algorithm

    def flop(self, actions: int) -> int:
        """Of the matrix products of one gradient step; no network needs a gradient with respect to observations."""
        first = 2 * BATCH * OBSERVED * HIDDEN[0]
        return sum(map(_forward, self.forward(actions))) + sum(
            2 * _forward(outputs) - first for outputs in self.trained(actions)
        )


def _forward(outputs: int) -> int:
    sizes = (OBSERVED, *HIDDEN, outputs)
    return 2 * BATCH * sum(before * after for before, after in pairwise(sizes))


ROWS = {
    "bc": Row(lambda a: [a], lambda a: [a], target=3.0),
    "cql": Row(lambda a: [a, a, a], lambda a: [a], target=3.0),
    "bcq": Row(lambda a: [a] * 5, lambda a: [a, a], {"logit_penalty": 0.0}, target=2.0),
    "iql": Row(lambda a: [a] * 5 + [1, 1], lambda a: [a, a, a, 1]),
}
NAMES = [f"{algorithm}/{actions}" for actions in ACTIONS for algorithm in ROWS]


def make_log(folder: Path, episodes: int, actions: int) -> None:
    ope.make_log(folder, episodes, STEPS, actions, GAMMA, OBSERVED)
    settings = {"hidden": HIDDEN, "batch_size": BATCH, "learning_rate": LEARNING_RATE}
    for name, value in settings.items():
        np.save(folder / f"{name}.npy", np.array(value))


def sgemm_gflops(repeats: int = 200) -> float:
    """Rate of 256 x 256 x 256 matrix products in this process."""
    import torch

    left, right, product = (torch.randn(256, 256) for _ in range(3))
    started = time.process_time()
    for _ in range(repeats):
        torch.mm(left, right, out=product)
    return repeats * 2 * 256**3 / (time.process_time() - started) / 1e9


def bare_s(algorithm: Any, transitions: Any, sampler: Any, steps: int) -> float:
    """CPU time of a plain loop: batches, losses, gradients, optimizer and targets, and no trainer."""
    import torch

    from offrl_models.learner import Learner, TrainingConfig

    learner = Learner(algorithm, transitions, sampler, TrainingConfig())
    torch.set_flush_denormal(True)
    started = time.process_time()
    for batch in transitions.batches(sampler, steps):
        torch.cat(list(algorithm.losses(batch).values())).sum().backward()
        learner.adam.step()
        learner.gradient_steps += 1
        learner.move_targets()
    return time.process_time() - started


def _fit(name: str, folder: Path, steps: int | None) -> Work:
    import torch

    from offrl_models.algorithms import ALGORITHMS, make_config
    from offrl_models.datasets.encoding import Encoder
    from offrl_models.datasets.transitions import Sampler, Transitions
    from offrl_models.training import fit

    assert steps is not None
    torch.set_num_threads(1)
    given = ope_peers.load(folder)
    config = make_config(name, {"hidden": HIDDEN, "learning_rate": LEARNING_RATE, **ROWS[name].settings})
    encoder, episodes = Encoder(ope.features(OBSERVED)), ope.logged(given)
    transitions = Transitions(episodes, encoder)
    bare = bare_s(
        ALGORITHMS[name][1](config, encoder, int(given["actions"]), [0]),
        transitions,
        Sampler([transitions.rows], BATCH, [0]),
        steps,
    )
    gflops = sgemm_gflops()

    def work() -> Values:
        _, went = fit(name, config, episodes, encoder, seeds=[0], gradient_steps=steps, batch_size=BATCH)
        losses = [sum(each[0] for key, each in chunk.items() if key != "gradient_steps") for chunk in went.history]
        return {"loss": [float(np.mean(losses))], "bare_s": [bare], "gflops": [gflops]}

    return work


WORKS = {name: partial(_fit, name) for name in ROWS}


def require_same(name: str, found: float, other: str, wanted: float, steps: int) -> None:
    """Raises ValueError where the mean losses of two contenders differ by more than SAME_LOSS."""
    if steps >= AGREED_STEPS and not abs(found - wanted) <= SAME_LOSS * abs(wanted):
        raise ValueError(f"{name} and {other} differ in their mean losses: {found} and {wanted}")


def compete(name: str, log: Path, steps: int, peers: Path | None, repeats: int) -> Costs:
    """Run one row in turns. Raises ValueError when the losses differ."""
    algorithm, given = name.partition("/")[0], (str(steps), str(log))
    commands = {"offrl": [sys.executable, "-m", "benchmarks.training", "--measure", algorithm, *given]}
    if peers and ROWS[algorithm].target:
        commands["d3rlpy"] = [str(peers / "bin" / "python"), "-m", "benchmarks.training_peers", algorithm, *given]
    first: list[tuple[str, float]] = []

    def check(who: str, cost: Cost) -> None:
        (loss,) = cost.result["loss"]
        first.append((who, loss))
        require_same(who, loss, *first[0], steps)

    return harness.alternate(commands, repeats, check, threads=1)


def compared(name: str, costs: Costs, steps: int, about: dict[str, Any]) -> list[Figure]:
    """Speed of every contender, our ratio with its spread, the share of the sgemm rate and the trainer's overhead."""
    algorithm, _, actions = name.partition("/")
    row, title, ours = ROWS[algorithm], f"training/{name}", costs["offrl"]
    speeds = {who: steps / harness.median(runs, "cpu") for who, runs in costs.items()}
    found = [
        Figure(f"{title}/{who}/speed", speed, "steps/CPU s", None, None, None, about) for who, speed in speeds.items()
    ]
    if "d3rlpy" in costs:
        ratios = [theirs.cpu_s / mine.cpu_s for mine, theirs in zip(ours, costs["d3rlpy"], strict=True)]
        for what, ratio in (("", statistics.median(ratios)), ("/from", min(ratios)), ("/to", max(ratios))):
            figure = f"{title}/offrl/ratio{what}"
            found.append(Figure(figure, speeds["offrl"], "steps/CPU s", "d3rlpy", ratio, row.target, about))
    rates = [row.flop(int(actions)) * steps / cost.cpu_s / 1e9 for cost in ours]
    share = statistics.median(rate / cost.result["gflops"][0] for rate, cost in zip(rates, ours, strict=True))
    found.append(
        Figure(f"{title}/offrl/rate", statistics.median(rates), "GFLOP/CPU s", "sgemm 256", share, None, about)
    )
    bare = statistics.median(cost.result["bare_s"][0] for cost in ours)
    overhead = statistics.median(cost.cpu_s / cost.result["bare_s"][0] for cost in ours)
    found.append(Figure(f"{title}/offrl/overhead", bare, "CPU s", "a bare loop", overhead, 1 + OVERHEAD, about))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--row", action="append", choices=NAMES, help="only this algorithm/actions; may be repeated")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the environment of the peers")
    parser.add_argument("--make-peers", action="store_true", help="make that environment where it is missing")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every contender once")
    parser.add_argument("--gradient-steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=2000, help=f"of {STEPS} steps, in the log")
    parser.add_argument("--measure", nargs=3, metavar=("ALGORITHM", "STEPS", "LOG"), help="one run, in this process")
    options = parser.parse_args(arguments)
    if options.measure:
        ope_peers.measured(WORKS, *options.measure)
        return
    peers, steps = options.peers.absolute(), options.gradient_steps
    found = peers if ope.ready(peers, options.make_peers) else None
    about = {**harness.machine("numpy", "torch", "lightning"), "peers": ope.PEERS if found else ()}
    for name in options.row or NAMES:
        with tempfile.TemporaryDirectory() as temporary:
            log = Path(temporary) / "log"
            make_log(log, options.episodes, int(name.partition("/")[2]))
            costs = compete(name, log, steps, found, options.repeats)
        figures = compared(name, costs, steps, about)
        harness.print_figures(figures)
        harness.print_table(f"training/{name}", costs, [])
        for figure in figures:
            beside = "" if figure.ratio is None else f", {figure.ratio:.2f} of {figure.peer} (target: {figure.target})"
            print(f"{figure.name}: {figure.value:.2f} {figure.unit}{beside}", file=sys.stderr)


if __name__ == "__main__":
    main()
