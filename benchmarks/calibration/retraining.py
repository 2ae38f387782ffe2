"""A year of retraining: every week a new policy is judged, and one that passes is from then on the one to beat, and writes the log.

Until the middle of the year no policy is better than the behavior. Then one is, and it is shown again until it passes. After that
none is better than it: some are exactly as good, and some gain half as much on the behavior. All nuisances are fitted anew every
week, and every look is given what the ledger has left for it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from benchmarks.calibration import small
from benchmarks.calibration.judging import CONFIG, Table, asked, behavior_table, evaluation, judged, known_policies
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import cell, cost, count, prose, table
from offrl_models import ledger
from offrl_models.evaluation import BEHAVIOR, measure_rungs
from offrl_models.gate import Status
from offrl_models.ope.nulls import Family
from offrl_models.ope.worlds import World, icu_sepsis, joined
from offrl_models.schema import Episodes

WEEKS, BETTER_FROM = 52, 26
FIRST, WEEKLY = (11_667, 5_000), (210, 90)  # episodes to fit on and to judge by, in the shares of the permanent split
START = date(2026, 1, 5)
BEFORE = (
    Family("random half", 1.5),
    Family("random half", 2.0),
    Family("severe half", 2.0),
    Family("action swap", 1.5),
)
BETTER, AS_GOOD = Family("random half", 2.0), (Family("random half", 5.0), Family("severe half", 5.0))
SAME = 1e-6  # of values: their exact differences are tuned to 1e-8
YEAR = "a policy every week"


@dataclass(frozen=True)
class Offers:
    """Policies that a year is tried with, and the world whose exact values say which pass is false."""

    world: World
    gain: float  # of the better one

    def _found(self, gain: float, *families: Family, seed: int = 0) -> dict[str, Table]:
        known = known_policies(self.world, gain, families, seed)
        return {f"{name}, {gain:g}, half {seed}": policy for name, policy in known.items()}

    @cached_property
    def before(self) -> dict[str, Table]:
        """Exactly as good as the behavior."""
        return {name: each for half in range(3) for name, each in self._found(0.0, *BEFORE, seed=half).items()}

    @cached_property
    def better(self) -> dict[str, Table]:
        return self._found(self.gain, BETTER)

    @cached_property
    def after(self) -> dict[str, Table]:
        """Exactly as good as the better one, which is among them, or half as much better than the behavior."""
        return {
            **self.better,
            **{name: each for half in (1, 2) for name, each in self._found(self.gain, BETTER, seed=half).items()},
            **self._found(self.gain, *AS_GOOD),
            **self._found(self.gain / 2, BETTER, Family("random half", 1.5)),
        }

    @cached_property
    def tables(self) -> dict[str, Table]:
        return {BEHAVIOR: self.world.behavior, **self.before, **self.after}

    @cached_property
    def value(self) -> dict[str, float]:
        return {name: self.world.value(policy) for name, policy in self.tables.items()}


@cache
def sepsis_offers() -> Offers:
    return Offers(icu_sepsis(), 0.016)


@cache
def small_offers() -> Offers:
    return Offers(small.world(), 0.03)


def year(seed: int, offers: Offers) -> Found:
    """The verdict of every week, and whether a policy passed that is no better than the champion of that week."""
    seeds = np.random.SeedSequence(seed).generate_state(WEEKS).tolist()
    champion, writer = BEHAVIOR, offers.world
    looks: list[ledger.Look] = []
    passes, verdicts, released = [], [], False
    fitted, gate = _written(writer, FIRST, seeds[0])
    for week in range(WEEKS):
        if week:
            more = _written(writer, WEEKLY, seeds[week])
            fitted, gate = joined([fitted, more[0]]), joined([gate, more[1]])
        offered = offers.before if week < BETTER_FROM else offers.after if released else offers.better
        others = [name for name in offered if name != champion]
        name, today = others[week % len(others)], START + timedelta(weeks=week)
        level = ledger.level(looks, f"week {week}", f"log {week}", CONFIG, today)
        status = _status(offers, name, champion, (fitted, gate), level.alpha, seeds[week])
        looks.append(
            ledger.Look(f"week {week}", champion, f"log {week}", f"{today}", level.alpha, level.spends, status, None)
        )
        better = offers.value[name] > offers.value[champion] + SAME
        passes.append(int(status is Status.PASS and not better))
        verdicts.append(str(status))
        if status is Status.PASS:
            champion, writer = name, replace(offers.world, behavior=offers.tables[name])
            released |= better
    return {YEAR: {"passes": passes, "verdicts": verdicts, "released": released}}


def _written(writer: World, episodes: tuple[int, int], seed: int) -> tuple[Episodes, Episodes]:
    """What is written in a week: to fit on, and to judge by."""
    log = writer.simulate(sum(episodes), seed)
    fitted = np.arange(log.n_episodes) < episodes[0]
    return log.take(fitted), log.take(~fitted)


def _status(
    offers: Offers, name: str, champion: str, log: tuple[Episodes, Episodes], alpha: float, seed: int
) -> Status:
    """The gate on one policy against the champion."""
    shown = {each: offers.tables[each] for each in (name, champion) if each != BEHAVIOR}
    found = evaluation(shown, behavior_table(log[0], offers.world.mask), *log, seed)
    question = replace(asked(offers.world.n_states, alpha), champion=champion)
    (rung,) = measure_rungs([name], found, CONFIG, question)
    return Status(judged([rung.measures])["status"])


def on_sepsis(seed: int) -> Found:
    return year(seed, sepsis_offers())


def on_small(seed: int) -> Found:
    return year(seed, small_offers())


def _section(title: str, offers: Offers, lines: Lines) -> list[str]:
    """False passes in either part of the year, and what else came of it."""
    found = [line.found[YEAR] for line in lines.values()]
    parts = {
        "until a better one is there": slice(0, BETTER_FROM),
        "from then on": slice(BETTER_FROM, WEEKS),
        "ever": slice(0, WEEKS),
    }
    rows = [("weeks", "logs with a false pass", "verdicts")]
    for name, weeks in parts.items():
        false = cell(*count(lines, YEAR, lambda one, weeks=weeks: any(one["passes"][weeks])))
        every = Counter(verdict for one in found for verdict in one["verdicts"][weeks])
        rows.append((name, false, ", ".join(f"{status} {number}" for status, number in every.most_common())))
    released = sum(one["released"] for one in found)
    return [
        f"### {title}", "",
        *prose(f"The better policy gains {offers.gain:g}, and was released on {released} of {len(found)} logs. {cost(lines)}"),
        *table(*rows),
    ]  # fmt: skip


def sepsis_report(lines: Lines, path: Path) -> list[str]:
    intro = prose(
        f"{WEEKS} weeks, each with a policy of its own, judged at the error rate that the ledger has left for it, on a log that "
        f"begins with {sum(FIRST):,} episodes and grows by {sum(WEEKLY)} a week, three tenths of them to judge by; nuisances are "
        "fitted anew every week. What passes replaces the champion: it writes the log from then on, and is the one to beat. In the "
        f"first {BETTER_FROM} weeks no policy is better than the behavior; then one is, shown until it passes; after that each is "
        "exactly as good as it, or gains half as much on the behavior. A pass is false where the policy is no better than the "
        "champion of that week."
    )
    return ["## A new policy every week for a year", "", *intro, *_section("ICU-Sepsis", sepsis_offers(), lines)]


def small_report(lines: Lines, path: Path) -> list[str]:
    return _section("A small exact world", small_offers(), lines)


def has_verdicts(found: Found) -> bool:
    return all("verdicts" in one for one in found.values())


EXPERIMENTS = {
    "retraining": Experiment(on_sepsis, 60, sepsis_report, has_verdicts),
    "retraining_small": Experiment(on_small, 200, small_report, has_verdicts),
}
