"""Clipped, forgetful, doubly robust and multi-step estimators: known answers, loops from the papers, and exact values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.doubly_robust import dr, dros, partial_returns, switch_dr
from offrl_models.ope.importance import clipped, pdis, recent_weights, tis, wis, wpdis
from offrl_models.ope.multistep import Trace, corrected_returns
from offrl_models.ope.worlds import World, random_policy
from tests.modelled_logs import (
    EXACT,
    INF,
    KINDS,
    corrected_by_hand,
    each_kind,
    each_world,
    hand,
    on_rows,
    paths,
    policy_ratios,
    random_log,
)


def wrong_model(world: World, seed: int = 0) -> np.ndarray:
    q = np.random.default_rng(seed).normal(size=(world.n_states, world.n_actions))
    q[world.terminal] = 0.0
    return q


# --- known answers -------------------------------------------------------------------------------------------------


def test_known_answers() -> None:
    log = hand()
    episodes, ratio = log.episodes, log.ratio
    known = {
        (4 * 2 + 0.5 * 4) / 2: tis(episodes, ratio, clip=4.0),
        (4 * 2 + 0.5 * 4) / 4.5: wis(episodes, ratio, clip=4.0),
        (2 * 1 + 4 * 1 + 0.5 * 4) / 2: pdis(episodes, ratio, clip=4.0),
        4 / 2.5 + 4 / 4.5: wpdis(episodes, ratio, clip=4.0),
        (5 * 2 + 0.5 * 4) / 2: tis(episodes, clipped(ratio, 2.5)),
        (2 * 1 + 3 * 1 + 0.5 * 4) / 2: pdis(episodes, ratio, memory=1),
        4 / 2.5 + 3 / 4: wpdis(episodes, ratio, memory=1),  # past its end, the second episode weighs 1 again
        (0.5 + 2 * 1 + 2 + 0.5 * 3) / 2: switch_dr(*log.given, 2.0),
        (0.5 + 1 * 1 - 0.6 * 0.5 + 2 + 2 / 4.25 * 3) / 2: dros(*log.given, 4.0),
        (0.5 + 2 * (1 - 0.5 * 0.5) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "retrace", 0.5),
        (0.5 + 2 * (1 - 0.5 * 0.375) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "tree_backup", 0.5),
        (0.5 + 2 * (1 - 0.5 * 0.4) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "q_pi", 0.4),
        (2 * (1 - 1) + 0.5 * (4 - 1)) / 2.5 + 2.5 / 2 + 0.5 * 2 * 2 / 2.5: partial_returns(*log.given, [1], np.ones(1)),
    }
    for expected, found in known.items():
        assert found.estimate() == pytest.approx(expected, abs=1e-12), expected


@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.integers(0, 5))
def test_weights_are_clipped_and_forgotten_as_loops_would(seed: int, clip: float, memory: int) -> None:
    log = random_log(seed)
    episodes, ratio = log.episodes, log.ratio
    total = {"tis": 0.0, "pdis": 0.0, "memory": 0.0}
    for i, path in enumerate(paths(log)):
        total["tis"] += min(math.prod(ratio[path].tolist()), clip) * float(episodes.return_[i]) / 7
        for t, row in enumerate(path):
            reward, before = float(episodes.time_discount[row] * episodes.reward[row]) / 7, max(t + 1 - memory, 0)
            total["pdis"] += min(math.prod(ratio[path[: t + 1]].tolist()), clip) * reward
            total["memory"] += min(math.prod(ratio[path[before : t + 1]].tolist()), clip) * reward
    assert tis(episodes, ratio, clip=clip).estimate() == pytest.approx(total["tis"])
    assert pdis(episodes, ratio, clip=clip).estimate() == pytest.approx(total["pdis"])
    assert pdis(episodes, ratio, clip=clip, memory=memory).estimate() == pytest.approx(total["memory"])


@given(st.integers(0, 10_000), st.floats(0.0, 4.0), st.floats(0.01, 10.0))
def test_switched_and_shrunk_corrections_are_as_loops_would(seed: int, tau: float, shrinkage: float) -> None:
    log = random_log(seed)

    def switched(so_far: list[float]) -> float:
        weight = math.prod(so_far)
        return weight if weight <= tau else 0.0

    def shrunk(so_far: list[float]) -> float:
        weight = math.prod(so_far)
        return shrinkage * weight / (weight**2 + shrinkage)

    assert switch_dr(*log.given, tau).estimate() == pytest.approx(corrected_by_hand(log, switched))
    assert dros(*log.given, shrinkage).estimate() == pytest.approx(corrected_by_hand(log, shrunk))


@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from(KINDS))
def test_traces_are_cut_as_loops_would(seed: int, lambda_: float, kind: Trace) -> None:
    log = random_log(seed)
    taken = log.probs[np.arange(len(log.probs)), log.episodes.action]
    policy = dict(zip(log.ratio.tolist(), taken.tolist(), strict=True))  # pi(a|s) of a logged action, by its ratio

    def cut(ratio: float) -> float:
        return {"retrace": min(1.0, ratio), "tree_backup": policy[ratio], "q_pi": 1.0}[kind]

    def weight(so_far: list[float]) -> float:
        return so_far[0] * math.prod(lambda_ * cut(ratio) for ratio in so_far[1:])

    assert corrected_returns(*log.given, kind, lambda_).estimate() == pytest.approx(corrected_by_hand(log, weight))


# --- exact values by enumeration -----------------------------------------------------------------------------------


@each_world
def test_any_correction_of_the_exact_values_is_exact(world: World) -> None:
    """Clipped, switched, shrunk or cut: brackets that have mean 0 may be weighted by anything that came before."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    model = on_rows(policy, world.q_values(policy), episodes)
    ratio = policy_ratios(policy, episodes)
    found = [switch_dr(episodes, ratio, *model, tau) for tau in (0.0, 0.5, 1.0, 2.0, INF)]
    found += [dros(episodes, ratio, *model, shrinkage) for shrinkage in (0.0, 0.1, 1.0, 30.0, INF)]
    found += [dr(episodes, clipped(ratio, 0.7), *model)]
    found += [partial_returns(episodes, ratio, *model, [steps], np.ones(1)) for steps in (0, 1, 2, 3, INF)]
    found += [corrected_returns(episodes, ratio, *model, kind, x) for kind in KINDS for x in (0.0, 0.4, 1.0)]
    for terms in found:
        assert terms.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


