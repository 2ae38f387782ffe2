"""What Q-learning in all its forms is known to find: the optimum where everything was tried, and not what was hardly tried."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World
from offrl_models.schema import Episodes
from offrl_models.training import fit
from tests.conftest import codes


def ladder(rungs: int = 6) -> World:
    """Up, at nine of ten tries, to a reward of 1 at the top; down for 0.01; or out, at once and with 0.15.

    Which action is which changes from rung to rung. Whoever looks no further than the next reward leaves.
    """
    at = np.arange(rungs)
    up, out, down = at % 3, (at + 1) % 3, (at + 2) % 3
    transition = np.zeros((rungs + 1, 3, rungs + 1))
    transition[at, up, at + 1], transition[at, up, at] = 0.9, 0.1
    transition[at, out, rungs] = transition[at, down, np.maximum(at - 1, 0)] = transition[rungs, :, rungs] = 1.0
    reward = np.zeros_like(transition)
    reward[at, out, rungs], reward[at, down] = 0.15, 0.01
    reward[rungs - 1, up[-1], rungs] = 1.0
    return World(
        transition=transition, reward=reward, initial=np.append(np.full(rungs, 1 / rungs), 0.0),
        terminal=np.arange(rungs + 1) == rungs, mask=np.ones((rungs + 1, 3), bool), gamma=0.9,
        behavior=np.full((rungs + 1, 3), 1 / 3),
    )  # fmt: skip


def road(actions: int = 12, steps: int = 6) -> World:
    """In each step a good action and a fair one lead on; the others, hardly ever tried, lead to the end without a reward."""
    order = np.random.default_rng(0).permuted(np.tile(np.arange(actions), (steps, 1)), axis=1)
    at, good, fair = np.arange(steps), order[:, 0], order[:, 1]
    transition = np.zeros((steps + 1, actions, steps + 1))
    transition[..., steps] = 1.0
    for action in (good, fair):
        transition[at, action, steps], transition[at, action, at + 1] = 0.0, 1.0
    reward = np.zeros_like(transition)
    reward[at, good, at + 1], reward[at, fair, at + 1] = 0.2, 0.1
    behavior = np.full((steps + 1, actions), 0.01)
    behavior[at, good] = behavior[at, fair] = (1.0 - 0.01 * (actions - 2)) / 2
    behavior[steps] = 1 / actions
    return World(
        transition=transition, reward=reward, initial=np.eye(steps + 1)[0], terminal=np.arange(steps + 1) == steps,
        mask=np.ones((steps + 1, actions), bool), gamma=0.95, behavior=behavior,
    )  # fmt: skip


def log_of(world: World, episodes: int) -> Episodes:
    return dataclasses.replace(world.simulate(episodes, seed=2), features=tuple(codes(world.n_states)))


def best(model: TabularModel, future: float = 1.0) -> np.ndarray:
    """The best policy by dynamic programming, or the one of whoever weighs what comes after the next reward otherwise."""
    q = model.reward
    for _ in range(500):
        q = model.reward + future * model.transition @ q.max(1)
    return np.eye(q.shape[1])[q.argmax(1)]


def policies(name: str, episodes: Episodes, seeds: int, steps: int, batch_size: int, **settings: Any) -> np.ndarray:
    """What each seed does in every state."""
    config = make_config(name, {"hidden": (32,), "learning_rate": 0.005, **settings})
    algorithm, _ = fit(
        name, config, episodes, Encoder(episodes.features), seeds=range(seeds), gradient_steps=steps, batch_size=batch_size
    )  # fmt: skip
    (states,) = {feature.categories for feature in episodes.features}
    assert states is not None
    every = torch.arange(float(states))[None, :, None].expand(seeds, -1, -1)
    mask = torch.ones(seeds, states, episodes.n_actions, dtype=torch.bool)
    with torch.no_grad():
        return algorithm.double().distribution(every.double(), mask).probs.numpy()


LADDER, NARROW = ladder(), road()
COVERED, FEW = log_of(LADDER, 1500), log_of(NARROW, 40)
EVERY: dict[str, Any] = {"target_interval": 20}


def test_a_reward_that_comes_late_is_for_those_who_look_ahead() -> None:
    """Who looks at the next reward alone, or takes what follows for a cost, is far from the optimum of the log."""
    model = TabularModel.fit(COVERED, LADDER.n_states)
    assert model is not None and model.visits[:-1].min() > 100
    optimum = model.value(best(model))
    for future in (0.0, -1.0):
        assert model.value(best(model, future)) < 0.5 * optimum


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("dqn", EVERY, 400),
        ("dqn", {**EVERY, "double": True}, 400),
        ("qr_dqn", {**EVERY, "quantiles": 20}, 400),
        ("iqn", {**EVERY, "quantiles": 8, "target_quantiles": 8}, 400),
        ("nfq", EVERY, 400),
        ("discrete_sac", {**EVERY, "entropy_share": 0.05, "initial_temperature": 0.02}, 600),
        ("cql", {**EVERY, "alpha": 0.01}, 400),
        ("bcq", {**EVERY, "threshold": 0.1, "logit_penalty": 0.01}, 400),
        ("iql", {"inverse_temperature": 50.0, "expectile": 0.9, "polyak": 0.05}, 400),
        ("awac", {"inverse_temperature": 50.0, "polyak": 0.05}, 400),
        ("crr", {**EVERY, "inverse_temperature": 30.0}, 400),
        ("crr", {**EVERY, "weight": "binary"}, 400),
        ("crr", {**EVERY, "weight": "binary", "advantage": "max"}, 400),
        ("td3_bc", {"alpha": 20.0, "polyak": 0.1}, 800),
        ("rebrac", {"polyak": 0.1, "critic_penalty": 0.0, "policy_penalty": 0.1}, 800),
        ("td3_awr", {"polyak": 0.1, "critic_penalty": 0.0, "policy_penalty": 1.0, "inverse_temperature": 30.0}, 600),
    ],
)
def test_where_everything_was_tried_the_optimum_is_found(name: str, settings: dict[str, Any], steps: int) -> None:
    """To 1% of what is best in the log, by dynamic programming."""
    model = TabularModel.fit(COVERED, LADDER.n_states)
    assert model is not None
    for probs in policies(name, COVERED, 2, steps, 128, **settings):
        assert model.value(np.eye(3)[probs.argmax(1)]) > 0.99 * model.value(best(model))


def test_where_little_was_tried_caution_pays() -> None:
    """Plain Q-learning believes what it makes up of actions that it has not seen; 8 seeds, by exact value of what is deployed."""
    settings: dict[str, dict[str, Any]] = {
        "dqn": EVERY,
        "cql": {**EVERY, "alpha": 0.3},
        "bcq": {**EVERY, "logit_penalty": 0.01},
        "iql": {"inverse_temperature": 30.0, "expectile": 0.8, "polyak": 0.05},
    }
    optimum = NARROW.value(NARROW.optimal())
    found = {
        name: [NARROW.value(probs) / optimum for probs in policies(name, FEW, 8, 400, 64, **more)]
        for name, more in settings.items()
    }
    assert np.mean(found["dqn"]) < 0.7
    for name in ("cql", "bcq", "iql"):
        assert np.mean(found[name]) > np.mean(found["dqn"]) + 0.15, found
        assert np.mean(found[name]) > NARROW.value(NARROW.behavior) / optimum + 0.1, found
