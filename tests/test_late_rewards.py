"""Rewards that come in later batches than their decisions: they join them, wait for them or are refused alone."""

import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl_models import storage
from offrl_models.config import Pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS
from offrl_models.logs.ingest import Count
from offrl_models.logs.read import Log, batch_files
from offrl_models.schema import InputError
from tests.dirty import (
    BASE,
    INF,
    LOGS,
    NAN,
    NOW,
    SCHEMA,
    START,
    Row,
    clean_rows,
    dataset_bytes,
    pipeline_in,
    take_in,
)
from tests.oracle import Defect, named

pytestmark = pytest.mark.usefixtures("no_pages")

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
