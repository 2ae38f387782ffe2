"""How often the gate is wrong: policies whose exact difference to the behavior is known, judged on simulated logs.

    python -m benchmarks.calibrate                      # the whole study, in docs/calibration.md; stop and start it at will
    python -m benchmarks.calibrate --smoke              # two nulls, 60 logs, in minutes: fails above 9 false passes
    python -m benchmarks.calibrate --experiment size    # one experiment

The world is ICU-Sepsis: 716 states, 25 actions, exact values by dynamic programming. Every log is drawn anew: 11,667 stays to
fit the nuisances on and 5,000 to judge by, the shares of the permanent split. Each policy is one rung, judged by `gate.judge`
with the pipeline's own functions and its default thresholds, at alpha .05; fitted Q evaluation is tabular, on three bootstrap
resamples. Each finished log is one line of a file, and a line is never computed twice.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import harness
from benchmarks.calibration_report import write_report
from offrl_models import legs
from offrl_models.gate import GateConfig, Measures, Status, judge
from offrl_models.ope.diagnostics import effective_sample_size, largest_share, mean_ratio_z, worst_action_z
from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.eprocess import elond_level
from offrl_models.ope.importance import trajectory_weights, wis
from offrl_models.ope.intervals import bootstrap_shares
from offrl_models.ope.nulls import FAMILIES, Family, policies
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World, icu_sepsis
from offrl_models.schema import Episodes

Table = np.ndarray[Any, np.dtype[np.float64]]

ALPHA = 0.05
FITTED_ON, JUDGED_ON = 11_667, 5_000
LOOKS = tuple(range(500, 5_001, 500))
LONG_LOOKS = tuple(range(500, 10_001, 500))
GAINS = (0.002, 0.004, 0.008, 0.016)
SIZES = (1_000, 5_000, 20_000)
POWER_FAMILY = Family("random half", 2.0)
WEEKS, FIRST_WEEK, PER_WEEK = 52, 500, 90
MEMBERS = 3
SMOKE = (FAMILIES[0], FAMILIES[6])
SMOKE_LOGS, SMOKE_LIMIT = 60, 9
CONFIG = GateConfig(alpha=ALPHA)
RETURNS = (0.0, 1.0)


@cache
def world() -> World:
    return icu_sepsis()


@cache
def tables(difference: float, families: tuple[Family, ...] = FAMILIES, seed: int = 0) -> dict[str, Table]:
    """Policies by name, each with this exact difference to the behavior."""
    known = world()
    worth = (known.behavior * known.q_values(known.behavior)).sum(1)
    return {
        str(name): table for name, table in policies(known, worth, difference, families=families, seed=seed).items()
    }


class Nuisances:
    """What is fitted on other episodes than those that judge."""

    def __init__(self, fitted_on: Episodes, seed: int):
        self.fitted_on = fitted_on
        self.model = self._fit(fitted_on)
        rng, n = np.random.default_rng(seed), fitted_on.n_episodes
        self.members = []
        for _ in range(MEMBERS):
            copies = np.bincount(rng.integers(0, n, n), minlength=n)
            self.members.append(self._fit(_repeated(fitted_on, copies)))
        self.base = [_value(member, member.behavior) for member in self.members]

    @staticmethod
    def _fit(episodes: Episodes) -> TabularModel:
        model = TabularModel.fit(episodes, world().n_states)
        assert model is not None
        return model

    def gains(self, table: Table) -> list[float]:
        """Leg D: each member's difference between policy and behavior."""
        return [_value(member, table) - base for member, base in zip(self.members, self.base, strict=True)]


def _value(model: TabularModel, table: Table) -> float:
    """NaN, which no check passes, where the policy never ends an episode in the model."""
    if not model.ends(table):
        return float("nan")
    return float(model.initial @ (table * model.q_values(table)).sum(1))


def _repeated(episodes: Episodes, copies: np.ndarray) -> Episodes:
    """A bootstrap resample of episodes."""
    chosen = np.repeat(np.arange(episodes.n_episodes), copies)
    length = episodes.length[chosen]
    start = np.repeat(episodes.offsets[chosen], length)
    rows = start + np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    per_row = ("observation", "action", "mask", "reward", "terminated", "truncated", "action_prob")
    return replace(
        episodes,
        episode_id=np.arange(len(chosen)),
        offsets=np.append(0, np.cumsum(length)),
        final_observation=episodes.final_observation[chosen],
        **{name: getattr(episodes, name)[rows] for name in per_row},
    )


def first(episodes: Episodes, n: int) -> Episodes:
    return episodes.take(np.arange(episodes.n_episodes) < n)


