"""A policy of which the log has a column: the probabilities of all actions, or the probability of the logged one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Bool, Float, Float64, Shaped

from offrl_models.assess.graphs import TOLERANCE
from offrl_models.assess.log import Assessed
from offrl_models.assess.named import names_of, order_of
from offrl_models.assess.target import ALIKE, Function, FunctionPolicy, Target, require_distributions
from offrl_models.choices import Probabilities
from offrl_models.logs import formats
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import CHUNK, Log
from offrl_models.schema import Episodes, InputError

NUMBER, LIST = pa.float64(), pa.list_(pa.float64())


def of_column(name: str, given: Assessed) -> Target:
    """A column of the log: the probabilities of all actions, a list or by their names, or that of the logged action.

    Raises InputError naming file, column and number of rows where it holds anything else.
    """
    episodes = given.episodes
    keys = [given.contract.episode_column, given.contract.step_column]
    parts = [_column(given.log, number, name, keys) for number, _ in given.log.decisions]
    known = pl.concat(parts, how="vertical_relaxed").unique([*keys, "_policy"], keep="first", maintain_order=True)
    again = known.select(keys).is_duplicated()
    if again.any():
        raise InputError(
            f"column {name!r} says two things of {known.filter(again).select(keys).n_unique()} decisions that are logged more than "
            f"once, the first in episode {known.filter(again)[keys[0]][0]!r}; keep one row of each."
        )
    wanted = pl.DataFrame({keys[0]: episodes.episode_id[episodes.episode_of_row], keys[1]: episodes.step})
    wanted = wanted.with_columns(pl.col(keys[0]).cast(known.schema[keys[0]]))
    found = wanted.join(known, on=keys, how="left", maintain_order="left")["_policy"]
    card = {"name": f"column {name}", "kind": "column of probabilities"}
    if isinstance(found.dtype, pl.List):
        probs = found.cast(pl.Array(pl.Float64, episodes.n_actions)).to_numpy()
        require_distributions(probs, np.array(episodes.mask), f"column {name!r}", "decisions")
        function, why = _looked_up(episodes, probs)
        policy = FunctionPolicy(function, name) if function else None
        choices = Probabilities(episodes, probs)
        return Target(card, choices.taken, choices, policy, why)
    why = "the column gives the probability of the logged action alone, so no model of the values can be made"
    return Target(card, found.to_numpy(), None, None, why)


def _column(log: Log, number: int, name: str, keys: list[str]) -> pl.DataFrame:
    """The column of one batch beside the keys of its rows, as `_policy`."""
    path, contract = log.batches[number].path, log.contract
    types = {name: _asked_as(path, contract, name)}
    tables = [pl.DataFrame(table) for table in formats.chunks(path, contract.format, [name], types, CHUNK)]
    rows = pl.concat([frame.select(keys) for _, frame in log.chunks_of(number, keys)], how="vertical_relaxed")
    column = pl.concat(tables, how="vertical_relaxed")[name]
    actions = contract.action.n_actions
    if isinstance(column.dtype, (pl.List, pl.Array, pl.Struct)):
        column = _listed(column, contract, f"{path}: column {name!r}")
        column = column.cast(pl.List(pl.Float64))
        wrong = column.is_null() | (column.list.len() != actions) | column.list.eval(pl.element().is_null()).list.any()
        asked = f"a list of {actions} probabilities"
    elif column.dtype.is_numeric():
        column = column.cast(pl.Float64)
        highest = 1.0 if actions else float("inf")
        wrong = ~(column.is_finite() & column.is_between(0.0, highest + TOLERANCE)).fill_null(False)
        column = column.clip(upper_bound=highest)
        asked = "a probability from 0 to 1" if actions else "a density of 0 or more"
    else:
        raise InputError(
            f"{path}: column {name!r} is {column.dtype} in all {len(column)} rows; make it numbers or lists."
        )
    if wrong.any():
        raise InputError(
            f"{path}: column {name!r} has {int(wrong.sum())} rows that do not hold {asked}, the first is row "
            f"{int(wrong.arg_max() or 0)}; write what the policy would do there."
        )
    return rows.with_columns(column.alias("_policy"))


def _listed(column: pl.Series, contract: Contract, whose: str) -> pl.Series:
    """Lists in the order of the log's actions."""
    fields = [field.name for field in column.dtype.fields] if isinstance(column.dtype, pl.Struct) else None
    if contract.action.continuous:
        raise InputError(f"{whose} has probabilities, but the action is continuous; give its density at the action.")
    order = order_of(fields, contract, whose, "write a struct (in JSON an object) with the fields")
    if order is None:
        return column
    named = column.struct.unnest()
    return named.select(pl.concat_list([named.columns[place] for place in order]).alias(column.name)).to_series()


def _asked_as(path: Path, contract: Contract, name: str) -> pa.DataType:
    """What a column is parsed as where the format leaves it open: JSON lines can hold lists and objects, CSV cannot."""
    if contract.format == "jsonl":
        named = pa.struct([(action, pa.float64()) for action in names_of(contract)])
        for asked in (LIST, named):
            try:
                next(formats.chunks(path, contract.format, [name], {name: asked}, CHUNK), None)
            except InputError:
                continue
            return asked
    return NUMBER


def _keys(observation: Float[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows actions"]) -> Iterator[bytes]:
    packed = np.packbits(mask, axis=1)
    for seen, allowed in zip(np.ascontiguousarray(observation, np.float32), packed, strict=True):
        yield seen.tobytes() + allowed.tobytes()


def _looked_up(episodes: Episodes, probs: Float64[np.ndarray, "rows actions"]) -> tuple[Function | None, str]:
    """The column as a function of observation and mask, or why it is none.

    What follows a terminal row is worth nothing, so that any distribution will do there.
    """
    if episodes.truncated.any():
        cut = int(episodes.truncated.sum())
        return None, f"{cut} episodes are truncated, and the column does not say what the policy does past their end"
    place: dict[bytes, int] = {}
    of_row = np.array(
        [place.setdefault(key, row) for row, key in enumerate(_keys(episodes.observation, episodes.mask))]
    )
    if np.abs(probs - probs[of_row]).max() > ALIKE:
        return None, "the column differs between decisions with one observation, so it is no policy of the observation"

    def function(
        observation: Float[np.ndarray, "asked columns"], mask: Bool[np.ndarray, "asked actions"]
    ) -> Shaped[np.ndarray, "asked actions"]:
        uniform = mask / np.maximum(mask.sum(1, keepdims=True), 1)
        rows = np.array([place.get(key, -1) for key in _keys(observation, mask)])
        return np.where(rows[:, None] < 0, uniform, probs[rows])

    return function, ""
