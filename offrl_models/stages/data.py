"""From raw logs to split episodes and the behavior policy."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from offrl_models import bundle, storage
from offrl_models.algorithms import BC, BCConfig
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.logs import coverage as log_coverage
from offrl_models.logs import ingest as log_ingest
from offrl_models.logs.read import batch_files, log_version, read_batches
from offrl_models.ope import behavior
from offrl_models.policies import BehaviorTable, Mixture, export_checked
from offrl_models.reports import plots, quality
from offrl_models.schema import Episodes, InputError
from offrl_models.storage import Stage
from offrl_models.training import fit


def ingest(pipeline: Pipeline) -> log_ingest.Ingested:
    """Take in the batches of the landing folder, and look again at those already accepted."""
    return log_ingest.ingest(pipeline.folders, pipeline.config.logs)


def _coverage_key(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "raw": log_version(pipeline.raw),
        "contract": pipeline.config.logs.model_dump(mode="json"),
        "thresholds": pipeline.config.coverage.model_dump(mode="json"),
    }


def coverage(pipeline: Pipeline) -> tuple[Stage, list[quality.CheckResult]]:
    """Run every coverage check on the accepted log and write Data Docs."""
    config, contract = pipeline.config, pipeline.config.logs
    docs = pipeline.reports / "coverage"

    def build(folder: Path) -> dict[str, Any]:
        log = read_batches(batch_files(pipeline.raw), contract)
        measured = log_coverage.measure(log, contract)
        shutil.rmtree(docs, ignore_errors=True)
        results = quality.check(measured, contract, **config.coverage.model_dump(), docs=docs)
        for name in ("batches", "cells", "propensity"):
            storage.write_parquet(folder / f"{name}.parquet", getattr(measured, name).to_arrow())
        visits = np.log10(measured.cells["visits"].to_numpy())
        plots.histogram(visits, "Visits per state-action cell", "log10 visits", pipeline.reports / "visits.png")
        actions = measured.cells.group_by("action").agg(pl.col("visits").sum()).sort("action")
        share = (actions["visits"] / log.height).to_list()
        labels = [str(a) for a in actions["action"]]
        plots.bars(labels, share, "How often each action was taken", "share of rows", pipeline.reports / "actions.png")
        return {"card": measured.card, "checks": [result.to_json() for result in results]}

    pages = (docs / "index.html", pipeline.reports / "visits.png", pipeline.reports / "actions.png")
    stage = storage.build_stage(pipeline.folder / "coverage", _coverage_key(pipeline), build, pages)
    return stage, [quality.CheckResult(**result) for result in stage.summary["checks"]]


def _episodes_key(pipeline: Pipeline, version: str) -> dict[str, Any]:
    return {"raw": version, "contract": pipeline.config.logs.model_dump(mode="json"), "salt": pipeline.config.salt}


def current_episodes(pipeline: Pipeline) -> Stage:
    """The episodes of the accepted log under the present contract. Raises InputError when they are of another one."""
    return storage.load_stage(pipeline.folder / "episodes", _episodes_key(pipeline, log_version(pipeline.raw)))


def episodes(pipeline: Pipeline) -> Stage:
    """Split the accepted log by entity into train, selection and gate. Raises InputError unless its coverage checks hold."""
    config, contract, version = pipeline.config, pipeline.config.logs, log_version(pipeline.raw)
    checked = storage.load_stage(pipeline.folder / "coverage", _coverage_key(pipeline))
    for result in checked.summary["checks"]:
        if result["blocking"] and not result["passed"]:
            raise InputError(f"check {result['check']} blocks the log: {result['sentence']}")

    def build(folder: Path) -> dict[str, Any]:
        log = read_batches(batch_files(pipeline.raw), contract)
        counts = write_splits(log, contract, config.salt, folder)
        # Part of the digest: what the columns mean, and gamma with it, is part of what later steps depend on.
        storage.write_json(
            folder / "contract.json", {"contract": contract.model_dump(mode="json"), "salt": config.salt}
        )
        train = read_splits(folder, "train", salt=config.salt, gamma=contract.gamma)
        plots.histogram(
            train.length, "Length of the training episodes", "steps", pipeline.reports / "lengths.png", log=True
        )
        return {
            "splits": counts,
            "raw": version,
            "mean_return": float(train.return_.mean()),
            "truncated_episodes": int(train.truncated.sum()),
        }

    return storage.build_stage(
        pipeline.folder / "episodes", _episodes_key(pipeline, version), build, (pipeline.reports / "lengths.png",)
    )


def read_episodes(pipeline: Pipeline, *splits: str) -> Episodes:
    return read_splits(
        pipeline.folder / "episodes", *splits, salt=pipeline.config.salt, gamma=pipeline.config.logs.gamma
    )


def encoder_of(pipeline: Pipeline, train: Episodes) -> Encoder:
    return Encoder.fit(pipeline.config.logs, train)


def _behavior_key(pipeline: Pipeline, made: Stage) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": made.digest,
        "training": None if config.logs.tabular_states else config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
    }


def current_behavior(pipeline: Pipeline) -> Stage:
    """The behavior policy of the present episodes. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "behavior", _behavior_key(pipeline, current_episodes(pipeline)))


def behavior_policy(pipeline: Pipeline) -> Stage:
    """The whole behavior policy, fitted on train and held against the selection split."""
    config, made = pipeline.config, current_episodes(pipeline)
    states = config.logs.tabular_states

    def build(folder: Path) -> dict[str, Any]:
        train = read_episodes(pipeline, "train")
        if states is not None:
            model: torch.nn.Module = behavior.fit_table(train, states)
        else:
            encoder = encoder_of(pipeline, train)
            seeds = range(config.seed, config.seed + config.seeds)
            cloned, _ = fit("bc", BCConfig(), train, encoder, seeds=seeds, **config.training.model_dump())
            model = Mixture(cloned, config.seeds)
        exported = export_checked(model, train, folder)
        held_out = read_episodes(pipeline, "selection")
        found = behavior.calibration(held_out, exported.on(held_out))
        plots.reliability(found["reliability"], found["ece"], pipeline.reports / "behavior.png")
        return {"kind": "table of logged propensities" if states else "behavior cloning", **found}

    return storage.build_stage(
        pipeline.folder / "behavior", _behavior_key(pipeline, made), build, (pipeline.reports / "behavior.png",)
    )


def load_behavior(pipeline: Pipeline, encoder: Encoder) -> torch.nn.Module:
    tensors = storage.read_tensors(pipeline.folder / "behavior" / bundle.WEIGHTS)
    if "known" in tensors:
        return BehaviorTable(tensors["known"].double().numpy())
    seeds = range(pipeline.config.seeds)
    model = Mixture(BC(BCConfig(), encoder, pipeline.config.logs.action.values, seeds), len(seeds))
    model.load_state_dict(tensors)
    return model
