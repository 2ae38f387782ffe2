"""The benchmarks of training and control: counted work, checkouts of others, logs, and verdicts of what is earned."""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from benchmarks import (
    checkouts,
    control,
    control_tasks,
    harness,
    ope_peers,
    ope_works,
    training,
    training_checkouts,
    training_works,
)
from benchmarks.harness import Cost
from offrl_models.algorithms import ALGORITHMS
from offrl_models.datasets.encoding import Encoder
from offrl_models.exported import open_session
from offrl_models.training import sampler_of, transitions_of


def counted(name: str, folder: Path) -> float:
    row = training_works.ROWS[name]
    training_works.make_log(folder / "log", 20, row.actions)
    episodes, encoder = training_works.logged(folder / "log"), Encoder(ope_works.features(training_works.OBSERVED))
    learned: Any = ALGORITHMS[row.algorithm][1](training_works.made(row, episodes), encoder, episodes.actions, [0])
    transitions = transitions_of(learned, episodes, encoder)
    return training_works.counted_flop(
        learned, transitions, sampler_of(learned, transitions, episodes, ope_works.BATCH, [0])
    )


@pytest.mark.parametrize("name", training_works.ROWS)
def test_every_row_can_be_trained_and_its_flop_counted(name: str, tmp_path: Path) -> None:
    assert counted(name, tmp_path) > 1e8


def test_counted_flop_are_those_of_the_products(tmp_path: Path) -> None:
    """A network of the policy alone: forward, and gradients of all layers, none with respect to what is observed."""
    sizes = (training_works.OBSERVED, *ope_works.HIDDEN, 8)
    layers = [2 * ope_works.BATCH * before * after for before, after in pairwise(sizes)]
    assert counted("bc/8", tmp_path) == 3 * sum(layers) - layers[0]


def test_training_runs_without_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--row", "iql/8", "--gradient-steps", "3", "--episodes", "3", "--repeats", "1"]
    training.main([*small, "--peers", str(tmp_path / "none")])
    printed = capsys.readouterr()
    figures = {figure["name"]: figure for figure in map(json.loads, printed.out.splitlines())}
    assert set(figures) == {f"training/iql/8/offrl/{what}" for what in ("speed", "rate", "overhead")}
    assert figures["training/iql/8/offrl/rate"]["peer"] == "sgemm 256" and printed.err.count("left out") == 1


def test_training_is_compared_round_by_round() -> None:
    def cost(cpu: float, **result: float) -> Cost:
        return Cost(1.0, cpu, 1.0, 1.0, 0.0, {name: [value] for name, value in result.items()})

    ours = [cost(cpu, bare_s=1.0, gflops=100.0, flop=3e9) for cpu in (1.0, 2.0, 4.0)]
    costs = {"offrl": ours, "d3rlpy": [cost(4.0)] * 3, "corl": [cost(1.0)] * 3, "unifloral": [cost(3.0)] * 3}
    every = training.compared("bc/8", costs, 100, {})
    found = {each.name.removeprefix("training/bc/8/"): each for each in every if each.peer not in checkouts.CHECKOUTS}
    assert (found["offrl/speed"].value, found["d3rlpy/speed"].value) == (50.0, 25.0)
    ratios = [found[f"offrl/ratio{what}"] for what in ("", "/from", "/to")]
    assert [(each.ratio, each.target) for each in ratios] == [(2.0, 3.0), (1.0, 3.0), (4.0, 3.0)]
    rate = 3e9 * 100 / 2.0 / 1e9
    assert (found["offrl/rate"].value, found["offrl/rate"].ratio) == (pytest.approx(rate), pytest.approx(rate / 100))
    assert (found["offrl/overhead"].ratio, found["offrl/overhead"].target) == (2.0, 1.03)
    others = {each.peer: each for each in every if each.name.endswith("ratio")}
    assert [(others[who].ratio, others[who].target) for who in ("corl", "unifloral")] == [(0.5, 1.2), (1.5, 0.9)]
    assert checkouts.ahead(every) == "ahead of us: CORL in training/bc/8 (ratio 0.50)"


