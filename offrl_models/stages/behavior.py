"""The behavior policy: fitted on train, held against selection; and propensities for splits where none were logged."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from offrl_models import bundle, storage
from offrl_models.algorithms import BC, BCConfig
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.exported import export_checked
from offrl_models.mapped import Columns, open_columns
from offrl_models.ope import behavior
from offrl_models.ope.estimates import Refit
from offrl_models.policies import BehaviorTable, Mixture, probs_of
from offrl_models.reports import checks, plots
from offrl_models.schema import Episodes, InputError
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes
from offrl_models.storage import Stage
from offrl_models.tensors import read_tensors
from offrl_models.training import fit

LOGGED, ESTIMATED = "logged", "estimated"


def propensities_are(pipeline: Pipeline) -> str:
    return LOGGED if pipeline.config.logs.action_prob else ESTIMATED


def _behavior_key(pipeline: Pipeline, made: Stage) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": made.digest,
        "training": None if config.logs.tabular_states else config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
        "thresholds": config.coverage.model_dump(),
        "calibration": config.behavior.calibration,
        "clone": config.resolved_algorithm("bc") if "bc" in config.algorithms else None,
    }


def current_behavior(pipeline: Pipeline) -> Stage:
    """The behavior policy of the present episodes. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "behavior", _behavior_key(pipeline, current_episodes(pipeline)))


def behavior_policy(pipeline: Pipeline) -> Stage:
    """The whole behavior policy, fitted on train and held against the selection split.

    Where no propensities were logged it is calibrated on one half of the selection split and held against the other, and those
    of every evaluated split are estimated on that split.
    """
    config, made = pipeline.config, current_episodes(pipeline)
    if config.logs.action.continuous:
        raise InputError(
            f"the action {config.logs.action.name!r} is continuous, and this version has no behavior model for it; "
            "code it as `values` to train on it."
        )
    docs = pipeline.reports / "behavior"

    def build(folder: Path) -> dict[str, Any]:
        train, held_out = read_episodes(pipeline, "train"), read_episodes(pipeline, "selection")
        if config.logs.action_prob:
            model = _model(pipeline, train, held_out)
        else:
            tuned_on, held_out = behavior.halves(held_out)
            inner = _model(pipeline, train, tuned_on)
            model = behavior.calibrated(inner, tuned_on, config.behavior.calibration)
            _write_propensities(pipeline, folder)
        exported = export_checked(model, train, folder)
        found = behavior.calibration(held_out, exported.on(held_out))
        title = f"Behavior model, calibration (ECE {found['ece']:.4f})"
        plots.reliability(found["reliability"], title, pipeline.reports / "behavior.png")
        results = checks.check_behavior(found, config.coverage, docs)
        return {
            "kind": "table" if config.logs.tabular_states else "behavior cloning",
            "propensities": propensities_are(pipeline),
            "calibration": None if config.logs.action_prob else config.behavior.calibration,
            "versions": behavior.version_shares(train, config.logs.policy_version),
            "checks": [result.to_json() for result in results],
            **found,
        }

    pages = (pipeline.reports / "behavior.png", docs / "index.html")
    return storage.build_stage(pipeline.folder / "behavior", _behavior_key(pipeline, made), build, pages)


def _model(pipeline: Pipeline, train: Episodes, tuned_on: Episodes) -> torch.nn.Module:
    states = pipeline.config.logs.tabular_states
    if states is None:
        return _cloned(pipeline, train)
    if pipeline.config.logs.action_prob:
        return behavior.fit_table(train, states)
    return behavior.estimate_table(train, states, tuned_on)


def _cloned(pipeline: Pipeline, episodes: Episodes) -> Mixture:
    config = pipeline.config
    seeds = range(config.seed, config.seed + config.seeds)
    cloned, _ = fit(
        "bc", _clone_config(pipeline), episodes, encoder_of(pipeline), seeds=seeds, **config.training.model_dump()
    )
    return Mixture(cloned, config.seeds)


def _clone_config(pipeline: Pipeline) -> BCConfig:
    """That of the candidate bc, where it is one."""
    config = pipeline.config.algorithm("bc") if "bc" in pipeline.config.algorithms else None
    return config if isinstance(config, BCConfig) else BCConfig()


def _write_propensities(pipeline: Pipeline, folder: Path) -> None:
    """Estimated propensities of the actions of each split that is evaluated on, from that split alone."""
    for name in ("selection", "gate"):
        episodes = read_episodes(pipeline, name)
        estimated = _estimated(pipeline, episodes)
        with Columns(folder / f"{name}.arrow", {"action_prob": (np.float64, None)}, episodes.n_rows) as file:
            file.fill("action_prob", 0, estimated)


def _estimated(pipeline: Pipeline, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
    """By counting where the observation is one category; else by two behavior clones, each calibrated and used on the half
    of the episodes that the other one was trained on."""
    states = pipeline.config.logs.tabular_states
    if states is not None:
        return behavior.estimate_propensities(episodes, states)
    found = np.empty(episodes.n_rows)
    even = np.arange(episodes.n_episodes) % 2 == 0
    for mine in (even, ~even):
        fitted_on, other = episodes.take(~mine), episodes.take(mine)
        clone = _cloned(pipeline, fitted_on)
        model = behavior.calibrated(clone, other, pipeline.config.behavior.calibration)
        found[mine[episodes.episode_of_row]] = probs_of(model, other)[np.arange(other.n_rows), other.action]
    return np.maximum(found, behavior.FLOOR)


def refit_of(pipeline: Pipeline, episodes: Episodes) -> Refit | None:
    """What estimates the propensities of evaluated episodes again in a bootstrap sample. None where they were logged.

    Those of behavior clones are kept as they are, for no clone can be trained a thousand times.
    """
    states = pipeline.config.logs.tabular_states
    if pipeline.config.logs.action_prob or states is None:
        return None
    return lambda copies: behavior.estimate_propensities(episodes, states, copies)


def read_evaluated(pipeline: Pipeline, split: str) -> Episodes:
    """The episodes of a split with propensities: the logged ones, or those estimated on the split."""
    episodes = read_episodes(pipeline, split)
    if pipeline.config.logs.action_prob:
        return episodes
    estimated = open_columns(pipeline.folder / "behavior" / f"{split}.arrow")["action_prob"]
    return dataclasses.replace(episodes, action_prob=estimated)


def load_behavior(pipeline: Pipeline, encoder: Encoder) -> torch.nn.Module:
    """The behavior policy as it was exported."""
    tensors = read_tensors(pipeline.folder / "behavior" / bundle.WEIGHTS)
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
