"""Behavior clones: they stop when episodes held out gain nothing more, and are then what they were when those gained most."""

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch

from offrl_models import cloning
from offrl_models.algorithms import BC, BCConfig
from offrl_models.cloning import fit_clone
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import TransitionBatch, Transitions
from offrl_models.ope.units import fold_of
from offrl_models.policies import Mixture, probs_of
from offrl_models.schema import Episodes
from tests.conftest import codes
from tests.test_models import single_steps

CONFIG = BCConfig(hidden=(32,), learning_rate=0.01)


def noisy(rows: int, seed: int) -> Episodes:
    """Three actions that follow one number of five a little."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(rows, 5)).astype(np.float32)
    chance = np.exp(np.stack([seen[:, 0], np.zeros(rows), -seen[:, 0]], 1))
    chance /= chance.sum(1, keepdims=True)
    action = (rng.random((rows, 1)) > chance.cumsum(1)).sum(1)
    return single_steps(seen, action, seen, mask=np.ones((rows, 3), bool), features=tuple(codes(*[None] * 5)))


def surprise(clone: BC, seeds: int, episodes: Episodes) -> float:
    """Mean negative log-likelihood of what was done."""
    probs = probs_of(Mixture(clone, seeds), episodes)
    return float(-np.log(probs[np.arange(episodes.n_rows), episodes.action]).mean())


def cloned(episodes: Episodes, seeds: list[int], steps: int) -> BC:
    found = fit_clone(CONFIG, episodes, Encoder.fit(episodes), seeds=seeds, gradient_steps=steps, batch_size=64)
    assert isinstance(found, BC)
    return found


def test_a_clone_does_not_learn_its_rows_by_heart() -> None:
    log, fresh = noisy(400, 1), noisy(4000, 2)
    with patch.object(cloning, "PATIENCE", 10**6):
        best_of_all = surprise(cloned(log, [0], 1500), 1, fresh)
    with patch.object(cloning, "PARTS", 10**6):  # nothing is held out
        by_heart = surprise(cloned(log, [0], 1500), 1, fresh)
    stopped = surprise(cloned(log, [0], 1500), 1, fresh)
    assert stopped == pytest.approx(best_of_all, abs=0.02) and stopped < by_heart - 0.2


def test_it_ends_when_nothing_is_gained_and_says_so() -> None:
    log, told = noisy(400, 1), []
    fit_clone(
        CONFIG, log, Encoder.fit(log), seeds=[0, 1], gradient_steps=5000, batch_size=64,
        report=lambda steps, of, losses: told.append((steps, of, losses["policy_held_out"])),
    )  # fmt: skip
    assert [steps for steps, _, _ in told] == list(range(25, 25 * len(told) + 1, 25))
    assert [of for _, of, _ in told[:-1]] == [5000] * (len(told) - 1) and told[-1][:2] == (told[-1][0], told[-1][0])
    assert 250 < told[-1][0] < 1500


def test_episodes_of_an_entity_are_held_out_together() -> None:
    log = dataclasses.replace(noisy(100, 1), entity=np.repeat(np.arange(50), 2))
    seen: list[TransitionBatch] = []

    def stop(self: cloning.LikeliestWeights, clone: BC, held_out: TransitionBatch) -> None:
        seen.append(held_out)
        raise StopIteration

    with patch.object(cloning.LikeliestWeights, "__init__", stop), pytest.raises(StopIteration):
        cloned(log, [0], 100)
    (held_out,) = seen
    first = fold_of(log, cloning.PARTS) == 0
    assert held_out.action.shape == (1, 20)
    assert np.array_equal(held_out.action[0].numpy(), log.action[first])


def test_a_seed_is_the_same_alone_and_in_company() -> None:
    log = noisy(300, 1)
    alone, together = cloned(log, [3], 400), cloned(log, [3, 4], 400)
    for one, both in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.allclose(one[0], both[0], atol=1e-5)


def test_four_episodes_hold_nothing_out() -> None:
    log, told = noisy(4, 1), []
    fit_clone(
        CONFIG, log, Encoder.fit(log), seeds=[0], gradient_steps=60, batch_size=8,
        report=lambda steps, of, losses: told.append((steps, of, sorted(losses))),
    )  # fmt: skip
    assert told[-1] == (60, 60, ["policy"])


def test_a_seed_that_is_done_stays_as_it_was() -> None:
    """However well it would do later on, while another one trains."""
    log = noisy(40, 1)
    clone = BC(CONFIG, Encoder.fit(log), 3, [0, 1])
    batch = Transitions(log, clone.policy.net.encode, "cpu").take(torch.arange(5).expand(2, -1))
    stop = cloning.LikeliestWeights(clone, batch)
    errors = [[1.0, 1.0], *([2.0, 1.0 - 0.01 * step] for step in range(1, cloning.PATIENCE + 1)), [0.5, 0.1]]
    weight = next(each for each in clone.parameters() if each.numel())
    for number, error in enumerate(errors):
        with torch.no_grad():
            weight.fill_(float(number))
        with patch.object(BC, "losses", lambda self, batch, error=error: {"policy": torch.tensor(error)}):
            stop.judge()
    stop.keep_best()
    assert weight[0].unique().tolist() == [0.0] and weight[1].unique().tolist() == [len(errors) - 1.0]
    assert not stop.done
