"""Splits, episodes, encoder and batches: nothing changes sides, and nothing leaks past the end of an episode."""

import dataclasses
import mmap
import tempfile
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.datasets import transitions as transitions_module
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.moments import Moments
from offrl_models.datasets.split import SPLITS, bucket, buckets, require_split
from offrl_models.datasets.transitions import NextProbs, Sampler, TransitionBatch, Transitions
from offrl_models.logs.read import Log
from offrl_models.mapped import Columns, read_table, write_table
from offrl_models.nets import MLP
from offrl_models.schema import Episodes, Feature, InputError
from tests.conftest import as_table, attributes, chain_world, codes

WORLD = chain_world()


@given(st.text(), st.text())
def test_a_bucket_depends_on_id_and_salt_alone(entity: str, salt: str) -> None:
    assert bucket(entity, salt) == bucket(entity, salt)
    assert 0 <= bucket(entity, salt) < 100


def test_known_buckets_never_change() -> None:
    """These hold for ever: moving an entity would let gate data into training."""
    assert [bucket(entity, "offrl") for entity in ("0", "1", "patient-17")] == [55, 22, 13]


def test_buckets_are_spread_evenly() -> None:
    counts = np.bincount(buckets(np.arange(50_000), "offrl"), minlength=100)
    assert counts.min() > 400 and counts.max() < 600
    assert sorted(number for numbers in SPLITS.values() for number in numbers) == list(range(100))


def log_of(folder: Path, table: pa.Table, **roles: object) -> Log:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= roles
    storage.write_parquet(folder / "b.parquet", table)
    return Log.open([folder / "b.parquet"], parse_pipeline(configured, "toy").logs)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return log_of(tmp_path, as_table(WORLD.simulate(400, seed=3)))


@pytest.fixture
def split(log: Log, tmp_path: Path) -> Path:
    write_splits(log, "offrl", tmp_path / "episodes")
    return tmp_path / "episodes"


def read(split: Path, log: Log, *names: str) -> Episodes:
    return read_splits(split, *names, salt="offrl", contract=log.contract)


def test_every_row_is_in_exactly_one_episode_of_one_split(split: Path, log: Log) -> None:
    whole = WORLD.simulate(400, seed=3)
    parts = [read(split, log, name) for name in SPLITS]
    assert sum(part.n_rows for part in parts) == whole.n_rows
    assert sorted(int(i) for part in parts for i in part.episode_id) == list(range(400))
    for part in parts:
        for place, number in enumerate(part.episode_id):
            mine, rows = slice(*part.offsets[place : place + 2]), slice(*whole.offsets[number : number + 2])
            for name in ("observation", "next_observation", "action", "mask", "reward", "terminated", "action_prob"):
                assert np.array_equal(getattr(part, name)[mine], getattr(whole, name)[rows]), name
    both = read(split, log, "train", "selection")
    assert both.n_rows == parts[0].n_rows + parts[1].n_rows
    assert np.array_equal(both.observation, np.concatenate([part.observation for part in parts[:2]]))


def test_one_split_is_mapped_and_writing_into_it_changes_no_file(split: Path, log: Log) -> None:
    before = storage.sha256_file(split / "train.arrow")
    train = read(split, log, "train")
    base = train.observation
    while not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap | mmap.mmap)
    train.observation[:] = -1.0
    assert storage.sha256_file(split / "train.arrow") == before
    assert read(split, log, "train").observation.min() >= 0.0


