"""Linear-Gaussian control: continuous states and actions with closed-form values, occupancies and density ratios.

s' = A s + B a + w with w ~ N(0, W), reward -(s'Q s + a'R a), policies a ~ N(K s, Sigma). States then stay Gaussian, and values
stay quadratic: the recursions of Bertsekas, Dynamic Programming and Optimal Control I, section 3.1, for a given policy.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from scipy.linalg import solve_discrete_are, solve_triangular

from offrl_models.schema import Episodes


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearGaussianPolicy:
    """a ~ N(gain @ s, covariance). A covariance of 0 is a deterministic policy; it has a value but no density."""

    gain: Float64[np.ndarray, "dimensions state"]
    covariance: Float64[np.ndarray, "dimensions dimensions"]

    def mean(self, state: Float[np.ndarray, "rows state"]) -> Float64[np.ndarray, "rows dimensions"]:
        return state.astype(np.float64) @ self.gain.T

    def density(
        self, state: Float[np.ndarray, "rows state"], action: Float[np.ndarray, "rows dimensions"]
    ) -> Float64[np.ndarray, "rows"]:
        """Density of each action. Raises numpy.linalg.LinAlgError for a deterministic policy."""
        return np.exp(log_normal(action - self.mean(state), self.covariance))


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearGaussianWorld:
    """A world of at most `horizon` steps, each of which ends the episode with probability 1 - `survival`.

    A log shows the state and then the step, since what is left to come depends on both.
    """

    dynamics: Float64[np.ndarray, "state state"]  # A
    control: Float64[np.ndarray, "state dimensions"]  # B
    noise: Float64[np.ndarray, "state state"]  # covariance W
    state_cost: Float64[np.ndarray, "state state"]  # Q
    action_cost: Float64[np.ndarray, "dimensions dimensions"]  # R
    initial_mean: Float64[np.ndarray, "state"]
    initial_covariance: Float64[np.ndarray, "state state"]
    horizon: int
    gamma: float
    behavior: LinearGaussianPolicy
    survival: float = 1.0

    def _cost_to_go(
        self, policy: LinearGaussianPolicy
    ) -> tuple[Float64[np.ndarray, "ends state state"], Float64[np.ndarray, "ends"]]:
        """P_t and c_t of V_t(s) = -(s'P_t s + c_t) for t = 0 to `horizon`, backward from V = 0 after the last step."""
        n, discount = len(self.dynamics), self.gamma * self.survival
        quadratic, constant = np.zeros((self.horizon + 1, n, n)), np.zeros(self.horizon + 1)
        closed = self.dynamics + self.control @ policy.gain
        cost = self.state_cost + policy.gain.T @ self.action_cost @ policy.gain
        noise = self._step_noise(policy)
        for t in range(self.horizon - 1, -1, -1):
            quadratic[t] = cost + discount * closed.T @ quadratic[t + 1] @ closed
            ahead = np.trace(quadratic[t + 1] @ noise) + constant[t + 1]
            constant[t] = np.trace(self.action_cost @ policy.covariance) + discount * ahead
        return quadratic, constant

    def _step_noise(self, policy: LinearGaussianPolicy) -> Float64[np.ndarray, "state state"]:
        """Covariance of the next state given this one."""
        return self.control @ policy.covariance @ self.control.T + self.noise

    def value(self, policy: LinearGaussianPolicy) -> float:
        """Exact expected discounted return of a policy."""
        quadratic, constant = self._cost_to_go(policy)
        second_moment = self.initial_covariance + np.outer(self.initial_mean, self.initial_mean)
        return -float(np.trace(quadratic[0] @ second_moment) + constant[0])

    def state_values(
        self, policy: LinearGaussianPolicy, observation: Float[np.ndarray, "rows columns"]
    ) -> Float64[np.ndarray, "rows"]:
        """V_t(s) of every observation."""
        quadratic, constant = self._cost_to_go(policy)
        state, step = split(observation)
        return -(np.einsum("ri,rij,rj->r", state, quadratic[step], state) + constant[step])

    def q_values(
        self,
        policy: LinearGaussianPolicy,
        observation: Float[np.ndarray, "rows columns"],
        action: Float[np.ndarray, "rows dimensions"],
    ) -> Float64[np.ndarray, "rows"]:
        """Q_t(s, a) of every observation and action."""
        quadratic, constant = self._cost_to_go(policy)
        state, step = split(observation)
        following = state @ self.dynamics.T + action @ self.control.T
        ahead = np.einsum("ri,rij,rj->r", following, quadratic[step + 1], following) + constant[step + 1]
        ahead += np.einsum("rij,ji->r", quadratic[step + 1], self.noise)
        return self._reward(state, action.astype(np.float64)) - self.gamma * self.survival * ahead

    def marginals(
        self, policy: LinearGaussianPolicy
    ) -> tuple[Float64[np.ndarray, "steps state"], Float64[np.ndarray, "steps state state"]]:
        """Mean and covariance of the state at every step; an episode gets to step t with probability survival^t."""
        mean, covariance = [self.initial_mean], [self.initial_covariance]
        closed, noise = self.dynamics + self.control @ policy.gain, self._step_noise(policy)
        for _ in range(self.horizon - 1):
            mean.append(closed @ mean[-1])
            covariance.append(closed @ covariance[-1] @ closed.T + noise)
        return np.array(mean), np.array(covariance)

    def state_density(
        self, policy: LinearGaussianPolicy, observation: Float[np.ndarray, "rows columns"]
    ) -> Float64[np.ndarray, "rows"]:
        """Density of the state at its step under a policy, among the episodes that get there."""
        state, step = split(observation)
        density = np.empty(len(state))
        for t, (mean, covariance) in enumerate(zip(*self.marginals(policy), strict=True)):
            here = step == t
            density[here] = np.exp(log_normal(state[here] - mean, covariance))
        return density

    def state_ratio(
        self, policy: LinearGaussianPolicy, observation: Float[np.ndarray, "rows columns"]
    ) -> Float64[np.ndarray, "rows"]:
        """Density of each state at its step under a policy over that under the behavior.

        Times the ratio of the action densities, it is the ratio of the state-action densities.
        """
        return self.state_density(policy, observation) / self.state_density(self.behavior, observation)

    def regulator(self, covariance: Float64[np.ndarray, "dimensions dimensions"]) -> LinearGaussianPolicy:
        """The policy whose gain is optimal over an endless horizon: the discrete algebraic Riccati equation."""
        root = np.sqrt(self.gamma * self.survival)
        a, b = root * self.dynamics, root * self.control
        cost = solve_discrete_are(a, b, self.state_cost, self.action_cost)
        gain = -np.linalg.solve(self.action_cost + b.T @ cost @ b, b.T @ cost @ a)
        return LinearGaussianPolicy(gain=gain, covariance=covariance)

    def _reward(
        self, state: Float64[np.ndarray, "rows state"], action: Float64[np.ndarray, "rows dimensions"]
    ) -> Float64[np.ndarray, "rows"]:
        return -((state @ self.state_cost * state).sum(1) + (action @ self.action_cost * action).sum(1))

    def simulate(self, episodes: int, seed: int) -> Episodes:
        """Episodes drawn under the behavior policy, all of them at once, one step at a time. Seeded.

        States and actions are rounded to single precision before they act, so that the log says exactly what happened.
        """
        rng = np.random.default_rng(seed)
        shake, explore = square_root(self.noise), square_root(self.behavior.covariance)
        start = rng.standard_normal((episodes, len(self.initial_mean))) @ square_root(self.initial_covariance)
        state = (self.initial_mean + start).astype(np.float32)
        running, final = np.arange(episodes), np.empty((episodes, state.shape[1] + 1), np.float32)
        ids, states, actions, ends = [], [], [], []
        for t in range(self.horizon):
            jitter = rng.standard_normal((len(running), len(explore))) @ explore
            action = (self.behavior.mean(state) + jitter).astype(np.float32)
            pushed = state @ self.dynamics.T + action @ self.control.T
            following = (pushed + rng.standard_normal(state.shape) @ shake).astype(np.float32)
            ending = (rng.random(len(running)) >= self.survival) | (t == self.horizon - 1)
            ids, states, actions, ends = [*ids, running], [*states, state], [*actions, action], [*ends, ending]
            final[running[ending]] = stacked(following[ending], t + 1)
            running, state = running[~ending], following[~ending]
        order = np.argsort(np.concatenate(ids), kind="stable")
        length = np.bincount(np.concatenate(ids), minlength=episodes)
        state, action = np.concatenate(states)[order], np.concatenate(actions)[order]
        step = np.repeat(np.arange(len(ids)), [len(rows) for rows in ids])[order]
        return Episodes(
            episode_id=np.arange(episodes),
            offsets=np.append(0, length.cumsum()),
            observation=stacked(state, step),
            final_observation=final,
            action=action,
            mask=np.ones((len(state), 0), bool),
            reward=self._reward(state.astype(np.float64), action.astype(np.float64)),
            terminated=np.concatenate(ends)[order],
            truncated=np.zeros(len(state), bool),
            action_prob=self.behavior.density(state, action),
            gamma=self.gamma,
        )


def split(
    observation: Float[np.ndarray, "rows columns"],
) -> tuple[Float64[np.ndarray, "rows state"], Int64[np.ndarray, "rows"]]:
    """State and step of every observation."""
    return observation[:, :-1].astype(np.float64), observation[:, -1].astype(np.int64)


def stacked(
    state: Float32[np.ndarray, "rows state"], step: int | Int64[np.ndarray, "rows"]
) -> Float32[np.ndarray, "rows columns"]:
    """Observations: the state, then the step."""
    return np.column_stack([state, np.broadcast_to(step, len(state))]).astype(np.float32)


def log_normal(
    deviation: Float[np.ndarray, "rows dimensions"], covariance: Float64[np.ndarray, "dimensions dimensions"]
) -> Float64[np.ndarray, "rows"]:
    """Log density of a Gaussian at so much from its mean."""
    factor = np.linalg.cholesky(covariance)
    white = solve_triangular(factor, deviation.T, lower=True)
    return -0.5 * (white**2).sum(0) - np.log(np.diag(factor)).sum() - 0.5 * len(factor) * np.log(2 * np.pi)


def square_root(covariance: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
    """The symmetric root of a covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0.0)) @ vectors.T


def point_mass(axes: int = 1, horizon: int = 20, gamma: float = 0.99, *, survival: float = 1.0) -> LinearGaussianWorld:
    """A mass to be pushed to the origin along each axis: states are positions, then velocities; actions are forces.

    The behavior policy is a weak spring with damping and much exploration.
    """
    one, none = np.eye(axes), np.zeros((axes, axes))
    return LinearGaussianWorld(
        dynamics=np.block([[one, 0.3 * one], [none, 0.9 * one]]),
        control=np.concatenate([none, 0.3 * one]),
        noise=0.01 * np.eye(2 * axes),
        state_cost=np.diag(np.repeat([0.1, 0.02], axes)),
        action_cost=0.02 * one,
        initial_mean=np.repeat([1.0, 0.0], axes),
        initial_covariance=np.diag(np.repeat([0.2, 0.1], axes)),
        horizon=horizon,
        gamma=gamma,
        behavior=LinearGaussianPolicy(gain=np.concatenate([-0.3 * one, -0.3 * one], 1), covariance=0.5 * one),
        survival=survival,
    )
