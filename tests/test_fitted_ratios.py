"""Fitted ratios and learned models against exact tables, closed-form Gaussian densities, and each other."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope import fitted_ratios, minimax, model_based
from offrl_models.ope.bandit import dm
from offrl_models.ope.fitted_ratios import Refusal, Weights, fit_ratios
from offrl_models.ope.flow import Features, Flow, block, chunks
from offrl_models.ope.marginal import mis, pseudo_outcomes, state_action_weights, step_ratios, value_gains
from offrl_models.ope.model_based import AffinePolicy, FeatureModel, LinearGaussianModel
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


def refused(found: Weights | Refusal) -> str:
    assert isinstance(found, Refusal), found
    assert not hasattr(found, "weight") and found.reason.endswith(".")
    return found.reason


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


# --- closed-form Gaussian densities --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlled() -> tuple[Episodes, Episodes]:
    """Logs to fit on and to weigh, of a mass pushed about at random."""
    return numbered(MASS.simulate(800, 0)), numbered(MASS.simulate(800, 1))


@pytest.fixture(scope="module")
def weights(controlled: tuple[Episodes, Episodes]) -> Weights:
    fitted_on, episodes = controlled
    fitted = fit_ratios(Flow.by_state(fitted_on, gaussian_ratio(fitted_on)))
    return required(fitted.weights(Flow.by_state(episodes, gaussian_ratio(episodes))))


def test_fitted_ratios_come_close_to_the_ratios_of_gaussian_densities(
    controlled: tuple[Episodes, Episodes], weights: Weights
) -> None:
    _, episodes = controlled
    exact = MASS.state_ratio(STEADY, episodes.observation)
    omega = weights.weight / gaussian_ratio(episodes)
    spread = np.square(exact - 1.0).mean()
    assert spread > 0.15 and np.square(omega - exact).mean() < 0.1 * spread
    assert np.corrcoef(omega, exact)[0, 1] > 0.95
    checks = weights.checks
    assert abs(checks.mean - 1) < 0.1 and max(map(abs, (checks.mean_z, checks.worst_z, checks.ratio_z))) < checks.limit


def test_the_checks_are_two_sided_and_of_weighted_rows(controlled: tuple[Episodes, Episodes], weights: Weights) -> None:
    fitted_on, episodes = controlled
    checks, omega = weights.checks, weights.weight / gaussian_ratio(episodes)
    assert checks.limit == pytest.approx(stats.norm.isf(0.01 / 2 / (checks.functions + 2)))
    drift = episodes.sum_per_episode(episodes.time_discount * (weights.weight - omega))
    assert checks.ratio_z == pytest.approx(drift.mean() / (drift.std() / np.sqrt(800)), abs=1e-6)
    fitted = fit_ratios(Flow.by_state(fitted_on, gaussian_ratio(fitted_on)), ridge=1e-4)
    flow, worst = Flow.by_state(episodes, gaussian_ratio(episodes)), []
    for factor in (0.5, 1.5):  # what is missing of one function is too much by the other
        scaled = dataclasses.replace(fitted, coefficients=factor * fitted.coefficients)
        worst.append(scaled.weights(flow).checks.worst_z)
    assert min(worst) < -checks.limit and max(worst) > checks.limit


def test_weighted_rewards_and_pseudo_outcomes_have_the_value_of_the_policy(
    controlled: tuple[Episodes, Episodes], weights: Weights
) -> None:
    """The gain over the behavior with good values, with bad ones, and with good values under bad weights."""
    _, episodes = controlled
    value, gain = MASS.value(STEADY), MASS.value(STEADY) - MASS.value(MASS.behavior)
    assert gain > 0.18
    assert mis(episodes, weights.weight).estimate() == pytest.approx(value, abs=0.08)
    q = MASS.q_values(STEADY, episodes.observation, episodes.action)
    v = MASS.state_values(STEADY, episodes.observation)
    zero = np.zeros(episodes.n_rows)
    for weight, share, within in ((weights.weight, 1.0, 0.04), (weights.weight, 0.5, 0.06), (zero + 1, 1.0, 0.04)):
        x = value_gains(episodes, weight, share * q, share * v, zero, zero + 1, v, zero)
        assert x.mean() == pytest.approx(gain, abs=within), share
    off = value_gains(episodes, zero + 1, 0.5 * q, 0.5 * v, zero, zero + 1, v, zero).mean()
    assert abs(off - gain) > 0.08  # neither right


# --- weights that cannot be trusted --------------------------------------------------------------------------------------


def test_features_too_poor_for_the_ratio_are_refused(controlled: tuple[Episodes, Episodes]) -> None:
    fitted_on, episodes = controlled
    fitted = fit_ratios(Flow.by_state(fitted_on, gaussian_ratio(fitted_on)), fourier=0)
    assert "out of balance" in refused(fitted.weights(Flow.by_state(episodes, gaussian_ratio(episodes))))


def test_weights_for_another_process_are_refused(controlled: tuple[Episodes, Episodes]) -> None:
    """Fitted where a push does twice as much as where the weights are used."""
    _, episodes = controlled
    heavier = numbered(dataclasses.replace(MASS, control=2.0 * MASS.control).simulate(800, 3))
    fitted = fit_ratios(Flow.by_state(heavier, gaussian_ratio(heavier)), ridge=1e-4)
    assert refused(fitted.weights(Flow.by_state(episodes, gaussian_ratio(episodes))))


def test_wrong_propensities_are_refused() -> None:
    """Half of what they are: with a fixed number of steps the rest balances all the same."""
    world = random_world(2, 2, 3, 0.9, seed=1)
    logs = [coded(world.simulate(800, seed), world.n_states) for seed in (0, 1)]
    policy = random_policy(world, 1)
    fitted_on, flow = (Flow.by_state(log, 2.0 * ratio_of(policy, log)) for log in logs)
    assert "propensities" in refused(fit_ratios(fitted_on, ridge=1e-9).weights(flow))


def test_a_policy_whose_visits_never_end_is_refused() -> None:
    """Undiscounted recordings of a process that goes on: there is nothing to balance the start with."""
    world = circling_world(1.0, ending=0.0)
    logs = []
    for seed in (0, 1):
        whole, probability = recorded_paths(world, 3)
        drawn = np.random.default_rng(seed).choice(whole.n_episodes, 400, p=probability)
        parts = [np.flatnonzero(whole.episode_of_row == i) for i in drawn]
        rows = np.concatenate(parts)
        names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
        taken = dataclasses.replace(
            whole,
            episode_id=np.arange(400),
            final_observation=whole.final_observation[drawn],
            **{name: getattr(whole, name)[rows] for name in names},
            offsets=np.append(0, np.cumsum([len(part) for part in parts])),
        )
        logs.append(coded(taken, 3))
    policy = random_policy(world, 1)
    flows = [Flow.by_state(log, ratio_of(policy, log)) for log in logs]
    assert "too little of where the policy goes" in refused(fit_ratios(flows[0], ridge=1e-12).weights(flows[1]))
    assert "instead of 1" in refused(fit_ratios(flows[0], ridge=1.0).weights(flows[1]))
    assert fit_ratios(flows[0], ridge=1.0).weights(flows[1]).checks.mean < 0.5
    assert refused(fit_ratios(flows[0]).weights(flows[1]))
    required(fit_ratios(flows[0], by_step=True).weights(flows[1]))  # by step a recording's end is an end


def test_too_few_episodes_to_check_with_are_refused(controlled: tuple[Episodes, Episodes]) -> None:
    fitted_on, episodes = controlled
    fitted = fit_ratios(Flow.by_state(fitted_on, gaussian_ratio(fitted_on)))
    few = episodes.take(np.arange(800) < 12)
    assert "12 episodes tell the mean" in refused(fitted.weights(Flow.by_state(few, gaussian_ratio(few))))


def test_the_stated_errors_are_those_over_many_logs() -> None:
    """100 pairs of logs, half as many episodes fitted on as weighed: refusals at a level of 10%, and every standard error."""
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, refusals, fits, mean_z = random_policy(world, 1), 0, [], []
    for seed in range(100):
        logs = [coded(world.simulate(n, 2 * seed + i), world.n_states) for i, n in enumerate((300, 600))]
        fitted_on, flow = (Flow.by_state(log, ratio_of(policy, log)) for log in logs)
        fits.append(fit_ratios(fitted_on, ridge=1e-4))
        found = fits[-1].weights(flow, level=0.1)
        refusals += isinstance(found, Refusal)
        mean_z.append(found.checks.mean_z)
    assert refusals <= stats.binom.ppf(0.99, 100, 0.1)
    assert np.std(mean_z) == pytest.approx(1.0, abs=0.2)
    spread = np.cov(np.array([fit.coefficients for fit in fits]).T)
    stated = np.mean([fit.covariance for fit in fits], axis=0)
    assert np.abs(stated - spread).max() < 0.3 * np.abs(spread).max()
    later = np.flatnonzero(np.diag(spread) > 0.2 * np.diag(spread).max())
    assert len(later) >= 2 and np.diag(stated)[later] == pytest.approx(np.diag(spread)[later], rel=0.4)
    visits = world.occupancy(world.behavior) * ~world.terminal
    average = np.sqrt((np.diag(spread) * visits).sum() / visits.sum())
    assert np.mean([fit.noise for fit in fits]) == pytest.approx(average, rel=0.15)


def test_with_the_ridge_that_balances_folds_right_weights_are_hardly_refused() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, refusals = random_policy(world, 1), 0
    for seed in range(40):
        logs = [coded(world.simulate(n, 2 * seed + i), world.n_states) for i, n in enumerate((300, 600))]
        fitted_on, flow = (Flow.by_state(log, ratio_of(policy, log)) for log in logs)
        refusals += isinstance(fit_ratios(fitted_on).weights(flow), Refusal)
    assert refusals <= stats.binom.ppf(0.99, 40, 0.01)


def test_the_fitting_error_is_part_of_the_checks() -> None:
    """Fitted on few episodes and checked on very many, right weights would be refused if only the latter's noise counted."""
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy = random_policy(world, 1)
    many = coded(world.simulate(20_000, 99), 7)
    flow = Flow.by_state(many, ratio_of(policy, many))
    aware = unaware = 0
    for seed in range(12):
        few = coded(world.simulate(200, seed), 7)
        fitted = fit_ratios(Flow.by_state(few, ratio_of(policy, few)), ridge=0.0)
        aware += isinstance(fitted.weights(flow), Refusal)
        sure = dataclasses.replace(fitted, covariance=np.zeros_like(fitted.covariance))
        unaware += isinstance(sure.weights(flow), Refusal)
    assert aware <= 1 and unaware >= 10


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


