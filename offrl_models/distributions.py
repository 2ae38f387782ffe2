"""What the outputs of a policy network mean: probabilities of discrete actions, or a density over bounded continuous ones."""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from offrl_models.nets import masked_log_softmax, take

COMPONENTS = 5  # of a mixture density
PARTS, ROUNDS = 16, 8  # of the interval from 0 to 1, until 2e-10 of it is left
OUTSIDE, ROUNDING = -1e9, 1e-6  # logarithm of no density; infinity would make NaN of differences
NARROWEST, WIDEST = -7.0, 2.0  # logarithm of a component's scale, where the action runs from 0 to 1

Space = Literal["discrete", "continuous"]
Actions = int | Float64[np.ndarray, "dimensions 2"]  # number of discrete actions, or bounds of continuous ones


def _log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + exp(-x)): in one operation, or in those that an exported graph has in double precision."""
    if torch.compiler.is_exporting():
        return -torch.relu(-x) - torch.log1p(torch.exp(-x.abs()))
    return F.logsigmoid(x)


def _within(unit: Tensor) -> Tensor:
    """Whether numbers lie between 0 and 1, but for rounding."""
    return (unit >= -ROUNDING) & (unit <= 1.0 + ROUNDING)


def _log_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y)), which in an exported graph would underflow if it were written as that."""
    return torch.maximum(x, y) + torch.log1p(torch.exp(-(x - y).abs()))


