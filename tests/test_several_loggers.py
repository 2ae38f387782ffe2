"""Bandit logs of several policies: naive, balanced and weighted estimates by exact values and variances."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.bandit import balanced, logger_variances, weighted
from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.importance import Terms, tis, wis
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import ratios
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError
from tests.test_bandit import BANDITS, EXACT, log, model_of, picked, ratio_of, states


def stacked(*logs: Episodes) -> Episodes:
    """Bandit logs one after the other."""
    names = ("observation", "final_observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    n = sum(part.n_episodes for part in logs)
    return dataclasses.replace(
        logs[0],
        episode_id=np.arange(n),
        offsets=np.arange(n + 1),
        **{name: np.concatenate([getattr(part, name) for part in logs]) for name in names},
    )


# Several logging policies


def two_loggers(
    world: World, other: np.ndarray
) -> tuple[Episodes, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Two thirds of the rows by the world's behavior, one third by another policy: every outcome and its probability.

    Returns the log, the probability of each row, the logger of each row, both loggers' probabilities of the logged action, and
    the two policies.
    """
    first, p = world.enumerate(1)
    second, r = dataclasses.replace(world, behavior=other).enumerate(1)
    assert first.n_episodes == second.n_episodes
    episodes = stacked(first, first, second)
    share = np.concatenate([p, p, r]) / 3
    logger = np.repeat([0, 0, 1], first.n_episodes)
    policies = [world.behavior, other]
    probs = np.stack([b[states(episodes), episodes.action] for b in policies], 1)
    return episodes, share, logger, probs, policies


def variance_of(terms: Terms, share: np.ndarray) -> float:
    """Exact variance of one row's term, all rows of the same logger."""
    values = terms.numerator.sum(1)
    return float(share @ np.square(values) - (share @ values) ** 2)


@pytest.mark.parametrize("world", BANDITS[:2])
def test_naive_balanced_and_weighted_sum_to_the_exact_value(world: World) -> None:
    policy, other = random_policy(world, 5), random_policy(world, 9)
    q = model_of(world, policy, 0)
    episodes, share, logger, probs, _ = two_loggers(world, other)
    mixed = balanced(episodes, logger, probs)
    s = states(episodes)
    q_taken, v = q[s, episodes.action], (policy * q).sum(1)[s]
    for log_, name in ((episodes, "naive"), (mixed, "balanced")):
        ratio = ratio_of(policy, log_)
        for terms in (tis(log_, ratio), wis(log_, ratio), dr(log_, ratio, q_taken, v)):
            assert terms.estimate(share) == pytest.approx(world.value(policy), abs=EXACT), name
    for terms in (tis(episodes, ratio_of(policy, episodes)), dr(episodes, ratio_of(policy, episodes), q_taken, v)):
        for variance in ([1.0, 1.0], [0.1, 7.0]):
            found = weighted(terms, logger, np.array(variance)).estimate(share)
            assert found == pytest.approx(world.value(policy), abs=EXACT)


@given(st.integers(0, 10_000))
def test_balancing_never_raises_the_variance_and_weighting_is_the_best_weighting(seed: int) -> None:
    """Exact variances of the estimate from 2 rows of one logger and 1 row of the other, in units of one row."""
    world = random_world(2, 3, 1, 1.0, seed=seed)
    policy = random_policy(world, seed + 1)
    episodes, share, logger, probs, _ = two_loggers(world, random_policy(world, seed + 2))
    naive = tis(episodes, ratio_of(policy, episodes))
    mixed = balanced(episodes, logger, probs)
    multiple = tis(mixed, ratio_of(policy, mixed))
    own = [np.where(logger == k, share, 0.0) / share[logger == k].sum() for k in (0, 1)]

    def total(terms: Terms, weight: np.ndarray) -> float:
        """Variance of sum over loggers of weight times the mean of its rows: 2 rows and 1 row."""
        return sum(float(w) ** 2 * variance_of(terms, p) / n for w, p, n in zip(weight, own, (2, 1), strict=True))

    shares = np.array([2 / 3, 1 / 3])
    assert total(multiple, shares) <= total(naive, shares) + EXACT
    variance = np.array([variance_of(naive, p) for p in own])
    found = weighted(naive, logger, variance).numerator
    # A term is its value times its logger's weight, so the weights can be read off.
    value = naive.numerator[:, 0]
    weight = np.array([found[logger == k, k].sum() / value[logger == k].sum() for k in (0, 1)])
    assert weight.sum() == pytest.approx(1.0, abs=EXACT)
    best = total(naive, weight)
    assert best <= total(naive, shares) + EXACT
    for first in np.linspace(0, 1, 21):
        assert best <= total(naive, np.array([first, 1 - first])) + EXACT


