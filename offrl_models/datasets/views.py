"""Other ways to look at episodes without copying them: several steps at once, and windows for sequence models."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from offrl_models.schema import Episodes, InputError


def next_action_known(episodes: Episodes) -> Bool[np.ndarray, "rows"]:
    """Rows that another one follows, or after which the task ended: not the last ones of recordings that were cut off."""
    last = np.zeros(episodes.n_rows, bool)
    last[episodes.offsets[1:] - 1] = True
    return ~last | episodes.terminated


@dataclass(frozen=True)
class MultiStep:
    """n-step transitions: what is earned over the next rows of an episode, and where its value is picked up again.

    target = reward + discount * V(next), where next is row `next_row` of the log, or the final observation of the episode
    where `past_end` holds. Sutton & Barto (2018), eq. 7.1.
    """

    reward: Float64[np.ndarray, "rows"]  # sum of the discounted rewards of up to n rows
    discount: Float64[np.ndarray, "rows"]  # of the value picked up; 0 where the task ended on the way
    next_row: Int64[np.ndarray, "rows"]
    past_end: Bool[np.ndarray, "rows"]


def multi_step(episodes: Episodes, n: int) -> MultiStep:
    """Returns over up to `n` rows from every row; an episode's last rows see fewer. Raises InputError unless n >= 1."""
    if n < 1:
        raise InputError(f"a return over {n} steps cannot be formed; give at least 1.")
    rows = np.arange(episodes.n_rows)
    end = episodes.offsets[1:][episodes.episode_of_row]
    reward, discount = np.zeros(episodes.n_rows), np.ones(episodes.n_rows)
    for ahead in range(n):
        row = rows + ahead
        inside = row < end
        at = row[inside]
        reward[inside] += discount[inside] * episodes.reward[at]
        discount[inside] *= episodes.discount[at]
    reached = np.minimum(rows + n, end)
    past_end = reached == end
    return MultiStep(reward, discount, np.where(past_end, end - 1, reached), past_end)


@dataclass(frozen=True)
class Windows:
    """Stretches of rows of one episode, padded at the front: what a sequence model is given at its last row.

    Chen et al. (2021), https://arxiv.org/abs/2106.01345.
    """

    row: Int64[np.ndarray, "windows context"]  # rows of the log; any row of the episode where `known` is False
    known: Bool[np.ndarray, "windows context"]  # False in the padding
    step: Int64[np.ndarray, "windows context"]  # of each row in its episode, 0 in the padding


def looking_back(
    step: Int64[Tensor, "*batch"], context: int
) -> tuple[Int64[Tensor, "*batch context"], Bool[Tensor, "*batch context"], Int64[Tensor, "*batch context"]]:
    """Of windows that end at these steps of an episode: how many rows back each of their rows lies, whether it is one of the
    episode (else it stands for its first), and its step."""
    age = torch.arange(context - 1, -1, -1, device=step.device)
    back = torch.minimum(age, step.unsqueeze(-1))
    return back, age <= step.unsqueeze(-1), step.unsqueeze(-1) - back


def windows(episodes: Episodes, context: int, last: Int64[np.ndarray, "windows"] | None = None) -> Windows:
    """The window of up to `context` rows that ends at each row of `last` (every row when left out).

    Observations, actions and `return_to_go` of the episodes are indexed by `row`. Raises InputError unless context >= 1.
    """
    if context < 1:
        raise InputError(f"a window of {context} rows cannot be formed; give at least 1.")
    ends = np.arange(episodes.n_rows) if last is None else last
    back, known, step = (part.numpy() for part in looking_back(torch.as_tensor(episodes.step[ends]), context))
    return Windows(ends[:, None] - back, known, step)
