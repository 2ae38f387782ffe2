"""The behavior policy over continuous actions: a density, calibrated, and how well it is.

Ratios use the logged density itself where there is one. Where none was logged it is estimated as propensities are (`behavior`):
on the split that evaluates, and calibrated on rows that it was not fitted on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import optimize

from offrl_models.densities import MixtureDensity
from offrl_models.distributions import LogisticMixture
from offrl_models.ope.behavior import COLDEST, FLOOR, HOTTEST, MOST_KNOTS, expected_calibration
from offrl_models.schema import Episodes, InputError

MOST_ROWS = 32_768  # that calibration looks at, evenly spread over the log
ROWS_PER_LEVEL = 50  # of a curve, expected
THRESHOLDS = np.linspace(0.1, 0.9, 9)  # quantiles of the logged actions, for calibration
RECURRING, LEAST_RECURRING = 0.02, 10  # share and number of rows from which on a single value is no accident


def require_density(episodes: Episodes, columns: Sequence[str]) -> None:
    """Raises InputError where single values of the action recur so often that no density describes them.

    A dose of 0, or a command cut off at its bound, has a probability of its own; its ratio to any density is meaningless.
    """
    for column, values in zip(columns, episodes.action.T, strict=True):
        value, count = np.unique(values, return_counts=True)
        most = int(count.argmax())
        if count[most] >= LEAST_RECURRING and count[most] > RECURRING * len(values):
            raise InputError(
                f"column {column!r}: {count[most]} of {len(values)} rows have exactly the action {value[most]:g}; no "
                "density describes values that recur, so code the action as `values`, or log it as it was before it was cut off."
            )


def _some_rows(
    episodes: Episodes,
) -> tuple[Float[torch.Tensor, "rows columns"], Float[torch.Tensor, "rows dimensions"]]:
    """Observations and actions of MOST_ROWS rows at most, evenly spread."""
    rows = np.unique(np.linspace(0, episodes.n_rows - 1, min(episodes.n_rows, MOST_ROWS)).astype(np.int64))
    return torch.as_tensor(episodes.observation[rows]), torch.as_tensor(episodes.action[rows])


def fit_spread(mixture: LogisticMixture, action: Float[torch.Tensor, "rows dimensions"]) -> float:
    """The factor on the scale of every component at which the actions taken are likeliest: a temperature for densities."""

    def loss(log_spread: float) -> float:
        return -float(mixture._replace(log_scale=mixture.log_scale + log_spread).log_prob(action).mean())

    found = optimize.minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


def fit_curves(share: Float64[np.ndarray, "rows dimensions"]) -> Float64[np.ndarray, "dimensions levels"]:
    """What the distribution function should have been at evenly spaced values, from what it was at the actions taken.

    Were it right, its values would be uniform; so their own distribution function corrects it: Kuleshov, Fenner & Ermon (2018),
    https://arxiv.org/abs/1807.00263. Every stretch counts as if seen once more, so that nothing becomes impossible.
    """
    levels = int(np.clip(len(share) // ROWS_PER_LEVEL, 1, MOST_KNOTS))
    seen = np.stack([np.histogram(column, levels, (0.0, 1.0))[0] + 1.0 for column in share.T])
    return np.pad(seen.cumsum(1) / seen.sum(1, keepdims=True), ((0, 0), (1, 0)))


@torch.no_grad()
def calibrated(density: MixtureDensity, tuned_on: Episodes, method: str) -> MixtureDensity:
    """The density, brought in line with the actions that were taken in some other episodes than it was fitted on.

    `method` is "temperature", which makes it wider or narrower, or "isotonic", which bends the distribution function of every
    dimension given those before it, and needs more rows.
    """
    observation, action = _some_rows(tuned_on)
    mixture = density.mixture(observation)
    if method == "isotonic":
        curves = fit_curves(density.of(mixture, action)[1].numpy())
        return MixtureDensity(density.algorithm, density.seeds, density.dimensions, curves=curves)
    spread = fit_spread(mixture, action.double())
    return MixtureDensity(density.algorithm, density.seeds, density.dimensions, spread=spread)


@torch.no_grad()
def calibration(episodes: Episodes, density: MixtureDensity) -> dict[str, Any]:
    """How well a density matches the actions taken, on episodes not fitted.

    The events are "this dimension of the action lies below that value", for the deciles of the logged actions and given the
    dimensions before it: `ece` and `brier` are those of their probabilities, and the latter, added up over all values, would be
    the continuous ranked probability score (Gneiting & Raftery 2007, eq. 20). `reliability` has one entry per bin.
    """
    observation, action = _some_rows(episodes)
    mixture = density.mixture(observation)
    predicted, happened = [], []
    for dimension, values in enumerate(action.T):
        for threshold in np.quantile(values.numpy(), THRESHOLDS):
            asked = action.double()
            asked[:, dimension] = threshold
            predicted.append(density.of(mixture, asked)[1][:, dimension].numpy())
            happened.append(values.numpy() <= threshold)
    return expected_calibration(np.concatenate(predicted), np.concatenate(happened))


def floored(density: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows"]:
    """Densities, at least FLOOR times their median, whatever the units: no single row may weigh more than the log can tell."""
    return np.maximum(density, FLOOR * np.median(density))
