"""Every byte this project writes goes through here: atomic, synced to disk, and verified when it is read back.

A pipeline stage owns one folder. Its `stage.json` is written last and lists the size and sha256 of every file in it, so a
folder without one, or with a file that differs, is not a result: readers refuse it and the stage is built again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offrl_models.schema import InputError

STAGE = "stage.json"
COMPUTES = ("lightning", "numpy", "onnx", "onnxruntime", "onnxscript", "polars", "scipy", "torch")


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no NaN or infinity, UTF-8, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The same for JSON: what is not finite is null, and a record is a dictionary."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path) -> str:
    """sha256 of a file, or over the names and contents of all files of a folder."""
    return (
        digest({name: facts["sha256"] for name, facts in list_files(path).items()})
        if path.is_dir()
        else sha256_file(path)
    )


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return sha256_bytes(canonical_json(value))


@cache
def code_digest() -> str:
    """sha256 over the library's own source and the versions of what computes: results of other code are never re-used."""
    root = Path(__file__).parent
    sources = {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*.py"))}
    return digest({**sources, **{name: importlib.metadata.version(name) for name in COMPUTES}})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything under it."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`; only a complete, synced file takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    _write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, canonical_json(value))


def write_blocks(path: Path, blocks: Iterable[bytes], verify: Callable[[Path], None]) -> None:
    """A file too large for memory, from its blocks in order; `verify` sees it complete, and may raise, before it has its name."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(blocks)
        verify(temporary)

    _write_atomically(path, write)


def parse_json(data: bytes, name: str) -> Any:
    """Strict JSON: duplicate keys, NaN and Infinity are errors, as they are everywhere else.

    Raises InputError naming `name`.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
        return dict(pairs)

    def no_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON ({error}); restore it or build it again.") from error


def read_json(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; materialize the step that writes it first.") from error
    return parse_json(data, str(path))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Parquet with zstd and page checksums; pyarrow writes none unless asked."""
    _write_atomically(
        path, lambda temporary: pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    )


def read_parquet(path: Path) -> pa.Table:
    """A whole Parquet file, page checksums verified. Raises InputError when it is cut short or damaged."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{path} cannot be read as Parquet ({reason}); write the file again or remove it.") from error


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder within one file system, synced, never over an existing one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        source.rename(target)  # fails where a folder that is not empty has the name
    else:
        os.link(source, target)  # fails where the name is taken, as rename would not
        source.unlink()
    _sync_folder(target.parent)
    _sync_folder(source.parent)


@contextlib.contextmanager
def exclusive(path: Path):
    """Hold an advisory lock on `path` for the block: one writer at a time, freed by the kernel when a process dies."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, what it was made from, what it holds, and what to show a person."""

    folder: Path
    key: dict[str, Any]  # inputs, configuration and code that the result depends on
    files: dict[str, dict[str, Any]]  # relative path -> {size, sha256}
    summary: dict[str, Any]
    reused: bool = False

    @property
    def digest(self) -> str:
        """Names the content: equal files have equal digests."""
        return digest(self.files)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STAGE
    }


def load_stage(folder: Path, key: dict[str, Any] | None = None) -> Stage:
    """The finished stage in `folder`, every file verified against its sha256.

    Raises InputError when the stage was never finished, a file has changed since, or it was made from another `key`.
    """
    if not (folder / STAGE).exists():
        raise InputError(f"{folder} holds no finished result; materialize that step first.")
    record = read_json(folder / STAGE)
    found = list_files(folder)
    if found != record["files"]:
        names = sorted(set(found) | set(record["files"]))
        changed = [name for name in names if found.get(name) != record["files"].get(name)]
        raise InputError(f"{folder / changed[0]} differs from what its step wrote; materialize that step again.")
    made_from = {name: value for name, value in record["key"].items() if name != "code"}
    if key is not None and made_from != key:
        raise InputError(
            f"{folder} was made from other logs or settings than the present ones; materialize that step first."
        )
    return Stage(folder, record["key"], record["files"], record["summary"])


def build_stage(
    folder: Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]], reports: tuple[Path, ...] = ()
) -> Stage:
    """Re-use the stage in `folder` when it was made from the same `key` and is intact; otherwise build it anew.

    `build` fills a folder beside it and returns the summary; only a complete one takes the name, and until then the
    previous result stands.
    `reports` are pages for people that `build` writes elsewhere: when one is gone, the stage is built again.
    """
    key = {**key, "code": code_digest()}
    with exclusive(folder.parent / f".{folder.name}.lock"):
        with contextlib.suppress(InputError):
            found = load_stage(folder)
            if found.key == key and all(page.exists() for page in reports):
                return Stage(found.folder, found.key, found.files, found.summary, reused=True)
        fresh, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
        for left_over in (fresh, old):
            shutil.rmtree(left_over, ignore_errors=True)
        fresh.mkdir(parents=True)
        summary = parse_json(canonical_json(build(fresh)), str(folder))  # the same plain types as when re-used
        files = list_files(fresh)
        write_json(fresh / STAGE, {"files": files, "key": key, "summary": summary})
        sync_tree(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    return Stage(folder, key, files, summary)
