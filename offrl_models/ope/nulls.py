"""Policies whose exact difference to the behavior is known, 0 among them: what the gate's error rates are measured on.

Each lies between policies that are better and worse than the behavior, all within one ratio cap, mixed so that the difference by
dynamic programming is the wanted one. The projection is that of the ladder, so these are rungs that the gate could be shown.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.optimize import root_scalar

from offrl_models.policies import project

EXACT = 1e-8  # largest error of a difference
DIRECTIONS = ("random half", "severe half", "mild half", "action swap")
CAPS = (1.2, 1.5, 2.0, 5.0, None)  # None is uncapped


@runtime_checkable
class ExactWorld(Protocol):
    """What knows the exact value of every policy; `worlds.World` does."""

    @property
    def mask(self) -> Bool[np.ndarray, "states actions"]: ...
    @property
    def behavior(self) -> Float64[np.ndarray, "states actions"]: ...
    def q_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]: ...
    def value(self, policy: Float64[np.ndarray, "states actions"]) -> float: ...


@dataclass(frozen=True)
class Family:
    """A direction away from the behavior, and how far the ratio may go."""

    direction: str
    cap: float | None

    def __str__(self) -> str:
        return f"{self.direction}, {'uncapped' if self.cap is None else f'cap {self.cap:g}'}"


FAMILIES = (
    *(Family("random half", cap) for cap in CAPS),
    *(Family("severe half", cap) for cap in (1.2, 2.0, None)),
    *(Family("mild half", cap) for cap in (1.5, 5.0)),
    *(Family("action swap", cap) for cap in (1.5, None)),
)


def capped(
    policy: Float64[np.ndarray, "states actions"], behavior: Float64[np.ndarray, "states actions"], cap: float | None
) -> Float64[np.ndarray, "states actions"]:
    """The projection of a policy on {pi <= cap * mu}; the policy itself where there is no cap."""
    if cap is None:
        return policy
    return project(torch.as_tensor(policy), torch.as_tensor(behavior), cap).numpy()


def greedy(
    scores: Float64[np.ndarray, "states actions"], allowed: Bool[np.ndarray, "states actions"]
) -> Float64[np.ndarray, "states actions"]:
    """The allowed action of the highest score in every state."""
    return np.eye(scores.shape[1])[np.where(allowed, scores, -np.inf).argmax(1)]


def swapped(
    behavior: Float64[np.ndarray, "states actions"], allowed: Bool[np.ndarray, "states actions"]
) -> Float64[np.ndarray, "states actions"]:
    """The behavior with the probabilities of each state's allowed actions handed on by one, in a circle."""
    in_order = np.argsort(~allowed, axis=1, kind="stable")  # the allowed ones first
    rank = np.argsort(in_order, axis=1)
    source = np.take_along_axis(in_order, (rank - 1) % allowed.sum(1, keepdims=True), axis=1)
    return np.where(allowed, np.take_along_axis(behavior, source, axis=1), 0.0)


def policies(
    world: ExactWorld,
    severity: Float[np.ndarray, "states"],
    difference: float = 0.0,
    *,
    families: tuple[Family, ...] = FAMILIES,
    seed: int = 0,
) -> dict[Family, Float64[np.ndarray, "states actions"]]:
    """Per family, a policy with V(policy) - V(behavior) = difference, to EXACT. Its ratio cap holds, and so does the mask.

    A half of the states is acted on for the better and the other half for the worse: a random half, or one by `severity` (any
    score of a state; its value will do); or every allowed action gets another's probability. From there each goes as far towards
    acting for the better, or for the worse, everywhere as the difference asks.

    Raises ValueError where a cap does not let a policy differ that much.
    """
    mu, start = world.behavior, world.value(world.behavior)
    allowed = world.mask & (mu > 0)
    q = world.q_values(mu)
    better, worse = greedy(q, allowed), greedy(-q, allowed)
    severe = severity >= np.median(severity)
    chance = np.random.default_rng(seed).permutation(len(mu)) < len(mu) // 2
    halves = {"random half": chance, "severe half": severe, "mild half": ~severe}
    aims = {name: np.where(half[:, None], better, worse) for name, half in halves.items()}
    aims["action swap"] = swapped(mu, allowed)
    found = {}
    for family in families:
        low, aim, high = (capped(each, mu, family.cap) for each in (worse, aims[family.direction], better))
        found[family] = _on_the_way(world, [low, aim, high], start + difference, str(family))
    return found


def _on_the_way(
    world: ExactWorld, stops: list[Float64[np.ndarray, "states actions"]], value: float, name: str
) -> Float64[np.ndarray, "states actions"]:
    """The policy of this value on the straight lines from the worst stop through the middle one to the best.

    Raises ValueError where the value lies outside.
    """

    def policy_at(place: float) -> Float64[np.ndarray, "states actions"]:
        leg = int(place > 1.0)
        share = place - leg
        return (1 - share) * stops[leg] + share * stops[leg + 1]

    @cache
    def value_at(place: float) -> float:
        return world.value(policy_at(place))

    if not value_at(0.0) <= value <= value_at(2.0):
        reach = f"they reach from {value_at(0.0):.6f} to {value_at(2.0):.6f}"
        raise ValueError(f"{name}: no policy has the value {value:.6f}; {reach}")
    bracket = (0.0, 1.0) if value_at(1.0) >= value else (1.0, 2.0)
    place = root_scalar(lambda place: value_at(place) - value, bracket=bracket, method="brentq", xtol=1e-11).root
    if not abs(value_at(place) - value) < EXACT:
        raise ValueError(f"{name}: the value of the policy is {value_at(place):.12f}, not {value:.12f}")
    return policy_at(place)
