"""Tables of values fitted to a log: MRDR against its objective and by enumeration, fixed points against loops and exact values."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models.ope import mrdr
from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.importance import Terms, pdis
from offrl_models.ope.multistep import Trace, fixed_point, following, traces
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError
from tests.modelled_logs import (
    EXACT,
    KINDS,
    WORLDS,
    each_kind,
    each_world,
    hand,
    on_rows,
    paths,
    policy_ratios,
    random_log,
)

# --- MRDR ----------------------------------------------------------------------------------------------------------


def variance(terms: Terms, probability: np.ndarray) -> float:
    return float(probability @ terms.numerator[:, 0] ** 2 - (probability @ terms.numerator[:, 0]) ** 2)


def with_model(
    episodes: Episodes, ratio: np.ndarray, probs: np.ndarray, basis: mrdr.Basis, coefficients: np.ndarray
) -> Terms:
    q = basis.q_values(coefficients)
    return dr(episodes, ratio, q[np.arange(len(q)), episodes.action], (probs * q).sum(1))


@each_world
def test_no_model_of_the_class_makes_dr_less_variable(world: World) -> None:
    """By enumeration, with two columns that no policy's values are linear in: a stationary point, and every step is uphill."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    state = states_of(episodes)[0]
    rng = np.random.default_rng(0)
    columns = np.stack([np.ones(world.n_states), rng.normal(size=world.n_states)], 1)[state]
    basis, ratio, probs = mrdr.Basis.of_columns(columns), policy_ratios(policy, episodes), policy[state]
    best = mrdr.fit(episodes, ratio, probs, world.behavior[state], basis, share=probability)

    def spread(coefficients: np.ndarray) -> float:
        return variance(with_model(episodes, ratio, probs, basis, coefficients), probability)

    least = spread(best)
    assert least < spread(0 * best)  # PDIS
    for _ in range(20):
        step = 0.1 * rng.normal(size=best.shape)
        up, down = spread(best + step), spread(best - step)
        assert min(up, down) >= least - EXACT
        assert up == pytest.approx(down, abs=EXACT)  # a parabola with its vertex here
    found = with_model(episodes, ratio, probs, basis, best).estimate(probability)
    assert found == pytest.approx(world.value(policy), abs=EXACT)


@each_world
def test_the_best_table_makes_dr_what_the_exact_values_make_it(world: World) -> None:
    """Episode by episode, although the table is not that of the values: what differs is what DR does not see."""
    episodes, probability = world.enumerate(3)
    policy, state = random_policy(world, 5), states_of(episodes)[0]
    ratio, probs = policy_ratios(policy, episodes), policy[state]
    basis = mrdr.Basis.of_states(state, world.n_states)
    best = mrdr.fit(episodes, ratio, probs, world.behavior[state], basis, share=probability)
    exact = dr(episodes, ratio, *on_rows(policy, world.q_values(policy), episodes))
    table = with_model(episodes, ratio, probs, basis, best)
    assert table.numerator == pytest.approx(exact.numerator, abs=1e-7)
    assert basis.q_values(best) != pytest.approx(world.q_values(policy)[state], abs=0.1)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_the_fit_minimizes_the_objective_of_the_paper(seed: int) -> None:
    """The objective in loops; at the minimum its slope is 0 in every direction."""
    log = random_log(seed)
    episodes = log.episodes
    basis = mrdr.Basis.of_columns(np.random.default_rng(seed).normal(size=(episodes.n_rows, 2)))
    best = mrdr.fit(episodes, log.ratio, log.probs, log.behavior, basis, ridge=0.01)

    def objective(coefficients: np.ndarray) -> float:
        q, total = basis.q_values(coefficients), 0.0
        for path in paths(log):
            for t, row in enumerate(path):
                seen, back = np.zeros(3), 0.0
                for later in path[t:]:
                    passed = episodes.time_discount[later] / episodes.time_discount[row]
                    back += math.prod(log.ratio[row + 1 : later + 1]) * passed * episodes.reward[later]
                seen[episodes.action[row]] = back
                residual = log.probs[row] * q[row] - seen
                omega = np.diag(1 / log.behavior[row]) - 1.0
                before = math.prod(log.ratio[path[:t]])
                scale = episodes.time_discount[row] ** 2 * before**2 * log.ratio[row]
                total += scale * residual @ omega @ residual / len(paths(log))
        return total + 0.01 * float(np.square(coefficients).sum())

    for index in np.ndindex(best.shape):
        step = np.zeros_like(best)
        step[index] = 1e-3
        up, down = objective(best + step), objective(best - step)
        assert up == pytest.approx(down, rel=1e-7, abs=1e-10) and up > objective(best)