FAKE = """
import d4rl, gym, pyrallis, torch, wandb
from dataclasses import dataclass
from torch import nn

@dataclass
class TrainConfig:
    env: "gym.Env" = None

class Actor(nn.Module):
    def __init__(self, state_dim, action_dim, max_action):
        super().__init__()
        wide = [layer for _ in range(2) for layer in (nn.Linear(256, 256), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(state_dim, 256), nn.ReLU(), *wide, nn.Linear(256, action_dim), nn.Tanh())

class ReplayBuffer:
    def __init__(self, state_dim, action_dim, buffer_size):
        self.shape = (buffer_size, state_dim, action_dim)

    def load_d4rl_dataset(self, data):
        assert self.shape == (*data["observations"].shape, data["actions"].shape[1])
        follows = (data["next_observations"][:-1] == data["observations"][1:]).all(1)
        assert (follows | (data["terminals"][:-1] == 1)).all() and data["terminals"].sum() == 2

    def sample(self, batch_size):
        return batch_size

class BC:
    def __init__(self, max_action, actor, actor_optimizer, discount=0.99):
        assert discount == 0.95 and [type(layer).__name__ for layer in actor.net] == 2 * ["Linear", "ReLU"] + ["Linear", "Tanh"]
        assert actor_optimizer.param_groups[0]["params"] == list(actor.parameters())
        self.rows = 0

    def train(self, batch):
        self.rows += batch
        return {"actor_loss": float(self.rows), "other": float("nan")}

@pyrallis.wrap()
def train(config: TrainConfig):
    wandb.init()
"""


def test_a_checkout_trains_by_its_own_means(tmp_path: Path) -> None:
    corl = checkouts.CHECKOUTS["corl"]
    (tmp_path / corl.folder).mkdir(parents=True)
    for row in corl.files:
        corl.file(tmp_path, row).write_text(FAKE)
    training_works.make_log(tmp_path / "log", 2, training_works.CONTINUOUS)
    start = checkouts.commands({"corl": tmp_path}, Path(sys.prefix), tmp_path, False)["corl"]
    cost = harness.run([*start, "bc/c", "3", str(tmp_path / "log")], threads=1)
    assert cost.result == {"loss": [3.0 * ope_works.BATCH]}


def test_networks_of_checkouts_are_cut_to_ours() -> None:
    def stack(*sizes: int) -> nn.Module:
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.ModuleList([nn.Sequential(*layers, nn.Linear(sizes[-1], 1))])

    (cut,) = training_checkouts.cut(stack(5, 8, 8, 8, 8), (8, 8))
    assert [tuple(layer.weight.shape) for layer in cut[::2]] == [(8, 5), (8, 8), (1, 8)]
    assert len(training_checkouts.cut(stack(5, 8, 8), (8, 8))[0]) == 5
    for other in (stack(5, 8), stack(5, 9, 9), nn.Linear(5, 8)):
        with pytest.raises(ValueError, match="other hidden layers|no stack"):
            training_checkouts.cut(other, (8, 8))


def test_losses_that_are_no_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training_checkouts, "replace_dispensable", lambda: None)
    for losses in ({"q_loss": float("nan")}, {"q": 1.0}):
        monkeypatch.setitem(training_checkouts.WORKS, "corl", lambda *_, losses=losses: lambda: losses)
        with pytest.raises(ValueError, match=r"CORL ended bc/c with losses that are no numbers"):
            training_checkouts.fit("corl", tmp_path, "bc/c", tmp_path, 1)()


@pytest.mark.parametrize("name", checkouts.CHECKOUTS)
def test_what_is_no_checkout_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"is no checkout of {checkouts.CHECKOUTS[name].title}: it has no .*/"):
        training.main([f"--{name}", str(tmp_path), "--row", "bc/8", "--gradient-steps", "1", "--peers", str(tmp_path)])


def test_checkouts_without_an_environment_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkouts.commands(dict.fromkeys(checkouts.CHECKOUTS, tmp_path), None, tmp_path / "none", False) == {}
    assert capsys.readouterr().err.count("Unifloral is left out") == 1


def test_other_losses_are_noticed() -> None:
    training.require_same("offrl", 1.06, "d3rlpy", 1.0, training.AGREED_STEPS)
    training.require_same("offrl", 2.0, "d3rlpy", 1.0, training.AGREED_STEPS - 1)
    for loss in (1.08, float("nan")):
        with pytest.raises(ValueError, match="differ in their mean losses"):
            training.require_same("offrl", loss, "d3rlpy", 1.0, training.AGREED_STEPS)


def simulated(name: str) -> control_tasks.Task:
    """A task with a log of four episodes."""
    for needed in ("gymnasium", *(["mujoco"] if name == "reacher" else [])):
        pytest.importorskip(needed, reason=f"the peers' own dependency: pip install {needed}")
    return dataclasses.replace(control_tasks.TASKS[name], episodes=4)


@pytest.mark.parametrize("name", control_tasks.TASKS)
def test_the_propensities_of_the_controller_are_those_it_draws_with(name: str) -> None:
    task, rng = control_tasks.TASKS[name], np.random.default_rng(0)
    seen = rng.standard_normal((40_000, 10 if name == "reacher" else 3))
    drawn, controlled = task.noisy(seen, rng), np.ones(len(seen), bool)
    assert (np.abs(drawn) <= task.limit).all() and (np.abs(drawn) == task.limit).mean() < 1e-4  # no mass at the bounds
    mu = task.density(seen, drawn, controlled)
    for noise in (
        0.6 * task.noise,
        0.9 * task.noise,
    ):  # E[pi / mu] = 1 for a known pi, here and where actions are uniform
        ratio = task.density(seen, drawn, controlled, noise) / mu
        assert ratio.std() > 0.1 and abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5
    anywhere = task.uniform(seen, rng)
    ratio = task.density(seen, anywhere, controlled) / task.density(seen, anywhere, ~controlled)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("name", control_tasks.TASKS)
