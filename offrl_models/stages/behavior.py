"""The behavior policy: fitted on train, held against selection; and propensities for splits where none were logged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from offrl_models import bundle, storage
from offrl_models.algorithms import BC, Algorithm, BCConfig
from offrl_models.cloning import fit_clone
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.split import SPLITS
from offrl_models.densities import MixtureDensity, log_density_of
from offrl_models.exporting import export_checked
from offrl_models.mapped import Columns, open_columns
from offrl_models.ope import behavior, density
from offrl_models.ope.estimates import Refit
from offrl_models.ope.units import fold_of
from offrl_models.policies import BehaviorTable, Mixture, probs_of
from offrl_models.progress import progress
from offrl_models.reports import checks, plots
from offrl_models.schema import Episodes
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes, require_unblocked
from offrl_models.storage import Stage
from offrl_models.tensors import read_tensors

LOGGED, ESTIMATED = "logged", "estimated"
CLONE = "behavior policy"  # as a person sees that it is being learned


def propensities_are(pipeline: Pipeline) -> str:
    return LOGGED if pipeline.config.logs.action_prob else ESTIMATED


def _behavior_key(pipeline: Pipeline, made: Stage) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": made.digest,
        "training": None if config.logs.tabular_states else _clone_training(pipeline),
        "seeds": [config.seed, config.seeds],
        "thresholds": config.coverage.model_dump(),
        "calibration": config.behavior.calibration,
        "clone": config.resolved_algorithm("bc") if "bc" in config.algorithms else None,
    }


def current_behavior(pipeline: Pipeline) -> Stage:
    """The behavior policy of the present episodes. Raises InputError when it is of others, or a check blocks it."""
    stage = storage.load_stage(pipeline.folder / "behavior", _behavior_key(pipeline, current_episodes(pipeline)))
    require_unblocked(stage, "behavior policy")
    return stage


def behavior_policy(pipeline: Pipeline) -> Stage:
    """The whole behavior policy, fitted on train and held against the selection split.

    Where no propensities were logged it is calibrated on one half of the selection split and held against the other, and those
    of every evaluated split are estimated on that split.
    """
    config, made = pipeline.config, current_episodes(pipeline)
    continuous, docs = config.logs.action.continuous, pipeline.reports / "behavior"

    def build(folder: Path) -> dict[str, Any]:
        train, held_out = read_episodes(pipeline, "train"), read_episodes(pipeline, "selection")
        tuned_on = None
        if not config.logs.action_prob:
            tuned_on, held_out = behavior.halves(held_out)
        found = (_density if continuous else _probabilities)(pipeline, train, tuned_on, held_out, folder)
        if tuned_on is not None:
            _write_propensities(pipeline, folder)
        title = f"Behavior model, calibration (ECE {found['ece']:.4f})"
        asked = ("P(action below a value)", "share below it") if continuous else ("probability", "share taken")
        plots.reliability(found["reliability"], title, pipeline.reports / "behavior.png", *asked)
        results = checks.check_behavior(found, config.coverage, docs)
        return {
            "kind": _kind(pipeline),
            "propensities": propensities_are(pipeline),
            "calibration": None if config.logs.action_prob else config.behavior.calibration,
            "versions": behavior.version_shares(train, config.logs.policy_version),
            "checks": [result.to_json() for result in results],
            **found,
        }

    pages = (pipeline.reports / "behavior.png", docs / "index.html")
    return storage.build_stage(pipeline.folder / "behavior", _behavior_key(pipeline, made), build, pages)


def _kind(pipeline: Pipeline) -> str:
    if pipeline.config.logs.action.continuous:
        return "behavior cloning, density"
    return "table" if pipeline.config.logs.tabular_states else "behavior cloning"


def _probabilities(
    pipeline: Pipeline, train: Episodes, tuned_on: Episodes | None, held_out: Episodes, folder: Path
) -> dict[str, Any]:
    """Export the policy over discrete actions, and hold it against episodes that it was not fitted on."""
    states, taken = pipeline.config.logs.tabular_states, (np.arange(held_out.n_rows), held_out.action)
    if states is None:
        model: torch.nn.Module = Mixture(_cloned(pipeline, train, CLONE), pipeline.config.seeds)
    elif tuned_on is None:
        model = behavior.fit_table(train, states)
    else:
        model = behavior.estimate_table(train, states, tuned_on)
    if tuned_on is not None:
        model = behavior.calibrated(model, tuned_on, pipeline.config.behavior.calibration)
    probs = export_checked(model, train, folder).on(held_out)
    found = behavior.calibration(held_out, probs)
    if tuned_on is not None:
        return found
    if states is None:
        return found | {"mean_ratios": _learned_ratios(pipeline, train, held_out, probs[taken])}
    # The table is made of logged propensities, and would agree with them whatever they are; counts do not.
    counted = behavior.counted_ratios(train, held_out, states, pipeline.config.logs.policy_version)
    return found | {"mean_ratios": behavior.held_against_logged(counted, least=1.0)}


def _learned_ratios(
    pipeline: Pipeline, train: Episodes, held_out: Episodes, modelled: Float64[np.ndarray, "rows"]
) -> list[dict[str, Any]]:
    """A model that was learned, `modelled` at the logged actions, held against what was logged.

    Where several policies wrote the log another one is learned, which knows whose decision it models: their mixture puts much where
    one of them has nothing.
    """
    column = pipeline.config.logs.policy_version
    names = sorted(behavior.version_shares(train, column))
    if column is not None and len(names) > 1:
        train, held_out = (behavior.version_observed(part, column, names) for part in (train, held_out))
        if not held_out.n_rows:
            return []
        clone = _cloned(pipeline, train, f"{CLONE}, by version", Encoder.fit(train))
        if held_out.bounds is not None:
            modelled = np.exp(
                log_density_of(MixtureDensity(clone, pipeline.config.seeds, len(held_out.bounds)), held_out)
            )
        else:
            probs = probs_of(Mixture(clone, pipeline.config.seeds), held_out)
            modelled = probs[np.arange(held_out.n_rows), held_out.action]
    ratios = behavior.learned_ratios(modelled, held_out, column)
    return behavior.held_against_logged(ratios, least=checks.LEAST_MEAN_RATIO)


def _density(
    pipeline: Pipeline, train: Episodes, tuned_on: Episodes | None, held_out: Episodes, folder: Path
) -> dict[str, Any]:
    """The same over continuous actions."""
    density.require_density(train, pipeline.config.logs.action.dimension_names)
    model = MixtureDensity(_cloned(pipeline, train, CLONE), pipeline.config.seeds, train.action.shape[1])
    if tuned_on is not None:
        model = density.calibrated(model, tuned_on, pipeline.config.behavior.calibration)
    logged = export_checked(model, train, folder).on(held_out)
    found = density.calibration(held_out, model)
    if tuned_on is not None:
        return found
    return found | {"mean_ratios": _learned_ratios(pipeline, train, held_out, logged)}


def _cloned(pipeline: Pipeline, episodes: Episodes, task: str, encoder: Encoder | None = None) -> Algorithm:
    config = pipeline.config
    seeds = range(config.seed, config.seed + config.seeds)
    with progress() as update:
        return fit_clone(
            _clone_config(pipeline), episodes, encoder or encoder_of(pipeline), seeds=seeds, **_clone_training(pipeline),
            report=lambda steps, of, loss: update(task, steps, of, f"policy {loss['policy']:.4f}"),
        )  # fmt: skip


def _clone_training(pipeline: Pipeline) -> dict[str, Any]:
    """As candidates are trained, but in this process, and until nothing is gained; only the best weights of a clone are wanted."""
    return pipeline.config.training.model_dump(exclude={"checkpoints", "processes"})


def _clone_config(pipeline: Pipeline) -> BCConfig:
    """That of the candidate bc, where it is one; of a sweep over bc, that of the first variant."""
    config = pipeline.config.algorithm("bc") if "bc" in pipeline.config.algorithms else None
    return config if isinstance(config, BCConfig) else BCConfig()


def _write_propensities(pipeline: Pipeline, folder: Path) -> None:
    """Estimated propensities of the actions of each split, from that split alone."""
    for name in SPLITS:
        episodes = read_episodes(pipeline, name)
        estimated = _estimated(pipeline, name, episodes)
        with Columns(folder / f"{name}.arrow", {"action_prob": (np.float64, None)}, episodes.n_rows) as file:
            file.fill("action_prob", 0, estimated)


def _estimated(pipeline: Pipeline, name: str, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
    """By counting where the observation is one category; else by behavior clones."""
    states, method = pipeline.config.logs.tabular_states, pipeline.config.behavior.calibration
    if states is not None:
        return behavior.estimate_propensities(episodes, states)

    def clone(fitted_on: Episodes, half: int) -> torch.nn.Module:
        return _cloned(pipeline, fitted_on, f"propensities of {name}, half {half} of 2")

    return cloned_propensities(episodes, clone, pipeline.config.seeds, method)


def cloned_propensities(
    episodes: Episodes, clone: Callable[[Episodes, int], torch.nn.Module], seeds: int, method: str
) -> Float64[np.ndarray, "rows"]:
    """Of the logged actions, by two behavior clones of so many seeds, `clone(episodes, 1)` and `clone(episodes, 2)`: each is
    calibrated and used on the half of the episodes that it was not trained on."""
    found = np.empty(episodes.n_rows)
    fold = fold_of(episodes, 2)
    for half, mine in enumerate((fold == 0, fold == 1), 1):
        other, rows = episodes.take(mine), mine[episodes.episode_of_row]
        cloned = clone(episodes.take(~mine), half)
        if other.bounds is not None:
            model = density.calibrated(MixtureDensity(cloned, seeds, len(other.bounds)), other, method)
            found[rows] = density.floored(np.exp(log_density_of(model, other)))
        else:
            probs = probs_of(behavior.calibrated(Mixture(cloned, seeds), other, method), other)
            found[rows] = np.maximum(probs[np.arange(other.n_rows), other.action], behavior.FLOOR)
    return found


def refit_of(pipeline: Pipeline, episodes: Episodes) -> Refit | None:
    """What estimates the propensities of evaluated episodes again in a bootstrap sample. None where they were logged.

    Those of behavior clones are kept as they are, for no clone can be trained a thousand times.
    """
    states = pipeline.config.logs.tabular_states
    if pipeline.config.logs.action_prob or states is None:
        return None
    return lambda copies: behavior.estimate_propensities(episodes, states, copies)


def read_evaluated(pipeline: Pipeline, *splits: str) -> Episodes:
    """The episodes of some splits with propensities: the logged ones, or those estimated on each split."""
    episodes = read_episodes(pipeline, *splits)
    if pipeline.config.logs.action_prob:
        return episodes
    folder = pipeline.folder / "behavior"
    estimated = [open_columns(folder / f"{split}.arrow")["action_prob"] for split in splits]
    return dataclasses.replace(episodes, action_prob=estimated[0] if len(splits) == 1 else np.concatenate(estimated))


def load_behavior(pipeline: Pipeline, encoder: Encoder) -> torch.nn.Module:
    """The behavior policy as it was exported."""
    tensors, config = read_tensors(pipeline.folder / "behavior" / bundle.WEIGHTS), pipeline.config
    if config.logs.action.continuous:
        clone = BC(_clone_config(pipeline), encoder, config.logs.action.actions, range(config.seeds))
        curves = tensors["curves"].double().numpy()
        found = MixtureDensity(clone, config.seeds, len(curves), curves=curves)
        found.load_state_dict(tensors)
        return found
    estimated = not pipeline.config.logs.action_prob
    prefix = "policy." if estimated else ""
    if f"{prefix}known" in tensors:
        inner: torch.nn.Module = BehaviorTable(tensors[f"{prefix}known"].double().numpy())
    else:
        seeds = range(pipeline.config.seeds)
        inner = Mixture(BC(_clone_config(pipeline), encoder, pipeline.config.logs.action.n_actions, seeds), len(seeds))
    model = inner
    if estimated and "knots" in tensors:
        model = behavior.Monotone(inner, *(tensors[name].double().numpy() for name in ("knots", "levels")))
    elif estimated:
        model = behavior.Warmed(inner)
    model.load_state_dict(tensors)
    return model
