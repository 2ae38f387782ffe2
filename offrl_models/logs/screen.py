"""What is wrong in a log, batch by batch: the row-level rules and the structure of its episodes, in two passes."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from offrl_models.logs.index import Index, index
from offrl_models.logs.read import BATCH, Log, ahead
from offrl_models.logs.rules import Rule, late_reward_rules, rules

# found across rows, or in batches of late rewards
STRUCTURAL = ("C03", "C04", "C05", "C07", "C08", "C10", "C12", "C27", "C31")


@dataclass(frozen=True)
class Violation:
    """Rows of one batch that break one rule."""

    check: str
    batch: int
    column: str
    rows: int
    first: int  # the first of them, counted from 0 in its file
    problem: str
    remedy: str
    across: bool = False  # it sets batches against each other

    def sentence(self, file: str) -> str:
        noun, which = ("row", "row") if self.rows == 1 else ("rows", "the first is row")
        said = (
            f"{file}: column {self.column!r} has {self.rows} {noun} {self.problem} ({self.check}), {which} {self.first}"
        )
        return f"{said}; {self.remedy}"


@dataclass(frozen=True)
class Screened:
    """A log and everything that is wrong in it."""

    log: Log
    index: Index
    broken: pl.DataFrame  # one row per batch: rows, and one column of broken rows per rule
    violations: tuple[Violation, ...]

    def reasons(self) -> dict[Path, list[str]]:
        """Batches that break a rule -> one sentence about each rule broken.

        A rule that sets batches against each other counts only where no batch breaks another rule: the earlier batch may
        itself be refused.
        """
        own = [violation for violation in self.violations if not violation.across]
        found: dict[Path, list[str]] = {}
        for violation in own or self.violations:
            path = self.log.batches[violation.batch].path
            found.setdefault(path, []).append(violation.sentence(str(path)))
        return found


def broken_rows(chunk: pl.DataFrame, table: list[Rule]) -> list[tuple[int, int]]:
    """For each rule, how many rows of a chunk break it, and which is the first."""
    flags = chunk.select(rule.broken.fill_null(False).alias(str(i)) for i, rule in enumerate(table))
    counts = flags.select(pl.all().sum()).row(0)
    return [(int(n), int(flags[str(i)].arg_max() or 0) if n else 0) for i, n in enumerate(counts)]


def screen(log: Log, now: datetime | None = None) -> Screened:
    """Hold every batch against every rule. `now` is when it is read: no decision may be later."""
    found = index(log)
    table = rules(log.contract, found.clock, now)
    broken = [
        Violation(p.check, batch, p.column, n, p.first[batch], p.problem, p.remedy, p.across)
        for p in found.problems
        for batch, n in p.rows.items()
    ]
    done = dict.fromkeys(found.rows, 0)
    for chunk in ahead(log.chunks()):
        if chunk.height == 0:
            continue
        batch = int(chunk[BATCH][0])
        for rule, (n, first) in zip(table, broken_rows(chunk, table), strict=True):
            if n:
                at = (rule.check, batch, rule.column, n, done[batch] + first)
                broken.append(Violation(*at, rule.problem, rule.remedy, rule.across))
        done[batch] += chunk.height
    keys = (log.contract.episode_id, log.contract.entity, log.contract.step, log.contract.decided_at)

    def order(found: Violation) -> tuple[int, bool, str]:
        """A key that is missing comes before what follows from that, such as gaps."""
        return found.batch, not (found.check == "C10" and found.column in keys), found.check

    everything = sorted(_together([*broken, *late_reward_violations(log, now)]), key=order)
    return Screened(log, found, _table(found, table, everything), tuple(everything))


def _together(violations: list[Violation]) -> list[Violation]:
    """One violation for each rule and batch: what chunks, or chunks and runs, found apart."""
    found: dict[tuple[Any, ...], Violation] = {}
    for v in violations:
        key = (v.batch, v.check, v.column, v.problem, v.across)
        before = found.get(key)
        found[key] = replace(v, rows=v.rows + before.rows, first=min(v.first, before.first)) if before else v
    return list(found.values())


def _table(found: Index, table: list[Rule], violations: list[Violation]) -> pl.DataFrame:
    """One row per batch: its rows, and how many of them break each rule; a rule that holds has its column too."""
    names = dict.fromkeys([*(rule.name for rule in table), *(f"{check}_structure" for check in STRUCTURAL)])
    counts = {name: dict.fromkeys(found.rows, 0) for name in names}
    known = {rule.name for rule in table}
    for v in violations:
        name = f"{v.check}_{v.column}"
        counts[name if name in known else f"{v.check}_structure"][v.batch] += v.rows
    columns = {name: list(per_batch.values()) for name, per_batch in counts.items()}
    return pl.DataFrame({"batch": list(found.rows), "rows": list(found.rows.values()), **columns})


def late_reward_violations(log: Log, now: datetime | None = None) -> list[Violation]:
    """Late rewards that fit no decision, contradict a reward that is known, or break a rule of rewards."""
    numbers = [number for number, batch in enumerate(log.batches) if batch.rewards_only]
    if not numbers:
        return []
    contract = log.contract
    keys, facts = list(contract.reward_keys), [*contract.reward_keys, *contract.reward.terms]
    facts += [contract.decided_at] if contract.decided_at and contract.decided_at not in keys else []
    known = pl.concat((frame.drop(BATCH) for frame in log.chunks(facts)), how="vertical_relaxed")
    known = known.select(*facts, pl.lit(True).alias("_known"))
    known = known.unique(keys, keep="first", maintain_order=True)
    found = []
    for number in numbers:
        come = log.raw(number, list(log.batches[number].kinds))
        joined = come.join(known, on=keys, how="left", suffix="_known", maintain_order="left")
        table = late_reward_rules(contract, now, come.columns)
        for rule, (n, first) in zip(table, broken_rows(joined, table), strict=True):
            if n:
                at = (rule.check, number, rule.column, n, first)
                found.append(Violation(*at, rule.problem, rule.remedy, rule.across))
    return found