def test_mrdr_is_unbiased_with_a_model_of_other_episodes() -> None:
    world = WORLDS[0]
    policy, other = random_policy(world, 5), world.simulate(50, 3)
    state = states_of(other)[0]
    fitted = mrdr.fit(
        other,
        policy_ratios(policy, other),
        policy[state],
        world.behavior[state],
        mrdr.Basis.of_states(state, world.n_states),
    )[:, :, 0]
    episodes, probability = world.enumerate(3)
    found = dr(episodes, policy_ratios(policy, episodes), *on_rows(policy, fitted, episodes))
    assert found.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


def test_cross_fitting_never_uses_an_episode_on_itself() -> None:
    log = random_log(1, episodes=20)
    episodes, row = log.episodes, np.arange(log.episodes.n_rows)
    state, fold = states_of(episodes)[0], np.arange(20) % 3
    basis = mrdr.Basis.of_states(state, 4)
    found = mrdr.mrdr(episodes, log.ratio, log.probs, log.behavior, basis, fold, ridge=0.1)
    for label in range(3):
        other = fold != label
        rows, here = other[episodes.episode_of_row], ~other[episodes.episode_of_row]
        alone = mrdr.fit(
            episodes.take(other),
            log.ratio[rows],
            log.probs[rows],
            log.behavior[rows],
            mrdr.Basis.of_states(state[rows], 4),
            ridge=0.1,
        )
        q = basis.q_values(alone)
        held_out = dr(
            episodes.take(~other),
            log.ratio[here],
            q[row, episodes.action][here],
            (log.probs * q).sum(1)[here],
        )
        assert found.numerator[~other] == pytest.approx(held_out.numerator)


def test_a_heavy_ridge_leaves_pdis_and_folds_and_behavior_are_checked() -> None:
    log = random_log(2)
    basis, fold = mrdr.Basis.of_states(states_of(log.episodes)[0], 4), np.arange(7) % 2
    arguments = (log.episodes, log.ratio, log.probs, log.behavior, basis)
    heavy = mrdr.mrdr(*arguments, fold, ridge=1e12)
    assert heavy.estimate() == pytest.approx(pdis(log.episodes, log.ratio).estimate(), abs=1e-6)
    with pytest.raises(InputError, match="at least 2 folds"):
        mrdr.mrdr(*arguments, 0 * fold)
    with pytest.raises(InputError, match="not pi / mu"):
        mrdr.fit(log.episodes, 1.1 * log.ratio, log.probs, log.behavior, basis)
    never = np.where(np.arange(3) == (log.episodes.action[:, None] + 1) % 3, 0.0, log.behavior)
    with pytest.raises(InputError, match="never takes"):
        mrdr.fit(log.episodes, log.ratio, log.probs, never, basis)
    with pytest.raises(InputError, match="NaN"):
        mrdr.Basis.of_columns(np.full((3, 1), np.nan))


def test_mrdr_converges_to_the_value_and_beats_pdis() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, episodes = random_policy(world, 5), world.simulate(4000, 2)
    state = states_of(episodes)[0]
    ratio = policy_ratios(policy, episodes)
    basis = mrdr.Basis.of_states(state, world.n_states)
    found = mrdr.mrdr(episodes, ratio, policy[state], world.behavior[state], basis, np.arange(4000) % 2)
    error = found.numerator.std() / math.sqrt(4000)
    assert found.estimate() == pytest.approx(world.value(policy), abs=4 * error)
    assert error < 0.9 * pdis(episodes, ratio).numerator.std() / math.sqrt(4000)


# --- fixed points --------------------------------------------------------------------------------------------------


