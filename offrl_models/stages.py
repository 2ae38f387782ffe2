"""The walk from raw logs to a released policy: one function per step, called alike by the orchestrator and the command line.

Every step owns a folder, re-uses it when nothing that it depends on has changed, and refuses inputs that an earlier step did
not finish or did not let through.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from offrl_models import bundle, storage
from offrl_models.algorithms import ALGORITHMS, BC, BCConfig
from offrl_models.config import Pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.evaluation import CHAMPION, Evaluation, evaluate, measure_rungs
from offrl_models.gate import Status, decisive_rung, ladder
from offrl_models.logs import coverage as log_coverage
from offrl_models.logs import ingest as log_ingest
from offrl_models.logs.read import batch_files, log_version, read_batches
from offrl_models.ope import behavior
from offrl_models.policies import BehaviorTable, CappedPolicy, Mixture, OnnxPolicy, export_checked
from offrl_models.progress import Update
from offrl_models.reports import evidence as evidence_report
from offrl_models.reports import plots, quality, shift
from offrl_models.schema import Episodes, InputError
from offrl_models.selection import rank
from offrl_models.storage import Stage
from offrl_models.training import fit, run_side_by_side

# --- 1. raw logs ------------------------------------------------------------------------------------------------------


def ingest(pipeline: Pipeline) -> log_ingest.Ingested:
    """Take in the batches of the landing folder, and look again at those already accepted."""
    return log_ingest.ingest(pipeline.folders, pipeline.config.logs)


# --- 2. coverage ------------------------------------------------------------------------------------------------------


def coverage(pipeline: Pipeline) -> tuple[Stage, list[quality.CheckResult]]:
    """Run every coverage check on the accepted log and write Data Docs."""
    config, contract = pipeline.config, pipeline.config.logs
    docs = pipeline.reports / "coverage"

    def build(folder: Path) -> dict[str, Any]:
        log = read_batches(batch_files(pipeline.raw), contract)
        measured = log_coverage.measure(log, contract)
        shutil.rmtree(docs, ignore_errors=True)
        results = quality.check(measured, contract, **config.coverage.model_dump(), docs=docs)
        for name in ("batches", "cells", "propensity"):
            storage.write_parquet(folder / f"{name}.parquet", getattr(measured, name).to_arrow())
        visits = np.log10(measured.cells["visits"].to_numpy())
        plots.histogram(visits, "Visits per state-action cell", "log10 visits", pipeline.reports / "visits.png")
        actions = measured.cells.group_by("action").agg(pl.col("visits").sum()).sort("action")
        share = (actions["visits"] / log.height).to_list()
        labels = [str(a) for a in actions["action"]]
        plots.bars(labels, share, "How often each action was taken", "share of rows", pipeline.reports / "actions.png")
        return {"card": measured.card, "checks": [result.to_json() for result in results]}

    key = {
        "raw": log_version(pipeline.raw),
        "contract": contract.model_dump(mode="json"),
        "thresholds": config.coverage.model_dump(mode="json"),
    }
    pages = (docs / "index.html", pipeline.reports / "visits.png", pipeline.reports / "actions.png")
    stage = storage.build_stage(pipeline.folder / "coverage", key, build, pages)
    return stage, [quality.CheckResult(**result) for result in stage.summary["checks"]]


# --- 3. episodes ------------------------------------------------------------------------------------------------------


def episodes(pipeline: Pipeline) -> Stage:
    """Split the accepted log by entity into train, selection and gate. Raises InputError unless its coverage checks hold."""
    config, contract, version = pipeline.config, pipeline.config.logs, log_version(pipeline.raw)
    checked = storage.load_stage(pipeline.folder / "coverage")
    if checked.key["raw"] != version:
        raise InputError(f"the coverage checks have not seen the batches in {contract.source}; run them first.")
    for result in checked.summary["checks"]:
        if result["blocking"] and not result["passed"]:
            raise InputError(f"check {result['check']} blocks the log: {result['sentence']}")

    def build(folder: Path) -> dict[str, Any]:
        log = read_batches(batch_files(pipeline.raw), contract)
        counts = write_splits(log, contract, config.salt, folder)
        train = read_splits(folder, "train", salt=config.salt, gamma=contract.gamma)
        plots.histogram(
            train.length, "Length of the training episodes", "steps", pipeline.reports / "lengths.png", log=True
        )
        return {
            "splits": counts,
            "raw": version,
            "mean_return": float(train.return_.mean()),
            "truncated_episodes": int(train.truncated.sum()),
        }

    key = {"raw": version, "contract": contract.model_dump(mode="json"), "salt": config.salt}
    return storage.build_stage(pipeline.folder / "episodes", key, build, (pipeline.reports / "lengths.png",))


def _read(pipeline: Pipeline, *splits: str) -> Episodes:
    return read_splits(
        pipeline.folder / "episodes", *splits, salt=pipeline.config.salt, gamma=pipeline.config.logs.gamma
    )


def _encoder(pipeline: Pipeline, train: Episodes) -> Encoder:
    return Encoder.fit(pipeline.config.logs, train)


# --- 4. behavior policy -----------------------------------------------------------------------------------------------


def behavior_policy(pipeline: Pipeline) -> Stage:
    """The whole behavior policy, fitted on train and held against the selection split."""
    config, made = pipeline.config, storage.load_stage(pipeline.folder / "episodes")
    states = config.logs.tabular_states

    def build(folder: Path) -> dict[str, Any]:
        train = _read(pipeline, "train")
        if states is not None:
            model: torch.nn.Module = behavior.fit_table(train, states)
        else:
            encoder = _encoder(pipeline, train)
            seeds = range(config.seed, config.seed + config.seeds)
            cloned, _ = fit("bc", BCConfig(), train, encoder, seeds=seeds, **config.training.model_dump())
            model = Mixture(cloned, config.seeds)
        exported = export_checked(model, train, folder)
        held_out = _read(pipeline, "selection")
        found = behavior.calibration(held_out, exported.on(held_out))
        plots.reliability(found["reliability"], found["ece"], pipeline.reports / "behavior.png")
        return {"kind": "table of logged propensities" if states else "behavior cloning", **found}

    key = {
        "episodes": made.digest,
        "training": None if states else config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
    }
    return storage.build_stage(pipeline.folder / "behavior", key, build, (pipeline.reports / "behavior.png",))


def _load_behavior(pipeline: Pipeline, encoder: Encoder) -> torch.nn.Module:
    tensors = storage.read_tensors(pipeline.folder / "behavior" / bundle.WEIGHTS)
    if "known" in tensors:
        return BehaviorTable(tensors["known"].double().numpy())
    seeds = range(pipeline.config.seeds)
    model = Mixture(BC(BCConfig(), encoder, pipeline.config.logs.action.values, seeds), len(seeds))
    model.load_state_dict(tensors)
    return model


# --- 5. candidates ----------------------------------------------------------------------------------------------------


def candidates(pipeline: Pipeline, names: list[str] | None = None) -> dict[str, Stage]:
    """Train the named algorithms (all by default), side by side."""
    wanted = names or list(pipeline.config.algorithms)
    stages = run_side_by_side(_train_candidate, [(pipeline, name) for name in wanted])
    return dict(zip(wanted, stages, strict=True))


def _train_candidate(job: tuple[Pipeline, str], update: Update) -> Stage:
    pipeline, name = job
    config, made = pipeline.config, storage.load_stage(pipeline.folder / "episodes")
    settings = config.algorithm(name)
    curve = pipeline.reports / f"candidate-{name}.png"
    total = config.training.gradient_steps

    def build(folder: Path) -> dict[str, Any]:
        train = _read(pipeline, "train")
        seeds = range(config.seed, config.seed + config.seeds)

        def report(steps: int, losses: dict[str, float]) -> None:
            update(name, steps, total, ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))

        encoder = _encoder(pipeline, train)
        algorithm, history = fit(
            name, settings, train, encoder, seeds=seeds, **config.training.model_dump(), report=report
        )
        export_checked(Mixture(algorithm, config.seeds), train, folder)
        storage.write_json(folder / "losses.json", history)
        plots.learning_curves(history, f"{name}, {config.seeds} seeds", curve)
        last = {key: float(np.mean(value)) for key, value in history[-1].items() if key != "gradient_steps"}
        return {"algorithm": name, "rows": train.n_rows, "gradient_steps": total, "seeds": config.seeds, "loss": last}

    key = {
        "train": made.files["train.parquet"]["sha256"],
        "contract": config.logs.model_dump(mode="json"),
        "algorithm": name,
        "config": dataclasses.asdict(settings) | {"hidden": list(settings.hidden)},
        "training": config.training.model_dump(),
        "seeds": [config.seed, config.seeds],
    }
    return storage.build_stage(pipeline.candidate(name), key, build, (curve,))


def _load_candidate(pipeline: Pipeline, name: str, encoder: Encoder) -> Mixture:
    seeds = range(pipeline.config.seeds)
    _, kind = ALGORITHMS[name]
    algorithm = kind(pipeline.config.algorithm(name), encoder, pipeline.config.logs.action.values, seeds)  # pyright: ignore[reportArgumentType]
    model = Mixture(algorithm, len(seeds))
    model.load_state_dict(storage.read_tensors(pipeline.candidate(name) / bundle.WEIGHTS))
    return model


# --- 6. leaderboard ---------------------------------------------------------------------------------------------------


def _evaluate(
    pipeline: Pipeline, policies: dict[str, OnnxPolicy], fitted_on: Episodes, evaluated_on: Episodes, task: str
) -> Evaluation:
    config, encoder = pipeline.config, _encoder(pipeline, _read(pipeline, "train"))
    return evaluate(
        policies,
        fitted_on,
        evaluated_on,
        encoder,
        config.fqe,
        samples=config.bootstrap_samples,
        seed=config.seed,
        task=task,
    )


def leaderboard(pipeline: Pipeline) -> Stage:
    """Rank the candidates on the selection split."""
    config = pipeline.config
    trained = {name: storage.load_stage(pipeline.candidate(name)) for name in config.algorithms}
    made, mu = storage.load_stage(pipeline.folder / "episodes"), storage.load_stage(pipeline.folder / "behavior")
    picture = pipeline.reports / "leaderboard.png"

    def build(folder: Path) -> dict[str, Any]:
        policies = {name: OnnxPolicy(pipeline.candidate(name) / bundle.POLICY) for name in trained}
        policies[CHAMPION] = OnnxPolicy(mu.folder / bundle.POLICY)
        train, selection = _read(pipeline, "train"), _read(pipeline, "selection")
        rows = rank(_evaluate(pipeline, policies, train, selection, "FQE for the leaderboard"))
        storage.write_json(folder / "leaderboard.json", rows)
        gains = [row["score"] for row in rows]
        plots.bars(
            [row["candidate"] for row in rows],
            gains,
            "Least gain over behavior by FQE, selection split",
            "gain",
            picture,
        )
        return {"best": rows[0]["candidate"], "ranking": rows, "episodes": selection.n_episodes}

    key = {
        "episodes": made.digest,
        "behavior": mu.digest,
        "candidates": {name: stage.digest for name, stage in trained.items()},
        "fqe": config.fqe.model_dump(mode="json"),
        "bootstrap": [config.seed, config.bootstrap_samples],
    }
    return storage.build_stage(pipeline.folder / "leaderboard", key, build, (picture,))


# --- 7. evidence ------------------------------------------------------------------------------------------------------


def _rung_name(candidate: str, cap: float | None) -> str:
    return candidate if cap is None else f"{candidate} ≤ {cap:g}μ"


def evidence(pipeline: Pipeline) -> Stage:
    """Climb the ladder with the best candidate, on the gate split, and write the evidence and the verdict."""
    config = pipeline.config
    board = storage.load_stage(pipeline.folder / "leaderboard")
    trained = {name: storage.load_stage(pipeline.candidate(name)) for name in config.algorithms}
    if board.key["candidates"] != {name: stage.digest for name, stage in trained.items()}:
        raise InputError(
            "the candidates have changed since the leaderboard was made; materialize the leaderboard first."
        )
    made, mu = storage.load_stage(pipeline.folder / "episodes"), storage.load_stage(pipeline.folder / "behavior")

    def build(folder: Path) -> dict[str, Any]:
        best = board.summary["best"]
        fitted_on, gate = _read(pipeline, "train", "selection"), _read(pipeline, "gate")
        encoder = _encoder(pipeline, _read(pipeline, "train"))
        champion, candidate = _load_behavior(pipeline, encoder), _load_candidate(pipeline, best, encoder)
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
        policies[CHAMPION] = OnnxPolicy(mu.folder / bundle.POLICY)
        evaluation = _evaluate(pipeline, policies, fitted_on, gate, "FQE for the gate")
        estimates = evaluation.estimates
        measures = measure_rungs(list(rungs), evaluation, config.gate, config.logs.tabular_states)
        verdicts = ladder([storage.sha256_file(rung / bundle.POLICY) for rung in rungs.values()], measures, config.gate)
        final = decisive_rung(verdicts)
        name, rung = list(rungs.items())[final]
        ranking = {row["candidate"]: row["rank"] for row in board.summary["ranking"]}
        found = {
            "dataset": config.dataset,
            "raw_logs": made.summary["raw"],
            "gate_episodes": gate.n_episodes,
            "champion": {
                "name": "the behavior policy",
                "value": float(gate.return_.mean()),
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
        storage.write_json(folder / "evidence.json", found)
        storage.write_json(folder / "verdict.json", verdicts[final].to_json())
        exact = None
        if config.known_world:
            exact = evidence_report.exact_values(config.known_world, policies, config.logs.gamma)
        evidence_report.write(found, exact, pipeline.reports)
        return {
            "status": verdicts[final].status,
            "reason": verdicts[final].reason,
            "decided_by": verdicts[final].decided_by,
            "policy_name": name,
            "rung": str(rung.relative_to(folder)),
            "algorithm": best,
            "cap": config.gate.caps[final],
            "lower_bound": verdicts[final].measures.lower_bound,
            "episodes": gate.n_episodes,
            "rows": gate.n_rows,
        }

    key = {
        "episodes": made.digest,
        "leaderboard": board.digest,
        "candidates": board.key["candidates"],
        "behavior": mu.digest,
        "gate": config.gate.model_dump(mode="json"),
        "fqe": config.fqe.model_dump(mode="json"),
        "bootstrap": [config.seed, config.bootstrap_samples],
        "known_world": config.known_world,
    }
    pages = tuple(pipeline.reports / f"evidence.{kind}" for kind in ("json", "html", "png"))
    return storage.build_stage(pipeline.folder / "evidence", key, build, pages)


# --- 8. shift ---------------------------------------------------------------------------------------------------------


def shift_report(pipeline: Pipeline) -> Stage:
    """Compare training logs with the newest batch, and the behavior's actions with the best candidate's."""
    config, contract = pipeline.config, pipeline.config.logs
    board = storage.load_stage(pipeline.folder / "leaderboard")
    best = board.summary["best"]
    pages = (pipeline.reports / "shift-logs.html", pipeline.reports / "shift-actions.html")

    def build(folder: Path) -> dict[str, Any]:
        log = read_batches(batch_files(pipeline.raw), contract)
        rows, reference, newest = shift.log_drift(log, contract)
        if rows:
            shift.write_report(reference, newest, pages[0], config.seed)
        else:
            storage.write_bytes(
                pages[0], b"<!doctype html><p>One batch only: there is nothing to compare it with yet.</p>"
            )
        selection = _read(pipeline, "selection")
        probs = OnnxPolicy(pipeline.candidate(best) / bundle.POLICY).on(selection)
        index, logged, drawn = shift.action_shift(selection, probs, config.seed)
        shift.write_report(logged, drawn, pages[1], config.seed)
        worst = max((row["index"] for row in rows), default=0.0)
        color = "red" if worst > config.drift.red else "amber" if worst > config.drift.amber else "green"
        found = {"columns": rows, "worst": worst, "color": color, "actions_index": index, "candidate": best}
        storage.write_json(folder / "shift.json", found)
        return {**found, "training_rows": reference.height, "newest_rows": newest.height}

    key = {
        "raw": log_version(pipeline.raw),
        "contract": contract.model_dump(mode="json"),
        "candidate": board.key["candidates"][best],
        "episodes": board.key["episodes"],
        "drift": config.drift.model_dump(),
        "seed": config.seed,
    }
    return storage.build_stage(pipeline.folder / "shift", key, build, pages)


# --- 9. release -------------------------------------------------------------------------------------------------------


def release(pipeline: Pipeline) -> bundle.Release:
    """Release the rung that the verdict names. Raises ReleaseRefusedError unless the verdict is a PASS of that very policy."""
    config = pipeline.config
    judged = storage.load_stage(pipeline.folder / "evidence")
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
            "champion_before": found["champion"]["name"],
            "raw_logs": found["raw_logs"],
            "code": judged.key["code"],
        },
        policies=pipeline.folder / "policies",
    )


def run(pipeline: Pipeline) -> tuple[Stage, bundle.Release | None]:
    """The whole walk without an orchestrator. Returns the evidence, and the release when the gate let it through."""
    ingest(pipeline).require_clean()
    coverage(pipeline)
    episodes(pipeline)
    behavior_policy(pipeline)
    candidates(pipeline)
    leaderboard(pipeline)
    judged = evidence(pipeline)
    drift = shift_report(pipeline)
    if drift.summary["color"] == "red":
        raise InputError(f"the newest batch has drifted from the training logs (index {drift.summary['worst']:.2f}); "
                         f"look at {pipeline.folders.shown(pipeline.reports / 'shift-logs.html')}.")  # fmt: skip
    return judged, release(pipeline) if judged.summary["status"] == Status.PASS else None
