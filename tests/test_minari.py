"""Minari: what its own library wrote is read exactly, it reads what we write, and a dataset is written whole or not at all."""

import json
import math
import sys
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow as pa
import pytest
from minari.data_collector import EpisodeBuffer

from offrl_models.logs import formats
from offrl_models.logs.minari import write_minari
from offrl_models.schema import Episodes, InputError
from tests.conftest import chain_world
from tests.test_formats import read
from tests.test_hdf5 import (
    CODE,
    LAST,
    LENGTHS,
    LOG_PROB,
    NEXT,
    OBSERVATION,
    REWARD,
    TERMINATED,
    VECTOR,
    check_episodes,
    d4rl,
    episodic,
    vectors,
)

# Minari

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
quiet = pytest.mark.filterwarnings(
    "ignore:.*(is set to None|env_spec is None):UserWarning"
)  # who made it is not asked here


def minari_dataset(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    buffers: list[EpisodeBuffer],
    observation: Any,
    action: Any,
    **options: Any,
) -> Path:
    """A dataset that Minari wrote into `folder`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    minari.create_dataset_from_buffers("toy-v0", buffers, observation_space=observation, action_space=action, **options)
    return folder / "toy-v0"


def buffers(actions: np.ndarray, **infos: np.ndarray) -> list[EpisodeBuffer]:
    """The episodes above; the observation after a step is that of the following row, or of `NEXT` after the last one."""
    made = []
    for start, stop in pairwise(np.cumsum((0, *LENGTHS))):
        made.append(
            EpisodeBuffer(
                observations=[*OBSERVATION[start:stop], NEXT[stop - 1]],
                actions=list(actions[start:stop]),
                rewards=REWARD[start:stop].tolist(),
                terminations=TERMINATED[start:stop].tolist(),
                truncations=(LAST & ~TERMINATED)[start:stop].tolist(),
                infos={name: values[start:stop].tolist() for name, values in infos.items()},
            )
        )
    return made


def following() -> pa.Array:
    return vectors(np.where(LAST[:, None], NEXT, np.roll(OBSERVATION, -1, axis=0)))


@quiet
def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = minari_dataset(tmp_path, monkeypatch, buffers(VECTOR), BOX, gymnasium.spaces.Box(-9, 9, (2,), np.float32))
    check_episodes(path, "minari", episodic(VECTOR, LAST & ~TERMINATED, next_observation=following()))


@quiet
def test_minari_codes_and_propensities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probability = np.exp(LOG_PROB.astype(np.float64))
    made = buffers(CODE, action_prob=probability)
    path = minari_dataset(tmp_path, monkeypatch, made, BOX, gymnasium.spaces.Discrete(5))
    more = {"next_observation": following(), "action_prob": probability}
    check_episodes(path, "minari", episodic(CODE, LAST & ~TERMINATED, **more))


@quiet
def test_spaces_are_flattened_as_gymnasium_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = gymnasium.spaces
    parts = [
        ("zeta", spaces.Box(0, 1, (2, 2), np.float32)),
        ("alpha", spaces.Tuple((spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 4])))),
        ("mid", spaces.Dict({"b": spaces.MultiBinary(3), "a": spaces.Discrete(2)})),
    ]
    space = spaces.Dict(OrderedDict(parts), seed=3)
    assert list(space) == ["zeta", "alpha", "mid"]  # gymnasium keeps this order until Minari has stored the space
    seen = [space.sample() for _ in range(7)]

    def column(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: column([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], tuple):
            return tuple(column(list(part)) for part in zip(*values, strict=True))
        return values

    buffer = EpisodeBuffer(
        observations=column(seen), actions=column(seen[:6]), rewards=[0.0] * 6, terminations=[False] * 5 + [True],
        truncations=[False] * 6,
    )  # fmt: skip
    path = minari_dataset(tmp_path, monkeypatch, [buffer], space, space)
    loaded = minari.load_dataset("toy-v0").observation_space
    assert list(loaded) == ["alpha", "mid", "zeta"]
    flat = np.array([spaces.flatten(loaded, value) for value in seen], np.float32)
    expected = pa.table(
        {"observation": vectors(flat[:6]), "action": vectors(flat[:6]), "next_observation": vectors(flat[1:])}
    )
    for rows in (1, 4, 9):
        assert read(path, "minari", expected.column_names, {}, rows).equals(expected)


@quiet
def test_a_discrete_observation_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = EpisodeBuffer(
        observations=[3, 1, 4],
        actions=[0, 1],
        rewards=[0.0, 1.0],
        terminations=[False, True],
        truncations=[False, True],
    )
    space = gymnasium.spaces.Discrete(5)
    columns = {"observation": [3, 1], "next_observation": [1, 4], "terminated": [False, True], "truncated": [False] * 2}
    found = read(minari_dataset(tmp_path, monkeypatch, [buffer], space, space), "minari", list(columns), {})
    assert found.to_pydict() == columns  # a step that ended both ways is terminated


@quiet
def test_spaces_without_a_fixed_row_of_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {"actions": [0], "rewards": [0.0], "terminations": [True], "truncations": [False]}
    text, image = gymnasium.spaces.Text(5), gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    code = gymnasium.spaces.Discrete(2)
    told = EpisodeBuffer(observations=["ab", "cd"], **plain)
    with pytest.raises(InputError, match="'observations' is a space of type Text"):
        formats.schema(minari_dataset(tmp_path / "a", monkeypatch, [told], text, code), "minari", {})
    one, other = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    for name, pictures, said in (("b", [one, one], "with `jpeg_encoding=False`"), ("c", [one, other], "holds object")):
        seen = EpisodeBuffer(observations=pictures, **plain)
        with pytest.raises(InputError, match=said):  # as JPEG, of one length or of several
            read(minari_dataset(tmp_path / name, monkeypatch, [seen], image, code), "minari", ["observation"], {})
        raw = minari_dataset(tmp_path / f"{name}-raw", monkeypatch, [seen], image, code, jpeg_encoding=False)
        found = read(raw, "minari", ["observation", "next_observation"], {}).to_pylist()
        assert [list(row.values()) for row in found] == [[picture.ravel().tolist() for picture in pictures]]


@quiet
def test_minari_that_is_not_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = gymnasium.spaces.Discrete(5)
    path = minari_dataset(tmp_path, monkeypatch, buffers(CODE), BOX, code)
    data, described = path / "data" / "main_data.hdf5", path / "data" / "metadata.json"
    whole, metadata = data.read_bytes(), json.loads(described.read_text())
    for length in range(0, len(whole), len(whole) // 20):
        data.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read as HDF5"):
            read(path, "minari", ["reward"], {})
    data.write_bytes(whole)
    with h5py.File(data, "a") as file:
        del file["episode_2"]
    with pytest.raises(InputError, match="episode 2 of 4 is missing"):
        read(path, "minari", ["reward"], {})
    described.write_text(json.dumps({**metadata, "data_format": "arrow"}))
    with pytest.raises(InputError, match="Minari's format 'arrow'"):
        formats.schema(path, "minari", {})
    described.unlink()
    with pytest.raises(InputError, match="toy-v0 is not a Minari dataset"):
        formats.schema(path, "minari", {})


@pytest.fixture(scope="module")
def simulated() -> Episodes:
    return chain_world().simulate(30, seed=4)


def test_minari_reads_what_is_written_and_so_do_we(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    path = tmp_path / "lab" / "toy-v3"
    write_minari(simulated, path, dataset_id="lab/toy-v3")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["data", "lab", "main_data.hdf5", "metadata.json", "toy-v3"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("lab/toy-v3")
    assert dataset.total_episodes == 30 and dataset.total_steps == simulated.n_rows
    assert dataset.action_space == gymnasium.spaces.Discrete(simulated.n_actions)
    second = dataset[1]
    own = slice(*simulated.offsets[1:3])
    assert (second.observations[1:] == simulated.next_observation[own]).all() and len(second.observations) == len(
        second
    ) + 1
    assert (
        math.isnan(second.infos["action_prob"][0])
        and (second.infos["action_prob"][1:] == simulated.action_prob[own]).all()
    )
    expected = pa.table(
        {
            "episode_id": simulated.episode_of_row,
            "step": simulated.step,
            "observation": vectors(simulated.observation),
            "action": simulated.action,
            "reward": simulated.reward,
            "terminated": simulated.terminated,
            "truncated": simulated.truncated,
            "next_observation": vectors(simulated.next_observation),
            "action_prob": simulated.action_prob,
        }
    )
    for rows in (1, 7, 10**6):
        assert read(path, "minari", expected.column_names, {}, rows).equals(expected)


def test_continuous_actions_of_unknown_propensity_are_written(tmp_path: Path, simulated: Episodes) -> None:
    rows = simulated.n_rows
    continuous = replace(
        simulated,
        action=np.random.default_rng(0).normal(size=(rows, 2)),
        mask=np.ones((rows, 0), bool),
        action_prob=np.full(rows, np.nan),
    )
    write_minari(continuous, tmp_path / "x", dataset_id="x-v0")
    assert "action_prob" not in formats.schema(tmp_path / "x", "minari", {}).names
    assert read(tmp_path / "x", "minari", ["action"], {})["action"].combine_chunks().equals(vectors(continuous.action))


@quiet
def test_values_outside_their_space_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)})
    buffer = EpisodeBuffer(
        observations={"a": [0, 2, 5, 1]},
        actions=[0] * 3,
        rewards=[0.0] * 3,
        terminations=[False] * 3,
        truncations=[False] * 3,
    )
    path = minari_dataset(tmp_path, monkeypatch, [buffer], space, gymnasium.spaces.Discrete(1))
    with pytest.raises(InputError, match="'observations/a' has 2 rows outside its space"):
        read(path, "minari", ["observation"], {})


def test_minari_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    with pytest.raises(InputError, match="'not an id' is no Minari dataset id"):
        write_minari(simulated, tmp_path / "x", dataset_id="not an id")
    write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    with pytest.raises(InputError, match="x exists"):
        write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    monkeypatch.setattr("offrl_models.storage.sync_tree", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_minari(simulated, tmp_path / "y", dataset_id="y-v0")
    assert not (tmp_path / "y").exists() and formats.batches(tmp_path, "minari") == [tmp_path / "x"]


def test_packages_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: Episodes
) -> None:
    path = d4rl(tmp_path / "x.hdf5")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match="pip install minari h5py"):
        write_minari(simulated, tmp_path / "x", dataset_id="x-v0")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="pip install h5py"):
        formats.schema(path, "d4rl", {})
