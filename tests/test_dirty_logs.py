"""Dirty logs: an oracle in plain Python says what must be refused, repeated or kept, and ingestion must agree row for row.

Batches come with any mixture of defects. The oracle works on rows, one at a time; it shares no code with the library.
"""

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.contract import Contract
from offrl_models.logs.ingest import Count, Ingested, ingest
from offrl_models.logs.read import Log, batch_files
from offrl_models.logs.screen import screen
from offrl_models.ope.worlds import random_world
from tests.conftest import attributes

WORLD = random_world(3, 3, 6, 1.0, seed=7)
START, NOW = datetime(2026, 1, 1), datetime(2026, 6, 1)
LEVELS = ("low", "high")
KEYS = ("episode", "step")
OBSERVED = ("state", "age", "level")
Row = dict[str, Any]
ROLES = {
    "entity": "patient",
    "observation": [
        {"column": "state", "categories": WORLD.n_states},
        {"column": "age", "range": [0, 120]},
        {"column": "level", "categories": list(LEVELS)},
    ],
    "next_observation": [f"next_{name}" for name in OBSERVED],
    "costs": [{"column": "cost", "range": [0, 10]}],
    "decided_at": "at",
    "policy_version": "version",
    "policy_versions": ["v1"],
}
SCHEMA = pa.schema(
    [("episode", pa.int64()), ("patient", pa.int64()), ("step", pa.int64()), ("at", pa.timestamp("us"))]
    + [(f"{next_}state", pa.int64()) for next_ in ("", "next_")]
    + [(f"{next_}age", pa.float64()) for next_ in ("", "next_")]
    + [(f"{next_}level", pa.string()) for next_ in ("", "next_")]
    + [("action", pa.int64()), ("allowed", pa.list_(pa.bool_())), ("prob", pa.float64()), ("reward", pa.float64())]
    + [("cost", pa.float64()), ("terminated", pa.bool_()), ("truncated", pa.bool_()), ("version", pa.string())]
)


def contract_of(**roles: object) -> Contract:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= {**ROLES, **roles}
    return parse_pipeline(configured, "toy").logs


