"""Coverage checks as Great Expectations suites over small derived tables, with Data Docs.

The measures are computed elsewhere, once, whatever the number of rows; expectations assert on them, so a suite costs the
same for any log.
"""

import os

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import importlib
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from offrl_models import storage
from offrl_models.logs.coverage import FEW_VISITS

BLOCKING, WARNING, INFO = "critical", "warning", "info"
ABSENT = "not applicable: "  # how the sentence of a check begins that a log gives nothing to assert on


@dataclass(frozen=True)
class Check:
    """One of the coverage checks."""

    title: str
    severity: str
    assets: tuple[str, ...] = ("raw_logs",)


CHECKS = {
    "C01": Check("schema equals the contract", BLOCKING),
    "C02": Check("files are those that were accepted", BLOCKING),
    "C03": Check("episode and step are unique", BLOCKING),
    "C04": Check("steps run 0, 1, 2, ... without gaps", BLOCKING),
    "C05": Check("terminated or truncated on the last row only, and not both", BLOCKING),
    "C06": Check("few episodes are open", BLOCKING),
    "C07": Check("the next observation is what was observed next", BLOCKING),
    "C08": Check("time does not run backwards, nor past the ingestion clock", BLOCKING),
    "C09": Check("no feature gives the last reward away", BLOCKING),
    "C10": Check("nothing is missing, NaN or infinite", BLOCKING),
    "C11": Check("values lie within the contract, few are outliers", BLOCKING),
    "C12": Check("rewards lie within their range and vary", BLOCKING),
    "C13": Check("actions are in the action set and allowed by their mask", BLOCKING),
    "C14": Check("propensities are probabilities", BLOCKING),
    "C15": Check("mean importance ratios are 1", BLOCKING, ("raw_logs", "behavior_policy")),
    "C16": Check("the behavior model is calibrated", WARNING, ("behavior_policy",)),
    "C17": Check("every row names a known policy version", BLOCKING),
    "C18": Check("something was tried out", WARNING),
    "C19": Check("the candidate keeps to what the behavior plays", BLOCKING, ("evidence",)),
    "C20": Check("enough effective transitions", BLOCKING, ("evidence",)),
    "C21": Check(f"few state-action cells have under {FEW_VISITS} visits", INFO),
    "C22": Check("state-action ratios are moderate", WARNING, ("evidence",)),
    "C23": Check("dataset quality", INFO),
    "C24": Check("dataset card", INFO),
    "C25": Check("the newest batch is like the training logs", BLOCKING, ("shift_report",)),
    "C26": Check("gate states lie inside the training support", WARNING, ("episodes",)),
    "C27": Check("an episode has one entity, an entity one split", BLOCKING, ("raw_logs", "episodes")),
    "C28": Check("few episodes occur again in another split", WARNING, ("episodes",)),
    "C29": Check("no sign of hidden confounding", WARNING),
    "C30": Check("the observation is a Markov state", WARNING),
    "C31": Check("rewards arrive within their window", BLOCKING),
    "C32": Check("clocks agree", WARNING),
    "C33": Check("the volume per day is steady", WARNING),
    "C34": Check("served logs are an unbroken chain", BLOCKING),
    "C35": Check("the verdict survives without its most influential episodes", BLOCKING, ("evidence",)),
    "C36": Check("subgroups are large enough", WARNING),
}


