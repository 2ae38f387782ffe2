"""Clipped, forgetful, doubly robust and multi-step estimators: exact values, limits, and loops written out from the papers."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models.ope import mrdr
from offrl_models.ope.doubly_robust import dr, dros, magic, magic_blend, partial_returns, switch_dr, wdr
from offrl_models.ope.importance import Terms, clipped, pdis, recent_weights, slope, tis, wis, wpdis
from offrl_models.ope.multistep import Trace, corrected_returns, fixed_point, following, traces
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.sequences import completed, ratios
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.ope.worlds import World, random_policy, random_world
from offrl_models.schema import Episodes, InputError

EXACT = 1e-9
INF = math.inf
WORLDS = [
    random_world(2, 2, 3, 0.9, seed=1),
    random_world(2, 3, 3, 1.0, seed=2),
    random_world(3, 2, 2, 0.5, 3, masked=True),
]
KINDS: tuple[Trace, ...] = ("retrace", "tree_backup", "q_pi")
each_world = pytest.mark.parametrize("world", WORLDS, ids=["two-by-two", "three actions", "masked"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def policy_ratios(policy: np.ndarray, episodes: Episodes) -> np.ndarray:
    return ratios(episodes, policy[states_of(episodes)[0]])


def on_rows(policy: np.ndarray, q: np.ndarray, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """q of the logged action and v of every row, from a table."""
    state = states_of(episodes)[0]
    return q[state, episodes.action], (policy * q).sum(1)[state]


def wrong_model(world: World, seed: int = 0) -> np.ndarray:
    q = np.random.default_rng(seed).normal(size=(world.n_states, world.n_actions))
    q[world.terminal] = 0.0
    return q


@dataclasses.dataclass(frozen=True)
class Log:
    """Episodes of no world at all, of 1 to 5 steps that are not equally long, with ratios and a model."""

    episodes: Episodes
    ratio: np.ndarray
    q: np.ndarray
    v: np.ndarray
    probs: np.ndarray
    behavior: np.ndarray

    @property
    def given(self) -> tuple[Episodes, np.ndarray, np.ndarray, np.ndarray]:
        """What estimators take."""
        return self.episodes, self.ratio, self.q, self.v


def random_log(seed: int, episodes: int = 7, gamma: float = 0.8) -> Log:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 6, episodes)
    length[0] = 5
    rows = int(length.sum())
    probs, behavior = rng.dirichlet(np.ones(3), rows), rng.dirichlet(np.full(3, 3.0), rows)
    action = rng.integers(0, 3, rows)
    last = np.zeros(rows, bool)
    last[length.cumsum() - 1] = True
    row = np.arange(rows)
    log = Episodes(
        episode_id=np.arange(episodes),
        offsets=np.append(0, length.cumsum()),
        observation=rng.integers(0, 4, (rows, 1)).astype(np.float32),
        final_observation=np.zeros((episodes, 1), np.float32),
        action=action,
        mask=np.ones((rows, 3), bool),
        reward=rng.normal(size=rows),
        terminated=last,
        truncated=np.zeros(rows, bool),
        action_prob=behavior[row, action],
        gamma=gamma,
        interval=rng.uniform(0.2, 2.0, rows),
    )
    ratio = probs[row, action] / behavior[row, action]
    return Log(log, ratio, rng.normal(size=rows), rng.normal(size=rows), probs, behavior)


def paths(log: Log) -> list[range]:
    """Rows of every episode."""
    return [range(a, b) for a, b in itertools.pairwise(log.episodes.offsets.tolist())]


def corrected_by_hand(log: Log, weight: Callable[[list[float]], float]) -> float:
    """v(s_0) + sum_t gamma^t weight(ratios so far) (r_t + gamma v(s_{t+1}) - q_t), in plain loops."""
    total = 0.0
    for path in paths(log):
        total += log.v[path[0]]
        discount = 1.0
        for t, row in enumerate(path):
            onward = log.episodes.step_discount[row]
            ahead = log.v[row + 1] if t + 1 < len(path) else 0.0
            error = log.episodes.reward[row] + onward * ahead - log.q[row]
            total += discount * weight(log.ratio[path[: t + 1]].tolist()) * error
            discount *= onward
    return total / len(paths(log))


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


# --- known answers -------------------------------------------------------------------------------------------------


def hand() -> Log:
    """Two episodes at gamma 1/2. Weights 2 and 6 in the first, 1/2 in the second; returns 2 and 4."""
    episodes = Episodes(
        episode_id=np.arange(2),
        offsets=np.array([0, 2, 3]),
        observation=np.zeros((3, 1), np.float32),
        final_observation=np.zeros((2, 1), np.float32),
        action=np.zeros(3, np.int64),
        mask=np.ones((3, 1), bool),
        reward=np.array([1.0, 2.0, 4.0]),
        terminated=np.array([False, True, True]),
        truncated=np.zeros(3, bool),
        action_prob=np.array([0.3, 0.25, 0.8]),
        gamma=0.5,
    )
    q, v = np.array([1.0, 3.0, 1.0]), np.array([0.5, 2.0, 2.0])
    return Log(episodes, np.array([2.0, 3.0, 0.5]), q, v, np.empty((3, 0)), np.empty((3, 0)))


def test_known_answers() -> None:
    log = hand()
    episodes, ratio = log.episodes, log.ratio
    known = {
        (4 * 2 + 0.5 * 4) / 2: tis(episodes, ratio, clip=4.0),
        (4 * 2 + 0.5 * 4) / 4.5: wis(episodes, ratio, clip=4.0),
        (2 * 1 + 4 * 1 + 0.5 * 4) / 2: pdis(episodes, ratio, clip=4.0),
        4 / 2.5 + 4 / 4.5: wpdis(episodes, ratio, clip=4.0),
        (5 * 2 + 0.5 * 4) / 2: tis(episodes, clipped(ratio, 2.5)),
        (2 * 1 + 3 * 1 + 0.5 * 4) / 2: pdis(episodes, ratio, memory=1),
        4 / 2.5 + 3 / 4: wpdis(episodes, ratio, memory=1),  # past its end, the second episode weighs 1 again
        (0.5 + 2 * 1 + 2 + 0.5 * 3) / 2: switch_dr(*log.given, 2.0),
        (0.5 + 1 * 1 - 0.6 * 0.5 + 2 + 2 / 4.25 * 3) / 2: dros(*log.given, 4.0),
        (0.5 + 2 * (1 - 0.5 * 0.5) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "retrace", 0.5),
        (0.5 + 2 * (1 - 0.5 * 0.375) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "tree_backup", 0.5),
        (0.5 + 2 * (1 - 0.5 * 0.4) + 2 + 0.5 * 3) / 2: corrected_returns(*log.given, "q_pi", 0.4),
        (2 * (1 - 1) + 0.5 * (4 - 1)) / 2.5 + 2.5 / 2 + 0.5 * 2 * 2 / 2.5: partial_returns(*log.given, [1], np.ones(1)),
    }
    for expected, found in known.items():
        assert found.estimate() == pytest.approx(expected, abs=1e-12), expected


@given(st.integers(0, 10_000), st.floats(0.1, 3.0), st.integers(0, 5))
def test_weights_are_clipped_and_forgotten_as_loops_would(seed: int, clip: float, memory: int) -> None:
    log = random_log(seed)
    episodes, ratio = log.episodes, log.ratio
    total = {"tis": 0.0, "pdis": 0.0, "memory": 0.0}
    for i, path in enumerate(paths(log)):
        total["tis"] += min(math.prod(ratio[path].tolist()), clip) * float(episodes.return_[i]) / 7
        for t, row in enumerate(path):
            reward, before = float(episodes.time_discount[row] * episodes.reward[row]) / 7, max(t + 1 - memory, 0)
            total["pdis"] += min(math.prod(ratio[path[: t + 1]].tolist()), clip) * reward
            total["memory"] += min(math.prod(ratio[path[before : t + 1]].tolist()), clip) * reward
    assert tis(episodes, ratio, clip=clip).estimate() == pytest.approx(total["tis"])
    assert pdis(episodes, ratio, clip=clip).estimate() == pytest.approx(total["pdis"])
    assert pdis(episodes, ratio, clip=clip, memory=memory).estimate() == pytest.approx(total["memory"])


@given(st.integers(0, 10_000), st.floats(0.0, 4.0), st.floats(0.01, 10.0))
def test_switched_and_shrunk_corrections_are_as_loops_would(seed: int, tau: float, shrinkage: float) -> None:
    log = random_log(seed)

    def switched(so_far: list[float]) -> float:
        weight = math.prod(so_far)
        return weight if weight <= tau else 0.0

    def shrunk(so_far: list[float]) -> float:
        weight = math.prod(so_far)
        return shrinkage * weight / (weight**2 + shrinkage)

    assert switch_dr(*log.given, tau).estimate() == pytest.approx(corrected_by_hand(log, switched))
    assert dros(*log.given, shrinkage).estimate() == pytest.approx(corrected_by_hand(log, shrunk))


@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.sampled_from(KINDS))
def test_traces_are_cut_as_loops_would(seed: int, lambda_: float, kind: Trace) -> None:
    log = random_log(seed)
    taken = log.probs[np.arange(len(log.probs)), log.episodes.action]
    policy = dict(zip(log.ratio.tolist(), taken.tolist(), strict=True))  # pi(a|s) of a logged action, by its ratio

    def cut(ratio: float) -> float:
        return {"retrace": min(1.0, ratio), "tree_backup": policy[ratio], "q_pi": 1.0}[kind]

    def weight(so_far: list[float]) -> float:
        return so_far[0] * math.prod(lambda_ * cut(ratio) for ratio in so_far[1:])

    assert corrected_returns(*log.given, kind, lambda_).estimate() == pytest.approx(corrected_by_hand(log, weight))


# --- exact values by enumeration -----------------------------------------------------------------------------------


@each_world
def test_any_correction_of_the_exact_values_is_exact(world: World) -> None:
    """Clipped, switched, shrunk or cut: brackets that have mean 0 may be weighted by anything that came before."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    model = on_rows(policy, world.q_values(policy), episodes)
    ratio = policy_ratios(policy, episodes)
    found = [switch_dr(episodes, ratio, *model, tau) for tau in (0.0, 0.5, 1.0, 2.0, INF)]
    found += [dros(episodes, ratio, *model, shrinkage) for shrinkage in (0.0, 0.1, 1.0, 30.0, INF)]
    found += [dr(episodes, clipped(ratio, 0.7), *model)]
    found += [partial_returns(episodes, ratio, *model, [steps], np.ones(1)) for steps in (0, 1, 2, 3, INF)]
    found += [corrected_returns(episodes, ratio, *model, kind, x) for kind in KINDS for x in (0.0, 0.4, 1.0)]
    for terms in found:
        assert terms.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