def clean_rows(ids: Iterable[int], seed: int = 3) -> list[Row]:
    """Whole episodes of the world with these ids, in order; two of them to a patient."""
    ids = list(ids)
    log, rows = WORLD.simulate(len(ids), seed=seed), []
    for i, number in zip(log.episode_of_row, range(log.n_rows), strict=True):
        step = int(log.step[number])
        row: Row = {"episode": ids[i], "patient": ids[i] // 2, "step": step, "at": START + timedelta(days=int(i), hours=step)}
        for next_, observed, later in (("", log.observation, 0), ("next_", log.next_observation, 1)):
            state = int(observed[number, 0])
            row |= {f"{next_}state": state, f"{next_}age": 40.0 + ids[i] % 40 + (step + later) / 8, f"{next_}level": LEVELS[state % 2]}
        row |= {"action": int(log.action[number]), "allowed": [True] * 3, "prob": float(log.action_prob[number])}
        row |= {"reward": round(abs(float(log.reward[number])) % 1, 3), "cost": float(step), "version": "v1"}
        rows.append(row | {"terminated": bool(log.terminated[number]), "truncated": bool(log.truncated[number])})
    return rows


def one_of_each_split() -> list[int]:
    """Even ids whose patients fall into train, selection and gate, so that no split is ever empty."""
    return [next(n for n in range(1000, 9000, 2) if bucket(n // 2, "offrl") in numbers) for numbers in SPLITS.values()]


BASE = clean_rows(one_of_each_split())
LOGS = [clean_rows(range(6), seed) for seed in range(8)]


# --- batches and what may be wrong with them --------------------------------------------------------------------------


@dataclass
class Batch:
    """A file to be: its name, its rows, and what is wrong with the file itself."""

    name: str
    rows: list[Row]
    fault: str = ""
    text_ids: bool = False

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.parquet"
        schema = SCHEMA
        if self.text_ids:
            for name in ("episode", "patient"):
                schema = schema.set(schema.get_field_index(name), pa.field(name, pa.large_string()))
        rows = [] if self.fault == "empty" else self.rows
        values = {name: [row[name] for row in rows] for name in SCHEMA.names}
        if self.text_ids:
            values |= {n: [None if v is None else str(v) for v in values[n]] for n in ("episode", "patient")}
        table = pa.table({n: pa.array(values[n], schema.field(n).type, from_pandas=False) for n in SCHEMA.names})
        if self.fault == "missing column":
            table = table.drop_columns(["cost"])
        if self.fault == "wrong type":
            table = table.set_column(table.schema.get_field_index("prob"), "prob", table["prob"].cast(pa.string()))
        if self.fault == "twice":
            table = table.append_column("reward", table["reward"])
        storage.write_parquet(path, table)
        if self.fault == "cut short":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path


def put(column: str, value: object) -> Callable[[list[Batch], int, Random], None]:
    def spoil(batches: list[Batch], which: int, random: Random) -> None:
        random.choice(batches[which].rows)[column] = value

    return spoil


def fault(name: str) -> Callable[[list[Batch], int, Random], None]:
    def spoil(batches: list[Batch], which: int, random: Random) -> None:
        batches[which].fault = name

    return spoil


def forbid(batches: list[Batch], which: int, random: Random) -> None:
    row = random.choice(batches[which].rows)
    row["allowed"] = [action != row["action"] for action in range(3)]


def end_both_ways(batches: list[Batch], which: int, random: Random) -> None:
    random.choice(batches[which].rows).update(terminated=True, truncated=True)


def wrong_next(batches: list[Batch], which: int, random: Random) -> None:
    row = random.choice(batches[which].rows)
    row["next_state"] = ((row["next_state"] or 0) + 1) % WORLD.n_states


def drop_row(batches: list[Batch], which: int, random: Random) -> None:
    """Leaves a gap, or an open episode, or an episode that begins late."""
    rows = batches[which].rows
    if len(rows) > 1:
        rows.pop(random.randrange(len(rows)))


def repeat(batches: list[Batch], which: int, random: Random) -> None:
    """Some rows again, in this or another batch."""
    rows = batches[which].rows
    start = random.randrange(len(rows))
    target = random.choice(batches).rows
    place = random.randint(0, len(target))
    target[place:place] = [dict(row) for row in rows[start : start + random.randint(1, 4)]]


def contradict(batches: list[Batch], which: int, random: Random) -> None:
    """A row again that says something else, in this or another batch."""
    row = dict(random.choice(batches[which].rows))
    row["cost"] = 9.5
    target = random.choice(batches).rows
    target.insert(random.randint(0, len(target)), row)


def go_on_after_the_end(batches: list[Batch], which: int, random: Random) -> None:
    """A row behind the last one of an episode, in this or another batch."""
    rows = batches[which].rows
    last = max((row for row in rows if row["step"] is not None), key=lambda row: (row["episode"] or 0, row["step"]), default=None)
    if last is not None:
        following = dict(last, step=last["step"] + 1, **{name: last[f"next_{name}"] for name in OBSERVED})
        target = random.choice(batches).rows
        target.insert(random.randint(0, len(target)), following)


def carry_over(batches: list[Batch], which: int, random: Random) -> None:
    """The last rows of a batch come with another one."""
    rows = batches[which].rows
    n = random.randint(1, 3)
    if len(rows) > n:
        moved = [rows.pop() for _ in range(n)][::-1]
        random.choice(batches).rows.extend(moved)


def shuffle(batches: list[Batch], which: int, random: Random) -> None:
    random.shuffle(batches[which].rows)


def name_ids(batches: list[Batch], which: int, random: Random) -> None:
    batches[which].text_ids = True


NAN, INF = math.nan, math.inf
DEFECTS: dict[str, Callable[[list[Batch], int, Random], None]] = {
    **{f"{column} {value}": put(column, value) for column in ("age", "next_age", "reward", "prob", "cost")
       for value in (NAN, None, INF, -INF)},
    **{f"{column} null": put(column, None) for column in SCHEMA.names if column not in ("age", "next_age", "reward", "prob", "cost")},
    **{f"{column} {value}": put(column, value) for column, value in (
        ("age", -1.0), ("reward", 5.0), ("prob", 0.0), ("prob", 1.5), ("cost", 99.0), ("step", -1), ("action", 7), ("action", -1),
        ("state", 99), ("next_state", -3), ("level", "odd"), ("next_level", "low"), ("patient", 7777), ("version", "v9"),
        ("at", datetime(2020, 1, 1)), ("at", datetime(2030, 1, 1)), ("terminated", True), ("truncated", True),
        ("terminated", False), ("allowed", [True]), ("allowed", [True, None, True]), ("episode", 1))},
    **{name: fault(name) for name in ("missing column", "wrong type", "twice", "empty", "cut short")},
    **{spoil.__name__: spoil for spoil in (forbid, end_both_ways, wrong_next)},
}  # fmt: skip
SHAPES: dict[str, Callable[[list[Batch], int, Random], None]] = {
    spoil.__name__: spoil
    for spoil in (drop_row, repeat, contradict, go_on_after_the_end, carry_over, shuffle, name_ids)
}


@dataclass
class Arrival:
    """What was accepted before, and what lies in the landing folder."""

    raw: list[Batch]
    landed: list[Batch]
    chunk: int  # rows that are read at a time
    copies: list[tuple[int, str]]  # of landed batches, under a new name


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    random = draw(st.randoms(use_true_random=False))
    episodes = draw(st.integers(2, 6))
    rows = [dict(row) for row in draw(st.sampled_from(LOGS)) if row["episode"] < episodes]
    cuts = sorted(random.sample(range(1, len(rows)), draw(st.integers(0, min(3, len(rows) - 1)))))
    batches = [Batch("", rows[start:end]) for start, end in pairwise([0, *cuts, len(rows)])]
    seen = draw(st.integers(0, len(batches) - 1))
    raw = [Batch("b0", [dict(row) for row in BASE]), *batches[:seen]]
    landed = batches[seen:]
    for number, batch in enumerate(raw[1:], 1):
        batch.name = f"b{number}"
    names = draw(st.permutations([f"{letter}{n}" for n, letter in enumerate("acdz"[: len(landed)])]))
    for batch, name in zip(landed, names, strict=True):
        batch.name = name
    spoilers = draw(st.lists(st.sampled_from(sorted(SHAPES)) | st.sampled_from(sorted(DEFECTS)), max_size=5))
    for name in spoilers:
        if name == "repeat" and random.random() < 0.3:  # what was accepted before arrives once more
            landed[0].rows.extend(dict(row) for row in random.choice(raw).rows[:3])
        (SHAPES | DEFECTS)[name](landed, random.randrange(len(landed)), random)
    copies = [(random.randrange(len(landed)), f"k{n}") for n in range(draw(st.sampled_from([0, 0, 0, 1, 2])))]
    again = draw(st.sampled_from(["", "", "", "same name", "same content", "name taken"]))
    if again == "same name":
        landed.append(Batch(raw[0].name, raw[0].rows))
    if again == "same content":
        landed.append(Batch("m", raw[-1].rows))
    if again == "name taken":
        landed.append(Batch(raw[0].name, raw[0].rows[1:]))
    return Arrival(raw, landed, draw(st.sampled_from([2, 5, 1000])), copies)


# --- the oracle -------------------------------------------------------------------------------------------------------


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
    for name, low, high, check in (("age", 0, 120, "C11"), ("next_age", 0, 120, "C11"), ("cost", 0, 10, "C12"), ("reward", 0, 1, "C12")):
        known = row[name] is not None and not math.isnan(row[name])
        if known and not low <= row[name] <= high and (check == "C11" or math.isfinite(row[name])):
            yield check, name
    for name in ("level", "next_level"):
        if row[name] is not None and row[name] not in LEVELS:
            yield "C11", name
    action, allowed = row["action"], row["allowed"]
    if action is not None and action not in range(3):
        yield "C13", "action"
    if allowed is None or len(allowed) != 3 or None in allowed or (action is not None and not (action in range(3) and allowed[action])):
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
            if step < 1 or step - 1 not in steps or any(place.linked for place in here):
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

    refused: dict[str, list[Defect] | str]  # by batch: defects of which one must be named, or what the sentence says
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
    copies = [Batch(name, arrival.landed[i].rows, arrival.landed[i].fault, arrival.landed[i].text_ids) for i, name in arrival.copies]
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
            gravest = min(defect.check for defect in defects)
            refused[name] = [defect for defect in defects if defect.check == gravest]
            quarantined += next(len(batch.rows) for batch in files if batch.name == name)
        files = [batch for batch in files if batch.name not in broken]
    kept = sum(len(batch.rows) for batch in files)
    distinct = len({(row["episode"], row["step"]) for batch in files for row in batch.rows})
    return Verdict(refused, twins, files, Count(read, distinct, quarantined, duplicates + kept - distinct))


def same_file(batch: Batch, other: tuple[list[Row], str, bool]) -> bool:
    rows, its_fault, text_ids = other
    if {batch.fault, its_fault} == {"empty"} and batch.text_ids == text_ids:
        return True
    alike = len(rows) == len(batch.rows) and not any(differs(a, b, SCHEMA.names) for a, b in zip(rows, batch.rows, strict=True))
    return alike and (batch.fault, batch.text_ids) == (its_fault, text_ids)


# --- ingestion against the oracle -------------------------------------------------------------------------------------


def everything_under(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): storage.sha256_file(path) for path in files}


def named(sentence: str) -> Defect:
    match = re.search(r"column '(\w+)' has (\d+) rows? .*\((C\d\d)\), (?:the first is )?row (\d+); .+", sentence)
    assert match is not None, sentence
    return Defect(match[3], match[1], int(match[2]), int(match[4]))


def check_dataset(log: Log, rows: list[Row], folder: Path) -> None:
    """The dataset holds exactly these rows."""
    expected: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["step"]):
        expected[str(row["episode"])].append(row)
    write_splits(log, "offrl", folder)
    seen = 0
    for name, numbers in SPLITS.items():
        part = read_splits(folder, name, salt="offrl", contract=log.contract)
        for place, episode in enumerate(part.episode_id):
            wanted, mine = expected[str(episode)], slice(*part.offsets[place : place + 2])
            assert bucket(wanted[0]["patient"], "offrl") in numbers
            assert str(part.entity[place]) == str(wanted[0]["patient"])  # type: ignore[index]
            for next_, matrix in (("", part.observation[mine]), ("next_", part.next_observation[mine])):
                told = [[r[f"{next_}state"], r[f"{next_}age"], LEVELS.index(r[f"{next_}level"])] for r in wanted]
                assert matrix.tolist() == told
            for column in ("action", "reward", "terminated"):
                assert getattr(part, column)[mine].tolist() == [row[column] for row in wanted]
            assert part.action_prob[mine].tolist() == [row["prob"] for row in wanted]
            assert part.costs["cost"][mine].tolist() == [row["cost"] for row in wanted]
            assert part.truncated[mine].tolist() == [False] * (len(wanted) - 1) + [not wanted[-1]["terminated"]]
        seen += part.n_rows
    assert seen == len(rows)


def take_in(pipeline: Pipeline) -> Ingested:
    return ingest(pipeline.folders, pipeline.config.logs, NOW)


@given(arrivals())
@settings(max_examples=120)
def test_nothing_valid_is_lost_nothing_invalid_enters_and_counts_add_up(arrival: Arrival) -> None:
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        read = Log.chunks_of
        patch.setattr(Log, "chunks_of", lambda self, number, columns=None, rows=0: read(self, number, columns, arrival.chunk))
        configured = attributes(WORLD.n_states, 3)
        configured["logs"] |= ROLES
        pipeline = Pipeline(parse_pipeline(configured, "toy"), Path(root))
        for batch in arrival.raw:
            batch.write(pipeline.folders.landing)
        take_in(pipeline).require_clean()
        landed = {batch.name: batch.write(pipeline.folders.landing) for batch in arrival.landed}
        for number, name in arrival.copies:
            landed[name] = pipeline.folders.landing / f"{name}.parquet"
            landed[name].write_bytes(landed[arrival.landed[number].name].read_bytes())
        check_against_oracle(pipeline, landed, judge(arrival))


def check_against_oracle(pipeline: Pipeline, landed: dict[str, Path], verdict: Verdict) -> None:
    content = {name: path.read_bytes() for name, path in landed.items()}
    before = {path.stem: path.read_bytes() for path in batch_files(pipeline.raw)}
    report = take_in(pipeline)
    refused = {Path(path).stem: reason for path, reason in report.quarantined.items()}
    assert set(refused) == set(verdict.refused)
    assert batch_files(pipeline.folders.landing) == []

    after = {path.stem: path.read_bytes() for path in batch_files(pipeline.raw)}
    assert after == before | {batch.name: content[batch.name] for batch in verdict.kept if batch.name not in before}
    for name, wanted in verdict.refused.items():
        assert (pipeline.folders.quarantine / f"{name}.parquet").read_bytes() == content[name]
        reason = json.loads((pipeline.folders.quarantine / f"{name}.reason.json").read_text())["reason"]
        assert reason.endswith(refused[name]) or refused[name] in reason.replace(f"{pipeline.root}/", "")
        assert f"landing/{name}.parquet" in reason
        assert re.search(wanted, reason) if isinstance(wanted, str) else named(reason) in wanted, (reason, wanted)
    somewhere = {*after.values(), *(content[name] for name in refused)}
    assert all(content[name] in somewhere for name in verdict.twins)

    assert report.count == verdict.count
    assert report.count.accepted + report.count.quarantined + report.count.duplicates == report.count.read
    assert report.rows == sum(len(batch.rows) for batch in verdict.kept)
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    assert screen(log, NOW).violations == ()
    check_dataset(log, verdict.rows, pipeline.root / "episodes")

    lying = everything_under(pipeline.folders.home)
    again = take_in(pipeline)
    again.require_clean()
    assert everything_under(pipeline.folders.home) == lying
    assert (again.version, again.rows, again.accepted) == (report.version, report.rows, [])
    assert again.count.accepted == report.count.accepted and again.count.read == report.rows