@dataclass(frozen=True)
class Expected:
    """Every value of a column of a table lies between two bounds."""

    check: str
    table: str
    column: str
    low: float | None
    high: float | None
    severity: str
    say: str  # what is wrong, from the columns of the worst row


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, for an asset check and for a person."""

    check: str
    title: str
    passed: bool
    blocking: bool
    sentence: str
    page: str  # relative to the reports folder

    @property
    def applies(self) -> bool:
        return not self.sentence.startswith(ABSENT)

    @property
    def standing(self) -> str:
        """What came of it, in a word or two."""
        if self.passed:
            return "holds" if self.applies else "not applicable"
        return "BLOCKS" if self.blocking else "notes" if CHECKS[self.check].severity == INFO else "warns"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_suites(
    tables: Mapping[str, pl.DataFrame],
    expected: Sequence[Expected],
    docs: Path,
    *,
    asset: str,
    absent: Mapping[str, str],
    said: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Assert on every table, write Data Docs into `docs`, and return one result per check of the asset.

    `absent` says of checks that nothing could be asserted, and why; `said` replaces sentences of checks that failed.
    Raises RuntimeError when a check of the asset is neither asserted nor absent.
    """
    shutil.rmtree(docs, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Great Expectations and its own dependencies
        outcome = _assert(tables, expected, docs)
    results = []
    for name, check in CHECKS.items():
        if asset not in check.assets:
            continue
        mine = [(one, ok, page) for one, ok, page in outcome if one.check == name]
        if mine:
            results.append(_result(name, mine, tables, (said or {}).get(name)))
        elif name in absent:
            results.append(
                CheckResult(name, check.title, True, False, f"{ABSENT}{absent[name]}", f"{docs.name}/index.html")
            )
        else:
            raise RuntimeError(f"check {name} of {asset} was not asserted on anything")
    return results


Outcome = list[tuple[Expected, bool, str]]  # expectation, whether it holds, page


def _assert(tables: Mapping[str, pl.DataFrame], expected: Sequence[Expected], docs: Path) -> Outcome:
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import ProgressBarsConfig

    gxe: Any = importlib.import_module("great_expectations.expectations")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    site = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        "coverage", {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": site}
    )
    source = context.data_sources.add_pandas("offrl")
    now = datetime.now(UTC)
    run = RunIdentifier(run_name=now.strftime("%Y%m%dT%H%M%SZ"), run_time=now)
    outcome: Outcome = []
    for name in dict.fromkeys(one.table for one in expected):
        asked = [one for one in expected if one.table == name]
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        suite = gx.ExpectationSuite(name=name)
        for number, one in enumerate(asked):
            suite.add_expectation(
                gxe.ExpectColumnValuesToBeBetween(
                    column=one.column,
                    min_value=one.low,
                    max_value=one.high,
                    severity=one.severity,
                    meta={"number": number},
                )
            )
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=name, data=batch, suite=context.suites.add(suite))
        )
        result = definition.run(
            batch_parameters={"dataframe": tables[name].to_pandas()}, result_format="SUMMARY", run_id=run
        )
        stamp = now.strftime("%Y%m%dT%H%M%S.%fZ")
        page = f"{docs.name}/validations/{name}/{run.run_name}/{stamp}/offrl-{name}.html"
        for found in result.results:
            number = int(found.expectation_config.meta["number"])  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
            outcome.append((asked[number], bool(found.success), page))
    context.build_data_docs(site_names=["coverage"])
    for file in docs.rglob("*.html"):
        storage.write_bytes(file, self_contained(file.read_text()).encode())
    return outcome


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e2e8f0; }
.col-lg-2, .navbar, .modal { display: none; } .text-success { color: #2f855a; } .text-danger { color: #c53030; }
.fa-check-circle::before { content: "✓"; } .fa-times::before { content: "✗"; } .fa-exclamation-triangle::before { content: "!"; }
"""


def self_contained(page: str) -> str:
    """A Data Docs page without anything fetched from elsewhere: it works, and stays private, with no network."""
    page = re.sub(r"<script[^>]*\ssrc=.https?:.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"<link[^>]*https?:[^>]*>", "", page, flags=re.DOTALL)
    page = re.sub(r"<img[^>]*https?:[^>]*>", "", page, flags=re.DOTALL)
    page = re.sub(r"<footer.*?</footer>", "", page, flags=re.DOTALL)
    page = re.sub(r"url\('https?:[^)]*\)", "none", page)
    return page.replace("</head>", f"<style>{STYLE}</style></head>", 1)


def _worst(one: Expected, table: pl.DataFrame) -> dict[str, Any]:
    """The row that lies furthest outside; an infinite one first."""
    column = pl.col(one.column).cast(pl.Float64)
    above = column - one.high if one.high is not None else pl.lit(float("-inf"))
    below = one.low - column if one.low is not None else pl.lit(float("-inf"))
    return table.sort(pl.max_horizontal(above, below), descending=True, nulls_last=True).row(0, named=True)


def _result(name: str, mine: Outcome, tables: Mapping[str, pl.DataFrame], said: str | None) -> CheckResult:
    """One check from all its expectations."""
    check, broken = CHECKS[name], [(one, page) for one, ok, page in mine if not ok]
    if not broken:
        return CheckResult(name, check.title, True, check.severity == BLOCKING, f"holds: {check.title}", mine[0][2])
    gravest = min(broken, key=lambda pair: [BLOCKING, WARNING, INFO].index(pair[0].severity))
    one, page = gravest
    sentence = said or one.say.format(**_worst(one, tables[one.table]))
    return CheckResult(name, check.title, False, any(e.severity == BLOCKING for e, _ in broken), sentence, page)
