"""A small world with exact values, in which a log costs milliseconds, and the smoke version of the study."""

from dataclasses import replace
from functools import cache

import numpy as np

from benchmarks.calibration.judging import Table, asked, judged, known_policies, measured, on_a_log
from benchmarks.calibration.tables import ever
from offrl_models.ope.nulls import Family
from offrl_models.ope.worlds import World, random_world

LAYER, ACTIONS, STEPS = 6, 4, 5  # states of each step, actions, steps at most

SMOKE = (Family("random half", 1.2), Family("severe half", 1.5))
SMOKE_LOGS, SMOKE_LIMIT = 60, 9  # logs, and most of them in which a policy that is no better may pass
SMOKE_GAIN, SMOKE_NEEDED = 0.02, 45  # a policy that is better by so much, and fewest logs in which it has to pass
SMOKE_FITTED_ON, SMOKE_LOOKS = 1_500, (500, 1_000)


@cache
def world(states: int = LAYER, actions: int = ACTIONS, steps: int = STEPS, seed: int = 3) -> World:
    """A random world of at most so many steps. Returns lie in [0, 1]: every transition is worth 1 / steps or nothing."""
    drawn = random_world(states, actions, steps, 1.0, seed)
    pays = np.random.default_rng(seed).random(drawn.reward.shape) < 0.5
    return replace(drawn, reward=np.where(drawn.terminal[:, None, None], 0.0, pays / steps))


def better(known: World, gain: float, cap: float = 2.0) -> Table:
    """A policy that is better by so much."""
    (found,) = known_policies(known, gain, (Family("random half", cap),)).values()
    return found


def smoke_log(seed: int) -> tuple[bool, bool]:
    """Whether the gate passes one of two nulls on a log, and whether it passes a policy that is better."""
    nulls = known_policies(world(), 0.0, SMOKE)
    candidates = {**nulls, "better": better(world(), SMOKE_GAIN)}
    found = on_a_log(world(), candidates, seed, SMOKE_FITTED_ON, max(SMOKE_LOOKS))
    verdicts = {name: judged(each) for name, each in measured(found, asked(world().n_states), SMOKE_LOOKS).items()}
    return any(ever(verdicts[name]) for name in nulls), ever(verdicts["better"])


def smoke() -> tuple[int, int]:
    """Logs, of SMOKE_LOGS, in which a policy that is no better passes, and in which one that is better does."""
    found = np.array([smoke_log(seed) for seed in range(1, SMOKE_LOGS + 1)])
    wrong, right = found.sum(0).tolist()
    return wrong, right
