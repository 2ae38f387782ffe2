"""The folders of a dataset."""

from dataclasses import dataclass
from pathlib import Path


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

    @property
    def fetched(self) -> Path:
        """Version of every object that was copied from the landing URL, by name."""
        return self.home / "fetched.json"

    def shown(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
