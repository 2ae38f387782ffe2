"""End to end: policies that are really trained on few or many stays, and what the gate and the rules of today release of them.

Bc, bcq, cql and iql are the pipeline's own, by its own learner with the settings of its YAML, except for one seed of 500 gradient
steps. The best of them on the selection split climbs the pipeline's ladder on the gate split, at the error rate that the
ledger gives a first look. A release is unsafe where the exact value of what is released is not above the behavior's.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.calibration.judging import (
    ALPHA,
    CONFIG,
    Table,
    asked,
    behavior_table,
    evaluation,
    last,
    measured,
    models,
    tabular_values,
    with_values,
)
from benchmarks.calibration.judging import KnownPolicy as Known
from benchmarks.calibration.rules import RULES, all_rules
from benchmarks.calibration.sepsis import world
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import cell, cost, prose, table
from offrl_models import ledger
from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.evaluation import BEHAVIOR
from offrl_models.gate import Status, decisive_rung, ladder
from offrl_models.ope.nulls import capped, greedy
from offrl_models.ope.tabular import TabularModel
from offrl_models.policies import Mixture
from offrl_models.schema import Episodes, Feature
from offrl_models.training import fit

SIZES = (100, 300, 1_000, 5_000)  # stays that are trained on
TRAIN, SELECTION = 0.6, 0.1  # shares of the permanent split; the gate has the rest
MANY = 5_000  # gate stays with which the ladder is climbed once more
GRADIENT_STEPS, BATCH = 500, 256
SETTINGS = Path(__file__).parents[2] / "orchestration" / "defs" / "icu_sepsis" / "defs.yaml"
FREQUENT = 20  # rows of a cell from which SPIBB leaves the behavior
ITERATIONS = 50
GATE, GATE_MANY, SPIBB = "gate, its 30% of the stays", f"gate, {MANY:,} stays", "SPIBB"
CHOICES = (GATE, GATE_MANY, *RULES, SPIBB)


@cache
def settings() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(SETTINGS.read_text())["attributes"]["algorithms"]


def trained(train: Episodes, seed: int) -> dict[str, Table]:
    """A policy of each algorithm, as its probabilities in every state."""
    described = replace(train, features=(Feature("state", world().n_states),))
    encoder = Encoder.fit(described)
    states = torch.arange(float(world().n_states))[:, None]
    found = {}
    for name, chosen in settings().items():
        algorithm, _ = fit(
            name, make_config(name, chosen), described, encoder,
            seeds=[seed], gradient_steps=GRADIENT_STEPS, batch_size=BATCH,
        )  # fmt: skip
        with torch.no_grad():
            found[name] = Mixture(algorithm, 1)(states, torch.as_tensor(world().mask)).numpy()
    return found


def best(candidates: dict[str, Table], behavior: Table, train: Episodes, selection: Episodes, seed: int) -> str:
    """The candidate of which the least member of the FQE ensemble thinks most, as on the pipeline's leaderboard."""
    policies = {**candidates, BEHAVIOR: behavior}
    fqe = tabular_values(models(train, len(behavior), seed), list(policies.values()), selection)
    found = with_values({name: Known.of(each) for name, each in policies.items()}, train, selection, fqe)
    scores = {name: float(np.nan_to_num(min(found.fqe_gains(name)), nan=-np.inf)) for name in candidates}
    return max(scores, key=lambda name: scores[name])


def spibb(log: Episodes, behavior: Table) -> tuple[Table, float]:
    """The policy of Laroche, Trichelair & Tachet des Combes (2019), Pi_b-SPIBB, and what it gains in the model of the log.

    In cells of fewer than FREQUENT rows it keeps the behavior's probabilities, and acts greedily with what is left.
    """
    model = TabularModel.fit(log, len(behavior))
    assert model is not None
    rare: np.ndarray = model.visits < FREQUENT
    unknown: np.ndarray = np.all(rare, axis=1)
    kept = np.where(rare, behavior, 0.0)
    free = np.where(unknown, 0.0, 1.0 - kept.sum(1))
    policy = behavior
    for _ in range(ITERATIONS):
        if not model.ends(policy):
            return policy, float("nan")
        better = np.where(unknown[:, None], behavior, kept + free[:, None] * greedy(model.q_values(policy), ~rare))
        if np.array_equal(better, policy):
            break
        policy = better
    return policy, model.value(policy) - model.value(behavior) if model.ends(policy) else float("nan")


