"""Worlds whose exact values are known. They make example logs, and they check the estimators.

Nothing that decides may read them: the truth stands in a marked column of a report, and nowhere else.
"""

from .control import LinearGaussianPolicy, LinearGaussianWorld, point_mass
from .icu import icu_sepsis, icu_tables
from .small import bandit, chain, toy_graph
from .stress import (
    aliased,
    confounded,
    delayed,
    faded,
    hidden_odds,
    hidden_trait,
    joined,
    misattributed,
    poisoned,
    simulate_each,
    stale,
    unsettled,
)
from .tabular import World, random_policy, random_world

WORLDS = {"icu_sepsis": icu_sepsis}

__all__ = [
    "WORLDS",
    "LinearGaussianPolicy",
    "LinearGaussianWorld",
    "World",
    "aliased",
    "bandit",
    "chain",
    "confounded",
    "delayed",
    "faded",
    "hidden_odds",
    "hidden_trait",
    "icu_sepsis",
    "icu_tables",
    "joined",
    "misattributed",
    "point_mass",
    "poisoned",
    "random_policy",
    "random_world",
    "simulate_each",
    "stale",
    "toy_graph",
    "unsettled",
]
