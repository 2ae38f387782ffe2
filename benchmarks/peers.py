"""The work as users of polars, DuckDB and pandas would write it, each in the fastest of the ways that were tried.

What is written, per split: one uncompressed Arrow file with the rows in order of episode and step, and beside the splits
`moments.json` with mean and standard deviation of the observed columns over the train split.

`polars`, `duckdb` and `pandas` do what the library does: they take rows in any order, over all files. `polars_in_order` may rely
on more, and checks it: a file holds whole episodes, and ids rise from file to file. It then works file by file, and shows what
the order is worth to who can be sure of it.
Imports are inside the functions because each contender has a process of its own, and its memory should count nothing else.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SALT = "benchmark"
THREADS = 2
FEATURES = [f"f{number:02d}" for number in range(17)]
KEY = ["episode_id", "step"]
FIRST_BUCKET = {"train": 0, "selection": 60, "gate": 70}  # of 100
ROWS = pa.schema(
    {
        "episode_id": pa.int64(),
        "step": pa.int32(),
        "observation": pa.list_(pa.float32(), len(FEATURES)),
        "action": pa.int64(),
        "reward": pa.float64(),
        "terminated": pa.bool_(),
        "action_prob": pa.float64(),
    }
)

Array = np.ndarray[Any, np.dtype[Any]]
Frame = TypeVar("Frame")


def split_numbers(ids: Sequence[int]) -> Array:
    """Number of the split of each episode: sha256 of salt and id, mod 100, is its bucket."""
    digests = (hashlib.sha256(f"{SALT}\0{episode}".encode()).digest() for episode in ids)
    buckets = np.fromiter((int.from_bytes(digest) % 100 for digest in digests), np.int8, len(ids))
    return np.searchsorted(list(FIRST_BUCKET.values()), buckets, "right") - 1


@contextlib.contextmanager
def _split_writers(folder: Path) -> Iterator[list[pa.RecordBatchFileWriter]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(pa.ipc.new_file(folder / f"{name}.arrow", ROWS)) for name in FIRST_BUCKET]


def _ahead(read: Callable[[Path], Frame], files: Sequence[Path]) -> Iterator[tuple[Path, Frame]]:
    """Each file and what is in it, the next one read in another thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, files[0])
        for file, following in zip(files, [*files[1:], None], strict=True):
            frame = coming.result()
            if following is not None:
                coming = pool.submit(read, following)
            yield file, frame


def _write_moments(folder: Path, count: float, total: Array, squares: Array) -> None:
    mean = total / count
    write_moments(folder, mean, np.sqrt(squares / count - mean**2))


def write_moments(folder: Path, mean: Array, std: Array) -> None:
    moments = [
        {"name": name, "mean": float(m), "std": float(s)} for name, m, s in zip(FEATURES, mean, std, strict=True)
    ]
    (folder / "moments.json").write_text(json.dumps(moments))


def _require_rising(last: int | None, first: int, file: Path) -> None:
    if last is not None and first <= last:
        raise ValueError(f"{file} begins with episode {first}, which does not follow {last}")


def polars(files: Sequence[Path], folder: Path) -> None:
    """The keys first; then one lazy plan for all splits in the streaming engine, sorted only where the rows are in no order."""
    import polars as pl

    log = pl.scan_parquet(list(files))
    keys = log.select(KEY).collect(engine="streaming")
    episode, step = keys["episode_id"].diff(), keys["step"].diff()
    ordered = bool(((episode > 0) | ((episode == 0) & (step > 0))).drop_nulls().all())
    ids = keys["episode_id"].rle().struct.field("value") if ordered else keys["episode_id"].unique()
    side = pl.DataFrame({"episode_id": ids, "split": split_numbers(ids.to_list())})
    rows = [
        *KEY, pl.concat_arr(FEATURES).alias("observation"), pl.col("action").cast(pl.Int64),
        pl.col("reward").cast(pl.Float64), "terminated", pl.col("action_prob").cast(pl.Float64),
    ]  # fmt: skip
    joined = log.join(side.lazy(), on="episode_id", how="left", maintain_order="left")
    joined = joined if ordered else joined.sort(KEY)
    written = [
        joined.filter(split=number)
        .select(rows)
        .sink_ipc(folder / f"{name}.arrow", compression="uncompressed", lazy=True, maintain_order=True)
        for number, name in enumerate(FIRST_BUCKET)
    ]
    numbers = pl.col(FEATURES).cast(pl.Float64)
    moments = joined.filter(split=0).select(
        numbers.mean().name.suffix(" mean"), numbers.std(ddof=0).name.suffix(" std")
    )
    *_, found = pl.collect_all([*written, moments], engine="streaming")
    row = found.to_numpy()[0]
    write_moments(folder, row[: len(FEATURES)], row[len(FEATURES) :])


