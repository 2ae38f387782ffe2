"""Reading raw batches: one Parquet file is one batch, and a file that cannot be trusted is named, not skipped."""

import hashlib
import json
from pathlib import Path

import polars as pl
import pyarrow as pa

from offrl_models import storage
from offrl_models.logs.contract import Contract, matches_kind
from offrl_models.schema import InputError

BATCH = "_batch"  # index of the file a row came from, in the order in which the batches are read


def batch_files(folder: Path) -> list[Path]:
    """Batches of a folder in the order of their names, which is the order of their arrival."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def read_batch(path: Path, contract: Contract) -> pa.Table:
    """One batch, its page checksums verified and its schema held against the contract (check C01).

    Raises InputError naming the file and the column when the file is damaged, a column is missing or has the wrong type,
    or the batch has no rows.
    """
    table = storage.read_parquet(path)
    for name, kind in contract.columns().items():
        if name not in table.column_names:
            raise InputError(
                f"{path}: column {name!r} is missing in all {table.num_rows} rows; "
                f"the contract needs it ({kind}), so write the batch again with it."
            )
        dtype = table.schema.field(name).type
        if not matches_kind(kind, dtype):
            raise InputError(
                f"{path}: column {name!r} is {dtype} in all {table.num_rows} rows where the contract needs "
                f"a {kind}; convert it and write the batch again."
            )
    if table.num_rows == 0:
        raise InputError(f"{path}: the batch has 0 rows; leave it out or write it again with its decisions.")
    return table.select(list(contract.columns()))


def read_batches(paths: list[Path], contract: Contract) -> pl.DataFrame:
    """All batches as one frame; column `_batch` is the index into `paths`. Keys are read as strings.

    Raises InputError for the first batch that cannot be used, or when there is none.
    """
    if not paths:
        raise InputError(
            f"no *.parquet batch lies in {contract.source}; put one there, or run `dvc pull` or `dvc repro` to fetch it."
        )
    return concatenate([read_batch(path, contract) for path in paths], contract)


def concatenate(batches: list[pa.Table], contract: Contract) -> pl.DataFrame:
    """Batches that hold to the contract as one frame, in one set of types."""
    casts = []
    for name, kind in contract.columns().items():
        match kind:
            case "key":
                casts.append(pl.col(name).cast(pl.String))
            case "integer":
                casts.append(pl.col(name).cast(pl.Int64))
            case "number":
                casts.append(pl.col(name).cast(pl.Float64))
            case "mask":
                casts.append(pl.col(name).cast(pl.List(pl.Boolean)))
            case "time":
                casts.append(pl.col(name).cast(pl.Datetime("us")))
    return pl.concat(
        pl.DataFrame(batch).with_columns(*casts, pl.lit(index, pl.Int32).alias(BATCH))
        for index, batch in enumerate(batches)
    )


def log_version(folder: Path) -> str:
    """The digest that DVC gives a folder of batches: md5 over the list of its files and their md5."""
    files = [
        {"md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(), "relpath": path.name}
        for path in batch_files(folder)
    ]
    return hashlib.md5(json.dumps(files, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
