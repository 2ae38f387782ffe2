"""Which version of a folder of batches this is, as DVC counts; read from its lock files, without DVC."""

import hashlib
import json
from pathlib import Path

import yaml


def log_version(folder: Path) -> str:
    """The digest that DVC gives a folder of batches: md5 over the list of its files and their md5."""
    files = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).parts):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            files.append({"md5": content, "relpath": path.relative_to(folder).as_posix()})
    return hashlib.md5(json.dumps(files, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def recorded(root: Path, folder: Path) -> tuple[str | None, str | None]:
    """The digest that `dvc.lock` or a `.dvc` file holds for a folder, and the stage or file that holds it."""
    relative = str(folder.relative_to(root))
    if (root / "dvc.lock").exists():
        lock = yaml.safe_load((root / "dvc.lock").read_text()) or {}
        for stage, facts in lock.get("stages", {}).items():
            for out in facts.get("outs", []):
                if out["path"] == relative:
                    return out["md5"], stage
    beside = folder.with_suffix(".dvc")
    if beside.exists():
        return yaml.safe_load(beside.read_text())["outs"][0]["md5"], str(beside.relative_to(root))
    return None, None
