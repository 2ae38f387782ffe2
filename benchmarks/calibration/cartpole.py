"""CartPole with a fallible controller as the behavior: continuous observations, and values by rollouts.

The equations of Barto, Sutton & Anderson (1983) with the constants and the Euler step of Gymnasium's CartPole-v1. An episode ends
when the pole or the cart leaves its bounds; a log stops recording after `horizon` steps. Values are discounted and have no horizon.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from offrl_models.schema import Episodes, Feature

GRAVITY, CART, POLE, HALF, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
FARTHEST, WIDEST = 2.4, 12 * 2 * np.pi / 360
NAMES = ("position", "velocity", "angle", "angular velocity")

Policy = Callable[[np.ndarray], np.ndarray]  # states [n, 4] -> probability of pushing to the right [n]


def step(state: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The states after one push, [n, 4]."""
    x, speed, angle, spin = state.T
    force = np.where(right, FORCE, -FORCE)
    cosine, sine = np.cos(angle), np.sin(angle)
    total, moment = CART + POLE, POLE * HALF
    push = (force + moment * spin**2 * sine) / total
    turn = (GRAVITY * sine - cosine * push) / (HALF * (4.0 / 3.0 - POLE * cosine**2 / total))
    drive = push - moment * turn * cosine / total
    return np.stack([x + TAU * speed, speed + TAU * drive, angle + TAU * spin, spin + TAU * turn], 1)


def fallen(state: np.ndarray) -> np.ndarray:
    return (np.abs(state[:, 0]) > FARTHEST) | (np.abs(state[:, 2]) > WIDEST)


def controller(on_the_left: float, on_the_right: float) -> Policy:
    """Pushes under the pole, the more surely the higher its gain on the side to which the pole leans."""

    def probability(state: np.ndarray) -> np.ndarray:
        lean = state[:, 2].astype(np.float64) + 0.3 * state[:, 3]
        side = 1.0 / (1.0 + np.exp(-30.0 * state[:, 2].astype(np.float64)))
        gain = on_the_left + (on_the_right - on_the_left) * side
        return 1.0 / (1.0 + np.exp(-gain * lean))

    return probability


@dataclass(frozen=True)
class CartPole:
    """One reward of (1 - gamma) for every step, so that values lie in [0, 1]."""

    behavior: Policy
    horizon: int = 40
    gamma: float = 0.9

    def _start(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.uniform(-0.05, 0.05, (n, 4))

    def value(self, policy: Policy, rollouts: int, seed: int) -> float:
        """By rollouts to 100 steps, whose discounted rest is under 0.00003. The same seed is the same luck for all policies."""
        rng, worth, total = np.random.default_rng(seed), 1.0 - self.gamma, 0.0
        state, up = self._start(rng, rollouts), np.ones(rollouts, bool)
        for _ in range(100):
            total += worth * float(up.mean())
            luck = rng.random(rollouts)
            state[up] = step(state[up], luck[up] < policy(state[up].astype(np.float32)))
            up &= ~fallen(state)
            worth *= self.gamma
        return total

    def no_better(self, on_the_right: float, rollouts: int, seed: int) -> Policy:
        """A controller that is better on the right and so much worse on the left that it gains nothing, by rollouts."""
        base = self.value(self.behavior, rollouts, seed)
        left = brentq(
            lambda gain: self.value(controller(gain, on_the_right), rollouts, seed) - base, 0.0, on_the_right, xtol=0.01
        )
        return controller(float(left), on_the_right)  # pyright: ignore[reportArgumentType]

    def simulate(self, episodes: int, seed: int) -> Episodes:
        """Episodes under the behavior, all at once. The log shows single precision, and so did the behavior."""
        rng = np.random.default_rng(seed)
        state, running = self._start(rng, episodes), np.arange(episodes)
        rows: list[tuple[np.ndarray, ...]] = []
        final = np.empty((episodes, 4), np.float32)
        for time in range(self.horizon):
            shown = state.astype(np.float32)
            right = self.behavior(shown)
            action = rng.random(len(running)) < right
            state = step(state, action)
            down = fallen(state)
            over = down | (time == self.horizon - 1)
            rows.append((running, shown, action, np.where(action, right, 1 - right), down, over & ~down))
            final[running[over]] = state[over]
            running, state = running[~over], state[~over]
        of_row, shown, action, prob, down, cut = (np.concatenate(part) for part in zip(*rows, strict=True))
        order = np.argsort(of_row, kind="stable")
        return Episodes(
            episode_id=np.arange(episodes),
            offsets=np.append(0, np.bincount(of_row, minlength=episodes).cumsum()),
            observation=shown[order],
            final_observation=final,
            action=action[order].astype(np.int64),
            mask=np.ones((len(order), 2), bool),
            reward=np.full(len(order), 1.0 - self.gamma),
            terminated=down[order],
            truncated=cut[order],
            action_prob=prob[order],
            gamma=self.gamma,
            features=tuple(Feature(name) for name in NAMES),
        )
