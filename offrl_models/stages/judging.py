"""From the best candidate to a verdict: the ladder on the gate split, against the champion, at the error rate that is left."""

import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offrl_models import bundle, ledger, storage
from offrl_models.config import Pipeline, PipelineConfig
from offrl_models.datasets.cut import read_cut
from offrl_models.evaluation import (
    BEHAVIOR,
    CHAMPION,
    Evaluation,
    Question,
    measure_rungs,
)
from offrl_models.exported import Exported, open_policy
from offrl_models.exporting import export_ladder_checked
from offrl_models.gate import Verdict, decisive_ladder, decisive_rung, ladder
from offrl_models.ope.units import entities_of, independent
from offrl_models.reports import checks
from offrl_models.reports import evidence as evidence_report
from offrl_models.reports.detail import canary_share, detail
from offrl_models.schema import Episodes, InputError
from offrl_models.stages.behavior import (
    LOGGED,
    current_behavior,
    load_behavior,
    propensities_are,
    read_evaluated,
)
from offrl_models.stages.champion import candidate_digest, current_champion
from offrl_models.stages.comparing import compare, log_of
from offrl_models.stages.data import current_episodes, encoder_of
from offrl_models.stages.drifting import current_shift, drifted
from offrl_models.stages.learning import capped, evaluate_policies
from offrl_models.stages.ranking import current_leaderboard
from offrl_models.storage import Stage
from offrl_models.variants import variant_of

FEWEST = 4  # gate episodes, or entities where one has several: two in each half


def _rung_name(candidate: str, cap: float | None) -> str:
    return candidate if cap is None else f"{candidate} ≤ {cap:g}μ"


def evidence_key(pipeline: Pipeline) -> dict[str, Any]:
    board = current_leaderboard(pipeline)
    return {
        **{name: value for name, value in board.key.items() if name != "code"},
        "leaderboard": board.digest,
        "shift": current_shift(pipeline).digest,
        "gate": pipeline.config.gate.model_dump(mode="json"),
        "champion": current_champion(pipeline).digest,
        "known_world": pipeline.config.known_world,
        "compare_with": [
            {**wanted.model_dump(mode="json"), "sha256": storage.sha256_tree(log_of(pipeline, wanted))}
            for wanted in pipeline.config.compare_with
        ],
    }


def evidence(pipeline: Pipeline) -> Stage:
    """Climb the ladder with the best candidates, on the gate split, enter the look in the ledger, and write the verdict."""

    def build(folder: Path) -> dict[str, Any]:
        look = _Look(pipeline, folder)
        verdicts, final, level = look.judged()
        verdict = verdicts[final]
        look.enter(verdict, level)  # before anything of it can be seen
        found = look.facts(verdicts, final, level)
        judged = {**asdict(verdict.measures), "policy": look.names[final], "influence": verdict.measures.influence}
        for nested in ("fqe_differences", "costs", "subgroups"):
            judged.pop(nested)
        results = checks.check_evidence([judged], pipeline.config.gate.model_dump(), pipeline.config.coverage, docs)
        storage.write_json(folder / "evidence.json", found)
        storage.write_json(folder / "verdict.json", verdict.to_json())
        evidence_report.write(found, look.exact(), look.compared(), pipeline.reports)
        return {
            "status": verdict.status,
            "reason": verdict.reason,
            "certificate": verdict.certificate,
            "decided_by": verdict.decided_by,
            "policy_name": look.names[final],
            "rung": str(look.rungs[look.names[final]].relative_to(folder)),
            "algorithm": pipeline.config.variants()[variant_of(look.steps[final][0])[0]].algorithm,
            "candidate_name": look.steps[final][0],
            "cap": look.steps[final][1],
            "lower_bound": verdict.measures.lower_bound,
            "alpha": verdict.measures.alpha,
            "champion": look.champion.name,
            "champion_version": look.champion.version,
            "candidate": candidate_digest(pipeline),
            "episodes": look.gate.n_episodes,
            "rows": look.gate.n_rows,
            "checks": [result.to_json() for result in results],
        }

    docs = pipeline.reports / "support"
    pages = tuple(pipeline.reports / f"evidence.{kind}" for kind in ("json", "html", "png"))
    pages = (*pages, pipeline.reports / "evidence-detail.png")
    return storage.build_stage(pipeline.folder / "evidence", evidence_key(pipeline), build, pages)


