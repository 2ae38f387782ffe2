"""The observation encoder. It is fitted on the train split only and travels inside the exported policy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from offrl_models.datasets.moments import Moments
from offrl_models.schema import Episodes, Feature, InputError


class Encoded(NamedTuple):
    """What a network's first layer reads: standardised numbers, and row indices into one table for all categories."""

    numeric: Float[Tensor, "*batch numeric"]
    codes: Int64[Tensor, "*batch categorical"]


Observation = (
    Tensor | Encoded
)  # what networks take: [seed, batch, columns] as logged, or encoded already, as in training


NOWHERE = 2**31  # beyond every table, so that a code that is no category is refused where rows are looked up


def known_codes(logged: Float[Tensor, "*batch"], categories: int | Tensor) -> Int64[Tensor, "*batch"]:
    """Categories as row indices; NOWHERE for numbers that are none of 0 to `categories` - 1, which would read other rows."""
    codes = logged.long()
    return torch.where((codes == logged) & (codes >= 0) & (codes < categories), codes, NOWHERE)


class Encoder(nn.Module):
    """Standardises numbers and turns the codes of categories into rows of a shared embedding table.

    A number that may be missing (NaN) is replaced by what the contract says, and a column of its own tells that it was.
    """

    numeric_columns: Tensor
    categorical_columns: Tensor
    nullable: Tensor
    stand_in: Tensor
    offset: Tensor
    counts: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, features: Sequence[Feature]):
        """`features` describes the columns of the observation."""
        super().__init__()
        self.features = tuple(features)
        numeric = [i for i, feature in enumerate(features) if feature.categories is None]
        categorical = [i for i, feature in enumerate(features) if feature.categories is not None]
        counts = [feature.categories for feature in features if feature.categories is not None]
        nullable = [place for place, i in enumerate(numeric) if features[i].missing is not None]
        self.n_numeric, self.n_categorical = len(numeric) + len(nullable), len(counts)
        self.table_rows, self.n_nullable = sum(counts), len(nullable)
        given = [features[i].missing for i in numeric]
        stand_in = [missing if isinstance(missing, (int, float)) else float("nan") for missing in given]
        offset = np.cumsum([0, *counts])[:-1] if counts else np.zeros(0, np.int64)
        self.register_buffer("numeric_columns", torch.tensor(numeric, dtype=torch.long))
        self.register_buffer("categorical_columns", torch.tensor(categorical, dtype=torch.long))
        self.register_buffer("nullable", torch.tensor(nullable, dtype=torch.long))
        self.register_buffer("stand_in", torch.tensor(stand_in, dtype=torch.float32))  # NaN: the mean
        self.register_buffer("offset", torch.as_tensor(np.asarray(offset, np.int64)))
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.long), persistent=False)
        self.register_buffer("mean", torch.zeros(len(numeric)))
        self.register_buffer("scale", torch.ones(len(numeric)))

    @classmethod
    def fit(cls, train: Episodes) -> "Encoder":
        """Means and standard deviations of the train split; a constant column is only centered."""
        moments = Moments(len(train.features))
        moments.add(train.observation)
        return cls.from_moments(train.features, moments.to_json(train.features))

    @classmethod
    def from_moments(cls, features: Sequence[Feature], moments: Sequence[dict[str, Any]]) -> "Encoder":
        """The encoder of moments that were found while the train split was written.

        Raises InputError when they are of other columns.
        """
        if [feature.name for feature in features] != [row["name"] for row in moments]:
            raise InputError("the moments of the train split are of other columns; build the episodes again.")
        encoder = cls(features)
        chosen = [moments[i] for i in encoder.numeric_columns.tolist()]
        encoder.mean.copy_(torch.tensor([row["mean"] for row in chosen], dtype=torch.float64))
        encoder.scale.copy_(torch.tensor([row["std"] or 1.0 for row in chosen], dtype=torch.float64))
        encoder.stand_in.copy_(torch.where(encoder.stand_in.isnan(), encoder.mean, encoder.stand_in))
        return encoder

    def forward(self, observation: Float[Tensor, "*batch columns"]) -> Encoded:
        all_numbers = not self.n_categorical and observation.shape[-1] == len(self.features)
        numbers = observation if all_numbers else observation.index_select(-1, self.numeric_columns)
        if self.n_nullable:
            absent = numbers.isnan()
            numbers = torch.where(absent, self.stand_in, numbers)
            told = absent.index_select(-1, self.nullable).to(numbers.dtype)
            numeric = torch.cat([(numbers - self.mean) / self.scale, told], -1)
        else:
            numeric = (numbers - self.mean) / self.scale
        codes = known_codes(observation.index_select(-1, self.categorical_columns), self.counts) + self.offset
        return Encoded(numeric, codes)
