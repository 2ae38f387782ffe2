"""Marginalised estimation: importance sampling, the tabular direct method, and leg A of the gate.

Weights of states replace products of ratios, so their variance does not grow with the horizon.
Xie, Ma & Wang (2019), https://arxiv.org/abs/1906.03393; Kallus & Uehara (2020), https://arxiv.org/abs/1908.08526.

A row's weight is what it counts beside its time discount. `state_weights` and `state_action_weights` pool the steps: over the
rows of a log they stand for all visits of the policy, those past a truncation included, so that rewards are taken as they
are. `step_ratios` keeps the steps apart: there a truncation is an end, and its episodes are to be completed first
(`sequences.completed`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.importance import Terms, discounted_rewards
from offrl_models.ope.multistep import following
from offrl_models.ope.sequences import by_step, finite
from offrl_models.ope.tabular import RATIO_LIMIT, TabularModel, fit_ending, over, states_of
from offrl_models.schema import Episodes, InputError


def policy_table(
    seen: Sequence[tuple[Episodes, Float64[np.ndarray, "_ actions"]]], states: int
) -> Float64[np.ndarray, "states actions"] | None:
    """pi(a|s) of every state that occurs in some episodes, zero elsewhere. None when it differs between rows of a state.

    It differs when the mask depends on more than the state; the state alone is then not Markov for the policy.
    """
    table = np.zeros((states, seen[0][1].shape[1]))
    for episodes, probs in seen:
        table[states_of(episodes)[0]] = probs
    same = all(np.abs(table[states_of(episodes)[0]] - probs).max() < 1e-9 for episodes, probs in seen)
    return table if same else None


def state_weights(
    model: TabularModel,
    policy: Float64[np.ndarray, "states actions"],
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    limit: float = np.inf,
) -> Float64[np.ndarray, "rows"]:
    """omega(s_t) rho_t of every row: by state, with the logged propensities. A limit on omega is for doubly robust use."""
    return np.minimum(model.recorded_state_ratio(policy), limit)[states_of(episodes)[0]] * ratio


def state_action_weights(
    model: TabularModel, policy: Float64[np.ndarray, "states actions"], episodes: Episodes
) -> Float64[np.ndarray, "rows"]:
    """w(s_t, a_t) of every row: by state and action, without propensities."""
    return model.recorded_ratio(policy)[states_of(episodes)[0], episodes.action]


def step_ratios(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    states: int,
    share: Float64[np.ndarray, "episodes"] | None = None,
) -> tuple[Float64[np.ndarray, "steps states"], Float64[np.ndarray, "steps"]]:
    """omega_t(s) of every step, 1 where it was never visited, and how probable it is that the policy still acts there.

    The recursion of Xie, Ma & Wang (2019), section 3: what the policy visits at a step, carried on by the ratios of the
    rows there, is what it visits at the next one. Unlike theirs, the ratios of a state's rows are scaled to average 1, for
    otherwise the mass of the policy drifts with every step. `share` counts the episodes, equally when left out.
    """
    state, next_state = states_of(episodes)
    counted = np.full(episodes.n_episodes, 1.0 / episodes.n_episodes) if share is None else share
    steps = int(episodes.length.max())
    omega, mass = np.empty((steps, states)), np.empty(steps)
    visited = np.bincount(state[episodes.offsets[:-1]], counted, states)
    for step in range(steps):
        here = episodes.length > step
        row = episodes.offsets[:-1][here] + step
        omega[step] = over(visited, np.bincount(state[row], counted[here], states))
        mass[step] = visited.sum()
        moved = ratio[row] * counted[here]
        carried = over(visited, np.bincount(state[row], moved, states))[state[row]] * moved
        goes_on = episodes.length[here] > step + 1
        visited = np.bincount(next_state[row][goes_on], carried[goes_on], states)
    return omega, mass


def step_weights(
    omega: Float64[np.ndarray, "steps states"], episodes: Episodes, ratio: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "rows"]:
    """omega_t(s_t) rho_t of every row.

    Raises InputError for episodes with more steps than those that the ratios were found on.
    """
    longest = int(episodes.length.max())
    if longest > len(omega):
        raise InputError(f"the episodes have up to {longest} steps, but the ratios are of {len(omega)} steps.")
    return omega[episodes.step, states_of(episodes)[0]] * ratio


def mis(episodes: Episodes, weight: Float64[np.ndarray, "rows"]) -> Terms:
    """Marginalised importance sampling: mean of sum_t gamma^t w_t r_t. Xie, Ma & Wang (2019), section 3.

    An interval from the terms takes the weights as given: it has no part of the error of fitting them.
    """
    worth = finite("the weighted reward", episodes.time_discount * weight * episodes.reward)
    return Terms(episodes.sum_per_episode(worth)[:, None])


def wmis(episodes: Episodes, weight: Float64[np.ndarray, "rows"], mass: float | Float64[np.ndarray, "steps"]) -> Terms:
    """Self-normalised marginalised importance sampling: the weights are scaled so that they add up to `mass`.

    That is the policy's expected discounted number of decisions (`occupancy(policy).sum()`), or its probability of still
    acting at each step (`step_ratios`), where every step is normalised on its own and one that it never reaches adds 0.
    """
    if not isinstance(mass, np.ndarray):
        discounted = finite("the weight", episodes.time_discount * weight)
        top = episodes.sum_per_episode(discounted * finite("the reward", episodes.reward))
        return Terms(mass * top[:, None], episodes.sum_per_episode(discounted)[:, None])
    weight_by_step, worth = by_step(episodes, finite("the weight", weight), 0.0), discounted_rewards(episodes)
    reached = np.flatnonzero(mass[: weight_by_step.shape[1]] > 0)
    return Terms((mass[reached] * (weight_by_step * worth)[:, reached]), weight_by_step[:, reached])


def bellman_errors(
    episodes: Episodes,
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    next_v: Float64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "rows"]:
    """r_t + gamma v(s_{t+1}) - q(s_t, a_t) of every row; `next_v` is read in truncated rows only."""
    ahead = following(episodes, v) + np.where(episodes.truncated, next_v, 0.0)
    return episodes.reward + episodes.discount * ahead - q


def _corrected(
    episodes: Episodes,
    worth: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    next_v: Float64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "episodes"]:
    """v(s_0) plus the Bellman errors of the rows, each counted `worth` times."""
    error = bellman_errors(episodes, q, v, next_v)
    return finite("the pseudo-outcome", v[episodes.offsets[:-1]] + episodes.sum_per_episode(worth * error))


def pseudo_outcomes(
    episodes: Episodes,
    weight: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    next_v: Float64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "episodes"]:
    """v(s_0) + sum_t gamma^t w_t [r_t + gamma v(s_{t+1}) - q(s_t, a_t)], whose mean is the policy's value.

    The efficient influence function of Kallus & Uehara (2020), plus the value. `q` is of the logged action, and `next_v` is
    read in truncated rows only. Right when the weights are right or the values are; neither may be fitted on these episodes.
    """
    return _corrected(episodes, episodes.time_discount * weight, q, v, next_v)


def value_gains(
    episodes: Episodes,
    weight: Float64[np.ndarray, "rows"],
    q: Float64[np.ndarray, "rows"],
    v: Float64[np.ndarray, "rows"],
    next_v: Float64[np.ndarray, "rows"],
    behavior_weight: Float64[np.ndarray, "rows"],
    behavior_v: Float64[np.ndarray, "rows"],
    behavior_next_v: Float64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "episodes"]:
    """Per episode, a pseudo-outcome whose mean is V(policy) - V(behavior), from weights and values of any origin.

    Of the behavior it takes the pseudo-outcome with v in the place of q, which is the realised return, whatever the values,
    where its weights are 1: in a log without truncations. Elsewhere they stand for the visits that were cut off.
    """
    gained = pseudo_outcomes(episodes, weight, q, v, next_v)
    return gained - pseudo_outcomes(episodes, behavior_weight, behavior_v, behavior_v, behavior_next_v)


def tabular_dm(episodes: Episodes, policy: Float64[np.ndarray, "states actions"]) -> Terms:
    """The policy's value in the empirical Markov decision process of these very episodes. Yin & Wang (2020), section 3.

    The terms are first-order: each episode has what it adds to the value as the model's counts change by it. Their mean is
    the value itself, for the Bellman errors of every cell add up to 0 in the model that was fitted to them.

    Raises InputError where the table is too large, or the policy never ends an episode in the model.
    """
    model = fit_ending(episodes, policy)
    q = model.q_values(policy)
    v = (policy * q).sum(1)
    state, next_state = states_of(episodes)
    under_policy = model.occupancy(policy)[:, None] * policy
    worth = over(under_policy * episodes.n_episodes, model.visits)[state, episodes.action]
    return Terms(_corrected(episodes, worth, q[state, episodes.action], v[state], v[next_state])[:, None])


class Differences(NamedTuple):
    """Per episode, a pseudo-outcome whose mean is V(policy) - V(behavior); and of every row its weight, and its Bellman error."""

    outcome: Float64[np.ndarray, "episodes"]
    weight: Float64[np.ndarray, "rows"]
    error: Float64[np.ndarray, "rows"]


def paired_differences(
    model: TabularModel,
    policy: Float64[np.ndarray, "states actions"],
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
) -> Differences | None:
    """The paired difference by a tabular model.

    None where the policy never ends an episode in the model, so that its values do not exist (gamma 1 only).

    X_i = V(s_0) + sum_t gamma^t omega(s_t) rho_t [r_t + gamma V(s_{t+1}) - Q(s_t, a_t)] - G_i, where the return of a
    truncated episode counts what was cut off as well (`value_gains`). omega is at most RATIO_LIMIT; what is above is left to
    the values. The model must be fitted on other episodes than these.
    """
    if not (model.ends(policy) and model.ends(model.behavior)):
        return None
    state, next_state = states_of(episodes)
    q = model.q_values(policy)
    v = (policy * q).sum(1)
    behavior_v = (model.behavior * model.q_values(model.behavior)).sum(1)
    weight = state_weights(model, policy, episodes, ratio, RATIO_LIMIT)
    behavior_weight = np.ones(len(ratio))
    if episodes.truncated.any():
        behavior_weight = state_weights(model, model.behavior, episodes, behavior_weight, RATIO_LIMIT)
    mine = (q[state, episodes.action], v[state], v[next_state])
    gains = value_gains(episodes, weight, *mine, behavior_weight, behavior_v[state], behavior_v[next_state])
    return Differences(gains, weight, bellman_errors(episodes, *mine))
