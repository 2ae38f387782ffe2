"""Training beside d3rlpy: the same networks on the same logs, for as many gradient steps, with one thread.

    python -m benchmarks.training --make-peers            # make the peers' environment first, where it is missing
    python -m benchmarks.training --row bc/8 --repeats 5  # one row only; may be repeated
    python -m benchmarks.training --corl ../CORL          # and CORL from a checkout; --offlinerl-kit, --unifloral likewise

Each run is a process of its own: it trains for two steps before the clock starts, then `fit` is measured from logs in memory to
a trained policy. Where both sides add up the same terms, over discrete actions, their mean losses must agree. Ratios are of CPU
time, round by round: the median, and the least and the greatest of them. Our runs also say how near they are to the rate at which
this very process multiplies matrices, and what the trainer costs beside a bare loop over the same losses.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from benchmarks import checkouts, harness, ope, ope_peers, ope_works
from benchmarks.checkouts import CHECKOUTS
from benchmarks.harness import Cost, Costs, Figure
from benchmarks.ope_peers import Values, Work
from benchmarks.ope_works import BATCH, HIDDEN

if TYPE_CHECKING:
    from offrl_models.schema import Episodes

OBSERVED, GAMMA, STEPS = 17, 0.95, 20
DIMENSIONS = 6  # of continuous actions
LEARNING_RATE = 1e-3
SAME_LOSS, AGREED_STEPS = 0.05, 500  # relative difference allowed between mean losses, from so many gradient steps on
OVERHEAD = 0.03  # of the trainer beside a bare loop: target
FULL, SEEDS, FULL_STEPS = 50_000, 8, 100  # episodes, seeds and gradient steps of runs whose memory is measured
MEMORY, MEMORY_ROWS, MOST_GIB = "memory", ("bc/25", "td3_bc/c", "cql/c"), 3.0
COUNTED = 2  # gradient steps whose floating point operations are counted: networks that are trained in every second one are in it
CONTINUOUS = "c"  # in the place of a number of actions


@dataclass(frozen=True)
class Row:
    """One algorithm on one kind of actions."""

    algorithm: str
    actions: str  # how many discrete ones, or CONTINUOUS
    target: float | None = None  # times as fast as d3rlpy; None where it has no such algorithm
    settings: Mapping[str, Any] = field(default_factory=dict)  # besides sizes and learning rates
    same_loss: bool = True  # whether both sides add up the same terms

    @property
    def name(self) -> str:
        return f"{self.algorithm}/{self.actions}"


ROWS = {
    row.name: row
    for row in (
        *(
            row
            for actions in ("8", "25")
            for row in (
                Row("bc", actions, 3.0),
                Row("dqn", actions, 3.0, {"double": False}),
                Row("cql", actions, 3.0),
                Row("bcq", actions, 2.0, {"logit_penalty": 0.0}),
                Row("iql", actions),
            )
        ),
        # Over continuous actions our policies are mixtures of densities where theirs are one normal density; bc can be one, too.
        Row("bc", CONTINUOUS, 3.0, {"components": 1}, same_loss=False),
        Row("td3_bc", CONTINUOUS, 2.0, same_loss=False),
        Row("iql", CONTINUOUS, 2.0, same_loss=False),
        Row("awac", CONTINUOUS, 2.0, same_loss=False),
        Row("cql", CONTINUOUS, 1.5, same_loss=False),
        Row("sac_n", CONTINUOUS, 1.5, same_loss=False),
    )
}


def make_log(folder: Path, episodes: int, actions: str) -> None:
    """A log of random observations, actions and rewards."""
    ope_works.make_log(folder, episodes, STEPS, 2 if actions == CONTINUOUS else int(actions), GAMMA, OBSERVED)
    if actions == CONTINUOUS:
        rows = episodes * STEPS
        np.save(folder / "action.npy", np.random.default_rng(1).uniform(-1, 1, (rows, DIMENSIONS)).astype(np.float32))
        np.save(folder / "mask.npy", np.ones((rows, 0), bool))
        np.save(folder / "action_prob.npy", np.full(rows, 0.5**DIMENSIONS))
    settings = {"hidden": HIDDEN, "batch_size": BATCH, "learning_rate": LEARNING_RATE}
    for name, value in settings.items():
        np.save(folder / f"{name}.npy", np.array(value))


def logged(folder: Path) -> "Episodes":
    episodes = ope_works.logged(ope_peers.load(folder))
    if episodes.n_actions:
        return episodes
    return replace(episodes, bounds=np.array([[-1.0, 1.0]] * DIMENSIONS))


def made(row: Row, episodes: "Episodes") -> Any:
    """The config of a row."""
    from offrl_models.algorithms import config_of, make_config
    from offrl_models.distributions import space_of

    space = space_of(episodes.actions)
    known = {each.name for each in fields(config_of(row.algorithm, space))}
    same = {"hidden": HIDDEN, "learning_rate": LEARNING_RATE, "actor_learning_rate": LEARNING_RATE}
    return make_config(row.algorithm, {**{k: v for k, v in same.items() if k in known}, **row.settings}, space)


def counted_flop(algorithm: Any, transitions: Any, sampler: Any) -> float:
    """Floating point operations of the matrix products of a gradient step, mean over COUNTED of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from offrl_models import products
    from offrl_models.learner import Learner, TrainingConfig

    Learner(algorithm, transitions, sampler, TrainingConfig())  # slow networks need no gradients
    with (
        patch.object(products, "BY_ONEDNN", False),
        FlopCounterMode(display=False) as counter,
    ):  # it knows torch's own alone
        for step, batch in enumerate(transitions.batches(sampler, COUNTED)):
            torch.cat(list(algorithm.losses(batch._replace(step=step)).values())).sum().backward()
    return counter.get_total_flops() / COUNTED


