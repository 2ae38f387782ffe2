"""One contract for every algorithm: its own losses, seeds, knobs and masks, and weights that come again."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import ALGORITHMS, config_of, make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Sampler, Transitions
from offrl_models.distributions import Space
from offrl_models.learner import Learner, NonFiniteLossError, TrainingConfig, train
from offrl_models.optimizer import FusedAdam
from offrl_models.schema import Episodes, InputError
from offrl_models.training import fit, prepare, sampler_of, transitions_of
from tests.conftest import chain_world, codes

WORLD = chain_world()
SMALL: dict[str, Any] = {"hidden": (8,), "learning_rate": 0.01}
QUICK: dict[str, Any] = {
    "target_interval": 3, "vae_hidden": (8,), "samples": 5, "embedding": 8, "layers": 2, "heads": 2, "context": 3,
}  # fmt: skip
MODEL: dict[str, Any] = {  # of the world, and rollouts that are felt in a few steps
    "dynamics_hidden": (8,), "dynamics_learning_rate": 0.01, "dynamics_steps": 20, "members": 4, "elites": 2,
    "rollout_steps": 2, "rollout_interval": 2, "kept_rollouts": 3, "actor_learning_rate": 0.01,
}  # fmt: skip
QUICK_OF: dict[str, dict[str, Any]] = {  # at which rounding does not grow in 200 steps, and knobs are felt in 12
    "rebrac": {"learning_rate": 0.001},
    "td3_awr": {"learning_rate": 0.001},
    "decision_transformer": {"learning_rate": 0.0003},
    "bandit": {"learning_rate": 0.001},
    "bc_top": {"top_share": 0.5},
    "dqn": {"learning_rate": 0.03},  # at a lower one the fast and the slow network prefer the same actions at first
    "iqn": {"quantiles": 8, "target_quantiles": 8},
    "mopo": MODEL,
    "combo": MODEL,
    "morel": {**MODEL, "halt_threshold": 0.6, "halt_penalty": 1.0},
}
SPACES = [(name, space) for name, (_, kind) in ALGORITHMS.items() for space in kind.spaces]
DISCRETE = [name for name, space in SPACES if space == "discrete"]


def reaching(episodes: int, seed: int) -> Episodes:
    """Continuous actions of two dimensions, best where they are what is observed; four steps."""
    rng, rows = np.random.default_rng(seed), 4 * episodes
    seen = rng.random((rows, 2)).astype(np.float32)
    action = rng.random((rows, 2)).astype(np.float32) * [1.0, 2.0] - [0.0, 1.0]
    wanted = seen * [1.0, 2.0] - [0.0, 1.0]
    return Episodes(
        episode_id=np.arange(episodes), offsets=np.arange(0, rows + 1, 4), observation=seen,
        final_observation=np.zeros((episodes, 2), np.float32), action=action.astype(np.float32),
        mask=np.ones((rows, 0), bool), reward=1.0 - np.abs(action - wanted).sum(1),
        terminated=np.arange(1, rows + 1) % 4 == 0, truncated=np.zeros(rows, bool), action_prob=np.full(rows, 0.5),
        gamma=0.5, features=tuple(codes(None, None)), bounds=np.array([[0.0, 1.0], [-1.0, 1.0]]),
    )  # fmt: skip


EPISODES = dataclasses.replace(WORLD.simulate(300, seed=1), features=tuple(codes(WORLD.n_states)))
LOGS: dict[Space, Episodes] = {"discrete": EPISODES, "continuous": reaching(300, 1)}


def build(name: str, seeds: list[int], space: Space = "discrete", **settings: Any) -> Any:
    quick = {key: value for key, value in {**SMALL, **QUICK}.items() if key in known_fields(name, space)}
    config = make_config(name, {**quick, **QUICK_OF.get(name, {}), **settings}, space)
    return ALGORITHMS[name][1](config, Encoder(LOGS[space].features), LOGS[space].actions, seeds)


def known_fields(name: str, space: Space) -> list[str]:
    return [field.name for field in dataclasses.fields(config_of(name, space))]


def sampled(algorithm: Any, seeds: list[int], episodes: Episodes, double: bool = False) -> tuple[Transitions, Sampler]:
    transitions = transitions_of(algorithm, episodes, Encoder(episodes.features))
    if double:
        algorithm.double()
        transitions.encoder.double()
        for name, part in list(vars(transitions).items()):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                setattr(transitions, name, part.double())
    sampler = sampler_of(algorithm, transitions, episodes, 32, seeds)
    prepare(algorithm, transitions, sampler, TrainingConfig())
    return transitions, sampler


def trained(algorithm: Any, seeds: list[int], steps: int, episodes: Episodes = EPISODES, double: bool = False) -> Any:
    inputs = sampled(algorithm, seeds, episodes, double)
    train(algorithm.double() if double else algorithm, *inputs, TrainingConfig(gradient_steps=steps), chunk=7)
    return algorithm


def outputs(algorithm: Any, seeds: int, space: Space = "discrete") -> torch.Tensor:
    """Log-probabilities of every action in every state, or log-densities of the actions that were taken in some rows."""
    with torch.no_grad():
        if space == "discrete":
            states = torch.arange(float(WORLD.n_states))[None, :, None].expand(seeds, -1, -1)
            return algorithm.distribution(states, torch.ones(seeds, WORLD.n_states, 3, dtype=torch.bool)).log_probs
        seen, action = (
            torch.as_tensor(part[:50]).expand(seeds, -1, -1) for part in (LOGS[space].observation, LOGS[space].action)
        )
        return algorithm.distribution(seen, None).log_prob(action)


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_each_loss_trains_only_its_own_network(name: str, space: Space) -> None:
    algorithm = build(name, [0, 1], space)
    transitions, sampler = sampled(algorithm, [0, 1], LOGS[space])
    (batch,) = transitions.batches(sampler, 1)
    networks = algorithm.learning_rates()
    assert set(algorithm.losses(batch)) == set(networks)
    for trained_network, loss in algorithm.losses(batch).items():
        assert loss.shape == (2,)
        algorithm.zero_grad(set_to_none=True)
        loss.sum().backward()
        for other in [*networks, *algorithm.targets]:
            touched = any(p.grad is not None and bool(p.grad.any()) for p in getattr(algorithm, other).parameters())
            assert touched == (other == trained_network), (trained_network, other)


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_nothing_starts_like_anything_else(name: str, space: Space) -> None:
    """No bias like a row of its weights, no layer like another, no seed and no member like the next one, whatever their sizes."""
    algorithm, starts = build(name, [0, 1], space), dict[tuple[float, ...], str]()
    for network in algorithm.learning_rates():
        for key, parameter in getattr(algorithm, network).named_parameters():
            for place, each in enumerate(parameter.detach().flatten(1) if parameter.dim() > 1 else parameter[None]):
                first = each[:3].tolist()
                if len(first) == 3 and len(set(first)) > 1:  # what is constant was not drawn
                    shape = tuple(round(number / first[0], 4) for number in first)
                    here = f"{network}.{key}[{place}]"
                    assert shape not in starts, (here, starts[shape])
                    starts[shape] = here
    assert starts


# What follows the slope of a network jumps where a ReLU does, and so do draws where a random number meets a probability: the
# rounding of sums in other orders grows. Of `edac` after 200 steps it makes 2e-3 in single precision and 2e-10 in double, so that
# nothing passes from seed to seed.
GROWING = ("crr", "td3_awr", "decision_transformer", "edac", "mopo", "combo", "morel")


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_seeds_trained_together_equal_seeds_trained_alone(name: str, space: Space) -> None:
    together = trained(build(name, [3, 5], space), [3, 5], 200, LOGS[space], double=name in GROWING)
    for position, seed in enumerate([3, 5]):
        alone = trained(build(name, [seed], space), [seed], 200, LOGS[space], double=name in GROWING)
        for (key, joint), (_, single) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
            mine = joint.unflatten(0, (2, -1))[position]  # of a critic's members too
            assert torch.allclose(mine, single, atol=1e-5), (seed, key)


OTHER = {
    "hidden": (9,), "learning_rate": 0.02, "alpha": 3.0, "target_interval": 5, "temperature": 0.5, "expectile": 0.9,
    "inverse_temperature": 9.0, "max_weight": 0.01, "polyak": 0.5, "threshold": 0.99, "logit_penalty": 2.0,
    "action_draws": 3, "advantage": "max", "weight": "binary", "noise": 0.9, "noise_clip": 0.1, "policy_interval": 3,
    "exploration": 0.2, "policy_penalty": 1.0, "critic_penalty": 1.0, "layer_norm": False, "top_share": 0.2,
    "double": True, "quantiles": 5, "huber_threshold": 0.1, "target_quantiles": 3, "greedy_quantiles": 2, "cosines": 4,
    "entropy_share": 0.1, "initial_temperature": 0.2, "objective": "dm",
    "members": 3, "diversity": 5.0, "actor_learning_rate": 0.02, "samples": 4,
    "vae_hidden": (9,), "vae_learning_rate": 0.1, "kl_weight": 3.0, "flexibility": 0.5, "pessimism": 0.1,
    "in_data_weight": 0.3, "embedding": 6, "layers": 1, "heads": 1, "context": 2, "max_steps": 2, "weight_decay": 0.5,
    "target_return": 0.1, "components": 2,
    "dynamics_hidden": (9,), "dynamics_learning_rate": 0.02, "dynamics_steps": 10, "elites": 1, "rollout_steps": 3,
    "rollout_interval": 3, "kept_rollouts": 1, "real_ratio": 0.3, "penalty": 3.0,
    "halt_threshold": 0.5, "halt_penalty": 2.0,
}  # fmt: skip
KNOBS = [
    (name, space, field)
    for name, space in SPACES
    for field in known_fields(name, space)
    if getattr(ALGORITHMS[name][1], "only", {}).get(field, space) == space  # others are refused, tests/test_weighted.py
]


@functools.cache
def untouched(name: str, space: Space) -> Any:
    """An algorithm whose settings all others are held against."""
    return trained(build(name, [0], space), [0], 12, LOGS[space])


@pytest.mark.parametrize(("name", "space", "field"), KNOBS)
def test_no_knob_is_dead(name: str, space: Space, field: str) -> None:
    base = untouched(name, space)
    changed = trained(build(name, [0], space, **{field: OTHER[field]}), [0], 12, LOGS[space])
    pairs = zip(base.parameters(), changed.parameters(), strict=True)
    same_weights = all(torch.equal(one, other) for one, other in pairs)
    assert not (same_weights and torch.equal(outputs(base, 1, space), outputs(changed, 1, space)))


@pytest.mark.parametrize("name", DISCRETE)
def test_degenerate_logs_stay_finite(name: str) -> None:
    """Constant rewards, single-step episodes, masks that leave one action."""
    steps = EPISODES.offsets[:-1]
    names = ("observation", "action", "reward", "action_prob")
    single = dataclasses.replace(
        EPISODES,
        final_observation=EPISODES.next_observation[steps],
        **{field: getattr(EPISODES, field)[steps] for field in names},
        offsets=np.arange(len(steps) + 1),
        mask=np.eye(3, dtype=bool)[EPISODES.action[steps]],
        terminated=np.ones(len(steps), bool),
        truncated=np.zeros(len(steps), bool),
    )
    constant = dataclasses.replace(single, reward=np.zeros(len(steps)))
    for episodes in (single, constant):
        found = outputs(trained(build(name, [0, 1]), [0, 1], 20, episodes), 2)
        assert bool(torch.isfinite(found).all())
        assert found.exp().sum(-1).numpy() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, space in SPACES if space == "continuous"])
def test_constant_rewards_and_single_steps_stay_finite(name: str) -> None:
    log = reaching(300, 2)
    steps = log.offsets[:-1]
    names = ("observation", "action", "mask", "action_prob")
    single = dataclasses.replace(
        log, **{field: getattr(log, field)[steps] for field in names}, offsets=np.arange(301), reward=np.zeros(300),
        terminated=np.ones(300, bool), truncated=np.zeros(300, bool),
    )  # fmt: skip
    found = outputs(trained(build(name, [0, 1], "continuous"), [0, 1], 20, single), 2, "continuous")
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("name", DISCRETE)
def test_masks_are_honoured(name: str) -> None:
    algorithm = trained(build(name, [0]), [0], 5)
    mask = torch.ones(1, WORLD.n_states, 3, dtype=torch.bool)
    mask[..., 1] = False
    states = torch.arange(float(WORLD.n_states))[None, :, None]
    with torch.no_grad():
        assert float(algorithm.distribution(states, mask).probs[..., 1].max()) == 0.0


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_saved_and_loaded_weights_act_alike(name: str, space: Space) -> None:
    first = trained(build(name, [0, 1], space), [0, 1], 10, LOGS[space])
    second = build(name, [7, 8], space)
    second.load_state_dict(first.state_dict())
    assert torch.equal(outputs(first, 2, space), outputs(second, 2, space))


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_an_algorithm_says_which_actions_it_is_for(name: str, space: Space) -> None:
    other: Space = "continuous" if space == "discrete" else "discrete"
    if other not in ALGORITHMS[name][1].spaces:
        said = f"the actions are {other}, and {name} is not for such; use one of bc, "
        with pytest.raises(InputError, match=said):
            make_config(name, {}, other)
        with pytest.raises(InputError, match=said):
            fit(name, make_config(name, {}, space), LOGS[other], Encoder(LOGS[other].features), seeds=[0])


def test_training_twice_gives_the_same_weights() -> None:
    first, second = (trained(build("iql", [0, 1]), [0, 1], 30) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_one_adam_with_a_group_per_network() -> None:
    transitions = Transitions(EPISODES, Encoder(codes(WORLD.n_states)))
    learner = Learner(build("iql", [0]), transitions, Sampler([transitions.rows], 8, [0]), TrainingConfig())
    groups = learner.configure_optimizers().param_groups
    assert [group["name"] for group in groups] == ["q", "value", "policy"]


def test_a_loss_that_explodes_names_the_network_and_the_seed() -> None:
    broken = dataclasses.replace(EPISODES, reward=np.full(EPISODES.n_rows, 1e30))
    with pytest.raises(NonFiniteLossError, match=r"the (q|value) loss of seed 0 is not finite after \d+"):
        trained(build("iql", [0]), [0], 40, broken)


def test_adam_is_that_of_torch_and_skips_networks_without_gradients() -> None:
    torch.manual_seed(0)
    mine, theirs = ([torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))] for _ in range(2))
    empty = torch.nn.Parameter(torch.ones(3, 0))
    adam = FusedAdam(
        [{"params": [mine[0], empty], "lr": 0.1, "name": "a"}, {"params": [mine[1]], "lr": 0.01, "name": "b"}]
    )
    wanted = torch.optim.Adam([{"params": [theirs[0]], "lr": 0.1}, {"params": [theirs[1]], "lr": 0.01}], fused=True)
    for step in range(7):
        for own, other in zip(mine[: 1 + step % 2], theirs, strict=False):  # the second one at every other step
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        adam.step()
        wanted.step()
        wanted.zero_grad(set_to_none=True)
        assert all(torch.equal(own, other) for own, other in zip(mine, theirs, strict=True))
        assert all(own.grad is None for own in mine)
