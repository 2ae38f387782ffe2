"""Algorithms that weigh logged actions, or follow a critic near them: what each finds, and what they are made of."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.actors import Actor, Critic, decided_q, frozen, shares, smoothed
from offrl_models.algorithms import ALGORITHMS, make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Transitions
from offrl_models.densities import MixtureDensity
from offrl_models.distributions import Categorical, LogisticMixture, PointHead, Space
from offrl_models.exporting import export_checked
from offrl_models.nets import MLP
from offrl_models.schema import Episodes, InputError
from offrl_models.training import fit, sampler_of
from tests.conftest import codes
from tests.test_algorithms import EPISODES, LOGS, WORLD, build, reaching, sampled, trained
from tests.test_covered_world import exact

COVERED = WORLD.simulate(2000, seed=2)
REACHING, HELD_OUT = reaching(2000, 2), reaching(100, 9)
WANTED = torch.as_tensor(HELD_OUT.observation) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
BOUNDS = np.array([[-1.0, 3.0], [0.0, 0.5]])


def found(name: str, episodes: Episodes, **settings: Any) -> Any:
    hidden, rate, steps = ((32,), 0.005, 400) if episodes.n_actions else ((32, 32), 0.003, 600)
    config = make_config(name, {"hidden": hidden, "learning_rate": rate, **settings})
    encoder = Encoder(episodes.features)
    return fit(name, config, episodes, encoder, seeds=[0, 1], gradient_steps=steps, batch_size=128)[0]


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("awr", {"inverse_temperature": 3.0, "max_weight": 100.0}, 0.7),  # what followed by chance weighs, too
        ("bc_top", {"top_share": 0.02}, 0.9),
    ],
)
def test_what_each_finds_on_a_covered_world(name: str, settings: dict[str, Any], share: float) -> None:
    """Its share of the way from the behavior to the optimum, by exact value."""
    optimum, behavior = WORLD.value(WORLD.optimal()), WORLD.value(WORLD.behavior)
    episodes = dataclasses.replace(COVERED, features=tuple(codes(WORLD.n_states)))
    assert exact(WORLD, found(name, episodes, **settings), 2) >= behavior + share * (optimum - behavior)


def missed(algorithm: Any) -> list[float]:
    """How far each seed's greedy action is from what is observed, on the average: 0.75 for any one action in the middle."""
    with torch.no_grad():
        seen = torch.as_tensor(HELD_OUT.observation).expand(2, -1, -1)
        return (algorithm.distribution(seen, None).greedy - WANTED).abs().sum(-1).mean(-1).tolist()


@pytest.mark.parametrize(
    ("name", "settings", "least", "most"),
    [
        ("bc", {}, 0.6, 1.5),
        ("awac", {"inverse_temperature": 10.0, "polyak": 0.05, "action_draws": 4}, 0.0, 0.2),
        ("crr", {"inverse_temperature": 10.0, "target_interval": 20}, 0.0, 0.2),
        ("crr", {"weight": "binary", "advantage": "max", "target_interval": 20}, 0.0, 0.2),
        ("td3_bc", {"polyak": 0.05}, 0.0, 0.2),
        ("td3_bc", {"polyak": 0.05, "alpha": 0.0}, 0.7, 0.8),
        ("rebrac", {"polyak": 0.05}, 0.0, 0.2),
        ("rebrac", {"polyak": 0.05, "policy_penalty": 100.0}, 0.7, 0.8),
        ("td3_awr", {"polyak": 0.05}, 0.0, 0.2),
        ("td3_awr", {"polyak": 0.05, "policy_penalty": 100.0, "inverse_temperature": 0.0}, 0.7, 0.8),
        ("td3_awr", {"polyak": 0.05, "policy_penalty": 100.0, "inverse_temperature": 10.0}, 0.0, 0.3),  # the good ones
        ("awr", {"inverse_temperature": 3.0}, 0.0, 0.35),
        ("bc_top", {}, 0.0, 0.35),
    ],
)
def test_continuous_actions_go_where_they_are_wanted(
    name: str, settings: dict[str, Any], least: float, most: float
) -> None:
    for each in missed(found(name, REACHING, **settings)):
        assert least <= each <= most


