"""Continuous actions: ratios from densities, and deterministic policies smoothed by a kernel.

A deterministic policy has no density, so no ratio. Kallus & Zhou (2018), https://arxiv.org/abs/1802.06037, put a kernel of some
bandwidth around its action; the ratio is the kernel's density at the logged action over the logged density. With those
ratios the kernel-smoothed IS, self-normalised and DR estimators are `tis`, `wis` and `dr`, at any horizon; DR takes
q(s, pi(s)) for v. What is estimated is the value of the smoothed policy: the bias falls like the bandwidth squared, the
variance rises like 1 over the product of the bandwidths.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float64
from scipy import special

from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.importance import Terms, slope, trajectory_weights
from offrl_models.ope.sequences import finite
from offrl_models.schema import Episodes, InputError

Kernel = Literal["gaussian", "epanechnikov"]
ROUNDING = 1e-6  # of the width between bounds: actions are kept in single precision
FEWEST_EFFECTIVE = 10  # effective episodes under which the spread of an estimate says nothing about its error


def density_ratios(episodes: Episodes, density: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows"]:
    """pi(a|s) / mu(a|s) of every logged action from the evaluation policy's density there, with the logged mu.

    Raises InputError for a density that is negative, NaN or infinite, and for a logged density that is not positive.
    """
    if (finite("the evaluation policy's density", density) < 0).any():
        raise InputError(f"the evaluation policy's density is negative in {int((density < 0).sum())} rows.")
    unusable = ~(episodes.action_prob > 0)
    if unusable.any():
        raise InputError(f"the logged density of the action is not positive in {int(unusable.sum())} rows.")
    return finite("the ratio", density / episodes.action_prob)


def _kernel(kernel: Kernel, u: Float64[np.ndarray, "rows dimensions"]) -> Float64[np.ndarray, "rows dimensions"]:
    if kernel == "gaussian":
        return np.exp(-0.5 * np.square(u)) / np.sqrt(2.0 * np.pi)
    return 0.75 * np.maximum(1.0 - np.square(u), 0.0)


def _kernel_below(kernel: Kernel, u: Float64[np.ndarray, "rows dimensions"]) -> Float64[np.ndarray, "rows dimensions"]:
    """The integral of the kernel up to u."""
    if kernel == "gaussian":
        return special.ndtr(u)
    inside = np.clip(u, -1.0, 1.0)
    return 0.5 + 0.75 * inside - 0.25 * inside**3


def _check_inside(
    name: str, values: Float64[np.ndarray, "rows dimensions"], bounds: Float64[np.ndarray, "dimensions 2"]
) -> None:
    rounding = ROUNDING * np.nan_to_num(bounds[:, 1] - bounds[:, 0], posinf=0.0)
    outside = ((values < bounds[:, 0] - rounding) | (values > bounds[:, 1] + rounding)).any(1)
    if outside.any():
        raise InputError(f"{name} lies outside the bounds of the action in {int(outside.sum())} rows.")


def kernel_density(
    episodes: Episodes,
    target: Float[np.ndarray, "rows dimensions"],
    bandwidth: Float64[np.ndarray, "dimensions"],
    *,
    kernel: Kernel,
    bounds: Float64[np.ndarray, "dimensions 2"] | None = None,
) -> Float64[np.ndarray, "rows"]:
    """Density at each logged action of a product kernel around `target`, the action that the policy takes there.

    `bandwidth` is in the units of each dimension: the standard deviation of the Gaussian, the half-width of the Epanechnikov
    kernel. Where the action is bounded, `bounds` holds the least and greatest value of each dimension, or infinity: each
    kernel is cut off there and divided by its mass inside, so that it integrates to 1 over the actions that can occur, as
    in Kallus & Zhou. At a bound the bias is then of the order of the bandwidth, not of its square.

    Raises InputError for discrete actions, a bandwidth that is not positive, and actions outside the bounds.
    """
    if episodes.action.ndim != 2:
        raise InputError("the actions are discrete; a kernel needs continuous ones.")
    if kernel not in get_args(Kernel):
        raise InputError(f"there is no kernel called {kernel!r}; use one of {', '.join(get_args(Kernel))}.")
    if not (finite("the bandwidth", bandwidth) > 0).all():
        raise InputError(f"every bandwidth must be positive, not {bandwidth.tolist()}.")
    center = finite("the evaluation policy's action", target.astype(np.float64))
    logged = finite("the logged action", episodes.action.astype(np.float64))
    density = _kernel(kernel, (logged - center) / bandwidth) / bandwidth
    if bounds is not None:
        _check_inside("the evaluation policy's action", center, bounds)
        _check_inside("the logged action", logged, bounds)
        below, up_to = (_kernel_below(kernel, (bounds[:, side] - center) / bandwidth) for side in (0, 1))
        density = density / (up_to - below)
    return density.prod(1)


def bandwidth_grid(episodes: Episodes, sizes: int) -> Float64[np.ndarray, "sizes dimensions"]:
    """Candidates for `smoothed`: the standard deviation of the logged actions in each dimension, halved again and again."""
    spread = episodes.action.std(0, dtype=np.float64)
    return spread * 2.0 ** -np.arange(sizes - 1.0, -1.0, -1.0)[:, None]


def smoothed(
    episodes: Episodes,
    target: Float[np.ndarray, "rows dimensions"],
    estimator: Callable[[Float64[np.ndarray, "rows"]], Terms],
    bandwidths: Float64[np.ndarray, "candidates dimensions"],
    *,
    kernel: Kernel,
    bounds: Float64[np.ndarray, "dimensions 2"] | None = None,
) -> tuple[Terms, Float64[np.ndarray, "dimensions"]]:
    """A kernel-smoothed estimate of a deterministic policy's value, and the bandwidth of each dimension that it was made with.

    `estimator` makes Terms of ratios: `partial(tis, episodes)`, `partial(wis, episodes)`, or `partial(dr, episodes, q=q, v=v)` with
    v = q(s, pi(s)). One candidate states the bandwidth. Among several, which must rise, `importance.slope` chooses: a smaller
    bandwidth has less bias and more variance.

    Raises InputError where a candidate leaves too few effective episodes: none at all when it is stated, fewer than
    FEWEST_EFFECTIVE when its error must be estimated for the choice.
    """
    if len(bandwidths) > 1 and not (np.diff(bandwidths, axis=0) > 0).all():
        raise InputError("the bandwidths must rise from one candidate to the next, in every dimension.")
    found: list[Terms] = []
    for bandwidth in bandwidths:
        ratio = density_ratios(episodes, kernel_density(episodes, target, bandwidth, kernel=kernel, bounds=bounds))
        effective = effective_sample_size(trajectory_weights(episodes, ratio))
        if effective < (FEWEST_EFFECTIVE if len(bandwidths) > 1 else 1e-9):
            raise InputError(
                f"within a bandwidth of {bandwidth.tolist()} the log is worth {effective:.1f} episodes of the policy; "
                "use a wider one."
            )
        found.append(estimator(ratio))
    chosen = slope(found) if len(found) > 1 else 0
    return found[chosen], bandwidths[chosen]
