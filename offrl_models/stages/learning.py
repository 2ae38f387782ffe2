"""From episodes to ranked candidates."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import nn

from offrl_models import bundle, storage
from offrl_models.algorithms import ALGORITHMS, Algorithm
from offrl_models.checkpoint import Checkpoint
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import CappedDensity, MixtureDensity
from offrl_models.evaluation import BEHAVIOR, Evaluation, evaluate
from offrl_models.exported import Exported, export_checked, open_policy
from offrl_models.policies import CappedPolicy, Mixture
from offrl_models.progress import Update
from offrl_models.reports import plots
from offrl_models.schema import Episodes
from offrl_models.selection import rank
from offrl_models.stages.behavior import current_behavior, read_evaluated, refit_of
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes
from offrl_models.storage import Stage
from offrl_models.tensors import read_tensors
from offrl_models.training import fit, run_side_by_side


def candidates(pipeline: Pipeline, names: list[str] | None = None) -> dict[str, Stage]:
    """Train the named algorithms (all by default), side by side."""
    wanted = names or list(pipeline.config.algorithms)
    stages = run_side_by_side(_train_candidate, [(pipeline, name) for name in wanted])
    return dict(zip(wanted, stages, strict=True))


def _train_candidate(job: tuple[Pipeline, str], update: Update) -> Stage:
    pipeline, name = job
    config, made = pipeline.config, current_episodes(pipeline)
    settings = config.algorithm(name)
    curve = pipeline.reports / f"candidate-{name}.png"
    total = config.training.gradient_steps

    def build(folder: Path) -> dict[str, Any]:
        train = read_episodes(pipeline, "train")
        seeds = range(config.seed, config.seed + config.seeds)

        started: list[
            tuple[int, float]
        ] = []  # steps done before the first report, which a checkpoint may have brought, and when

        def report(steps: int, losses: dict[str, float]) -> None:
            started.append((steps, time.monotonic()))
            (before, then), (now, at) = started[0], started[-1]
            speed = f"{(now - before) / (at - then):,.0f} steps/s, " if at > then else ""
            update(name, steps, total, speed + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))

        algorithm, went = fit(
            name,
            settings,
            train,
            encoder_of(pipeline),
            seeds=seeds,
            report=report,
            checkpoint=checkpoint,
            **config.training.model_dump(),
        )
        export_checked(_acting(algorithm, pipeline), train, folder)
        storage.write_json(folder / "losses.json", went.history)
        storage.write_bytes(folder / "losses.csv", _table(went.history).write_csv().encode())
        plots.learning_curves(went.history, f"{name}, {config.seeds} seeds", curve)
        stopped = {str(seeds[place]): why for place, why in went.stopped.items()}
        summary = {"algorithm": name, "rows": train.n_rows, "gradient_steps": total, "seeds": config.seeds}
        return {**summary, "loss": _last_losses(went.history), "stopped": stopped}

    key = _candidate_key(pipeline, name, made)
    unfinished = pipeline.candidate(name).with_name(f".{name}.checkpoint")
    checkpoint = Checkpoint(unfinished, storage.digest({**key, "code": storage.code_digest()}))
    stage = storage.build_stage(pipeline.candidate(name), key, build, (curve,))
    checkpoint.remove()
    return stage


def _table(history: list[dict[str, Any]]) -> pl.DataFrame:
    """One row per chunk and seed, one column per network."""
    networks = sorted(history[0].keys() - {"gradient_steps"})
    return pl.DataFrame(
        {"seed": seed, "gradient_steps": chunk["gradient_steps"], **{name: chunk[name][seed] for name in networks}}
        for chunk in history
        for seed in range(len(chunk[networks[0]]))
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


def _candidate_key(pipeline: Pipeline, name: str, made: Stage) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": made.digest,
        "algorithm": name,
        "config": config.resolved_algorithm(name),
        "training": config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
    }


def current_candidates(pipeline: Pipeline) -> dict[str, Stage]:
    """Every candidate, trained on the present episodes with the present settings. Raises InputError when one was not."""
    made = current_episodes(pipeline)
    return {
        name: storage.load_stage(pipeline.candidate(name), _candidate_key(pipeline, name, made))
        for name in pipeline.config.algorithms
    }


def _acting(algorithm: Algorithm, pipeline: Pipeline) -> nn.Module:
    """The policy of all seeds of an algorithm."""
    config = pipeline.config
    if config.logs.action.continuous:
        return MixtureDensity(algorithm, config.seeds, config.logs.action.dimensions)
    return Mixture(algorithm, config.seeds)


def capped(pipeline: Pipeline, name: str, encoder: Encoder, behavior: nn.Module, cap: float) -> nn.Module:
    """One rung of a candidate's ladder."""
    candidate = load_candidate(pipeline, name, encoder)
    if isinstance(candidate, MixtureDensity) and isinstance(behavior, MixtureDensity):
        return CappedDensity(candidate, behavior, cap)
    return CappedPolicy(candidate, behavior, cap)


def load_candidate(pipeline: Pipeline, name: str, encoder: Encoder) -> nn.Module:
    seeds = range(pipeline.config.seeds)
    _, kind = ALGORITHMS[name]
    algorithm = kind(pipeline.config.algorithm(name), encoder, pipeline.config.logs.action.actions, seeds)
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


def _leaderboard_key(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": current_episodes(pipeline).digest,
        "behavior": current_behavior(pipeline).digest,
        "candidates": {name: stage.digest for name, stage in current_candidates(pipeline).items()},
        "fqe": config.fqe.model_dump(mode="json"),
        "bootstrap": [config.seed, config.bootstrap_samples],
    }


def current_leaderboard(pipeline: Pipeline) -> Stage:
    """The ranking of the present candidates. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "leaderboard", _leaderboard_key(pipeline))


def leaderboard(pipeline: Pipeline) -> Stage:
    """Rank the candidates on the selection split."""
    picture = pipeline.reports / "leaderboard.png"

    def build(folder: Path) -> dict[str, Any]:
        policies = {name: open_policy(pipeline.candidate(name) / bundle.POLICY) for name in pipeline.config.algorithms}
        policies[BEHAVIOR] = open_policy(pipeline.folder / "behavior" / bundle.POLICY)
        train, selection = read_episodes(pipeline, "train"), read_evaluated(pipeline, "selection")
        rows = rank(evaluate_policies(pipeline, policies, train, selection, "FQE for the leaderboard"))
        storage.write_json(folder / "leaderboard.json", rows)
        gains = [row["score"] for row in rows]
        plots.bars(
            [row["candidate"] for row in rows],
            gains,
            "Least gain over behavior by FQE, selection split",
            "gain",
            picture,
        )
        return {"best": rows[0]["candidate"], "ranking": rows, "episodes": selection.n_episodes}

    return storage.build_stage(pipeline.folder / "leaderboard", _leaderboard_key(pipeline), build, (picture,))
