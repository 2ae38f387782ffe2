"""Where every row of a log goes: which split, and which row of it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64

from offrl_models.datasets.split import SPLITS, buckets
from offrl_models.logs.contract import Contract
from offrl_models.logs.index import Index
from offrl_models.schema import InputError


def splits_of(entities: pl.Series, salt: str) -> pl.DataFrame:
    """The number of the split of every entity, each once."""
    each = entities.unique().rename("entity")
    later = np.array([numbers.start for numbers in list(SPLITS.values())[1:]])
    return pl.DataFrame({"entity": each, "split": np.searchsorted(later, buckets(each.to_numpy(), salt), "right")})


def place(found: Index, contract: Contract, split: pl.DataFrame) -> pl.DataFrame:
    """Episodes that enter the dataset, sorted by id: their split, the row of it where they begin, and how many they keep.

    Left out are episodes with gaps, and those whose rewards may still come. An open episode counts as truncated. Where the log
    has no next observation, a truncated episode ends one decision earlier, at the last observation that is known.
    Raises InputError when a split would be empty, and where two ids are one that is written in two ways.
    """
    for column in ("entity", "episode"):
        _require_written_alike(found.episodes[column], getattr(contract, f"{column}_column"))
    kept = found.episodes.filter(~pl.col("gap") & ~pl.col("pending")).with_columns(truncated=~pl.col("terminated"))
    if contract.next_observation is None:
        kept = kept.with_columns(pl.col("length") - pl.col("truncated")).filter(pl.col("length") > 0)
    kept = kept.join(split, on="entity", how="left", maintain_order="left")
    for number, name in enumerate(SPLITS):
        if not (kept["split"] == number).any():
            raise InputError(f"the log has {kept.height} episodes and none falls into the {name} split; collect more.")
    start = (pl.col("length").cum_sum() - pl.col("length")).over("split")
    return kept.with_columns(start=start, number=pl.int_range(pl.len()).over("split"))


def _require_written_alike(ids: pl.Series, column: str) -> None:
    """Blanks around an id, and the .0 of a column that was once a number, make two of what is one: it would be in two splits."""
    if ids.dtype != pl.String:
        return
    each = (
        ids.unique(maintain_order=True)
        .to_frame("id")
        .with_columns(plain=pl.col("id").str.strip_chars().str.replace(r"^([0-9]+)\.0$", "$1"))
    )
    twice = each.filter(pl.col("plain").is_duplicated()).sort("plain", "id")
    if twice.height:
        raise InputError(
            f"column {column!r} writes {twice['plain'].n_unique()} ids in two ways, such as {twice['id'][0]!r} and "
            f"{twice['id'][1]!r}; write each in one way, or one of them is trained on and judged by."
        )


class Destination(NamedTuple):
    """Of some rows of the log, one entry each."""

    split: Int64[np.ndarray, "rows"]  # number of the split, -1 where the row is left out
    row: Int64[np.ndarray, "rows"]  # row of the split
    end: Int64[np.ndarray, "rows"]  # row of the split at which the episode ends; rows from it on are cut off
    episode: Int64[np.ndarray, "rows"]  # number of the episode in the split

    def inside(self, split: int) -> Bool[np.ndarray, "rows"]:
        """Rows that the split keeps."""
        return (self.split == split) & (self.row < self.end)


@dataclass(frozen=True)
class Placement:
    """The destination of every run of one batch, in order of reading."""

    first: Int64[np.ndarray, "runs"]  # row of the batch at which each run begins
    runs: Destination  # of the first row of each run

    @classmethod
    def by_batch(cls, found: Index, placed: pl.DataFrame) -> "dict[int, Placement]":
        facts = placed.select("episode", "split", "start", "number", end=pl.col("start") + pl.col("length"))
        runs = found.runs.select("batch", "row", "episode", "step").join(
            facts, on="episode", how="left", maintain_order="left"
        )
        known = runs.select(
            "batch", first="row", split=pl.col("split").fill_null(-1).cast(pl.Int64),
            row=(pl.col("start") + pl.col("step")).fill_null(0).cast(pl.Int64),
            end=pl.col("end").fill_null(0).cast(pl.Int64), number=pl.col("number").fill_null(0).cast(pl.Int64),
        )  # fmt: skip
        parts = known.partition_by("batch", as_dict=True, maintain_order=True)
        return {
            int(number): cls(
                part["first"].to_numpy(), Destination(*(part[n].to_numpy() for n in ("split", "row", "end", "number")))
            )
            for (number,), part in parts.items()
        }

    @cached_property
    def rises(self) -> bool:
        """Whether the rows of each split come in the order in which it keeps them."""
        first = [self.runs.row[self.runs.split == split] for split in range(len(SPLITS))]
        return all(bool((np.diff(rows) > 0).all()) for rows in first)

    def of_rows(self, first: int, rows: int) -> Destination:
        """The destination of `rows` rows of the batch from `first` on."""
        low = int(np.searchsorted(self.first, first, "right")) - 1
        high = int(np.searchsorted(self.first, first + rows, "left"))
        begins = np.maximum(self.first[low:high], first)
        counts = np.diff(np.append(begins, first + rows))
        split, row, end, episode = (np.repeat(values[low:high], counts) for values in self.runs)
        within = np.arange(first, first + rows) - np.repeat(self.first[low:high], counts)
        return Destination(split, row + within, end, episode)
