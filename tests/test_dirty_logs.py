"""Dirty logs: an oracle in plain Python says what must be refused, repeated or kept, and ingestion must agree row for row.

Batches come with any mixture of defects. The oracle works on rows, one at a time; it shares no code with the library.
"""

import json
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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
from offrl_models.ope.worlds import random_world
from offrl_models.schema import InputError
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
        row: Row = {
            "episode": ids[i],
            "patient": ids[i] // 2,
            "step": step,
            "at": START + timedelta(days=int(i) % 28, hours=step),
        }
        for next_, observed, later in (("", log.observation, 0), ("next_", log.next_observation, 1)):
            state = int(observed[number, 0])
            row |= {f"{next_}state": state, f"{next_}level": LEVELS[state % 2]}
            row[f"{next_}age"] = 40.0 + ids[i] % 40 + (step + later) / 8
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
    last = max(
        (row for row in rows if row["step"] is not None),
        key=lambda row: (row["episode"] or 0, row["step"]),
        default=None,
    )
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


def of_one_episode(batch: Batch, random: Random) -> list[Row]:
    """The rows of one of its episodes: all of them, or a part where other batches have the rest."""
    episode = random.choice(batch.rows)["episode"]
    return [row for row in batch.rows if row["episode"] == episode]


def change_patient(batches: list[Batch], which: int, random: Random) -> None:
    for row in of_one_episode(batches[which], random):
        row["patient"] = 7777


def turn_back_clocks(batches: list[Batch], which: int, random: Random) -> None:
    for row in of_one_episode(batches[which], random):
        row["at"] = row["at"] and row["at"] - timedelta(days=100)


def tear_seam(batches: list[Batch], which: int, random: Random) -> None:
    """The first observation of a batch is not the one that the batch before it announced."""
    batches[which].rows[0].update(age=77.0, state=3)


def end_too_early(batches: list[Batch], which: int, random: Random) -> None:
    """The last row of a batch ends its episode, whether or not another batch goes on."""
    batches[which].rows[-1]["truncated"] = True


def shuffle(batches: list[Batch], which: int, random: Random) -> None:
    random.shuffle(batches[which].rows)


def name_ids(batches: list[Batch], which: int, random: Random) -> None:
    batches[which].text_ids = True


NAN, INF = math.nan, math.inf
NUMBERS = ("age", "next_age", "reward", "prob", "cost")
DEFECTS: dict[str, Callable[[list[Batch], int, Random], None]] = {
    **{f"{column} {value}": put(column, value) for column in NUMBERS for value in (NAN, None, INF, -INF)},
    **{f"{column} null": put(column, None) for column in SCHEMA.names if column not in NUMBERS},
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
    for spoil in (
        drop_row, repeat, contradict, go_on_after_the_end, carry_over, change_patient, turn_back_clocks, tear_seam,
        end_too_early, shuffle, name_ids,
    )
}  # fmt: skip


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
    shapes, anything = st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(SHAPES | DEFECTS))
    spoilers = draw(st.lists(shapes, min_size=1, max_size=3) | st.lists(anything, min_size=1, max_size=4))
    for name in spoilers:
        if name == "repeat":  # also what was accepted before
            landed[0].rows.extend(dict(row) for row in random.choice(raw).rows[: random.randint(0, 3)])
        (SHAPES | DEFECTS)[name](landed, random.randrange(len(landed)), random)
    copies = [(random.randrange(len(landed)), f"k{n}") for n in range(draw(st.sampled_from([0, 0, 0, 1, 2])))]
    again = draw(st.sampled_from(["", "", "", "same name", "same content", "name taken"]))
    if again == "same name":
        landed.append(Batch(raw[0].name, raw[0].rows))
    if again == "same content":
        landed.append(Batch("m", raw[-1].rows))
    if again == "name taken":
        landed.append(Batch(raw[0].name, raw[0].rows[1:]))
    return Arrival(raw, landed, draw(st.sampled_from([7, 1000])), copies)


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
@settings(max_examples=50)
def test_nothing_valid_is_lost_nothing_invalid_enters_and_counts_add_up(arrival: Arrival) -> None:
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        read = Log.chunks_of
        patch.setattr(
            Log, "chunks_of", lambda self, number, columns=None, rows=0: read(self, number, columns, arrival.chunk)
        )
        configured = attributes(WORLD.n_states, 3)
        configured["logs"] |= ROLES
        pipeline = Pipeline(parse_pipeline(configured, "toy"), Path(root))
        for batch in arrival.raw:
            batch.write(pipeline.raw)
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
        told = json.loads((pipeline.folders.quarantine / f"{name}.reason.json").read_text())
        assert told["reason"] == told["all"][0] == refused[name]
        assert all(sentence.startswith(f"data/toy/landing/{name}.parquet") for sentence in told["all"])
        if isinstance(wanted, str):
            assert len(told["all"]) == 1 and re.search(wanted, told["reason"])
        else:
            assert Counter(map(named, told["all"])) == Counter(wanted)
    somewhere = {*after.values(), *(content[name] for name in refused)}
    assert all(content[name] in somewhere for name in verdict.twins)

    assert report.count == verdict.count
    assert report.count.accepted + report.count.quarantined + report.count.duplicates == report.count.read
    assert report.rows == sum(len(batch.rows) for batch in verdict.kept)
    check_dataset(Log.open(batch_files(pipeline.raw), pipeline.config.logs), verdict.rows, pipeline.root / "episodes")

    lying = everything_under(pipeline.folders.home)
    again = take_in(pipeline)
    again.require_clean()  # nothing that was accepted breaks a rule
    assert everything_under(pipeline.folders.home) == lying
    assert (again.version, again.rows, again.accepted) == (report.version, report.rows, [])
    assert again.count.accepted == report.count.accepted and again.count.read == report.rows


