"""The checks that stand between assets. The library refuses on its own as well; these say so in the UI and stop a run."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg

from offrl_models import stages, storage
from offrl_models.config import Pipeline
from offrl_models.reports.quality import BLOCKING, CHECKS, CheckResult
from orchestration.results import one_sentence, page, plot

PICTURES = {
    "C15": ("overlap.png",),
    "C16": ("behavior.png",),
    "C21": ("cells.png",),
    "C24": ("actions.png", "returns.png"),
}


def check_name(check: str) -> str:
    return f"{check}_{re.sub('[^a-z0-9]+', '_', CHECKS[check].title.lower()).strip('_')}"


def build_checks(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    def key(name: str) -> dg.AssetKey:
        return dg.AssetKey([pipeline.config.dataset, name])

    def of_asset(asset: str, run: Callable[[], tuple[storage.Stage, list[CheckResult]]]) -> dg.AssetChecksDefinition:
        """Every coverage check of one asset, run together."""
        specs = [
            dg.AssetCheckSpec(
                check_name(name),
                asset=key(asset),
                description=check.title,
                blocking=check.severity == BLOCKING
                and asset != "shift_report",  # of a drift the gate says that it is INVALID
            )
            for name, check in CHECKS.items()
            if asset in check.assets
        ]

        @dg.multi_asset_check(name=f"{pipeline.config.dataset}_{asset}_checks", specs=specs)
        def checks() -> Iterator[dg.AssetCheckResult]:
            with one_sentence():
                stage, results = run()
            for result in results:
                shown: dict[str, Any] = {"page": page(pipeline, result.page)}
                shown |= {name: plot(pipeline, name) for name in PICTURES.get(result.check, ())}
                if result.check == "C24":
                    shown |= {name: value for name, value in stage.summary["card"].items() if value is not None}
                yield dg.AssetCheckResult(
                    check_name=check_name(result.check),
                    asset_key=key(asset),
                    passed=result.passed,
                    severity=dg.AssetCheckSeverity.ERROR if result.blocking else dg.AssetCheckSeverity.WARN,
                    description=result.sentence,
                    metadata=shown,
                )

        return checks

    def made_by(folder: str) -> Callable[[], tuple[storage.Stage, list[CheckResult]]]:
        """The checks that a step ran when it made its asset."""

        def run() -> tuple[storage.Stage, list[CheckResult]]:
            stage = storage.load_stage(pipeline.folder / folder)
            return stage, stages.check_results(stage)

        return run

    @dg.asset_check(
        asset=key("evidence"), blocking=True, description="The verdict is PASS; anything else keeps the champion."
    )
    def gate() -> dg.AssetCheckResult:
        with one_sentence():
            judged = storage.load_stage(pipeline.folder / "evidence").summary
        return dg.AssetCheckResult(
            passed=judged["status"] == "PASS",
            severity=dg.AssetCheckSeverity.ERROR,
            description=f"{judged['status']}: {judged['policy_name']}: {judged['reason']}",
            metadata={
                "decided by": judged["decided_by"],
                "certificate": judged["certificate"],
                "lower bound": judged["lower_bound"],
                "page": page(pipeline, "evidence.html"),
            },
        )

    return [
        of_asset("raw_logs", lambda: stages.coverage(pipeline)),
        of_asset("episodes", made_by("episodes")),
        of_asset("behavior_policy", made_by("behavior")),
        of_asset("shift_report", made_by("shift")),
        of_asset("evidence", made_by("evidence")),
        gate,
    ]