def hypothesis(config: PipelineConfig, rungs: list[str], champion: str) -> str:
    """Digest of what is claimed, a rung of these ladders beats this champion in this reward by these thresholds, and of how it is
    tested."""
    tested = {
        "logs": config.logs.model_dump(mode="json", exclude={"source", "landing"}),
        "gate": config.gate.model_dump(mode="json", exclude={"canary_loss"}),
        "fqe": config.fqe.model_dump(mode="json"),
        "behavior": config.behavior.model_dump(mode="json"),
        "drift": config.drift.model_dump(mode="json"),
        "seed": config.seed,
    }
    return storage.digest({"rungs": rungs, "champion": champion, **tested})


def require_enough(gate: Episodes) -> None:
    """Raises InputError where the gate's episodes, or entities where one has several, are fewer than FEWEST."""
    number = independent(gate)
    if number < FEWEST:
        noun = "episodes" if entities_of(gate) is None else "entities"
        raise InputError(
            f"the gate split holds {number} {noun}, and fewer than {FEWEST} say nothing of a policy; collect more logs."
        )


class _Look:
    """One look at the gate split: the rungs of the best candidates, exported and evaluated beside everything else."""

    def __init__(self, pipeline: Pipeline, folder: Path):
        self.pipeline, self.config = pipeline, pipeline.config
        self.board = current_leaderboard(pipeline)
        self.champion = current_champion(pipeline)
        self.caps = self._caps()
        climbing = [row["candidate"] for row in self.board.summary["ranking"]][: self.config.gate.ladders]
        self.steps = [(candidate, cap) for candidate in climbing for cap in self.caps]
        self.fitted_on, self.gate = read_evaluated(pipeline, "train", "selection"), read_evaluated(pipeline, "gate")
        policies = {row["candidate"]: open_policy(pipeline.candidate(row["candidate"]) / bundle.POLICY)
                    for row in self.board.summary["ranking"]}  # fmt: skip
        require_enough(self.gate)
        self.rungs = self._export(folder, policies)
        self.names = list(self.rungs)
        policies[BEHAVIOR] = open_policy(pipeline.folder / "behavior" / bundle.POLICY)
        policies[self.champion.key] = open_policy(self.champion.policy)
        self.policies = policies
        self.found: Evaluation = evaluate_policies(pipeline, policies, self.fitted_on, self.gate, "FQE for the gate")
        self.digests = [storage.sha256_file(rung / bundle.POLICY) for rung in self.rungs.values()]

    def _caps(self) -> tuple[float | None, ...]:
        """The rungs from the champion's own on: one closer to the behavior than the champion is cannot be expected to beat it."""
        caps = self.config.gate.caps
        return tuple(cap for cap in caps if cap is None or cap >= self.champion.cap) or caps[-1:]

    def _export(self, folder: Path, policies: dict[str, Exported]) -> dict[str, Path]:
        """Every rung as the graph that would act; the uncapped one is the candidate's own."""
        encoder = encoder_of(self.pipeline)
        behavior = load_behavior(self.pipeline, encoder)
        rungs = {step: folder / f"rung-{position + 1}" for position, step in enumerate(self.steps)}
        exported: dict[Path, Exported] = {}
        for climbing in dict.fromkeys(climbing for climbing, _ in self.steps):
            caps = {rungs[climbing, cap]: cap for cap in self.caps if cap is not None}
            if caps:
                policy = capped(self.pipeline, climbing, encoder, behavior, min(caps.values()))
                exported |= export_ladder_checked(policy, caps, self.fitted_on)
            if None in self.caps:
                whole = rungs[climbing, None]
                for file in (bundle.POLICY, bundle.WEIGHTS):
                    storage.write_bytes(whole / file, (self.pipeline.candidate(climbing) / file).read_bytes())
                exported[whole] = open_policy(whole / bundle.POLICY)
        named = {_rung_name(*step): rung for step, rung in rungs.items()}
        policies.update((name, exported[rung]) for name, rung in named.items())
        return named

    @property
    def hypothesis(self) -> str:
        return hypothesis(self.config, self.digests, self.champion.digest)

    @property
    def gate_data(self) -> str:
        return str(self.board.key["episodes"])

    def judged(self) -> tuple[list[Verdict], int, ledger.Level]:
        """The verdict on every rung, which of them decides, and the error rate that the ledger has left for all ladders."""
        gate, logs, propensities = self.config.gate, self.config.logs, propensities_are(self.pipeline)
        looks = ledger.read(self.pipeline.ledger)
        self.looks_before = len(looks)
        level = ledger.level(looks, self.hypothesis, self.gate_data, gate)
        ladders = len(self.steps) // len(self.caps)
        alpha = level.alpha * (1.0 if propensities == LOGGED else 0.5) / ladders
        asked = Question(
            alpha,
            logs.tabular_states,
            propensities,
            self.config.return_range,
            self.champion.key,
            drifted(self.pipeline),
            read_cut(self.pipeline.folder / "episodes", self.gate.n_episodes, self.config.salt),
        )
        self.measured, rungs = measure_rungs(self.names, self.found, gate, asked), len(self.caps)
        measures = [rung.measures for rung in self.measured]
        starts = range(0, len(self.steps), rungs)
        climbed = [ladder(self.digests[s : s + rungs], measures[s : s + rungs], gate) for s in starts]
        decisive = decisive_ladder(climbed)
        final = decisive * rungs + decisive_rung(climbed[decisive])
        return [verdict for verdicts in climbed for verdict in verdicts], final, level

    def enter(self, verdict: Verdict, level: ledger.Level) -> None:
        """Write the look into the ledger; a second time changes nothing, and is refused where it would say something else."""
        today = datetime.now(UTC).date().isoformat()
        ledger.enter(
            self.pipeline.ledger,
            ledger.Look(
                self.hypothesis, self.champion.digest, self.gate_data, today, level.alpha, level.spends, verdict.status,
                verdict.measures.e_value, self.config.split_by, self.digests,
            ),
            self.looks_before,
        )  # fmt: skip

    def facts(self, verdicts: list[Verdict], final: int, level: ledger.Level) -> dict[str, Any]:
        """The evidence as plain JSON. It holds no time, so that the same logs give the same bundle."""
        estimates, config = self.found.estimates, self.config
        returns = float(self.found.logged_returns.mean())
        champion = {"value": returns, **estimates[BEHAVIOR].to_json()}
        if self.champion.key != BEHAVIOR:
            known = estimates[CHAMPION].intervals
            value = next(known[name].estimate for name in ("DR", "FQE") if math.isfinite(known[name].estimate))
            champion = {"value": value, **estimates[CHAMPION].to_json()}
        ranking = {row["candidate"]: row["rank"] for row in self.board.summary["ranking"]}
        return {
            "dataset": config.dataset,
            "raw_logs": current_episodes(self.pipeline).summary["raw"],
            "gate_episodes": self.gate.n_episodes,
            "continuous": not self.gate.n_actions,
            "error_rate": asdict(level),
            "behavior": {
                name: current_behavior(self.pipeline).summary[name]
                for name in ("propensities", "versions", "ece", "reliability")
            },
            "champion": {"name": self.champion.name, "policy": self.champion.key, **champion},
            "logged": {"policy": BEHAVIOR, "value": returns, **estimates[BEHAVIOR].to_json()},
            "candidates": [
                {"policy": key, "rank": place, **estimates[key].to_json()} for key, place in ranking.items()
            ],
            "ladder": [
                {**estimates[key].to_json(), **verdict.to_json(), "sha256": verdict.policy, "policy": key, "cap": cap}
                for key, (_, cap), verdict in zip(self.names, self.steps, verdicts, strict=True)
            ],
            "detail": detail(
                self.found,
                self.names[final],
                self.champion.key,
                self.measured[final],
                config.gate,
                verdicts[final].status,
                action_names=config.logs.action.action_names,
                category_names=config.logs.category_names,
            ),
            "canary": canary_share(verdicts[final].status, config.gate, self.config.return_range, self.gate.return_),
            "verdict": {
                **verdicts[final].to_json(),
                "proven_by_betting": verdicts[final].exact,
                "relies_on_state": verdicts[final].measures.relies_on_state,
                "policy_name": self.names[final],
                "cap": self.steps[final][1],
            },
        }

    def exact(self) -> dict[str, float] | None:
        """Exact values, where the world is known; nothing that decides reads them."""
        if not self.config.known_world:
            return None
        return evidence_report.exact_values(self.config.known_world, self.policies, self.config.logs.gamma)

    def compared(self) -> list[dict[str, Any]]:
        return [compare(self.pipeline, wanted, self.gate, self.found.samples) for wanted in self.config.compare_with]
