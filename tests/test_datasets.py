"""Splits and episodes: nothing changes sides, and a row is in exactly one episode."""

import mmap
import tempfile
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket, buckets, require_split
from offrl_models.logs.read import Log
from offrl_models.mapped import Columns, read_table, write_table
from offrl_models.schema import Episodes, InputError
from tests.conftest import as_table, attributes, chain_world

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


def test_ids_as_text_were_recorded_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    table = pl.DataFrame(as_table(WORLD.simulate(120, seed=3))).with_columns(
        episode="stay " + pl.col("episode").cast(pl.String)
    )
    log = log_of(tmp_path / "log", table.to_arrow())
    write_splits(log, "offrl", tmp_path / "episodes")
    whole = read_splits(tmp_path / "episodes", *SPLITS, salt="offrl", contract=log.contract)
    assert whole.episode_id[whole.oldest_first].tolist() == [f"stay {number}" for number in range(120)]


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


@pytest.mark.parametrize(("one", "other"), [("P12", "P12 "), ("7", "7.0")])
def test_one_id_in_two_ways_is_refused(tmp_path: Path, one: str, other: str) -> None:
    """Each would be a patient of its own, one of whom is trained on and the other judged by."""
    table = pl.DataFrame(as_table(WORLD.simulate(120, seed=3)))
    names = pl.col("episode").replace_strict({5: one, 6: other}, default=pl.col("episode").cast(pl.String) + "x")
    log = log_of(tmp_path / "log", table.with_columns(episode=names).to_arrow())
    with pytest.raises(InputError, match=f"column 'episode' writes 1 ids in two ways, such as '{one}' and '{other}'"):
        write_splits(log, "offrl", tmp_path / "episodes")


def test_a_split_that_would_be_empty_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the log has 2 episodes and none falls into the .* split"):
        write_splits(log_of(tmp_path, as_table(WORLD.simulate(2, seed=3))), "offrl", tmp_path)


def test_a_crash_while_writing_leaves_no_file_behind(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Columns, "write", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        write_splits(log, "offrl", tmp_path / "episodes")
    assert list((tmp_path / "episodes").iterdir()) == []
