"""What an exported graph has to take and to give before its policy is assessed."""

from typing import Any

import numpy as np
from scipy.special import expit

from offrl_models.assess.log import Assessed
from offrl_models.choices import Draws
from offrl_models.densities import uniform_numbers
from offrl_models.exported import Exported
from offrl_models.ope.fqe import DRAWS
from offrl_models.schema import InputError

TOLERANCE = 1e-5  # of sums of probabilities, and of bounds in shares of their width
COMPARED = 1000  # rows at which densities and draws are held against each other
APART, Z_APART = 0.05, 6.0  # share and standard errors by which they may differ
TAKEN = {  # of each input, its axes and its type
    "observation": ("rows, columns", "tensor(float)"),
    "mask": ("rows, actions", "tensor(bool)"),
    "action": ("rows, actions, dimensions", "tensor(float)"),
    "uniform": ("rows, draws, numbers", "tensor(double)"),
}


def require_interface(policy: Exported, given: Assessed) -> None:
    """Raises InputError for a graph of other inputs and outputs than those of a policy over the actions of the log."""
    inputs = {entry.name: entry for entry in policy.session.get_inputs()}
    outputs = [entry.name for entry in policy.session.get_outputs()]
    wanted, asked = {"observation": len(given.contract.features)}, ["probs"]
    if given.contract.action.continuous:
        wanted |= {"action": given.contract.action.dimensions}
        names, asked = {*wanted, "uniform"}, ["log_density", "drawn"]
    else:
        wanted |= {"mask": given.episodes.n_actions}
        names = set(wanted)
    if set(inputs) != names or not set(asked) <= set(outputs):
        raise InputError(
            f"{policy.path} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; a policy over "
            f"{given.contract.action.space} actions has {' and '.join(sorted(names))}, and gives {' and '.join(asked)}."
        )
    for name, entry in inputs.items():
        _require_input(policy, entry, wanted.get(name))


def _require_input(policy: Exported, entry: Any, wanted: int | None) -> None:
    """Raises InputError for an input of another type, with other axes, or with another size of the last one than is wanted."""
    (axes, kind), shape = TAKEN[entry.name], entry.shape or []
    if entry.type != kind:
        raise InputError(f"{policy.path} takes {entry.name} as a {entry.type}; export it to take a {kind}.")
    if len(shape) != axes.count(",") + 1 or any(isinstance(size, int) for size in shape[:-1]):
        written = ", ".join(str(size or "?") for size in shape)
        raise InputError(
            f"{policy.path} takes {entry.name} of shape [{written}]; export it to take [{axes}], all but the last of any size."
        )
    if wanted is None and not isinstance(shape[-1], int):
        raise InputError(
            f"{policy.path} leaves open how many numbers `{entry.name}` holds for a draw; export it with that size fixed."
        )
    if wanted is not None and isinstance(shape[-1], int) and shape[-1] != wanted:
        what = {"observation": "observed columns", "mask": "actions", "action": "dimensions of the action"}[entry.name]
        raise InputError(
            f"{policy.path} takes {shape[-1]} {what} and the log has {wanted}; name those that it was trained on, in their order."
        )


def require_density(choices: Draws) -> None:
    """Raises InputError for densities or drawn actions that cannot be, and densities that are not those of what is drawn."""
    path, bounds = choices.policy.path, choices.episodes.known_bounds
    room = TOLERANCE * np.diff(bounds).ravel()
    inside = ((choices.drawn >= bounds[:, 0] - room) & (choices.drawn <= bounds[:, 1] + room)).all((1, 2))
    for broken, what in (
        (~np.isfinite(choices.taken), "gives a density that is NaN or infinite"),
        (~inside, "draws actions that are NaN or outside the bounds of the contract"),
    ):
        if broken.any():
            raise InputError(f"{path} {what} in {int(broken.sum())} of {len(choices.taken)} rows; export it again.")
    for by_draws, by_density, error in both_ways(choices):
        apart = abs(by_draws - by_density)
        if not (apart <= APART * max(by_draws, by_density) or apart <= Z_APART * error):
            raise InputError(
                f"{path} gives a log_density that is not that of the actions it draws (the same expectation is {by_draws:.3g} by "
                f"the draws and {by_density:.3g} by the density); export the logarithm of the density of what is drawn."
            )


def both_ways(choices: Draws) -> list[tuple[float, float, float]]:
    """Some expectations by what is drawn, the same by the density, and the standard errors of their differences.

    Let u be the uniform density within the bounds, p the policy's, and f the place of one dimension within its bounds, or 1. The
    mean of f u / (p + u) over drawn actions and the mean of f p / (p + u) over uniform ones are both the integral of
    f p u / (p + u), and each term is between 0 and 1, however peaked p is. The mean square on one side is a mean on the other as
    well, so that what is too rare to be seen on one is not taken for certain.
    """
    rows = np.unique(np.linspace(0, choices.episodes.n_rows - 1, COMPARED).astype(int))
    seen, (low, high) = choices.episodes.observation[rows], choices.episodes.known_bounds.T
    numbers = uniform_numbers(len(rows), DRAWS, len(low), 0)
    sides = (choices.drawn[rows].clip(low, high), -1.0), (low + (high - low) * numbers, 1.0)
    share = [
        expit(sign * (choices.policy.log_density(seen, action) + np.log(high - low).sum())) for action, sign in sides
    ]
    found = []
    for dimension in (None, *range(len(low))):
        place = [
            np.ones_like(part) if dimension is None else ((action - low) / (high - low))[..., dimension]
            for part, (action, _) in zip(share, sides, strict=True)
        ]
        each = [f * part for f, part in zip(place, share, strict=True)]
        variance = (each[0].mean(1) - each[1].mean(1)).var() / len(rows)
        for f, part, own in zip(place, share, each, strict=True):  # of the other side, by its mean square
            variance += max((f**2 * part * (1.0 - part)).mean() - own.mean() ** 2, 0.0) / part.size
        found.append((float(each[0].mean()), float(each[1].mean()), float(np.sqrt(variance))))
    return found