@pytest.mark.parametrize("space", ["discrete", "continuous"])
@pytest.mark.parametrize("name", ["awac", "crr", "awr", "iql"])
def test_a_weight_that_looks_at_nothing_is_behavior_cloning(name: str, space: Space) -> None:
    cloned = trained(build("bc", [3, 4], space), [3, 4], 20, LOGS[space])
    weighted = trained(build(name, [3, 4], space, inverse_temperature=0.0), [3, 4], 20, LOGS[space])
    for mine, theirs in zip(weighted.policy.parameters(), cloned.policy.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("space", ["discrete", "continuous"])
def test_where_all_logged_actions_weigh_the_same_td3_awr_is_rebrac(space: Space) -> None:
    same = {"policy_penalty": 0.1, "learning_rate": 0.001}
    plain = trained(build("rebrac", [3, 4], space, **same), [3, 4], 20, LOGS[space])
    weighted = trained(build("td3_awr", [3, 4], space, inverse_temperature=0.0, **same), [3, 4], 20, LOGS[space])
    told = trained(build("td3_awr", [3, 4], space, inverse_temperature=9.0, **same), [3, 4], 20, LOGS[space])
    for network in ("q", "target_q", "policy", "target_policy"):
        mine, theirs = (getattr(each, network).parameters() for each in (weighted, plain))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    pairs = zip(told.policy.parameters(), plain.policy.parameters(), strict=True)
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


@pytest.mark.parametrize("name", ["td3_bc", "rebrac"])
def test_policy_and_targets_move_every_few_steps(name: str) -> None:
    algorithm = build(name, [0], policy_interval=3)
    start = {key: value.clone() for key, value in algorithm.state_dict().items()}
    transitions, sampler = sampled(algorithm, [0], EPISODES)
    batches = transitions.batches(sampler, 4)
    assert [len(algorithm.losses(b._replace(step=i))) for i, b in enumerate(batches)] == [2, 1, 1, 2]
    trained(algorithm, [0], 2)
    same = {key: torch.equal(value, start[key]) for key, value in algorithm.state_dict().items()}
    assert all(still for key, still in same.items() if key.startswith("target"))
    assert not same["policy.net.rest.0.weight"] and not same["q.net.rest.0.weight"]
    trained(algorithm := build(name, [0], policy_interval=3, polyak=0.25), [0], 3)
    slow, fast = algorithm.target_policy.net.rest[0].weight, algorithm.policy.net.rest[0].weight
    old = start["policy.net.rest.0.weight"]
    assert torch.allclose(slow, old + 0.25 * (fast - old), atol=1e-6) and not torch.equal(slow, old)


def test_a_penalty_on_the_next_action_lowers_the_critic() -> None:
    seen, mask = torch.arange(float(WORLD.n_states))[None, :, None], torch.ones(1, WORLD.n_states, 3, dtype=torch.bool)
    values = []
    for penalty in (0.0, 1.0):
        algorithm = trained(build("rebrac", [0], critic_penalty=penalty, polyak=0.5, hidden=(32,)), [0], 300)
        with torch.no_grad():
            values.append(decided_q(algorithm.q, seen, algorithm.distribution(seen, mask)).mean())
    assert values[1] < values[0] - 0.2


def test_a_masked_action_is_no_one_s_maximum() -> None:
    algorithm = build("crr", [0], advantage="max")
    algorithm.q.net.last_bias().data[..., 2] = 100.0
    (batch,) = (lambda pair: pair[0].batches(pair[1], 1))(sampled(algorithm, [0], EPISODES))
    batch.mask[..., 2] = False
    with torch.no_grad():
        policy = algorithm.distribution(batch.observation, batch.mask)
        best = algorithm.baseline(batch, policy, None)
        assert torch.equal(best, algorithm.q.each(batch.observation)[:, 0, :, :2].amax(-1)) and best.max() < 50
    mean = build("crr", [0])
    mean.q.load_state_dict(algorithm.q.state_dict())
    assert (mean.baseline(batch, policy, None) < best).all()


def test_knobs_that_such_actions_have_no_use_for_are_refused() -> None:
    given = {"action_draws": 7, "noise": 0.7, "noise_clip": 0.7, "exploration": 0.7}
    tried = 0
    for name, (_, kind) in ALGORITHMS.items():
        for knob, space in getattr(kind, "only", {}).items():
            other: Space = "discrete" if space == "continuous" else "continuous"
            if other in kind.spaces and knob in given:
                config = make_config(name, {"hidden": [4], knob: given[knob]})
                with pytest.raises(InputError, match=f"{knob} of {name} is for {space} actions, and these are {other}"):
                    fit(
                        name,
                        config,
                        LOGS[other],
                        Encoder(LOGS[other].features),
                        seeds=[0],
                        gradient_steps=1,
                        batch_size=2,
                    )
                tried += 1
    assert tried == 11


def test_the_best_episodes_are_imitated_and_no_other() -> None:
    algorithm = build("bc_top", [0], top_share=0.1)
    transitions, sampler = sampled(algorithm, [0], EPISODES)
    chosen = np.unique(EPISODES.episode_of_row[sampler.pools[0].numpy()])
    assert len(chosen) == 30 and len(sampler.pools[0]) == EPISODES.length[chosen].sum()
    others = np.setdiff1d(np.arange(300), chosen)
    assert EPISODES.return_[chosen].min() >= EPISODES.return_[others].max()
    assert len(sampled(build("bc_top", [0], top_share=1.0), [0], EPISODES)[1].pools[0]) == len(transitions.rows)
    assert build("bc_top", [0], top_share=1e-6).usable(EPISODES).sum() == EPISODES.length[EPISODES.return_.argmax()]


def test_rows_without_a_next_action_are_left_out() -> None:
    cut = dataclasses.replace(
        EPISODES, terminated=np.zeros(EPISODES.n_rows, bool), truncated=EPISODES.terminated, mask=EPISODES.mask
    )
    algorithm = build("rebrac", [0])
    pool = sampled(algorithm, [0], cut)[1].pools[0].numpy()
    assert np.array_equal(pool, np.setdiff1d(np.arange(cut.n_rows), cut.offsets[1:] - 1))
    assert len(sampled(algorithm, [0], EPISODES)[1].pools[0]) == EPISODES.n_rows
    first = cut.offsets[:-1]
    parts = ("observation", "action", "mask", "reward", "action_prob", "terminated", "truncated")
    single = dataclasses.replace(
        cut, **{name: getattr(cut, name)[first] for name in parts}, offsets=np.arange(cut.n_episodes + 1)
    )
    with pytest.raises(InputError, match="ReBRAC can train on none of the 300 rows"):
        sampler_of(algorithm, Transitions(single, Encoder(single.features)), single, 8, [0])


@pytest.mark.parametrize("space", ["discrete", "continuous"])
def test_a_batch_has_what_was_asked_for(space: Space) -> None:
    episodes = LOGS[space]
    encoder, row = Encoder(episodes.features), torch.arange(episodes.n_rows - 1)[None]
    plain = Transitions(episodes, encoder).take(row)
    assert plain.next_action is None and plain.return_to_go is None
    asked = Transitions(episodes, encoder, extras=("next_action", "return_to_go")).take(row)
    assert asked.next_action is not None and asked.return_to_go is not None
    inside = np.setdiff1d(row[0].numpy(), episodes.offsets[1:] - 1)
    assert np.array_equal(asked.next_action[0].numpy()[inside], episodes.action[inside + 1])
    assert asked.return_to_go[0].numpy() == pytest.approx(episodes.return_to_go[:-1], abs=1e-6)


def test_a_deterministic_policy_has_a_density_of_the_stated_width() -> None:
    head = PointHead(BOUNDS, exploration=0.1).double()
    policy = head(torch.tensor([[[0.3, -0.2]]], dtype=torch.float64))
    uniform = torch.rand(1, 1, 40_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = policy.sample(uniform)[0, 0]
    assert (drawn.std(0) / head.width * 2).numpy() == pytest.approx([0.1, 0.1], rel=0.02)
    assert torch.allclose(drawn.mean(0), policy.greedy[0, 0], atol=0.01)
    far = head(torch.tensor([[[50.0, -50.0]]], dtype=torch.float64))
    assert far.greedy.tolist() == [[[3.0, 0.0]]] and torch.isfinite(far.log_prob(far.greedy)).all()
    assert far.center.tolist() == [[[[1.0, 0.0]]]]  # beyond the bounds it would have no gradient and stay there


def test_target_noise_is_cut_off_and_stays_inside_the_bounds() -> None:
    policy = PointHead(BOUNDS, exploration=0.1)(torch.zeros(1, 5000, 2))
    uniform = torch.rand(1, 5000, 1, 3, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([2.0, 0.25])
    moved = (smoothed(policy, uniform, noise=0.2, clip=0.5).greedy - policy.greedy) / half
    assert moved.abs().max() == pytest.approx(0.5, abs=1e-5) and moved.std() == pytest.approx(0.2, rel=0.05)
    wide = smoothed(policy, uniform, noise=5.0, clip=9.0).greedy
    assert wide[..., 0].min() == -1.0 and wide[..., 0].max() == 3.0
    probs = Categorical(torch.zeros(1, 2, 1))
    assert smoothed(probs, None, noise=0.2, clip=0.5) is probs


def test_gradients_pass_through_a_frozen_network_and_leave_it_alone() -> None:
    critic = Critic([0], "q", Encoder(codes(None)), (8,), BOUNDS, members=2)
    actor = Actor([0], "p", Encoder(codes(None)), (8,), BOUNDS, exploration=0.1)
    seen = torch.randn(1, 5, 1)
    held = next(iter(critic.parameters()))
    held.requires_grad_(False)
    with frozen(critic):
        q = decided_q(critic, seen, actor(seen, None))
    q.sum().backward()
    assert all(each.grad is None for each in critic.parameters())
    assert all(each.grad is not None and bool(each.grad.any()) for each in actor.parameters() if each.numel())
    wanting = [each.requires_grad for each in critic.parameters()]
    assert wanting.count(False) == 1 and not held.requires_grad


def test_random_numbers_are_shared_out() -> None:
    uniform = torch.rand(2, 3, 5, 2)
    four, one = shares(uniform, 4, 1)
    assert four is not None and one is not None
    assert torch.equal(torch.cat([four, one], 2), uniform) and four.shape[2] == 4
    assert shares(None, 4, 1) == (None, None)


def test_a_layer_norm_takes_out_the_scale_of_a_layer() -> None:
    encoder, seen = Encoder(codes(None)), torch.randn(1, 6, 1)
    with torch.no_grad():
        for layer_norm in (True, False):
            net = MLP([0], "n", encoder, (16, 16), 2, layer_norm=layer_norm)
            before = net(seen)
            for each in (net.first.weight, net.first.bias):
                each *= 10.0
            assert torch.allclose(net(seen), before, atol=1e-3) == layer_norm


def test_a_deterministic_policy_is_exported_as_it_is_trained(tmp_path: Path) -> None:
    algorithm = trained(build("td3_bc", [0, 1], "continuous"), [0, 1], 20, LOGS["continuous"])
    density = MixtureDensity(algorithm.cpu(), 2, 2)
    mixture = density.mixture(torch.as_tensor(HELD_OUT.observation))
    assert isinstance(mixture, LogisticMixture) and mixture.center.shape == (400, 2, 2)
    export_checked(density, HELD_OUT, tmp_path)
