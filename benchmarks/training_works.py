"""What runs of the training benchmark do, each in a process of its own: `python -m benchmarks.training_works ROW STEPS LOG`."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from benchmarks import ope_peers, ope_works
from benchmarks.ope_peers import Values, Work
from benchmarks.ope_works import BATCH, CHUNK, HIDDEN, but_first_chunk

if TYPE_CHECKING:
    from offrl_models.schema import Episodes

OBSERVED, GAMMA, STEPS = 17, 0.95, 20
DIMENSIONS = 6  # of continuous actions
LEARNING_RATE = 1e-3
SLOW = {"target_interval": 8000}  # steps between copies into slow networks, as d3rlpy has by default
SEEDS = 8  # of runs whose memory is measured
COUNTED = 2  # gradient steps whose floating point operations are counted: networks that are trained in every second one are in it
CONTINUOUS = "c"  # in the place of a number of actions
OURS, COMPILED = "offrl", "offrl-compiled"
MEMORY, MEMORY_ROWS = "memory", ("bc/25", "td3_bc/c", "cql/c")


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
                Row("dqn", actions, 3.0, {"double": False, **SLOW}),
                Row("cql", actions, 3.0, SLOW),
                Row("bcq", actions, 2.0, {"logit_penalty": 0.0, **SLOW}),
                Row("iql", actions),
            )
        ),
        # Over continuous actions a policy is one density, as theirs are, or one action.
        Row("bc", CONTINUOUS, 3.0, {"components": 1}, same_loss=False),
        Row("td3_bc", CONTINUOUS, 2.0, same_loss=False),
        Row("iql", CONTINUOUS, 2.0, {"components": 1}, same_loss=False),
        Row("awac", CONTINUOUS, 2.0, {"components": 1}, same_loss=False),
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


def _fit(name: str, folder: Path, steps: int | None, *, compiled: bool = False) -> Work:
    """With `compiled` losses CHUNK more steps come first, in which they are compiled and which do not count."""
    import torch

    from offrl_models.algorithms import ALGORITHMS
    from offrl_models.datasets.encoding import Encoder
    from offrl_models.training import fit, sampler_of, transitions_of

    assert steps is not None
    torch.set_num_threads(1)
    row, episodes = ROWS[name], logged(folder)
    config, encoder = made(row, episodes), Encoder(ope_works.features(OBSERVED))
    how = {"gradient_steps": steps + CHUNK * compiled, "batch_size": BATCH, "compile": compiled}

    def fresh() -> tuple[Any, Any, Any]:
        algorithm = ALGORITHMS[row.algorithm][1](config, encoder, episodes.actions, [0])
        transitions = transitions_of(algorithm, episodes, encoder)
        return algorithm, transitions, sampler_of(algorithm, transitions, episodes, BATCH, [0])

    flop, bare, gflops = counted_flop(*fresh()), bare_s(*fresh(), steps), sgemm_gflops()

    def work() -> Values:
        _, went = fit(row.algorithm, config, episodes, encoder, seeds=[0], **how)
        history = went.history[: len(went.history) - compiled]
        losses = [sum(each[0] for key, each in chunk.items() if key != "gradient_steps") for chunk in history]
        return {"loss": [float(np.mean(losses))], "bare_s": [bare], "gflops": [gflops], "flop": [flop]}

    return but_first_chunk(work) if compiled else work


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


WORKS = {
    **{name: partial(_fit, name) for name in ROWS},
    **{f"{name}/{COMPILED}": partial(_fit, name, compiled=True) for name in ROWS},
    **{f"{MEMORY}/{name}": partial(_fit_seeds, name) for name in MEMORY_ROWS},
}


if __name__ == "__main__":
    ope_peers.measured(WORKS, *sys.argv[1:])
