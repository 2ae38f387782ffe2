"""Rollouts in the learned model of the world, and what the algorithms that practise there find."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.checkpoint import Checkpoint
from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.dynamics import Prediction, Simulated
from offrl_models.model_losses import simulated_gap
from offrl_models.ope.worlds import LinearGaussianPolicy, LinearGaussianWorld
from offrl_models.schema import InputError
from offrl_models.training import fit
from tests.conftest import codes
from tests.test_algorithms import EPISODES, LOGS, MODEL, WORLD, build, sampled
from tests.test_covered_world import exact
from tests.test_critics import LOW, WIDTH, narrow
from tests.test_models import CutShortError


@pytest.fixture(scope="module", params=["discrete", "continuous"])
def practising(request: pytest.FixtureRequest) -> Any:
    """MOPO over each kind of action, before its first step, and a batch."""
    algorithm = build("mopo", [0, 1], request.param, real_ratio=0.25)
    transitions, sampler = sampled(algorithm, [0, 1], LOGS[request.param])
    return algorithm, list(transitions.batches(sampler, 8))


def stepped(algorithm: Any, batch: TransitionBatch, step: int) -> TransitionBatch:
    with torch.no_grad():
        return algorithm.rollouts.mixed(batch._replace(step=step), algorithm.policy, algorithm.dynamics.step)


def test_the_first_rows_are_logged_and_the_others_simulated(practising: Any) -> None:
    algorithm, (batch, *_) = practising
    mixed, again = stepped(algorithm, batch, 0), stepped(algorithm, batch, 0)
    assert algorithm.rollouts.real(32) == 8 and algorithm.rollouts.real(1) == 1  # never none of them
    assert torch.equal(mixed.reward[:, :8], batch.reward[:, :8]) and torch.equal(mixed.row[:, :8], batch.row[:, :8])
    assert torch.equal(mixed.mask[:, :8], batch.mask[:, :8]) and (mixed.row[:, 8:] == -1).all()
    assert not torch.isin(mixed.reward[:, 8:], batch.reward).all() and mixed.reward.shape == (2, 32)
    gamma = float(algorithm.dynamics.gamma)
    assert set(mixed.discount[:, 8:].unique().tolist()) <= {0.0, gamma}
    assert torch.equal(mixed.reward, again.reward) and torch.equal(mixed.action, again.action)


def test_rollouts_follow_the_policy_in_the_model_and_start_again_where_they_ended(practising: Any) -> None:
    """A model that adds 1 to the reward at each step and ends every second rollout at once."""
    algorithm, (batch, *_) = practising
    taken: list[Encoded] = []

    def step(observation: Encoded, action: torch.Tensor, uniform: torch.Tensor) -> Simulated:
        taken.append(observation)
        assert torch.equal(action, algorithm.policy(observation, batch.mask).sample(random(len(taken) - 1)).squeeze(2))
        ends = torch.arange(32) % 2 == 0
        return Simulated(
            next_observation=batch.next_observation, reward=torch.full((2, 32), float(len(taken))),
            discount=(~ends).float().expand(2, -1), next_mask=batch.mask, prediction=Prediction(*[torch.zeros(0)] * 4),
        )  # fmt: skip

    def random(step: int) -> torch.Tensor:
        assert batch.uniform is not None
        flat = batch.uniform[:, :, 1 : algorithm.rollouts.draws].flatten(2)
        start = step * algorithm.rollouts.numbers
        return flat[..., None, start : start + algorithm.rollouts.width]

    kept = [getattr(algorithm.rollouts, name).clone() for name in algorithm.rollouts.parts]
    with torch.no_grad():
        algorithm.rollouts.mixed(batch._replace(step=0), algorithm.policy, step)
    first, second = taken
    for start, now, after in zip(first, second, batch.next_observation, strict=True):
        assert torch.equal(now[:, ::2], start[:, ::2]) and torch.equal(now[:, 1::2], after[:, 1::2])
    assert algorithm.rollouts.reward[:, 0].flatten(1).unique().tolist() == [1.0, 2.0]
    for name, before in zip(algorithm.rollouts.parts, kept, strict=True):
        getattr(algorithm.rollouts, name).copy_(before)


def test_the_latest_rollouts_are_kept(practising: Any) -> None:
    """At every second step, the last three; between them nothing is added."""
    algorithm, (batch, *others) = practising
    seen = []
    for step in range(8):
        stepped(algorithm, [batch, *others][step], step)
        seen.append(algorithm.rollouts.reward.clone())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[4][:, 2], seen[3][:, 2]) and torch.equal(seen[4][:, :2], seen[3][:, :2])
    assert not torch.equal(seen[6][:, 0], seen[5][:, 0]) and torch.equal(seen[6][:, 1:], seen[5][:, 1:])


def simulated_by(name: str, **settings: Any) -> tuple[Any, Simulated, Simulated]:
    """A step of the model alone, and what an algorithm makes of it."""
    algorithm = build(name, [0, 1], "continuous", **settings)
    transitions, sampler = sampled(algorithm, [0, 1], LOGS["continuous"])
    (batch,) = transitions.batches(sampler, 1)
    assert batch.uniform is not None
    uniform = batch.uniform.flatten(2)[..., : algorithm.dynamics.numbers]
    given = (batch.observation, batch.action, uniform)
    with torch.no_grad():
        return algorithm, algorithm.dynamics.step(*given), algorithm.simulated(*given)


def test_mopo_charges_for_uncertainty() -> None:
    algorithm, plain, charged = simulated_by("mopo", penalty=3.0)
    units = torch.cat([algorithm.dynamics.scale[:-1], torch.ones(1)])
    stated, mean = units * plain.prediction.log_scale.exp(), units * plain.prediction.mean
    apart = mean - mean.mean(1, keepdim=True)
    wanted = 3.0 * algorithm.dynamics.scale[-1] * (stated.square() + apart.square()).sum(-1).sqrt().amax(1)
    assert torch.allclose(plain.reward - charged.reward, wanted, atol=1e-6) and (wanted > 0).all()
    assert torch.equal(plain.discount, charged.discount)


def test_morel_halts_where_members_disagree_and_nowhere_else() -> None:
    algorithm, plain, made = simulated_by("morel", halt_threshold=0.4, halt_penalty=2.0)
    model, found = algorithm.dynamics, plain.prediction
    expected = torch.cat([torch.cat([model.scale[:-1], torch.ones(1)]) * found.mean, found.event.sigmoid()], -1)
    apart = (expected[:, :, None] - expected[:, None]).square().sum(-1).sqrt().amax((1, 2))
    halts = apart > 0.4 * model.farthest[:, None]
    assert 0 < halts.sum() < halts.numel()
    cost = float(model.low[-1] - 2.0 * model.scale[-1])
    assert torch.equal(made.reward[~halts], plain.reward[~halts]) and made.reward[halts].numpy() == pytest.approx(cost)
    assert (made.discount[halts] == 0).all() and torch.equal(made.discount[~halts], plain.discount[~halts])


@pytest.mark.parametrize(("space", "log_volume"), [("discrete", np.log(3.0)), ("continuous", 2 * np.log(2.0))])
def test_the_gap_of_combo_is_the_volume_of_the_actions_where_q_is_zero(space: Any, log_volume: float) -> None:
    """Masks allow all here, where the model has learned so; twice, for two critics."""
    found = {}
    for alpha in (0.0, 1.0):
        algorithm = build("combo", [0], space, alpha=alpha, dynamics_steps=100)
        transitions, sampler = sampled(algorithm, [0], LOGS[space])
        with torch.no_grad():
            for parameter in [*algorithm.q.parameters(), *algorithm.policy.parameters()]:
                parameter.zero_()
            if space == "continuous":
                algorithm.policy.net.last_bias()[..., -2:] = 5.0  # so wide that the policy is nearly uniform
        (batch,) = transitions.batches(sampler, 1)
        found[alpha] = algorithm.losses(batch)["q"].item()
    assert found[1.0] - found[0.0] == pytest.approx(2 * log_volume, abs=0.02)


def test_combo_raises_logged_rows_alone() -> None:
    """The gradient of the gap at the value of an action taken is negative in logged rows, and in no other."""
    algorithm = build("combo", [0], "discrete", real_ratio=0.25)
    transitions, sampler = sampled(algorithm, [0], EPISODES)
    (batch,) = transitions.batches(sampler, 1)
    batch = stepped(algorithm, batch, 0)
    each = torch.zeros(1, 2, 32, 3, requires_grad=True)
    algorithm.q.each = lambda observation: each
    taken, everywhere = algorithm._values(batch, algorithm.policy(batch.observation, batch.mask), *[torch.zeros(0)] * 2)
    simulated_gap(everywhere, taken[..., : algorithm.rollouts.real(32)]).sum().backward()
    assert each.grad is not None
    raised = each.grad[0, 0].amin(-1) < 0
    assert raised[:8].all() and not raised[8:].any() and (each.grad.sum((-1, -2)).abs() < 1e-6).all()


def regulated() -> LinearGaussianWorld:
    """One state that is to be brought to 0, at a cost."""
    one = np.eye(1)
    return LinearGaussianWorld(
        dynamics=0.9 * one, control=0.5 * one, noise=0.01 * one, state_cost=one, action_cost=0.3 * one,
        initial_mean=np.zeros(1), initial_covariance=one, horizon=40, gamma=0.8, survival=0.95,
        behavior=LinearGaussianPolicy(gain=-0.3 * one, covariance=0.5 * one),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "steps", "share"),
    [
        ("mopo", {}, 600, 0.01),
        ("combo", {"alpha": 0.05, "samples": 2}, 400, 0.01),
        ("morel", {"halt_penalty": 3.0}, 600, 0.03),
    ],
)
def test_the_optimal_gain_of_a_linear_system_is_found(
    name: str, settings: dict[str, Any], steps: int, share: float
) -> None:
    """The value of a = k s in closed form misses so small a share of the optimum, and the behavior without its noise 22%."""
    world, still = regulated(), np.zeros((1, 1))
    optimum = world.regulator(still)
    raw = world.simulate(300, seed=1)
    log = dataclasses.replace(
        raw, observation=raw.observation[:, :1], final_observation=raw.final_observation[:, :1],
        features=tuple(codes(None)), bounds=np.array([[raw.action.min(), raw.action.max()]], np.float64),
    )  # fmt: skip
    given = {
        "hidden": (32, 32), "learning_rate": 0.01, "actor_learning_rate": 0.01, "polyak": 0.05, "members": 4, "elites": 3,
        "initial_temperature": 0.1, "dynamics_hidden": (32, 32), "dynamics_steps": 300, **settings,
    }  # fmt: skip
    config = make_config(name, given, "continuous")
    algorithm, _ = fit(name, config, log, Encoder.fit(log), seeds=[0, 1], gradient_steps=steps, batch_size=128)
    state = torch.linspace(-1.5, 1.5, 31)[None, :, None].expand(2, -1, -1)
    with torch.no_grad():
        action = algorithm.distribution(state, None).greedy[..., 0].numpy()
    x = state[0, :, 0].numpy()
    assert np.abs(action - x * optimum.gain[0, 0]).mean(1).max() < 0.2
    for seed in range(2):
        gain = float(action[seed] @ x / (x @ x))
        found = LinearGaussianPolicy(gain=np.array([[gain]]), covariance=still)
        assert world.value(found) > (1.0 + share) * world.value(optimum)  # values are costs


CODED = {
    "hidden": (32,), "learning_rate": 0.005, "actor_learning_rate": 0.005, "polyak": 0.05, "initial_temperature": 0.1,
    "dynamics_hidden": (32,), "dynamics_learning_rate": 0.01, "dynamics_steps": 400, "members": 4, "elites": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), [("mopo", {"penalty": 0.2}), ("combo", {"alpha": 0.05}), ("morel", {})])
def test_a_covered_world_of_codes_is_solved(name: str, settings: dict[str, Any]) -> None:
    """By exact value, within 3% of the optimum; the behavior has a third of it."""
    log = dataclasses.replace(WORLD.simulate(2000, seed=2), features=tuple(codes(WORLD.n_states)))
    config = make_config(name, {**CODED, **settings})
    algorithm, _ = fit(name, config, log, Encoder(log.features), seeds=[0, 1], gradient_steps=400, batch_size=128)
    assert exact(WORLD, algorithm, 2) > 0.97 * WORLD.value(WORLD.optimal())


@pytest.mark.parametrize(
    ("name", "settings", "least", "most"),
    [
        ("mopo", {"penalty": 5.0}, 0.0, 0.03),
        ("combo", {"alpha": 0.5, "samples": 4}, 0.0, 0.03),
        ("morel", {"halt_threshold": 0.7}, 0.0, 0.06),
        ("mopo", {"penalty": 0.0}, 0.2, 0.4),
    ],
)
def test_where_the_log_shows_little_each_keeps_to_it(
    name: str, settings: dict[str, Any], least: float, most: float
) -> None:
    """How far actions leave the middle fifth of their range, beyond which nobody knows, in shares of it: the median seed."""
    log = narrow(300, 1)
    given = {**CODED, "hidden": (32, 32), "dynamics_hidden": (32, 32), "dynamics_learning_rate": 0.003, **settings}
    config = make_config(name, {**given, "dynamics_steps": 300, "rollout_steps": 2, "polyak": 0.02}, "continuous")
    algorithm, _ = fit(name, config, log, Encoder.fit(log), seeds=range(5), gradient_steps=400, batch_size=128)
    with torch.no_grad():
        seen = torch.as_tensor(log.observation[:500]).expand(5, -1, -1)
        share = (algorithm.distribution(seen, None).greedy.numpy() - LOW) / WIDTH
    assert least <= np.median(np.abs(share - share.clip(0.4, 0.6)).mean((1, 2))) < most + 1e-6


def test_an_algorithm_and_its_model_that_were_cut_short_go_on_bit_for_bit(tmp_path: Path) -> None:
    config = make_config("mopo", {"hidden": (8,), **MODEL, "dynamics_steps": 200})
    given: Any = ("mopo", config, EPISODES, Encoder(EPISODES.features))
    how: Any = {"seeds": [0, 1], "batch_size": 32, "gradient_steps": 120}
    whole, wanted = fit(*given, **how)
    saved, told = Checkpoint(tmp_path / "c", "this", every=100), []

    def dying(task: str, at: int) -> Any:
        def report(steps: int, *others: Any) -> None:
            told.append((task, steps))
            if steps == at:
                raise CutShortError

        return report

    again, went = None, None
    for of_model, at in ((200, 0), (0, 120), (0, 0)):
        with pytest.raises(CutShortError) if of_model or at else contextlib.nullcontext():
            again, went = fit(
                *given, **how, checkpoint=saved, model_report=dying("model", of_model), report=dying("mopo", at)
            )
    assert told == [("model", 100), ("model", 200), ("model", 200), ("mopo", 100), ("mopo", 120), ("mopo", 120)]
    assert again is not None and went is not None and went.model is not None and wanted.model is not None
    assert went.history == wanted.history and went.model.history == wanted.model.history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert torch.equal(whole.dynamics.elite, again.dynamics.elite)
    assert torch.equal(whole.rollouts.reward, again.rollouts.reward)
    saved.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_use_is_said() -> None:
    uneven = dataclasses.replace(EPISODES, interval=np.full(EPISODES.n_rows, 2.0))
    for name in ("mopo", "combo", "morel"):
        with pytest.raises(InputError, match="decisions are not equally far apart, and the model of the world has one"):
            fit(name, make_config(name, MODEL), uneven, Encoder(EPISODES.features), seeds=[0], gradient_steps=1)
        with pytest.raises(ValueError, match=f"elites of {name}: .*should be at most the number of members, 4"):
            make_config(name, {"members": 4, "elites": 5})
        with pytest.raises(ValueError, match=f"elites of {name}: .*should be at most the number of members, 3"):
            make_config(name, {"members": 3})  # of which five would be elites
