"""Estimators against the sum over every trajectory, and the identities that hold without any tolerance to argue about."""

import dataclasses
from functools import partial
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope import estimates, sequences
from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.doubly_robust import Model, dr, dros, switch_dr, wdr
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.importance import Terms, pdis, tis, trajectory_weights, wis, wpdis
from offrl_models.ope.intervals import bootstrap
from offrl_models.ope.marginal import TabularModel, paired_differences, policy_table
from offrl_models.ope.multistep import corrected_returns
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import completed, finite, ratios, ratios_and_values
from offrl_models.ope.worlds import World, random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import cut_after_one_step

EXACT = 1e-9


def random_policy(world: World, seed: int) -> np.ndarray:
    weights = np.random.default_rng(seed).dirichlet(np.ones(world.n_actions), size=world.n_states) * world.mask
    return weights / weights.sum(1, keepdims=True)


def states(episodes: Episodes) -> np.ndarray:
    return episodes.observation[:, 0].astype(int)


def probs_of(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return policy[states(episodes)]


def value_model(world: World, policy: np.ndarray, episodes: Episodes, q: np.ndarray) -> tuple[np.ndarray, ...]:
    """q of the logged action, v and next v for every row, from a table q."""
    v = (policy * q).sum(1)
    following = episodes.next_observation[:, 0].astype(int)
    return q[states(episodes), episodes.action], v[states(episodes)], v[following]


def all_terms(world: World, policy: np.ndarray, episodes: Episodes, q: np.ndarray) -> dict[str, Terms]:
    """Every estimator of a policy's value, with a value model given as a table."""
    ratio = ratios(episodes, probs_of(policy, episodes))
    q_taken, v, next_v = value_model(world, policy, episodes, q)
    valued = completed(episodes, next_v)
    return estimates.all_terms(valued, ratio, Model.of(valued, q_taken, v))


T = TypeVar("T")


def required(value: T | None) -> T:
    assert value is not None
    return value


WORLDS = [
    random_world(2, 2, 3, 0.9, seed=1),
    random_world(2, 3, 3, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, 3, masked=True),
]


@pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
@pytest.mark.parametrize("name", ["TIS", "PDIS", "WIS", "WPDIS", "DR", "WDR"])
def test_the_sum_over_every_trajectory_is_the_exact_value(world: World, name: str) -> None:
    """Unbiased estimators equal the value in expectation; ratios of expectations do too. Any value model will do."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    wrong_q = np.random.default_rng(0).normal(size=(world.n_states, world.n_actions))
    wrong_q[world.terminal] = 0.0
    found = all_terms(world, policy, episodes, wrong_q)[name].estimate(probability)
    assert found == pytest.approx(world.value(policy), abs=EXACT)


@pytest.mark.parametrize("world", WORLDS)
def test_the_marginalised_difference_over_every_trajectory_is_the_exact_difference(world: World) -> None:
    """With exact state ratios any value model is corrected, and with the exact model any ratio is."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 6)
    exact = world.model()
    x, *_ = required(paired_differences(exact, policy, episodes, ratios(episodes, probs_of(policy, episodes))))
    assert probability @ x == pytest.approx(world.value(policy) - world.value(world.behavior), abs=EXACT)
    broken = dataclasses.replace(exact, reward=exact.reward + np.random.default_rng(1).normal(size=exact.reward.shape))
    x, *_ = required(paired_differences(broken, policy, episodes, ratios(episodes, probs_of(policy, episodes))))
    assert probability @ x == pytest.approx(world.value(policy) - world.value(world.behavior), abs=EXACT)


@given(st.integers(0, 10_000))
def test_on_policy_every_estimator_is_the_mean_return(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes = world.simulate(25, seed)
    flat = np.zeros((world.n_states, world.n_actions))
    for name, terms in all_terms(world, world.behavior, episodes, flat).items():
        assert terms.estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT), name


@given(st.integers(0, 10_000))
def test_wis_lies_inside_the_observed_returns(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes = world.simulate(12, seed)
    ratio = ratios(episodes, probs_of(random_policy(world, seed + 1), episodes))
    assert episodes.return_.min() - EXACT <= wis(episodes, ratio).estimate() <= episodes.return_.max() + EXACT


def test_dr_without_a_model_is_pdis_and_wdr_is_wpdis(tiny: World) -> None:
    episodes = tiny.simulate(50, 0)
    found = all_terms(tiny, random_policy(tiny, 3), episodes, np.zeros((tiny.n_states, 2)))
    assert found["DR"].estimate() == pytest.approx(found["PDIS"].estimate(), abs=EXACT)
    assert found["WDR"].estimate() == pytest.approx(found["WPDIS"].estimate(), abs=EXACT)


def test_what_is_estimated_together_is_what_each_estimator_says_alone(tiny: World) -> None:
    """In a log, where weights do not average to 1, and in its resamples."""
    episodes, policy = tiny.simulate(30, 0), random_policy(tiny, 3)
    table = np.random.default_rng(0).normal(size=(tiny.n_states, 2))
    ratio, (q, v, _) = ratios(episodes, probs_of(policy, episodes)), value_model(tiny, policy, episodes, table)
    alone = {
        name: each(episodes, ratio) for name, each in (("TIS", tis), ("PDIS", pdis), ("WIS", wis), ("WPDIS", wpdis))
    }
    alone |= {name: each(episodes, ratio, q, v) for name, each in (("DR", dr), ("WDR", wdr))}
    found, shares = estimates.all_terms(episodes, ratio, Model.of(episodes, q, v)), bootstrap_shares(30, 5, 0)
    assert set(found) == set(alone) and len({round(terms.estimate(), 6) for terms in alone.values()}) == 6
    for name, terms in found.items():
        assert terms.estimate() == pytest.approx(alone[name].estimate(), abs=EXACT), name
        assert terms.resampled(shares) == pytest.approx(alone[name].resampled(shares), abs=EXACT), name


def test_dr_with_the_true_model_has_no_variance_where_the_world_is_deterministic() -> None:
    world = random_world(2, 2, 3, 0.9, seed=4)
    deterministic = (world.transition == world.transition.max(2, keepdims=True)).astype(float)
    initial = np.eye(world.n_states)[0]
    world = dataclasses.replace(world, transition=deterministic, initial=initial)
    policy = random_policy(world, 8)
    episodes = world.simulate(200, 0)
    terms = all_terms(world, policy, episodes, world.q_values(policy))["DR"]
    assert terms.numerator.std() < EXACT
    assert terms.estimate() == pytest.approx(world.value(policy), abs=EXACT)


@given(st.integers(0, 10_000), st.floats(0.1, 50.0))
def test_values_scale_with_rewards(seed: int, scale: float) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes = world.simulate(20, seed)
    policy, q = random_policy(world, 2), np.random.default_rng(seed).normal(size=(world.n_states, 2))
    scaled = dataclasses.replace(episodes, reward=scale * episodes.reward)
    before, after = all_terms(world, policy, episodes, q), all_terms(world, policy, scaled, scale * q)
    for name in before:
        assert after[name].estimate() == pytest.approx(scale * before[name].estimate(), rel=1e-9, abs=1e-9), name


@given(st.integers(0, 10_000))
def test_the_order_of_episodes_never_matters(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=3)
    episodes = world.simulate(15, seed)
    order = np.random.default_rng(seed).permutation(15)
    rows = np.concatenate([np.flatnonzero(episodes.episode_of_row == i) for i in order])
    names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    shuffled = dataclasses.replace(
        episodes,
        final_observation=episodes.final_observation[order],
        **{name: getattr(episodes, name)[rows] for name in names},
        offsets=np.append(0, episodes.length[order].cumsum()),
    )
    policy, q = random_policy(world, 2), np.random.default_rng(1).normal(size=(world.n_states, 2))
    before, after = all_terms(world, policy, episodes, q), all_terms(world, policy, shuffled, q)
    for name in before:
        assert after[name].estimate() == pytest.approx(before[name].estimate(), abs=EXACT), name


def test_a_truncated_episode_is_completed_by_the_value_model(tiny: World) -> None:
    """Cut every episode after its first step: with the true values every estimator still sums to the exact value."""
    whole, probability = tiny.enumerate(3)
    cut = cut_after_one_step(whole)
    policy = random_policy(tiny, 5)
    for name, terms in all_terms(tiny, policy, cut, tiny.q_values(policy)).items():
        assert terms.estimate(probability) == pytest.approx(tiny.value(policy), abs=EXACT), name


def test_weights_have_mean_one_over_every_trajectory(tiny: World) -> None:
    episodes, probability = tiny.enumerate(3)
    weight = trajectory_weights(episodes, ratios(episodes, probs_of(random_policy(tiny, 1), episodes)))
    assert probability @ weight == pytest.approx(1.0, abs=EXACT)


def test_a_policy_that_is_no_distribution_or_plays_a_forbidden_action_is_refused() -> None:
    world = random_world(3, 2, 2, 0.5, 3, masked=True)
    episodes = world.simulate(50, 0)
    good = probs_of(random_policy(world, 1), episodes)
    with pytest.raises(InputError, match="do not sum to 1"):
        ratios(episodes, good * 0.9)
    with pytest.raises(InputError, match="NaN"):
        ratios(episodes, good * np.nan)
    with pytest.raises(InputError, match=f"negative or do not sum to 1 in {episodes.n_rows} rows"):
        ratios(episodes, np.tile([1.5, -0.5], (episodes.n_rows, 1)))
    with pytest.raises(InputError, match="has 1 actions, and the log has others"):
        ratios(episodes, np.ones((episodes.n_rows, 1)))
    with pytest.raises(InputError, match="mask forbids"):
        ratios(episodes, np.tile([0.5, 0.5], (episodes.n_rows, 1)))


def test_values_of_tables_are_those_of_the_rows(tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the rows at a time, the last of them shorter."""
    episodes, policy = tiny.simulate(50, 0), random_policy(tiny, 1)
    monkeypatch.setattr(sequences, "CHUNK", 7)
    probs, table = probs_of(policy, episodes), tiny.q_values(policy)[states(episodes)]
    ratio, q, v = ratios_and_values(episodes, probs, table)
    taken = np.arange(episodes.n_rows), episodes.action
    assert ratio == pytest.approx(probs[taken] / episodes.action_prob, rel=1e-14)
    assert np.array_equal(q, table[taken]) and v == pytest.approx((probs * table).sum(1), rel=1e-14)
    assert np.array_equal(ratios(episodes, probs), ratio)


@pytest.mark.parametrize("again", [False, True])
def test_policies_that_are_estimated_together_are_estimated_as_if_alone(tiny: World, again: bool) -> None:
    whole = tiny.simulate(200, 0)
    last = np.isin(np.arange(whole.n_rows), whole.offsets[1:] - 1)
    truncated = last & (np.arange(whole.n_rows) % 3 == 0)
    episodes = dataclasses.replace(whole, terminated=last & ~truncated, truncated=truncated)
    shares, refit = bootstrap_shares(200, 50, 0), (lambda _copies: episodes.action_prob) if again else None
    policies = [tiny.behavior, random_policy(tiny, 1), random_policy(tiny, 2)]
    ratio = [ratios(episodes, probs_of(policy, episodes)) for policy in policies]
    q, v, next_v = (
        np.stack(part)
        for part in zip(*(value_model(tiny, each, episodes, tiny.q_values(each)) for each in policies), strict=True)
    )
    next_v += np.arange(1.0, 4.0)[:, None]  # for the task had ended where the recording is said to have
    initial = v[:, None, episodes.offsets[:-1]] + np.array([[[0.0], [1.0]]])
    found = estimates.estimate(episodes, ratio, FQEValues(q, v, next_v, initial), shares, refit)
    for number, together in enumerate(found):
        one = slice(number, number + 1)
        values = FQEValues(q[one], v[one], next_v[one], initial[one])
        (alone,) = estimates.estimate(episodes, ratio[one], values, shares, refit)
        assert list(together.intervals) == list(estimates.ESTIMATORS)
        effective = effective_sample_size(trajectory_weights(episodes, ratio[number]))
        assert together.effective_episodes == alone.effective_episodes == effective
        valued = completed(episodes, next_v[number])
        terms = estimates.all_terms(valued, ratio[number], Model.of(valued, q[number], v[number]))
        for name, interval in together.intervals.items():
            assert name == "FQE" or interval.estimate == pytest.approx(terms[name].estimate(), rel=1e-12)
            other = alone.intervals[name]
            ends = (interval.estimate, interval.low, interval.high)
            assert ends == pytest.approx((other.estimate, other.low, other.high), rel=1e-6), name
    assert len({each.intervals["DR"].estimate for each in found}) == 3


def test_only_what_is_not_finite_is_refused() -> None:
    for wrong, number in (([np.inf, -np.inf, 1.0], 2), ([np.nan, 0.0], 1), ([np.inf], 1)):
        with pytest.raises(InputError, match=f"the reward holds {number} values that are NaN or infinite"):
            finite("the reward", np.array(wrong))
    large = np.full(3, 1e308)  # whose sum is infinite
    assert finite("the reward", large) is large


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_an_error_not_an_estimate(tiny: World, wrong: float) -> None:
    episodes = tiny.simulate(5, 0)
    ones, spoiled = np.ones(episodes.n_rows), np.where(np.arange(episodes.n_rows) == 0, wrong, 1.0)
    broken = dataclasses.replace(episodes, reward=spoiled)
    for estimator in (tis, wis, pdis, wpdis, partial(tis, clip=5.0), partial(pdis, memory=2)):
        for log, ratio in ((broken, ones), (episodes, spoiled)):
            with pytest.raises(InputError, match="NaN or infinite"):
                estimator(log, ratio)
    for estimator in (dr, wdr, partial(switch_dr, tau=2.0), partial(dros, shrinkage=1.0),
                      partial(corrected_returns, kind="retrace", lambda_=1.0)):  # fmt: skip
        for log, ratio, q, v in ((broken, ones, ones, ones), (episodes, spoiled, ones, ones), (episodes, ones, spoiled, ones),
                                 (episodes, ones, ones, spoiled)):  # fmt: skip
            with pytest.raises(InputError, match="NaN or infinite"):
                estimator(log, ratio, q, v)


def test_the_tabular_model_of_many_episodes_has_the_worlds_values(tiny: World) -> None:
    model = required(TabularModel.fit(tiny.simulate(200_000, 0), tiny.n_states))
    policy = random_policy(tiny, 5)
    assert model.initial @ (policy * model.q_values(policy)).sum(1) == pytest.approx(tiny.value(policy), abs=0.01)
    assert model.recorded_state_ratio(model.behavior) == pytest.approx(np.ones(tiny.n_states), abs=1e-9)


def test_a_policy_that_differs_within_a_state_has_no_table(tiny: World) -> None:
    episodes = tiny.simulate(50, 0)
    probs = probs_of(random_policy(tiny, 1), episodes)
    assert policy_table([(episodes, probs)], tiny.n_states) is not None
    other = probs.copy()
    other[0] = other[0][::-1]
    assert policy_table([(episodes, other)], tiny.n_states) is None


def test_a_policy_that_never_ends_has_no_marginalised_difference() -> None:
    """Two states and an action that leads back: at gamma 1 the model of that policy is singular."""
    world = random_world(1, 2, 2, 1.0, seed=0)
    transition = world.transition.copy()
    transition[1, 1] = [1.0, 0.0, 0.0]
    transition[0, 1] = [0.0, 1.0, 0.0]
    world = dataclasses.replace(world, transition=transition)
    episodes = world.simulate(300, 0)
    model = TabularModel.fit(episodes, 3)
    assert model is not None
    circling = np.array([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    assert paired_differences(model, circling, episodes, np.ones(episodes.n_rows)) is None
    assert TabularModel.fit(episodes, 100_000) is None
    one = np.ones((1, 1))
    hardly_ends = TabularModel(np.array([[[1 - 1e-9]]]), one, np.ones(1), one)
    assert not hardly_ends.ends(np.ones((1, 1)))


def cut_after(world: World, episodes: Episodes, steps: int) -> Episodes:
    """The recording stops after some steps."""
    keep = episodes.step < steps
    names = ("observation", "action", "mask", "reward", "action_prob")
    terminated = episodes.terminated[keep]
    length = np.minimum(episodes.length, steps)
    last = np.zeros(len(terminated), bool)
    last[np.cumsum(length) - 1] = True
    return dataclasses.replace(
        episodes,
        final_observation=episodes.next_observation[keep][last],
        **{name: getattr(episodes, name)[keep] for name in names},
        offsets=np.append(0, np.cumsum(length)),
        terminated=terminated,
        truncated=last & ~terminated,
    )


def test_the_behavior_gains_nothing_on_itself_when_recordings_stop(tiny: World) -> None:
    """With exact values, and with a tabular model fitted elsewhere: truncation must not look like an improvement."""
    cut = cut_after(tiny, tiny.simulate(20_000, 1), 1)
    q = tiny.q_values(tiny.behavior)
    *_, next_v = value_model(tiny, tiny.behavior, cut, q)
    whole = completed(cut, next_v)
    mine = all_terms(tiny, tiny.behavior, cut, q)["WDR"]
    noise = 4 * whole.return_.std() / np.sqrt(cut.n_episodes)
    assert abs(mine.estimate() - whole.return_.mean()) < noise
    assert whole.return_.mean() == pytest.approx(tiny.value(tiny.behavior), abs=noise)
    model = TabularModel.fit(tiny.simulate(20_000, 2), tiny.n_states)
    assert model is not None
    paired = paired_differences(model, tiny.behavior, cut, np.ones(cut.n_rows))
    assert paired is not None and abs(paired[0].mean()) < noise


def test_no_overlap_is_no_estimate(tiny: World) -> None:
    """Weights that are all 0 leave nothing to normalise; that is not an estimate of 0."""
    episodes = tiny.simulate(10, 0)
    found = wis(episodes, np.zeros(episodes.n_rows))
    assert np.isnan(found.estimate())
    assert bootstrap(found, bootstrap_shares(10, 100, 0), 0.95).to_json()["estimate"] is None
