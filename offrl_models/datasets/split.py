"""The permanent split: an entity's bucket depends on its id and the salt alone, so it never changes sides."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Shaped

from offrl_models.schema import InputError

SPLITS = {"train": range(0, 60), "selection": range(60, 70), "gate": range(70, 100)}  # buckets of 100
AT_A_TIME = 16_384  # ids whose digests are in memory


def bucket(entity: object, salt: str) -> int:
    """sha256(salt, entity) mod 100."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{entity}".encode()).digest()) % 100


def buckets(entities: Shaped[np.ndarray, "n"], salt: str) -> Int64[np.ndarray, "n"]:
    stretches = (entities[start : start + AT_A_TIME] for start in range(0, len(entities), AT_A_TIME))
    return np.concatenate([_buckets(stretch.tolist(), salt) for stretch in stretches] or [np.zeros(0, np.int64)])


def _buckets(entities: Sequence[object], salt: str) -> Int64[np.ndarray, "n"]:
    start, hashed = f"{salt}\0".encode(), hashlib.sha256
    digests = b"".join([hashed(start + str(entity).encode()).digest() for entity in entities])
    words = np.frombuffer(digests, ">u8").reshape(-1, 4).astype(np.uint64) % np.uint64(100)
    weights = np.array(
        [2**192 % 100, 2**128 % 100, 2**64 % 100, 1], np.uint64
    )  # of the words of one number, modulo 100
    return (words @ weights % np.uint64(100)).astype(np.int64)


def require_split(entities: Shaped[np.ndarray, "n"], salt: str, *allowed: str) -> None:
    """Recompute every bucket. Raises InputError when an entity belongs to a split other than those allowed."""
    wanted = {number for name in allowed for number in SPLITS[name]}
    outside = entities[~np.isin(buckets(entities, salt), sorted(wanted))]
    if len(outside):
        raise InputError(
            f"{len(outside)} entities, the first {str(outside[0])!r}, do not belong to the split "
            f"{' or '.join(allowed)}; build the episodes again from the raw logs."
        )
