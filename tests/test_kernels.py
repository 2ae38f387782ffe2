"""Kernels over continuous actions by hand and by quadrature, and the choice of a bandwidth."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.continuous import Kernel, bandwidth_grid, density_ratios, kernel_density, smoothed
from offrl_models.ope.importance import tis, wis
from offrl_models.schema import Episodes, InputError
from tests.test_continuous import EXACT, KERNELS, act, at_target, logged, panels, simulated

# The kernels themselves


def actions(values: np.ndarray) -> Episodes:
    """Episodes of one step with these actions [rows, dimensions], a logged density of 1/2 and a reward of 1."""
    n = len(values)
    return logged(np.zeros((n, 1)), values[:, None, :], np.ones((n, 1)), np.full((n, 1), 0.5))


def test_kernels_by_hand() -> None:
    """Distances of 1 and 0.5 in bandwidths of 2 and 1; and a bound at the target in the second dimension."""
    episodes, target = actions(np.array([[1.0, 0.5]])), np.array([[0.0, 0.0]])
    h = np.array([2.0, 1.0])
    found = kernel_density(episodes, target, h, kernel="epanechnikov")
    assert found[0] == pytest.approx(0.75 * (1 - 0.25) / 2 * 0.75 * (1 - 0.25))
    found = kernel_density(episodes, target, h, kernel="gaussian")
    assert found[0] == pytest.approx(stats.norm.pdf(0.5) / 2 * stats.norm.pdf(0.5))
    assert density_ratios(episodes, found)[0] == pytest.approx(2 * found[0])
    bounds = np.array([[-np.inf, np.inf], [0.0, np.inf]])
    for kernel in KERNELS:
        open_, cut = (kernel_density(episodes, target, h, kernel=kernel, bounds=b) for b in (None, bounds))
        assert cut == pytest.approx(2 * open_)
    far = actions(np.array([[2.1, 0.0]]))
    assert kernel_density(far, target, h, kernel="epanechnikov")[0] == 0.0


@given(st.sampled_from(KERNELS), st.floats(0.05, 3.0), st.floats(0.0, 1.0), st.booleans())
def test_a_kernel_integrates_to_one_over_the_actions_that_can_occur(
    kernel: Kernel, h: float, center: float, bounded: bool
) -> None:
    bounds = np.array([[0.0, 1.0]]) if bounded else None
    low, high = (0.0, 1.0) if bounded else (center - 10 * h, center + 10 * h)
    kinks = [center + k * h for k in (-8, -4, -2, -1, 0, 1, 2, 4, 8)]
    a, weight = panels(*sorted({low, high, *(k for k in kinks if low < k < high)}))
    target = np.full((len(a), 1), center)
    density = kernel_density(actions(a[:, None]), target, np.array([h]), kernel=kernel, bounds=bounds)
    assert weight @ density == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize(("kernel", "inward"), [("gaussian", np.sqrt(2 / np.pi)), ("epanechnikov", 3 / 8)])
def test_a_policy_at_the_bound_of_its_action_is_corrected(kernel: Kernel, inward: float) -> None:
    """Uniform actions on [0, 1], reward 1 + 2 a, policy 0: half a kernel, which is `inward` bandwidths off its target."""
    h = 0.1
    a, weight = panels(0.0, 0.1, 0.2, 0.4, 1.0)
    episodes = logged(np.zeros((160, 1)), a[:, None, None], 1 + 2 * a[:, None], np.ones((160, 1)))
    target, bounds, stated = np.zeros((160, 1)), np.array([[0.0, 1.0]]), np.array([[h]])
    for estimator in (tis, wis):
        terms, _ = smoothed(episodes, target, partial(estimator, episodes), stated, kernel=kernel, bounds=bounds)
        assert terms.estimate(weight) == pytest.approx(1 + 2 * h * inward, abs=EXACT)
    uncorrected, _ = smoothed(episodes, target, partial(tis, episodes), stated, kernel=kernel)
    assert uncorrected.estimate(weight) == pytest.approx((1 + 2 * h * inward) / 2, abs=EXACT)


# The choice of a bandwidth


def test_a_flat_reward_gets_a_wide_bandwidth_and_a_curved_one_a_narrow_one() -> None:
    chosen, errors = {"flat": [], "curved": []}, []
    for seed in range(12):
        episodes = simulated(4000, seed)
        grid = bandwidth_grid(episodes, 6)
        a, s = episodes.action[:, 0].astype(float), episodes.observation[:, 0]
        for name, reward in (("flat", 1 + 0.1 * s), ("curved", np.cos(3 * (a - act(s))))):
            log = dataclasses.replace(episodes, reward=reward)
            terms, h = smoothed(log, at_target(log), partial(wis, log), grid, kernel="epanechnikov")
            chosen[name].append(h[0] / grid[-1, 0])
            alone, _ = smoothed(log, at_target(log), partial(wis, log), h[None, :], kernel="epanechnikov")
            assert terms.estimate() == alone.estimate()  # the terms are those of the bandwidth that is returned
            if name == "curved":
                errors.append(terms.estimate() - 1.0)
    assert np.median(chosen["flat"]) == 1.0
    assert 1 / 32 < np.median(chosen["curved"]) < 1 / 2
    assert np.abs(errors).max() < 0.15  # at the widest the error is over 0.5


def test_the_grid_halves_the_spread_of_each_dimension() -> None:
    episodes = simulated(200, 0, dimensions=2)
    episodes = dataclasses.replace(episodes, action=episodes.action * np.array([1, 10], np.float32))
    grid = bandwidth_grid(episodes, 3)
    assert grid[2] == pytest.approx(episodes.action.astype(float).std(0))
    assert grid[:2] == pytest.approx(np.stack([grid[2] / 4, grid[2] / 2]))


def test_what_continuous_actions_refuse() -> None:
    episodes = simulated(100, 0)
    target, one = at_target(episodes), np.array([0.5])
    density = kernel_density(episodes, target, one, kernel="gaussian")
    with pytest.raises(InputError, match="negative in 100 rows"):
        density_ratios(episodes, -density)
    with pytest.raises(InputError, match="NaN"):
        density_ratios(episodes, density * np.nan)
    for bad in (0.0, -1.0, np.nan):
        broken = dataclasses.replace(episodes, action_prob=np.full(100, bad))
        with pytest.raises(InputError, match="not positive in 100 rows"):
            density_ratios(broken, density)
    with pytest.raises(InputError, match="bandwidth must be positive"):
        kernel_density(episodes, target, np.array([0.0]), kernel="gaussian")
    with pytest.raises(InputError, match="the evaluation policy's action holds 100 values"):
        kernel_density(episodes, target * np.nan, one, kernel="gaussian")
    with pytest.raises(InputError, match="policy's action lies outside"):
        kernel_density(episodes, target + 50, one, kernel="gaussian", bounds=np.array([[-20.0, 20.0]]))
    with pytest.raises(InputError, match="logged action lies outside"):
        kernel_density(episodes, target * 0, one, kernel="gaussian", bounds=np.array([[-0.1, 0.1]]))
    low = np.float32(-0.3)  # is below -0.3
    at_the_bound = dataclasses.replace(episodes, action=np.full((100, 1), low))
    kernel_density(at_the_bound, target * 0, one, kernel="gaussian", bounds=np.array([[-0.3, 0.3]]))
    discrete = dataclasses.replace(episodes, action=np.zeros(100, int))
    with pytest.raises(InputError, match="discrete"):
        kernel_density(discrete, target, one, kernel="gaussian")


def test_a_bandwidth_that_reaches_no_logged_action_is_refused() -> None:
    episodes = simulated(100, 0)
    choose = partial(smoothed, episodes, estimator=partial(tis, episodes), kernel="epanechnikov")
    with pytest.raises(InputError, match="worth 0.0 episodes"):
        choose(at_target(episodes) + 50, bandwidths=np.array([[0.5]]))
    with pytest.raises(InputError, match=r"0.01.* worth \d.\d episodes"):
        choose(at_target(episodes), bandwidths=np.array([[0.01], [1.0]]))
    with pytest.raises(InputError, match="must rise"):
        choose(at_target(episodes), bandwidths=np.array([[1.0], [0.5]]))
