"""Networks with a leading seed axis: parameters are [seed, in, out], so several seeds cost one pass."""

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.products import affine


def initial_weights(seeds: Sequence[int], name: str, shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """Uniform in +-1/sqrt(fan_in), drawn per seed, so that a seed starts alike alone and in company."""
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return nn.Parameter(torch.stack(drawn))


class SeedLinear(nn.Module):
    """x [seed, batch, in] -> [seed, batch, out]. Weights start as if `beside` more inputs were added to the same outputs."""

    def __init__(
        self, seeds: Sequence[int], name: str, inputs: int, outputs: int, *, bias: bool = True, beside: int = 0
    ):
        super().__init__()
        self.weight = initial_weights(seeds, name + ".w", (inputs, outputs), inputs + beside)
        self.bias = initial_weights(seeds, name + ".b", (1, outputs), inputs + beside) if bias else None

    def forward(self, x: Float[Tensor, "seed batch inputs"], relu: bool = False) -> Float[Tensor, "seed batch outputs"]:
        return affine(x, self.weight, self.bias, relu=relu)


class ObservationLayer(nn.Module):
    """First layer: a linear map of the numbers plus one table row per category, which equals a one-hot product.

    Weights start as if `beside` more inputs were added to the same outputs.
    """

    first_row: Tensor

    def __init__(self, seeds: Sequence[int], name: str, encoder: Encoder, outputs: int, *, beside: int = 0):
        super().__init__()
        fan_in = encoder.n_numeric + encoder.n_categorical + beside
        self.table_rows = encoder.table_rows
        self.weight = initial_weights(seeds, name + ".n", (encoder.n_numeric, outputs), fan_in)
        self.table = initial_weights(seeds, name + ".t", (encoder.table_rows, outputs), fan_in)
        self.bias = initial_weights(seeds, name + ".b", (1, outputs), fan_in)
        first_row = torch.arange(len(seeds))[:, None, None] * encoder.table_rows  # of each seed's table among all
        self.register_buffer("first_row", first_row, persistent=False)

    def forward(self, encoded: Encoded) -> Float[Tensor, "seed batch outputs"]:
        out = self.bias
        if self.weight.shape[1]:
            out = affine(encoded.numeric, self.weight, out)
        if self.table_rows:
            rows = F.embedding(encoded.codes + self.first_row, self.table.flatten(0, 1))
            out = out + rows.sum(-2)
        return out


class MLP(nn.Module):
    """Observation [seed, batch, columns], as logged or encoded, -> [seed, batch, outputs]; ReLU between the layers.

    With `layer_norm` what each ReLU gives is standardised over the layer, Ba, Kiros & Hinton (2016); a learned scale and shift
    would be undone by the linear layer that follows.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        name: str,
        encoder: Encoder,
        hidden: Sequence[int],
        outputs: int,
        *,
        layer_norm: bool = False,
        beside: int = 0,
    ):
        super().__init__()
        self.encode, self.layer_norm = encoder, layer_norm
        self.first = ObservationLayer(seeds, name + "0", encoder, hidden[0], beside=beside)
        sizes = [*hidden, outputs]
        self.rest = nn.ModuleList(
            SeedLinear(seeds, f"{name}{i + 1}", before, after) for i, (before, after) in enumerate(pairwise(sizes))
        )

    def last_bias(self) -> nn.Parameter:
        """The bias of the outputs, [seed, 1, outputs]."""
        last = self.rest[-1]
        assert isinstance(last, SeedLinear) and last.bias is not None
        return last.bias

    def forward(self, observation: Observation) -> Float[Tensor, "seed batch outputs"]:
        return self.after(self.first(observation if isinstance(observation, Encoded) else self.encode(observation)))

    def after(self, x: Float[Tensor, "seed batch hidden"]) -> Float[Tensor, "seed batch outputs"]:
        """What follows the first layer."""
        x = torch.relu(x)
        for left, layer in zip(range(len(self.rest))[::-1], self.rest, strict=True):
            x = layer(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x, relu=left > 0)
        return x.float() if x.dtype == torch.bfloat16 else x  # only products of matrices are taken in half precision


class Box(nn.Module):
    """Bounded vectors, into units in which every dimension runs from -1 to 1, and back."""

    low: Tensor
    width: Tensor

    def __init__(self, bounds: Float64[np.ndarray, "dimensions 2"]):
        super().__init__()
        self.register_buffer("low", torch.as_tensor(bounds[:, 0], dtype=torch.float32))
        self.register_buffer("width", torch.as_tensor(bounds[:, 1] - bounds[:, 0], dtype=torch.float32))

    def unit(self, vector: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch dimensions"]:
        return 2.0 * (vector - self.low) / self.width - 1.0

    def vector(self, unit: Float[Tensor, "*batch dimensions"]) -> Float[Tensor, "*batch dimensions"]:
        """What lies outside is brought to the bounds."""
        return self.low + self.width * (unit.clamp(-1.0, 1.0) + 1.0) / 2.0


TILE = 768  # rows of a seed that caches hold while they go through the layers


class JointMLP(nn.Module):
    """Observation and a vector -> outputs: [seed, batch, outputs], or [seed, batch, draws, outputs] of several vectors for each
    observation, for which what is observed is looked at once. The first layer starts as that of one vector of both."""

    def __init__(
        self,
        seeds: Sequence[int],
        name: str,
        encoder: Encoder,
        hidden: Sequence[int],
        inputs: int,
        outputs: int,
        *,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.seen = MLP(seeds, name, encoder, hidden, outputs, layer_norm=layer_norm, beside=inputs)
        observed = encoder.n_numeric + encoder.n_categorical
        self.joined = SeedLinear(seeds, name + "a", inputs, hidden[0], bias=False, beside=observed)

    def forward(self, observation: Observation, vector: Float[Tensor, "seed batch *draws inputs"]) -> Tensor:
        encoded = observation if isinstance(observation, Encoded) else self.seen.encode(observation)
        first = self.seen.first(encoded)
        if vector.dim() == 3:
            return self.seen.after(affine(vector, self.joined.weight, first))
        first, tile = first.unsqueeze(2), vector.shape[2]
        if vector.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            tile = max(TILE // max(vector.shape[1], 1), 1)
        return torch.cat([self._of_each(first, part) for part in vector.split(tile, 2)], 2)

    def _of_each(self, first: Tensor, vector: Float[Tensor, "seed batch draws inputs"]) -> Tensor:
        hidden = first + self.joined(vector.flatten(1, 2)).unflatten(1, vector.shape[1:3])
        return self.seen.after(hidden.flatten(1, 2)).unflatten(1, vector.shape[1:3])


LEAST = -1e38  # below any value of a network, in half precision too
FORBIDDEN = -1e9  # logarithm of no probability; infinity would make NaN of 0 * infinity


def take(values: Float[Tensor, "*batch actions"], action: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The value of each row's own action."""
    return values.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def take_each(
    values: Float[Tensor, "*batch actions numbers"], action: Int64[Tensor, "*batch"]
) -> Float[Tensor, "*batch numbers"]:
    """The numbers of each row's own action, where an action has several."""
    place = action[..., None, None].expand(*action.shape, 1, values.shape[-1])
    return values.gather(-2, place).squeeze(-2)


def masked(values: Float[Tensor, "*batch actions"], mask: Bool[Tensor, "*batch actions"]) -> Tensor:
    """Values with forbidden actions pushed out of any maximum or softmax."""
    return torch.where(mask, values, LEAST)


def masked_log_softmax(logits: Float[Tensor, "*batch actions"], mask: Bool[Tensor, "*batch actions"]) -> Tensor:
    """Log-probabilities over the allowed actions."""
    return torch.log_softmax(masked(logits, mask), -1).clamp(min=FORBIDDEN)


def likely_enough(
    logits: Float[Tensor, "*batch actions"], mask: Bool[Tensor, "*batch actions"], threshold: float
) -> Bool[Tensor, "*batch actions"]:
    """Allowed actions whose probability is at least `threshold` times that of the likeliest one."""
    log_probs = masked_log_softmax(logits, mask)
    return mask & (torch.exp(log_probs - log_probs.amax(-1, keepdim=True)) >= threshold)


def best_of(
    vectors: Float[Tensor, "*batch draws dimensions"], value: Float[Tensor, "*batch draws"]
) -> Float[Tensor, "*batch dimensions"]:
    """Of several vectors the one of the greatest value."""
    place = value.argmax(-1)[..., None, None].expand(*vectors.shape[:-2], 1, vectors.shape[-1])
    return vectors.gather(-2, place).squeeze(-2)
