"""Networks that choose and that judge actions of either kind: discrete ones, or bounded continuous vectors."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.distributions import Actions, Categorical, Distribution, LogisticMixture, head_of
from offrl_models.losses import expected_value, smoothing_noise, soft_value, temperature_loss
from offrl_models.nets import MLP, Box, JointMLP, take

MEMBER = 7_919_000_003  # far apart: no member of one seed starts like a member of another


class Actor(nn.Module):
    """A network whose outputs are a distribution over actions; over continuous ones a mixture of `components`, or, with
    `exploration`, one action with a density of that width around it."""

    def __init__(
        self,
        seeds: Sequence[int],
        name: str,
        encoder: Encoder,
        hidden: Sequence[int],
        actions: Actions,
        components: int | None = None,
        exploration: float | None = None,
    ):
        super().__init__()
        self.head = head_of(actions, components, exploration)
        self.net = MLP(seeds, name, encoder, hidden, self.head.outputs)

    def forward(self, observation: Observation, mask: Tensor | None) -> Distribution:
        """The policy at every observation, [seed, batch]; a mask, which continuous actions do not have, is not looked at."""
        return self.head(self.net(observation), mask)


class Critic(nn.Module):
    """Several Q functions of an observation and an action, in one pass."""

    def __init__(
        self,
        seeds: Sequence[int],
        name: str,
        encoder: Encoder,
        hidden: Sequence[int],
        actions: Actions,
        members: int,
        *,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.members, self.encode = members, encoder
        each = [seed + MEMBER * member for seed in seeds for member in range(members)]
        if isinstance(actions, int):
            self.net = MLP(each, name, encoder, hidden, actions, layer_norm=layer_norm)
        else:
            self.net = JointMLP(each, name, encoder, hidden, len(actions), 1, layer_norm=layer_norm)
            self.box = Box(actions)

    def last_bias(self) -> Tensor:
        """What is added to every value, [seed * members, 1, actions]; of continuous actions, [seed * members, 1, 1]."""
        return self.net.last_bias() if isinstance(self.net, MLP) else self.net.seen.last_bias()

    def _encoded(self, observation: Observation) -> Encoded:
        """The observation once for each member of each seed."""
        encoded = observation if isinstance(observation, Encoded) else self.encode(observation)
        return encoded if self.members == 1 else Encoded(*(part.repeat_interleave(self.members, 0) for part in encoded))

    def _unit(self, action: Tensor) -> Tensor:
        """The action once for each member of each seed, where every dimension runs from -1 to 1."""
        return self.box.unit(action).repeat_interleave(self.members, 0)

    def each(self, observation: Observation) -> Float[Tensor, "seed member batch actions"]:
        """Q of every discrete action."""
        return self.net(self._encoded(observation)).unflatten(0, (-1, self.members))

    def forward(self, observation: Observation, action: Tensor) -> Float[Tensor, "seed member batch *draws"]:
        """Q of one action for each observation, [seed, batch] or [seed, batch, dimensions]; or of several continuous ones for
        each, [seed, batch, draws, dimensions], for which what is observed is looked at once."""
        if isinstance(self.net, MLP):
            return take(self.each(observation), action.unsqueeze(1).expand(-1, self.members, -1))
        found = self.net(self._encoded(observation), self._unit(action))
        return found.squeeze(-1).unflatten(0, (-1, self.members))

    def with_slopes(
        self, observation: Observation, action: Float[Tensor, "seed batch dimensions"]
    ) -> tuple[Float[Tensor, "seed member batch"], Float[Tensor, "seed member batch dimensions"]]:
        """Q of an action for each observation, and its gradient with respect to the action where every dimension runs from -1
        to 1: in one pass, and such that the gradient can be trained."""
        unit = self._unit(action).requires_grad_()
        q = self.net(self._encoded(observation), unit).squeeze(-1)
        (slope,) = torch.autograd.grad(q.sum(), unit, create_graph=True)
        return q.unflatten(0, (-1, self.members)), slope.unflatten(0, (-1, self.members))


class Temperature(nn.Module):
    """The weight of the entropy in the objective of each seed, learned as its logarithm."""

    def __init__(self, seeds: Sequence[int], initial: float = 1.0):
        super().__init__()
        self.log = nn.Parameter(torch.full((len(seeds),), math.log(initial)))

    def forward(self) -> Float[Tensor, "seed"]:
        """Held fixed: only the loss of the temperature trains it."""
        return self.log.detach().exp()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradients flow through these networks, and not into them; what that would have cost is not computed."""
    owned = [
        (owner, name, each)
        for module in modules
        for owner in module.modules()
        for name, each in owner._parameters.items()
        if each is not None
    ]
    for owner, name, each in owned:
        owner._parameters[name] = each.detach()  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for owner, name, each in owned:
            owner._parameters[name] = each


