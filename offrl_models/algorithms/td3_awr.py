"""TD3-AWR: ReBRAC whose policy is held near a logged action the more, the better that action is than was expected.

Jackson, Berdica, Liesen, Whiteson & Foerster (2025), "A clean slate for offline reinforcement learning",
https://arxiv.org/abs/2504.11453; defaults of its code, Unifloral, and in between what it searches over.
Differences from the paper: all losses are taken at the same parameters; the policy has no layer norm, and the others have no
scale and shift; what is deployed, and evaluated, is a cut-off logistic density around the policy's action, as wide as TD3's
exploration. Over discrete actions the policy has probabilities: Q is expected, and distances are those of probabilities to a
vector with a single 1. Batches are of 256 by default, where Unifloral has 1,024.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, decided_q, frozen, smoothed
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import Extra, TransitionBatch
from offrl_models.datasets.views import next_action_known
from offrl_models.distributions import Actions, Distribution, Space
from offrl_models.losses import (
    advantage_weight,
    ensemble_error,
    expectile_loss,
    relative_q,
    squared_distance,
    td_target,
)
from offrl_models.nets import MLP
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True)
class TD3AWRConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    inverse_temperature: float = Field(default=3.0, ge=0)  # of the weight of a distance; 0 is ReBRAC
    max_weight: float = Field(default=100.0, gt=0)
    expectile: float = Field(default=0.7, gt=0, lt=1)  # of Q, with which Q of a logged action is compared
    policy_penalty: float = Field(default=0.001, ge=0)  # of the policy's weighted distance to the logged action
    critic_penalty: float = Field(default=0.01, ge=0)  # of the next step's distance, in units of reward
    layer_norm: bool = True  # in critic and value
    noise: float = Field(default=0.2, ge=0)  # of the target policy; where an action runs from -1 to 1
    noise_clip: float = Field(default=0.5, gt=0)
    policy_interval: int = Field(default=2, ge=1)  # gradient steps for each one of policy, value and target networks
    exploration: float = Field(default=0.1, gt=0)  # standard deviation around the action, in units of `noise`
    polyak: float = Field(default=0.005, gt=0, le=1)


class TD3AWR(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q", "target_policy": "policy"}
    only: ClassVar[dict[str, Space]] = dict.fromkeys(("noise", "noise_clip", "exploration"), "continuous")
    extras: ClassVar[tuple[Extra, ...]] = ("next_action",)

    def __init__(self, config: TD3AWRConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2, layer_norm=config.layer_norm)
        self.value = MLP(seeds, "value", encoder, config.hidden, 1, layer_norm=config.layer_norm)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, exploration=config.exploration)
        self.target_q, self.target_policy = deepcopy(self.q), deepcopy(self.policy)
        self.target_update = (config.polyak, config.policy_interval)
        self.draws = 0 if isinstance(actions, int) else 1

    def usable(self, episodes: Episodes) -> Bool[np.ndarray, "rows"]:
        """Rows that have a next action or need none."""
        return next_action_known(episodes)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "value", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each network trained in this step, keyed by the attribute it trains."""
        c = self.config
        assert batch.next_action is not None
        with torch.no_grad():
            following = self.target_policy(batch.next_observation, batch.next_mask)
            following = smoothed(following, batch.uniform, noise=c.noise, clip=c.noise_clip)
            next_value = decided_q(self.target_q, batch.next_observation, following).amin(1)
            next_value = next_value - c.critic_penalty * squared_distance(following, batch.next_action)
        logged = self.q(batch.observation, batch.action)
        losses = {"q": ensemble_error(logged, td_target(batch.reward, batch.discount, next_value))}
        if batch.step % c.policy_interval == 0:
            policy = self.distribution(batch.observation, batch.mask)
            value, least = self.value(batch.observation).squeeze(-1), logged.detach().amin(1)
            weight = advantage_weight(least - value, inverse_temperature=c.inverse_temperature, max_weight=c.max_weight)
            with frozen(self.q):
                q = decided_q(self.q, batch.observation, policy).amin(1)
            distance = weight * squared_distance(policy, batch.action)
            losses["value"] = expectile_loss(value, least, expectile=c.expectile)
            losses["policy"] = (c.policy_penalty * distance - relative_q(q)).mean(-1)
        return losses

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
