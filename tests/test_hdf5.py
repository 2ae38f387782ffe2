"""Episodes in HDF5, as D4RL and d3rlpy write them: read exactly in chunks of any size, and refused where they cannot be trusted."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.logs import formats
from offrl_models.logs.hdf5 import number_steps
from offrl_models.schema import InputError
from tests.test_formats import read

# Episodes


@given(ends=st.lists(st.booleans(), min_size=1, max_size=30), cut=st.integers(1, 30))
def test_steps_are_numbered_alike_in_one_piece_and_in_several(ends: list[bool], cut: int) -> None:
    expected, episode, step = [], 0, 0
    for end in ends:
        expected.append((episode, step))
        episode, step = (episode + 1, 0) if end else (episode, step + 1)
    found, episode, step = [], 0, 0
    for start in range(0, len(ends), cut):
        part = np.array(ends[start : start + cut])
        ids, steps = number_steps(part, episode, step)
        found += zip(ids.tolist(), steps.tolist(), strict=True)
        episode, step = (int(ids[-1]) + 1, 0) if part[-1] else (int(ids[-1]), int(steps[-1]) + 1)
    assert found == expected


LENGTHS = (4, 1, 7, 3)
EPISODES = np.repeat(np.arange(4), LENGTHS)
STEPS = np.concatenate([np.arange(n) for n in LENGTHS])
LAST = np.append(EPISODES[1:] != EPISODES[:-1], True)
TERMINATED = LAST & np.isin(EPISODES, (0, 2))  # the others were cut off
RNG = np.random.default_rng(5)
OBSERVATION = RNG.normal(size=(15, 3)).astype(np.float32)
NEXT = RNG.normal(size=(15, 3)).astype(np.float32)
VECTOR = RNG.normal(size=(15, 2)).astype(np.float32)
CODE = RNG.integers(0, 5, 15)
REWARD = RNG.normal(size=15).astype(np.float32)
LOG_PROB = -RNG.random(15).astype(np.float32)
ALL = (1, 2, 7, 15, 100)


def vectors(values: np.ndarray) -> pa.Array:
    dtype = pa.list_(pa.from_numpy_dtype(values.dtype), values.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=dtype)


def episodic(action: np.ndarray, truncated: np.ndarray, **more: Any) -> pa.Table:
    """What every format with a layout of its own must give."""
    return pa.table(
        {
            "episode_id": EPISODES,
            "step": STEPS,
            "observation": vectors(OBSERVATION),
            "action": vectors(action) if action.ndim == 2 else pa.array(action, pa.int64()),
            "reward": REWARD.astype(np.float64),
            "terminated": TERMINATED,
            "truncated": truncated,
            **more,
        }
    )


def check_episodes(path: Path, format: str, expected: pa.Table) -> None:
    assert formats.schema(path, format, {}) == expected.schema
    for rows in ALL:
        assert read(path, format, expected.column_names, {}, rows).equals(expected)
    assert read(path, format, ["reward", "step"], {}, 4).equals(expected.select(["reward", "step"]))


def hdf5(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name.replace("__", "/"), data=values)
    return path


def d4rl(path: Path, **changed: Any) -> Path:
    datasets: dict[str, Any] = {
        "observations": OBSERVATION,
        "actions": VECTOR,
        "rewards": REWARD,
        "terminals": TERMINATED,
        "timeouts": LAST & ~TERMINATED,
        "next_observations": NEXT,
        "infos__action_log_probs": LOG_PROB,
        "infos__qpos": OBSERVATION,
        "metadata__algorithm": "SAC",
        **changed,
    }
    return hdf5(path, **{name: values for name, values in datasets.items() if values is not None})


def test_d4rl(tmp_path: Path) -> None:
    more = {"next_observation": vectors(NEXT), "action_prob": np.exp(LOG_PROB.astype(np.float64))}
    check_episodes(d4rl(tmp_path / "x.hdf5"), "d4rl", episodic(VECTOR, LAST & ~TERMINATED, **more))


def test_d4rl_without_timeouts_ends_at_terminals_only_and_its_tail_stays_open(tmp_path: Path) -> None:
    path = d4rl(tmp_path / "x.hdf5", timeouts=None, next_observations=None, infos__action_log_probs=None)
    for rows in ALL:
        found = read(path, "d4rl", ["episode_id", "step", "terminated", "truncated"], {}, rows)
        assert found["episode_id"].to_pylist() == [0] * 4 + [1] * 8 + [2] * 3  # lengths 1 and 7 run together
        assert found["step"].to_pylist() == [*range(4), *range(8), *range(3)]
        assert found["terminated"].to_pylist() == TERMINATED.tolist() and not any(found["truncated"].to_pylist())
    assert formats.schema(path, "d4rl", {}).names[-1] == "truncated"


def test_d4rl_without_timeouts_is_refused_where_recordings_were_glued_together(tmp_path: Path) -> None:
    path = d4rl(tmp_path / "x.hdf5", timeouts=None)  # two ends that are no terminals, but for the last row
    for rows in ALL:
        with pytest.raises(InputError, match=r"x.hdf5: after \d+ rows comes another observation .* `timeouts`"):
            read(path, "d4rl", ["episode_id"], {}, rows)


def test_a_step_that_ended_both_ways_is_terminated(tmp_path: Path) -> None:
    found = read(d4rl(tmp_path / "x.hdf5", timeouts=LAST), "d4rl", ["terminated", "truncated"], {})
    assert found["terminated"].to_pylist() == TERMINATED.tolist()
    assert found["truncated"].to_pylist() == (LAST & ~TERMINATED).tolist()


@pytest.mark.parametrize("actions", [CODE, CODE[:, None].astype(np.int32), CODE.astype(np.uint8)])
def test_integer_actions_are_codes(tmp_path: Path, actions: np.ndarray) -> None:
    found = read(d4rl(tmp_path / "x.hdf5", actions=actions), "d4rl", ["action"], {}, 4)
    assert found.equals(pa.table({"action": pa.array(CODE, pa.int64())}))


def test_numbers_keep_their_precision(tmp_path: Path) -> None:
    exact = RNG.normal(size=(15, 2))
    found = read(
        d4rl(tmp_path / "x.hdf5", observations=exact, actions=exact[:, :1]), "d4rl", ["observation", "action"], {}
    )
    assert found.equals(pa.table({"observation": vectors(exact), "action": vectors(exact[:, :1])}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rewards": None}, "dataset 'rewards' is missing"),
        ({"rewards": REWARD[:9]}, "dataset 'rewards' has 9 rows where 15 are needed"),
        ({"rewards": VECTOR}, "dataset 'rewards' has 2 values per row where one is needed"),
        ({"timeouts": STEPS}, "dataset 'timeouts' has 8 rows that are neither 0 nor 1"),
        ({"observations": np.array([b"x"] * 15)}, "dataset 'observations' holds .* where rows of numbers are needed"),
    ],
)
def test_d4rl_that_is_not_what_it_should_be_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"x\.hdf5: {said}"):
        read(d4rl(tmp_path / "x.hdf5", **changed), "d4rl", ["truncated"], {})


def mdp_dataset(path: Path, **changed: Any) -> Path:
    """As `MDPDataset.dump` of d3rlpy 1.1 writes it."""
    datasets: dict[str, Any] = {
        "observations": OBSERVATION,
        "actions": CODE.astype(np.int32),
        "rewards": REWARD,
        "terminals": TERMINATED.astype(np.float32),
        "episode_terminals": LAST.astype(np.float32),
        "discrete_action": True,
        "version": "1.0",
        **changed,
    }
    return hdf5(path, **{name: values for name, values in datasets.items() if values is not None})


def replay_buffer(path: Path, actions: np.ndarray, **changed: Any) -> Path:
    """As `ReplayBuffer.dump` of d3rlpy 2.8 writes it."""
    keys = ("observations", "actions", "rewards", "terminated")
    datasets: dict[str, Any] = {"columns": list(keys), "num_episodes": len(LENGTHS)}
    for number, (start, stop) in enumerate(pairwise(np.cumsum((0, *LENGTHS)))):
        values = (OBSERVATION[start:stop], actions[start:stop], REWARD[start:stop, None], bool(TERMINATED[stop - 1]))
        datasets |= {f"{key}_{number}": value for key, value in zip(keys, values, strict=True)}
    return hdf5(path, **{**datasets, "version": "2.1", **changed})


def test_d3rlpy_1(tmp_path: Path) -> None:
    check_episodes(mdp_dataset(tmp_path / "x.h5"), "d3rlpy", episodic(CODE, LAST & ~TERMINATED))
    path = mdp_dataset(
        tmp_path / "open.h5", actions=VECTOR, episode_terminals=(LAST & (EPISODES < 3)).astype(np.float32)
    )
    check_episodes(path, "d3rlpy", episodic(VECTOR, LAST & ~TERMINATED))


def test_d3rlpy_2(tmp_path: Path) -> None:
    check_episodes(replay_buffer(tmp_path / "x.h5", VECTOR), "d3rlpy", episodic(VECTOR, LAST & ~TERMINATED))
    check_episodes(replay_buffer(tmp_path / "y.h5", CODE[:, None]), "d3rlpy", episodic(CODE, LAST & ~TERMINATED))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: mdp_dataset(p, version=None), "d3rlpy before 1.0 logged each reward one row later"),
        (
            lambda p: hdf5(p, columns=["rewards"], total_size=4, rewards=REWARD, version="2.0"),
            "no dump of d3rlpy 1 or 2.1",
        ),
        (lambda p: d4rl(p, observations=None), "no dump of d3rlpy 1 or 2.1"),
        (lambda p: replay_buffer(p, VECTOR, num_episodes=5), "dataset 'rewards_4' is missing"),
        (lambda p: replay_buffer(p, VECTOR, observations_2=NEXT[:7, :2]), "episode 2 has other shapes or types"),
        (lambda p: replay_buffer(p, VECTOR, observations_0_0=NEXT), "observations are tuples of arrays"),
    ],
)
def test_a_dump_that_cannot_be_trusted_is_refused(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(InputError, match=rf"x\.h5.*{said}"):
        read(make(tmp_path / "x.h5"), "d3rlpy", ["observation", "reward"], {})


@pytest.mark.parametrize(("format", "make"), [("d4rl", d4rl), ("d3rlpy", mdp_dataset)])
def test_a_cut_hdf5_file_is_refused(tmp_path: Path, format: str, make: Callable[[Path], Path]) -> None:
    whole = make(tmp_path / "x.h5").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (tmp_path / "x.h5").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read as HDF5"):
            read(tmp_path / "x.h5", format, ["reward"], {})
