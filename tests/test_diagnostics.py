"""Diagnostics: known answers, the fit of tails against others, balance by enumeration, confounding against every vertex."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.diagnostics import (
    balance_z,
    clip_sensitivity,
    confounded_bounds,
    effective_sample_size,
    effective_sample_size_by_group,
    effective_sample_size_by_step,
    gamma_star,
    generalized_pareto_shape,
    imbalance,
    largest_gap,
    largest_share,
    pareto_k,
    pareto_k_limit,
    without_most_influential,
    worst_action_z,
)
from offrl_models.ope.importance import Terms, pdis, trajectory_weights, wis
from offrl_models.ope.intervals import Interval
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_world
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


# Balance


def occupancy(world: World, policy: np.ndarray) -> np.ndarray:
    """Expected discounted visits of every state before the end."""
    live = ~world.terminal
    onward = np.einsum("sa,sat->st", policy, world.transition) * live
    return np.linalg.solve(np.eye(world.n_states) - world.gamma * onward.T, world.initial)


def state_ratio(world: World, policy: np.ndarray) -> np.ndarray:
    seen = occupancy(world, world.behavior)
    return np.where(seen > 0, occupancy(world, policy) / np.where(seen > 0, seen, 1.0), 1.0)


def state_features(world: World, episodes: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    each = np.eye(world.n_states)
    now, following = each[states(episodes)], each[episodes.next_observation[:, 0].astype(int)]
    return now[episodes.offsets[:-1]], now, following


WORLDS = [random_world(2, 2, 3, 0.9, seed=1), random_world(3, 2, 2, 0.5, 3, masked=True)]


@pytest.mark.parametrize("world", WORLDS)
def test_exact_weights_are_balanced_over_every_trajectory(world: World) -> None:
    """By state, and by state and action; the behavior's own weights and stale ratios are not."""
    episodes, probability = world.enumerate(3)
    policy = some_policy(world)
    ratio, omega = ratio_of(world, policy, episodes), state_ratio(world, policy)[states(episodes)]
    features = state_features(world, episodes)
    assert probability @ imbalance(episodes, omega * ratio, *features) == pytest.approx(0.0, abs=1e-9)
    assert np.abs(probability @ imbalance(episodes, ratio, *features)).max() > 0.01
    assert np.abs(probability @ imbalance(episodes, omega, *features)).max() > 0.01
    assert probability @ imbalance(episodes, np.ones(episodes.n_rows), *features) == pytest.approx(0.0, abs=1e-9)
    pairs = np.eye(world.n_states * world.n_actions)
    policy_pairs = np.zeros((world.n_states, len(pairs)))
    for s, a in itertools.product(range(world.n_states), range(world.n_actions)):
        policy_pairs[s, s * world.n_actions + a] = policy[s, a]
    here, following = states(episodes), episodes.next_observation[:, 0].astype(int)
    q_features = policy_pairs[here[episodes.offsets[:-1]]], pairs[here * world.n_actions + episodes.action]
    left = imbalance(episodes, omega * ratio, *q_features, policy_pairs[following])
    assert probability @ left == pytest.approx(0.0, abs=1e-9)


def test_balance_scores_find_wrong_weights_in_a_sample(tiny: World) -> None:
    episodes = tiny.simulate(4000, 0)
    policy = some_policy(tiny)
    ratio, omega = ratio_of(tiny, policy, episodes), state_ratio(tiny, policy)[states(episodes)]
    features = state_features(tiny, episodes)
    live = ~tiny.terminal
    right = balance_z(imbalance(episodes, omega * ratio, *features))[live]
    wrong = balance_z(imbalance(episodes, np.sqrt(omega) * ratio, *features))[live]
    assert np.abs(right).max() < 4 < np.abs(wrong).max()


