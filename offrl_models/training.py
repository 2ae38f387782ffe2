"""The one door to training: candidates, behavior networks and fitted Q functions all go through `learner.train`."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from offrl_models.algorithms import ALGORITHMS, Algorithm, AlgorithmConfig, config_of
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import NextProbs, Sampler, Transitions
from offrl_models.distributions import space_of
from offrl_models.exported import OnnxPolicy
from offrl_models.learner import Report, Trainable, train
from offrl_models.ope.fqe import FQE, FQEConfig, FQEValues, bootstrap_rows, fitted_values
from offrl_models.policies import next_mask_or_all
from offrl_models.progress import Update, progress
from offrl_models.schema import Episodes, InputError


def device() -> str:
    """Where to train: the first CUDA device when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(
    name: str,
    config: AlgorithmConfig,
    episodes: Episodes,
    encoder: Encoder,
    *,
    seeds: Sequence[int],
    gradient_steps: int,
    batch_size: int,
    report: Report | None = None,
) -> tuple[Algorithm, list[dict[str, Any]]]:
    """Train all seeds of one algorithm at once. Returns it, on the CPU, and its losses per chunk, network and seed.

    Raises InputError when no row can be trained on or the algorithm is not for such actions, and NonFiniteLossError when a loss
    explodes.
    """
    kind, space = ALGORITHMS[name][1], space_of(episodes.actions)
    if space not in kind.spaces:
        able = ", ".join(other for other, (_, each) in ALGORITHMS.items() if space in each.spaces)
        raise InputError(f"the actions are {space}, and {name} is not for such; use one of {able}.")
    if not isinstance(config, config_of(name, space)):
        raise InputError(f"the settings of {name} are not those over {space} actions; make them for such.")
    algorithm = kind(config, encoder, episodes.actions, seeds)
    transitions = Transitions(episodes, encoder, device())
    sampler = sampler_of(algorithm, transitions, episodes, batch_size, seeds)
    history = train(algorithm, transitions, sampler, gradient_steps=gradient_steps, report=report)
    return algorithm.cpu(), history


def sampler_of(
    algorithm: Trainable, transitions: Transitions, episodes: Episodes, batch_size: int, seeds: Sequence[int]
) -> Sampler:
    """Rows for every seed, and the random numbers that the algorithm wants with each of them."""
    width = 1 + (0 if episodes.n_actions else episodes.action.shape[1])
    return Sampler([transitions.rows] * len(seeds), batch_size, list(seeds), algorithm.draws, width)


def fit_fqe(
    config: FQEConfig,
    encoder: Encoder,
    policies: Sequence[OnnxPolicy],
    fitted_on: Episodes,
    evaluated_on: Episodes,
    *,
    seed: int,
    report: Report | None = None,
) -> FQEValues:
    """Fit Q functions of several policies on some episodes and evaluate them on others."""
    found = [policy.distinct_probs(fitted_on.next_observation, next_mask_or_all(fitted_on)) for policy in policies]
    next_probs = NextProbs(
        probs=torch.as_tensor(np.stack([probs for probs, _ in found]), dtype=torch.float32),
        distinct_of_row=torch.as_tensor(found[0][1]),
        policy_of_seed=torch.arange(len(policies)).repeat_interleave(config.members),
    )
    transitions = Transitions(fitted_on, encoder, device(), next_probs)
    fqe = FQE(config, encoder, len(policies), fitted_on.n_actions, float(fitted_on.return_to_go.mean()))
    members = range(seed, seed + config.members)
    pools = [bootstrap_rows(fitted_on, transitions, member) for member in members]
    sampler = Sampler(pools * len(policies), config.batch_size, [*members] * len(policies))
    train(fqe, transitions, sampler, gradient_steps=config.gradient_steps, report=report)
    return fitted_values(fqe.cpu(), policies, evaluated_on)


@dataclasses.dataclass(frozen=True)
class _Sender:
    """Carries progress from a worker process to the terminal."""

    queue: Any

    def __call__(self, task: str, done: int, total: int, note: str) -> None:
        self.queue.put((task, done, total, note))


def _single_threaded() -> None:
    torch.set_num_threads(1)


def run_side_by_side(job: Callable[[Any, Update], Any], inputs: Sequence[Any]) -> list[Any]:
    """`job(input, update)` for every input, in parallel single-threaded processes, one per core; progress is shown.

    Two threads in one process get in each other's way; two processes do not. A lone input runs in this process.
    """
    torch.set_num_threads(1)
    processes = min(len(inputs), os.cpu_count() or 1)
    with progress() as update:
        if processes <= 1:
            return [job(item, update) for item in inputs]
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager:
            queue = manager.Queue()
            listener = threading.Thread(target=_forward, args=(queue, update), daemon=True)
            listener.start()
            with concurrent.futures.ProcessPoolExecutor(processes, context, _single_threaded) as pool:
                running = [pool.submit(job, item, _Sender(queue)) for item in inputs]
                results = [task.result() for task in running]
            queue.put(None)
            listener.join()
            return results


def _forward(queue: Any, update: Update) -> None:
    while (message := queue.get()) is not None:
        update(*message)
