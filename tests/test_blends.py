"""Several estimates become one: MAGIC blends them as its paper says, and SLOPE chooses among them."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope.doubly_robust import dros, magic, magic_blend, partial_returns, switch_dr, wdr
from offrl_models.ope.importance import Terms, pdis, slope, tis, wpdis
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.worlds import random_policy, random_world
from offrl_models.schema import InputError
from tests.modelled_logs import EXACT, INF, Log, on_rows, paths, policy_ratios, random_log

# --- MAGIC ---------------------------------------------------------------------------------------------------------


def partial_return_by_hand(log: Log, steps: float) -> np.ndarray:
    """Each episode's contribution to g^(steps - 1) as the paper writes it: terms (a), (b) and (c) below its equation 4."""
    episodes, n = log.episodes, len(paths(log))
    weight = np.ones((n, 6))
    for i, path in enumerate(paths(log)):
        for t in range(1, 6):
            weight[i, t] = weight[i, t - 1] * (log.ratio[path[t - 1]] if t <= len(path) else 1.0)
    weight /= weight.sum(0)
    found = np.zeros(n)
    for i, path in enumerate(paths(log)):
        for t, row in enumerate(path):
            discount = episodes.time_discount[row]
            if t < steps:
                found[i] += discount * weight[i, t + 1] * (episodes.reward[row] - log.q[row])
                found[i] += discount * weight[i, t] * log.v[row]
            elif t == steps:
                found[i] += discount * weight[i, t] * log.v[row]
    return found


def check_blend(log: Log, shares: np.ndarray, level: float) -> tuple[np.ndarray, float, float]:
    """The matrix from loops, and the conditions under which a point of the simplex is its minimum.

    Returns the partial returns and the interval around WDR.
    """
    steps = [0, 1, 3, INF]
    parts = np.stack([partial_return_by_hand(log, k) for k in steps])
    total = parts.sum(1)
    low, high = np.quantile(wdr(*log.given).resampled(shares), [(1 - level) / 2, (1 + level) / 2])
    low, high = min(low, total[-1]), max(high, total[-1])
    bias = np.array([max(low - g, g - high, 0.0) for g in total])
    error = len(paths(log)) * np.cov(parts) + np.outer(bias, bias)
    found = magic_blend(*log.given, steps, shares, level)
    gradient = error @ found
    least = found @ gradient
    assert found.sum() == pytest.approx(1.0) and (found >= 0).all()
    assert gradient.min() >= least * (1 - 1e-6)
    assert gradient[found > 1e-9] == pytest.approx(least, rel=1e-6)
    assert magic(*log.given, steps, shares, level).estimate() == pytest.approx(float(found @ total))
    return total, low, high


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9]))
def test_the_blend_is_least_in_the_estimated_mean_squared_error(seed: int, level: float) -> None:
    check_blend(random_log(seed, episodes=12), bootstrap_shares(12, 60, seed), level)


def test_the_interval_of_the_blend_holds_wdr_and_biases_on_either_side_of_it_do_not_cancel() -> None:
    log = random_log(4, episodes=12)
    check_blend(log, np.tile(np.eye(12)[0], (5, 1)), 0.5)  # every sample is one episode, far from all of them
    step = log.episodes.step
    model = np.where(step == 0, -20.0, np.where(step == 1, 20.0, 0.0))
    total, low, high = check_blend(dataclasses.replace(log, q=model, v=model), bootstrap_shares(12, 60, 0), 0.5)
    assert total[0] < low and total[1] > high


def test_a_blend_of_one_is_that_one() -> None:
    log, shares = random_log(3), bootstrap_shares(7, 20, 0)
    assert magic(*log.given, [0], shares).estimate() == pytest.approx(
        log.v[log.episodes.offsets[:-1]].mean(), abs=1e-12
    )
    assert magic(*log.given, [INF], shares).estimate() == pytest.approx(wdr(*log.given).estimate(), abs=1e-12)
    assert magic(*log.given, [INF, 5], shares).estimate() == pytest.approx(wdr(*log.given).estimate(), abs=1e-12)


def test_magic_leans_on_a_good_model_and_leaves_a_bad_one() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, episodes = random_policy(world, 5), world.simulate(4000, 1)
    ratio, shares = policy_ratios(policy, episodes), bootstrap_shares(4000, 60, 0)
    good = on_rows(policy, world.q_values(policy), episodes)
    bad = on_rows(policy, world.q_values(policy) + 3.0, episodes)
    assert magic_blend(episodes, ratio, *good, [0, INF], shares)[0] > 0.9
    assert magic_blend(episodes, ratio, *bad, [0, INF], shares)[0] < 0.01
    for model in (good, bad):
        found = magic(episodes, ratio, *model, [0, 1, 2, INF], shares).estimate()
        assert found == pytest.approx(world.value(policy), abs=0.1)
    assert abs(bad[1][episodes.offsets[:-1]].mean() - world.value(policy)) > 2.5


