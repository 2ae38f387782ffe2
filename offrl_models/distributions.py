"""What the outputs of a policy network mean: probabilities of discrete actions, or a density over bounded continuous ones."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from offrl_models.losses import take
from offrl_models.nets import masked_log_softmax

COMPONENTS = 5  # of a mixture density
NARROWEST, WIDEST = -7.0, 2.0  # logarithm of a component's scale, where the action runs from 0 to 1

Actions = int | Float64[np.ndarray, "dimensions 2"]  # number of discrete actions, or bounds of continuous ones


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), in operations that an exported graph has in double precision."""
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


class Categorical(NamedTuple):
    """Probabilities of discrete actions."""

    log_probs: Float[Tensor, "*batch actions"]

    def log_prob(self, action: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return take(self.log_probs, action)


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

    def _unit(self, action: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch 1 dimensions"]:
        return ((action - self.low) / self.width).unsqueeze(-2)

    def _log_densities(
        self, unit: Float[Tensor, "*batch 1 dimensions"]
    ) -> Float[Tensor, "*batch components dimensions"]:
        """Of each component in each dimension, where the action runs from 0 to 1."""
        scale = self.log_scale.exp()
        z = ((unit - self.center) / scale).abs()
        # The mass inside is s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)) with s the logistic function and b - a = 1 / scale.
        below, above = -self.center / scale, (1.0 - self.center) / scale
        log_mass = torch.log1p(-torch.exp(-1.0 / scale)) - _softplus(-above) - _softplus(below)
        return -z - 2.0 * torch.log1p(torch.exp(-z)) - self.log_scale - log_mass

    def log_prob(self, action: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch"]:
        """Logarithm of the density at actions inside the bounds."""
        joint = self.log_weight + self._log_densities(self._unit(action)).sum(-1)
        return torch.logsumexp(joint, -1) - self.width.log().sum()

    def conditionals(
        self, action: Float[Tensor, "*batch dimensions"]
    ) -> tuple[Float[Tensor, "*batch dimensions"], Float[Tensor, "*batch dimensions"]]:
        """Of each dimension given those before it: the logarithm of the density and the distribution function.

        Where actions are drawn from this density the latter is uniform on [0, 1] and independent across dimensions:
        Rosenblatt (1952), "Remarks on a multivariate transformation".
        """
        unit = self._unit(action)
        each = self._log_densities(unit)
        up_to = self.log_weight.unsqueeze(-1) + each.cumsum(-1)
        before = up_to - each
        total = torch.logsumexp(before, -2)
        log_density = torch.logsumexp(up_to, -2) - total - self.width.log()
        scale = self.log_scale.exp()
        z, above = (unit - self.center) / scale, (1.0 - self.center) / scale
        inside = torch.exp(_softplus(-above) - _softplus(-z)) * torch.expm1(-unit / scale) / torch.expm1(-1.0 / scale)
        return log_density, ((before - total.unsqueeze(-2)).exp() * inside).sum(-2)


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

    def __init__(self, bounds: Float64[np.ndarray, "dimensions 2"]):
        super().__init__()
        self.dimensions = len(bounds)
        self.outputs = COMPONENTS * (1 + 2 * self.dimensions)
        self.register_buffer("low", torch.as_tensor(bounds[:, 0], dtype=torch.float32))
        self.register_buffer("width", torch.as_tensor(bounds[:, 1] - bounds[:, 0], dtype=torch.float32))
        start = (torch.arange(COMPONENTS) + 0.5) / COMPONENTS  # components begin side by side
        self.register_buffer("start", start.unsqueeze(-1))

    def forward(self, outputs: Float[Tensor, "*batch outputs"], mask: Tensor | None = None) -> LogisticMixture:
        """A mask, which continuous actions do not have, is not looked at."""
        logit, rest = outputs[..., :COMPONENTS], outputs[..., COMPONENTS:]
        center, raw = rest.unflatten(-1, (2, COMPONENTS, self.dimensions)).unbind(-3)
        middle, reach = (WIDEST + NARROWEST) / 2, (WIDEST - NARROWEST) / 2
        log_scale = middle + reach * torch.tanh(raw)
        return LogisticMixture(logit.log_softmax(-1), self.start + center, log_scale, self.low, self.width)


Head = CategoricalHead | MixtureHead


def head_of(actions: Actions) -> Head:
    """What the outputs of a network over such actions mean."""
    return CategoricalHead(actions) if isinstance(actions, int) else MixtureHead(actions)