# --- what the property does not reach ---------------------------------------------------------------------------------


def pipeline_in(root: Path, **roles: object) -> Pipeline:
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= {**ROLES, **roles}
    return Pipeline(parse_pipeline(configured, "toy"), root)


def dataset_bytes(pipeline: Pipeline, name: str) -> dict[str, str]:
    """Digests of the files that the accepted log becomes."""
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    write_splits(log, "offrl", pipeline.root / name)
    return everything_under(pipeline.root / name)


def land(pipeline: Pipeline, name: str, rows: list[Row]) -> Path:
    return Batch(name, rows).write(pipeline.folders.landing)


@pytest.mark.parametrize(
    ("episodes", "gaps", "stands"), [(1000, 1, True), (1999, 1, True), (1000, 2, False), (999, 1, False)]
)
def test_one_episode_in_a_thousand_may_have_a_gap_and_is_left_out(
    tmp_path: Path, episodes: int, gaps: int, stands: bool
) -> None:
    rows = clean_rows(range(20_000, 20_000 + episodes))
    long = [row["episode"] for row in rows if row["step"] == 2][:gaps]
    lost = [row for row in rows if row["episode"] in long and row["step"] == 1]
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "b0", BASE)
    land(pipeline, "b1", [row for row in rows if row not in lost])
    report = take_in(pipeline)
    left = sum(row["episode"] in long for row in rows) - gaps
    if not stands:
        [reason] = report.quarantined.values()
        assert (
            f"column 'step' has {gaps} row{'s' * (gaps > 1)} following a gap in the steps of its episode (C04)"
            in reason
        )
        assert report.count == Count(len(BASE) + len(rows) - gaps, len(BASE), len(rows) - gaps, 0)
        return
    report.require_clean()
    assert report.left_out == gaps
    assert report.count == Count(len(BASE) + len(rows) - gaps, len(BASE) + len(rows) - gaps - left, left, 0)
    told = json.loads((pipeline.folders.quarantine / "episodes.json").read_text())
    assert [(fact["episode"], fact["rows"]) for fact in told] == [(long[0], left)]
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    check_dataset(log, [row for row in BASE + rows if row["episode"] not in long], tmp_path / "left_out")
    land(pipeline, "b2", lost)  # the missing decision comes after all
    assert take_in(pipeline).left_out == 0
    assert json.loads((pipeline.folders.quarantine / "episodes.json").read_text()) == []
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    check_dataset(log, BASE + rows, tmp_path / "complete")


