"""The parts of a contract: what one column, or a few of them, mean."""

from collections.abc import Iterable
from itertools import product
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from offrl_models.logs.strict import Strict
from offrl_models.schema import Feature

TIME_FEATURES = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "days")  # what a timestamp becomes
Label = str | int


def _require_labels(labels: Any) -> Any:
    """YAML reads yes, no, true and false as booleans, and 1.5 as a number."""
    for label in labels if isinstance(labels, (list, tuple)) else ():
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise ValueError(f"{label!r} is no label: labels are text or whole numbers, so put quotes around it")
    return labels


def _require_stand_in(missing: Any) -> Any:
    if isinstance(missing, (str, bool)) and missing not in ("mean", "category"):
        raise ValueError(f"{missing!r} cannot stand for a missing value: give a number, 'mean' or 'category'")
    return missing


Labels = Annotated[tuple[Label, ...], BeforeValidator(_require_labels)]
Codes = Annotated[int | tuple[Label, ...], BeforeValidator(_require_labels)]  # 0 to n - 1, or the labels themselves
StandIn = Annotated[float | Literal["mean", "category"], BeforeValidator(_require_stand_in)]


def _require_ordered(name: str, bounds: tuple[float | None, float | None] | None) -> None:
    if bounds and bounds[0] is not None and bounds[1] is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"the {name} {list(bounds)} must have its lower end below its upper end")


