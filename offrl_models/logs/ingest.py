"""Taking in new batches: each one is accepted whole or quarantined whole, with the reason beside it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from offrl_models import storage
from offrl_models.logs import formats
from offrl_models.logs.contract import Contract
from offrl_models.logs.folders import Folders
from offrl_models.logs.landing import fetch_landed
from offrl_models.logs.read import DamagedBatchError, Log, batch_files, count_rows, open_batch
from offrl_models.logs.screen import Screened, screen
from offrl_models.logs.versions import log_version, recorded
from offrl_models.schema import InputError


@dataclass(frozen=True)
class Count:
    """Rows that were read, and where they went: read = accepted + quarantined + duplicates."""

    read: int
    accepted: int
    quarantined: int  # in refused batches, and in episodes with gaps
    duplicates: int  # exact repetitions of a row that is there already


@dataclass(frozen=True)
class Ingested:
    """What lies in the raw folder after new batches were taken in."""

    version: str  # digest of the accepted batches, as DVC computes it
    batches: int
    rows: int
    accepted: list[str]  # names of the batches that were new
    quarantined: dict[str, str]  # where each refused batch lies now -> the reason
    count: Count
    left_out: int = 0  # episodes with gaps, in batches that stand
    episodes: dict[str, int] = field(default_factory=dict)  # whole, open, pending

    def require_clean(self) -> None:
        """Raises InputError with the reason and the new place of every batch that was refused."""
        if self.quarantined:
            sentences = [
                f"{reason.rstrip('.')}; the batch now lies in {path}." for path, reason in self.quarantined.items()
            ]
            raise InputError("\n".join(sentences))


def ingest(folders: Folders, contract: Contract, now: datetime | None = None) -> Ingested:
    """Take in the batches of the landing folder, and look again at those in the raw folder.

    A batch that breaks a blocking row-level rule moves to quarantine whole, with the reason beside it; the others stand.
    Batches that were accepted before are never moved: if they no longer fit, it is the contract that changed.
    No decision may be later than `now` (the present, in UTC, when left out).
    Raises InputError then, and when no batch remains.
    """
    now = now or datetime.now(UTC).replace(tzinfo=None)
    with storage.exclusive(folders.home / ".ingest.lock"):
        fetch_landed(folders, contract)
        ledger = storage.read_json(folders.ledger) if folders.ledger.exists() else {}
        batches = _Batches.found(folders, contract)
        digest, raw = batches.digest, batches.raw
        gone = [folders.raw / name for name in ledger if not (folders.raw / name).exists()]
        _require_unchanged(
            folders, [*gone, *(path for path in raw if ledger.get(path.name, digest[path]) != digest[path])]
        )
        screened, refused = _screened([*raw, *batches.new], contract, now)
        _require_contract_fits(folders, raw, _accepted_before(folders, raw, digest), refused)
        for path in batches.namesakes:
            refused[path] = [f"{path}: another batch of this name was accepted before; give the new one its own name."]
        count = _count(screened, refused, batches.twins, contract)
        for path in batches.twins:
            storage.remove(path)
        _quarantine(folders, refused)
        accepted = [path for path in batches.new if path not in refused]
        for path in accepted:
            storage.move(path, folders.raw / path.name)
        kept = [*(path for path in raw if path not in refused), *accepted]
        storage.write_json(folders.ledger, {path.name: digest[path] for path in kept})
        if screened is not None:
            _write_left_out(folders, screened)
        quarantined = {folders.shown(path): reason for path, reason in _told(folders).items()}
    report = Ingested(
        version=log_version(folders.raw),
        batches=len(kept),
        rows=sum(screened.index.rows.values()) if screened else 0,
        accepted=[path.name for path in accepted],
        quarantined=quarantined,
        count=count,
        left_out=screened.index.left_out.height if screened else 0,
        episodes=_episode_counts(screened) if screened else {},
    )
    if not kept:
        report.require_clean()
        wanted = " or ".join(formats.FORMATS[contract.format].suffixes)
        raise InputError(
            f"no batch lies in {contract.source}; put {contract.format} files ({wanted}) into {folders.shown(folders.landing)}."
        )
    return report


@dataclass(frozen=True)
class _Batches:
    """What lies in the raw and the landing folder."""

    raw: list[Path]
    new: list[Path]
    twins: list[Path]  # landed, and the same as another batch byte by byte
    namesakes: list[Path]  # landed under the name of a raw batch, and other than it
    digest: dict[Path, str]  # sha256

    @classmethod
    def found(cls, folders: Folders, contract: Contract) -> "_Batches":
        raw, landed = batch_files(folders.raw, contract.format), batch_files(folders.landing, contract.format)
        digest = {path: storage.sha256_tree(path) for path in [*raw, *landed]}
        first_of: dict[str, Path] = {}
        for path in [*raw, *landed]:
            first_of.setdefault(digest[path], path)
        twins = [path for path in landed if first_of[digest[path]] != path]
        taken = {path.name for path in raw}
        namesakes = [path for path in landed if path.name in taken and path not in twins]
        new = [path for path in landed if path.name not in taken and path not in twins]
        return cls(raw, new, twins, namesakes, digest)


def _quarantine(folders: Folders, refused: dict[Path, list[str]]) -> None:
    """Move refused batches away, each with the reasons beside it, which are there first: no batch vanishes without a word."""
    for path, sentences in refused.items():
        target = _free_name(folders.quarantine / path.name)
        said = [sentence.replace(f"{folders.root}/", "") for sentence in sentences]
        storage.write_json(_reason(target), {"batch": target.name, "reason": said[0], "all": said, "told": False})
        storage.move(path, target)


def _told(folders: Folders) -> dict[Path, str]:
    """The quarantined batches that no one was told of, each with its reason; also those of an ingestion that was cut short."""
    found = {}
    for beside in sorted(folders.quarantine.glob("*.reason.json")):
        reason = storage.read_json(beside)
        batch = folders.quarantine / reason.get("batch", "")
        if not reason.get("told", True) and batch.exists():
            found[batch] = reason["reason"]
            storage.write_json(beside, {**reason, "told": True})
    return found


def _accepted_before(folders: Folders, raw: list[Path], digest: dict[Path, str]) -> list[Path]:
    """The raw batches that this dataset accepted, or another one of the project, or all where they are the version DVC has on
    record: a fresh clone knows of nothing else."""
    if recorded(folders.root, folders.raw)[0] == log_version(folders.raw):
        return raw
    known = {item for path in folders.home.parent.glob("*/accepted.json") for item in storage.read_json(path).items()}
    return [path for path in raw if (path.name, digest[path]) in known]


def _screened(files: list[Path], contract: Contract, now: datetime) -> tuple[Screened | None, dict[Path, list[str]]]:
    """The log of the batches that hold to the contract and break no rule, and what is wrong with each of the others."""
    refused: dict[Path, list[str]] = {}
    for path in files:
        try:
            open_batch(path, contract)
        except InputError as error:
            refused[path] = [str(error)]
    while kept := [path for path in files if path not in refused]:
        try:
            found = screen(Log.open(kept, contract), now)
        except DamagedBatchError as error:
            refused[error.path] = [str(error)]
            continue
        broken = found.reasons()
        if not broken:
            return found, refused
        refused |= broken
    return None, refused


def _count(screened: Screened | None, refused: dict[Path, list[str]], twins: list[Path], contract: Contract) -> Count:
    """Where every row went that was read; each of the numbers is counted on its own."""
    again = sum(count_rows(path, contract) for path in twins)
    refused_rows = sum(count_rows(path, contract) for path in refused)
    if screened is None:
        return Count(again + refused_rows, 0, refused_rows, again)
    found = screened.index
    distinct = pl.col("rows") - pl.col("repeated")
    accepted = int(found.episodes.filter(~pl.col("gap")).select(distinct.sum()).item())
    late = screened.log.late_rewards
    return Count(
        read=sum(found.rows.values()) + refused_rows + again,
        accepted=accepted + (0 if late is None else late.height),
        quarantined=refused_rows + int(found.left_out.select(distinct.sum()).item()),
        duplicates=sum(found.duplicates.values()) + again,
    )


def _episode_counts(screened: Screened) -> dict[str, int]:
    episodes = screened.index.episodes
    waiting = episodes.filter("pending").height
    still_open = episodes.filter(pl.col("open") & ~pl.col("gap")).height
    return {"episodes": episodes.height, "open": still_open, "waiting for rewards": waiting}


def _write_left_out(folders: Folders, screened: Screened) -> None:
    """Which episodes do not enter the dataset although their batches stand, and why."""
    path, left_out = folders.quarantine / "episodes.json", screened.index.left_out
    facts: list[dict[str, Any]] = [
        {"episode": episode, "rows": rows, "reason": "its steps have gaps (C04)"}
        for episode, rows in left_out.select("episode", "rows").iter_rows()
    ]
    if facts or path.exists():
        storage.write_json(path, facts)


def _require_unchanged(folders: Folders, changed: list[Path]) -> None:
    """C02. Raises InputError when accepted batches are other files than those that were accepted.

    Unless DVC has recorded the folder as it is: another version of the logs was checked out, or made.
    """
    if changed and recorded(folders.root, folders.raw)[0] != log_version(folders.raw):
        raise InputError(
            f"{folders.shown(changed[0])} has changed since it was accepted (C02) or is gone, as have {len(changed) - 1} others; "
            "bring them back with `dvc checkout`, or put what is new into the landing folder under a name of its own."
        )


def _require_contract_fits(
    folders: Folders, raw: list[Path], accepted: list[Path], refused: dict[Path, list[str]]
) -> None:
    """Raises InputError, before anything moved, when accepted batches are refused, or all there are."""
    misfits = [path for path in accepted if path in refused] or (raw if all(path in refused for path in raw) else [])
    if misfits:
        reason = refused[misfits[0]][0].replace(f"{folders.root}/", "").rstrip(".")
        raise InputError(
            f"{reason}. The same contract refuses {len(misfits)} of {len(raw)} batches in {folders.shown(folders.raw)}, so "
            "nothing was moved: correct the contract, or bring the batches back with `dvc checkout`."
        )


def _reason(path: Path) -> Path:
    """Where it stands why a batch was refused."""
    return path.with_suffix(".reason.json")


def _free_name(path: Path) -> Path:
    """A name that neither a batch in quarantine has, nor one that someone was told of and took away."""
    number, free = 1, path
    while free.exists() or (_reason(free).exists() and storage.read_json(_reason(free)).get("told", True)):
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
