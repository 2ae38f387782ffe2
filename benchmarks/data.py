"""From raw Parquet logs to split, encoded, memory-mappable episodes, beside polars, DuckDB and pandas.

    python -m benchmarks.data                                       # all contenders, 10 million rows
    python -m benchmarks.data --interleaved                         # rows in order of time, many episodes at once
    python -m benchmarks.data --rows 100_000_000 --contender offrl  # out of core: our peak memory

The log has 23 columns: episode_id, step, 17 float32 features, action, action_prob, reward, terminated. Episodes have 1 to 39
rows. The files are what `pyarrow.parquet.write_table` makes of it with zstd and page checksums.

The work, for every contender: an episode's split is a hash of its id; the rows of each split, in order of episode and step, go
to one uncompressed Arrow file with the features as one float32 vector per row, which is what a sampler gathers from; mean and
standard deviation over the train split, summed in float64, lie beside it. Features stay in raw units, because the first layer
of the exported policy standardises them. Files are synced to disk within the measured time, and the outputs of all contenders
must be the same, byte by byte.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harness, peers
from benchmarks.harness import Cost, Figure
from benchmarks.peers import FEATURES, FIRST_BUCKET, ROWS

if TYPE_CHECKING:
    from offrl_models.logs.contract import Contract

SEED = 0
FILE_ROWS, GROUP_ROWS = 1_000_000, 250_000
LONGEST = 39  # rows of an episode
ACTIONS = 6
AT_ONCE = 1000  # episodes that run at the same time in an interleaved log
OURS = "offrl"
FASTER, FASTER_THAN_PANDAS = 1.2, 3.0  # targets: time of the fastest peer, and of pandas, / ours
MEMORY_SHARE = 0.6  # target: our peak / that of polars
OUT_OF_CORE_GIB = 3.0  # target for our peak where we run alone


def contract() -> "Contract":
    """What the columns of the log mean."""
    from offrl_models.logs.contract import Contract

    return Contract.model_validate(
        {
            "source": "raw",
            "episode_id": "episode_id",
            "step": "step",
            "observation": FEATURES,
            "action": {"column": "action", "values": ACTIONS},
            "action_prob": "action_prob",
            "reward": {"column": "reward", "range": [0, 1]},
            "terminated": "terminated",
            "gamma": 0.99,
        }
    )


def offrl(files: Sequence[Path], folder: Path) -> None:
    """The library's own way."""
    from offrl_models.datasets.episodes import write_splits
    from offrl_models.logs.read import Log

    write_splits(Log.open(files, contract()), peers.SALT, folder)


CONTENDERS: dict[str, Callable[[Sequence[Path], Path], None]] = {
    OURS: offrl,
    "polars": peers.polars,
    "polars_in_order": peers.polars_in_order,
    "duckdb": peers.duckdb,
    "pandas": peers.pandas,
    "floor": peers.floor,
}
PEERS = ("polars", "duckdb", "pandas")
IMPORTS = {
    OURS: "offrl_models.datasets.episodes",
    "floor": "pyarrow",
    "polars_in_order": "polars",
}  # before the clock starts