def test_balance_knows_what_a_recording_that_stopped_would_have_reached(tiny: World) -> None:
    """Every episode cut after one step: weights of visits over recorded rows carry on into the next state."""
    whole, probability = tiny.enumerate(3)
    first = whole.offsets[:-1]
    names = ("observation", "action", "mask", "reward", "action_prob")
    cut = dataclasses.replace(
        whole,
        final_observation=whole.next_observation[first],
        **{name: getattr(whole, name)[first] for name in names},
        offsets=np.arange(whole.n_episodes + 1),
        terminated=whole.terminated[first],
        truncated=~whole.terminated[first],
    )
    policy = some_policy(tiny)
    rows = np.bincount(states(cut), probability, tiny.n_states)
    recorded = np.where(rows > 0, occupancy(tiny, policy) / np.where(rows > 0, rows, 1.0), 0.0)
    weight = recorded[states(cut)] * ratio_of(tiny, policy, cut)
    left = probability @ imbalance(cut, weight, *state_features(tiny, cut))
    started = tiny.initial > 0
    first_layer = left[started]
    assert first_layer == pytest.approx(0.0, abs=1e-9)
    assert left[~started & ~tiny.terminal].max() > 0.01  # later states were never recorded: nothing leaves them


# Hidden confounding


@given(st.integers(0, 10_000), st.floats(1.0, 20.0))
def test_the_bounds_are_those_of_every_vertex_of_the_box(seed: int, odds_ratio: float) -> None:
    """A ratio of linear functions is extreme at a vertex: all 2^7 combinations of least and greatest weights."""
    rng = np.random.default_rng(seed)
    probs = rng.uniform(0.05, 1.0, size=7)
    policy = rng.uniform(0.05, 1.0, size=7)
    episodes = bandit(rng.normal(size=7).tolist(), probs.tolist())
    low, high = (policy * (1 + (1 / probs - 1) * factor) for factor in (1 / odds_ratio, odds_ratio))
    weight = np.where(np.array(list(itertools.product((False, True), repeat=7))), low, high)
    means = weight @ episodes.reward / weight.sum(1)
    found = confounded_bounds(episodes, policy / probs, odds_ratio)
    assert found == pytest.approx((means.min(), means.max()), abs=1e-9)


def test_the_odds_are_within_the_factor_at_the_ends() -> None:
    """The propensity that gives the end of a weight has odds exactly Gamma times less, or more, than the logged one."""
    mu, odds_ratio = 0.2, 3.0
    for factor, odds in ((odds_ratio, 0.25 / 3), (1 / odds_ratio, 0.25 * 3)):
        hidden = 1 / (1 + (1 / mu - 1) * factor)
        assert hidden / (1 - hidden) == pytest.approx(odds)


@pytest.mark.parametrize("world", WORLDS)
def test_over_several_steps_weights_range_between_the_products_of_the_ends(world: World) -> None:
    episodes = world.simulate(8, 3)
    ratio = ratio_of(world, some_policy(world), episodes)
    pi = ratio * episodes.action_prob
    low, high = (np.multiply.reduceat(pi + (ratio - pi) * factor, episodes.offsets[:-1]) for factor in (0.5, 2.0))
    weight = np.where(np.array(list(itertools.product((False, True), repeat=8))), low, high)
    means = weight @ episodes.return_ / weight.sum(1)
    assert confounded_bounds(episodes, ratio, 2.0) == pytest.approx((means.min(), means.max()), abs=1e-9)


def test_without_confounding_the_bounds_are_the_estimate_and_they_widen(tiny: World) -> None:
    episodes = tiny.simulate(300, 0)
    ratio = ratio_of(tiny, some_policy(tiny), episodes)
    estimate = wis(episodes, ratio).estimate()
    found = np.array([confounded_bounds(episodes, ratio, odds) for odds in (1.0, 1.1, 1.5, 3.0, 1e4)])
    assert found[0] == pytest.approx((estimate, estimate), abs=1e-9)
    assert (np.diff(found[:, 0]) < 0).all() and (np.diff(found[:, 1]) > 0).all()
    assert found[-1, 0] >= episodes.return_.min() and found[-1, 1] <= episodes.return_.max()


