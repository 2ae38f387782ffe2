"""From raw logs to split episodes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from offrl_models import ledger, storage
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import MOMENTS, read_splits, write_splits
from offrl_models.datasets.leakage import split_tables
from offrl_models.logs import coverage as log_coverage
from offrl_models.logs import ingest as log_ingest
from offrl_models.logs.read import Log, batch_files
from offrl_models.logs.versions import log_version
from offrl_models.reports import checks, overview, plots
from offrl_models.reports.quality import CheckResult
from offrl_models.schema import Episodes, InputError
from offrl_models.storage import Stage


def ingest(pipeline: Pipeline) -> log_ingest.Ingested:
    """Take in the batches of the landing folder, and look again at those already accepted."""
    return log_ingest.ingest(pipeline.folders, pipeline.config.logs)


def read_log(pipeline: Pipeline) -> Log:
    """The accepted log."""
    contract = pipeline.config.logs
    return Log.open(batch_files(pipeline.raw, contract.format), contract)


def _coverage_key(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "raw": log_version(pipeline.raw),
        "contract": pipeline.config.logs.model_dump(mode="json"),
        "thresholds": pipeline.config.coverage.model_dump(mode="json"),
    }


def coverage(pipeline: Pipeline) -> tuple[Stage, list[CheckResult]]:
    """Run every coverage check on the accepted log; write Data Docs and the page that is read first."""
    config, contract = pipeline.config, pipeline.config.logs
    docs = pipeline.reports / "coverage"

    def build(folder: Path) -> dict[str, Any]:
        log = read_log(pipeline)
        measured = log_coverage.measure(log, config.seed)
        results = checks.check_logs(measured, contract, config.coverage, _files(pipeline), docs)
        for name in ("batches", "cells", "propensity", "actions"):
            storage.write_parquet(folder / f"{name}.parquet", getattr(measured, name).to_arrow())
        problems = [
            {**asdict(violation), "file": pipeline.folders.shown(log.batches[violation.batch].path)}
            for violation in measured.violations
        ]
        overview.write(config.dataset, measured, results, problems, _quarantined(pipeline), pipeline.reports, docs)
        return {"card": measured.card, "checks": [result.to_json() for result in results]}

    pages = (docs / "index.html", pipeline.reports / "returns.png")
    stage = storage.build_stage(pipeline.folder / "coverage", _coverage_key(pipeline), build, pages)
    return stage, check_results(stage)


def check_results(stage: Stage) -> list[CheckResult]:
    """The checks that a stage ran."""
    return [CheckResult(**result) for result in stage.summary["checks"]]


def require_unblocked(stage: Stage, of: str) -> None:
    """Raises InputError when a check that blocks did not pass."""
    for result in check_results(stage):
        if result.blocking and not result.passed:
            raise InputError(f"check {result.check} blocks the {of}: {result.sentence}")


def _files(pipeline: Pipeline) -> pl.DataFrame:
    """Every batch, and whether it is the file that was accepted (C02); of those that are gone, that they are not."""
    ledger = storage.read_json(pipeline.folders.ledger) if pipeline.folders.ledger.exists() else {}
    batches = batch_files(pipeline.raw, pipeline.config.logs.format)
    return pl.DataFrame(
        [
            {"file": pipeline.folders.shown(path), "unchanged": int(ledger.get(path.name) == storage.sha256_tree(path))}
            for path in batches
        ]
        + [
            {"file": pipeline.folders.shown(pipeline.raw / name), "unchanged": 0}
            for name in ledger
            if not (pipeline.raw / name).exists()
        ]
    )


def _quarantined(pipeline: Pipeline) -> list[dict[str, str]]:
    """Every batch in quarantine, and why."""
    return [
        {"file": pipeline.folders.shown(path), "reason": storage.read_json(path)["reason"]}
        for path in sorted(pipeline.folders.quarantine.glob("*.reason.json"))
    ]


def _episodes_key(pipeline: Pipeline, version: str) -> dict[str, Any]:
    contract, thresholds = (part.model_dump(mode="json") for part in (pipeline.config.logs, pipeline.config.coverage))
    return {"raw": version, "contract": contract, "salt": pipeline.config.salt, "thresholds": thresholds}


def current_episodes(pipeline: Pipeline) -> Stage:
    """The episodes of the accepted log under the present contract.

    Raises InputError when they are of another one, and unless the checks of the log and of its splits hold at the present
    thresholds.
    """
    covered = _coverage_key(pipeline)
    require_unblocked(storage.load_stage(pipeline.folder / "coverage", covered), "log")
    stage = storage.load_stage(pipeline.folder / "episodes", _episodes_key(pipeline, covered["raw"]))
    require_unblocked(stage, "log")
    return stage


def episodes(pipeline: Pipeline) -> Stage:
    """Split the accepted log by entity into train, selection and gate. Raises InputError unless its coverage checks hold."""
    config, contract, version = pipeline.config, pipeline.config.logs, log_version(pipeline.raw)
    ledger.require_split(pipeline.ledger, config.split_by)
    require_unblocked(storage.load_stage(pipeline.folder / "coverage", _coverage_key(pipeline)), "log")

    def build(folder: Path) -> dict[str, Any]:
        counts = write_splits(read_log(pipeline), config.salt, folder)
        # Part of the digest: what the columns mean, and gamma with it, is part of what later steps depend on.
        storage.write_json(
            folder / "contract.json", {"contract": contract.model_dump(mode="json"), "salt": config.salt}
        )
        train = read_splits(folder, "train", salt=config.salt, contract=contract)
        picture = pipeline.reports / "train-lengths.png"
        plots.histogram(train.length, "Length of the training episodes", "steps", picture, log=True)
        parts = {name: read_splits(folder, name, salt=config.salt, contract=contract) for name in counts}
        tables = split_tables(parts, config.seed)
        results = checks.check_splits(tables, config.coverage, docs)
        return {
            "splits": counts,
            "raw": version,
            "mean_return": float(train.return_.mean()),
            "truncated_episodes": int(train.truncated.sum()),
            "checks": [result.to_json() for result in results],
        }

    docs = pipeline.reports / "splits"
    pages = (pipeline.reports / "train-lengths.png", docs / "index.html")
    return storage.build_stage(pipeline.folder / "episodes", _episodes_key(pipeline, version), build, pages)


def read_episodes(pipeline: Pipeline, *splits: str) -> Episodes:
    return read_splits(pipeline.folder / "episodes", *splits, salt=pipeline.config.salt, contract=pipeline.config.logs)


def encoder_of(pipeline: Pipeline) -> Encoder:
    """The encoder of the train split, whose moments were found while it was written."""
    moments = storage.read_json(pipeline.folder / "episodes" / MOMENTS)
    return Encoder.from_moments(pipeline.config.logs.features, moments)