def make_log(
    folder: Path, rows: int, *, interleaved: bool, file_rows: int = FILE_ROWS, group_rows: int = GROUP_ROWS
) -> list[Path]:
    """Raw logs of so many rows, the same every time. Files hold whole episodes; ids rise, with gaps."""
    folder.mkdir(parents=True)
    rng, last, files = np.random.default_rng(SEED), 0, []
    for number, start in enumerate(range(0, rows, file_rows)):
        n = min(file_rows, rows - start)
        ends = np.cumsum(rng.integers(1, LONGEST + 1, n))
        ends = ends[: np.searchsorted(ends, n) + 1]
        ends[-1] = n  # the last episode is cut so that the file has its rows
        length = np.diff(ends, prepend=0)
        ids = last + np.cumsum(rng.integers(1, 10, len(ends)))
        last = int(ids[-1])
        log = _rows(rng, ids, length)
        if interleaved:
            began = np.repeat(rng.integers(0, max(n // AT_ONCE, 1), len(ends)), length)
            log = log.take(pa.array(np.lexsort((log["episode_id"].to_numpy(), began + log["step"].to_numpy()))))
        files.append(folder / f"part-{number:05d}.parquet")
        pq.write_table(log, files[-1], compression="zstd", row_group_size=group_rows, write_page_checksum=True)
    return files


def _rows(rng: np.random.Generator, ids: np.ndarray, length: np.ndarray) -> pa.Table:
    """The rows of some episodes, in order; the features differ in mean and spread."""
    n = int(length.sum())
    ends = np.cumsum(length)
    columns: dict[str, np.ndarray] = {
        "episode_id": np.repeat(ids, length),
        "step": (np.arange(n) - np.repeat(ends - length, length)).astype(np.int32),
    }
    for number, name in enumerate(FEATURES):
        columns[name] = rng.standard_normal(n, np.float32) * np.float32(number + 1) + np.float32(number)
    columns["action"] = rng.integers(0, ACTIONS, n, np.int8)
    columns["action_prob"] = rng.uniform(0.05, 1.0, n).astype(np.float32)
    columns["reward"] = rng.random(n, np.float32)
    columns["terminated"] = np.isin(np.arange(n), ends - 1)
    return pa.table(columns)


def cached_log(folder: Path, rows: int, *, interleaved: bool) -> list[Path]:
    """The log in `folder`, made when it is not there yet, and in the page cache either way."""
    log = folder / f"{_layout(interleaved)}-{rows}"
    if not log.exists():
        unfinished = log.with_name(f".{log.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_log(unfinished, rows, interleaved=interleaved)
        unfinished.rename(log)
    files = sorted(log.glob("*.parquet"))
    for file in files:
        with file.open("rb") as raw:
            hashlib.file_digest(raw, "sha256")
    return files


def _layout(interleaved: bool) -> str:
    return "interleaved" if interleaved else "ordered"


def work(name: str, files: Sequence[Path], folder: Path) -> None:
    """What is measured: the contender's work, to the point where its files are on the disk."""
    CONTENDERS[name](files, folder)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def summarize(folder: Path) -> dict[str, Any]:
    """What a contender has written: rows and a sha256 of every column per split, and the moments."""
    splits = {}
    for split in FIRST_BUCKET:
        table, episodes = _read(folder / f"{split}.arrow"), folder / f"{split}.episodes.arrow"
        if episodes.exists():
            table = _with_keys(table, _read(episodes))
        splits[split] = {"rows": table.num_rows, **{field.name: _digest(table[field.name], field) for field in ROWS}}
    return {"splits": splits, "moments": json.loads((folder / "moments.json").read_text())}


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _with_keys(rows: pa.Table, episodes: pa.Table) -> pa.Table:
    """Rows with the id and step that a file of one row per episode stands for."""
    ids, length = episodes["episode_id"].to_numpy(), episodes["length"].to_numpy().astype(np.int64)
    step = np.arange(rows.num_rows) - np.repeat(np.cumsum(length) - length, length)
    return rows.append_column("episode_id", pa.array(np.repeat(ids, length))).append_column(
        "step", pa.array(step.astype(np.int32))
    )


def _digest(column: pa.ChunkedArray, field: pa.Field) -> str:
    """sha256 of the values, however they are cut into batches. A boolean may be stored as a byte."""
    digest, plain = hashlib.sha256(), field.type
    if pa.types.is_fixed_size_list(plain):
        plain = plain.value_type
    for chunk in column.chunks:
        values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
        if values.type != plain and (values.type, plain) != (pa.uint8(), pa.bool_()):
            raise ValueError(f"column {field.name!r} is {column.type} where {field.type} is asked for")
        array = values.to_numpy(zero_copy_only=False).astype(plain.to_pandas_dtype(), copy=False)
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def require_same(name: str, found: Mapping[str, Any], other: str, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError where two contenders have not done the same work."""
    for split, facts in wanted["splits"].items():
        for fact, value in facts.items():
            if found["splits"][split][fact] != value:
                raise ValueError(f"{name} and {other} differ in {fact!r} of the {split} split")
    for mine, theirs in zip(found["moments"], wanted["moments"], strict=True):
        same_name = mine["name"] == theirs["name"]
        same = np.allclose([mine["mean"], mine["std"]], [theirs["mean"], theirs["std"]], rtol=1e-9, atol=1e-9)
        if not (same_name and same):
            raise ValueError(f"{name} and {other} differ in the moments of {theirs['name']!r}")


def installed(name: str) -> bool:
    """Whether a contender can run here. DuckDB is a dependency of this benchmark only."""
    if importlib.util.find_spec(IMPORTS.get(name, name).partition(".")[0]):
        return True
    print(f"{name} is left out: `pip install {name}` to have it run", file=sys.stderr)
    return False


def compete(names: Sequence[str], log: Sequence[Path], folder: Path, repeats: int) -> harness.Costs:
    """Run the contenders in turns. Raises ValueError when their outputs differ."""
    out, first = folder / "out", {}

    def check(name: str, _: Cost) -> None:
        if name != "floor" and len(names) > 1:
            found = summarize(out)
            other, wanted = next(iter(first.items()), (name, found))
            require_same(name, found, other, wanted)
            first.setdefault(other, wanted)
        shutil.rmtree(out)

    shutil.rmtree(out, ignore_errors=True)
    module = [sys.executable, "-m", "benchmarks.data"]
    commands = {name: [*module, "--measure", name, str(log[0].parent), str(out)] for name in names}
    return harness.alternate(commands, repeats, check, peers.THREADS)


def compared(name: str, costs: harness.Costs, about: dict[str, Any]) -> list[Figure]:
    """How we stand: to the fastest peer, to pandas and to the memory of polars; alone, our peak."""
    rivals = [peer for peer in PEERS if peer in costs]
    if OURS not in costs:
        return []
    if not rivals:
        peak = harness.median(costs[OURS], "peak") / 1024
        return [Figure(f"{name}/{OURS}/peak", peak, "GiB", None, None, OUT_OF_CORE_GIB, about)]
    found = [harness.compare(name, costs, "wall", OURS, harness.fastest(costs, rivals), FASTER, about)]
    if "pandas" in costs:
        found.append(harness.compare(name, costs, "wall", OURS, "pandas", FASTER_THAN_PANDAS, about))
    if "polars" in costs:
        found.append(harness.compare(name, costs, "peak", OURS, "polars", MEMORY_SHARE, about))
    return found


def measure(name: str, log: Path, out: Path) -> None:
    """One contender in this process, its library imported before the clock starts."""
    importlib.import_module(IMPORTS.get(name, name))
    out.mkdir(parents=True)
    harness.measure(lambda: work(name, sorted(log.glob("*.parquet")), out))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every contender once")
    parser.add_argument("--interleaved", action="store_true", help="rows in order of time within each file")
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="only this one; may be repeated")
    parser.add_argument("--folder", type=Path, help="keep the logs here; a temporary folder otherwise")
    parser.add_argument("--measure", nargs=3, metavar=("CONTENDER", "LOG", "OUT"), help="one run, in this process")
    options = parser.parse_args(arguments)
    if options.measure:
        name, log, out = options.measure
        measure(name, Path(log), Path(out))
        return
    names = [name for name in options.contender or CONTENDERS if installed(name)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        log = cached_log(folder, options.rows, interleaved=options.interleaved)
        costs = compete(names, log, folder, options.repeats)
    title = f"data/{_layout(options.interleaved)}/{options.rows}"
    about = harness.machine("pyarrow", "numpy", *(name for name in PEERS if name in costs))
    ratios = compared(title, costs, about)
    harness.print_figures([*harness.figures(title, costs, about), *ratios])
    harness.print_table(title, costs, ratios)


if __name__ == "__main__":
    main()
