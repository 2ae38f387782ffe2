"""What is left out where recordings stop: the last decision of a truncated episode, if nothing was observed after it.

Its reward was logged, and goes with it. Where recordings stop for what was decided or came of it, that matters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from offrl_models.datasets.split import SPLITS, buckets
from offrl_models.logs.index import Index
from offrl_models.logs.read import Log
from offrl_models.logs.values import rewards
from offrl_models.mapped import read_table, write_table

CUT = "cut.arrow"


@dataclass(frozen=True)
class Cut:
    """Last decisions that were left out."""

    rows: int = 0
    episodes: int = 0  # of which nothing is left
    reward: float = 0.0  # the size of theirs, summed, over the number of all episodes


UNCUT = Cut()


def write_cut(log: Log, found: Index, folder: Path) -> None:
    """Entity, length and size of the last reward of every episode that lost its last decision.

    Open episodes, which a later batch may complete, are not among them where the log tells them from truncated ones.
    """
    contract = log.contract
    ended = "open" if contract.truncated else "terminated"
    stopped = found.episodes.filter(~pl.col("gap") & ~pl.col("pending") & ~pl.col("terminated"))
    stopped = stopped.filter(~pl.col(ended)).select("episode", "entity", "length", step=pl.col("length") - 1)
    if contract.horizon == 1 or contract.next_observation is not None:
        stopped = stopped.clear()
    keys, reward = [contract.episode_column, contract.step_column], contract.reward
    named = [*keys, *reward.terms, *filter(None, (contract.decided_at, reward.arrived_at))]
    size = pl.DataFrame(schema={"episode": stopped.schema["episode"], "reward": pl.Float64})
    for chunk in log.chunks(dict.fromkeys(named)) if stopped.height else ():
        last = chunk.join(stopped, left_on=keys, right_on=["episode", "step"], how="semi")
        each = np.abs(rewards(last, contract, found.clock)).astype(np.float64)
        size.extend(last.select(pl.col(keys[0]).alias("episode").cast(size.schema["episode"]), reward=pl.Series(each)))
    table = stopped.join(size.unique("episode", keep="first"), on="episode", how="left", maintain_order="left")
    write_table(folder / CUT, table.select("entity", "length", pl.col("reward").fill_null(0.0)).to_arrow())


def read_cut(folder: Path, episodes: int, salt: str | None = None, split: str = "gate") -> Cut:
    """Of `episodes` that are left of a whole log, or of the entities of a split by `salt`."""
    table = pl.DataFrame(read_table(folder / CUT))
    if salt is not None and table.height:
        table = table.filter(pl.Series(np.isin(buckets(table["entity"].to_numpy(), salt), SPLITS[split])))
    nothing_left = int((table["length"] == 1).sum())
    return Cut(table.height, nothing_left, float(table["reward"].sum()) / max(episodes + nothing_left, 1))
