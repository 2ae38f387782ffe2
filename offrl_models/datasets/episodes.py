"""Episodes on disk: memory-mapped Arrow, written in one pass over the raw log.

`<split>.arrow` has one row per decision, in order of episode and step; `<split>.episodes.arrow` has one row per episode, and
`<split>.finals.arrow` what was observed after the last of its rows.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Bool

from offrl_models import storage
from offrl_models.datasets.cut import write_cut
from offrl_models.datasets.moments import Moments
from offrl_models.datasets.placement import Destination, Placement, place, splits_of
from offrl_models.datasets.split import SPLITS, require_split
from offrl_models.logs import values
from offrl_models.logs.contract import Contract
from offrl_models.logs.index import analyse, read_runs
from offrl_models.logs.read import CHUNK, WORKERS, Log
from offrl_models.mapped import Columns, open_columns, read_table, write_table
from offrl_models.schema import Episodes, InputError

MOMENTS = "moments.json"  # of the observed columns of the train split
BLOCK = 16_384  # rows that are gathered and written at a time
CACHED = 8192  # rows whose moments are taken at a time: in double precision they stay in the cache
SYNC_S = 0.25  # between two times that what was written is brought to disk, while more is being written


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


def _row_values(chunk: pl.DataFrame, clock: datetime | None, contract: Contract) -> dict[str, np.ndarray]:
    """The columns of one chunk, but for the observation and the flags of the end."""
    arrays: dict[str, np.ndarray] = {
        "action": values.action(chunk, contract),
        "reward": values.rewards(chunk, contract, clock),
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


def write_splits(log: Log, salt: str, folder: Path) -> dict[str, dict[str, int]]:
    """Split a checked log by entity and write its episodes. Returns rows and episodes per split.

    Raises InputError when a split would be empty.
    """
    splits = _Splits(log, salt, folder)
    with splits.filled():
        for _ in log.each(splits.write, _columns_read(log.contract)):
            pass
        splits.write_flags()
        moments = splits.moments()
    splits.write_episodes()
    write_cut(log, splits.found, folder)
    storage.write_json(folder / MOMENTS, moments.to_json(log.contract.features))
    return splits.counts


class _Splits:
    """The files of all splits while they are filled; several threads may write at a time."""

    def __init__(self, log: Log, salt: str, folder: Path):
        self.contract, self.folder = log.contract, folder
        runs = read_runs(log)
        with ThreadPoolExecutor(1) as pool:
            split = pool.submit(splits_of, runs.frame["entity"], salt)
            found = analyse(runs, log)
            placed = place(found, self.contract, split.result())
        del runs
        self.found = found
        self.clock, self.placements = found.clock, Placement.by_batch(found, placed)
        self.episodes = [placed.filter(pl.col("split") == number) for number in range(len(SPLITS))]
        self.counts = {
            name: {"rows": int(part["length"].sum()), "episodes": part.height}
            for name, part in zip(SPLITS, self.episodes, strict=True)
        }
        width, several = len(self.contract.features), self.contract.horizon is None
        self.finals = [np.zeros((part.height if several else 0, width), np.float32) for part in self.episodes]
        columns = _row_columns(self.contract)
        self.files = [Columns(folder / f"{name}.arrow", columns, self.counts[name]["rows"]) for name in SPLITS]

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """The files take their names at the end. What is written is brought to disk in the meantime, so that little is left
        to wait for then."""
        over = threading.Event()

        def sync() -> None:
            while not over.wait(SYNC_S):
                for file in self.files:
                    file.sync()

        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
            for file in self.files:
                stack.enter_context(file)
            syncing = pool.submit(sync)
            try:
                yield
            finally:
                over.set()
                syncing.result()

    def write(self, number: int, first: int, chunk: pl.DataFrame) -> None:
        """The rows of one chunk, which begins at row `first` of its batch, but for the flags of the end."""
        contract, placement = self.contract, self.placements[number]
        arrays = _row_values(chunk, self.clock, contract)
        observed = values.observed(chunk, contract, [column.column for column in contract.observation])
        to = placement.of_rows(first, chunk.height)
        order = None if placement.rises else np.lexsort((to.row, to.split))
        for start in range(0, chunk.height, BLOCK):
            rows = slice(start, start + BLOCK) if order is None else order[start : start + BLOCK]
            here = Destination(*(part[rows] for part in to))
            block = {
                "observation": values.matrix(observed, rows),
                **{name: array[rows] for name, array in arrays.items()},
            }
            for split, file in enumerate(self.files):
                mine = np.flatnonzero(here.inside(split))
                file.write(
                    here.row[mine], {name: np.take(array, mine, 0, mode="clip") for name, array in block.items()}
                )
        self._keep_finals(chunk, observed, to)

    def _keep_finals(self, chunk: pl.DataFrame, observed: Sequence[np.ndarray], to: Destination) -> None:
        """What was observed after the last row that an episode keeps, where the chunk has it."""
        if self.contract.horizon == 1:
            return
        if self.contract.next_observation is None:
            here = np.flatnonzero((to.split >= 0) & (to.row == to.end))
            last = values.matrix(observed, here)
        else:
            here = np.flatnonzero((to.split >= 0) & (to.row == to.end - 1))
            last = values.observation(chunk[here], self.contract, self.contract.next_observation)
        for number, final in enumerate(self.finals):
            mine = to.split[here] == number
            final[to.episode[here][mine]] = last[mine]

    def write_flags(self) -> None:
        """The flags of the end, on the last row of every episode."""
        for file, part in zip(self.files, self.episodes, strict=True):
            last = (part["start"] + part["length"] - 1).to_numpy()
            for flag in ("terminated", "truncated"):
                flags = np.zeros(file.rows, bool)
                flags[last] = part[flag].to_numpy()
                file.fill(flag, 0, flags)

    def moments(self) -> Moments:
        """Of the train split in its own order, so that they do not depend on the order in which rows arrived."""
        train, width = self.files[0], len(self.contract.features)

        def of_stretch(first: int) -> Moments:
            found = Moments(width)
            for start in range(first, min(first + CHUNK, train.rows), CACHED):
                found.add(train.read("observation", start, CACHED))
            return found

        found = Moments(width)
        with ThreadPoolExecutor(WORKERS) as pool:
            for part in pool.map(of_stretch, range(0, train.rows, CHUNK)):
                found.merge(part)
        return found

    def write_episodes(self) -> None:
        """One row per episode, and what was observed after its last."""
        for name, part, final in zip(SPLITS, self.episodes, self.finals, strict=True):
            write_table(self.folder / f"{name}.episodes.arrow", _episode_table(part, self.contract))
            if self.contract.horizon is None:
                column = {"observation": (np.float32, final.shape[1])}
                with Columns(self.folder / f"{name}.finals.arrow", column, len(final)) as file:
                    file.fill("observation", 0, final)


def _episode_table(part: pl.DataFrame, contract: Contract) -> pa.Table:
    """One row per episode of a split."""
    labels = [pl.col(f"label.{name}") for name in contract.labels]
    return part.select(
        pl.col("episode").alias("episode_id"), "entity", "length", "open", "recorded", *labels
    ).to_arrow()


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
        bounds=np.array(contract.action.bounds).T if contract.action.continuous else None,
        entity=table["entity"].to_numpy(zero_copy_only=False),
        recorded=table["recorded"].to_numpy(zero_copy_only=False),
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
