"""ReBRAC: TD3+BC whose critic also pays for leaving the log at the next step, with deeper networks and a layer norm.

Tarasov, Kurenkov, Nikulin & Kolesnikov (2023), https://arxiv.org/abs/2305.09836; defaults of CORL, and in between the weights of
the two distances that it tunes for locomotion.
Differences from the paper: all losses are taken at the same parameters; the layer norm has no scale and shift; what is
deployed, and evaluated, is a cut-off logistic density around the policy's action, as wide as TD3's exploration. Over discrete
actions the policy has probabilities: Q is expected, and distances are those of probabilities to a vector with a single 1.
Batches are of 256 by default, where CORL has 1,024.
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
from offrl_models.losses import ensemble_error, relative_q, squared_distance, td_target
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True)
class ReBRACConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    policy_penalty: float = Field(default=0.01, ge=0)  # paper: beta_1; of the policy's distance to the logged action
    critic_penalty: float = Field(default=0.01, ge=0)  # paper: beta_2; of the next step's, in units of reward
    layer_norm: bool = True  # in the critic
    noise: float = Field(default=0.2, ge=0)  # of the target policy; where an action runs from -1 to 1
    noise_clip: float = Field(default=0.5, gt=0)
    policy_interval: int = Field(default=2, ge=1)  # gradient steps for each one of policy and target networks
    exploration: float = Field(default=0.1, gt=0)  # standard deviation around the action, in units of `noise`
    polyak: float = Field(default=0.005, gt=0, le=1)


class ReBRAC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q", "target_policy": "policy"}
    only: ClassVar[dict[str, Space]] = dict.fromkeys(("noise", "noise_clip", "exploration"), "continuous")
    extras: ClassVar[tuple[Extra, ...]] = ("next_action",)

    def __init__(self, config: ReBRACConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2, layer_norm=config.layer_norm)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, exploration=config.exploration)
        self.target_q, self.target_policy = deepcopy(self.q), deepcopy(self.policy)
        self.target_update = (config.polyak, config.policy_interval)
        self.draws = 0 if isinstance(actions, int) else 1

    def usable(self, episodes: Episodes) -> Bool[np.ndarray, "rows"]:
        """Rows that have a next action or need none."""
        return next_action_known(episodes)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each network trained in this step, keyed by the attribute it trains."""
        c = self.config
        assert batch.next_action is not None
        with torch.no_grad():
            following = self.target_policy(batch.next_observation, batch.next_mask)
            following = smoothed(following, batch.uniform, noise=c.noise, clip=c.noise_clip)
            next_value = decided_q(self.target_q, batch.next_observation, following).amin(1)
            next_value = next_value - c.critic_penalty * squared_distance(following, batch.next_action)
        target = td_target(batch.reward, batch.discount, next_value)
        losses = {"q": ensemble_error(self.q(batch.observation, batch.action), target)}
        if batch.step % c.policy_interval == 0:
            policy = self.distribution(batch.observation, batch.mask)
            with frozen(self.q):
                q = decided_q(self.q, batch.observation, policy).amin(1)
            distance = squared_distance(policy, batch.action)
            losses["policy"] = (c.policy_penalty * distance - relative_q(q)).mean(-1)
        return losses

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
