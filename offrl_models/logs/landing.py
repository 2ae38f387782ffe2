"""New batches from a URL: objects of a bucket or files of a folder, each copied once into the landing folder.

Any protocol of fsspec will do. S3 needs the package s3fs; credentials, region and a server other than Amazon's come from
where every client of AWS takes them (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...), options of other protocols
from fsspec's own configuration (FSSPEC_GCS_TOKEN, ~/.config/fsspec, ...). The remote side is only listed and read.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from offrl_models import storage
from offrl_models.logs import formats
from offrl_models.logs.contract import Contract
from offrl_models.logs.folders import Folders
from offrl_models.logs.read import batch_files
from offrl_models.schema import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CHECKSUMS = ("ETag", "etag", "checksum", "md5Hash", "Content-MD5")  # what the protocols call it
BLOCK = 8 * 2**20  # bytes read at a time


@dataclass(frozen=True)
class Remote:
    """One object of the listing."""

    path: str  # as its file system names it
    name: str
    shown: str  # its URL without secrets
    size: int  # bytes
    version: str


def landed(folders: Folders, contract: Contract) -> dict[str, str]:
    """What waits to be taken in: name and version of each batch, wherever it lies. Raises InputError as `fetch` does."""
    found = {}
    for path in batch_files(folders.landing, contract.format):
        about = path.stat()
        found[path.name] = f"{about.st_size} bytes of {about.st_mtime_ns}"
    source = _source(folders, contract)
    return found | (_waiting(*source) if source else {})


def fetch_landed(folders: Folders, contract: Contract) -> None:
    """Copy what is new at the landing URL, or in the folder that is named instead, into the landing folder."""
    source = _source(folders, contract)
    if source:
        url, known, suffixes = source
        storage.write_json(folders.fetched, fetch(url, folders.landing, known, suffixes))


def _source(folders: Folders, contract: Contract) -> tuple[str, dict[str, str], tuple[str, ...]] | None:
    """Where batches come from, if not to the landing folder itself; which were copied; and how their names end."""
    url = contract.landing
    if url and "://" not in url:
        folder = (folders.root / url).resolve()
        url = "" if folder == folders.landing.resolve() else f"file://{folder}"
    known = storage.read_json(folders.fetched) if url and folders.fetched.exists() else {}
    return (url, known, formats.FORMATS[contract.format].suffixes) if url else None


def fetch(url: str, landing: Path, known: Mapping[str, str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """Download what lies directly under `url`, ends in one of `suffixes` and is not `known`, into `landing`.

    `known` and the result map names to versions: a checksum where the store has one, else size and time of change. An
    object of a known name with another version is downloaded anew; one that is gone stays known. A file takes its name only
    when it is complete. Folders under `url` are left alone, and so is another file of an unknown name that waits in `landing`.

    Raises InputError, naming the URL without user, password and query, when it cannot be listed or read, a name is not
    plain, a download is not as long as the listing said, or another file of its name waits.
    """
    fs, remotes = _listed(url, suffixes)
    for remote in remotes:
        if known.get(remote.name) != remote.version:
            _download(fs, remote, landing / remote.name, replace=remote.name in known)
    return {**known, **{remote.name: remote.version for remote in remotes}}


def _waiting(url: str, known: Mapping[str, str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """Name and version of what `fetch` would download. Raises InputError as it does."""
    return {each.name: each.version for each in _listed(url, suffixes)[1] if known.get(each.name) != each.version}


def _listed(url: str, suffixes: tuple[str, ...]) -> tuple[fsspec.AbstractFileSystem, list[Remote]]:
    shown = without_secrets(url)
    protocol, separator, _ = url.partition("://")
    if not separator or protocol not in fsspec.available_protocols():
        raise InputError(f"{shown!r} has no known protocol; write the URL as s3://bucket/prefix or file:///folder.")
    with _reported(shown):
        fs, root = fsspec.url_to_fs(url)
        fs.invalidate_cache()
        entries = _batches(_list(fs, root), root, suffixes, shown)
    return fs, [_describe(fs, entry, shown) for entry in entries]


def without_secrets(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])


@contextlib.contextmanager
def _reported(shown: str) -> Iterator[None]:
    """What a driver raises, as an InputError. Its own message is left out: it may quote keys and signed addresses."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        protocol = shown.partition("://")[0]
        hint = 'run `pip install "offrl[s3]"`' if protocol in ("s3", "s3a") else f"fsspec says: {error}"
        raise InputError(f"{shown}: no driver for {protocol}:// is installed; {hint}.") from error
    except FileNotFoundError as error:
        raise InputError(f"{shown}: no such bucket, folder or object; create it or correct the URL.") from error
    except Exception as error:  # drivers share no class of errors
        reason = type(error).__name__
        if isinstance(error, PermissionError) or "Credentials" in reason:
            raise InputError(
                f"{shown}: access was refused ({reason}); give credentials that may list and read there."
            ) from error
        raise InputError(
            f"{shown}: cannot be read ({reason}); check the URL, the server's address and the network."
        ) from error


