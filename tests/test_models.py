"""The learned model of the world: what it finds, whom it trusts, when it ends and how it goes on after it was cut short."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models import early_stopping
from offrl_models.checkpoint import Checkpoint
from offrl_models.datasets.encoding import Encoded, Encoder
from offrl_models.datasets.transitions import Sampler, TransitionBatch, Transitions
from offrl_models.dynamics import Dynamics, DynamicsConfig
from offrl_models.early_stopping import PATIENCE, EarlyStopping
from offrl_models.learner import NonFiniteLossError, TrainingConfig, train
from offrl_models.ope.worlds import World
from offrl_models.schema import Episodes, Feature
from offrl_models.training import fit_dynamics
from tests.conftest import chain_world, codes
from tests.test_algorithms import EPISODES, LOGS, build, sampled

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
            measure(known.predict(*asked(known, reach * direction[:, :2], reach * direction[:, 2:]))).mean()
            for reach in (0.8, 2.0, 5.0)
        ]
        assert found[0] < found[1] < found[2]  # of both seeds together
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
