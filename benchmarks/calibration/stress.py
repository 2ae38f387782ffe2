"""Logs on which something is wrong: how often a policy that is no better passes, and what the verdicts are.

A small exact world, 11,667 episodes for the nuisances and 5,000 to judge by. What is wrong with the log is wrong with both parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration import small
from benchmarks.calibration.judging import (
    Table,
    asked,
    behavior_table,
    evaluation,
    judged,
    known_policies,
    measured,
)
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import cell, cost, prose, table, verdicts
from offrl_models.ope.behavior import estimate_propensities, estimate_table, halves
from offrl_models.ope.diagnostics import gamma_star
from offrl_models.ope.nulls import Family
from offrl_models.ope.worlds import (
    World,
    aliased,
    delayed,
    faded,
    hidden_odds,
    hidden_trait,
    misattributed,
    poisoned,
    random_policy,
    simulate_each,
    stale,
    unsettled,
)
from offrl_models.policies import BehaviorTable
from offrl_models.schema import Episodes, InputError

FITTED_ON, JUDGED_ON = 11_667, 5_000
ALL = FITTED_ON + JUDGED_ON
SOME = (
    Family("random half", 1.2),
    Family("random half", 2.0),
    Family("severe half", 2.0),
    Family("mild half", 1.5),
    Family("action swap", 1.5),
)
WIDE = (Family("random half", 2.0), Family("severe half", 2.0), Family("action swap", 2.0))
GAIN = 0.02
GONE = (0.004, 0.006, 0.008, 0.012, GAIN)  # gains until the middle of the log
EFFECT, ODDS = 0.1, (1.2, 1.5, 2.5)
OVERRIDDEN = (0.01, 0.02, 0.05)
REFUSED = "REFUSED"  # by the pipeline, before there is a gate


@dataclass(frozen=True)
class Shown:
    """A world as its log shows it, in groups of states: tables are over groups, values those of the world."""

    world: World
    group: np.ndarray
    behavior: Table

    @property
    def mask(self) -> np.ndarray:
        mask = np.zeros((self.group.max() + 1, self.world.n_actions), bool)
        np.logical_or.at(mask, self.group, self.world.mask)
        return mask

    def value(self, policy: Table) -> float:
        return self.world.value(policy[self.group])

    def q_values(self, policy: Table) -> Table:
        """Of a group, the mean over how often the behavior visits its states: the directions of the nulls only."""
        visits = self.world.occupancy(self.world.behavior)[:, None]
        q = self.world.q_values(policy[self.group])
        total, weight = np.zeros_like(policy), np.zeros((len(policy), 1))
        np.add.at(total, self.group, visits * q)
        np.add.at(weight, self.group, visits)
        return total / np.maximum(weight, 1e-12)

    def nulls(self, champion: float) -> dict[str, Table]:
        """Policies over groups with exactly the champion's value."""
        return known_policies(self, champion - self.value(self.behavior), SOME)


def same(world: World) -> Shown:
    return Shown(world, np.arange(world.n_states), world.behavior)


def verdict_of(
    log: Episodes, candidates: Mapping[str, Table], mask: np.ndarray, seed: int, *, estimated: bool = False,
    behavior: Table | None = None, hidden: bool = False,
) -> Found:  # fmt: skip
    """The gate on every policy. The whole behavior policy is the one that the pipeline would fit, where none is given."""
    fitted = np.arange(log.n_episodes) < FITTED_ON
    train, gate = log.take(fitted), log.take(~fitted)
    try:
        if estimated:
            gate = replace(gate, action_prob=estimate_propensities(gate, len(mask)))
            behavior = _filled(estimate_table(*(halves(train)[0], len(mask), halves(train)[1])), mask)
        elif behavior is None:
            behavior = behavior_table(train, mask)
    except InputError:
        return {name: {"passes": [0], "status": REFUSED, "decided_by": "behavior"} for name in candidates}
    found = evaluation(candidates, behavior, train, gate, seed)
    question = asked(len(mask), propensities="estimated" if estimated else "logged")
    verdict: dict[str, Any] = {name: judged(each) for name, each in measured(found, question).items()}
    if hidden:
        for name, one in verdict.items():
            one["gamma_star"] = gamma_star(gate, found.ratio[name], float(gate.return_.mean()))
    return verdict


