"""Null policies and policies of a known gain: exact, under their caps and masks, projected as the ladder projects."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models.ope.nulls import CAPS, DIRECTIONS, EXACT, FAMILIES, Family, capped, policies, swapped
from offrl_models.ope.worlds import World, chain, icu_sepsis, icu_tables, random_world
from offrl_models.policies import project

Policies = dict[Family, np.ndarray]


@pytest.fixture(scope="module")
def icu() -> World:
    return icu_sepsis()


@pytest.fixture(scope="module")
def icu_nulls(icu: World) -> Policies:
    return policies(icu, icu_tables()["sofa_scores"])


def check(world: World, found: Policies, difference: float) -> None:
    """The difference by dynamic programming, the cap, the mask, and that it is a distribution."""
    start = world.value(world.behavior)
    for family, policy in found.items():
        assert abs(world.value(policy) - start - difference) < EXACT, family
        assert policy.sum(1) == pytest.approx(np.ones(world.n_states), abs=1e-9), family
        assert policy.min() >= 0 and not policy[~world.mask].any(), family
        assert not policy[world.behavior == 0].any(), family
        if family.cap is not None:
            assert (policy <= family.cap * world.behavior * (1 + 1e-6) + 1e-12).all(), family


def test_twelve_families_of_null_policies_of_icu_sepsis(icu: World, icu_nulls: Policies) -> None:
    check(icu, icu_nulls, 0.0)
    assert len(FAMILIES) == len(set(map(str, FAMILIES))) == len(icu_nulls) == 12
    assert {family.cap for family in FAMILIES} == set(CAPS)
    assert {family.direction for family in FAMILIES} == set(DIRECTIONS)


def test_null_policies_are_far_from_the_behavior_and_from_each_other(icu: World, icu_nulls: Policies) -> None:
    """In total variation over the behavior's decisions; the looser the cap, the further."""
    visits = icu.occupancy(icu.behavior)

    def distance(left: np.ndarray, right: np.ndarray) -> float:
        return float(visits @ np.abs(left - right).sum(1) / visits.sum() / 2)

    found = list(icu_nulls.values())
    assert min(distance(policy, icu.behavior) for policy in found) > 0.02
    assert min(distance(found[i], found[j]) for i in range(12) for j in range(i)) > 0.02
    halves = [distance(icu_nulls[Family("random half", cap)], icu.behavior) for cap in CAPS]
    assert halves == sorted(halves) and halves[-1] > 10 * halves[0]
    capped_at_2 = icu_nulls[Family("random half", 2.0)]
    reached = (capped_at_2 / np.where(icu.behavior > 0, icu.behavior, 1.0))[visits > 0].max()
    assert reached == pytest.approx(2.0, abs=1e-3)  # the cap binds


def test_a_policy_of_the_severe_half_helps_there_and_harms_elsewhere(icu: World, icu_nulls: Policies) -> None:
    score, q, v = icu_tables()["sofa_scores"], icu.q_values(icu.behavior), icu.state_values(icu.behavior)
    severe = score >= np.median(score)
    for direction, helped in (("severe half", severe), ("mild half", ~severe)):
        family = next(f for f in FAMILIES if f.direction == direction)
        gain = (icu_nulls[family] * q).sum(1) - v
        assert gain[helped].sum() > 0.1 and gain[~helped & ~icu.terminal].sum() < -0.1


@pytest.mark.parametrize("difference", [0.002, 0.004, 0.008, 0.016, 0.03, -0.01])
def test_policies_of_a_known_difference(icu: World, difference: float) -> None:
    families = (Family("random half", 5.0), Family("action swap", None))
    check(icu, policies(icu, icu_tables()["sofa_scores"], difference, families=families), difference)


def test_a_difference_that_no_policy_under_the_cap_has_is_refused(icu: World) -> None:
    tight = (Family("severe half", 1.2),)
    with pytest.raises(
        ValueError, match=r"severe half, cap 1\.2: no policy has the value .*they reach from 0\.77.* to 0\.78"
    ):
        policies(icu, icu_tables()["sofa_scores"], 0.016, families=tight)
    with pytest.raises(ValueError, match="uncapped: no policy"):
        policies(icu, icu_tables()["sofa_scores"], -0.3, families=(Family("mild half", None),))


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.booleans())
def test_nulls_of_random_worlds(seed: int, masked: bool) -> None:
    """With the value of a state as its severity; a random half depends on the seed."""
    world = random_world(4, 3, 3, 0.9, seed=seed, masked=masked)
    severity = world.state_values(world.behavior)
    found = policies(world, severity)
    check(world, found, 0.0)
    other = policies(world, severity, seed=1, families=FAMILIES[:1])
    assert not np.allclose(other[FAMILIES[0]], found[FAMILIES[0]])


def test_nulls_of_a_long_chain() -> None:
    world = chain()
    found = policies(world, np.arange(world.n_states) // 3 + 0.0)
    check(world, found, 0.0)
    late = found[Family("severe half", 1.2)]
    assert late[:3, 1].max() < 0.5 < late[120:140, 1].min()  # left at first, right later on


@given(st.integers(0, 10_000), st.sampled_from(CAPS[:-1]))
def test_the_projection_is_the_ladders(seed: int, cap: float) -> None:
    """Equal to `project`, and to the water level k of p = min(cap mu, k pi) found by bisection."""
    rng = np.random.default_rng(seed)
    pi, mu = rng.dirichlet(np.ones(4), 5), rng.dirichlet(np.ones(4), 5)
    mu[0, 0] = 0.0
    mu /= mu.sum(1, keepdims=True)
    found = capped(pi, mu, cap)
    assert np.array_equal(found, project(torch.as_tensor(pi), torch.as_tensor(mu), cap).numpy())
    low, high = np.zeros((5, 1)), np.full((5, 1), 1e9)
    for _ in range(200):
        middle = (low + high) / 2
        enough = np.minimum(cap * mu, middle * pi).sum(1, keepdims=True) >= 1
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    assert found == pytest.approx(np.minimum(cap * mu, high * pi), abs=1e-4)  # the ladder's has a millionth of mu in it
    assert np.array_equal(capped(pi, mu, None), pi)


def test_swapped_actions_by_hand() -> None:
    behavior = np.array([[0.1, 0.0, 0.2, 0.7], [0.0, 1.0, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0]])
    allowed = behavior > 0
    handed_on = [[0.7, 0.0, 0.1, 0.2], [0.0, 1.0, 0.0, 0.0], [0.75, 0.25, 0.0, 0.0]]
    assert np.array_equal(swapped(behavior, allowed), np.array(handed_on))
