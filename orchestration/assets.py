"""The assets of one pipeline. Each reads a folder, calls one library function and says what came out."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import dagster as dg

from offrl_models import stages
from offrl_models.config import Pipeline
from orchestration import versioning
from orchestration.results import materialized, one_sentence, page, plot


def build_assets(pipeline: Pipeline) -> list[dg.AssetsDefinition]:
    config = pipeline.config

    def asset(**more: Any) -> Callable[[Callable[[], dg.MaterializeResult]], dg.AssetsDefinition]:
        """`dg.asset` with what all assets of the pipeline share."""
        shared = {"key_prefix": config.dataset, "group_name": config.dataset, "owners": list(config.owners)}
        return cast(Any, dg.asset)(**shared, **more)

    def key(*name: str) -> dg.AssetKey:
        return dg.AssetKey([config.dataset, *name])

    algorithms = {name: key("candidates", name) for name in config.algorithms}

    @asset(kinds={"parquet", "dvc"}, description=f"Accepted log batches. {config.description}".strip())
    def raw_logs() -> dg.MaterializeResult:
        with one_sentence():
            taken = stages.ingest(pipeline)
            recorded = versioning.record(pipeline)
            taken.require_clean()
        return dg.MaterializeResult(
            data_version=dg.DataVersion(taken.version),
            metadata={
                "dagster/row_count": taken.rows,
                "batches": taken.batches,
                "new batches": ", ".join(taken.accepted) or "none",
                "DVC digest": taken.version,
                "recorded in": recorded,
                "checks": page(pipeline, "coverage/index.html"),
                "actions": plot(pipeline, "actions.png"),
            },
        )

    @asset(deps=[raw_logs], kinds={"parquet"}, description="Episodes, split for good by entity: 60/10/30.")
    def episodes() -> dg.MaterializeResult:
        with one_sentence():
            stage = stages.episodes(pipeline)
        splits = stage.summary["splits"]
        shown = {f"{name} episodes": counts["episodes"] for name, counts in splits.items()}
        return materialized(
            stage,
            rows=sum(counts["rows"] for counts in splits.values()),
            metadata={
                **shown,
                "mean return": stage.summary["mean_return"],
                "checks": page(pipeline, "coverage/index.html"),
                "lengths": plot(pipeline, "lengths.png"),
            },
        )

    @asset(deps=[episodes], kinds={"onnx"}, description="The policy that wrote the logs, as a distribution.")
    def behavior_policy() -> dg.MaterializeResult:
        with one_sentence():
            stage = stages.behavior_policy(pipeline)
        facts = {name: stage.summary[name] for name in ("kind", "propensities", "ece", "brier")}
        return materialized(
            stage,
            rows=sum(row["pairs"] for row in stage.summary["reliability"]),
            metadata={
                **facts,
                "checks": page(pipeline, "coverage/index.html"),
                "calibration": plot(pipeline, "behavior.png"),
            },
        )

    @dg.multi_asset(
        name=f"{config.dataset}_candidates",
        specs=[
            dg.AssetSpec(
                asset_key,
                deps=[episodes],
                group_name=config.dataset,
                owners=list(config.owners),
                kinds={"pytorch", "lightning", "onnx"},
                skippable=True,
                description=f"{name}: {config.seeds} seeds trained at once, acting as one policy; every variant of a sweep.",
            )
            for name, asset_key in algorithms.items()
        ],
        can_subset=True,
    )
    def candidates(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        wanted = [name for name, asset_key in algorithms.items() if asset_key in context.selected_asset_keys]
        with one_sentence():
            trained = stages.candidates(pipeline, wanted)
        for name, variants in trained.items():
            first = next(iter(variants.values()))
            lines = ["| variant | last losses | stopped |", "|---|---|---|"]
            for variant, stage in variants.items():
                losses = ", ".join(f"{network} {loss:.4g}" for network, loss in stage.summary["loss"].items())
                if model := stage.summary["model"]:
                    losses += f"; model, {model['gradient_steps']:,} steps: error held out {model['holdout_error']:.4g}"
                stopped = "; ".join(f"seed {seed}: {why}" for seed, why in stage.summary["stopped"].items())
                lines.append(f"| {variant} | {losses} | {stopped or 'no seed'} |")
            shown = {
                "gradient steps": first.summary["gradient_steps"],
                "seeds": first.summary["seeds"],
                "checkpoints": config.training.checkpoints,
                "variants": dg.MetadataValue.md("\n".join(lines)),
                "ranking": page(pipeline, "leaderboard.html"),
                "curves": plot(pipeline, *(stage.summary["curve"] for stage in variants.values())),
            }
            yield materialized(*variants.values(), rows=first.summary["rows"], metadata=shown, key=algorithms[name])

    @asset(
        deps=[*algorithms.values(), behavior_policy],
        kinds={"python"},
        description="Candidates ranked on the selection split, by pessimistic fitted Q evaluation, and how sure the order is.",
    )
    def leaderboard() -> dg.MaterializeResult:
        with one_sentence():
            stage = stages.leaderboard(pipeline)
        lines = [
            "| rank | candidate | least gain by FQE | is the best | beats the next | 95% of ranks |",
            "|---|---|---|---|---|---|",
        ]
        for row in stage.summary["ranking"]:
            (low, high), following = row["rank_interval"], row["beats_next"]
            chances = f"{row['probability_best']:.0%} | {'' if following is None else f'{following:.0%}'}"
            lines.append(f"| {row['rank']} | {row['candidate']} | {row['score']:+.4f} | {chances} | {low} to {high} |")
        pruned = ["| pruned | first-order gain | why |", "|---|---|---|"]
        pruned += [
            f"| {row['candidate']} | {row['first_order_gain']:+.4f} | {row['reason']} |"
            for row in stage.summary["pruned"]
        ]
        return materialized(
            stage,
            rows=len(stage.summary["ranking"]),
            metadata={
                "best": stage.summary["best"],
                "selection episodes": stage.summary["episodes"],
                "how sure": stage.summary["sentence"],
                "ranking": dg.MetadataValue.md("\n".join(lines)),
                "pruned": dg.MetadataValue.md("\n".join(pruned)) if stage.summary["pruned"] else "none",
                "page": page(pipeline, "leaderboard.html"),
                "picture": plot(pipeline, "leaderboard.png"),
            },
        )

    @asset(
        deps=[raw_logs, leaderboard],
        kinds={"evidently"},
        description="Training logs against the newest batch, and behavior actions against the candidate's.",
    )
    def shift_report() -> dg.MaterializeResult:
        with one_sentence():
            stage = stages.shift_report(pipeline)
        return materialized(
            stage,
            rows=stage.summary["newest_rows"],
            metadata={
                "color": stage.summary["color"],
                "worst index": stage.summary["worst"],
                "index of the candidate's actions": stage.summary["actions_index"],
                "logs": page(pipeline, "shift-logs.html"),
                "actions": page(pipeline, "shift-actions.html"),
                "indices": plot(pipeline, "shift.png"),
            },
        )

    @asset(
        deps=[leaderboard, shift_report],
        kinds={"python", "onnx"},
        description="The ladder of capped policies, evaluated on the gate split by every estimator; and the verdict.",
    )
    def evidence() -> dg.MaterializeResult:
        with one_sentence():
            stage = stages.evidence(pipeline)
        facts = {name: stage.summary[name] for name in ("status", "policy_name", "reason", "lower_bound", "episodes")}
        links = {"page": page(pipeline, "evidence.html"), "numbers": page(pipeline, "evidence.json")}
        return materialized(
            stage, rows=stage.summary["rows"], metadata={**facts, **links, "picture": plot(pipeline, "evidence.png")}
        )

    @asset(
        deps=[evidence],
        kinds={"onnx"},
        description="The released policy: an immutable bundle and the champion pointer. Refused without a PASS.",
    )
    def policy() -> dg.MaterializeResult:
        with one_sentence():
            released = stages.release(pipeline)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(released.manifest_sha256),
            metadata={
                "dagster/row_count": released.judged_rows,
                "version": released.version,
                "folder": dg.MetadataValue.path(str(released.folder)),
                "manifest sha256": released.manifest_sha256,
                "lower bound": released.lower_bound,
                "evidence": page(pipeline, "evidence.html"),
                "picture": plot(pipeline, "evidence.png"),
            },
        )

    return [raw_logs, episodes, behavior_policy, candidates, leaderboard, shift_report, evidence, policy]
