"""Advantage-weighted regression: imitates logged actions, the more the more their returns surpassed what was expected.

Peng, Kumar, Zhang & Levine (2019), https://arxiv.org/abs/1910.00177; standardised advantages, temperature and clip of the
authors' code, networks and learning rate of Unifloral.
Differences from the paper: returns are the recorded ones (TD(1)), so that what would have followed the end of a recording that
was cut off counts as 0; both networks are trained at each step, by Adam, advantages being standardised within the batch; and
over continuous actions the policy is a mixture of cut-off logistic densities. Batches are of 256 by default, where Unifloral
has 1,024.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import Extra, TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Distribution, Space
from offrl_models.losses import advantage_weight, squared_error, standardized
from offrl_models.nets import MLP


@dataclass(frozen=True, kw_only=True)
class AWRConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    inverse_temperature: float = Field(default=1.0, ge=0)  # paper: 1 / beta; of standardised advantages
    max_weight: float = Field(default=20.0, gt=0)
    layer_norm: bool = True  # in the value network
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class AWR(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {}
    only: ClassVar[dict[str, Space]] = {"components": "continuous"}
    extras: ClassVar[tuple[Extra, ...]] = ("return_to_go",)
    target_update = (1.0, 1)
    draws = 0

    def __init__(self, config: AWRConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.value = MLP(seeds, "value", encoder, config.hidden, 1, layer_norm=config.layer_norm)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("value", "policy"), self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c = self.config
        assert batch.return_to_go is not None
        value = self.value(batch.observation).squeeze(-1)
        advantage = standardized(batch.return_to_go - value.detach())
        weight = advantage_weight(advantage, inverse_temperature=c.inverse_temperature, max_weight=c.max_weight)
        log_prob = self.distribution(batch.observation, batch.mask).log_prob(batch.action)
        return {"value": squared_error(value, batch.return_to_go), "policy": -(weight * log_prob).mean(-1)}

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
