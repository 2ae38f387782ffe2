"""Coverage checks as a Great Expectations suite over small derived tables, with Data Docs.

The measures are computed elsewhere, once, whatever the number of rows; expectations assert on them, so the suite costs the
same for any log.
"""

import os

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import importlib
import logging
import re
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from offrl_models import storage
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import FEW_VISITS, Coverage, rules

TITLES = {
    "C01": "schema equals the contract",
    "C03": "episode and step are unique",
    "C04": "steps run 0, 1, 2, ... without gaps",
    "C05": "exactly one of terminated and truncated, on the last row only",
    "C07": "the next observation is what was observed next",
    "C10": "nothing is missing, NaN or infinite",
    "C11": "categories lie within the contract",
    "C12": "rewards lie within their range and vary",
    "C13": "actions are in the action set and allowed by their mask",
    "C14": "propensities lie in (0, 1]",
    "C15": "mean importance ratios are 1",
    "C21": f"few state-action cells have under {FEW_VISITS} visits",
    "C24": "dataset card",
    "C27": "an episode belongs to one entity",
}
BLOCKING, WARNING, INFO = "critical", "warning", "info"
SEVERITY = {name: BLOCKING for name in TITLES} | {"C21": INFO, "C24": INFO}


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e2e8f0; }
img { max-width: 48%; } .ok { color: #2f855a; } .no { color: #c53030; } .warn { color: #b7791f; }
.col-lg-2, .navbar, .modal { display: none; } .text-success { color: #2f855a; } .text-danger { color: #c53030; }
.fa-check-circle::before { content: "✓"; } .fa-times::before { content: "✗"; } .fa-exclamation-triangle::before { content: "!"; }
"""
INDEX = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Coverage checks</title>
<style>{{ style | safe }}</style></head><body><h1>Coverage checks</h1>
<table><tr><th>check</th><th></th><th>finding</th><th>details</th></tr>
{% for r in results %}<tr><td>{{ r.check }}</td>
<td>{% if r.passed %}<b class="ok">holds</b>{% elif r.blocking %}<b class="no">blocks</b>{% else %}<b class="warn">warns</b>
{% endif %}</td><td>{{ r.title if r.passed else r.sentence }}</td>
<td><a href="{{ r.page.removeprefix(prefix) }}">expectations</a></td></tr>{% endfor %}</table>
<h2>Dataset card</h2><table>{% for name, value in card.items() %}<tr><td>{{ name.replace("_", " ") }}</td>
<td>{{ "{:,}".format(value) if value is integer else "%.4g" | format(value) }}</td></tr>{% endfor %}</table>
<p><img src="../visits.png" alt="Visits per state-action cell"> <img src="../actions.png" alt="Action frequencies"></p>
</body></html>
"""
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, for an asset check and for a person."""

    check: str
    title: str
    passed: bool
    blocking: bool
    sentence: str
    page: str  # relative to the reports folder

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _frames(coverage: Coverage, contract: Contract) -> dict[str, pl.DataFrame]:
    cells = coverage.cells
    thin = cells.filter(pl.col("visits") < FEW_VISITS).height / cells.height
    card = pl.DataFrame([{**coverage.card, "share_of_thin_cells": thin, "cells": cells.height}])
    columns = [{"column": name, "kind": kind, "matches": True} for name, kind in contract.columns().items()]
    return {
        "schema": pl.DataFrame(columns),  # a batch that does not match is refused when it is read
        "batches": coverage.batches,
        "propensity": coverage.propensity,
        "cells": cells,
        "card": card,
    }


def check(
    coverage: Coverage, contract: Contract, *, propensity_z: float, few_visits_share: float, docs: Path
) -> list[CheckResult]:
    """Run the suite, write Data Docs into `docs`, and return one result per check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Great Expectations and its own dependencies
        return _check(coverage, contract, propensity_z, few_visits_share, docs)


def _check(
    coverage: Coverage, contract: Contract, propensity_z: float, few_visits_share: float, docs: Path
) -> list[CheckResult]:
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import ProgressBarsConfig

    gxe: Any = importlib.import_module("great_expectations.expectations")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    frames = _frames(coverage, contract)

    def between(name: str, column: str, low: float | None, high: float | None, severity: str) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(
            column=column, min_value=low, max_value=high, severity=severity, meta={"check": name}
        )

    expectations: dict[str, list[Any]] = {
        "schema": [
            gxe.ExpectColumnValuesToBeInSet(
                column="matches", value_set=[True], severity=BLOCKING, meta={"check": "C01"}
            )
        ],
        "batches": [between(rule.check, rule.name, 0, 0, BLOCKING) for rule in rules(contract)],
        "propensity": [between("C15", "z", -propensity_z, propensity_z, BLOCKING)],
        "cells": [between("C21", "visits", 1, None, INFO)],
        "card": [
            between("C12", "reward_distinct_values", 2, None, WARNING),
            between("C21", "share_of_thin_cells", 0, few_visits_share, INFO),
            between("C24", "episodes", 1, None, INFO),
        ],
    }
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    context.add_data_docs_site(
        "coverage",
        {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        },
    )
    source = context.data_sources.add_pandas("offrl")
    now = datetime.now(UTC)
    run = RunIdentifier(run_name=now.strftime("%Y%m%dT%H%M%SZ"), run_time=now)
    outcome: dict[str, list[tuple[bool, str, str]]] = {name: [] for name in TITLES}
    for name, frame in frames.items():
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations[name]))
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name=name,
                validation_definitions=[definition],
                result_format="SUMMARY",
                actions=[UpdateDataDocsAction(name="docs", site_names=["coverage"])],
            )
        )
        result = checkpoint.run(batch_parameters={"dataframe": frame.to_pandas()}, run_id=run)
        stamp = now.strftime("%Y%m%dT%H%M%S.%fZ")
        page = f"{docs.name}/validations/{name}/{run.run_name}/{stamp}/offrl-{name}.html"
        for validation in result.run_results.values():
            for one in validation.results:
                config: Any = one.expectation_config
                column = config.kwargs["column"]
                failed = str(one.exception_info.get("exception_message", "")) if one.exception_info else ""
                outcome[config.meta["check"]].append((bool(one.success), f"{name}.{column} {failed}".strip(), page))
    for file in docs.rglob("*.html"):
        storage.write_bytes(file, self_contained(file.read_text()).encode())
    results = [_result(name, found, coverage) for name, found in outcome.items() if found]
    page = INDEX.render(results=results, card=coverage.card, prefix=f"{docs.name}/", style=STYLE)
    storage.write_bytes(docs / "index.html", page.encode())
    return results


