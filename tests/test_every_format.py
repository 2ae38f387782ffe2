"""One log, written in every format by the format's own library, becomes the same episodes."""

import csv
import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from minari.data_collector import EpisodeBuffer
from pyarrow import feather

from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import measure
from offrl_models.logs.folders import Folders
from offrl_models.logs.ingest import Count, ingest
from offrl_models.logs.read import Log, batch_files
from offrl_models.logs.screen import screen
from offrl_models.schema import Episodes

SALT, GAMMA, ACTIONS = "offrl", 0.9, 5
Arrays = dict[str, np.ndarray]

# --- the log ----------------------------------------------------------------------------------------------------------


def source(action: str, seed: int = 11) -> Arrays:
    """50 episodes of 1 to 6 decisions, half of them cut off; the action is one of five codes, or two numbers."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 7, 50)
    episode = np.repeat(np.arange(50), length)
    rows, last = len(episode), np.append(episode[1:] != episode[:-1], True)
    observation = rng.normal(size=(rows, 3)).astype(np.float32)
    after_the_last = rng.normal(size=(rows, 3)).astype(np.float32)
    codes, vectors = rng.integers(0, ACTIONS, rows), rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    return {
        "episode_id": episode,
        "step": np.concatenate([np.arange(n) for n in length]),
        "observation": observation,
        "next_observation": np.where(last[:, None], after_the_last, np.roll(observation, -1, 0)),
        "action": codes if action == "codes" else vectors,
        "action_prob": rng.uniform(0.05, 1.0, rows),
        "reward": rng.integers(0, 9, rows) / 8,  # float32 holds them
        "terminated": last & (episode % 2 == 0),
        "truncated": last & (episode % 2 == 1),
    }


SOURCES = {action: source(action) for action in ("codes", "vectors")}


def bounds(log: Arrays) -> list[tuple[int, int]]:
    """First row of each episode, and the one after its last."""
    return list(pairwise([0, *(np.flatnonzero(log["terminated"] | log["truncated"]) + 1).tolist()]))


# --- the formats ------------------------------------------------------------------------------------------------------


def as_lists(log: Arrays) -> pa.Table:
    return pa.table({name: values.tolist() if values.ndim == 2 else values for name, values in log.items()})


def as_cells(log: Arrays) -> dict[str, list[Any]]:
    """Columns of one value each: observation_0, observation_1, ..."""
    found: dict[str, list[Any]] = {}
    for name, values in log.items():
        columns = {f"{name}_{i}": column for i, column in enumerate(values.T)} if values.ndim == 2 else {name: values}
        found |= {key: column.tolist() for key, column in columns.items()}
    return found


def write_parquet(log: Arrays, path: Path) -> None:
    pq.write_table(as_lists(log), path, write_page_checksum=True)


def write_arrow(log: Arrays, path: Path) -> None:
    with pa.ipc.new_stream(str(path), as_lists(log).schema) as writer:
        writer.write_table(as_lists(log))


def write_feather(log: Arrays, path: Path) -> None:
    feather.write_feather(as_lists(log), str(path))


def write_csv(log: Arrays, path: Path) -> None:
    columns = as_cells(log)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_jsonl(log: Arrays, path: Path) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in as_lists(log).to_pylist())


def write_hdf5(path: Path, datasets: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values)


def write_d4rl(log: Arrays, path: Path) -> None:
    datasets = {"observations": log["observation"], "actions": log["action"], "rewards": log["reward"]}
    datasets |= {"terminals": log["terminated"], "timeouts": log["truncated"]}
    datasets |= {"next_observations": log["next_observation"]}
    write_hdf5(path, datasets | {"infos/action_log_probs": np.log(log["action_prob"])})


def write_d3rlpy_1(log: Arrays, path: Path) -> None:
    """As `MDPDataset.dump` of version 1."""
    ends = (log["terminated"] | log["truncated"]).astype(np.float32)
    datasets: dict[str, Any] = {"observations": log["observation"], "actions": log["action"], "rewards": log["reward"]}
    datasets |= {"terminals": log["terminated"].astype(np.float32), "episode_terminals": ends}
    write_hdf5(path, datasets | {"discrete_action": log["action"].ndim == 1, "version": "1.0"})


def write_d3rlpy_2(log: Arrays, path: Path) -> None:
    """As `ReplayBuffer.dump` of version 2."""
    keys = ("observations", "actions", "rewards", "terminated")
    datasets: dict[str, Any] = {"columns": list(keys), "num_episodes": len(bounds(log)), "version": "2.1"}
    action = log["action"] if log["action"].ndim == 2 else log["action"][:, None]
    for number, (start, stop) in enumerate(bounds(log)):
        rows = slice(start, stop)
        values = (log["observation"][rows], action[rows], log["reward"][rows, None], bool(log["terminated"][stop - 1]))
        datasets |= {f"{key}_{number}": value for key, value in zip(keys, values, strict=True)}
    write_hdf5(path, datasets)


def write_minari(log: Arrays, path: Path) -> None:
    spaces, discrete = gymnasium.spaces, log["action"].ndim == 1
    buffers = [
        EpisodeBuffer(
            observations=[*log["observation"][a:b], log["next_observation"][b - 1]],
            actions=list(log["action"][a:b]),
            rewards=log["reward"][a:b].tolist(),
            terminations=log["terminated"][a:b].tolist(),
            truncations=log["truncated"][a:b].tolist(),
            infos={"action_prob": log["action_prob"][a:b].tolist()},
        )
        for a, b in bounds(log)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path.parent))
        minari.create_dataset_from_buffers(
            path.name, buffers, observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32),
            action_space=spaces.Discrete(ACTIONS) if discrete else spaces.Box(-1, 1, (2,), np.float32),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format holds the log."""

    format: str
    write: Callable[[Arrays, Path], None]
    cells: bool = False  # one value each; a vector is several columns
    left_out: tuple[str, ...] = ()  # what it has no place for
    named_by_reader: bool = False  # the reader makes the ids, steps and flags, and the contract need not name them


