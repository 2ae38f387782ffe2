"""Doubly robust pseudo-outcomes and double reinforcement learning against exact values, and identities of every estimator."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.drl import cross_fit, drl, with_step
from offrl_models.ope.importance import Terms
from offrl_models.ope.marginal import (
    mis,
    paired_differences,
    pseudo_outcomes,
    state_action_weights,
    state_weights,
    step_ratios,
    step_weights,
    tabular_dm,
    value_gains,
    wmis,
)
from offrl_models.ope.sequences import ratios
from offrl_models.ope.tabular import RATIO_LIMIT, TabularModel, states_of
from offrl_models.ope.units import fold_of
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError
from tests.conftest import circling_world, ratio_of, recorded_paths
from tests.test_marginal import EXACT, positions_only, random_q, values, worlds

# --- doubly robust pseudo-outcomes ---------------------------------------------------------------------------------------


@worlds
def test_pseudo_outcomes_are_right_when_the_weights_are_or_the_values_are(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy, model = random_policy(world, 5), world.model()
    weight = state_weights(model, policy, episodes, ratio_of(policy, episodes))
    right, wrong = values(policy, world.q_values(policy), episodes), values(policy, random_q(world), episodes)
    junk = np.random.default_rng(0).exponential(size=(world.n_states, world.n_actions))
    wrong_weight = junk[states_of(episodes)[0], episodes.action]
    value = world.value(policy)
    assert probability @ pseudo_outcomes(episodes, weight, *wrong) == pytest.approx(value, abs=EXACT)
    assert probability @ pseudo_outcomes(episodes, wrong_weight, *right) == pytest.approx(value, abs=EXACT)
    assert abs(probability @ pseudo_outcomes(episodes, wrong_weight, *wrong) - value) > 0.01
    gains = value_gains(episodes, weight, *wrong, np.ones(episodes.n_rows), *wrong[1:])
    assert probability @ gains == pytest.approx(value - world.value(world.behavior), abs=EXACT)


def test_the_ratio_of_states_is_limited_in_paired_differences() -> None:
    """What is above the limit is left to the values, which are exact here."""
    world = circling_world(0.9)
    episodes, probability = recorded_paths(world, 3)
    model, policy = world.model(), random_policy(world, 1)
    rare = dataclasses.replace(model, recorded=np.full((3, 2), 1e-3))
    paired, ratio = paired_differences(rare, policy, episodes, ratio_of(policy, episodes)), ratio_of(policy, episodes)
    assert paired is not None and paired[1] == pytest.approx(RATIO_LIMIT * ratio)
    assert probability @ paired[0] == pytest.approx(world.value(policy) - world.value(world.behavior), abs=EXACT)


def test_values_that_are_not_finite_are_refused(tiny: World) -> None:
    episodes = tiny.simulate(5, 0)
    one = np.ones(episodes.n_rows)
    broken = np.where(np.arange(episodes.n_rows) == 1, np.nan, 1.0)
    for place in range(4):
        weight, q, v, reward = (broken if i == place else one for i in range(4))
        with pytest.raises(InputError, match="NaN or infinite"):
            pseudo_outcomes(dataclasses.replace(episodes, reward=reward), weight, q, v, one)
    for call in (
        lambda: mis(episodes, broken),
        lambda: wmis(episodes, broken, 1.0),
        lambda: wmis(episodes, broken, one[:3]),
    ):
        with pytest.raises(InputError, match="NaN or infinite"):
            call()


# --- double reinforcement learning ---------------------------------------------------------------------------------------


def test_folds_follow_the_entity_and_not_the_order() -> None:
    episodes = dataclasses.replace(random_world(2, 2, 2, 1.0, 0).simulate(12, 0), entity=np.repeat(list("cabd"), 3))
    fold = fold_of(episodes, 2)
    assert [set(fold[episodes.entity == e]) for e in "abcd"] == [{0}, {1}, {0}, {1}]
    assert (fold_of(dataclasses.replace(episodes, entity=None), 3) == np.arange(12) % 3).all()
    with pytest.raises(InputError, match="4 entities cannot be cut into 5 folds"):
        fold_of(episodes, 5)


def test_cross_fitting_hands_each_fold_to_the_nuisances_of_the_others(tiny: World) -> None:
    episodes = tiny.simulate(20, 0)
    seen = []

    def terms_of(others: Episodes, held: Episodes, rows: np.ndarray) -> np.ndarray:
        seen.append((set(others.episode_id.tolist()), set(held.episode_id.tolist())))
        assert (held.reward == episodes.reward[rows]).all()
        return held.return_ + 100.0 * others.n_episodes

    found = cross_fit(episodes, 3, terms_of)
    everyone = set(range(20))
    assert all(others | held == everyone and not others & held for others, held in seen)
    assert sorted(i for _, held in seen for i in held) == list(range(20))
    outside = 20 - np.bincount(np.arange(20) % 3)[np.arange(20) % 3]
    assert found.numerator[:, 0] == pytest.approx(episodes.return_ + 100.0 * outside)


@worlds
@pytest.mark.parametrize("form", ["history", "markov"])
def test_with_given_nuisances_the_terms_are_exact_over_every_trajectory(world: World, form: str) -> None:
    """Any values are corrected, by products of ratios in one form and by exact state ratios in the other."""
    from offrl_models.ope.drl import _terms

    episodes, probability = world.enumerate(3)
    policy, exact = random_policy(world, 5), world.model()
    ratio = ratio_of(policy, episodes)
    broken = dataclasses.replace(exact, reward=exact.reward + random_q(world, 1))
    kind: Literal["history", "markov"] = "history" if form == "history" else "markov"
    assert probability @ _terms(broken, policy, episodes, ratio, kind) == pytest.approx(world.value(policy), abs=EXACT)


def test_the_forms_are_those_of_the_two_models(tiny: World) -> None:
    """History: DR with products of ratios; Markov: state ratio times ratio; both with the values of the other fold."""
    episodes, policy = tiny.simulate(40, 0), random_policy(tiny, 3)
    ratio = ratio_of(policy, episodes)
    found = {form: drl(episodes, ratio, policy, form=form, folds=2).numerator[:, 0] for form in ("history", "markov")}
    for held in (np.arange(40) % 2 == 0, np.arange(40) % 2 == 1):
        model = TabularModel.fit(episodes.take(~held), tiny.n_states)
        assert model is not None
        mine, rows = episodes.take(held), held[episodes.episode_of_row]
        q, v, next_v = values(policy, model.q_values(policy), mine)
        assert found["history"][held] == pytest.approx(dr(mine, ratio[rows], q, v).numerator[:, 0], abs=EXACT)
        weight = state_weights(model, policy, mine, ratio[rows], 20.0)
        assert found["markov"][held] == pytest.approx(pseudo_outcomes(mine, weight, q, v, next_v), abs=EXACT)


def efficiency_bounds(world: World, policy: np.ndarray) -> dict[str, float]:
    """Variance of the influence function of one episode in each model, by enumeration."""
    episodes, probability = world.enumerate(3)
    ratio, arrays = ratio_of(policy, episodes), values(policy, world.q_values(policy), episodes)
    history = dr(episodes, ratio, *arrays[:2]).numerator[:, 0]
    markov = pseudo_outcomes(episodes, state_weights(world.model(), policy, episodes, ratio), *arrays)
    return {
        form: float(probability @ np.square(x - world.value(policy)))
        for form, x in (("history", history), ("markov", markov))
    }


def test_intervals_from_the_terms_cover_and_are_as_short_as_any_can_be() -> None:
    """200 logs of 300 episodes: coverage of the 95% interval, and the variance against the bound of each model."""
    world = random_world(2, 2, 3, 1.0, seed=8)
    policy = random_policy(world, 3)
    bounds = efficiency_bounds(world, policy)
    assert bounds["markov"] < 0.97 * bounds["history"]
    logs = [world.simulate(300, seed) for seed in range(200)]
    for form in ("history", "markov"):
        found = [drl(log, ratio_of(policy, log), policy, form=form, folds=2) for log in logs]
        estimates = np.array([terms.estimate() for terms in found])
        errors = np.array([terms.influence().std() / np.sqrt(300) for terms in found])
        covered = int((np.abs(estimates - world.value(policy)) < 1.96 * errors).sum())
        assert covered >= stats.binom.ppf(0.001, 200, 0.95)
        assert 300 * estimates.var() == pytest.approx(bounds[form], rel=0.25)
        assert abs(estimates.mean() - world.value(policy)) < 4 * estimates.std() / np.sqrt(200)


def test_a_truncated_log_is_valued_past_its_end() -> None:
    """Both forms on recordings of 4 steps of a process that goes on: the value of going on, not of the recording."""
    world = circling_world(0.9)
    policy = random_policy(world, 1)
    whole = world.simulate(4000, 0)
    cut = whole.step < 4
    names = ("observation", "action", "mask", "reward", "action_prob", "terminated")
    length = np.minimum(whole.length, 4)
    last = np.zeros(int(cut.sum()), bool)
    last[length.cumsum() - 1] = True
    episodes = dataclasses.replace(
        whole,
        final_observation=whole.next_observation[cut][last],
        **{name: getattr(whole, name)[cut] for name in names},
        offsets=np.append(0, length.cumsum()),
        truncated=last & ~whole.terminated[cut],
    )
    assert episodes.truncated.sum() > 500
    ratio = ratio_of(policy, episodes)
    for terms in (
        drl(episodes, ratio, policy, form="history"),
        drl(episodes, ratio, policy, form="markov"),
        tabular_dm(episodes, policy),
    ):
        error = terms.influence().std() / np.sqrt(4000)
        assert error < 0.05 and abs(terms.estimate() - world.value(policy)) < 4 * error


def test_step_and_state_as_one_category() -> None:
    episodes, _ = recorded_paths(circling_world(1.0), 2)
    coded = with_step(episodes, 3)
    state, next_state = states_of(episodes)
    assert (coded.observation[:, 0] == 3 * episodes.step + state).all()
    ahead = ~episodes.terminated
    assert (states_of(coded)[1][ahead] == (3 * (episodes.step + 1) + next_state)[ahead]).all()
    assert coded.features[0].categories == 9 and states_of(coded)[1].max() < 9


def test_with_the_step_in_the_state_a_changing_process_is_estimated() -> None:
    """Positions alone are no Markov state of a layered world. With the step they are, and the Markov form is right."""
    world = positions_only(random_world(2, 2, 3, 1.0, seed=1), 2)
    episodes = world.simulate(4000, 3)
    coded = with_step(episodes, 2)
    layered = random_policy(world, 5)
    policy = np.concatenate([layered[:6], np.full((2, 2), 0.5)])
    terms = drl(coded, ratios(coded, policy[states_of(coded)[0]]), policy, form="markov")
    assert abs(terms.estimate() - world.value(layered)) < 4 * terms.influence().std() / np.sqrt(4000)


# --- identities ----------------------------------------------------------------------------------------------------------


def every_estimator(world: World, policy: np.ndarray, episodes: Episodes, fitted_on: Episodes) -> dict[str, Terms]:
    ratio, states = ratio_of(policy, episodes), world.n_states
    model = TabularModel.fit(fitted_on, states)
    assert model is not None
    omega, mass = step_ratios(fitted_on, ratio_of(policy, fitted_on), states)
    by_state, by_pair = state_weights(model, policy, episodes, ratio), state_action_weights(model, policy, episodes)
    by_step, visits = step_weights(omega, episodes, ratio), float(model.occupancy(policy).sum())
    return {
        "MIS by state": mis(episodes, by_state),
        "MIS by state and action": mis(episodes, by_pair),
        "MIS by step": mis(episodes, by_step),
        "WMIS by state": wmis(episodes, by_state, visits),
        "WMIS by step": wmis(episodes, by_step, mass),
        "DRL, history": drl(episodes, ratio, policy, form="history", folds=2),
        "DRL, Markov": drl(episodes, ratio, policy, form="markov", folds=2),
        "DM": tabular_dm(episodes, policy),
    }


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_on_policy_importance_sampling_is_the_mean_return(seed: int) -> None:
    """And the direct method is, where the policy is the empirical behavior. Ratios from the same episodes, gamma 1."""
    world = random_world(2, 2, 3, 1.0, seed=seed)
    episodes = world.simulate(25, seed)
    model = TabularModel.fit(episodes, world.n_states)
    assert model is not None
    found = every_estimator(world, world.behavior, episodes, episodes)
    ones = np.ones(episodes.n_rows)
    assert found["MIS by step"].estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT)
    assert found["WMIS by step"].estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT)
    weight = state_weights(model, model.behavior, episodes, ones)
    assert weight == pytest.approx(ones, abs=EXACT)
    mass = float(model.occupancy(model.behavior).sum())
    assert wmis(episodes, weight, mass).estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT)
    assert tabular_dm(episodes, model.behavior).estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT)


@given(st.integers(0, 10_000), st.floats(0.1, 50.0))
@settings(max_examples=15)
def test_values_scale_with_rewards(seed: int, scale: float) -> None:
    world = random_world(2, 2, 3, 0.9, seed=seed)
    episodes, policy = world.simulate(25, seed), random_policy(world, 2)
    scaled = dataclasses.replace(episodes, reward=scale * episodes.reward)
    before = every_estimator(world, policy, episodes, episodes)
    after = every_estimator(world, policy, scaled, scaled)
    for name in before:
        assert after[name].estimate() == pytest.approx(scale * before[name].estimate(), rel=1e-9, abs=1e-9), name


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_the_order_of_episodes_and_what_lies_past_their_end_never_matter(seed: int) -> None:
    world = random_world(2, 2, 3, 0.9, seed=3)
    episodes, policy = world.simulate(20, seed), random_policy(world, 2)
    order = np.random.default_rng(seed).permutation(20)
    rows = np.concatenate([np.flatnonzero(episodes.episode_of_row == i) for i in order])
    names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    shuffled = dataclasses.replace(
        episodes,
        episode_id=episodes.episode_id[order],
        final_observation=np.where(np.arange(20)[:, None] % 2 == 0, np.nan, 99.0).astype(np.float32),
        **{name: getattr(episodes, name)[rows] for name in names},
        offsets=np.append(0, episodes.length[order].cumsum()),
    )
    before = every_estimator(world, policy, episodes, episodes)
    after = every_estimator(world, policy, shuffled, shuffled)
    for name in before:
        assert after[name].estimate() == pytest.approx(before[name].estimate(), abs=EXACT), name
