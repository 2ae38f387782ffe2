"""Continuous actions against linear-Gaussian worlds with values in closed form: integrals by quadrature, so no sampling error.

Every node of a quadrature rule is an episode, and its weight times the density of the logged data is the episode's share.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.continuous import Kernel, bandwidth_grid, density_ratios, kernel_density, smoothed
from offrl_models.ope.doubly_robust import dr, wdr
from offrl_models.ope.importance import Terms, pdis, tis, wis, wpdis
from offrl_models.ope.worlds import point_mass
from offrl_models.schema import Episodes

EXACT = 1e-9
KERNELS: tuple[Kernel, ...] = ("gaussian", "epanechnikov")
SECOND_MOMENT = {"gaussian": 1.0, "epanechnikov": 0.2}  # of each kernel


def logged(
    observation: np.ndarray, action: np.ndarray, reward: np.ndarray, density: np.ndarray, gamma: float = 1.0
) -> Episodes:
    """Episodes that all have as many steps as the arrays have columns; actions [episodes, steps, dimensions]."""
    n, steps = reward.shape
    last = np.tile(np.arange(steps) == steps - 1, n)
    return Episodes(
        episode_id=np.arange(n),
        offsets=np.arange(0, n * steps + 1, steps),
        observation=observation.reshape(-1, 1),
        final_observation=np.zeros((n, 1)),
        action=action.reshape(n * steps, -1),
        mask=np.ones((n * steps, 0), bool),
        reward=reward.ravel().astype(np.float64),
        terminated=last,
        truncated=np.zeros(n * steps, bool),
        action_prob=density.ravel().astype(np.float64),
        gamma=gamma,
    )


def trapezoid(low: float, high: float, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights; as good as exact for smooth functions that vanish at both ends."""
    at = np.linspace(low, high, nodes)
    return at, np.full(nodes, at[1] - at[0])


