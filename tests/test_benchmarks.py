"""The benchmark is fair only if every contender does the work of a plain reference, and all are measured alike."""

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import data, harness, peers
from benchmarks.harness import Cost

ROWS = 20_000
FEATURES = [f"f{number:02d}" for number in range(17)]


@pytest.fixture(scope="module", params=[False, True], ids=["ordered", "interleaved"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files, the last of them short, of several row groups each."""
    folder = tmp_path_factory.mktemp("log") / "raw"
    return data.make_log(folder, ROWS, interleaved=request.param, file_rows=8000, group_rows=3000)


def reference(files: list[Path]) -> dict[str, Any]:
    """The work in numpy and hashlib, all at once, summarized as `data.summarize` does."""
    log = pa.concat_tables(pq.read_table(file) for file in files)
    columns = {name: log[name].to_numpy() for name in log.column_names}
    bucket = np.array(
        [
            int(hashlib.sha256(b"benchmark\0" + str(i).encode()).hexdigest(), 16) % 100
            for i in columns["episode_id"].tolist()
        ]
    )
    order = np.lexsort((columns["step"], columns["episode_id"]))
    splits, moments = {}, []
    for name, (low, high) in {"train": (0, 60), "selection": (60, 70), "gate": (70, 100)}.items():
        rows = order[(bucket[order] >= low) & (bucket[order] < high)]
        matrix = np.stack([columns[feature][rows] for feature in FEATURES], 1)
        if name == "train":
            moments = [
                {"name": feature, "mean": float(column.mean()), "std": float(column.std())}
                for feature, column in zip(FEATURES, matrix.astype(np.float64).T, strict=True)
            ]
        arrays = {
            "episode_id": columns["episode_id"][rows],
            "step": columns["step"][rows],
            "observation": matrix,
            "action": columns["action"][rows].astype(np.int64),
            "reward": columns["reward"][rows].astype(np.float64),
            "terminated": columns["terminated"][rows],
            "action_prob": columns["action_prob"][rows].astype(np.float64),
        }
        digests = {column: hashlib.sha256(array.tobytes()).hexdigest() for column, array in arrays.items()}
        splits[name] = {"rows": len(rows), **digests}
    return {"splits": splits, "moments": moments}


@pytest.mark.parametrize("name", ["offrl", "polars", "duckdb", "pandas"])
def test_every_contender_does_the_work_of_the_reference(name: str, log: list[Path], tmp_path: Path) -> None:
    if name == "duckdb":
        pytest.importorskip("duckdb", reason="the benchmark's own dependency: pip install duckdb")
    data.work(name, log, tmp_path)
    data.require_same(name, data.summarize(tmp_path), "the reference", reference(log))


def test_a_log_has_the_shape_that_the_benchmark_promises(log: list[Path]) -> None:
    tables = [pq.read_table(file) for file in log]
    assert [table.num_rows for table in tables] == [8000, 8000, 4000] and tables[0].num_columns == 23
    names = ["episode_id", "step", *FEATURES, "action", "action_prob", "reward", "terminated"]
    assert tables[0].column_names == names
    frame = pa.concat_tables(tables).to_pandas()
    ids = [set(table["episode_id"].to_numpy()) for table in tables]
    assert not ids[0] & ids[1] and not ids[1] & ids[2]  # a file holds whole episodes
    steps = frame.sort_values(["episode_id", "step"]).groupby("episode_id")["step"]
    assert (steps.diff().dropna() == 1).all() and (steps.min() == 0).all()
    assert steps.size().between(1, 39).all() and abs(steps.size().mean() - 20) < 1
    assert (frame.groupby("episode_id")["terminated"].sum() == 1).all()


def test_rows_are_in_order_of_time_where_the_log_is_interleaved(tmp_path: Path) -> None:
    ordered, mixed = (
        pq.read_table(data.make_log(tmp_path / str(interleaved), 5000, interleaved=interleaved)[0]).to_pandas()
        for interleaved in (False, True)
    )
    key = ["episode_id", "step"]
    assert ordered[key].equals(ordered[key].sort_values(key)) and not mixed[key].equals(ordered[key])
    assert mixed.sort_values(key, ignore_index=True).equals(ordered)
    changes = (mixed["episode_id"].diff() != 0).mean()
    assert changes > 0.9 and (mixed.groupby("episode_id")["step"].diff().dropna() == 1).all()


@pytest.mark.parametrize("damage", ["reward", "rows", "order", "type", "moments"])
def test_less_work_is_noticed(damage: str, tmp_path: Path) -> None:
    files = data.make_log(tmp_path / "raw", 2000, interleaved=False)
    wanted, out = reference(files), tmp_path / "out"
    out.mkdir()
    data.work("polars", files, out)
    data.require_same("polars", data.summarize(out), "the reference", wanted)
    path = out / "gate.arrow"
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    match damage:
        case "reward":
            column = np.nextafter(table["reward"].to_numpy(), 2.0)
            table = table.set_column(4, table.schema.field("reward"), pa.array(column))
        case "rows":
            table = table.slice(1)
        case "order":
            table = table.take(pa.array(np.arange(table.num_rows)[::-1]))
        case "type":
            table = table.set_column(4, "reward", table["reward"].cast(pa.float32()))
        case "moments":
            peers.write_moments(out, np.zeros(17), np.ones(17))
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="differ in|is float where double"):
        data.require_same("polars", data.summarize(out), "the reference", wanted)


def test_files_that_are_not_in_order_of_id_are_refused_where_order_is_relied_on(tmp_path: Path) -> None:
    files = data.make_log(tmp_path / "raw", 200, interleaved=False, file_rows=100)
    with pytest.raises(ValueError, match="does not follow"):
        data.CONTENDERS["polars_in_order"](files[::-1], tmp_path)


def test_the_benchmark_prints_one_object_per_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main(
        ["--rows", "2000", "--repeats", "2", "--folder", str(tmp_path), "--contender", "polars", "--contender", "floor"]
    )
    printed = capsys.readouterr()
    figures = [json.loads(line) for line in printed.out.splitlines()]
    assert all(list(figure) == ["name", "value", "unit", "peer", "ratio", "target", "machine"] for figure in figures)
    names = {f"data/ordered/2000/{who}/{what}" for who in ("polars", "floor") for what in harness.MEASURES}
    assert {figure["name"] for figure in figures} == names and len(figures) == len(names)
    assert {"cpu", "cores", "memory_gib", "polars", "pyarrow", "date"} <= set(figures[0]["machine"])
    assert "data/ordered/2000" in printed.err and not (tmp_path / "out").exists()


def child(code: str) -> list[str]:
    return [sys.executable, "-c", "from benchmarks import harness\n" + textwrap.dedent(code)]


def test_a_run_is_measured_in_time_and_memory() -> None:
    work = """
        import time
        def work():
            block = bytes(range(256)) * 2**18  # 64 MiB
            end = time.process_time() + 0.2
            while time.process_time() < end: pass
            time.sleep(0.2)
            return len(block)
        harness.measure(work)
        """
    cost = harness.run(child(work), threads=1)
    assert cost.result == 2**26
    assert 0.2 <= cost.cpu_s < cost.wall_s and 0.4 <= cost.wall_s < 5.0
    small = harness.run(child("harness.measure(lambda: None)"), threads=1)
    assert 60 < cost.peak_mib - small.peak_mib < 80 and 60 < cost.anonymous_mib - small.anonymous_mib < 80


def test_the_peak_of_a_run_is_not_that_of_its_parent() -> None:
    block = np.ones(2**25)  # 256 MiB
    cost = harness.run(child("harness.measure(lambda: None)"), threads=1)
    assert cost.peak_mib < 128 < block.nbytes / harness.MIB


def test_libraries_are_given_the_same_threads() -> None:
    cost = harness.run(
        child("import os; harness.measure(lambda: [os.environ[f'{n}_NUM_THREADS'] for n in ('OMP', 'OPENBLAS')])"),
        threads=3,
    )
    assert cost.result == ["3", "3"]


def test_a_run_that_fails_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        harness.run([sys.executable, "-c", "raise SystemExit(3)"], threads=1)


def test_contenders_take_turns_and_each_round_begins_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(harness, "run", lambda command, threads: Cost(1.0, 1.0, 1.0, 1.0, 0.0, command[0]))
    costs = harness.alternate({name: [name] for name in "abc"}, 3, lambda name, cost: ran.append(name))
    assert "".join(ran) == "abcbcacab"
    assert {name: [cost.result for cost in runs] for name, runs in costs.items()} == {n: [n] * 3 for n in "abc"}


def test_ratios_say_how_we_stand() -> None:
    def cost(wall: float, peak: float) -> Cost:
        return Cost(wall, 1.0, peak, 1.0, 0.0, None)

    costs = {
        "offrl": [cost(9.0, 90.0), cost(2.0, 100.0), cost(1.0, 300.0)],
        "polars": [cost(3.0, 400.0)] * 3,
        "pandas": [cost(8.0, 50.0)] * 3,
    }
    found = data.compared("t", costs, {})
    assert [(f.name, f.value, f.unit, f.peer, f.ratio, f.target) for f in found] == [
        ("t/offrl/wall", 2.0, "s", "polars", 1.5, 1.2),
        ("t/offrl/wall", 2.0, "s", "pandas", 4.0, 3.0),
        ("t/offrl/peak", 100.0, "MiB", "polars", 0.25, 0.6),
    ]
    (alone,) = data.compared("t", {"offrl": [cost(1.0, 2048.0)]}, {})
    assert (alone.value, alone.unit, alone.target) == (2.0, "GiB", 3.0)
