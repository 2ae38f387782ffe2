"""Weights on disk. Apart from `storage`, so that what only reads logs need not load torch."""

from pathlib import Path

import safetensors.torch
from torch import Tensor

from offrl_models import storage


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    storage.write_bytes(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())
