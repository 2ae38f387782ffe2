"""Small worlds, and logs of none of them with ratios and a model of values: what tests of estimators vary."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from offrl_models.ope.multistep import Trace
from offrl_models.ope.sequences import ratios
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import random_world
from offrl_models.schema import Episodes

EXACT = 1e-9
INF = math.inf
WORLDS = [
    random_world(2, 2, 3, 0.9, seed=1),
    random_world(2, 3, 3, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, 3, masked=True),
]
KINDS: tuple[Trace, ...] = ("retrace", "tree_backup", "q_pi")
each_world = pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def policy_ratios(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states_of(episodes)[0]])


def on_rows(policy: np.ndarray, q: np.ndarray, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """q of the logged action and v of every row, from a table."""
    state = states_of(episodes)[0]
    return q[state, episodes.action], (policy * q).sum(1)[state]


@dataclasses.dataclass(frozen=True)
class Log:
    """Episodes of no world at all, of 1 to 5 steps that are not equally long, with ratios and a model."""

    episodes: Episodes
    ratio: np.ndarray
    q: np.ndarray
    v: np.ndarray
    probs: np.ndarray
    behavior: np.ndarray

    @property
    def given(self) -> tuple[Episodes, np.ndarray, np.ndarray, np.ndarray]:
        """What estimators take."""
        return self.episodes, self.ratio, self.q, self.v


def random_log(seed: int, episodes: int = 7, gamma: float = 0.8) -> Log:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 6, episodes)
    length[0] = 5
    rows = int(length.sum())
    probs, behavior = rng.dirichlet(np.ones(3), rows), rng.dirichlet(np.full(3, 3.0), rows)
    action = rng.integers(0, 3, rows)
    last = np.zeros(rows, bool)
    last[length.cumsum() - 1] = True
    row = np.arange(rows)
    log = Episodes(
        episode_id=np.arange(episodes),
        offsets=np.append(0, length.cumsum()),
        observation=rng.integers(0, 4, (rows, 1)).astype(np.float32),
        final_observation=np.zeros((episodes, 1), np.float32),
        action=action,
        mask=np.ones((rows, 3), bool),
        reward=rng.normal(size=rows),
        terminated=last,
        truncated=np.zeros(rows, bool),
        action_prob=behavior[row, action],
        gamma=gamma,
        interval=rng.uniform(0.2, 2.0, rows),
    )
    ratio = probs[row, action] / behavior[row, action]
    return Log(log, ratio, rng.normal(size=rows), rng.normal(size=rows), probs, behavior)


def paths(log: Log) -> list[range]:
    """Rows of every episode."""
    return [range(a, b) for a, b in itertools.pairwise(log.episodes.offsets.tolist())]


def corrected_by_hand(log: Log, weight: Callable[[list[float]], float]) -> float:
    """v(s_0) + sum_t gamma^t weight(ratios so far) (r_t + gamma v(s_{t+1}) - q_t), in plain loops."""
    total = 0.0
    for path in paths(log):
        total += log.v[path[0]]
        discount = 1.0
        for t, row in enumerate(path):
            onward = log.episodes.step_discount[row]
            ahead = log.v[row + 1] if t + 1 < len(path) else 0.0
            error = log.episodes.reward[row] + onward * ahead - log.q[row]
            total += discount * weight(log.ratio[path[: t + 1]].tolist()) * error
            discount *= onward
    return total / len(paths(log))


def hand() -> Log:
    """Two episodes at gamma 1/2. Weights 2 and 6 in the first, 1/2 in the second; returns 2 and 4."""
    episodes = Episodes(
        episode_id=np.arange(2),
        offsets=np.array([0, 2, 3]),
        observation=np.zeros((3, 1), np.float32),
        final_observation=np.zeros((2, 1), np.float32),
        action=np.zeros(3, np.int64),
        mask=np.ones((3, 1), bool),
        reward=np.array([1.0, 2.0, 4.0]),
        terminated=np.array([False, True, True]),
        truncated=np.zeros(3, bool),
        action_prob=np.array([0.3, 0.25, 0.8]),
        gamma=0.5,
    )
    q, v = np.array([1.0, 3.0, 1.0]), np.array([0.5, 2.0, 2.0])
    return Log(episodes, np.array([2.0, 3.0, 0.5]), q, v, np.empty((3, 0)), np.empty((3, 0)))
