"""Distributions that are drawn from, and critics of either kind of action."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.actors import Actor, Critic, expected_q
from offrl_models.datasets.encoding import Encoder
from offrl_models.distributions import Categorical, LogisticMixture, MixtureHead
from tests.conftest import codes

BOUNDS = np.array([[-1.0, 3.0], [0.0, 0.5]])


def head(seed: int, components: int) -> LogisticMixture:
    """Components far out and narrow ones, too."""
    outputs = MixtureHead(BOUNDS, components).double()
    generator = torch.Generator().manual_seed(seed)
    return outputs(2.0 * torch.randn(1, 1, outputs.outputs, generator=generator, dtype=torch.float64))


def over_draws(policy: LogisticMixture) -> LogisticMixture:
    weight, center, log_scale = (part.unsqueeze(2) for part in policy[:3])
    return LogisticMixture(weight, center, log_scale, policy.low, policy.width)


@given(st.integers(0, 300))
def test_a_draw_of_one_component_is_the_inverse_of_its_distribution_function(seed: int) -> None:
    policy = head(seed, 1)
    uniform = torch.rand(1, 1, 50, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    action = policy.sample(uniform)
    share = over_draws(policy).conditionals(action)[1]
    inside = (action - policy.low).minimum(policy.low + policy.width - action).amin(-1) > 1e-9
    assert (action >= policy.low).all() and (action <= policy.low + policy.width).all()
    assert inside.any() and (share - uniform[..., 1:])[inside].abs().max() < 1e-6


def test_draws_of_a_mixture_are_distributed_like_it() -> None:
    """By its own distribution function, given the dimension before: uniform, and independent."""
    policy = head(3, 4)
    uniform = torch.rand(1, 1, 20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = over_draws(policy).conditionals(policy.sample(uniform))[1][0, 0].numpy()
    for column in share.T:
        assert stats.kstest(column, "uniform").statistic < 0.012
    assert abs(np.corrcoef(share.T)[0, 1]) < 0.03


def test_draws_of_a_categorical_are_distributed_like_it() -> None:
    probs = torch.tensor([[[0.2, 0.0, 0.5, 0.3]]])
    uniform = torch.linspace(0, 1, 10_001)[:-1].reshape(1, 1, -1, 1)
    found = torch.bincount(Categorical(probs.log()).sample(uniform).flatten(), minlength=4) / 10_000
    assert found.numpy() == pytest.approx([0.2, 0.0, 0.5, 0.3], abs=1e-3)
    assert Categorical(probs.log()).greedy.item() == 2


def test_draws_follow_their_center_and_scale() -> None:
    policy = head(5, 1)
    center = torch.full_like(policy.center, 0.4).requires_grad_()
    action = policy._replace(center=center).sample(torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64))
    action.sum().backward()
    assert center.grad is not None and (center.grad > 0).all()
    assert policy.greedy.shape == (1, 1, 2)


def test_a_critic_looks_at_several_actions_as_at_each_alone() -> None:
    encoder = Encoder(codes(None, 3))
    critic = Critic([0, 1], "q", encoder, (8, 8), BOUNDS, members=3)
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([torch.randn(2, 5, 1, generator=generator), torch.ones(2, 5, 1)], -1)
    action = torch.rand(2, 5, 4, 2, generator=generator)
    together = critic(seen, action)
    assert together.shape == (2, 3, 5, 4)
    for place in range(4):
        assert torch.allclose(together[..., place], critic(seen, action[:, :, place]), atol=1e-6)
    assert (
        len({tuple(each.tolist()) for each in together.flatten(0, 1).flatten(1)}) == 2 * 3
    )  # no two members are alike


def test_the_first_layer_of_a_critic_starts_as_that_of_observation_and_action_together() -> None:
    """Two numbers, a category of 3 and two dimensions of an action: within 1 / sqrt(5), as published critics do."""
    encoder = Encoder(codes(None, None, 3))
    continuous, discrete = (
        dict(Critic([0, 1], "q", encoder, (400,), actions, members=2).named_parameters()) for actions in (BOUNDS, 3)
    )
    for part in ("seen.first.weight", "seen.first.table", "seen.first.bias", "joined.weight"):
        assert 0.98 / 5**0.5 < continuous[f"net.{part}"].abs().max() <= 1 / 5**0.5, part
    assert 0.98 / 3**0.5 < discrete["net.first.weight"].abs().max() <= 1 / 3**0.5  # the observation alone


def test_a_discrete_critic_gives_the_value_of_the_action_and_of_each() -> None:
    critic = Critic([0, 1], "q", Encoder(codes(None)), (8,), 3, members=2)
    seen, action = torch.randn(2, 5, 1), torch.randint(3, (2, 5))
    each = critic.each(seen)
    for member in range(2):
        assert torch.equal(critic(seen, action)[:, member], each[:, member].gather(-1, action[..., None])[..., 0])
    probs = torch.rand(2, 5, 3).softmax(-1)
    expected = expected_q(critic, seen, Categorical(probs.log()), None)
    assert torch.allclose(expected, (each * probs[:, None]).sum(-1), atol=1e-6)


def test_an_actor_has_a_density_or_probabilities() -> None:
    encoder, seen = Encoder(codes(None)), torch.randn(2, 5, 1)
    discrete = Actor([0, 1], "p", encoder, (8,), 3)(seen, torch.ones(2, 5, 3, dtype=torch.bool))
    assert isinstance(discrete, Categorical) and discrete.probs.sum(-1).detach().numpy() == pytest.approx(1.0, abs=1e-6)
    continuous = Actor([0, 1], "p", encoder, (8,), BOUNDS, components=2)(seen, None)
    assert isinstance(continuous, LogisticMixture) and continuous.center.shape == (2, 5, 2, 2)