HELD_BY_D3RLPY = {"left_out": ("next_observation", "action_prob"), "named_by_reader": True}
LAYOUTS = {
    "log.parquet": Layout("parquet", write_parquet),
    "log.arrows": Layout("arrow", write_arrow),
    "log.feather": Layout("arrow", write_feather),
    "log.csv": Layout("csv", write_csv, cells=True),
    "log.csv.gz": Layout("csv", write_csv, cells=True),
    "log.jsonl": Layout("jsonl", write_jsonl),
    "log.jsonl.gz": Layout("jsonl", write_jsonl),
    "log.hdf5": Layout("d4rl", write_d4rl, named_by_reader=True),
    "first.h5": Layout("d3rlpy", write_d3rlpy_1, **HELD_BY_D3RLPY),
    "second.h5": Layout("d3rlpy", write_d3rlpy_2, **HELD_BY_D3RLPY),
    "log-v0": Layout("minari", write_minari, named_by_reader=True),
}


def contract_of(layout: Layout, action: str) -> Contract:
    def columns(name: str, size: int) -> list[str]:
        return [f"{name}_{i}" for i in range(size)]

    limits = {"low": -1, "high": 1}
    roles: dict[str, Any] = {
        "source": "data/lab/raw", "format": layout.format, "reward": {"column": "reward", "range": [0, 1]}, "gamma": GAMMA,
        "observation": columns("observation", 3) if layout.cells else [{"column": "observation", "size": 3}],
        "next_observation": columns("next_observation", 3) if layout.cells else ["next_observation"],
        "action_prob": {"column": "action_prob", "of": "action" if action == "codes" else "density"},
        "action": {"column": "action", "values": ACTIONS} if action == "codes"
        else {"columns": columns("action", 2), **limits} if layout.cells else {"column": "action", "size": 2, **limits},
    }  # fmt: skip
    if not layout.named_by_reader:
        roles |= {name: name for name in ("episode_id", "step", "terminated", "truncated")}
    return Contract(**{name: role for name, role in roles.items() if name not in layout.left_out})


# --- the way to episodes ----------------------------------------------------------------------------------------------


def id_of(number: int, name: str) -> str:
    """What the reader calls an episode of a batch, as text: where it counts them itself, the batch is part of the name."""
    return f"{name}/{number}" if LAYOUTS[name].named_by_reader else str(number)


def expected(log: Arrays, split: str, name: str) -> Arrays:
    """The episodes of a split, by episode. Where nothing is known of what follows, a truncated one ends a decision earlier."""
    left_out, found = LAYOUTS[name].left_out, dict[str, list[Any]]()
    for number, (start, stop) in enumerate(bounds(log)):
        truncated = bool(log["truncated"][stop - 1])
        cut = truncated and "next_observation" in left_out
        rows = range(start, stop - cut)
        if bucket(id_of(number, name), SALT) not in SPLITS[split] or not rows:
            continue
        ends = np.arange(len(rows)) == len(rows) - 1
        final = log["observation"][stop - 1] if cut else log["next_observation"][stop - 1]
        parts = {"episode_id": [id_of(number, name)], "length": [len(rows)]}
        parts |= {column: log[column][list(rows)] for column in ("observation", "action", "reward", "action_prob")}
        parts |= {"terminated": ends & (not truncated), "truncated": ends & truncated}
        parts |= {"final_observation": [final]} if truncated or "next_observation" not in left_out else {}
        for column, values in parts.items():
            found.setdefault(column, []).extend(values)
    return {column: np.array(values) for column, values in found.items() if column not in left_out}


