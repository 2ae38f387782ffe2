"""Policies: the projection is the nearest capped distribution, and an exported graph is the policy it came from."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.algorithms import ALGORITHMS, make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import ROWS_AT_A_TIME, MixtureDensity
from offrl_models.exported import OnnxPolicy
from offrl_models.exporting import export_checked, export_ladder_checked, weights
from offrl_models.policies import BehaviorTable, CappedPolicy, Mixture, project
from offrl_models.schema import Episodes, InputError
from offrl_models.tensors import read_tensors
from tests.conftest import chain_world, codes
from tests.test_algorithms import SPACES, build, reaching, trained


def distributions(seed: int, rows: int, actions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random policies and behavior policies, some of them deterministic, some without support on an action."""
    rng = np.random.default_rng(seed)
    pi, mu = rng.dirichlet(np.full(actions, 0.3), rows), rng.dirichlet(np.full(actions, 0.5), rows)
    pi[::3] = np.eye(actions)[rng.integers(0, actions, len(pi[::3]))]
    mu[::2, 0] = 0.0
    return torch.as_tensor(pi), torch.as_tensor(mu / mu.sum(1, keepdims=True))


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([1.0, 1.2, 1.5, 2.0, 5.0, 1e6]))
def test_a_projection_is_a_distribution_under_its_cap(seed: int, actions: int, cap: float) -> None:
    pi, mu = distributions(seed, 12, actions)
    projected = project(pi, mu, cap)
    assert projected.sum(-1).numpy() == pytest.approx(np.ones(12), abs=1e-9)
    assert bool((projected >= 0).all())
    assert bool((projected <= cap * mu * (1 + 1e-6) + 1e-9).all())


@given(st.integers(0, 10_000), st.sampled_from([1.2, 2.0]))
def test_no_capped_distribution_is_nearer(seed: int, cap: float) -> None:
    """KL(p | pi) of the projection is at most that of random feasible distributions, mixtures of it with others."""
    pi, mu = distributions(seed, 1, 4)
    pi = 0.98 * pi + 0.02 * mu.clamp(min=1e-3) / mu.clamp(min=1e-3).sum()
    best = project(pi, mu, cap)

    def divergence(p: torch.Tensor) -> float:
        return float(torch.where(p > 0, p * (p / pi).log(), 0.0).sum())

    rng = np.random.default_rng(seed)
    for _ in range(20):
        direction = project(torch.as_tensor(rng.dirichlet(np.ones(4), 1)), mu, cap)
        assert divergence(best) <= divergence(0.9 * best + 0.1 * direction) + 1e-6


def test_projections_at_the_ends() -> None:
    pi, mu = distributions(0, 20, 5)
    assert project(pi, mu, 1.0).numpy() == pytest.approx(mu.numpy(), abs=1e-6)  # only mu itself is under 1 mu
    inside = 0.5 * pi + 0.5 * mu
    assert project(inside, inside, 3.0).numpy() == pytest.approx(inside.numpy(), abs=1e-9)


def test_the_behavior_table_shares_what_is_left_among_unseen_allowed_actions() -> None:
    table = BehaviorTable(np.array([[0.5, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]]))
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    probs = table(torch.tensor([[0.0], [1.0]]), mask)
    assert probs[0].tolist() == pytest.approx([0.5, 0.25, 0.25, 0.0])
    assert probs[1].tolist() == pytest.approx([0.6, 0.4, 0.0, 0.0])


@pytest.fixture(scope="module")
def episodes() -> Episodes:
    return chain_world().simulate(200, seed=1)


def policy_of(name: str, encoder: Encoder, actions: int) -> Mixture:
    model = {"dynamics_hidden": [8]} if name in ("mopo", "combo", "morel") else {}
    config = make_config(name, {"hidden": [8], **model})
    return Mixture(ALGORITHMS[name][1](config, encoder, actions, range(2)), 2)  # pyright: ignore[reportArgumentType]


SEEING = [  # the present observation and nothing before it; others are in tests/test_history.py
    (name, space) for name, space in SPACES if not getattr(ALGORITHMS[name][1], "needs_history", False)
]


@pytest.mark.parametrize("name", [name for name, space in SEEING if space == "discrete"])
def test_an_exported_graph_is_the_policy_on_every_state(name: str, episodes: Episodes, tmp_path: Path) -> None:
    world = chain_world()
    policy = policy_of(name, Encoder(codes(world.n_states)), 3)
    exported = export_checked(policy, episodes, tmp_path)
    states = np.arange(world.n_states, dtype=np.float32)[:, None]
    mask = np.random.default_rng(0).random((world.n_states, 3)) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        wanted = policy(torch.as_tensor(states), torch.as_tensor(mask)).numpy()
    assert isinstance(exported, OnnxPolicy)
    found = exported.probs(states, mask)
    assert np.abs(found - wanted).max() <= 1e-6
    assert found.sum(1) == pytest.approx(np.ones(world.n_states), abs=1e-9)
    assert float(found[~mask].max()) == 0.0


