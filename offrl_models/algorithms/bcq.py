"""Batch-constrained Q-learning: Q-learning among the actions that the behavior takes often enough.

Discrete: Fujimoto, Conti, Ghavamzadeh & Pineau (2019), https://arxiv.org/abs/1910.01708; continuous: Fujimoto, Meger & Precup
(2019), https://arxiv.org/abs/1812.02900; defaults of d3rlpy.
Differences from the papers: imitator and Q-network share no layers, and the discrete policy is a softmax of Q over the actions
that pass the threshold, at a stated temperature, instead of their argmax. The continuous policy chooses among proposals of fixed
latents, spread evenly, and is a density of a stated scale around its choice; all losses are taken at the same parameters.
Batches are of 256 by default, where d3rlpy has 100 over continuous actions and 32 over discrete ones, for which the slow network is
copied a hundred times in a training by default, and there at every 8,000th step.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.actors import Critic, frozen
from offrl_models.datasets.encoding import Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Actions, Categorical, Distribution, LogisticMixture, Space
from offrl_models.losses import double_q_value, huber, negative_log_likelihood, soft_least, squared_error, td_target
from offrl_models.nets import MLP, best_of, likely_enough, masked_log_softmax, take
from offrl_models.vae import DRAWS, ActionVAE, Perturbation, normal


@dataclass(frozen=True, kw_only=True)
class BCQConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    threshold: float = Field(default=0.3, ge=0, le=1)  # paper: tau; least probability relative to the likeliest action
    logit_penalty: float = Field(
        default=0.5, ge=0
    )  # weight of the imitator's squared logits; the paper's code has 0.01
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


@dataclass(frozen=True, kw_only=True)
class ContinuousBCQConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(400, 300), min_length=1)
    vae_hidden: tuple[PositiveInt, ...] = Field(default=(750, 750), min_length=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    samples: int = Field(default=100, ge=1)  # proposals that the policy chooses from
    flexibility: float = Field(default=0.05, ge=0, le=2)  # paper: phi; how far a proposal is moved; actions are 2 wide
    pessimism: float = Field(default=0.75, ge=0, le=1)  # paper: lambda; weight of the lesser critic in targets
    kl_weight: float = Field(default=0.5, ge=0)  # in the loss of the autoencoder
    polyak: float = Field(default=0.005, gt=0, le=1)
    exploration: float = Field(default=0.03, gt=0)  # scale of the deployed density, as a share of an action's range


class BCQ(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete", "continuous")

    def __init__(
        self, config: BCQConfig | ContinuousBCQConfig, encoder: Encoder, actions: Actions, seeds: Sequence[int]
    ):
        super().__init__()
        self.config, members = config, 1 if isinstance(actions, int) else 2
        self.q = Critic(seeds, "q", encoder, config.hidden, actions, members)
        self.target_q = Critic(seeds, "q", encoder, config.hidden, actions, members)
        self.targets = {"target_q": "q"}
        if isinstance(config, BCQConfig):
            assert isinstance(actions, int)
            self.imitator = MLP(seeds, "imitator", encoder, config.hidden, actions)
            self.draws, self.target_update = 0, (1.0, config.target_interval)
        else:
            assert not isinstance(actions, int)
            self.vae = ActionVAE(seeds, encoder, config.vae_hidden, actions, config.samples)
            moved = (seeds, encoder, config.hidden, actions, config.flexibility)
            self.perturbation, self.target_perturbation = Perturbation(*moved), Perturbation(*moved)
            self.targets["target_perturbation"] = "perturbation"
            self.draws, self.target_update = DRAWS * (2 + config.samples), (config.polyak, 1)

    def learning_rates(self) -> dict[str, float]:
        trained = ("q", "imitator") if isinstance(self.config, BCQConfig) else ("q", "perturbation", "vae")
        return dict.fromkeys(trained, self.config.learning_rate)

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        c, seen, following = self.config, batch.observation, batch.next_observation
        q = self.q(seen, batch.action)
        if isinstance(c, BCQConfig):
            with torch.no_grad():
                online, slow = (net.each(following).squeeze(1) for net in (self.q, self.target_q))
                allowed = likely_enough(self.imitator(following), batch.next_mask, c.threshold)
            target = td_target(batch.reward, batch.discount, double_q_value(slow, online, allowed))
            logits = self.imitator(seen)
            imitation = negative_log_likelihood(take(masked_log_softmax(logits, batch.mask), batch.action))
            penalty = c.logit_penalty * logits.square().mean((-2, -1))
            return {"q": huber(q.squeeze(1), target), "imitator": imitation + penalty}
        assert batch.uniform is not None
        for_vae, for_actor, for_target = batch.uniform.split([DRAWS, DRAWS, DRAWS * c.samples], 2)
        with torch.no_grad():
            proposed = self.vae.propose(seen, normal(for_actor))
            moved = self.target_perturbation(following, self.vae.propose(following, normal(for_target)))
            next_value = soft_least(self.target_q(following, moved), pessimism=c.pessimism).amax(-1)
        target = td_target(batch.reward, batch.discount, next_value).unsqueeze(1).expand_as(q)
        with frozen(self.q):
            reached = self.q(seen, self.perturbation(seen, proposed))[:, 0]
        return {
            "q": squared_error(q, target).sum(1),
            "perturbation": -reached.mean((1, 2)),
            "vae": self.vae.loss(seen, batch.action, for_vae, kl_weight=c.kl_weight),
        }

    def distribution(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy, [seed, batch]."""
        c = self.config
        if isinstance(c, BCQConfig):
            assert mask is not None
            q = self.q.each(observation).squeeze(1)
            allowed = likely_enough(self.imitator(observation), mask, c.threshold)
            return Categorical(masked_log_softmax(q / c.temperature, allowed))
        proposed = self.perturbation(observation, self.vae.spread(observation))
        best = best_of(proposed, self.q(observation, proposed)[:, 0])
        return LogisticMixture.around(best, c.exploration, self.vae.box.low, self.vae.box.width)
