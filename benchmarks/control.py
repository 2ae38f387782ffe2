"""Continuous methods on logs of gymnasium's Pendulum and MuJoCo's Reacher beside d3rlpy's, at equal gradient steps.

    python -m benchmarks.control --make-peers             # make the peers' environment first, where it is missing
    python -m benchmarks.control                          # every row
    python -m benchmarks.control --row pendulum/td3_bc    # one row only; may be repeated

A row trains both sides on the same log, with the same networks, batches, learning rates and discount, and one thread: ours all
seeds at once, d3rlpy's one after the other. What each seed has trained is rolled out from the same initial states on both sides,
in the peers' environment, ours as an ONNX graph that gives a drawn action, as one that is deployed, and the greedy one beside it,
which a deployed one does not have. d3rlpy's policies act greedily, and greedy actions are compared. Returns are undiscounted
means; their intervals are those of the mean over training seeds, at LEVEL.

The verdict is of the differences, seed by seed: `worse` where their whole interval lies below 0, `better` where it lies above,
else `level`, which shows no more than the width of the interval does.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks import harness, ope, ope_works
from benchmarks.control_peers import MEMBERS, PROPOSALS, SAMPLES
from benchmarks.control_tasks import BATCH, GAMMA, HIDDEN, LEARNING_RATE, TASKS, Task
from benchmarks.harness import Cost, Figure
from benchmarks.ope_peers import Values, load

if TYPE_CHECKING:
    from offrl_models.schema import Episodes

LEVEL = 0.95
# Besides sizes and learning rates; where names are missing, our defaults are d3rlpy's.
ROWS: dict[str, dict[str, Any]] = {
    "td3_bc": {},
    "iql": {},
    "awac": {},
    "cql": {"actor_learning_rate": LEARNING_RATE, "samples": SAMPLES},
    "bcq": {"samples": PROPOSALS, "vae_hidden": HIDDEN},
    "rebrac": {},
    "crr": {},
    "sac_n": {"members": MEMBERS},
}
NAMES = [f"{task}/{algorithm}" for task in TASKS for algorithm in ROWS]


class Mean(NamedTuple):
    """Of independent numbers, with its t-interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Raises ValueError for fewer than two numbers, which say nothing about their spread."""
        if len(values) < 2:
            raise ValueError(f"an interval needs two training seeds or more, not {len(values)}")
        mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
        reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
        return cls(mean, mean - reach, mean + reach)

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"

    def __str__(self) -> str:
        return format(self)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """Of what two contenders earn from the same initial states, seed by seed."""
    return Mean.of([mine - other for mine, other in zip(ours, theirs, strict=True)])


def verdict(found: Mean) -> str:
    return "worse" if found.high < 0 else "better" if found.low > 0 else "level"


def logged(given: Mapping[str, Any], task: Task) -> "Episodes":
    """The log as one of ours: recordings of tasks that never end."""
    from offrl_models.schema import Episodes

    rows, offsets = len(given["reward"]), given["offsets"]
    truncated = np.zeros(rows, bool)
    truncated[offsets[1:] - 1] = True
    return Episodes(
        episode_id=np.arange(len(offsets) - 1),
        offsets=offsets,
        observation=given["observation"],
        final_observation=given["final_observation"],
        action=given["action"],
        mask=np.ones((rows, 0), bool),
        reward=given["reward"],
        terminated=np.zeros(rows, bool),
        truncated=truncated,
        action_prob=given["action_prob"],
        gamma=GAMMA,
        features=ope_works.features(given["observation"].shape[1]),
        bounds=np.array([[-task.limit, task.limit]] * task.dimensions),
    )


def train(row: str, seeds: int, folder: Path, steps: int) -> Values:
    """Train all seeds of ours on the log of a folder, and leave their policies there as ALGORITHM.onnx.

    Returns the mean losses of the last steps.
    """
    import torch

    from offrl_models.algorithms import make_config
    from offrl_models.datasets.encoding import Encoder
    from offrl_models.exporting import traced
    from offrl_models.training import fit

    class Acting(torch.nn.Module):
        """What each seed's policy thinks best, and what it draws at one row of uniform numbers: [seed, batch, dimensions]."""

        def __init__(self) -> None:
            super().__init__()
            self.algorithm = algorithm

        def forward(self, observation: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            policy = self.algorithm.distribution(observation.double().expand(seeds, -1, -1), None)
            return policy.greedy, policy.sample(uniform.expand(seeds, -1, -1).unsqueeze(-2)).squeeze(-2)

    torch.set_num_threads(1)
    name, _, algorithm_name = row.partition("/")
    episodes = logged(load(folder), TASKS[name])
    settings = {"hidden": HIDDEN, "learning_rate": LEARNING_RATE, **ROWS[algorithm_name]}
    config = make_config(algorithm_name, settings, "continuous")
    how = {"seeds": list(range(seeds)), "gradient_steps": steps, "batch_size": BATCH}
    algorithm, went = fit(algorithm_name, config, episodes, Encoder.fit(episodes), **how)
    went.require_all()
    algorithm.double()
    numbers = torch.full((2, 1 + TASKS[name].dimensions), 0.5, dtype=torch.float64)
    example = {"observation": torch.zeros(2, episodes.observation.shape[1]), "uniform": numbers}
    graph = traced(Acting(), example, ["greedy", "drawn"], dict.fromkeys(example, ()))
    (folder / f"{algorithm_name}.onnx").write_bytes(graph.SerializeToString())
    return {name: losses for name, losses in went.history[-1].items() if name != "gradient_steps"}


def kept(path: Path, command: Sequence[str]) -> Cost:
    """What a command cost and returned, from a file where there is one of an earlier run."""
    if not path.exists():
        path.write_text(json.dumps(asdict(harness.run(command, threads=1))))
    return Cost(**json.loads(path.read_text()))


def compete(row: str, seeds: int, folder: Path, steps: int, python: str) -> dict[str, Cost]:
    """Train both sides on the log of a folder and roll both out, unless its files say how that went."""
    given, peer = (str(seeds), str(folder)), [python, "-m", "benchmarks.control_peers"]
    commands = {
        "training": [sys.executable, "-m", "benchmarks.control", "--measure", row, *given, str(steps)],
        "offrl": [*peer, "rollout", row, *given],
        "d3rlpy": [*peer, row, *given, str(steps)],
    }
    title = f"{row.partition('/')[2]}-{steps}-{seeds}"
    return {who: kept(folder / f"{title}-{who}.json", command) for who, command in commands.items()}


def _figures(title: str, found: Mean, about: dict[str, Any], peer: str | None = None) -> list[Figure]:
    """A mean and its interval. Beside a peer the interval should reach 0, so that the upper end should be at least that."""
    ends = {"": (found.value, None), "/from": (found.low, None), "/to": (found.high, 0.0 if peer else None)}
    return [Figure(title + end, value, "return", peer, None, target, about) for end, (value, target) in ends.items()]


def compared(row: str, costs: Mapping[str, Cost], about: dict[str, Any]) -> list[Figure]:
    """What both sides earn, how far ours is above, and the CPU time of training; d3rlpy's has its rollouts in it."""
    ours, theirs, title = costs["offrl"].result, costs["d3rlpy"].result["greedy"], f"control/{row}"
    return [
        *_figures(f"{title}/offrl/greedy", Mean.of(ours["greedy"]), about),
        *_figures(f"{title}/offrl/deployed", Mean.of(ours["drawn"]), about),
        *_figures(f"{title}/d3rlpy/greedy", Mean.of(theirs), about),
        *_figures(f"{title}/difference", difference(ours["greedy"], theirs), about, "d3rlpy"),
        Figure(f"{title}/offrl/cpu", costs["training"].cpu_s, "CPU s", None, None, None, about),
        Figure(f"{title}/d3rlpy/cpu", costs["d3rlpy"].cpu_s, "CPU s", None, None, None, about),
    ]


def table_row(row: str, steps: int, costs: Mapping[str, Cost]) -> str:
    """A line of a Markdown table under HEADER."""
    ours, theirs = costs["offrl"].result, costs["d3rlpy"].result["greedy"]
    apart = difference(ours["greedy"], theirs)
    cells = [row, f"{steps:,}", *map(Mean.of, (ours["greedy"], theirs)), apart, verdict(apart), Mean.of(ours["drawn"])]
    return f"| {' | '.join(map(str, cells))} |"


HEADER = """| row | steps | offrl, greedy | d3rlpy, greedy | difference | verdict | offrl, as deployed |
|---|---|---|---|---|---|---|"""


def ready(peers: Path, make: bool) -> bool:
    """Whether the peers can run, and simulate MuJoCo; says so where they cannot."""
    if not ope.ready(peers, make):
        return False
    check = [str(peers / "bin" / "python"), "-c", "import mujoco, imageio, onnxruntime"]
    if subprocess.run(check, capture_output=True).returncode == 0:
        return True
    print(f"{peers} has no mujoco; remove that folder and use --make-peers to make it again", file=sys.stderr)
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--row", action="append", choices=NAMES, help="only this task/algorithm; may be repeated")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the environment of the peers")
    parser.add_argument("--make-peers", action="store_true", help="make that environment where it is missing")
    parser.add_argument("--steps", type=int, help="gradient steps; those of each task when left out")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds, two or more")
    parser.add_argument("--folder", type=Path, help="keep logs and results here; what is in it is not run again")
    parser.add_argument(
        "--measure", nargs=4, metavar=("ROW", "SEEDS", "FOLDER", "STEPS"), help="train, in this process"
    )
    options = parser.parse_args(arguments)
    if options.measure:
        row, seeds, folder, steps = options.measure
        harness.measure(lambda: train(row, int(seeds), Path(folder), int(steps)))
        return
    peers = options.peers.absolute()
    if not ready(peers, options.make_peers):
        parser.exit(1, "nothing can be simulated without them\n")
    python, about = str(peers / "bin" / "python"), {**harness.machine("torch", "lightning"), "peers": ope.PEERS}
    baselines: list[str] = []
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        root = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for row in options.row or NAMES:
            name = row.partition("/")[0]
            folder, steps = root / name, options.steps or TASKS[name].gradient_steps
            folder.mkdir(parents=True, exist_ok=True)
            if not any(line.startswith(name) for line in baselines):
                command = [python, "-m", "benchmarks.control_peers", "log", name, str(options.seeds), str(folder)]
                for who, values in kept(folder / f"log-{options.seeds}.json", command).result.items():
                    harness.print_figures(_figures(f"control/{name}/{who}", Mean.of(values), about))
                    baselines.append(f"{name}, {who}: {Mean.of(values)}")
            costs = compete(row, options.seeds, folder, steps, python)
            harness.print_figures(compared(row, costs, about))
            lines.append(table_row(row, steps, costs))
            print(lines[-1], file=sys.stderr)
    print("\n".join(["", *baselines, HEADER, *lines]), file=sys.stderr)


if __name__ == "__main__":
    main()
