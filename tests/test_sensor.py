"""The sensor on new logs asks for a run when there is something to do, and for no run twice."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from offrl_models.config import Pipeline, parse_pipeline
from orchestration import automation
from orchestration.pipeline import OfflineRLPipeline
from tests.conftest import attributes
from tests.walks import OF_DAGSTER

pytestmark = OF_DAGSTER


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def tick(pipeline: Pipeline, instance: dg.DagsterInstance) -> str:
    """The key of the run that the sensor asks for, or why it asks for none."""
    sensor = OfflineRLPipeline(pipeline).build_defs().get_repository_def().get_sensor_def("toy_new_logs")
    found = sensor(dg.build_sensor_context(instance=instance))
    if isinstance(found, dg.SkipReason):
        return f"none: {found.skip_message}"
    assert isinstance(found, dg.RunRequest) and found.run_key
    return found.run_key


def ran(instance: dg.DagsterInstance, key: str, status: dg.DagsterRunStatus) -> None:
    @dg.job(name="toy")
    def walk() -> None: ...

    tags = {automation.RUN_KEY: key} if key else {}
    instance.create_run_for_job(walk, status=status, tags=tags)


def into(folder: Path, pipeline: Pipeline, name: str = "new.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(pipeline.raw / "batch-1.parquet", folder / name))


def test_it_asks_for_one_run_per_landing(toy: Pipeline, instance: dg.DagsterInstance) -> None:
    assert tick(toy, instance) == "none: no batch lies in data/toy/landing"
    into(toy.folders.landing, toy)
    first = tick(toy, instance)
    assert first == tick(toy, instance) and "none" not in first
    into(toy.folders.landing, toy, "newer.parquet")
    assert tick(toy, instance) != first


@pytest.mark.parametrize("landing", ["inbox", "a URL"])
def test_it_looks_where_batches_land(toy: Pipeline, instance: dg.DagsterInstance, landing: str) -> None:
    inbox = toy.root / "inbox"
    inbox.mkdir()
    made = attributes(10, 3)
    made["logs"]["landing"] = f"file://{inbox}" if landing == "a URL" else "inbox"
    pipeline = Pipeline(parse_pipeline(made, "toy"), toy.root)
    assert tick(pipeline, instance).startswith("none: no batch lies in ")
    into(inbox, toy)
    assert not tick(pipeline, instance).startswith("none")
    shutil.rmtree(inbox)
    assert "no such bucket, folder or object" in tick(pipeline, instance)


def test_a_run_that_failed_before_it_took_the_batch_in_is_tried_again(
    toy: Pipeline, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(toy.folders.landing, toy)
    key = tick(toy, instance)
    ran(instance, key, dg.DagsterRunStatus.STARTED)
    assert tick(toy, instance) == key
    ran(instance, key, dg.DagsterRunStatus.FAILURE)
    monkeypatch.setattr(automation.time, "time", lambda: 0.0)
    again = tick(toy, instance)
    assert again == f"{key}-0"
    ran(instance, again, dg.DagsterRunStatus.FAILURE)
    assert tick(toy, instance) == again  # which Dagster has done: not every minute
    monkeypatch.setattr(automation.time, "time", lambda: 3600.0)
    assert tick(toy, instance) == f"{key}-1"
    (toy.raw / "batch-1.parquet").touch()  # someone repaired the logs: at once
    assert not tick(toy, instance).startswith(key)


def test_a_batch_that_was_accepted_beside_a_bad_one_does_not_wait(toy: Pipeline, instance: dg.DagsterInstance) -> None:
    """The bad one fails the run, and nothing lies in the landing folder any more."""
    new = into(toy.folders.landing, toy)
    key = tick(toy, instance)
    shutil.move(new, toy.raw / "new.parquet")
    ran(instance, key, dg.DagsterRunStatus.FAILURE)
    second = tick(toy, instance)
    assert second != key and not second.startswith("none")
    ran(instance, second, dg.DagsterRunStatus.FAILURE)
    assert tick(toy, instance) == second  # once
    ran(instance, "", dg.DagsterRunStatus.FAILURE)  # a person's own run
    assert tick(toy, instance).startswith("none")
