"""Whether what happens next depends on more than the state: what marginalised estimates have to assume, held against the log."""

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models.logs.tally import zero_mean_z
from offrl_models.ope.tabular import TabularModel, states_of
from offrl_models.schema import Episodes

LAGS = (1, 2, 3, 4, 5)  # steps back
LENT = 5.0  # rows of no effect that every cell is lent


def _next_values(model: TabularModel, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
    """The reward of every row and the behavior's value of what follows."""
    v = (model.behavior * model.q_values(model.behavior)).sum(1)
    onward = np.where(episodes.terminated, 0.0, episodes.step_discount)
    return episodes.reward + onward * v[states_of(episodes)[1]]


def _cells(episodes: Episodes) -> Int64[np.ndarray, "rows"]:
    return states_of(episodes)[0] * episodes.n_actions + episodes.action


def _within(values: Float64[np.ndarray, "rows"], cell: Int64[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows"]:
    """What is left of values when the mean of their cell is taken off."""
    place = np.unique(cell, return_inverse=True)[1]
    return values - (np.bincount(place, values) / np.bincount(place))[place]


def _learned(
    place: Int64[np.ndarray, "rows"], came: Float64[np.ndarray, "rows"], asked: Int64[np.ndarray, "asked"]
) -> Float64[np.ndarray, "asked"]:
    """The mean of what came in each place, drawn towards 0 by the rows it is lent, at the places asked for; 0 at unknown ones."""
    known, inverse = np.unique(place, return_inverse=True)
    mean = np.bincount(inverse, came) / (np.bincount(inverse) + LENT)
    found = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return np.where(known[found] == asked, mean[found], 0.0)


def markov_z(model: TabularModel, fitted_on: Episodes, episodes: Episodes) -> float:
    """The largest z-score of "the past tells what comes next, beyond state and action". Small for a Markov state.

    What comes next is the reward and the behavior's value of what follows. The past is, so many steps before as LAGS say, the state
    and action, each with what was learned to come after it from `fitted_on`; what came next then; and how many steps there were,
    with what was learned to come after so many, in each state and action, and in all, where it is also asked whether the episode
    ends. z is that of the covariance over `episodes`, which are independent, within each present state and action, so that errors
    of the model cancel. 0 where episodes are too short to tell. The idea of testing by conditional covariances is that of Shi et
    al. (2020), https://arxiv.org/abs/2002.01751.
    """
    logs = (fitted_on, episodes)
    cells = [_cells(log) for log in logs]
    came = [_within(_next_values(model, log), cell) for log, cell in zip(logs, cells, strict=True)]
    ended = [_within(log.terminated.astype(float), cell) for log, cell in zip(logs, cells, strict=True)]
    steps = [log.step for log in logs]
    both = [cell * max(int(log.length.max()) for log in logs) + log.step for cell, log in zip(cells, logs, strict=True)]
    found = [0.0]
    for place, outcome in ((both, came), (steps, came), (steps, ended)):
        expected = _within(_learned(place[0], outcome[0], place[1]), cells[1])
        found.append(zero_mean_z(episodes.sum_per_episode(expected * outcome[1])))
    for lag in LAGS:
        learned_from, late = (np.flatnonzero(log.step >= lag) for log in logs)
        if not len(learned_from) or not len(late):
            break
        learned = _learned(cells[0][learned_from - lag], came[0][learned_from], cells[1][late - lag])
        now = cells[1][late]
        for past, sides in ((learned, 1), (came[1][late - lag], 2)):
            product = np.zeros(episodes.n_rows)
            product[late] = _within(past, now) * _within(came[1][late], now)
            z = zero_mean_z(episodes.sum_per_episode(product))
            found.append(z if sides == 1 else abs(z))  # what was learned has a sign
    return float(max(found))
