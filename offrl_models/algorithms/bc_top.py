"""Behavior cloning of the best episodes: the policy that makes the actions of those with the greatest returns most likely.

Called %BC by Chen, Lu, Rajeswaran et al. (2021), https://arxiv.org/abs/2106.01345; defaults of its 10% and of bc.
Difference from theirs: returns are discounted as the log says, and over continuous actions the policy is a mixture density.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Distribution, Space
from offrl_models.losses import negative_log_likelihood
from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True)
class TopBCConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    top_share: float = Field(default=0.1, gt=0, le=1)  # of the episodes, those with the greatest returns
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class TopBC(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {}
    only: ClassVar[dict[str, Space]] = {"components": "continuous"}
    target_update = (1.0, 1)
    draws = 0

    def __init__(self, config: TopBCConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)

    def usable(self, episodes: Episodes) -> Bool[np.ndarray, "rows"]:
        """The rows of the best episodes; among equal returns the earlier episode comes first."""
        best = np.argsort(-episodes.return_, kind="stable")[: math.ceil(self.config.top_share * episodes.n_episodes)]
        return np.isin(np.arange(episodes.n_episodes), best)[episodes.episode_of_row]

    def learning_rates(self) -> dict[str, float]:
        return {"policy": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        chosen = self.distribution(batch.observation, batch.mask).log_prob(batch.action)
        return {"policy": negative_log_likelihood(chosen)}

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
