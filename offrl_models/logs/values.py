"""What the columns of a chunk say, as arrays: observation matrix, action, mask, reward and propensity."""

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

from offrl_models.logs.contract import Contract
from offrl_models.logs.roles import ActionComponent, Label, ObservationColumn

EPOCH = datetime(2000, 1, 1)
BLOCK = 4096  # rows that are turned from columns into a matrix at a time: they stay in the cache of the processor


def within(value: pl.Expr, low: float | None, high: float | None) -> pl.Expr:
    """Whether a number lies in a range. What float32 makes of a bound meets it, for logs store numbers so."""
    inside = pl.lit(True)
    if low is not None:
        inside &= value >= min(low, _in_float32(low))
    if high is not None:
        inside &= value <= max(high, _in_float32(high))
    return inside


def _in_float32(bound: float) -> float:
    return float(np.float32(bound)) if abs(bound) <= np.finfo(np.float32).max else bound


def row_hash(frame: pl.DataFrame) -> pl.Series:
    """A hash per row that depends on neither the width of its numbers nor the kind of its lists."""
    plain = []
    for name, dtype in frame.schema.items():
        column = pl.col(name)
        if dtype.is_numeric():
            column = column.cast(pl.Float64)
        elif isinstance(dtype, (pl.List, pl.Array)) and dtype.inner.is_numeric():
            column = column.cast(pl.List(pl.Float64))
        plain.append(column)
    return frame.select(plain).hash_rows(seed=0)


def _is_missing(frame: pl.DataFrame, name: str) -> pl.Expr:
    """Whether a value is null or NaN, or a list that holds one."""
    column, dtype = pl.col(name), frame.schema[name]
    if isinstance(dtype, (pl.List, pl.Array)):
        each = column.cast(pl.List(pl.Float64)).list
        return column.is_null() | each.sum().is_nan() | each.contains(None)
    return column.is_null() | (column.is_nan() if dtype.is_float() else pl.lit(False))


