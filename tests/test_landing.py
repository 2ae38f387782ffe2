"""Landing: each object is copied once and whole, from a folder as from memory, and nothing is left where it cannot be."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

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
