"""Simulated experience: short rollouts of the policy in a learned model, from observations of the log.

Janner, Fu, Zhang & Levine (2019), "When to trust your model", https://arxiv.org/abs/1906.08253, algorithm 2; defaults of
OfflineRL-Kit, where rollouts are as many but come less often, 50,000 at every 1,000th step, and of which the latest 1,250,000
transitions are kept. Here it is `kept_rollouts * batch_size * rollout_steps` of them, 128,000 by default.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor
from offrl_models.datasets.encoding import Encoded
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions
from offrl_models.dynamics import Dynamics, DynamicsConfig, Simulated
from offrl_models.schema import Episodes, InputError

Step = Callable[[Encoded, Tensor, Tensor], Simulated]  # of an observation, an action and uniform numbers


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(DynamicsConfig):
    rollout_steps: int = Field(default=5, ge=1)
    rollout_interval: int = Field(default=5, ge=1)  # gradient steps between rollouts from every row of a batch
    kept_rollouts: int = Field(default=100, ge=1)  # times such rollouts are kept; the oldest make room
    real_ratio: float = Field(default=0.05, ge=0, le=1)  # share of logged transitions in a batch


class Rollouts(nn.Module):
    """The latest simulated transitions of each seed, on the device.

    A rollout that ends early starts again from its logged observation, so that each call adds as many transitions for every seed.
    All of it depends on the batch alone: its rows, its step and its random numbers.
    """

    parts = ("numeric", "codes", "action", "reward", "discount", "next_numeric", "next_codes", "mask", "next_mask")

    def __init__(self, config: RolloutConfig, dynamics: Dynamics, actions: Actions, seeds: int):
        super().__init__()
        self.config, self.seeds = config, seeds
        self.width = 1 if isinstance(actions, int) else 1 + len(actions)  # random numbers of a draw of an action
        self.numbers = self.width + dynamics.numbers  # of a step
        self.draws = 1 + math.ceil(
            config.rollout_steps * self.numbers / self.width
        )  # the first one chooses a transition
        allowed = actions if isinstance(actions, int) else 0
        self.kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "numeric": ((dynamics.encoder.n_numeric,), torch.float32),
            "codes": ((dynamics.encoder.n_categorical,), torch.long),
            "action": ((), torch.long) if isinstance(actions, int) else ((len(actions),), torch.float32),
            "reward": ((), torch.float32),
            "discount": ((), torch.float32),
            "mask": ((allowed,), torch.bool),
        }
        self.allocate(0)

    def allocate(self, batch_size: int) -> None:
        """Make room for rollouts from batches of so many rows. They are no part of a policy, but of a checkpoint."""
        rows = batch_size * self.config.rollout_steps
        for part in self.parts:
            shape, dtype = self.kinds[part.removeprefix("next_")]
            empty = torch.zeros(self.seeds, self.config.kept_rollouts, rows, *shape, dtype=dtype)
            self.register_buffer(part, empty, persistent=False)

    @torch.no_grad()
    def mixed(self, batch: TransitionBatch, policy: Actor, step: Step) -> TransitionBatch:
        """The batch whose first rows are logged, `real_ratio` of all, and the others simulated; the random numbers stay.

        Where it is time to, the policy is first rolled out from every row: `step` is one of the model, and what it makes of it.
        """
        assert batch.uniform is not None
        when, due = divmod(batch.step, self.config.rollout_interval)
        if due == 0:
            new = [torch.cat(parts, 1) for parts in zip(*self._rolled_out(batch, policy, step), strict=True)]
            for name, part in zip(self.parts, new, strict=True):
                getattr(self, name)[:, when % self.config.kept_rollouts] = part
        real = self.real(batch.reward.shape[1])
        filled = min(when + 1, self.config.kept_rollouts) * batch.reward.shape[1] * self.config.rollout_steps
        place = (batch.uniform[:, real:, 0, 0] * filled).long().clamp(max=filled - 1)
        seed = torch.arange(self.seeds, device=place.device).unsqueeze(-1)
        found = {name: getattr(self, name).flatten(1, 2)[seed, place] for name in self.parts}

        def joined(logged: Tensor, simulated: str) -> Tensor:
            return torch.cat([logged[:, :real], found[simulated]], 1)

        unknown = torch.full_like(found["reward"], torch.nan)
        return batch._replace(
            observation=Encoded(*map(joined, batch.observation, ("numeric", "codes"))),
            action=joined(batch.action, "action"),
            action_prob=torch.cat([batch.action_prob[:, :real], unknown], 1),
            reward=joined(batch.reward, "reward"),
            discount=joined(batch.discount, "discount"),
            next_observation=Encoded(*map(joined, batch.next_observation, ("next_numeric", "next_codes"))),
            mask=joined(batch.mask, "mask"),
            next_mask=joined(batch.next_mask, "next_mask"),
            row=torch.cat([batch.row[:, :real], torch.full_like(place, -1)], 1),
        )

    def real(self, batch_size: int) -> int:
        """How many of a batch's rows are logged; one at least, where any are to be."""
        return max(round(self.config.real_ratio * batch_size), int(self.config.real_ratio > 0))

    def _rolled_out(self, batch: TransitionBatch, policy: Actor, step: Step) -> Iterator[tuple[Tensor, ...]]:
        """The transitions of each step, in the order of `parts`."""
        assert batch.uniform is not None
        random = batch.uniform[:, :, 1 : self.draws].flatten(2)
        observation, mask = batch.observation, batch.mask
        for uniform in random[..., : self.config.rollout_steps * self.numbers].split(self.numbers, -1):
            action = policy(observation, mask).sample(uniform[..., None, : self.width]).squeeze(2)
            after = step(observation, action, uniform[..., self.width :])
            yield *observation, action, after.reward, after.discount, *after.next_observation, mask, after.next_mask
            goes_on = (after.discount > 0).unsqueeze(-1)
            following = zip(after.next_observation, batch.observation, strict=True)
            observation = Encoded(*(torch.where(goes_on, new, first) for new, first in following))
            mask = torch.where(goes_on, after.next_mask, batch.mask)


def refuse_unequal_steps(episodes: Episodes) -> None:
    """Raises InputError where decisions are not equally far apart: the model does not tell when the next one is due."""
    if episodes.interval is not None:
        raise InputError(
            "decisions are not equally far apart, and the model of the world has one discount for all of them; use an algorithm "
            "without a model."
        )


def refuse_rollouts(name: str, config: type[Any], key: str) -> None:
    """Raises InputError for the settings of an algorithm with rollouts. Such a key of the training wants losses that are those of
    the rows of a batch alone."""
    if issubclass(config, RolloutConfig):
        raise InputError(
            f"{name} practises in a model of the world, in rollouts from whole batches at some of the steps, and cannot be trained "
            f"with `{key}`; leave it out."
        )