def applied_by_hand(
    episodes: Episodes, trace: np.ndarray, policy: np.ndarray, q: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """The mean over visits of q plus all later errors, discounted and cut: the operator on a log, in loops."""
    state, next_state = states_of(episodes)
    total, visits = np.zeros_like(q), np.zeros_like(q)
    for i, (a, b) in enumerate(itertools.pairwise(episodes.offsets.tolist())):
        for t in range(a, b):
            cell, carried, value = (state[t], episodes.action[t]), 1.0, q[state[t], episodes.action[t]]
            for k in range(t, b):
                if k > t:
                    carried *= episodes.step_discount[k - 1] * trace[k]
                ahead = 0.0 if episodes.terminated[k] else float(policy[next_state[k]] @ q[next_state[k]])
                error = episodes.reward[k] + episodes.step_discount[k] * ahead - q[state[k], episodes.action[k]]
                value += carried * error
            total[cell] += share[i] * value
            visits[cell] += share[i]
    return np.where(visits > 0, total / np.where(visits > 0, visits, 1.0), q)


@each_world
@each_kind
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_the_fixed_point_over_every_trajectory_is_the_exact_q(world: World, kind: Trace, lambda_: float) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    start = np.full((world.n_states, world.n_actions), 7.0)
    found = fixed_point(episodes, policy_ratios(policy, episodes), policy, kind, lambda_, start, probability)
    state = states_of(episodes)[0]
    seen = np.zeros_like(found, bool)
    seen[state, episodes.action] = True
    assert found[seen] == pytest.approx(world.q_values(policy)[seen], abs=EXACT)
    assert (found[~seen] == 7.0).all()


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.floats(0.0, 1.0))
@settings(max_examples=25)
def test_a_fixed_point_is_what_the_operator_leaves_alone(seed: int, kind: Trace, lambda_: float) -> None:
    """States that come back, steps of any length, truncated episodes, junk after the others, and cells that were never visited."""
    log = random_log(seed, episodes=12, gamma=0.6)
    rng = np.random.default_rng(seed)
    last = log.episodes.terminated
    cut = last & (rng.random(len(last)) < 0.5)
    episodes = dataclasses.replace(
        log.episodes,
        terminated=last & ~cut,
        truncated=cut,
        final_observation=np.where(cut[last], rng.integers(0, 6, 12), 1e6)[:, None].astype(np.float32),
    )
    policy, start, share = rng.dirichlet(np.ones(3), 6), rng.normal(size=(6, 3)), rng.dirichlet(np.ones(12))
    found = fixed_point(episodes, log.ratio, policy, kind, lambda_, start, share)
    trace = traces(episodes, log.ratio, kind, lambda_)
    assert applied_by_hand(episodes, trace, policy, found, share) == pytest.approx(found, rel=1e-7, abs=1e-7)
    seen = np.zeros((6, 3), bool)
    seen[states_of(episodes)[0], episodes.action] = True
    assert (found[~seen] == start[~seen]).all()


def test_without_a_trace_the_fixed_point_is_that_of_the_tabular_model() -> None:
    world = WORLDS[0]
    episodes, policy = world.simulate(300, 0), random_policy(world, 5)
    model = TabularModel.fit(episodes, world.n_states)
    assert model is not None and (model.visits[~world.terminal] > 0).all()
    for kind in KINDS:
        found = fixed_point(episodes, policy_ratios(policy, episodes), policy, kind, 0.0, np.zeros((world.n_states, 2)))
        live = ~world.terminal
        assert found[live] == pytest.approx(model.q_values(policy)[live], abs=EXACT)


def test_retrace_on_policy_is_every_visit_monte_carlo() -> None:
    """With one action in every state, errors telescope to the returns whatever q is."""
    log = random_log(5)
    episodes = dataclasses.replace(log.episodes, action=0 * log.episodes.action, action_prob=np.ones(len(log.ratio)))
    state, one = states_of(episodes)[0], np.ones(len(log.ratio))
    policy = np.tile([1.0, 0.0, 0.0], (4, 1))
    for kind in KINDS:
        found = fixed_point(episodes, one, policy, kind, 1.0, np.zeros((4, 3)))
        for s in range(4):
            assert found[s, 0] == pytest.approx(episodes.return_to_go[state == s].mean(), abs=EXACT)


@each_kind
def test_fixed_points_converge_where_states_come_back(kind: Trace) -> None:
    world = random_world(3, 2, 1, 0.9, seed=4)
    transition = world.transition.copy()
    transition[:3] = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 2))
    world = dataclasses.replace(world, transition=transition)
    policy, episodes = random_policy(world, 5), world.simulate(20_000, 0)
    ratio, start = policy_ratios(policy, episodes), np.zeros((4, 2))
    found = fixed_point(episodes, ratio, policy, kind, 0.8, start)
    assert found[:3] == pytest.approx(world.q_values(policy)[:3], abs=0.06)


def test_a_policy_that_never_ends_has_no_fixed_point() -> None:
    """The behavior leaves the one state in the end, the policy almost or quite never does."""
    world = random_world(1, 2, 1, 1.0, seed=0)
    transition = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    episodes = dataclasses.replace(world, transition=transition).simulate(300, 0)
    for stays in (1.0, 1.0 - 1e-9):
        circling = np.array([[stays, 1.0 - stays], [0.5, 0.5]])
        for kind in KINDS:
            with pytest.raises(InputError, match="hardly ever ends"):
                fixed_point(episodes, np.ones(episodes.n_rows), circling, kind, 0.0, np.zeros((2, 2)))


def test_following_and_accumulated_stay_inside_an_episode() -> None:
    episodes = hand().episodes
    values = np.array([1.0, 2.0, 3.0])
    assert following(episodes, values).tolist() == [2.0, 0.0, 0.0]
    assert episodes.accumulated(values, np.full(3, 10.0)).tolist() == [21.0, 2.0, 3.0]
    log = random_log(0).episodes
    assert log.return_to_go[log.offsets[:-1]] == pytest.approx(log.return_)
