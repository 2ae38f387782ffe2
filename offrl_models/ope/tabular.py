"""The empirical Markov decision process of a log whose observation is one category: values, visits and their ratios."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offrl_models.schema import Episodes, InputError

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
    recorded: Float64[np.ndarray, "states actions"] | None = None  # discounted rows per episode of the log

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
        recorded = np.zeros_like(visits)
        np.add.at(recorded, (state, episodes.action), episodes.time_discount / episodes.n_episodes)
        return cls(transition, reward, initial, visits, recorded)

    def _onward(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states states"]:
        return np.einsum("sa,sat->st", policy, self.transition, optimize=True)

    def q_values(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]:
        """Action values of a policy in the model."""
        state = np.linalg.solve(np.eye(len(policy)) - self._onward(policy), (policy * self.reward).sum(1))
        return self.reward + self.transition @ state

    def value(self, policy: Float64[np.ndarray, "states actions"]) -> float:
        """Value of a policy in the model, from its initial states."""
        return float(self.initial @ (policy * self.q_values(policy)).sum(1))

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

    def recorded_ratio(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states actions"]:
        """w(s, a): visits under the policy, however many, over the rows that the log has; 1 where it has none.

        It differs from the ratio of visits where recordings stop early, and weighted rows then stand for what was cut off
        as well. Yin & Wang (2020), https://arxiv.org/abs/2001.10742.
        """
        return over(self.occupancy(policy)[:, None] * policy, self._recorded)

    def recorded_state_ratio(self, policy: Float64[np.ndarray, "states actions"]) -> Float64[np.ndarray, "states"]:
        """omega(s): visits under the policy over the rows that the log has; 1 where it has none."""
        return over(self.occupancy(policy), self._recorded.sum(1))

    @property
    def _recorded(self) -> Float64[np.ndarray, "states actions"]:
        if self.recorded is not None:
            return self.recorded
        return self.occupancy(self.behavior)[:, None] * self.behavior


def over(above: Float64[np.ndarray, "*shape"], below: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """The ratio; 1 where nothing is known of what is below."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 1.0)


def states_of(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """State and next state of every row; the next state of a row that ends the task is 0, whatever was logged."""
    following = np.where(episodes.terminated, 0, episodes.next_observation[:, 0])
    return episodes.observation[:, 0].astype(np.int64), following.astype(np.int64)


def fit_ending(episodes: Episodes, policy: Float64[np.ndarray, "states actions"]) -> TabularModel:
    """The model of some episodes, in which the policy ends its own.

    Raises InputError where its table would be too large, or where the policy's values do not exist in it.
    """
    states = len(policy)
    model = TabularModel.fit(episodes, states)
    if model is None:
        raise InputError(f"a table of {states} states by {episodes.n_actions} actions by {states} states is too large.")
    if not model.ends(policy):
        raise InputError(
            f"the policy never ends an episode in the model of these {episodes.n_episodes} episodes, so that it has no value "
            "at gamma 1."
        )
    return model
