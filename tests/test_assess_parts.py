"""Parts of `offrl evaluate`: folds, pooled entities, every check that keeps an answer back, and what overflows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offrl_models import course, storage
from offrl_models.assess import _found, answer, checks, options, target, values
from offrl_models.assess.units import MOST_UNITS, units_of
from offrl_models.choices import Probabilities
from offrl_models.ope.behavior import estimate_propensities
from offrl_models.ope.diagnostics import gamma_star
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval, bootstrap, confidence_sequence_width
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import completed
from offrl_models.ope.units import pooled
from offrl_models.ope.worlds import bandit
from offrl_models.schema import Episodes
from tests.conftest import chain_world, cut_after_one_step
from tests.test_assess import FEW_STEPS, better

SETTLED = answer.Gain("DR", 0.2, 0.1, 0.3, 0.95, 0.01)

# Parts


def test_values_come_from_the_other_fold(tmp_path: Path) -> None:
    """Rewards of one fold are shifted: it is the other fold's values that rise."""
    world = chain_world()
    episodes = world.simulate(600, 1)
    table = better(world)
    probs = table[episodes.observation[:, 0].astype(int)]
    choices = Probabilities(episodes, probs)
    known = target.Target({}, choices.taken, choices, None)
    first = values.first_fold(episodes)[episodes.episode_of_row]
    shifted = Episodes(**{**vars_of(episodes), "reward": episodes.reward + first})
    before, after = (values.tabular_values(e, known, known.ratio(e), world.n_states) for e in (episodes, shifted))
    assert before is not None and after is not None
    np.testing.assert_allclose(after.v[first], before.v[first])
    assert (after.v[~first] > before.v[~first] + 0.5).all()
    assert 0.4 < first.mean() < 0.6


def vars_of(episodes: Episodes) -> dict[str, Any]:
    names = ("episode_id", "offsets", "observation", "final_observation", "action", "mask", "reward", "terminated")
    return {name: getattr(episodes, name) for name in (*names, "truncated", "action_prob", "gamma")}


