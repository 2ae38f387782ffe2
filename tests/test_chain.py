"""The hash chain of served logs: any row that is altered, taken out, put in or moved breaks it."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from offrl_models import storage
from offrl_models.config import CoverageConfig, parse_pipeline
from offrl_models.logs.chain import sealed
from offrl_models.logs.coverage import measure
from offrl_models.logs.read import Log
from offrl_models.reports.checks import check_logs
from tests.conftest import as_table, attributes, chain_world

WORLD = chain_world()


def served(seed: int, first_id: int) -> pl.DataFrame:
    table = pl.DataFrame(as_table(WORLD.simulate(60, seed), first_id=first_id))
    at = [datetime(2025, 1, 1) + timedelta(minutes=i) for i in range(table.height)]
    return sealed(table.with_columns(pl.Series("at", at, pl.Datetime("us"))), "hash", "previous")


def found(frames: list[pl.DataFrame], folder: Path) -> tuple[bool, bool, str]:
    """Whether C34 holds, whether it blocks, and what it says."""
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= {"chain": {"hash": "hash", "previous": "previous"}, "decided_at": "at"}
    paths = [folder / f"{number}.parquet" for number in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        storage.write_parquet(path, frame.to_arrow())
    contract = parse_pipeline(configured, "toy").logs
    files = pl.DataFrame({"file": [path.name for path in paths], "unchanged": 1})
    results = check_logs(measure(Log.open(paths, contract)), contract, CoverageConfig(), files, folder / "docs")
    result = next(result for result in results if result.check == "C34")
    return result.passed, result.blocking, result.sentence


def test_an_unbroken_chain_holds(tmp_path: Path) -> None:
    assert found([served(1, 0), served(2, 100)], tmp_path) == (True, True, "holds: served logs are an unbroken chain")


TAMPERED: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], int]] = {
    "altered": (lambda f: f.with_columns(reward=pl.when(pl.int_range(pl.len()) == 9).then(0.25).otherwise("reward")), 1),
    "taken out": (lambda f: pl.concat([f[:9], f[10:]]), 1),
    "moved": (lambda f: pl.concat([f[:9], f[10:11], f[9:10], f[11:]]), 3),
    "hash altered": (lambda f: f.with_columns(hash=pl.when(pl.int_range(pl.len()) == 9).then(pl.lit("0")).otherwise("hash")), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_segment_that_was_tampered_with_is_blocked(name: str, tmp_path: Path) -> None:
    tamper, rows = TAMPERED[name]
    passed, blocking, sentence = found([served(1, 0), tamper(served(2, 100))], tmp_path)
    assert not passed and blocking
    assert sentence == f"{rows} rows of batch 1 do not continue the chain of the row before; the segment was altered"
