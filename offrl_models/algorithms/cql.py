"""Conservative Q-learning: Q-learning that lowers the value of actions the log does not show.

Kumar, Zhou, Tucker & Levine (2020), https://arxiv.org/abs/2006.04779, the discrete CQL(H) on double DQN; defaults of d3rlpy.
Differences from the paper: the policy is a softmax of Q at a stated temperature instead of the argmax, so that what is
deployed is a distribution and what is evaluated is the same one.
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
from offrl_models.losses import conservative_gap, double_q_value, huber, td_target
from offrl_models.nets import MLP, masked_log_softmax, take


@dataclass(frozen=True, kw_only=True)
class CQLConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    alpha: float = Field(default=1.0, ge=0)  # weight of the conservative gap; in units of reward
    target_interval: int = Field(default=8000, ge=1)  # gradient steps between hard updates of the target network
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class CQL(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0

    def __init__(self, config: CQLConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_update = (1.0, config.target_interval)

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        q = self.q(batch.observation)
        with torch.no_grad():
            online, slow = self.q(batch.next_observation), self.target_q(batch.next_observation)
        target = td_target(batch.reward, batch.discount, double_q_value(slow, online, batch.next_mask))
        gap = conservative_gap(q, batch.action, batch.mask)
        return {"q": huber(take(q, batch.action), target) + self.config.alpha * gap}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        return Categorical(masked_log_softmax(self.q(observation) / self.config.temperature, mask))
