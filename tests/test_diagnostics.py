"""Diagnostics: known answers, the test of each action, and the fit of tails against others."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from offrl_models.ope.diagnostics import (
    clip_sensitivity,
    effective_sample_size,
    effective_sample_size_by_group,
    effective_sample_size_by_step,
    generalized_pareto_shape,
    largest_gap,
    largest_share,
    pareto_k,
    pareto_k_limit,
    without_most_influential,
    worst_action_z,
)
from offrl_models.ope.importance import Terms, pdis, trajectory_weights
from offrl_models.ope.intervals import Interval
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World
from offrl_models.schema import Episodes, InputError


def states(episodes: Episodes) -> np.ndarray:
    return episodes.observation[:, 0].astype(int)


def some_policy(world: World, seed: int = 5) -> np.ndarray:
    weights = np.random.default_rng(seed).dirichlet(np.ones(world.n_actions), size=world.n_states) * world.mask
    return weights / weights.sum(1, keepdims=True)


def ratio_of(world: World, policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states(episodes)])


def bandit(rewards: list[float], probs: list[float]) -> Episodes:
    """One step per episode, with these logged propensities of the action that was taken."""
    n = len(rewards)
    return Episodes(
        episode_id=np.arange(n),
        offsets=np.arange(n + 1),
        observation=np.zeros((n, 1), np.float32),
        final_observation=np.zeros((n, 1), np.float32),
        action=np.zeros(n, np.int64),
        mask=np.ones((n, 2), bool),
        reward=np.array(rewards, float),
        terminated=np.ones(n, bool),
        truncated=np.zeros(n, bool),
        action_prob=np.array(probs, float),
        gamma=1.0,
    )


# The mean-ratio test of each action


def rare_action(times: int, prob: float = 0.002, rows: int = 5000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions, the second one so many times, and ratios and probabilities of a policy that takes it 1.2 times as often."""
    log = bandit([0.0] * rows, [1 - prob] * rows)
    action = (np.arange(rows) < times).astype(np.int64)
    log = dataclasses.replace(log, action=action, action_prob=np.where(action == 1, prob, 1 - prob))
    probs = np.tile([1 - 1.2 * prob, 1.2 * prob], (rows, 1))
    return action, ratios(log, probs), probs


def test_an_action_seen_too_rarely_by_chance_is_no_broken_log() -> None:
    """10 are expected; 3 are as rare as 1 in 100, and 0 as 1 in 22,000. By the errors alone 3 have z = -4.05."""
    assert worst_action_z(*rare_action(10)) == pytest.approx(0.0, abs=1e-9)
    errors_alone = (3 - 10) / math.sqrt(3)
    assert worst_action_z(*rare_action(3)) == pytest.approx(-7 / math.sqrt(10), abs=0.05) != errors_alone
    assert -4 < worst_action_z(*rare_action(0)) < -3
    assert worst_action_z(*rare_action(22)) == pytest.approx((22 - 10) / math.sqrt(22), abs=0.05)


@pytest.mark.parametrize(("times", "prob"), [(700, 0.1), (330, 0.1), (60, 0.004)])
def test_a_wrong_propensity_of_one_action_is_seen(times: int, prob: float) -> None:
    assert abs(worst_action_z(*rare_action(times, prob))) > 4


def test_the_test_of_each_action_has_its_size() -> None:
    """Three actions of 4, 15 and 40 expected rows: with right propensities |z| hardly ever is above 3."""
    rng, rows, far = np.random.default_rng(0), 2000, 0
    mu = np.array([0.9705, 0.002, 0.0075, 0.02])
    pi = np.array([0.9558, 0.003, 0.01125, 0.03])
    pi /= pi.sum()
    for _ in range(1000):
        action = rng.choice(4, rows, p=mu)
        far += abs(worst_action_z(action, pi[action] / mu[action], np.tile(pi, (rows, 1)))) > 3
    assert far <= 20  # it was 114 by the errors alone


def test_shares_of_draws_vary_by_themselves() -> None:
    """The second action has errors of sum 1 and of variance 1; shares of 2 draws add (1 * 2 + 1) / 4 to it."""
    action, ratio, probs = np.array([0, 0, 1, 1]), np.array([2.0, 2.0, 1.0, 1.0]), np.tile([0.75, 0.25], (4, 1))
    assert worst_action_z(action, ratio, probs) == pytest.approx(1.0)
    assert worst_action_z(action, ratio, probs, draws=2) == pytest.approx(1 / np.sqrt(1.75))


# Effective sample sizes, shares, clips, agreement


