"""Policies that look back: what a transformer sees and what it does not, and what it finds."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import Window
from offrl_models.datasets.views import windows
from offrl_models.distributions import Space
from offrl_models.history import HistoryDensity, HistoryMixture, log_density_given_history, probs_given_history
from offrl_models.optimizer import FusedAdam
from offrl_models.schema import Episodes
from offrl_models.training import fit
from offrl_models.transformer import SequenceActor
from tests.conftest import codes
from tests.test_algorithms import EPISODES, build, sampled, trained

NAME = "decision_transformer"
SPACES: list[Space] = ["discrete", "continuous"]


def random_window(space: Space, context: int, known_from: int = 0, seed: int = 0) -> Window:
    """Two seeds, five windows; the rows before `known_from` are not known."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 5, context)
    if space == "discrete":
        seen = torch.randint(10, (*shape, 1), generator=generator).float()
        action = torch.randint(3, shape, generator=generator)
    else:
        seen = torch.randn(*shape, 2, generator=generator)
        action = torch.rand(*shape, 2, generator=generator) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    place = torch.arange(context)
    step = (place - known_from).clamp(min=0).expand(shape)
    mask = torch.ones(*shape, 3 if space == "discrete" else 0, dtype=torch.bool)
    known = (place >= known_from).expand(shape)
    return Window(seen, action, torch.randn(shape, generator=generator), step, known, mask)


def shown(actor: SequenceActor, window: Window) -> torch.Tensor:
    with torch.no_grad():
        return actor.outputs(window)


