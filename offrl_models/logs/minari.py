"""Minari datasets: one folder with `data/metadata.json` and `data/main_data.hdf5`, as Minari 0.5 lays them out.

An episode of T steps holds T + 1 observations, so every row has its `next_observation`. Minari keeps T + 1 infos as well,
the first from the reset; of an info `action_prob` the value that came with a step is the propensity of its action.

A Discrete space at the top gives its codes. Any other is one row of numbers in the order of `gymnasium.spaces.flatten`:
keys of a Dict sorted, what is discrete as one-hot. Reading needs h5py only; writing needs Minari.

Younis et al. (2024), Minari, https://minari.farama.org; dataset standards and `EpisodeData` of its documentation.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from offrl_models import storage
from offrl_models.logs.hdf5 import FLAGS, NUMBERED, Read, flags, numbers, open_hdf5, sections, to_table, vector_type
from offrl_models.schema import Episodes, InputError

PROPENSITY = "infos/action_prob"


@dataclass(frozen=True)
class Leaf:
    """One array of a space: where it lies in an episode's group, and the shape of one value."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    first: tuple[int, ...] = ()  # of each discrete entry, its smallest value
    counts: tuple[int, ...] = ()  # of each discrete entry, how many values it has

    @property
    def width(self) -> int:
        """How many numbers one value is flattened to."""
        return sum(self.counts) if self.counts else math.prod(self.shape)

    def flatten(self, values: Shaped[np.ndarray, "rows *shape"], path: Path) -> Shaped[np.ndarray, "rows width"]:
        """Raises InputError when a discrete value is outside its space."""
        flat = values.reshape(len(values), math.prod(self.shape))
        if not self.counts:
            return flat
        codes = flat - np.array(self.first)
        odd = int(((codes < 0) | (codes >= np.array(self.counts))).any(axis=1).sum())
        if odd:
            raise InputError(f"{path}: {self.name!r} has {odd} rows outside its space in one episode; correct them.")
        offsets = np.cumsum((0, *self.counts[:-1]))
        one_hot = np.zeros((len(flat), self.width), np.float32)
        np.put_along_axis(one_hot, offsets + codes, 1.0, axis=1)
        return one_hot


@dataclass(frozen=True)
class Space:
    """The arrays of an observation or action space, in the order in which gymnasium flattens them."""

    leaves: tuple[Leaf, ...]
    coded: bool  # one Discrete space, which gives its codes

    @property
    def dtype(self) -> pa.DataType:
        if self.coded:
            return pa.int64()
        held = np.result_type(*(leaf.dtype for leaf in self.leaves if not leaf.counts), np.float32)
        return vector_type(sum(leaf.width for leaf in self.leaves), held)

    def reader(self, group: Any, path: Path, *, rows: int, ahead: int = 0) -> Read:
        """Reads rows, each `ahead` steps later, of arrays that have `rows` rows. Raises InputError when a shape is wrong."""
        arrays = [_values(group, leaf, path, rows) for leaf in self.leaves]

        def read(part: slice) -> np.ndarray:
            moved = slice(part.start + ahead, part.stop + ahead)
            if self.coded:
                return arrays[0][moved]
            flat = [leaf.flatten(a[moved], path) for leaf, a in zip(self.leaves, arrays, strict=True)]
            return np.concatenate(flat, axis=1)

        return read


def _values(group: Any, leaf: Leaf, path: Path, rows: int) -> Any:
    found = numbers(group, leaf.name, path, rows=rows)
    if math.prod(found.shape[1:]) != math.prod(leaf.shape):
        raise InputError(
            f"{path}: {leaf.name!r} holds values of shape {found.shape[1:]} where its space has {leaf.shape}; images must be "
            "written with `jpeg_encoding=False`."
        )
    return found


