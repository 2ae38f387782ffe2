"""Taking in new batches: each one is accepted whole or quarantined whole, with the reason beside it."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from offrl_models import storage
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import measure, screen
from offrl_models.logs.read import batch_files, concatenate, log_version, read_batch
from offrl_models.schema import InputError


@dataclass(frozen=True)
class Folders:
    """Where batches arrive, where accepted ones stay, and where refused ones go."""

    root: Path  # paths in messages are relative to it
    raw: Path
    home: Path  # of the dataset

    @property
    def landing(self) -> Path:
        return self.home / "landing"

    @property
    def quarantine(self) -> Path:
        return self.home / "quarantine"

    @property
    def ledger(self) -> Path:
        """sha256 of every batch that was accepted, by name."""
        return self.home / "accepted.json"

    def shown(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


@dataclass(frozen=True)
class Ingested:
    """What lies in the raw folder after new batches were taken in."""

    version: str  # digest of the accepted batches, as DVC computes it
    batches: int
    rows: int
    accepted: list[str]  # names of the batches that were new
    quarantined: dict[str, str]  # where each refused batch lies now -> the reason

    def require_clean(self) -> None:
        """Raises InputError with the reason and the new place of every batch that was refused."""
        if self.quarantined:
            sentences = [
                f"{reason.rstrip('.')}; the batch now lies in {path}." for path, reason in self.quarantined.items()
            ]
            raise InputError(" ".join(sentences))


def ingest(folders: Folders, contract: Contract) -> Ingested:
    """Take in the batches of the landing folder, and look again at those in the raw folder.

    A batch that breaks a blocking row-level rule moves to quarantine whole, with the reason beside it; the others stand.
    Batches that were accepted before are never moved: if they no longer fit, it is the contract that changed.
    Raises InputError then, and when no batch remains.
    """
    with storage.exclusive(folders.home / ".ingest.lock"):
        ledger = storage.read_json(folders.ledger) if folders.ledger.exists() else {}
        raw, landed = batch_files(folders.raw), batch_files(folders.landing)
        digest = {path: storage.sha256_file(path) for path in [*raw, *landed]}
        taken = {path.name: digest[path] for path in raw}
        twins = [path for path in landed if taken.get(path.name) == digest[path]]
        namesakes = [path for path in landed if path.name in taken and path not in twins]
        new = [path for path in landed if path.name not in taken]
        tables, refused = _screened([*raw, *new], contract)
        _require_contract_fits(folders, raw, [p for p in raw if ledger.get(p.name) == digest[p]], refused)
        for path in namesakes:
            refused[path] = f"{path}: another batch of this name was accepted before; give the new one its own name."
        for path in twins:
            path.unlink()  # the same batch again
        quarantined = {}
        for path, reason in refused.items():
            target = _free_name(folders.quarantine / path.name)
            storage.move(path, target)
            storage.write_json(target.with_suffix(".reason.json"), {"reason": reason})
            quarantined[folders.shown(target)] = reason.replace(f"{folders.root}/", "")
        for path in new:
            if path in tables:
                storage.move(path, folders.raw / path.name)
        storage.write_json(folders.ledger, {path.name: digest[path] for path in tables})
    report = Ingested(
        version=log_version(folders.raw),
        batches=len(tables),
        rows=sum(table.num_rows for table in tables.values()),
        accepted=[path.name for path in new if path in tables],
        quarantined=quarantined,
    )
    if not tables:
        report.require_clean()
        raise InputError(
            f"no batch lies in {contract.source}; put Parquet files into {folders.shown(folders.landing)}."
        )
    return report


def _screened(files: list[Path], contract: Contract) -> tuple[dict[Path, pa.Table], dict[Path, str]]:
    """Batches that hold to the contract and break no rule, and the reason for each of the others."""
    tables: dict[Path, pa.Table] = {}
    refused: dict[Path, str] = {}
    for path in files:
        try:
            tables[path] = read_batch(path, contract)
        except InputError as error:
            refused[path] = str(error)
    while tables:
        measured = measure(concatenate(list(tables.values()), contract), contract)
        broken = screen(measured, contract, list(tables))
        if not broken:
            break
        refused |= broken
        tables = {path: table for path, table in tables.items() if path not in broken}
    return tables, refused


def _require_contract_fits(folders: Folders, raw: list[Path], accepted: list[Path], refused: dict[Path, str]) -> None:
    """Raises InputError, before anything moved, when accepted batches are refused, or all there are."""
    misfits = [path for path in accepted if path in refused] or (raw if all(path in refused for path in raw) else [])
    if misfits:
        reason = refused[misfits[0]].replace(f"{folders.root}/", "").rstrip(".")
        raise InputError(
            f"{reason}. The same contract refuses {len(misfits)} of {len(raw)} batches in {folders.shown(folders.raw)}, so "
            "nothing was moved: correct the contract, or bring the batches back with `dvc checkout`."
        )


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
