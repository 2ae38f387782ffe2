"""When a pipeline runs by itself: weekly, and when a batch lands."""

import hashlib

import dagster as dg

from offrl_models.config import Pipeline
from offrl_models.logs.read import batch_files


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

    @dg.sensor(
        name=f"{dataset}_new_logs",
        job=job,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=f"Runs the pipeline when a batch lands in {pipeline.folders.shown(pipeline.folders.landing)}.",
    )
    def new_logs() -> dg.RunRequest | dg.SkipReason:
        landed = batch_files(pipeline.folders.landing, pipeline.config.logs.format)
        if not landed:
            return dg.SkipReason(f"no batch lies in {pipeline.folders.shown(pipeline.folders.landing)}")
        listing = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in landed])
        return dg.RunRequest(run_key=hashlib.sha256(listing.encode()).hexdigest())

    return dg.Definitions(jobs=[job], schedules=schedules, sensors=[new_logs] if retrain.on_new_logs else [])
