"""Batches that were accepted stay where they are, and those that are refused never vanish without a word."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from offrl_models import storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.logs import ingest as ingestion
from offrl_models.logs.ingest import ingest
from offrl_models.logs.versions import log_version
from offrl_models.schema import InputError
from offrl_models.stages.data import _quarantined
from tests.conftest import attributes, chain_world, write_batches
from tests.test_logs import everything_under, land, new_batch, put


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    write_batches(tmp_path, chain_world().simulate(60, seed=3))
    return under_range(tmp_path, "toy", 1.0)


def under_range(root: Path, dataset: str, largest: float) -> Pipeline:
    """A pipeline over the logs of toy whose rewards may be up to `largest`; they are 0 or 0.3."""
    made = attributes(10, 3, dataset=dataset)
    made["logs"] |= {"reward": {"column": "reward", "range": [0, largest]}}
    return Pipeline(parse_pipeline(made, dataset), root)


def without_rewards(pipeline: Pipeline) -> Path:
    """One batch more, in which nothing is earned, so that it fits a narrower range than the others do."""
    frame = new_batch().with_columns(reward=0.0)
    return land(pipeline, frame, "batch-0.parquet")


@pytest.mark.parametrize("known_by", ["DVC", "another dataset"])
def test_batches_that_were_accepted_elsewhere_are_not_moved(pipeline: Pipeline, known_by: str) -> None:
    without_rewards(pipeline)
    ingest(pipeline.folders, pipeline.config.logs).require_clean()
    narrower = under_range(pipeline.root, "toy", 0.1)
    if known_by == "DVC":  # a fresh clone: its files are the version on record, and no other trace is left
        pipeline.folders.ledger.unlink()
        outs = [{"md5": log_version(pipeline.raw), "path": "raw"}]
        storage.write_json(pipeline.raw.with_suffix(".dvc"), {"outs": outs})
    else:
        narrower = under_range(pipeline.root, "other", 0.1)
    before = everything_under(pipeline.raw)
    with pytest.raises(
        InputError, match="The same contract refuses 2 of 3 batches in data/toy/raw, so nothing was moved"
    ):
        ingest(narrower.folders, narrower.config.logs)
    assert everything_under(pipeline.raw) == before and not narrower.folders.quarantine.exists()


def bad(pipeline: Pipeline) -> Path:
    return land(pipeline, put(new_batch(), "prob", 2.0))


def cut_short(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, name, full)


@pytest.mark.parametrize("at", ["the move", "the reason", "afterwards"])
def test_a_batch_whose_refusal_was_cut_short_is_told_of(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    ingest(pipeline.folders, pipeline.config.logs).require_clean()
    bad(pipeline)
    where, name = {"the move": (storage, "move"), "the reason": (storage, "write_json"),
                   "afterwards": (ingestion, "_write_left_out")}[at]  # fmt: skip
    cut_short(monkeypatch, where, name)
    with pytest.raises(OSError, match="No space left"):
        ingest(pipeline.folders, pipeline.config.logs)
    monkeypatch.undo()
    quarantine = pipeline.folders.quarantine
    assert not (quarantine / "batch-9.parquet").exists() or (quarantine / "batch-9.reason.json").exists()
    told = r"propensity outside \(0, 1\] \(C14\).*; the batch now lies in data/toy/quarantine/batch-9\.parquet\."
    with pytest.raises(InputError, match=told):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()
    (only,) = _quarantined(pipeline)
    assert only["file"] == "data/toy/quarantine/batch-9.reason.json" and "C14" in only["reason"]
    ingest(pipeline.folders, pipeline.config.logs).require_clean()  # once is enough
    assert pl.read_parquet(quarantine / "batch-9.parquet").height == new_batch().height
