"""The learned model of the world, rollouts in it, and what the algorithms that practise there find."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models import early_stopping
from offrl_models.algorithms import make_config
from offrl_models.checkpoint import Checkpoint
from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import Sampler, TransitionBatch, Transitions
from offrl_models.dynamics import Dynamics, DynamicsConfig, Prediction, Simulated
from offrl_models.early_stopping import PATIENCE, EarlyStopping
from offrl_models.learner import NonFiniteLossError, TrainingConfig, train
from offrl_models.model_losses import simulated_gap
from offrl_models.ope.worlds import LinearGaussianPolicy, LinearGaussianWorld, World
from offrl_models.schema import Episodes, Feature, InputError
from offrl_models.training import fit, fit_dynamics
from tests.conftest import chain_world, codes
from tests.test_algorithms import EPISODES, LOGS, MODEL, WORLD, build, exact, sampled
from tests.test_critics import LOW, WIDTH, narrow

DYNAMICS = np.array([[0.9, 0.2], [-0.1, 0.8]])
CONTROL = np.array([[0.5], [1.0]])
NOISE = np.array([0.05, 0.1])


def single_steps(observation: np.ndarray, action: np.ndarray, following: np.ndarray, **more: Any) -> Episodes:
    """One episode for each row, cut off where it did not end."""
    rows = len(observation)
    given = {"reward": np.zeros(rows), "terminated": np.zeros(rows, bool), "gamma": 0.9, **more}
    return Episodes(
        episode_id=np.arange(rows), offsets=np.arange(rows + 1), observation=observation.astype(np.float32),
        final_observation=following.astype(np.float32), action=action, truncated=~given["terminated"],
        mask=given.pop("mask", np.ones((rows, 0), bool)), action_prob=np.ones(rows), **given,
    )  # fmt: skip


def linear(rows: int, seed: int) -> Episodes:
    """s' = A s + B a + noise, reward s_0 - a, and an end where s_0 + a > 0.5."""
    rng = np.random.default_rng(seed)
    state, action = rng.uniform(-1, 1, (rows, 2)), rng.uniform(-1, 1, (rows, 1)).astype(np.float32)
    following = state @ DYNAMICS.T + action @ CONTROL.T + NOISE * rng.standard_normal((rows, 2))
    ends = state[:, 0] + action[:, 0] > 0.5
    following[ends] = 77.0  # what is observed after an end must not be looked at
    return single_steps(
        state, action, following, reward=state[:, 0] - action[:, 0], terminated=ends, features=tuple(codes(None, None)),
        bounds=np.array([[-1.0, 1.0]]),
    )  # fmt: skip


def model_of(log: Episodes, steps: int, **settings: Any) -> Dynamics:
    config = DynamicsConfig(**{
        "dynamics_hidden": (64, 64), "dynamics_learning_rate": 0.003, "dynamics_steps": steps, "members": 4, "elites": 3,
        **settings,
    })  # fmt: skip
    encoder = Encoder.fit(log)
    model = Dynamics(config, encoder, log.actions, [0, 1])
    transitions = Transitions(log, encoder)
    fit_dynamics(model, transitions, Sampler([transitions.rows] * 2, 128, [0, 1]), TrainingConfig())
    return model


@pytest.fixture(scope="module")
def known() -> Dynamics:
    return model_of(linear(4000, 1), 1500)


def asked(model: Dynamics, state: np.ndarray, action: np.ndarray) -> tuple[Encoded, torch.Tensor]:
    """Both seeds are asked the same."""
    seen = model.encoder(torch.as_tensor(state, dtype=torch.float32).expand(2, -1, -1))
    return seen, torch.as_tensor(action, dtype=torch.float32).expand(2, -1, -1)


