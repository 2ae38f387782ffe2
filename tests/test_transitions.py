"""Batches of transitions: what they are drawn by, and where they live."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offrl_models.datasets import transitions
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Extra, NextDraws, Sampler, Transitions, stream
from offrl_models.distributions import Space
from offrl_models.exported import OnnxDensity
from offrl_models.ope.fqe import DRAWS
from offrl_models.training import _next_policy
from tests.test_algorithms import LOGS


class Anywhere(OnnxDensity):
    def __init__(self) -> None:
        pass

    def draws(self, observation: np.ndarray, dimensions: int, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).random((len(observation), count, dimensions), np.float32)


def test_streams_for_one_purpose_are_no_others() -> None:
    """torch reads 32 bits of a seed: seeds that are far apart may be the same."""
    rows = torch.arange(1000)
    generators = [Sampler([rows], 8, [seed]).generators[0] for seed in range(3)]
    generators += [stream(seed, purpose) for seed in range(3) for purpose in ("one thing", "draws of policies")]
    drawn = [torch.randint(2**31, (4,), generator=each).tolist() for each in generators]
    assert all(not set(one) & set(other) for one, other in itertools.combinations(drawn, 2))
    assert torch.rand(3, generator=stream(1, "a")).equal(torch.rand(3, generator=stream(1, "a")))


def test_every_member_of_an_ensemble_meets_all_draws_of_a_policy() -> None:
    """A row that is drawn 60 times meets 15 or 16 of 16 draws, if which draw it meets does not depend on the row."""
    log = LOGS["continuous"]
    following = _next_policy([Anywhere()], log, 2, seed=0)
    assert isinstance(following, NextDraws)
    numbered = torch.arange(float(log.n_rows * DRAWS)).reshape(1, log.n_rows, DRAWS, 1).expand(-1, -1, -1, 2)
    rows = Transitions(log, Encoder(log.features), next_policy=following._replace(actions=numbered))
    sampler = Sampler([rows.rows] * 2, 256, [0, 1])
    met = np.zeros((2, log.n_rows, DRAWS), bool)
    for batch in rows.batches(sampler, 60 * log.n_rows // 256):
        assert batch.next_draw is not None
        place = batch.next_draw[..., 0].long().numpy() % DRAWS
        for member in (0, 1):
            met[member, batch.row[member].numpy(), place[member]] = True
    assert (met.sum(2).mean(1) > 14).all(), met.sum(2).mean(1)


@pytest.mark.parametrize("space", ["discrete", "continuous"])
def test_a_log_that_a_device_has_no_room_for_stays_where_it_is(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its batches go to the device. The `meta` device, which computes nothing, stands in for a GPU."""
    log = LOGS[space]
    extras: tuple[Extra, ...] = ("next_action", "return_to_go")
    here = Transitions(log, Encoder(log.features), extras=extras, context=2)
    monkeypatch.setattr(transitions, "kept_on", lambda device, size: torch.device("cpu"))
    away = Transitions(log, Encoder(log.features), "meta", extras=extras, context=2)
    assert {each.device.type for each in vars(away).values() if isinstance(each, Tensor)} == {"cpu"}
    (one,), (other,) = (each.batches(Sampler([each.rows] * 2, 8, [0, 1], draws=1), 1) for each in (here, away))
    for right, found in zip(parts(one), parts(other), strict=True):
        assert found.device.type == "meta" and (found.shape, found.dtype) == (right.shape, right.dtype)


def parts(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [part for each in value for part in parts(each)]
    return [value] if isinstance(value, Tensor) else []


def test_a_gpu_keeps_a_log_that_leaves_it_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert transitions.kept_on(cuda, 500) == cuda and transitions.kept_on(cuda, 501) == cpu
    assert transitions.kept_on(cpu, 10**15) == cpu
