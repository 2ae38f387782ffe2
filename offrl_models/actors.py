"""Networks that choose and that judge actions of either kind: discrete ones, or bounded continuous vectors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offrl_models.datasets.encoding import Encoded, Encoder, Observation
from offrl_models.distributions import Actions, Categorical, Distribution, head_of
from offrl_models.losses import smoothing_noise
from offrl_models.nets import MLP, SeedLinear, take

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

    low: Tensor
    width: Tensor

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
        self.members, self.n_actions = members, actions if isinstance(actions, int) else None
        each = [seed + MEMBER * member for seed in seeds for member in range(members)]
        self.net = MLP(each, name, encoder, hidden, self.n_actions or 1, layer_norm=layer_norm)
        if not isinstance(actions, int):
            self.acted = SeedLinear(each, name + "a", len(actions), hidden[0], bias=False)
            self.register_buffer("low", torch.as_tensor(actions[:, 0], dtype=torch.float32))
            self.register_buffer("width", torch.as_tensor(actions[:, 1] - actions[:, 0], dtype=torch.float32))

    def _encoded(self, observation: Observation) -> Encoded:
        """The observation once for each member of each seed."""
        encoded = observation if isinstance(observation, Encoded) else self.net.encode(observation)
        return encoded if self.members == 1 else Encoded(*(part.repeat_interleave(self.members, 0) for part in encoded))

    def each(self, observation: Observation) -> Float[Tensor, "seed member batch actions"]:
        """Q of every discrete action."""
        return self.net(self._encoded(observation)).unflatten(0, (-1, self.members))

    def forward(self, observation: Observation, action: Tensor) -> Float[Tensor, "seed member batch *draws"]:
        """Q of one action for each observation, [seed, batch] or [seed, batch, dimensions]; or of several continuous ones for
        each, [seed, batch, draws, dimensions], for which what is observed is looked at once."""
        if self.n_actions is not None:
            return take(self.each(observation), action.unsqueeze(1).expand(-1, self.members, -1))
        unit = (2.0 * (action - self.low) / self.width - 1.0).repeat_interleave(self.members, 0)
        seen = self.net.first(self._encoded(observation))
        if unit.dim() == 3:
            return self.net.after(seen + self.acted(unit)).squeeze(-1).unflatten(0, (-1, self.members))
        hidden = seen.unsqueeze(2) + self.acted(unit.flatten(1, 2)).unflatten(1, unit.shape[1:3])
        found = self.net.after(hidden.flatten(1, 2)).unflatten(1, unit.shape[1:3])
        return found.squeeze(-1).unflatten(0, (-1, self.members))


def expected_q(
    critic: Critic, observation: Observation, policy: Distribution, uniform: Tensor | None
) -> Float[Tensor, "seed member batch"]:
    """E[Q(s, a)] for a of the policy: exact over discrete actions, else the mean of as many draws as `uniform` has.

    `uniform` [seed, batch, draws, 1 + dimensions] is not looked at where actions are discrete.
    """
    if isinstance(policy, Categorical):
        return (critic.each(observation) * policy.log_probs.exp().unsqueeze(1)).sum(-1)
    assert uniform is not None
    return critic(observation, policy.draws(uniform)).mean(-1)


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


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """What is computed inside passes gradients through a network and takes none of its weights, which also saves their cost."""
    parameters = [each for each in network.parameters() if each.requires_grad]
    for each in parameters:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in parameters:
            each.requires_grad_(True)