@each_world
def test_what_is_unbiased_with_any_model_stays_so(world: World) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    ratio, model = policy_ratios(policy, episodes), on_rows(policy, wrong_model(world), episodes)
    found = [
        *(tis(episodes, ratio, clip=INF), wis(episodes, ratio, clip=INF)),
        *(pdis(episodes, ratio, memory=3), wpdis(episodes, ratio, memory=3)),
        *(switch_dr(episodes, ratio, *model, INF), dros(episodes, ratio, *model, INF)),
        *(partial_returns(episodes, ratio, *model, [3, INF], np.array([0.4, 0.6])),),
    ]
    for terms in found:
        assert terms.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


@each_world
@pytest.mark.parametrize("memory", [0, 1, 2])
def test_forgetful_weights_evaluate_a_policy_that_sets_in_late(world: World, memory: int) -> None:
    """With a memory of k steps, the reward of step t is that of the behavior until k steps before, and of pi from there."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    expected, live = np.einsum("sat,sat->sa", world.transition, world.reward), np.where(world.terminal, 0.0, 1.0)
    value = 0.0
    for t in range(3):
        reached = world.initial
        for step in range(t + 1):
            acting = policy if step > t - memory else world.behavior
            if step == t:
                value += world.gamma**t * float(reached @ (acting * expected).sum(1))
            reached = live * np.einsum("s,sa,sat->t", reached, acting, world.transition)
    ratio = policy_ratios(policy, episodes)
    assert pdis(episodes, ratio, memory=memory).estimate(probability) == pytest.approx(value, abs=EXACT)
    assert wpdis(episodes, ratio, memory=memory).estimate(probability) == pytest.approx(value, abs=EXACT)
    each_step = probability @ recent_weights(episodes, ratio, memory)
    assert each_step == pytest.approx(np.ones(len(each_step)), abs=EXACT)


@each_world
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_partial_return_evaluates_some_steps_of_the_policy_and_then_the_model(world: World, steps: int) -> None:
    episodes, probability = world.enumerate(3)
    policy, q = random_policy(world, 5), wrong_model(world)
    expected, live = np.einsum("sat,sat->sa", world.transition, world.reward), np.where(world.terminal, 0.0, 1.0)
    reached, value = world.initial, 0.0
    for t in range(steps):
        value += world.gamma**t * float(reached @ (policy * expected).sum(1))
        reached = live * np.einsum("s,sa,sat->t", reached, policy, world.transition)
    value += world.gamma**steps * float(reached @ (policy * q).sum(1))
    ratio = policy_ratios(policy, episodes)
    found = partial_returns(episodes, ratio, *on_rows(policy, q, episodes), [steps], np.ones(1))
    assert found.estimate(probability) == pytest.approx(value, abs=EXACT)


def trace_table(world: World, policy: np.ndarray, kind: Trace, lambda_: float) -> np.ndarray:
    ratio = np.divide(policy, world.behavior, out=np.zeros_like(policy), where=world.behavior > 0)
    cut = {"retrace": np.minimum(ratio, 1.0), "tree_backup": policy, "q_pi": np.ones_like(policy)}[kind]
    return lambda_ * cut


@each_world
@each_kind
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_corrected_returns_apply_the_operator_once(world: World, kind: Trace, lambda_: float) -> None:
    """R q = q + (I - gamma P^(c mu))^-1 (T^pi q - q), Munos et al. (2016), solved with the tables of the world."""
    episodes, probability = world.enumerate(3)
    policy, q = random_policy(world, 5), wrong_model(world)
    onward = world.gamma * np.where(world.terminal, 0.0, world.transition) * ~world.terminal[:, None, None]
    cut = world.behavior * trace_table(world, policy, kind, lambda_)
    size = q.size
    carried = np.einsum("sat,tb->satb", onward, cut).reshape(size, size)
    expected = np.einsum("sat,sat->sa", world.transition, world.reward)
    error = expected + onward @ (policy * q).sum(1) - q
    improved = q + np.linalg.solve(np.eye(size) - carried, error.ravel()).reshape(q.shape)
    model = on_rows(policy, q, episodes)
    found = corrected_returns(episodes, policy_ratios(policy, episodes), *model, kind, lambda_).estimate(probability)
    assert found == pytest.approx(float(world.initial @ (policy * improved).sum(1)), abs=EXACT)


@each_world
@each_kind
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_the_fixed_point_over_every_trajectory_is_the_exact_q(world: World, kind: Trace, lambda_: float) -> None:
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    start = np.full((world.n_states, world.n_actions), 7.0)
    found = fixed_point(episodes, policy_ratios(policy, episodes), policy, kind, lambda_, start, probability)
    state = states_of(episodes)[0]
    seen = np.zeros_like(found, bool)
    seen[state, episodes.action] = True
    assert found[seen] == pytest.approx(world.q_values(policy)[seen], abs=EXACT)
    assert (found[~seen] == 7.0).all()


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
    arrays = [np.concatenate([getattr(x, name) for x in (first, second)]) for name in ("ratio", "q", "v")]
    before, after = families(*log.given), families(longer, *arrays)
    assert rows + extra == longer.n_rows
    for name in before:
        assert after[name].estimate(share) == pytest.approx(before[name].estimate(), abs=1e-7), name


def test_a_truncated_episode_is_completed_by_the_value_model() -> None:
    """Cut after the first step and with the true values, corrections still sum to the exact value."""
    world = WORLDS[0]
    whole, probability = world.enumerate(3)
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


# --- MRDR ----------------------------------------------------------------------------------------------------------


def variance(terms: Terms, probability: np.ndarray) -> float:
    return float(probability @ terms.numerator[:, 0] ** 2 - (probability @ terms.numerator[:, 0]) ** 2)


def with_model(
    episodes: Episodes, ratio: np.ndarray, probs: np.ndarray, basis: mrdr.Basis, coefficients: np.ndarray
) -> Terms:
    q = basis.q_values(coefficients)
    return dr(episodes, ratio, q[np.arange(len(q)), episodes.action], (probs * q).sum(1))


@each_world
def test_no_model_of_the_class_makes_dr_less_variable(world: World) -> None:
    """By enumeration, with two columns that no policy's values are linear in: a stationary point, and every step is uphill."""
    episodes, probability = world.enumerate(3)
    policy = random_policy(world, 5)
    state = states_of(episodes)[0]
    rng = np.random.default_rng(0)
    columns = np.stack([np.ones(world.n_states), rng.normal(size=world.n_states)], 1)[state]
    basis, ratio, probs = mrdr.Basis.of_columns(columns), policy_ratios(policy, episodes), policy[state]
    best = mrdr.fit(episodes, ratio, probs, world.behavior[state], basis, share=probability)

    def spread(coefficients: np.ndarray) -> float:
        return variance(with_model(episodes, ratio, probs, basis, coefficients), probability)

    least = spread(best)
    assert least < spread(0 * best)  # PDIS
    for _ in range(20):
        step = 0.1 * rng.normal(size=best.shape)
        up, down = spread(best + step), spread(best - step)
        assert min(up, down) >= least - EXACT
        assert up == pytest.approx(down, abs=EXACT)  # a parabola with its vertex here
    found = with_model(episodes, ratio, probs, basis, best).estimate(probability)
    assert found == pytest.approx(world.value(policy), abs=EXACT)


