"""Fitted ratios against exact tables and least squares, and identities of them and of their features."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models.ope import fitted_ratios, minimax
from offrl_models.ope.fitted_ratios import Refusal, Weights, fit_ratios
from offrl_models.ope.flow import Features, Flow, block
from offrl_models.ope.marginal import mis, state_action_weights, step_ratios
from offrl_models.ope.sequences import completed, ratios
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import LinearGaussianPolicy, World, point_mass, random_policy, random_world
from offrl_models.schema import Episodes, Feature, InputError
from tests.conftest import circling_world, ratio_of, recorded_paths

EXACT = 1e-9
MASS = point_mass(1, 10, 0.95)
STEADY = LinearGaussianPolicy(gain=np.array([[-0.6, -0.6]]), covariance=np.array([[0.4]]))


def coded(episodes: Episodes, states: int) -> Episodes:
    """The observation described as one category."""
    return dataclasses.replace(episodes, features=(Feature("state", states),))


def numbered(episodes: Episodes) -> Episodes:
    """The observation described as numbers."""
    columns = episodes.observation.shape[1]
    return dataclasses.replace(episodes, features=tuple(Feature(f"column {i}") for i in range(columns)))


def pair_flow(episodes: Episodes, policy: np.ndarray) -> Flow:
    state, next_state = states_of(episodes)
    return Flow.by_state_action(episodes, policy[state], policy[next_state])


def gaussian_ratio(episodes: Episodes) -> np.ndarray:
    return STEADY.density(episodes.observation[:, :2], episodes.action) / episodes.action_prob


def required(found: Weights | Refusal) -> Weights:
    assert isinstance(found, Weights), found
    return found


# --- exact ratios --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_indicators_give_the_exact_ratios_of_visits(gamma: float, seed: int) -> None:
    """Every trajectory with its probability: by state, and by state and action, as dynamic programming has them."""
    world = random_world(2, 3, 3, gamma, seed=seed)
    episodes, probability = world.enumerate(3)
    episodes, policy = coded(episodes, world.n_states), random_policy(world, 5)
    live = ~world.terminal
    exact = world.occupancy(policy)[live] / world.occupancy(world.behavior)[live]
    by_state = fit_ratios(Flow.by_state(episodes, ratio_of(policy, episodes)), ridge=0.0, share=probability)
    assert by_state.coefficients[live] == pytest.approx(exact, abs=EXACT)
    flow, c = Flow.by_state(episodes, ratio_of(policy, episodes)), by_state.coefficients
    given = {"by_step": False, "limited": False, "share": probability}
    left = fitted_ratios._balance(flow, by_state.features, c, by_state.features, **given)
    assert left.mean == pytest.approx(np.zeros(world.n_states), abs=EXACT)
    by_pair = fit_ratios(pair_flow(episodes, policy), ridge=0.0, share=probability)
    found = by_pair.coefficients.reshape(3, world.n_states).T[live]
    assert found == pytest.approx(exact[:, None] * (policy / world.behavior)[live], abs=EXACT)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_rows_stand_for_the_visits_that_a_recording_cut_off(gamma: float) -> None:
    world = circling_world(gamma)
    episodes, probability = recorded_paths(world, 3)
    episodes, policy = coded(episodes, 3), random_policy(world, 1)
    recorded, visited = np.zeros(3), world.initial
    for step in range(3):
        recorded += gamma**step * visited * ~world.terminal
        visited = visited @ world._onward(world.behavior)
    exact = world.occupancy(policy)[:2] / recorded[:2]
    by_state = fit_ratios(Flow.by_state(episodes, ratio_of(policy, episodes)), ridge=0.0, share=probability)
    assert by_state.coefficients[:2] == pytest.approx(exact, abs=EXACT)
    by_pair = fit_ratios(pair_flow(episodes, policy), ridge=0.0, share=probability)
    found = by_pair.coefficients.reshape(2, 3).T[:2]
    assert found == pytest.approx(exact[:, None] * (policy / world.behavior)[:2], abs=EXACT)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_by_step_a_truncation_is_an_end(gamma: float) -> None:
    """State and step together take six values, so that enough random features can tell them all apart."""
    world = circling_world(gamma)
    episodes, probability = recorded_paths(world, 3)
    episodes, policy = coded(episodes, 3), random_policy(world, 1)
    ratio = ratio_of(policy, episodes)
    fitted = fit_ratios(Flow.by_state(episodes, ratio), by_step=True, fourier=40, ridge=0.0, share=probability)
    omega = fitted.features.of(episodes.observation, episodes.step) @ fitted.coefficients
    exact, _ = step_ratios(episodes, ratio, 3, probability)
    assert omega == pytest.approx(exact[episodes.step, states_of(episodes)[0]], abs=1e-6)
    *_, next_v = (policy * world.q_values(policy)).sum(1)[None, states_of(episodes)[1]]
    found = mis(completed(episodes, next_v), omega * ratio)
    assert found.estimate(probability) == pytest.approx(world.value(policy), abs=1e-6)


def test_numbers_that_tell_states_apart_are_as_good_as_codes() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    shown = np.random.default_rng(0).normal(size=(world.n_states, 2)).astype(np.float32)
    hidden, probability = world.enumerate(3)
    episodes = numbered(dataclasses.replace(world, observed=shown).enumerate(3)[0])
    policy = random_policy(world, 5)
    fitted = fit_ratios(Flow.by_state(episodes, ratio_of(policy, hidden)), fourier=40, ridge=0.0, share=probability)
    omega = fitted.features.of(episodes.observation, episodes.step) @ fitted.coefficients
    exact = world.occupancy(policy)[:-1] / world.occupancy(world.behavior)[:-1]
    assert omega == pytest.approx(exact[states_of(hidden)[0]], abs=1e-6)


def test_in_a_log_they_are_the_ratios_of_the_empirical_process() -> None:
    world = circling_world(1.0)
    episodes, policy = coded(world.simulate(200, 0), 3), random_policy(world, 1)
    model = TabularModel.fit(episodes, 3)
    assert model is not None
    fitted = fit_ratios(pair_flow(episodes, policy), ridge=0.0)
    found = fitted.coefficients.reshape(2, 3).T[states_of(episodes)[0], episodes.action]
    assert found == pytest.approx(state_action_weights(model, policy, episodes), abs=EXACT)


def test_a_large_ridge_leaves_every_weight_at_one() -> None:
    world = circling_world(0.9)
    episodes, policy = coded(world.simulate(200, 0), 3), random_policy(world, 1)
    flow = Flow.by_state(episodes, ratio_of(policy, episodes))
    assert fit_ratios(flow, ridge=1e12).coefficients[:2] == pytest.approx(np.ones(2), abs=EXACT)
    some, less = (np.abs(fit_ratios(flow, ridge=r).coefficients[:2] - 1).max() for r in (1.0, 10.0))
    assert 0.001 < less < some


def test_the_ridge_counts_in_squares_of_the_largest_singular_value() -> None:
    """Against the stacked least-squares problem: imbalance within the ball, and distance of omega from 1 over the log."""
    world = circling_world(0.8)
    episodes, policy, share = coded(world.simulate(80, 0), 3), random_policy(world, 1), np.full(80, 1 / 80)
    flow = Flow.by_state(episodes, ratio_of(policy, episodes))
    features = Features.fit(episodes, fourier=0, by_step=False, seed=0)
    means = minimax._mean(minimax._moments(flow, features, False, share, np.zeros(80, np.int64)))
    ball, values = minimax._ball(means.second), np.linalg.eigh(means.second)
    root = values[1] * np.sqrt(values[0].clip(min=0.0)) @ values[1].T
    largest = np.linalg.norm(ball @ means.system @ np.linalg.pinv(root, rcond=1e-6), 2)
    assert abs(largest - 1.0) > 0.1
    for ridge in (0.01, 1.0):
        penalty = np.sqrt(ridge) * largest * root
        wanted = np.concatenate([ball @ means.start, penalty.sum(1)])
        expected = np.linalg.lstsq(np.vstack([ball @ means.system, penalty]), wanted, rcond=1e-9)[0]
        found = minimax.solve(flow, features, by_step=False, ridge=ridge, share=share).coefficients
        assert found[:2] == pytest.approx(expected[:2], abs=1e-6)


def test_a_world_of_one_step_is_its_own_ratio() -> None:
    """A bandit: nothing moves, so omega is 1 and the weights are the ratios."""
    world: World = random_world(4, 3, 1, 1.0, seed=2)
    policy = random_policy(world, 3)
    flows = []
    for seed in (0, 1):
        log = coded(world.simulate(400, seed), world.n_states)
        flows.append(Flow.by_state(log, ratios(log, policy[states_of(log)[0]])))
    found = required(fit_ratios(flows[0]).weights(flows[1]))
    assert found.weight == pytest.approx(flows[1].factor, abs=1e-6)


# --- identities ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([0.8, 1.0]), st.booleans())
@settings(max_examples=10)
def test_on_policy_every_weight_is_one_whatever_the_ridge(seed: int, gamma: float, numeric: bool) -> None:
    world = circling_world(gamma)
    log = world.simulate(60, seed)
    episodes = numbered(log) if numeric else coded(log, 3)
    flow = Flow.by_state(episodes, np.ones(episodes.n_rows))
    for ridge in (0.0, 1e-3, None):
        found = required(fit_ratios(flow, fourier=10, ridge=ridge).weights(flow))
        assert found.weight == pytest.approx(np.ones(episodes.n_rows), abs=1e-6)
        assert found.checks.mean == pytest.approx(1.0, abs=1e-6) and found.checks.ratio_z == 0.0


def test_neither_order_nor_rewards_nor_what_lies_past_the_end_matter() -> None:
    world = random_world(2, 2, 3, 0.9, seed=3)
    episodes, policy = coded(world.simulate(200, 0), world.n_states), random_policy(world, 2)
    order = np.random.default_rng(0).permutation(200)
    rows = np.concatenate([np.flatnonzero(episodes.episode_of_row == i) for i in order])
    names = ("observation", "action", "mask", "terminated", "truncated", "action_prob")
    shuffled = dataclasses.replace(
        episodes,
        episode_id=episodes.episode_id[order],
        final_observation=np.full((200, 1), 99, np.float32),
        **{name: getattr(episodes, name)[rows] for name in names},
        reward=np.random.default_rng(1).normal(size=len(rows)),
        offsets=np.append(0, episodes.length[order].cumsum()),
    )
    ratio = ratio_of(policy, episodes)
    found, again = (fit_ratios(Flow.by_state(log, r)) for log, r in ((episodes, ratio), (shuffled, ratio[rows])))
    assert found.ridge == again.ridge
    assert again.coefficients == pytest.approx(found.coefficients, abs=EXACT)


def test_the_ridge_is_chosen_on_folds_of_entities() -> None:
    """Eight episodes of two patients are two folds at most."""
    world = circling_world(0.9)
    episodes = coded(world.simulate(8, 0), 3)
    two_patients = dataclasses.replace(episodes, entity=np.repeat([0, 1], 4))
    flow = Flow.by_state(two_patients, np.ones(two_patients.n_rows))
    with pytest.raises(InputError, match="2 entities cannot be cut into 3 folds"):
        fit_ratios(flow)


def test_the_imbalance_left_in_a_fold_is_over_pairs_of_its_episodes() -> None:
    """Against the plain sum over pairs, and the coefficients of a fold against those of a log without it."""
    world = circling_world(0.8)
    episodes, policy = numbered(world.simulate(30, 0)), random_policy(world, 1)
    flow = Flow.by_state(episodes, ratio_of(policy, episodes))
    features = Features.fit(episodes, fourier=4, by_step=False, seed=0)
    fold, share = np.arange(30) % 3, np.full(30, 1 / 30)
    coefficients = np.random.default_rng(0).normal(size=(3, 2, features.size))
    coefficients[:, 1] *= 30.0  # beyond the limits of omega
    ball = np.random.default_rng(1).normal(size=(features.size, features.size))
    part = block(flow, features, False, slice(0, 30))
    expected = np.zeros(2)
    for place, number in itertools.product(range(2), range(3)):
        omega = np.clip(part.basis @ coefficients[number, place], 0.0, 20.0)
        left = part.start - episodes.sum_per_episode((episodes.time_discount * omega)[:, None] * part.departure)
        mine = left[fold == number] @ ball.T
        expected[place] += np.mean([one @ other for one, other in itertools.permutations(mine, 2)])
    assert minimax._violations(flow, features, False, coefficients, fold, ball) == pytest.approx(expected, rel=1e-9)
    without = minimax._mean(minimax._moments(flow, features, False, share, fold), without=1)
    others = episodes.take(fold != 1)
    alone = minimax._moments(
        Flow.by_state(others, ratio_of(policy, others)), features, False, np.full(20, 1 / 20), np.zeros(20, np.int64)
    )
    for mine, theirs in zip(without[:4], alone[:4], strict=True):
        assert mine == pytest.approx(theirs[0], abs=1e-12)


def test_features_of_numbers_categories_and_gaps() -> None:
    """A constant, a standardised number with a mark where it is missing, indicators, and waves between -1 and 1."""
    world = circling_world(1.0)
    log = world.simulate(50, 0)
    shown = np.column_stack([log.step * 2.0, np.where(log.action == 1, np.nan, 3.0), log.observation[:, 0]])
    features = (Feature("a"), Feature("b", missing="mean"), Feature("c", 3))
    episodes = dataclasses.replace(log, observation=shown, final_observation=np.zeros((50, 3)), features=features)
    found = Features.fit(episodes, fourier=5, by_step=True, seed=0)
    values = found.of(episodes.observation, episodes.step)
    assert values.shape == (log.n_rows, 1 + 7 + 5) == (log.n_rows, found.size)
    assert values @ found.constant == pytest.approx(np.ones(log.n_rows))
    linear = values[:, 1:8] * np.sqrt(7)
    assert linear[:, 0] == pytest.approx((log.step - log.step.mean()) / log.step.std(), abs=1e-5)
    assert (linear[:, 2] == (log.action == 1)).all() and (linear[:, 1] == 0.0).all()
    assert (linear[:, 3:6].argmax(1) == log.observation[:, 0]).all()
    assert linear[:, 6] == pytest.approx((log.step - log.step.mean()) / log.step.std())
    assert np.abs(values[:, 8:]).max() <= np.sqrt(2 / 5)
    one_category = Features.fit(coded(log, 3), fourier=5, by_step=False, seed=0)
    indicators = one_category.of(log.observation, log.step)
    assert indicators.shape == (log.n_rows, 3) and (indicators @ one_category.constant == 1.0).all()


def test_random_features_make_a_kernel_of_the_distance() -> None:
    """Their products average to a mixture of Gaussians of the distance. Rahimi & Recht (2007)."""
    log = numbered(MASS.simulate(50, 0))
    found = Features.fit(log, fourier=30_000, by_step=False, seed=0)
    inputs = found._inputs(log.observation, log.step)
    rows = np.random.default_rng(0).integers(0, log.n_rows, (2, 2000))
    width = np.median(np.sqrt(np.square(inputs[rows[0]] - inputs[rows[1]]).sum(1)))
    waves = found.of(log.observation[:12], log.step[:12])[:, 4:]
    apart = np.square(inputs[:12, None] - inputs[None, :12]).sum(2) / width**2
    kernel = np.mean([np.exp(-apart / (2 * scale**2)) for scale in (0.5, 1.0, 2.0)], axis=0)
    assert waves @ waves.T == pytest.approx(kernel, abs=0.03)
    assert np.abs(np.exp(-apart / 2) - kernel).max() > 0.08


def test_what_cannot_be_fitted_is_refused() -> None:
    log = MASS.simulate(30, 0)
    with pytest.raises(InputError, match="3 columns were observed and 0 are described"):
        fit_ratios(Flow.by_state(log, gaussian_ratio(log)))
    with pytest.raises(InputError, match="actions are continuous"):
        Flow.by_state_action(log, np.ones((log.n_rows, 2)), np.ones((log.n_rows, 2)))
    with pytest.raises(InputError, match="ratio holds 300 values"):
        Flow.by_state(log, np.full(log.n_rows, np.nan))
    missing = np.where(np.arange(log.n_rows)[:, None] == 3, np.nan, log.observation).astype(np.float32)
    with pytest.raises(InputError, match="NaN"):
        fit_ratios(Flow.by_state(numbered(dataclasses.replace(log, observation=missing)), gaussian_ratio(log)))