def test_an_open_episode_is_truncated_until_a_later_batch_completes_it(tmp_path: Path) -> None:
    rows = clean_rows(range(8), seed=5)
    whole, parts = pipeline_in(tmp_path / "whole"), pipeline_in(tmp_path / "parts")
    land(whole, "b0", BASE + rows)
    take_in(whole).require_clean()
    early = [row for row in rows if row["step"] < 2]
    land(parts, "z", BASE + early)
    report = take_in(parts)
    still_open = {row["episode"] for row in rows if row["step"] == 2}
    assert report.episodes == {"episodes": 11, "open": len(still_open), "waiting for rewards": 0}
    check_dataset(Log.open(batch_files(parts.raw), parts.config.logs), BASE + early, tmp_path / "early")
    land(parts, "a", [row for row in rows if row["step"] >= 2][::-1])  # sorts before what it completes
    report = take_in(parts)
    assert report.episodes["open"] == 0 and report.count == Count(len(BASE + rows), len(BASE + rows), 0, 0)
    assert dataset_bytes(whole, "dataset") == dataset_bytes(parts, "dataset")


def test_the_content_of_an_accepted_batch_under_another_name_changes_nothing(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "b0", BASE)
    before, lying = take_in(pipeline), everything_under(pipeline.folders.home)
    land(pipeline, "other", BASE)
    after = take_in(pipeline)
    after.require_clean()
    assert (after.version, after.rows, after.accepted) == (before.version, before.rows, [])
    assert after.count == Count(2 * len(BASE), len(BASE), 0, len(BASE))
    assert everything_under(pipeline.folders.home) == lying


def test_where_every_batch_is_refused_the_error_says_why_of_each(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "a", [{**row, "prob": 0.0} for row in BASE])
    Batch("b", BASE, "cut short").write(pipeline.folders.landing)
    Batch("c", BASE, "empty").write(pipeline.folders.landing)
    with pytest.raises(InputError) as refusal:
        take_in(pipeline)
    for said in (
        "a.parquet: column 'prob' has 16 rows",
        "b.parquet cannot be read as Parquet",
        "c.parquet: the batch has 0 rows",
    ):
        assert f"data/toy/landing/{said}" in str(refusal.value)
    assert len(list(pipeline.folders.quarantine.glob("*.reason.json"))) == 3 and not pipeline.raw.exists()


def test_reasons_of_refused_batches_of_one_name_stand_side_by_side(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "b0", BASE)
    take_in(pipeline)
    for value in (0.0, 2.0):
        land(pipeline, "bad", [{**row, "prob": value} for row in clean_rows(range(2))])
        take_in(pipeline)
    assert sorted(path.name for path in pipeline.folders.quarantine.iterdir()) == [
        "bad-1.parquet", "bad-1.reason.json", "bad.parquet", "bad.reason.json",
    ]  # fmt: skip
    before = everything_under(pipeline.folders.quarantine)
    (pipeline.folders.quarantine / "bad.parquet").unlink()  # someone took the file away
    land(pipeline, "bad", [{**row, "prob": -1.0} for row in clean_rows(range(2))])
    take_in(pipeline)
    after = everything_under(pipeline.folders.quarantine)
    assert after["bad.reason.json"] == before["bad.reason.json"] and "bad-2.reason.json" in after


def test_a_batch_that_contradicts_an_accepted_one_is_refused_and_nothing_else(tmp_path: Path) -> None:
    """It is the later batch that is wrong, whatever the rule: accepted ones stand, and the contract is not blamed."""
    pipeline = pipeline_in(tmp_path)
    rows = clean_rows([0, 1, 2, 3], seed=6)
    last = next(row for row in rows if row["terminated"] and row["step"] > 1)
    follower = {**last, "step": last["step"] + 1, **{name: last[f"next_{name}"] for name in OBSERVED}}
    early = [row for row in rows if row["episode"] == last["episode"] and row["step"] < last["step"]]
    land(pipeline, "b", BASE + [row for row in rows if row["episode"] != last["episode"]] + [early[-1]] + early[:-1])
    take_in(pipeline).require_clean()
    wrong = {
        "C05": [last, follower],
        "C07": [{**last, "state": (last["state"] + 1) % WORLD.n_states}],
        "C08": [{**last, "at": last["at"] - timedelta(days=9)}],
        "C27": [{**last, "patient": 7777}],
        "C03": [{**early[0], "cost": 9.0}],
    }
    for check, batch in wrong.items():
        land(pipeline, f"a-{check}", batch)  # names before that of the accepted batch
        report = take_in(pipeline)
        [reason] = report.quarantined.values()
        assert named(reason).check == check and report.batches == 1
    land(pipeline, "c", [last])
    take_in(pipeline).require_clean()
    land(pipeline, "d", [follower])
    [reason] = take_in(pipeline).quarantined.values()
    assert (
        "column 'terminated' has 1 row at odds with an earlier batch about where their episode ends (C05), row 0"
        in reason
    )