def test_an_entity_is_in_one_fold(tmp_path: Path) -> None:
    episodes = chain_world().simulate(400, 1)
    shared = Episodes(**vars_of(episodes), entity=np.arange(400) // 4)
    fold = values.first_fold(shared).reshape(100, 4)
    assert (fold == fold[:, :1]).all()


def test_pooling_keeps_the_estimate_and_counts_entities_once() -> None:
    """Four copies of every episode under one entity are as much evidence as one."""
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(size=(300, 2)), rng.uniform(0.5, 2, size=(300, 2))
    entity, shares = np.repeat(np.arange(300), 4), bootstrap_shares(300, 200, 0)
    for once in (Terms(top, bottom), Terms(top)):
        copied = Terms(np.repeat(top, 4, 0), None if once.denominator is None else np.repeat(bottom, 4, 0))
        merged = pooled(copied, entity)
        assert merged.estimate() == pytest.approx(once.estimate(), abs=1e-12)
        mine, plain = bootstrap(merged, shares, 0.95), bootstrap(once, shares, 0.95)
        assert (mine.low, mine.high) == pytest.approx((plain.low, plain.high), rel=1e-5)
    uneven = Terms(top)
    assert pooled(uneven, np.arange(300) // 7).estimate() == pytest.approx(top.mean(0).sum(), abs=1e-12)
    order = rng.permutation(300)
    for each in (uneven, Terms(top, bottom), Terms(top, bottom, weighted=True)):
        alone = pooled(each, order)  # unit `order[i]` is episode i
        assert alone.numerator[order] == pytest.approx(each.numerator, abs=1e-12)
        assert alone.estimate() == pytest.approx(each.estimate(), abs=1e-12)


def test_propensities_are_fitted_again_on_the_units_that_are_weighed() -> None:
    """In one context the fitted weights average 1 exactly: IPW and SNIPW agree in every sample, whatever order units are in."""
    log = bandit(1, 3, 1, seed=0).simulate(400, 4)
    log = Episodes(**{**vars_of(log), "observation": np.zeros((400, 1)), "reward": log.reward + 1.0})
    estimated = Episodes(**{**vars_of(log), "action_prob": estimate_propensities(log, 1)})
    ratio = np.array([0.6, 0.3, 0.1])[log.action] / estimated.action_prob
    unit = units_of(estimated, 1)
    assert (unit != np.arange(400)).any()
    found = answer.refitted_intervals(estimated, ratio, None, 1, bootstrap_shares(400, 100, 0), unit)
    given = answer.intervals(answer.every_terms(estimated, ratio, None), bootstrap_shares(400, 100, 0), unit)
    assert (found["IPW"].low, found["IPW"].high) == pytest.approx((found["SNIPW"].low, found["SNIPW"].high), abs=1e-9)
    assert given["IPW"].high - given["IPW"].low > 1.1 * (found["IPW"].high - found["IPW"].low)


def test_where_the_state_is_not_markov_nothing_is_marginalised() -> None:
    """Rewards that come a step late: what the state and the action tell of them, the past tells better."""
    world = chain_world()
    log = world.simulate(4000, 1)
    table = better(world)
    shifted = np.append(0.0, log.reward[:-1])
    shifted[log.offsets[:-1]] = 0.0
    for reward, markov in ((log.reward, True), (shifted, False)):
        episodes = Episodes(**{**vars_of(log), "reward": reward})
        probs = table[episodes.observation[:, 0].astype(int)]
        choices = Probabilities(episodes, probs)
        known = target.Target({}, choices.taken, choices, None)
        ratio = known.ratio(episodes)
        found = values.tabular_values(episodes, known, ratio, world.n_states)
        assert found is not None and found.markov_z is not None and (found.markov_z < 4) is markov
        terms = answer.every_terms(episodes, ratio, found)
        assert answer.headline(terms) == ("MDR" if markov else "WDR")
        said = {check.name for check in checks.checks(episodes, known, ratio, found, SETTLED, 0.1)}
        assert ("effective transitions" in said, "effective episodes" in said) == (markov, not markov)


def test_hidden_confounding_is_asked_of_what_was_cut_off_as_well() -> None:
    """Recordings that stop after a step: what comes later counts on both sides."""
    world = chain_world()
    cut = cut_after_one_step(world.simulate(3000, 2))
    table = better(world)
    probs = table[cut.observation[:, 0].astype(int)]
    choices = Probabilities(cut, probs)
    known = target.Target({}, choices.taken, choices, None)
    ratio = known.ratio(cut)
    found = values.tabular_values(cut, known, ratio, world.n_states)
    assert found is not None
    told = _found(cut, known, ratio, found, "logged", world.n_states, FEW_STEPS)
    logged, whole = told["logged"].estimate, completed(cut, found.next_v)
    assert told["weights"]["gamma_star"] == pytest.approx(gamma_star(whole, ratio, logged))
    assert told["weights"]["gamma_star"] != pytest.approx(gamma_star(cut, ratio, logged), rel=0.01)


def test_more_episodes_than_are_resampled_are_pooled_evenly() -> None:
    episodes = bandit(3, 2, 1, 0).simulate(2 * MOST_UNITS + 10, 0)
    count = np.bincount(units_of(episodes, 0))
    assert len(count) == MOST_UNITS and set(count) == {2, 3}


def test_a_check_that_fails_keeps_better_back() -> None:
    gain = SETTLED
    holds = answer.Check("episodes", True, 900, "at least 500", "", False)
    fails = answer.Check("episodes", False, 90, "at least 500", "90 episodes are fewer than 500", False)
    grave = answer.Check("mean ratio", False, 9, "under 4", "the ratio is wrong", True)
    assert answer.answer(gain, [holds])[0] == "better"
    word, said = answer.answer(gain, [holds, fails])
    assert word == "unsettled" and "90 episodes are fewer than 500" in said
    assert answer.answer(gain, [fails, grave])[0] == "unusable"
    down = answer.Gain("DR", -0.2, -0.3, -0.1, 0.95, 0.01)
    assert answer.answer(down, [holds])[0] == "worse"
    word, said = answer.answer(down, [holds, fails])  # too little shows no harm either
    assert word == "unsettled" and "90 episodes are fewer than 500" in said
    nothing = answer.Gain("DR", math.nan, math.nan, math.nan, 0.95, math.nan)
    assert answer.answer(nothing, [holds])[0] == "unsettled"


def failing(episodes: Episodes, ratio: np.ndarray) -> set[str]:
    """The checks of the self-normalised difference that fail."""
    known, returns = target.Target({}, ratio * episodes.action_prob, None, None), Terms(episodes.return_[:, None])
    terms = answer.every_terms(episodes, ratio, None)["SNIPW"]
    gain = answer.gain("SNIPW", terms, returns, units_of(episodes, 0), 0.05)
    said = checks.checks(episodes, known, ratio, None, gain, answer.influence(terms, returns))
    assert all(check.sentence for check in said if not check.holds)
    return {check.name for check in said if not check.holds}


def test_each_check_fails_where_it_should() -> None:
    episodes = bandit(6, 3, 2, 1).simulate(2000, 0)
    ones = np.ones(2000)
    assert failing(episodes, ones) == set()
    assert failing(episodes.take(np.arange(2000) < 400), ones[:400]) == {"episodes", "effective episodes"}
    assert failing(episodes, 1.2 * ones) == {"mean ratio"}
    few = np.where(np.arange(2000) % 40 == 0, 40.0, 0.0)  # 50 episodes carry all of the weight, and its mean is 1
    assert "effective episodes" in failing(episodes, few)
    worse = 1.0 - 199 / 1999 - 0.1 * (episodes.reward - episodes.reward.mean())
    one = np.where(np.arange(2000) == int(episodes.reward.argmax()), 200.0, worse)
    assert {"largest share", "influence"} <= failing(episodes, one)


def test_the_direct_method_may_not_contradict_what_is_settled() -> None:
    direct = Interval(0.4, 0.3, 0.5, 0.95, "")
    up, down = answer.Gain("DR", 0.2, 0.1, 0.3, 0.95, 0.0), answer.Gain("DR", -0.2, -0.3, -0.1, 0.95, 0.0)
    open_ = answer.Gain("DR", 0.0, -0.1, 0.1, 0.95, 0.0)
    held = [checks.direct_check(direct, logged, gain).holds for gain in (up, down, open_) for logged in (0.3, 0.5)]
    assert held == [True, False, False, True, True, True]


def test_a_settled_gain_has_to_show_in_the_newer_half() -> None:
    rng, n = np.random.default_rng(0), 2000
    base, unit, order = Terms(rng.normal(size=(n, 1))), np.arange(n), rng.permutation(n)
    cases = ((0.2, 0.2, True), (0.4, 0.0, False), (0.4, 0.085, False), (0.0, 0.4, True), (-0.4, -0.1, True))
    for older, newer, holds in cases:
        gained = np.empty(n)
        gained[order[: n // 2]], gained[order[n // 2 :]] = older, newer
        noise = np.empty(n)
        noise[order] = np.tile([0.5, -0.5, -0.5, 0.5], n // 4)  # of mean 0 in either half
        better = Terms(base.numerator + (gained + noise)[:, None])
        gain = answer.gain("DR", better, base, unit, 0.05)
        found = checks.newer_check(better, base, unit, order, gain)
        assert found.holds is holds and bool(found.sentence) is not holds, (older, newer)
        mine = (better.numerator - base.numerator)[:, 0]
        width = confidence_sequence_width(n, alpha=0.05, planned=n) * np.sqrt(n)
        assert found.value == pytest.approx(course.kept(mine, order, alpha=0.05, width=width).lower_bound)
        pairs = checks.newer_check(better, base, unit // 2, order, gain)  # two episodes of each entity
        assert pairs.holds is holds and pairs.value != found.value


def test_a_state_that_is_only_ever_reached_is_worth_the_mean_return() -> None:
    """All recordings stop on reaching state 1, in which no decision was logged."""
    n = 400
    rng = np.random.default_rng(0)
    episodes = Episodes(
        episode_id=np.arange(n), offsets=np.arange(n + 1), observation=np.zeros((n, 1), np.float32),
        final_observation=np.ones((n, 1), np.float32), action=rng.integers(0, 2, n), mask=np.ones((n, 2), bool),
        reward=rng.normal(size=n), terminated=np.zeros(n, bool), truncated=np.ones(n, bool), action_prob=np.full(n, 0.5),
        gamma=0.9,
    )  # fmt: skip
    known = target.Target({}, np.full(n, 0.5), Probabilities(episodes, np.full((n, 2), 0.5)), None)
    found = values.tabular_values(episodes, known, np.ones(n), 2)
    assert found is not None
    first = values.first_fold(episodes)
    assert found.next_v[first] == pytest.approx(np.full(first.sum(), episodes.return_[~first].mean()))


def test_weights_that_overflow_are_said_to() -> None:
    world = chain_world()
    episodes = world.simulate(50, 0)
    ratio = np.full(episodes.n_rows, 1e200)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = answer.every_terms(episodes, ratio, None)
        assert answer.tail(episodes, ratio, 0.0)["overflow"] > 0
        unit = units_of(episodes, 0)
        returns = Terms(episodes.return_[:, None])
        found = answer.intervals({"": returns, **terms}, bootstrap_shares(50, 100, 0), unit)
        gain = answer.gain("WPDIS", terms["WPDIS"], returns, unit, 0.05)
    assert math.isnan(found["TIS"].estimate) and math.isnan(gain.estimate)
    assert storage.plain({"TIS": found["TIS"]})["TIS"]["low"] is None
    assert found[""].estimate == pytest.approx(episodes.return_.mean())


def test_the_upper_end_of_weights_alone_is_not_said_to_hold() -> None:
    said = {}
    for name in ("WPDIS", "WDR"):
        found = answer.Gain(name, 0.1, -0.1, 0.3, 0.95, 0.01)
        said[name] = answer.ends(found)
        assert said[name] in answer.answer(found, [])[1]
    assert said == {
        "WPDIS": "the lower end at 95% confidence and the upper end at less",
        "WDR": "each end at 95% confidence",
    }


def test_columns_as_options_write_them() -> None:
    one = {"age": {}, "ward:12": {"categories": 12}, "sex:f|m|x": {"categories": ["f", "m", "x"]}, "v[3]": {"size": 3}}
    for text, means in one.items():
        name = text.split(":")[0].split("[")[0]
        assert options._column(text) == {"column": name, **means}