@each_world
def test_the_best_table_makes_dr_what_the_exact_values_make_it(world: World) -> None:
    """Episode by episode, although the table is not that of the values: what differs is what DR does not see."""
    episodes, probability = world.enumerate(3)
    policy, state = random_policy(world, 5), states_of(episodes)[0]
    ratio, probs = policy_ratios(policy, episodes), policy[state]
    basis = mrdr.Basis.of_states(state, world.n_states)
    best = mrdr.fit(episodes, ratio, probs, world.behavior[state], basis, share=probability)
    exact = dr(episodes, ratio, *on_rows(policy, world.q_values(policy), episodes))
    table = with_model(episodes, ratio, probs, basis, best)
    assert table.numerator == pytest.approx(exact.numerator, abs=1e-7)
    assert basis.q_values(best) != pytest.approx(world.q_values(policy)[state], abs=0.1)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_the_fit_minimizes_the_objective_of_the_paper(seed: int) -> None:
    """The objective in loops; at the minimum its slope is 0 in every direction."""
    log = random_log(seed)
    episodes = log.episodes
    basis = mrdr.Basis.of_columns(np.random.default_rng(seed).normal(size=(episodes.n_rows, 2)))
    best = mrdr.fit(episodes, log.ratio, log.probs, log.behavior, basis, ridge=0.01)

    def objective(coefficients: np.ndarray) -> float:
        q, total = basis.q_values(coefficients), 0.0
        for path in paths(log):
            for t, row in enumerate(path):
                seen, back = np.zeros(3), 0.0
                for later in path[t:]:
                    passed = episodes.time_discount[later] / episodes.time_discount[row]
                    back += math.prod(log.ratio[row + 1 : later + 1]) * passed * episodes.reward[later]
                seen[episodes.action[row]] = back
                residual = log.probs[row] * q[row] - seen
                omega = np.diag(1 / log.behavior[row]) - 1.0
                before = math.prod(log.ratio[path[:t]])
                scale = episodes.time_discount[row] ** 2 * before**2 * log.ratio[row]
                total += scale * residual @ omega @ residual / len(paths(log))
        return total + 0.01 * float(np.square(coefficients).sum())

    for index in np.ndindex(best.shape):
        step = np.zeros_like(best)
        step[index] = 1e-3
        up, down = objective(best + step), objective(best - step)
        assert up == pytest.approx(down, rel=1e-7, abs=1e-10) and up > objective(best)


