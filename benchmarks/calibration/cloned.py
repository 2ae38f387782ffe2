"""Logs without propensities whose observations are numbers: behavior clones tell them, and a PASS is AMBER."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy import special

from benchmarks.calibration.elsewhere import (
    FITTED_ON,
    JUDGED_ON,
    SOME,
    by_networks,
    in_numbers,
    of_function,
    over_contexts,
    parted,
    pole_nulls,
    section,
)
from benchmarks.calibration.judging import Table, asked, known_policies
from benchmarks.calibration.store import Experiment, Found, Lines
from offrl_models.algorithms import BCConfig
from offrl_models.cloning import fit_clone
from offrl_models.datasets.encoding import Encoder
from offrl_models.evaluation import BEHAVIOR
from offrl_models.ope import behavior
from offrl_models.ope.nulls import Family
from offrl_models.ope.worlds import World, bandit
from offrl_models.policies import Mixture
from offrl_models.schema import Episodes
from offrl_models.stages.behavior import cloned_propensities

CLONE = BCConfig(hidden=(64, 64), learning_rate=1e-3)
STEPS, SEEDS, METHOD = 1_000, 2, "temperature"  # of each clone, at most; the method is the pipeline's own
GAIN, WITHIN = 0.03, (Family("random half", 2.0), Family("random half", 5.0))  # of policies that are better


@cache
def bandit_policies() -> tuple[World, dict[str, Table]]:
    """Of a behavior that follows the numbers, as one does that can be learned from a log: a softmax of linear functions."""
    world = bandit(contexts=200, actions=6, columns=5, seed=1)
    assert world.observed is not None
    slopes = np.random.default_rng(1).normal(0.0, 0.5, (world.observed.shape[1], world.n_actions))
    world = replace(world, behavior=special.softmax(world.observed @ slopes, 1))
    better = {f"{name}, better by {GAIN:g}": table for name, table in known_policies(world, GAIN, WITHIN).items()}
    return world, {**known_policies(world, 0.0, SOME), **better}


def on_bandit(seed: int) -> Found:
    world, tables = bandit_policies()
    log, shown = in_numbers(world, seed), ~world.terminal
    assert world.observed is not None
    whole, train, gate = without_propensities(log, seed)
    told = world.behavior.copy()
    told[shown] = whole(world.observed[shown])
    policies = {name: over_contexts(world, table) for name, table in {**tables, BEHAVIOR: told}.items()}
    return by_networks(policies, train, gate, seed, asked(None, propensities="estimated"))


def on_pole(seed: int) -> Found:
    world, nulls = pole_nulls()
    whole, train, gate = without_propensities(world.simulate(FITTED_ON + JUDGED_ON, seed), seed)
    known = {**nulls, BEHAVIOR: lambda observation: whole(observation)[:, 1]}
    policies = {name: of_function(policy) for name, policy in known.items()}
    return by_networks(policies, train, gate, seed, asked(None, propensities="estimated"))


def without_propensities(log: Episodes, seed: int) -> tuple[Callable[[np.ndarray], Table], Episodes, Episodes]:
    """The whole behavior policy, a function of the observation; and what nuisances are fitted on and what is judged on, with
    propensities by the pipeline's own functions. The whole policy is fitted on half of the former and calibrated on the other."""

    def clone(fitted_on: Episodes, half: int) -> torch.nn.Module:
        seeds, encoder = [10 * seed + half, 10 * seed + half + 5], Encoder.fit(fitted_on)
        return fit_clone(CLONE, fitted_on, encoder, seeds=seeds, gradient_steps=STEPS, batch_size=256)

    train, gate = parted(log)
    fitted_on, tuned_on = behavior.halves(train)
    policy = behavior.calibrated(Mixture(clone(fitted_on, 3), SEEDS), tuned_on, METHOD)

    def whole(observation: np.ndarray) -> Table:
        seen = torch.as_tensor(np.array(observation, np.float32))
        with torch.no_grad():
            return policy(seen, torch.ones(len(seen), log.n_actions, dtype=torch.bool)).double().numpy()

    def told(part: Episodes) -> Episodes:
        return replace(part, action_prob=cloned_propensities(part, clone, SEEDS, METHOD))

    return whole, told(train), told(gate)


def bandit_report(lines: Lines, path: Path) -> list[str]:
    intro = (
        "The contextual bandit with a behavior that follows the numbers, and without its propensities, which behavior clones tell: "
        f"two for each part of the log, of {SEEDS} seeds and two layers of 64, each calibrated and used on the half that it was "
        "not trained on; the whole behavior policy is another one. The error rate is halved and the certificate is AMBER. The "
        "policies that are better show the power."
    )
    return section("Propensities by behavior clones, the contextual bandit", intro, lines)


def pole_report(lines: Lines, path: Path) -> list[str]:
    return section(
        "Propensities by behavior clones, CartPole", "CartPole as above, its propensities told as these.", lines
    )


EXPERIMENTS = {
    "cloned_bandit": Experiment(on_bandit, 400, bandit_report),
    "cloned_pole": Experiment(on_pole, 200, pole_report),
}
