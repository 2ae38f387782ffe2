"""Episodes on disk: one Parquet file per split, rows in order of episode and step, canonical column names."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from offrl_models import storage
from offrl_models.datasets.split import SPLITS, buckets, require_split
from offrl_models.logs.contract import Contract
from offrl_models.schema import Episodes, InputError

CATEGORY_LIMIT = 2**24  # float32 holds every integer below it exactly


def canonical(log: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """A checked log under the canonical names, sorted by episode and step."""
    actions = contract.action.values
    wide = [c.column for c in contract.observation if (c.categories or 0) > CATEGORY_LIMIT]
    if wide:
        raise InputError(f"column {wide[0]!r} has over {CATEGORY_LIMIT:,} categories; group them first.")
    mask = pl.col(contract.action.mask) if contract.action.mask else pl.lit([True] * actions, pl.List(pl.Boolean))

    def vector(names: list[str]) -> pl.Expr:
        return pl.concat_arr([pl.col(name).cast(pl.Float32) for name in names])

    return log.sort(contract.episode_id, contract.step).select(
        pl.col(contract.episode_id).alias("episode_id"),
        pl.col(contract.entity_column).alias("entity"),
        pl.col(contract.step).alias("step"),
        vector([c.column for c in contract.observation]).alias("observation"),
        vector(contract.next_observation).alias("next_observation"),
        pl.col(contract.action.column).alias("action"),
        mask.list.to_array(actions).alias("mask"),
        pl.col(contract.reward.column).alias("reward"),
        pl.col(contract.terminated).alias("terminated"),
        (pl.col(contract.truncated) if contract.truncated else pl.lit(False)).alias("truncated"),
        pl.col(contract.action_prob).alias("action_prob"),
    )


def write_splits(log: pl.DataFrame, contract: Contract, salt: str, folder: Path) -> dict[str, dict[str, int]]:
    """Split a checked log by entity and write one file per split.

    Returns rows and episodes per split. Raises InputError when a split would be empty.
    """
    rows = canonical(log, contract)
    entities = rows["entity"].unique()
    side = pl.DataFrame({"entity": entities, "bucket": buckets(entities.to_numpy(), salt)})
    rows = rows.join(side, on="entity", how="left", maintain_order="left")
    sides = rows.group_by("episode_id").agg(pl.col("entity").n_unique()).filter(pl.col("entity") > 1)
    if sides.height:
        raise InputError(
            f"{sides.height} episodes, the first of them {sides['episode_id'][0]!r}, have several entities in column "
            f"{contract.entity_column!r}; an episode belongs to one, or it would be cut up between splits."
        )
    counts = {}
    for name, wanted in SPLITS.items():
        part = rows.filter(pl.col("bucket").is_between(wanted.start, wanted.stop - 1)).drop("bucket")
        if part.height == 0:
            raise InputError(
                f"the log has {rows['episode_id'].n_unique()} episodes and none falls into the {name} split; collect more."
            )
        storage.write_parquet(folder / f"{name}.parquet", part.to_arrow())
        counts[name] = {"rows": part.height, "episodes": part["episode_id"].n_unique()}
    return counts


def _writable(column: pa.ChunkedArray) -> np.ndarray:
    """A copy that torch may share; a fixed-size list becomes a matrix."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return np.array(array.flatten().to_numpy(zero_copy_only=False)).reshape(-1, array.type.list_size)
    return np.array(array.to_numpy(zero_copy_only=False))


def read_splits(folder: Path, *names: str, salt: str, gamma: float) -> Episodes:
    """The episodes of one or several splits, in order of split. Every entity's bucket is recomputed.

    Raises InputError when a file is damaged or an entity is on the wrong side.
    """
    table = pa.concat_tables(storage.read_parquet(folder / f"{name}.parquet") for name in names)
    episode = table["episode_id"].to_numpy()
    starts = np.flatnonzero(np.append(True, episode[1:] != episode[:-1]))
    require_split(np.unique(table["entity"].to_numpy()), salt, *names)
    return Episodes(
        episode_id=episode[starts],
        offsets=np.append(starts, len(episode)),
        observation=_writable(table["observation"]),
        next_observation=_writable(table["next_observation"]),
        action=_writable(table["action"]),
        mask=_writable(table["mask"]),
        reward=_writable(table["reward"]),
        terminated=_writable(table["terminated"]),
        truncated=_writable(table["truncated"]),
        action_prob=_writable(table["action_prob"]),
        gamma=gamma,
    )
