"""Taking in new batches: each one is accepted whole or quarantined whole, with the reason beside it."""

from dataclasses import dataclass
from pathlib import Path

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

    @property
    def landing(self) -> Path:
        return self.raw.parent / "landing"

    @property
    def quarantine(self) -> Path:
        return self.raw.parent / "quarantine"

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
    """Take in the batches of the landing folder, and look again at those already accepted.

    A batch that breaks a blocking row-level rule moves to quarantine whole, with the reason beside it; the others stand.
    Raises InputError when no batch remains.
    """
    with storage.exclusive(folders.raw.parent / ".ingest.lock"):
        refused: dict[Path, str] = {}
        tables, files = [], []
        accepted = {path.name: path for path in batch_files(folders.raw)}
        new: list[Path] = []
        for path in batch_files(folders.landing):
            twin = accepted.get(path.name)
            if twin is None:
                new.append(path)
            elif storage.sha256_file(twin) == storage.sha256_file(path):
                path.unlink()  # the same batch again
            else:
                refused[path] = (
                    f"{path}: another batch of this name was accepted before; give the new one its own name."
                )
        for path in [*accepted.values(), *new]:
            try:
                tables.append(read_batch(path, contract))
                files.append(path)
            except InputError as error:
                refused[path] = str(error)
        if tables:
            refused |= screen(measure(concatenate(tables, contract), contract), files)
        quarantined = {}
        for path, reason in refused.items():
            target = _free_name(folders.quarantine / path.name)
            storage.move(path, target)
            storage.write_json(target.with_suffix(".reason.json"), {"reason": reason})
            quarantined[folders.shown(target)] = reason.replace(f"{folders.root}/", "")
        for path in new:
            if path not in refused:
                storage.move(path, folders.raw / path.name)
    remaining = [table for table, path in zip(tables, files, strict=True) if path not in refused]
    report = Ingested(
        version=log_version(folders.raw),
        batches=len(remaining),
        rows=sum(table.num_rows for table in remaining),
        accepted=[path.name for path in new if path not in refused],
        quarantined=quarantined,
    )
    if not remaining:
        report.require_clean()
        raise InputError(
            f"no batch lies in {contract.source}; put Parquet files into {folders.shown(folders.landing)}."
        )
    return report


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
