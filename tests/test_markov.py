"""The test of a Markov state: silent where the state is one, whatever the model, and loud where the past tells more."""

import dataclasses

import numpy as np
import pytest

from offrl_models.ope.markov import LENT, markov_z
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World, delayed, random_world
from offrl_models.schema import Episodes
from tests.conftest import circling_world

WORLD = random_world(4, 3, 6, 0.9, seed=2)


def fitted(log: Episodes, world: World) -> TabularModel:
    model = TabularModel.fit(log, world.n_states)
    assert model is not None
    return model


def logs(world: World, seed: int, episodes: int = 1500) -> tuple[Episodes, Episodes]:
    return world.simulate(episodes, 2 * seed), world.simulate(episodes, 2 * seed + 1)


@pytest.mark.parametrize("world", [WORLD, circling_world(0.9)], ids=["layers", "circling"])
def test_a_markov_state_is_hardly_ever_called_none(world: World) -> None:
    """The largest of ten z-scores, hardly ever above 3 and never above 4."""
    found = []
    for seed in range(60):
        fitted_on, gate = logs(world, seed, 600)
        found.append(markov_z(fitted(fitted_on, world), fitted_on, gate))
    assert max(found) < 4 and np.mean(np.array(found) > 3) <= 0.1


def test_errors_of_the_model_make_no_difference() -> None:
    """Values of every state are wrong by as much as they vary."""
    found = []
    for seed in range(30):
        fitted_on, gate = logs(WORLD, seed, 600)
        model = fitted(fitted_on, WORLD)
        wrong = np.random.default_rng(seed).normal(size=model.reward.shape)
        found.append(markov_z(dataclasses.replace(model, reward=wrong), fitted_on, gate))
    assert max(found) < 4


def test_late_rewards_are_noticed() -> None:
    for late in (1, 3):
        fitted_on, gate = (delayed(log, late) for log in logs(WORLD, 0))
        assert markov_z(fitted(fitted_on, WORLD), fitted_on, gate) > 6


def test_a_trait_that_nobody_logged_is_noticed() -> None:
    """Half of the episodes earn 2 more by one action, all the way through."""
    rng = np.random.default_rng(0)
    changed = []
    for log in logs(WORLD, 1):
        trait = rng.random(log.n_episodes) < 0.5
        extra = np.where(trait[log.episode_of_row] & (log.action == 0), 2.0, 0.0)
        changed.append(dataclasses.replace(log, reward=log.reward + extra))
    fitted_on, gate = changed
    assert markov_z(fitted(fitted_on, WORLD), fitted_on, gate) > 6


@pytest.mark.parametrize("steps", [2, 10])
def test_an_end_that_the_state_does_not_tell_is_noticed(steps: int) -> None:
    """Every recording that goes on for so many steps ends there, wherever it is; rewards and transitions are those of the state."""
    fitted_on, gate = (ended_after(log, steps) for log in logs(circling_world(0.9), 4))
    assert markov_z(fitted(fitted_on, circling_world(0.9)), fitted_on, gate) > 6


def ended_after(log: Episodes, steps: int) -> Episodes:
    kept = log.step < steps
    last = np.flatnonzero(kept & (np.append(log.step[1:], 0) % steps == 0))
    return dataclasses.replace(
        log,
        offsets=np.append(0, last + 1 - np.cumsum(~kept)[last]),
        observation=log.observation[kept],
        final_observation=log.next_observation[last],
        action=log.action[kept],
        mask=np.asarray(log.mask)[kept],
        reward=log.reward[kept],
        terminated=np.isin(np.flatnonzero(kept), last),
        truncated=np.zeros(int(kept.sum()), bool),
        action_prob=log.action_prob[kept],
    )


def test_nothing_is_said_of_single_decisions() -> None:
    world = random_world(4, 3, 1, 0.9, seed=2)
    fitted_on, gate = logs(world, 0)
    assert markov_z(fitted(fitted_on, world), fitted_on, gate) == 0.0


def test_the_covariances_are_those_of_plain_sums() -> None:
    """Lag 2 alone, summed row by row."""
    fitted_on, gate = logs(WORLD, 3, 40)
    model = fitted(fitted_on, WORLD)
    v = (model.behavior * model.q_values(model.behavior)).sum(1)

    def rows(log: Episodes) -> list[tuple[int, int, float, tuple[int, int] | None, float]]:
        """Episode and cell of every row, what came next, and the cell and what came next two steps before."""
        state, following = log.observation[:, 0].astype(int), log.next_observation[:, 0].astype(int)
        cell = [int(s) * log.n_actions + int(a) for s, a in zip(state, log.action, strict=True)]
        next_value = [
            float(r) + (0.0 if end else 0.9 * float(v[s]))
            for r, end, s in zip(log.reward, log.terminated, following, strict=True)
        ]
        mean = {c: float(np.mean([x for x, d in zip(next_value, cell, strict=True) if d == c])) for c in cell}
        came = [x - mean[c] for x, c in zip(next_value, cell, strict=True)]
        return [
            (int(e), cell[i], came[i], (cell[i - 2], i - 2) if t >= 2 else None, came[i - 2] if t >= 2 else 0.0)
            for i, (e, t) in enumerate(zip(log.episode_of_row, log.step, strict=True))
        ]

    learned: dict[int, list[float]] = {}
    for _, _, came, before, _ in rows(fitted_on):
        if before:
            learned.setdefault(before[0], []).append(came)
    late = [row for row in rows(gate) if row[3]]
    expected = []
    for told in (
        [sum(learned.get(row[3][0], [])) / (len(learned.get(row[3][0], [])) + LENT) if row[3] else 0.0 for row in late],
        [row[4] for row in late],
    ):
        sums = np.zeros(gate.n_episodes)
        for row, past in zip(late, told, strict=True):
            alike = [i for i, other in enumerate(late) if other[1] == row[1]]
            sums[row[0]] += (past - np.mean([told[i] for i in alike])) * (row[2] - np.mean([late[i][2] for i in alike]))
        expected.append(sums.mean() / (sums.std() / np.sqrt(len(sums))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offrl_models.ope.markov.LAGS", (2,))
        assert markov_z(model, fitted_on, gate) == pytest.approx(max(expected[0], abs(expected[1]), 0.0), abs=1e-9)
