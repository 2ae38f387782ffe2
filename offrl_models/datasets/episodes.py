"""Episodes on disk: memory-mapped Arrow, written in one pass over the raw log.

`<split>.arrow` has one row per decision, in order of episode and step; `<split>.episodes.arrow` has one row per episode, and
`<split>.finals.arrow` what was observed after the last of its rows.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Bool, Float32

from offrl_models import storage
from offrl_models.datasets.moments import Moments
from offrl_models.datasets.placement import Destination, Placement, place
from offrl_models.datasets.split import SPLITS, require_split
from offrl_models.logs import values
from offrl_models.logs.contract import Contract
from offrl_models.logs.index import Index, index
from offrl_models.logs.read import WORKERS, Log
from offrl_models.mapped import Columns, open_columns, read_table, write_table
from offrl_models.schema import Episodes, InputError

MOMENTS = "moments.json"  # of the observed columns of the train split
BLOCK = 4096  # rows whose moments are taken at a time: they stay in the cache of the processor


def _row_columns(contract: Contract) -> dict[str, tuple[Any, int | None]]:
    action = contract.action
    found: dict[str, tuple[Any, int | None]] = {
        "observation": (np.float32, len(contract.features)),
        "action": (np.float32, action.dimensions) if action.continuous else (np.int64, None),
        "reward": (np.float64, None),
        "terminated": (np.bool_, None),
        "truncated": (np.bool_, None),
        "action_prob": (np.float64, None),
    }
    if action.mask or action.candidates:
        found["mask"] = (np.bool_, action.n_actions)
    if contract.interval:
        found["interval"] = (np.float64, None)
    return found | {f"cost.{cost.column}": (np.float64, None) for cost in contract.costs}


def _row_values(chunk: pl.DataFrame, found: Index, contract: Contract) -> dict[str, np.ndarray]:
    """The columns of one chunk, but for the flags of the end."""
    arrays: dict[str, np.ndarray] = {
        "observation": values.observed_now(chunk, contract),
        "action": values.action(chunk, contract),
        "reward": values.rewards(chunk, contract, found.clock),
        "action_prob": values.propensities(chunk, contract),
    }
    allowed = values.mask(chunk, contract)
    if allowed is not None:
        arrays["mask"] = allowed
    for name, column in {
        "interval": contract.interval,
        **{f"cost.{c.column}": c.column for c in contract.costs},
    }.items():
        if column:
            arrays[name] = chunk[column].cast(pl.Float64).to_numpy()
    return arrays


def _columns_read(contract: Contract) -> list[str]:
    """Columns of the log that the rows are made of."""
    action, reward = contract.action, contract.reward
    read = [name for name, _ in contract.observed()] + [choice.column for choice in action.choices] + [*action.columns]
    read += [*reward.terms, *(cost.column for cost in contract.costs)]
    more = [action.column, action.mask, action.candidates, contract.interval]
    more += [contract.action_prob.column if contract.action_prob else None]
    more += [contract.decided_at if reward.window_hours else None]
    return list(dict.fromkeys([*read, *(name for name in more if name)]))


def write_splits(log: Log, salt: str, folder: Path, found: Index | None = None) -> dict[str, dict[str, int]]:
    """Split a checked log by entity and write its episodes. Returns rows and episodes per split.

    `found` is the index of the log, where it is known already. Raises InputError when a split would be empty.
    """
    contract, found = log.contract, found or index(log)
    placed = place(found, contract, salt)
    placements = Placement.by_batch(found, placed)
    parts = {name: placed.filter(pl.col("split") == number) for number, name in enumerate(SPLITS)}
    counts = {name: {"rows": int(part["length"].sum()), "episodes": part.height} for name, part in parts.items()}
    width, row_columns = len(contract.features), _row_columns(contract)
    finals = [np.zeros((part.height if contract.horizon is None else 0, width), np.float32) for part in parts.values()]
    train, selection, gate = (Columns(folder / f"{name}.arrow", row_columns, counts[name]["rows"]) for name in SPLITS)

    def write(number: int, first: int, chunk: pl.DataFrame) -> None:
        arrays, to = _row_values(chunk, found, contract), placements[number].of_rows(first, chunk.height)
        for split, file in enumerate((train, selection, gate)):
            mine = np.flatnonzero(to.inside(split))
            rows = to.row[mine]
            for name, array in arrays.items():
                file.write(name, rows, np.take(array, mine, axis=0, mode="clip"))
        _keep_finals(finals, chunk, arrays["observation"], to, contract)

    with train, selection, gate:
        for _ in log.each(write, _columns_read(contract)):
            pass
        for file, part in zip((train, selection, gate), parts.values(), strict=True):
            _write_flags(file, part)
        with ThreadPoolExecutor(1) as pool:
            written = [pool.submit(file.sync) for file in (selection, gate, train)]  # while the moments are taken
            moments = _moments(train, width)
            for file in written:
                file.result()
    for (name, part), final in zip(parts.items(), finals, strict=True):
        write_table(folder / f"{name}.episodes.arrow", _episode_table(part, contract))
        if contract.horizon is None:
            with Columns(
                folder / f"{name}.finals.arrow", {"observation": row_columns["observation"]}, len(final)
            ) as file:
                file.write("observation", np.arange(len(final)), final)
    storage.write_json(folder / MOMENTS, moments.to_json(contract.features))
    return counts


def _write_flags(file: Columns, part: pl.DataFrame) -> None:
    """The flags of the end, on the last row of every episode."""
    last = (part["start"] + part["length"] - 1).to_numpy()
    for flag in ("terminated", "truncated"):
        values = np.zeros(file.rows, bool)
        values[last] = part[flag].to_numpy()
        file.write(flag, np.arange(file.rows), values)


def _moments(train: Columns, width: int) -> Moments:
    """Of the train split in its own order, so that they do not depend on the order in which rows arrived."""
    found = Moments(width)
    with ThreadPoolExecutor(WORKERS) as pool:
        for part in pool.map(Moments.of, train.blocks("observation", BLOCK)):
            found.merge(part)
    return found


def _keep_finals(
    finals: Sequence[np.ndarray],
    chunk: pl.DataFrame,
    observation: Float32[np.ndarray, "rows columns"],
    to: Destination,
    contract: Contract,
) -> None:
    """What was observed after the last row that an episode keeps, where the chunk has it."""
    if contract.horizon == 1:
        return
    if contract.next_observation is None:
        here = np.flatnonzero((to.split >= 0) & (to.row == to.end))
        observed = observation[here]
    else:
        here = np.flatnonzero((to.split >= 0) & (to.row == to.end - 1))
        observed = values.observation(chunk[here], contract, contract.next_observation)
    for number, final in enumerate(finals):
        mine = to.split[here] == number
        final[to.episode[here][mine]] = observed[mine]


def _episode_table(part: pl.DataFrame, contract: Contract) -> pa.Table:
    """One row per episode of a split."""
    labels = [pl.col(f"label.{name}") for name in contract.labels]
    return part.select(pl.col("episode").alias("episode_id"), "entity", "length", "open", *labels).to_arrow()


def read_splits(folder: Path, *names: str, salt: str, contract: Contract) -> Episodes:
    """The episodes of one or several splits, in order of split. One split is mapped, not copied. Every bucket is recomputed.

    Raises InputError when a file is damaged or an entity is on the wrong side.
    """
    rows = [open_columns(folder / f"{name}.arrow") for name in names]
    tables = [read_table(folder / f"{name}.episodes.arrow") for name in names]
    table = pa.concat_tables(tables)
    require_split(table["entity"].unique().to_numpy(zero_copy_only=False), salt, *names)
    columns = rows[0] if len(rows) == 1 else {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    length = table["length"].to_numpy().astype(np.int64)
    observation = columns["observation"]
    if int(length.sum()) != len(observation):
        raise InputError(
            f"{folder}: the rows and the episodes of {' and '.join(names)} do not fit; build the episodes again."
        )
    return Episodes(
        episode_id=table["episode_id"].to_numpy(zero_copy_only=False),
        offsets=np.append(0, length.cumsum()),
        observation=observation,
        final_observation=_finals(folder, names, (table.num_rows, observation.shape[1]), contract),
        action=columns["action"],
        mask=_mask(columns, contract, len(observation)),
        reward=columns["reward"],
        terminated=columns["terminated"],
        truncated=columns["truncated"],
        action_prob=columns["action_prob"],
        gamma=contract.gamma,
        interval=columns.get("interval"),
        features=contract.features,
        entity=table["entity"].to_numpy(zero_copy_only=False),
        costs={name.removeprefix("cost."): values for name, values in columns.items() if name.startswith("cost.")},
        labels={name: table[f"label.{name}"].to_numpy(zero_copy_only=False) for name in contract.labels},
    )


def _finals(folder: Path, names: Sequence[str], shape: tuple[int, int], contract: Contract) -> np.ndarray:
    if contract.horizon == 1:
        return np.broadcast_to(np.float32(0.0), shape)
    parts = [open_columns(folder / f"{name}.finals.arrow")["observation"] for name in names]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _mask(columns: dict[str, np.ndarray], contract: Contract, rows: int) -> Bool[np.ndarray, "rows actions"]:
    """The logged mask; everything is allowed where none was logged, in no memory of its own."""
    return columns["mask"] if "mask" in columns else np.broadcast_to(np.True_, (rows, contract.action.n_actions))
