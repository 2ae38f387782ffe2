"""One pipeline from raw logs to verdict, in this process, with what happened told to a person.

python -m orchestration.demo icu_sepsis
"""

import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.text import Text

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


class StepPrinter(logging.Handler):
    """Says which step begins."""

    def __init__(self, console: Console):
        super().__init__()
        self.console, self.started = console, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "dagster_meta", {}).get("dagster_event")
        if event is not None and event.event_type_value == "STEP_START":
            what = next((what for name, what in STEPS.items() if event.step_key.endswith(f"_{name}")), event.step_key)
            elapsed = time.monotonic() - self.started
            self.console.print(f"[dim]{elapsed:5.0f} s[/]  {what}", highlight=False)


def run(pipeline: Pipeline, instance: dg.DagsterInstance, console: Console) -> str | None:
    """Materialize everything. Returns the sentence of the step that failed, if one did."""

    @dg.logger
    def steps(_: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("offrl.steps")
        logger.addHandler(StepPrinter(console))
        return logger

    definitions = dg.Definitions.merge(
        OfflineRLPipeline(pipeline).build_defs(), dg.Definitions(loggers={"steps": steps})
    )
    job = definitions.resolve_job_def(pipeline.config.dataset)
    result = job.execute_in_process(instance=instance, raise_on_error=False, run_config={"loggers": {"steps": {}}})
    if result.success:
        return None
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return data.user_failure_data.description
            if data.error:
                return data.error.message.strip()
    return "the run failed; look at it in the UI."


def main(arguments: list[str]) -> int:
    console = Console(width=None if sys.stdout.isatty() else 124)
    dataset = arguments[0] if arguments else "icu_sepsis"
    try:
        pipeline = Pipeline(read_pipeline(ROOT / "orchestration" / "defs" / dataset / "defs.yaml"), ROOT)
    except InputError as error:
        console.print("[bold red]Error:[/]", Text(str(error)))
        return 1
    with dg.DagsterInstance.get() as instance:
        failure = run(pipeline, instance, console)
    return report(pipeline, failure, console)


def report(pipeline: Pipeline, failure: str | None, console: Console) -> int:
    """Print the table and where everything lies. A refusal by the gate is a result, any other failure an error."""
    judged: dict[str, Any] = {"status": "", "reason": ""}
    with contextlib.suppress(InputError):
        judged = storage.load_stage(pipeline.folder / "evidence").summary
    refused = failure is not None and judged["status"] not in ("", "PASS") and judged["reason"] in failure
    if failure is not None and not refused:
        console.print("[bold red]Error:[/]", Text(failure))
        return 1
    shown = storage.read_json(pipeline.reports / "evidence.json")
    for table in evidence.tables(shown):
        console.print(table)
    if shown["exact"]:
        console.print(f"* {shown['exact']['note']}; the behavior's is {shown['exact']['values']['behavior']:.4f}.")
    pointer = registry.champion(pipeline.folder / "policies")
    if refused or pointer is None:
        console.print(f"[bold yellow]Not released.[/] {judged['status']}: {judged['policy_name']}: {judged['reason']}.")
    else:
        folder = pipeline.folders.shown(pipeline.folder / "policies" / str(pointer["version"]))
        console.print(f"[bold green]Released[/] {judged['policy_name']} as version {pointer['version']}: {folder}")
    console.print(
        f"Reports: {pipeline.folders.shown(pipeline.reports)} (evidence.html, coverage/index.html, shift-*.html)"
    )
    console.print("Look around: make ui, then open http://127.0.0.1:3000")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
