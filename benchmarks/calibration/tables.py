"""Shares with their intervals, and Markdown tables."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.calibration.store import Lines

Count = tuple[int, int]  # passes, of so many


def clopper_pearson(passes: int, logs: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a share."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, passes, logs - passes + 1)) if passes else 0.0
    high = float(stats.beta.ppf(1 - tail, passes + 1, logs - passes)) if passes < logs else 1.0
    return low, high


def below(passes: float, logs: int, level: float) -> bool:
    """Whether a share is less than `level`, whatever chance did."""
    return clopper_pearson(round(passes), logs)[1] < level


def allowed(logs: int, share: float = 0.05) -> int:
    """Most passes of so many logs at which the true share is at most `share` with 95% confidence; -1 where none are."""
    passes = np.arange(logs)
    return int((stats.beta.ppf(0.95, passes + 1, logs - passes) <= share).sum()) - 1


def cell(passes: int, logs: int) -> str:
    low, high = clopper_pearson(passes, logs)
    return f"{passes} of {logs} ({low:.1%} to {high:.1%})"


def prose(text: str) -> list[str]:
    """A paragraph, wrapped, and an empty line after it."""
    return [*textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False), ""]


def plain(passes: int, logs: int) -> str:
    return f"{passes} of {logs}"


def table(*rows: Sequence[str]) -> list[str]:
    head, *body = rows
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in body), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def count(lines: Lines, name: str, passed: Callable[[Any], bool]) -> Count:
    """Logs in which something passed, of those in which it was tried."""
    tried = [line.found[name] for line in lines.values() if name in line.found]
    return sum(bool(passed(one)) for one in tried), len(tried)


def ever(one: dict[str, Any]) -> bool:
    """Whether a policy passed at any look."""
    return any(one["passes"])


def names(lines: Lines) -> list[str]:
    return list(next(iter(lines.values())).found)


def cost(lines: Lines) -> str:
    """How many logs there are, what one of them costs, and when they were computed."""
    known = [line.cpu_s for line in lines.values() if line.cpu_s is not None]
    days = sorted({line.day for line in lines.values() if line.day is not None})
    told = [f"{len(lines)} logs", *([f"{np.median(known):.1f} s of one core each"] if known else [])]
    return f"{', '.join([*told, *([' to '.join(days[:: max(len(days) - 1, 1)])] if days else [])])}."


def verdicts(found: Iterable[dict[str, Any]]) -> str:
    """How often each verdict was given."""
    found = list(found)
    counted = Counter(one["status"] for one in found)
    return ", ".join(f"{status} {number}" for status, number in counted.most_common())