def _leaves(space: Mapping[str, Any], name: str, path: Path) -> Iterator[Leaf]:
    match space["type"]:
        case "Box":
            yield Leaf(name, tuple(space["shape"]), np.dtype(space["dtype"]).name)
        case "MultiBinary":
            yield Leaf(name, tuple(np.atleast_1d(space["n"]).tolist()), "int8")
        case "Discrete":
            yield Leaf(name, (), "int64", (space["start"],), (space["n"],))
        case "MultiDiscrete":
            counts, first = np.array(space["nvec"]), np.array(space["start"])
            yield Leaf(
                name, counts.shape, space["dtype"], tuple(first.ravel().tolist()), tuple(counts.ravel().tolist())
            )
        case "Dict":
            for key in sorted(space["subspaces"]):
                yield from _leaves(space["subspaces"][key], f"{name}/{key}", path)
        case "Tuple":
            for index, part in enumerate(space["subspaces"]):
                yield from _leaves(part, f"{name}/_index_{index}", path)
        case other:
            raise InputError(
                f"{path}: {name!r} is a space of type {other}, which has no fixed row of numbers; encode it before logging."
            )


def _space(described: Any, name: str, path: Path) -> Space:
    return Space(tuple(_leaves(described, name, path)), coded=described["type"] == "Discrete")


@dataclass(frozen=True)
class Dataset:
    """An open dataset: its HDF5 file and what its metadata say."""

    path: Path
    file: Any
    observation: Space
    action: Space
    total_episodes: int

    def episode(self, number: int) -> Any:
        group = self.file.get(f"episode_{number}")
        if group is None:
            raise InputError(
                f"{self.path}: episode {number} of {self.total_episodes} is missing; write the dataset again with all of them."
            )
        return group

    @property
    def schema(self) -> pa.Schema:
        types = NUMBERED | {"observation": self.observation.dtype, "action": self.action.dtype, "reward": pa.float64()}
        types |= {**FLAGS, "next_observation": self.observation.dtype}
        if self.total_episodes and PROPENSITY in self.episode(0):
            types["action_prob"] = pa.float64()
        return pa.schema(types)


def _described(path: Path) -> tuple[Space, Space, int]:
    """Observation space, action space and number of episodes. Raises InputError when the metadata do not say."""
    described = path / "data" / "metadata.json"
    if not described.is_file():
        raise InputError(f"{path} is not a Minari dataset: it has no data/metadata.json; give the folder that has it.")
    try:
        metadata = json.loads(described.read_bytes())
        if metadata["data_format"] != "hdf5":
            said = f"the data are in Minari's format {metadata['data_format']!r}"
            raise InputError(f"{path}: {said}; write the dataset again with 'hdf5'.")
        observation = _space(json.loads(metadata["observation_space"]), "observations", path)
        action = _space(json.loads(metadata["action_space"]), "actions", path)
        return observation, action, int(metadata["total_episodes"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{described} does not describe a dataset ({error}); write it again with Minari 0.5 or newer."
        ) from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Dataset]:
    observation, action, total_episodes = _described(path)
    with open_hdf5(path / "data" / "main_data.hdf5") as file:
        yield Dataset(path, file, observation, action, total_episodes)


def _propensity(group: Any, path: Path, rows: int) -> Read:
    """Reads `action_prob` of steps; one value more than there are steps means that the first came with the reset."""
    found = numbers(group, PROPENSITY, path, scalar=True)
    if len(found) not in (rows, rows + 1):
        raise InputError(f"{path}: {found.name!r} has {len(found)} values for {rows} steps; log one for each step.")
    ahead = len(found) - rows
    return lambda part: found[part.start + ahead : part.stop + ahead]


def _flags(group: Any, name: str, path: Path, rows: int) -> Read:
    found = numbers(group, name, path, rows=rows, scalar=True)
    return lambda part: flags(found[part], f"{group.name}/{name}", path)


def _truncated(group: Any, path: Path, rows: int) -> Read:
    truncated, terminated = (_flags(group, name, path, rows) for name in ("truncations", "terminations"))
    return lambda part: truncated(part) & ~terminated(part)


