"""Dirty logs: whole episodes of a small world, cut into batches with any mixture of defects, and ingestion of them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.episodes import write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.ingest import Ingested, ingest
from offrl_models.logs.read import Log, batch_files
from offrl_models.ope.worlds import random_world
from tests.conftest import attributes

WORLD = random_world(3, 3, 6, 1.0, seed=7)
NAN, INF = math.nan, math.inf
START, NOW = datetime(2026, 1, 1), datetime(2026, 6, 1)
LEVELS = ("low", "high")
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


# --- pipelines over such logs -----------------------------------------------------------------------------------------


def pipeline_in(root: Path, **roles: object) -> Pipeline:
    """A pipeline whose contract has these roles instead of the plain ones."""
    configured = attributes(WORLD.n_states, 3)
    configured["logs"] |= {**ROLES, **roles}
    return Pipeline(parse_pipeline(configured, "toy"), root)


def land(pipeline: Pipeline, name: str, rows: list[Row]) -> Path:
    return Batch(name, rows).write(pipeline.folders.landing)


def take_in(pipeline: Pipeline) -> Ingested:
    """Ingestion at the present of these logs."""
    return ingest(pipeline.folders, pipeline.config.logs, NOW)


def everything_under(folder: Path) -> dict[str, str]:
    """Digests of files by their path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): storage.sha256_file(path) for path in files}


def dataset_bytes(pipeline: Pipeline, name: str) -> dict[str, str]:
    """Digests of the files that the accepted log becomes."""
    log = Log.open(batch_files(pipeline.raw), pipeline.config.logs)
    write_splits(log, "offrl", pipeline.root / name)
    return everything_under(pipeline.root / name)
