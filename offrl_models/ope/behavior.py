"""The behavior policy as a whole distribution: from the propensities that were logged, or estimated where they were not.

Importance ratios use the logged propensity itself; the model here is what a capped policy is capped by. Where none was logged,
ratios use estimates that are fitted on the very split that evaluates: Hirano, Imbens & Ridder (2003); Hanna, Niekum & Stone
(2019), https://arxiv.org/abs/1806.01347.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import optimize
from torch import Tensor, nn

from offrl_models.logs.tally import holm_z, zero_mean_z
from offrl_models.ope.diagnostics import mean_ratio_z
from offrl_models.ope.units import fold_of
from offrl_models.policies import BehaviorTable, probs_of
from offrl_models.schema import Episodes, Feature, InputError

FLOOR = 0.01  # of an estimated propensity: no single row may weigh more than the log can tell
SMOOTHING = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0)  # rows that a state lends to its actions that were never taken
COLDEST, HOTTEST = 0.2, 5.0
MOST_KNOTS = 32  # of a calibration curve
LEAST_LEVEL = 1e-6  # of a calibration curve: what is allowed may happen


def fit_table(episodes: Episodes, states: int) -> BehaviorTable:
    """Harmonic mean of the logged propensities of every visited state-action cell.

    Where several policies wrote the log, that is the probability under them all, each as often as it acted in the state:
    E[1 / mu(a|s) | s, a logged] is the inverse of it. The arithmetic mean would be too high, for each policy logs most often what
    it plays most.

    Raises InputError when a state's propensities, equal in each of its cells, add up to clearly more than 1, which no policy's do.
    """
    cell = (episodes.observation[:, 0].astype(np.int64), episodes.action)
    visits, inverse, low, high = np.zeros((4, states, episodes.n_actions))
    low[:] = 1.0
    np.add.at(visits, cell, 1.0)
    np.add.at(inverse, cell, 1.0 / episodes.action_prob)
    np.minimum.at(low, cell, episodes.action_prob)
    np.maximum.at(high, cell, episodes.action_prob)
    known = visits / np.where(visits > 0, inverse, 1.0)
    by_one_policy = (high <= low + 1e-6).all(
        1
    )  # else sums over 1 are noise, and the mean-ratio tests tell what is wrong
    excess = by_one_policy & (known.sum(1) > 1.0 + 1e-3)
    if excess.any():
        first = int(np.flatnonzero(excess)[0])
        raise InputError(
            f"the logged propensities of state {first} add up to {known[first].sum():.4f} over its actions, and so do those "
            f"of {int(excess.sum()) - 1} other states to more than 1; they were not drawn by one policy of this observation."
        )
    return BehaviorTable(known)


def _visits(episodes: Episodes, states: int) -> Float64[np.ndarray, "states actions"]:
    return _counts(episodes, episodes.observation[:, 0].astype(np.int64), states, None)


def _counts(
    episodes: Episodes, place: Int64[np.ndarray, "rows"], places: int, copies: Float64[np.ndarray, "episodes"] | None
) -> Float64[np.ndarray, "places actions"]:
    """How often each action was taken in each place."""
    weight = None if copies is None else copies[episodes.episode_of_row]
    taken = place * episodes.n_actions + episodes.action
    return np.bincount(taken, weight, places * episodes.n_actions).reshape(places, -1).astype(np.float64)


def estimate_table(episodes: Episodes, states: int, tuned_on: Episodes) -> BehaviorTable:
    """Share of each state's visits in which an action was taken, less what smoothing lends to actions never taken.

    The smoothing is the one under which the actions of `tuned_on` are likeliest.
    """
    visits = _visits(episodes, states)
    tables = [BehaviorTable(visits / np.maximum(visits.sum(1, keepdims=True) + lent, 1.0)) for lent in SMOOTHING]
    inputs = torch.as_tensor(tuned_on.observation), torch.as_tensor(np.array(tuned_on.mask))
    with torch.no_grad():
        losses = [_negative_log_likelihood(table(*inputs).numpy(), tuned_on.action) for table in tables]
    return tables[int(np.argmin(losses))]


def estimate_propensities(
    episodes: Episodes, states: int, copies: Float64[np.ndarray, "episodes"] | None = None
) -> Float64[np.ndarray, "rows"]:
    """Estimated propensity of every logged action: its share of the decisions in these very episodes that were made in the same
    state, with the same actions allowed, at least FLOOR.

    Whoever acted knew what was allowed, and that may tell what comes next: the share of all visits of the state would be another
    policy's. `copies` counts each episode that many times, in whatever unit.
    """
    place = episodes.situation
    visits = _counts(episodes, place, max(states, int(place.max(initial=0)) + 1), copies)
    total = visits.sum(1, keepdims=True)
    share = visits / np.where(total > 0, total, 1.0)
    return np.maximum(share[place, episodes.action], FLOOR)


class Warmed(nn.Module):
    """A policy at another temperature: probabilities to the power 1 / temperature, over the allowed actions."""

    temperature: Tensor

    def __init__(self, policy: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.policy = policy
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float64))

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        probs = self.policy(observation, mask).double().clamp(min=1e-12)
        powered = torch.where(mask, probs.log() / self.temperature, -torch.inf)
        return powered.softmax(-1)


def _negative_log_likelihood(probs: Float[np.ndarray, "rows actions"], action: Int64[np.ndarray, "rows"]) -> float:
    return float(-np.log(np.maximum(probs[np.arange(len(probs)), action], 1e-12)).mean())


def fit_temperature(
    probs: Float[np.ndarray, "rows actions"], mask: Bool[np.ndarray, "rows actions"], action: Int64[np.ndarray, "rows"]
) -> float:
    """The temperature at which the actions taken are likeliest. Guo et al. (2017), https://arxiv.org/abs/1706.04599."""
    logits = np.where(mask, np.log(np.maximum(probs, 1e-12)), -np.inf)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled -= scaled.max(1, keepdims=True)
        return _negative_log_likelihood(np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True), action)

    found = optimize.minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


