"""One pipeline from raw logs to verdict, in this process, with what happened told to a person.

python -m orchestration.demo icu_sepsis
python -m orchestration.demo open_bandit
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
    "raw_logs_checks": "check what they cover",
    "episodes": "split into episodes",
    "episodes_checks": "check the splits",
    "behavior_policy": "fit the behavior policy",
    "behavior_policy_checks": "check its calibration",
    "candidates": "train the candidates",
    "leaderboard": "rank them on the selection split",
    "shift_report": "compare with the newest batch",
    "shift_report_checks": "check for drift",
    "evidence": "evaluate the ladder on the gate split",
    "evidence_checks": "check overlap and sample sizes",
    "gate": "the gate",
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


@dataclass(frozen=True)
class Outcome:
    """How a run ended: well, refused by the gate (a result, not an error), or with a sentence."""

    refused: bool = False
    error: str | None = None


def outcome(result: dg.ExecuteInProcessResult) -> Outcome:
    if result.success:
        return Outcome()
    for event in result.all_events:
        if event.is_step_failure:
            said = event.step_failure_data.user_failure_data
            if said and said.description:
                return Outcome(error=said.description)
    broken = [
        check
        for check in result.get_asset_check_evaluations()
        if check.blocking and not check.passed and check.severity is dg.AssetCheckSeverity.ERROR  # others only warn
    ]
    if broken and broken[0].check_name != "gate":
        return Outcome(error=f"check {broken[0].check_name} blocks: {broken[0].description}")
    if broken:
        return Outcome(refused=True)
    errors = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    return Outcome(error=errors[0].message.strip() if errors and errors[0] else "the run failed; look at it in the UI.")


def run(pipeline: Pipeline, instance: dg.DagsterInstance, console: Console) -> Outcome:
    """Materialize everything, saying which step begins."""

    @dg.logger
    def steps(_: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("offrl.steps")
        logger.addHandler(StepPrinter(console))
        return logger

    definitions = dg.Definitions.merge(
        OfflineRLPipeline(pipeline).build_defs(), dg.Definitions(loggers={"steps": steps})
    )
    job = definitions.resolve_job_def(pipeline.config.dataset)
    return outcome(
        job.execute_in_process(instance=instance, raise_on_error=False, run_config={"loggers": {"steps": {}}})
    )


def main(arguments: list[str]) -> int:
    console = Console(width=None if sys.stdout.isatty() else 124)
    dataset = arguments[0] if arguments else "icu_sepsis"
    try:
        pipeline = Pipeline(read_pipeline(ROOT / "orchestration" / "defs" / dataset / "defs.yaml"), ROOT)
    except InputError as error:
        console.print("[bold red]Error:[/]", Text(str(error)))
        return 1
    with dg.DagsterInstance.get() as instance:
        ended = run(pipeline, instance, console)
    try:
        return report(pipeline, ended, console)
    except InputError as error:
        console.print("[bold red]Error:[/]", Text(str(error)))
        return 1


def report(pipeline: Pipeline, ended: Outcome, console: Console) -> int:
    """Print the table and where everything lies. Returns the exit status."""
    if ended.error:
        console.print("[bold red]Error:[/]", Text(ended.error))
        return 1
    shown = storage.read_json(pipeline.reports / "evidence.json")
    for table in evidence.tables(shown):
        console.print(table)
    if shown["exact"]:
        console.print(f"* {shown['exact']['note']}; the behavior's is {shown['exact']['values']['behavior']:.4f}.")
    judged = shown["verdict"]
    pointer = registry.champion(pipeline.folder / "policies")
    if ended.refused or pointer is None:
        console.print(
            "[bold yellow]Not released.[/]", f"{judged['status']}: {judged['policy_name']}: {judged['reason']}."
        )
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