def with_any_next_after_the_end(frame: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """The same rows. Where a row terminated and its next observation is missing, that is the observation of the row.

    Nothing follows an end, so many logs leave it out there; the arrays that are made of it hold some number all the same.
    """
    if contract.terminated not in frame.columns:
        return frame
    ended = pl.col(str(contract.terminated)).fill_null(False)
    pairs = zip(contract.observation, contract.next_observation or (), strict=False)
    missing = {
        name: (column.column, ended & _is_missing(frame, name))
        for column, name in pairs
        if name in frame.columns and column.missing is None
    }
    found = frame.filter(ended).select(is_so.any().alias(name) for name, (_, is_so) in missing.items())
    return frame.with_columns(
        pl.when(is_so).then(now).otherwise(name).alias(name)
        for name, (now, is_so) in missing.items()
        if found[name].item()
    )


def codes(column: str, labels: Sequence[Label]) -> pl.Expr:
    """Position of each label; null where the contract does not name it."""
    names = [str(label) for label in labels]
    return pl.col(column).replace_strict(names, list(range(len(names))), default=None, return_dtype=pl.Int64)


def _numbers(name: str, column: ObservationColumn) -> list[pl.Expr]:
    """One expression per feature; null or NaN is missing."""
    if column.labels:
        values = codes(name, column.labels)
    elif column.timestamp:
        at = pl.col(name)
        days = (at - EPOCH).dt.total_microseconds() / 86_400e6
        hour, week = days.mod(1) * 2 * np.pi, ((days + 5) / 7).mod(1) * 2 * np.pi  # 2000-01-01 was a Saturday
        return [hour.sin(), hour.cos(), week.sin(), week.cos(), days]
    else:
        values = pl.col(name)
    if column.n_categories is not None and column.missing == "category":
        values = values.fill_null(column.n_categories)
    return [values]


def observed(frame: pl.DataFrame, contract: Contract, names: Sequence[str]) -> list[Shaped[np.ndarray, "rows ..."]]:
    """What was observed in the columns `names`, in the order of the contract, one array per column; see `matrix`."""
    columns: list[np.ndarray] = []  # [rows] or [rows, size]
    for name, column in zip(names, contract.observation, strict=True):
        if column.size:
            columns.append(frame[name].cast(pl.Array(pl.Float32, column.size)).to_numpy())
        elif column.labels or column.timestamp or column.n_categories is not None:
            columns += [frame.select(expression).to_series().to_numpy() for expression in _numbers(name, column)]
        else:
            columns.append(frame[name].to_numpy())
    return columns


def matrix(
    columns: Sequence[Shaped[np.ndarray, "all ..."]], rows: slice | Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows columns"]:
    """Some rows of observed columns as one matrix; NaN where a number is missing."""
    parts = [values[rows] if isinstance(rows, slice) else np.take(values, rows, 0, mode="clip") for values in columns]
    widths = [part.shape[1] if part.ndim > 1 else 1 for part in parts]
    found, at = np.empty((len(parts[0]), sum(widths)), np.float32), 0
    for part, width in zip(parts, widths, strict=True):
        found[:, at : at + width] = part.reshape(-1, width)
        at += width
    return found


def observation(frame: pl.DataFrame, contract: Contract, names: Sequence[str]) -> Float32[np.ndarray, "rows columns"]:
    """The observation matrix from the columns `names`."""
    columns = observed(frame, contract, names)
    blocks = [matrix(columns, slice(start, start + BLOCK)) for start in range(0, max(frame.height, 1), BLOCK)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def observed_now(frame: pl.DataFrame, contract: Contract) -> Float32[np.ndarray, "rows columns"]:
    return observation(frame, contract, [column.column for column in contract.observation])


def component_code(choice: ActionComponent) -> pl.Expr:
    """Code of one component of the action; null where the contract does not name it."""
    if choice.labels:
        return codes(choice.column, choice.labels)
    column = pl.col(choice.column).cast(pl.Int64)
    return pl.when(column.is_between(0, choice.n_values - 1)).then(column)


def action_names(choice: ActionComponent) -> list[str]:
    """What the values of a component are called in a list of candidates."""
    return [str(label) for label in choice.labels or range(choice.n_values)]


def action_code(contract: Contract) -> pl.Expr:
    """Code of a discrete action; of a joint one, the first component varies slowest. Null where it is unknown."""
    code = pl.lit(0, pl.Int64)
    for choice in contract.action.choices:
        code = code * choice.n_values + component_code(choice)
    return code


def action(
    frame: pl.DataFrame, contract: Contract
) -> Int64[np.ndarray, "rows"] | Float32[np.ndarray, "rows dimensions"]:
    if not contract.action.continuous:
        return frame.select(action_code(contract)).to_series().to_numpy()
    if contract.action.size:
        return frame[str(contract.action.column)].cast(pl.Array(pl.Float32, contract.action.size)).to_numpy()
    return frame.select(pl.col(contract.action.columns).cast(pl.Float32)).to_numpy()


def mask_list(contract: Contract) -> pl.Expr | None:
    """One list of booleans per row, or None where everything is always allowed. Null where it is missing."""
    action = contract.action
    if action.mask:
        return pl.col(action.mask)
    if action.candidates:
        return pl.concat_list(
            [pl.col(action.candidates).list.contains(name) for name in action_names(action.choices[0])]
        )
    return None


def mask(frame: pl.DataFrame, contract: Contract) -> Bool[np.ndarray, "rows actions"] | None:
    """True where an action was allowed; None where everything always is."""
    allowed = mask_list(contract)
    if allowed is None:
        return None
    return frame.select(allowed.list.to_array(contract.action.n_actions)).to_series().to_numpy().astype(bool)


def window_closed(contract: Contract, clock: datetime | None) -> pl.Expr:
    """Rows whose reward can no longer come. `clock` is the latest time in the log: a log knows of no later one."""
    window = contract.reward.window_hours
    if window is None or clock is None:
        return pl.lit(True)
    return pl.col(str(contract.decided_at)) + pl.duration(seconds=int(window * 3600)) <= pl.lit(clock)


def reward_sum(contract: Contract) -> pl.Expr:
    """The weighted sum that was logged; null where one of its terms is."""
    terms = contract.reward.terms.items()
    return pl.sum_horizontal(*(pl.col(name).cast(pl.Float64) * weight for name, weight in terms), ignore_nulls=False)


def reward(contract: Contract, clock: datetime | None = None) -> pl.Expr:
    """Reward per row; null where it may still come, or never came and the contract says of no value for that."""
    total = reward_sum(contract)
    if contract.reward.missing is None:
        return total
    absent = total.is_null() & window_closed(contract, clock)
    return pl.when(absent).then(pl.lit(contract.reward.missing)).otherwise(total)


def propensity(contract: Contract) -> pl.Expr:
    """Probability or density of the logged action; NaN where it was not logged."""
    prob = contract.action_prob
    if prob is None:
        return pl.lit(float("nan"))
    if prob.of == "vector":
        return pl.col(prob.column).cast(pl.List(pl.Float64)).list.get(action_code(contract), null_on_oob=True)
    return pl.col(prob.column).cast(pl.Float64)


def propensities(frame: pl.DataFrame, contract: Contract) -> Float64[np.ndarray, "rows"]:
    if contract.action_prob is None:
        return np.full(frame.height, np.nan)
    return frame.select(propensity(contract).fill_null(float("nan"))).to_series().to_numpy()


def probabilities(frame: pl.DataFrame, contract: Contract) -> Float64[np.ndarray, "rows actions"] | None:
    """The whole distribution from which each action was drawn, NaN where it is broken; None where it was not logged."""
    prob, n = contract.action_prob, contract.action.n_actions
    if prob is None or prob.of != "vector":
        return None
    each = pl.col(prob.column).cast(pl.List(pl.Float64))
    each = pl.when(each.list.len() == n).then(each)
    return frame.select(each.list.to_array(n)).to_series().to_numpy().reshape(-1, n)


def rewards(frame: pl.DataFrame, contract: Contract, clock: datetime | None = None) -> Float[np.ndarray, "rows"]:
    return frame.select(reward(contract, clock)).to_series().to_numpy()
