"""What each asset must hold: thresholds on the tables of its measures, asserted by Great Expectations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from offrl_models.config import CoverageConfig
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import Coverage
from offrl_models.logs.screen import Violation
from offrl_models.reports.quality import BLOCKING, CHECKS, INFO, WARNING, CheckResult, Expected, run_suites

LEAST_GAIN = 0.005  # of variance explained, below which an association is too weak to matter, however sure


def _of_rows(violations: tuple[Violation, ...], check: str) -> str | None:
    """What the rows of all batches break, as one sentence; None where they break nothing."""
    mine = [violation for violation in violations if violation.check == check]
    if not mine:
        return None
    rows, batches = sum(v.rows for v in mine), len({v.batch for v in mine})
    return f"column {mine[0].column!r}: {rows} rows of {batches} batches, {mine[0].problem}; {mine[0].remedy}"


def _row_level(measured: Coverage) -> list[Expected]:
    """One expectation per row-level rule: no row of any batch breaks it."""
    return [
        Expected(
            name.partition("_")[0],
            "batches",
            name,
            0,
            0,
            BLOCKING,
            f"{{{name}}} rows of batch {{batch}} break the rule",
        )
        for name in measured.batches.columns
        if name not in ("batch", "rows")
    ]


def _log_level(t: CoverageConfig) -> list[Expected]:
    """Expectations on measures of the whole log."""
    return [
        Expected("C01", "schema", "matches", 1, 1, BLOCKING, "column {column!r} is no {kind}"),
        Expected("C02", "files", "unchanged", 1, 1, BLOCKING, "{file} is not the file that was accepted; bring it back with "
                 "`dvc checkout`"),
        Expected("C06", "card", "open_share", 0, t.open_share, BLOCKING, "{open_share:.1%} of the episodes are open; wait for the "
                 "batches that end them, or mark them truncated"),
        Expected("C09", "leakage", "auc", 0, t.leakage_auc, BLOCKING, "column {column!r} alone predicts the last reward with AUC "
                 "{auc:.3f}; take it out if it is known only after the decision"),
        Expected("C11", "outliers", "share", 0, t.outlier_share, WARNING, "{share:.2%} of column {column!r} lie further than 6 MAD "
                 "from its median; look for another unit or a code for missing"),
        Expected("C12", "card", "reward_distinct_values", 2, None, WARNING, "all rewards are equal: nothing can be learned"),
        Expected("C12", "rewards", "share_low", None, 1, INFO, "{share_low:.1%} of the rewards lie at the lower bound"),
        Expected("C12", "rewards", "z", -t.propensity_z, t.propensity_z, WARNING, "the mean reward of batch {batch} differs from "
                 "that of the batches before it (z = {z:.1f})"),
        Expected("C15", "propensity", "z_holm", None, t.propensity_z, BLOCKING, "the mean ratio of {policy!r} "
                 "has z = {z:.1f} over {rows} rows of version {version!r}: the logged propensities are not those with which "
                 "actions were drawn"),
        Expected("C15", "propensity", "lower_z_holm", -t.propensity_z, None, BLOCKING, "the mean ratio of {policy!r} has "
                 "z = {lower_z:.1f} over {rows} rows of version {version!r}, more than rare actions explain: the logged "
                 "propensities are not those with which actions were drawn"),
        Expected("C15", "propensity", "z_holm", -t.propensity_z, None, WARNING, "the mean ratio of {policy!r} has z = {z:.1f} "
                 "over {rows} rows of version {version!r}: logged propensities are too large, or it is allowed where it is hardly "
                 "ever played"),
        Expected("C17", "versions", "rows", 1, None, INFO, "a version has no rows"),
        Expected("C18", "exploration", "share_sure", 0, t.sure_share, WARNING, "{share_sure:.1%} of the choices of version "
                 "{version!r} were drawn with a propensity over .999: importance sampling says nothing there"),
        Expected("C21", "card", "share_of_thin_cells", 0, t.few_visits_share, INFO, "{share_of_thin_cells:.1%} of the {cells} "
                 "visited state-action cells have under 5 visits"),
        Expected("C23", "quality", "tq", 0, 1, INFO, "the trajectory quality of batch {batch} is {tq:.3f}"),
        Expected("C24", "card", "distinct_actions", 2, None, INFO, "all {rows} rows have the same action: there is nothing to "
                 "compare it with"),
        Expected("C29", "confounding", "z", -t.confounding_z, t.confounding_z, WARNING, "{test}: z = {z:.1f}; what drove the "
                 "actions beyond the observation may drive the rewards too"),
        Expected("C30", "markov", "gain", None, t.markov_gain, WARNING, "the step before improves the prediction of {target} by "
                 "{gain:.3f} of its variance: the observation is no Markov state, and leg A of the gate relies on one"),
        Expected("C31", "delay", "share_late", 0, t.late_share, BLOCKING, "{share_late:.1%} of the rewards came after their "
                 "window; make it longer"),
        Expected("C32", "clocks", "median_min", -t.clock_skew_minutes, t.clock_skew_minutes, WARNING, "decisions of source "
                 "{source!r} were ingested {median_min:.1f} minutes later, in the median"),
        Expected("C32", "clocks", "share_early", 0, 0, WARNING, "{share_early:.1%} of the decisions of source {source!r} were "
                 "ingested over 5 minutes before they happened"),
        Expected("C33", "volume", "ratio", 1 / t.volume_ratio, t.volume_ratio, WARNING, "{day} has {rows} rows, {ratio:.2f} times "
                 "the days before it"),
        Expected("C34", "chain", "broken", 0, 0, BLOCKING, "{broken} rows of batch {batch} do not continue the chain of the row "
                 "before; the segment was altered"),
        Expected("C36", "subgroups", "episodes", t.subgroup_episodes, None, WARNING, "subgroup {group} = {value} has {episodes} "
                 "episodes; a verdict on it needs more"),
    ]  # fmt: skip


def _absent(contract: Contract, tables: Mapping[str, pl.DataFrame]) -> dict[str, str]:
    """Checks that this log gives nothing to assert on, and why."""
    reasons = {
        "C07": "the log has no next observations" if not contract.next_observation else "",
        "C08": "the log has no decision times" if not contract.decided_at else "",
        "C14": "no propensities are logged; they are estimated and the certificate is AMBER",
        "C15": "no propensities are logged; they are estimated and the certificate is AMBER",
        "C17": "the log names no policy versions" if not contract.policy_version else "",
        "C18": "no propensities are logged" if not contract.action_prob else "densities have no bound of 1",
        "C09": "too few episodes end with either reward",
        "C27": "every episode is an entity of its own",
        "C29": "too few rows for a test",
        "C30": "too few episodes of two steps or more",
        "C31": "the log has no arrival times of rewards",
        "C32": "the log has no ingestion times",
        "C33": "too few days, or no decision times",
        "C34": "the contract names no hash chain",
        "C36": "the contract names no subgroups",
    }
    return {check: reason or "too few rows" for check, reason in reasons.items()}


def check_logs(
    measured: Coverage, contract: Contract, thresholds: CoverageConfig, files: pl.DataFrame, docs: Path
) -> list[CheckResult]:
    """Every check of the raw logs. `files` has one row per batch: file, and whether it is unchanged since it was accepted."""
    derived = measured.derived
    schema = pl.DataFrame(
        [{"column": n, "kind": k, "matches": 1} for n, k in contract.kinds.items()]
    )  # else refused when read
    volume = derived.get("C33")
    tables = {
        "batches": measured.batches,
        "schema": schema,
        "files": files,
        "card": pl.DataFrame([measured.card]),
        "propensity": measured.propensity,
        "exploration": derived["C18"] if contract.action_prob and contract.action_prob.of != "density" else None,
        "leakage": derived["C09"],
        "outliers": derived["C11"],
        "rewards": derived["C12"],
        "versions": derived.get("C17"),
        "quality": derived["C23"],
        "confounding": derived["C29"].with_columns(z=pl.when(pl.col("r2_gain") > LEAST_GAIN).then("z").otherwise(0.0)),
        "markov": derived["C30"],
        "delay": derived.get("C31"),
        "clocks": derived.get("C32"),
        "volume": volume.filter(pl.col("ratio").is_not_null() & ~pl.col("partial")) if volume is not None else None,
        "chain": derived.get("C34"),
        "subgroups": derived["C36"],
    }
    given = {name: table for name, table in tables.items() if table is not None and table.height}
    whole = contract.action_prob is not None and contract.action_prob.of == "vector"
    silent = {"C07"} if contract.next_observation is None else set()
    silent |= {"C27"} if contract.entity is None else set()
    silent |= {"C31"} if "C31" not in derived and not _of_rows(measured.violations, "C31") else set()
    asked = [
        one
        for one in [*_row_level(measured), *_log_level(thresholds)]
        if one.table in given and one.check not in silent and (one.column != "lower_z_holm" or whole)
    ]
    said = {check: sentence for check in CHECKS if (sentence := _of_rows(measured.violations, check))}
    return run_suites(given, asked, docs, asset="raw_logs", absent=_absent(contract, given), said=said)


def check_splits(tables: Mapping[str, pl.DataFrame], thresholds: CoverageConfig, docs: Path) -> list[CheckResult]:
    """The checks of the episodes: `support` (C26), `entities` (C27) and `duplicates` (C28)."""
    asked = [
        Expected("C26", "support", "share_outside", 0, thresholds.outside_support, WARNING, "{share_outside:.1%} of the gate's "
                 "states lie outside what the training episodes cover"),
        Expected("C27", "entities", "splits", 1, 1, BLOCKING, "{entities} entities are in {splits} splits"),
        Expected("C28", "duplicates", "share", 0, thresholds.near_duplicates, WARNING, "{share:.2%} of the episodes of {split} "
                 "occur again in another split: the same course under two entities"),
    ]  # fmt: skip
    given = {name: table for name, table in tables.items() if table.height}
    absent: dict[str, str] = dict.fromkeys(("C26", "C28"), "too few episodes")
    return run_suites(given, [one for one in asked if one.table in given], docs, asset="episodes", absent=absent)


def check_evidence(
    rungs: list[dict[str, Any]], gate: Mapping[str, Any], thresholds: CoverageConfig, docs: Path
) -> list[CheckResult]:
    """The checks of the rung that the verdict is about: overlap (C19), sample size (C20), ratios (C22), influence (C35)."""
    asked = [
        Expected("C19", "rungs", "unsupported_mass", 0, gate["unsupported_mass"], BLOCKING, "{unsupported_mass:.1%} of the mass of "
                 "{policy} lies where the behavior hardly ever plays; the largest ratio is {ratio_max:.1f}"),
        Expected("C20", "rungs", "effective_transitions", gate["effective_transitions"], None, BLOCKING, "{policy} has "
                 "{effective_transitions:.0f} effective transitions"),
        Expected("C22", "rungs", "ratio_q99", 0, thresholds.concentrability, WARNING, "1% of the state-action ratios of {policy} "
                 "are above {ratio_q99:.1f}, the largest is {ratio_max:.1f}, chi-squared is {chi_squared:.1f}"),
        Expected("C35", "rungs", "influence", 0, None, BLOCKING, "without its 0.5% most influential episodes the difference of "
                 "{policy} is {without_top:+.4f}, of another sign than with them"),
    ]  # fmt: skip
    return run_suites({"rungs": pl.DataFrame(rungs)}, asked, docs, asset="evidence", absent={})


def check_shift(columns: list[dict[str, Any]], amber: float, red: float, docs: Path) -> list[CheckResult]:
    """C25: the stability index of every column stays below the thresholds."""
    say = "the population stability index of {column!r} is {index:.3f}"
    asked = [
        Expected("C25", "columns", "index", 0, red, BLOCKING, say),
        Expected("C25", "columns", "index", 0, amber, WARNING, say),
    ]
    absent = {"C25": "there is one batch only, and nothing to compare it with"}
    return run_suites(
        {"columns": pl.DataFrame(columns)} if columns else {},
        asked if columns else [],
        docs,
        asset="shift_report",
        absent=absent,
    )


LEAST_MEAN_RATIO = 0.9  # of a model that was learned: what it puts where the behavior has nothing is less than the rest


def check_behavior(found: Mapping[str, Any], thresholds: CoverageConfig, docs: Path) -> list[CheckResult]:
    """C16: the expected calibration error of the behavior model on episodes that it was not fitted on; C15: its mean ratio.

    A mean ratio above 1 shows that logged propensities are too small. One below 1 shows that they are too large where visits were
    counted; a model that was learned puts a little where the behavior has nothing.
    """
    t = thresholds
    says = (
        "the mean ratio of the behavior model to the logged propensities of {version} is {mean_ratio:.3f} (z = {z:.1f})"
    )
    asked = [
        Expected("C15", "ratios", "z", None, t.propensity_z, BLOCKING, f"{says}: they are not those with which actions were drawn"),
        Expected("C15", "ratios", "shortfall_z", -t.propensity_z, None, BLOCKING, f"{says}: they are not those with which actions "
                 "were drawn; or several policies wrote these rows and `policy_version` does not tell them apart, or the model "
                 "needs longer training"),
        Expected("C15", "ratios", "z", -t.propensity_z, None, WARNING, f"{says}: they may be too large"),
        Expected("C16", "calibration", "ece", 0, t.propensity_ece, WARNING, "the expected calibration error is {ece:.3f}; "
                 "capped policies are capped by probabilities that are off by as much"),
    ]  # fmt: skip
    tables = {"calibration": pl.DataFrame([{name: found[name] for name in ("ece", "brier")}])}
    if found.get("mean_ratios"):
        tables["ratios"] = pl.DataFrame(found["mean_ratios"])
    asked = [one for one in asked if one.table in tables]
    logged = "mean_ratios" in found
    absent = {
        "C15": "nothing in the episodes held out, no state or no logging policy, was seen in training"
        if logged
        else "no propensities are logged; they are estimated and the certificate is AMBER"
    }
    return run_suites(tables, asked, docs, asset="behavior_policy", absent=absent)
