"""Neural fitted Q iteration: a regression to targets that stand still, then new targets, and so on.

Riedmiller (2005), https://doi.org/10.1007/11564096_32.
Differences from the paper: batches and Adam in place of passes over the whole log by Rprop, an iteration goes on from the
weights of the one before, the network has one output for each action, and it acts by a softmax of Q at a stated temperature.
Batches are of 256 and iterations a hundred by default, where d3rlpy has 32 and new targets at each step.
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
from offrl_models.losses import squared_error, td_target
from offrl_models.nets import MLP, masked, masked_log_softmax, take


@dataclass(frozen=True, kw_only=True)
class NFQConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)  # d3rlpy's; the paper has none
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps of one iteration; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class NFQ(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"previous_q": "q"}
    draws = 0

    def __init__(self, config: NFQConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.previous_q = MLP(seeds, "q", encoder, config.hidden, actions)
        self.target_update = (1.0, config.target_interval)

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        with torch.no_grad():
            next_value = masked(self.previous_q(batch.next_observation), batch.next_mask).amax(-1)
        target = td_target(batch.reward, batch.discount, next_value)
        return {"q": squared_error(take(self.q(batch.observation), batch.action), target)}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        return Categorical(masked_log_softmax(self.q(observation) / self.config.temperature, mask))
