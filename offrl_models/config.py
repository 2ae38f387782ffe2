"""One pipeline, as its YAML declares it: resolved, validated, and the folders it works in."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from offrl_models.algorithms import AlgorithmConfig, make_config
from offrl_models.gate import GateConfig
from offrl_models.logs.contract import Contract, Strict, one_sentence
from offrl_models.logs.ingest import Folders
from offrl_models.ope.fqe import FQEConfig
from offrl_models.schema import InputError


class TrainingConfig(Strict):
    """How every candidate is trained."""

    gradient_steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=256, ge=1)


class CoverageConfig(Strict):
    """Thresholds of the coverage checks that are not zero by nature."""

    propensity_z: float = Field(default=4.0, gt=0)  # C15
    few_visits_share: float = Field(
        default=0.5, ge=0, le=1
    )  # C21: share of cells under 5 visits that is worth a remark


class DriftConfig(Strict):
    """Population stability index between training logs and the newest batch."""

    amber: float = Field(default=0.1, gt=0)
    red: float = Field(default=0.25, gt=0)


class RetrainConfig(Strict):
    cron: str | None = "0 3 * * 1"
    on_new_logs: bool = True


class PipelineConfig(Strict):
    """The attributes of one pipeline."""

    dataset: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    owners: tuple[str, ...] = ()
    logs: Contract
    salt: str = "offrl"  # of the permanent split; changing it moves entities between splits
    algorithms: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: int = Field(default=5, ge=1)
    seed: int = 0  # of everything random
    training: TrainingConfig = TrainingConfig()
    fqe: FQEConfig = FQEConfig()
    bootstrap_samples: int = Field(default=1000, ge=100)
    coverage: CoverageConfig = CoverageConfig()
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    retrain: RetrainConfig = RetrainConfig()
    known_world: str | None = None  # name of a simulated world whose exact values the report shows beside the estimates

    @field_validator("algorithms", mode="before")
    @classmethod
    def _settings_may_be_empty(cls, value: Any) -> Any:
        return {name: settings or {} for name, settings in value.items()} if isinstance(value, dict) else value

    @field_validator("algorithms")
    @classmethod
    def _algorithms_are_known(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in value.items():
            make_config(name, settings)
        return value

    def algorithm(self, name: str) -> AlgorithmConfig:
        return make_config(name, self.algorithms[name])

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain JSON; it travels with the policy."""
        plain = self.model_dump(mode="json")
        plain["algorithms"] = {name: self.resolved_algorithm(name) for name in self.algorithms}
        return plain

    def resolved_algorithm(self, name: str) -> dict[str, Any]:
        """The config of one algorithm, defaults included, as plain JSON."""
        config = self.algorithm(name)
        return TypeAdapter(type(config)).dump_python(config, mode="json")


def parse_pipeline(attributes: Any, where: str) -> PipelineConfig:
    """Validate the attributes of a pipeline. Raises InputError with one sentence naming `where` and the key."""
    try:
        return PipelineConfig.model_validate(attributes)
    except ValidationError as error:
        raise one_sentence(error, where) from error


def read_pipeline(path: Path) -> PipelineConfig:
    """The pipeline that a defs.yaml declares. Raises InputError with one sentence naming the file and the key."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give the path of a pipeline's defs.yaml."
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(document, dict) or "attributes" not in document:
        raise InputError(f"{path} declares no pipeline: it needs the keys 'type' and 'attributes'.")
    return parse_pipeline(document["attributes"], str(path))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A configuration and the project folder it lives in."""

    config: PipelineConfig
    root: Path

    @cached_property
    def folder(self) -> Path:
        return self.root / "data" / self.config.dataset

    @property
    def raw(self) -> Path:
        """Accepted batches, versioned by DVC."""
        return self.root / self.config.logs.source

    @property
    def folders(self) -> Folders:
        return Folders(self.root, self.raw, self.folder)

    @property
    def reports(self) -> Path:
        """Pages for people."""
        return self.folder / "reports"

    def candidate(self, algorithm: str) -> Path:
        return self.folder / "candidates" / algorithm
