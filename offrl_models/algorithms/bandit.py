"""Bandit learners: where every decision stands alone, the policy that makes an estimate of its own value greatest.

DM by a model of the reward; IPW by what was earned, weighted by pi(a | x) / action_prob; DR by both: Dudik, Langford & Li
(2011), https://arxiv.org/abs/1103.4601. SNIPW and SNDR divide by the sum of the weights instead of their number, so that
adding a number to all rewards changes nothing: Swaminathan & Joachims (2015), "The self-normalized estimator for
counterfactual learning". Defaults of OBP's NNPolicyLearner.
Differences from OBP: the model is a network that is trained beside the policy on the same rows, without cross-fitting;
self-normalised weights are those of a batch, of 256 by default where theirs has 200; and weights of networks do not decay.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Actor
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Categorical, Space
from offrl_models.losses import expected_value, squared_error, weighted_mean
from offrl_models.nets import MLP, take
from offrl_models.schema import Episodes, InputError


@dataclass(frozen=True, kw_only=True)
class BanditConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(100,), min_length=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    objective: Literal["dm", "ipw", "snipw", "dr", "sndr"] = "dr"


class Bandit(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {}
    target_update = (1.0, 1)
    draws = 0

    def __init__(self, config: BanditConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.policy = Actor(seeds, "policy", encoder, config.hidden, actions)
        modelled = config.objective in ("dm", "dr", "sndr")
        self.reward = MLP(seeds, "reward", encoder, config.hidden, actions) if modelled else None

    def check_log(self, episodes: Episodes) -> None:
        """Raises InputError for episodes of several steps, and where propensities are wanted and were not logged."""
        longer, unknown = int((episodes.length > 1).sum()), int(np.isnan(episodes.action_prob).sum())
        if longer:
            raise InputError(
                f"{longer} episodes have more than one step, and bandit is for logs of horizon 1; use another algorithm."
            )
        if unknown and self.config.objective != "dm":
            raise InputError(
                f"{unknown} rows have no propensity, and the objective {self.config.objective} of bandit divides by it; log it as "
                "action_prob, or use the objective dm."
            )

    def learning_rates(self) -> dict[str, float]:
        trained = ("policy",) if self.reward is None else ("policy", "reward")
        return dict.fromkeys(trained, self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        policy = self.distribution(batch.observation, batch.mask)
        losses, terms, unexplained = {}, [], batch.reward
        if self.reward is not None:
            reward = self.reward(batch.observation)
            predicted = take(reward, batch.action)
            losses["reward"] = squared_error(predicted, batch.reward)
            terms.append(expected_value(reward.detach(), policy.log_probs).mean(-1))
            unexplained = batch.reward - predicted.detach()
        if self.config.objective != "dm":
            ratio = policy.log_prob(batch.action).exp() / batch.action_prob
            normalized = self.config.objective.startswith("sn")
            terms.append(weighted_mean(ratio, unexplained, self_normalized=normalized))
        return losses | {"policy": -sum(terms[1:], terms[0])}

    def distribution(self, observation: Observation, mask: Tensor | None) -> Categorical:
        """The policy, [seed, batch]."""
        policy = self.policy(observation, mask)
        assert isinstance(policy, Categorical)
        return policy
