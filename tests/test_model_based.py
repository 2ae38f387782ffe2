"""Models of features and linear-Gaussian models against exact tables, closed-form values, and fitted ratios."""

import dataclasses
import itertools

import numpy as np
import pytest

from offrl_models.ope import model_based
from offrl_models.ope.bandit import dm
from offrl_models.ope.fitted_ratios import fit_ratios
from offrl_models.ope.flow import Features, Flow, block
from offrl_models.ope.marginal import mis, pseudo_outcomes
from offrl_models.ope.model_based import AffinePolicy, FeatureModel, LinearGaussianModel
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import LinearGaussianPolicy, random_policy, random_world
from offrl_models.schema import Episodes, Feature, InputError
from tests.conftest import circling_world, recorded_paths
from tests.test_fitted_ratios import EXACT, MASS, STEADY, coded, numbered, pair_flow, required

# --- learned models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_linear_dynamics_of_indicators_are_the_tabular_model(gamma: float) -> None:
    """Values of rows and past truncations, from recordings that stop."""
    world = circling_world(gamma)
    episodes = coded(recorded_paths(world, 4)[0], 3)
    policy = random_policy(world, 1)
    state, next_state = states_of(episodes)
    beyond = np.where(episodes.terminated[:, None], np.nan, policy[next_state])  # nothing acts past the end
    flow = Flow.by_state_action(episodes, policy[state], beyond)
    values = FeatureModel.fit(flow, ridge=0.0).values(flow)
    model = TabularModel.fit(episodes, 3)
    assert model is not None
    q = model.q_values(policy)
    v = (policy * q).sum(1)
    assert values.q == pytest.approx(q[state, episodes.action], abs=EXACT)
    assert values.v == pytest.approx(v[state], abs=EXACT)
    assert values.next_v == pytest.approx(np.where(episodes.truncated, v[next_state], 0.0), abs=EXACT)
    assert dm(episodes, values.v).estimate() == pytest.approx(model.value(policy), abs=EXACT)


def test_a_finite_horizon_is_followed_step_by_step() -> None:
    world = circling_world(1.0)
    episodes, policy = coded(world.simulate(300, 0), 3), random_policy(world, 1)
    flow = pair_flow(episodes, policy)
    fitted, model = FeatureModel.fit(flow, ridge=0.0), TabularModel.fit(episodes, 3)
    assert model is not None
    v = np.zeros(3)
    for steps in range(1, 5):
        v = (policy * (model.reward + model.transition @ v)).sum(1)
        assert dm(episodes, fitted.values(flow, steps).v).estimate() == pytest.approx(model.initial @ v, abs=EXACT)
    assert fitted.coefficients(500) == pytest.approx(fitted.coefficients(), abs=EXACT)


def test_the_models_ridge_is_judged_on_the_folds_left_out() -> None:
    """Against plain least squares on the other folds: up to a constant, its squared errors over what there was to predict."""
    world = circling_world(0.8)
    episodes, policy = numbered(world.simulate(30, 0)), random_policy(world, 1)
    flow = pair_flow(episodes, policy)
    features = Features.fit(episodes, fourier=4, by_step=False, seed=0)
    fold = np.arange(30) % 3
    part = block(flow, features, False, slice(0, 30))
    ahead, of_row = episodes.discount[:, None] * part.onward, fold[episodes.episode_of_row]
    expected = np.zeros(len(model_based.RIDGES))
    for place, ridge in enumerate(model_based.RIDGES):
        for number in range(3):
            mine, basis = of_row == number, part.basis[of_row != number]
            largest = np.linalg.eigvalsh(basis.T @ basis)[-1]
            solve = np.linalg.solve(basis.T @ basis + ridge * largest * np.eye(basis.shape[1]), basis.T)
            off = ahead[mine] - part.basis[mine] @ (solve @ ahead[of_row != number])
            earned = episodes.reward[mine] - part.basis[mine] @ (solve @ episodes.reward[of_row != number])
            expected[place] += np.square(off).sum() / np.square(ahead).sum()
            expected[place] += np.square(earned).sum() / np.square(episodes.reward).sum()
    found = model_based._errors(model_based._sums(flow, features, False, fold))
    assert found - found[0] == pytest.approx(expected - expected[0], abs=1e-6)