def test_mrdr_is_unbiased_with_a_model_of_other_episodes() -> None:
    world = WORLDS[0]
    policy, other = random_policy(world, 5), world.simulate(50, 3)
    state = states_of(other)[0]
    fitted = mrdr.fit(
        other,
        policy_ratios(policy, other),
        policy[state],
        world.behavior[state],
        mrdr.Basis.of_states(state, world.n_states),
    )[:, :, 0]
    episodes, probability = world.enumerate(3)
    found = dr(episodes, policy_ratios(policy, episodes), *on_rows(policy, fitted, episodes))
    assert found.estimate(probability) == pytest.approx(world.value(policy), abs=EXACT)


def test_cross_fitting_never_uses_an_episode_on_itself() -> None:
    log = random_log(1, episodes=20)
    episodes, row = log.episodes, np.arange(log.episodes.n_rows)
    state, fold = states_of(episodes)[0], np.arange(20) % 3
    basis = mrdr.Basis.of_states(state, 4)
    found = mrdr.mrdr(episodes, log.ratio, log.probs, log.behavior, basis, fold, ridge=0.1)
    for label in range(3):
        other = fold != label
        rows, here = other[episodes.episode_of_row], ~other[episodes.episode_of_row]
        alone = mrdr.fit(
            episodes.take(other),
            log.ratio[rows],
            log.probs[rows],
            log.behavior[rows],
            mrdr.Basis.of_states(state[rows], 4),
            ridge=0.1,
        )
        q = basis.q_values(alone)
        held_out = dr(
            episodes.take(~other),
            log.ratio[here],
            q[row, episodes.action][here],
            (log.probs * q).sum(1)[here],
        )
        assert found.numerator[~other] == pytest.approx(held_out.numerator)