def self_contained(page: str) -> str:
    """A Data Docs page without anything fetched from elsewhere: it works, and stays private, with no network."""
    page = re.sub(r"<script[^>]*\ssrc=.https?:.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"<link[^>]*https?:[^>]*>", "", page, flags=re.DOTALL)
    page = re.sub(r"<img[^>]*https?:[^>]*>", "", page, flags=re.DOTALL)
    page = re.sub(r"<footer.*?</footer>", "", page, flags=re.DOTALL)
    page = re.sub(r"url\('https?:[^)]*\)", "none", page)
    return page.replace("</head>", f"<style>{STYLE}</style></head>", 1)


def _result(check: str, found: list[tuple[bool, str, str]], coverage: Coverage) -> CheckResult:
    """One check from all its expectations; row-level ones say how many rows of how many batches."""
    broken = [(what, page) for success, what, page in found if not success]
    page = (broken or [(found[0][1], found[0][2])])[0][1]
    if not broken:
        return CheckResult(check, TITLES[check], True, SEVERITY[check] == BLOCKING, f"holds: {TITLES[check]}", page)
    mine = [violation for violation in coverage.violations if violation.check == check]
    if mine:
        rows, batches = sum(v.rows for v in mine), len({v.batch for v in mine})
        sentence = f"column {mine[0].column!r}: {rows} rows of {batches} batches, {mine[0].problem}; {mine[0].remedy}"
    elif check == "C15":
        worst = coverage.propensity.sort(pl.col("z").abs(), descending=True).row(0, named=True)
        sentence = (
            f"the mean ratio of policy '{worst['policy']}' has z = {worst['z']:.1f} over {worst['rows']} rows: "
            "the logged propensities are not those with which actions were drawn"
        )
    else:
        sentence = f"does not hold: {TITLES[check]} ({', '.join(what for what, _ in broken)})"
    blocking = SEVERITY[check] == BLOCKING and not (check == "C12" and not mine)
    return CheckResult(check, TITLES[check], False, blocking, sentence, page)
