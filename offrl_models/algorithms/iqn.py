"""Implicit quantile networks: any quantile of the return is an output of the network, whose level is an input.

Dabney, Ostrovski, Silver & Munos (2018b), https://arxiv.org/abs/1806.06923; defaults of d3rlpy, whose head, too, is linear.
Differences from the paper: actions are chosen by the mean over evenly spaced levels and not over drawn ones, so that the
policy is no random function; as the head is linear, the mean of the embeddings gives it at the price of one quantile; and
the policy is a softmax of that mean at a stated temperature instead of the argmax. Batches are of 256 by
default, and the slow network is copied a hundred times in a training, where d3rlpy has 32 and every 8,000th step.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.distributions import Categorical, Space
from offrl_models.losses import quantile_huber, quantile_midpoints, td_target
from offrl_models.nets import MLP, SeedLinear, masked, masked_log_softmax, take_each


@dataclass(frozen=True, kw_only=True)
class IQNConfig:
    hidden: tuple[PositiveInt, ...] = Field(default=(256, 256), min_length=1)
    learning_rate: float = Field(default=6.25e-5, gt=0)
    quantiles: int = Field(default=64, ge=1)  # paper: N; levels drawn for each row
    target_quantiles: int = Field(default=64, ge=1)  # paper: N'; the same in the target
    greedy_quantiles: int = Field(default=32, ge=1)  # paper: K; levels whose mean chooses actions
    cosines: int = Field(default=64, ge=1)  # paper: n; size of the embedding of a level
    huber_threshold: float = Field(default=1.0, gt=0)  # paper: kappa; below this error quantiles turn into expectiles
    target_interval: int | None = Field(default=None, ge=1)  # gradient steps between copies; None: a hundredth of all
    temperature: float = Field(default=0.01, gt=0)  # of the softmax over Q that acts; in units of reward


class ImplicitQuantiles(nn.Module):
    """What is seen times an embedding of the level, then a linear layer; paper: eq. 4."""

    frequency: Tensor
    evenly: Tensor

    def __init__(self, seeds: Sequence[int], name: str, encoder: Encoder, config: IQNConfig, actions: int):
        super().__init__()
        self.net = MLP(seeds, name, encoder, config.hidden, actions)
        self.embed = SeedLinear(seeds, name + "l", config.cosines, config.hidden[-1])
        self.register_buffer("frequency", torch.pi * torch.arange(config.cosines))
        evenly = torch.cos(quantile_midpoints(config.greedy_quantiles)[:, None] * self.frequency)
        self.register_buffer("evenly", evenly.repeat(len(seeds), 1, 1))

    def seen(self, observation: Observation) -> Float[Tensor, "seed batch hidden"]:
        """The last hidden layer."""
        x = self.net.first(observation if isinstance(observation, Encoded) else self.net.encode(observation))
        for layer in self.net.rest[:-1]:
            x = layer(torch.relu(x))
        return torch.relu(x)

    def at(
        self, seen: Float[Tensor, "seed batch hidden"], level: Float[Tensor, "seed batch draws"]
    ) -> Float[Tensor, "seed batch actions draws"]:
        """Quantiles of the return of every action."""
        embedding = torch.relu(self.embed(torch.cos(level.unsqueeze(-1) * self.frequency).flatten(1, 2)))
        x = seen.unsqueeze(2) * embedding.unflatten(1, level.shape[1:])
        return self.net.rest[-1](x.flatten(1, 2)).unflatten(1, level.shape[1:]).transpose(2, 3)

    def mean(self, seen: Float[Tensor, "seed batch hidden"]) -> Float[Tensor, "seed batch actions"]:
        """Of the quantiles at evenly spaced levels."""
        return self.net.rest[-1](seen * torch.relu(self.embed(self.evenly)).mean(1, keepdim=True))


class IQN(nn.Module):
    spaces: ClassVar[tuple[Space, ...]] = ("discrete",)
    targets: ClassVar[dict[str, str]] = {"target_q": "q"}

    def __init__(self, config: IQNConfig, encoder: Encoder, actions: int, seeds: Sequence[int]):
        super().__init__()
        self.config = config
        self.q = ImplicitQuantiles(seeds, "q", encoder, config, actions)
        self.target_q = ImplicitQuantiles(seeds, "q", encoder, config, actions)
        self.target_update = (1.0, config.target_interval)
        self.draws = config.quantiles + config.target_quantiles

    def learning_rates(self) -> dict[str, float]:
        return {"q": self.config.learning_rate}

    def losses(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """One loss per seed for each trained network, keyed by the attribute it trains."""
        assert batch.uniform is not None
        level, next_level = batch.uniform[..., 0].split((self.config.quantiles, self.config.target_quantiles), -1)
        with torch.no_grad():
            seen = self.target_q.seen(batch.next_observation)
            best = masked(self.target_q.mean(seen), batch.next_mask).argmax(-1)
            following = take_each(self.target_q.at(seen, next_level), best)
            target = td_target(batch.reward[..., None], batch.discount[..., None], following)
        predicted = take_each(self.q.at(self.q.seen(batch.observation), level), batch.action)
        return {"q": quantile_huber(predicted, target, level, threshold=self.config.huber_threshold)}

    def distribution(self, observation: Observation, mask: Tensor) -> Categorical:
        """The policy, [seed, batch]."""
        q = self.q.mean(self.q.seen(observation))
        return Categorical(masked_log_softmax(q / self.config.temperature, mask))
