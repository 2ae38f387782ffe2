"""Policies over continuous actions: what they play, and with which density.

Such a policy maps raw observations [batch, columns], actions to be judged [batch, actions, dimensions] and numbers uniform on
[0, 1) [batch, draws, numbers] to the logarithm of the density of each action and to one action drawn for each draw. The encoder
and, for a capped policy, the behavior model are inside it.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.stats import qmc
from torch import Tensor, nn

from offrl_models.distributions import LogisticMixture
from offrl_models.policies import HasDistribution, require_memoryless
from offrl_models.schema import Episodes

POINTS = 64  # at which a capped policy looks at its candidate to learn how often it is vetoed
ROWS_AT_A_TIME = 2048


def spread_points(count: int, numbers: int) -> Float64[np.ndarray, "count numbers"]:
    """Points that fill the unit cube evenly: Sobol' points, so `count` is best a power of 2. Shifted by one uniform point,
    modulo 1, each of them is uniform: Cranley & Patterson (1976)."""
    return qmc.Sobol(numbers, scramble=False).random(count)


class MixtureDensity(nn.Module):
    """The density of continuous actions of several seeds: the mean of theirs, made wider or narrower, then bent.

    `spread` multiplies the scale of every component. `curves` bend the distribution function of each dimension given those
    before it: level i is what the value i / (levels - 1) becomes, straight in between. Without them nothing is changed.
    """

    spread: Tensor
    curves: Tensor

    def __init__(
        self,
        algorithm: nn.Module,
        seeds: int,
        dimensions: int,
        spread: float = 1.0,
        curves: Float64[np.ndarray, "dimensions levels"] | None = None,
    ):
        super().__init__()
        require_memoryless(algorithm)
        self.algorithm, self.seeds, self.dimensions = algorithm.double(), seeds, dimensions
        self.numbers = 1 + dimensions
        straight = np.linspace(0.0, 1.0, 2)[None].repeat(dimensions, 0)
        self.register_buffer("spread", torch.tensor(spread, dtype=torch.float64))
        self.register_buffer("curves", torch.as_tensor(straight if curves is None else curves, dtype=torch.float64))

    def mixture(self, observation: Float[Tensor, "batch columns"]) -> LogisticMixture:
        """All components of all seeds, before the curves."""
        each = cast(HasDistribution, self.algorithm).distribution(observation.double().expand(self.seeds, -1, -1), None)
        assert isinstance(each, LogisticMixture)
        pooled = each.pooled()
        return pooled._replace(log_scale=pooled.log_scale + self.spread.log())

    @property
    def _pieces(self) -> int:
        return self.curves.shape[1] - 1

    def bend(
        self, share: Float[Tensor, "*batch dimensions"]
    ) -> tuple[Float[Tensor, "*batch dimensions"], Float[Tensor, "*batch dimensions"]]:
        """What the curves make of values of the distribution function, and their slopes there."""
        at = share.clamp(0.0, 1.0) * self._pieces
        piece = at.floor().clamp(max=self._pieces - 1)
        level, above = self._levels(piece)
        return level + (at - piece) * (above - level), (above - level) * self._pieces

    def unbend(self, level: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch dimensions"]:
        """The inverse of `bend`."""
        piece = (level.unsqueeze(-1) >= self.curves[:, 1:-1]).sum(-1).double()
        low, high = self._levels(piece)
        return (piece + (level - low) / (high - low)) / self._pieces

    def _levels(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of a piece of the curve of each dimension."""
        first = torch.arange(self.dimensions, device=piece.device) * (self._pieces + 1)
        levels, place = self.curves.flatten(), piece.long() + first
        return levels[place], levels[place + 1]

    def of(
        self, mixture: LogisticMixture, action: Float[Tensor, "*batch dimensions"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dimensions"]]:
        """Logarithm of the density of each action, and the distribution function of each dimension given those before it."""
        log_density, share = mixture.conditionals(action.double())
        level, slope = self.bend(share)
        return (log_density + slope.log()).sum(-1), level

    def log_density(
        self, mixture: LogisticMixture, action: Float[Tensor, "*batch dimensions"]
    ) -> Float[Tensor, "*batch"]:
        """Of a mixture that was found before."""
        return mixture.log_prob(action.double()) if self._pieces == 1 else self.of(mixture, action)[0]

    def drawn(self, mixture: LogisticMixture, uniform: Float[Tensor, "batch draws numbers"]) -> Tensor:
        """Actions [batch, draws, dimensions] of a mixture that was found before."""
        if self._pieces == 1:
            return mixture.sample(uniform)
        return mixture.of_each.at_shares(self.unbend(uniform[..., 1:]))

    def forward(
        self,
        observation: Float[Tensor, "batch columns"],
        action: Float[Tensor, "batch actions dimensions"],
        uniform: Float[Tensor, "batch draws numbers"],
    ) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch draws dimensions"]]:
        mixture = self.mixture(observation)
        return self.log_density(mixture.of_each, action), self.drawn(mixture, uniform.double())


class CappedDensity(nn.Module):
    """One rung of the ladder over continuous actions: the candidate proposes, and the behavior model may veto.

    An action a of the candidate pi is played with probability min(1, (cap - 1) mu(a) / pi(a)), and otherwise one of the behavior
    model mu is. What is played has the density min(pi, (cap - 1) mu) + (1 - accepted) mu, which is nowhere above cap * mu; of a
    candidate that is the behavior model itself nothing changes. `accepted`, the share of the proposals that pass, is an integral
    over all actions. It is estimated without bias, at points that are shifted by numbers of each row's own, so that ratios of
    these densities have the right expectation, and so have their products along an episode.
    """

    points: Tensor
    level: Tensor  # log(cap - 1): all that the rungs of a ladder differ in

    def __init__(self, candidate: MixtureDensity, behavior: MixtureDensity, cap: float):
        super().__init__()
        self.candidate, self.behavior = candidate, behavior
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.set_cap(cap)
        each = candidate.numbers
        self.parts = [
            each,
            each,
            1,
            each,
        ]  # a proposal, what is played instead, whether it is, and the shift of the points
        self.numbers = sum(self.parts)
        self.register_buffer("points", torch.as_tensor(spread_points(POINTS, each)), persistent=False)

    def set_cap(self, cap: float) -> None:
        self.level.fill_(math.log(cap - 1.0))

    def forward(
        self,
        observation: Float[Tensor, "batch columns"],
        action: Float[Tensor, "batch actions dimensions"],
        uniform: Float[Tensor, "batch draws numbers"],
    ) -> tuple[Float[Tensor, "batch actions"], Float[Tensor, "batch draws dimensions"]]:
        pi, mu = self.candidate.mixture(observation), self.behavior.mixture(observation)
        for_proposal, for_other, for_veto, shift = uniform.double().split(self.parts, -1)
        points = self.points + shift[:, :1]
        # At the points, at the proposals, and at what is asked about: all at once.
        drawn = self.candidate.drawn(pi, torch.cat([points - points.floor(), for_proposal], 1))
        at = torch.cat([drawn, action.double()], 1)
        log_pi, log_mu = self.candidate.log_density(pi.of_each, at), self.behavior.log_density(mu.of_each, at)
        last = drawn.shape[1]
        passes = (self.level + log_mu[:, :last] - log_pi[:, :last]).clamp(max=0.0).exp()
        accepted = passes[:, :POINTS].mean(1, keepdim=True)
        ratio = (log_pi[:, last:] - log_mu[:, last:]).clamp(max=self.level).exp() + (1.0 - accepted)
        plays = for_veto < passes[:, POINTS:, None]
        other = self.behavior.drawn(mu, for_other)
        return log_mu[:, last:] + ratio.log(), torch.where(plays, drawn[:, POINTS:], other)


def uniform_numbers(
    rows: int, draws: int, numbers: int, seed: int | Sequence[int]
) -> Float64[np.ndarray, "rows draws numbers"]:
    """Evenly spread points for the draws of every row, shifted by numbers of its own."""
    shift = np.random.default_rng(seed).random((rows, 1, numbers))
    return (shift + spread_points(draws, numbers)) % 1.0


def log_density_of(density: MixtureDensity, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
    """Logarithm of the density of every logged action."""
    found = []
    uniform = uniform_numbers(episodes.n_rows, 1, density.numbers, 0)
    with torch.no_grad():
        for start in range(0, episodes.n_rows, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            observation, action = (
                torch.as_tensor(np.array(each[rows])) for each in (episodes.observation, episodes.action)
            )
            found.append(density(observation, action.unsqueeze(1), torch.as_tensor(uniform[rows]))[0][:, 0].numpy())
    return np.concatenate(found)
