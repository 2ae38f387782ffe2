"""Discrete batch-constrained Q-learning: Q-learning among the actions that the behavior takes often enough.

Fujimoto, Conti, Ghavamzadeh & Pineau (2019), https://arxiv.org/abs/1910.01708; defaults of d3rlpy.
Differences from the paper: imitator and Q-network share no layers, and the policy is a softmax of Q over the actions that
pass the threshold, at a stated temperature, instead of their argmax.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Categorical, Space
from offrl_models.losses import double_q_value, huber, negative_log_likelihood, td_target
from offrl_models.nets import MLP, masked_log_softmax, take


@dataclass(frozen=True, kw_only=True)
class BCQConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    threshold: float = Field(default=0.3, ge=0, le=1)  # paper: tau; least probability relative to the likeliest action
    logit_penalty: float = Field(
        default=0.5, ge=0
    )  # weight of the imitator's squared logits; the paper's code has 0.01
    target_interval: int = Field(default=8000, ge=1)  # gradient steps between hard updates of the target network
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class BCQ(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0

    def __init__(self, config: BCQConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.imitator = MLP(seeds, "imitator", encoder, config.hidden, actions)
        self.target_update = (1.0, config.target_interval)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "imitator"), self.config.learning_rate)

    def likely(self, observation: Observation, mask: Tensor) -> Tensor:
        """Allowed actions whose probability is at least `threshold` times that of the likeliest one."""
        log_probs = masked_log_softmax(self.imitator(observation), mask)
        relative = torch.exp(log_probs - log_probs.amax(-1, keepdim=True))
        return mask & (relative >= self.config.threshold)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        with torch.no_grad():
            online, slow = self.q(batch.next_observation), self.target_q(batch.next_observation)
            allowed = self.likely(batch.next_observation, batch.next_mask)
        target = td_target(batch.reward, batch.discount, double_q_value(slow, online, allowed))
        logits = self.imitator(batch.observation)
        imitation = negative_log_likelihood(take(masked_log_softmax(logits, batch.mask), batch.action))
        penalty = self.config.logit_penalty * logits.square().mean((-2, -1))
        return {"q": huber(take(self.q(batch.observation), batch.action), target), "imitator": imitation + penalty}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        q = self.q(observation) / self.config.temperature
        return Categorical(masked_log_softmax(q, self.likely(observation, mask)))
