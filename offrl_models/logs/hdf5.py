"""Logged episodes in HDF5: the flat files of D4RL, and what d3rlpy dumps.

Both give `episode_id` (counted from 0), `step`, `observation`, `action`, `reward`, `terminated` and `truncated`. A step
that ended both ways is terminated: `truncated` says that the recording ended and the task did not. Rows of numbers are
float32, or float64 where float32 does not hold what is stored.

HDF5 has no checksums unless its writer asked for them: a file that was cut is refused, a flipped bit in the data is not seen.

D4RL: Fu, Kumar, Nachum, Tucker & Levine (2020), https://arxiv.org/abs/2004.07219.
d3rlpy: Seno & Imai (2022), JMLR 23(315); `ReplayBuffer.dump` of version 2, `MDPDataset.dump` of version 1.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, Shaped

from offrl_models.schema import InputError

Read = Callable[[slice], np.ndarray]  # the values of some rows

NUMBERED = {"episode_id": pa.int64(), "step": pa.int64()}
FLAGS = {"terminated": pa.bool_(), "truncated": pa.bool_()}


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An `h5py.File` to read from. Raises InputError when h5py is not installed or the file is not whole."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs the package h5py; run `pip install h5py`.") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py has no class of its own
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{path} cannot be read as HDF5 ({reason}); write the file again or remove it.") from error


def numbers(group: Any, name: str, path: Path, *, rows: int | None = None, scalar: bool = False) -> Any:
    """The dataset `name` of a group.

    Raises InputError when it is missing, holds no numbers, has not `rows` rows, or has several values per row when `scalar`.
    """
    found, shown = group.get(name), f"{path}: dataset {f'{group.name}/{name}'.lstrip('/')!r}"
    if found is None or not hasattr(found, "dtype"):
        raise InputError(f"{shown} is missing; write the file again with it.")
    if found.dtype.kind not in "biuf" or getattr(found, "ndim", 0) == 0:
        raise InputError(
            f"{shown} holds {found.dtype} where rows of numbers are needed; write the file again with them."
        )
    if rows is not None and len(found) != rows:
        raise InputError(
            f"{shown} has {len(found)} rows where {rows} are needed; write the file again with all of them."
        )
    if scalar and math.prod(found.shape[1:]) != 1:
        raise InputError(f"{shown} has {math.prod(found.shape[1:])} values per row where one is needed; write one.")
    return found


def vector_type(width: int, dtype: Any) -> pa.DataType:
    """`width` numbers per row, in the smallest of float32 and float64 that holds `dtype` exactly."""
    return pa.list_(pa.from_numpy_dtype(np.result_type(dtype, np.float32)), width)


def _row_type(dataset: Any) -> pa.DataType:
    return vector_type(math.prod(dataset.shape[1:]), dataset.dtype)


def _action_type(dataset: Any) -> pa.DataType:
    """int64 where the dataset is one column of integers, else a row of numbers."""
    one_column = dataset.ndim == 1 or dataset.shape[1:] == (1,)
    return pa.int64() if one_column and dataset.dtype.kind in "iu" else _row_type(dataset)


def flags(values: np.ndarray, name: str, path: Path) -> Bool[np.ndarray, "rows"]:
    """Booleans that were stored as any kind of number. Raises InputError when one is neither 0 nor 1."""
    odd = int((~np.isin(values, (0, 1))).sum())
    if odd:
        raise InputError(f"{path}: dataset {name!r} has {odd} rows that are neither 0 nor 1; write flags.")
    return values.reshape(len(values)).astype(bool)


def to_arrow(values: Shaped[np.ndarray, "rows *shape"], dtype: pa.DataType) -> pa.Array:
    """Rows as an Arrow array; what a row holds is laid out in one line."""
    if pa.types.is_fixed_size_list(dtype):
        flat = np.ascontiguousarray(values, dtype.value_type.to_pandas_dtype()).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=dtype)
    return pa.array(values.reshape(len(values)).astype(dtype.to_pandas_dtype()), dtype)


def sections(total: int, rows: int) -> Iterator[slice]:
    """0 to `total` in slices of at most `rows`."""
    return (slice(start, min(start + rows, total)) for start in range(0, total, rows))


def to_table(schema: pa.Schema, columns: Sequence[str], read: Mapping[str, Read], part: slice) -> pa.Table:
    """Some rows of some columns; the others are not read."""
    fields = [schema.field(name) for name in columns]
    return pa.table([to_arrow(read[field.name](part), field.type) for field in fields], schema=pa.schema(fields))


def number_steps(
    ends: Bool[np.ndarray, "rows"], episode: int, step: int
) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
    """(episode_id, step) of rows of which the first is step `step` of `episode`, and `ends` is True on last rows."""
    opens = np.concatenate([[False], ends[:-1]])
    position = np.arange(len(ends))
    start = np.maximum.accumulate(np.where(opens, position, -step))
    return episode + np.cumsum(opens), position - start


def _constant(values: np.ndarray) -> Read:
    return lambda _: values


def _flat_datasets(file: Any, path: Path) -> dict[str, Any]:
    """The datasets of a flat file by the column they fill; all have the rows of `terminals`."""
    rows = len(numbers(file, "terminals", path, scalar=True))
    found = {
        "observation": numbers(file, "observations", path, rows=rows),
        "action": numbers(file, "actions", path, rows=rows),
        "reward": numbers(file, "rewards", path, rows=rows, scalar=True),
    }
    if "next_observations" in file:
        found["next_observation"] = numbers(file, "next_observations", path, rows=rows)
    if "infos/action_log_probs" in file:
        found["action_prob"] = numbers(file, "infos/action_log_probs", path, rows=rows, scalar=True)
    return found


def _flat_schema(file: Any, path: Path) -> pa.Schema:
    found = _flat_datasets(file, path)
    types = NUMBERED | {"observation": _row_type(found["observation"]), "action": _action_type(found["action"])}
    types |= {"reward": pa.float64(), **FLAGS}
    if "next_observation" in found:
        types["next_observation"] = _row_type(found["next_observation"])
    if "action_prob" in found:
        types["action_prob"] = pa.float64()
    return pa.schema(types)


def _flat_chunks(
    file: Any, path: Path, columns: Sequence[str], rows: int, *, ends: str, closed: bool
) -> Iterator[pa.Table]:
    """Rows of a flat file. Dataset `ends` marks last rows besides `terminals`; `closed` says that the last row is one too."""
    found, schema = _flat_datasets(file, path), _flat_schema(file, path)
    total = len(found["reward"])
    terminals = numbers(file, "terminals", path)
    others = numbers(file, ends, path, rows=total, scalar=True) if ends in file else None
    episode = step = 0
    for part in sections(total, rows):
        terminated = flags(terminals[part], "terminals", path)
        ended = terminated if others is None else terminated | flags(others[part], ends, path)
        if closed and part.stop == total:
            ended = ended | (np.arange(len(ended)) == len(ended) - 1)
        episode_id, steps = number_steps(ended, episode, step)
        episode, step = (int(episode_id[-1]) + 1, 0) if ended[-1] else (int(episode_id[-1]), int(steps[-1]) + 1)
        read: dict[str, Read] = {name: dataset.__getitem__ for name, dataset in found.items()}
        if "action_prob" in found:
            read["action_prob"] = lambda rows: np.exp(found["action_prob"][rows].astype(np.float64))
        read |= {"episode_id": _constant(episode_id), "step": _constant(steps)}
        read |= {"terminated": _constant(terminated), "truncated": _constant(ended & ~terminated)}
        yield to_table(schema, columns, read, part)


def d4rl_schema(path: Path, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """What a D4RL file holds; `next_observation` and `action_prob` where it has them."""
    with open_hdf5(path) as file:
        return _flat_schema(file, path)


def d4rl_chunks(path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType], rows: int) -> Iterator[pa.Table]:
    """Rows of a D4RL file. Without `timeouts` only `terminals` end an episode; a tail that nothing ended stays open.

    Raises InputError where the next observations then say that recordings stopped in between.
    """
    with open_hdf5(path) as file:
        if "timeouts" not in file:
            _require_followed(file, path, rows)
        yield from _flat_chunks(file, path, columns, rows, ends="timeouts", closed=False)


def _require_followed(file: Any, path: Path, rows: int) -> None:
    """Raises InputError where a row is not followed by what was observed after it, and did not end the task."""
    found = _flat_datasets(file, path)
    if "next_observation" not in found:
        return
    total, apart = len(found["reward"]), 0
    terminals = numbers(file, "terminals", path)
    for part in sections(total - 1, rows):
        after = slice(part.start + 1, part.stop + 1)
        differs = np.asarray(found["next_observation"][part]) != np.asarray(found["observation"][after])
        differs = differs.reshape(len(differs), -1).any(1)
        apart += int((differs & ~flags(terminals[part], "terminals", path)).sum())
    if apart:
        raise InputError(
            f"{path}: after {apart} rows comes another observation than next_observations says, and no dataset `timeouts` marks "
            "where recordings stop; add it."
        )


def _is_flat(file: Any, path: Path) -> bool:
    """Whether d3rlpy 1 wrote the file, and not d3rlpy 2. Raises InputError for layouts that cannot be trusted."""
    stored = file.get("version")
    version = stored.asstr()[()] if hasattr(stored, "asstr") else None
    if version is None and "observations" in file:
        raise InputError(
            f"{path} has no dataset 'version', and d3rlpy before 1.0 logged each reward one row later: make sure that every "
            "reward stands in the row of its action, and write version '1.0' into the file."
        )
    if version is not None and version.startswith("1."):
        return True
    if version is not None and "num_episodes" in file:
        return False
    raise InputError(f"{path} is no dump of d3rlpy 1 or 2.1 (version {version}); load it there and dump it again.")


def _dumped_episode(file: Any, path: Path, number: int) -> tuple[pa.Schema, dict[str, Any]]:
    """Schema and datasets of one episode of a d3rlpy 2 dump."""
    if f"observations_{number}_0" in file:
        raise InputError(f"{path}: observations are tuples of arrays; dump them as one array per episode.")
    reward = numbers(file, f"rewards_{number}", path, scalar=True)
    found = {
        "observation": numbers(file, f"observations_{number}", path, rows=len(reward)),
        "action": numbers(file, f"actions_{number}", path, rows=len(reward)),
        "reward": reward,
    }
    types = NUMBERED | {"observation": _row_type(found["observation"]), "action": _action_type(found["action"])}
    return pa.schema(types | {"reward": pa.float64(), **FLAGS}), found


def _dumped_chunks(file: Any, path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
    schema, _ = _dumped_episode(file, path, 0)
    for number in range(int(file["num_episodes"][()])):
        own, found = _dumped_episode(file, path, number)
        if own != schema:
            raise InputError(f"{path}: episode {number} has other shapes or types than episode 0; dump them apart.")
        total = len(found["reward"])
        terminated = bool(flags(np.atleast_1d(file[f"terminated_{number}"][()]), f"terminated_{number}", path)[0])
        for part in sections(total, rows):
            step = np.arange(part.start, part.stop)
            last = step == total - 1
            read: dict[str, Read] = {name: dataset.__getitem__ for name, dataset in found.items()}
            read |= {"episode_id": _constant(np.full(len(step), number)), "step": _constant(step)}
            read |= {"terminated": _constant(last & terminated), "truncated": _constant(last & (not terminated))}
            yield to_table(schema, columns, read, part)


def d3rlpy_schema(path: Path, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """What a d3rlpy dump holds."""
    with open_hdf5(path) as file:
        return _flat_schema(file, path) if _is_flat(file, path) else _dumped_episode(file, path, 0)[0]


def d3rlpy_chunks(
    path: Path, columns: Sequence[str], types: Mapping[str, pa.DataType], rows: int
) -> Iterator[pa.Table]:
    """Rows of a d3rlpy dump. An episode that did not terminate is truncated at its last row."""
    with open_hdf5(path) as file:
        if _is_flat(file, path):
            yield from _flat_chunks(file, path, columns, rows, ends="episode_terminals", closed=True)
        else:
            yield from _dumped_chunks(file, path, columns, rows)
