"""Landing: each object is copied once and whole, from S3 as from a folder, and the remote side stays as it is."""

import contextlib
import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from botocore.client import BaseClient
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import given
from hypothesis import strategies as st
from moto import settings as moto_settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.server import ThreadedMotoServer

from offrl_models import storage
from offrl_models.logs import landing
from offrl_models.schema import InputError

SUFFIXES = (".parquet", ".csv")


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def fetch(url: str, folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    return landing.fetch(url, folder, known or {}, SUFFIXES)


@contextlib.contextmanager
def no_download() -> Iterator[None]:
    """Downloads are errors within the block."""

    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"{path.name} was downloaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_blocks", refuse)
        yield


# A server of S3 on this machine.


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
    assert server._server is not None
    server._server.server_close()  # stop() leaves the socket open


def clear_clients() -> None:
    """Forget clients that were made under another environment."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseClient]:
    """A client that owns bucket `logs`, and the environment of a user of that server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    clear_clients()
    client: Any = boto3.client("s3")
    client.create_bucket(Bucket="logs")
    yield client
    for item in client.list_objects_v2(Bucket="logs").get("Contents", []):
        client.delete_object(Bucket="logs", Key=item["Key"])
    client.delete_bucket(Bucket="logs")
    client.close()
    clear_clients()


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
    assert "very-secret" not in str(refused.value) and "AKIA" not in str(refused.value)
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


# Other protocols: files of this machine, and of memory.


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = MemoryFileSystem()
    fs.mkdir("/in")
    yield fs
    fs.rm("/in", recursive=True)


def test_files_of_a_folder_are_copied_once(tmp_path: Path) -> None:
    inbox, here = tmp_path / "inbox", tmp_path / "landing"
    (inbox / "folder.parquet").mkdir(parents=True)
    (inbox / "a.parquet").write_bytes(b"first")
    known = fetch(inbox.as_uri(), here)
    assert files(here) == {"a.parquet": b"first"}
    with no_download():
        assert fetch(inbox.as_uri(), here, known) == known
    (inbox / "a.parquet").write_bytes(b"FIRST")
    later = (here / "a.parquet").stat().st_mtime + 1
    os.utime(inbox / "a.parquet", (later, later))  # of the same length, but of another time
    assert fetch(inbox.as_uri(), here, known) != known
    assert files(here) == {"a.parquet": b"FIRST"}


def test_a_missing_folder_and_a_single_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file:///.*/nowhere: no such bucket, folder or object"):
        fetch((tmp_path / "nowhere").as_uri(), tmp_path / "landing")
    (tmp_path / "a.parquet").write_bytes(b"first")
    with pytest.raises(InputError, match=r"a\.parquet is one object; give the folder"):
        fetch((tmp_path / "a.parquet").as_uri(), tmp_path / "landing")


@pytest.mark.parametrize("url", ["", "/data/inbox", "nowhere://inbox", "simplecache::s3://logs/in"])
def test_a_url_needs_a_known_protocol(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="has no known protocol"):
        fetch(url, tmp_path)


def test_messages_leave_out_user_password_and_query(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        fetch("nowhere://me:hidden@server/in?signature=abc", tmp_path)
    assert "'nowhere://server/in'" in str(error.value)


@pytest.mark.parametrize("name", ["a b.parquet", ".a.parquet", "-a.parquet", "ä.parquet", "a\n.parquet", ".parquet"])
def test_a_name_that_is_not_plain_stops_everything(memory: MemoryFileSystem, tmp_path: Path, name: str) -> None:
    memory.pipe({"/in/a.parquet": b"first", f"/in/{name}": b"second"})
    with pytest.raises(InputError, match="is not plain") as error:
        fetch("memory://in", tmp_path)
    assert repr(name) in str(error.value) and files(tmp_path) == {}


@given(st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=12))
def test_no_name_leads_out_of_the_landing_folder(name: str) -> None:
    entry = {"name": f"logs/in/{name}.csv", "type": "file", "size": 1, "ETag": "x"}
    try:
        (found,) = landing._batches([entry], "logs/in", SUFFIXES, "s3://logs/in")
    except InputError:
        return
    target = Path("/landing") / landing._name(found)
    assert target.name == f"{name}.csv" and target.parent == Path("/landing") and ".." not in target.parts
    assert name.isascii() and not target.name.startswith(".")


class Cut(io.BytesIO):
    """A stream that ends as if it were complete, at fewer bytes than it has."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size)[:-1]


class Breaking(io.BytesIO):
    """A stream that breaks with its second block."""

    reason: BaseException = OSError()

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise self.reason
        return super().read(3)


def serve(monkeypatch: pytest.MonkeyPatch, stream: Callable[[], io.BytesIO]) -> None:
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: stream())


@pytest.mark.parametrize(("sent", "arrived"), [(lambda: Cut(b"first"), 4), (lambda: io.BytesIO(b"first!"), 6)])
def test_a_length_other_than_the_listed_leaves_nothing(
    memory: MemoryFileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: Callable[[], io.BytesIO],
    arrived: int,
) -> None:
    memory.pipe("/in/a.parquet", b"first")
    serve(monkeypatch, sent)
    with pytest.raises(InputError, match=rf"memory://in/a\.parquet: {arrived} of 5 bytes arrived"):
        fetch("memory://in", tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), ConnectionResetError(), TimeoutError()])
def test_an_interrupted_download_leaves_nothing(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    memory.pipe("/in/a.parquet", b"first")
    monkeypatch.setattr(Breaking, "reason", reason)
    serve(monkeypatch, lambda: Breaking(b"first"))
    expected = KeyboardInterrupt if isinstance(reason, KeyboardInterrupt) else InputError
    with pytest.raises(expected) as error:
        fetch("memory://in", tmp_path)
    assert files(tmp_path) == {}
    if expected is InputError:
        assert f"memory://in/a.parquet: cannot be read ({type(reason).__name__})" in str(error.value)
    monkeypatch.undo()
    fetch("memory://in", tmp_path)
    assert files(tmp_path) == {"a.parquet": b"first"}


def test_an_interrupted_download_keeps_the_version_that_waits(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/in/a.parquet", b"first")
    known = fetch("memory://in", tmp_path)
    memory.pipe("/in/a.parquet", b"second")
    serve(monkeypatch, lambda: Breaking(b"second"))
    with pytest.raises(InputError):
        fetch("memory://in", tmp_path, known)
    assert files(tmp_path) == {"a.parquet": b"first"}
    monkeypatch.undo()
    fetch("memory://in", tmp_path, known)
    assert files(tmp_path) == {"a.parquet": b"second"}


def test_a_full_disk_is_not_the_servers_fault(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/in/a.parquet", b"first")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fetch("memory://in", tmp_path)
    assert files(tmp_path) == {}


def test_a_file_that_somebody_put_there_is_not_replaced(memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe("/in/a.parquet", b"first")
    (tmp_path / "a.parquet").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"a\.parquet waits already and differs from memory://in/a\.parquet"):
        fetch("memory://in", tmp_path)
    assert files(tmp_path) == {"a.parquet": b"mine"}
    (tmp_path / "a.parquet").write_bytes(b"first")  # as after a crash before the record was kept
    assert set(fetch("memory://in", tmp_path)) == {"a.parquet"}


def test_a_server_that_does_not_say_the_length_is_refused(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"name": "/in/a.parquet", "type": "file", "size": None, "ETag": "x"}
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *_, **__: [entry])
    with pytest.raises(InputError, match=r"memory://in/a\.parquet: the server does not say how long it is"):
        fetch("memory://in", tmp_path)