def test_effective_sample_size_by_step_by_hand(tiny: World) -> None:
    """Two episodes of two steps: weights (1, 1), then (1, 3): 2 effective ones, then 16 / 10."""
    episodes = dataclasses.replace(
        bandit([0.0] * 4, [0.5] * 4),
        episode_id=np.arange(2),
        offsets=np.array([0, 2, 4]),
        final_observation=np.zeros((2, 1), np.float32),
        terminated=np.array([False, True, False, True]),
    )
    found = effective_sample_size_by_step(episodes, np.array([1.0, 1.0, 1.0, 3.0]))
    assert found == pytest.approx([2.0, 1.6])
    longer = tiny.simulate(200, 0)
    ratio = ratio_of(tiny, some_policy(tiny), longer)
    assert effective_sample_size_by_step(longer, ratio)[-1] == pytest.approx(
        effective_sample_size(trajectory_weights(longer, ratio))
    )


def test_effective_sample_size_of_each_group() -> None:
    weight, label = np.array([1.0, 1.0, 2.0, 0.0, 5.0]), np.array(["a", "a", "b", "b", "c"])
    assert effective_sample_size_by_group(weight, label) == pytest.approx({"a": 2.0, "b": 1.0, "c": 1.0})
    assert effective_sample_size_by_group(weight, label == "a") == pytest.approx({"True": 2.0, "False": 49 / 29})


def test_the_largest_share_is_of_sizes() -> None:
    assert largest_share(np.array([1.0, -3.0, 2.0])) == pytest.approx(0.5)
    assert largest_share(np.full(8, -0.3)) == pytest.approx(1 / 8)
    assert largest_share(np.zeros(3)) == 0.0
    with pytest.raises(InputError, match="NaN"):
        largest_share(np.array([1.0, np.nan]))


def test_clips_go_from_nothing_to_the_estimate_itself(tiny: World) -> None:
    episodes = tiny.simulate(100, 0)
    ratio = ratio_of(tiny, some_policy(tiny), episodes)
    found = clip_sensitivity(lambda r: pdis(episodes, r), ratio, [0.0, 1.0, np.inf])
    assert found[0] == 0.0
    assert found[1] == pytest.approx(pdis(episodes, np.minimum(ratio, 1.0)).estimate())
    assert found[2] == pytest.approx(pdis(episodes, ratio).estimate())
    weight, returns = np.array([1.0, 5.0]), np.array([1.0, 3.0])
    of_episodes = clip_sensitivity(lambda w: Terms((w * returns)[:, None]), weight, [2.0, 4.0, 6.0])
    assert of_episodes == pytest.approx([3.5, 6.5, 8.0])


def test_the_largest_gap_by_hand() -> None:
    """Standard errors 1, 2 and 1 from intervals of other levels: gaps of 3 / sqrt 5, 4 / sqrt 2 and 1 / sqrt 5."""
    z95, z80 = 1.959964, 1.281552
    found = largest_gap(
        {
            "A": Interval(0.0, -z95, z95, 0.95, ""),
            "B": Interval(3.0, 3.0 - 2 * z80, 3.0 + 2 * z80, 0.8, ""),
            "C": Interval(4.0, 4.0 - z95, 4.0 + z95, 0.95, ""),
        }
    )
    assert (found.first, found.second) == ("A", "C")
    assert found.standardized == pytest.approx(4 / np.sqrt(2), rel=1e-5)


def test_gaps_at_the_edges() -> None:
    point, other, none = (Interval(x, x, x, 0.95, "") for x in (1.0, 2.0, math.nan))
    assert largest_gap({"a": point, "b": point}).standardized == 0.0
    assert largest_gap({"a": point, "b": other}).standardized == math.inf
    assert math.isnan(largest_gap({"a": point, "b": other, "c": none}).standardized)
    with pytest.raises(InputError, match="at least 2"):
        largest_gap({"a": point})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_most_influential_are_those_that_pull_most_in_the_direction_of_the_difference(sign: float) -> None:
    """A self-normalised estimate less a mean: influences w (x - estimate) / mean(w) less deviations, 5 of 1,000 left out."""
    rng = np.random.default_rng(0)
    weight, value, base = rng.exponential(size=1000), rng.normal(size=1000) + sign, 2.0 * rng.normal(size=1000)
    estimate = (weight * value).sum() / weight.sum()
    pull = sign * (weight * (value - estimate) / weight.mean() - (base - base.mean()))
    kept = pull.argsort()[:995]
    expected = (weight * value)[kept].sum() / weight[kept].sum() - base[kept].mean()
    minuend, subtrahend = Terms((weight * value)[:, None], weight[:, None]), Terms(base[:, None])
    assert without_most_influential(minuend, subtrahend) == pytest.approx(expected, abs=1e-12)
    assert abs(expected) < abs(estimate - base.mean()) - 0.02


def test_at_least_one_episode_is_left_out_and_one_is_left() -> None:
    one, nothing = Terms(np.array([[1.0], [2.0], [6.0]])), Terms(np.zeros((3, 1)))
    assert without_most_influential(one, nothing) == pytest.approx(1.5)
    assert without_most_influential(nothing, one, share=0.4) == pytest.approx(-1.0)
    assert math.isnan(without_most_influential(one, nothing, share=0.9))


