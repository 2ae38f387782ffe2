"""What the algorithms with critics of continuous actions find, and the parts they are made of."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.actors import Critic, Temperature, frozen, soft_actor_losses
from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Sampler, Transitions
from offrl_models.distributions import LogisticMixture, MixtureHead
from offrl_models.learner import TrainingConfig, train
from offrl_models.losses import diversity_loss, sampled_conservative_gap, soft_least, squared_error
from offrl_models.nets import Box, best_of, likely_enough
from offrl_models.schema import Episodes, InputError
from offrl_models.training import fit
from offrl_models.vae import ActionVAE, Perturbation, normal
from tests.conftest import codes
from tests.test_algorithms import EPISODES, build, reaching, sampled, trained

LOW, WIDTH = np.array([0.0, -1.0]), np.array([1.0, 2.0])  # of the actions of `reaching`
BOUNDS = np.stack([LOW, LOW + WIDTH], 1)
QUICK: dict[str, Any] = {"hidden": (32, 32), "learning_rate": 0.005}
SETTINGS: dict[str, dict[str, Any]] = {
    "sac_n": {"members": 5},
    "edac": {"members": 5, "diversity": 0.1},
    "cql": {"actor_learning_rate": 0.005, "alpha": 0.1, "samples": 4},
    "bcq": {"vae_hidden": (32, 32), "samples": 20},
    "mcq": {"vae_hidden": (32, 32)},
}


def narrow(episodes: int, seed: int) -> Episodes:
    """The middle fifth of each dimension alone is in the log; more is better there, and what is beyond it nobody knows."""
    log, rng = reaching(episodes, seed), np.random.default_rng(seed)
    share = 0.4 + 0.2 * rng.random(log.action.shape)
    action = (LOW + share * WIDTH).astype(np.float32)
    return dataclasses.replace(log, action=action, reward=share.mean(1), action_prob=np.full(len(share), 12.5))


def greedy(name: str, log: Episodes, settings: dict[str, Any], seeds: int = 2) -> np.ndarray:
    """What some seeds, trained for a second, think best in the first rows: as shares of the range, [seed, rows, dimensions]."""
    algorithm, _ = fit(
        name, make_config(name, {**QUICK, **settings}, "continuous"), log, Encoder(log.features), seeds=range(seeds),
        gradient_steps=400, batch_size=128,
    )  # fmt: skip
    with torch.no_grad():
        found = algorithm.distribution(torch.as_tensor(log.observation[:500]).expand(seeds, -1, -1), None).greedy
    return (found.numpy() - LOW) / WIDTH


@pytest.mark.parametrize("name", SETTINGS)
def test_where_the_log_shows_everything_the_policy_does_what_is_best(name: str) -> None:
    """A policy that does not look errs by 0.25 at least; behavior cloning by 0.33."""
    log = reaching(500, 1)
    error = np.abs(greedy(name, log, SETTINGS[name]) - log.observation[:500])
    assert error.mean() < (0.13 if name == "bcq" else 0.1)  # bcq has twenty proposals to choose from


@pytest.mark.parametrize(
    ("name", "settings", "limit"),
    [
        ("edac", {"diversity": 1.0}, 0.1),
        ("cql", {"alpha": 0.3}, 0.01),
        ("bcq", {}, 0.01),
        ("mcq", {}, 0.05),
    ],
)
def test_where_the_log_shows_little_the_policy_keeps_to_it(name: str, settings: dict[str, Any], limit: float) -> None:
    """The median of five seeds: of mcq and edac one in ten has not found back by then."""
    found = greedy(name, narrow(300, 1), {**SETTINGS[name], **settings}, seeds=5)
    assert np.median(np.abs(found - found.clip(0.4, 0.6)).mean((1, 2))) < limit


def test_a_plain_critic_believes_in_what_the_log_does_not_show() -> None:
    """What the conservative term and the many critics are for."""
    for name, settings in (("cql", {"alpha": 0.0}), ("sac_n", {"members": 2})):
        found = greedy(name, narrow(300, 1), {**SETTINGS[name], **settings})
        assert np.abs(found - found.clip(0.4, 0.6)).mean() > 0.2


def test_edac_without_diversity_is_sac_n() -> None:
    log = reaching(50, 1)
    one = trained(build("edac", [0], "continuous", diversity=0.0), [0], 20, log)
    other = trained(build("sac_n", [0], "continuous"), [0], 20, log)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_diversity_makes_critics_disagree() -> None:
    log = reaching(100, 1)

    def alike(**settings: Any) -> float:
        """Mean cosine of the slopes of two members at what the log shows."""
        algorithm = trained(build("edac", [0], "continuous", hidden=(32,), members=3, **settings), [0], 200, log)
        (batch,) = Transitions(log, Encoder(log.features)).batches(sampled(algorithm, [0], log)[1], 1)
        return float(diversity_loss(algorithm.q.with_slopes(batch.observation, batch.action)[1]).detach())

    assert alike(diversity=1.0) < alike(diversity=0.0) - 0.5


def test_slopes_of_a_critic_are_its_differences() -> None:
    critic: Any = Critic([0, 1], "q", Encoder(codes(None, None)), (8, 8), BOUNDS, members=3).double()
    seen, action = torch.rand(2, 5, 2, dtype=torch.float64), torch.rand(2, 5, 2, dtype=torch.float64)
    q, slope = critic.with_slopes(seen, action)
    assert torch.equal(q, critic(seen, action))
    for dimension in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[dimension] = 1e-6 * WIDTH[dimension] / 2.0  # of an action that is 2 wide
        difference = (critic(seen, action + step) - critic(seen, action - step)) / 2e-6
        assert torch.allclose(difference, slope[..., dimension], atol=1e-6)
    slope.square().sum().backward()
    assert all(layer.grad is not None for layer in critic.net.joined.parameters())


def test_diversity_is_the_mean_cosine_of_all_pairs() -> None:
    slope = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    cosine = torch.cosine_similarity(slope[:, :, None], slope[:, None], dim=-1)  # [seed, member, member, batch]
    pairs = cosine.sum((1, 2)) - torch.diagonal(cosine, dim1=1, dim2=2).sum(-1)
    assert torch.allclose(diversity_loss(slope), pairs.mean(-1) / 3.0)


def policy(seed: int) -> LogisticMixture:
    head = MixtureHead(BOUNDS, 1).double()
    generator = torch.Generator().manual_seed(seed)
    return head(torch.randn(1, 4, head.outputs, generator=generator, dtype=torch.float64))


def test_density_of_draws_is_per_unit_of_an_action_two_wide() -> None:
    uniform = torch.rand(1, 4, 6, 3, dtype=torch.float64)
    action, log_prob = policy(0).sample_and_log_prob(uniform)
    for draw in range(6):
        wanted = policy(0).log_prob(action[:, :, draw]) + float(np.log(WIDTH / 2.0).sum())
        assert torch.allclose(log_prob[..., draw], wanted)


def test_the_gap_over_draws_of_a_density_proportional_to_exp_q_is_exact() -> None:
    """exp(Q) / density is then one number everywhere: 2.5 here, whatever is drawn."""
    _, log_density = policy(1).sample_and_log_prob(torch.rand(1, 4, 7, 3, dtype=torch.float64))
    q = (log_density + np.log(2.5)).unsqueeze(1).expand(-1, 2, -1, -1)
    logged = torch.full((1, 2, 4), 0.5, dtype=torch.float64)
    found = sampled_conservative_gap(q, log_density.unsqueeze(1), logged)
    assert found.numpy() == pytest.approx(np.log(2.5) - 0.5)


def test_uniform_draws_integrate_over_actions_two_wide() -> None:
    """The integral of exp(Q) over [-1, 1] for Q(a) = a is e - 1/e."""
    middles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 - 1.0
    found = sampled_conservative_gap(
        middles[None, None, None], torch.full((1, 1, 1, 2000), -np.log(2.0)), torch.zeros(1, 1, 1)
    )
    assert found.item() == pytest.approx(np.log(np.e - 1 / np.e), abs=1e-6)


def test_the_gap_of_a_critic_that_is_zero_is_the_volume_of_the_actions() -> None:
    """Its logarithm: two dimensions from -1 to 1, twice for two critics."""
    log, gaps = reaching(50, 1), {}
    for alpha in (0.0, 1.0):
        algorithm = build("cql", [0], "continuous", alpha=alpha)
        with torch.no_grad():
            for parameter in [*algorithm.q.parameters(), *algorithm.policy.parameters()]:
                parameter.zero_()
            algorithm.policy.net.last_bias()[..., -2:] = 5.0  # so wide that the policy is nearly uniform
        (batch,) = Transitions(log, Encoder(log.features)).batches(sampled(algorithm, [0], log)[1], 1)
        gaps[alpha] = algorithm.losses(batch)["q"].item()
    assert gaps[1.0] - gaps[0.0] == pytest.approx(2 * 2 * np.log(2.0), abs=0.01)


def test_the_gap_of_a_critic_that_is_zero_is_the_number_of_discrete_actions() -> None:
    gaps = {}
    for alpha in (0.0, 1.0):
        algorithm = build("cql", [0], alpha=alpha)
        for parameter in algorithm.q.parameters():
            torch.nn.init.zeros_(parameter)
        (batch,) = Transitions(EPISODES, Encoder(EPISODES.features)).batches(sampled(algorithm, [0], EPISODES)[1], 1)
        gaps[alpha] = algorithm.losses(batch)["q"].item()
    assert gaps[1.0] - gaps[0.0] == pytest.approx(np.log(3.0), abs=1e-5)


def test_a_frozen_network_lets_gradients_through() -> None:
    critic, action = Critic([0], "q", Encoder(codes(None)), (8,), BOUNDS, members=2), torch.rand(1, 3, 2)
    still = dict(critic.named_parameters())["net.seen.first.table"].requires_grad_(
        False
    )  # nor does it train afterwards
    action.requires_grad_()
    with frozen(critic):
        critic(torch.rand(1, 3, 1), action).sum().backward()
    assert action.grad is not None and bool(action.grad.any())
    assert all(each.grad is None for each in critic.parameters())
    assert all(each.requires_grad == (each is not still) for each in critic.parameters())


def test_an_actor_seeks_the_least_value_and_the_temperature_its_entropy() -> None:
    critic, temperature = Critic([0], "q", Encoder(codes(None)), (8,), BOUNDS, members=3), Temperature([0])
    seen, uniform = torch.rand(1, 4, 1), torch.rand(1, 4, 2, 3)
    chosen = LogisticMixture(*(part.float() for part in policy(2)))
    found = soft_actor_losses(chosen, critic, temperature, seen, uniform)
    action, log_prob = chosen.sample_and_log_prob(uniform)
    wanted = (log_prob - critic(seen, action).amin(1)).mean()
    assert found["policy"].item() == pytest.approx(wanted.item(), abs=1e-5)
    found["temperature"].sum().backward()
    assert temperature.log.grad is not None
    assert temperature.log.grad.item() == pytest.approx(2.0 - log_prob.mean().item(), abs=1e-5)


def test_proposals_are_like_the_log() -> None:
    log = narrow(300, 2)

    class Cloned(torch.nn.Module):
        targets, target_update, draws = {}, (1.0, 1), 2

        def __init__(self) -> None:
            super().__init__()
            self.vae = ActionVAE([0, 1], Encoder(log.features), (32, 32), BOUNDS, 50)

        def learning_rates(self) -> dict[str, float]:
            return {"vae": 0.005}

        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"vae": self.vae.loss(batch.observation, batch.action, batch.uniform, kl_weight=0.5)}

    cloned, transitions = Cloned(), Transitions(log, Encoder(log.features))
    train(cloned, transitions, Sampler([transitions.rows] * 2, 64, [0, 1], 2, 3), TrainingConfig(gradient_steps=300))
    with torch.no_grad():
        found = cloned.vae.spread(torch.as_tensor(log.observation[:100]).expand(2, -1, -1)).numpy()
    share = (found - LOW) / WIDTH
    assert share.shape == (2, 100, 50, 2)
    assert np.abs(share - share.clip(0.35, 0.65)).max() < 0.02


def test_latents_are_standard_normal_and_the_fixed_ones_are_those_of_every_seed() -> None:
    found = normal(torch.rand(1, 20_000, 4, 3, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (1, 20_000, 2, 4)
    assert found.mean((0, 1)).numpy() == pytest.approx(np.zeros((2, 4)), abs=0.03)
    assert found.std((0, 1)).numpy() == pytest.approx(np.ones((2, 4)), abs=0.03)
    assert np.abs(np.corrcoef(found.reshape(-1, 8).T) - np.eye(8)).max() < 0.03
    first, second = (ActionVAE([seed], Encoder(codes(None)), (4,), BOUNDS, 9).latents for seed in (0, 1))
    assert torch.equal(first, second) and len(first.unique()) == first.numel()


def test_a_perturbation_moves_no_further_than_its_flexibility_and_stays_inside() -> None:
    moved = Perturbation([0], Encoder(codes(None)), (8,), BOUNDS, 0.1)
    torch.nn.init.constant_(moved.net.seen.last_bias(), 100.0)
    seen, unit = torch.rand(1, 2, 1), torch.tensor([[[[0.0, -1.0]], [[0.95, 1.0]]]])
    box = Box(BOUNDS)
    found = box.unit(moved(seen, box.vector(unit)))
    assert found.detach().numpy() == pytest.approx(np.array([[[[0.1, -0.9]], [[1.0, 1.0]]]]), abs=1e-6)


def test_bcq_deploys_a_density_around_its_best_proposal() -> None:
    algorithm = build("bcq", [0, 1], "continuous", exploration=0.05, samples=7)
    seen = torch.rand(2, 5, 2)
    with torch.no_grad():
        proposed = algorithm.perturbation(seen, algorithm.vae.spread(seen))
        q, policy = algorithm.q(seen, proposed)[:, 0], algorithm.distribution(seen, None)
        for seed in range(2):
            for row in range(5):
                best = proposed[seed, row, q[seed, row].argmax()]
                assert torch.allclose(policy.greedy[seed, row], best, atol=1e-6)
        assert policy.log_scale.exp().numpy() == pytest.approx(0.05)
        share = policy.sample(torch.tensor([0.0, 0.75, 0.75]).expand(2, 5, 1, 3)).squeeze(2) - policy.greedy
        assert (share / policy.width).numpy() == pytest.approx(
            0.05 * np.log(3.0), abs=0.01
        )  # a logistic's third quartile


def test_small_parts() -> None:
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert best_of(vectors, torch.tensor([[0.0, 9.0, 1.0]])).tolist() == [[3.0, 4.0]]
    logits, mask = torch.tensor([0.5, 0.2, 0.1, 0.9]).log(), torch.tensor([True, True, True, False])
    assert likely_enough(logits, mask, 0.3).tolist() == [True, True, False, False]
    assert likely_enough(logits, mask, 1.0).tolist() == [True, False, False, False]
    q = torch.tensor([[[1.0], [5.0], [2.0]]])
    assert soft_least(q, pessimism=1.0).item() == 1.0 and soft_least(q, pessimism=0.0).item() == 5.0
    action = torch.tensor([[[0.25, -0.5]]])
    assert Box(BOUNDS).unit(action).tolist() == [[[-0.5, -0.5]]]
    assert squared_error(Box(BOUNDS).vector(Box(BOUNDS).unit(action)), action).max().item() < 1e-12


def test_settings_are_those_over_the_actions_of_the_log() -> None:
    with pytest.raises(ValueError, match="unknown key 'threshold' of bcq"):
        make_config("bcq", {"threshold": 0.1}, "continuous")
    log = reaching(5, 1)
    with pytest.raises(InputError, match="the settings of cql are not those over continuous actions"):
        fit(
            "cql", make_config("cql", {}), log, Encoder(log.features), seeds=[0], gradient_steps=1, batch_size=8
        )  # fmt: skip