class Categorical(NamedTuple):
    """Probabilities of discrete actions."""

    log_probs: Float[Tensor, "*batch actions"]

    @property
    def probs(self) -> Float[Tensor, "*batch actions"]:
        return self.log_probs.exp()

    def log_prob(self, action: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return take(self.log_probs, action)

    def sample(self, uniform: Float[Tensor, "*batch draws 1"]) -> Int64[Tensor, "*batch draws"]:
        """Actions drawn by the inverse of the distribution function, at numbers uniform on [0, 1)."""
        below = self.probs.cumsum(-1).unsqueeze(-2)
        return (below <= uniform * below[..., -1:]).sum(-1).clamp(max=self.log_probs.shape[-1] - 1)

    @property
    def greedy(self) -> Int64[Tensor, "*batch"]:
        """The likeliest action."""
        return self.log_probs.argmax(-1)


class LogisticMixture(NamedTuple):
    """A mixture of products of logistic densities, each cut off at the bounds of the action and divided by its mass inside.

    Components let a density have several modes and its dimensions depend on each other: Bishop (1994), "Mixture density
    networks". Unlike the normal, the logistic has its distribution function in closed form. `center` and `log_scale` are in
    units in which every dimension of the action runs from 0 to 1.
    """

    log_weight: Float[Tensor, "*batch components"]
    center: Float[Tensor, "*batch components dimensions"]
    log_scale: Float[Tensor, "*batch components dimensions"]
    low: Float[Tensor, "dimensions"]
    width: Float[Tensor, "dimensions"]

    @classmethod
    def around(
        cls, action: Float[Tensor, "*batch dimensions"], scale: float, low: Tensor, width: Tensor
    ) -> "LogisticMixture":
        """One component around each action, of a scale in units in which every dimension runs from 0 to 1."""
        center = ((action - low) / width).unsqueeze(-2)
        return cls(torch.zeros_like(center[..., 0]), center, torch.full_like(center, math.log(scale)), low, width)

    def _unit(self, action: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch 1 dimensions"]:
        return ((action - self.low) / self.width).unsqueeze(-2)

    def _log_densities(
        self, unit: Float[Tensor, "*batch 1 dimensions"]
    ) -> Float[Tensor, "*batch components dimensions"]:
        """Of each component in each dimension, where the action runs from 0 to 1."""
        return self._log_density(unit, self.center, self.log_scale)

    @classmethod
    def _log_density(cls, unit: Tensor, center: Tensor, log_scale: Tensor) -> Tensor:
        rate = torch.exp(-log_scale)
        z = (unit - center) * rate
        return 2.0 * _log_sigmoid(z) - z - log_scale - cls._log_mass(center, rate)

    @staticmethod
    def _share_below(unit: Tensor, center: Tensor, log_scale: Tensor) -> Tensor:
        """The distribution function of a single component."""
        rate = torch.exp(-log_scale)
        z, above = (unit - center) * rate, (1.0 - center) * rate
        return torch.exp(_log_sigmoid(z) - _log_sigmoid(above)) * torch.expm1(-unit * rate) / torch.expm1(-rate)

    @staticmethod
    def _log_mass(center: Tensor, rate: Tensor) -> Tensor:
        """Logarithm of the mass that a logistic density has between 0 and 1; `rate` is 1 / scale.

        It is s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)) with s the logistic function and b - a = 1 / scale.
        """
        below = center * rate  # -a
        return torch.log1p(-torch.exp(-rate)) + _log_sigmoid(rate - below) + _log_sigmoid(below)

    def log_prob(self, action: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch"]:
        """Logarithm of the density; OUTSIDE the bounds, where nothing is ever played, it is as good as minus infinity."""
        unit = self._unit(action)
        each = self._log_densities(unit.clamp(0.0, 1.0)).sum(-1)
        mixed = each.squeeze(-1) if each.shape[-1] == 1 else torch.logsumexp(self.log_weight + each, -1)
        return mixed + torch.where(_within(unit).all(-1).squeeze(-1), -self.width.log().sum(), OUTSIDE)

    def conditionals(
        self, action: Float[Tensor, "*batch dimensions"]
    ) -> tuple[Float[Tensor, "*batch dimensions"], Float[Tensor, "*batch dimensions"]]:
        """Of each dimension given those before it: the logarithm of the density and the distribution function.

        Where actions are drawn from this density the latter is uniform on [0, 1] and independent across dimensions:
        Rosenblatt (1952), "Remarks on a multivariate transformation".
        """
        given = self._unit(action)
        unit = given.clamp(0.0, 1.0)
        each = self._log_densities(unit)
        up_to = self.log_weight.unsqueeze(-1) + each.cumsum(-1)
        before = up_to - each
        total = torch.logsumexp(before, -2)
        log_density = torch.logsumexp(up_to, -2) - total - self.width.log()
        inside = self._share_below(unit, self.center, self.log_scale)
        log_density = torch.where(_within(given).squeeze(-2), log_density, OUTSIDE)
        return log_density, ((before - total.unsqueeze(-2)).exp() * inside).sum(-2)

    def at_shares(self, share: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch dimensions"]:
        """Actions at which the distribution function of each dimension, given those before it, has these values: one dimension
        after the other, each by cutting the interval that holds it into PARTS, ROUNDS times."""
        log_weight, found = self.log_weight, []
        for dimension in range(share.shape[-1]):
            center, log_scale = self.center[..., dimension], self.log_scale[..., dimension]
            weight, asked = log_weight.softmax(-1).unsqueeze(-2), share[..., dimension : dimension + 1]
            unit, size = torch.zeros_like(asked), 1.0
            for _ in range(ROUNDS):
                size /= PARTS
                edges = (unit + size * torch.arange(1, PARTS, device=asked.device)).unsqueeze(-1)
                below = self._share_below(edges, center.unsqueeze(-2), log_scale.unsqueeze(-2))
                unit = unit + size * ((weight * below).sum(-1) < asked).sum(-1, keepdim=True)
            unit = unit + size / 2
            log_weight = log_weight + self._log_density(unit, center, log_scale)
            found.append(unit)
        return self.low + self.width * torch.cat(found, -1)

    @property
    def of_each(self) -> "LogisticMixture":
        """The same for each of several actions of an observation, whose axis comes before that of the dimensions."""
        parts = self.log_weight.unsqueeze(-2), self.center.unsqueeze(-3), self.log_scale.unsqueeze(-3)
        return LogisticMixture(*parts, self.low, self.width)

    def sample(self, uniform: Float[Tensor, "*batch draws numbers"]) -> Float[Tensor, "*batch draws dimensions"]:
        """Actions drawn by the inverse of the distribution function, at numbers uniform on [0, 1): the first one chooses the
        component, each other one is of a dimension. Gradients reach center and scale, and not the weights."""
        below = self.log_weight.exp().cumsum(-1).unsqueeze(-2)
        chosen = (below <= uniform[..., :1] * below[..., -1:]).sum(-1).clamp(max=below.shape[-1] - 1)
        place = chosen[..., None].expand(*chosen.shape, self.center.shape[-1])
        center, log_scale = self.center.gather(-2, place), self.log_scale.gather(-2, place)
        rate = torch.exp(-log_scale)
        log_mass = self._log_mass(center, rate)
        inside = uniform[..., 1:].clamp(1e-6, 1.0 - 1e-6)
        log_below = _log_of_sum(_log_sigmoid(-center * rate), inside.log() + log_mass)
        log_above = _log_of_sum(_log_sigmoid((center - 1.0) * rate), torch.log1p(-inside) + log_mass)
        unit = (center + (log_below - log_above) / rate).clamp(0.0, 1.0)
        return self.low + self.width * unit

    def sample_and_log_prob(
        self, uniform: Float[Tensor, "*batch draws numbers"]
    ) -> tuple[Float[Tensor, "*batch draws dimensions"], Float[Tensor, "*batch draws"]]:
        """`sample`, and the logarithm of the density of each of them where every dimension of the action runs from -1 to 1."""
        action = self.sample(uniform)
        return action, self.of_each.log_prob(action) + (self.width / 2.0).log().sum()

    def pooled(self) -> "LogisticMixture":
        """The mean of the densities of several seeds, [seed, batch], as one mixture of all their components, [batch]."""
        each = (part.transpose(0, 1).flatten(1, 2) for part in (self.log_weight, self.center, self.log_scale))
        log_weight, center, log_scale = each
        return LogisticMixture(log_weight - math.log(len(self.center)), center, log_scale, self.low, self.width)

    @property
    def greedy(self) -> Float[Tensor, "*batch dimensions"]:
        """Where the component is densest that has the greatest weight."""
        place = self.log_weight.argmax(-1)[..., None, None].expand(*self.center.shape[:-2], 1, self.center.shape[-1])
        return self.low + self.width * self.center.gather(-2, place).squeeze(-2).clamp(0.0, 1.0)


Distribution = Categorical | LogisticMixture


class CategoricalHead(nn.Module):
    """One logit per action."""

    def __init__(self, actions: int):
        super().__init__()
        self.outputs = actions

    def forward(
        self, outputs: Float[Tensor, "*batch outputs"], mask: Bool[Tensor, "*batch actions"] | None
    ) -> Categorical:
        assert mask is not None
        return Categorical(masked_log_softmax(outputs, mask))


class MixtureHead(nn.Module):
    """Weight, centers and scales of every component. `bounds` has the least and the greatest value of each dimension."""

    low: Tensor
    width: Tensor
    start: Tensor

    def __init__(self, bounds: Float64[np.ndarray, "dimensions 2"], components: int = COMPONENTS):
        super().__init__()
        self.dimensions, self.components = len(bounds), components
        self.outputs = components * (1 + 2 * self.dimensions)
        self.register_buffer("low", torch.as_tensor(bounds[:, 0], dtype=torch.float32))
        self.register_buffer("width", torch.as_tensor(bounds[:, 1] - bounds[:, 0], dtype=torch.float32))
        start = (torch.arange(components) + 0.5) / components  # components begin side by side
        self.register_buffer("start", start.unsqueeze(-1))

    def forward(self, outputs: Float[Tensor, "*batch outputs"], mask: Tensor | None = None) -> LogisticMixture:
        """A mask, which continuous actions do not have, is not looked at."""
        logit, rest = outputs[..., : self.components], outputs[..., self.components :]
        center, raw = rest.unflatten(-1, (2, self.components, self.dimensions)).unbind(-3)
        middle, reach = (WIDEST + NARROWEST) / 2, (WIDEST - NARROWEST) / 2
        log_scale = middle + reach * torch.tanh(raw)
        log_weight = logit.log_softmax(-1) if self.components > 1 else torch.zeros_like(logit)
        return LogisticMixture(log_weight, self.start + center, log_scale, self.low, self.width)


class PointHead(nn.Module):
    """One action, as networks of deterministic policies give it; around it a logistic density, cut off at the bounds.

    `exploration` is the density's standard deviation where an action runs from -1 to 1, and is not learned.
    """

    low: Tensor
    width: Tensor

    def __init__(self, bounds: Float64[np.ndarray, "dimensions 2"], exploration: float):
        super().__init__()
        self.outputs = len(bounds)
        self.log_scale = math.log(exploration / 2 * math.sqrt(3) / math.pi)
        self.register_buffer("low", torch.as_tensor(bounds[:, 0], dtype=torch.float32))
        self.register_buffer("width", torch.as_tensor(bounds[:, 1] - bounds[:, 0], dtype=torch.float32))

    def forward(self, outputs: Float[Tensor, "*batch outputs"], mask: Tensor | None = None) -> LogisticMixture:
        """A mask, which continuous actions do not have, is not looked at."""
        center = (0.5 + 0.5 * torch.tanh(outputs)).unsqueeze(-2)
        log_weight, log_scale = torch.zeros_like(center[..., 0]), torch.full_like(center, self.log_scale)
        return LogisticMixture(log_weight, center, log_scale, self.low, self.width)


Head = CategoricalHead | MixtureHead | PointHead


def space_of(actions: Actions) -> Space:
    return "discrete" if isinstance(actions, int) else "continuous"


def head_of(actions: Actions, components: int | None = None, exploration: float | None = None) -> Head:
    """What the outputs of a network over such actions mean; with `exploration`, of a deterministic policy if there can be one."""
    if isinstance(actions, int):
        return CategoricalHead(actions)
    return MixtureHead(actions, components or COMPONENTS) if exploration is None else PointHead(actions, exploration)
