"""The DVC stage that makes the example's raw logs: 20,000 simulated ICU stays, in the batches in which they arrived."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from offrl_models import storage
from offrl_models.ope.worlds import icu_sepsis, icu_tables

STAYS, BATCHES, SEED = 20_000, 8, 2026
RAW = Path(__file__).parent / "raw"


def main() -> None:
    stays = icu_sepsis().simulate(STAYS, SEED)
    state = stays.observation[:, 0].astype(np.int16)
    # A stay is admitted every half hour, and a decision is taken every four hours.
    admitted = np.datetime64(datetime(2026, 1, 1), "s") + np.arange(STAYS) * np.timedelta64(30, "m")
    decided_at = admitted[stays.episode_of_row] + stays.step * np.timedelta64(4, "h")
    table = pa.table(
        {
            "stay_id": stays.episode_of_row.astype(np.int32),
            "step": stays.step.astype(np.int16),
            "state": state,
            "sofa": icu_tables()["sofa_scores"][state].astype(np.float32),
            "action": stays.action.astype(np.int8),
            "admissible": pa.FixedSizeListArray.from_arrays(pa.array(stays.mask.ravel()), stays.n_actions),
            "action_prob": stays.action_prob,
            "reward": stays.reward.astype(np.float32),
            "terminated": stays.terminated,
            "truncated": stays.truncated,
            "next_state": stays.next_observation[:, 0].astype(np.int16),
            "policy_version": pa.array(["clinicians-1"] * stays.n_rows).dictionary_encode(),
            "decided_at": decided_at.astype("datetime64[us]"),
        }
    )
    per_batch = STAYS // BATCHES
    for batch in range(BATCHES):
        first, last = stays.offsets[batch * per_batch], stays.offsets[(batch + 1) * per_batch]
        storage.write_parquet(RAW / f"batch-{batch + 1:03d}.parquet", table.slice(first, last - first))
    print(f"wrote {stays.n_rows:,} decisions of {STAYS:,} stays in {BATCHES} batches to {RAW}")


if __name__ == "__main__":
    main()