def polars_in_order(files: Sequence[Path], folder: Path) -> None:
    """Per file: read ahead, then one lazy plan for the three splits and the sums, so that the join is done once."""
    import polars as pl

    rows = [
        *KEY, pl.concat_arr(FEATURES).alias("observation"), pl.col("action").cast(pl.Int64),
        pl.col("reward").cast(pl.Float64), "terminated", pl.col("action_prob").cast(pl.Float64),
    ]  # fmt: skip
    numbers = pl.col(FEATURES).cast(pl.Float64)
    count, total, squares, last = 0, np.zeros(len(FEATURES)), np.zeros(len(FEATURES)), None
    with _split_writers(folder) as writers:
        for file, log in _ahead(pl.read_parquet, files):
            episode, step = log["episode_id"].diff(), log["step"].diff()
            if not ((episode > 0) | ((episode == 0) & (step > 0))).all():
                log = log.sort(KEY)
            ids = log["episode_id"].rle().struct.field("value")
            _require_rising(last, ids[0], file)
            last = ids[-1]
            side = pl.DataFrame({"episode_id": ids, "split": split_numbers(ids.to_list())})
            joined = log.lazy().join(side.lazy(), on="episode_id", how="left", maintain_order="left")
            splits = [joined.filter(split=number) for number in range(len(writers))]
            *parts, sums, powers = pl.collect_all(
                [
                    *(split.select(rows) for split in splits),
                    splits[0].select(numbers.sum()),
                    splits[0].select((numbers**2).sum()),
                ]
            )
            for writer, part in zip(writers, parts, strict=True):
                writer.write_table(part.to_arrow().cast(ROWS))
            count, total, squares = count + parts[0].height, total + sums.to_numpy()[0], squares + powers.to_numpy()[0]
    _write_moments(folder, count, total, squares)


def _bucket_sql() -> str:
    """The bucket in SQL: a digest of 256 bits is four words of 64, and 2**64 mod 100 is 16."""
    words = [f"('0x' || substr(digest, {1 + 16 * word}, 16))::UBIGINT % 100" for word in range(4)]
    return "(" + " + ".join(f"({word}) * {pow(2, 64 * (3 - i), 100)}" for i, word in enumerate(words)) + ") % 100"


def duckdb(files: Sequence[Path], folder: Path) -> None:
    """The split as a table made in SQL; one ordered query per split, streamed to Arrow; the moments in SQL."""
    import duckdb as db

    _, selection, gate = FIRST_BUCKET.values()
    vector = f"[{', '.join(FEATURES)}]::FLOAT[{len(FEATURES)}]"  # array_value was four times as slow
    sums = ", ".join(f"sum({name}::DOUBLE), sum({name}::DOUBLE * {name}::DOUBLE)" for name in FEATURES)
    paths = {"paths": [str(file) for file in files]}
    connection = db.connect(config={"threads": THREADS})
    connection.execute(
        f"""CREATE TABLE side AS
        WITH ids AS (SELECT DISTINCT episode_id FROM read_parquet($paths)),
            digests AS (SELECT episode_id, sha256(concat($salt, chr(0), episode_id)) AS digest FROM ids),
            buckets AS (SELECT episode_id, {_bucket_sql()} AS bucket FROM digests)
        SELECT episode_id, ((bucket >= {selection})::TINYINT + (bucket >= {gate})::TINYINT) AS split FROM buckets""",
        {**paths, "salt": SALT},
    )
    with _split_writers(folder) as writers:
        for number, writer in enumerate(writers):
            query = f"""SELECT episode_id, step, {vector} AS observation, action::BIGINT AS action,
                reward::DOUBLE AS reward, terminated, action_prob::DOUBLE AS action_prob
                FROM read_parquet($paths) JOIN side USING (episode_id) WHERE split = {number} ORDER BY episode_id, step"""
            for batch in connection.sql(query, params=paths).to_arrow_reader(200_000):
                writer.write_batch(batch.cast(ROWS))
    found = connection.execute(
        f"SELECT count(*), {sums} FROM read_parquet($paths) JOIN side USING (episode_id) WHERE split = 0", paths
    ).fetchone()
    assert found is not None
    _write_moments(folder, found[0], np.array(found[1::2]), np.array(found[2::2]))


def pandas(files: Sequence[Path], folder: Path) -> None:
    """All files in one frame, sorted where it is not in order, a split for each id by `factorize`, matrices by `to_numpy`."""
    import pandas as pd

    log = pd.read_parquet(files[0].parent)
    episode, step = log["episode_id"].diff()[1:], log["step"].diff()[1:]
    if not ((episode > 0) | ((episode == 0) & (step > 0))).all():
        log = log.sort_values(KEY)
    codes, ids = pd.factorize(log["episode_id"])
    split = split_numbers(ids.tolist())[codes]
    with _split_writers(folder) as writers:
        for number, writer in enumerate(writers):
            part = log.loc[split == number]
            matrix = part.loc[:, FEATURES].to_numpy(np.float32)
            columns: Mapping[str, Any] = {
                **{name: part[name].to_numpy() for name in ROWS.names if name != "observation"},
                "observation": pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), len(FEATURES)),
            }
            arrays = [columns[field.name] for field in ROWS]
            casted = [pa.array(array).cast(field.type) for array, field in zip(arrays, ROWS, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(casted, schema=ROWS))
            if number == 0:
                numbers = matrix.astype(np.float64)
                _write_moments(folder, len(numbers), numbers.sum(0), np.einsum("ij,ij->j", numbers, numbers))


def floor(files: Sequence[Path], folder: Path) -> None:
    """No work at all: the raw columns read, decoded and written by pyarrow, one row group after the other."""
    with contextlib.ExitStack() as stack:
        writer = None
        for file in files:
            log = pq.ParquetFile(file)
            if writer is None:
                writer = stack.enter_context(pa.ipc.new_file(folder / "log.arrow", log.schema_arrow))
            for group in range(log.num_row_groups):
                writer.write_table(log.read_row_group(group))
