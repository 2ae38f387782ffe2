"""Deep Q-learning, plain or double: a baseline that believes its own values of actions the log does not show.

Mnih et al. (2015), https://doi.org/10.1038/nature14236; van Hasselt, Guez & Silver (2016), https://arxiv.org/abs/1509.06461;
defaults of d3rlpy.
Differences from the papers: the policy is a softmax of Q at a stated temperature instead of the argmax, so that what is
deployed is a distribution and what is evaluated is the same one; rewards are not clipped. Batches are of 256 by
default, and the slow network is copied a hundred times in a training, where d3rlpy has 32 and every 8,000th step.
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
from offrl_models.losses import double_q_value, huber, td_target
from offrl_models.nets import MLP, masked_log_softmax, take


@dataclass(frozen=True, kw_only=True)
class DQNConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    double: bool = False  # the fast network chooses the next action and the slow one tells its value
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class DQN(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0

    def __init__(self, config: DQNConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_update = (1.0, config.target_interval)

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        with torch.no_grad():
            slow = self.target_q(batch.next_observation)
            choosing = self.q(batch.next_observation) if self.config.double else slow
        target = td_target(batch.reward, batch.discount, double_q_value(slow, choosing, batch.next_mask))
        return {"q": huber(take(self.q(batch.observation), batch.action), target)}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        return Categorical(masked_log_softmax(self.q(observation) / self.config.temperature, mask))
