"""The one door to training: candidates, behavior networks and fitted Q functions all go through `learner.train`."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from offrl_models.algorithms import ALGORITHMS, Algorithm, AlgorithmConfig, config_of, require_space
from offrl_models.checkpoint import Checkpoint
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import NextDraws, NextProbs, Sampler, Transitions, stream
from offrl_models.distributions import Space, space_of
from offrl_models.dynamics import Dynamics
from offrl_models.early_stopping import EarlyStopping
from offrl_models.exported import Exported
from offrl_models.learner import NonFiniteLossError, Report, Trainable, Trained, Watch, train
from offrl_models.ope.fqe import FQE, OF_NEXT, FQEConfig, FQEValues, bootstrap_rows, divided, draws_of, fitted_values
from offrl_models.policies import next_mask_or_all
from offrl_models.progress import Update, progress
from offrl_models.rollouts import refuse_rollouts
from offrl_models.schema import Episodes, InputError
from offrl_models.training_config import TrainingConfig

ModelReport = Callable[[int, int, dict[str, float]], None]  # gradient steps so far, of how many, mean losses and errors

HOLDOUT_ROWS = 1000  # at most, and at most a fifth of all


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
    report: Report | None = None,
    model_report: ModelReport | None = None,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
    **training: Any,
) -> tuple[Algorithm, Trained]:
    """Train all seeds of one algorithm at once. Returns it, on the CPU, and how it went. `training` are fields of TrainingConfig.

    Where it is trained in a model of the world, that is trained before it, reports to `model_report`, and has a checkpoint beside
    `checkpoint`.

    Raises InputError when no row can be trained on, or the algorithm or one of its knobs is not for such actions or such a log, and
    NonFiniteLossError when the losses of all seeds explode.
    """
    how = TrainingConfig(**training)
    kind, space = ALGORITHMS[name][1], space_of(episodes.actions)
    require_space(name, space)
    if not isinstance(config, config_of(name, space)):
        raise InputError(f"the settings of {name} are not those over {space} actions; make them for such.")
    algorithm = kind(config, encoder, episodes.actions, seeds)
    refuse_idle_knobs(name, config, space)
    for key in how.of_rows:
        refuse_rollouts(name, type(config), key)
    if hasattr(kind, "check_log"):
        algorithm.check_log(episodes)
    transitions = transitions_of(algorithm, episodes, encoder, device())
    sampler = sampler_of(algorithm, transitions, episodes, how.batch_size, seeds)
    model = prepare(algorithm, transitions, sampler, how, report=model_report, checkpoint=checkpoint)
    went = train(algorithm, transitions, sampler, how, report=report, checkpoint=checkpoint, watch=watch)
    return algorithm.cpu(), dataclasses.replace(went, model=model)


def refuse_idle_knobs(name: str, config: AlgorithmConfig, space: Space) -> None:
    """Raises InputError when a knob is set that such actions have no use for."""
    only: dict[str, Space] = getattr(ALGORITHMS[name][1], "only", {})
    untouched = type(config)()
    for knob, other in only.items():
        if other != space and getattr(config, knob) != getattr(untouched, knob):
            raise InputError(f"{knob} of {name} is for {other} actions, and these are {space}; remove it.")


def transitions_of(algorithm: Trainable, episodes: Episodes, encoder: Encoder, where: str = "cpu") -> Transitions:
    """The rows, with what else the algorithm wants to know of each, and of the log as a whole."""
    if hasattr(algorithm, "look_at"):
        cast(Any, algorithm).look_at(episodes)
    context = getattr(algorithm, "context", None)
    return Transitions(episodes, encoder, where, extras=getattr(algorithm, "extras", ()), context=context)


def sampler_of(
    algorithm: Trainable, transitions: Transitions, episodes: Episodes, batch_size: int, seeds: Sequence[int]
) -> Sampler:
    """Rows for every seed, and the random numbers that the algorithm wants with each of them.

    Raises InputError when the algorithm can use none of the rows.
    """
    width = 1 + (0 if episodes.n_actions else episodes.action.shape[1])
    rows, usable = transitions.rows, getattr(algorithm, "usable", None)
    if usable is not None:
        rows = rows[torch.as_tensor(usable(episodes), device=rows.device)[rows]]
        if not len(rows):
            raise InputError(f"{type(algorithm).__name__} can train on none of the {episodes.n_rows} rows.")
    return Sampler([rows] * len(seeds), batch_size, list(seeds), algorithm.draws, width)


def prepare(
    algorithm: Algorithm,
    transitions: Transitions,
    sampler: Sampler,
    how: TrainingConfig,
    *,
    report: ModelReport | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained | None:
    """Give algorithms with a model of the world room for what it simulates, and train the model. Returns how that went.

    `checkpoint` is that of the algorithm.
    """
    if not hasattr(algorithm, "dynamics"):
        return None
    algorithm.rollouts.allocate(sampler.batch_size)
    of_model = None if checkpoint is None else checkpoint.of_model
    return fit_dynamics(algorithm.dynamics, transitions, sampler, how, report=report, checkpoint=of_model)


def fit_dynamics(
    dynamics: Dynamics,
    transitions: Transitions,
    sampler: Sampler,
    how: TrainingConfig,
    *,
    report: ModelReport | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train a model of the world in place: each member on a bootstrap resample of a seed's rows, until rows held out no longer
    gain. They are judged after each pass over the rows, or after 100 to 1,000 gradient steps where a pass is shorter or longer.

    Goes on from the checkpoint if there is one of this training, which may be a finished one. Beside the losses of each member
    stand its errors on the rows held out, `transition_holdout_error` and, of discrete actions, `allowed_holdout_error`.
    Raises NonFiniteLossError when too few members of a seed stay finite.
    """
    members, config = dynamics.config.members, dynamics.config
    pools: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    for seed, pool in zip(sampler.seeds, sampler.pools, strict=True):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
        held = min(len(pool) // 5, HOLDOUT_ROWS)
        rest = pool[order[held:]]
        held_out += [pool[order[:held]] if held else rest] * members
        drawn = torch.randint(len(rest), (members, len(rest)), generator=generator).to(pool.device)
        pools += rest[drawn].unbind()
    dynamics.to(transitions.device).measure(transitions, sampler.pools[0])
    stopping = EarlyStopping(dynamics, transitions.take(torch.stack(held_out)))
    rows = Sampler(pools, sampler.batch_size, dynamics.seeds)
    rows.seeds = [seed for seed in sampler.seeds for _ in range(members)]  # as which a member that explodes is named
    how = TrainingConfig(gradient_steps=config.dynamics_steps, batch_size=sampler.batch_size, precision=how.precision)
    every = min(max(len(pools[0]) // sampler.batch_size, 100), 1000)

    def told(steps: int, losses: dict[str, float]) -> None:
        if report:
            report(steps, steps if stopping.done else config.dynamics_steps, losses)

    went = train(dynamics, transitions, rows, how, chunk=every, report=told, checkpoint=checkpoint, stop=stopping)
    finite = stopping.keep_best().isfinite().sum(1).tolist()
    for seed, found in zip(sampler.seeds, finite, strict=True):
        if found < config.elites:
            raise NonFiniteLossError(
                f"only {found} members of the model of the world of seed {seed} have finite errors, and {config.elites} are to "
                "simulate; lower dynamics_learning_rate or look for extreme values in the observations and rewards."
            )
    return went


def fit_fqe(
    config: FQEConfig,
    encoder: Encoder,
    policies: Sequence[Exported],
    fitted_on: Episodes,
    evaluated_on: Episodes,
    *,
    seed: int,
    report: Report | None = None,
) -> FQEValues:
    """Fit Q functions of several policies on some episodes and evaluate them on others."""
    return fitted_values(_fitted(config, encoder, policies, fitted_on, seed, report), policies, evaluated_on)


def fit_shared_fqe(
    config: FQEConfig,
    encoder: Encoder,
    behavior: Exported,
    policies: Iterable[Exported],
    fitted_on: Episodes,
    evaluated_on: Episodes,
    *,
    seed: int,
    report: Report | None = None,
) -> Iterator[FQEValues]:
    """Fit Q functions of the behavior alone, and evaluate each policy by them: v(s) = sum_a pi(a|s) Q_behavior(s, a).

    One fit serves any number of policies, of which one at a time is needed.
    """
    found = _fitted(config, encoder, [behavior], fitted_on, seed, report)
    for policy in policies:
        yield fitted_values(found, [policy], evaluated_on)


def _fitted(
    config: FQEConfig,
    encoder: Encoder,
    policies: Sequence[Exported],
    fitted_on: Episodes,
    seed: int,
    report: Report | None,
) -> FQE:
    to_go = fitted_on.return_to_go
    unit, next_policy = float(to_go.std()) or 1.0, _next_policy(policies, fitted_on, config.members, seed)
    scaled = dataclasses.replace(fitted_on, reward=fitted_on.reward / unit)
    transitions = Transitions(scaled, encoder, device(), next_policy)
    fqe = FQE(config, encoder, len(policies), fitted_on.actions, float(to_go.mean()) / unit, unit)
    members = range(seed, seed + config.members)
    pools = [bootstrap_rows(fitted_on, transitions, member) for member in members]
    sampler = Sampler(pools * len(policies), config.batch_size, [*members] * len(policies))
    how = TrainingConfig(gradient_steps=config.gradient_steps, compile=config.compile)
    train(fqe, transitions, sampler, how, report=report).require_all()
    return fqe.cpu()


def _next_policy(policies: Sequence[Exported], episodes: Episodes, members: int, seed: int) -> NextProbs | NextDraws:
    """What the policies do at the next observation of every row; each is evaluated by so many members."""
    policy_of_seed = torch.arange(len(policies)).repeat_interleave(members)
    densities, others = divided(policies)
    if densities:
        drawn = draws_of(densities, episodes.observation_ahead, episodes.action.shape[1], OF_NEXT)
        return NextDraws(torch.as_tensor(drawn), policy_of_seed, stream(seed, "draws of policies"))
    mask = next_mask_or_all(episodes)
    found = [policy.distinct_probs(episodes.observation_ahead, mask) for policy in others]
    probs = torch.as_tensor(np.stack([probs for probs, _ in found]), dtype=torch.float32)
    return NextProbs(probs, torch.as_tensor(found[0][1]), policy_of_seed)


@dataclasses.dataclass(frozen=True)
class _Sender:
    """Carries progress from a worker process to the terminal."""

    queue: Any

    def __call__(self, task: str, done: int, total: int, note: str) -> None:
        self.queue.put((task, done, total, note))


def _single_threaded() -> None:
    torch.set_num_threads(1)


def cores() -> int:
    """How many processes train side by side at most."""
    return os.cpu_count() or 1


def run_side_by_side(job: Callable[[Any, Update], Any], inputs: Sequence[Any], of_each: int = 1) -> list[Any]:
    """`job(input, update)` for every input, in parallel single-threaded processes, one per `of_each` cores; progress is shown.

    Two threads in one process get in each other's way; two processes do not. A lone input runs in this process.
    """
    torch.set_num_threads(1)
    processes = min(len(inputs), max(cores() // of_each, 1))
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
