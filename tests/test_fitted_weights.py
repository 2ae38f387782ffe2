"""Fitted weights against closed-form Gaussian densities, what is checked of them, and what cannot be trusted."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from offrl_models.ope import fitted_ratios
from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.drl import drl_fitted
from offrl_models.ope.fitted_ratios import Refusal, Weights, fit_ratios
from offrl_models.ope.flow import Flow, chunks
from offrl_models.ope.importance import pdis
from offrl_models.ope.marginal import mis, value_gains
from offrl_models.ope.model_based import AffinePolicy, LinearGaussianModel, Values
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import random_policy, random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import circling_world, ratio_of, recorded_paths
from tests.test_fitted_ratios import MASS, STEADY, coded, gaussian_ratio, numbered, required


def refused(found: Weights | Refusal) -> str:
    assert isinstance(found, Refusal), found
    assert not hasattr(found, "weight") and found.reason.endswith(".")
    return found.reason


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


def test_double_reinforcement_learning_needs_right_values_or_right_weights(
    controlled: tuple[Episodes, Episodes],
) -> None:
    """Over continuous states and actions, with the value known in closed form; values of other folds, good ones and none."""
    log = controlled[1]
    ratio, n = gaussian_ratio(log), log.n_episodes
    affine = AffinePolicy(np.concatenate([[[0.0]], STEADY.gain, [[0.0]]], 1), STEADY.covariance)
    shared = []

    def modelled(others: Episodes, held: Episodes) -> Values:
        shared.append(set(others.episode_id.tolist()) & set(held.episode_id.tolist()))
        return LinearGaussianModel.fit(others, steps=MASS.horizon).values(held, affine)

    def nothing(others: Episodes, held: Episodes) -> Values:
        return Values(*np.zeros((3, held.n_rows)))

    found = {
        "good": drl_fitted(log, ratio, modelled, form="markov", folds=2),
        "none": drl_fitted(log, ratio, nothing, form="markov", folds=2),
        "past": drl_fitted(log, ratio, modelled, form="history", folds=2),
    }
    errors = {name: terms.influence().std() / np.sqrt(n) for name, terms in found.items()}
    for name, terms in found.items():
        assert abs(terms.estimate() - MASS.value(STEADY)) < 4 * errors[name], name
    assert errors["good"] < 0.8 * errors["none"] and errors["good"] < 1.05 * errors["past"]
    assert shared == [set()] * 4  # the others of a fold hold none of it
    plain = drl_fitted(log, ratio, nothing, form="history", folds=2)
    assert plain.numerator[:, 0] == pytest.approx(pdis(log, ratio).numerator.sum(1), abs=1e-9)
    with pytest.raises(InputError, match="do not average 1"):
        drl_fitted(log, 1.3 * ratio, nothing, form="markov", folds=2)


def test_double_reinforcement_learning_counts_what_a_truncation_cut_off() -> None:
    log, _ = recorded_paths(world := circling_world(0.9), 3)
    q = world.q_values(policy := random_policy(world, 1))
    v, ratio = (policy * q).sum(1), ratio_of(policy, log)

    def exact(others: Episodes, held: Episodes) -> Values:
        state, following = states_of(held)
        return Values(q[state, held.action], v[state], v[following])

    found = drl_fitted(log, ratio, exact, form="history", folds=2)
    of_all = exact(log, log)
    expected = dr(completed(log, of_all.next_v), ratio, of_all.q, of_all.v).numerator[:, 0]
    assert log.truncated.any() and found.numerator[:, 0] == pytest.approx(expected, abs=1e-9)