def sgemm_gflops(repeats: int = 200) -> float:
    """Rate of 256 x 256 x 256 matrix products in this process, by the library that training multiplies with."""
    import torch

    from offrl_models.products import affine

    left, right = torch.randn(1, 256, 256), torch.randn(1, 256, 256)
    started = time.process_time()
    for _ in range(repeats):
        affine(left, right)
    return repeats * 2 * 256**3 / (time.process_time() - started) / 1e9


def bare_s(algorithm: Any, transitions: Any, sampler: Any, steps: int) -> float:
    """CPU time of a plain loop: batches, losses, gradients, optimizer and targets, and no trainer."""
    import torch

    from offrl_models.learner import Learner, TrainingConfig
    from offrl_models.processor import ready_to_train

    learner = Learner(algorithm, transitions, sampler, TrainingConfig())
    started = time.process_time()
    with ready_to_train():
        for batch in transitions.batches(sampler, steps):
            losses = algorithm.losses(batch._replace(step=learner.gradient_steps))
            torch.cat(list(losses.values())).sum().backward()
            learner.adam.advance()
            learner.gradient_steps += 1
            learner.move_targets()
    return time.process_time() - started


def _fit(name: str, folder: Path, steps: int | None) -> Work:
    import torch

    from offrl_models.algorithms import ALGORITHMS
    from offrl_models.datasets.encoding import Encoder
    from offrl_models.training import fit, sampler_of, transitions_of

    assert steps is not None
    torch.set_num_threads(1)
    row, episodes = ROWS[name], logged(folder)
    config, encoder = made(row, episodes), Encoder(ope_works.features(OBSERVED))

    def fresh() -> tuple[Any, Any, Any]:
        algorithm = ALGORITHMS[row.algorithm][1](config, encoder, episodes.actions, [0])
        transitions = transitions_of(algorithm, episodes, encoder)
        return algorithm, transitions, sampler_of(algorithm, transitions, episodes, BATCH, [0])

    flop, bare, gflops = counted_flop(*fresh()), bare_s(*fresh(), steps), sgemm_gflops()

    def work() -> Values:
        _, went = fit(row.algorithm, config, episodes, encoder, seeds=[0], gradient_steps=steps, batch_size=BATCH)
        losses = [sum(each[0] for key, each in chunk.items() if key != "gradient_steps") for chunk in went.history]
        return {"loss": [float(np.mean(losses))], "bare_s": [bare], "gflops": [gflops], "flop": [flop]}

    return work


def _fit_seeds(name: str, folder: Path, steps: int | None) -> Work:
    """Many seeds of a large log at once: for the memory that takes."""
    import torch

    from offrl_models.datasets.encoding import Encoder
    from offrl_models.training import fit

    torch.set_num_threads(1)
    row, episodes = ROWS[name], logged(folder)
    config, encoder = made(row, episodes), Encoder(ope_works.features(OBSERVED))

    def work() -> Values:
        fit(row.algorithm, config, episodes, encoder, seeds=range(SEEDS), gradient_steps=steps, batch_size=BATCH)
        return {"rows": [float(episodes.n_rows)]}

    return work


WORKS = {name: partial(_fit, name) for name in ROWS} | {
    f"{MEMORY}/{name}": partial(_fit_seeds, name) for name in MEMORY_ROWS
}


def require_same(name: str, found: float, other: str, wanted: float, steps: int) -> None:
    """Raises ValueError where the mean losses of two contenders differ by more than SAME_LOSS."""
    if steps >= AGREED_STEPS and not abs(found - wanted) <= SAME_LOSS * abs(wanted):
        raise ValueError(f"{name} and {other} differ in their mean losses: {found} and {wanted}")


def compete(
    name: str, log: Path, steps: int, peers: Path | None, others: Mapping[str, list[str]], repeats: int
) -> Costs:
    """Run one row in turns. Raises ValueError when the losses differ."""
    row, given = ROWS[name], (str(steps), str(log))
    commands = {"offrl": [sys.executable, "-m", "benchmarks.training", "--measure", name, *given]}
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
    row, title, ours = ROWS[name], f"training/{name}", costs["offrl"]
    speeds = {who: steps / harness.median(runs, "cpu") for who, runs in costs.items()}
    found = [
        Figure(f"{title}/{who}/speed", speed, "steps/CPU s", None, None, None, about) for who, speed in speeds.items()
    ]
    for who in [each for each in costs if each != "offrl"]:
        target = CHECKOUTS[who].target if who in CHECKOUTS else row.target
        ratios = [theirs.cpu_s / mine.cpu_s for mine, theirs in zip(ours, costs[who], strict=True)]
        for what, ratio in (("", statistics.median(ratios)), ("/from", min(ratios)), ("/to", max(ratios))):
            figure = f"{title}/offrl/ratio{what}"
            found.append(Figure(figure, speeds["offrl"], "steps/CPU s", who, ratio, target, about))
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
            command = [sys.executable, "-m", "benchmarks.training", "--measure", work, str(FULL_STEPS), str(log)]
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
    parser.add_argument("--measure", nargs=3, metavar=("ROW", "STEPS", "LOG"), help="one run, in this process")
    checkouts.add_options(parser)
    options = parser.parse_args(arguments)
    if options.measure:
        ope_peers.measured(WORKS, *options.measure)
        return
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
            costs = compete(name, log, steps, found, others, options.repeats)
        harness.print_table(f"training/{name}", costs, [])
        figures += (new := compared(name, costs, steps, about))
        tell(new)
    if any(figure.peer in CHECKOUTS for figure in figures):
        print(checkouts.ahead(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
