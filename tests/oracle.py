"""An oracle in plain Python: what ingestion of a dirty log must refuse, take for a repetition or keep.

It works on rows, one at a time, and shares no code with the library but the type of its counts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from offrl_models.logs.ingest import Count
from tests.dirty import LEVELS, NOW, OBSERVED, SCHEMA, WORLD, Arrival, Batch, Row


@dataclass(frozen=True)
class Defect:
    check: str
    column: str
    rows: int
    first: int


@dataclass
class Found:
    """Defects of batches: `own` ones, and those `across` batches, which count once there are no others."""

    own: dict[str, list[Defect]] = field(default_factory=lambda: defaultdict(list))
    across: dict[str, list[Defect]] = field(default_factory=lambda: defaultdict(list))

    def note(self, check: str, column: str, rows: Mapping[str, list[int]], *, across: bool = False) -> None:
        for batch, numbers in rows.items():
            if numbers:
                (self.across if across else self.own)[batch].append(Defect(check, column, len(numbers), min(numbers)))


@dataclass(frozen=True)
class Place:
    """Where a row lies."""

    order: int  # of its batch
    number: int  # in its batch
    batch: str
    row: Row
    linked: bool  # the row before it in the batch is the one before it in its episode, and both were read together


def same(one: object, other: object) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other


def differs(one: Row, other: Row, columns: Iterable[str]) -> bool:
    return not all(same(one[name], other[name]) for name in columns)


def is_number(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def row_defects(row: Row) -> Iterator[tuple[str, str]]:
    """What is wrong with a row by itself: check and column."""
    for name in SCHEMA.names:
        if name != "allowed" and not is_number(row[name]):
            yield "C10", name
    for name in ("state", "next_state"):
        if row[name] is not None and not 0 <= row[name] < WORLD.n_states:
            yield "C11", name
    for check, name, high in (("C11", "age", 120), ("C11", "next_age", 120), ("C12", "cost", 10), ("C12", "reward", 1)):
        known = row[name] is not None and not math.isnan(row[name])
        if known and not 0 <= row[name] <= high and (check == "C11" or math.isfinite(row[name])):
            yield check, name
    for name in ("level", "next_level"):
        if row[name] is not None and row[name] not in LEVELS:
            yield "C11", name
    action, allowed = row["action"], row["allowed"]
    if action is not None and action not in range(3):
        yield "C13", "action"
    if allowed is None or len(allowed) != 3 or None in allowed or (action in range(3) and not allowed[action]):
        yield "C13", "allowed"
    if is_number(row["prob"]) and not 0 < row["prob"] <= 1:
        yield "C14", "prob"
    if row["version"] is not None and row["version"] != "v1":
        yield "C17", "version"
    if row["step"] is not None and row["step"] < 0:
        yield "C04", "step"
    if row["at"] is not None and row["at"] > NOW + timedelta(minutes=5):
        yield "C08", "at"


def flagged(row: Row) -> bool:
    return bool(row["terminated"]) or bool(row["truncated"])


def follows(before: Row, row: Row) -> bool:
    """Whether the rows are one decision and the next of one episode, by what they say of it."""
    if None in (before["episode"], before["step"], row["step"]) or before["episode"] != row["episode"]:
        return False
    return before["step"] + 1 == row["step"] and not flagged(before) and before["patient"] == row["patient"]


def violations(batches: list[Batch], chunk: int) -> Found:
    """Everything that is wrong in batches that can be read, in the order in which they are read."""
    found, places = Found(), []
    for order, batch in enumerate(batches):
        by_rule: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for number, row in enumerate(batch.rows):
            for check, column in row_defects(row):
                by_rule[check, column, ""].append(number)
            before = batch.rows[number - 1] if number % chunk else None
            linked = before is not None and follows(before, row)
            if linked and before is not None and None not in (before["terminated"], before["truncated"]):
                for name in OBSERVED:
                    if not same(before[f"next_{name}"], row[name]):
                        by_rule["C07", f"next_{name}", "adjacent"].append(number - 1)
                if row["at"] is not None and before["at"] is not None and row["at"] < before["at"]:
                    by_rule["C08", "at", "backwards"].append(number)
            if row["episode"] is not None and row["step"] is not None:
                places.append(Place(order, number, batch.name, row, linked))
        for n, (place, at) in blamed_joins(p for p in places if p.order == order):
            by_rule[n, at, "backwards" if n == "C08" else "apart"].append(place.number)
        for (check, column, _), numbers in by_rule.items():
            found.note(check, column, {batch.name: numbers})
    own_structure(places, found)
    if not found.own:
        structure_across(places, found)
    return found


def grouped(places: Iterable[Place], *, by_batch: bool = False) -> dict[Any, list[Place]]:
    """Places by episode, or by batch and episode, in order of reading."""
    groups: dict[Any, list[Place]] = defaultdict(list)
    for place in places:
        groups[(place.batch if by_batch else None, place.row["episode"])].append(place)
    return groups


def by_step(places: list[Place]) -> dict[int, list[Place]]:
    steps: dict[int, list[Place]] = defaultdict(list)
    for place in places:
        steps[place.row["step"]].append(place)
    return steps


def blamed_joins(places: Iterable[Place], *, across: bool = False) -> Iterator[tuple[str, tuple[Place, str]]]:
    """Decisions and the next one, read apart, that do not fit: the check, the later of the two and the column."""
    for group in grouped(places).values():
        steps = by_step(group)
        for step, here in steps.items():
            if step - 1 not in steps or any(place.linked for place in here):
                continue
            before, after = steps[step - 1][0], here[0]
            if across and before.order == after.order:
                continue
            later = after if after.order >= before.order else before
            if any(not same(before.row[f"next_{name}"], after.row[name]) for name in OBSERVED):
                yield "C07", (later, "next_state")
            if None not in (before.row["at"], after.row["at"]) and after.row["at"] < before.row["at"]:
                yield "C08", (later, "at")


def own_structure(places: list[Place], found: Found) -> None:
    rows: dict[str, dict[str, list[int]]] = {check: defaultdict(list) for check in ("C03", "C04", "C05", "C27")}
    for (batch, _), group in grouped(places, by_batch=True).items():
        steps = by_step(group)
        owner = steps[min(steps)][0].row["patient"]
        for place in group:
            both = place.row["terminated"] and place.row["truncated"]
            if both or (flagged(place.row) and place.row["step"] < max(steps)):
                rows["C05"][batch].append(place.number)
            if place.row["patient"] != owner:
                rows["C27"][batch].append(place.number)
            if differs(steps[place.row["step"]][0].row, place.row, SCHEMA.names):
                rows["C03"][batch].append(place.number)
    for group in grouped(places).values():
        steps = by_step(group)
        for step, here in steps.items():
            if step > 0 and step - 1 not in steps:
                rows["C04"][here[0].batch].append(here[0].number)
    for check, column in (("C03", "step"), ("C04", "step"), ("C05", "terminated"), ("C27", "patient")):
        found.note(check, column, rows[check])


def structure_across(places: list[Place], found: Found) -> None:
    """A batch that is right by itself and contradicts one that came before."""
    rows: dict[str, dict[str, list[int]]] = {check: defaultdict(list) for check in ("C03", "C05", "C07", "C08", "C27")}
    for group in grouped(places).values():
        steps = by_step(group)
        for place in group:
            earlier = [other for other in group if other.order < place.order]
            passed = any(flagged(other.row) and other.row["step"] < place.row["step"] for other in earlier)
            if passed or (flagged(place.row) and any(other.row["step"] > place.row["step"] for other in earlier)):
                rows["C05"][place.batch].append(place.number)
            if place.row["patient"] != group[0].row["patient"]:
                rows["C27"][place.batch].append(place.number)
            if differs(steps[place.row["step"]][0].row, place.row, SCHEMA.names):
                rows["C03"][place.batch].append(place.number)
    for check, (place, _) in blamed_joins(places, across=True):
        rows[check][place.batch].append(place.number)
    columns = {"C03": "step", "C05": "terminated", "C07": "next_state", "C08": "at", "C27": "patient"}
    for check, column in columns.items():
        found.note(check, column, rows[check], across=True)


@dataclass
class Verdict:
    """What ingestion must come to."""

    refused: dict[str, list[Defect] | str]  # by batch: every defect, or a pattern that the sentence fits
    twins: list[str]
    kept: list[Batch]
    count: Count

    @property
    def rows(self) -> list[Row]:
        """Every row that is kept, once."""
        once = {(row["episode"], row["step"]): row for batch in reversed(self.kept) for row in reversed(batch.rows)}
        return list(once.values())


FAULTS: dict[str, str] = {  # what the sentence says, as a pattern
    "missing column": r"column 'cost' is missing in all {} rows.*\(C01\)",
    "wrong type": r"column 'prob' is string in all {} rows where the contract needs a number \(C01\)",
    "twice": r"column 'reward' is there twice in all {} rows \(C01\)",
    "empty": r"the batch has 0 rows \(C01\)",
    "cut short": "cannot be read as Parquet",
}


def judge(arrival: Arrival) -> Verdict:
    raw = sorted(arrival.raw, key=lambda b: b.name)
    copies = [replace(arrival.landed[i], name=name) for i, name in arrival.copies]
    refused: dict[str, list[Defect] | str] = {}
    twins, files, contents = [], list(raw), [(b.rows, b.fault, b.text_ids) for b in raw]
    taken_names = {batch.name for batch in raw}
    read = sum(len(batch.rows) for batch in raw)
    quarantined = duplicates = 0
    for batch in sorted([*arrival.landed, *copies], key=lambda b: b.name):
        rows = 0 if batch.fault in ("empty", "cut short") else len(batch.rows)
        read += rows
        if any(same_file(batch, other) for other in contents):
            twins.append(batch.name)
            duplicates += rows
            continue
        contents.append((batch.rows, batch.fault, batch.text_ids))
        if batch.name in taken_names:
            refused[batch.name] = "another batch of this name was accepted before"
            quarantined += rows
        elif batch.fault:
            refused[batch.name] = FAULTS[batch.fault].format(rows)
            quarantined += rows
        else:
            files.append(batch)
    while True:
        found = violations(files, arrival.chunk)
        broken = found.own or found.across
        if not broken:
            break
        for name, defects in broken.items():
            refused[name] = defects
            quarantined += next(len(batch.rows) for batch in files if batch.name == name)
        files = [batch for batch in files if batch.name not in broken]
    kept = sum(len(batch.rows) for batch in files)
    distinct = len({(row["episode"], row["step"]) for batch in files for row in batch.rows})
    return Verdict(refused, twins, files, Count(read, distinct, quarantined, duplicates + kept - distinct))


def same_file(batch: Batch, other: tuple[list[Row], str, bool]) -> bool:
    rows, its_fault, text_ids = other
    if {batch.fault, its_fault} == {"empty"} and batch.text_ids == text_ids:
        return True
    alike = len(rows) == len(batch.rows) and not any(
        differs(a, b, SCHEMA.names) for a, b in zip(rows, batch.rows, strict=True)
    )
    return alike and (batch.fault, batch.text_ids) == (its_fault, text_ids)


def named(sentence: str) -> Defect:
    """The defect that a sentence of ingestion tells of."""
    match = re.search(r"column '(\w+)' has (\d+) rows? .*\((C\d\d)\), (?:the first is )?row (\d+); .+", sentence)
    assert match is not None, sentence
    return Defect(match[3], match[1], int(match[2]), int(match[4]))