def test_weights_are_never_negative_nor_above_the_limit(controlled: tuple[Episodes, Episodes]) -> None:
    log = controlled[0].take(np.arange(800) < 50)
    flow = Flow.by_state(log, gaussian_ratio(log))
    fitted = fit_ratios(flow, fourier=20, ridge=1e-3)
    wild = fitted.coefficients * -30.0
    for limited, low, high in ((True, 0.0, 20.0), (False, -np.inf, np.inf)):
        omega = fitted_ratios._balance(
            flow, fitted.features, wild, fitted.checked, by_step=False, limited=limited
        ).omega
        assert (omega.min() >= low and omega.max() <= high) and (limited or omega.min() < 0)


@pytest.mark.parametrize("limited", [True, False])
def test_the_slope_is_that_of_what_leaves(controlled: tuple[Episodes, Episodes], limited: bool) -> None:
    """Against differences; where omega is limited, its coefficients move nothing."""
    log = controlled[0].take(np.arange(800) < 50)
    flow = Flow.by_state(log, gaussian_ratio(log))
    fitted = fit_ratios(flow, fourier=20, ridge=1e-3)
    wild, step = fitted.coefficients * -3.0, 1e-6

    def balance(coefficients: np.ndarray) -> fitted_ratios._Balance:
        return fitted_ratios._balance(
            flow, fitted.features, coefficients, fitted.checked, by_step=False, limited=limited
        )

    found = balance(wild)
    assert not limited or 0.2 < (found.omega == 0.0).mean() < 1.0
    for place in (0, 5, len(wild) - 1):
        shift = step * (np.arange(len(wild)) == place)
        left = (balance(wild + shift).mean - balance(wild - shift).mean) / (2 * step)
        assert -left == pytest.approx(found.slope[:, place], abs=1e-6)


