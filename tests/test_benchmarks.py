"""The benchmark is fair only if every contender does the same work: all are held against a plain reference, and measured alike."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from benchmarks import (
    checkouts,
    control,
    control_tasks,
    data,
    harness,
    ope,
    ope_peers,
    peers,
    training,
    training_checkouts,
)
from benchmarks.harness import Cost
from offrl_models.algorithms import ALGORITHMS
from offrl_models.datasets.encoding import Encoder
from offrl_models.exported import open_session
from offrl_models.ope import resampling
from offrl_models.ope.bandit import dm
from offrl_models.ope.doubly_robust import Model, dr, dros, switch_dr
from offrl_models.ope.estimates import all_terms
from offrl_models.ope.importance import tis, wis
from offrl_models.ope.intervals import bootstrap_all
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.training import sampler_of, transitions_of

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


def plain_values(given: dict[str, Any]) -> ope_peers.Values:
    """The seven estimators as their formulas read, episode by episode and step by step."""
    steps, gamma, n = int(given["steps"]), float(given["gamma"]), len(given["reward"]) // int(given["steps"])
    rows = np.arange(len(given["reward"]))
    ratio = given["probs"][rows, given["action"]] / given["action_prob"]
    q, v = given["q"][rows, given["action"]], (given["q"] * given["probs"]).sum(1)
    reward, ratio, q, v = (array.reshape(n, steps) for array in (given["reward"], ratio, q, v))
    found = dict.fromkeys(("DM", "TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR"), 0.0)
    weight = np.array([[ratio[i, : t + 1].prod() for t in range(steps)] for i in range(n)])
    for i in range(n):
        found["DM"] += v[i, 0] / n
        for t in range(steps):
            gain, before = gamma**t * reward[i, t], weight[i, t - 1] if t else 1.0
            share, share_before = weight[i, t] / weight[:, t].sum(), before / (weight[:, t - 1].sum() if t else n)
            found["TIS"] += weight[i, -1] * gain / n
            found["PDIS"] += weight[i, t] * gain / n
            found["WIS"] += weight[i, -1] * gain / weight[:, -1].sum()
            found["WPDIS"] += share * gain
            error = gamma**t * (reward[i, t] - q[i, t])
            found["DR"] += (weight[i, t] * error + before * gamma**t * v[i, t]) / n
            found["WDR"] += share * error + share_before * gamma**t * v[i, t]
    return {name: [value] for name, value in found.items()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ope")
    ope.make_logs("sequential", ope.Sizes(episodes=40), folder)
    ope.make_logs("bandit", ope.Sizes(rounds=300), folder)
    return folder


def test_the_log_of_the_evaluation_is_one(evaluated: Path) -> None:
    given = ope_peers.load(evaluated / "sequential")
    assert given["probs"].shape == given["q"].shape == (40 * ope.STEPS, 25)
    np.testing.assert_allclose(given["probs"].sum(1), 1.0, rtol=1e-12)
    assert (given["action_prob"] > 0).all() and len(np.unique(given["action"])) == 25
    assert given["terminated"].sum() == 40 and given["terminated"][ope.STEPS - 1]


def test_the_evaluation_gives_what_its_formulas_say(evaluated: Path) -> None:
    wanted = plain_values(ope_peers.load(evaluated / "sequential"))
    for work, log in (("tables", "sequential"), ("one", "rows")):
        found = {name.partition(" ")[0]: value for name, value in ope.WORKS[work](evaluated / log, None)().items()}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name


def test_the_estimates_of_the_bandit_log_are_those_of_the_library(evaluated: Path) -> None:
    given = ope_peers.load(evaluated / "bandit")
    episodes = ope.logged(given)
    rows = ope.per_row(episodes, given)
    ratio = rows[0]
    wanted = {
        "DM": dm(episodes, rows[2]),
        "IPW": tis(episodes, ratio),
        "SNIPW": wis(episodes, ratio),
        "DR": dr(episodes, *rows),
        "Switch-DR": switch_dr(episodes, *rows, ope.TAU),
        "DRos": dros(episodes, *rows, ope.SHRINKAGE),
    }
    found = ope.WORKS["bandit"](evaluated / "bandit", None)()
    assert found == {name: [pytest.approx(terms.estimate(), rel=1e-12)] for name, terms in wanted.items()}
    assert (ratio > ope.TAU).any() and (ratio < ope.TAU).any()  # the switch does something


def test_intervals_are_the_same_whether_samples_are_drawn_at_once_or_in_blocks(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ope_peers.load(evaluated / "rows")
    episodes = ope.logged(given)
    terms = all_terms(episodes, given["ratio"], Model.of(episodes, given["q"], given["v"]))
    shares = bootstrap_shares(40, 50, 0)
    monkeypatch.setattr(resampling, "BLOCK", 7 * 40)
    drawn = [block.copy() for block in resampling.BootstrapSamples(40, 50, 0)]
    assert [len(block) for block in drawn] == [7] * 7 + [1] and np.array_equal(np.vstack(drawn), 40 * shares)
    dense, blocks = (bootstrap_all(terms, s, 0.9) for s in (shares, resampling.BootstrapSamples(40, 50, 0)))
    for name, each in terms.items():
        samples = each.resampled(shares)
        allowed = 1e-5 * samples.std()
        assert (dense[name].low, dense[name].high) == pytest.approx(np.quantile(samples, [0.05, 0.95]), abs=allowed)
        assert (blocks[name].low, blocks[name].high) == pytest.approx((dense[name].low, dense[name].high), abs=allowed)


def test_several_candidates_get_estimates_of_their_own(evaluated: Path) -> None:
    found = ope.WORKS["ten"](evaluated / "rows", None)()
    assert len(found) == 7 * ope.CANDIDATES
    assert len({found[f"TIS {number}"][0] for number in range(ope.CANDIDATES)}) == ope.CANDIDATES


@pytest.mark.parametrize(
    ("mine", "theirs", "number", "same"),
    [
        ({"DR": [1.0]}, {"DR": [1.0 + 9e-7]}, None, True),
        ({"DR": [1.0]}, {"DR": [1.0 + 2e-6]}, None, False),
        ({"DR": [0.0, 1.0]}, {"DR": [0.1, 1.1]}, 1000, True),
        ({"DR": [0.0, 1.0]}, {"DR": [0.2, 1.0]}, 1000, False),
        ({"WIS": [0.0, 1.0]}, {"WIS": [0.5, 2.0]}, 1000, True),  # another interval, on purpose
        ({"FQE": [1.0]}, {"FQE": [1.05]}, 1000, True),
        ({"FQE": [1.0]}, {"FQE": [1.2]}, 1000, False),
        ({"DR": [float("nan")]}, {"DR": [1.0]}, None, False),
    ],
)
def test_other_numbers_are_noticed(
    mine: ope_peers.Values, theirs: ope_peers.Values, number: int | None, same: bool
) -> None:
    with nullcontext() if same else pytest.raises(ValueError, match="differ in"):
        ope.require_same("offrl", mine, "peer", theirs, number)


def test_evaluation_runs_without_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ope.main(["--small", "--part", "bandit", "--repeats", "1", "--peers", str(tmp_path / "none")])
    printed = capsys.readouterr()
    figures = [json.loads(line) for line in printed.out.splitlines()]
    assert {figure["name"].split("/")[2] for figure in figures} == {"offrl", "offrl-ci"}
    assert all(figure["peer"] is None for figure in figures)
    assert printed.err.count("the peers are left out") == 1


def test_costs_and_memory_of_the_evaluation_have_bars() -> None:
    def cost(cpu: float, peak: float = 100.0) -> list[Cost]:
        return [Cost(1.0, cpu, peak, 1.0, 0.0, None)]

    costs = {
        "start": cost(0.0, 50.0),
        "offrl": cost(2.0, 250.0),
        "offrl-ci": cost(4.0),
        "rows": cost(1.0),
        "rows-ci": cost(3.0),
        "scope-rl": cost(30.0),
        "scope-rl-ci": cost(60.0),
        "ten": cost(4.0),
        "ten-ci": cost(9.0),
    }
    found = ope.compared("sequential", "t", costs, dict.fromkeys(costs, 100.0), {})
    speed = {(figure.name, figure.peer): (figure.ratio, figure.target) for figure in found}
    assert speed["t/offrl/cpu", "scope-rl"] == (15.0, 12.0) and speed["t/offrl-ci/cpu", "scope-rl-ci"] == (15.0, 10.0)
    assert speed["t/ten/cpu", "rows"] == (4.0, 5.0) and speed["t/ten-ci/cpu", "rows-ci"] == (3.0, 5.0)
    assert speed["t/offrl/peak", "its arrays"] == (2.0, 2.0)


def counted(name: str, folder: Path) -> float:
    row = training.ROWS[name]
    training.make_log(folder / "log", 20, row.actions)
    episodes, encoder = training.logged(folder / "log"), Encoder(ope.features(training.OBSERVED))
    learned: Any = ALGORITHMS[row.algorithm][1](training.made(row, episodes), encoder, episodes.actions, [0])
    transitions = transitions_of(learned, episodes, encoder)
    return training.counted_flop(learned, transitions, sampler_of(learned, transitions, episodes, ope.BATCH, [0]))


@pytest.mark.parametrize("name", training.ROWS)
def test_every_row_can_be_trained_and_its_flop_counted(name: str, tmp_path: Path) -> None:
    assert counted(name, tmp_path) > 1e8


def test_counted_flop_are_those_of_the_products(tmp_path: Path) -> None:
    """A network of the policy alone: forward, and gradients of all layers, none with respect to what is observed."""
    sizes = (training.OBSERVED, *ope.HIDDEN, 8)
    layers = [2 * ope.BATCH * before * after for before, after in pairwise(sizes)]
    assert counted("bc/8", tmp_path) == 3 * sum(layers) - layers[0]


def test_training_runs_without_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--row", "iql/8", "--gradient-steps", "3", "--episodes", "3", "--repeats", "1"]
    training.main([*small, "--peers", str(tmp_path / "none")])
    printed = capsys.readouterr()
    figures = {figure["name"]: figure for figure in map(json.loads, printed.out.splitlines())}
    assert set(figures) == {f"training/iql/8/offrl/{what}" for what in ("speed", "rate", "overhead")}
    assert figures["training/iql/8/offrl/rate"]["peer"] == "sgemm 256" and printed.err.count("left out") == 1


def test_training_is_compared_round_by_round() -> None:
    def cost(cpu: float, **result: float) -> Cost:
        return Cost(1.0, cpu, 1.0, 1.0, 0.0, {name: [value] for name, value in result.items()})

    ours = [cost(cpu, bare_s=1.0, gflops=100.0, flop=3e9) for cpu in (1.0, 2.0, 4.0)]
    costs = {"offrl": ours, "d3rlpy": [cost(4.0)] * 3, "corl": [cost(1.0)] * 3, "unifloral": [cost(3.0)] * 3}
    every = training.compared("bc/8", costs, 100, {})
    found = {each.name.removeprefix("training/bc/8/"): each for each in every if each.peer not in checkouts.CHECKOUTS}
    assert (found["offrl/speed"].value, found["d3rlpy/speed"].value) == (50.0, 25.0)
    ratios = [found[f"offrl/ratio{what}"] for what in ("", "/from", "/to")]
    assert [(each.ratio, each.target) for each in ratios] == [(2.0, 3.0), (1.0, 3.0), (4.0, 3.0)]
    rate = 3e9 * 100 / 2.0 / 1e9
    assert (found["offrl/rate"].value, found["offrl/rate"].ratio) == (pytest.approx(rate), pytest.approx(rate / 100))
    assert (found["offrl/overhead"].ratio, found["offrl/overhead"].target) == (2.0, 1.03)
    others = {each.peer: each for each in every if each.name.endswith("ratio")}
    assert [(others[who].ratio, others[who].target) for who in ("corl", "unifloral")] == [(0.5, 1.2), (1.5, 0.9)]
    assert checkouts.ahead(every) == "ahead of us: CORL in training/bc/8 (ratio 0.50)"


FAKE = """
import d4rl, gym, pyrallis, torch, wandb
from dataclasses import dataclass
from torch import nn

