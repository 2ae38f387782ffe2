"""The contract: which column of a raw log plays which role, with its range. It lives in the pipeline's YAML."""

import difflib
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from offrl_models.schema import InputError


def nearest_key_hint(key: str, known: list[str]) -> str:
    """'; did you mean ...' for a misspelt key, or the list of known ones."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}."


def _open_schema(schema: dict[str, Any]) -> None:
    """Leave unknown keys to the validator of `Strict`, which says more than that they are not allowed."""
    schema.pop("additionalProperties", None)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_open_schema)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}: {nearest_key_hint(str(key), list(cls.model_fields))}")
        return data


def one_sentence(error: ValidationError, where: str) -> InputError:
    """The first complaint of a pydantic error, as a sentence that says where it is."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{where}: {path + ': ' if path else ''}{message}")


class ObservationColumn(Strict):
    """One observed column. With `categories`, its values are codes 0 to categories - 1; without, it is numeric."""

    column: str
    categories: int | None = Field(default=None, ge=1)


def _plain_name_is_numeric(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


Observed = Annotated[
    ObservationColumn, BeforeValidator(_plain_name_is_numeric, json_schema_input_type=ObservationColumn | str)
]


class ActionColumn(Strict):
    """A discrete action, coded 0 to values - 1, and optionally a list column of booleans: which actions were allowed."""

    column: str
    values: int = Field(ge=2)
    mask: str | None = None


class RewardColumn(Strict):
    column: str
    range: tuple[float, float]  # the true range of one reward, not the observed one

    @model_validator(mode="after")
    def _ordered(self) -> "RewardColumn":
        if not self.range[0] < self.range[1]:
            raise ValueError(f"the reward range {list(self.range)} must have its lower end below its upper end")
        return self


class Contract(Strict):
    """Columns to roles. Discrete actions; Parquet batches in one folder."""

    source: str  # folder of accepted batches, relative to the project
    format: Literal["parquet"] = "parquet"
    episode_id: str
    entity: str | None = None  # patient or user, where one entity can have several episodes
    step: str
    observation: list[Observed] = Field(min_length=1)
    next_observation: list[str]
    action: ActionColumn
    action_prob: str  # behavior probability of the logged action
    reward: RewardColumn
    terminated: str
    truncated: str | None = None
    policy_version: str | None = None
    decided_at: str | None = None
    gamma: float = Field(gt=0, le=1)

    @field_validator("source")
    @classmethod
    def _source_is_inside(cls, source: str) -> str:
        path = PurePosixPath(source)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{source!r} must be a folder inside the project, relative to it")
        return source

    @model_validator(mode="after")
    def _next_matches_observation(self) -> "Contract":
        if len(self.next_observation) != len(self.observation):
            raise ValueError(
                f"next_observation names {len(self.next_observation)} columns and observation {len(self.observation)}; "
                "give one next column for each observed column, in the same order"
            )
        return self

    @property
    def entity_column(self) -> str:
        """What the split keeps together."""
        return self.entity or self.episode_id

    @property
    def tabular_states(self) -> int | None:
        """Number of states when the observation is one categorical column, else None."""
        return self.observation[0].categories if len(self.observation) == 1 else None

    def columns(self) -> dict[str, str]:
        """Every column the contract names -> the kind of type it must have."""
        kinds = {self.episode_id: "key", self.entity_column: "key", self.step: "integer"}
        for column, following in zip(self.observation, self.next_observation, strict=True):
            kinds |= dict.fromkeys((column.column, following), "integer" if column.categories else "number")
        kinds |= {self.action.column: "integer", self.reward.column: "number", self.terminated: "boolean"}
        kinds[self.action_prob] = "number"
        optional = {
            self.action.mask: "mask",
            self.truncated: "boolean",
            self.policy_version: "key",
            self.decided_at: "time",
        }
        return kinds | {name: kind for name, kind in optional.items() if name is not None}


def matches_kind(kind: str, dtype: pa.DataType) -> bool:
    """Whether an Arrow type can play the part."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    match kind:
        case "key":
            return pa.types.is_integer(dtype) or pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
        case "integer":
            return pa.types.is_integer(dtype)
        case "number":
            return pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
        case "boolean":
            return pa.types.is_boolean(dtype)
        case "time":
            return pa.types.is_timestamp(dtype)
        case "mask":
            return (
                pa.types.is_fixed_size_list(dtype) or pa.types.is_list(dtype) or pa.types.is_large_list(dtype)
            ) and pa.types.is_boolean(dtype.value_type)
    raise AssertionError(kind)
