"""Mildly conservative Q-learning: what the policy does beyond the data is worth no more than the best action like the data's.

Lyu, Ma, Li & Lu (2022), https://arxiv.org/abs/2206.04745; defaults of OfflineRL-Kit.
Differences from the paper: the policy is a cut-off logistic density where theirs is a squashed normal; actions of the policy are
brought down at the observation only, and not at the next one too as in their code; all losses are taken at the same parameters.
The temperature has no upper bound, where OfflineRL-Kit holds it to at most 1, and the policy has no dropout, where it has 0.1.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, Temperature, soft_actor_losses
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import LogisticMixture, Space
from offrl_models.losses import squared_error, td_target
from offrl_models.vae import DRAWS, ActionVAE, normal


@dataclass(frozen=True, kw_only=True)
class MCQConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(400, 400), min_length=1)
    vae_hidden: tuple[PositiveInt, ...] = Field(default=(750, 750), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    vae_learning_rate: float = Field(default=1e-3, gt=0)
    in_data_weight: float = Field(
        default=0.9, gt=0, le=1
    )  # paper: lambda; the rest is the weight of the policy's actions
    samples: int = Field(default=10, ge=1)  # actions like the data's, of which the best is the measure; paper: N
    polyak: float = Field(default=0.005, gt=0, le=1)


class MCQ(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("continuous",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(
        self, config: MCQConfig, encoder: Encoder, actions: Float64[np.ndarray, "dimensions 2"], seeds: Sequence[int]
    ):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members=2)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, components=1)
        self.temperature = Temperature(seeds)
        self.vae = ActionVAE(seeds, encoder, config.vae_hidden, actions)
        self.target_update = (config.polyak, 1)
        self.draws = 3 + DRAWS * (1 + config.samples)

    def learning_rates(self) -> dict[str, float]:
        rates = dict.fromkeys(("q", "policy", "temperature"), self.config.learning_rate)
        return {**rates, "vae": self.config.vae_learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c, seen, following = self.config, batch.observation, batch.next_observation
        assert batch.uniform is not None
        sizes = [1, 1, 1, DRAWS, DRAWS * c.samples]
        for_actor, for_target, beyond, for_vae, proposals = batch.uniform.split(sizes, 2)
        policy = self.distribution(seen)
        with torch.no_grad():
            action, log_prob = self.distribution(following).sample_and_log_prob(for_target)
            next_value = self.target_q(following, action).amin(1) - self.temperature()[:, None, None] * log_prob
            like_data = self.vae.propose(seen, normal(proposals))
            measure = self.target_q(seen, like_data).amax(-1).amin(1)
            logged_and_drawn = torch.cat([batch.action.unsqueeze(2), policy.sample(beyond)], 2)
        q = self.q(seen, logged_and_drawn)
        target = torch.stack([td_target(batch.reward, batch.discount, next_value.squeeze(-1)), measure], 1)
        in_data, drawn = (squared_error(q[..., i], target[:, i : i + 1].expand_as(q[..., i])).sum(1) for i in (0, 1))
        return {
            "q": c.in_data_weight * in_data + (1.0 - c.in_data_weight) * drawn,
            "vae": self.vae.loss(seen, batch.action, for_vae, kl_weight=1.0),
            **soft_actor_losses(policy, self.q, self.temperature, seen, for_actor),
        }

    def distribution(self, observation: Observation, mask: Tensor | None = None) -> LogisticMixture:
        """The policy, [seed, batch]."""
        policy = self.policy(observation, mask)
        assert isinstance(policy, LogisticMixture)
        return policy
