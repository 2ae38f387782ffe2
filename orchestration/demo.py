"""One pipeline from raw logs to verdict, in this process, with what happened told to a person.

    python -m orchestration.demo icu_sepsis
"""

import sys
from pathlib import Path

import dagster as dg
from rich.console import Console

from offrl_models import registry, storage
from offrl_models.config import Pipeline, read_pipeline
from offrl_models.reports import evidence
from offrl_models.schema import InputError
from orchestration.pipeline import OfflineRLPipeline

ROOT = Path(__file__).parent.parent
STEPS = {
    "raw_logs": "take in new batches",
    "coverage": "check coverage",
    "episodes": "split into episodes",
    "behavior_policy": "fit the behavior policy",
    "candidates": "train the candidates",
    "leaderboard": "rank them on the selection split",
    "evidence": "evaluate the ladder on the gate split",
    "gate": "the gate",
    "shift_report": "compare with the newest batch",
    "drift": "drift",
    "policy": "release",
}


def run(pipeline: Pipeline, instance: dg.DagsterInstance, console: Console) -> str | None:
    """Materialize everything. Returns the sentence of the step that failed, if one did."""
    definitions = OfflineRLPipeline(pipeline).build_defs()
    job = definitions.resolve_job_def(pipeline.config.dataset)
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    failure = None
    result = job.execute_in_process(instance=instance, raise_on_error=False, run_config=quiet)
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            said = event.step_failure_data.user_failure_data
            failure = failure or (said.description if said and said.description else error.message if error else None)
    return None if result.success else failure or "the run failed; look at it in the UI."


def main(arguments: list[str]) -> int:
    console = Console()
    dataset = arguments[0] if arguments else "icu_sepsis"
    try:
        pipeline = Pipeline(read_pipeline(ROOT / "orchestration" / "defs" / dataset / "defs.yaml"), ROOT)
    except InputError as error:
        console.print(f"[bold red]Error:[/] {error}", highlight=False)
        return 1
    with dg.DagsterInstance.get() as instance:
        failure = run(pipeline, instance, console)
    return report(pipeline, failure, console)


def report(pipeline: Pipeline, failure: str | None, console: Console) -> int:
    """Print the table and where everything lies. A refusal by the gate is a result, any other failure an error."""
    judged = None
    try:
        judged = storage.load_stage(pipeline.folder / "evidence").summary
    except InputError:
        pass
    refused = failure is not None and judged is not None and judged["status"] != "PASS" and judged["reason"] in failure
    if failure is not None and not refused:
        console.print(f"[bold red]Error:[/] {failure}", highlight=False)
        return 1
    shown = storage.read_json(pipeline.reports / "evidence.json")
    for table in evidence.tables(shown):
        console.print(table)
    if shown["exact"]:
        console.print(f"* {shown['exact']['note']}; the behavior's is {shown['exact']['values']['behavior']:.4f}.")
    if refused:
        console.print(f"[bold yellow]Not released.[/] {judged['status']}: {judged['policy_name']}: {judged['reason']}.")
    else:
        pointer = registry.champion(pipeline.folder / "policies")
        folder = pipeline.folders.shown(pipeline.folder / "policies" / str(pointer["version"]))
        console.print(f"[bold green]Released[/] {judged['policy_name']} as version {pointer['version']}: {folder}")
    console.print(f"Reports: {pipeline.folders.shown(pipeline.reports)} (evidence.html, coverage/index.html, shift-*.html)")
    console.print("Look around: make ui, then open http://127.0.0.1:3000")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