def _reads(dataset: Dataset, number: int, columns: Sequence[str]) -> tuple[int, dict[str, Read]]:
    """Number of steps of an episode, and how the columns asked for are read; arrays of others are not opened."""
    path, group = dataset.path, dataset.episode(number)
    reward = numbers(group, "rewards", path, scalar=True)
    steps = len(reward)
    reads: dict[str, Callable[[], Read]] = {
        "episode_id": lambda: lambda part: np.full(part.stop - part.start, number),
        "step": lambda: lambda part: np.arange(part.start, part.stop),
        "observation": lambda: dataset.observation.reader(group, path, rows=steps + 1),
        "next_observation": lambda: dataset.observation.reader(group, path, rows=steps + 1, ahead=1),
        "action": lambda: dataset.action.reader(group, path, rows=steps),
        "reward": lambda: reward.__getitem__,
        "terminated": lambda: _flags(group, "terminations", path, steps),
        "truncated": lambda: _truncated(group, path, steps),
        "action_prob": lambda: _propensity(group, path, steps),
    }
    return steps, {name: reads[name]() for name in columns}


def schema(path: Path, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """What a dataset holds; `action_prob` where its first episode has that info."""
    with _open(path) as dataset:
        return dataset.schema


def chunks(path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType], rows: int) -> Iterator[pa.Table]:
    """Rows of a dataset, episode by episode. A step that ended both ways is terminated and not truncated."""
    with _open(path) as dataset:
        found = dataset.schema
        for number in range(dataset.total_episodes):
            steps, read = _reads(dataset, number, columns)
            for part in sections(steps, rows):
                yield to_table(found, columns, read, part)


def write_minari(episodes: Episodes, path: Path, *, dataset_id: str) -> None:
    """Write episodes as the new dataset folder `path`, whole or not at all.

    Minari finds it as `dataset_id` when `path` is MINARI_DATASETS_PATH / dataset_id. Episodes are numbered from 0: ids of
    their own, gamma and masks of allowed actions have no place there. Propensities are the info `action_prob`, NaN at the
    reset, where nothing was decided; there is no such info when none was logged.
    Raises InputError when Minari is not installed, the id is malformed, or `path` exists.
    """
    try:
        import gymnasium
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise InputError(f"{path}: writing Minari needs more packages; run `pip install minari h5py`.") from error
    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise InputError(
            f"{path}: {dataset_id!r} is no Minari dataset id ({error}); write one like 'toy/log-v0'."
        ) from error
    if path.exists():
        raise InputError(f"{path} exists; give a folder that does not, or remove it.")
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "data").mkdir(parents=True)
    spaces = gymnasium.spaces
    dataset = MinariStorage.new(
        fresh / "data",
        observation_space=spaces.Box(-np.inf, np.inf, episodes.observation.shape[1:], episodes.observation.dtype.type),
        action_space=spaces.Discrete(episodes.n_actions)
        if episodes.action.ndim == 1
        else spaces.Box(-np.inf, np.inf, episodes.action.shape[1:], episodes.action.dtype.type),
    )
    dataset.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__})
    dataset.update_episodes(_buffers(episodes))
    storage.sync_tree(fresh)
    fresh.rename(path)


def _buffers(episodes: Episodes) -> Iterator[Any]:
    """Episodes as Minari takes them, made one at a time."""
    from minari.data_collector import EpisodeBuffer

    logged = not np.isnan(episodes.action_prob).all()
    for start, stop in pairwise(episodes.offsets.tolist()):
        own = slice(start, stop)
        yield EpisodeBuffer(
            observations=[*episodes.observation[own], episodes.next_observation[stop - 1]],
            actions=list(episodes.action[own]),
            rewards=episodes.reward[own].tolist(),
            terminations=episodes.terminated[own].tolist(),
            truncations=episodes.truncated[own].tolist(),
            infos={"action_prob": [float("nan"), *episodes.action_prob[own].tolist()]} if logged else None,
        )