@dataclass
class TrainConfig:
    env: "gym.Env" = None

class Actor(nn.Module):
    def __init__(self, state_dim, action_dim, max_action):
        super().__init__()
        wide = [layer for _ in range(2) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(state_dim, 256), nn.ReLU(), *wide, nn.Linear(256, action_dim), nn.Tanh())

class ReplayBuffer:
    def __init__(self, state_dim, action_dim, buffer_size):
        self.shape = (buffer_size, state_dim, action_dim)

    def load_d4rl_dataset(self, data):
        assert self.shape == (*data["observations"].shape, data["actions"].shape[1])
        follows = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
        assert (follows | (data["terminals"][:-1] == 1)).all() and data["terminals"].sum() == 2

    def sample(self, batch_size):
        return batch_size

class BC:
    def __init__(self, max_action, actor, actor_optimizer, discount=0.99):
        assert discount == 0.95 and [type(layer).__name__ for layer in actor.net] == 2 * ["Linear", "ReLU"] + ["Linear", "Tanh"]
        assert actor_optimizer.param_groups[0]["params"] == list(actor.parameters())
        self.rows = 0

    def train(self, batch):
        self.rows += batch
        return {"actor_loss": float(self.rows), "other": float("nan")}

@pyrallis.wrap()
def train(config: TrainConfig):
    wandb.init()
