"""Clipped, forgetful, doubly robust and multi-step estimators: their limits, what never matters to them, and refusals."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.ope import mrdr
from offrl_models.ope.doubly_robust import Model, dr, dros, magic, partial_returns, switch_dr, wdr
from offrl_models.ope.estimates import all_terms
from offrl_models.ope.importance import Terms, clipped, pdis, tis, wis, wpdis
from offrl_models.ope.multistep import corrected_returns, fixed_point, traces
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import World, random_policy
from offrl_models.schema import Episodes, InputError
from tests.conftest import cut_after_one_step
from tests.modelled_logs import (
    EXACT,
    INF,
    KINDS,
    WORLDS,
    Log,
    corrected_by_hand,
    each_world,
    on_rows,
    paths,
    policy_ratios,
    random_log,
)


def families(
    episodes: Episodes, ratio: np.ndarray, q: np.ndarray, v: np.ndarray, blend: np.ndarray | None = None
) -> dict[str, Terms]:
    """Every estimator of this file with some parameters."""
    blend = np.array([0.2, 0.5, 0.3]) if blend is None else blend
    found = {
        "TIS clipped": tis(episodes, ratio, clip=1.5),
        "WIS clipped": wis(episodes, ratio, clip=1.5),
        "PDIS clipped": pdis(episodes, ratio, clip=1.5),
        "WPDIS clipped": wpdis(episodes, ratio, clip=1.5),
        "TIS, every ratio clipped": tis(episodes, clipped(ratio, 1.5)),
        "PDIS, memory 2": pdis(episodes, ratio, memory=2),
        "WPDIS, memory 2": wpdis(episodes, ratio, memory=2),
        "Switch-DR": switch_dr(episodes, ratio, q, v, 1.5),
        "DRos": dros(episodes, ratio, q, v, 2.0),
        "blend": partial_returns(episodes, ratio, q, v, [0, 1, INF], blend),
    }
    return found | {kind: corrected_returns(episodes, ratio, q, v, kind, 0.7) for kind in KINDS}


def unclipped(episodes: Episodes, ratio: np.ndarray, q: np.ndarray, v: np.ndarray) -> dict[str, Terms]:
    """The estimators of reports, each on its own and all at once."""
    found = {f"{estimator.__name__} alone": estimator(episodes, ratio) for estimator in (tis, pdis, wis, wpdis)}
    found |= {f"{estimator.__name__} alone": estimator(episodes, ratio, q, v) for estimator in (dr, wdr)}
    return found | all_terms(episodes, ratio, Model.of(episodes, q, v))


def fitted(log: Log) -> dict[str, Terms]:
    """The two that look at the whole log before they weigh an episode."""
    basis, fold = mrdr.Basis.of_states(states_of(log.episodes)[0], 5), np.arange(log.episodes.n_episodes) % 2
    more_robust = mrdr.mrdr(log.episodes, log.ratio, log.probs, log.behavior, basis, fold, ridge=1e-3)
    return {"MRDR": more_robust, "MAGIC": magic(*log.given, [0, 1, 2, INF], bootstrap_shares(7, 30, 0))}


# --- limits --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_limits(seed: int) -> None:
    log = random_log(seed)
    episodes, ratio, q, v = log.given
    one, model = np.ones(1), v[episodes.offsets[:-1]].mean()
    pairs = [
        (pdis(episodes, ratio, memory=5), pdis(episodes, ratio)),
        (wpdis(episodes, ratio, memory=99), wpdis(episodes, ratio)),
        (pdis(episodes, ratio, memory=0), tis(episodes, np.ones_like(ratio))),
        (tis(episodes, ratio, clip=1e9), tis(episodes, ratio)),
        (wis(episodes, ratio, clip=1e9), wis(episodes, ratio)),
        (wis(episodes, ratio, clip=1e-9), tis(episodes, np.ones_like(ratio))),
        (pdis(episodes, clipped(ratio, 1e9), clip=1e9), pdis(episodes, ratio)),
        (switch_dr(*log.given, INF), dr(*log.given)),
        (dros(*log.given, INF), dr(*log.given)),
        (partial_returns(*log.given, [INF], one), wdr(*log.given)),
        (partial_returns(*log.given, [5], one), wdr(*log.given)),
        (switch_dr(episodes, ratio, 0 * q, 0 * v, INF), pdis(episodes, ratio)),
    ]
    for found, same in pairs:
        assert found.estimate() == pytest.approx(same.estimate(), rel=1e-7, abs=EXACT)
    for alone in (switch_dr(*log.given, 0.0), dros(*log.given, 0.0), partial_returns(*log.given, [0], one)):
        assert alone.estimate() == pytest.approx(model, abs=EXACT)
    below = np.minimum(ratio, 1.0)
    retrace = corrected_returns(episodes, below, q, v, "retrace", 1.0)
    assert retrace.numerator == pytest.approx(dr(episodes, below, q, v).numerator, abs=EXACT)
    first = [corrected_returns(episodes, ratio, q, v, kind, 0.0).estimate() for kind in KINDS]
    assert first == pytest.approx([corrected_by_hand(log, lambda past: past[0] * (len(past) == 1))] * 3)


@given(st.integers(0, 10_000))
def test_on_policy_and_without_a_model_they_are_the_mean_return(seed: int) -> None:
    log = random_log(seed)
    episodes, ratio, nothing = log.episodes, np.ones_like(log.ratio), np.zeros_like(log.q)
    found = families(episodes, ratio, nothing, nothing, np.array([0.0, 0.0, 1.0]))
    for name in ("DRos", "tree_backup", "retrace", "q_pi"):  # these cut even where the policies agree
        del found[name]
    found["retrace"] = corrected_returns(episodes, ratio, nothing, nothing, "retrace", 1.0)
    found["q_pi"] = corrected_returns(episodes, ratio, nothing, nothing, "q_pi", 1.0)
    found["MAGIC"] = magic(episodes, ratio, nothing, nothing, [INF], bootstrap_shares(7, 20, 0))
    for name, terms in found.items():
        assert terms.estimate() == pytest.approx(episodes.return_.mean(), abs=EXACT), name
    assert found["retrace"].numerator[:, 0] == pytest.approx(episodes.return_)  # Monte Carlo, episode by episode


@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_clipped_and_self_normalised_estimates_lie_inside_the_observed_returns(seed: int, clip: float) -> None:
    log = random_log(seed)
    episodes, ratio = log.episodes, log.ratio
    found = wis(episodes, ratio, clip=clip).estimate()
    assert episodes.return_.min() - EXACT <= found <= episodes.return_.max() + EXACT


@each_world
def test_a_higher_clip_never_loses_value_where_rewards_are_not_negative(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    gains = dataclasses.replace(episodes, reward=np.abs(episodes.reward))
    ratio = policy_ratios(policy, episodes)
    for estimator in (tis, pdis):
        found = [estimator(gains, ratio, clip=clip).estimate(probability) for clip in (0.5, 1.0, 2.0, 4.0, 1e6)]
        assert found == sorted(found) and found[0] < found[-1]
        assert found[-1] == pytest.approx(pdis(gains, ratio).estimate(probability), abs=EXACT)


# --- identities ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.1, 50.0))
def test_values_scale_with_rewards(seed: int, scale: float) -> None:
    episodes, ratio, q, v = random_log(seed).given
    scaled = dataclasses.replace(episodes, reward=scale * episodes.reward)
    shares = bootstrap_shares(7, 30, seed)
    before, after = families(episodes, ratio, q, v), families(scaled, ratio, scale * q, scale * v)
    before["MAGIC"] = magic(episodes, ratio, q, v, [0, 1, INF], shares)
    after["MAGIC"] = magic(scaled, ratio, scale * q, scale * v, [0, 1, INF], shares)
    for name in before:
        assert after[name].estimate() == pytest.approx(scale * before[name].estimate(), rel=1e-6, abs=1e-7), name


@given(st.integers(0, 10_000))
def test_the_order_of_episodes_never_matters(seed: int) -> None:
    log = random_log(seed)
    order = np.random.default_rng(seed).permutation(7)
    rows = np.concatenate([np.array(paths(log)[i]) for i in order])
    names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob", "interval")
    shuffled = dataclasses.replace(
        log.episodes,
        **{name: getattr(log.episodes, name)[rows] for name in names},
        offsets=np.append(0, log.episodes.length[order].cumsum()),
    )
    arrays, shares = (log.ratio, log.q, log.v), bootstrap_shares(7, 30, seed)
    ratio, q, v = (x[rows] for x in arrays)
    before, after = families(log.episodes, *arrays), families(shuffled, ratio, q, v)
    before["MAGIC"] = magic(*log.given, [0, 2, INF], shares)
    after["MAGIC"] = magic(shuffled, ratio, q, v, [0, 2, INF], shares[:, order])
    for name in before:
        assert after[name].estimate() == pytest.approx(before[name].estimate(), rel=1e-7, abs=1e-7), name


@given(st.integers(0, 10_000))
def test_mrdr_does_not_depend_on_the_order_of_episodes(seed: int) -> None:
    log = random_log(seed)
    order, fold = np.random.default_rng(seed).permutation(7), np.arange(7) % 2
    shuffled, rows = log.episodes.take(order), np.concatenate([np.array(paths(log)[i]) for i in order])
    basis, moved = (mrdr.Basis.of_states(states_of(e)[0], 4) for e in (log.episodes, shuffled))
    before = mrdr.mrdr(log.episodes, log.ratio, log.probs, log.behavior, basis, fold, ridge=1e-3)
    ratio, probs, behavior = (each[rows] for each in (log.ratio, log.probs, log.behavior))
    after = mrdr.mrdr(shuffled, ratio, probs, behavior, moved, fold[order], ridge=1e-3)
    assert after.numerator[:, 0] == pytest.approx(before.numerator[order, 0], rel=1e-6, abs=1e-7)


@given(st.integers(0, 10_000))
def test_what_lies_past_the_end_of_an_episode_never_matters(seed: int) -> None:
    """A longer episode that counts nothing gives every other one more columns, and junk beside its last row."""
    log, junk = random_log(seed), random_log(seed + 1)
    rows, extra = log.episodes.n_rows, junk.episodes.n_rows
    names = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob", "interval")
    first, second = (log, junk) if seed % 2 else (junk, log)
    both = {name: np.concatenate([getattr(x.episodes, name) for x in (first, second)]) for name in names}
    junk_row = np.repeat([first is junk, second is junk], [first.episodes.n_rows, second.episodes.n_rows])
    both["reward"] = np.where(junk_row, 1e6, both["reward"])
    length = [extra] * (first is junk) + log.episodes.length.tolist() + [extra] * (second is junk)
    longer = dataclasses.replace(
        log.episodes,
        **both,
        episode_id=np.arange(8),
        final_observation=np.zeros((8, 1), np.float32),
        offsets=np.append(0, np.cumsum(length)),
    )
    share = np.full(8, 1 / 7)
    share[0 if first is junk else 7] = 0.0
    ratio, q, v = (np.concatenate([getattr(x, name) for x in (first, second)]) for name in ("ratio", "q", "v"))
    before = families(*log.given) | unclipped(*log.given)
    after = families(longer, ratio, q, v) | unclipped(longer, ratio, q, v)
    assert rows + extra == longer.n_rows
    for name in before:
        assert after[name].estimate(share) == pytest.approx(before[name].estimate(), abs=1e-7), name


@given(st.integers(0, 10_000))
def test_steps_in_a_state_that_nothing_leaves_never_matter(seed: int) -> None:
    """One episode goes on where nothing is paid and the policies agree: the others have more columns past their end."""
    log, rng = random_log(seed), np.random.default_rng(seed)
    more, place, evenly = int(rng.integers(1, 9)), int(rng.integers(7)), 1 / 3
    end = int(log.episodes.offsets[place + 1])  # where the steps are put in
    added = {
        "observation": 4.0,
        "action": rng.integers(0, 3, more),
        "mask": True,
        "reward": 0.0,
        "terminated": np.arange(more) == more - 1,
        "truncated": False,
        "action_prob": evenly,
        "interval": rng.uniform(0.2, 2.0, more),
    }
    columns = {name: np.insert(getattr(log.episodes, name), [end] * more, each, 0) for name, each in added.items()}
    columns["terminated"][end - 1] = False
    offsets = log.episodes.offsets + more * (np.arange(8) > place)
    beyond = {"ratio": 1.0, "q": 0.0, "v": 0.0, "probs": evenly, "behavior": evenly}
    longer = Log(
        dataclasses.replace(log.episodes, **columns, offsets=offsets),
        **{name: np.insert(getattr(log, name), [end] * more, each, 0) for name, each in beyond.items()},
    )
    before, after = (families(*each.given) | unclipped(*each.given) | fitted(each) for each in (log, longer))
    for name in before:
        assert after[name].estimate() == pytest.approx(before[name].estimate(), rel=1e-6, abs=1e-7), name


def test_a_truncated_episode_is_completed_by_the_value_model() -> None:
    """Cut after the first step and with the true values, corrections still sum to the exact value."""
    world = WORLDS[0]
    whole, probability = world.enumerate(3)
    cut = cut_after_one_step(whole)
    policy = random_policy(world, 5)
    q, ratio = world.q_values(policy), policy_ratios(policy, cut)
    done = completed(cut, (policy * q).sum(1)[states_of(cut)[1]])
    model = on_rows(policy, q, cut)
    for name in ("Switch-DR", "DRos", "blend", "PDIS, memory 2", *KINDS):
        found = families(done, ratio, *model)[name].estimate(probability)
        assert found == pytest.approx(world.value(policy), abs=EXACT), name
    start = np.where(world.terminal[:, None], 0.0, q)  # states that lie past the cut keep their values
    table = fixed_point(cut, ratio, policy, "retrace", 1.0, start, probability)
    assert float(world.initial @ (policy * table).sum(1)) == pytest.approx(world.value(policy), abs=EXACT)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_impossible_parameters_are_refused() -> None:
    log = random_log(0)
    episodes, ratio, q, v = log.given
    continuous = dataclasses.replace(episodes, action=np.zeros((len(q), 1)), mask=np.ones((len(q), 0), bool))
    refused: list[Callable[[], object]] = [
        lambda: tis(episodes, ratio, clip=0.0),
        lambda: wpdis(episodes, ratio, clip=math.nan),
        lambda: clipped(ratio, -1.0),
        lambda: pdis(episodes, ratio, memory=-1),
        lambda: switch_dr(*log.given, -0.1),
        lambda: switch_dr(*log.given, math.nan),
        lambda: dros(*log.given, -0.1),
        lambda: dros(*log.given, math.nan),
        lambda: partial_returns(*log.given, [-1], np.ones(1)),
        lambda: partial_returns(*log.given, [1.5], np.ones(1)),
        lambda: partial_returns(*log.given, [math.nan], np.ones(1)),
        lambda: magic(*random_log(0, episodes=1).given, [0], np.ones((3, 1))),
        lambda: corrected_returns(*log.given, "retrace", 1.1),
        lambda: corrected_returns(*log.given, "q_pi", math.nan),
        lambda: corrected_returns(episodes, ratio, q, np.full_like(v, np.inf), "retrace", 1.0),
        lambda: corrected_returns(episodes, ratio, np.full_like(q, np.nan), v, "retrace", 1.0),
        lambda: switch_dr(episodes, ratio, np.full_like(q, np.nan), v, 1.0),
        lambda: fixed_point(
            dataclasses.replace(episodes, reward=np.full_like(q, np.inf)),
            ratio,
            np.full((4, 3), 1 / 3),
            "retrace",
            1.0,
            np.zeros((4, 3)),
        ),
        lambda: traces(dataclasses.replace(episodes, action_prob=np.full_like(q, np.nan)), ratio, "tree_backup", 1.0),
        lambda: traces(continuous, ratio, "tree_backup", 1.0),  # whose densities depend on the unit of the action
    ]
    assert traces(continuous, ratio, "retrace", 1.0) == pytest.approx(np.minimum(ratio, 1.0))
    for call in refused:
        with pytest.raises(InputError):
            call()