def test_gamma_star_by_hand() -> None:
    """Propensities 1/2, returns 0 and 1, ratios 1: the least mean is 1 / (1 + Gamma), the greatest Gamma / (1 + Gamma)."""
    episodes = bandit([0.0, 1.0], [0.5, 0.5])
    assert gamma_star(episodes, np.ones(2), 0.25) == pytest.approx(3.0)
    assert gamma_star(episodes, np.ones(2), 0.9) == pytest.approx(9.0)
    assert gamma_star(episodes, np.ones(2), 0.5) == pytest.approx(1.0)
    assert gamma_star(episodes, np.ones(2), -0.1) == math.inf


@pytest.mark.parametrize("side", [-0.05, 0.05])
def test_at_gamma_star_the_bound_is_the_champions_value(tiny: World, side: float) -> None:
    episodes = tiny.simulate(400, 0)
    ratio = ratio_of(tiny, some_policy(tiny), episodes)
    champion = wis(episodes, ratio).estimate() + side
    found = gamma_star(episodes, ratio, champion)
    assert found > 1.0
    assert confounded_bounds(episodes, ratio, found)[0 if side < 0 else 1] == pytest.approx(champion, abs=1e-8)
    assert gamma_star(episodes, ratio, champion + side) > found


def test_a_confounder_of_known_strength_is_within_the_bounds() -> None:
    """A hidden trait doubles or halves the odds of the better action and moves the reward: WIS is wrong, its bounds are not."""
    rng = np.random.default_rng(0)
    n, odds_ratio = 40_000, 2.0
    trait = rng.random(n) < 0.5
    prob = np.where(trait, 2 / 3, 1 / 3)  # odds 2 and 1/2
    action = (rng.random(n) < prob).astype(np.int64)
    reward = 1.0 * trait + 0.1 * action  # whoever gets action 1 would have fared better anyway
    logged = np.full(n, 0.5)  # what the log knows: the average over the trait
    episodes = dataclasses.replace(bandit(reward.tolist(), logged.tolist()), action=action)
    ratio = np.where(action == 1, 1.0, 0.0) / 0.5  # always action 1: worth 0.6
    low, high = confounded_bounds(episodes, ratio, odds_ratio)
    assert wis(episodes, ratio).estimate() == pytest.approx(0.1 + 2 / 3, abs=0.02)
    assert low == pytest.approx(0.1 + 0.5, abs=0.02) and high > 0.75  # the truth is the very end of the range
    assert confounded_bounds(episodes, ratio, 1.5)[0] > 0.62


def test_what_has_no_odds_is_an_error() -> None:
    episodes = bandit([0.0, 1.0], [0.5, 0.5])
    with pytest.raises(InputError, match="does not overlap"):
        confounded_bounds(episodes, np.zeros(2), 2.0)
    with pytest.raises(InputError, match="NaN or infinite"):
        confounded_bounds(dataclasses.replace(episodes, action_prob=np.array([0.5, np.nan])), np.ones(2), 2.0)
    continuous = dataclasses.replace(episodes, action=np.zeros((2, 1)), mask=np.ones((2, 0), bool))
    with pytest.raises(InputError, match="continuous"):
        confounded_bounds(continuous, np.ones(2), 2.0)


def test_weights_of_zero_stay_zero_and_long_products_do_not_overflow() -> None:
    episodes = bandit([5.0, 0.0, 1.0], [0.5] * 3)
    found = confounded_bounds(episodes, np.array([0.0, 1.0, 1.0]), 3.0)
    assert found == pytest.approx((0.25, 0.75))
    long = dataclasses.replace(
        bandit([0.0] * 399 + [1.0] + [0.0] * 400, [0.01] * 800),
        episode_id=np.arange(2),
        offsets=np.array([0, 400, 800]),
        final_observation=np.zeros((2, 1), np.float32),
        terminated=np.arange(800) % 400 == 399,
    )
    assert confounded_bounds(long, np.full(800, 50.0), 1.0) == pytest.approx((0.5, 0.5))
