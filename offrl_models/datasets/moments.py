"""Mean and standard deviation of every observed column, in one pass over the train split."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from offrl_models.schema import Feature


class Moments:
    """Running moments of the columns of a matrix; NaN is missing and does not count.

    Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance", eq. 2.1, so that adding piece by piece loses
    no digits.
    """

    def __init__(self, columns: int):
        self.count, self.mean, self.squares = np.zeros(columns), np.zeros(columns), np.zeros(columns)

    @classmethod
    def of(cls, values: Float[np.ndarray, "rows columns"]) -> "Moments":
        """The moments of one piece."""
        found, numbers = cls(values.shape[1]), values.astype(np.float64)
        known = np.isfinite(numbers)
        whole = bool(known.all())
        found.count = np.full(values.shape[1], float(len(values))) if whole else known.sum(0).astype(np.float64)
        if not whole:
            numbers[~known] = 0.0
        ones = np.ones(len(numbers))
        found.mean = ones @ numbers / np.maximum(found.count, 1.0)
        numbers -= found.mean
        if not whole:
            numbers[~known] = 0.0
        np.square(numbers, out=numbers)
        found.squares = ones @ numbers
        return found

    def merge(self, other: "Moments") -> None:
        """Take in the moments of another piece."""
        total = np.maximum(self.count + other.count, 1.0)
        gap = other.mean - self.mean
        self.squares += other.squares + gap**2 * self.count * other.count / total
        self.mean += gap * other.count / total
        self.count += other.count

    def add(self, values: Float[np.ndarray, "rows columns"]) -> None:
        if len(values):
            self.merge(Moments.of(values))

    @property
    def std(self) -> Float[np.ndarray, "columns"]:
        """Standard deviation (divided by n); 0 for a constant column."""
        return np.sqrt(self.squares / np.maximum(self.count, 1.0))

    def to_json(self, features: Sequence[Feature]) -> list[dict[str, Any]]:
        return [
            {"name": feature.name, "mean": float(mean), "std": float(std), "known": int(count)}
            for feature, mean, std, count in zip(features, self.mean, self.std, self.count, strict=True)
        ]
