"""Worlds whose exact values are known. They make example logs, and they check the estimators.

Nothing that decides may read them: the truth stands in a marked column of a report, and nowhere else.
"""

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from offrl_models.schema import Episodes, InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """A finite Markov decision process. An episode ends on entering a terminal state."""

    transition: Float64[np.ndarray, "states actions states"]
    reward: Float64[np.ndarray, "states actions states"]  # of a transition
    initial: Float64[np.ndarray, "states"]
    terminal: Bool[np.ndarray, "states"]
    mask: Bool[np.ndarray, "states actions"]
    gamma: float
    behavior: Float64[np.ndarray, "states actions"]

    @property
    def n_states(self) -> int:
        return self.transition.shape[0]

    @property
    def n_actions(self) -> int:
        return self.transition.shape[1]

    def q_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]:
        """Exact action values of a policy, by solving the Bellman equations."""
        live = ~self.terminal
        onward = np.where(live[None, :], np.einsum("sa,sat->st", policy, self.transition), 0.0)
        expected = np.einsum("sat,sat->sa", self.transition, self.reward)
        state = np.linalg.solve(np.eye(self.n_states) - self.gamma * onward, (policy * expected).sum(1))
        return expected + self.gamma * self.transition @ np.where(live, state, 0.0)

    def value(self, policy: Float64[np.ndarray, "states actions"]) -> float:
        """Exact expected discounted return of a policy from the initial distribution."""
        return float(self.initial @ (policy * self.q_values(policy)).sum(1))

    def optimal(self) -> Float64[np.ndarray, "states actions"]:
        """An optimal policy, by policy iteration over the allowed actions."""
        policy = self.mask / self.mask.sum(1, keepdims=True)
        while True:
            q = np.where(self.mask, self.q_values(policy), -np.inf)
            # Only a strict gain changes an action, so that ties cannot cycle.
            gain = q.max(1) > (policy * np.where(self.mask, q, 0.0)).sum(1) + 1e-12
            if not gain.any():
                return policy
            policy = np.where(gain[:, None], np.eye(self.n_actions)[q.argmax(1)], policy)

    def simulate(self, episodes: int, seed: int) -> Episodes:
        """Episodes drawn under the behavior policy, all of them at once, one step at a time. Seeded."""
        rng = np.random.default_rng(seed)

        def draw(cumulative: np.ndarray, at: np.ndarray) -> np.ndarray:
            return (rng.random(len(at))[:, None] > cumulative[at]).sum(1)

        behavior, following = self.behavior.cumsum(1), self.transition.cumsum(2).reshape(-1, self.n_states)
        behavior[:, -1] = following[:, -1] = np.inf  # rounding must not run past the last entry
        initial = np.append(self.initial.cumsum()[:-1], np.inf)
        running = np.arange(episodes)
        state = draw(np.tile(initial, (1, 1)), np.zeros(episodes, int))
        steps: list[Int64[np.ndarray, "rows 4"]] = []
        while len(running):
            action = draw(behavior, state)
            next_state = draw(following, state * self.n_actions + action)
            steps.append(np.stack([running, state, action, next_state], 1))
            live = ~self.terminal[next_state]
            running, state = running[live], next_state[live]
        rows = np.concatenate(steps)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return self._logged(rows[:, 1:], np.bincount(rows[:, 0], minlength=episodes))

    def _logged(self, rows: Int64[np.ndarray, "rows 3"], length: Int64[np.ndarray, "episodes"]) -> Episodes:
        """Episodes from their (state, action, next state) in order, and the number of steps of each."""
        state, action, next_state = rows.T
        return Episodes(
            episode_id=np.arange(len(length)),
            offsets=np.append(0, length.cumsum()),
            observation=state[:, None].astype(np.float32),
            final_observation=next_state[length.cumsum() - 1, None].astype(np.float32),
            action=action,
            mask=self.mask[state],
            reward=self.reward[state, action, next_state],
            terminated=self.terminal[next_state],
            truncated=np.zeros(len(rows), bool),
            action_prob=self.behavior[state, action],
            gamma=self.gamma,
        )

    def enumerate(self, longest: int) -> tuple[Episodes, Float64[np.ndarray, "episodes"]]:
        """Every trajectory of at most `longest` steps and its probability under the behavior policy.

        Raises ValueError when longer trajectories have a positive probability.
        """
        found = list(self._trajectories(longest))
        probability = np.array([p for p, _ in found])
        if abs(probability.sum() - 1.0) > 1e-12:
            raise ValueError(
                f"trajectories of at most {longest} steps have probability {probability.sum():.12f}, not 1"
            )
        rows = np.array([row for _, path in found for row in path])
        return self._logged(rows, np.array([len(path) for _, path in found])), probability

    def _trajectories(self, longest: int) -> Iterator[tuple[float, list[tuple[int, int, int]]]]:
        open_paths = [(float(p), [], s) for s, p in enumerate(self.initial) if p > 0]
        for _ in range(longest):
            grown = []
            for p, path, s in open_paths:
                for a, t in itertools.product(range(self.n_actions), range(self.n_states)):
                    q = p * float(self.behavior[s, a]) * float(self.transition[s, a, t])
                    if q > 0:
                        longer = [*path, (s, a, t)]
                        if self.terminal[t]:
                            yield q, longer
                        else:
                            grown.append((q, longer, t))
            open_paths = grown