def expected_q(
    critic: Critic, observation: Observation, policy: Distribution, uniform: Tensor | None
) -> Float[Tensor, "seed member batch"]:
    """E[Q(s, a)] for a of the policy: exact over discrete actions, else the mean of as many draws as `uniform` has.

    `uniform` [seed, batch, draws, 1 + dimensions] is not looked at where actions are discrete.
    """
    if isinstance(policy, Categorical):
        return (critic.each(observation) * policy.probs.unsqueeze(1)).sum(-1)
    assert uniform is not None
    return critic(observation, policy.sample(uniform)).mean(-1)


def decided_q(critic: Critic, observation: Observation, policy: Distribution) -> Float[Tensor, "seed member batch"]:
    """Q of what a deterministic policy does. Over discrete actions it has probabilities, and this is E[Q(s, a)]."""
    if isinstance(policy, Categorical):
        return expected_q(critic, observation, policy, None)
    return critic(observation, policy.greedy)


def smoothed(policy: Distribution, uniform: Tensor | None, *, noise: float, clip: float) -> Distribution:
    """A deterministic policy whose actions are shifted by noise and kept inside their bounds: Fujimoto, van Hoof & Meger
    (2018), eq. 14. Discrete actions have no neighbors, and such a policy stays as it is.

    `noise` and `clip` hold where an action runs from -1 to 1; `uniform` is [seed, batch, 1, 1 + dimensions].
    """
    if isinstance(policy, Categorical):
        return policy
    assert uniform is not None
    shift = smoothing_noise(uniform[..., 1:], noise=noise, clip=clip) / 2  # centers run from 0 to 1
    return policy._replace(center=(policy.center + shift).clamp(0.0, 1.0))


def shares(uniform: Tensor | None, *draws: int) -> tuple[Tensor | None, ...]:
    """The random numbers that each of several purposes gets, which want so many draws each."""
    return (None,) * len(draws) if uniform is None else uniform.split(draws, -2)


def soft_actor_losses(
    policy: LogisticMixture, critic: Critic, temperature: Temperature, observation: Observation, uniform: Tensor
) -> dict[str, Float[Tensor, "seed"]]:
    """Of a policy, which seeks the least value of several critics and entropy, and of the weight of the entropy.

    Haarnoja et al. (2018), https://arxiv.org/abs/1812.05905, eq. 9 and 18. `uniform` [seed, batch, draws, 1 + dimensions] is what
    actions are drawn at. As is usual the entropy aimed at is -1 per dimension, where every dimension runs from -1 to 1.
    """
    action, log_prob = policy.sample_and_log_prob(uniform)
    wanted = torch.full_like(log_prob.flatten(1), -float(action.shape[-1]))
    with frozen(critic):
        least = critic(observation, action).amin(1)
    return {
        "policy": (temperature()[:, None, None] * log_prob - least).mean((1, 2)),
        "temperature": temperature_loss(temperature.log, -log_prob.flatten(1), wanted),
    }


def soft_losses(
    policy: Distribution,
    critic: Critic,
    temperature: Temperature,
    observation: Observation,
    mask: Tensor,
    uniform: Tensor,
    *,
    entropy_share: float,
) -> dict[str, Float[Tensor, "seed"]]:
    """`soft_actor_losses` over actions of either kind: over discrete ones of Christodoulou (2019), with an entropy aimed at that
    is a share of the greatest one among the actions a mask allows. Continuous actions have no use for that share."""
    if not isinstance(policy, Categorical):
        return soft_actor_losses(policy, critic, temperature, observation, uniform)
    with torch.no_grad():
        least = critic.each(observation).amin(1)
    log_probs = policy.log_probs
    wanted = entropy_share * mask.sum(-1).log()
    return {
        "policy": -soft_value(least, log_probs, temperature()).mean(-1),
        "temperature": temperature_loss(temperature.log, -expected_value(log_probs, log_probs), wanted),
    }


def soft_next_value(
    policy: Distribution, critic: Critic, temperature: Tensor, observation: Observation, uniform: Tensor
) -> Float[Tensor, "seed batch"]:
    """The least value of several critics at actions of the policy, less `temperature` [seed] for each unit of log-probability:
    exact over discrete actions, else at one draw. `uniform` is [seed, batch, 1, 1 + dimensions]."""
    with torch.no_grad():
        if isinstance(policy, Categorical):
            return soft_value(critic.each(observation).amin(1), policy.log_probs, temperature)
        action, log_prob = policy.sample_and_log_prob(uniform)
        return (critic(observation, action).amin(1) - temperature[:, None, None] * log_prob).squeeze(-1)