class Candidate:
    """One policy on one log: what the gate measures of it at every look."""

    def __init__(self, table: Table, nuisances: Nuisances, gate: Episodes):
        state = gate.observation[:, 0].astype(np.int64)
        self.gate, self.nuisances, self.probs, self.table = gate, nuisances, table[state], table
        self.ratio = self.probs[np.arange(len(state)), gate.action] / gate.action_prob
        q = (
            nuisances.model.q_values(table) if nuisances.model.ends(table) else np.zeros_like(table)
        )  # leg A then refuses
        v = (table * q).sum(1)
        fitted_state = nuisances.fitted_on.observation[:, 0].astype(np.int64)
        self.side = legs.Side(
            table[fitted_state], self.probs, self.ratio, q[state, gate.action], v[state], np.zeros(len(state))
        )
        self.leg_a = legs.paired(self.side, self.side, nuisances.fitted_on, gate, nuisances.model)
        self.outcome = dr(gate, self.ratio, self.side.q, self.side.v).numerator.sum(1) - gate.return_
        self.weight = trajectory_weights(gate, self.ratio)
        self.fqe = nuisances.gains(table)
        visits = nuisances.model.visits < CONFIG.few_visits
        rare = world().behavior[state] < CONFIG.rare_prob
        self.few = (self.probs * visits[state]).sum(1)
        self.unsupported = (self.probs * rare).sum(1)

    def measures(self, n: int, alpha: float) -> Measures:
        """What the gate knows after the first `n` episodes."""
        gate, rows = first(self.gate, n), int(self.gate.offsets[n])
        doubt = self.leg_a if isinstance(self.leg_a, str) else ""
        x = self.outcome[:n] if isinstance(self.leg_a, str) else self.leg_a.outcome[:n]
        weight = self.ratio[:rows] if isinstance(self.leg_a, str) else self.leg_a.weight[:rows]
        overall = legs.contrast("all", x, alpha, CONFIG.planned_episodes)
        side = replace(
            self.side, probs=self.probs[:rows], ratio=self.ratio[:rows], q=self.side.q[:rows], v=self.side.v[:rows],
            next_v=self.side.next_v[:rows],
        )  # fmt: skip
        c = self.outcome[:n]
        return Measures(
            episodes=n, rows=rows, alpha=alpha, difference=overall.difference, lower_bound=overall.lower_bound,
            upper_bound=overall.upper_bound, bound="", doubt=doubt, e_value=legs.betting(side, gate, RETURNS, 0.0),
            trajectory_difference=float(c.mean()), trajectory_error=float(c.std(ddof=1) / np.sqrt(n)),
            fqe_differences=self.fqe, effective_transitions=effective_sample_size(weight),
            effective_episodes=effective_sample_size(self.weight[:n]), mean_ratio_z=mean_ratio_z(self.ratio[:rows]),
            worst_action_z=worst_action_z(gate, self.ratio[:rows], self.probs[:rows]),
            unsupported_mass=float(self.unsupported[:rows].mean()), few_visits_mass=float(self.few[:rows].mean()),
            ratio_q99=float(np.quantile(weight, 0.99)), ratio_max=float(weight.max()),
            chi_squared=float(np.square(weight).mean() - 1), largest_share=largest_share(x),
            without_top=legs.influence(x), sure_share=legs.sure_share(gate), propensities="logged",
        )  # fmt: skip

    def rules(self, alpha: float, seed: int) -> dict[str, bool]:
        """Whether the rules that people use today pass the policy, on the whole log and at one look."""
        returns, n = self.gate.return_, self.gate.n_episodes
        terms = wis(self.gate, self.ratio)
        influence = terms.influence() - (returns - returns.mean())
        t = (terms.estimate() - returns.mean()) / (influence.std(ddof=1) / np.sqrt(n))
        shares = bootstrap_shares(n, 200, seed)
        return {
            "best FQE": float(np.mean(self.fqe)) > 0,
            "WIS t-test": bool(t > stats.t.ppf(1 - alpha, n - 1)),
            "DR bootstrap": bool(np.quantile(shares @ self.outcome, alpha) > 0),
        }


def log(seed: int, judged_on: int = JUDGED_ON) -> tuple[Nuisances, Episodes]:
    both = world().simulate(FITTED_ON + judged_on, seed)
    fitted = np.arange(both.n_episodes) < FITTED_ON
    return Nuisances(both.take(fitted), seed), both.take(~fitted)


def _judged(candidate: Candidate, looks: Sequence[int], alpha: float = ALPHA) -> dict[str, Any]:
    verdicts = [judge("", candidate.measures(n, alpha), CONFIG) for n in looks]
    return {
        "passes": [int(v.status is Status.PASS) for v in verdicts],
        "decided_by": verdicts[-1].decided_by,
        "difference": verdicts[-1].measures.difference,
        "lower_bound": verdicts[-1].measures.lower_bound,
        "e_value": verdicts[-1].measures.e_value,
    }