def plain(episodes: Episodes, left_out: tuple[str, ...]) -> Arrays:
    """The same of what was read. Ids that were read from text are in the order of text."""
    ids = episodes.episode_id.astype(str)
    order = np.argsort([int(one.rpartition("/")[2]) for one in ids])
    rows = np.concatenate([np.arange(*episodes.offsets[i : i + 2]) for i in order])
    last = episodes.offsets[1:][order] - 1
    known = episodes.truncated[last] | ("next_observation" not in left_out)
    per_row = ("observation", "action", "reward", "action_prob", "terminated", "truncated")
    found = {name: getattr(episodes, name)[rows] for name in per_row if name not in left_out}
    found |= {"episode_id": ids[order], "length": episodes.length[order]}
    return found | {"final_observation": episodes.final_observation[order][known]}


def return_of(log: Arrays) -> float:
    returns = [(GAMMA ** np.arange(b - a) * log["reward"][a:b]).sum() for a, b in bounds(log)]
    return float(np.mean(returns))


@pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None):UserWarning")  # who made it is not asked here
@pytest.mark.parametrize("action", SOURCES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_log_gives_the_same_episodes_in_every_format(name: str, action: str, tmp_path: Path) -> None:
    layout, log = LAYOUTS[name], SOURCES[action]
    rows, contract = len(log["reward"]), contract_of(layout, action)
    folders = Folders(tmp_path, tmp_path / contract.source, tmp_path / "data" / "lab")
    folders.landing.mkdir(parents=True)
    layout.write(log, folders.landing / name)

    taken = ingest(folders, contract)
    assert (taken.accepted, taken.quarantined, taken.count) == ([name], {}, Count(rows, rows, 0, 0))
    assert not list(folders.landing.iterdir()) and ingest(folders, contract) == dataclasses.replace(taken, accepted=[])

    accepted = Log.open(batch_files(folders.raw, contract.format), contract)
    measured = measure(accepted)
    assert measured.violations == () and measured.card["rows"] == rows and measured.card["episodes"] == 50
    assert measured.card["return_mean"] == pytest.approx(return_of(log), rel=1e-12)
    assert measured.episodes.rows() == [
        (n, c) for n, c in zip(*np.unique(np.diff(bounds(log)), return_counts=True), strict=True)
    ]

    counts = write_splits(accepted, SALT, tmp_path / "episodes")
    for split in SPLITS:
        found = read_splits(tmp_path / "episodes", split, salt=SALT, contract=contract)
        wanted = expected(log, split, name)
        same = plain(found, layout.left_out)
        assert counts[split] == {"rows": len(wanted["reward"]), "episodes": len(wanted["length"])}
        assert set(same) == set(wanted)
        for column, values in wanted.items():
            if column == "action_prob":  # D4RL holds its logarithm
                assert same[column] == pytest.approx(values, rel=1e-12)
            else:
                assert same[column].shape == values.shape and np.array_equal(same[column], values), column
        assert found.mask.all() and found.n_actions == (ACTIONS if action == "codes" else 0)
        assert np.isnan(found.action_prob).all() == ("action_prob" in layout.left_out)


READERS = [name for name in LAYOUTS if LAYOUTS[name].named_by_reader]


@pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None):UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_second_batch_of_a_reader_that_counts_episodes_brings_other_episodes(name: str, tmp_path: Path) -> None:
    layout, contract = LAYOUTS[name], contract_of(LAYOUTS[name], "codes")
    folders = Folders(tmp_path, tmp_path / contract.source, tmp_path / "data" / "lab")
    folders.landing.mkdir(parents=True)
    names, rows = [f"a{name}", f"b{name}"], 0
    for seed, batch in enumerate(names):
        log = source("codes", seed)
        _, rows_of_batch = bounds(log)[7]  # eight episodes
        layout.write({column: values[:rows_of_batch] for column, values in log.items()}, folders.landing / batch)
        ingest(folders, contract).require_clean()
        rows += rows_of_batch
    accepted = batch_files(folders.raw, layout.format)
    found = screen(Log.open(accepted, contract))
    ids = {f"{batch}/{number}" for batch in names for number in range(8)}
    assert found.violations == () and set(found.index.episodes["episode"]) == ids
    assert sum(found.index.rows.values()) == rows and found.index.duplicates == {}

    again = folders.landing / f"c{name}"  # the same batch under another name
    (shutil.copytree if accepted[0].is_dir() else shutil.copy)(accepted[0], again)
    repeated = ingest(folders, contract)
    assert (repeated.accepted, repeated.quarantined, repeated.rows) == ([], {}, rows)
    assert repeated.count.duplicates > 0 and batch_files(folders.raw, layout.format) == accepted