def _list(fs: fsspec.AbstractFileSystem, root: str) -> list[dict[str, Any]]:
    """What lies directly under `root`, as its file system describes it. Raises FileNotFoundError."""
    bucket, _, prefix = root.partition("/")
    if not root.strip("/"):
        raise FileNotFoundError("the URL names no bucket or folder")
    try:
        return fs.ls(root, detail=True)
    except FileNotFoundError:
        # A store of objects has no folders: where nothing has arrived yet there is no prefix, only its bucket.
        if bucket and prefix and fs.exists(bucket):
            return []
        raise


def _batches(entries: list[dict[str, Any]], root: str, suffixes: tuple[str, ...], shown: str) -> list[dict[str, Any]]:
    """The entries that are batches, in order of name. Raises InputError when a name is not plain."""
    if any(entry["name"] == root for entry in entries):
        raise InputError(f"{shown} is one object; give the folder or prefix in which batches arrive.")
    found = [entry for entry in entries if entry["type"] == "file" and entry["name"].endswith(suffixes)]
    for entry in found:
        if not NAME.fullmatch(_name(entry)):
            raise InputError(
                f"{shown}: the name {_name(entry)!r} is not plain; give it a letter or digit first and "
                "only letters, digits, dots, hyphens and underscores."
            )
    return sorted(found, key=_name)


def _name(entry: dict[str, Any]) -> str:
    return entry["name"].rpartition("/")[2]


def _describe(fs: fsspec.AbstractFileSystem, entry: dict[str, Any], shown: str) -> Remote:
    path, shown = entry["name"], f"{shown.rstrip('/')}/{_name(entry)}"
    with _reported(shown):
        if not any(entry.get(key) for key in CHECKSUMS):
            entry = {**entry, **fs.info(path)}
        checksum = next((entry[key] for key in CHECKSUMS if entry.get(key)), None)
        version = str(checksum).strip('"') if checksum else f"{entry['size']} bytes of {fs.modified(path).isoformat()}"
    if entry["size"] is None:
        raise InputError(f"{shown}: the server does not say how long it is; use one that does.")
    return Remote(path, _name(entry), shown, int(entry["size"]), version)


def _blocks(fs: fsspec.AbstractFileSystem, remote: Remote) -> Iterator[bytes]:
    with _reported(remote.shown), cast(BinaryIO, fs.open(remote.path, "rb", block_size=BLOCK)) as stream:
        while block := stream.read(BLOCK):
            yield block


def _download(fs: fsspec.AbstractFileSystem, remote: Remote, target: Path, *, replace: bool) -> None:
    def verify(temporary: Path) -> None:
        size = temporary.stat().st_size
        if size != remote.size:
            raise InputError(
                f"{remote.shown}: {size} of {remote.size} bytes arrived, so it broke off or changed meanwhile; "
                "fetch it again."
            )
        if target.exists() and not replace and storage.sha256_file(target) != storage.sha256_file(temporary):
            raise InputError(
                f"{target} waits already and differs from {remote.shown}; take it in first, or rename one of them."
            )

    storage.write_blocks(target, _blocks(fs, remote), verify)
