"""Finite Markov decision processes: exact values, occupancies, simulation and enumeration."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from offrl_models.ope.tabular import TabularModel
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """A finite Markov decision process. An episode ends on entering a terminal state.

    A log shows the code of each state and the behavior's own propensities, unless `observed` and `logged` say otherwise.
    """

    transition: Float64[np.ndarray, "states actions states"]
    reward: Float64[np.ndarray, "states actions states"]  # of a transition
    initial: Float64[np.ndarray, "states"]
    terminal: Bool[np.ndarray, "states"]
    mask: Bool[np.ndarray, "states actions"]
    gamma: float
    behavior: Float64[np.ndarray, "states actions"]
    observed: Float32[np.ndarray, "states columns"] | None = None  # what a log shows of each state
    logged: Float64[np.ndarray, "states actions"] | None = None  # what a log claims the propensities are

    @property
    def n_states(self) -> int:
        return self.transition.shape[0]

    @property
    def n_actions(self) -> int:
        return self.transition.shape[1]

    @cached_property
    def _expected_reward(self) -> Float64[np.ndarray, "states actions"]:
        return np.einsum("sat,sat->sa", self.transition, self.reward)

    def _onward(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states states"]:
        """Probability of each next state that does not end the episode."""
        return np.where(self.terminal, 0.0, np.einsum("sa,sat->st", policy, self.transition))

    def state_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states"]:
        """Exact state values of a policy, by solving the Bellman equations."""
        return np.linalg.solve(
            np.eye(self.n_states) - self.gamma * self._onward(policy), (policy * self._expected_reward).sum(1)
        )

    def q_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]:
        """Exact action values of a policy."""
        onward = np.where(self.terminal, 0.0, self.state_values(policy))
        return self._expected_reward + self.gamma * self.transition @ onward

    def value(self, policy: Float64[np.ndarray, "states actions"]) -> float:
        """Exact expected discounted return of a policy from the initial distribution."""
        return float(self.initial @ self.state_values(policy))

    def occupancy(
        self, policy: Float64[np.ndarray, "states actions"], gamma: float | None = None
    ) -> Float64[np.ndarray, "states"]:
        """Expected number of decisions in each state per episode, one at step t counted gamma^t (the world's by default)."""
        discount = self.gamma if gamma is None else gamma
        return np.linalg.solve(np.eye(self.n_states) - discount * self._onward(policy).T, self.initial)

    def model(self) -> TabularModel:
        """The empirical model that infinitely many episodes would give."""
        live = ~self.terminal[:, None]
        onward = self.gamma * np.where(self.terminal, 0.0, self.transition) * live[..., None]
        return TabularModel(onward, self._expected_reward, self.initial, self.behavior * live)

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

    def states(self, observation: Float[np.ndarray, "rows columns"]) -> Int64[np.ndarray, "rows"]:
        """The state that each observation shows.

        Raises ValueError where one observation stands for several states, or for none.
        """
        if self.observed is None:
            return observation[:, 0].astype(np.int64)
        shown = self.observed[~self.terminal]
        _, code = np.unique(np.concatenate([shown, observation]), axis=0, return_inverse=True)
        of_code = np.full(code.max() + 1, -1)
        of_code[code[: len(shown)]] = np.flatnonzero(~self.terminal)
        found = of_code[code[len(shown) :]]
        if len(np.unique(code[: len(shown)])) < len(shown) or (found < 0).any():
            raise ValueError("the observations do not tell the states apart")
        return found

    @cached_property
    def _cumulative_transition(self) -> Float64[np.ndarray, "pairs states"]:
        return cumulative(self.transition.reshape(-1, self.n_states))

    def simulate(self, episodes: int, seed: int) -> Episodes:
        """Episodes drawn under the behavior policy, all of them at once, one step at a time. Seeded."""
        rng = np.random.default_rng(seed)
        behavior, following = cumulative(self.behavior), self._cumulative_transition
        running = np.arange(episodes)
        state = draw(rng, cumulative(self.initial[None]), np.zeros(episodes, int))
        steps: list[Int64[np.ndarray, "rows 4"]] = []
        while len(running):
            action = draw(rng, behavior, state)
            next_state = draw(rng, following, state * self.n_actions + action)
            steps.append(np.stack([running, state, action, next_state], 1))
            live = ~self.terminal[next_state]
            running, state = running[live], next_state[live]
        rows = np.concatenate(steps)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return self._logged(rows[:, 1:], np.bincount(rows[:, 0], minlength=episodes))

    def _logged(self, rows: Int64[np.ndarray, "rows 3"], length: Int64[np.ndarray, "episodes"]) -> Episodes:
        """Episodes from their (state, action, next state) in order, and the number of steps of each."""
        state, action, next_state = rows.T
        shown = np.arange(self.n_states, dtype=np.float32)[:, None] if self.observed is None else self.observed
        return Episodes(
            episode_id=np.arange(len(length)),
            offsets=np.append(0, length.cumsum()),
            observation=shown[state],
            final_observation=shown[next_state[length.cumsum() - 1]],
            action=action,
            mask=self.mask[state],
            reward=self.reward[state, action, next_state],
            terminated=self.terminal[next_state],
            truncated=np.zeros(len(rows), bool),
            action_prob=(self.behavior if self.logged is None else self.logged)[state, action],
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


def cumulative(probability: Float64[np.ndarray, "rows values"]) -> Float64[np.ndarray, "rows values"]:
    """Cumulative probabilities of each row; the last is infinite, for rounding must not run past it."""
    summed = probability.cumsum(1)
    summed[:, -1] = np.inf
    return summed


def draw(
    rng: np.random.Generator, summed: Float64[np.ndarray, "rows values"], at: Int64[np.ndarray, "draws"]
) -> Int64[np.ndarray, "draws"]:
    """One draw from each row named of some cumulative probabilities, by bisection for a uniform number."""
    uniform = rng.random(len(at))
    low, high = np.zeros(len(at), np.int64), np.full(len(at), summed.shape[1] - 1)
    for _ in range(summed.shape[1].bit_length()):
        middle = (low + high) // 2
        above = uniform > summed[at, middle]
        low, high = np.where(above, middle + 1, low), np.where(above, high, middle)
    return low


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


def random_policy(world: World, seed: int, *, uniform: float = 0.1) -> Float64[np.ndarray, "states actions"]:
    """A random policy over the allowed actions, mixed with a share of the uniform one so that it has support everywhere."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(world.n_actions), size=world.n_states) * world.mask
    even = world.mask / world.mask.sum(1, keepdims=True)
    return (1 - uniform) * weights / weights.sum(1, keepdims=True) + uniform * even
