"""Provenance of served logs (C34): every row carries the hash of the row before it, so that no row can be altered or taken out.

A segment is one batch. The hash of a row is sha256 over the hash before it and the canonical JSON of its other columns.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import polars as pl

from offrl_models import storage
from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH


def link(previous: str, row: Mapping[str, Any]) -> str:
    """The hash of a row that follows the row with hash `previous`."""
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}
    return storage.sha256_bytes(previous.encode() + b"\n" + storage.canonical_json(plain))


def sealed(frame: pl.DataFrame, hash_column: str, previous_column: str, start: str = "") -> pl.DataFrame:
    """Rows with the two columns that chain them: what writes logs seals them so."""
    before, hashes, last = [], [], start
    for row in frame.iter_rows(named=True):
        before.append(last)
        last = link(last, row)
        hashes.append(last)
    return frame.with_columns(pl.Series(hash_column, hashes, pl.String), pl.Series(previous_column, before, pl.String))


class Chain:
    """Follows the chain of every batch, chunk by chunk."""

    def __init__(self, contract: Contract):
        self.contract = contract
        self.last: dict[int, str] = {}  # batch -> hash of the last row seen
        self.broken: dict[int, int] = {}  # batch -> rows that do not continue the chain

    def add(self, chunk: pl.DataFrame) -> None:
        chain = self.contract.chain
        if chain is None:
            return
        content = chunk.select(name for name in self.contract.kinds if name not in (chain.hash, chain.previous))
        batch = int(chunk[BATCH][0])
        last, broken = self.last.get(batch), self.broken.get(batch, 0)
        stated = zip(chunk[chain.previous].to_list(), chunk[chain.hash].to_list(), strict=True)
        for row, (previous, own) in zip(content.iter_rows(named=True), stated, strict=True):
            follows = previous is not None and (last is None or previous == last)
            broken += not (follows and own == link(str(previous), row))
            last = own
        self.last[batch], self.broken[batch] = last or "", broken

    def found(self) -> pl.DataFrame:
        """One row per batch: batch, broken rows."""
        schema = {"batch": pl.Int64, "broken": pl.Int64}
        return pl.DataFrame(sorted(self.broken.items()), schema=schema, orient="row")
