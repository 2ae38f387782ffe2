"""One pipeline, as its YAML declares it: resolved, validated, and the folders it works in."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from offrl_models.algorithms import AlgorithmConfig, config_of, require_gateable
from offrl_models.gate import GateConfig
from offrl_models.logs.contract import Contract, Strict, nearest_key_hint, one_sentence
from offrl_models.logs.folders import Folders
from offrl_models.logs.formats import nearest_column
from offrl_models.ope.fqe import FQEConfig
from offrl_models.rollouts import refuse_rollouts
from offrl_models.schema import InputError
from offrl_models.training_config import TrainingConfig
from offrl_models.variants import Variant, checkpoint_folder, expand, file_name, swept, variant_of
from offrl_models.yaml_file import read_yaml


class CoverageConfig(Strict):
    """Thresholds of the coverage checks that are not zero by nature."""

    open_share: float = Field(default=0.02, ge=0, le=1)  # C06: most episodes that may be open
    leakage_auc: float = Field(default=0.99, ge=0.5, le=1)  # C09
    outlier_share: float = Field(default=0.001, ge=0, le=1)  # C11: most values beyond 6 MAD
    propensity_z: float = Field(default=4.0, gt=0)  # C15: after Holm's correction
    propensity_ece: float = Field(default=0.02, ge=0, le=1)  # C16
    sure_share: float = Field(default=0.2, ge=0, le=1)  # C18: most rows with a propensity over .999
    few_visits_share: float = Field(default=0.5, ge=0, le=1)  # C21: share of cells under 5 visits worth a remark
    concentrability: float = Field(default=20.0, gt=0)  # C22: largest 99% quantile of the state-action ratio
    outside_support: float = Field(default=0.02, ge=0, le=1)  # C26
    near_duplicates: float = Field(default=0.001, ge=0, le=1)  # C28
    confounding_z: float = Field(default=4.0, gt=0)  # C29
    markov_gain: float = Field(default=0.01, ge=0, le=1)  # C30
    late_share: float = Field(default=0.01, ge=0, le=1)  # C31: most rewards that may come after their window
    clock_skew_minutes: float = Field(default=5.0, gt=0)  # C32
    volume_ratio: float = Field(default=5.0, gt=1)  # C33: between a day and those before it
    subgroup_episodes: int = Field(default=200, ge=1)  # C36


class DriftConfig(Strict):
    """Population stability index between training logs and the newest batch."""

    amber: float = Field(default=0.1, gt=0)
    red: float = Field(default=0.25, gt=0)

    @model_validator(mode="after")
    def _amber_comes_first(self) -> "DriftConfig":
        if self.amber > self.red:
            raise ValueError(f"amber is {self.amber:g} and red is {self.red:g}; red has to be the larger one")
        return self


class BehaviorConfig(Strict):
    """How propensities that were not logged are estimated."""

    calibration: Literal["temperature", "isotonic"] = "temperature"


class SelectionConfig(Strict):
    """How candidates are ranked on the selection split."""

    finalists: int = Field(default=6, ge=1)  # that are ranked by fitted Q evaluation; a cheap score prunes the others


class RetrainConfig(Strict):
    cron: str | None = Field(default="0 3 * * 1", pattern=r"^(@[a-z]+|\s*(\S+\s+){4}\S+\s*)$")
    on_new_logs: bool = True


class ComparisonConfig(Strict):
    """Another policy, which left a log of its own. What it earned is shown beside an estimate, and decides nothing."""

    name: str = Field(min_length=1)
    log: str  # one batch with the columns of the contract that are used, relative to the project
    cells: tuple[str, ...] = Field(min_length=1)  # observed columns in whose cells its actions are counted

    def contract(self, logs: Contract) -> Contract:
        """The little of a contract that the comparison reads: cells, action and reward, every row an episode.

        Raises ValueError where the pipeline's logs are not of that kind, or a cell is no observed category.
        """
        if logs.horizon != 1 or logs.action.continuous:
            raise ValueError("compare_with needs `horizon: 1` and discrete actions; leave it out")
        kinds = {column.column: column for column in logs.observation if column.categories or column.ordered}
        for name in self.cells:
            if name not in kinds:
                raise ValueError(
                    f"compare_with: {name!r} is no observed category: {nearest_key_hint(name, list(kinds))}"
                )
        return Contract(
            source=self.log,
            format=logs.format,
            horizon=1,
            observation=[kinds[name] for name in self.cells],
            action=logs.action.model_copy(update={"mask": None, "candidates": None}),
            reward=logs.reward.model_copy(update={"window_hours": None, "arrived_at": None}),
            gamma=logs.gamma,
        )


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
    behavior: BehaviorConfig = BehaviorConfig()
    training: TrainingConfig = TrainingConfig()
    fqe: FQEConfig = FQEConfig()
    selection: SelectionConfig = SelectionConfig()
    bootstrap_samples: int = Field(default=1000, ge=100)
    coverage: CoverageConfig = CoverageConfig()
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    retrain: RetrainConfig = RetrainConfig()
    known_world: str | None = None  # name of a simulated world whose exact values the report shows beside the estimates
    compare_with: tuple[ComparisonConfig, ...] = ()

    @field_validator("algorithms", mode="before")
    @classmethod
    def _settings_may_be_empty(cls, value: Any) -> Any:
        return {name: settings or {} for name, settings in value.items()} if isinstance(value, dict) else value

    @field_validator("algorithms")
    @classmethod
    def _algorithms_are_known(cls, value: dict[str, dict[str, Any]], info: Any) -> dict[str, dict[str, Any]]:
        if "logs" in info.data:  # else they are wrong themselves, and that is said
            expand(value, info.data["logs"].action.space)
            for name in value:
                require_gateable(name)
        return value

    @model_validator(mode="after")
    def _losses_are_of_rows(self) -> "PipelineConfig":
        for key in self.training.of_rows:
            for name in self.algorithms:
                refuse_rollouts(name, config_of(name, self.logs.action.space), key)
        return self

    @model_validator(mode="after")
    def _a_known_world_has_states(self) -> "PipelineConfig":
        if self.known_world and self.logs.tabular_states is None:
            raise ValueError("known_world is for logs of one observed category and discrete actions; leave it out")
        return self

    @model_validator(mode="after")
    def _a_canary_has_a_worst_case(self) -> "PipelineConfig":
        if self.gate.canary_loss is not None and self.return_range is None:
            raise ValueError("gate.canary_loss needs gate.return_range, the worst and the best return that can occur")
        return self

    @model_validator(mode="after")
    def _the_gate_asks_of_what_is_logged(self) -> "PipelineConfig":
        for key, asked, role, logged in (
            ("subgroups", self.gate.subgroups, "logs.subgroups", self.logs.labels),
            ("constraints", self.gate.constraints, "logs.costs", [cost.column for cost in self.logs.costs]),
        ):
            for name in asked:
                if name not in logged:
                    hint = nearest_column(name, logged)
                    raise ValueError(f"gate.{key} names {name!r}, which is not among {role}{hint}; name it there")
        return self

    @model_validator(mode="after")
    def _comparisons_can_be_made(self) -> "PipelineConfig":
        for comparison in self.compare_with:
            comparison.contract(self.logs)
        return self

    @property
    def split_by(self) -> str:
        """What decides into which split an episode falls."""
        logs = self.logs
        return f"salt {self.salt!r} and {logs.entity or logs.episode_id or 'the place in its file'}"

    @property
    def return_range(self) -> tuple[float, float] | None:
        """Of the discounted return: as stated, or at horizon 1 that of the reward; None where it is not known."""
        return self.gate.return_range or (self.logs.reward.range if self.logs.horizon == 1 else None)

    def variants(self) -> dict[str, Variant]:
        """Every algorithm that is trained, a variant for each combination of the values that a sweep lists; by name."""
        return expand(self.algorithms, self.logs.action.space)

    def variants_of(self, algorithm: str) -> list[str]:
        """Names of the variants of one algorithm."""
        return [name for name, variant in self.variants().items() if variant.algorithm == algorithm]

    def algorithm(self, name: str) -> AlgorithmConfig:
        """The config of an algorithm; of a sweep, that of its first variant."""
        return self.variants()[self.variants_of(name)[0]].config

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain JSON; it travels with the policy. Sweeps stay lists."""
        plain = self.model_dump(mode="json")
        space = self.logs.action.space
        plain["algorithms"] = {
            name: self.resolved_algorithm(name) | swept(name, settings, space)
            for name, settings in self.algorithms.items()
        }
        return plain

    def resolved_algorithm(self, name: str) -> dict[str, Any]:
        """The config of one algorithm, defaults included, as plain JSON; of a sweep, that of its first variant."""
        return plain_config(self.algorithm(name))