def test_several_loggers_by_hand() -> None:
    """Logger 0 plays action 0 only, logger 1 plays both alike. The policy plays action 1 in 3 of 4 cases.

    The mixture plays action 0 with 3/4 and action 1 with 1/4. Rewards are 1 and 2, so the value is 1.75.
    """
    episodes = log([0, 0, 0, 1], [1, 1, 1, 2], [1.0, 1.0, 0.5, 0.5])
    logger, probs = np.array([0, 0, 1, 1]), np.array([[1.0, 0.5]] * 3 + [[0.0, 0.5]])
    policy = np.tile([0.25, 0.75], (4, 1))
    mixed = balanced(episodes, logger, probs)
    assert mixed.action_prob.tolist() == [0.75, 0.75, 0.75, 0.25]
    assert tis(mixed, ratios(mixed, policy)).estimate() == pytest.approx(1.75, abs=1e-12)
    naive = tis(episodes, ratios(episodes, policy))
    assert naive.estimate() == pytest.approx((0.25 + 0.25 + 0.5 + 3.0) / 4)  # logger 0 never shows action 1
    combined = weighted(naive, logger, np.array([1.0, 4.0]))  # weights 2/1 and 2/4, over their sum
    assert combined.estimate() == pytest.approx(0.8 * 0.25 + 0.2 * 1.75)


def test_the_variance_of_each_logger_by_hand() -> None:
    terms, logger = Terms(np.array([[1.0], [5.0], [3.0], [4.0]])), np.array([0, 1, 0, 1])
    assert logger_variances(terms, logger) == pytest.approx(np.array([2.0, 0.5]))
    found = weighted(terms, logger, logger_variances(terms, logger))  # weights 1 and 4, over 5
    assert found.estimate() == pytest.approx(0.2 * 2.0 + 0.8 * 4.5)


def test_one_logger_alone_changes_nothing() -> None:
    world = BANDITS[1]
    episodes, policy = world.simulate(30, 0), random_policy(world, 3)
    alone = np.zeros(30, int)
    mixed = balanced(episodes, alone, episodes.action_prob[:, None])
    assert np.array_equal(mixed.action_prob, episodes.action_prob)
    terms = tis(episodes, ratio_of(policy, episodes))
    shares = bootstrap_shares(30, 20, 0)
    combined = weighted(terms, alone, logger_variances(terms, alone))
    assert combined.resampled(shares) == pytest.approx(terms.resampled(shares), abs=EXACT)


@given(st.integers(0, 10_000), st.floats(0.1, 50.0))
def test_loggers_scale_with_rewards_and_their_order_never_matters(seed: int, scale: float) -> None:
    world = random_world(2, 3, 1, 1.0, seed=seed)
    rng = np.random.default_rng(seed)
    policies = [world.behavior, random_policy(world, seed + 1)]
    parts = [dataclasses.replace(world, behavior=b).simulate(15, seed + k) for k, b in enumerate(policies)]
    episodes, logger = stacked(*parts), np.repeat([0, 1], 15)
    policy, order = random_policy(world, seed + 2), rng.permutation(30)

    def both(log_: Episodes, logger: np.ndarray, factor: float) -> list[float]:
        log_ = dataclasses.replace(log_, reward=factor * log_.reward)
        probs = np.stack([b[states(log_), log_.action] for b in policies], 1)
        mixed = balanced(log_, logger, probs)
        terms = tis(log_, ratio_of(policy, log_))
        precise = weighted(terms, logger, logger_variances(terms, logger))
        return [tis(mixed, ratio_of(policy, mixed)).estimate(), precise.estimate()]

    before = both(episodes, logger, 1.0)
    assert both(picked(episodes, order), logger[order], 1.0) == pytest.approx(before, abs=EXACT)
    assert both(episodes, logger, scale) == pytest.approx([scale * x for x in before], rel=1e-9, abs=1e-9)


def test_what_several_loggers_refuse() -> None:
    episodes = log([0, 1], [1.0, 0.5], [0.5, 0.5])
    logger, probs = np.array([0, 1]), np.array([[0.5, 0.9], [0.1, 0.5]])
    balanced(episodes, logger, probs)
    with pytest.raises(InputError, match="in 2 rows the logged propensity"):
        balanced(episodes, logger[::-1].copy(), probs)
    with pytest.raises(InputError, match="outside 0 to 1"):
        balanced(episodes, np.array([0, 2]), probs)
    with pytest.raises(InputError, match="NaN"):
        balanced(episodes, logger, probs * np.nan)
    with pytest.raises(InputError, match="negative in 1 rows"):
        balanced(episodes, logger, np.array([[0.5, 0.9], [-0.1, 0.5]]))
    terms = Terms(np.ones((2, 1)))
    with pytest.raises(InputError, match="self-normalised"):
        weighted(Terms(np.ones((2, 1)), np.ones((2, 1))), logger, np.ones(2))
    with pytest.raises(InputError, match="policy 2 has no episodes"):
        weighted(terms, logger, np.ones(3))
    with pytest.raises(InputError, match="policy 1 is not positive"):
        weighted(terms, logger, np.array([1.0, 0.0]))
    with pytest.raises(InputError, match="a variance needs 2"):
        logger_variances(terms, logger)
    with pytest.raises(InputError, match="are equal"):
        logger_variances(terms, np.zeros(2, int))
