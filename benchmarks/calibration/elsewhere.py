"""Other worlds than ICU-Sepsis: a chain, a contextual bandit, CartPole and a point mass, all but the first with neural nuisances.

All nulls are exact but those of CartPole, which are as good as the behavior by 100,000 rollouts.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from benchmarks.calibration.cartpole import CartPole, Policy, controller
from benchmarks.calibration.judging import (
    KnownPolicy,
    Table,
    asked,
    judged,
    known_policies,
    measured,
    on_a_log,
)
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import cell, cost, count, ever, names, prose, table, verdicts
from offrl_models.datasets.encoding import Encoder
from offrl_models.evaluation import BEHAVIOR, Question, evaluate
from offrl_models.exported import Exported, OnnxDensity
from offrl_models.ope.fqe import FQEConfig
from offrl_models.ope.nulls import Family
from offrl_models.ope.worlds import World, bandit, chain
from offrl_models.ope.worlds.control import LinearGaussianPolicy, LinearGaussianWorld, point_mass, split
from offrl_models.schema import Episodes, Feature

FITTED_ON, JUDGED_ON = 4_667, 2_000
CHAIN_CAPS = (1.2, 1.5)  # a coin has no ratio above 2
SOME = (Family("random half", 1.5), Family("random half", 5.0), Family("severe half", 2.0), Family("action swap", None))
FQE = FQEConfig(hidden=(64, 64), gradient_steps=600, learning_rate=2e-3, polyak=0.05, members=3)
RIGHT = {"a little better on one side": 5.0, "better on one side": 6.0}  # gain of the controller on the right
ROLLOUTS = 100_000
MASS_STEPS, MASS_BOUNDS = 10, np.array([[-8.0, 8.0]])  # of what it is pushed with; nothing is cut off there


@cache
def chain_nulls() -> tuple[World, dict[str, Table]]:
    world = chain(50)
    families = tuple(Family(way, cap) for way in ("random half", "severe half") for cap in CHAIN_CAPS)
    return world, known_policies(world, 0.0, families)


@cache
def bandit_nulls() -> tuple[World, dict[str, Table]]:
    world = bandit(contexts=200, actions=6, columns=5, seed=1)
    return world, known_policies(world, 0.0, SOME)


@cache
def pole_nulls() -> tuple[CartPole, dict[str, Policy]]:
    world = CartPole(controller(4.0, 4.0))
    return world, {name: world.no_better(gain, ROLLOUTS, seed=1) for name, gain in RIGHT.items()}


def parted(log: Episodes) -> tuple[Episodes, Episodes]:
    """What nuisances are fitted on, and what is judged on."""
    fitted = np.arange(log.n_episodes) < FITTED_ON
    return log.take(fitted), log.take(~fitted)


def by_networks(
    policies: Mapping[str, Exported], train: Episodes, gate: Episodes, seed: int, question: Question
) -> Found:
    """The pipeline's own evaluation, fitted Q networks included, and the gate's verdict on every policy."""
    found = evaluate(dict(policies), train, gate, Encoder.fit(train), FQE, samples=50, seed=seed, task="nuisances")
    return {name: judged(each) for name, each in measured(found, question).items()}


def on_chain(seed: int) -> Found:
    world, nulls = chain_nulls()
    found = on_a_log(world, nulls, seed, FITTED_ON, JUDGED_ON)
    return {name: judged(each) for name, each in measured(found, asked(world.n_states)).items()}


def on_bandit(seed: int) -> Found:
    world, nulls = bandit_nulls()
    tables = {**nulls, BEHAVIOR: world.behavior}
    policies = {name: over_contexts(world, policy) for name, policy in tables.items()}
    return by_networks(policies, *parted(in_numbers(world, seed)), seed, asked(None))


def in_numbers(world: World, seed: int) -> Episodes:
    """A log that shows contexts as numbers."""
    log = world.simulate(FITTED_ON + JUDGED_ON, seed)
    return replace(log, features=tuple(Feature(f"x{column}") for column in range(log.observation.shape[1])))


def over_contexts(world: World, policy: Table) -> KnownPolicy:
    """A table over contexts as a policy of their features; after the end, where nothing acts, it is that of context 0."""
    assert world.observed is not None
    place = {row.tobytes(): state for state, row in enumerate(world.observed[~world.terminal])}

    def known(observation: np.ndarray) -> tuple[Table, np.ndarray]:
        shown = np.ascontiguousarray(observation, np.float32)
        return policy, np.array([place.get(row.tobytes(), 0) for row in shown])

    return KnownPolicy(known)


def on_pole(seed: int) -> Found:
    world, nulls = pole_nulls()
    policies = {name: of_function(policy) for name, policy in {**nulls, BEHAVIOR: world.behavior}.items()}
    return by_networks(policies, *parted(world.simulate(FITTED_ON + JUDGED_ON, seed)), seed, asked(None))


def of_function(policy: Policy) -> KnownPolicy:
    def known(observation: np.ndarray) -> tuple[Table, np.ndarray]:
        right = policy(observation)
        return np.stack([1.0 - right, right], 1), np.arange(len(observation))

    return KnownPolicy(known)


class KnownDensity(OnnxDensity):
    """A linear policy with normal noise, where the pipeline has an exported graph."""

    def __init__(self, policy: LinearGaussianPolicy):
        self.policy = policy

    @property
    def numbers(self) -> int:
        return 1

    def run(self, observation: np.ndarray, action: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, width = self.policy.mean(split(observation)[0])[:, None], np.sqrt(self.policy.covariance)
        return stats.norm.logpdf(action, mean, width)[..., 0], stats.norm.ppf(uniform, mean, width)


@cache
def mass_policies() -> tuple[LinearGaussianWorld, dict[str, LinearGaussianPolicy]]:
    """A push too hard or a brake too hard, which gain at first what they lose later; and half of the way to either."""
    world = point_mass(horizon=MASS_STEPS, gamma=0.95)
    before = world.behavior

    def moved(size: float, way: np.ndarray) -> LinearGaussianPolicy:
        return replace(before, gain=before.gain - size * way)

    def gained(size: float, way: np.ndarray) -> float:
        return world.value(moved(size, way)) - world.value(before)

    found = {}
    for name, way in {"spring": np.array([[1.0, 0.0]]), "brake": np.array([[0.0, 1.0]])}.items():
        size = optimize.root_scalar(gained, args=(way,), bracket=(0.5, 2.0), xtol=1e-12).root
        found[f"{name} too hard, no better"] = moved(size, way)
        found[f"{name}, better by {gained(size / 4, way):.2g}"] = moved(size / 4, way)
    return world, found


def on_mass(seed: int) -> Found:
    world, known = mass_policies()
    log = world.simulate(FITTED_ON + JUDGED_ON, seed)
    shown = replace(log, features=tuple(map(Feature, ("position", "speed", "step"))), bounds=MASS_BOUNDS)
    policies = {**known, BEHAVIOR: world.behavior}
    known_densities = {name: KnownDensity(policy) for name, policy in policies.items()}
    return by_networks(known_densities, *parted(shown), seed, replace(asked(None), return_range=None))


def _rows(lines: Lines) -> list[str]:
    rows = [("policy", "passes", "verdicts")]
    for name in names(lines):
        every = [line.found[name] for line in lines.values()]
        rows.append((name, cell(*count(lines, name, ever)), verdicts(every)))
    return table(*rows)


def section(title: str, intro: str, lines: Lines) -> list[str]:
    return [f"### {title}", "", *prose(f"{intro} {cost(lines)}"), *_rows(lines)]


def chain_report(lines: Lines, path: Path) -> list[str]:
    return [
        "## Other worlds", "",
        f"One look at {JUDGED_ON:,} episodes, nuisances fitted on {FITTED_ON:,} others.", "",
        *section("A chain of 50 steps", "The curse of horizon; tabular nuisances.", lines),
    ]  # fmt: skip


def bandit_report(lines: Lines, path: Path) -> list[str]:
    intro = f"200 contexts shown as 5 numbers, 6 actions; fitted Q networks of {FQE.gradient_steps} gradient steps."
    return section("A contextual bandit", intro, lines)


def pole_report(lines: Lines, path: Path) -> list[str]:
    intro = (
        "Four numbers observed, recordings stop after 40 steps, gamma .9; fitted Q networks and fitted visit ratios. No better "
        f"than the behavior by {ROLLOUTS:,} rollouts."
    )
    return section("CartPole", intro, lines)


def mass_report(lines: Lines, path: Path) -> list[str]:
    world, _ = mass_policies()
    intro = (
        f"A push of a mass along a line, {MASS_STEPS} steps: continuous actions, densities known, gamma .95, the behavior worth "
        f"{world.value(world.behavior):.3f}. Fitted Q networks and fitted visit ratios, uncapped policies; exact values in closed "
        "form. The policies that are better show the power."
    )
    return section("Continuous actions: a point mass", intro, lines)


EXPERIMENTS = {
    "chain": Experiment(on_chain, 400, chain_report),
    "bandit": Experiment(on_bandit, 400, bandit_report),
    "cartpole": Experiment(on_pole, 200, pole_report),
    "point_mass": Experiment(on_mass, 200, mass_report),
}
