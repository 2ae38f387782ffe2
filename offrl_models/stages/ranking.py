"""From trained candidates to a leaderboard, on the selection split: a cheap score prunes, fitted Q evaluation ranks."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offrl_models import bundle, storage
from offrl_models.config import Pipeline
from offrl_models.evaluation import BEHAVIOR, Evaluation
from offrl_models.exported import Exported, open_policy
from offrl_models.progress import progress
from offrl_models.reports import leaderboard as page
from offrl_models.schema import Episodes
from offrl_models.selection import Selection, first_order_gain, rank, two_stage
from offrl_models.stages.behavior import current_behavior, read_evaluated
from offrl_models.stages.data import current_episodes, encoder_of, read_episodes
from offrl_models.stages.learning import current_candidates, evaluate_policies
from offrl_models.storage import Stage
from offrl_models.training import fit_shared_fqe
from offrl_models.variants import variant_of


def _leaderboard_key(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config
    return {
        "episodes": current_episodes(pipeline).digest,
        "behavior": current_behavior(pipeline).digest,
        "candidates": current_candidates(pipeline),
        "fqe": config.fqe.model_dump(mode="json"),
        "selection": config.selection.model_dump(),
        "bootstrap": [config.seed, config.bootstrap_samples],
    }


def current_leaderboard(pipeline: Pipeline) -> Stage:
    """The ranking of the present candidates. Raises InputError when it is of others."""
    return storage.load_stage(pipeline.folder / "leaderboard", _leaderboard_key(pipeline))


def leaderboard(pipeline: Pipeline) -> Stage:
    """Rank the candidates on the selection split: all by FQE, or where they are too many those that a cheap score leaves."""
    pages = tuple(pipeline.reports / f"leaderboard.{kind}" for kind in ("png", "html"))
    key = _leaderboard_key(pipeline)

    def build(folder: Path) -> dict[str, Any]:
        train, selection = read_episodes(pipeline, "train"), read_evaluated(pipeline, "selection")
        chosen, evaluation = _chosen(pipeline, list(key["candidates"]), train, selection)
        rows, first = rank(evaluation), chosen.cheap
        heads = ", the best of each algorithm among them" if len(pipeline.config.algorithms) <= len(rows) else ""
        for row in rows:
            row["first_order_gain"] = first.get(row["candidate"])
        found = {
            "best": rows[0]["candidate"],
            "ranking": rows,
            "pruned": [
                {
                    "candidate": name,
                    "first_order_gain": gain,
                    "reason": f"place {place} of {len(first)} by first-order gain, and {len(rows)} are ranked{heads}",
                }
                for place, (name, gain) in enumerate(first.items(), 1)
                if name not in chosen.full
            ],
            "candidates": len(key["candidates"]),
            "episodes": selection.n_episodes,
        }
        found["sentence"] = page.sentence(found)
        storage.write_json(folder / "leaderboard.json", found)
        page.write(pipeline.config.dataset, found, *pages)
        return found

    return storage.build_stage(pipeline.folder / "leaderboard", key, build, pages)


def _chosen(pipeline: Pipeline, names: list[str], train: Episodes, selection: Episodes) -> tuple[Selection, Evaluation]:
    """Which candidates are ranked, with the scores that say so, and their evaluation."""
    behavior = open_policy(pipeline.folder / "behavior" / bundle.POLICY)
    config, found = pipeline.config, list[Evaluation]()

    def opened(name: str) -> Exported:
        return open_policy(pipeline.candidate(name) / bundle.POLICY)

    def cheap(names: Sequence[str]) -> list[float]:
        policies = itertools.chain([behavior], map(opened, names))
        with progress() as update:
            values = fit_shared_fqe(
                config.fqe,
                encoder_of(pipeline),
                behavior,
                policies,
                train,
                selection,
                seed=config.seed,
                report=lambda steps, loss: update(
                    "FQE of the behavior", steps, config.fqe.gradient_steps, f"loss {loss['q']:.4f}"
                ),
            )
            base, *others = [each.v[0] for each in values]
        return [float(first_order_gain(selection, v, base).mean()) for v in others]

    def full(names: Sequence[str]) -> list[float]:
        policies = {**{name: opened(name) for name in names}, BEHAVIOR: behavior}
        found.append(evaluate_policies(pipeline, policies, train, selection, "FQE for the leaderboard"))
        return [min(found[0].fqe_gains(name)) for name in names]

    def algorithm(name: str) -> str:
        return variants[variant_of(name)[0]].algorithm

    variants, places = config.variants(), config.selection.finalists
    if len(names) > places:
        chosen = two_stage(names, cheap, full, places, algorithm)
    else:
        chosen = Selection({}, dict(zip(names, full(names), strict=True)))
    return chosen, found[0]