def test_where_batches_do_not_fit_together_the_one_that_came_later_is_blamed(tmp_path: Path) -> None:
    """By the order of batches, not of steps; and what an earlier batch says already is not held against a later one."""
    rows = [row for row in clean_rows(range(6)) if row["episode"] == 0]
    assert len(rows) > 2
    torn = [*clean_rows([40]), {**rows[0], "next_age": 99.0}]
    orders = {
        "b": {"a": rows[1:], "b": torn},  # the later batch has the earlier step, without which there is a gap
        "c": {"b": torn, "c": rows[1:], "d": torn + torn},  # the batch before has it, and so has one that follows
    }
    for number, (blamed, batches) in enumerate(orders.items()):
        pipeline = pipeline_in(tmp_path / str(number))
        land(pipeline, "Base", BASE)
        for name, part in batches.items():
            land(pipeline, name, part)
        report = take_in(pipeline)
        reason = report.quarantined[f"data/toy/quarantine/{blamed}.parquet"]
        assert named(reason) == Defect("C07", "next_state", 1, len(torn) - 1 if blamed == "b" else 0)
        assert report.accepted == ["Base.parquet", *(["b.parquet", "d.parquet"] if blamed == "c" else [])]


def test_columns_of_other_widths_kinds_and_encodings_are_the_same_rows(tmp_path: Path) -> None:
    """Ids as text, as unsigned and as dictionaries, numbers of other widths, fixed lists: still exact repetitions."""
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "a", BASE)
    table = pq.read_table(pipeline.folders.landing / "a.parquet")

    def recast(**types: pa.DataType) -> pa.Table:
        found = table
        for name, dtype in types.items():
            column = found[name].combine_chunks()
            values = column.dictionary_encode() if pa.types.is_dictionary(dtype) else column.cast(dtype)
            found = found.set_column(found.schema.get_field_index(name), name, values)
        return found

    words = pa.dictionary(pa.int32(), pa.string())
    variants = [
        recast(
            episode=pa.string(), patient=pa.large_string(), allowed=pa.list_(pa.bool_(), 3), level=pa.large_string()
        ),
        recast(episode=pa.uint64(), step=pa.int8(), state=pa.uint16(), at=pa.timestamp("ns"), version=words),
        recast(step=pa.uint64(), action=pa.int32(), episode=words, at=pa.timestamp("ms")),
        table.select(table.schema.names[::-1]).append_column("note", [["not named"] * len(table)]),
    ]
    for number, variant in enumerate(variants):
        storage.write_parquet(pipeline.folders.landing / f"b{number}.parquet", variant)
    report = take_in(pipeline)
    report.require_clean()
    assert report.count == Count(5 * len(BASE), len(BASE), 0, 4 * len(BASE))
    check_dataset(Log.open(batch_files(pipeline.raw), pipeline.config.logs), BASE, tmp_path / "dataset")


def test_ids_and_steps_beyond_64_bits_are_refused_or_read_and_never_a_crash(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "a", BASE)
    land(pipeline, "b", clean_rows([0, 2]))
    land(pipeline, "c", clean_rows([4, 6]))
    for name, column, large in (("b", "episode", 2**64 - 9), ("c", "step", 2**64 - 9)):
        path = pipeline.folders.landing / f"{name}.parquet"
        table = pq.read_table(path)
        values = pa.array([value + large if value > 1 else value for value in table[column].to_pylist()], pa.uint64())
        storage.write_parquet(path, table.set_column(table.schema.get_field_index(column), column, values))
    report = take_in(pipeline)
    assert report.accepted == ["a.parquet", "b.parquet"]
    [reason] = report.quarantined.values()
    assert named(reason).check == "C04" and "with a step outside 0 to" in reason


