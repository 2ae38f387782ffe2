"""Mean and standard deviation of every observed column, in one pass over the train split."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

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
        total, missing = _sum(numbers), None
        found.count += len(values)
        if not np.isfinite(total).all():
            missing = ~np.isfinite(numbers)
            found.count -= missing.sum(0)
            numbers[missing] = 0.0
            total = _sum(numbers)
        found.mean = total / np.maximum(found.count, 1.0)
        numbers -= found.mean
        if missing is not None:
            numbers[missing] = 0.0
        found.squares = _sum(np.square(numbers, out=numbers))
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


def _sum(values: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "columns"]:
    """Over the rows, 64 of them side by side: short rows summed one after the other take four times as long."""
    whole, columns = len(values) // 64 * 64, values.shape[1]
    wide = values[:whole].reshape(-1, 64 * columns).sum(0)
    return wide.reshape(64, columns).sum(0) + values[whole:].sum(0)