def panels(*edges: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights between all neighboring edges: for functions with a kink at some edge."""
    node, weight = np.polynomial.legendre.leggauss(40)
    half = np.diff(edges)[:, None] / 2
    return (np.array(edges[:-1])[:, None] + half * (1 + node)).ravel(), (half * weight).ravel()


# One step: s ~ N(0.5, 1), a ~ N(0.8 s, 1), r = 1 + 2 s - (a - s)^2.


def reward_of(s: np.ndarray, a: np.ndarray) -> np.ndarray:
    return 1 + 2 * s - np.square(a - s)


def act(s: np.ndarray) -> np.ndarray:
    """The deterministic policy of the one-step world."""
    return 0.4 * s + 0.3


VALUE = 1 + 2 * 0.5 - (0.36 * 1.25 - 0.36 * 0.5 + 0.09)  # E(0.3 - 0.6 s)^2 with E s^2 = 1.25


def one_step(h: float) -> tuple[Episodes, np.ndarray]:
    """Quadrature of the world, fine enough for kernels of bandwidth h around `act(s)`."""
    s, s_weight = trapezoid(0.5 - 8, 0.5 + 8, 48)
    u, u_weight = panels(*sorted({-16, -8, -4, -8 * h, -h, 0, h, 8 * h, 4, 8, 16}))  # action minus act(s)
    s_of, u_of = np.meshgrid(s, u, indexing="ij")
    a = act(s_of) + u_of
    density = stats.norm.pdf(a, 0.8 * s_of, 1.0)
    share = (s_weight * stats.norm.pdf(s, 0.5, 1.0))[:, None] * u_weight * density
    flat = s_of.reshape(-1, 1)
    episodes = logged(flat, a.reshape(-1, 1, 1), reward_of(flat, a.reshape(-1, 1)), density.reshape(-1, 1))
    return episodes, share.ravel()


def at_target(episodes: Episodes) -> np.ndarray:
    return act(episodes.observation)


def one_step_terms(episodes: Episodes, h: float, kernel: Kernel, q: np.ndarray, v: np.ndarray) -> dict[str, Terms]:
    estimators = {
        "TIS": partial(tis, episodes),
        "WIS": partial(wis, episodes),
        "DR": partial(dr, episodes, q=q, v=v),
        "WDR": partial(wdr, episodes, q=q, v=v),
    }
    stated = np.array([[h]])
    found = {n: smoothed(episodes, at_target(episodes), e, stated, kernel=kernel) for n, e in estimators.items()}
    assert all(bandwidth.tolist() == [h] for _, bandwidth in found.values())
    return {name: terms for name, (terms, _) in found.items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("h", [0.8, 0.4])
def test_a_smoothed_estimate_is_the_value_less_the_kernels_second_moment(kernel: Kernel, h: float) -> None:
    """The reward is quadratic in the action, so smoothing costs exactly h^2 times the kernel's second moment."""
    episodes, share = one_step(h)
    assert share.sum() == pytest.approx(1.0, abs=1e-11)
    s, a, target = episodes.observation[:, 0], episodes.action[:, 0], act(episodes.observation[:, 0])
    smooth = VALUE - h**2 * SECOND_MOMENT[kernel]
    linear = one_step_terms(episodes, h, kernel, 3 * s - 2 * a, 3 * s - 2 * target)
    for name, terms in linear.items():
        assert terms.estimate(share) == pytest.approx(smooth, abs=EXACT), name
    true = one_step_terms(episodes, h, kernel, reward_of(s, a), reward_of(s, target))
    assert true["DR"].estimate(share) == pytest.approx(VALUE, abs=EXACT)
    assert true["WDR"].estimate(share) == pytest.approx(VALUE, abs=EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_bias_falls_like_the_square_of_the_bandwidth(kernel: Kernel) -> None:
    """With a cosine of the action, whose smoothed value is in closed form: the kernel's characteristic function at 2 h."""
    exact = np.cos(1.8 * 0.5 + 0.6) * np.exp(-(1.8**2) / 2)  # 2 act(s) + s is N(1.5, 1.8^2)
    errors = []
    for h in (0.4, 0.2, 0.1, 0.05):
        episodes, share = one_step(h)
        s, a = episodes.observation[:, 0], episodes.action[:, 0]
        episodes = dataclasses.replace(episodes, reward=np.cos(2 * a + s))
        terms, _ = smoothed(episodes, at_target(episodes), partial(tis, episodes), np.array([[h]]), kernel=kernel)
        k = 2 * h
        kept = np.exp(-(k**2) / 2) if kernel == "gaussian" else 3 * (np.sin(k) - k * np.cos(k)) / k**3
        assert terms.estimate(share) == pytest.approx(exact * kept, abs=EXACT)
        errors.append(terms.estimate(share) - exact)
    assert errors[-2] / errors[-1] == pytest.approx(4.0, rel=0.01)


def test_a_gaussian_policy_has_ratios_of_densities() -> None:
    """pi(a|s) = N(act(s), 0.7^2) in the one-step world: its value is that of the policy smoothed by 0.7."""
    episodes, share = one_step(1.0)
    s, a = episodes.observation[:, 0], episodes.action[:, 0]
    ratio = density_ratios(episodes, stats.norm.pdf(a, act(s), 0.7))
    for terms in (tis(episodes, ratio), wis(episodes, ratio), dr(episodes, ratio, q=a + s, v=act(s) + s)):
        assert terms.estimate(share) == pytest.approx(VALUE - 0.49, abs=EXACT)


# Two steps: s_0 = 1 or -0.5, s_1 = 0.9 s_0 + 0.5 a_0, behavior N(0.2 s, 1), r = -s^2 - 0.5 a^2, gamma 0.9, policy a = -0.6 s.

GAMMA, GAIN = 0.9, -0.6


def two_steps() -> tuple[Episodes, np.ndarray]:
    s0 = np.array([1.0, -0.5])
    e, weight = trapezoid(-9, 9, 82)  # what the behavior adds to its mean
    s0_of, e0, e1 = np.meshgrid(s0, e, e, indexing="ij")
    a0 = 0.2 * s0_of + e0
    s1 = 0.9 * s0_of + 0.5 * a0
    s, a = np.stack([s0_of, s1], -1).reshape(-1, 2), np.stack([a0, 0.2 * s1 + e1], -1).reshape(-1, 2)
    density = stats.norm.pdf(a - 0.2 * s)
    share = np.tile(np.multiply.outer(weight, weight).ravel(), 2) * density.prod(1) * np.repeat([0.3, 0.7], 82**2)
    return logged(s, a[..., None], -np.square(s) - 0.5 * np.square(a), density, GAMMA), share


def two_step_value(noise: float) -> float:
    """Of the policy a = GAIN s plus noise of that standard deviation."""
    first = np.array([0.3, 0.7]) @ np.square([1.0, -0.5])
    second = (0.9 + 0.5 * GAIN) ** 2 * first + 0.25 * noise**2
    return float(-(1 + 0.5 * GAIN**2) * (first + GAMMA * second) - 0.5 * noise**2 * (1 + GAMMA))


@pytest.mark.parametrize("h", [0.6, 0.4])
def test_two_steps_of_a_linear_gaussian_world(h: float) -> None:
    """Smoothed at both steps, or Gaussian itself: every sequential estimator is exact, and tends to the value as h falls."""
    episodes, share = two_steps()
    assert share.sum() == pytest.approx(1.0, abs=1e-11)
    s, a, target = episodes.observation[:, 0], episodes.action[:, 0], GAIN * episodes.observation
    estimators = {
        "TIS": partial(tis, episodes),
        "PDIS": partial(pdis, episodes),
        "WIS": partial(wis, episodes),
        "WPDIS": partial(wpdis, episodes),
        "DR": partial(dr, episodes, q=2 * s - a, v=2 * s - target[:, 0]),
        "WDR": partial(wdr, episodes, q=2 * s - a, v=2 * s - target[:, 0]),
    }
    density = stats.norm.pdf(a, target[:, 0], h)
    assert kernel_density(episodes, target, np.array([h]), kernel="gaussian") == pytest.approx(density, abs=1e-12)
    for name, estimator in estimators.items():
        terms, _ = smoothed(episodes, target, estimator, np.array([[h]]), kernel="gaussian")
        assert terms.estimate(share) == pytest.approx(two_step_value(h), abs=EXACT), name
    error = [two_step_value(0.0) - two_step_value(x) for x in (h, h / 2)]
    assert error[0] == pytest.approx(4 * error[1]) and error[0] > 0.1


def test_a_logged_linear_gaussian_world_with_episodes_of_any_length() -> None:
    """Two axes, 3 steps at most, a fifth of the episodes end at each: simulated, so within four standard errors of the value."""
    world = point_mass(axes=2, horizon=3, gamma=0.9, survival=0.8)
    episodes = world.simulate(20_000, 0)
    assert set(episodes.length) == {1, 2, 3}
    state = episodes.observation[:, :-1]
    regulator = world.regulator(0.3 * np.eye(2))
    gain = 0.5 * (regulator.gain + world.behavior.gain)
    noisy = dataclasses.replace(regulator, gain=gain)
    certain = dataclasses.replace(regulator, gain=gain, covariance=np.zeros((2, 2)))
    q = world.q_values(certain, episodes.observation, episodes.action)
    v = world.state_values(certain, episodes.observation)
    ratio = density_ratios(episodes, noisy.density(state, episodes.action))
    smoothed_once, _ = smoothed(
        episodes, certain.mean(state), partial(dr, episodes, q=q, v=v), np.full((1, 2), 0.3), kernel="epanechnikov"
    )
    for terms, value in ((pdis(episodes, ratio), world.value(noisy)), (smoothed_once, world.value(certain))):
        error = terms.influence().std() / np.sqrt(episodes.n_episodes)
        assert error < 0.2 * abs(value)
        assert abs(terms.estimate() - value) < 4 * error


# Identities


def simulated(n: int, seed: int, dimensions: int = 1) -> Episodes:
    """The one-step world, each dimension of the action on its own, with actions as single precision."""
    rng = np.random.default_rng(seed)
    s = rng.normal(0.5, 1.0, (n, 1))
    a = (0.8 * s + rng.normal(size=(n, dimensions))).astype(np.float32)
    density = stats.norm.pdf(a.astype(float), 0.8 * s, 1.0).prod(1, keepdims=True)
    return logged(s, a[:, None, :], reward_of(s, a.astype(float)).sum(1, keepdims=True), density)


def test_on_policy_the_estimates_are_the_mean_return() -> None:
    episodes = simulated(50, 0)
    ratio = density_ratios(episodes, episodes.action_prob.copy())
    zero = np.zeros(50)
    for terms in (tis(episodes, ratio), wis(episodes, ratio), dr(episodes, ratio, zero, zero)):
        assert terms.estimate() == pytest.approx(episodes.reward.mean(), abs=EXACT)


@given(st.integers(0, 1000), st.floats(0.1, 50.0), st.sampled_from(KERNELS))
def test_estimates_scale_with_rewards_and_the_order_of_rows_never_matters(
    seed: int, scale: float, kernel: Kernel
) -> None:
    episodes, order = simulated(300, seed), np.random.default_rng(seed).permutation(300)
    per_row = ("observation", "action", "reward", "action_prob")
    shuffled = dataclasses.replace(episodes, **{name: getattr(episodes, name)[order] for name in per_row})
    scaled = dataclasses.replace(episodes, reward=scale * episodes.reward)

    def both(log: Episodes) -> list[tuple[float, float]]:
        grid = bandwidth_grid(log, 4)
        found = [smoothed(log, at_target(log), partial(e, log), grid, kernel=kernel) for e in (tis, wis)]
        return [(terms.estimate(), float(h[0])) for terms, h in found]

    before = both(episodes)
    for (value, h), (same, same_h), (times, times_h) in zip(before, both(shuffled), both(scaled), strict=True):
        assert (same, times) == pytest.approx((value, scale * value), rel=1e-9)
        assert (same_h, times_h) == pytest.approx((h, h))