@pytest.mark.parametrize("kind", ["network", "table"])
def test_a_graph_refuses_codes_that_are_no_category(kind: str, tmp_path: Path) -> None:
    """They would read the rows of another column, or count from the end; no gate has seen what comes of that."""
    columns = 2 if kind == "network" else 1
    one = chain_world().simulate(20, seed=1)
    one = dataclasses.replace(
        one, observation=np.zeros((one.n_rows, columns), np.float32), features=tuple(codes(*[3] * columns)),
        final_observation=np.zeros((one.n_episodes, columns), np.float32),
    )  # fmt: skip
    policy = policy_of("bc", Encoder(one.features), 3) if kind == "network" else BehaviorTable(np.full((3, 3), 1 / 3))
    exported = export_checked(policy, one, tmp_path)
    assert isinstance(exported, OnnxPolicy)
    mask = np.ones((1, 3), bool)
    assert exported.probs(np.full((1, columns), 2.0), mask).sum() == pytest.approx(1.0)
    for column in range(columns):
        for code in (-1.0, 3.0, 0.9, np.nan):
            observation = np.zeros((1, columns))
            observation[0, column] = code
            with pytest.raises(Exception, match="out of data bounds|invalid index"):
                exported.probs(observation, mask)


@pytest.mark.parametrize("name", [name for name, space in SEEING if space == "continuous"])
def test_an_exported_graph_is_the_density_of_the_policy(name: str, tmp_path: Path) -> None:
    log = reaching(50, 3)
    algorithm = trained(build(name, [0, 1], "continuous"), [0, 1], 5, log)
    with torch.no_grad():
        seen, action = (torch.as_tensor(part).expand(2, -1, -1).double() for part in (log.observation, log.action))
        wanted = algorithm.double().distribution(seen, None).log_prob(action).exp().mean(0)
    found = export_checked(MixtureDensity(algorithm, 2, log.action.shape[1]), log, tmp_path).on(log)
    assert found == pytest.approx(wanted.numpy(), rel=1e-6)


def test_a_capped_policy_exports_with_its_behavior_model_inside(episodes: Episodes, tmp_path: Path) -> None:
    world = chain_world()
    capped = CappedPolicy(policy_of("cql", Encoder(codes(world.n_states)), 3), BehaviorTable(world.behavior), 1.2)
    found = export_checked(capped, episodes, tmp_path).on(episodes)
    behavior = world.behavior[episodes.observation[:, 0].astype(int)]
    assert float((found / behavior).max()) <= 1.2 + 1e-6
    assert "behavior.known" in read_tensors(tmp_path / "policy.safetensors")


def test_the_rungs_of_a_ladder_are_what_each_is_alone(episodes: Episodes, tmp_path: Path) -> None:
    """Among them one whose cap is a number that the graph holds elsewhere, too."""
    world, caps = chain_world(), (1.2, 2.0, 1e6)
    parts = policy_of("cql", Encoder(codes(world.n_states)), 3), BehaviorTable(world.behavior)
    export_ladder_checked(CappedPolicy(*parts, 3.0), {tmp_path / str(cap): cap for cap in caps}, episodes)
    for cap in caps:
        alone = export_checked(CappedPolicy(*parts, cap), episodes, tmp_path / f"alone-{cap}")
        rung = OnnxPolicy(tmp_path / str(cap) / "policy.onnx")
        assert np.array_equal(rung.on(episodes), alone.on(episodes))
        assert float(read_tensors(tmp_path / str(cap) / "policy.safetensors")["level"]) == cap


def test_numeric_and_categorical_columns_export_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mixed = chain_world().simulate(50, seed=1)
    observation = np.stack([rng.normal(5, 3, mixed.n_rows), rng.integers(0, 4, mixed.n_rows)], 1).astype(np.float32)
    encoder = Encoder(codes(None, 4))
    encoder.mean.fill_(5.0)
    encoder.scale.fill_(3.0)
    policy = policy_of("iql", encoder, 3)
    last = observation[: mixed.n_episodes]
    exported = export_checked(
        policy, dataclasses.replace(mixed, observation=observation, final_observation=last), tmp_path
    )
    rows = 2 * ROWS_AT_A_TIME + 1
    many = np.stack([rng.normal(5, 3, rows), rng.integers(0, 4, rows)], 1).astype(np.float32)
    mask = rng.random((rows, 3)) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        wanted = policy(torch.as_tensor(many), torch.as_tensor(mask)).numpy()
    assert isinstance(exported, OnnxPolicy)
    assert np.abs(exported.probs(many, mask) - wanted).max() <= 1e-6


def test_exporting_twice_gives_the_same_bytes(episodes: Episodes, tmp_path: Path) -> None:
    policy = policy_of("bcq", Encoder(codes(chain_world().n_states)), 3)
    export_checked(policy, episodes, tmp_path / "a")
    export_checked(policy, episodes, tmp_path / "b")
    for file in ("policy.onnx", "policy.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert b"/offrl" not in (tmp_path / "a" / "policy.onnx").read_bytes()  # no path of the machine it was made on


def test_stored_weights_are_exact(episodes: Episodes) -> None:
    policy = CappedPolicy(policy_of("bc", Encoder(codes(10)), 3), BehaviorTable(np.full((10, 3), 1 / 3)), 2.0)
    stored, state = weights(policy), policy.state_dict()
    for name, tensor in state.items():
        assert torch.equal(stored[name].to(tensor.dtype), tensor), name
    assert stored["behavior.known"].dtype == torch.float64  # a third is not exact in single precision


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be loaded"):
        OnnxPolicy(tmp_path / "policy.onnx")