class Monotone(nn.Module):
    """A policy whose probabilities went through a rising, piecewise linear curve, then add up to 1 over the allowed actions."""

    knots: Tensor
    levels: Tensor

    def __init__(self, policy: nn.Module, knots: Float64[np.ndarray, "knots"], levels: Float64[np.ndarray, "knots"]):
        super().__init__()
        self.policy = policy
        self.register_buffer("knots", torch.as_tensor(knots, dtype=torch.float64))
        self.register_buffer("levels", torch.as_tensor(levels, dtype=torch.float64))

    def forward(
        self, observation: Float[Tensor, "batch columns"], mask: Bool[Tensor, "batch actions"]
    ) -> Float[Tensor, "batch actions"]:
        probs = self.policy(observation, mask).double()
        width, rise = self.knots.diff(), self.levels.diff()
        along = ((probs.unsqueeze(-1) - self.knots[:-1]) / width).clamp(0.0, 1.0)
        curved = (self.levels[0] + (along * rise).sum(-1)) * mask
        return curved / curved.sum(-1, keepdim=True)


def fit_curve(
    probs: Float[np.ndarray, "rows actions"], mask: Bool[np.ndarray, "rows actions"], action: Int64[np.ndarray, "rows"]
) -> tuple[Float64[np.ndarray, "knots"], Float64[np.ndarray, "knots"]]:
    """Knots and levels of the rising curve from predicted probabilities to frequencies, over all allowed actions.

    Isotonic regression: Zadrozny & Elkan (2002), "Transforming classifier scores into accurate multiclass probability
    estimates". Its steps are joined by straight lines between their middles, and no allowed action ends up impossible.
    """
    taken = np.zeros_like(mask)
    taken[np.arange(len(action)), action] = True
    order = np.argsort(probs[mask], kind="stable")
    predicted, happened = probs[mask][order].astype(np.float64), taken[mask][order].astype(np.float64)
    cuts = np.flatnonzero(np.append(True, np.diff(predicted) > 0))  # what was predicted alike stays together
    count = np.diff(np.append(cuts, len(predicted))).astype(np.float64)
    middle, frequency = (np.add.reduceat(values, cuts) / count for values in (predicted, happened))
    steps = optimize.isotonic_regression(frequency, weights=count).x
    of_step = np.append(0, np.cumsum(np.diff(steps) > 0))
    bands = of_step if of_step[-1] < MOST_KNOTS else np.minimum(
        (np.cumsum(count) / count.sum() * MOST_KNOTS).astype(int), MOST_KNOTS - 1
    )  # fmt: skip
    weight = np.bincount(bands, count)
    known = weight > 0
    knots, levels = (np.bincount(bands, count * values)[known] / weight[known] for values in (middle, steps))
    at = np.concatenate([[0.0], knots[(knots > 0) & (knots < 1)], [1.0]])
    return at, np.maximum(np.interp(at, knots, levels), LEAST_LEVEL)


def calibrated(policy: nn.Module, tuned_on: Episodes, method: str) -> nn.Module:
    """The policy, brought in line with the actions that were taken in some other episodes than it was fitted on.

    `method` is "temperature", which has one parameter, or "isotonic", which can straighten any rising curve and needs more rows.
    """
    probs, mask = probs_of(policy, tuned_on), np.array(tuned_on.mask)
    if method == "isotonic":
        return Monotone(policy, *fit_curve(probs, mask, tuned_on.action))
    return Warmed(policy, fit_temperature(probs, mask, tuned_on.action))


