"""Transitions on the training device, sampled with replacement, one generator per seed."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offrl_models.schema import Episodes, InputError


class TransitionBatch(NamedTuple):
    """Transitions for all seeds at once; the seed axis always leads."""

    observation: Float[Tensor, "seed batch columns"]
    action: Int64[Tensor, "seed batch"] | Float[Tensor, "seed batch dimensions"]
    reward: Float[Tensor, "seed batch"]
    discount: Float[Tensor, "seed batch"]  # gamma * (1 - terminated)
    next_observation: Float[Tensor, "seed batch columns"]
    mask: Bool[Tensor, "seed batch actions"]
    next_mask: Bool[Tensor, "seed batch actions"]
    row: Int64[Tensor, "seed batch"]  # where in the split it came from


class Transitions:
    """All usable rows of some episodes as tensors, which share the memory of the episodes where the device allows.

    A seed draws its own rows from its own generator, so its batches do not depend on which seeds train beside it.
    """

    def __init__(self, episodes: Episodes, device: torch.device | str = "cpu"):
        usable = np.flatnonzero(episodes.bootstrappable)
        if len(usable) == 0:
            raise InputError(
                "no row can be trained on: every episode is truncated after one step and masks are logged."
            )
        self.rows = torch.as_tensor(usable, device=device)
        self.n_rows = episodes.n_rows

        def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            if array.ndim and 0 in array.strides:  # one value for all rows
                return torch.as_tensor(array[:1].copy(), dtype=dtype, device=device).expand(*array.shape)
            return torch.as_tensor(array, dtype=dtype, device=device)

        self.observation = as_tensor(episodes.observation, torch.float32)
        self.final_observation = as_tensor(episodes.final_observation, torch.float32)
        self.action = as_tensor(episodes.action, torch.float32 if episodes.action.ndim > 1 else torch.long)
        self.reward = as_tensor(episodes.reward, torch.float32)
        self.discount = as_tensor(episodes.discount, torch.float32)
        self.mask = as_tensor(episodes.mask, torch.bool)
        following = np.arange(1, episodes.n_rows + 1)  # beyond the rows: the final observation of an episode
        following[episodes.offsets[1:] - 1] = episodes.n_rows + np.arange(episodes.n_episodes)
        self.following = as_tensor(following, torch.long)

    def take(self, row: Tensor) -> TransitionBatch:
        """The transitions at `row`, of shape [seed, batch]."""
        following = self.following[row]
        inside = (following < self.n_rows)[..., None]
        next_row, final = following.clamp(max=self.n_rows - 1), (following - self.n_rows).clamp(min=0)
        return TransitionBatch(
            observation=self.observation[row],
            action=self.action[row],
            reward=self.reward[row],
            discount=self.discount[row],
            next_observation=torch.where(inside, self.observation[next_row], self.final_observation[final]),
            mask=self.mask[row],
            # Past a terminal row any mask will do (its discount is 0), but an empty one would turn into NaN.
            next_mask=self.mask[next_row] | ~inside,
            row=row,
        )


class Sampler:
    """Draws rows for every seed; `pools` gives each seed rows of its own, as a bootstrap resample does."""

    def __init__(self, pools: list[Tensor], batch_size: int, seeds: list[int]):
        self.pools, self.batch_size = pools, batch_size
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, steps: int) -> Tensor:
        """Rows for `steps` batches, of shape [steps, seed, batch]."""
        drawn = [
            pool[torch.randint(len(pool), (steps, self.batch_size), generator=generator).to(pool.device)]
            for pool, generator in zip(self.pools, self.generators, strict=True)
        ]
        return torch.stack(drawn, 1)