@each_world
def test_what_is_unbiased_with_any_model_stays_so(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    ratio, model = policy_ratios(policy, episodes), on_rows(policy, wrong_model(world), episodes)
    found = [
        *(tis(episodes, ratio, clip=INF), wis(episodes, ratio, clip=INF)),
        *(pdis(episodes, ratio, memory=3), wpdis(episodes, ratio, memory=3)),
        *(switch_dr(episodes, ratio, *model, INF), dros(episodes, ratio, *model, INF)),
        *(partial_returns(episodes, ratio, *model, [3, INF], np.array([0.4, 0.6])),),
    ]
    for terms in found:
        assert terms.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


@each_world
@pytest.mark.parametrize("memory", [0, 1, 2])
def test_forgetful_weights_evaluate_a_policy_that_sets_in_late(world: World, memory: int) -> None:
    """With a memory of k steps, the reward of step t is that of the behavior until k steps before, and of pi from there."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    expected, live = np.einsum("sat,sat->sa", world.transition, world.reward), np.where(world.terminal, 0.0, 1.0)
    value = 0.0
    for t in range(3):
        reached = world.initial
        for step in range(t + 1):
            acting = policy if step > t - memory else world.behavior
            if step == t:
                value += world.gamma**t * float(reached @ (acting * expected).sum(1))
            reached = live * np.einsum("s,sa,sat->t", reached, acting, world.transition)
    ratio = policy_ratios(policy, episodes)
    assert pdis(episodes, ratio, memory=memory).estimate(probability) == pytest.approx(value, abs=EXACT)
    assert wpdis(episodes, ratio, memory=memory).estimate(probability) == pytest.approx(value, abs=EXACT)
    each_step = probability @ recent_weights(episodes, ratio, memory)
    assert each_step == pytest.approx(np.ones(len(each_step)), abs=EXACT)


@each_world
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_partial_return_evaluates_some_steps_of_the_policy_and_then_the_model(world: World, steps: int) -> None:
    episodes, probability = world.enumerate(3)
    policy, q = random_policy(world, 5), wrong_model(world)
    expected, live = np.einsum("sat,sat->sa", world.transition, world.reward), np.where(world.terminal, 0.0, 1.0)
    reached, value = world.initial, 0.0
    for t in range(steps):
        value += world.gamma**t * float(reached @ (policy * expected).sum(1))
        reached = live * np.einsum("s,sa,sat->t", reached, policy, world.transition)
    value += world.gamma**steps * float(reached @ (policy * q).sum(1))
    ratio = policy_ratios(policy, episodes)
    found = partial_returns(episodes, ratio, *on_rows(policy, q, episodes), [steps], np.ones(1))
    assert found.estimate(probability) == pytest.approx(value, abs=EXACT)


def trace_table(world: World, policy: np.ndarray, kind: Trace, lambda_: float) -> np.ndarray:
    ratio = np.divide(policy, world.behavior, out=np.zeros_like(policy), where=world.behavior > 0)
    cut = {"retrace": np.minimum(ratio, 1.0), "tree_backup": policy, "q_pi": np.ones_like(policy)}[kind]
    return lambda_ * cut


@each_world
@each_kind
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_corrected_returns_apply_the_operator_once(world: World, kind: Trace, lambda_: float) -> None:
    """R q = q + (I - gamma P^(c mu))^-1 (T^pi q - q), Munos et al. (2016), solved with the tables of the world."""
    episodes, probability = world.enumerate(3)
    policy, q = random_policy(world, 5), wrong_model(world)
    onward = world.gamma * np.where(world.terminal, 0.0, world.transition) * ~world.terminal[:, None, None]
    cut = world.behavior * trace_table(world, policy, kind, lambda_)
    size = q.size
    carried = np.einsum("sat,tb->satb", onward, cut).reshape(size, size)
    expected = np.einsum("sat,sat->sa", world.transition, world.reward)
    error = expected + onward @ (policy * q).sum(1) - q
    improved = q + np.linalg.solve(np.eye(size) - carried, error.ravel()).reshape(q.shape)
    model = on_rows(policy, q, episodes)
    found = corrected_returns(episodes, policy_ratios(policy, episodes), *model, kind, lambda_).estimate(probability)
    assert found == pytest.approx(float(world.initial @ (policy * improved).sum(1)), abs=EXACT)
