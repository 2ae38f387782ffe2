"""Dirty logs: ingestion must agree with an oracle in plain Python, row for row, and with known cases beyond its reach."""

import json
import re
import tempfile
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from offrl_models import storage
from offrl_models.config import Pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.ingest import Count
from offrl_models.logs.read import Log, batch_files
from offrl_models.schema import InputError
from tests.dirty import (
    BASE,
    LEVELS,
    OBSERVED,
    SCHEMA,
    WORLD,
    Arrival,
    Batch,
    Row,
    arrivals,
    clean_rows,
    dataset_bytes,
    everything_under,
    land,
    pipeline_in,
    take_in,
)
from tests.oracle import Defect, Verdict, judge, named

# --- ingestion against the oracle -------------------------------------------------------------------------------------


def check_dataset(log: Log, rows: list[Row], folder: Path) -> None:
    """The dataset holds exactly these rows."""
    expected: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["step"]):
        expected[str(row["episode"])].append(row)
    write_splits(log, "offrl", folder)
    seen = 0
    for name, numbers in SPLITS.items():
        part = read_splits(folder, name, salt="offrl", contract=log.contract)
        assert part.entity is not None
        for place, episode in enumerate(part.episode_id):
            wanted, mine = expected[str(episode)], slice(*part.offsets[place : place + 2])
            assert bucket(wanted[0]["patient"], "offrl") in numbers
            assert str(part.entity[place]) == str(wanted[0]["patient"])
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


@given(arrivals())
@settings(max_examples=30)
def test_nothing_valid_is_lost_nothing_invalid_enters_and_counts_add_up(arrival: Arrival) -> None:
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        read = Log.chunks_of
        patch.setattr(
            Log, "chunks_of", lambda self, number, columns=None, rows=0: read(self, number, columns, arrival.chunk)
        )
        pipeline = pipeline_in(Path(root))
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
