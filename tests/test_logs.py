"""Raw logs: every kind of bad batch is named in one sentence, quarantined whole, and leaves the rest as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from offrl_models import storage
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.logs.ingest import ingest
from offrl_models.logs.read import batch_files
from offrl_models.logs.screen import screen
from offrl_models.logs.versions import log_version
from offrl_models.schema import InputError
from offrl_models.stages.data import _files, read_log
from tests.conftest import as_table, attributes, chain_world, write_batches

WORLD = chain_world()
LONG = 3  # steps of the episodes that are broken below


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    write_batches(tmp_path, WORLD.simulate(300, seed=3))
    return Pipeline(parse_pipeline(attributes(WORLD.n_states, 3), "toy"), tmp_path)


def new_batch() -> pl.DataFrame:
    return pl.DataFrame(as_table(WORLD.simulate(80, seed=9), first_id=1000))


def land(pipeline: Pipeline, frame: pl.DataFrame, name: str = "batch-9.parquet") -> Path:
    path = pipeline.folders.landing / name
    storage.write_parquet(path, frame.to_arrow())
    return path


def first_row_where(frame: pl.DataFrame, condition: pl.Expr) -> int:
    return int(frame.with_row_index("i").filter(condition)["i"][0])


def put(frame: pl.DataFrame, column: str, value: object, rows: int = 1, *, after: int = 0) -> pl.DataFrame:
    """The frame with `rows` values of a column replaced, from row `after` on."""
    index = pl.int_range(pl.len())
    chosen = index.is_between(after, after + rows - 1)
    return frame.with_columns(pl.when(chosen).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))


def forbid_taken(frame: pl.DataFrame) -> pl.DataFrame:
    """The mask of row 0 no longer allows the action that was taken there."""
    masks = [list(mask) for mask in frame["allowed"].to_list()]
    masks[0][frame["action"][0]] = False
    return frame.with_columns(pl.Series("allowed", masks, pl.Array(pl.Boolean, 3)))


def drop_middle(frame: pl.DataFrame) -> pl.DataFrame:
    """Without step 1 of an episode of three steps."""
    episode = frame.filter(pl.col("step") == LONG - 1)["episode"][0]
    return frame.filter(~((pl.col("episode") == episode) & (pl.col("step") == 1)))


def end_twice(frame: pl.DataFrame) -> pl.DataFrame:
    row = first_row_where(frame, (pl.col("step") == 0) & ~pl.col("terminated"))
    return put(frame, "terminated", True, after=row)


def contradict_row(frame: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([frame, frame.head(1).with_columns(reward=0.5 - pl.col("reward"))])


BROKEN: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "missing column": (lambda f: f.drop("reward"), r"column 'reward' is missing in all \d+ rows"),
    "wrong type": (lambda f: f.with_columns(pl.col("action").cast(pl.String)), "column 'action' is .* in all"),
    "empty": (lambda f: f.clear(), "the batch has 0 rows"),
    "NaN rewards": (lambda f: put(f, "reward", float("nan"), 3), r"column 'reward' has 3 rows missing, NaN.*\(C10\)"),
    "null action": (lambda f: put(f, "action", None), r"column 'action' has 1 row missing, NaN.*\(C10\)"),
    "propensity 0": (lambda f: put(f, "prob", 0.0, 2), r"column 'prob' has 2 rows with a propensity.*\(C14\)"),
    "propensity above 1": (lambda f: put(f, "prob", 1.5), r"column 'prob' has 1 row with a propensity.*\(C14\)"),
    "inadmissible action": (forbid_taken, r"column 'allowed' has 1 row holding an action that the mask.*\(C13\)"),
    "unknown action": (lambda f: put(f, "action", 7), r"column 'action' has 1 row holding an action outside 0 to 2 \(C13\)"),
    "gap in the steps": (drop_middle, r"column 'step' has 1 row following a gap.*\(C04\)"),
    "two terminal rows": (end_twice, r"column 'terminated' has 1 row ending an episode wrongly.*\(C05\)"),
    "contradicted decision": (contradict_row, r"column 'step' has 1 row contradicting another row.*\(C03\)"),
    "wrong next state": (lambda f: put(f, "next_state", 0, after=first_row_where(f, pl.col("step").shift(-1) == 1)),
                         r"column 'next_state' has 1 row differing from 'state'.*\(C07\)"),
    "unknown state": (lambda f: put(f, "state", 999), r"column 'state' has 1 row holding a category outside.*\(C11\)"),
    "reward out of range": (lambda f: put(f, "reward", 5.0), r"column 'reward' has 1 row outside.*\(C12\)"),
}  # fmt: skip


def everything_under(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): storage.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_batch_is_quarantined_whole_with_one_sentence(pipeline: Pipeline, name: str) -> None:
    spoil, expected = BROKEN[name]
    landed = land(pipeline, spoil(new_batch()))
    content, before = storage.sha256_file(landed), everything_under(pipeline.raw)
    report = ingest(pipeline.folders, pipeline.config.logs)
    with pytest.raises(InputError, match=expected) as refusal:
        report.require_clean()
    sentence = str(refusal.value)
    assert "landing/batch-9.parquet" in sentence and str(pipeline.root) not in sentence
    assert sentence.endswith("the batch now lies in data/toy/quarantine/batch-9.parquet.")
    assert not landed.exists()
    assert storage.sha256_file(pipeline.folders.quarantine / "batch-9.parquet") == content
    reason = json.loads((pipeline.folders.quarantine / "batch-9.reason.json").read_text())["reason"]
    assert reason.rstrip(".").replace(str(pipeline.root) + "/", "") in sentence
    assert everything_under(pipeline.raw) == before
    ingest(pipeline.folders, pipeline.config.logs).require_clean()  # and the next run goes on without it


def test_a_truncated_file_and_a_flipped_bit_are_refused(pipeline: Pipeline) -> None:
    landed = land(pipeline, new_batch())
    whole = landed.read_bytes()
    landed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="landing/batch-9.parquet cannot be read as Parquet"):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    land(pipeline, new_batch(), "batch-8.parquet").write_bytes(bytes(flipped))
    with pytest.raises(InputError, match="landing/batch-8.parquet"):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()


def test_a_good_batch_is_accepted_and_the_same_batch_twice_changes_nothing(pipeline: Pipeline) -> None:
    land(pipeline, new_batch())
    first = ingest(pipeline.folders, pipeline.config.logs)
    assert first.accepted == ["batch-9.parquet"] and first.batches == 3
    land(pipeline, new_batch())
    again = ingest(pipeline.folders, pipeline.config.logs)
    again.require_clean()
    assert (again.version, again.rows, again.accepted) == (first.version, first.rows, [])
    assert batch_files(pipeline.folders.landing) == []


def test_a_good_batch_is_accepted_beside_a_bad_one(pipeline: Pipeline) -> None:
    land(pipeline, new_batch())
    land(pipeline, put(new_batch().with_columns(pl.col("episode") + 500), "prob", 2.0), "batch-8.parquet")
    report = ingest(pipeline.folders, pipeline.config.logs)
    assert report.accepted == ["batch-9.parquet"]
    assert list(report.quarantined) == ["data/toy/quarantine/batch-8.parquet"]


def test_rows_that_contradict_an_earlier_batch_are_a_conflict_of_the_later_one(pipeline: Pipeline) -> None:
    earlier = pl.DataFrame(pq.read_table(batch_files(pipeline.raw)[0])).filter(pl.col("episode") < 5)
    land(pipeline, earlier.with_columns(reward=0.5 - pl.col("reward")))
    wanted = (
        r"landing/batch-9.parquet: column 'step' has \d+ rows contradicting another row of the same episode and step"
    )
    with pytest.raises(InputError, match=wanted):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()
    assert len(batch_files(pipeline.raw)) == 2


def test_another_batch_of_a_known_name_is_refused(pipeline: Pipeline) -> None:
    land(pipeline, new_batch(), "batch-1.parquet")
    with pytest.raises(InputError, match="another batch of this name was accepted before"):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()


def test_a_corrected_batch_is_not_blamed_for_the_bad_one_beside_it(pipeline: Pipeline) -> None:
    land(pipeline, put(new_batch(), "reward", float("nan")), "batch-3.parquet")
    land(pipeline, new_batch(), "batch-4.parquet")
    report = ingest(pipeline.folders, pipeline.config.logs)
    assert report.accepted == ["batch-4.parquet"]
    assert list(report.quarantined) == ["data/toy/quarantine/batch-3.parquet"]


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_mistake_in_the_contract_moves_no_accepted_batch(pipeline: Pipeline, seen_before: bool) -> None:
    if seen_before:
        ingest(pipeline.folders, pipeline.config.logs)
    before = everything_under(pipeline.raw)
    for change in (
        {"reward": {"column": "rewrd", "range": [0, 1]}},
        {"reward": {"column": "reward", "range": [0, 0.1]}},
    ):
        configured = attributes(WORLD.n_states, 3)
        configured["logs"] |= change
        wrong = parse_pipeline(configured, "toy").logs
        with pytest.raises(InputError, match=r"refuses 2 of 2 batches in data/toy/raw, so nothing was moved"):
            ingest(pipeline.folders, wrong)
    assert everything_under(pipeline.raw) == before and not pipeline.folders.quarantine.exists()
    ingest(pipeline.folders, pipeline.config.logs).require_clean()


def test_a_bad_file_dropped_into_the_raw_folder_itself_is_quarantined(pipeline: Pipeline) -> None:
    ingest(pipeline.folders, pipeline.config.logs)
    storage.write_parquet(pipeline.raw / "batch-3.parquet", put(new_batch(), "prob", 0.0).to_arrow())
    report = ingest(pipeline.folders, pipeline.config.logs)
    assert list(report.quarantined) == ["data/toy/quarantine/batch-3.parquet"] and report.batches == 2


def test_an_episode_of_two_entities_is_refused(pipeline: Pipeline) -> None:
    """It would be cut up between splits: part of it in training, part of it in the gate."""
    configured = attributes(WORLD.n_states, 3)
    configured["logs"]["entity"] = "patient"
    contract = parse_pipeline(configured, "toy").logs
    for path in batch_files(pipeline.raw):
        storage.write_parquet(path, pl.read_parquet(path).with_columns(patient=pl.col("episode")).to_arrow())
    land(pipeline, new_batch().with_columns(patient=pl.col("episode") * 10 + pl.col("step")))
    with pytest.raises(InputError, match=r"column 'patient' has \d+ rows belonging to another entity.*\(C27\)"):
        ingest(pipeline.folders, contract).require_clean()


def test_no_batch_at_all_says_where_to_put_one(tmp_path: Path) -> None:
    empty = Pipeline(parse_pipeline(attributes(WORLD.n_states, 3), "toy"), tmp_path)
    with pytest.raises(InputError, match="no batch lies in data/toy/raw; put parquet files .* into data/toy/landing"):
        ingest(empty.folders, empty.config.logs)


def test_the_version_is_a_function_of_names_and_bytes(pipeline: Pipeline) -> None:
    before = log_version(pipeline.raw)
    path = batch_files(pipeline.raw)[0]
    path.touch()
    assert log_version(pipeline.raw) == before
    path.rename(path.with_name("batch-0.parquet"))
    assert log_version(pipeline.raw) != before


def test_an_accepted_batch_that_changed_is_neither_used_nor_moved(pipeline: Pipeline) -> None:
    """C02: what was accepted is not altered behind our back; another version that DVC recorded is welcome."""
    ingest(pipeline.folders, pipeline.config.logs)
    path = batch_files(pipeline.raw)[0]
    changed = pl.read_parquet(path).with_columns(reward=0.5 - pl.col("reward"))
    storage.write_parquet(path, changed.to_arrow())
    with pytest.raises(InputError, match=r"data/toy/raw/batch-1.parquet has changed since it was accepted \(C02\)"):
        ingest(pipeline.folders, pipeline.config.logs)
    lock = {"stages": {"toy": {"outs": [{"path": "data/toy/raw", "md5": log_version(pipeline.raw)}]}}}
    (pipeline.root / "dvc.lock").write_text(json.dumps(lock))
    ingest(pipeline.folders, pipeline.config.logs).require_clean()


def test_a_missing_key_is_named_before_the_gap_that_it_leaves(pipeline: Pipeline) -> None:
    log = read_log(pipeline)
    frame = pl.read_parquet(log.batches[0].path)
    longest = frame["episode"].mode()[0]
    gone = (pl.col("episode") == longest) & (pl.col("step") == 0)
    storage.write_parquet(log.batches[0].path, frame.with_columns(episode=pl.when(~gone).then("episode")).to_arrow())
    first, *others = [(found.check, found.column) for found in screen(read_log(pipeline)).violations]
    assert first == ("C10", "episode") and ("C04", "step") in others


def test_an_accepted_batch_that_is_gone_is_missed(pipeline: Pipeline) -> None:
    ingest(pipeline.folders, pipeline.config.logs)
    batch_files(pipeline.raw)[1].unlink()
    with pytest.raises(InputError, match=r"data/toy/raw/batch-2.parquet has changed .* \(C02\) or is gone"):
        ingest(pipeline.folders, pipeline.config.logs)
    files = _files(pipeline)
    assert files.filter(pl.col("unchanged") == 0)["file"].to_list() == ["data/toy/raw/batch-2.parquet"]


def test_the_reason_names_everything_that_is_wrong_with_a_batch(pipeline: Pipeline) -> None:
    land(pipeline, put(put(new_batch(), "reward", float("nan"), 3), "prob", 2.0, 2, after=5))
    with pytest.raises(InputError, match=r"'reward' has 3 rows .*\(C10\), the first is row 0"):
        ingest(pipeline.folders, pipeline.config.logs).require_clean()
    reason = json.loads((pipeline.folders.quarantine / "batch-9.reason.json").read_text())
    assert len(reason["all"]) == 2 and reason["reason"] == reason["all"][0]
    assert "'prob' has 2 rows with a propensity outside (0, 1] (C14), the first is row 5" in reason["all"][1]
