"""Policies that look back, as they act: evaluated along episodes, exported, pooled, and refused where only the present is known."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.config import parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.densities import MixtureDensity
from offrl_models.distributions import Space
from offrl_models.history import (
    HistoryDensity,
    HistoryMixture,
    export_history_checked,
    inputs_of,
    log_density_given_history,
    probs_given_history,
)
from offrl_models.ope import estimates
from offrl_models.ope.doubly_robust import Model
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_world
from offrl_models.policies import Mixture
from offrl_models.schema import InputError
from offrl_models.training import fit
from tests.conftest import attributes, codes
from tests.test_algorithms import LOGS, build, trained
from tests.test_sequence import NAME, SPACES


def acted_out(world: World, policy: HistoryMixture, longest: int) -> float:
    """The value of a policy by following every path that it may take, one decision after the other."""

    def onward(states: list[int], actions: list[int], earned: list[float]) -> float:
        blank = policy.context - len(states[-policy.context :])
        padded = [np.array([0.0] * blank + list(part)[-policy.context :]) for part in (states, [*actions, 0], earned)]
        seen, done, had = (torch.as_tensor(part)[None] for part in padded)
        mask = torch.as_tensor(world.mask[states[-1]])[None]
        with torch.no_grad():
            probs = policy(seen.float()[..., None], done.long(), had, torch.tensor([len(states) - 1]), mask)[0]
        total = 0.0
        for action, prob in enumerate(probs.tolist()):
            for following in np.flatnonzero(world.transition[states[-1], action]):
                share = prob * float(world.transition[states[-1], action, following])
                reward = float(world.reward[states[-1], action, following])
                worth = reward
                if not world.terminal[following]:
                    worth += world.gamma * onward(
                        [*states, int(following)], [*actions, action], [*earned, earned[-1] + reward]
                    )
                total += share * worth
        return total

    return sum(float(p) * onward([s], [], [0.0]) for s, p in enumerate(world.initial) if p)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_estimators_along_episodes_are_right_for_a_policy_that_looks_back(context: int) -> None:
    """The sum over every trajectory of the log is the value that acting step by step has, whatever the value model."""
    world = random_world(2, 2, 3, 0.9, seed=1)
    episodes, probability = world.enumerate(3)
    log = dataclasses.replace(world.simulate(200, seed=0), features=tuple(codes(world.n_states)))
    config = make_config(NAME, {"embedding": 8, "layers": 1, "context": context, "learning_rate": 0.01})
    algorithm, _ = fit(NAME, config, log, Encoder(log.features), seeds=[0, 1], gradient_steps=30, batch_size=16)
    policy = HistoryMixture(algorithm, 2)
    probs = probs_given_history(policy, episodes)
    q = np.random.default_rng(0).normal(size=(episodes.n_rows, 2))[episodes.observation[:, 0].astype(int)]
    taken, v = q[np.arange(episodes.n_rows), episodes.action], (probs * q).sum(1)
    found = estimates.all_terms(episodes, ratios(episodes, probs), Model.of(episodes, taken, v))
    value = acted_out(world, policy, 3)
    for name in ("TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR"):
        assert found[name].estimate(probability) == pytest.approx(value, abs=1e-9), name
    memoryless = np.abs(probs - probs_given_history(policy, dataclasses.replace(episodes, action=1 - episodes.action)))
    assert (memoryless.max() > 1e-6) == (context > 1)


@pytest.mark.parametrize(("space", "context"), [("discrete", 1), ("discrete", 4), ("continuous", 4)])
def test_an_exported_graph_is_the_policy_at_every_row(space: Space, context: int, tmp_path: Path) -> None:
    log = LOGS[space]
    algorithm = trained(build(NAME, [0, 1], space, context=context), [0, 1], 20, log)
    policy = HistoryMixture(algorithm, 2) if space == "discrete" else HistoryDensity(algorithm, 2, 2)
    exported = export_history_checked(policy, log, tmp_path)
    assert exported.context == context
    if isinstance(policy, HistoryMixture):
        assert np.abs(exported.probs(log) - probs_given_history(policy, log)).max() < 1e-9
        few = np.array(log.mask)
        few[:, 1] = False
        found = exported.probs(dataclasses.replace(log, mask=few))
        assert found[:, 1].max() == 0.0 and found.sum(1) == pytest.approx(1.0, abs=1e-9)
    else:
        assert np.abs(exported.log_density(log) - log_density_given_history(policy, log)).max() < 1e-6
        given = next(inputs_of(log, context))
        many = {
            "action": given["action"].repeat(7, 1),
            "uniform": np.random.default_rng(0).random((len(given["step"]), 9, 3)),
        }
        log_density, drawn = exported.session.run(None, given | many)
        assert np.asarray(log_density).shape[1] == 7 and np.asarray(drawn).shape[1:] == (9, 2)
    assert b"/offrl" not in exported.path.read_bytes()  # no path of the machine it was made on


def test_at_the_first_decision_there_is_no_history() -> None:
    """`distribution` is the policy there, in either kind of actions."""
    for space in SPACES:
        log = LOGS[space]
        algorithm = trained(build(NAME, [0, 1], space), [0, 1], 10, log)
        first = log.offsets[:-1]
        seen = torch.as_tensor(log.observation[first]).expand(2, -1, -1)
        with torch.no_grad():
            if space == "discrete":
                found = algorithm.distribution(seen, torch.as_tensor(log.mask[first]).expand(2, -1, -1))
                alone, whole = found.probs.mean(0), probs_given_history(HistoryMixture(algorithm, 2), log)
            else:
                found = algorithm.distribution(seen, None).log_prob(
                    torch.as_tensor(log.action[first]).expand(2, -1, -1)
                )
                alone = found.logsumexp(0) - np.log(2)
                whole = log_density_given_history(HistoryDensity(algorithm, 2, 2), log)
        assert alone.numpy() == pytest.approx(whole[first], abs=1e-4)


def test_seeds_are_pooled_as_a_mean_of_densities() -> None:
    """And what is drawn is distributed as they say."""
    log = LOGS["continuous"]
    algorithm = trained(build(NAME, [0, 1], "continuous"), [0, 1], 10, log)
    inputs = {name: torch.as_tensor(part[:20]) for name, part in next(inputs_of(log, 3)).items()}
    inputs["uniform"] = torch.rand(20, 20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = HistoryDensity(algorithm, 2, 2)
    with torch.no_grad():
        pooled, drawn = policy(*inputs.values())
        parts = [part.double() if part.is_floating_point() else part for part in list(inputs.values())[:4]]
        each = algorithm.given(*(part.expand(2, *part.shape) for part in parts), None)
        alone = each.log_prob(inputs["action"][:, 0].double().expand(2, -1, -1))
        far = policy(*list(inputs.values())[:4], drawn, inputs["uniform"])[0]
    assert torch.allclose(pooled[:, 0], alone.exp().mean(0).log(), atol=1e-9)
    assert (1.0 / far.exp()).mean(1).numpy() == pytest.approx(2.0, rel=0.1)  # the area between the bounds


def test_a_policy_that_looks_back_is_no_policy_of_the_present() -> None:
    kinds: list[tuple[Space, Any, tuple[int, ...]]] = [
        ("discrete", Mixture, (1,)),
        ("continuous", MixtureDensity, (1, 2)),
    ]
    for space, kind, sizes in kinds:
        with pytest.raises(
            InputError, match="DecisionTransformer looks back at what came before; use HistoryMixture or"
        ):
            kind(build(NAME, [0], space), *sizes)


def test_a_pipeline_refuses_it_before_anything_is_trained() -> None:
    said = r"decision_transformer can be trained by `training.fit` and cannot be gated by a pipeline: fitted Q evaluation, "
    with pytest.raises(InputError, match=said):
        parse_pipeline(attributes(5, 3, algorithms={NAME: {}}), "toy")