@given(st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_rows_and_batches_never_matters(tmp_path: Path, random: Random, batches: int) -> None:
    """Shuffled rows, cut into batches anywhere, give the same files, bit for bit, but for which episode was recorded first."""
    table = pl.DataFrame(as_table(WORLD.simulate(60, seed=3)))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    write_splits(log_of(folder / "ordered", table.to_arrow()), "offrl", folder / "ordered")
    order = list(range(table.height))
    random.shuffle(order)
    cuts = sorted(random.sample(range(1, table.height), batches - 1))
    paths = []
    for number, (start, end) in enumerate(pairwise([0, *cuts, table.height])):
        paths.append(folder / f"{number}.parquet")
        storage.write_parquet(paths[-1], table[order[start:end]].to_arrow())
    shuffled = Log.open(paths, log_of(folder / "ordered", table.to_arrow()).contract)
    write_splits(shuffled, "offrl", folder / "shuffled")
    for name in SPLITS:
        for kind in ("arrow", "finals.arrow"):
            one, other = folder / "ordered" / f"{name}.{kind}", folder / "shuffled" / f"{name}.{kind}"
            assert one.read_bytes() == other.read_bytes(), (name, kind)
        tables = [read_table(folder / order / f"{name}.episodes.arrow") for order in ("ordered", "shuffled")]
        assert tables[0].drop_columns("recorded").equals(tables[1].drop_columns("recorded")), name


@given(st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_recorded_first_is_told_by_time_else_by_batch(tmp_path: Path, random: Random, timed: bool) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    table, began = pl.DataFrame(as_table(WORLD.simulate(60, seed=3))), random.sample(range(60), 60)
    at = pl.col("episode").replace_strict(range(60), began) * 3600 + pl.col("step")
    table = table.with_columns(at=pl.datetime(2026, 1, 1) + pl.duration(seconds=at))
    newer = pl.col("episode").is_in(random.sample(range(60), 30))
    halves = [table.filter(~newer).sample(fraction=1, shuffle=True, seed=1), table.filter(newer)]
    paths = [folder / f"{number}.parquet" for number in range(2)]
    for path, half in zip(paths, halves, strict=True):
        storage.write_parquet(path, half.to_arrow())
    contract = log_of(folder / "log", table.to_arrow(), **({"decided_at": "at"} if timed else {})).contract
    write_splits(Log.open(paths, contract), "offrl", folder / "episodes")
    whole = read_splits(folder / "episodes", *SPLITS, salt="offrl", contract=contract)
    second = set(halves[1]["episode"])
    expected = sorted(range(60), key=lambda number: began[number] if timed else (number in second, number))
    assert whole.episode_id[whole.oldest_first].tolist() == expected
    gate = read_splits(folder / "episodes", "gate", salt="offrl", contract=contract)
    assert gate.episode_id[gate.oldest_first].tolist() == [each for each in expected if each in set(gate.episode_id)]
    backwards = whole.take(np.arange(59, -1, -1))
    assert backwards.episode_id[backwards.oldest_first].tolist() == expected


def test_a_gate_row_inside_a_training_file_is_a_hard_error(split: Path, log: Log) -> None:
    gate, train = (read_table(split / f"{name}.episodes.arrow") for name in ("gate", "train"))
    write_table(split / "train.episodes.arrow", pa.concat_tables([train.slice(1), gate.slice(0, 1)]))
    with pytest.raises(InputError, match="1 entities, the first .* do not belong to the split train"):
        read(split, log, "train")


@pytest.mark.parametrize("file", ["train.arrow", "train.episodes.arrow", "train.finals.arrow"])
def test_a_damaged_file_says_so(split: Path, log: Log, file: str) -> None:
    whole = (split / file).read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"junk" * 100):
        (split / file).write_bytes(content)
        with pytest.raises(InputError, match=f"{file} cannot be read as Arrow"):
            read(split, log, "train")


def test_an_entity_with_several_episodes_stays_on_one_side(tmp_path: Path) -> None:
    table = pl.DataFrame(as_table(WORLD.simulate(400, seed=3))).with_columns(patient=pl.col("episode") // 4)
    log = log_of(tmp_path, table.to_arrow(), entity="patient")
    write_splits(log, "offrl", tmp_path)
    sides = {name: set(read_table(tmp_path / f"{name}.episodes.arrow")["entity"].to_pylist()) for name in SPLITS}
    assert sum(len(side) for side in sides.values()) == 100
    require_split(np.array(sorted(sides["gate"])), "offrl", "gate")


def test_a_split_that_would_be_empty_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the log has 2 episodes and none falls into the .* split"):
        write_splits(log_of(tmp_path, as_table(WORLD.simulate(2, seed=3))), "offrl", tmp_path)


def test_a_crash_while_writing_leaves_no_file_behind(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Columns, "write", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        write_splits(log, "offrl", tmp_path / "episodes")
    assert list((tmp_path / "episodes").iterdir()) == []


def test_the_encoder_standardises_with_the_train_split_and_one_hot_is_a_table() -> None:
    episodes = WORLD.simulate(200, seed=1)
    rng = np.random.default_rng(0)
    observation = np.stack([rng.normal(50, 7, episodes.n_rows), np.full(episodes.n_rows, 3.0)], 1).astype(np.float32)
    train = dataclasses.replace(
        episodes, observation=observation, final_observation=observation[:200], features=tuple(codes(None, None))
    )
    encoder = Encoder.fit(train)
    numeric = encoder(torch.as_tensor(observation)).numeric
    assert numeric[:, 0].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert numeric[:, 0].std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert numeric[:, 1].abs().max().item() == 0.0  # a constant column is centered, not divided by zero
    mixed = Encoder(codes(None, 4, 3))
    assert mixed(torch.tensor([[0.5, 3.0, 2.0]])).codes.tolist() == [[3, 6]]


def test_a_missing_number_is_replaced_and_told() -> None:
    features = [Feature("a", missing="mean"), Feature("b"), Feature("c", missing=7.0)]
    moments = [{"name": name, "mean": mean, "std": 2.0} for name, mean in zip("abc", (1.0, 2.0, 3.0), strict=True)]
    numeric = Encoder.from_moments(features, moments)(torch.tensor([[float("nan"), 4.0, float("nan")]])).numeric
    assert numeric.tolist() == [[0.0, 1.0, 2.0, 1.0, 1.0]]


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 100))
def test_moments_do_not_depend_on_the_pieces(cuts: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(1e4, 3.0, (40, 2)).astype(np.float32)
    values[np.random.default_rng(seed + 1).random(40) < 0.2, 1] = np.nan
    moments = Moments(2)
    for start, end in pairwise([0, *sorted(cuts), 40]):
        moments.add(values[start:end])
    exact = values.astype(np.float64)
    assert moments.mean == pytest.approx(np.nanmean(exact, 0), rel=1e-12)
    assert moments.std == pytest.approx(np.nanstd(exact, 0), rel=1e-9)


def test_discount_is_zero_only_where_the_task_ended() -> None:
    episodes = WORLD.simulate(50, seed=1)
    cut = dataclasses.replace(episodes, terminated=np.zeros(episodes.n_rows, bool), truncated=episodes.terminated)
    assert (episodes.discount == 1.0 - episodes.terminated).all()
    assert (cut.discount == 1.0).all()


def test_return_to_go_and_returns_agree() -> None:
    episodes = dataclasses.replace(WORLD.simulate(60, seed=1), gamma=0.7)
    assert episodes.return_to_go[episodes.offsets[:-1]] == pytest.approx(episodes.return_)
    last = episodes.offsets[1:] - 1
    assert episodes.return_to_go[last] == pytest.approx(episodes.reward[last])


def test_a_truncated_row_without_a_next_mask_is_left_out_of_training() -> None:
    episodes = WORLD.simulate(50, seed=1)
    cut = dataclasses.replace(episodes, terminated=np.zeros(episodes.n_rows, bool), truncated=episodes.terminated)
    encoder = Encoder(codes(WORLD.n_states))
    assert len(Transitions(cut, encoder).rows) == cut.n_rows  # every action is allowed everywhere, so also next
    masked = dataclasses.replace(cut, mask=np.eye(3, dtype=bool)[cut.action])
    usable = Transitions(masked, encoder).rows.numpy()
    assert set(range(cut.n_rows)) - set(usable.tolist()) == set((cut.offsets[1:] - 1).tolist())


def test_a_seed_draws_the_same_rows_alone_and_in_company() -> None:
    pool = torch.arange(1000)
    together = Sampler([pool] * 3, 8, [5, 6, 7]).draw(4)
    alone = Sampler([pool], 8, [6]).draw(4)
    assert torch.equal(together[:, 1], alone[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])


def logged_numbers(folder: Path, continuous: bool) -> Episodes:
    """Episodes of two numbers and a category, some of them missing, in memory-mapped arrays; half of them are truncated."""
    rng = np.random.default_rng(3)
    base = WORLD.simulate(40, seed=3)
    rows, episodes = base.n_rows, base.n_episodes
    observation = np.column_stack([rng.normal(5, 3, (rows + episodes, 2)), rng.integers(0, 4, rows + episodes)])
    observation[rng.random(rows + episodes) < 0.2, 0] = np.nan
    arrays = {
        "observation": observation[:rows].astype(np.float32),
        "final_observation": observation[rows:].astype(np.float32),
        "action": rng.random((rows, 2), np.float32) if continuous else base.action,
        "mask": np.ones((rows, 0), bool) if continuous else rng.random((rows, 3)) < 0.8,
        "reward": rng.random(rows),
        "terminated": base.terminated & (base.episode_of_row % 2 == 0),
        "truncated": base.terminated & (base.episode_of_row % 2 == 1),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    mapped = {
        name: np.load(folder / f"{name}.npy", mmap_mode=None if array.size == 0 else "c")
        for name, array in arrays.items()
    }
    features = (Feature("a", missing="mean"), Feature("b"), Feature("c", categories=4))
    return dataclasses.replace(base, **mapped, gamma=0.9, features=features)


@pytest.mark.parametrize("continuous", [False, True])
def test_batches_hold_the_rows_of_the_log_however_they_are_gathered(
    continuous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = logged_numbers(tmp_path, continuous)
    encoder = Encoder.fit(episodes)
    policy_of_seed = torch.tensor([1, 0, 1])
    given = NextProbs(torch.rand(2, episodes.n_rows, 3), torch.arange(episodes.n_rows).flip(0), policy_of_seed)
    transitions = Transitions(episodes, encoder, next_policy=given)
    row = Sampler([transitions.rows] * 3, 5, [0, 1, 2]).draw(7)
    assert np.isin(row, episodes.offsets[1:] - 1).any()  # last rows of episodes, too
    for gathered in (2**24, 1):
        monkeypatch.setattr(transitions_module, "GATHERED", gathered)
        batches = list(transitions.batches(Sampler([transitions.rows] * 3, 5, [0, 1, 2], draws=2, width=4), 7))
        assert len(batches) == 7 and all(isinstance(batch, TransitionBatch) for batch in batches)
        for batch, chosen in zip(batches, row, strict=True):
            where = chosen.numpy()
            for found, wanted in (
                (batch.observation, episodes.observation[where]),
                (batch.next_observation, episodes.next_observation[where]),
            ):
                numeric, codes = encoder(torch.as_tensor(np.array(wanted)))
                assert torch.equal(found.numeric, numeric) and torch.equal(found.codes, codes)
            for name in ("action", "action_prob", "reward", "discount", "mask"):
                assert np.array_equal(
                    getattr(batch, name), getattr(episodes, name)[where].astype(getattr(batch, name).numpy().dtype)
                )
            on = ~episodes.terminated[where]
            assert np.array_equal(batch.next_mask.numpy()[on], episodes.next_mask[where][on])
            assert batch.next_mask.any(-1).all() or continuous
            assert batch.next_probs is not None and torch.equal(batch.row, chosen)
            assert batch.uniform is not None and batch.uniform.shape == (3, 5, 2, 4)
            wanted = torch.stack(
                [given.probs[policy_of_seed[seed], given.distinct_of_row[chosen[seed]]] for seed in range(3)]
            )
            assert torch.equal(batch.next_probs, wanted)
    assert transitions.observation.data_ptr() == episodes.observation.ctypes.data  # no copy of the log


def test_random_numbers_are_of_a_seed_and_no_two_rows() -> None:
    pool = torch.arange(100)
    together = Sampler([pool] * 2, 8, [5, 6], draws=3, width=2).uniform(4, pool.device)
    alone = Sampler([pool], 8, [6], draws=3, width=2).uniform(4, pool.device)
    assert together is not None and alone is not None and together.shape == (4, 2, 8, 3, 2)
    assert torch.equal(together[:, 1:], alone) and len(together.unique()) > 370
    assert Sampler([pool], 8, [6]).uniform(4, pool.device) is None


def test_networks_take_observations_as_logged_and_encoded(tmp_path: Path) -> None:
    episodes = logged_numbers(tmp_path, continuous=False)
    encoder = Encoder.fit(episodes)
    network = MLP([0, 1], "q", encoder, (8, 8), 3)
    observation = torch.as_tensor(np.array(episodes.observation)).expand(2, -1, -1)
    assert torch.equal(network(observation), network(encoder(observation)))
    assert not torch.equal(network(observation)[0], network(observation)[1])
