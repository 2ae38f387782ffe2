"""The contract: which column of a raw log plays which role, with its range. It lives in the pipeline's YAML."""

from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BeforeValidator, Field, field_validator, model_validator

from offrl_models.logs.formats import FORMATS
from offrl_models.logs.roles import (
    ActionColumns,
    ChainColumns,
    Cost,
    ObservationColumn,
    Observed,
    Propensity,
    RewardColumns,
)
from offrl_models.logs.strict import Strict, nearest_key_hint, one_sentence
from offrl_models.schema import Feature

__all__ = ["Contract", "Strict", "arrow_type", "matches_kind", "nearest_key_hint", "one_sentence"]

EPISODE, STEP = "_episode", "_step"  # columns that the reader adds where the log has none
LARGEST_CATEGORY = 2**24  # float32 holds every integer below it exactly
EPISODIC = {  # what the readers of formats with a layout of their own call the columns
    "episode_id": "episode_id",
    "step": "step",
    "terminated": "terminated",
    "truncated": "truncated",
}
LAYOUT = {"d4rl": EPISODIC, "d3rlpy": EPISODIC, "minari": {**EPISODIC, "next_observation": ["next_observation"]}}


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Contract(Strict):
    """Columns to roles.

    Rows are decisions. With `horizon: 1` every row is an episode of its own (a bandit log) and needs no step and no end;
    otherwise rows are ordered by `step`, or by `decided_at` where there is no step.
    """

    source: str  # folder of accepted batches, relative to the project
    landing: str | None = None  # where batches arrive, a folder or a URL; data/<dataset>/landing when left out
    format: str = "parquet"
    horizon: int | None = Field(default=None, ge=1, le=1)
    episode_id: str | None = None
    entity: str | None = None  # patient or user, where one entity can have several episodes
    step: str | None = None
    observation: list[Observed] = Field(min_length=1)
    next_observation: list[str] | None = None
    action: ActionColumns
    action_prob: Propensity | None = None  # leave out when it was not logged: it is then estimated
    reward: RewardColumns
    costs: list[Cost] = Field(default_factory=list)
    terminated: str | None = None
    truncated: str | None = None
    interval: str | None = None  # time until the next decision; gamma is then per unit of it
    policy_version: str | None = None
    policy_versions: tuple[str, ...] | None = None  # the known ones
    decided_at: str | None = None
    ingested_at: str | None = None
    actor: str | None = None  # person or site that acted, where that is not part of the observation
    subgroups: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = ()
    chain: ChainColumns | None = None
    gamma: float = Field(gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _layout_of_the_format(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("format") == "open_bandit":
            data = {"horizon": 1, **data}
        given = LAYOUT.get(str(data.get("format")), {})
        if given and "reward" in data and isinstance(data["reward"], dict) and "weights" not in data["reward"]:
            data = {**data, "reward": {"column": "reward", **data["reward"]}}
        return {**given, **data}

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, name: str) -> str:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}: {nearest_key_hint(name, list(FORMATS))}")
        return name

    @field_validator("source")
    @classmethod
    def _source_is_inside(cls, source: str) -> str:
        path = PurePosixPath(source)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{source!r} must be a folder inside the project, relative to it")
        return source

    @model_validator(mode="after")
    def _rows_have_an_order(self) -> "Contract":
        if self.horizon == 1:
            for name in ("step", "terminated", "truncated", "next_observation", "interval"):
                if getattr(self, name):
                    raise ValueError(f"with horizon 1 every row is an episode, so there is no {name}; leave it out")
        elif self.episode_id is None:
            raise ValueError("name the column of the episode_id, or write `horizon: 1` when every row stands alone")
        elif self.step is None and self.decided_at is None:
            raise ValueError(
                "name the column of the step, or of decided_at to order the rows by; or write `horizon: 1` when every row stands "
                "alone"
            )
        elif self.terminated is None and self.truncated is None:
            raise ValueError("name the column that says that an episode terminated, or that it was truncated")
        return self

    @model_validator(mode="after")
    def _columns_fit_together(self) -> "Contract":
        if self.next_observation is not None and len(self.next_observation) != len(self.observation):
            raise ValueError(
                f"next_observation names {len(self.next_observation)} columns and observation {len(self.observation)}; "
                "give one next column for each observed column, in the same order"
            )
        observed = [name for name, _ in self.observed()]
        for listed in (observed, [cost.column for cost in self.costs], list(self.subgroups)):
            twice = [name for name in listed if listed.count(name) > 1]
            if twice:
                raise ValueError(f"column {twice[0]!r} is named twice in one role; name it once")
        if self.policy_versions is not None and self.policy_version is None:
            raise ValueError("policy_versions are those of a column; name it as policy_version")
        wide = [c.column for c in self.observation if (c.n_categories or 0) > LARGEST_CATEGORY]
        if wide:
            raise ValueError(f"column {wide[0]!r} has over {LARGEST_CATEGORY:,} categories; group them first")
        if self.action_prob and (self.action_prob.of == "density") != self.action.continuous:
            wanted = "density" if self.action.continuous else "action or vector"
            raise ValueError(f"the propensity of this kind of action is `of: {wanted}`")
        if self.reward.window_hours and not (self.decided_at and (self.reward.arrived_at or self.episode_id)):
            raise ValueError("a reward window needs decided_at, and an episode_id by which late rewards find their row")
        kinds: dict[str, tuple[str, str]] = {}
        for role, name, kind in self._roles():
            earlier = kinds.setdefault(name, (role, kind))
            if earlier[0] == "the observation" and role in ("the action", "the reward", "the propensity"):
                raise ValueError(f"column {name!r} is {role}: observe only what was known before the decision")
            if _narrower(earlier[1], kind) is None:
                raise ValueError(f"column {name!r} cannot be {earlier[0]} ({earlier[1]}) and {role} ({kind}) at once")
        return self

    @property
    def episode_column(self) -> str:
        return self.episode_id or EPISODE

    @property
    def numbers_episodes_by_batch(self) -> bool:
        """Whether the ids come from a reader that counts the episodes of every batch from 0."""
        given = LAYOUT.get(self.format, {}).get("episode_id")
        return given is not None and given == self.episode_id and self.kinds[given] == "key"

    @property
    def step_column(self) -> str:
        return self.step or STEP

    @property
    def entity_column(self) -> str:
        """What the split keeps together."""
        return self.entity or self.episode_column

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """Columns of the observation matrix."""
        return tuple(feature for column in self.observation for feature in column.features)

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns that tell episodes apart without being observed: subgroups and the policy version."""
        return tuple(dict.fromkeys([*self.subgroups, *([self.policy_version] if self.policy_version else [])]))

    @property
    def category_names(self) -> dict[str, tuple[str, ...]]:
        """Column of the observation matrix -> what a person would call each of its codes, where categories have labels."""
        return {
            column.column: (*map(str, column.labels or ()), "missing")
            for column in self.observation
            if isinstance(column.categories, tuple)
        }

    @property
    def tabular_states(self) -> int | None:
        """Number of states when the observation is one categorical column and actions are discrete, else None."""
        return self.features[0].categories if len(self.features) == 1 and not self.action.continuous else None

    def observed(self) -> list[tuple[str, ObservationColumn]]:
        """Every column that holds an observation, the next ones included."""
        following = self.next_observation or []
        return [(c.column, c) for c in self.observation] + list(zip(following, self.observation, strict=False))

    def _roles(self) -> list[tuple[str, str, str]]:
        """(role, column, kind of type) of every column the contract names."""
        action, prob = self.action, self.action_prob
        found = [("the observation", name, column.kind) for name, column in self.observed()]
        found += [("the action", c.column, "label" if c.labels else "integer") for c in action.choices]
        found += [("the action", name, "number") for name in action.columns]
        found += [("the action", action.column or "", f"numbers[{action.size}]")] if action.size else []
        found += [("the reward", name, "number") for name in self.reward.terms]
        found += [("a cost", cost.column, "number") for cost in self.costs]
        if prob:
            found.append(("the propensity", prob.column, "numbers" if prob.of == "vector" else "number"))
        more = {
            "the mask": (action.mask, "mask"),
            "the candidates": (action.candidates, "labels"),
            "the episode": (self.episode_id, "key"),
            "the entity": (self.entity, "key"),
            "the step": (self.step, "integer"),
            "terminated": (self.terminated, "boolean"),
            "truncated": (self.truncated, "boolean"),
            "the interval": (self.interval, "number"),
            "the policy version": (self.policy_version, "label"),
            "decided_at": (self.decided_at, "time"),
            "ingested_at": (self.ingested_at, "time"),
            "the reward's arrival": (self.reward.arrived_at, "time"),
            "the actor": (self.actor, "label"),
            "the chain": (self.chain.hash if self.chain else None, "label"),
            "the chain before": (self.chain.previous if self.chain else None, "label"),
        }
        found += [(role, name, kind) for role, (name, kind) in more.items() if name]
        return found + [("a subgroup", name, "label") for name in self.subgroups]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Every column the contract names -> the kind of type it must have; the narrower where it plays two roles."""
        found: dict[str, str] = {}
        for _, name, kind in self._roles():
            found[name] = _narrower(found.get(name, kind), kind) or kind
        return found

    @cached_property
    def content(self) -> list[str]:
        """Columns that say what was decided: all but `ingested_at`, which only says when that was written down."""
        named = [name for _, name, _ in self._roles()]
        return [name for name in self.kinds if name != self.ingested_at or named.count(name) > 1]

    @cached_property
    def reward_keys(self) -> tuple[str, ...]:
        """Columns by which a reward that comes later finds its decision; none where it cannot."""
        order = self.step or (self.decided_at if self.horizon is None else None)
        return (self.episode_id, *([order] if order else [])) if self.episode_id else ()