@torch.no_grad()
def test_the_model_finds_linear_dynamics_their_noise_and_a_rule_of_termination(known: Dynamics) -> None:
    rng = np.random.default_rng(5)
    state, action = rng.uniform(-0.9, 0.9, (500, 2)), rng.uniform(-0.9, 0.9, (500, 1))
    found = known.predict(*asked(known, state, action))
    change = (known.shift + known.scale * found.mean)[..., :2] * known.encoder.scale
    goes_on = state[:, 0] + action[:, 0] < 0.4
    wanted = state @ DYNAMICS.T + action @ CONTROL.T - state
    assert np.abs(change.numpy() - wanted)[:, :, goes_on].mean() < 0.02
    reward = known.shift[-1] + known.scale[-1] * found.mean[..., -1]
    assert np.abs(reward.numpy() - (state[:, 0] - action[:, 0])).mean() < 0.02
    noise = (known.scale * found.log_scale.exp())[..., :2] * known.encoder.scale
    assert noise.numpy()[:, :, goes_on].mean((0, 1, 2)) == pytest.approx(NOISE, rel=0.15)
    margin = np.abs(state[:, 0] + action[:, 0] - 0.5) > 0.1
    ends = (found.event[..., 0] > 0).numpy() == (state[:, 0] + action[:, 0] > 0.5)
    assert ends[:, :, margin].mean() > 0.99
    assert float(known.gamma) == pytest.approx(0.9)


@torch.no_grad()
def test_uncertainty_grows_away_from_the_data(known: Dynamics) -> None:
    """Both by what members state and by how far they are apart; and so of actions alone."""
    rng = np.random.default_rng(6)
    direction = rng.uniform(-1, 1, (300, 3))
    direction[:, 0], direction[:, 2] = -np.abs(direction[:, 0]), -np.abs(direction[:, 2])  # where the task goes on
    for measure in (known.deviation, known.disagreement):
        found = [
            measure(known.predict(*asked(known, reach * direction[:, :2], reach * direction[:, 2:]))).mean(1)
            for reach in (0.8, 2.0, 5.0)
        ]
        assert (found[0] < found[1]).all() and (found[1] < found[2]).all()
    assert (known.farthest > 0).all() and known.farthest.isfinite().all()


@torch.no_grad()
def test_draws_are_of_the_elites_and_stay_in_the_range_of_the_log(known: Dynamics) -> None:
    draws = 20_000
    seen, action = asked(known, np.full((draws, 2), -0.3), np.full((draws, 1), 0.2))
    uniform = torch.rand(2, draws, known.numbers, generator=torch.Generator().manual_seed(0))
    kept = known.elite.clone()
    known.elite.copy_(torch.tensor([[3, 3, 3], [1, 1, 1]]))
    step, found = known.step(seen, action, uniform), known.predict(seen, action)
    known.elite.copy_(kept)
    for seed, member in ((0, 3), (1, 1)):
        mean = seen.numeric[seed, 0] + (known.shift + known.scale * found.mean[seed, member, 0])[:2]
        spread = (known.scale * found.log_scale[seed, member, 0].exp())[:2]
        drawn = step.next_observation.numeric[seed]
        assert ((drawn.mean(0) - mean).abs() < 0.05 * spread).all()
        assert drawn.std(0).numpy() == pytest.approx(spread.numpy(), rel=0.05)
        ended = torch.sigmoid(found.event[seed, member, 0, 0])
        assert float((step.discount[seed] == 0).float().mean()) == pytest.approx(float(ended), abs=0.01)
    far = known.step(*asked(known, np.full((50, 2), 40.0), np.full((50, 1), 1.0)), uniform[:, :50])
    assert (far.next_observation.numeric <= known.high[:2]).all() and (far.reward <= known.high[-1]).all()
    assert known.elite.shape == (2, 3)
    errors = known.holdout_error.gather(1, known.elite)
    assert torch.equal(errors, known.holdout_error.sort(1).values[:, :3])


def masked_world() -> World:
    """The chain, where an action is forbidden in each state but one, by its code."""
    world = chain_world()
    mask = np.ones((world.n_states, 3), bool)
    mask[np.arange(1, world.n_states), np.arange(1, world.n_states) % 3] = False
    behavior = mask / mask.sum(1, keepdims=True)
    return dataclasses.replace(world, mask=mask, behavior=behavior)