def test_other_functions_are_checked_than_those_fitted_with(controlled: tuple[Episodes, Episodes]) -> None:
    log = controlled[0].take(np.arange(800) < 50)
    fitted = fit_ratios(Flow.by_state(log, gaussian_ratio(log)), fourier=50, ridge=1e-3)
    assert fitted.features.frequency.shape == fitted.checked.frequency.shape
    assert not np.isclose(fitted.features.phase, fitted.checked.phase).any()


def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, controlled: tuple[Episodes, Episodes]
) -> None:
    log = controlled[0].take(np.arange(800) < 60)
    flow = Flow.by_state(log, gaussian_ratio(log))
    whole = fit_ratios(flow, fourier=20, ridge=1e-3)
    assert [(part.start, part.stop) for part in chunks(log, 24)] == [(0, 60)]
    monkeypatch.setattr("offrl_models.ope.flow.NUMBERS", 24 * 35)
    assert [(part.start, part.stop) for part in chunks(log, 24)] == [(i, i + 3) for i in range(0, 60, 3)]
    monkeypatch.setattr("offrl_models.ope.flow.NUMBERS", 1)
    again = fit_ratios(flow, fourier=20, ridge=1e-3)
    assert again.coefficients == pytest.approx(whole.coefficients, rel=1e-6)
    assert again.covariance == pytest.approx(whole.covariance, rel=1e-5, abs=1e-5)


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
