"""Quantile-regression DQN: learns the distribution of the return as quantiles, and acts on their mean.

Dabney, Rowland, Bellemare & Munos (2018a), https://arxiv.org/abs/1710.10044; defaults of d3rlpy.
Differences from the paper: the policy is a softmax of the mean at a stated temperature instead of the argmax, and the Huber
loss is divided by its threshold, which changes nothing at the paper's 1. Batches are of 256 by default, and the slow
network is copied a hundred times in a training, where d3rlpy has 32 and every 8,000th step.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Categorical, Space
from offrl_models.losses import quantile_huber, quantile_midpoints, td_target
from offrl_models.nets import MLP, masked, masked_log_softmax, take_each


@dataclass(frozen=True, kw_only=True)
class QRDQNConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    quantiles: int = Field(default=32, ge=1)  # paper: N, 200
    huber_threshold: float = Field(default=1.0, gt=0)  # paper: kappa; below this error quantiles turn into expectiles
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class QRDQN(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}
    draws = 0
    level: Tensor

    def __init__(self, config: QRDQNConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = MLP(seeds, "q", encoder, config.hidden, actions * config.quantiles)
        self.target_q = MLP(seeds, "q", encoder, config.hidden, actions * config.quantiles)
        self.target_update = (1.0, config.target_interval)
        self.register_buffer("level", quantile_midpoints(config.quantiles)[None, None])

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def quantiles(self, network: MLP, observation: Observation) -> Float[Tensor, "seed batch actions quantiles"]:
        """Of the return of every action, by the fast network or the slow one."""
        return network(observation).unflatten(-1, (-1, self.config.quantiles))

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        with torch.no_grad():
            following = self.quantiles(self.target_q, batch.next_observation)
            best = masked(following.mean(-1), batch.next_mask).argmax(-1)
            target = td_target(batch.reward[..., None], batch.discount[..., None], take_each(following, best))
        predicted = take_each(self.quantiles(self.q, batch.observation), batch.action)
        return {"q": quantile_huber(predicted, target, self.level, threshold=self.config.huber_threshold)}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        q = self.quantiles(self.q, observation).mean(-1)
        return Categorical(masked_log_softmax(q / self.config.temperature, mask))
