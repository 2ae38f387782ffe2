"""The legs of the gate: each says what it says by exact enumeration, and none speaks where it cannot be trusted."""

import dataclasses

import numpy as np
import pytest

from offrl_models import legs
from offrl_models.choices import Probabilities
from offrl_models.gate import GateConfig
from offrl_models.measures import Measures
from offrl_models.ope.eprocess import e_value
from offrl_models.ope.intervals import confidence_sequence_lower_bound, confidence_sequence_width
from offrl_models.ope.sequences import ratios
from offrl_models.ope.tabular import states_of
from offrl_models.ope.worlds import World, bandit, random_policy, random_world
from offrl_models.reports.detail import episodes_needed
from offrl_models.schema import Episodes, Feature
from tests.conftest import circling_world, ratio_of, recorded_paths
from tests.hand_made import GOOD

WORLD = bandit(4, 3, 2, seed=1)
POLICY = random_policy(WORLD, 2)


def enumerated() -> tuple[Episodes, np.ndarray, np.ndarray]:
    """Every round of the bandit, its probability, and the state of each."""
    log, probability = WORLD.enumerate(1)
    return log, probability, WORLD.states(log.observation)


def side_of(log: Episodes, state: np.ndarray, seed: int) -> legs.Side:
    """A policy with values that are wrong, but belong to it: v = sum_a pi(a|s) q(s, a)."""
    q = np.random.default_rng(seed).normal(size=POLICY.shape)
    probs = POLICY[state]
    zeros = np.zeros(log.n_rows)
    return legs.Side(
        Probabilities(log, probs),
        Probabilities(log, probs),
        ratios(log, probs),
        q[state, log.action],
        (POLICY * q).sum(1)[state],
        zeros,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_step_is_exact_whatever_the_values(seed: int) -> None:
    log, probability, state = enumerated()
    side = side_of(log, state, seed)
    found = legs.paired(side, side, log, log, None)
    assert isinstance(found, legs.Paired)
    difference = WORLD.value(POLICY) - WORLD.value(WORLD.behavior)
    assert probability @ found.outcome == pytest.approx(difference, abs=1e-12)
    assert np.array_equal(found.weight, side.ratio)


@pytest.mark.parametrize(("fitted", "judged"), [(300, 600), (300, 601)])
def test_nuisances_from_few_episodes_judge_no_more_than_twice_as_many(fitted: int, judged: int) -> None:
    world = circling_world(0.9)
    fitted_on, gate = world.simulate(fitted, 1), world.simulate(judged, 2)
    table = random_policy(world, 3)
    probs, before = (table[world.states(log.observation)] for log in (gate, fitted_on))
    zeros = np.zeros(gate.n_rows)
    side = legs.Side(
        Probabilities(fitted_on, before), Probabilities(gate, probs), ratios(gate, probs), zeros, zeros, zeros
    )
    found = legs.paired(side, side, fitted_on, gate, legs.TabularModel.fit(fitted_on, world.n_states))
    if judged == 600:
        assert isinstance(found, legs.Paired)
    else:
        assert isinstance(found, str) and "300 episodes, and with 601 to judge" in found


def test_the_rise_of_a_cost_is_exact_and_is_discounted() -> None:
    log, probability, state = enumerated()
    cost = np.random.default_rng(0).random(POLICY.shape)
    log = dataclasses.replace(log, costs={"days": cost[state, log.action]})
    side = side_of(log, state, 0)
    leg = legs.paired(side, side, log, log, None)
    assert isinstance(leg, legs.Paired)
    rise = probability @ legs.cost_outcome("days", side, leg, log, log, None)
    contexts = np.bincount(state, probability, len(POLICY))
    assert rise == pytest.approx(contexts @ ((POLICY - WORLD.behavior) * cost).sum(1), abs=1e-12)


def test_the_rise_of_a_cost_over_several_steps() -> None:
    """With the reward itself as the cost, it is the difference that leg A finds, from the same model."""
    world = random_world(3, 2, 3, 0.9, seed=4)
    fitted_on, gate = world.simulate(3000, 1), world.simulate(800, 2)
    fitted_on, gate = (
        dataclasses.replace(log, costs={"paid": log.reward, "twice": 2.0 * log.reward}) for log in (fitted_on, gate)
    )
    table = random_policy(world, 3)
    probs, fitted = (table[world.states(log.observation)] for log in (gate, fitted_on))
    zeros = np.zeros(gate.n_rows)
    side = legs.Side(
        Probabilities(fitted_on, fitted), Probabilities(gate, probs), ratios(gate, probs), zeros, zeros, zeros
    )
    model = legs.TabularModel.fit(fitted_on, world.n_states)
    found = legs.paired(side, side, fitted_on, gate, model)
    assert isinstance(found, legs.Paired)
    rise = legs.cost_outcome("paid", side, found, fitted_on, gate, world.n_states)
    assert rise == pytest.approx(found.outcome, abs=1e-12)
    twice = legs.cost_outcome("twice", side, found, fitted_on, gate, world.n_states)
    assert twice == pytest.approx(2.0 * found.outcome, abs=1e-12)
    difference = world.value(table) - world.value(world.behavior)
    assert abs(found.outcome.mean() - difference) < 4 * found.outcome.std() / np.sqrt(800)


def test_groups_are_bounded_each_by_its_own_episodes() -> None:
    rng = np.random.default_rng(0)
    log = WORLD.simulate(900, 3)
    log = dataclasses.replace(log, labels={"sex": np.where(rng.random(900) < 0.3, "f", "m")})
    outcome = rng.normal(size=900)
    found = legs.by_subgroup(legs.Paired(outcome, np.ones(900), np.zeros(900), ""), log, ("sex",), 0.05, 1000)
    assert [contrast.name for contrast in found] == ["sex f", "sex m"]
    mine = outcome[log.labels["sex"] == "f"]
    lower = confidence_sequence_lower_bound(mine, alpha=0.05, planned=1000)
    assert (found[0].episodes, found[0].difference, found[0].lower_bound) == (len(mine), mine.mean(), lower)
    assert found[0].upper_bound - mine.mean() == pytest.approx(mine.mean() - lower, abs=1e-12)
    assert sum(contrast.episodes for contrast in found) == 900


def test_betting_weighs_whole_episodes() -> None:
    log, _, state = enumerated()
    side = side_of(log, state, 0)
    assert legs.betting(side, log, (0.0, 1.0), -1.0) == e_value(side.ratio, log.return_, (0.0, 1.0), 0.0)


def test_betting_weighs_the_product_of_all_decisions() -> None:
    world = random_world(2, 2, 3, 1.0, seed=1)
    log = world.simulate(50, 0)
    side = exact_side(world, random_policy(world, 1), log)
    weight = np.multiply.reduceat(side.ratio, log.offsets[:-1])
    low, high = float(log.return_.min()), float(log.return_.max())
    assert legs.betting(side, log, (low, high), 0.1) == pytest.approx(e_value(weight, log.return_, (low, high), 0.1))


def exact_side(world: World, policy: np.ndarray, log: Episodes, q: np.ndarray | None = None) -> legs.Side:
    """A policy with its exact values, or those of any q."""
    q = world.q_values(policy) if q is None else q
    state, following = states_of(log)
    v, probs = (policy * q).sum(1), Probabilities(log, policy[state])
    next_v = np.where(log.truncated, v[following], 0.0)
    return legs.Side(probs, probs, ratio_of(policy, log), q[state, log.action], v[state], next_v)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_with_the_values_of_both_policies_leg_a_needs_no_weights(gamma: float) -> None:
    """Over every path of a recording that stops, under weights that are wrong on both sides."""
    world = circling_world(gamma)
    log, probability = recorded_paths(world, 3)
    policy, junk = random_policy(world, 1), np.random.default_rng(0).exponential(size=(2, log.n_rows))
    side, base = exact_side(world, policy, log), exact_side(world, world.behavior, log)
    difference = world.value(policy) - world.value(world.behavior)
    state = states_of(log)[0]
    of_action, of_state = junk[0, 2 * state + log.action], junk[1, state]
    found = probability @ legs._gains(log, side, of_action, base, of_state)
    assert found == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_leg_c_counts_the_value_of_what_a_truncation_cut_off(gamma: float) -> None:
    """Over every path of a recording that stops: values within it may be wrong, the one past its end may not."""
    world = circling_world(gamma)
    log, probability = recorded_paths(world, 3)
    policy, wrong = random_policy(world, 1), np.random.default_rng(0).normal(size=(3, 2))
    side = exact_side(world, policy, log, wrong)
    side = dataclasses.replace(side, next_v=exact_side(world, policy, log).next_v)
    assert probability @ legs.trajectory_outcome(side, log) == pytest.approx(world.value(policy), abs=1e-9)


def test_recordings_of_one_step_that_go_on_are_no_bandit() -> None:
    world = circling_world(0.9)
    fitted_on, gate = (stopped(world.simulate(400, seed), 1) for seed in (1, 2))
    sides = []
    for policy in (random_policy(world, 1), world.behavior):
        side = exact_side(world, policy, gate)
        sides.append(dataclasses.replace(side, fitted=exact_side(world, policy, fitted_on).judged))
    side, base = sides
    found = legs.paired(side, base, fitted_on, gate, legs.TabularModel.fit(fitted_on, world.n_states))
    assert isinstance(found, legs.Paired) and found.method == "marginalised doubly robust paired difference"


@pytest.mark.parametrize("part", ["fitted", "judged"])
def test_a_policy_that_looks_at_more_than_the_state_has_no_tabular_leg(part: str) -> None:
    world = circling_world(0.9)
    logs = world.simulate(300, 1), world.simulate(300, 2)
    fitted, side = (exact_side(world, world.behavior, log) for log in logs)
    side = dataclasses.replace(side, fitted=fitted.judged)
    model = legs.TabularModel.fit(logs[0], world.n_states)
    assert isinstance(legs.paired(side, side, *logs, model), legs.Paired)
    seen = getattr(side, part)
    later = np.where(seen.episodes.step[:, None] > 0, seen.probs[:, ::-1], seen.probs)
    changed = dataclasses.replace(side, **{part: Probabilities(seen.episodes, later)})
    found = legs.paired(changed, side, *logs, model)
    assert isinstance(found, str) and "depends on more than the state" in found


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_influence_is_the_mean_without_those_that_pull_most(sign: float) -> None:
    outcome = sign * np.append(np.full(995, 0.001), [5.0, 4.0, 3.0, 2.0, -9.0])
    assert legs.influence(outcome) == pytest.approx(sign * (994 * 0.001 - 9.0) / 995)


def test_certainty_counts_only_where_there_was_a_choice() -> None:
    log = WORLD.simulate(4, 0)
    mask = np.ones((4, 3), bool)
    mask[0, 1:] = False
    log = dataclasses.replace(log, mask=mask, action_prob=np.array([1.0, 0.9995, 0.5, 0.2]))
    assert legs.sure_share(log) == pytest.approx(1 / 3)


def test_weights_that_do_not_balance_are_no_evidence() -> None:
    """A log of another world than the one that the ratios were fitted on."""
    world, other = (random_world(3, 2, 4, 0.9, seed=seed) for seed in (1, 2))
    table = random_policy(world, 5)
    columns = (Feature("state", world.n_states),)
    fitted_on, gate = (
        dataclasses.replace(log, features=columns) for log in (world.simulate(2000, 1), other.simulate(2000, 2))
    )
    probs, fitted = (table[world.states(log.observation)] for log in (gate, fitted_on))
    zeros = np.zeros(gate.n_rows)
    side = legs.Side(
        Probabilities(fitted_on, fitted), Probabilities(gate, probs), ratios(gate, probs), zeros, zeros, zeros
    )
    found = legs.paired(side, side, fitted_on, gate, None)
    assert isinstance(found, str) and "weights" in found


def stopped(log: Episodes, steps: int) -> Episodes:
    """The log of a recording that stops after so many steps of each episode."""
    kept, length = log.step < steps, np.minimum(log.length, steps)
    last = np.zeros(int(kept.sum()), bool)
    last[length.cumsum() - 1] = True
    names = ("observation", "action", "mask", "reward", "action_prob", "terminated")
    return dataclasses.replace(
        log,
        final_observation=log.next_observation[kept][last],
        **{name: getattr(log, name)[kept] for name in names},
        offsets=np.append(0, length.cumsum()),
        truncated=last & ~log.terminated[kept],
        costs={},
    )


@pytest.mark.parametrize("tabular", [True, False], ids=["tabular", "fitted"])
def test_a_log_that_stops_early_is_compared_by_what_was_cut_off_too(tabular: bool) -> None:
    """Both sides with values that are wrong: the weights alone have to make up for it, in rewards and in costs."""
    world = circling_world(0.9)
    fitted_on, gate = (stopped(world.simulate(6000, seed), 4) for seed in (1, 2))
    assert gate.truncated.sum() > 1000
    columns = (Feature("state", world.n_states),)
    fitted_on, gate = (
        dataclasses.replace(log, features=columns, costs={"paid": log.reward}) for log in (fitted_on, gate)
    )
    table = random_policy(world, 1)
    probs, fitted = (table[world.states(log.observation)] for log in (gate, fitted_on))
    zeros = np.zeros(gate.n_rows)
    side = legs.Side(
        Probabilities(fitted_on, fitted), Probabilities(gate, probs), ratios(gate, probs), zeros, zeros, zeros
    )
    base = legs.Side(
        Probabilities(fitted_on, world.behavior[world.states(fitted_on.observation)]),
        Probabilities(gate, probs),
        zeros + 1,
        zeros,
        zeros,
        zeros,
    )
    model = legs.TabularModel.fit(fitted_on, world.n_states) if tabular else None
    wrong = dataclasses.replace(model, reward=np.ones((3, 2))) if model is not None else None
    found = legs.paired(side, base, fitted_on, gate, wrong)
    assert isinstance(found, legs.Paired)
    difference = world.value(table) - world.value(world.behavior)
    rise = legs.cost_outcome("paid", side, found, fitted_on, gate, world.n_states if tabular else None)
    for outcome in (found.outcome, rise):
        error = outcome.std() / np.sqrt(6000)
        assert error < 0.1 * abs(difference) and abs(outcome.mean() - difference) < 4 * error


def test_a_cost_without_leg_a_is_weighed_by_decisions() -> None:
    world = random_world(3, 2, 3, 0.9, seed=4)
    log, probability = world.enumerate(3)
    log = dataclasses.replace(log, costs={"paid": log.reward})
    table = random_policy(world, 3)
    probs, zeros = table[world.states(log.observation)], np.zeros(log.n_rows)
    side = legs.Side(Probabilities(log, probs), Probabilities(log, probs), ratios(log, probs), zeros, zeros, zeros)
    rise = probability @ legs.cost_outcome("paid", side, "no weights", log, log, world.n_states)
    assert rise == pytest.approx(world.value(table) - world.value(world.behavior), abs=1e-9)


@pytest.mark.parametrize("lower", [-0.01, 0.004])
def test_more_episodes_settle_it_where_the_difference_is_above_the_margin(lower: float) -> None:
    config = GateConfig()
    measures: Measures = dataclasses.replace(GOOD, difference=0.01, lower_bound=lower)
    needed = episodes_needed(measures, config)
    assert needed is not None and (needed > measures.episodes) == (lower < 0)
    spread = (0.01 - lower) / confidence_sequence_width(6000, alpha=0.05, planned=5000)
    for n, settled in ((needed - 1, False), (needed, True)):
        assert (0.01 - spread * confidence_sequence_width(n, alpha=0.05, planned=5000) > 0) is settled
    assert episodes_needed(dataclasses.replace(GOOD, difference=-0.01, lower_bound=-0.02), config) is None
