"""The observation encoder. It is fitted on the train split only and travels inside the exported policy."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from offrl_models.logs.contract import Contract
from offrl_models.schema import Episodes


class Encoded(NamedTuple):
    """What a network's first layer reads: standardised numbers, and row indices into one table for all categories."""

    numeric: Float[Tensor, "*batch numeric"]
    codes: Int64[Tensor, "*batch categorical"]


class Encoder(nn.Module):
    """Standardises numeric columns and turns the codes of categorical ones into rows of a shared embedding table."""

    numeric_columns: Tensor
    categorical_columns: Tensor
    offset: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, categories: list[int | None]):
        """`categories` per observation column, None for a numeric one."""
        super().__init__()
        self.categories = categories
        numeric = [i for i, c in enumerate(categories) if c is None]
        counts = [c for c in categories if c is not None]
        self.n_numeric, self.n_categorical, self.table_rows = len(numeric), len(counts), sum(counts)
        categorical = [i for i, c in enumerate(categories) if c is not None]
        self.register_buffer("numeric_columns", torch.tensor(numeric, dtype=torch.long))
        self.register_buffer("categorical_columns", torch.tensor(categorical, dtype=torch.long))
        offset = np.cumsum([0, *counts])[:-1] if counts else np.zeros(0, np.int64)
        self.register_buffer("offset", torch.as_tensor(np.asarray(offset, np.int64)))
        self.register_buffer("mean", torch.zeros(len(numeric)))
        self.register_buffer("scale", torch.ones(len(numeric)))

    @classmethod
    def fit(cls, contract: Contract, train: Episodes) -> "Encoder":
        """Means and standard deviations of the train split; a constant column is only centered."""
        encoder = cls([column.categories for column in contract.observation])
        if encoder.n_numeric:
            numbers = train.observation[:, encoder.numeric_columns.numpy()].astype(np.float64)
            spread = numbers.std(0)
            encoder.mean.copy_(torch.as_tensor(numbers.mean(0)))
            encoder.scale.copy_(torch.as_tensor(np.where(spread > 0, spread, 1.0)))
        return encoder

    def forward(self, observation: Float[Tensor, "*batch columns"]) -> Encoded:
        numeric = (observation.index_select(-1, self.numeric_columns) - self.mean) / self.scale
        codes = observation.index_select(-1, self.categorical_columns).long() + self.offset
        return Encoded(numeric, codes)
