"""Splits, episodes, encoder and batches: nothing changes sides, and nothing leaks past the end of an episode."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket, buckets, require_split
from offrl_models.datasets.transitions import Sampler, Transitions
from offrl_models.logs.read import read_batches
from offrl_models.schema import InputError
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


@pytest.fixture
def split(tmp_path: Path) -> Path:
    contract = parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs
    storage.write_parquet(tmp_path / "b.parquet", as_table(WORLD.simulate(400, seed=3)))
    write_splits(read_batches([tmp_path / "b.parquet"], contract), contract, "offrl", tmp_path / "episodes")
    return tmp_path / "episodes"


def test_every_row_is_in_exactly_one_episode_of_one_split(split: Path) -> None:
    whole = WORLD.simulate(400, seed=3)
    parts = [read_splits(split, name, salt="offrl", gamma=1.0) for name in SPLITS]
    assert sum(part.n_rows for part in parts) == whole.n_rows
    assert sorted(int(i) for part in parts for i in part.episode_id) == list(range(400))
    assert sum(float(part.return_.sum()) for part in parts) == pytest.approx(float(whole.return_.sum()))
    both = read_splits(split, "train", "selection", salt="offrl", gamma=1.0)
    assert both.n_rows == parts[0].n_rows + parts[1].n_rows


def test_a_gate_row_inside_a_training_file_is_a_hard_error(split: Path) -> None:
    mixed = pl.concat([pl.read_parquet(split / "train.parquet"), pl.read_parquet(split / "gate.parquet").head(1)])
    storage.write_parquet(split / "train.parquet", mixed.to_arrow())
    with pytest.raises(InputError, match="1 episodes, the first of entity .* do not belong to the split train"):
        read_splits(split, "train", salt="offrl", gamma=1.0)


def test_an_entity_with_several_episodes_stays_on_one_side(tmp_path: Path) -> None:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"]["entity"] = "patient"
    contract = parse_pipeline(configured, "toy").logs
    table = as_table(WORLD.simulate(400, seed=3))
    storage.write_parquet(
        tmp_path / "b.parquet", pl.DataFrame(table).with_columns(patient=pl.col("episode") // 4).to_arrow()
    )
    write_splits(read_batches([tmp_path / "b.parquet"], contract), contract, "offrl", tmp_path)
    sides = {name: set(pl.read_parquet(tmp_path / f"{name}.parquet")["entity"]) for name in SPLITS}
    assert sum(len(side) for side in sides.values()) == 100
    require_split(np.array(sorted(sides["gate"])), "offrl", "gate")


def test_an_episode_of_several_entities_is_not_cut_up(tmp_path: Path) -> None:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"]["entity"] = "patient"
    contract = parse_pipeline(configured, "toy").logs
    log = pl.DataFrame(as_table(WORLD.simulate(100, seed=3))).with_columns(patient=pl.col("step"))
    storage.write_parquet(tmp_path / "b.parquet", log.to_arrow())
    with pytest.raises(
        InputError, match=r"\d+ episodes, the first of them .* have several entities in column 'patient'"
    ):
        write_splits(read_batches([tmp_path / "b.parquet"], contract), contract, "offrl", tmp_path)


def test_a_split_that_would_be_empty_says_so(tmp_path: Path) -> None:
    contract = parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs
    storage.write_parquet(tmp_path / "b.parquet", as_table(WORLD.simulate(2, seed=3)))
    with pytest.raises(InputError, match="the log has 2 episodes and none falls into the .* split"):
        write_splits(read_batches([tmp_path / "b.parquet"], contract), contract, "offrl", tmp_path)


def test_the_encoder_standardises_with_the_train_split_and_one_hot_is_a_table() -> None:
    episodes = WORLD.simulate(200, seed=1)
    rng = np.random.default_rng(0)
    observation = np.stack([rng.normal(50, 7, episodes.n_rows), np.full(episodes.n_rows, 3.0)], 1).astype(np.float32)
    configured = attributes(None, 3)
    configured["logs"] |= {"observation": ["a", "b"], "next_observation": ["x", "y"]}
    train = dataclasses.replace(episodes, observation=observation, next_observation=observation)
    encoder = Encoder.fit(parse_pipeline(configured, "toy").logs, train)
    numeric = encoder(torch.as_tensor(observation)).numeric
    assert numeric[:, 0].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert numeric[:, 0].std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert numeric[:, 1].abs().max().item() == 0.0  # a constant column is centered, not divided by zero
    mixed = Encoder([None, 4, 3])
    codes = mixed(torch.tensor([[0.5, 3.0, 2.0]])).codes
    assert codes.tolist() == [[3, 6]]


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
    assert len(Transitions(cut).rows) == cut.n_rows  # every action is allowed everywhere, so also next
    masked = dataclasses.replace(cut, mask=np.eye(3, dtype=bool)[cut.action])
    usable = Transitions(masked).rows.numpy()
    assert set(range(cut.n_rows)) - set(usable.tolist()) == set((cut.offsets[1:] - 1).tolist())


def test_a_seed_draws_the_same_rows_alone_and_in_company() -> None:
    pool = torch.arange(1000)
    together = Sampler([pool] * 3, 8, [5, 6, 7]).draw(4)
    alone = Sampler([pool], 8, [6]).draw(4)
    assert torch.equal(together[:, 1], alone[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])