def _plain_name(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


def _repeated(names: Iterable[Label]) -> bool:
    """Whether two are the same text: a log's labels are compared as text."""
    texts = [str(name) for name in names]
    return len(set(texts)) < len(texts)


class ObservationColumn(Strict):
    """One observed column: a number or boolean unless it says otherwise."""

    column: str
    categories: Codes | None = None
    ordered: Labels | None = None  # labels from low to high; read as 0, 1, 2, ...
    timestamp: bool = False  # read as time of day, day of the week, and days since 2000
    size: int | None = Field(default=None, ge=1)  # a list column of so many numbers
    missing: StandIn | None = None  # what stands for a missing value; None: none may be missing
    range: tuple[float | None, float | None] | None = None
    unit: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "ObservationColumn":
        kinds = [n for n in ("categories", "ordered", "timestamp", "size") if getattr(self, n)]
        if len(kinds) > 1:
            raise ValueError(f"{self.column!r} cannot be {kinds[0]} and {kinds[1]} at once; keep one")
        if (self.n_categories is not None and self.n_categories < 1) or self.ordered == ():
            raise ValueError(f"{self.column!r} needs at least one category")
        if _repeated(self.labels or ()):
            raise ValueError(f"{self.column!r} names a label twice")
        if (self.missing == "category") and self.n_categories is None:
            raise ValueError(f"missing: category needs `categories`; give {self.column!r} a number or 'mean'")
        if self.n_categories is not None and self.missing not in (None, "category"):
            raise ValueError(f"{self.column!r} has categories: a missing one is `missing: category`")
        if self.range and (self.n_categories is not None or self.ordered or self.timestamp):
            raise ValueError(f"{self.column!r} is no number, so it has no range; leave it out")
        _require_ordered(f"range of {self.column!r}", self.range)
        return self

    @property
    def n_categories(self) -> int | None:
        """Categories that the contract names."""
        return self.categories if self.categories is None or isinstance(self.categories, int) else len(self.categories)

    @property
    def labels(self) -> tuple[Label, ...] | None:
        return self.ordered or (self.categories if isinstance(self.categories, tuple) else None)

    @property
    def kind(self) -> str:
        """The kind of type that the column must have."""
        if self.timestamp:
            return "time"
        if self.size:
            return f"numbers[{self.size}]"
        if self.labels:
            return "label"
        return "integer" if self.categories else "number"

    @property
    def features(self) -> tuple[Feature, ...]:
        """Columns of the observation matrix that it becomes."""
        if self.n_categories is not None:
            return (Feature(self.column, self.n_categories + (self.missing == "category")),)
        missing = None if self.missing == "category" else self.missing
        if self.timestamp:
            return tuple(Feature(f"{self.column}.{part}", None, missing) for part in TIME_FEATURES)
        if self.size:
            return tuple(Feature(f"{self.column}[{i}]", None, missing) for i in range(self.size))
        return (Feature(self.column, None, missing),)


Observed = Annotated[ObservationColumn, BeforeValidator(_plain_name, json_schema_input_type=ObservationColumn | str)]


class ActionComponent(Strict):
    """One of several choices that make up an action."""

    column: str
    values: Codes

    @model_validator(mode="after")
    def _at_least_two(self) -> "ActionComponent":
        if not 2 <= self.n_values <= 10**5 or _repeated(self.labels or ()):
            raise ValueError(f"the action {self.column!r} needs at least two different values, and 100,000 at most")
        return self

    @property
    def n_values(self) -> int:
        return self.values if isinstance(self.values, int) else len(self.values)

    @property
    def labels(self) -> tuple[Label, ...] | None:
        return None if isinstance(self.values, int) else self.values


class ActionColumns(Strict):
    """What was decided: a discrete choice, several at once, or a vector of numbers with bounds.

    `mask` is a list of booleans, one per action: which were allowed. `candidates` is a list of the actions that were.
    """

    column: str | None = None
    values: Codes | None = None
    components: tuple[ActionComponent, ...] = ()  # a joint choice; the first varies slowest
    columns: tuple[str, ...] = ()  # one number each
    size: int | None = Field(default=None, ge=1)  # `column` is a list of so many numbers
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    mask: str | None = None
    candidates: str | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> "ActionColumns":
        parts = ("column", "values", "components", "columns", "size")
        given = {name for name in parts if getattr(self, name) not in (None, ())}
        if given not in ({"column", "values"}, {"components"}, {"columns"}, {"column", "size"}):
            ways = "column and values; components; columns, low and high; column, size, low and high"
            raise ValueError(f"give the action as one of: {ways}")
        if _repeated(self.columns) or _repeated(choice.column for choice in self.components):
            raise ValueError("the action names a column twice")
        if self.continuous:
            if self.low is None or self.high is None or len(self.bounds[0]) != self.dimensions != 0:
                raise ValueError("a continuous action needs `low` and `high`: a number each, or one per dimension")
            if not all(low < high for low, high in zip(*self.bounds, strict=True)):
                raise ValueError("every `low` of the action must lie below its `high`")
            if self.mask or self.candidates:
                raise ValueError("a continuous action has bounds; a mask or candidates are for discrete ones")
        elif self.low is not None or self.high is not None:
            raise ValueError("`low` and `high` are for continuous actions; a discrete one has `values`")
        elif not self.components:
            ActionComponent(column=self.column or "", values=self.values or 0)
        if self.mask and self.candidates:
            raise ValueError("give either the mask or the candidates of the action, not both")
        if self.candidates and self.components:
            raise ValueError("candidates are of an action in one column; give a joint action a mask")
        return self

    @property
    def continuous(self) -> bool:
        return bool(self.columns) or self.size is not None

    @property
    def space(self) -> Literal["discrete", "continuous"]:
        return "continuous" if self.continuous else "discrete"

    @property
    def dimensions(self) -> int:
        return len(self.columns) or self.size or 0

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """What a person would call each dimension of a continuous action."""
        return self.columns or tuple(f"{self.column}[{i}]" for i in range(self.dimensions))

    @property
    def bounds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lower and upper bound of every dimension of a continuous action."""

        def spread(bound: float | tuple[float, ...] | None) -> tuple[float, ...]:
            return bound if isinstance(bound, tuple) else (bound or 0.0,) * self.dimensions

        return spread(self.low), spread(self.high)

    @property
    def actions(self) -> int | np.ndarray:
        """What there is to choose from: the number of discrete actions, or the bounds [dimensions, 2] of continuous ones."""
        return np.array(self.bounds).T if self.continuous else self.n_actions

    @property
    def choices(self) -> tuple[ActionComponent, ...]:
        """The components of a discrete action; one of them as a rule."""
        if self.components or self.continuous:
            return self.components
        return (ActionComponent(column=self.column or "", values=self.values or 0),)

    @property
    def n_actions(self) -> int:
        """Number of discrete actions, joint ones counted as such; 0 for a continuous action."""
        return prod(choice.n_values for choice in self.choices) if self.choices else 0

    @property
    def action_names(self) -> tuple[str, ...] | None:
        """What a person would call each discrete action; None where its number is all there is."""
        if not self.components:
            return None if self.values is None or isinstance(self.values, int) else tuple(map(str, self.values))
        parts = [
            [f"{each.column} {value}" for value in each.labels or range(each.n_values)] for each in self.components
        ]
        return tuple(map(", ".join, product(*parts)))

    @property
    def name(self) -> str:
        """The column that a message names."""
        return self.column or (self.components[0].column if self.components else self.columns[0])


class RewardColumns(Strict):
    """The reward: one column, or a weighted sum of several. `range` is the true range of one reward, not the observed one."""

    column: str | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    range: tuple[float, float]
    unit: str | None = None
    missing: float | None = None  # what a reward counts as that never came, once the window has closed
    window_hours: float | None = Field(default=None, gt=0)  # how long after its decision a reward may still come
    arrived_at: str | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> "RewardColumns":
        if (self.column is None) == (not self.weights):
            raise ValueError("give the reward either as `column` or as `weights` (column: weight)")
        _require_ordered("reward range", self.range)
        if self.missing is not None and not self.range[0] <= self.missing <= self.range[1]:
            raise ValueError(f"a missing reward counts as {self.missing:g}, outside the range {list(self.range)}")
        return self

    @property
    def terms(self) -> dict[str, float]:
        """Column -> weight."""
        return {self.column: 1.0} if self.column else self.weights

    @property
    def name(self) -> str:
        return self.column or next(iter(self.weights))


class CostColumn(Strict):
    """A cost that a constraint may bound."""

    column: str
    range: tuple[float, float] | None = None
    unit: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "CostColumn":
        _require_ordered(f"range of {self.column!r}", self.range)
        return self


Cost = Annotated[CostColumn, BeforeValidator(_plain_name, json_schema_input_type=CostColumn | str)]


class ChainColumns(Strict):
    """Columns that chain the rows of served logs: the hash of each row, and that of the row before it."""

    hash: str
    previous: str


class PropensityColumn(Strict):
    """With which probability the behavior policy acted: of the logged action, of every action (a list), or a density."""

    column: str
    of: Literal["action", "vector", "density"] = "action"


Propensity = Annotated[PropensityColumn, BeforeValidator(_plain_name, json_schema_input_type=PropensityColumn | str)]
