"""The vocabulary every other module speaks: episodes, and errors that a user can act on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: which file, column, how many rows, what to do."""


@dataclass(frozen=True)
class Feature:
    """One column of an observation matrix: a number, or the code of a category."""

    name: str
    categories: int | None = None  # codes 0 to categories - 1; a missing category has a code of its own among them
    missing: float | Literal["mean"] | None = (
        None  # what stands for a missing number (NaN); None where none may be missing
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Episodes:
    """Logged episodes of any length, as flat arrays plus offsets: episode i owns rows offsets[i] to offsets[i + 1].

    `terminated` says that the task ended, `truncated` that the recording did; they meet only in `discount`.
    A bandit log is a set of episodes of length 1. The arrays may lie in memory-mapped files; nothing writes into them.
    """

    episode_id: Shaped[np.ndarray, "episodes"]
    offsets: Int64[np.ndarray, "episodes+1"]
    observation: Float[np.ndarray, "rows columns"]  # one column per feature; categories are their codes, NaN is missing
    final_observation: Float[np.ndarray, "episodes columns"]  # observed after the last row; any where that terminated
    action: Int64[np.ndarray, "rows"] | Float[np.ndarray, "rows dimensions"]  # discrete code or continuous vector
    mask: Bool[np.ndarray, "rows actions"]  # True where the action was allowed; no columns for continuous actions
    reward: Float64[np.ndarray, "rows"]
    terminated: Bool[np.ndarray, "rows"]
    truncated: Bool[np.ndarray, "rows"]
    action_prob: Float64[np.ndarray, "rows"]  # behavior probability or density of the logged action; NaN if not logged
    gamma: float  # discount per step, or per unit of `interval`
    interval: Float64[np.ndarray, "rows"] | None = None  # time until the next decision
    features: tuple[Feature, ...] = ()  # of the columns of `observation`
    bounds: Float64[np.ndarray, "dimensions 2"] | None = None  # least and greatest value of continuous actions
    entity: Shaped[np.ndarray, "episodes"] | None = None  # patient or user; the episode itself when left out
    recorded: Int64[np.ndarray, "episodes"] | None = (
        None  # rises with the time at which each began; as they stand if None
    )
    costs: Mapping[str, Float64[np.ndarray, "rows"]] = field(default_factory=dict)  # by column
    labels: Mapping[str, Shaped[np.ndarray, "episodes"]] = field(
        default_factory=dict
    )  # subgroups and policy version, by column

    @property
    def n_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_episodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_actions(self) -> int:
        return self.mask.shape[1]

    @property
    def actions(self) -> int | Float64[np.ndarray, "dimensions 2"]:
        """What there is to choose from: the number of discrete actions, or the bounds of continuous ones.

        Raises InputError for continuous actions without bounds.
        """
        return self.n_actions if self.action.ndim == 1 else self.known_bounds

    @property
    def known_bounds(self) -> Float64[np.ndarray, "dimensions 2"]:
        """`bounds`. Raises InputError where there are none."""
        if self.bounds is None:
            raise InputError(
                "the actions are continuous and have no bounds; give the least and the greatest value of each."
            )
        return self.bounds

    @cached_property
    def length(self) -> Int64[np.ndarray, "episodes"]:
        return np.diff(self.offsets)

    @cached_property
    def episode_of_row(self) -> Int64[np.ndarray, "rows"]:
        return np.repeat(np.arange(self.n_episodes), self.length)

    @cached_property
    def oldest_first(self) -> Int64[np.ndarray, "episodes"]:
        """The numbers of the episodes in the order in which they were recorded."""
        return np.arange(self.n_episodes) if self.recorded is None else np.argsort(self.recorded, kind="stable")

    @cached_property
    def step(self) -> Int64[np.ndarray, "rows"]:
        return np.arange(self.n_rows) - self.offsets[:-1][self.episode_of_row]

    @cached_property
    def situation(self) -> Int64[np.ndarray, "rows"]:
        """Of a log whose observation is one category, what a discrete decision was made by: that category, or a number for it
        and what was allowed, where one category has decisions with other actions allowed than others have."""
        state = self.observation[:, 0].astype(np.int64)
        _, first, place = np.unique(state, return_index=True, return_inverse=True)
        if (self.mask[first][place] == self.mask).all():
            return state
        told = np.column_stack([state[:, None].view(np.uint8).reshape(len(state), -1), np.packbits(self.mask, axis=1)])
        return np.unique(told, axis=0, return_inverse=True)[1].reshape(-1)

    @cached_property
    def next_observation(self) -> Float[np.ndarray, "rows columns"]:
        """The following row's observation; the final one after the last row."""
        following = np.empty_like(self.observation)
        following[:-1] = self.observation[1:]
        following[self.offsets[1:] - 1] = self.final_observation
        return following

    @property
    def observation_ahead(self) -> Float[np.ndarray, "rows columns"]:
        """The same, but that where the task ended, and nothing follows, each row's own stands: surely an observation."""
        return np.where(self.terminated[:, None], self.observation, self.next_observation)

    @cached_property
    def step_discount(self) -> Float64[np.ndarray, "rows"]:
        """What one step costs in time: gamma, or gamma ** interval where decisions are not equally far apart."""
        return np.full(self.n_rows, self.gamma) if self.interval is None else self.gamma**self.interval

    @cached_property
    def discount(self) -> Float64[np.ndarray, "rows"]:
        """What the value of the next observation is worth: gamma * (1 - terminated)."""
        return self.step_discount * (1.0 - self.terminated)

    @cached_property
    def time_discount(self) -> Float64[np.ndarray, "rows"]:
        """What a reward of each row is worth at the start of its episode: gamma ** step, or gamma ** (time since then)."""
        if self.interval is None:
            worth = self.gamma ** np.arange(int(self.length.max(initial=0)))
            if self.n_rows == self.n_episodes * len(worth):  # all episodes are as long as the longest
                return np.tile(worth, self.n_episodes) if len(worth) > 1 else np.broadcast_to(worth, self.n_rows)
            return worth[self.step]
        elapsed = np.append(0.0, self.interval.cumsum())[:-1]
        return self.gamma ** (elapsed - elapsed[self.offsets[:-1]][self.episode_of_row])

    @cached_property
    def discounted_reward(self) -> Float64[np.ndarray, "rows"]:
        """What the reward of each row is worth at the start of its episode."""
        return self.time_discount * self.reward

    @cached_property
    def return_(self) -> Float64[np.ndarray, "episodes"]:
        """Realised discounted return of each episode."""
        return self.sum_per_episode(self.discounted_reward)

    @cached_property
    def return_to_go(self) -> Float64[np.ndarray, "rows"]:
        """Realised discounted return from each row on, seen from that row."""
        return self.accumulated(self.reward, self.step_discount)

    @cached_property
    def reward_to_go(self) -> Float64[np.ndarray, "rows"]:
        """Sum of the rewards from each row on, not discounted."""
        return self.accumulated(self.reward, np.ones(self.n_rows))

    @cached_property
    def earned(self) -> Float64[np.ndarray, "rows"]:
        """Sum of the rewards of an episode before each row, not discounted."""
        found, total = np.zeros(self.n_rows), np.zeros(self.n_episodes)
        for step in range(int(self.length.max())):  # each episode by itself, so that others do not cost it digits
            here = self.length > step
            row = self.offsets[:-1][here] + step
            found[row] = total[here]
            total[here] += self.reward[row]
        return found

    def accumulated(
        self, values: Float64[np.ndarray, "rows"], carry: Float64[np.ndarray, "rows"]
    ) -> Float64[np.ndarray, "rows"]:
        """x_t = values_t + carry_t x_{t+1}, backwards along every episode; x is 0 past its end."""
        found, carried = np.zeros(self.n_rows), np.zeros(self.n_episodes)
        for step in range(int(self.length.max()) - 1, -1, -1):
            here = self.length > step
            row = self.offsets[:-1][here] + step
            carried[here] = values[row] + carry[row] * carried[here]
            found[row] = carried[here]
        return found

    def sum_per_episode(self, values: Float[np.ndarray, "rows *rest"]) -> Float[np.ndarray, "episodes *rest"]:
        """Sum of `values` over the rows of each episode; every episode has at least one row."""
        if self.n_rows == self.n_episodes:
            return values
        return np.add.reduceat(values, self.offsets[:-1], axis=0)

    def take(self, chosen: Bool[np.ndarray, "episodes"] | Int64[np.ndarray, "chosen"]) -> "Episodes":
        """The chosen episodes; chosen by number, in that order and as often as they are named."""
        episodes = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        length = self.length[episodes]
        offsets = np.append(0, length.cumsum())
        rows = np.repeat(self.offsets[episodes] - offsets[:-1], length) + np.arange(offsets[-1])
        per_row = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob", "interval")
        per_episode = ("episode_id", "final_observation", "entity", "recorded")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*per_row, *per_episode)}
        found |= {name: found[name][rows] for name in per_row if found[name] is not None}
        found |= {name: found[name][episodes] for name in per_episode if found[name] is not None}
        return replace(
            self,
            **found,
            offsets=offsets,
            costs={name: values[rows] for name, values in self.costs.items()},
            labels={name: values[episodes] for name, values in self.labels.items()},
        )

    @cached_property
    def next_mask(self) -> Bool[np.ndarray, "rows actions"]:
        """Actions allowed at the next observation: the following row's mask.

        After the last recorded step no mask was logged. All actions stand in for it where every logged mask allows
        everything; otherwise the row is all False, and `bootstrappable` leaves it out of temporal-difference targets.
        """
        if 0 in self.mask.strides:  # one value for all rows
            return self.mask
        following = np.empty_like(self.mask)
        following[:-1] = self.mask[1:]
        following[self.offsets[1:] - 1] = bool(self.mask.all())
        return following

    @cached_property
    def bootstrappable(self) -> Bool[np.ndarray, "rows"]:
        """Rows whose target can be formed: the task ended there, or the actions allowed next are known."""
        return self.terminated | self.next_mask.any(1) if self.n_actions else np.ones(self.n_rows, bool)
