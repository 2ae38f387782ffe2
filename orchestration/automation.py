"""When a pipeline runs by itself: weekly, and when a batch lands."""

import hashlib
import time
from typing import Any

import dagster as dg

from offrl_models.config import Pipeline
from offrl_models.logs.landing import landed, without_secrets
from offrl_models.logs.read import batch_files
from offrl_models.schema import InputError

RETRY_S = 3600  # after which a run that failed before it took the batch in is tried again
RUN_KEY = "dagster/run_key"  # the tag under which Dagster keeps it


def build_automation(pipeline: Pipeline) -> dg.Definitions:
    dataset, retrain = pipeline.config.dataset, pipeline.config.retrain
    job = dg.define_asset_job(
        dataset,
        selection=dg.AssetSelection.groups(dataset),
        description=f"The whole walk of {dataset}: raw logs to policy. Steps whose inputs have not changed are re-used.",
    )
    schedules = []
    if retrain.cron:
        schedules.append(dg.ScheduleDefinition(name=f"{dataset}_weekly", job=job, cron_schedule=retrain.cron))
    where = without_secrets(pipeline.config.logs.landing or "") or pipeline.folders.shown(pipeline.folders.landing)

    @dg.sensor(
        name=f"{dataset}_new_logs",
        job=job,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=f"Runs the pipeline when a batch lands in {where}, and once more where that failed and the logs have changed.",
    )
    def new_logs(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            batches = landed(pipeline.folders, pipeline.config.logs)
        except InputError as error:
            return dg.SkipReason(str(error))
        failed = _failed_key(context.instance, dataset)
        if not batches and failed is None:
            return dg.SkipReason(f"no batch lies in {where}")
        raw = [(path.name, path.stat().st_mtime_ns) for path in batch_files(pipeline.raw, pipeline.config.logs.format)]
        key = hashlib.sha256(repr((sorted(batches.items()), raw)).encode()).hexdigest()
        if batches and failed and failed.startswith(key):
            key = f"{key}-{int(time.time() // RETRY_S)}"
        return dg.RunRequest(run_key=key)

    return dg.Definitions(jobs=[job], schedules=schedules, sensors=[new_logs] if retrain.on_new_logs else [])


def _failed_key(instance: Any, job: str) -> str | None:
    """The key of the last run of a job, where the sensor asked for it and it failed."""
    last = next(iter(instance.get_runs(filters=dg.RunsFilter(job_name=job), limit=1)), None)
    return last.tags.get(RUN_KEY) if last and last.status is dg.DagsterRunStatus.FAILURE else None