def random_world(states: int, actions: int, steps: int, gamma: float, seed: int, *, masked: bool = False) -> World:
    """A random world of `steps` layers of `states` states, then one terminal state; every episode has `steps` steps at most.

    From each layer an episode may also end early. With `masked`, action 0 is the only one allowed in the first state.
    """
    rng = np.random.default_rng(seed)
    n = states * steps + 1
    transition = np.zeros((n, actions, n))
    for layer, s, a in itertools.product(range(steps), range(states), range(actions)):
        onward = slice((layer + 1) * states, (layer + 2) * states) if layer + 1 < steps else slice(n - 1, n)
        weights = rng.dirichlet(np.ones(onward.stop - onward.start))
        ending = 0.2 if layer + 1 < steps else 0.0
        transition[layer * states + s, a, onward] = (1 - ending) * weights
        transition[layer * states + s, a, n - 1] += ending
    transition[n - 1, :, n - 1] = 1.0
    terminal = np.arange(n) == n - 1
    mask = np.ones((n, actions), bool)
    if masked:
        mask[0, 1:] = False
    behavior = rng.dirichlet(np.full(actions, 3.0), size=n) * mask
    reward = rng.normal(size=transition.shape)
    reward[terminal] = 0.0
    initial = np.zeros(n)
    initial[:states] = rng.dirichlet(np.ones(states))
    return World(
        transition=transition,
        reward=reward,
        initial=initial,
        terminal=terminal,
        mask=mask,
        gamma=gamma,
        behavior=behavior / behavior.sum(1, keepdims=True),
    )


@cache
def icu_tables() -> dict[str, np.ndarray]:
    """The tables inside the `icu-sepsis` package: sepsis treatment in intensive care, fitted to MIMIC-III.

    Choudhary, Gupta & Thomas (2024), https://arxiv.org/abs/2406.05646. The package's environment is not imported.
    Raises InputError when the package is not installed.
    """
    found = importlib.util.find_spec("icu_sepsis")
    if found is None or found.origin is None:
        raise InputError("the example needs the package icu-sepsis; install it with `pip install offrl[demo]`.")
    assets = Path(found.origin).parent / "envs" / "assets"
    tables = dict(np.load(assets / "dynamics.npz"))
    allowed = np.zeros(tables["tx_mat"].shape[:2], bool)
    lines = (assets / "admissible_actions.txt").read_text().splitlines()
    for state, line in enumerate(lines[1:]):
        allowed[state, [int(action) for action in line.split()]] = True
    return {**tables, "admissible": allowed}


def icu_sepsis(gamma: float = 1.0) -> World:
    """ICU-Sepsis with a behavior policy of 0.8 the shipped expert on admissible actions and 0.2 uniform on them.

    716 states: 713 of a patient under treatment, then death, survival (reward 1) and an absorbing state; 25 actions.
    """
    tables = icu_tables()
    mask = tables["admissible"]
    uniform = mask / mask.sum(1, keepdims=True)
    expert = np.where(mask, tables["expert_policy"], 0.0)
    total = np.array([[math.fsum(row)] for row in expert])  # exact, so that every processor logs the same propensities
    expert = np.where(total > 0, expert / np.where(total > 0, total, 1.0), uniform)
    terminal = np.arange(len(mask)) >= 713
    return World(
        transition=tables["tx_mat"],
        reward=np.where(terminal[:, None, None], 0.0, tables["r_mat"]),
        initial=tables["d_0"],
        terminal=terminal,
        mask=mask,
        gamma=gamma,
        behavior=0.8 * expert + 0.2 * uniform,
    )


WORLDS = {"icu_sepsis": icu_sepsis}