def test_weighting_rewards_and_following_a_model_are_two_sides_of_the_same_equations() -> None:
    """In the same features, without ridge or discount: minimax weights times rewards are the model's value, exactly."""
    world = circling_world(1.0)
    shown = np.array([[0.0], [1.0], [5.0]], np.float32)
    episodes, policy = numbered(dataclasses.replace(world, observed=shown).simulate(300, 0)), random_policy(world, 1)
    state = episodes.observation[:, 0].astype(int)
    next_state = np.where(episodes.terminated, 0, episodes.next_observation[:, 0]).astype(int)
    flow = Flow.by_state_action(episodes, policy[state], policy[next_state])
    for fourier in (0, 3):
        fitted = fit_ratios(flow, ridge=0.0, fourier=fourier)
        part = block(flow, fitted.features, False, slice(0, 300))
        weighted = mis(episodes, part.basis @ fitted.coefficients).estimate()
        modelled = dm(episodes, FeatureModel.fit(flow, ridge=0.0, fourier=fourier).values(flow).v).estimate()
        assert weighted == pytest.approx(modelled, abs=1e-8)


def test_the_model_of_random_features_has_the_value_of_a_policy_that_looks_at_the_observation() -> None:
    """And with fitted weights by state and action, no propensity in sight, the corrected value has it too."""
    world = random_world(3, 2, 3, 1.0, seed=6)
    shown = np.random.default_rng(0).normal(size=(world.n_states, 2)).astype(np.float32)
    shown[world.terminal] = np.nan
    policy, flows = random_policy(world, 1), []
    for seed in (0, 1):
        hidden = world.simulate(1500, seed)
        log = dataclasses.replace(
            numbered(hidden), observation=shown[states_of(hidden)[0]], final_observation=shown[[-1] * 1500]
        )
        flows.append(Flow.by_state_action(numbered(log), policy[states_of(hidden)[0]], policy[states_of(hidden)[1]]))
    values = FeatureModel.fit(flows[0], fourier=30).values(flows[1])
    assert dm(flows[1].episodes, values.v).estimate() == pytest.approx(world.value(policy), abs=0.1)
    weight = required(fit_ratios(flows[0], fourier=30).weights(flows[1])).weight
    x = pseudo_outcomes(flows[1].episodes, weight, *values)
    assert x.mean() == pytest.approx(world.value(policy), abs=4 * x.std() / np.sqrt(1500))
    assert x.std() / np.sqrt(1500) < 0.06


def test_a_model_that_grows_without_bound_has_no_values() -> None:
    world = circling_world(1.0, ending=0.0)
    episodes = coded(recorded_paths(world, 3)[0], 3)
    fitted = FeatureModel.fit(pair_flow(episodes, world.behavior), ridge=0.0)
    with pytest.raises(InputError, match="without bound"):
        fitted.coefficients()
    assert np.isfinite(fitted.coefficients(3)).all()


def true_model(steps: int | None, survival: float = 1.0) -> LinearGaussianModel:
    """The mass as the model would have it after infinitely many rows: columns position, velocity and step."""
    dynamics = np.zeros((5, 3))
    dynamics[1:3, :2], dynamics[4:, :2] = MASS.dynamics.T, MASS.control.T
    dynamics[[0, 3], 2] = 1.0
    noise = np.zeros((3, 3))
    noise[:2, :2] = MASS.noise
    reward = np.zeros((5, 5))
    reward[1:3, 1:3], reward[4:, 4:] = -MASS.state_cost, -MASS.action_cost
    return LinearGaussianModel(dynamics, noise, reward, MASS.gamma * survival, steps)


def affine(policy: LinearGaussianPolicy) -> AffinePolicy:
    return AffinePolicy(np.concatenate([[[0.0]], policy.gain, [[0.0]]], 1), policy.covariance)


@pytest.mark.parametrize("survival", [1.0, 0.8])
def test_the_values_of_a_linear_gaussian_model_are_exact(survival: float) -> None:
    world = dataclasses.replace(MASS, survival=survival)
    log = world.simulate(50, 0)
    values = true_model(world.horizon, survival).values(log, affine(STEADY))
    assert values.v == pytest.approx(world.state_values(STEADY, log.observation), abs=EXACT)
    assert values.q == pytest.approx(world.q_values(STEADY, log.observation, log.action), abs=1e-6)
    cut = dataclasses.replace(log, terminated=np.zeros(log.n_rows, bool), truncated=log.terminated)
    following = log.next_observation
    ahead = np.where(following[:, 2] < world.horizon, following[:, 2], 0)
    past = world.state_values(STEADY, np.column_stack([following[:, :2], ahead]).astype(np.float32))
    expected = np.where(log.terminated & (following[:, 2] < world.horizon), past, 0.0)
    assert true_model(world.horizon, survival).values(cut, affine(STEADY)).next_v == pytest.approx(expected, abs=EXACT)