def test_a_step_without_overlap_blocks_only_what_reaches_it() -> None:
    episodes, _, q, v = random_log(0).given
    none = np.where((episodes.step == 2) | (np.repeat(episodes.length, episodes.length) <= 2), 0.0, 1.0)
    alone = partial_returns(episodes, none, q, v, [0, 2], np.array([1.0, 0.0]))
    assert np.isfinite(alone.estimate())
    longer = episodes.length > 2
    rows = longer[episodes.episode_of_row]
    alone = partial_returns(episodes.take(longer), none[rows], q[rows], v[rows], [0, 2], np.array([0.5, 0.5]))
    assert np.isfinite(alone.estimate())
    with pytest.raises(InputError, match="NaN"):
        magic(episodes, np.zeros_like(none), q, v, [0, INF], bootstrap_shares(7, 20, 0))


# --- choosing between estimates ------------------------------------------------------------------------------------


def terms_around(center: float, error: float) -> Terms:
    """An estimate with a standard error, from 4 episodes."""
    return Terms(center + error * math.sqrt(3.0) * np.array([[1.0], [1.0], [-1.0], [-1.0]]))


def test_slope_takes_the_last_that_meets_all_before_it() -> None:
    made = [terms_around(0.0, 1.0), terms_around(1.0, 0.5), terms_around(4.0, 0.25), terms_around(0.5, 0.1)]
    assert slope(made) == 1  # 4 +- .5 misses [0, 2]; that the last would meet it again does not count
    assert slope(made[:2] + made[3:]) == 2
    assert slope(made[:1]) == 0
    assert slope([terms_around(0.0, 1.0), terms_around(1.9, 0.0), terms_around(2.1, 0.0)]) == 1
    assert slope([terms_around(0.0, 1.0), terms_around(2.1, 0.0)]) == 0
    assert slope([terms_around(0.0, 1.0), terms_around(2.1, 0.0)], width=1.1) == 1
    # Each meets the first, but not each other.
    assert slope([terms_around(0.0, 1.0), terms_around(1.9, 0.1), terms_around(-1.9, 0.1)]) == 1
    # A radius counts for those before it as well: a later wide interval shows that the earlier one was too narrow.
    assert slope([terms_around(0.0, 0.1), terms_around(1.0, 0.1), terms_around(0.5, 1.0)]) == 2
    for few in ([], [Terms(np.ones((1, 1)))]):
        with pytest.raises(InputError, match="at least one candidate"):
            slope(few)
    with pytest.raises(InputError, match="NaN"):
        slope([Terms(np.zeros((4, 1)), np.zeros((4, 1)))])


def test_where_actions_lead_nowhere_else_one_step_of_memory_is_enough_and_is_chosen() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    world = dataclasses.replace(world, transition=world.transition.mean(1, keepdims=True) + 0 * world.transition)
    policy, (episodes, probability) = random_policy(world, 5), world.enumerate(3)
    found = pdis(episodes, policy_ratios(policy, episodes), memory=1).estimate(probability)
    assert found == pytest.approx(world.value(policy), abs=EXACT)
    many = world.simulate(4000, 0)
    ratio = policy_ratios(policy, many)
    assert slope([pdis(many, ratio, memory=memory) for memory in (3, 2, 1, 0)]) == 2
    assert slope([wpdis(many, ratio, memory=memory) for memory in (3, 2, 1, 0)]) == 2


def test_slope_works_for_every_hyper_parameter() -> None:
    """With the exact model all estimates agree and the model alone is taken; with a bad one nothing may be given up."""
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, episodes = random_policy(world, 5), world.simulate(4000, 1)
    ratio = policy_ratios(policy, episodes)
    good = on_rows(policy, world.q_values(policy), episodes)
    bad = on_rows(policy, world.q_values(policy) + 3.0, episodes)
    switches, shrinkages = (INF, 2.0, 1.0, 0.0), (INF, 10.0, 0.1, 0.0)
    assert slope([switch_dr(episodes, ratio, *good, tau) for tau in switches]) == 3
    assert slope([dros(episodes, ratio, *good, shrinkage) for shrinkage in shrinkages]) == 3
    assert slope([switch_dr(episodes, ratio, *bad, tau) for tau in switches]) < 2
    assert slope([dros(episodes, ratio, *bad, shrinkage) for shrinkage in shrinkages]) < 2
    gains = dataclasses.replace(episodes, reward=episodes.reward + 5.0)
    assert slope([tis(gains, ratio, clip=clip) for clip in (INF, 1e6, 0.01)]) == 1
    assert slope([partial_returns(episodes, ratio, *good, [k], np.ones(1)) for k in (INF, 2, 1, 0)]) == 3
