"""Critic-regularized regression: imitates the logged actions that the critic finds good, compared to the policy's own.

Wang, Novikov, Zolna et al. (2020), https://arxiv.org/abs/2006.15134; defaults of d3rlpy.
Differences from the paper: one plain critic, not a distributional one; the policy acts without choosing by the critic among
its draws; both losses are taken at the same parameters; over discrete actions mean and maximum are exact, and over continuous
ones the policy is a mixture of cut-off logistic densities. Batches are of 256 by default, where d3rlpy has 100.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor, Critic, expected_q, shares
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import COMPONENTS, Actions, Categorical, Distribution, Space
from offrl_models.losses import advantage_weight, binary_weight, ensemble_error, td_target
from offrl_models.nets import masked


@dataclass(frozen=True, kw_only=True)
class CRRConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    advantage: Literal["mean", "max"] = "mean"  # over the policy's actions, of which Q is compared with
    weight: Literal["exp", "binary"] = "exp"  # of a logged action; binary: 1 where the advantage is not negative
    inverse_temperature: float = Field(default=1.0, ge=0)  # paper: 1 / beta; of exp
    max_weight: float = Field(default=20.0, gt=0)  # of exp
    action_draws: int = Field(default=4, ge=1)  # paper: m; over continuous actions
    target_interval: int = Field(default=100, ge=1)  # gradient steps between hard updates of both target networks
    components: int = Field(default=COMPONENTS, ge=1)  # of the mixture density; 1 is enough where actions have one mode


class CRR(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")
    targets: ClassVar[dict[str, str]] = {"target_q": "q", "target_policy": "policy"}
    only: ClassVar[dict[str, Space]] = dict.fromkeys(("action_draws", "components"), "continuous")

    def __init__(self, config: CRRConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members=1)
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions, config.components)
        self.target_q, self.target_policy = deepcopy(self.q), deepcopy(self.policy)
        self.target_update = (1.0, config.target_interval)
        self.draws = 0 if isinstance(actions, int) else config.action_draws + 1

    def learning_rates(self) -> dict[str, float]:
        return dict.fromkeys(("q", "policy"), self.config.learning_rate)

    def baseline(
        self, batch: TransitionBatch, policy: Distribution, uniform: Tensor | None
    ) -> Float[Tensor, "seed batch"]:
        """What Q of a logged action is compared with: the mean, or the maximum, over the policy's actions."""
        if self.config.advantage == "mean":
            return expected_q(self.q, batch.observation, policy, uniform).squeeze(1)
        if isinstance(policy, Categorical):
            return masked(self.q.each(batch.observation).squeeze(1), batch.mask).amax(-1)
        assert uniform is not None
        return self.q(batch.observation, policy.sample(uniform)).squeeze(1).amax(-1)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c = self.config
        here, there = shares(batch.uniform, c.action_draws, 1)
        q, policy = self.q(batch.observation, batch.action), self.distribution(batch.observation, batch.mask)
        with torch.no_grad():
            following = self.target_policy(batch.next_observation, batch.next_mask)
            next_value = expected_q(self.target_q, batch.next_observation, following, there).squeeze(1)
            advantage = q.squeeze(1) - self.baseline(batch, policy, here)
        if c.weight == "exp":
            weight = advantage_weight(advantage, inverse_temperature=c.inverse_temperature, max_weight=c.max_weight)
        else:
            weight = binary_weight(advantage)
        return {
            "q": ensemble_error(q, td_target(batch.reward, batch.discount, next_value)),
            "policy": -(weight * policy.log_prob(batch.action)).mean(-1),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        return self.policy(observation, mask)