# Tails


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e160])
def test_the_effective_sample_size_has_no_units(scale: float) -> None:
    assert effective_sample_size(np.full(7, scale)) == pytest.approx(7.0)
    assert effective_sample_size(scale * np.array([1.0, 2.0, 0.0])) == pytest.approx(9 / 5)


def test_beside_infinite_weights_others_are_nothing_and_nan_is_refused() -> None:
    assert effective_sample_size(np.array([np.inf, 1.0, np.inf])) == 2.0
    for weight in (np.array([1.0, np.nan]), np.array([np.inf, np.nan])):
        with pytest.raises(InputError, match="the weight holds 1 values that are NaN"):
            effective_sample_size(weight)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_the_tail_of_pareto_weights_has_their_shape(shape: float) -> None:
    """Quantiles of a Pareto distribution instead of a sample. Its excess over any limit is generalized Pareto."""
    u = (np.arange(20_000) + 0.5) / 20_000
    found = pareto_k(u**-shape)
    assert found == pytest.approx(shape, abs=0.05)
    assert pareto_k(1e6 * u**-shape) == pytest.approx(found, abs=1e-9)
    assert pareto_k(np.random.default_rng(0).permutation(u**-shape)) == pytest.approx(found, abs=1e-9)


def test_the_tail_of_bounded_weights_is_lighter_than_an_exponential() -> None:
    u = (np.arange(5000) + 0.5) / 5000
    assert pareto_k(u) < -0.5
    assert abs(pareto_k(-np.log(u))) < 0.1


def test_the_fit_agrees_with_maximum_likelihood() -> None:
    for seed, shape in enumerate((-0.3, 0.1, 0.4, 0.9)):
        excess = np.sort(stats.genpareto.rvs(shape, scale=3.0, size=3000, random_state=seed))
        likeliest = stats.genpareto.fit(excess, shape, floc=0.0, scale=3.0)[0]
        assert generalized_pareto_shape(excess) == pytest.approx(likeliest, abs=0.02)


def test_the_fit_is_the_one_of_zhang_and_stephens() -> None:
    """Written out point by point as in the paper (their k is minus the shape), with 30 instead of 20 points at least."""
    x = np.sort(stats.genpareto.rvs(0.5, size=47, random_state=3))
    m, prior = 30 + int(47**0.5), 3.0
    quartile = x[int(47 / 4 + 0.5) - 1]
    theta = [1 / x[-1] + (1 - (m / (j - 0.5)) ** 0.5) / prior / quartile for j in range(1, m + 1)]

    def profile(b: float) -> float:
        k = -sum(math.log(1 - b * v) for v in x) / 47
        return 47 * (math.log(b / k) + k - 1)

    logs = [profile(b) for b in theta]
    weight = [1 / sum(math.exp(other - own) for other in logs) for own in logs]
    best = sum(w * b for w, b in zip(weight, theta, strict=True))
    expected = sum(math.log(1 - best * v) for v in x) / 47
    assert generalized_pareto_shape(x) == pytest.approx(expected, abs=1e-9)


def test_few_values_are_drawn_towards_one_half() -> None:
    """25 weights have a tail of 5: ten further ones at 0.5 count twice as much as the fit."""
    weight = np.concatenate([np.ones(20), 1.0 + np.array([1.0, 1.1, 1.2, 1.3, 1.4])])
    fit = generalized_pareto_shape(np.array([1.0, 1.1, 1.2, 1.3, 1.4]))
    assert pareto_k(weight) == pytest.approx((5 * fit + 10 * 0.5) / 15)


@pytest.mark.parametrize(("n", "tail"), [(100, 20), (10_000, 300)])
def test_the_tail_is_a_fifth_or_three_square_roots(n: int, tail: int) -> None:
    """Weights below the tail and its lower end may be anything; the lower end itself may not."""
    weight = np.sort(np.random.default_rng(0).pareto(1.5, size=n))
    below, end = weight.copy(), weight.copy()
    below[: -tail - 1] = 0.0
    end[:-tail] = 0.0
    assert pareto_k(below) == pytest.approx(pareto_k(weight), abs=1e-12)
    assert pareto_k(end) != pytest.approx(pareto_k(weight), abs=1e-3)


def test_tails_that_cannot_be_fitted() -> None:
    assert pareto_k(np.ones(1000)) == -math.inf
    assert pareto_k(1.0 + 1e-15 * np.arange(1000)) == -math.inf
    assert pareto_k(np.append(np.zeros(997), [1.0, 2.0, 3.0])) == math.inf
    assert pareto_k(np.zeros(10)) == -math.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        pareto_k(np.array([1.0, np.inf]))
    assert (pareto_k_limit(100), pareto_k_limit(100_000)) == pytest.approx((0.5, 0.7))
    assert pareto_k_limit(1) == -math.inf
