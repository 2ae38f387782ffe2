"""TD3+BC: the policy that the critic likes best, held near the logged actions by a squared error.

Fujimoto & Gu (2021), https://arxiv.org/abs/2106.06860, on TD3, Fujimoto, van Hoof & Meger (2018); defaults of its authors,
in whose code, too, the squared error is the mean over the dimensions of the action.
Differences from the paper: all losses are taken at the same parameters; what is deployed, and evaluated, is a cut-off logistic
density around the policy's action, as wide as TD3's exploration. Over discrete actions the policy has probabilities: Q is
expected, and the distance is that of the probabilities to a vector with a single 1.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, decided_q, frozen, smoothed
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions, Distribution, Space
from offrl_models.losses import ensemble_error, relative_q, squared_distance, td_target


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    alpha: float = Field(default=2.5, ge=0)  # weight of Q; 0 is behavior cloning
    noise: float = Field(default=0.2, ge=0)  # of the target policy; where an action runs from -1 to 1
    noise_clip: float = Field(default=0.5, gt=0)
    policy_interval: int = Field(default=2, ge=1)  # gradient steps for each one of policy and target networks
    exploration: float = Field(default=0.1, gt=0)  # standard deviation around the action, in units of `noise`
    polyak: float = Field(default=0.005, gt=0, le=1)


class TD3BC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q", "target_policy": "policy"}
    only: ClassVar[dict[str, Space]] = dict.fromkeys(("noise", "noise_clip", "exploration"), "continuous")

    def __init__(self, config: TD3BCConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, exploration=config.exploration)
        self.target_q, self.target_policy = deepcopy(self.q), deepcopy(self.policy)
        self.target_update = (config.polyak, config.policy_interval)
        self.dimensions, self.draws = (1, 0) if isinstance(actions, int) else (len(actions), 1)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each network trained in this step, keyed by the attribute it trains."""
        c = self.config
        with torch.no_grad():
            following = self.target_policy(batch.next_observation, batch.next_mask)
            following = smoothed(following, batch.uniform, noise=c.noise, clip=c.noise_clip)
            next_value = decided_q(self.target_q, batch.next_observation, following).amin(1)
        target = td_target(batch.reward, batch.discount, next_value)
        losses = {"q": ensemble_error(self.q(batch.observation, batch.action), target)}
        if batch.step % c.policy_interval == 0:
            policy = self.distribution(batch.observation, batch.mask)
            with frozen(self.q):
                q = decided_q(self.q, batch.observation, policy)[:, 0]  # of the first critic
            distance = squared_distance(policy, batch.action) / self.dimensions
            losses["policy"] = (distance - c.alpha * relative_q(q)).mean(-1)
        return losses

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
