"""Batches arrive from a bucket once, and from a URL under the names that they have in a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offrl_models import storage
from offrl_models.logs.contract import Contract
from offrl_models.logs.folders import Folders
from offrl_models.logs.ingest import Count, Ingested, ingest
from offrl_models.logs.read import Log, batch_files
from offrl_models.schema import InputError
from tests.buckets import own_bucket, serve
from tests.conftest import as_table, attributes, chain_world
from tests.test_every_format import LAYOUTS, SOURCES, contract_of, write_d4rl
from tests.test_landing import no_download


def test_episodes_that_were_counted_have_the_same_names_from_a_folder_and_from_a_url(tmp_path: Path) -> None:
    found = []
    for place in ("landing", "folder", "url"):
        root = tmp_path / place
        contract = contract_of(LAYOUTS["log.hdf5"], "codes")
        folders = Folders(root, root / contract.source, root / "data" / "lab")
        url = {"landing": "data/lab/landing", "folder": "far away", "url": f"file://{root / 'far away'}"}[place]
        contract = contract.model_copy(update={"landing": url})
        there = folders.landing if place == "landing" else root / "far away"
        there.mkdir(parents=True)
        write_d4rl(SOURCES["codes"], there / "log.hdf5")
        ingest(folders, contract).require_clean()
        found.append(Log.open(batch_files(folders.raw, "d4rl"), contract).frame()["episode_id"])
        assert folders.fetched.exists() is (place != "landing")
        assert (there / "log.hdf5").exists() is (place != "landing")  # what lies elsewhere is only read
    assert found[0].equals(found[1]) and found[0].equals(found[2]) and found[0][-1] == "log.hdf5/49"


# --- batches in a bucket ----------------------------------------------------------------------------------------------


endpoint = pytest.fixture(serve, scope="module")
bucket_of_logs = pytest.fixture(own_bucket)


def put(client: Any, key: str, log: pl.DataFrame) -> None:
    client.put_object(Bucket="logs", Key=key, Body=pq_bytes(log))


def pq_bytes(log: pl.DataFrame) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(log.to_arrow(), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def snapshot(client: Any, root: Path) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """Every file of the project but for empty locks, and every object of the bucket."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    objects = [(item["Key"], item["ETag"]) for item in client.list_objects_v2(Bucket="logs")["Contents"]]
    return {name: content for name, content in files.items() if content}, objects


def test_batches_are_taken_in_from_a_bucket_once(bucket_of_logs: Any, tmp_path: Path) -> None:
    client, world = bucket_of_logs, chain_world()
    log = pl.DataFrame(as_table(world.simulate(90, seed=3)))
    batches = [log.filter(pl.col("episode") // 30 == number) for number in range(3)]
    contract = Contract(**attributes(world.n_states, 3)["logs"], landing="s3://logs/in")
    folders = Folders(tmp_path, tmp_path / contract.source, tmp_path / "data" / "toy")

    def take_in() -> Ingested:
        return ingest(folders, contract)

    put(client, "in/1.parquet", batches[0])
    put(client, "in/2.parquet", batches[1])
    put(client, "in/older/3.parquet", batches[2])
    first = take_in()
    rows = batches[0].height + batches[1].height
    assert (first.accepted, first.quarantined, first.rows) == (["1.parquet", "2.parquet"], {}, rows)
    assert first.count == Count(rows, rows, 0, 0) and first.episodes["episodes"] == 60
    assert {path.name: path.read_bytes() for path in folders.raw.iterdir()} == {
        "1.parquet": pq_bytes(batches[0]), "2.parquet": pq_bytes(batches[1])
    }  # fmt: skip

    before = snapshot(client, tmp_path)
    with no_download():
        second = take_in()
    assert second == dataclasses.replace(first, accepted=[]) and snapshot(client, tmp_path) == before

    doubtful = pl.concat([batches[2], batches[1].head(4).with_columns(reward=0.3 - pl.col("reward"))])
    put(client, "in/3.parquet", doubtful)
    third = take_in()
    assert list(third.quarantined) == ["data/toy/quarantine/3.parquet"] and third.accepted == []
    reason = third.quarantined["data/toy/quarantine/3.parquet"]
    assert (
        reason.startswith("data/toy/landing/3.parquet: column 'step' has 4 rows contradicting another row")
        and "(C03)" in reason
    )
    assert (third.version, third.rows) == (first.version, rows)
    assert third.count == Count(rows + doubtful.height, rows, doubtful.height, 0)
    with pytest.raises(InputError, match=r"\(C03\).*; the batch now lies in data/toy/quarantine/3\.parquet"):
        third.require_clean()
    assert (folders.quarantine / "3.parquet").read_bytes() == pq_bytes(doubtful)
    assert storage.read_json(folders.quarantine / "3.reason.json")["reason"] == reason

    before = snapshot(client, tmp_path)
    with no_download():
        assert take_in() == second and snapshot(client, tmp_path) == before  # nor is it fetched to be refused again

    put(client, "in/3.parquet", batches[2])  # the same object, corrected
    fourth = take_in()
    assert (fourth.accepted, fourth.quarantined, fourth.rows) == (["3.parquet"], {}, log.height)
    assert fourth.version != first.version and fourth.episodes["episodes"] == 90
    assert (folders.quarantine / "3.parquet").exists() and not list(folders.landing.iterdir())
