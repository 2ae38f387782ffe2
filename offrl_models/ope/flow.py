"""Functions of observations and actions, and what a policy carries of them from row to row.

Occupancy ratios and values are two sides of it: the ratios balance what enters an observation with what leaves it, for every
function; the value is the function whose difference along the way is the reward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64

from offrl_models.datasets.encoding import Encoder
from offrl_models.ope.sequences import finite
from offrl_models.schema import Episodes, InputError

SCALES = (0.5, 1.0, 2.0)  # kernel widths, in median distances between rows
PAIRS = 2000  # of rows, whose distances set the kernel's width
NUMBERS = 500_000  # in one array at a time; few enough to stay in the cache


@dataclass(frozen=True, eq=False)
class Features:
    """Functions of an observation: a constant, its standardised columns and categories, random Fourier features of them.

    Of an observation that is one category the indicators are all there is. Rahimi & Recht (2007).
    """

    encoder: Encoder
    frequency: Float64[np.ndarray, "inputs fourier"]
    phase: Float64[np.ndarray, "fourier"]
    step: tuple[float, float] | None  # mean and standard deviation, where the step is an input
    indicators: bool

    @classmethod
    def fit(cls, episodes: Episodes, *, fourier: int, by_step: bool, seed: int) -> "Features":
        """Features whose kernel is as wide as rows are apart.

        Raises InputError where the columns of the observation are not described.
        """
        if len(episodes.features) != episodes.observation.shape[1]:
            raise InputError(
                f"{episodes.observation.shape[1]} columns were observed and {len(episodes.features)} are described by features."
            )
        rng, step = np.random.default_rng(seed), episodes.step
        known = cls(
            encoder=Encoder.fit(episodes),
            frequency=np.zeros((0, 0)),  # until it is known how far rows are apart
            phase=np.zeros(0),
            step=(float(step.mean()), float(step.std()) or 1.0) if by_step else None,
            indicators=not by_step and len(episodes.features) == 1 and episodes.features[0].categories is not None,
        )
        if known.indicators:
            return known
        pair = rng.integers(0, episodes.n_rows, (2, PAIRS))
        one, other = (known._inputs(episodes.observation[rows], step[rows]) for rows in pair)
        apart = np.sqrt(np.square(one - other).sum(1))
        width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
        scale = width * np.resize(SCALES, fourier)
        return replace(
            known,
            frequency=rng.standard_normal((one.shape[1], fourier)) / scale,
            phase=rng.uniform(0.0, 2.0 * np.pi, fourier),
        )

    def _inputs(
        self, observation: Float[np.ndarray, "rows columns"], step: Int64[np.ndarray, "rows"]
    ) -> Float64[np.ndarray, "rows inputs"]:
        with torch.no_grad():
            numeric, codes = self.encoder(torch.as_tensor(observation, dtype=torch.float32))
        indicator = np.zeros((len(observation), self.encoder.table_rows))
        np.put_along_axis(indicator, codes.numpy(), 1.0, axis=1)
        columns = [finite("an observed number", numeric.double().numpy()), indicator]
        if self.step is not None:
            columns.append(((step - self.step[0]) / self.step[1])[:, None])
        return np.concatenate(columns, 1)

    def of(
        self, observation: Float[np.ndarray, "rows columns"], step: Int64[np.ndarray, "rows"]
    ) -> Float64[np.ndarray, "rows features"]:
        inputs = self._inputs(observation, step)
        if self.indicators:
            return inputs
        fourier = np.sqrt(2.0 / max(len(self.phase), 1)) * np.cos(inputs @ self.frequency + self.phase)
        linear = inputs / np.sqrt(max(inputs.shape[1], 1))
        return np.concatenate([np.ones((len(inputs), 1)), linear, fourier], 1)

    @property
    def size(self) -> int:
        return len(self.constant)

    @property
    def constant(self) -> Float64[np.ndarray, "features"]:
        """The coefficients of the function that is 1 everywhere."""
        if self.indicators:
            return np.ones(self.encoder.table_rows)
        return np.eye(1, 1 + len(self.frequency) + len(self.phase))[0]


@dataclass(frozen=True, eq=False)
class Flow:
    """What a policy carries from row to row: a function has `groups` parts, one per action or a single one.

    At a row it is read from its parts by `here`, at the next observation by `onward`, at the first one by `start`.
    """

    episodes: Episodes
    here: Float64[np.ndarray, "rows groups"]
    onward: Float64[np.ndarray, "rows groups"]
    start: Float64[np.ndarray, "episodes groups"]
    factor: Float64[np.ndarray, "rows"]  # of the weight, beside the function that is fitted

    @classmethod
    def by_state(cls, episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> "Flow":
        """Weights omega(s) ratio: the logged propensities say how each action weighs."""
        one = np.ones((episodes.n_rows, 1))
        return cls(episodes, one, finite("the ratio", ratio)[:, None], one[: episodes.n_episodes], ratio)

    @classmethod
    def by_state_action(
        cls,
        episodes: Episodes,
        probs: Float64[np.ndarray, "rows actions"],
        next_probs: Float64[np.ndarray, "rows actions"],
    ) -> "Flow":
        """Weights w(s, a), without propensities. `next_probs` are the policy's at each next observation.

        Raises InputError for continuous actions.
        """
        if episodes.action.ndim > 1:
            raise InputError("the actions are continuous; weights by state and action need discrete ones.")
        here = np.eye(probs.shape[1])[episodes.action]
        onward = np.where(episodes.terminated[:, None], 0.0, next_probs)
        first = finite("the evaluation policy", probs[episodes.offsets[:-1]])
        return cls(
            episodes, here, finite("the policy at the next observation", onward), first, np.ones(episodes.n_rows)
        )


class Block(NamedTuple):
    """Some whole episodes in terms of features: read here, at the next observation, and at the start."""

    rows: slice
    first: Int64[np.ndarray, "episodes"]  # row of each episode, among these
    basis: Float64[np.ndarray, "rows functions"]
    onward: Float64[np.ndarray, "rows functions"]  # 0 where nothing follows
    departure: Float64[np.ndarray, "rows functions"]  # here less discounted onward
    start: Float64[np.ndarray, "episodes functions"]


def _spread(
    parts: Float64[np.ndarray, "n groups"], features: Float64[np.ndarray, "n features"]
) -> Float64[np.ndarray, "n functions"]:
    return (parts[:, :, None] * features[:, None, :]).reshape(len(parts), -1)


def block(flow: Flow, features: Features, by_step: bool, chosen: slice) -> Block:
    """The chosen episodes. A truncated one goes on at its final observation; with `by_step` it ends there."""
    log = flow.episodes
    rows = slice(int(log.offsets[chosen.start]), int(log.offsets[chosen.stop]))
    first = log.offsets[chosen] - rows.start
    last = first + log.length[chosen] - 1
    g = features.of(log.observation[rows], log.step[rows])
    following = np.concatenate([g[1:], np.zeros((1, g.shape[1]))])
    following[last] = 0.0
    open_ended = np.flatnonzero(log.truncated[rows][last]) if not by_step else np.zeros(0, np.int64)
    if len(open_ended):
        observed, step = log.final_observation[chosen][open_ended], log.length[chosen][open_ended]
        following[last[open_ended]] = features.of(observed, step)
    basis, onward = _spread(flow.here[rows], g), _spread(flow.onward[rows], following)
    departure = basis - log.discount[rows, None] * onward
    return Block(rows, first, basis, onward, departure, _spread(flow.start[chosen], g[first]))


def chunks(episodes: Episodes, functions: int) -> Iterator[slice]:
    """Whole episodes, as many at a time as fit into memory in terms of so many functions."""
    start, rows = 0, max(NUMBERS // functions, 1)
    while start < episodes.n_episodes:
        stop = int(np.searchsorted(episodes.offsets, episodes.offsets[start] + rows, side="right")) - 1
        yield slice(start, max(stop, start + 1))
        start = max(stop, start + 1)
