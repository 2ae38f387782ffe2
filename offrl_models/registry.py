"""Released policies: immutable numbered versions and one champion pointer, moved by one atomic step."""

import os
from pathlib import Path
from typing import Any

from offrl_models import storage
from offrl_models.schema import InputError

MANIFEST = "manifest.json"
CHAMPION = "champion.json"
UNNAMED = ".unnamed.json"  # versions that have their folder, and perhaps never had the pointer: a crash came between


def versions(policies: Path) -> list[int]:
    return sorted(int(path.name) for path in policies.glob("*") if path.name.isdecimal())


def verify(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle, after hashing every file that it lists.

    Raises InputError when a file is missing, extra or altered.
    """
    manifest = storage.read_json(bundle / MANIFEST)
    listed = {name: facts for name, facts in storage.list_files(bundle).items() if name != MANIFEST}
    if listed != manifest["files"]:
        names = sorted(set(listed) | set(manifest["files"]))
        wrong = next(name for name in names if listed.get(name) != manifest["files"].get(name))
        raise InputError(f"{bundle / wrong} is not what {bundle / MANIFEST} says; the bundle must not be used.")
    return manifest


def champion(policies: Path) -> dict[str, Any] | None:
    """The champion pointer, its bundle verified, or None before the first release.

    Raises InputError where the pointer is gone, or a bundle was altered.
    """
    if not (policies / CHAMPION).exists():
        if set(versions(policies)) - set(_unnamed(policies)):
            raise InputError(
                f"{policies / CHAMPION} is gone, and there are released versions; restore it from DVC or a backup."
            )
        return None
    pointer = storage.read_json(policies / CHAMPION)
    bundle = policies / str(pointer["version"])
    if storage.sha256_file(bundle / MANIFEST) != pointer["manifest_sha256"]:
        raise InputError(f"{bundle / MANIFEST} is not the one that {policies / CHAMPION} names; restore it.")
    verify(bundle)
    return pointer


def publish(draft: Path, policies: Path, facts: dict[str, Any], beaten: int | None) -> int:
    """Give a complete, verified draft bundle a version and point the champion at it, which has to be the version `beaten`.

    A bundle that was published before keeps its version, and a champion of the very same policy, whatever else is in its bundle,
    stays what it is. `facts` go into the pointer, `policy` among them. Raises InputError, and changes nothing, where another
    version is the champion.
    """
    with storage.exclusive(policies / ".lock"):
        verify(draft)
        digest = storage.sha256_file(draft / MANIFEST)
        now = champion(policies)
        if now and now["version"] != beaten:
            if now["policy"] == facts["policy"]:
                return int(now["version"])
            against = "the behavior policy" if beaten is None else f"version {beaten}"
            raise InputError(
                f"{draft} was judged against {against}, and the champion is version {now['version']}, which it never had to beat; "
                "the champion stays. Where both are of one candidate, train another, which is held against the champion."
            )
        known = [v for v in versions(policies) if storage.sha256_file(policies / str(v) / MANIFEST) == digest]
        if known:
            version = known[0]
            verify(policies / str(version))
        else:
            version = max(versions(policies), default=0) + 1
            storage.sync_tree(draft)
            storage.write_json(policies / UNNAMED, [*([] if now else _unnamed(policies)), version])
            os.rename(draft, policies / str(version))
        pointer = {"version": version, "manifest_sha256": digest, **facts}
        storage.write_json(policies / CHAMPION, pointer)
        (policies / UNNAMED).unlink(missing_ok=True)
    return version


def _unnamed(policies: Path) -> list[int]:
    return storage.read_json(policies / UNNAMED) if (policies / UNNAMED).exists() else []
