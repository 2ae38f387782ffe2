"""The DVC stage that makes the example's raw logs: 20,000 simulated ICU stays, in the batches in which they arrived."""

from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from offrl_models import storage
from offrl_models.ope.worlds import icu_sepsis, icu_tables

STAYS, BATCHES, SEED = 20_000, 8, 2026
RAW = Path(__file__).parent / "raw"


def raw_log(stays: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    """The log of some stays, and the row at which each stay begins (and the last one ends)."""
    drawn = icu_sepsis().simulate(stays, seed)
    state = drawn.observation[:, 0].astype(np.int16)
    # A stay is admitted every half hour, and a decision is taken every four hours.
    admitted = np.datetime64(datetime(2024, 1, 1), "s") + np.arange(stays) * np.timedelta64(30, "m")
    decided_at = admitted[drawn.episode_of_row] + drawn.step * np.timedelta64(4, "h")
    table = pa.table(
        {
            "stay_id": drawn.episode_of_row.astype(np.int32),
            "step": drawn.step.astype(np.int16),
            "state": state,
            "sofa": icu_tables()["sofa_scores"][state].astype(np.float32),
            "action": drawn.action.astype(np.int8),
            "admissible": pa.FixedSizeListArray.from_arrays(pa.array(drawn.mask.ravel()), drawn.n_actions),
            "action_prob": drawn.action_prob,
            "reward": drawn.reward.astype(np.float32),
            "terminated": drawn.terminated,
            "truncated": drawn.truncated,
            "next_state": drawn.next_observation[:, 0].astype(np.int16),
            "policy_version": pa.array(["clinicians-1"] * drawn.n_rows).dictionary_encode(),
            "decided_at": decided_at.astype("datetime64[us]"),
        }
    )
    return table, drawn.offsets


def write(folder: Path, stays: int, batches: int, seed: int) -> None:
    """Batches of whole stays, in order of admission."""
    table, offsets = raw_log(stays, seed)
    cuts = offsets[np.linspace(0, stays, batches + 1).astype(int)]
    for number, (first, last) in enumerate(pairwise(cuts), 1):
        storage.write_parquet(folder / f"batch-{number:03d}.parquet", table.slice(first, last - first))
    print(f"wrote {table.num_rows:,} decisions of {stays:,} stays in {batches} batches to {folder}")


if __name__ == "__main__":
    write(RAW, STAYS, BATCHES, SEED)
