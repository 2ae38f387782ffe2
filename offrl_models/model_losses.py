"""What a learned model of the world is trained by and how unsure it is: one equation per function, like `losses`."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def gaussian_loss(
    mean: Float[Tensor, "seed batch numbers"],
    log_scale: Float[Tensor, "seed batch numbers"],
    target: Float[Tensor, "seed batch numbers"],
    known: Bool[Tensor, "seed batch numbers"],
) -> Float[Tensor, "seed"]:
    """-log N(target; mean, scale) without its constant, summed over the numbers that are known: Chua et al. (2018), eq. 1.

    >>> zero, one, known = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    >>> bool(gaussian_loss(one, zero, one, known) < gaussian_loss(zero, zero, one, known))
    True
    >>> gaussian_loss(zero, zero, one, ~known).item()
    0.0
    """
    each = 0.5 * ((target - mean) * torch.exp(-log_scale)).square() + log_scale
    return torch.where(known, each, 0.0).sum(-1).mean(-1)


def known_squared_error(
    mean: Float[Tensor, "seed batch numbers"],
    target: Float[Tensor, "seed batch numbers"],
    known: Bool[Tensor, "seed batch numbers"],
) -> Float[Tensor, "seed"]:
    """Squared error, summed over the numbers that are known.

    >>> known = torch.tensor([[[True, False]]])
    >>> known_squared_error(torch.tensor([[[1.0, 7.0]]]), torch.tensor([[[3.0, 0.0]]]), known).item()
    4.0
    """
    return torch.where(known, (target - mean).square(), 0.0).sum(-1).mean(-1)


def category_loss(
    logits: Float[Tensor, "seed batch categories"], code: Int64[Tensor, "seed batch"], known: Bool[Tensor, "seed batch"]
) -> Float[Tensor, "seed"]:
    """-log of the probability of the category that followed, where one did.

    >>> logits, known = torch.tensor([[[2.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    >>> likely, unlikely = (category_loss(logits, torch.tensor([[code]]), known) for code in (0, 1))
    >>> bool(likely < unlikely)
    True
    """
    each = -torch.log_softmax(logits, -1).gather(-1, code.unsqueeze(-1)).squeeze(-1)
    return torch.where(known, each, 0.0).mean(-1)


def event_loss(
    logit: Float[Tensor, "seed batch events"],
    happened: Bool[Tensor, "seed batch events"],
    known: Bool[Tensor, "seed batch events"],
) -> Float[Tensor, "seed"]:
    """-log of the probability of what happened, summed over independent events that may happen or not.

    >>> logit, yes = torch.full((1, 1, 1), 2.0), torch.ones(1, 1, 1, dtype=torch.bool)
    >>> bool(event_loss(logit, yes, yes) < event_loss(logit, ~yes, yes))
    True
    """
    each = F.binary_cross_entropy_with_logits(logit, happened.to(logit.dtype), reduction="none")
    return torch.where(known, each, 0.0).sum(-1).mean(-1)


def largest_deviation(
    mean: Float[Tensor, "seed member batch columns"], variance: Float[Tensor, "seed member batch columns"]
) -> Float[Tensor, "seed batch"]:
    """max over members of the root of E |x - expected|^2, where x is what the member states and `expected` what all expect on
    the average. Where they agree it is the largest root of the summed variances: Yu et al. (2020), section 4.3.

    >>> alike, apart = torch.zeros(1, 2, 1, 1), torch.tensor([[[[4.0]], [[-4.0]]]])
    >>> variance = torch.tensor([[[[9.0]], [[1.0]]]])
    >>> largest_deviation(alike, variance).item(), largest_deviation(apart, variance).item()
    (3.0, 5.0)
    """
    distance = mean - mean.mean(1, keepdim=True)
    return (variance + distance.square()).sum(-1).sqrt().amax(1)


def largest_distance(mean: Float[Tensor, "seed member batch columns"]) -> Float[Tensor, "seed batch"]:
    """max over pairs of members of the distance between what they expect: Kidambi et al. (2020), eq. 2.

    >>> largest_distance(torch.tensor([[[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 1.0]]]])).item()
    5.0
    """
    each = mean.transpose(1, 2)
    return torch.stack([(each - other).square().sum(-1).amax(-1) for other in each.split(1, 2)]).amax(0).sqrt()


def simulated_gap(
    everywhere: Float[Tensor, "seed member batch"], q_logged: Float[Tensor, "seed member real"]
) -> Float[Tensor, "seed member"]:
    """Mean of log sum_a exp Q(s, a) over simulated and logged observations, less the mean of Q(s, a) over logged pairs:
    Yu et al. (2021), eq. 3. Lowering it raises what was logged alone.

    >>> simulated_gap(torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[1.0]]])).item()
    2.0
    """
    return everywhere.mean(-1) - q_logged.mean(-1)