def test_an_endless_horizon_is_the_limit_of_long_ones() -> None:
    log = MASS.simulate(20, 0)
    endless, long = (true_model(steps).values(log, affine(STEADY)) for steps in (None, 2000))
    assert endless.q == pytest.approx(long.q, abs=1e-7) and endless.v == pytest.approx(long.v, abs=1e-7)
    undiscounted = dataclasses.replace(true_model(None), discount=1.0)
    with pytest.raises(InputError, match="without bound"):
        undiscounted.values(log, affine(STEADY))


@pytest.mark.parametrize("survival", [1.0, 0.8])
def test_a_fitted_linear_gaussian_model_has_the_policys_value(survival: float) -> None:
    world = dataclasses.replace(MASS, survival=survival)
    fitted_on, episodes = numbered(world.simulate(1500, 0)), numbered(world.simulate(1500, 1))
    model = LinearGaussianModel.fit(fitted_on, steps=world.horizon)
    assert model.discount == pytest.approx(MASS.gamma * survival, abs=0.01)
    assert model.noise[:2, :2] == pytest.approx(MASS.noise, abs=0.001)
    exact = world.value(STEADY)
    assert exact - world.value(world.behavior) > 0.04
    assert dm(episodes, model.values(episodes, affine(STEADY)).v).estimate() == pytest.approx(exact, abs=0.02)


def test_discrete_actions_under_a_policy_that_looks_at_nothing() -> None:
    """s' = s + 1 + a, reward (s + a)^2, the end after three steps: the sum over all eight sequences of actions."""
    rng = np.random.default_rng(0)
    start, action = rng.normal(size=200).round(2), rng.integers(0, 2, (200, 3))
    state = start[:, None] + np.column_stack([np.zeros(200), np.cumsum(1.0 + action[:, :2], axis=1)])
    ends = np.tile([False, False, True], 200)
    log = Episodes(
        episode_id=np.arange(200),
        offsets=np.arange(0, 601, 3),
        observation=state.reshape(-1, 1),
        final_observation=np.full((200, 1), np.nan),
        action=action.ravel(),
        mask=np.ones((600, 2), bool),
        reward=np.square(state + action).ravel(),
        terminated=ends,
        truncated=np.zeros(600, bool),
        action_prob=np.full(600, 0.5),
        gamma=0.9,
        features=(Feature("s"),),
    )
    model = LinearGaussianModel.fit(log, steps=3)
    p = 0.3
    values = model.values(log, AffinePolicy(np.array([[p, 0.0]]), np.array([[p * (1 - p)]])))
    expected = np.zeros(200)
    for sequence in itertools.product((0, 1), repeat=3):
        s, chance = start.copy(), np.prod([p if a else 1 - p for a in sequence])
        for step, a in enumerate(sequence):
            expected += chance * 0.9**step * (s + a) ** 2
            s = s + 1.0 + a
    assert values.v[::3] == pytest.approx(expected, abs=1e-8)


def test_what_a_linear_gaussian_model_cannot_know_is_refused() -> None:
    log = numbered(MASS.simulate(20, 0))
    with pytest.raises(InputError, match="20 episodes have more than the 5 steps"):
        LinearGaussianModel.fit(log, steps=5)
    with pytest.raises(InputError, match="column state holds categories"):
        LinearGaussianModel.fit(coded(circling_world(1.0).simulate(20, 0), 3), steps=None)
    with pytest.raises(InputError, match="not equally far apart"):
        LinearGaussianModel.fit(dataclasses.replace(log, interval=np.ones(log.n_rows)), steps=10)
    bandit = numbered(random_world(2, 2, 1, 1.0, 0).simulate(20, 0))
    with pytest.raises(InputError, match="no dynamics to learn"):
        LinearGaussianModel.fit(bandit, steps=1)
