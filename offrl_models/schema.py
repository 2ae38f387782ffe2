"""The vocabulary every other module speaks: episodes, transition batches, and errors that a user can act on."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence: which file, column, how many rows, what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Episodes:
    """Logged episodes of any length, as flat arrays plus offsets: episode i owns rows offsets[i] to offsets[i + 1].

    `terminated` says that the task ended, `truncated` that the recording did; they meet only in `discount`.
    A bandit log is a set of episodes of length 1.
    """

    episode_id: Shaped[np.ndarray, "episodes"]
    offsets: Int64[np.ndarray, "episodes+1"]
    observation: Float[np.ndarray, "rows columns"]  # raw values in contract order; categories are their codes
    next_observation: Float[np.ndarray, "rows columns"]
    action: Int64[np.ndarray, "rows"]
    mask: Bool[np.ndarray, "rows actions"]  # True where the action was allowed
    reward: Float64[np.ndarray, "rows"]
    terminated: Bool[np.ndarray, "rows"]
    truncated: Bool[np.ndarray, "rows"]
    action_prob: Float64[np.ndarray, "rows"]  # behavior probability of the logged action
    gamma: float  # discount per step

    @property
    def n_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_episodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_actions(self) -> int:
        return self.mask.shape[1]

    @cached_property
    def length(self) -> Int64[np.ndarray, "episodes"]:
        return np.diff(self.offsets)

    @cached_property
    def episode_of_row(self) -> Int64[np.ndarray, "rows"]:
        return np.repeat(np.arange(self.n_episodes), self.length)

    @cached_property
    def step(self) -> Int64[np.ndarray, "rows"]:
        return np.arange(self.n_rows) - self.offsets[:-1][self.episode_of_row]

    @cached_property
    def discount(self) -> Float64[np.ndarray, "rows"]:
        """What the value of the next observation is worth: gamma * (1 - terminated)."""
        return self.gamma * (1.0 - self.terminated)

    @cached_property
    def return_(self) -> Float64[np.ndarray, "episodes"]:
        """Realised discounted return of each episode."""
        return self.sum_per_episode(self.gamma**self.step * self.reward)

    @cached_property
    def return_to_go(self) -> Float64[np.ndarray, "rows"]:
        """Realised discounted return from each row on, seen from that row."""
        remaining = np.zeros(self.n_rows)
        carried = np.zeros(self.n_episodes)
        for step in range(int(self.length.max()) - 1, -1, -1):
            here = self.length > step
            row = self.offsets[:-1][here] + step
            carried[here] = self.reward[row] + self.gamma * carried[here]
            remaining[row] = carried[here]
        return remaining

    def sum_per_episode(self, values: Float[np.ndarray, "rows *rest"]) -> Float[np.ndarray, "episodes *rest"]:
        """Sum of `values` over the rows of each episode; every episode has at least one row."""
        return np.add.reduceat(values, self.offsets[:-1], axis=0)

    @cached_property
    def next_mask(self) -> Bool[np.ndarray, "rows actions"]:
        """Actions allowed at the next observation: the following row's mask.

        After the last recorded step no mask was logged. All actions stand in for it where every logged mask allows
        everything; otherwise the row is all False, and `bootstrappable` leaves it out of temporal-difference targets.
        """
        following = np.empty_like(self.mask)
        following[:-1] = self.mask[1:]
        following[self.offsets[1:] - 1] = bool(self.mask.all())
        return following

    @cached_property
    def bootstrappable(self) -> Bool[np.ndarray, "rows"]:
        """Rows whose target can be formed: the task ended there, or the actions allowed next are known."""
        return self.terminated | self.next_mask.any(1)


class TransitionBatch(NamedTuple):
    """Transitions for all seeds at once; the seed axis always leads."""

    observation: Float[Tensor, "seed batch columns"]
    action: Int64[Tensor, "seed batch"]
    reward: Float[Tensor, "seed batch"]
    discount: Float[Tensor, "seed batch"]  # gamma * (1 - terminated)
    next_observation: Float[Tensor, "seed batch columns"]
    mask: Bool[Tensor, "seed batch actions"]
    next_mask: Bool[Tensor, "seed batch actions"]
    row: Int64[Tensor, "seed batch"]  # where in the split it came from