def plain_config(config: AlgorithmConfig) -> dict[str, Any]:
    """Every setting of an algorithm as plain JSON."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def parse_pipeline(attributes: Any, where: str) -> PipelineConfig:
    """Validate the attributes of a pipeline. Raises InputError with one sentence naming `where` and the key."""
    try:
        return PipelineConfig.model_validate(attributes)
    except ValidationError as error:
        raise one_sentence(error, where) from error


def read_pipeline(path: Path) -> PipelineConfig:
    """The pipeline that a defs.yaml declares. Raises InputError with one sentence naming the file and the key."""
    document = read_yaml(path, "the path of a pipeline's defs.yaml")
    if not isinstance(document, dict) or "attributes" not in document:
        raise InputError(f"{path} declares no pipeline: it needs the keys 'type' and 'attributes'.")
    return parse_pipeline(document["attributes"], str(path))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A configuration and the project folder it lives in."""

    config: PipelineConfig
    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())  # Data Docs are written to no relative folder

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
    def ledger(self) -> Path:
        """Of all looks at these logs. It lies beside them: who asks them under the name of another dataset pays as well."""
        return self.raw.with_name("policies") / "ledger.jsonl"

    @property
    def reports(self) -> Path:
        """Pages for people."""
        return self.folder / "reports"

    @property
    def tensorboard(self) -> Path:
        """Losses of every variant, as event files for TensorBoard."""
        return self.folder / "tensorboard"

    def variant(self, name: str) -> Path:
        """What the training of a variant leaves."""
        return self.folder / "candidates" / file_name(name)

    def candidate(self, name: str) -> Path:
        """The policy of a candidate: of a variant, or of an earlier checkpoint of it."""
        variant, steps = variant_of(name)
        return self.variant(variant) if steps is None else self.variant(variant) / checkpoint_folder(steps)