@pytest.mark.parametrize("space", SPACES)
def test_nothing_that_comes_later_is_looked_at(space: Space) -> None:
    """Later rows, and the row's own action; what is seen and wanted there, and the action before it, count."""
    actor = build(NAME, [0, 1], space).policy
    window, other = random_window(space, 4, seed=0), random_window(space, 4, seed=1)
    before = shown(actor, window)
    for row in range(4):
        later = torch.arange(4) > row

        def mixed(part: torch.Tensor, junk: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            return torch.where(where.view(4, *[1] * (part.dim() - 3)), junk, part)

        assert isinstance(window.observation, torch.Tensor) and isinstance(other.observation, torch.Tensor)
        assert window.action is not None and other.action is not None
        changed = window._replace(
            observation=mixed(window.observation, other.observation, later),
            action=mixed(window.action, other.action, later | (torch.arange(4) == row)),
            return_to_go=mixed(window.return_to_go, other.return_to_go, later),
            known=window.known & ~later,
        )
        assert torch.equal(shown(actor, changed)[:, :, : row + 1], before[:, :, : row + 1])
        here = torch.arange(4) == row
        for name in ("observation", "return_to_go"):
            moved = window._replace(**{name: mixed(getattr(window, name), getattr(other, name), here)})
            told = (shown(actor, moved) - before).abs().amax((0, 1, 3)) > 1e-6
            assert not told[:row].any() and told[row:].all()
        acted = window._replace(action=mixed(window.action, other.action, here))
        told = (shown(actor, acted) - before).abs().amax((0, 1, 3)) > 1e-6
        assert not told[: row + 1].any() and told[row + 1 :].all()


@pytest.mark.parametrize("space", SPACES)
def test_rows_that_are_not_known_change_nothing(space: Space) -> None:
    """Whatever is in them, and also if there are none of them."""
    actor = build(NAME, [0, 1], space).policy
    window, other = random_window(space, 5, known_from=2, seed=0), random_window(space, 5, seed=1)
    assert isinstance(window.observation, torch.Tensor) and isinstance(other.observation, torch.Tensor)
    assert window.action is not None and other.action is not None and window.mask is not None
    junk = window._replace(
        observation=torch.cat([other.observation[:, :, :2], window.observation[:, :, 2:]], 2),
        action=torch.cat([other.action[:, :, :2], window.action[:, :, 2:]], 2),
        return_to_go=window.return_to_go.index_fill(2, torch.arange(2), torch.nan),
    )
    before = shown(actor, window)[:, :, 2:]
    assert torch.equal(shown(actor, junk)[:, :, 2:], before)
    short = Window(*(part[:, :, 2:] for part in window if isinstance(part, torch.Tensor)))
    assert torch.allclose(shown(actor, short), before, atol=1e-6)


def test_batches_have_the_windows_of_the_log() -> None:
    algorithm = build(NAME, [0], context=3)
    transitions, sampler = sampled(algorithm, [0], EPISODES)
    (batch,) = transitions.batches(sampler, 1)
    assert batch.window is not None and batch.window.action is not None and batch.window.mask is not None
    view = windows(EPISODES, 3, batch.row[0].numpy())
    assert (batch.window.known[0].numpy() == view.known).all() and (batch.window.step[0].numpy() == view.step).all()
    assert (batch.window.action[0].numpy() == EPISODES.action[view.row]).all()
    assert batch.window.return_to_go[0].numpy() == pytest.approx(EPISODES.reward_to_go[view.row], abs=1e-6)
    assert torch.equal(batch.window.action[..., -1], batch.action)
    assert build("bc", [0]) and sampled(build("bc", [0]), [0], EPISODES)[0].take(batch.row).window is None


def test_what_was_earned_and_what_is_still_to_come_are_the_return() -> None:
    total = EPISODES.sum_per_episode(EPISODES.reward)[EPISODES.episode_of_row]
    assert EPISODES.earned + EPISODES.reward_to_go == pytest.approx(total, abs=1e-12)
    assert not EPISODES.earned[EPISODES.offsets[:-1]].any()


def choosing(episodes: int, space: Space) -> Episodes:
    """Three decisions between two actions, of which one earns what the first observation says; nothing tells good from bad
    but the return. Whoever wrote the log sticks to the good one or to the bad one for an episode, by a coin."""
    rng, rows = np.random.default_rng(0), 3 * episodes
    good, sought = (rng.integers(0, 2, episodes).repeat(3) for _ in range(2))
    choice = np.where(sought, good, 1 - good)
    action = choice if space == "discrete" else (choice[:, None] + rng.uniform(-0.1, 0.1, (rows, 1))).astype(np.float32)
    return Episodes(
        episode_id=np.arange(episodes), offsets=np.arange(0, rows + 1, 3), observation=good[:, None].astype(np.float32),
        final_observation=np.zeros((episodes, 1), np.float32), action=action, reward=(choice == good).astype(float),
        mask=np.ones((rows, 2 if space == "discrete" else 0), bool), terminated=np.arange(1, rows + 1) % 3 == 0,
        truncated=np.zeros(rows, bool), action_prob=np.full(rows, 0.5), gamma=0.9, features=tuple(codes(2)),
        bounds=None if space == "discrete" else np.array([[-1.0, 2.0]]),
    )  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
def test_the_return_that_is_wanted_is_the_one_that_is_sought(space: Space) -> None:
    log = choosing(200, space)
    rate, steps = (0.003, 200) if space == "discrete" else (0.01, 400)
    config = make_config(NAME, {"embedding": 16, "layers": 1, "context": 3, "learning_rate": rate}, space)
    algorithm, _ = fit(
        NAME, config, log, Encoder(log.features), seeds=[2, 3], gradient_steps=steps, batch_size=32, clip_norm=0.25,
        warmup_steps=10,
    )  # fmt: skip
    assert float(algorithm.target_return) == 3.0  # the greatest in the log
    total = log.sum_per_episode(log.reward)
    for target in (3.0, 0.0):
        alike, found = log.take(np.abs(total - target) < 0.5), []
        for aim in (target, 3.0 - target):  # what was logged is then likely, and unlikely
            algorithm.aim_at(aim)
            if space == "discrete":
                probs = probs_given_history(HistoryMixture(algorithm, 2), alike)[np.arange(alike.n_rows), alike.action]
                assert probs.min() > 0.9 if aim == target else probs[alike.offsets[:-1]].max() < 0.1
            else:
                found.append(log_density_given_history(HistoryDensity(algorithm, 2, 1), alike).mean())
        assert space == "discrete" or found[0] > found[1] + 1.5


def test_what_lies_further_back_than_the_window_counts_by_what_was_earned_alone() -> None:
    algorithm = trained(build(NAME, [0, 1], context=2), [0, 1], 20)
    log = EPISODES.take(EPISODES.length == EPISODES.length.max())
    policy = HistoryMixture(algorithm, 2)
    before = probs_given_history(policy, log).reshape(log.n_episodes, -1, 3)
    first = log.offsets[:-1]
    action, observation, reward = log.action.copy(), log.observation.copy(), log.reward.copy()
    action[first], observation[first] = (action[first] + 1) % 3, (observation[first] + 1) % 5
    after = probs_given_history(policy, dataclasses.replace(log, action=action, observation=observation))
    changed = np.abs(after.reshape(before.shape) - before).max((0, 2)) > 1e-9
    assert changed[:2].all() and not changed[2:].any()
    reward[first] += 1.0
    after = probs_given_history(policy, dataclasses.replace(log, reward=reward)).reshape(before.shape)
    changed = np.abs(after - before).max((0, 2)) > 1e-9
    assert not changed[0] and changed[1:].all()


def test_probabilities_of_a_log_do_not_look_ahead() -> None:
    policy = HistoryMixture(trained(build(NAME, [0, 1], context=3), [0, 1], 20), 2)
    before = probs_given_history(policy, EPISODES)
    rng = np.random.default_rng(0)
    for step in range(2):
        later = EPISODES.step > step
        changed = dataclasses.replace(
            EPISODES,
            action=np.where(EPISODES.step >= step, rng.integers(0, 3, EPISODES.n_rows), EPISODES.action),
            reward=np.where(EPISODES.step >= step, 9.0, EPISODES.reward),
            observation=np.where(later[:, None], 1.0, EPISODES.observation).astype(np.float32),
        )
        after = probs_given_history(policy, changed)
        assert (after[EPISODES.step <= step] == before[EPISODES.step <= step]).all()
        assert (after[EPISODES.step == step + 1] != before[EPISODES.step == step + 1]).any()


def test_returns_that_are_all_alike_are_not_blown_up() -> None:
    first = EPISODES.take(EPISODES.length == 1)
    same = dataclasses.replace(first, reward=np.full(first.n_rows, 0.1))
    assert 0 < same.reward_to_go.std() < 1e-9  # rounding
    algorithm = build(NAME, [0])
    algorithm.look_at(same)
    assert float(algorithm.scale) == 1.0 and float(algorithm.target_return) == 0.1
    algorithm.look_at(dataclasses.replace(same, reward=np.linspace(-3.0, 1.0, same.n_rows)))
    assert float(algorithm.scale) == pytest.approx(4 / np.sqrt(12), rel=0.05) and float(algorithm.target_return) == 1.0


def test_heads_share_the_numbers_of_a_token() -> None:
    with pytest.raises(
        ValueError, match="heads of decision_transformer: value error, a divisor of embedding, 128, is needed"
    ):
        make_config(NAME, {"heads": 3})


def test_decoupled_weight_decay_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    adam = FusedAdam([{"params": [mine], "lr": 0.1, "name": "a", "weight_decay": 0.3}])
    wanted = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3, fused=True)
    for _ in range(5):
        mine.grad = torch.randn(3, 2)
        theirs.grad = mine.grad.clone()
        adam.step()
        wanted.step()
        assert torch.equal(mine, theirs)


def test_the_loss_is_over_known_rows() -> None:
    algorithm = build(NAME, [0, 1], context=4)
    transitions, sampler = sampled(algorithm, [0, 1], EPISODES)
    (batch,) = transitions.batches(sampler, 1)
    window: Any = batch.window
    standard = window._replace(return_to_go=(window.return_to_go - algorithm.mean) / algorithm.scale)
    log_prob = algorithm.policy(standard.__class__(*standard[:2], standard[2].float(), *standard[3:])).log_prob(
        window.action
    )
    wanted = torch.stack([-each[known].mean() for each, known in zip(log_prob, window.known, strict=True)])
    assert torch.allclose(algorithm.losses(batch)["policy"], wanted, atol=1e-6) and not window.known.all()