def test_the_model_finds_what_follows_a_code_and_which_actions_it_allows() -> None:
    world = masked_world()
    log = dataclasses.replace(world.simulate(1500, seed=4), features=tuple(codes(world.n_states)))
    model = model_of(log, 600, dynamics_hidden=(32,), dynamics_learning_rate=0.01)
    states = np.flatnonzero(~world.terminal)
    codes_, actions = (torch.as_tensor(each.ravel()) for each in np.meshgrid(states, range(3), indexing="ij"))
    seen = Encoded(torch.zeros(2, len(codes_), 0), codes_.expand(2, -1).unsqueeze(-1))
    with torch.no_grad():
        found = model.predict(seen, actions.expand(2, -1))
        onward, ending = found.category.softmax(-1), found.event[..., 0].sigmoid()
        every = Encoded(torch.zeros(2, len(states), 0), torch.as_tensor(states).expand(2, -1).unsqueeze(-1))
        allowed = [model.mask(every, torch.full((2, len(states)), member)) for member in range(4)]
    ends = world.transition[codes_, actions][:, world.terminal].sum(-1)
    wanted = world.transition[codes_, actions] * ~world.terminal
    seen_pair = world.mask[codes_, actions]
    assert np.abs(ending.numpy() - ends)[:, :, seen_pair].mean() < 0.05
    going = seen_pair & (ends < 1)
    total = np.abs(onward.numpy()[:, :, going] - wanted[going] / (1 - ends[going])[:, None]).sum(-1) / 2
    assert total.mean() < 0.1
    for mask in allowed:
        assert np.array_equal(mask.numpy(), np.stack([world.mask[states]] * 2))


def test_whether_a_number_will_be_missing_is_learned() -> None:
    rng = np.random.default_rng(0)
    code = rng.integers(0, 2, 2000)
    value = rng.normal(5.0, 2.0, (2, 2000))
    value[1] = np.where((code == 1) & (rng.random(2000) < 0.9), np.nan, 1.0 + 2.0 * rng.standard_normal(2000))
    log = single_steps(
        np.stack([value[0], code], 1), np.zeros((2000, 1), np.float32), np.stack([value[1], code], 1),
        features=(Feature("value", missing="mean"), Feature("code", 2)), bounds=np.array([[-1.0, 1.0]]),
    )  # fmt: skip
    model = model_of(log, 300, dynamics_hidden=(32,), dynamics_learning_rate=0.01)
    seen = model.encoder(torch.tensor([[5.0, 0.0], [5.0, 1.0]]).repeat_interleave(3000, 0).expand(2, -1, -1))
    uniform = torch.rand(2, 6000, model.numbers, generator=torch.Generator().manual_seed(1))
    after = model.step(seen, torch.zeros(2, 6000, 1), uniform).next_observation
    number, absent = after.numeric.unflatten(1, (2, 3000)).unbind(-1)
    assert absent.mean(-1)[:, 0].max() < 0.05 and absent.mean(-1)[:, 1].numpy() == pytest.approx(0.9, abs=0.05)
    assert (number[absent > 0] == 0.0).all()  # the mean stands in
    found = model.encoder.mean + model.encoder.scale * number[:, 0]
    assert found.mean(-1).detach().numpy() == pytest.approx(1.0, abs=0.7)


def test_each_member_keeps_its_best_weights_and_a_seed_is_done_when_none_gets_better() -> None:
    nan, late, worse = float("nan"), [1.0, 1.0, 9.0, 9.0], [9.0] * 4
    script = [
        [9.0, 5.0, 4.0, 4.0],
        [8.0, 6.0, 3.0, 5.0],
        [7.99, 6.0, 3.0, nan],
        [7.99, 6.0, 2.0, 5.0],
        worse,
        worse,
        worse,
    ]
    given = iter([*script, late, late])
    model: Any = Dynamics(
        DynamicsConfig(dynamics_hidden=(4,), members=2, elites=1), Encoder(codes(None, None)), 3, [0, 1]
    )
    surer = iter(range(20, 0, -1))  # masks get better all the time, and that does not count

    def errors(batch: TransitionBatch) -> dict[str, torch.Tensor]:
        for parameter in model.transition.parameters():
            parameter.data += 1.0
        return {"transition": torch.tensor(next(given)), "allowed": torch.full((4,), float(next(surer)))}

    for parameter in model.transition.parameters():
        torch.nn.init.zeros_(parameter)
    model.errors = errors
    batch = Transitions(LOGS["continuous"], Encoder(codes(None, None))).take(torch.zeros(4, 1, dtype=torch.long))
    stopping = EarlyStopping(model, batch)
    found = [(stopping.judge(), stopping.done) for _ in range(4 + PATIENCE)]
    done = [each for _, each in found]
    # The first seed gained at the second judgement for the last time, so that the eighth, where it would again, comes too late.
    assert done == [False] * 8 + [True]
    assert stopping.best["transition"][0].flatten(1)[:, 0].tolist() == [2.0, 1.0, 4.0, 1.0]
    assert stopping.error["transition"].tolist() == [8.0, 5.0, 2.0, 4.0]
    assert found[1][0] == {"transition_holdout_error": script[1], "allowed_holdout_error": [19.0] * 4}


