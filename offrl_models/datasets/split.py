"""The permanent split: an entity's bucket depends on its id and the salt alone, so it never changes sides."""

import hashlib

import numpy as np
from jaxtyping import Int64, Shaped

from offrl_models.schema import InputError

SPLITS = {"train": range(0, 60), "selection": range(60, 70), "gate": range(70, 100)}  # buckets of 100


def bucket(entity: object, salt: str) -> int:
    """sha256(salt, entity) mod 100."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{entity}".encode()).digest()) % 100


def buckets(entities: Shaped[np.ndarray, "n"], salt: str) -> Int64[np.ndarray, "n"]:
    start, hashed = f"{salt}\0".encode(), hashlib.sha256
    digests = b"".join([hashed(start + str(entity).encode()).digest() for entity in entities.tolist()])
    words = np.frombuffer(digests, ">u4").reshape(-1, 8).astype(np.int64)
    remainder = np.zeros(len(words), np.int64)
    for word in words.T:  # the number modulo 100, word by word
        remainder = (remainder * (2**32 % 100) + word) % 100
    return remainder


def require_split(entities: Shaped[np.ndarray, "n"], salt: str, *allowed: str) -> None:
    """Recompute every bucket. Raises InputError when an entity belongs to a split other than those allowed."""
    wanted = {number for name in allowed for number in SPLITS[name]}
    outside = entities[~np.isin(buckets(entities, salt), sorted(wanted))]
    if len(outside):
        raise InputError(
            f"{len(outside)} entities, the first {str(outside[0])!r}, do not belong to the split "
            f"{' or '.join(allowed)}; build the episodes again from the raw logs."
        )
