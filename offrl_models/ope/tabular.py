"""The empirical Markov decision process of a log whose observation is one category: values, visits and their ratios."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from offrl_models.logs.tally import zero_mean_z
from offrl_models.schema import Episodes, InputError

LARGEST_TABLE = 150_000_000  # states x actions x states
LONGEST_STAY = 1e7  # expected visits to a state beyond which a policy counts as never ending
CONTRADICTED = 3.0  # standard errors between what was chosen and what propensities say
SAME = 1e-6  # propensities that differ by less are the same
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
    logger: Float64[np.ndarray, "states actions"] | None = None  # the policy that wrote the log, where that is known

    @classmethod
    def fit(cls, episodes: Episodes, states: int) -> "TabularModel | None":
        """The model of some episodes, or None where its table would have over LARGEST_TABLE entries."""
        if states**2 * episodes.n_actions > LARGEST_TABLE:
            return None
        state, following = states_of(episodes)
        visits = np.zeros((states, episodes.n_actions))
        transition = np.zeros((states, episodes.n_actions, states))
        np.add.at(visits, (state, episodes.action), 1.0)
        onward = ~episodes.terminated
        np.add.at(
            transition, (state[onward], episodes.action[onward], following[onward]), episodes.step_discount[onward]
        )
        per_state = visits.sum(1)
        average_transition = transition.sum(1) / np.maximum(per_state, 1.0)[:, None]
        transition /= np.maximum(visits, 1.0)[..., None]
        where = np.nonzero((visits == 0) & (per_state > 0)[:, None])
        transition[where] = average_transition[where[0]]
        initial = np.bincount(state[episodes.offsets[:-1]], minlength=states) / episodes.n_episodes
        recorded = np.zeros_like(visits)
        np.add.at(recorded, (state, episodes.action), episodes.time_discount / episodes.n_episodes)
        return cls(transition, _mean_rewards(episodes, visits), initial, visits, recorded)

    def rewarded(self, episodes: Episodes) -> "TabularModel":
        """The model of the same episodes with other rewards."""
        return replace(self, reward=_mean_rewards(episodes, self.visits))

    def logged_by(self, fitted_on: Episodes, judged: Episodes) -> "TabularModel":
        """The model of `fitted_on`, with the policy that wrote both logs, where their propensities tell it.

        They do where every state-action cell has one propensity only, and those of a state add up to 1: one policy, of the state
        alone. What they leave goes to the actions that the model has never seen there, whose values are all the same. And what
        was chosen in `judged` is worth, by the values of that policy, what they say: the mean of Q(s, a) - V(s) is 0 (z < 3).
        """
        (state, action), seen = (states_of(fitted_on)[0], fitted_on.action), self.visits > 0
        known = np.zeros_like(self.visits)
        known[state, action] = fitted_on.action_prob
        here = states_of(judged)[0], judged.action
        off = np.abs(known[state, action] - fitted_on.action_prob).max(initial=0.0)
        off = max(off, (np.abs(known[here] - judged.action_prob) * seen[here]).max(initial=0.0))
        left, unseen = 1.0 - known.sum(1), (~seen).sum(1)
        visited = seen.any(1)
        off = max(off, -left[visited].min(initial=0.0), left[visited & (unseen == 0)].max(initial=0.0))
        if not off < SAME:
            return self
        table = np.where(seen, known, np.maximum(left, 0.0)[:, None] / np.maximum(unseen, 1)[:, None])
        table /= table.sum(1, keepdims=True)
        if not self.ends(table):
            return self
        q = self.q_values(table)
        surplus = judged.time_discount * (q - (table * q).sum(1, keepdims=True))[here]
        if abs(zero_mean_z(judged.sum_per_episode(surplus))) >= CONTRADICTED:
            return self
        return replace(self, logger=table)

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

    @property
    def base(self) -> Float64[np.ndarray, "states actions"]:
        """The policy that wrote the log, as far as it is known."""
        return self.behavior if self.logger is None else self.logger

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


def _mean_rewards(
    episodes: Episodes, visits: Float64[np.ndarray, "states actions"]
) -> Float64[np.ndarray, "states actions"]:
    """Mean reward of every action that was taken in a state; of one that was not, the state's, and of others the mean return."""
    total, per_state = np.zeros_like(visits), visits.sum(1, keepdims=True)
    np.add.at(total, (states_of(episodes)[0], episodes.action), episodes.reward)
    of_state = total.sum(1, keepdims=True) / np.maximum(per_state, 1.0)
    found = np.where(visits > 0, total / np.maximum(visits, 1.0), of_state)
    return np.where(per_state > 0, found, episodes.return_.mean())


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
