"""What is wrong in a log, batch by batch: the row-level rules and the structure of its episodes, in two passes."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from offrl_models.logs.index import Index, index
from offrl_models.logs.read import BATCH, Log, ahead
from offrl_models.logs.rules import Rule, rules

STRUCTURAL = (
    "C03",
    "C04",
    "C05",
    "C07",
    "C10",
    "C12",
    "C27",
    "C31",
)  # found across rows, or in batches of late rewards


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

    def reasons(self) -> dict[Path, str]:
        """Batches that break a rule -> one sentence about the first rule broken.

        A rule that sets rows of different batches against each other counts only where no batch breaks another rule: the
        earlier batch may itself be refused.
        """
        own = [violation for violation in self.violations if violation.check not in ("C03", "C04", "C31")]
        found: dict[Path, str] = {}
        for violation in own or self.violations:
            path = self.log.batches[violation.batch].path
            found.setdefault(path, violation.sentence(str(path)))
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
    violations: dict[tuple[int, int], Violation] = {}
    done = dict.fromkeys(found.rows, 0)
    for chunk in ahead(log.chunks()):
        if chunk.height == 0:
            continue
        batch = int(chunk[BATCH][0])
        for i, (rule, (n, first)) in enumerate(zip(table, broken_rows(chunk, table), strict=True)):
            if n:
                before = violations.get((batch, i))
                total, start = (before.rows + n, before.first) if before else (n, done[batch] + first)
                violations[batch, i] = Violation(
                    rule.check, batch, rule.column, total, start, rule.problem, rule.remedy
                )
        done[batch] += chunk.height
    structural = [
        Violation(p.check, batch, p.column, n, p.first[batch], p.problem, p.remedy)
        for p in found.problems
        for batch, n in p.rows.items()
    ]
    everything = sorted(
        [*violations.values(), *structural, *late_reward_violations(log)], key=lambda v: (v.batch, v.check)
    )
    return Screened(log, found, _table(found, table, everything), tuple(everything))


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


def late_reward_violations(log: Log) -> list[Violation]:
    """Late rewards that fit no decision, or contradict a reward that is known (C03, C31)."""
    numbers = {number for number, batch in enumerate(log.batches) if batch.rewards_only}
    if not numbers:
        return []
    contract = log.contract
    keys, terms = list(contract.reward_keys), list(contract.reward.terms)
    known = pl.concat((frame.select(*keys, *terms) for frame in log.chunks([*keys, *terms])), how="vertical_relaxed")
    come = pl.concat((log.raw(number, [*keys, *terms]) for number in sorted(numbers)), how="vertical_relaxed")
    value = pl.sum_horizontal(
        *(pl.col(name).cast(pl.Float64) * w for name, w in contract.reward.terms.items()), ignore_nulls=False
    )
    low, high = contract.reward.range
    first = pl.struct(terms).first().over(keys)
    come = come.with_columns(row=pl.int_range(pl.len()).over(BATCH))
    joined = come.join(known, on=keys, how="left", suffix="_known", maintain_order="left").with_columns(
        lost=~pl.struct(keys).is_in(known.select(pl.struct(keys)).to_series().implode()),
        contradicts=pl.any_horizontal(*(pl.col(n).ne_missing(pl.col(f"{n}_known")) for n in terms)) | (pl.struct(terms) != first),
        empty=value.is_null() | ~value.is_finite(),
        outside=~value.is_between(low, high),
    )  # fmt: skip
    said = {
        "lost": ("C31", keys[0], "with a reward for a decision that no batch has", "land its decisions first, or correct the key."),
        "contradicts": ("C03", contract.reward.name, "with another reward than the one known", "a reward is logged once; "
                        "correct the one that is wrong at the source."),
        "empty": ("C10", contract.reward.name, "missing, NaN or infinite", "leave out rewards that have not come."),
        "outside": ("C12", contract.reward.name, f"outside the reward range [{low:g}, {high:g}]",
                    "correct them or the range in the contract."),
    }  # fmt: skip
    violations = []
    for name, (check, column, problem, remedy) in said.items():
        wrong = joined.filter(
            pl.col(name).fill_null(False)
            & (pl.lit(True) if name in ("lost", "empty") else ~pl.col("lost") & ~pl.col("empty"))
        )
        for batch, n, first in (
            wrong.group_by(BATCH).agg(pl.len(), pl.col("row").min().alias("first")).sort(BATCH).iter_rows()
        ):
            violations.append(Violation(check, int(batch), column, int(n), int(first), problem, remedy))
    return violations
