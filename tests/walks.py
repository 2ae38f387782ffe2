"""Walks of whole pipelines under Dagster, headless, and what came of them."""

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import dagster as dg
import pytest
from rich.console import Console

from offrl_models.config import Pipeline
from orchestration import demo
from orchestration.pipeline import OfflineRLPipeline

ROOT = Path(__file__).parent.parent
OF_DAGSTER = [
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),  # sqlite handles of ephemeral Dagster instances
    pytest.mark.filterwarnings("ignore:Parameter `execution_type`"),  # Dagster warns of its own beta code
]


def run(pipeline: Pipeline, *only: str) -> dg.ExecuteInProcessResult:
    """Materialize everything, or some assets alone."""
    job = OfflineRLPipeline(pipeline).build_defs().resolve_job_def(pipeline.config.dataset)
    selection = [dg.AssetKey([pipeline.config.dataset, *name.split("/")]) for name in only] or None
    with dg.DagsterInstance.ephemeral() as instance:
        return job.execute_in_process(instance=instance, raise_on_error=False, asset_selection=selection)


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Step -> sentence."""
    found = {}
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            said = data.user_failure_data.description if data.user_failure_data else None
            found[event.step_key] = said or (data.error.message if data.error else "")
    return found


def made(result: dg.ExecuteInProcessResult) -> set[str]:
    events = result.get_asset_materialization_events()
    return {"/".join(event.asset_key.path[1:]) for event in events if event.asset_key}


def printed(pipeline: Pipeline, result: dg.ExecuteInProcessResult) -> tuple[int, str]:
    """Exit status and text of what the demo says about a run."""
    console = Console(file=io.StringIO(), width=124)
    status = demo.report(pipeline, demo.outcome(result), console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def script(path: Path) -> ModuleType:
    """A script of `data/`, by its path in the repository."""
    spec = importlib.util.spec_from_file_location(path.stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
