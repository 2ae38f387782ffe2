"""Landing from S3: each object is copied once and whole, the bucket stays as it is, and no credential is told."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from fsspec.registry import _registry
from moto import settings as moto_settings
from moto.core.authorization import ActionAuthenticatorMixin

from offrl_models import storage
from offrl_models.logs import landing
from offrl_models.schema import InputError
from tests.buckets import SECRET, clear_clients, own_bucket, serve
from tests.test_landing import fetch, files, no_download

endpoint = pytest.fixture(serve, scope="module")
s3 = pytest.fixture(own_bucket)


def listing(client: Any) -> list[tuple[str, str, Any]]:
    contents = client.list_objects_v2(Bucket="logs").get("Contents", [])
    return [(item["Key"], item["ETag"], item["LastModified"]) for item in contents]


def put(client: Any, key: str, body: bytes) -> None:
    client.put_object(Bucket="logs", Key=key, Body=body)


@pytest.mark.parametrize("url", ["s3://logs/in", "s3://logs/in/"])
def test_objects_of_a_bucket_are_copied_once(s3: BaseClient, tmp_path: Path, url: str) -> None:
    put(s3, "in/", b"")  # some tools mark a folder so
    put(s3, "in/a.parquet", b"first")
    put(s3, "in/b.csv", b"second")
    put(s3, "in/notes.txt", b"not a batch")
    put(s3, "in/deeper/c.parquet", b"not directly there")
    put(s3, "in/folder.parquet/part-0.parquet", b"nor this")
    before = listing(s3)
    known = fetch(url, tmp_path)
    assert files(tmp_path) == {"a.parquet": b"first", "b.csv": b"second"}
    assert set(known) == {"a.parquet", "b.csv"} and len(set(known.values())) == 2
    (tmp_path / "a.parquet").unlink()  # taken in
    with no_download():
        assert fetch(url, tmp_path, known) == known
    assert listing(s3) == before


def test_only_the_changed_object_is_copied_again(s3: BaseClient, tmp_path: Path) -> None:
    put(s3, "in/a.parquet", b"first")
    put(s3, "in/b.parquet", b"second")
    known = fetch("s3://logs/in", tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.parquet").unlink()
    put(s3, "in/b.parquet", b"SECOND")
    put(s3, "in/a.parquet", b"first")  # the same again
    put(s3, "in/c.parquet", b"third")
    after = fetch("s3://logs/in", tmp_path, known)
    assert files(tmp_path) == {"b.parquet": b"SECOND", "c.parquet": b"third"}
    assert after["a.parquet"] == known["a.parquet"] and after["b.parquet"] != known["b.parquet"]


def test_what_is_gone_from_the_bucket_stays_known(s3: Any, tmp_path: Path) -> None:
    put(s3, "in/a.parquet", b"first")
    known = fetch("s3://logs/in", tmp_path)
    s3.delete_object(Bucket="logs", Key="in/a.parquet")
    assert fetch("s3://logs/in", tmp_path, known) == known


def test_a_large_object_comes_in_blocks(s3: BaseClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "BLOCK", 2**16)
    body = os.urandom(5 * 2**16 + 1)
    put(s3, "in/a.parquet", body)
    written: list[int] = []
    write_blocks = storage.write_blocks

    def watched(path: Path, blocks: Iterator[bytes], verify: Callable[[Path], None]) -> None:
        write_blocks(path, (written.append(len(block)) or block for block in blocks), verify)

    monkeypatch.setattr(storage, "write_blocks", watched)
    fetch("s3://logs/in", tmp_path)
    assert files(tmp_path) == {"a.parquet": body} and written == [2**16] * 5 + [1]


def test_a_prefix_without_objects_is_no_error_but_a_missing_bucket_is(s3: BaseClient, tmp_path: Path) -> None:
    assert fetch("s3://logs/nothing-yet", tmp_path, {"a.parquet": "1"}) == {"a.parquet": "1"}
    for url in ("s3://no-such-bucket/in", "s3://no-such-bucket", "s3://"):
        with pytest.raises(InputError, match=f"{url}: no such bucket"):
            fetch(url, tmp_path)


def test_refused_credentials_are_named_without_their_values(
    s3: BaseClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, "in/a.parquet", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(moto_settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
        patch.setattr(ActionAuthenticatorMixin, "request_count", 0)
        with pytest.raises(InputError, match="s3://logs/in: access was refused") as refused:
            fetch("s3://logs/in", tmp_path)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
        clear_clients()
        with pytest.raises(InputError, match=r"access was refused \(NoCredentialsError\)"):
            fetch("s3://logs/in", tmp_path)
    assert SECRET not in str(refused.value) and "AKIA" not in str(refused.value)
    assert files(tmp_path) == {}


def test_an_unreachable_server_is_an_error_of_one_sentence(
    s3: BaseClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        clear_clients()
        with pytest.raises(InputError, match=r"s3://logs/in: cannot be read \(EndpointConnectionError\); check"):
            fetch("s3://logs/in", tmp_path)


def test_a_missing_driver_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # drivers that were imported before
    with pytest.raises(
        InputError, match=r's3://logs/in: no driver for s3:// is installed; run `pip install "offrl\[s3\]"'
    ):
        fetch("s3://logs/in", tmp_path)