def size(seed: int, families: tuple[Family, ...] = FAMILIES) -> dict[str, Any]:
    """Every null family on one log, at ten looks, beside the rules of today."""
    nuisances, gate = log(seed)
    found = {}
    for name, table in tables(0.0, families).items():
        candidate = Candidate(table, nuisances, gate)
        found[name] = {**_judged(candidate, LOOKS), "rules": candidate.rules(ALPHA, seed)}
    return found


def power(seed: int) -> dict[str, Any]:
    """Policies that are better by a known gain, at one look after so many episodes."""
    nuisances, gate = log(seed, max(SIZES))
    found = {}
    for gain in GAINS:
        (table,) = tables(gain, (POWER_FAMILY,)).values()
        found[str(gain)] = _judged(Candidate(table, nuisances, gate), SIZES)
    return found


def anytime(seed: int) -> dict[str, Any]:
    """Twenty looks at each of three nulls on a growing log."""
    nuisances, gate = log(seed, max(LONG_LOOKS))
    some = tuple(FAMILIES[place] for place in (1, 2, 4))
    return {name: _judged(Candidate(table, nuisances, gate), LONG_LOOKS) for name, table in tables(0.0, some).items()}


def retraining(seed: int) -> dict[str, Any]:
    """A new null every week on a growing log, each at the error rate that the ledger would give it."""
    nuisances, gate = log(seed, FIRST_WEEK + WEEKS * PER_WEEK)
    nulls = [table for half in range(2) for table in tables(0.0, FAMILIES[:5], half).values()]
    passes, releases = [], 0
    for week in range(WEEKS):
        alpha = min(elond_level(ALPHA, week + 1, releases), ALPHA)
        candidate = Candidate(nulls[week % len(nulls)], nuisances, gate)
        passes.append(_judged(candidate, [FIRST_WEEK + week * PER_WEEK], alpha)["passes"][0])
        releases += passes[-1]
    return {"weekly": {"passes": passes}}


EXPERIMENTS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "size": (size, 400),
    "power": (power, 200),
    "anytime": (anytime, 200),
    "retraining": (retraining, 100),
}


def _one_thread(experiment: Callable[[int], dict[str, Any]], seed: int) -> tuple[int, dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    return seed, experiment(seed)


def done(path: Path) -> dict[int, dict[str, Any]]:
    """The finished logs; a line that was cut short is computed again."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["seed"]] = entry["found"]
    return found


def run(name: str, experiment: Callable[[int], dict[str, Any]], logs: int, folder: Path) -> dict[int, dict[str, Any]]:
    """Whatever of `logs` logs is not done yet, one process per core."""
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    found = done(path)
    left = [seed for seed in range(1, logs + 1) if seed not in found]
    with path.open("a") as file, ProcessPoolExecutor(os.cpu_count()) as pool:
        for seed, result in _finished(pool, experiment, left):
            found[seed] = result
            file.write(json.dumps({"seed": seed, "found": result}) + "\n")
            file.flush()
            print(f"{name}: {len(found)} of {logs} logs", file=sys.stderr, flush=True)
    return found


def _finished(
    pool: ProcessPoolExecutor, experiment: Callable[[int], dict[str, Any]], seeds: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from pool.map(partial(_one_thread, experiment), seeds)


def smoke() -> int:
    """Two nulls on 60 logs. Returns the number of logs in which one of them passed."""
    found = (size(seed, SMOKE) for seed in range(1, SMOKE_LOGS + 1))
    return sum(any(any(policy["passes"]) for policy in one.values()) for one in found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--experiment", action="append", choices=EXPERIMENTS, help="only this one; may be repeated")
    parser.add_argument("--logs", type=int, help="simulated logs of each experiment, when fewer are enough")
    parser.add_argument("--folder", type=Path, default=Path(".calibration"), help="finished logs are kept here")
    parser.add_argument("--report", type=Path, default=Path("docs/calibration.md"))
    options = parser.parse_args()
    if options.smoke:
        wrong = smoke()
        print(f"{wrong} of {SMOKE_LOGS} logs passed a policy that is no better; at most {SMOKE_LIMIT} may")
        return int(wrong > SMOKE_LIMIT)
    for name in options.experiment or EXPERIMENTS:
        experiment, logs = EXPERIMENTS[name]
        run(name, experiment, min(options.logs or logs, logs), options.folder)
    results = {name: done(options.folder / f"{name}.jsonl") for name in EXPERIMENTS}
    write_report(results, options.report, harness.machine("numpy", "scipy"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
