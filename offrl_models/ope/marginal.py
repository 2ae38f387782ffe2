"""Marginalised doubly robust estimation where the observation is one category: leg A of the gate.

Weights of states replace products of ratios, so their variance does not grow with the horizon.
Xie, Ma & Wang (2019), https://arxiv.org/abs/1906.03393; Kallus & Uehara (2020), https://arxiv.org/abs/1908.08526.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offrl_models.schema import Episodes

LARGEST_TABLE = 150_000_000  # states x actions x states
LONGEST_STAY = 1e7  # expected visits to a state beyond which a policy counts as never ending
RATIO_LIMIT = 20.0  # of the state ratio; what is cut off there is left to the value model


@dataclass(frozen=True)
class TabularModel:
    """The empirical Markov decision process of some episodes.

    An action that was never taken in a state is given the state's average outcome, and a state that was never seen ends at
    once with the mean return: both are guesses that the importance-weighted correction is there to correct.
    """

    transition: Float64[np.ndarray, "states actions states"]  # discounted; the rest ends the episode
    reward: Float64[np.ndarray, "states actions"]
    initial: Float64[np.ndarray, "states"]
    visits: Float64[np.ndarray, "states actions"]

    @classmethod
    def fit(cls, episodes: Episodes, states: int) -> "TabularModel | None":
        """The model of some episodes, or None where its table would have over LARGEST_TABLE entries."""
        if states**2 * episodes.n_actions > LARGEST_TABLE:
            return None
        state, following = states_of(episodes)
        visits, reward = np.zeros((states, episodes.n_actions)), np.zeros((states, episodes.n_actions))
        transition = np.zeros((states, episodes.n_actions, states))
        np.add.at(visits, (state, episodes.action), 1.0)
        np.add.at(reward, (state, episodes.action), episodes.reward)
        onward = ~episodes.terminated
        np.add.at(
            transition, (state[onward], episodes.action[onward], following[onward]), episodes.step_discount[onward]
        )
        per_state = visits.sum(1)
        seen, unseen_action = per_state > 0, (visits == 0) & (per_state > 0)[:, None]
        average_reward = reward.sum(1) / np.maximum(per_state, 1.0)
        average_transition = transition.sum(1) / np.maximum(per_state, 1.0)[:, None]
        reward /= np.maximum(visits, 1.0)
        transition /= np.maximum(visits, 1.0)[..., None]
        where = np.nonzero(unseen_action)
        reward[where], transition[where] = average_reward[where[0]], average_transition[where[0]]
        reward[~seen] = episodes.return_.mean()
        initial = np.bincount(state[episodes.offsets[:-1]], minlength=states) / episodes.n_episodes
        return cls(transition, reward, initial, visits)

    def _onward(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states states"]:
        return np.einsum("sa,sat->st", policy, self.transition, optimize=True)

    def q_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]:
        """Action values of a policy in the model."""
        state = np.linalg.solve(np.eye(len(policy)) - self._onward(policy), (policy * self.reward).sum(1))
        return self.reward + self.transition @ state

    def occupancy(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states"]:
        """Expected discounted number of visits to each state per episode."""
        return np.linalg.solve(np.eye(len(policy)) - self._onward(policy).T, self.initial)

    @property
    def behavior(self) -> Float64[np.ndarray, "states actions"]:
        """Empirical behavior policy; uniform in states that were never seen."""
        visits = np.where(self.visits.sum(1, keepdims=True) > 0, self.visits, 1.0)
        return visits / visits.sum(1, keepdims=True)

    def ends(self, policy: Float64[np.ndarray, "states actions"]) -> bool:
        """Whether the policy's values exist: a policy that circles for ever has none at gamma 1."""
        try:
            visits = np.linalg.solve(np.eye(len(policy)) - self._onward(policy), np.ones(len(policy)))
        except np.linalg.LinAlgError:
            return False
        return bool(np.isfinite(visits).all() and visits.min() > 0 and visits.max() < LONGEST_STAY)

    def state_ratio(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states"]:
        """omega(s): visits under the policy over visits under the behavior, at most RATIO_LIMIT; 1 where neither is known."""
        under_policy, under_behavior = self.occupancy(policy), self.occupancy(self.behavior)
        ratio = under_policy / np.where(under_behavior > 0, under_behavior, 1.0)
        return np.where(under_behavior > 0, np.minimum(ratio, RATIO_LIMIT), 1.0)


def states_of(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """State and next state of every row."""
    return episodes.observation[:, 0].astype(np.int64), episodes.next_observation[:, 0].astype(np.int64)


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


def paired_differences(
    model: TabularModel,
    policy: Float64[np.ndarray, "states actions"],
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
) -> tuple[Float64[np.ndarray, "episodes"], Float64[np.ndarray, "rows"]] | None:
    """Per episode, a pseudo-outcome whose mean is V(policy) - V(behavior), and the weight of every transition.

    None where the policy never ends an episode in the model, so that its values do not exist (gamma 1 only).

    X_i = V(s_0) + sum_t gamma^t omega(s_t) rho_t [r_t + gamma V(s_{t+1}) - Q(s_t, a_t)] - G_i, where a truncated episode
    counts the value of its last next state in G_i as well. The model must be fitted on other episodes than these.
    """
    if not (model.ends(policy) and model.ends(model.behavior)):
        return None
    state, following = states_of(episodes)
    q = model.q_values(policy)
    v = (policy * q).sum(1)
    weight = model.state_ratio(policy)[state] * ratio
    error = episodes.reward + episodes.discount * v[following] - q[state, episodes.action]
    q_behavior = model.q_values(model.behavior)
    v_behavior = (model.behavior * q_behavior).sum(1)
    left_open = np.where(episodes.truncated, episodes.discount * v_behavior[following], 0.0)
    correction = episodes.sum_per_episode(episodes.time_discount * (weight * error - left_open))
    return v[state[episodes.offsets[:-1]]] + correction - episodes.return_, weight
