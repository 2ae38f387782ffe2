"""From the best candidate to a verdict, a look at drift, and a release."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from offrl_models import bundle, storage
from offrl_models.config import ComparisonConfig, Pipeline
from offrl_models.evaluation import CHAMPION, estimate_stated, measure_rungs, visit_frequencies
from offrl_models.gate import Status, decisive_rung, ladder
from offrl_models.logs import values
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from offrl_models.policies import CappedPolicy, OnnxPolicy, export_checked
from offrl_models.reports import checks, plots, shift
from offrl_models.reports import evidence as evidence_report
from offrl_models.schema import Episodes, InputError
from offrl_models.stages.behavior import current_behavior, load_behavior, propensities_are, read_evaluated
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes, read_log
from offrl_models.stages.learning import current_leaderboard, evaluate_policies, load_candidate
from offrl_models.storage import Stage


def _rung_name(candidate: str, cap: float | None) -> str:
    return candidate if cap is None else f"{candidate} ≤ {cap:g}μ"


def _evidence_key(pipeline: Pipeline) -> dict[str, Any]:
    board = current_leaderboard(pipeline)
    return {
        **{name: value for name, value in board.key.items() if name != "code"},
        "leaderboard": board.digest,
        "gate": pipeline.config.gate.model_dump(mode="json"),
        "known_world": pipeline.config.known_world,
        "compare_with": [
            {**wanted.model_dump(mode="json"), "sha256": storage.sha256_tree(_log_of(pipeline, wanted))}
            for wanted in pipeline.config.compare_with
        ],
    }


def _log_of(pipeline: Pipeline, wanted: ComparisonConfig) -> Path:
    path = pipeline.root / wanted.log
    if not path.exists():
        raise InputError(
            f"{wanted.log}, the log of {wanted.name!r} in compare_with, is missing; fetch it with `dvc pull` or "
            "`dvc repro`, or leave the comparison out."
        )
    return path


def compare(
    pipeline: Pipeline, wanted: ComparisonConfig, gate: Episodes, shares: Float64[np.ndarray, "samples episodes"]
) -> dict[str, Any]:
    """What the gate split says of another policy, and what its own log says.

    Raises InputError where that log is missing, breaks a rule of the contract, or leaves out a cell of the gate split.
    """
    contract = wanted.contract(pipeline.config.logs)
    log = Log.open([_log_of(pipeline, wanted)], contract)
    broken = screen(log).violations
    if broken:
        raise InputError(broken[0].sentence(wanted.log))
    rows = log.frame()
    names = [feature.name for feature in gate.features]
    probs = visit_frequencies(
        values.observed_now(rows, contract),
        values.action(rows, contract),
        gate.observation[:, [names.index(name) for name in wanted.cells]],
        gate.n_actions,
        wanted.log,
    )
    reward = values.rewards(rows, contract)
    return {
        "policy": wanted.name,
        "log": wanted.log,
        "cells": list(wanted.cells),
        "logged_rows": len(reward),
        "logged_mean": float(reward.mean()),
        "logged_standard_error": float(reward.std(ddof=1) / np.sqrt(len(reward))),
        "gate_episodes": gate.n_episodes,
        **estimate_stated(gate, probs, shares).to_json(),
    }


def evidence(pipeline: Pipeline) -> Stage:
    """Climb the ladder with the best candidate, on the gate split, and write the evidence and the verdict."""
    config = pipeline.config
    board, made = current_leaderboard(pipeline), current_episodes(pipeline)

    def build(folder: Path) -> dict[str, Any]:
        best = board.summary["best"]
        fitted_on, gate = read_episodes(pipeline, "train", "selection"), read_evaluated(pipeline, "gate")
        encoder = encoder_of(pipeline)
        champion, candidate = load_behavior(pipeline, encoder), load_candidate(pipeline, best, encoder)
        policies = {row["candidate"]: OnnxPolicy(pipeline.candidate(row["candidate"]) / bundle.POLICY)
                    for row in board.summary["ranking"]}  # fmt: skip
        rungs: dict[str, Path] = {}
        for position, cap in enumerate(config.gate.caps):
            name, rung = _rung_name(best, cap), folder / f"rung-{position + 1}"
            if cap is None:
                for file in (bundle.POLICY, bundle.WEIGHTS):
                    storage.write_bytes(rung / file, (pipeline.candidate(best) / file).read_bytes())
                policies[name] = OnnxPolicy(rung / bundle.POLICY)
            else:
                policies[name] = export_checked(CappedPolicy(candidate, champion, cap), fitted_on, rung)
            rungs[name] = rung
        policies[CHAMPION] = OnnxPolicy(pipeline.folder / "behavior" / bundle.POLICY)
        evaluation = evaluate_policies(pipeline, policies, fitted_on, gate, "FQE for the gate")
        estimates = evaluation.estimates
        measures = measure_rungs(
            list(rungs), evaluation, config.gate, config.logs.tabular_states, propensities_are(pipeline)
        )
        verdicts = ladder([storage.sha256_file(rung / bundle.POLICY) for rung in rungs.values()], measures, config.gate)
        final = decisive_rung(verdicts)
        name, rung = list(rungs.items())[final]
        ranking = {row["candidate"]: row["rank"] for row in board.summary["ranking"]}
        found = {
            "dataset": config.dataset,
            "raw_logs": made.summary["raw"],
            "gate_episodes": gate.n_episodes,
            "behavior": {name: current_behavior(pipeline).summary[name] for name in ("propensities", "versions", "ece")},
            "champion": {
                "name": "the behavior policy",
                "value": float(evaluation.champion_returns.mean()),
                **estimates[CHAMPION].to_json(),
            },
            "candidates": [
                {"policy": key, "rank": place, **estimates[key].to_json()} for key, place in ranking.items()
            ],
            "ladder": [
                {**estimates[key].to_json(), **verdict.to_json(), "sha256": verdict.policy, "policy": key, "cap": cap}
                for key, cap, verdict in zip(rungs, config.gate.caps, verdicts, strict=True)
            ],
            "verdict": {**verdicts[final].to_json(), "policy_name": name, "cap": config.gate.caps[final]},
        }  # fmt: skip
        judged = {**asdict(verdicts[final].measures), "policy": name, "influence": verdicts[final].measures.influence}
        judged.pop("fqe_differences")
        results = checks.check_evidence([judged], config.gate.model_dump(), config.coverage, docs)
        storage.write_json(folder / "evidence.json", found)
        storage.write_json(folder / "verdict.json", verdicts[final].to_json())
        exact = None
        if config.known_world:
            exact = evidence_report.exact_values(config.known_world, policies, config.logs.gamma)
        compared = [compare(pipeline, wanted, gate, evaluation.shares) for wanted in config.compare_with]
        evidence_report.write(found, exact, compared, pipeline.reports)
        return {
            "status": verdicts[final].status,
            "reason": verdicts[final].reason,
            "certificate": verdicts[final].certificate,
            "decided_by": verdicts[final].decided_by,
            "policy_name": name,
            "rung": str(rung.relative_to(folder)),
            "algorithm": best,
            "cap": config.gate.caps[final],
            "lower_bound": verdicts[final].measures.lower_bound,
            "episodes": gate.n_episodes,
            "rows": gate.n_rows,
            "checks": [result.to_json() for result in results],
        }

    docs = pipeline.reports / "support"
    pages = tuple(pipeline.reports / f"evidence.{kind}" for kind in ("json", "html", "png"))
    return storage.build_stage(pipeline.folder / "evidence", _evidence_key(pipeline), build, pages)


def shift_report(pipeline: Pipeline) -> Stage:
    """Compare training logs with the newest batch, and the behavior's actions with the best candidate's."""
    config, board = pipeline.config, current_leaderboard(pipeline)
    best = board.summary["best"]
    pages = tuple(pipeline.reports / name for name in ("shift-logs.html", "shift-actions.html", "shift.png"))

    def build(folder: Path) -> dict[str, Any]:
        rows, reference, newest = shift.log_drift(read_log(pipeline), config.seed)
        if rows:
            shift.write_report(reference, newest, pages[0], config.seed)
        else:
            storage.write_bytes(
                pages[0], b"<!doctype html><p>One batch only: there is nothing to compare it with yet.</p>"
            )
        selection = read_episodes(pipeline, "selection")
        probs = OnnxPolicy(pipeline.candidate(best) / bundle.POLICY).on(selection)
        index, logged, drawn = shift.action_shift(selection, probs, config.seed)
        shift.write_report(logged, drawn, pages[1], config.seed)
        names = [*(row["column"] for row in rows), f"actions of {best}"]
        heights = [*(row["index"] for row in rows), index]
        title = "Newest batch against training logs, and the candidate's actions against the behavior's"
        plots.bars(names, heights, title, "population stability index", pages[2])
        worst = max((row["index"] for row in rows), default=0.0)
        color = "red" if worst > config.drift.red else "amber" if worst > config.drift.amber else "green"
        found = {"columns": rows, "worst": worst, "color": color, "actions_index": index, "candidate": best}
        results = checks.check_shift(rows, config.drift.amber, config.drift.red, docs)
        found["checks"] = [result.to_json() for result in results]
        storage.write_json(folder / "shift.json", found)
        return {**found, "compared_rows": reference.height, "newest_rows": newest.height}

    docs = pipeline.reports / "drift"
    return storage.build_stage(pipeline.folder / "shift", _shift_key(pipeline), build, pages)


def _shift_key(pipeline: Pipeline) -> dict[str, Any]:
    board = current_leaderboard(pipeline)
    return {
        "episodes": board.key["episodes"],
        "candidate": board.key["candidates"][board.summary["best"]],
        "drift": pipeline.config.drift.model_dump(),
        "seed": pipeline.config.seed,
    }


def release(pipeline: Pipeline) -> bundle.Release:
    """Release the rung that the verdict names.

    Raises ReleaseRefusedError unless the verdict is a PASS of that very policy and the newest batch has not drifted, and
    InputError when evidence or shift report are of other logs or settings than the present ones, so that the configuration
    in the bundle is the one that was trained and judged.
    """
    config = pipeline.config
    judged = storage.load_stage(pipeline.folder / "evidence", _evidence_key(pipeline))
    drift = storage.load_stage(pipeline.folder / "shift", _shift_key(pipeline))
    if drift.summary["color"] == "red":
        raise bundle.ReleaseRefusedError(
            f"the newest batch has drifted from the training logs (index {drift.summary['worst']:.2f}); look at "
            f"{pipeline.folders.shown(pipeline.reports / 'shift-logs.html')}; the champion stays."
        )
    found = storage.read_json(judged.folder / "evidence.json")
    verdict = storage.read_json(judged.folder / "verdict.json")
    if judged.summary["status"] != Status.PASS:
        raise bundle.ReleaseRefusedError(
            f"the verdict on {judged.summary['policy_name']} is {judged.summary['status']}, not PASS: "
            f"{judged.summary['reason']}; the champion stays."
        )
    return bundle.release(
        judged.folder / judged.summary["rung"],
        verdict,
        thresholds=config.gate,
        evidence=found,
        config=config.resolved(),
        lineage={
            "dataset": config.dataset,
            "algorithm": judged.summary["algorithm"],
            "cap": judged.summary["cap"],
            "compared_with": found["champion"]["name"],
            "raw_logs": found["raw_logs"],
            "code": judged.key["code"],
        },
        policies=pipeline.folder / "policies",
    )
