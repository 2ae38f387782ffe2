"""Encoder, moments and batches: what training sees is what was logged, and nothing leaks past the end of an episode."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.datasets import transitions as transitions_module
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.moments import Moments
from offrl_models.datasets.transitions import NextProbs, Sampler, TransitionBatch, Transitions
from offrl_models.nets import MLP
from offrl_models.schema import Episodes, Feature
from tests.conftest import chain_world, codes

WORLD = chain_world()


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
                (batch.next_observation, episodes.observation_ahead[where]),
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
