"""What a policy does at every logged observation, over discrete actions or over continuous ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float64, Int64

from offrl_models.exported import Exported, OnnxDensity
from offrl_models.ope.continuous import density_ratios
from offrl_models.ope.diagnostics import worst_action_z
from offrl_models.ope.fqe import DRAWS, OF_ROWS, draws_of
from offrl_models.ope.sequences import ratios
from offrl_models.schema import Episodes

MIXED = "one policy is over discrete actions and the other over continuous ones."
BINS = 8  # of each dimension of a continuous action, equally often logged


@dataclass(frozen=True)
class Share:
    """How often two policies play an action, or a range of one dimension of it."""

    action: str
    policy: float
    champion: float


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Of every discrete action."""

    episodes: Episodes
    probs: Float64[np.ndarray, "rows actions"]

    @property
    def taken(self) -> Float64[np.ndarray, "rows"]:
        """Probability of every logged action."""
        return self.probs[np.arange(self.episodes.n_rows), self.episodes.action]

    def ratio(self) -> Float64[np.ndarray, "rows"]:
        """pi / mu of every logged action. Raises InputError for probabilities that are no distribution over the allowed actions."""
        return ratios(self.episodes, self.probs)

    def worst_z(self, ratio: Float64[np.ndarray, "rows"]) -> float:
        """Of the mean-ratio tests of every action, the z-score furthest from 0."""
        return worst_action_z(self.episodes.action, ratio, self.probs)


@dataclass(frozen=True, eq=False)
class Draws:
    """Densities of logged continuous actions, and actions that the policy draws."""

    episodes: Episodes
    policy: OnnxDensity

    @cached_property
    def drawn(self) -> Float[np.ndarray, "rows draws dimensions"]:
        return draws_of([self.policy], self.episodes.observation, self.episodes.action.shape[1], OF_ROWS)[0]

    @cached_property
    def taken(self) -> Float64[np.ndarray, "rows"]:
        """Density of every logged action."""
        return self.policy.on(self.episodes)

    def ratio(self) -> Float64[np.ndarray, "rows"]:
        """pi / mu of every logged action. Raises InputError for densities that are no positive numbers."""
        return density_ratios(self.episodes, self.taken)

    @cached_property
    def edges(self) -> list[Float64[np.ndarray, "edges"]]:
        """Of each dimension, values between ranges that were logged equally often."""
        inner = np.linspace(0, 1, BINS + 1)[1:-1]
        return [np.unique(np.quantile(column, inner)) for column in np.asarray(self.episodes.action, np.float64).T]

    def _range_of(self, action: Float[np.ndarray, "*rows dimensions"], dimension: int) -> Int64[np.ndarray, "*rows"]:
        return np.searchsorted(self.edges[dimension], action[..., dimension], side="right")

    def shares(self, dimension: int) -> Float64[np.ndarray, "rows ranges"]:
        """How often each range of a dimension is drawn, in every row."""
        ranges = np.arange(len(self.edges[dimension]) + 1)
        return (self._range_of(self.drawn, dimension)[..., None] == ranges).mean(1)

    def worst_z(self, ratio: Float64[np.ndarray, "rows"]) -> float:
        """The same for ranges of each dimension."""
        found = [
            worst_action_z(self._range_of(self.episodes.action, dimension), ratio, self.shares(dimension), DRAWS)
            for dimension in range(self.episodes.action.shape[1])
        ]
        return max(found, key=abs)


Choices = Probabilities | Draws


def choices_of(policy: Exported, episodes: Episodes) -> Choices:
    """What a policy does at every logged observation."""
    if isinstance(policy, OnnxDensity):
        return Draws(episodes, policy)
    return Probabilities(episodes, policy.on(episodes))


def rare_mass(policy: Choices, behavior: Choices, rare: float) -> Float64[np.ndarray, "rows"]:
    """The share of a policy's mass in each row where the behavior plays with a probability under `rare`, or over continuous
    actions with a density that is lower, beside what is usual in the row, than in all but a share of `rare` of its own draws."""
    match policy, behavior:
        case Probabilities(), Probabilities():
            return (policy.probs * (behavior.probs < rare)).sum(1)
        case Draws(), Draws():
            own, found = (
                behavior.policy.log_density(policy.episodes.observation, side.drawn) for side in (behavior, policy)
            )
            usual = own.mean(1, keepdims=True)
            return (found - usual < np.quantile(own - usual, rare)).mean(1)
        case _:
            raise TypeError(MIXED)


def apart(policy: Choices, other: Choices) -> Float64[np.ndarray, "rows"]:
    """Total variation distance in every row; over continuous actions E[(1 - q(a) / p(a))+] for a drawn from p."""
    match policy, other:
        case Probabilities(), Probabilities():
            return 0.5 * np.abs(policy.probs - other.probs).sum(1)
        case Draws(), Draws():
            log_p, log_q = (
                side.policy.log_density(policy.episodes.observation, policy.drawn) for side in (policy, other)
            )
            return np.asarray((1.0 - np.exp(np.minimum(log_q - log_p, 0.0))).mean(1), np.float64)
        case _:
            raise TypeError(MIXED)


def shares(policy: Choices, champion: Choices, most: int, action_names: Sequence[str] | None = None) -> list[Share]:
    """Of the actions that two policies play differently often, the most different ones first; over continuous actions, the ranges
    of the dimension in which they differ most."""
    match policy, champion:
        case Probabilities(), Probabilities():
            mine, theirs = policy.probs.mean(0), champion.probs.mean(0)
            first = np.argsort(-np.abs(mine - theirs), kind="stable")[:most]
            called = action_names or range(len(mine))
            return [Share(str(called[action]), float(mine[action]), float(theirs[action])) for action in first]
        case Draws(), Draws():
            both = [
                (policy.shares(d).mean(0), champion.shares(d).mean(0)) for d in range(len(policy.episodes.known_bounds))
            ]
            dimension = int(np.argmax([np.abs(mine - theirs).sum() for mine, theirs in both]))
            low, high = policy.episodes.known_bounds[dimension]
            edges = [low, *policy.edges[dimension], high]
            name = f"[{dimension}] " if len(both) > 1 else ""
            return [
                Share(f"{name}{below:.3g} to {above:.3g}", float(mine), float(theirs))
                for below, above, mine, theirs in zip(edges, edges[1:], *both[dimension], strict=False)
            ]
        case _:
            raise TypeError(MIXED)
