"""From episodes to ranked candidates."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from torch import nn

from offrl_models import bundle, storage
from offrl_models.algorithms import ALGORITHMS, Algorithm
from offrl_models.checkpoint import Checkpoint
from offrl_models.config import Pipeline, plain_config
from offrl_models.curves import Curves
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import CappedDensity, MixtureDensity
from offrl_models.dynamics import Dynamics
from offrl_models.evaluation import Evaluation, evaluate
from offrl_models.exported import Exported
from offrl_models.exporting import export_checked
from offrl_models.learner import Trained
from offrl_models.parallel import place, together
from offrl_models.policies import CappedPolicy, Mixture
from offrl_models.progress import Update
from offrl_models.reports import plots
from offrl_models.schema import Episodes
from offrl_models.stages.behavior import refit_of
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes
from offrl_models.storage import Stage
from offrl_models.tensors import read_tensors
from offrl_models.training import fit, run_side_by_side
from offrl_models.variants import candidate_name, checkpoint_folder, file_name, variant_of


def candidates(pipeline: Pipeline, names: list[str] | None = None) -> dict[str, dict[str, Stage]]:
    """Train every variant of the named algorithms (of all by default), side by side. Returns algorithm -> variant -> stage."""
    wanted = names or list(pipeline.config.algorithms)
    variants = {algorithm: pipeline.config.variants_of(algorithm) for algorithm in wanted}
    every = [name for found in variants.values() for name in found]
    jobs, cores = [(pipeline, name) for name in every], pipeline.config.training.processes
    stages = dict(zip(every, run_side_by_side(_train_candidate, jobs, cores), strict=True))
    return {algorithm: {name: stages[name] for name in found} for algorithm, found in variants.items()}


class _Job(NamedTuple):
    """A variant to train, and where its training is saved."""

    pipeline: Pipeline
    name: str
    checkpoint: Checkpoint

    @property
    def seeds(self) -> range:
        return range(self.pipeline.config.seed, self.pipeline.config.seed + self.pipeline.config.seeds)

    def fit(self, train: Episodes, **how: Any) -> tuple[Algorithm, Trained]:
        """Train it on these episodes, from its checkpoint on."""
        config, encoder = self.pipeline.config, encoder_of(self.pipeline)
        variant, how = config.variants()[self.name], {**config.training.model_dump(), **how}
        return fit(
            variant.algorithm, variant.config, train, encoder, seeds=self.seeds, checkpoint=self.checkpoint, **how
        )


def _train_candidate(job: tuple[Pipeline, str], update: Update) -> Stage:
    pipeline, name = job
    config, made = pipeline.config, current_episodes(pipeline)
    curve = pipeline.reports / f"candidate-{file_name(name)}.png"

    def build(folder: Path) -> dict[str, Any]:
        train = read_episodes(pipeline, "train")
        if config.training.processes > 1:
            together(_train, training, config.training.processes, update)
            # Nothing is left to do: they have saved what they learned.
            algorithm, went = training.fit(train, processes=1)
        else:
            algorithm, went = _train(training, update, train)
        policy = _acting(algorithm, pipeline)
        export_checked(policy, train, folder)
        for steps, kept in went.kept.items():
            algorithm.load_state_dict({**algorithm.state_dict(), **kept})  # what is not trained has stayed what it is
            export_checked(policy, train, folder / checkpoint_folder(steps))
        storage.write_json(folder / "losses.json", went.history)
        storage.write_bytes(folder / "losses.csv", _table(went.history).write_csv().encode())
        model = went.model and went.model.history
        if model:
            table = _table(model, algorithm.dynamics.config.members)
            storage.write_bytes(folder / "model_losses.csv", table.write_csv().encode())
        plots.learning_curves(went.history, f"{name}, {config.seeds} seeds", curve, model)
        return {
            "algorithm": config.variants()[name].algorithm,
            "rows": train.n_rows,
            "gradient_steps": config.training.gradient_steps,
            "seeds": config.seeds,
            "loss": _last_losses(went.history),
            "stopped": {str(training.seeds[place]): why for place, why in went.stopped.items()},
            "curve": curve.name,
            "model": _model_card(algorithm.dynamics, model) if model else None,
        }

    key = _candidate_key(pipeline, name, made)
    # However many processes have begun a training, any number of them can go on with it.
    begun = {**key, "training": {**key["training"], "processes": None}, "code": storage.code_digest()}
    unfinished = pipeline.variant(name).with_name(f".{file_name(name)}.checkpoint")
    training = _Job(pipeline, name, Checkpoint(unfinished, storage.digest(begun)))
    stage = storage.build_stage(pipeline.variant(name), key, build, (curve,))
    training.checkpoint.remove()
    return stage


def _train(job: _Job, update: Update, train: Episodes | None = None) -> tuple[Algorithm, Trained]:
    """Train a variant and tell how it goes; of several processes that do so together, the first one tells."""
    train = read_episodes(job.pipeline, "train") if train is None else train
    if place() > 0:
        return job.fit(train)
    total = job.pipeline.config.training.gradient_steps
    # Of each task: steps done before the first report, which a checkpoint may have brought, and when.
    started: dict[str, tuple[int, float]] = {}

    def show(task: str, steps: int, of: int, losses: dict[str, float]) -> None:
        at = time.monotonic()
        before, then = started.setdefault(task, (steps, at))
        speed = f"{(steps - before) / (at - then):,.0f} steps/s, " if at > then else ""
        update(task, steps, of, speed + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))

    with Curves(job.pipeline.tensorboard / file_name(job.name), job.seeds) as curves:
        return job.fit(
            train,
            report=lambda steps, losses: show(job.name, steps, total, losses),
            model_report=lambda steps, of, losses: show(f"{job.name} model", steps, of, losses),
            watch=curves,
        )


def _table(history: list[dict[str, Any]], members: int | None = None) -> pl.DataFrame:
    """One row per chunk and seed, or member of each seed, and one column per network."""
    networks = sorted(history[0].keys() - {"gradient_steps"})

    def named(place: int) -> dict[str, int]:
        return {"seed": place} if members is None else {"seed": place // members, "member": place % members}

    return pl.DataFrame(
        {**named(place), "gradient_steps": chunk["gradient_steps"], **{name: chunk[name][place] for name in networks}}
        for chunk in history
        for place in range(len(chunk[networks[0]]))
    )


def _last_losses(history: list[dict[str, Any]]) -> dict[str, float]:
    """Of each network, the mean over the seeds that were not stopped, in the last chunk that trained it."""
    known = {
        name: [value for value in chunk[name] if value is not None]
        for chunk in history
        for name in chunk.keys() - {"gradient_steps"}
        if any(value is not None for value in chunk[name])
    }
    return {name: float(np.mean(values)) for name, values in sorted(known.items())}


def _model_card(dynamics: Dynamics, history: list[dict[str, Any]]) -> dict[str, float]:
    """How long a model of the world was trained, and the mean error of its elites on rows held out."""
    error = dynamics.holdout_error.gather(1, dynamics.elite).mean()
    return {"gradient_steps": history[-1]["gradient_steps"], "holdout_error": float(error)}


def _candidate_key(pipeline: Pipeline, name: str, made: Stage) -> dict[str, Any]:
    config, variant = pipeline.config, pipeline.config.variants()[name]
    return {
        "episodes": made.digest,
        "algorithm": variant.algorithm,
        "config": plain_config(variant.config),
        "training": config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
    }


def current_candidates(pipeline: Pipeline) -> dict[str, str]:
    """The digest of every candidate, trained on the present episodes with the present settings.

    A training leaves several candidates where `training.checkpoints` says so, the last one first. Raises InputError when one
    was not trained.
    """
    made, found = current_episodes(pipeline), {}
    for name in pipeline.config.variants():
        stage = storage.load_stage(pipeline.variant(name), _candidate_key(pipeline, name, made))
        for steps in (None, *pipeline.config.training.kept_after[-2::-1]):
            folder = "" if steps is None else f"{checkpoint_folder(steps)}/"
            files = {file: stage.files[f"{folder}{file}"]["sha256"] for file in (bundle.POLICY, bundle.WEIGHTS)}
            found[candidate_name(name, steps)] = storage.digest(files)
    return found


def _acting(algorithm: Algorithm, pipeline: Pipeline) -> nn.Module:
    """The policy of all seeds of an algorithm."""
    config = pipeline.config
    if config.logs.action.continuous:
        return MixtureDensity(algorithm, config.seeds, config.logs.action.dimensions)
    return Mixture(algorithm, config.seeds)


def capped(
    pipeline: Pipeline, name: str, encoder: Encoder, behavior: nn.Module, cap: float
) -> CappedPolicy | CappedDensity:
    """One rung of a candidate's ladder."""
    candidate = load_candidate(pipeline, name, encoder)
    if isinstance(candidate, MixtureDensity) and isinstance(behavior, MixtureDensity):
        return CappedDensity(candidate, behavior, cap)
    return CappedPolicy(candidate, behavior, cap)


def load_candidate(pipeline: Pipeline, name: str, encoder: Encoder) -> nn.Module:
    seeds = range(pipeline.config.seeds)
    variant = pipeline.config.variants()[variant_of(name)[0]]
    _, kind = ALGORITHMS[variant.algorithm]
    algorithm = kind(variant.config, encoder, pipeline.config.logs.action.actions, seeds)
    model = _acting(algorithm, pipeline)
    model.load_state_dict(read_tensors(pipeline.candidate(name) / bundle.WEIGHTS))
    return model


def evaluate_policies(
    pipeline: Pipeline, policies: Mapping[str, Exported], fitted_on: Episodes, evaluated_on: Episodes, task: str
) -> Evaluation:
    config, encoder = pipeline.config, encoder_of(pipeline)
    return evaluate(
        policies,
        fitted_on,
        evaluated_on,
        encoder,
        config.fqe,
        samples=config.bootstrap_samples,
        seed=config.seed,
        task=task,
        refit=refit_of(pipeline, evaluated_on),
    )
