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
    return np.fromiter((bucket(entity, salt) for entity in entities), np.int64, len(entities))


def require_split(entities: Shaped[np.ndarray, "n"], salt: str, *allowed: str) -> None:
    """Recompute every bucket. Raises InputError when an entity belongs to a split other than those allowed."""
    wanted = {number for name in allowed for number in SPLITS[name]}
    outside = [entity for entity in entities if bucket(entity, salt) not in wanted]
    if outside:
        raise InputError(
            f"{len(outside)} episodes, the first of entity {outside[0]!r}, do not belong to the split "
            f"{' or '.join(allowed)}; build the episodes again from the raw logs."
        )