class SecondTime:
    """Is done once it has judged twice."""

    def __init__(self) -> None:
        self.judged = torch.zeros(1)

    @property
    def done(self) -> bool:
        return bool(self.judged >= 2)

    def judge(self) -> dict[str, list[float]]:
        self.judged += 1
        return {"error": [float("nan") if self.judged < 2 else 3.0]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"stop.judged": self.judged}


def test_training_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """And what was judged stands beside the losses. A checkpoint of a training that has ended is not trained on."""
    saved = Checkpoint(tmp_path / "c", "this", every=10**6)
    for _ in range(2):
        algorithm = build("iql", [0])
        how = TrainingConfig(gradient_steps=40)
        went = train(algorithm, *sampled(algorithm, [0], EPISODES), how, chunk=5, stop=SecondTime(), checkpoint=saved)
        assert [(chunk["gradient_steps"], chunk["error"]) for chunk in went.history] == [(5, [None]), (10, [3.0])]


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
        assert torch.equal(action, algorithm.policy(observation, batch.mask).draws(random(len(taken) - 1)).squeeze(2))
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


class CutShortError(Exception):
    pass


def test_a_model_whose_training_was_cut_short_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of its seeds is done by then; and where both are, it is not trained any more."""
    monkeypatch.setattr(early_stopping, "PATIENCE", 2)
    config = DynamicsConfig(dynamics_hidden=(4,), dynamics_learning_rate=0.03, members=2, elites=1)
    saved, most = Checkpoint(tmp_path / "c", "this", every=100), 10_000

    def learned(at: int, checkpoint: Checkpoint | None) -> tuple[Dynamics, Any, list[tuple[int, int]]]:
        """A model, how its training went, and the steps that were told, the last of which may kill it."""
        model, told = Dynamics(config, Encoder(EPISODES.features), EPISODES.actions, [3, 4]), []
        transitions = Transitions(EPISODES, Encoder(EPISODES.features))

        def report(steps: int, of: int, losses: dict[str, float]) -> None:
            assert list(losses) == ["transition", "allowed", "transition_holdout_error", "allowed_holdout_error"]
            told.append((steps, of))
            if steps >= at:
                raise CutShortError

        given: Any = (model, transitions, Sampler([transitions.rows] * 2, 16, [3, 4]), TrainingConfig())
        with contextlib.suppress(CutShortError):
            return model, fit_dynamics(*given, report=report, checkpoint=checkpoint), told
        return model, None, told

    whole, wanted, every = learned(most, None)
    assert every == [*((steps, most) for steps in range(100, len(every) * 100, 100)), (len(every) * 100,) * 2]
    for at, left in ((300, every[:3]), (600, every[2:6]), (most, every[5:]), (most, [])):
        again, went, told = learned(at, saved)
        assert told == left and (went is None) == (at < most)
        if at == 600:
            tensors, _ = saved.load() or ({}, None)
            waited = sorted(tensors["stop.waited"].tolist())
            assert waited[0] < 2 == waited[1]  # one seed is done, the other trains on alone
        if went:
            assert went.history == wanted.history
            states = zip(whole.state_dict().items(), again.state_dict().items(), strict=True)
            assert [name for (name, one), (_, other) in states if not torch.equal(one, other)] == []


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


def test_members_that_explode_are_no_elites_and_too_few_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NonFiniteLossError, match="the transition loss of seed 0 is not finite"):
        model_of(linear(200, 1), 30, dynamics_learning_rate=1e30)
    honest = Dynamics.errors

    def errors(self: Dynamics, batch: TransitionBatch) -> dict[str, torch.Tensor]:
        return {
            name: found.index_fill(0, torch.tensor([0, 5, *bad]), torch.nan)
            for name, found in honest(self, batch).items()
        }

    monkeypatch.setattr(Dynamics, "errors", errors)
    bad: list[int] = []
    model = model_of(linear(200, 1), 5)
    assert [sorted(each) for each in model.elite.tolist()] == [[1, 2, 3], [0, 2, 3]]
    bad = [6]
    with pytest.raises(
        NonFiniteLossError, match="only 2 members of the model of the world of seed 1 have finite errors"
    ):
        model_of(linear(200, 1), 5)
