"""The component: one YAML file is one pipeline, from raw logs to a released policy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster.components.scaffold.scaffold import ScaffoldRequest, scaffold_with
from pydantic import BaseModel

from offrl_models.config import Pipeline, PipelineConfig
from offrl_models.yaml_file import read_yaml
from orchestration.assets import build_assets
from orchestration.automation import build_automation
from orchestration.checks import build_checks

TEMPLATE: dict[str, Any] = {
    "dataset": "my_logs",
    "description": "What was decided, for whom, and how often.",
    "logs": {
        "source": "data/my_logs/raw",
        "episode_id": "episode_id",
        "step": "step",
        "observation": ["age", {"column": "ward", "categories": 12}],
        "next_observation": ["next_age", "next_ward"],
        "action": {"column": "action", "values": 4},
        "action_prob": "action_prob",
        "reward": {"column": "reward", "range": [0, 1]},
        "terminated": "terminated",
        "truncated": "truncated",
        "gamma": 0.99,
    },
    "algorithms": {"bc": {}, "cql": {"learning_rate": 0.0003}, "iql": {}},
    "gate": {"alpha": 0.05, "margin": 0.0},
}


class PipelineScaffolder(dg.Scaffolder):
    """`dg scaffold defs orchestration.pipeline.OfflineRLPipeline my_logs` writes a YAML to fill in."""

    def scaffold(self, request: ScaffoldRequest) -> None:
        name = Path(request.target_path).name
        logs = {**TEMPLATE["logs"], "source": f"data/{name}/raw"}
        dg.scaffold_component(request, {**TEMPLATE, "dataset": name, "logs": logs})


@scaffold_with(PipelineScaffolder)
@dataclass
class OfflineRLPipeline(dg.Component):
    """Logged decisions to a gated policy. The attributes are documented on `offrl_models.config.PipelineConfig`."""

    pipeline: Pipeline

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return PipelineConfig

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> "OfflineRLPipeline":
        if not isinstance(attributes, PipelineConfig):
            raise dg.DagsterInvalidDefinitionError(f"{context.path} has no attributes; it must at least name its logs.")
        for file in sorted(context.path.glob("*.yaml")):
            read_yaml(file, "the pipeline's defs.yaml")  # Dagster takes the last of a key that is there twice
        return cls(Pipeline(attributes, context.project_root))

    def build_defs(self, context: dg.ComponentLoadContext | None = None) -> dg.Definitions:
        return dg.Definitions.merge(
            dg.Definitions(
                assets=build_assets(self.pipeline),
                asset_checks=build_checks(self.pipeline),
                executor=dg.in_process_executor,
            ),
            build_automation(self.pipeline),
        )