def _narrower(kind: str, other: str) -> str | None:
    """The kind of a column that plays two roles: any label may be one, a whole number is a number; else None."""
    if kind == other or other in ("label", "key"):
        return kind
    if kind in ("label", "key"):
        return other
    return "integer" if {kind, other} == {"integer", "number"} else None


def arrow_type(kind: str) -> pa.DataType:
    """The type that a column of a text file is read as."""
    if kind.startswith("numbers"):
        return pa.list_(pa.float64())
    plain = {
        "key": pa.string(), "label": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(),
        "time": pa.timestamp("us"), "mask": pa.list_(pa.bool_()), "labels": pa.list_(pa.string()),
    }  # fmt: skip
    return plain[kind]


def _is_list_of(dtype: pa.DataType, test: Any) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(is_list(dtype) for is_list in lists) and test(dtype.value_type)


def _is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype)


def _is_label(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def matches_kind(kind: str, dtype: pa.DataType) -> bool:
    """Whether an Arrow type can play the part."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    match kind:
        case "key" | "label":
            return _is_label(dtype) or (kind == "label" and pa.types.is_boolean(dtype))
        case "integer":
            return pa.types.is_integer(dtype)
        case "number":
            return _is_number(dtype) or pa.types.is_boolean(dtype)
        case "boolean":
            return pa.types.is_boolean(dtype)
        case "time":
            return pa.types.is_timestamp(dtype)
        case "mask":
            return _is_list_of(dtype, pa.types.is_boolean)
        case "labels":
            return _is_list_of(dtype, _is_label)
    return _is_list_of(dtype, _is_number)
