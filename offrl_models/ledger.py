"""Every look at the gate's data, in a chain of entries that nothing rewrites, and the error rate that is left for the next one.

A hypothesis is "this ladder of policies beats this champion", tested by certain settings. Its first look is given an error rate;
later looks at the same hypothesis, on more data, are covered by the confidence sequence and spend nothing. A retrained candidate or
another setting makes a new hypothesis.
Three budgets bound what it is given: `alpha` for one release; `yearly_alpha` for all looks of 365 days together, a union bound; and
the levels of e-LOND, Xu & Ramdas (2024), "Online multiple testing with e-values", with the e-value 1 / alpha_t where the gate
passes at alpha_t and 0 elsewhere. Before the first release these levels are fixed and add up to `long_run_alpha`, so that is the
chance of any false release at all, however the looks depend on each other. After it, that the share of false ones among all
releases stays below it is proven for looks whose data are new; looks share gate data, and there the year's union bound holds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from offrl_models import storage
from offrl_models.gate import GateConfig, Status
from offrl_models.ope.eprocess import elond_level
from offrl_models.schema import InputError

YEAR = timedelta(days=365)
LEAST = 1e-6  # error rate below which a look could not end in a release


@dataclass(frozen=True)
class Look:
    """One entry: which policies were held against which champion, on what data, and what came of it."""

    hypothesis: str  # digest of the ladder, the champion, and the settings of the test
    champion: str  # sha256 of its graph
    gate_data: str  # digest of the episodes that judged
    date: str  # UTC
    alpha: float  # error rate that the hypothesis was given
    spent: float  # 0 where an earlier look at the same hypothesis paid
    verdict: str
    e_value: float | None
    split_by: str | None = None  # what the data were split by; None in entries that are older than this field
    rungs: list[str] | None = None  # sha256 of the graphs of the ladder, in its order; None in older entries


@dataclass(frozen=True)
class Level:
    """The error rate of the next look."""

    alpha: float
    spends: float
    number: int  # of the hypothesis, counted from 1
    looks: int  # earlier looks at this very hypothesis
    reason: str


def read(path: Path) -> list[Look]:
    """The entries in order; none before the first look. Raises InputError when an entry was altered or taken out."""
    looks, before = [], ""
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            entry = json.loads(line)
            look = Look(**{name: value for name, value in entry.items() if name != "hash"})
            intact = entry["hash"] == _hash(before, {name: value for name, value in entry.items() if name != "hash"})
        except (ValueError, TypeError, KeyError):
            intact, entry, look = False, {}, None
        if not intact or look is None:
            raise InputError(f"{path}: entry {number} is not what was written; restore the file from DVC or a backup.")
        looks.append(look)
        before = entry["hash"]
    return looks


def _hash(before: str, look: dict[str, Any]) -> str:
    return storage.sha256_bytes(before.encode() + b"\n" + storage.canonical_json(look))


def require_split(path: Path, split_by: str) -> None:
    """Raises InputError where a look was taken at a gate split that was made otherwise, which would now be trained on."""
    for look in read(path):
        if look.split_by not in (None, split_by):
            raise InputError(
                f"{path}: on {look.date} the gate judged logs that were split by {look.split_by}, and they are split by "
                f"{split_by} now: episodes that judged would be trained on, and trained ones would judge. Put it back, or start a "
                "dataset of its own."
            )


def level(
    looks: Sequence[Look], hypothesis: str, gate_data: str, config: GateConfig, today: date | None = None
) -> Level:
    """What a hypothesis may be tested at on some data; what it was tested at, where that look was taken before.

    Raises InputError when this year's budget is spent.
    """
    today = today or datetime.now(UTC).date()
    for place, look in enumerate(looks):
        if (look.hypothesis, look.gate_data) == (hypothesis, gate_data):
            looks, today = looks[:place], date.fromisoformat(look.date)
            break
    numbers = {name: number for number, name in enumerate(dict.fromkeys(look.hypothesis for look in looks), 1)}
    earlier = [look for look in looks if look.hypothesis == hypothesis]
    if earlier:
        reason = f"as at the first of {len(earlier)} earlier looks at this hypothesis, which paid for this one"
        return Level(earlier[0].alpha, 0.0, numbers[hypothesis], len(earlier), reason)
    number = len(numbers) + 1
    releases = len({look.hypothesis for look in looks if look.verdict == Status.PASS})
    recent = [look for look in looks if date.fromisoformat(look.date) > today - YEAR]
    budgets = {
        "one release": config.alpha,
        "this year": config.yearly_alpha - sum(look.spent for look in recent),
        "the long run": elond_level(config.long_run_alpha, number, releases),
    }
    tightest = min(budgets, key=lambda name: budgets[name])
    if budgets[tightest] < LEAST:
        if tightest != "this year":
            raise InputError(
                f"the budget of {tightest} leaves an error rate of {budgets[tightest]:.1g} for hypothesis {number}, and no look is "
                f"taken at less than {LEAST:g}; the champion stays."
            )
        first = min((date.fromisoformat(look.date) for look in recent if look.spent), default=today)
        raise InputError(
            f"the looks of the last 365 days have spent the error rate of {config.yearly_alpha:g} (gate.yearly_alpha); the next "
            f"look at a new candidate is possible on {first + YEAR}, and the champion stays until then."
        )
    alpha = budgets[tightest]
    return Level(alpha, alpha, number, 0, f"hypothesis {number}, bounded by the budget of {tightest}")


def enter(path: Path, look: Look, known: int | None = None) -> bool:
    """Append a look, unless the same hypothesis was judged on the same data before. Returns whether it was new.

    Its date is not before that of the last entry, though the clock may be. Raises InputError where it was judged before, with
    another verdict, and where there are other than the `known` entries by which it was given its error rate.
    """
    with storage.exclusive(path.with_name(f".{path.name}.lock")):
        looks = read(path)
        for old in looks:
            if (old.hypothesis, old.gate_data) == (look.hypothesis, look.gate_data):
                if old.verdict == look.verdict:
                    return False
                raise InputError(
                    f"{path}: these policies were judged on these logs on {old.date}, by the same settings, and the verdict was "
                    f"{old.verdict}; now it would be {look.verdict}. The first look counts: judge them again on more logs."
                )
        if known is not None and len(looks) != known:
            raise InputError(
                f"{path}: another look was entered while this one was taken, so its error rate may be spent; judge again."
            )
        lines = path.read_text().splitlines() if looks else []
        before = json.loads(lines[-1])["hash"] if lines else ""
        look = replace(look, date=max([look.date, *(old.date for old in looks)]))
        entry = {**asdict(look), "hash": _hash(before, asdict(look))}
        storage.write_bytes(path, "".join(f"{line}\n" for line in [*lines, json.dumps(entry)]).encode())
    return True
