"""Importance sampling estimators, each as a sum of ratios of means.

An estimate is sum_k mean_i(numerator[i, k]) / mean_i(denominator[i, k]). Unbiased estimators have a denominator of 1;
self-normalised ones have the weights there, so that a bootstrap re-forms every ratio in each of its samples.
Precup, Sutton & Singh (2000); Thomas (2015), Safe Reinforcement Learning, chapter 3.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offrl_models.ope.sequences import by_step, finite, weights_by_step
from offrl_models.schema import Episodes


@dataclass(frozen=True)
class Terms:
    """What an estimator leaves of each episode. `denominator` is None where it is 1."""

    numerator: Float64[np.ndarray, "episodes terms"]
    denominator: Float64[np.ndarray, "episodes terms"] | None = None

    def estimate(self, share: Float64[np.ndarray, "episodes"] | None = None) -> float:
        """The estimate with each episode counted `share` times (shares sum to 1); without it, equally."""
        n = len(self.numerator)
        weight = np.full(n, 1.0 / n) if share is None else share
        return float(self.resampled(weight[None, :])[0])

    def influence(self) -> Float64[np.ndarray, "episodes"]:
        """How far each episode pulls the estimate: the influence function, whose mean is 0."""
        top = self.numerator.mean(0)
        if self.denominator is None:
            return (self.numerator - top).sum(1)
        bottom = self.denominator.mean(0)
        ratio = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
        return ((self.numerator - ratio * self.denominator) / np.where(bottom > 0, bottom, 1.0)).sum(1)

    def resampled(self, share: Float64[np.ndarray, "samples episodes"]) -> Float64[np.ndarray, "samples"]:
        """One estimate per row of shares; NaN where every weight of some step is 0, since then there is no estimate."""
        top = share @ self.numerator
        if self.denominator is None:
            return top.sum(1)
        bottom = share @ self.denominator
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan).sum(1)


def discounted_rewards(episodes: Episodes) -> Float64[np.ndarray, "episodes steps"]:
    """gamma^t r_t, zero past the end."""
    return by_step(episodes, finite("the reward", episodes.time_discount * episodes.reward), 0.0)


def trajectory_weights(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "episodes"]:
    """Product of all ratios of each episode."""
    return weights_by_step(episodes, ratio)[:, -1]


def tis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Terms:
    """Trajectory-wise importance sampling: mean of w_T G."""
    return Terms((trajectory_weights(episodes, ratio) * episodes.return_)[:, None])


def wis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Terms:
    """Weighted (self-normalised) trajectory-wise importance sampling: sum w_T G / sum w_T."""
    weight = trajectory_weights(episodes, ratio)[:, None]
    return Terms(weight * episodes.return_[:, None], weight)


def pdis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Terms:
    """Per-decision importance sampling: mean of sum_t w_t gamma^t r_t."""
    return Terms((weights_by_step(episodes, ratio) * discounted_rewards(episodes)).sum(1, keepdims=True))


def wpdis(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Terms:
    """Weighted per-decision importance sampling: at each step the weights are normalised over all episodes."""
    weight = weights_by_step(episodes, ratio)
    return Terms(weight * discounted_rewards(episodes), weight)
