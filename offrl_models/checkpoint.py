"""Training that was cut short goes on where it was: everything it depends on, in one file that is replaced whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from offrl_models import storage
from offrl_models.schema import InputError
from offrl_models.tensors import read_tensors, tensor_facts, write_tensors


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is saved, which one it is, and how often."""

    path: Path
    key: str  # digest of everything that the training depends on: another one's checkpoint is not gone on with
    every: int = 2000  # gradient steps

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Atomic: a crash leaves the one before."""
        told = {"key": self.key, "facts": facts, "sha256": _digest(tensors)}
        write_tensors(self.path, dict(tensors), {"training": storage.canonical_json(told).decode()})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """None where there is none of this training. Raises InputError where the file is damaged."""
        if not self.path.exists():
            return None
        try:
            tensors, told = read_tensors(self.path), json.loads(tensor_facts(self.path)["training"])
            damaged = told["sha256"] != _digest(tensors)
        except (SafetensorError, KeyError, ValueError):
            damaged, tensors, told = True, {}, {}
        if damaged:
            raise InputError(f"{self.path} is damaged; remove it, and the training starts anew.")
        return (tensors, told["facts"]) if told["key"] == self.key else None

    @property
    def of_model(self) -> "Checkpoint":
        """That of the model of the world which an algorithm is trained in, in a file beside its own."""
        return replace(self, path=self.path.with_name(f"{self.path.name}.model"))

    def remove(self) -> None:
        """A finished training needs none, and neither does its model."""
        for path in (self.path, self.of_model.path):
            if path.exists():
                storage.remove(path)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