def test_a_heavy_ridge_leaves_pdis_and_folds_and_behavior_are_checked() -> None:
    log = random_log(2)
    basis, fold = mrdr.Basis.of_states(states_of(log.episodes)[0], 4), np.arange(7) % 2
    arguments = (log.episodes, log.ratio, log.probs, log.behavior, basis)
    heavy = mrdr.mrdr(*arguments, fold, ridge=1e12)
    assert heavy.estimate() == pytest.approx(pdis(log.episodes, log.ratio).estimate(), abs=1e-6)
    with pytest.raises(InputError, match="at least 2 folds"):
        mrdr.mrdr(*arguments, 0 * fold)
    with pytest.raises(InputError, match="not pi / mu"):
        mrdr.fit(log.episodes, 1.1 * log.ratio, log.probs, log.behavior, basis)
    never = np.where(np.arange(3) == (log.episodes.action[:, None] + 1) % 3, 0.0, log.behavior)
    with pytest.raises(InputError, match="never takes"):
        mrdr.fit(log.episodes, log.ratio, log.probs, never, basis)
    with pytest.raises(InputError, match="NaN"):
        mrdr.Basis.of_columns(np.full((3, 1), np.nan))


def test_mrdr_converges_to_the_value_and_beats_pdis() -> None:
    world = random_world(2, 2, 3, 0.9, seed=1)
    policy, episodes = random_policy(world, 5), world.simulate(4000, 2)
    state = states_of(episodes)[0]
    ratio = policy_ratios(policy, episodes)
    basis = mrdr.Basis.of_states(state, world.n_states)
    found = mrdr.mrdr(episodes, ratio, policy[state], world.behavior[state], basis, np.arange(4000) % 2)
    error = found.numerator.std() / math.sqrt(4000)
    assert found.estimate() == pytest.approx(world.value(policy), abs=4 * error)
    assert error < 0.9 * pdis(episodes, ratio).numerator.std() / math.sqrt(4000)


