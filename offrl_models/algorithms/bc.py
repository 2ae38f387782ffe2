"""Behavior cloning: the policy that makes the logged actions most likely.

Pomerleau (1988). Defaults of d3rlpy's discrete BC with the 2x256 networks of CORL.
Differences from theirs: large logits are not penalised as d3rlpy does; and over continuous actions the policy is a mixture
density, not one action or one normal, so that it can also stand for the policy that wrote a log. Batches are of 256 by default,
as in CORL, where d3rlpy has 100.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Distribution, Space
from offrl_models.losses import negative_log_likelihood


@dataclass(frozen=True, kw_only=True)
class BCConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class BC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {}
    target_update = (1.0, 1)
    only: ClassVar[dict[str, Space]] = {"components": "continuous"}
    draws = 0

    def __init__(self, config: BCConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)

    def learning_rates(self) -> dict[str, float]:
        return {"policy": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        chosen = self.distribution(batch.observation, batch.mask).log_prob(batch.action)
        return {"policy": negative_log_likelihood(chosen)}

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
