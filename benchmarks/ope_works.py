"""Logs to evaluate policies on, and our side of that work, beside which `benchmarks.ope` sets other libraries."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from benchmarks import ope_peers
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
CHUNK = 100  # gradient steps of a chunk


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


def candidate(given: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
    """The tables of one of several candidates: the further on, the nearer to uniform, and Q is its own as well."""
    mixed = number / CANDIDATES
    return {
        "probs": (1 - mixed) * given["probs"] + mixed / given["probs"].shape[1],
        "q": given["q"] * (1 - mixed / 2),
    }


def make_rows(folder: Path, source: Path, candidates: int) -> None:
    """The same logs with each candidate's ratio, q and v of each row, [candidates, rows], in the place of the tables."""
    folder.mkdir(parents=True)
    given = load(source)
    episodes = logged(given)
    found = zip(*(per_row(episodes, candidate(given, number)) for number in range(candidates)), strict=True)
    kept = {name: array for name, array in given.items() if name not in ("probs", "q")}
    for name, array in {**kept, **dict(zip(("ratio", "q", "v"), found, strict=True))}.items():
        np.save(folder / f"{name}.npy", array)


def make_fqe_log(folder: Path, episodes: int) -> None:
    """Logs to fit on: no tables, but settings of the training, and a network's policy as ONNX."""
    import torch

    from offrl_models.datasets.encoding import Encoder
    from offrl_models.exporting import traced
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

    example = {"observation": torch.zeros(2, OBSERVED), "mask": torch.ones(2, ACTIONS["fqe"], dtype=torch.bool)}
    graph = traced(Policy(), example, ["probs"], dict.fromkeys(example, ()))
    (folder / "policy.onnx").write_bytes(graph.SerializeToString())


def make_logs(part: str, sizes: Sizes, folder: Path) -> None:
    match part:
        case "sequential":
            make_log(folder / part, sizes.episodes, STEPS, ACTIONS[part], GAMMA)
            make_rows(folder / "rows", folder / part, 1)
            make_rows(folder / "ten", folder / part, CANDIDATES)
        case "bandit":
            make_log(folder / part, sizes.rounds, 1, ACTIONS[part], GAMMA)
        case _:
            make_fqe_log(folder / part, sizes.fitted)


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
    from offrl_models.ope.bandit import dm
    from offrl_models.ope.doubly_robust import Model
    from offrl_models.ope.estimates import all_terms

    return {"DM": dm(episodes, v), **all_terms(episodes, ratio, Model.of(episodes, q, v))}


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
        "Switch-DR": model.corrected(weight, partial(switched, tau=TAU)),
        "DRos": model.corrected(weight, partial(shrunk, shrinkage=SHRINKAGE)),
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


def _nothing(modules: Sequence[str], folder: Path, samples: int | None) -> Work:
    """What a process holds before a log is read: the modules of its work."""
    for module in modules:
        importlib.import_module(f"offrl_models.ope.{module}")
    return dict


def _from_rows(folder: Path, samples: int | None) -> Work:
    """The seven of every candidate of a log, each with its own ratio, q and v."""
    given = load(folder)

    def work() -> Values:
        episodes = logged(given)
        terms = {}
        for number, own in enumerate(zip(given["ratio"], given["q"], given["v"], strict=True)):
            terms |= {f"{name} {number}": each for name, each in _seven(episodes, *own).items()}
        return _values(terms, episodes.n_episodes, samples)

    return work


def but_first_chunk(work: Work) -> Work:
    """The work; what counts of its CPU time is all but the first chunk of gradient steps."""

    def timed() -> Values:
        from offrl_models import training

        train, clock = training.train, []  # CPU time when training began, and at the end of each chunk

        def watched(*given: Any, **how: Any) -> Any:
            return train(*given, **{**how, "watch": lambda _: clock.append(time.process_time())})

        with patch.object(training, "train", watched):
            began = time.process_time()
            found = work()
            took = time.process_time() - began
        return {**found, "cpu_s": [took - (clock[1] - clock[0])]}

    return timed


def _fit(members: int, folder: Path, samples: int | None, *, compiled: bool = False) -> Work:
    """With `compiled` losses CHUNK more steps come first, in which they are compiled and which do not count."""
    import torch

    from offrl_models.datasets.encoding import Encoder
    from offrl_models.exported import OnnxPolicy
    from offrl_models.ope.fqe import FQEConfig
    from offrl_models.training import fit_fqe

    assert samples is not None
    torch.set_num_threads(1)
    given = load(folder)
    policy, encoder = OnnxPolicy(folder / "policy.onnx"), Encoder(features())
    steps = samples + CHUNK * compiled
    config = FQEConfig(
        hidden=HIDDEN, learning_rate=LEARNING_RATE, batch_size=BATCH, gradient_steps=steps, compile=compiled
    )
    config = config.model_copy(update={"members": members})  # a pipeline's config wants two at least

    def work() -> Values:
        episodes = logged(given)
        chosen = episodes.take(np.arange(episodes.n_episodes) < SMALL.episodes)
        found = fit_fqe(config, encoder, [policy], episodes, chosen, seed=0)
        return {"FQE": [float(np.mean(found.members(0)))]}

    return but_first_chunk(work) if compiled else work


WORKS: dict[str, Callable[[Path, int | None], Work]] = {
    "nothing": partial(_nothing, ["estimates"]),
    "nothing of a bandit": partial(_nothing, ["bandit", "doubly_robust", "intervals", "resampling"]),
    "tables": partial(_from_tables, _seven),
    "bandit": partial(_from_tables, _six),
    "rows": _from_rows,
    "fqe": partial(_fit, 1),
    "compiled": partial(_fit, 1, compiled=True),
    "ensemble": partial(_fit, MEMBERS),
}
