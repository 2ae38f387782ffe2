"""Two tasks of gymnasium, what logged them, and rollouts. Needs numpy and scipy, and gymnasium once something is simulated.

Half of the episodes of a log are of a controller with noise, half of actions that are uniform. The noise is normal and cut off at
the bounds of the action, so that every action has a density; the log holds the one of the policy that acted in its episode.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

HIDDEN, BATCH, LEARNING_RATE, GAMMA = (64, 64), 256, 1e-3, 0.98  # of both sides
EVALUATED = 20  # episodes for each training seed
FIRST_EVALUATED = 1_000_000  # far from the seeds of logged episodes

Array = np.ndarray[Any, np.dtype[Any]]
Act = Callable[[Array], Array]  # observations [episodes, columns] -> actions [episodes, dimensions]


@dataclass(frozen=True)
class Task:
    """Actions run from -limit to limit in each dimension; `noise` is a standard deviation in the same units."""

    environment: str
    controller: Act
    limit: float
    dimensions: int
    noise: float
    episodes: int  # in the log
    gradient_steps: int
    reward_scale: float = 1.0  # of the logged rewards beside the environment's

    def noisy(self, observation: Array, rng: np.random.Generator) -> Array:
        """What the controller does, with its noise."""
        return cut_off_draws(self.controller(observation), self.noise, self.limit, rng)

    def uniform(self, observation: Array, rng: np.random.Generator) -> Array:
        return rng.uniform(-self.limit, self.limit, (len(observation), self.dimensions))

    def density(self, observation: Array, action: Array, controlled: Array, noise: float | None = None) -> Array:
        """Of each action, [rows], where the controller acted, with its own or some other noise, and where nobody did."""
        by_controller = cut_off_density(action, self.controller(observation), noise or self.noise, self.limit)
        return np.where(controlled, by_controller, (2 * self.limit) ** -self.dimensions)


def swing_up(observation: Array) -> Array:
    """Of a pendulum, seen as cosine and sine of its angle and the speed: pump energy, then hold it where it is nearly upright.

    Energy shaping: Astrom & Furuta (2000), "Swinging up a pendulum by energy control". Mass and length are 1, gravity is 10.
    """
    cosine, sine, speed = observation.T
    energy = speed**2 / 6 + 5 * cosine
    pumping = (5.3 - energy) * np.where(np.abs(speed) < 0.01, 1.0, speed)
    holding = -12 * np.arctan2(sine, cosine) - 3 * speed
    return np.clip(np.where(cosine > 0.9, holding, pumping), -2, 2)[:, None]


def reach(observation: Array) -> Array:
    """Of an arm with two links: the transposed Jacobian pulls its tip to the target, and friction slows the joints.

    Observed are cosines and sines of both joints, the target, the speeds, and tip less target.
    """
    cosine, sine, speed, away = (observation[:, start : start + 2] for start in (0, 2, 6, 8))
    first, second = np.arctan2(sine, cosine).T
    outer = 0.11 * np.stack([-np.sin(first + second), np.cos(first + second)], 1)
    inner = outer + 0.1 * np.stack([-np.sin(first), np.cos(first)], 1)
    pull = -np.stack([(inner * away).sum(1), (outer * away).sum(1)], 1)
    return np.clip(20 * pull - 0.1 * speed, -1, 1)


TASKS = {
    "pendulum": Task("Pendulum-v1", swing_up, 2.0, 1, 0.5, 60, 4_000, reward_scale=0.1),
    "reacher": Task("Reacher-v5", reach, 1.0, 2, 0.2, 200, 1_500),
}


def cut_off_draws(center: Array, noise: float, limit: float, rng: np.random.Generator) -> Array:
    """Normal numbers around each center that lie within +-limit: by the inverse of their distribution function."""
    below, above = ndtr((-limit - center) / noise), ndtr((limit - center) / noise)
    drawn = center + noise * ndtri(below + rng.random(center.shape) * (above - below))
    return np.clip(drawn, -limit, limit)


def cut_off_density(action: Array, center: Array, noise: float, limit: float) -> Array:
    """The density of such numbers, [rows, dimensions] -> [rows]."""
    mass = ndtr((limit - center) / noise) - ndtr((-limit - center) / noise)
    each = np.exp(-0.5 * ((action - center) / noise) ** 2) / (noise * np.sqrt(2 * np.pi) * mass)
    return each.prod(1)


def roll_out(task: Task, seeds: Sequence[int], act: Act) -> dict[str, Array]:
    """One episode for each seed, all in step: `observation` [episodes, steps + 1, columns], `action` and `reward`.

    Raises RuntimeError where an episode ends before its time is up, which none of the tasks does.
    """
    gymnasium: Any = importlib.import_module("gymnasium")
    worlds = [gymnasium.make(task.environment) for _ in seeds]
    seen = np.stack([world.reset(seed=seed)[0] for world, seed in zip(worlds, seeds, strict=True)]).astype(np.float32)
    observation, action, reward = [seen], [], []
    for step in range(worlds[0].spec.max_episode_steps):
        chosen = act(seen).astype(np.float32)
        seen, earned, terminated, truncated, _ = zip(
            *(world.step(each) for world, each in zip(worlds, chosen, strict=True)), strict=True
        )
        if any(terminated) or (any(truncated) and step + 1 < worlds[0].spec.max_episode_steps):
            raise RuntimeError(f"an episode of {task.environment} ended after {step + 1} steps")
        seen = np.stack(seen).astype(np.float32)
        observation.append(seen)
        action.append(chosen)
        reward.append(earned)
    return {name: np.stack(x, 1) for name, x in (("observation", observation), ("action", action), ("reward", reward))}


def evaluated_seeds(seed: int) -> range:
    """Of the episodes that judge what was trained with a seed: the same for everyone."""
    return range(FIRST_EVALUATED + seed * EVALUATED, FIRST_EVALUATED + (seed + 1) * EVALUATED)


def mean_return(task: Task, seed: int, act: Act) -> float:
    """Undiscounted, over the episodes of a training seed."""
    return float(roll_out(task, evaluated_seeds(seed), act)["reward"].sum(1).mean())


def make_log(task: Task, folder: Path) -> None:
    """The log as one array per file; of every two episodes the controller has one."""
    rng, controlled = np.random.default_rng(0), np.arange(task.episodes) % 2 == 0

    def act(observation: Array) -> Array:
        return np.where(controlled[:, None], task.noisy(observation, rng), task.uniform(observation, rng))

    found = roll_out(task, range(task.episodes), act)
    observation, action, steps = found["observation"], found["action"], found["action"].shape[1]
    seen, done = observation[:, :-1].reshape(-1, observation.shape[2]), action.reshape(-1, task.dimensions)
    arrays = {
        "observation": seen,
        "final_observation": observation[:, -1],
        "action": done,
        "reward": (found["reward"] * task.reward_scale).reshape(-1),
        "action_prob": task.density(seen, done, controlled.repeat(steps)),
        "offsets": np.arange(0, len(seen) + 1, steps),
        "return": found["reward"].sum(1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