# --- fixed points --------------------------------------------------------------------------------------------------


def applied_by_hand(
    episodes: Episodes, trace: np.ndarray, policy: np.ndarray, q: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """The mean over visits of q plus all later errors, discounted and cut: the operator on a log, in loops."""
    state, next_state = states_of(episodes)
    total, visits = np.zeros_like(q), np.zeros_like(q)
    for i, (a, b) in enumerate(itertools.pairwise(episodes.offsets.tolist())):
        for t in range(a, b):
            cell, carried, value = (state[t], episodes.action[t]), 1.0, q[state[t], episodes.action[t]]
            for k in range(t, b):
                if k > t:
                    carried *= episodes.step_discount[k - 1] * trace[k]
                ahead = 0.0 if episodes.terminated[k] else float(policy[next_state[k]] @ q[next_state[k]])
                error = episodes.reward[k] + episodes.step_discount[k] * ahead - q[state[k], episodes.action[k]]
                value += carried * error
            total[cell] += share[i] * value
            visits[cell] += share[i]
    return np.where(visits > 0, total / np.where(visits > 0, visits, 1.0), q)


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.floats(0.0, 1.0))
@settings(max_examples=25)
def test_a_fixed_point_is_what_the_operator_leaves_alone(seed: int, kind: Trace, lambda_: float) -> None:
    """States that come back, steps of any length, truncated episodes, junk after the others, and cells that were never visited."""
    log = random_log(seed, episodes=12, gamma=0.6)
    rng = np.random.default_rng(seed)
    last = log.episodes.terminated
    cut = last & (rng.random(len(last)) < 0.5)
    episodes = dataclasses.replace(
        log.episodes,
        terminated=last & ~cut,
        truncated=cut,
        final_observation=np.where(cut[last], rng.integers(0, 6, 12), 1e6)[:, None].astype(np.float32),
    )
    policy, start, share = rng.dirichlet(np.ones(3), 6), rng.normal(size=(6, 3)), rng.dirichlet(np.ones(12))
    found = fixed_point(episodes, log.ratio, policy, kind, lambda_, start, share)
    trace = traces(episodes, log.ratio, kind, lambda_)
    assert applied_by_hand(episodes, trace, policy, found, share) == pytest.approx(found, rel=1e-7, abs=1e-7)
    seen = np.zeros((6, 3), bool)
    seen[states_of(episodes)[0], episodes.action] = True
    assert (found[~seen] == start[~seen]).all()