def climbed(
    candidate: Table, behavior: Table, fitted_on: Episodes, gate: Episodes, seed: int, ensemble: Sequence[TabularModel]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """What the ladder releases, and what the rules of today say of the candidate itself."""
    caps = CONFIG.caps
    rungs = {str(cap): capped(candidate, behavior, cap) for cap in caps}
    found = evaluation(rungs, behavior, fitted_on, gate, seed, ensemble)
    alpha = ledger.level([], "first", "data", CONFIG).alpha
    measures = measured(found, asked(len(behavior), alpha))
    verdicts = ladder(list(rungs), [each[0] for each in measures.values()], CONFIG)
    decisive = verdicts[decisive_rung(verdicts)]
    released = decisive.status is Status.PASS
    climb = {"released": released, "gain": gain(rungs[decisive.policy]), "rung": decisive.policy, **last(decisive)}
    return climb, all_rules(found, str(caps[-1]), ALPHA, seed)


def gain(policy: Table) -> float:
    """Exact value above the behavior's."""
    return world().value(policy) - world().value(world().behavior)


def one_size(trained_on: int, seed: int) -> Found:
    """What each rule releases of policies that were trained on so many stays, and what that gains."""
    stays = round(trained_on / TRAIN)
    both = world().simulate(stays + MANY, seed)
    place = np.arange(both.n_episodes)
    starts = [0, trained_on, trained_on + round(stays * SELECTION), stays, stays + MANY]
    train, selection, gate, many = (both.take((place >= a) & (place < b)) for a, b in pairwise(starts))
    fitted_on, log = (both.take(place < end) for end in starts[2:4])
    behavior, candidates = behavior_table(train, world().mask), trained(train, seed)
    chosen = candidates[best(candidates, behavior, train, selection, seed)]
    ensemble = models(fitted_on, len(behavior), seed)
    first, rules = climbed(chosen, behavior, fitted_on, gate, seed, ensemble)
    second, _ = climbed(chosen, behavior, fitted_on, many, seed, ensemble)
    safe, promised = spibb(log, behavior)
    return {
        GATE: first,
        GATE_MANY: second,
        **{rule: {"released": passes, "gain": gain(chosen)} for rule, passes in rules.items()},
        SPIBB: {"released": promised > 0, "gain": gain(safe)},
        "candidates": {name: gain(policy) for name, policy in candidates.items()},
    }


def end_to_end(seed: int) -> Found:
    return {str(n): one_size(n, seed * len(SIZES) + place) for place, n in enumerate(SIZES)}


def report(lines: Lines, path: Path) -> list[str]:
    rows = [("trained on", "rule", "released", "unsafe releases, of all runs", "mean exact gain of a release")]
    for n in map(str, SIZES):
        for rule in CHOICES:
            every = [line.found[n][rule] for line in lines.values()]
            gains = [one["gain"] for one in every if one["released"]]
            unsafe = sum(each <= 0 for each in gains)
            worth = f"{np.mean(gains):+.4f}" if gains else "—"
            rows.append((f"{int(n):,}", rule, f"{len(gains)} of {len(every)}", cell(unsafe, len(every)), worth))
    return [
        "## Policies that are really trained",
        "",
        *prose(
            "Bc, bcq, cql and iql with the settings of the example's YAML, but one seed of 500 gradient steps; the best of the "
            "four on the selection split climbs the ladder of caps. With 100 or 300 stays to train on, the gate's own 30% are "
            "fewer than the 500 that it asks for, so that nothing can be released; beside it, the same ladder on "
            f"{MANY:,} further stays, with the same nuisances. The rules of today judge the uncapped candidate at 5%; the gate "
            "spends what the ledger gives a first look (2.2%). SPIBB trains and releases on all stays. Unsafe: the exact value is "
            f"not above the behavior's. {cost(lines)}"
        ),
        *table(*rows),
    ]


EXPERIMENTS = {"end_to_end": Experiment(end_to_end, 200, report)}
