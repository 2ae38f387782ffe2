"""Off-policy evaluation beside SCOPE-RL, Open Bandit Pipeline and d3rlpy, on the same arrays and one thread.

    python -m benchmarks.ope --make-peers     # make their environment first, where it is missing
    python -m benchmarks.ope                  # with the peers that are there
    python -m benchmarks.ope --part bandit    # one part only; may be repeated

A run begins with logs, the candidate's probabilities pi(a|s) and a table Q(s, a) of every row, all in memory, and ends with
estimates or, where names end in `ci`, with intervals. Where names say `rows` or `ten`, it begins with the ratio, q and v of
each row, as a pipeline hands them on. Each run has a process of its own, which does the work once before the clock starts, with
2 bootstrap samples or gradient steps.

Estimates must agree to 1e-6 and, where both sides bootstrap the same thing, intervals to within the noise of their samples; our
self-normalised ratios are formed again in every bootstrap sample, which the peers do not do. Values of FQE are random on both
sides: they must agree to 0.1. Ratios are of CPU time, which varies less than wall time on a busy machine.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness, ope_peers
from benchmarks.harness import Cost, Costs, Figure
from benchmarks.ope_peers import Values, Work, load

if TYPE_CHECKING:
    from offrl_models.ope.importance import Terms
    from offrl_models.schema import Episodes

GAMMA, STEPS, OBSERVED = 0.95, 20, 8
ACTIONS = {"sequential": 25, "bandit": 10, "fqe": 25}
FQE_GAMMA = 0.5  # so short a horizon that a few hundred gradient steps reach the true values
HIDDEN, BATCH, LEARNING_RATE = (256, 256), 256, 1e-3
TAU, SHRINKAGE = 1.5, 2.0  # of Switch-DR and DRos
CANDIDATES, MEMBERS = 10, 5
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
class Sizes:
    """Of the logs and of the training."""

    episodes: int = 100_000  # of STEPS steps
    rounds: int = 1_000_000
    fitted: int = 2_000  # episodes that FQE fits on
    gradient_steps: int = 1000


SMALL = Sizes(200, 500, 50, 2)


def _distribution(rng: np.random.Generator, rows: int, actions: int) -> np.ndarray:
    weight = rng.random((rows, actions)) + 0.2
    return weight / weight.sum(1, keepdims=True)


def make_log(folder: Path, episodes: int, steps: int, actions: int, gamma: float, observed: int = OBSERVED) -> None:
    """Logs of a random policy, the probabilities of a candidate near to it, and a Q table that knows a part of the rewards."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), episodes * steps
    behavior = _distribution(rng, rows, actions)
    action = (behavior.cumsum(1) > rng.random((rows, 1))).argmax(1)
    reward = rng.random(rows)
    q = rng.random((rows, actions)) * (1 - gamma**steps) / (1 - gamma)
    arrays = {
        "observation": rng.standard_normal((rows, observed), np.float32),
        "action": action,
        "reward": reward,
        "terminated": np.arange(1, rows + 1) % steps == 0,
        "action_prob": behavior[np.arange(rows), action],
        "mask": np.ones((rows, actions), bool),
        "probs": 0.8 * behavior + 0.2 * _distribution(rng, rows, actions),
        "q": q,
    }
    settings = {"steps": steps, "gamma": gamma, "tau": TAU, "shrinkage": SHRINKAGE, "actions": actions}
    for name, array in {**arrays, **settings}.items():
        np.save(folder / f"{name}.npy", array)


def make_rows(folder: Path, source: Path) -> None:
    """The same logs with the ratio, q and v of each row in the place of the tables."""
    folder.mkdir(parents=True)
    given = load(source)
    ratio, q, v = per_row(logged(given), given)
    kept = {name: array for name, array in given.items() if name not in ("probs", "q")}
    for name, array in {**kept, "ratio": ratio, "q": q, "v": v}.items():
        np.save(folder / f"{name}.npy", array)


