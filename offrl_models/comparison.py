"""Another policy that left a log of its own: what the evaluated log says of it, knowing only how often it acts."""

import numpy as np
from jaxtyping import Float, Float64, Int64

from offrl_models.ope.estimates import LEVEL, Estimates, Refit, refitted
from offrl_models.ope.importance import Samples, Terms, tis, wis
from offrl_models.ope.intervals import bootstrap_all
from offrl_models.ope.sequences import ratios
from offrl_models.ope.units import by, entities_of
from offrl_models.schema import Episodes, InputError

STATED = {"TIS": tis, "WIS": wis}  # estimators that need no model of the values


def visit_frequencies(
    visited: Float[np.ndarray, "visited columns"],
    action: Int64[np.ndarray, "visited"],
    asked: Float[np.ndarray, "asked columns"],
    n_actions: int,
    log: str,
) -> Float64[np.ndarray, "asked actions"]:
    """The policy that another log shows: how often each action was taken where the observation was the one asked about.

    The frequency is an unbiased estimate of the mean probability of an action in its cell. The mean of its logged
    propensities is not: an action is logged more often when its probability is high.
    Raises InputError naming `log` when it has no row in a cell that is asked about.
    """
    cell = np.unique(np.concatenate([visited, asked]), axis=0, return_inverse=True)[1].ravel()
    visits = np.zeros((int(cell.max()) + 1, n_actions))
    np.add.at(visits, (cell[: len(visited)], action), 1.0)
    found = visits[cell[len(visited) :]]
    total = found.sum(1, keepdims=True)
    if not total.all():
        raise InputError(
            f"{log} has no row in the cells of {int((total == 0).sum())} evaluated rows; compare by fewer `cells`."
        )
    return found / total


def estimate_stated(
    episodes: Episodes,
    probs: Float64[np.ndarray, "rows actions"],
    samples: Samples,
    refit: Refit | None = None,
) -> Estimates:
    """The value of a policy of which only the probabilities at the logged observations are known; `samples` are of entities, where
    one has several episodes."""
    ratio = ratios(episodes, probs)
    taken, unit = ratio * episodes.action_prob, entities_of(episodes)

    def terms_of(action_prob: Float64[np.ndarray, "rows"]) -> dict[str, Terms]:
        return {name: of(episodes, taken / action_prob) for name, of in STATED.items()}

    if refit is None:
        terms = {name: by(of(episodes, ratio), unit) for name, of in STATED.items()}
        intervals = bootstrap_all(terms, samples, LEVEL)
    else:
        intervals = refitted(terms_of, refit, episodes, samples, LEVEL, unit)
    return Estimates.of(intervals, episodes, ratio, unit)