@pytest.mark.parametrize("column", ["episode", "step"])
def test_a_batch_without_a_single_key_is_refused_and_not_a_crash(tmp_path: Path, column: str) -> None:
    pipeline = pipeline_in(tmp_path)
    land(pipeline, "a", [{**row, column: None} for row in BASE])
    with pytest.raises(InputError, match=rf"column '{column}' has {len(BASE)} rows missing, NaN or infinite \(C10\)"):
        take_in(pipeline)


@pytest.mark.parametrize("step", ["step", None])
@pytest.mark.parametrize("column", ["at", "reward"])
def test_a_damaged_column_refuses_its_batch_alone_at_whatever_pass_it_is_met(
    tmp_path: Path, step: str | None, column: str
) -> None:
    """Where the log has no step, the keys are read before anything else is."""
    pipeline = pipeline_in(tmp_path, step=step)
    land(pipeline, "a", BASE)
    path = land(pipeline, "b", clean_rows(range(200)))
    chunk = pq.read_metadata(path).row_group(0).column(SCHEMA.get_field_index(column))
    content = bytearray(path.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(bytes(content))
    report = take_in(pipeline)
    assert report.accepted == ["a.parquet"]
    [reason] = report.quarantined.values()
    assert "landing/b.parquet cannot be read as Parquet" in reason


# --- rewards that come later ------------------------------------------------------------------------------------------

WINDOW = timedelta(hours=48)
LATE = {"reward": {"column": "reward", "range": [0, 1], "window_hours": 48, "arrived_at": "arrived", "missing": 0.25}}
LATE_SCHEMA = SCHEMA.append(pa.field("arrived", pa.timestamp("us")))


def write_rows(path: Path, rows: list[Row], schema: pa.Schema = LATE_SCHEMA) -> Path:
    table = {field.name: pa.array([row[field.name] for row in rows], field.type, from_pandas=False) for field in schema}
    storage.write_parquet(path, pa.table(table, schema))
    return path


def write_rewards(pipeline: Pipeline, name: str, rows: list[Row], step: pa.DataType | None = None) -> Path:
    """A batch that has the key and the reward only."""
    kept = [LATE_SCHEMA.field(column) for column in ("episode", "reward", "arrived")]
    schema = pa.schema([*kept, pa.field("step", step or pa.int64())])
    return write_rows(pipeline.folders.landing / f"{name}.parquet", rows, schema)


def told(row: Row) -> Row:
    """A decision whose reward came after a day."""
    return {**row, "arrived": row["at"] + timedelta(days=1)}


def untold(row: Row) -> Row:
    return {**row, "reward": None, "arrived": None}


def late_pipeline(root: Path, rows: list[Row]) -> Pipeline:
    """With whole episodes in every split, and decisions whose rewards have not come."""
    pipeline = pipeline_in(root, **LATE)
    write_rows(pipeline.folders.landing / "b0.parquet", [told(row) for row in BASE])
    write_rows(pipeline.folders.landing / "b1.parquet", [untold(row) for row in rows])
    return pipeline


def entered(pipeline: Pipeline) -> set[int]:
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    write_splits(log, "offrl", pipeline.root / "now")
    parts = [read_splits(pipeline.root / "now", name, salt="offrl", contract=log.contract) for name in SPLITS]
    return {int(episode) for part in parts for episode in part.episode_id}


@given(st.randoms(use_true_random=False), st.sampled_from(LOGS))
@settings(max_examples=6)
def test_late_rewards_make_the_dataset_of_rewards_known_at_once(random: Random, log: list[Row]) -> None:
    """Batch by batch: what waits is left out; what never came counts as the contract says; in the end nothing tells."""
    rows = [told(row) for row in log]
    never = [row for row in rows if random.random() < 0.2]
    coming = [row for row in rows if row not in never and random.random() < 0.7]
    closing = [
        told(row) | {"at": START + timedelta(days=60), "arrived": START + timedelta(days=60)}
        for row in clean_rows([5000])
    ]
    with tempfile.TemporaryDirectory() as root:
        late, once = pipeline_in(Path(root) / "late", **LATE), pipeline_in(Path(root) / "once", **LATE)
        base = [told(row) for row in BASE]
        write_rows(late.folders.landing / "b0.parquet", base)
        write_rows(late.folders.landing / "b1.parquet", [untold(r) if r in never + coming else r for r in rows])
        random.shuffle(coming)
        cut = random.randint(0, len(coming))
        parts = [part + random.sample(part, len(part) // 3) for part in (coming[:cut], coming[cut:])]
        for number, part in enumerate([[], *parts]):
            if part:
                write_rewards(late, f"c{number}", part, step=random.choice([pa.int64(), pa.int16()]))
            report = take_in(late)
            report.require_clean()
            arrived = [row for some in parts[:number] for row in some]
            known = [row for row in rows if row not in never + coming] + arrived
            clock = max(row["at"] for row in base + rows), max(row["arrived"] for row in base + known)
            waits = {row["episode"] for row in rows if row not in known and row["at"] + WINDOW > max(clock)}
            assert report.episodes["waiting for rewards"] == len(waits)
            assert entered(late) == {row["episode"] for row in base + rows} - waits
            repeats = sum(len(some) - len({(r["episode"], r["step"]) for r in some}) for some in parts[:number])
            assert report.count == Count(report.rows, report.rows - repeats, 0, repeats)
        write_rows(late.folders.landing / "d.parquet", closing)
        take_in(late).require_clean()
        write_rows(
            once.folders.landing / "b.parquet",
            base + [{**r, "reward": 0.25} if r in never else r for r in rows] + closing,
        )
        take_in(once).require_clean()
        assert dataset_bytes(late, "dataset") == dataset_bytes(once, "dataset")


ROWS = clean_rows(range(4), seed=4)
TOLD = [told(row) for row in ROWS]
WRONG_REWARDS: dict[str, tuple[list[Row], Defect]] = {
    "of no decision": ([*TOLD, {**TOLD[0], "step": 99}], Defect("C31", "episode", 1, len(TOLD))),
    "twice and not equal": ([*TOLD[:3], {**TOLD[1], "reward": 0.999}], Defect("C03", "reward", 1, 3)),
    "missing": ([TOLD[0], {**TOLD[1], "reward": None}], Defect("C10", "reward", 1, 1)),
    "NaN": ([{**TOLD[0], "reward": NAN}, TOLD[1]], Defect("C10", "reward", 1, 0)),
    "infinite": ([{**TOLD[0], "reward": -INF}], Defect("C10", "reward", 1, 0)),
    "out of range": ([TOLD[0], {**TOLD[1], "reward": 1.5}, {**TOLD[2], "reward": -0.5}], Defect("C12", "reward", 2, 1)),
    "of the future": ([{**TOLD[0], "arrived": NOW + timedelta(days=1)}], Defect("C08", "arrived", 1, 0)),
    "before the decision": (
        [TOLD[1], {**TOLD[0], "arrived": START - timedelta(days=1)}],
        Defect("C08", "arrived", 1, 1),
    ),
}


@pytest.mark.parametrize("name", WRONG_REWARDS)
@pytest.mark.parametrize("together", [True, False])
def test_a_wrong_late_reward_refuses_its_batch_and_not_the_decisions(tmp_path: Path, name: str, together: bool) -> None:
    rows, defect = WRONG_REWARDS[name]
    pipeline = late_pipeline(tmp_path, ROWS)
    if not together:
        take_in(pipeline).require_clean()
    write_rewards(pipeline, "a", rows)
    report = take_in(pipeline)
    [reason] = report.quarantined.values()
    assert named(reason) == defect and "landing/a.parquet" in reason
    assert report.batches == 2
    assert report.count == Count(len(BASE) + len(ROWS) + len(rows), len(BASE) + len(ROWS), len(rows), 0)
    write_rewards(pipeline, "c", TOLD)  # the right ones are not held against what was refused
    take_in(pipeline).require_clean()


def test_a_reward_other_than_the_one_known_is_a_contradiction_of_the_later_batch(tmp_path: Path) -> None:
    pipeline = late_pipeline(tmp_path, ROWS)
    write_rewards(pipeline, "c", TOLD[:2])
    write_rows(pipeline.folders.landing / "b2.parquet", [untold(row) for row in ROWS[:3]])  # decisions once more
    take_in(pipeline).require_clean()
    other = [
        {**TOLD[1], "reward": 0.999},
        {**told(BASE[0]), "reward": 0.999},
        TOLD[2],
    ]  # late, and known from the start
    write_rewards(pipeline, "d", other)
    [reason] = take_in(pipeline).quarantined.values()
    assert named(reason) == Defect("C03", "reward", 2, 0)
    write_rewards(pipeline, "e", [TOLD[0], TOLD[2]])  # one is known already
    report = take_in(pipeline)
    report.require_clean()
    assert report.count.duplicates == 3 + 1


def test_rewards_of_a_refused_batch_are_of_no_decision(tmp_path: Path) -> None:
    pipeline = late_pipeline(tmp_path, [])
    (pipeline.folders.landing / "b1.parquet").unlink()
    write_rows(pipeline.folders.landing / "d.parquet", [untold({**row, "prob": 0.0}) for row in ROWS])
    write_rewards(pipeline, "c", TOLD)
    reasons = [named(reason) for reason in take_in(pipeline).quarantined.values()]
    assert sorted(r.check for r in reasons) == ["C14", "C31"]


def test_batches_of_rewards_that_are_empty_or_alone_are_refused(tmp_path: Path) -> None:
    pipeline = late_pipeline(tmp_path, ROWS)
    write_rewards(pipeline, "c", [])
    [reason] = take_in(pipeline).quarantined.values()
    assert "c.parquet: the batch has 0 rows (C01)" in reason
    alone = pipeline_in(tmp_path / "alone", **LATE)
    write_rewards(alone, "c", TOLD)
    with pytest.raises(InputError, match="it brings rewards only, and no batch has decisions; land those first"):
        take_in(alone)


def test_a_refused_batch_of_the_future_closes_no_window(tmp_path: Path) -> None:
    """Without a value for missing rewards, one that is due refuses its batch: the clock must not be that of a bad batch."""
    pipeline = pipeline_in(tmp_path, reward={k: v for k, v in LATE["reward"].items() if k != "missing"})
    write_rows(pipeline.folders.landing / "b0.parquet", [told(row) for row in BASE])
    recent = [untold({**row, "at": START + timedelta(days=9, hours=row["step"])}) for row in ROWS]
    write_rows(pipeline.folders.landing / "b1.parquet", recent)
    write_rows(
        pipeline.folders.landing / "b2.parquet", [told({**row, "at": datetime(2030, 1, 1)}) for row in clean_rows([50])]
    )
    report = take_in(pipeline)
    assert report.accepted == ["b0.parquet", "b1.parquet"]
    assert report.episodes["waiting for rewards"] == 4
    write_rows(
        pipeline.folders.landing / "b3.parquet", [untold({**row, "episode": row["episode"] + 20}) for row in ROWS]
    )
    [reason] = take_in(pipeline).quarantined.values()
    assert named(reason).check == "C10"
    assert "without a reward although the time for it is over (C10)" in reason and "`missing`" in reason


def test_late_rewards_with_steps_from_time_find_their_decision(tmp_path: Path) -> None:
    """Where the log has no step, the key is the episode and the time."""
    pipeline = pipeline_in(tmp_path, step=None, **LATE)
    write_rows(pipeline.folders.landing / "b0.parquet", [told(row) for row in BASE + ROWS])
    once = take_in(pipeline)
    pieces = pipeline_in(tmp_path / "pieces", step=None, **LATE)
    write_rows(pieces.folders.landing / "b0.parquet", [told(row) for row in BASE])
    write_rows(pieces.folders.landing / "b1.parquet", [untold(row) for row in ROWS])
    names = ("episode", "at", "reward")
    write_rows(pieces.folders.landing / "c.parquet", TOLD, pa.schema([LATE_SCHEMA.field(name) for name in names]))
    take_in(pieces).require_clean()
    assert once.count.accepted == len(BASE + ROWS)
    assert dataset_bytes(pipeline, "dataset") == dataset_bytes(pieces, "dataset")
