"""One equation per function. Every loss is the mean over the batch for each seed: [seed, batch, ...] -> [seed]."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offrl_models.nets import masked, take


def negative_log_likelihood(log_prob: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed"]:
    """Behavior cloning, from the logarithm of the probability or density of each logged action.

    >>> likely, unlikely = torch.tensor([[0.9]]).log(), torch.tensor([[0.1]]).log()
    >>> bool(negative_log_likelihood(likely) < negative_log_likelihood(unlikely))
    True
    """
    return -log_prob.mean(-1)


def td_target(
    reward: Float[Tensor, "seed batch"], discount: Float[Tensor, "seed batch"], next_value: Float[Tensor, "seed batch"]
) -> Float[Tensor, "seed batch"]:
    """r + gamma (1 - terminated) V(s'), held fixed.

    >>> td_target(torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 7.0)).item()
    1.0
    """
    return (reward + discount * next_value).detach()


def squared_error(
    prediction: Float[Tensor, "*seed batch"], target: Float[Tensor, "*seed batch"]
) -> Float[Tensor, "*seed"]:
    """Mean squared error.

    >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).item()
    5.0
    """
    return F.mse_loss(prediction, target, reduction="none").mean(-1)


def huber(prediction: Float[Tensor, "seed batch"], target: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed"]:
    """Quadratic up to an error of 1, linear beyond it.

    >>> huber(torch.tensor([[3.0]]), torch.zeros(1, 1)).item()
    2.5
    """
    return F.huber_loss(prediction, target, reduction="none").mean(-1)


def expectile_loss(
    value: Float[Tensor, "seed batch"], target: Float[Tensor, "seed batch"], *, expectile: float
) -> Float[Tensor, "seed"]:
    """|expectile - 1(target < value)| (target - value)^2: Kostrikov et al. (2021), eq. 5. Above 0.5 it pushes the value up.

    >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    >>> bool(expectile_loss(zero, one, expectile=0.9) > expectile_loss(one, zero, expectile=0.9))
    True
    """
    error = target.detach() - value
    weight = torch.where(error < 0, 1.0 - expectile, expectile)
    return (weight * error.square()).mean(-1)


def advantage_weight(
    advantage: Float[Tensor, "seed batch"], *, inverse_temperature: float, max_weight: float
) -> Float[Tensor, "seed batch"]:
    """min(exp(inverse_temperature * advantage), max_weight), held fixed: Kostrikov et al. (2021), eq. 7.

    >>> advantage_weight(torch.tensor([[0.0, 100.0]]), inverse_temperature=3.0, max_weight=20.0).tolist()
    [[1.0, 20.0]]
    """
    return torch.exp(inverse_temperature * advantage.detach()).clamp(max=max_weight)


def conservative_gap(
    q: Float[Tensor, "seed batch actions"],
    action: Int64[Tensor, "seed batch"],
    mask: Bool[Tensor, "seed batch actions"],
) -> Float[Tensor, "seed"]:
    """log sum_a exp Q(s, a) - Q(s, a_logged), over allowed actions: Kumar et al. (2020), eq. 4, CQL(H).

    Lowering it lowers actions that were not taken.

    >>> q = torch.tensor([[[0.0, 5.0]]])
    >>> logged, other = torch.tensor([[1]]), torch.tensor([[0]])
    >>> allowed = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> bool(conservative_gap(q, logged, allowed) < conservative_gap(q, other, allowed))
    True
    """
    return (torch.logsumexp(masked(q, mask), -1) - take(q, action)).mean(-1)


def sampled_conservative_gap(
    q: Float[Tensor, "seed member batch draws"],
    log_density: Float[Tensor, "seed 1 batch draws"],
    q_logged: Float[Tensor, "seed member batch"],
) -> Float[Tensor, "seed member"]:
    """log of the integral of exp Q(s, a) over a, less Q(s, a_logged): Kumar et al. (2020), eq. 4 and appendix F.

    The integral is the mean of exp Q(s, a) / density(a) over draws, each by the density it was drawn from.

    >>> q = torch.tensor([[[[0.0, 5.0]]]])
    >>> gap = lambda logged: sampled_conservative_gap(q, torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), logged))
    >>> bool(gap(5.0) < gap(0.0))
    True
    """
    return (torch.logsumexp(q - log_density, -1) - math.log(q.shape[-1]) - q_logged).mean(-1)


def double_q_value(
    target_q: Float[Tensor, "seed batch actions"],
    online_q: Float[Tensor, "seed batch actions"],
    allowed: Bool[Tensor, "seed batch actions"],
) -> Float[Tensor, "seed batch"]:
    """The slow network's value of the action that the fast one prefers among those allowed: van Hasselt et al. (2016).

    >>> slow, fast = torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[0.0, 1.0, 8.0]]])
    >>> double_q_value(slow, fast, torch.tensor([[[True, True, False]]])).item()
    2.0
    """
    return take(target_q, masked(online_q, allowed).argmax(-1))


def soft_least(q: Float[Tensor, "seed member *batch"], *, pessimism: float) -> Float[Tensor, "seed *batch"]:
    """pessimism min + (1 - pessimism) max over members: Fujimoto et al. (2019), https://arxiv.org/abs/1812.02900, eq. 13.

    >>> q = torch.tensor([[[0.0], [1.0]]])
    >>> soft_least(q, pessimism=0.75).item()
    0.25
    """
    return torch.lerp(q.amax(1), q.amin(1), pessimism)


def temperature_loss(
    log_temperature: Float[Tensor, "seed"], log_prob: Float[Tensor, "seed batch"], *, target_entropy: float
) -> Float[Tensor, "seed"]:
    """-log_temperature (log_prob + target_entropy): Haarnoja et al. (2018), https://arxiv.org/abs/1812.05905, eq. 18, for the
    logarithm of the temperature. It raises the temperature where the entropy, the mean of -log_prob, is below its target.

    >>> low = torch.zeros(1, requires_grad=True)
    >>> temperature_loss(low, torch.full((1, 1), 3.0), target_entropy=-1.0).sum().backward()
    >>> bool(low.grad < 0)
    True
    """
    return -log_temperature * (log_prob.detach().mean(-1) + target_entropy)


def diversity_loss(slope: Float[Tensor, "seed member batch dimensions"]) -> Float[Tensor, "seed"]:
    """Sum over pairs i != j of cos(dQ_i/da, dQ_j/da) / (members - 1): An et al. (2021), eq. 6. Lowering it makes members disagree.

    The sum over pairs is the square of the sum less the sum of squares.

    >>> alike, opposed = torch.tensor([[[[1.0]], [[2.0]]]]), torch.tensor([[[[1.0]], [[-2.0]]]])
    >>> diversity_loss(alike).item() > 0 > diversity_loss(opposed).item()
    True
    """
    direction = F.normalize(slope, dim=-1, eps=1e-6)
    pairs = direction.sum(1).square().sum(-1) - direction.square().sum((1, 3))
    return pairs.mean(-1) / (slope.shape[1] - 1)
