"""The distribution of the return against the sum over every trajectory, and what is read from it."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.distribution import (
    Functional,
    ReturnCDF,
    cvar,
    dr_cdf,
    mean,
    quantile,
    tis_cdf,
    variance,
    wis_cdf,
)
from offrl_models.ope.importance import tis, trajectory_weights, wis
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes

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


def test_a_return_that_misses_its_point_by_rounding_is_of_that_point() -> None:
    """.1 + .1 + .1 is above .3."""
    every, _ = WORLDS[0].enumerate(3)
    one = every.take(np.arange(every.n_episodes) == every.length.argmax())
    one = dataclasses.replace(one, reward=np.full(3, 0.1), gamma=1.0)
    assert one.n_rows == 3 and one.return_[0] > 0.3
    model = np.tile([0.0, 1.0, 1.0], (3, 1))
    found = dr_cdf(one, np.ones(3), model, model, np.array([0.0, 0.3, 1.0]))
    assert found.estimate(np.ones(1)).tolist() == [0.0, 1.0, 1.0]
