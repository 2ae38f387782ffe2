"""One equation per function. Every loss is the mean over the batch for each seed: [seed, batch, ...] -> [seed]."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from offrl_models.distributions import Categorical, Distribution
from offrl_models.nets import masked, take
from offrl_models.parallel import batch_mean


def negative_log_likelihood(log_prob: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed"]:
    """Behavior cloning, from the logarithm of the probability or density of each logged action.

    >>> likely, unlikely = torch.tensor([[0.9]]).log(), torch.tensor([[0.1]]).log()
    >>> bool(negative_log_likelihood(likely) < negative_log_likelihood(unlikely))
    True
    """
    return -log_prob.mean(-1)


def td_target(
    reward: Float[Tensor, "seed batch *#draws"],
    discount: Float[Tensor, "seed batch *#draws"],
    next_value: Float[Tensor, "seed batch *#draws"],
) -> Float[Tensor, "seed batch *#draws"]:
    """r + gamma (1 - terminated) V(s'), held fixed; the value may be several numbers, such as quantiles.

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


def ensemble_error(q: Float[Tensor, "seed member batch"], target: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed"]:
    """Mean squared error of each member of an ensemble, summed: each learns as if alone.

    >>> ensemble_error(torch.tensor([[[1.0], [3.0]]]), torch.zeros(1, 1)).item()
    10.0
    """
    return squared_error(q, target.unsqueeze(1).expand_as(q)).sum(-1)


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


def binary_weight(advantage: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed batch"]:
    """1(advantage >= 0): Wang et al. (2020), eq. 3, whose sign at 0 would leave out the best action where it is compared to itself.

    >>> binary_weight(torch.tensor([[-0.1, 0.0, 7.0]])).tolist()
    [[0.0, 1.0, 1.0]]
    """
    return (advantage.detach() >= 0).to(advantage.dtype)


def standardized(values: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed batch"]:
    """Mean 0 and standard deviation 1 in each seed's batch.

    >>> standardized(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).round(decimals=3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    centered = values - batch_mean(values).unsqueeze(-1)
    return centered / (batch_mean(centered.square()).unsqueeze(-1).sqrt() + 1e-5)


def relative_q(q: Float[Tensor, "seed batch"]) -> Float[Tensor, "seed batch"]:
    """Q / mean |Q|, the mean held fixed, so that its weight does not depend on the scale of rewards: Fujimoto & Gu (2021), eq. 5.

    >>> relative_q(torch.tensor([[20.0, 40.0]])).sum().item()
    2.0
    """
    return q / batch_mean(q.detach().abs()).unsqueeze(-1).clamp(min=1e-6)


def squared_distance(policy: Distribution, action: Tensor) -> Float[Tensor, "seed batch"]:
    """|pi(s) - a|^2, where every dimension of an action runs from -1 to 1. A discrete action is a vector with a single 1, and
    pi(s) the vector of probabilities: the score of Brier (1950).

    >>> policy = Categorical(torch.tensor([[[0.8, 0.2]]]).log())
    >>> likely, unlikely = (squared_distance(policy, torch.tensor([[action]])).item() for action in (0, 1))
    >>> round(likely, 4), round(unlikely, 4)
    (0.08, 1.28)
    """
    if isinstance(policy, Categorical):
        probs = policy.probs
        return probs.square().sum(-1) - 2.0 * take(probs, action) + 1.0
    return (2.0 * (policy.greedy - action) / policy.width).square().sum(-1)


def smoothing_noise(uniform: Tensor, *, noise: float, clip: float) -> Tensor:
    """Normal numbers of standard deviation `noise`, cut off at +-`clip`, from numbers uniform on [0, 1).

    >>> [round(each, 3) for each in smoothing_noise(torch.tensor([0.0, 0.5, 0.8413]), noise=0.2, clip=0.5).tolist()]
    [-0.5, 0.0, 0.2]
    """
    return (noise * torch.special.ndtri(uniform.clamp(1e-6, 1.0 - 1e-6))).clamp(-clip, clip)


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


def quantile_midpoints(quantiles: int) -> Float[Tensor, "quantiles"]:
    """The levels whose quantiles are the best summary of a distribution: Dabney et al. (2018a), lemma 2.

    >>> quantile_midpoints(2).tolist()
    [0.25, 0.75]
    """
    return (torch.arange(quantiles) + 0.5) / quantiles


def quantile_huber(
    prediction: Float[Tensor, "seed batch quantiles"],
    target: Float[Tensor, "seed batch targets"],
    level: Float[Tensor, "#seed #batch quantiles"],
    *,
    threshold: float,
) -> Float[Tensor, "seed"]:
    """sum_i mean_j |level_i - 1(target_j < prediction_i)| huber(target_j - prediction_i): Dabney et al. (2018b), eq. 3.

    `threshold`, the paper's kappa, is where the Huber loss becomes linear; it is divided by it. A level above 0.5 pushes the
    prediction up.

    >>> zero, one, level = torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.tensor([[[0.9]]])
    >>> bool(quantile_huber(zero, one, level, threshold=1.0) > quantile_huber(one, zero, level, threshold=1.0))
    True
    """
    shape = (*prediction.shape, target.shape[-1])
    low, high = prediction.unsqueeze(-1).expand(shape), target.detach().unsqueeze(-2).expand(shape)
    weight = (level.unsqueeze(-1) - (high < low).to(low.dtype)).abs()
    each = weight * F.huber_loss(low, high, reduction="none", delta=threshold) / threshold
    return each.mean(-1).sum(-1).mean(-1)


def expected_value(
    q: Float[Tensor, "seed batch actions"], log_probs: Float[Tensor, "seed batch actions"]
) -> Float[Tensor, "seed batch"]:
    """sum_a pi(a | s) Q(s, a).

    >>> expected_value(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.25, 0.75]]]).log()).item()
    2.5
    """
    return (log_probs.exp() * q).sum(-1)


def soft_value(
    q: Float[Tensor, "seed batch actions"],
    log_probs: Float[Tensor, "seed batch actions"],
    temperature: Float[Tensor, "seed"],
) -> Float[Tensor, "seed batch"]:
    """sum_a pi(a | s) (Q(s, a) - temperature log pi(a | s)): Christodoulou (2019), eq. 10.

    >>> sure, even = torch.tensor([[[0.0, -1e9]]]), torch.full((1, 1, 2), 0.5).log()
    >>> bool(soft_value(torch.zeros(1, 1, 2), even, torch.ones(1)) > soft_value(torch.zeros(1, 1, 2), sure, torch.ones(1)))
    True
    """
    return expected_value(q - temperature[:, None, None] * log_probs, log_probs)


def temperature_loss(
    temperature: Float[Tensor, "seed"], entropy: Float[Tensor, "seed batch"], wanted: Float[Tensor, "seed batch"]
) -> Float[Tensor, "seed"]:
    """temperature (entropy - wanted), of a temperature or of its logarithm: Haarnoja et al. (2018),
    https://arxiv.org/abs/1812.05905, eq. 18. Too little entropy raises it.

    >>> temperature = torch.ones(1, requires_grad=True)
    >>> temperature_loss(temperature, torch.zeros(1, 1), torch.ones(1, 1)).sum().backward()
    >>> bool(temperature.grad < 0)
    True
    """
    return temperature * (entropy - wanted).detach().mean(-1)


def weighted_mean(
    weight: Float[Tensor, "seed batch"], value: Float[Tensor, "seed batch"], *, self_normalized: bool
) -> Float[Tensor, "seed"]:
    """Importance sampling, mean(w x), or self-normalised, sum(w x) / sum(w): Swaminathan & Joachims (2015).

    >>> weight, value = torch.full((1, 2), 3.0), torch.ones(1, 2)
    >>> [weighted_mean(weight, value, self_normalized=each).item() for each in (False, True)]
    [3.0, 1.0]
    """
    if not self_normalized:
        return (weight * value).mean(-1)
    return batch_mean(weight * value) / batch_mean(weight).clamp(min=torch.finfo(weight.dtype).tiny)


def soft_least(q: Float[Tensor, "seed member *batch"], *, pessimism: float) -> Float[Tensor, "seed *batch"]:
    """pessimism min + (1 - pessimism) max over members: Fujimoto et al. (2019), https://arxiv.org/abs/1812.02900, eq. 13.

    >>> q = torch.tensor([[[0.0], [1.0]]])
    >>> soft_least(q, pessimism=0.75).item()
    0.25
    """
    return torch.lerp(q.amax(1), q.amin(1), pessimism)


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