def test_a_log_of_control_is_one_of_ours(name: str, tmp_path: Path) -> None:
    task = simulated(name)
    control_tasks.make_log(task, tmp_path)
    given = ope_peers.load(tmp_path)
    episodes = control.logged(given, task)
    assert episodes.n_episodes == 4 and len(set(episodes.length)) == 1 and not episodes.terminated.any()
    assert episodes.truncated.sum() == 4 and episodes.discount.min() == control_tasks.GAMMA  # bootstrapped past the end
    controlled = np.arange(4)[episodes.episode_of_row] % 2 == 0
    assert np.allclose(episodes.action_prob, task.density(episodes.observation, episodes.action, controlled))
    earned = episodes.sum_per_episode(episodes.reward) / task.reward_scale
    assert np.allclose(earned, given["return"]) and earned[::2].mean() > earned[1::2].mean()
    assert (np.abs(episodes.action).max(0) <= episodes.known_bounds[:, 1]).all()


def test_what_was_trained_on_control_acts_as_its_graph(tmp_path: Path) -> None:
    task = simulated("pendulum")
    control_tasks.make_log(task, tmp_path)
    losses = control.train("pendulum/iql", 2, tmp_path, 2)
    assert losses.keys() == {"q", "value", "policy"} and all(len(each) == 2 for each in losses.values())
    given = {"observation": np.eye(3, dtype=np.float32), "uniform": np.full((3, 2), 0.25)}
    greedy, drawn = map(np.asarray, open_session(tmp_path / "iql.onnx").run(["greedy", "drawn"], given))
    assert greedy.shape == drawn.shape == (2, 3, 1) and (np.abs(drawn) <= task.limit).all()
    assert not np.array_equal(greedy, drawn) and not np.array_equal(greedy[0], greedy[1])


def test_the_verdict_is_of_differences_seed_by_seed() -> None:
    far_apart = [-100.0, -500.0, -900.0]  # initial states differ more than the contenders do
    found = control.difference(
        far_apart, [value + gap for value, gap in zip(far_apart, (9.0, 10.0, 11.0), strict=True)]
    )
    reach = 4.302653 / 3**0.5  # t of 2 degrees of freedom; the standard deviation is 1
    assert found == pytest.approx((-10.0, -10.0 - reach, -10.0 + reach)) and control.verdict(found) == "worse"
    assert control.verdict(control.Mean(1.0, -0.1, 2.1)) == control.verdict(control.Mean(-1.0, -2.1, 0.0)) == "level"
    assert control.verdict(control.Mean(1.0, 0.1, 1.9)) == "better"
    with pytest.raises(ValueError, match="two training seeds or more"):
        control.Mean.of([1.0])
    with pytest.raises(ValueError, match="zip"):
        control.difference([1.0, 2.0], [1.0])


def test_control_is_compared_by_what_is_earned(tmp_path: Path) -> None:
    def cost(**result: list[float]) -> Cost:
        return Cost(1.0, 2.0, 3.0, 4.0, 0.0, result)

    costs = {
        "training": cost(),
        "offrl": cost(greedy=[-9.0, -12.0], drawn=[-20.0, -20.0]),
        "d3rlpy": cost(greedy=[-10.0, -11.0]),
    }
    found = {figure.name.removeprefix("control/t/a/"): figure for figure in control.compared("t/a", costs, {})}
    assert found["offrl/greedy"].value == -10.5 and found["offrl/deployed"].value == -20.0
    assert found["difference"].value == 0.0 and found["difference/to"].value == pytest.approx(12.7062, abs=1e-3)
    bars = {name for name, figure in found.items() if figure.target is not None}
    assert (
        bars == {"difference/to"} and found["difference/to"].target == 0.0 and found["difference/to"].peer == "d3rlpy"
    )
    assert control.table_row("t/a", 2000, costs).startswith(
        "| t/a | 2,000 | -10.5 (-29.6 to 8.6) | -10.5 (-16.9 to -4.1) | 0.0 (-12.7 to 12.7) | level | -20.0 ("
    )
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(dataclasses.asdict(costs["offrl"])))
    assert control.kept(path, ["false"]) == costs["offrl"]  # and nothing is run


def test_control_needs_peers_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        control.main(["--peers", str(tmp_path / "none")])
    assert "nothing can be simulated without them" in capsys.readouterr().err
