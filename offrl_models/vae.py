"""Actions like those that a log shows: an autoencoder that proposes them, and a network that moves them a little."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.losses import squared_error
from offrl_models.nets import Box, JointMLP

DRAWS = 2  # random draws of a row that make up one latent, which has twice as many dimensions as the action
REACH = 0.5  # proposals come from latents cut off there, so that they are like likely actions
NARROWEST, WIDEST = -4.0, 15.0  # logarithm of the standard deviation of a latent


def normal(uniform: Float[Tensor, "*batch draws numbers"]) -> Float[Tensor, "*batch latents dimensions"]:
    """Standard normal latents of numbers uniform on [0, 1): DRAWS draws each, whose first number is not looked at."""
    each = torch.special.ndtri(uniform[..., 1:].clamp(1e-6, 1.0 - 1e-6))
    return each.unflatten(-2, (-1, DRAWS)).flatten(-2)


def spread_latents(count: int, dimensions: int) -> Float[Tensor, "count latent"]:
    """Latents of so many proposals, the same ones each time: a scrambled Sobol sequence, spread evenly by the normal."""
    spread = torch.quasirandom.SobolEngine(DRAWS * dimensions, scramble=True, seed=0).draw(count)
    return torch.special.ndtri(spread.clamp(1e-6, 1.0 - 1e-6))


class ActionVAE(nn.Module):
    """Sohn, Lee & Yan (2015), "Learning structured output representation using deep conditional generative models", with the
    networks of Fujimoto et al. (2019), https://arxiv.org/abs/1812.02900."""

    latents: Tensor

    def __init__(
        self,
        seeds: Sequence[int],
        encoder: Encoder,
        hidden: Sequence[int],
        bounds: Float64[np.ndarray, "dimensions 2"],
        proposals: int = 1,
    ):
        """`proposals` are how many `spread` makes."""
        super().__init__()
        dimensions = len(bounds)
        self.posterior = JointMLP(seeds, "vaee", encoder, hidden, dimensions, 2 * DRAWS * dimensions)
        self.decoder = JointMLP(seeds, "vaed", encoder, hidden, DRAWS * dimensions, dimensions)
        self.box = Box(bounds)
        self.register_buffer("latents", spread_latents(proposals, dimensions))

    def loss(
        self,
        observation: Observation,
        action: Float[Tensor, "seed batch dimensions"],
        uniform: Float[Tensor, "seed batch draws numbers"],
        *,
        kl_weight: float,
    ) -> Float[Tensor, "seed"]:
        """Squared error of actions decoded from their own latents, where every dimension runs from -1 to 1, plus the mean
        divergence of a latent's dimension from the standard normal."""
        unit = self.box.unit(action)
        mean, log_deviation = self.posterior(observation, unit).chunk(2, -1)
        log_deviation = log_deviation.clamp(NARROWEST, WIDEST)
        latent = mean + log_deviation.exp() * normal(uniform).squeeze(-2)
        divergence = 0.5 * (mean.square() + (2.0 * log_deviation).exp() - 1.0) - log_deviation
        decoded = torch.tanh(self.decoder(observation, latent))
        return squared_error(decoded.flatten(1), unit.flatten(1)) + kl_weight * divergence.mean((1, 2))

    def propose(
        self, observation: Observation, latent: Float[Tensor, "seed batch draws latent"]
    ) -> Float[Tensor, "seed batch draws dimensions"]:
        """An action for each latent, within the bounds."""
        return self.box.vector(torch.tanh(self.decoder(observation, latent.clamp(-REACH, REACH))))

    def spread(self, observation: Observation) -> Float[Tensor, "seed batch proposals dimensions"]:
        """The same proposals each time, spread evenly."""
        encoded = observation if isinstance(observation, Encoded) else self.decoder.seen.encode(observation)
        return self.propose(encoded, self.latents.expand(*encoded.numeric.shape[:2], -1, -1))


class Perturbation(nn.Module):
    """Moves actions by at most `flexibility`, where every dimension runs from -1 to 1: Fujimoto et al. (2019), section 4."""

    def __init__(
        self,
        seeds: Sequence[int],
        encoder: Encoder,
        hidden: Sequence[int],
        bounds: Float64[np.ndarray, "dimensions 2"],
        flexibility: float,
    ):
        super().__init__()
        self.net = JointMLP(seeds, "xi", encoder, hidden, len(bounds), len(bounds))
        self.box, self.flexibility = Box(bounds), flexibility

    def forward(
        self, observation: Observation, action: Float[Tensor, "seed batch draws dimensions"]
    ) -> Float[Tensor, "seed batch draws dimensions"]:
        unit = self.box.unit(action)
        return self.box.vector(unit + self.flexibility * torch.tanh(self.net(observation, unit)))