def _filled(model: BehaviorTable, mask: np.ndarray) -> Table:
    import torch

    states = torch.arange(float(len(mask)))[:, None]
    with torch.no_grad():
        return model(states, torch.as_tensor(mask)).numpy()


@cache
def trait_world(odds: float) -> World:
    """A trait that nobody logs lifts rewards and steers actions; returns stay in [0, 1]."""
    base = small.world()
    scaled = np.where(base.terminal[:, None, None], 0.0, base.reward / 2 + EFFECT / 2)
    return hidden_trait(replace(base, reward=scaled), odds, EFFECT)


@cache
def pairs() -> Shown:
    """Two states of a step look alike; the behavior sees no more than the log."""
    world = small.world()
    group = (np.arange(world.n_states) + 1) // 2  # layers have an even number of states; the end is alone
    group = np.where(world.terminal, group.max(), np.arange(world.n_states) // 2)
    behavior = np.zeros((group.max() + 1, world.n_actions))
    np.add.at(behavior, group, world.behavior)
    behavior /= behavior.sum(1, keepdims=True)
    return Shown(aliased(replace(world, behavior=behavior[group]), group), group, behavior)


def spoiled(seed: int) -> Found:
    """Every way in which a log can be wrong, on one log each."""
    world = small.world()
    own = np.random.SeedSequence(seed).generate_state(20).tolist()
    nulls = same(world).nulls(world.value(world.behavior))
    log = world.simulate(ALL, own[0])
    mask = world.mask
    previous = 0.8 * world.behavior + 0.2 * random_policy(world, 1)
    found = {
        "nothing": verdict_of(log, nulls, mask, seed),
        "estimated propensities": verdict_of(log, nulls, mask, seed, estimated=True),
        "propensities of another draw, 2% of rows": verdict_of(
            misattributed(log, world, 0.02, own[1]), nulls, mask, seed
        ),
        "propensities of another draw, 20% of rows": verdict_of(
            misattributed(log, world, 0.2, own[1]), nulls, mask, seed
        ),
        "propensities of the policy before": verdict_of(
            stale(world, previous).simulate(ALL, own[2]), nulls, mask, seed
        ),
        **{
            f"better choices in {share:.0%} of the rows, not logged": _overridden(share, own[9], seed)
            for share in OVERRIDDEN
        },
        "rewards three steps late": verdict_of(delayed(log, 3), nulls, mask, seed),
        "last 10% of the rewards not in": verdict_of(unsettled(log, 0.1), nulls, mask, seed),
        "aliased states": _aliased(own[3], seed),
        **{f"hidden confounder, odds {odds:g}": confounded(odds, own[4], seed) for odds in ODDS},
        "5% poisoned episodes": _poisoned(log, nulls, own[5], seed),
        "drift, no better before or after": drifted(0.0, own[6], seed),
        f"drift, better by {GAIN:g} until the middle of the log, no better since": drifted(GAIN, own[7], seed),
        "several behavior policies": _several(own[8], seed, None),
        "several behavior policies, their mean known": _several(own[8], seed, "known"),
    }
    return found


def _overridden(share: float, log_seed: int, seed: int) -> Found:
    """Somebody who knows better overrides the policy whose propensities are logged; no better than both together."""
    world = small.world()
    both = (1 - share) * world.behavior + share * world.optimal()
    acted = stale(replace(world, behavior=both), world.behavior)
    nulls = same(world).nulls(acted.value(both))
    return verdict_of(acted.simulate(ALL, log_seed), nulls, world.mask, seed)


def _aliased(log_seed: int, seed: int) -> Found:
    shown = pairs()
    nulls = shown.nulls(shown.value(shown.behavior))
    return verdict_of(shown.world.simulate(ALL, log_seed), nulls, shown.mask, seed)


def confounded(odds: float, log_seed: int, seed: int) -> Found:
    world = trait_world(odds)
    n = world.n_states // 2
    assert world.logged is not None
    shown = Shown(world, np.tile(np.arange(n), 2), world.logged[:n])
    nulls = shown.nulls(world.value(world.behavior))
    return verdict_of(world.simulate(ALL, log_seed), nulls, shown.mask, seed, hidden=True)


def _poisoned(log: Episodes, nulls: Mapping[str, Table], log_seed: int, seed: int) -> Found:
    """Each policy is what somebody wants released."""
    world, found = small.world(), {}
    for name, policy in nulls.items():
        forged = poisoned(log, world, policy, 0.05, log_seed)
        found |= verdict_of(forged, {name: policy}, world.mask, seed, hidden=True)
    return found


def drifted(gain: float, log_seed: int, seed: int) -> Found:
    """In the second half of the log's days no choice matters any more; the split mixes the days."""
    world = small.world()
    later = np.random.default_rng(log_seed).random(ALL) < 0.5
    log = simulate_each([world, faded(world, 1.0)], later.astype(np.int64), log_seed)
    log = replace(log, recorded=later.astype(np.int64))
    return verdict_of(log, known_policies(world, gain, SOME if gain == 0 else WIDE), world.mask, seed)


def gone(seed: int) -> Found:
    """One log, and what each gain was worth until its middle; then none is left."""
    log_seed = int(np.random.SeedSequence(seed).generate_state(20)[7])
    return {f"{gain:g}": drifted(gain, log_seed, seed) for gain in GONE}


def _several(log_seed: int, seed: int, mean: str | None) -> Found:
    """Two behavior policies by turns, each with its own propensities; no better than both together."""
    world = small.world()
    others = [world, replace(world, behavior=random_policy(world, 1, uniform=0.5))]
    average = (others[0].behavior + others[1].behavior) / 2
    champion = float(np.mean([other.value(other.behavior) for other in others]))
    nulls = same(replace(world, behavior=average)).nulls(champion)
    of_episode = np.random.default_rng(log_seed).integers(0, 2, ALL)
    log = simulate_each(others, of_episode, log_seed)
    return verdict_of(log, nulls, world.mask, seed, behavior=average if mean else None)


def rows_of(lines: Lines) -> list[str]:
    rows = [
        ("what is wrong", "false passes, worst policy", "verdicts on all policies", "Γ* of WIS's sign, passes, median")
    ]
    for case in next(iter(lines.values())).found:
        logs = [line.found[case] for line in lines.values() if case in line.found]
        passes = {name: sum(one[name]["passes"][0] for one in logs) for name in logs[0]}
        every = [one for each in logs for one in each.values()]
        stars = [one["gamma_star"] for one in every if "gamma_star" in one and one["passes"][0]]
        star = f"{np.median(stars):.3f}" if stars else ""
        rows.append((case, cell(max(passes.values()), len(logs)), verdicts(every), star))
    return table(*rows)


def report(lines: Lines, path: Path) -> list[str]:
    odds = ", ".join(f"{hidden_odds(trait_world(each)):.2f}" for each in ODDS)
    return [
        "## Logs on which something is wrong",
        "",
        *prose(
            f"{len(SOME)} null policies in a small exact world, one look at {JUDGED_ON:,} episodes with nuisances fitted on "
            f"{FITTED_ON:,} others. REFUSED: the pipeline stops before the gate, where it fits the whole behavior policy to the "
            "logged propensities. With estimated propensities the error rate is halved and the certificate is AMBER. Two kinds no "
            "gate that sees the log alone can be sure to notice, and no verdict covers them: a hidden confounder, and "
            "episodes that were forged with the right propensities. There Γ* says how little hidden confounding would "
            f"turn the sign of WIS; the largest odds ratios that were really there are {odds}. What was better until the "
            f"middle of the log is better on average over it, and a pass is false all the same: the gain is gone. {cost(lines)}"
        ),
        *rows_of(lines),
    ]


def report_gone(lines: Lines, path: Path) -> list[str]:
    rows = [("better until the middle by", "on average by", *(str(family) for family in WIDE))]
    for gain in GONE:
        logs = [line.found[f"{gain:g}"] for line in lines.values()]
        passes = {name: sum(one[name]["passes"][0] for one in logs) for name in logs[0]}
        rows.append((f"{gain:g}", f"{gain / 2:g}", *(cell(count, len(logs)) for count in passes.values())))
    return [
        "### Gains that are gone",
        "",
        *prose(
            "How often a policy passes that was better until the middle of the log and is no better since, by how much better it "
            "was. A small gain is not shown to begin with, and of a large one the newer half shows that it is gone; the most "
            f"passes are to be found between. {cost(lines)}"
        ),
        *table(*rows),
    ]


EXPERIMENTS = {"stress": Experiment(spoiled, 400, report), "gone": Experiment(gone, 400, report_gone)}
