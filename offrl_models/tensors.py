"""Weights on disk. Apart from `storage`, so that what only reads logs need not load torch."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from offrl_models import storage


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(stored, facts))


def read_tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())


def tensor_facts(path: Path) -> dict[str, str]:
    """What was written beside the tensors."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}
