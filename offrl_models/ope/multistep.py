"""Multi-step policy evaluation with cut traces: Retrace(lambda), Tree-Backup(lambda) and Q^pi(lambda).

All three are the operator R q(s, a) = q(s, a) + E[ sum_t gamma^t c_1 ... c_t (r_t + gamma v(s_{t+1}) - q(s_t, a_t)) ] of Munos,
Stepleton, Harutyunyan & Bellemare (2016), eq. 3, https://arxiv.org/abs/1606.02647; they differ in the trace c_t of a step:

- retrace: lambda min(1, ratio), of that paper;
- tree_backup: lambda pi(a_t|s_t), of Precup, Sutton & Singh (2000);
- q_pi: lambda, of Harutyunyan, Bellemare, Stepleton & Munos (2016), https://arxiv.org/abs/1602.04951.

Its fixed point is the policy's q whatever the trace; of any other q it makes a better one, at a smaller variance than
products of ratios have.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float64
from scipy import sparse
from scipy.sparse import linalg

from offrl_models.ope.importance import Terms
from offrl_models.ope.sequences import finite
from offrl_models.ope.tabular import LONGEST_STAY, states_of
from offrl_models.schema import Episodes, InputError

Trace = Literal["retrace", "tree_backup", "q_pi"]


def traces(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], kind: Trace, lambda_: float
) -> Float64[np.ndarray, "rows"]:
    """c_t of every row. Raises InputError when `lambda_` is not between 0 and 1, and of tree_backup over continuous actions,
    whose densities are no probabilities."""
    if not 0 <= lambda_ <= 1:
        raise InputError(f"lambda is {lambda_}; a trace needs one between 0 and 1.")
    if kind == "retrace":
        return lambda_ * np.minimum(finite("the ratio", ratio), 1.0)
    if kind == "tree_backup":
        if not episodes.n_actions:
            raise InputError("tree_backup cuts traces by probabilities, and the actions are continuous; take retrace.")
        return lambda_ * finite("the evaluation policy", ratio * episodes.action_prob)
    return np.full(episodes.n_rows, lambda_)


def following(episodes: Episodes, values: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows"]:
    """The value of the next row of the same episode; 0 after the last."""
    ahead = np.append(values[1:], 0.0)
    ahead[episodes.offsets[1:] - 1] = 0.0
    return ahead


def corrected_returns(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    kind: Trace,
    lambda_: float,
) -> Terms:
    """The value of the policy's first action after one application of the operator to a model of its values.

    v(s_0) + ratio_0 sum_t gamma^t c_1 ... c_t [r_t + gamma v(s_{t+1}) - q(s_t, a_t)] per episode. `q` and `v` are as in
    `doubly_robust`, and truncated episodes are to be completed first. Where no ratio is over 1, Retrace(1) is DR.
    """
    trace = following(episodes, traces(episodes, ratio, kind, lambda_))
    error = episodes.reward + episodes.step_discount * following(episodes, finite("the state value", v)) - q
    correction = episodes.accumulated(finite("the q-value", error), episodes.step_discount * trace)
    first = episodes.offsets[:-1]
    return Terms((v[first] + ratio[first] * correction[first])[:, None])


def fixed_point(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    policy: Float64[np.ndarray, "states actions"],
    kind: Trace,
    lambda_: float,
    start: Float64[np.ndarray, "states actions"],
    share: Float64[np.ndarray, "episodes"] | None = None,
) -> Float64[np.ndarray, "states actions"]:
    """q of a policy: the fixed point of the operator with the mean over the log in place of its expectation.

    Every visit to a state and action, in whatever step, counts `share` of its episode (equally when left out). What was never
    visited stays at `start`. A truncated episode goes on with the value of its final observation. The linear system is
    solved, so that Q^pi(lambda) needs no lambda small enough for its iteration to converge.

    Raises InputError where there is no unique fixed point: the policy hardly ever ends an episode in the log.
    """
    shares = np.ones(episodes.n_episodes) if share is None else share
    state, next_state = states_of(episodes)
    states, actions = policy.shape
    cell = state * actions + episodes.action
    visits = np.bincount(cell, weights=shares[episodes.episode_of_row], minlength=states * actions)
    system, target = _visited_errors(episodes, traces(episodes, ratio, kind, lambda_), policy, shares, cell, next_state)
    seen = visits > 0
    rows = sparse.csr_array(sparse.diags_array(1.0 / visits[seen]) @ system[np.flatnonzero(seen)])
    found = start.ravel().copy()
    known = target[seen] / visits[seen] - rows[:, np.flatnonzero(~seen)] @ found[~seen]
    found[seen] = _solved(sparse.csc_array(rows[:, np.flatnonzero(seen)]), known)
    return found.reshape(policy.shape)


def _visited_errors(
    episodes: Episodes,
    trace: Float64[np.ndarray, "rows"],
    policy: Float64[np.ndarray, "states actions"],
    shares: Float64[np.ndarray, "episodes"],
    cell: np.ndarray,
    next_state: np.ndarray,
) -> tuple[sparse.csr_array, Float64[np.ndarray, "cells"]]:
    """A and b such that b - A q is, for every cell, what the operator adds to q, summed over the visits.

    The eligibility of a cell in an episode grows by 1 with a visit and is cut by gamma c with every step.
    """
    rows, cells, actions = episodes.n_rows, policy.size, policy.shape[1]
    one_hot = sparse.csr_array((np.ones(rows), (np.arange(rows), cell)), shape=(rows, cells))
    ahead = (episodes.discount[:, None] * policy[next_state]).ravel()
    column = (next_state[:, None] * actions + np.arange(actions)).ravel()
    expected = sparse.csr_array((ahead, (np.repeat(np.arange(rows), actions), column)), shape=(rows, cells))
    difference = sparse.csr_array(one_hot - expected)
    difference.eliminate_zeros()
    system, target = sparse.csr_array((cells, cells)), np.zeros(cells)
    first, eligible = episodes.offsets[:-1], sparse.csr_array((episodes.n_episodes, cells))
    for step in range(int(episodes.length.max())):
        running = episodes.length > step
        row = first[running] + step
        kept = np.zeros(len(row)) if step == 0 else episodes.step_discount[row - 1] * trace[row]
        before = eligible[np.flatnonzero(running[episodes.length >= step])]
        eligible = sparse.csr_array(sparse.diags_array(kept) @ before + one_hot[row])
        weighted = sparse.csr_array(eligible.T @ sparse.diags_array(shares[running]))
        system = sparse.csr_array(system + weighted @ difference[row])
        target += weighted @ finite("the reward", episodes.reward[row])
    return system, target


def _solved(system: sparse.csc_array, known: Float64[np.ndarray, "cells"]) -> Float64[np.ndarray, "cells"]:
    refusal = "the policy hardly ever ends an episode in the log, so its values have no unique fixed point there."
    try:
        factors = linalg.splu(system)
    except RuntimeError as error:  # exactly singular
        raise InputError(refusal) from error
    stay = factors.solve(np.ones(len(known)))  # at lambda 0, the expected number of steps still to come
    if not np.abs(stay).max() < LONGEST_STAY:
        raise InputError(refusal)
    return factors.solve(known)