def expected_calibration(
    predicted: Float64[np.ndarray, "events"], happened: Bool[np.ndarray, "events"], bins: int = 10
) -> dict[str, Any]:
    """`ece`, the expected calibration error of the probabilities of events; `brier`, their mean squared error; and
    `reliability`, one entry per bin that is not empty."""
    which = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    mean = np.bincount(which, predicted, bins) / np.maximum(count, 1)
    frequency = np.bincount(which, happened, bins) / np.maximum(count, 1)
    return {
        "ece": float((count * np.abs(mean - frequency)).sum() / count.sum()),
        "brier": float(np.square(predicted - happened).mean()),
        "reliability": [
            {"predicted": float(m), "frequency": float(f), "pairs": int(c)}
            for m, f, c in zip(mean, frequency, count, strict=True)
            if c
        ],
    }


def calibration(episodes: Episodes, probs: Float64[np.ndarray, "rows actions"]) -> dict[str, Any]:
    """How well modelled probabilities match the actions taken, on episodes not fitted: all (row, allowed action) pairs."""
    taken = np.zeros_like(probs, bool)
    taken[np.arange(len(probs)), episodes.action] = True
    return expected_calibration(probs[episodes.mask], taken[episodes.mask])


def held_against_logged(ratios: Mapping[str, Float64[np.ndarray, "_"]], least: float) -> list[dict[str, Any]]:
    """Mean ratio of each logging policy: modelled probabilities or densities of the actions it took, on episodes not fitted,
    over the logged ones.

    The mean of p(a|s) / mu(a|s) is 1 for any p that is 0 wherever mu is, if the logged mu is right, and less where p is not.
    `z` tells how many standard errors it is from 1, and `shortfall_z`, below 0, how many it is below `least`; both are corrected
    for the number of policies (Holm).
    """
    z = holm_z(np.array([mean_ratio_z(ratio) for ratio in ratios.values()]))
    short = holm_z(np.array([min(zero_mean_z(ratio - least), 0.0) for ratio in ratios.values()]))
    return [
        {"version": version, "mean_ratio": float(ratio.mean()), "z": float(z[i]), "shortfall_z": float(short[i])}
        for i, (version, ratio) in enumerate(ratios.items())
    ]


def _by_version(episodes: Episodes, column: str | None) -> dict[str, Episodes]:
    """The episodes of each logging policy, where a label column of the log names them."""
    if column is None:
        return {"all rows": episodes}
    wrote = episodes.labels[column].astype(str)
    return {str(name): episodes.take(wrote == name) for name in np.unique(wrote)}


def counted_ratios(
    train: Episodes, held_out: Episodes, states: int, column: str | None
) -> dict[str, Float64[np.ndarray, "_"]]:
    """Of each logging policy: its share of visits in `train` over the logged propensity of every row of `held_out` whose state it
    has visited there."""
    found = {}
    trained = _by_version(train, column)
    for name, other in _by_version(held_out, column).items():
        visits = _visits(trained[name], states) if name in trained else np.zeros((states, other.n_actions))
        state, total = other.observation[:, 0].astype(np.int64), visits.sum(1)
        seen = total[state] > 0
        if seen.sum() > 1:
            share = visits[state[seen], other.action[seen]] / total[state[seen]]
            found[name] = share / other.action_prob[seen]
    return found


def version_observed(episodes: Episodes, column: str, names: Sequence[str]) -> Episodes:
    """The episodes that the policies `names`, in order, wrote, with the one that did as one more category of the observation."""
    known = episodes.take(np.isin(episodes.labels[column].astype(str), names))
    code = np.searchsorted(names, known.labels[column].astype(str)).astype(known.observation.dtype)
    return dataclasses.replace(
        known,
        observation=np.column_stack([known.observation, code[known.episode_of_row]]),
        final_observation=np.column_stack([known.final_observation, code]),
        features=(*known.features, Feature(column, categories=len(names))),
    )


def learned_ratios(
    modelled: Float64[np.ndarray, "rows"], held_out: Episodes, column: str | None
) -> dict[str, Float64[np.ndarray, "_"]]:
    """Of each logging policy: the modelled over the logged propensities of its rows."""
    found = _by_version(dataclasses.replace(held_out, action_prob=modelled / held_out.action_prob), column)
    return {name: part.action_prob for name, part in found.items() if part.n_rows > 1}


def version_shares(episodes: Episodes, column: str | None) -> dict[str, float]:
    """Share of each logging policy in the episodes, where a label column of the log names them."""
    if column is None:
        return {}
    names, counts = np.unique(episodes.labels[column].astype(str), return_counts=True)
    return {str(name): float(count / counts.sum()) for name, count in zip(names, counts, strict=True)}


def halves(episodes: Episodes) -> tuple[Episodes, Episodes]:
    """Two folds of the episodes, those of an entity in one of them."""
    first = fold_of(episodes, 2) == 0
    return episodes.take(first), episodes.take(~first)