"""


def test_a_checkout_trains_by_its_own_means(tmp_path: Path) -> None:
    corl = checkouts.CHECKOUTS["corl"]
    (tmp_path / corl.folder).mkdir(parents=True)
    for row in corl.files:
        corl.file(tmp_path, row).write_text(FAKE)
    training.make_log(tmp_path / "log", 2, training.CONTINUOUS)
    start = checkouts.commands({"corl": tmp_path}, Path(sys.prefix), tmp_path, False)["corl"]
    cost = harness.run([*start, "bc/c", "3", str(tmp_path / "log")], threads=1)
    assert cost.result == {"loss": [3.0 * ope.BATCH]}


def test_networks_of_checkouts_are_cut_to_ours() -> None:
    def stack(*sizes: int) -> nn.Module:
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.ModuleList([nn.Sequential(*layers, nn.Linear(sizes[-1], 1))])

    (cut,) = training_checkouts.cut(stack(5, 8, 8, 8, 8), (8, 8))
    assert [tuple(layer.weight.shape) for layer in cut[::2]] == [(8, 5), (8, 8), (1, 8)]
    assert len(training_checkouts.cut(stack(5, 8, 8), (8, 8))[0]) == 5
    for other in (stack(5, 8), stack(5, 9, 9), nn.Linear(5, 8)):
        with pytest.raises(ValueError, match="other hidden layers|no stack"):
            training_checkouts.cut(other, (8, 8))


def test_losses_that_are_no_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training_checkouts, "replace_dispensable", lambda: None)
    for losses in ({"q_loss": float("nan")}, {"q": 1.0}):
        monkeypatch.setitem(training_checkouts.WORKS, "corl", lambda *_, losses=losses: lambda: losses)
        with pytest.raises(ValueError, match=r"CORL ended bc/c with losses that are no numbers"):
            training_checkouts.fit("corl", tmp_path, "bc/c", tmp_path, 1)()


@pytest.mark.parametrize("name", checkouts.CHECKOUTS)
def test_what_is_no_checkout_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"is no checkout of {checkouts.CHECKOUTS[name].title}: it has no .*/"):
        training.main([f"--{name}", str(tmp_path), "--row", "bc/8", "--gradient-steps", "1", "--peers", str(tmp_path)])


def test_checkouts_without_an_environment_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkouts.commands(dict.fromkeys(checkouts.CHECKOUTS, tmp_path), None, tmp_path / "none", False) == {}
    assert capsys.readouterr().err.count("Unifloral is left out") == 1


def test_other_losses_are_noticed() -> None:
    training.require_same("offrl", 1.04, "d3rlpy", 1.0, training.AGREED_STEPS)
    training.require_same("offrl", 2.0, "d3rlpy", 1.0, training.AGREED_STEPS - 1)
    for loss in (1.06, float("nan")):
        with pytest.raises(ValueError, match="differ in their mean losses"):
            training.require_same("offrl", loss, "d3rlpy", 1.0, training.AGREED_STEPS)


def simulated(name: str) -> control_tasks.Task:
    """A task with a log of four episodes."""
    for needed in ("gymnasium", *(["mujoco"] if name == "reacher" else [])):
        pytest.importorskip(needed, reason=f"the peers' own dependency: pip install {needed}")
    return dataclasses.replace(control_tasks.TASKS[name], episodes=4)


@pytest.mark.parametrize("name", control_tasks.TASKS)
def test_the_propensities_of_the_controller_are_those_it_draws_with(name: str) -> None:
    task, rng = control_tasks.TASKS[name], np.random.default_rng(0)
    seen = rng.standard_normal((40_000, 10 if name == "reacher" else 3))
    drawn, controlled = task.noisy(seen, rng), np.ones(len(seen), bool)
    assert (np.abs(drawn) <= task.limit).all() and (np.abs(drawn) == task.limit).mean() < 1e-4  # no mass at the bounds
    mu = task.density(seen, drawn, controlled)
    for noise in (
        0.6 * task.noise,
        0.9 * task.noise,
    ):  # E[pi / mu] = 1 for a known pi, here and where actions are uniform
        ratio = task.density(seen, drawn, controlled, noise) / mu
        assert ratio.std() > 0.1 and abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5
    anywhere = task.uniform(seen, rng)
    ratio = task.density(seen, anywhere, controlled) / task.density(seen, anywhere, ~controlled)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("name", control_tasks.TASKS)
def test_a_log_of_control_is_one_of_ours(name: str, tmp_path: Path) -> None:
    task = simulated(name)
    control_tasks.make_log(task, tmp_path)
    given = ope_peers.load(tmp_path)
    episodes = control.logged(given, task)
    assert episodes.n_episodes == 4 and len(set(episodes.length)) == 1 and not episodes.terminated.any()
    assert episodes.truncated.sum() == 4 and episodes.discount.min() == control_tasks.GAMMA  # bootstrapped past the end
    controlled = np.arange(4)[episodes.episode_of_row] % 2 == 0
    assert np.allclose(episodes.action_prob, task.density(episodes.observation, episodes.action, controlled))
    earned = episodes.sum_per_episode(episodes.reward) / task.reward_scale
    assert np.allclose(earned, given["return"]) and earned[::2].mean() > earned[1::2].mean()
    assert (np.abs(episodes.action).max(0) <= episodes.known_bounds[:, 1]).all()


def test_what_was_trained_on_control_acts_as_its_graph(tmp_path: Path) -> None:
    task = simulated("pendulum")
    control_tasks.make_log(task, tmp_path)
    losses = control.train("pendulum/iql", 2, tmp_path, 2)
    assert losses.keys() == {"q", "value", "policy"} and all(len(each) == 2 for each in losses.values())
    given = {"observation": np.eye(3, dtype=np.float32), "uniform": np.full((3, 2), 0.25)}
    greedy, drawn = map(np.asarray, open_session(tmp_path / "iql.onnx").run(["greedy", "drawn"], given))
    assert greedy.shape == drawn.shape == (2, 3, 1) and (np.abs(drawn) <= task.limit).all()
    assert not np.array_equal(greedy, drawn) and not np.array_equal(greedy[0], greedy[1])


def test_the_verdict_is_of_differences_seed_by_seed() -> None:
    far_apart = [-100.0, -500.0, -900.0]  # initial states differ more than the contenders do
    found = control.difference(
        far_apart, [value + gap for value, gap in zip(far_apart, (9.0, 10.0, 11.0), strict=True)]
    )
    reach = 4.302653 / 3**0.5  # t of 2 degrees of freedom; the standard deviation is 1
    assert found == pytest.approx((-10.0, -10.0 - reach, -10.0 + reach)) and control.verdict(found) == "worse"
    assert control.verdict(control.Mean(1.0, -0.1, 2.1)) == control.verdict(control.Mean(-1.0, -2.1, 0.0)) == "level"
    assert control.verdict(control.Mean(1.0, 0.1, 1.9)) == "better"
    with pytest.raises(ValueError, match="two training seeds or more"):
        control.Mean.of([1.0])
    with pytest.raises(ValueError, match="zip"):
        control.difference([1.0, 2.0], [1.0])


def test_control_is_compared_by_what_is_earned(tmp_path: Path) -> None:
    def cost(**result: list[float]) -> Cost:
        return Cost(1.0, 2.0, 3.0, 4.0, 0.0, result)

    costs = {
        "training": cost(),
        "offrl": cost(greedy=[-9.0, -12.0], drawn=[-20.0, -20.0]),
        "d3rlpy": cost(greedy=[-10.0, -11.0]),
    }
    found = {figure.name.removeprefix("control/t/a/"): figure for figure in control.compared("t/a", costs, {})}
    assert found["offrl/greedy"].value == -10.5 and found["offrl/deployed"].value == -20.0
    assert found["difference"].value == 0.0 and found["difference/to"].value == pytest.approx(12.7062, abs=1e-3)
    bars = {name for name, figure in found.items() if figure.target is not None}
    assert (
        bars == {"difference/to"} and found["difference/to"].target == 0.0 and found["difference/to"].peer == "d3rlpy"
    )
    assert control.table_row("t/a", 2000, costs).startswith(
        "| t/a | 2,000 | -10.5 (-29.6 to 8.6) | -10.5 (-16.9 to -4.1) | 0.0 (-12.7 to 12.7) | level | -20.0 ("
    )
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(dataclasses.asdict(costs["offrl"])))
    assert control.kept(path, ["false"]) == costs["offrl"]  # and nothing is run


def test_control_needs_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        control.main(["--peers", str(tmp_path / "none")])
    assert "nothing can be simulated without them" in capsys.readouterr().err