def test_without_a_trace_the_fixed_point_is_that_of_the_tabular_model() -> None:
    world = WORLDS[0]
    episodes, policy = world.simulate(300, 0), random_policy(world, 5)
    model = TabularModel.fit(episodes, world.n_states)
    assert model is not None and (model.visits[~world.terminal] > 0).all()
    for kind in KINDS:
        found = fixed_point(episodes, policy_ratios(policy, episodes), policy, kind, 0.0, np.zeros((world.n_states, 2)))
        live = ~world.terminal
        assert found[live] == pytest.approx(model.q_values(policy)[live], abs=EXACT)


def test_retrace_on_policy_is_every_visit_monte_carlo() -> None:
    """With one action in every state, errors telescope to the returns whatever q is."""
    log = random_log(5)
    episodes = dataclasses.replace(log.episodes, action=0 * log.episodes.action, action_prob=np.ones(len(log.ratio)))
    state, one = states_of(episodes)[0], np.ones(len(log.ratio))
    policy = np.tile([1.0, 0.0, 0.0], (4, 1))
    for kind in KINDS:
        found = fixed_point(episodes, one, policy, kind, 1.0, np.zeros((4, 3)))
        for s in range(4):
            assert found[s, 0] == pytest.approx(episodes.return_to_go[state == s].mean(), abs=EXACT)


@each_kind
def test_fixed_points_converge_where_states_come_back(kind: Trace) -> None:
    world = random_world(3, 2, 1, 0.9, seed=4)
    transition = world.transition.copy()
    transition[:3] = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 2))
    world = dataclasses.replace(world, transition=transition)
    policy, episodes = random_policy(world, 5), world.simulate(20_000, 0)
    ratio, start = policy_ratios(policy, episodes), np.zeros((4, 2))
    found = fixed_point(episodes, ratio, policy, kind, 0.8, start)
    assert found[:3] == pytest.approx(world.q_values(policy)[:3], abs=0.06)


def test_a_policy_that_never_ends_has_no_fixed_point() -> None:
    """The behavior leaves the one state in the end, the policy almost or quite never does."""
    world = random_world(1, 2, 1, 1.0, seed=0)
    transition = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    episodes = dataclasses.replace(world, transition=transition).simulate(300, 0)
    for stays in (1.0, 1.0 - 1e-9):
        circling = np.array([[stays, 1.0 - stays], [0.5, 0.5]])
        for kind in KINDS:
            with pytest.raises(InputError, match="hardly ever ends"):
                fixed_point(episodes, np.ones(episodes.n_rows), circling, kind, 0.0, np.zeros((2, 2)))


def test_following_and_accumulated_stay_inside_an_episode() -> None:
    episodes = hand().episodes
    values = np.array([1.0, 2.0, 3.0])
    assert following(episodes, values).tolist() == [2.0, 0.0, 0.0]
    assert episodes.accumulated(values, np.full(3, 10.0)).tolist() == [21.0, 2.0, 3.0]
    log = random_log(0).episodes
    assert log.return_to_go[log.offsets[:-1]] == pytest.approx(log.return_)


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


# --- refusals ------------------------------------------------------------------------------------------------------


def test_impossible_parameters_are_refused() -> None:
    log = random_log(0)
    episodes, ratio, q, v = log.given
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
    ]
    for call in refused:
        with pytest.raises(InputError):
            call()
