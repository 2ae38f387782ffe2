"""Random numbers of one seed for several purposes: torch reads 32 bits of a seed, and none of them may be another's."""

import itertools

import numpy as np
import torch

from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import NextDraws, Sampler, Transitions, stream
from offrl_models.exported import OnnxDensity
from offrl_models.ope.fqe import DRAWS
from offrl_models.training import _next_policy
from tests.test_algorithms import LOGS


class Anywhere(OnnxDensity):
    def __init__(self) -> None:
        pass

    def draws(self, observation: np.ndarray, dimensions: int, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).random((len(observation), count, dimensions), np.float32)


def test_no_two_purposes_share_a_stream() -> None:
    rows = torch.arange(1000)
    samplers = [Sampler([rows], 8, [seed], draws=1) for seed in range(3)]
    generators = [each for sampler in samplers for each in (*sampler.generators, *sampler.chances)]
    generators += [stream(seed, purpose) for seed in range(3) for purpose in ("rows held out", "draws of policies")]
    drawn = [torch.randint(2**31, (4,), generator=each).tolist() for each in generators]
    assert all(not set(one) & set(other) for one, other in itertools.combinations(drawn, 2))
    assert torch.rand(3, generator=stream(1, "a")).equal(torch.rand(3, generator=stream(1, "a")))


def test_every_member_of_an_ensemble_meets_all_draws_of_a_policy() -> None:
    """A row that is drawn 60 times meets 15 or 16 of 16 draws, if which draw it meets does not depend on the row."""
    log = LOGS["continuous"]
    following = _next_policy([Anywhere()], log, 2, seed=0)
    assert isinstance(following, NextDraws)
    numbered = torch.arange(float(log.n_rows * DRAWS)).reshape(1, log.n_rows, DRAWS, 1).expand(-1, -1, -1, 2)
    transitions = Transitions(log, Encoder(log.features), next_policy=following._replace(actions=numbered))
    sampler = Sampler([transitions.rows] * 2, 256, [0, 1])
    met = np.zeros((2, log.n_rows, DRAWS), bool)
    for batch in transitions.batches(sampler, 60 * log.n_rows // 256):
        assert batch.next_draw is not None
        place = batch.next_draw[..., 0].long().numpy() % DRAWS
        for member in (0, 1):
            met[member, batch.row[member].numpy(), place[member]] = True
    assert (met.sum(2).mean(1) > 14).all(), met.sum(2).mean(1)
