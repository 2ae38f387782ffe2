"""What is known of the value-based learners and of the bandit learners, beyond the contract of all algorithms."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.learner import Learner
from offrl_models.ope.worlds import bandit
from offrl_models.policies import Mixture
from offrl_models.schema import Episodes, InputError
from offrl_models.training import fit
from offrl_models.training_config import TrainingConfig
from tests.conftest import chain_world, codes
from tests.test_algorithms import EPISODES, build, sampled, trained

WORLD = chain_world()
VALUES = ("dqn", "qr_dqn", "discrete_sac", "nfq", "iqn")


def fitted(name: str, episodes: Episodes, steps: int, **settings: Any) -> Any:
    config = make_config(name, {"hidden": (32,), "learning_rate": 0.005, **settings})
    encoder = Encoder(episodes.features or codes(WORLD.n_states))
    return fit(name, config, episodes, encoder, seeds=[0, 1], gradient_steps=steps, batch_size=128)[0]


def rewarded(reward: np.ndarray) -> Episodes:
    """One state, one step, three actions in turn."""
    rows = len(reward)
    return Episodes(
        episode_id=np.arange(rows), offsets=np.arange(rows + 1), observation=np.zeros((rows, 1), np.float32),
        final_observation=np.zeros((rows, 1), np.float32), action=np.arange(rows) % 3, mask=np.ones((rows, 3), bool),
        reward=reward, terminated=np.ones(rows, bool), truncated=np.zeros(rows, bool), action_prob=np.full(rows, 1 / 3),
        gamma=1.0, features=tuple(codes(1)),
    )  # fmt: skip


STATE = torch.zeros(2, 1, 1)  # of each seed


def test_quantiles_of_the_return_are_found() -> None:
    """Rewards uniform on [0, 1], on [0, 2] and on [0, 3]: quantiles are their levels times 1, 2 and 3."""
    rng = np.random.default_rng(0)
    episodes = rewarded(rng.random(6000) * (1 + np.arange(6000) % 3))
    level, wide = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0])
    wanted = (wide[:, None] * level).expand(2, 3, 3)
    fixed = fitted("qr_dqn", episodes, 600, quantiles=5, huber_threshold=0.02)
    implicit = fitted("iqn", episodes, 600, quantiles=16, huber_threshold=0.02)
    with torch.no_grad():
        found = fixed.quantiles(fixed.q, STATE)[:, 0, :, [0, 2, 4]]
        assert float(((found - wanted) / wide[:, None]).abs().max()) < 0.1
        found = implicit.q.at(implicit.q.seen(STATE), level.expand(2, 1, 3))[:, 0]
        assert float(((found - wanted) / wide[:, None]).abs().max()) < 0.1
        mean = implicit.q.mean(implicit.q.seen(STATE))[:, 0]
        assert float((mean / wide - 0.5).abs().max()) < 0.05


def test_the_mean_of_quantiles_is_that_of_the_evenly_spaced_ones() -> None:
    q = build("iqn", [0, 1], greedy_quantiles=4).q
    seen = q.seen(torch.arange(6.0).reshape(2, 3, 1))
    each = q.at(seen, torch.tensor([0.125, 0.375, 0.625, 0.875]).expand(2, 3, 4))
    assert torch.allclose(q.mean(seen), each.mean(-1), atol=1e-6)


def test_rare_large_rewards_count_in_full_where_errors_are_squared() -> None:
    """Of 10 in one of five rows the mean is 2; the Huber loss, whose pull is at most 1, stays at 1/4."""
    reward = 10.0 * (np.arange(3000) // 3 % 5 == 0)
    squared, linear = (fitted(name, rewarded(reward), 600).q(STATE)[:, 0].detach() for name in ("nfq", "dqn"))
    assert squared.numpy() == pytest.approx(np.full((2, 3), 2.0), abs=0.4)
    assert linear.numpy() == pytest.approx(np.full((2, 3), 0.25), abs=0.1)


def one_step(next_mask: list[bool]) -> TransitionBatch:
    """From state 0 to state 1 by action 2, for two seeds, three rows each."""
    seen, following = (Encoded(torch.zeros(2, 3, 0), torch.full((2, 3, 1), state)) for state in (0, 1))
    ones = torch.ones(2, 3)
    return TransitionBatch(
        observation=seen,
        action=torch.full((2, 3), 2),
        action_prob=ones / 3,
        reward=0.0 * ones,
        discount=ones,
        next_observation=following,
        mask=torch.ones(2, 3, 3, dtype=torch.bool),
        next_mask=torch.tensor(next_mask).expand(2, 3, 3),
        row=torch.zeros(2, 3, dtype=torch.long),
        uniform=torch.rand(2, 3, 16, 1, generator=torch.Generator().manual_seed(0)),
    )


def raise_q(network: Any, action: int, by: float) -> None:
    """Add to the value of an action in every state."""
    outputs = network.last_bias() if hasattr(network, "last_bias") else network.net.last_bias()
    with torch.no_grad():
        outputs.unflatten(-1, (3, -1))[..., action, :] += by


@pytest.mark.parametrize("name", VALUES)
def test_targets_ask_no_action_that_is_forbidden_next(name: str) -> None:
    algorithm = build(name, [0, 1])
    slow = getattr(algorithm, next(iter(algorithm.targets)))
    masked, free = one_step([True, False, True]), one_step([True, True, True])
    before = [algorithm.losses(batch)["q"] for batch in (masked, free)]
    raise_q(slow, 1, 100.0)
    assert torch.equal(algorithm.losses(masked)["q"], before[0])
    assert (algorithm.losses(free)["q"] > before[1] + 10.0).all()


@pytest.mark.parametrize("double", [False, True])
def test_double_asks_the_slow_network_about_the_choice_of_the_fast_one(double: bool) -> None:
    """The fast network prefers action 0 next, the slow one action 1, whose value it then overestimates."""
    algorithm = build("dqn", [0, 1], double=double)
    algorithm.target_q.load_state_dict(algorithm.q.state_dict())
    raise_q(algorithm.q, 0, 50.0)
    raise_q(algorithm.target_q, 1, 50.0)
    batch = one_step([True, True, True])
    with torch.no_grad():
        slow = algorithm.target_q(batch.next_observation)[..., 0 if double else 1]
        error = (algorithm.q(batch.observation)[..., 2] - slow).abs()
        wanted = torch.where(error < 1, error.square() / 2, error - 0.5).mean(-1)
        assert torch.allclose(algorithm.losses(batch)["q"], wanted, atol=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_temperature_finds_the_entropy_that_is_wanted(share: float) -> None:
    more = {"target_interval": 20, "entropy_share": share, "initial_temperature": 0.1, "learning_rate": 0.02}
    episodes = WORLD.simulate(2000, seed=2)
    algorithm = fitted("discrete_sac", episodes, 800, **more)
    states = torch.as_tensor(np.array(episodes.observation)).expand(2, -1, -1)
    with torch.no_grad():
        log_probs = algorithm.distribution(states, torch.ones(2, episodes.n_rows, 3, dtype=torch.bool)).log_probs
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean(-1)
    assert (entropy / np.log(3.0)).numpy() == pytest.approx([share] * 2, abs=0.07)


def test_where_one_action_is_allowed_no_entropy_is_wanted() -> None:
    algorithm = build("discrete_sac", [0, 1])
    batch = one_step([True, True, True])._replace(mask=torch.tensor([False, False, True]).expand(2, 3, 3))
    assert float(algorithm.losses(batch)["temperature"].detach().abs().max()) < 1e-6


def test_targets_move_by_polyak_and_by_interval() -> None:
    slow = build("iql", [0], polyak=0.25)
    before = [p.clone() for p in slow.target_q.parameters()]
    trained(slow, [0], 1)
    for old, target, fast in zip(before, slow.target_q.parameters(), slow.q.parameters(), strict=True):
        assert torch.allclose(target, old + 0.25 * (fast - old), atol=1e-7)
    hard = trained(build("cql", [0], target_interval=4), [0], 5)
    assert not torch.equal(hard.q.net.last_bias(), hard.target_q.net.last_bias())
    hard = trained(build("cql", [0], target_interval=5), [0], 5)
    assert all(torch.equal(a, b) for a, b in zip(hard.q.parameters(), hard.target_q.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "every"), [(50, 1), (1000, 10)])
def test_where_no_interval_is_set_targets_move_at_each_hundredth_of_the_training(steps: int, every: int) -> None:
    algorithm = build("cql", [0], target_interval=None)
    learner = Learner(algorithm, *sampled(algorithm, [0], EPISODES), TrainingConfig(gradient_steps=steps))
    moved = []
    for learner.gradient_steps in range(1, 31):
        algorithm.q.net.last_bias().data += 1.0
        learner.move_targets()
        if torch.equal(algorithm.q.net.last_bias(), algorithm.target_q.net.last_bias()):
            moved.append(learner.gradient_steps)
    assert moved == list(range(every, 31, every))


CLICKS = bandit(contexts=5, actions=3, columns=3, seed=5)
LOG = CLICKS.simulate(20_000, seed=1)
OBJECTIVES = ("dm", "ipw", "snipw", "dr", "sndr")


def learned(objective: str, episodes: Episodes, steps: int = 600) -> Any:
    config = make_config("bandit", {"hidden": (32,), "learning_rate": 0.01, "objective": objective})
    encoder = Encoder(codes(*[None] * episodes.observation.shape[1]))
    return fit("bandit", config, episodes, encoder, seeds=[0, 1], gradient_steps=steps, batch_size=256)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bandit_learner_finds_what_earns_most(objective: str) -> None:
    """Whoever forgets the propensities goes less than half of the way from the behavior to the best."""
    best, behavior = CLICKS.value(CLICKS.optimal()), CLICKS.value(CLICKS.behavior)
    often = np.eye(3)[(CLICKS.behavior * CLICKS.q_values(CLICKS.behavior)).argmax(1)]  # what earns most in sum
    assert CLICKS.value(often) < behavior + 0.5 * (best - behavior)
    assert CLICKS.observed is not None
    probs = Mixture(learned(objective, LOG), 2)(torch.as_tensor(CLICKS.observed), torch.as_tensor(CLICKS.mask))
    assert CLICKS.value(probs.detach().numpy()) >= behavior + 0.9 * (best - behavior)


def bandit_loss(objective: str, reward: torch.Tensor, reward_model: float = 0.0) -> torch.Tensor:
    """Of the policy, where the model predicts one reward for everything."""
    algorithm = build("bandit", [0, 1], objective=objective)
    if algorithm.reward is not None:
        for parameter in algorithm.reward.parameters():
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(algorithm.reward.last_bias(), reward_model)
    batch = one_step([True, True, True])._replace(
        action=torch.tensor([[0, 1, 2], [2, 2, 0]]), action_prob=torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.3, 0.2]])
    )
    return algorithm.losses(batch._replace(reward=reward))["policy"].detach()


def test_the_objectives_of_bandit_learners_are_the_estimators_of_their_names() -> None:
    reward = torch.tensor([[1.0, 0.0, 3.0], [0.5, 2.0, 1.0]])
    ipw, snipw = (bandit_loss(name, reward) for name in ("ipw", "snipw"))
    assert torch.allclose(bandit_loss("snipw", reward + 7.0), snipw - 7.0, atol=1e-5)
    weight = -bandit_loss("ipw", torch.ones(2, 3))  # its mean
    assert (weight - 1.0).abs().min() > 0.01
    assert torch.allclose(bandit_loss("ipw", reward + 7.0), ipw - 7.0 * weight, atol=1e-5)
    assert torch.allclose(ipw / weight, snipw, atol=1e-6)
    assert torch.allclose(bandit_loss("dm", reward, 7.0), torch.tensor([-7.0, -7.0]))
    # A model that says 0 adds nothing; one that says 7 everywhere takes 7 from what is weighted and adds 7.
    assert torch.allclose(bandit_loss("dr", reward), ipw) and torch.allclose(bandit_loss("sndr", reward), snipw)
    assert torch.allclose(bandit_loss("dr", reward + 7.0, 7.0), ipw - 7.0, atol=1e-5)
    assert torch.allclose(bandit_loss("sndr", reward + 7.0, 7.0), snipw - 7.0, atol=1e-5)


def test_a_log_that_is_no_bandit_log_is_refused() -> None:
    with pytest.raises(InputError, match=r"\d+ episodes have more than one step, and bandit is for logs of horizon 1"):
        learned("dr", WORLD.simulate(20, seed=1), 1)
    unknown = dataclasses.replace(LOG, action_prob=np.where(np.arange(LOG.n_rows) < 3, np.nan, LOG.action_prob))
    with pytest.raises(InputError, match="3 rows have no propensity, and the objective ipw of bandit divides by it"):
        learned("ipw", unknown, 1)
    assert torch.isfinite(learned("dm", unknown, 5).policy.net.last_bias()).all()