def make_fqe_log(folder: Path, episodes: int) -> None:
    """Logs to fit on: no tables, but settings of the training, and a network's policy as ONNX."""
    import torch

    from offrl_models.datasets.encoding import Encoder
    from offrl_models.exported import export
    from offrl_models.nets import MLP, masked_log_softmax

    make_log(folder, episodes, STEPS, ACTIONS["fqe"], FQE_GAMMA)
    for name in ("probs", "q"):
        (folder / f"{name}.npy").unlink()
    settings = {"hidden": HIDDEN, "batch_size": BATCH, "learning_rate": LEARNING_RATE}
    for name, value in settings.items():
        np.save(folder / f"{name}.npy", np.array(value))

    class Policy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP([0], "policy", Encoder(features()), HIDDEN, ACTIONS["fqe"])

        def forward(self, observation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return masked_log_softmax(self.net(observation[None])[0], mask).exp()

    export(Policy(), OBSERVED, ACTIONS["fqe"], folder / "policy.onnx")


def features(count: int = OBSERVED) -> tuple[Any, ...]:
    from offrl_models.schema import Feature

    return tuple(Feature(f"x{number}") for number in range(count))


def logged(given: Mapping[str, Any]) -> "Episodes":
    from offrl_models.schema import Episodes

    rows, steps = len(given["reward"]), int(given["steps"])
    return Episodes(
        episode_id=np.arange(rows // steps),
        offsets=np.arange(0, rows + 1, steps),
        observation=given["observation"],
        final_observation=given["observation"][steps - 1 :: steps],
        action=given["action"],
        mask=given["mask"],
        reward=given["reward"],
        terminated=given["terminated"],
        truncated=np.zeros(rows, bool),
        action_prob=given["action_prob"],
        gamma=float(given["gamma"]),
        features=features(given["observation"].shape[1]),
    )


def per_row(episodes: "Episodes", given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the estimators take: pi/mu and Q of the logged action, and V."""
    from offrl_models.ope.sequences import ratios_and_values

    return ratios_and_values(episodes, given["probs"], given["q"])


def _seven(episodes: "Episodes", ratio: np.ndarray, q: np.ndarray, v: np.ndarray) -> "dict[str, Terms]":
    return _of_candidates(episodes, [ratio], q, v)[0]


def _of_candidates(
    episodes: "Episodes", ratios: Sequence[np.ndarray], q: np.ndarray, v: np.ndarray
) -> "list[dict[str, Terms]]":
    """The seven of each candidate; the values are the same for all of them."""
    from offrl_models.ope.bandit import dm
    from offrl_models.ope.doubly_robust import Model
    from offrl_models.ope.estimates import all_terms

    direct, model = dm(episodes, v), Model.of(episodes, q, v)
    return [{"DM": direct, **all_terms(episodes, ratio, model)} for ratio in ratios]


def _six(episodes: "Episodes", ratio: np.ndarray, q: np.ndarray, v: np.ndarray) -> "dict[str, Terms]":
    from offrl_models.ope.bandit import dm
    from offrl_models.ope.doubly_robust import Model, shrunk, switched
    from offrl_models.ope.importance import normalised, plain
    from offrl_models.ope.sequences import weights_by_step

    weight, reward, model = weights_by_step(episodes, ratio), episodes.return_[:, None], Model.of(episodes, q, v)
    return {
        "DM": dm(episodes, v),
        "IPW": plain(weight, reward),
        "SNIPW": normalised(weight, reward),
        "DR": model.corrected(weight),
        "Switch-DR": model.corrected(switched(weight, TAU)),
        "DRos": model.corrected(shrunk(weight, SHRINKAGE)),
    }


def _values(terms: "Mapping[str, Terms]", episodes: int, samples: int | None) -> Values:
    """The estimates, or the ends of their intervals."""
    from offrl_models.ope.intervals import bootstrap_all
    from offrl_models.ope.resampling import BootstrapSamples

    if samples is None:
        return {name: [each.estimate()] for name, each in terms.items()}
    found = bootstrap_all(terms, BootstrapSamples(episodes, samples, 0), 1 - ope_peers.ALPHA)
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _from_tables(estimators: Callable[..., "dict[str, Terms]"], folder: Path, samples: int | None) -> Work:
    given = load(folder)

    def work() -> Values:
        episodes = logged(given)
        return _values(estimators(episodes, *per_row(episodes, given)), episodes.n_episodes, samples)

    return work


def _nothing(folder: Path, samples: int | None) -> Work:
    """What every process holds before a log is read."""
    importlib.import_module("offrl_models.ope.estimates")
    return dict


def _from_rows(candidates: int, folder: Path, samples: int | None) -> Work:
    """All estimators of one or more candidates; their ratios are powers of those given."""
    given = load(folder)
    ratios = [given["ratio"]] + [given["ratio"] ** (1 - number / CANDIDATES) for number in range(1, candidates)]

    def work() -> Values:
        episodes = logged(given)
        found = _of_candidates(episodes, ratios, given["q"], given["v"])
        terms = {f"{name} {number}": each for number, part in enumerate(found) for name, each in part.items()}
        return _values(terms, episodes.n_episodes, samples)

    return work


def _fit(members: int, folder: Path, samples: int | None) -> Work:
    import torch

    from offrl_models.datasets.encoding import Encoder
    from offrl_models.exported import OnnxPolicy
    from offrl_models.ope.fqe import FQEConfig
    from offrl_models.training import fit_fqe

    assert samples is not None
    torch.set_num_threads(1)
    given = load(folder)
    policy, encoder = OnnxPolicy(folder / "policy.onnx"), Encoder(features())
    config = FQEConfig(hidden=HIDDEN, learning_rate=LEARNING_RATE, batch_size=BATCH, gradient_steps=samples)
    config = config.model_copy(update={"members": members})  # a pipeline's config wants two at least

    def work() -> Values:
        episodes = logged(given)
        chosen = episodes.take(np.arange(episodes.n_episodes) < SMALL.episodes)
        found = fit_fqe(config, encoder, [policy], episodes, chosen, seed=0)
        return {"FQE": [float(np.mean(found.members(0)))]}

    return work


WORKS: dict[str, Callable[[Path, int | None], Work]] = {
    "nothing": _nothing,
    "tables": partial(_from_tables, _seven),
    "bandit": partial(_from_tables, _six),
    "one": partial(_from_rows, 1),
    "ten": partial(_from_rows, CANDIDATES),
    "fqe": partial(_fit, 1),
    "ensemble": partial(_fit, MEMBERS),
}


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
                "rows": Contender(False, "one", "rows"),
                "rows-ci": Contender(False, "one", "rows", samples),
                "ten": Contender(False, "ten", "rows"),
                "ten-ci": Contender(False, "ten", "rows", samples),
            }
        case "bandit":
            return {
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
    "fqe": [Bar("offrl", "d3rlpy", 3.0), Bar("ensemble", "offrl", 4.0, most=True)],
}
MEMORY_BARS = {"sequential": ("offrl", "offrl-ci", "rows", "rows-ci")}
MEMORY = 2.0  # target: peak of the process, less what it holds before a log is read / arrays that it was given


def make_logs(part: str, sizes: Sizes, folder: Path) -> None:
    match part:
        case "sequential":
            make_log(folder / part, sizes.episodes, STEPS, ACTIONS[part], GAMMA)
            make_rows(folder / "rows", folder / part)
        case "bandit":
            make_log(folder / part, sizes.rounds, 1, ACTIONS[part], GAMMA)
        case _:
            make_fqe_log(folder / part, sizes.fitted)


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
        found.append(Figure(f"{title}/{name}/peak", peak, "MiB", "its arrays", peak / given_mib[name], MEMORY, about))
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
