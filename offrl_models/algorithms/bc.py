"""Behavior cloning: the policy that makes the logged actions most likely.

Pomerleau (1988). Defaults of d3rlpy's discrete BC with the 2x256 networks of CORL.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.losses import negative_log_likelihood
from offrl_models.nets import MLP, masked_log_softmax


@dataclass(frozen=True, kw_only=True)
class BCConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class BC(nn.Module):
    targets: ClassVar[dict[str, str]] = {}
    target_update = (1.0, 1)

    def __init__(self, config: BCConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.policy = MLP(seeds, "policy", encoder, config.hidden, actions)

    def learning_rates(self) -> dict[str, float]:
        return {"policy": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        return {"policy": negative_log_likelihood(self.log_probs(batch.observation, batch.mask), batch.action)}

    def log_probs(self, observation: Tensor, mask: Tensor) -> Tensor:
        """The policy: log-probabilities [seed, batch, actions]."""
        return masked_log_softmax(self.policy(observation), mask)
