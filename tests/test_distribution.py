"""The distribution of the return against the sum over every trajectory, and what is read from it."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.distribution import (
    Functional,
    ReturnCDF,
    band,
    band_interval,
    bootstrap_functional,
    cvar,
    dr_cdf,
    mean,
    quantile,
    tis_cdf,
    variance,
    wis_cdf,
)
from offrl_models.ope.importance import tis, trajectory_weights, wis
from offrl_models.ope.intervals import bootstrap
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError

EXACT = 1e-9
LOW, HIGH = -50.0, 50.0
FUNCTIONALS: dict[str, Functional] = {
    "mean": mean,
    "variance": variance,
    "median": partial(quantile, level=0.5),
    "lower decile": partial(quantile, level=0.1),
    "CVaR 0.2": partial(cvar, tail=0.2),
}


def states(episodes: Episodes) -> np.ndarray:
    return episodes.observation[:, 0].astype(int)


def ratio_of(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states(episodes)])


def under(world: World, policy: np.ndarray, longest: int = 3) -> np.ndarray:
    """The probability of every trajectory under another policy, in the order of `enumerate`."""
    return dataclasses.replace(world, behavior=policy).enumerate(longest)[1]


def exact_cdf(returns: np.ndarray, probability: np.ndarray, points: np.ndarray) -> np.ndarray:
    return (returns[:, None] <= points).T @ probability


def read(cdf: ReturnCDF, functional: Functional, share: np.ndarray | None = None) -> float:
    return float(functional(cdf.points, cdf.estimate(share)[None, :])[0])


def one_step(reward: list[float], ratio: list[float]) -> tuple[Episodes, np.ndarray]:
    """A bandit log with these rewards, and these ratios."""
    n = len(reward)
    episodes = Episodes(
        episode_id=np.arange(n),
        offsets=np.arange(n + 1),
        observation=np.zeros((n, 1), np.float32),
        final_observation=np.zeros((n, 1), np.float32),
        action=np.zeros(n, int),
        mask=np.ones((n, 2), bool),
        reward=np.array(reward, np.float64),
        terminated=np.ones(n, bool),
        truncated=np.zeros(n, bool),
        action_prob=np.full(n, 0.5),
        gamma=0.9,
    )
    return episodes, np.array(ratio, np.float64)


WORLDS = [
    random_world(2, 2, 3, 0.9, seed=1),
    random_world(2, 3, 2, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, 3, masked=True),
]


@pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
@pytest.mark.parametrize("estimator", [tis_cdf, wis_cdf])
def test_the_sum_over_every_trajectory_is_the_exact_distribution(world: World, estimator) -> None:
    episodes, share = world.enumerate(3)
    policy = random_policy(world, 5)
    p, returns = under(world, policy), episodes.return_
    found = estimator(episodes, ratio_of(policy, episodes), low=LOW, high=HIGH)
    assert found.estimate(share) == pytest.approx(exact_cdf(returns, p, found.points), abs=EXACT)
    assert read(found, mean, share) == pytest.approx(world.value(policy), abs=EXACT)
    assert read(found, variance, share) == pytest.approx(p @ np.square(returns - p @ returns), abs=EXACT)
    order = np.argsort(returns)
    worst, room = 0.0, 0.3
    for r, q in zip(returns[order], p[order], strict=True):  # mass of the worst returns until 0.3 is full
        worst, room = worst + r * min(q, room), room - min(q, room)
    assert read(found, partial(cvar, tail=0.3), share) == pytest.approx(worst / 0.3, abs=EXACT)
    third = returns[order][p[order].cumsum().searchsorted(0.3)]
    assert read(found, partial(quantile, level=0.3), share) == pytest.approx(third, abs=EXACT)


def table_model(world: World, policy: np.ndarray, episodes: Episodes, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A model of the CDF that is wrong: q of any table of state and action, v its mean under the policy."""
    table = np.sort(np.random.default_rng(0).random((world.n_states, world.n_actions, points)), axis=2)
    v = np.einsum("sa,sap->sp", policy, table)
    return table[states(episodes), episodes.action], v[states(episodes)]


@pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
def test_a_wrong_model_is_corrected_over_every_trajectory(world: World) -> None:
    episodes, share = world.enumerate(3)
    policy = random_policy(world, 5)
    points = np.linspace(episodes.return_.min() - 0.1, episodes.return_.max() + 0.1, 17)
    q, v = table_model(world, policy, episodes, 17)
    ratio = ratio_of(policy, episodes)
    exact = exact_cdf(episodes.return_, under(world, policy), points)
    assert dr_cdf(episodes, ratio, q, v, points).estimate(share) == pytest.approx(exact, abs=EXACT)
    _, wrong = table_model(world, world.behavior, episodes, 17)
    assert dr_cdf(episodes, ratio, q, wrong, points).estimate(share) != pytest.approx(exact, abs=1e-3)


def true_model(episodes: Episodes, p: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(return <= x) given everything up to the action of a row, and given everything before it; by enumeration."""
    q, v = np.zeros((episodes.n_rows, len(points))), np.zeros((episodes.n_rows, len(points)))
    below = episodes.return_[:, None] <= points
    histories = [
        [(int(s), int(a)) for s, a in zip(states(episodes)[i:j], episodes.action[i:j], strict=True)]
        for i, j in zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True)
    ]
    for row in range(episodes.n_rows):
        t, path = int(episodes.step[row]), histories[episodes.episode_of_row[row]]
        same = np.array([h[:t] == path[:t] and len(h) > t and h[t][0] == path[t][0] for h in histories])
        both = same & np.array([len(h) > t and h[t] == path[t] for h in histories])
        q[row], v[row] = p[both] @ below[both] / p[both].sum(), p[same] @ below[same] / p[same].sum()
    return q, v


def test_the_true_model_has_no_variance_where_the_world_is_deterministic() -> None:
    """Every single episode then gives the exact CDF, whatever its weight."""
    world = random_world(2, 2, 3, 0.9, seed=4)
    deterministic = (world.transition == world.transition.max(2, keepdims=True)).astype(float)
    world = dataclasses.replace(world, transition=deterministic, initial=np.eye(world.n_states)[0])
    policy = random_policy(world, 8)
    episodes, _ = world.enumerate(3)
    p = under(world, policy)
    points = np.unique(episodes.return_)
    q, v = true_model(episodes, p, points)
    found = dr_cdf(episodes, ratio_of(policy, episodes), q, v, points)
    alone = found.resampled(np.eye(episodes.n_episodes))
    exact = exact_cdf(episodes.return_, p, points)
    assert np.abs(alone - exact).max() < EXACT
    assert found.weight.std() > 0.1


def test_without_a_model_dr_is_tis() -> None:
    world = WORLDS[0]
    episodes = world.simulate(60, 0)
    ratio = ratio_of(random_policy(world, 3), episodes)
    plain = tis_cdf(episodes, ratio, low=LOW, high=HIGH)
    none = np.zeros((episodes.n_rows, len(plain.points)))
    shares = bootstrap_shares(60, 10, 0)
    assert dr_cdf(episodes, ratio, none, none, plain.points).resampled(shares) == pytest.approx(plain.resampled(shares))


def test_dr_at_horizon_one_by_hand() -> None:
    """Rewards 0 and 1 with ratios 0.5 and 1.2; q(0) is 0.4 and 0.1, v(0) 0.3: mean of 0.5 * 0.6 + 0.3 and 1.2 * -0.1 + 0.3."""
    episodes, ratio = one_step([0.0, 1.0], [0.5, 1.2])
    q, v = np.array([[0.4, 1.0], [0.1, 1.0]]), np.array([[0.3, 1.0]] * 2)
    found = dr_cdf(episodes, ratio, q, v, np.array([0.0, 1.0])).estimate()
    assert found == pytest.approx(np.array([(0.6 + 0.18) / 2, 1.0]), abs=1e-12)


@given(st.integers(0, 10_000))
def test_on_policy_it_is_the_empirical_distribution(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes = world.simulate(25, seed)
    returns, one = episodes.return_, np.ones(episodes.n_rows)
    for found in (tis_cdf(episodes, one, low=LOW, high=HIGH), wis_cdf(episodes, one, low=LOW, high=HIGH)):
        assert found.estimate() == pytest.approx((returns[:, None] <= found.points).mean(0), abs=EXACT)
        assert read(found, mean) == pytest.approx(returns.mean(), abs=EXACT)
        assert read(found, partial(cvar, tail=1.0)) == pytest.approx(returns.mean(), abs=EXACT)
        assert read(found, variance) == pytest.approx(returns.var(), abs=EXACT)
        for level in (0.04, 0.1, 0.5, 0.9, 1.0):
            expected = np.quantile(returns, level, method="inverted_cdf")
            assert read(found, partial(quantile, level=level)) == pytest.approx(expected, abs=EXACT)
        assert read(found, partial(cvar, tail=0.2)) == pytest.approx(np.sort(returns)[:5].mean(), abs=EXACT)


@given(st.integers(0, 10_000))
def test_its_mean_is_the_estimate_of_the_value_in_every_resample(seed: int) -> None:
    """Exactly WIS; TIS apart from the mass that the weights leave missing, which lies at the top of the range."""
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes, shares = world.simulate(30, seed), bootstrap_shares(30, 8, seed)
    ratio = ratio_of(random_policy(world, seed + 1), episodes)
    found = wis_cdf(episodes, ratio, low=LOW, high=HIGH)
    assert mean(found.points, found.resampled(shares)) == pytest.approx(wis(episodes, ratio).resampled(shares))
    plain, weight = tis_cdf(episodes, ratio, low=LOW, high=HIGH), trajectory_weights(episodes, ratio)
    short = shares @ weight <= 1  # otherwise the CDF is clipped
    missing = (1 - shares @ weight) * HIGH
    expected = tis(episodes, ratio).resampled(shares) + missing
    assert mean(plain.points, plain.resampled(shares))[short] == pytest.approx(expected[short])


def test_weights_by_hand() -> None:
    """Returns 1, 2, 3 with weights 0.6, 0, 1.2: TIS gives 0.2, 0.2, 0.6 and 0.4 at the top, WIS 1/3, 1/3, 1."""
    episodes, ratio = one_step([1.0, 2.0, 3.0], [0.6, 0.0, 1.2])
    found = tis_cdf(episodes, ratio, low=0.0, high=4.0)
    assert found.points.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found.estimate() == pytest.approx(np.array([0.0, 0.2, 0.2, 0.6, 1.0]), abs=1e-12)
    assert read(found, mean) == pytest.approx(0.2 + 0.4 * 3 + 0.4 * 4)
    assert read(found, partial(cvar, tail=0.5)) == pytest.approx((0.2 * 1 + 0.3 * 3) / 0.5)
    assert read(found, partial(quantile, level=0.2)) == 1.0
    assert read(found, partial(quantile, level=0.21)) == 3.0
    from_one = tis_cdf(episodes, ratio, low=1.0, high=4.0)  # a return at the very bottom of the range has its mass
    for functional in FUNCTIONALS.values():
        assert read(from_one, functional) == pytest.approx(read(found, functional), abs=1e-12)
    below_zero = wis_cdf(*one_step([-3.0, 1.0], [1.0, 1.0]), low=-3.0, high=1.0)
    assert read(below_zero, mean) == pytest.approx(-1.0)
    normalized = wis_cdf(episodes, ratio, low=0.0, high=4.0)
    assert normalized.estimate() == pytest.approx(np.array([0.0, 1 / 3, 1 / 3, 1.0, 1.0]), abs=1e-12)
    assert read(normalized, variance) == pytest.approx(2 / 9 * 4)
    heavy = tis_cdf(episodes, 2 * ratio, low=0.0, high=4.0)
    assert heavy.estimate() == pytest.approx(np.array([0.0, 0.4, 0.4, 1.0, 1.0]), abs=1e-12)


@given(st.integers(0, 10_000))
def test_a_cdf_is_monotone_and_between_0_and_1_by_construction(seed: int) -> None:
    """However wild the weights and however wrong the model."""
    rng = np.random.default_rng(seed)
    episodes, ratio = one_step(list(rng.normal(size=12)), list(rng.exponential(size=12) * rng.choice([0.1, 1, 9], 12)))
    points = np.array([-1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    shares = bootstrap_shares(12, 20, seed)
    model = dr_cdf(episodes, ratio, rng.random((12, 6)), rng.random((12, 6)), points)
    for found in (tis_cdf(episodes, ratio, low=LOW, high=HIGH), wis_cdf(episodes, ratio, low=LOW, high=HIGH), model):
        cdf = found.resampled(shares)
        assert (np.diff(cdf, axis=1) >= 0).all() and cdf.min() >= 0 and (cdf[:, -1] == 1).all() and cdf.max() == 1


def test_a_model_that_falls_is_raised_to_its_running_maximum() -> None:
    episodes, ratio = one_step([9.0], [1.0])
    zero, v = np.zeros((1, 4)), np.array([[0.2, 0.6, 0.4, 1.0]])
    found = dr_cdf(episodes, ratio, zero, v, np.array([0.0, 1.0, 2.0, 9.0])).estimate()
    assert found == pytest.approx(np.array([0.2, 0.6, 0.6, 1.0]))


@given(st.integers(0, 10_000), st.floats(0.1, 50.0))
def test_functionals_scale_with_rewards_and_the_order_of_episodes_never_matters(seed: int, scale: float) -> None:
    world = random_world(2, 2, 3, 0.9, seed=3)
    episodes, policy = world.simulate(15, seed), random_policy(world, 2)
    order = np.random.default_rng(seed).permutation(15)
    rows = np.concatenate([np.flatnonzero(episodes.episode_of_row == i) for i in order])
    names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    shuffled = dataclasses.replace(
        episodes,
        final_observation=episodes.final_observation[order],
        **{name: getattr(episodes, name)[rows] for name in names},
        offsets=np.append(0, episodes.length[order].cumsum()),
    )
    scaled = dataclasses.replace(episodes, reward=scale * episodes.reward)
    for estimator in (tis_cdf, wis_cdf):
        before, same = (estimator(e, ratio_of(policy, e), low=LOW, high=HIGH) for e in (episodes, shuffled))
        after = estimator(scaled, ratio_of(policy, scaled), low=scale * LOW, high=scale * HIGH)
        for name, functional in FUNCTIONALS.items():
            factor = scale**2 if name == "variance" else scale
            assert read(same, functional) == pytest.approx(read(before, functional), abs=1e-8), name
            assert read(after, functional) == pytest.approx(factor * read(before, functional), rel=1e-6), name


@given(st.integers(0, 10_000))
def test_cvar_rises_with_the_tail_from_the_lowest_return_to_the_mean(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes = world.simulate(20, seed)
    found = wis_cdf(episodes, ratio_of(random_policy(world, seed + 1), episodes), low=LOW, high=HIGH)
    values = [read(found, partial(cvar, tail=t)) for t in (1e-6, 0.05, 0.2, 0.5, 1.0)]
    assert (np.diff(values) > -1e-9).all()
    assert values[-1] == pytest.approx(read(found, mean), abs=EXACT)
    assert values[0] == pytest.approx(read(found, partial(quantile, level=1e-6)), abs=1e-9)


# Intervals


def test_a_bootstrap_forms_the_cdf_again_in_every_sample() -> None:
    world = WORLDS[0]
    episodes = world.simulate(200, 1)
    ratio, shares = ratio_of(random_policy(world, 3), episodes), bootstrap_shares(200, 100, 0)
    found = wis_cdf(episodes, ratio, low=LOW, high=HIGH)
    mine, theirs = bootstrap_functional(found, mean, shares, 0.9), bootstrap(wis(episodes, ratio), shares, 0.9)
    assert (mine.estimate, mine.low, mine.high) == pytest.approx((theirs.estimate, theirs.low, theirs.high))
    assert mine.level == 0.9
    for name, functional in FUNCTIONALS.items():
        by_sample = [read(found, functional, share) for share in shares]
        interval = bootstrap_functional(found, functional, shares, 0.8)
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(by_sample, [0.1, 0.9]))), name
        assert interval.low <= interval.estimate <= interval.high, name


def test_constant_returns_have_intervals_of_no_width() -> None:
    rng = np.random.default_rng(0)
    episodes, ratio = one_step([2.5] * 40, list(rng.exponential(size=40)))
    found, shares = wis_cdf(episodes, ratio, low=0.0, high=9.0), bootstrap_shares(40, 50, 0)
    for name, functional in FUNCTIONALS.items():
        interval = bootstrap_functional(found, functional, shares, 0.95)
        value = 0.0 if name == "variance" else 2.5
        assert (interval.low, interval.estimate, interval.high) == pytest.approx((value,) * 3, abs=1e-12), name


def drawn(n: int, rng: np.random.Generator) -> tuple[Episodes, np.ndarray]:
    """Behavior 50:50, policy 90:10; action 0 returns a uniform number, action 1 twice one. Weights are 1.8 or 0.2."""
    action = rng.integers(0, 2, n)
    return one_step(list((1.0 + action) * rng.random(n)), list(np.where(action == 0, 1.8, 0.2)))


def drawn_cdf(x: np.ndarray) -> np.ndarray:
    return 0.9 * np.clip(x, 0, 1) + 0.1 * np.clip(x / 2, 0, 1)


def test_bootstrap_intervals_cover_about_as_often_as_they_say() -> None:
    """300 logs of 150 episodes: a 90% interval of the CVaR of the worst quarter."""
    u = np.linspace(0, 0.25, 100_001)
    true = np.interp(u, drawn_cdf(np.linspace(0, 2, 20_001)), np.linspace(0, 2, 20_001)).mean()
    rng, covered = np.random.default_rng(2), 0
    shares = bootstrap_shares(150, 150, 0)
    for _ in range(300):
        episodes, ratio = drawn(150, rng)
        found = bootstrap_functional(wis_cdf(episodes, ratio, low=0.0, high=2.0), partial(cvar, tail=0.25), shares, 0.9)
        covered += found.low <= true <= found.high
    assert stats.binom.ppf(0.001, 300, 0.86) <= covered <= 300 * 0.97


def test_the_band_by_hand() -> None:
    """sqrt(log(2 e / 0.05) / 8) is 0.765578: 4 episodes, weights up to 1; with twice the limit it is twice as wide."""
    episodes, ratio = one_step([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    found = tis_cdf(episodes, ratio, low=0.0, high=5.0)
    lower, upper = band(found, 1.0, 0.95)
    assert upper == pytest.approx(np.array([0.765578, 1.0, 1.0, 1.0, 1.0, 1.0]), abs=1e-6)
    assert lower == pytest.approx(np.array([0.0, 0.0, 0.0, 0.0, 0.234422, 1.0]), abs=1e-6)
    many, ratio = one_step([1.0, 2.0, 3.0, 4.0] * 100, [1.0] * 400)
    found = tis_cdf(many, ratio, low=0.0, high=5.0)
    for limit in (1.0, 2.0):
        lower, upper = band(found, limit, 0.95)
        assert upper[2] - 0.5 == pytest.approx(limit * 0.0765578, abs=1e-6)
        assert 0.5 - lower[2] == pytest.approx(limit * 0.0765578, abs=1e-6)


@pytest.mark.parametrize("level", [0.2, 0.5, 0.95])
def test_the_band_holds_the_whole_cdf_at_least_as_often_as_it_says(level: float) -> None:
    """400 logs of 80 episodes; and the estimate is sometimes further off than half the band, so it is not idle."""
    rng, held, half = np.random.default_rng(0), 0, 0
    for _ in range(400):
        episodes, ratio = drawn(80, rng)
        found = tis_cdf(episodes, ratio, low=0.0, high=2.0)
        lower, upper = band(found, 1.8, level)
        true, estimate = drawn_cdf(found.points), found.estimate()
        # Just before each jump the step functions still have the value of the point before.
        ok = (lower <= true + 1e-12) & (true <= upper + 1e-12)
        ok[1:] &= true[1:] <= upper[:-1] + 1e-12
        held += ok[:-1].all()
        half += np.abs(true - estimate)[:-1].max() > 0.25 * 1.8 * np.sqrt(np.log(2 * np.e / (1 - level)) / 160)
    assert held >= stats.binom.ppf(0.001, 400, level)
    assert half > 20


def test_the_inequality_of_the_band_for_weights_of_0_or_the_limit() -> None:
    """Where half the episodes have no weight the error is that of DKW with a limit of 2; the bound is e times DKW's."""
    rng = np.random.default_rng(1)
    n, t, runs = 60, np.array([0.08, 0.1, 0.12, 0.15]), 2000
    returns = np.sort(rng.random((runs, n)), axis=1)
    cdf = np.cumsum(2.0 * rng.integers(0, 2, (runs, n)), axis=1) / n
    before = np.concatenate([np.zeros((runs, 1)), cdf[:, :-1]], axis=1)
    error = np.maximum(np.abs(cdf - returns), np.abs(before - returns)).max(1)
    exceeded = (error[:, None] > 2 * t).mean(0)
    assert (exceeded <= 2 * np.e * np.exp(-2 * n * t**2)).all() and exceeded[0] > 0.1


def test_what_the_band_says_about_functionals() -> None:
    """It contains the estimate, grows with the level, shrinks like n^-1/2, and holds the truth of all of them at once."""
    rng, right = np.random.default_rng(5), 0
    points = np.linspace(0, 2, 20_001)
    names = ("mean", "median", "lower decile", "CVaR 0.2")
    truth = {name: float(FUNCTIONALS[name](points, drawn_cdf(points)[None, :])[0]) for name in names}
    for _ in range(100):
        found = tis_cdf(*drawn(200, rng), low=0.0, high=2.0)
        intervals = {name: band_interval(found, FUNCTIONALS[name], 1.8, 0.9) for name in names}
        assert all(i.low <= i.estimate <= i.high for i in intervals.values())
        right += all(intervals[n].low - 1e-3 <= truth[n] <= intervals[n].high + 1e-3 for n in names)
    assert right >= stats.binom.ppf(0.001, 100, 0.9)

    def width(n: int, level: float) -> float:
        found = band_interval(tis_cdf(*drawn(n, np.random.default_rng(0)), low=0.0, high=2.0), mean, 1.8, level)
        return found.high - found.low

    assert width(1000, 0.8) < width(1000, 0.9) < width(1000, 0.99)
    assert width(1000, 0.9) / width(16_000, 0.9) == pytest.approx(4.0, rel=0.1)


# What is refused


def test_what_a_distribution_refuses() -> None:
    episodes, ratio = one_step([0.0, 1.0], [0.5, 1.5])
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        tis_cdf(episodes, ratio, low=0.0, high=0.5)
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        wis_cdf(episodes, ratio, low=0.5, high=1.0)
    with pytest.raises(InputError, match="2 episodes are truncated"):
        tis_cdf(dataclasses.replace(episodes, truncated=np.ones(2, bool)), ratio, low=0.0, high=1.0)
    with pytest.raises(InputError, match="ratio holds 1 values that are NaN"):
        tis_cdf(episodes, np.array([1.0, np.nan]), low=0.0, high=1.0)
    with pytest.raises(InputError, match="1 values that are NaN"):
        tis_cdf(dataclasses.replace(episodes, reward=np.array([np.inf, 1.0])), ratio, low=0.0, high=1.0)
    for estimator in (tis_cdf, wis_cdf):
        with pytest.raises(InputError, match="does not overlap"):
            estimator(episodes, np.zeros(2), low=0.0, high=1.0).estimate()
        with pytest.raises(InputError, match="does not overlap"):
            estimator(episodes, np.array([0.0, 2.0]), low=0.0, high=1.0).resampled(np.array([[0.5, 0.5], [1.0, 0.0]]))
    q, points = np.full((2, 2), 0.5), np.array([0.0, 1.0])
    with pytest.raises(InputError, match="must rise"):
        dr_cdf(episodes, ratio, q, q, points[::-1].copy() + 1)
    with pytest.raises(InputError, match="1 of 2 values lie outside"):
        dr_cdf(episodes, ratio, q, q, points - 0.5)
    with pytest.raises(InputError, match="v is no probability in 2 rows"):
        dr_cdf(episodes, ratio, q, 3 * q, points)
    with pytest.raises(InputError, match="q is no probability in 2 rows"):
        dr_cdf(episodes, ratio, q * np.nan, q, points)


def test_what_functionals_and_bands_refuse() -> None:
    episodes, ratio = one_step([0.0, 1.0], [0.5, 1.5])
    found = tis_cdf(episodes, ratio, low=0.0, high=1.0)
    with pytest.raises(InputError, match="1 importance weights exceed 1.2"):
        band(found, 1.2, 0.9)
    with pytest.raises(InputError, match="`tis_cdf`"):
        band(wis_cdf(episodes, ratio, low=0.0, high=1.0), 2.0, 0.9)
    with pytest.raises(InputError, match="variance"):
        band_interval(found, variance, 2.0, 0.9)
    for tail in (0.0, 1.1):
        with pytest.raises(InputError, match="tail"):
            read(found, partial(cvar, tail=tail))
        with pytest.raises(InputError, match="level of a quantile"):
            read(found, partial(quantile, level=tail))


def test_a_sum_of_rewards_may_exceed_the_range_by_its_rounding() -> None:
    episodes, ratio = one_step([0.1 + 0.2, -1e-17], [1.0, 1.0])
    assert tis_cdf(episodes, ratio, low=0.0, high=0.3).points.tolist() == [0.0, 0.3]
