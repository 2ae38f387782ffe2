"""The checks that stand between assets. The library refuses on its own as well; these say so in the UI and stop a run."""

import re
from collections.abc import Iterator

import dagster as dg

from offrl_models import stages, storage
from offrl_models.config import Pipeline
from offrl_models.reports.quality import BLOCKING, SEVERITY, TITLES
from orchestration.results import one_sentence, page, plot


def check_name(check: str) -> str:
    return f"{check}_{re.sub('[^a-z0-9]+', '_', TITLES[check].lower()).strip('_')}"


def build_checks(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    def key(name: str) -> dg.AssetKey:
        return dg.AssetKey([pipeline.config.dataset, name])

    @dg.multi_asset_check(
        name=f"{pipeline.config.dataset}_coverage",
        specs=[
            dg.AssetCheckSpec(
                check_name(check), asset=key("raw_logs"), description=title, blocking=SEVERITY[check] == BLOCKING
            )
            for check, title in TITLES.items()
        ],
    )
    def coverage() -> Iterator[dg.AssetCheckResult]:
        with one_sentence():
            stage, results = stages.coverage(pipeline)
        card = {name: value for name, value in stage.summary["card"].items() if value is not None}
        extra = {
            "C21": {"visits": plot(pipeline, "visits.png")},
            "C24": {**card, "actions": plot(pipeline, "actions.png")},
        }
        for result in results:
            yield dg.AssetCheckResult(
                check_name=check_name(result.check),
                asset_key=key("raw_logs"),
                passed=result.passed,
                severity=dg.AssetCheckSeverity.ERROR if result.blocking else dg.AssetCheckSeverity.WARN,
                description=result.sentence,
                metadata={"page": page(pipeline, result.page), **extra.get(result.check, {})},
            )

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
                "lower bound": judged["lower_bound"],
                "page": page(pipeline, "evidence.html"),
            },
        )

    @dg.asset_check(asset=key("shift_report"), blocking=True, description="The newest batch is like the training logs.")
    def drift() -> dg.AssetCheckResult:
        with one_sentence():
            found = storage.load_stage(pipeline.folder / "shift").summary
        red = found["color"] == "red"
        return dg.AssetCheckResult(
            passed=found["color"] == "green",
            severity=dg.AssetCheckSeverity.ERROR if red else dg.AssetCheckSeverity.WARN,
            description=f"{found['color']}: the largest population stability index is {found['worst']:.3f}",
            metadata={"page": page(pipeline, "shift-logs.html")},
        )

    return [coverage, gate, drift]
