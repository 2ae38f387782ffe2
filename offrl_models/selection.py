"""Ranking candidates without an environment, on the selection split, and what a ranking was worth where the truth is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import stats

from offrl_models.evaluation import BEHAVIOR, Evaluation
from offrl_models.ope.estimates import LEVEL
from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.sequences import finite
from offrl_models.ope.units import per_unit
from offrl_models.schema import Episodes, InputError

TRIED = 3  # policies in regret@k and SharpeRatio@k of a report
ROUNDING = 1e-6  # of the largest gain: smaller differences are none
Scorer = Callable[[Sequence[str]], Sequence[float]]  # names of candidates in, one score each out, higher is better


def rank(found: Evaluation) -> list[dict[str, Any]]:
    """Candidates from best to worst, by the least that a member of the FQE ensemble says they gain on the champion.

    A member compares both policies on the same resample, so what it gets wrong of both cancels. Ranking by FQE follows
    Paine et al. (2020), https://arxiv.org/abs/2007.09055; the least of the members instead of their mean is pessimism.
    How sure the order is comes with it: `beats_next` is the probability that a candidate is better than the one after it.
    """
    names = [name for name in found.names if name != BEHAVIOR]
    names.sort(key=lambda name: (-min(found.fqe_gains(name)), name))
    initial = found.fqe.initial[[found.names.index(name) for name in (*names, BEHAVIOR)]]
    gains = np.apply_along_axis(per_unit, -1, initial[:-1] - initial[-1], found.unit)
    draws = draw_gains(gains, found.samples)
    sure, ends = order(draws), np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [
        {
            "rank": place + 1,
            "candidate": name,
            "score": min(found.fqe_gains(name)),
            "gain_by_member": found.fqe_gains(name),
            "gain": float(np.mean(found.fqe_gains(name))),
            "gain_interval": [float(end) for end in ends[:, place]],
            "probability_best": float(sure.best[place]),
            "rank_interval": [int(sure.low_rank[place]), int(sure.high_rank[place])],
            "beats_next": beats(draws, place, place + 1) if place + 1 < len(names) else None,
            **found.estimates[name].to_json(),
        }
        for place, name in enumerate(names)
    ]


def first_order_gain(
    episodes: Episodes, v: Float64[np.ndarray, "rows"], behavior_v: Float64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "episodes"]:
    """sum_t gamma^t [v(s_t) - behavior_v(s_t)] of each episode, both by the behavior's Q: v(s) = sum_a pi(a|s) Q(s, a).

    Its mean is what a policy gains where it decides once and the behavior goes on: the value's derivative from the behavior towards
    the policy, Kakade & Langford (2002), "Approximately optimal approximate reinforcement learning". One Q serves all
    candidates, and no importance weight is in it. What it leaves out is where the policy itself would lead.
    """
    gain = finite("a value", v) - finite("a value", behavior_v)
    return episodes.sum_per_episode(episodes.time_discount * gain)


@dataclass(frozen=True)
class Selection:
    """Scores of the two stages by candidate, each stage from best to worst."""

    cheap: dict[str, float]  # of every candidate
    full: dict[str, float]  # of those that were kept


def two_stage(
    candidates: Sequence[str],
    cheap: Scorer,
    full: Scorer,
    keep: int,
    family: Callable[[str], str] = lambda name: "",
) -> Selection:
    """Keep the best few by a score that costs little, then rank these by one that costs much.

    The best of every `family` is kept, where there are no more families than places: what a cheap score gets wrong may be wrong
    of a whole algorithm. The other places are those of the best of all.

    The first may be `first_order_gain`, the second is FQE. Tang & Wiens (2021), "Model selection for offline
    reinforcement learning: practical considerations for healthcare settings", https://arxiv.org/abs/2107.11003. Equal scores
    are ranked by name. Raises InputError for scores that are no numbers, for a name that occurs twice, and for a `keep` that
    keeps none or too many.
    """
    if not 1 <= keep <= len(set(candidates)) == len(candidates):
        raise InputError(
            f"{keep} of {len(candidates)} candidates cannot be kept; name each once, and keep at least 1 and at most all."
        )
    first = _ranked(candidates, cheap)
    heads = list({family(name): name for name in reversed(first)}.values())
    sure = set(heads if len(heads) <= keep else ())
    others = [name for name in first if name not in sure][: keep - len(sure)]
    return Selection(first, _ranked([name for name in first if name in sure.union(others)], full))


def _ranked(candidates: Sequence[str], scorer: Scorer) -> dict[str, float]:
    scores = dict(zip(candidates, scorer(candidates), strict=True))
    unknown = [name for name, score in scores.items() if not math.isfinite(score)]
    if unknown:
        raise InputError(f"{len(unknown)} candidates have no score that is a number: {', '.join(sorted(unknown)[:5])}.")
    return {name: float(scores[name]) for name in sorted(scores, key=lambda name: (-scores[name], name))}


@dataclass(frozen=True)
class Order:
    """How sure an order of candidates is."""

    best: Float64[np.ndarray, "candidates"]  # probability of being the best; those that are equal share it
    low_rank: Int64[np.ndarray, "candidates"]
    high_rank: Int64[np.ndarray, "candidates"]


def draw_gains(
    gains: Float64[np.ndarray, "candidates members episodes"], samples: BootstrapSamples
) -> Float64[np.ndarray, "samples candidates"]:
    """Gains that might be the true ones, all candidates together, so that what they have in common stays in common.

    `gains` are values of first observations by each member of an FQE ensemble less the champion's. A draw is the mean gain of a
    bootstrap sample of the episodes, plus the error of the fits: a combination of the members' deviations at random, whose
    distribution is Student's t with a degree of freedom less than there are members. That is the interval of
    `ope.intervals.ensemble`, of all candidates at once. Raises InputError for fewer than two members.
    """
    members = gains.shape[1]
    if members < 2:
        raise InputError(f"the spread of an ensemble needs at least 2 members, not {members}.")
    finite("a gain", gains)
    rng = np.random.default_rng([samples.seed, samples.number])
    normal = rng.normal(size=(samples.number, members))
    student = normal * np.sqrt((members - 1) / rng.chisquare(members - 1, size=(samples.number, 1)))
    fits, episodes = gains.mean(2), gains.mean(1)
    spread = (fits - fits.mean(1, keepdims=True)) * np.sqrt((1 + 1 / members) / (members - 1))
    resampled = np.stack([episodes @ count for block in samples for count in block]) / samples.episodes
    return resampled + student @ spread.T


def order(draws: Float64[np.ndarray, "draws candidates"], level: float = LEVEL) -> Order:
    """How sure the order of some candidates is, by what their gains might be.

    The rank interval of a candidate holds the middle `level` of its ranks; equal gains take all the ranks between them. It is that
    of one candidate, as Goldstein & Spiegelhalter (1996) draw league tables, and not of all at once. Raises InputError for NaN.
    """
    value = _equalled(finite("a gain", draws))
    top = value == value.max(1, keepdims=True)
    lowest, highest = (stats.rankdata(-value, method=method, axis=1) for method in ("min", "max"))
    low = np.quantile(lowest, (1 - level) / 2, axis=0, method="inverted_cdf")
    high = np.quantile(highest, (1 + level) / 2, axis=0, method="inverted_cdf")
    return Order((top / top.sum(1, keepdims=True)).mean(0), low.astype(np.int64), high.astype(np.int64))


def beats(draws: Float64[np.ndarray, "draws candidates"], first: int, second: int) -> float:
    """The probability that one candidate is better than another; half of it where they are equal."""
    value = _equalled(finite("a gain", draws))
    above = value[:, first] - value[:, second]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _equalled(draws: Float64[np.ndarray, "draws candidates"]) -> Float64[np.ndarray, "draws candidates"]:
    """Numbers that differ by rounding alone, as those of policies that do the same, made equal."""
    unit = ROUNDING * max(float(np.abs(draws).max()), np.finfo(float).tiny)
    return np.round(draws / unit)


def spearman(estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"]) -> float:
    """Correlation of the ranks by estimate with the ranks by true value, ties sharing a rank; NaN where either is constant."""
    ranks = [stats.rankdata(finite("an estimate or value", each)) for each in (estimate, value)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _best(estimate: Float64[np.ndarray, "policies"], k: int) -> Int64[np.ndarray, "k"]:
    """Positions of the k highest estimates; of equal ones, those that come first."""
    if not 1 <= k <= len(estimate):
        raise InputError(f"the best {k} of {len(estimate)} policies do not exist; choose k from 1 to {len(estimate)}.")
    return np.argsort(-finite("an estimate", estimate), kind="stable")[:k]


def regret_at_k(estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], k: int) -> float:
    """The best value there is less the best among the k policies of highest estimate. Paine et al. (2020)."""
    return float(finite("a value", value).max() - value[_best(estimate, k)].max())


def error_rates(
    passed: Bool[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], champion_value: float
) -> tuple[float, float]:
    """Type I and type II error of a rule: how many of the policies no better than the champion passed, and how many of the
    better ones did not, as shares. NaN where there is none to err on."""
    better = finite("a value", value) > champion_value
    false_pass = float(passed[~better].mean()) if not better.all() else math.nan
    false_fail = float((~passed[better]).mean()) if better.any() else math.nan
    return false_pass, false_fail


def sharpe_ratio_at_k(
    estimate: Float64[np.ndarray, "policies"], value: Float64[np.ndarray, "policies"], champion_value: float, k: int
) -> float:
    """(best value among the k policies of highest estimate - champion's value) / standard deviation of the k values.

    What trying out the k policies gains over its risk: Kiyohara et al. (2024), https://arxiv.org/abs/2311.18207. The
    deviation has k in its denominator. NaN where the k values are equal, as one alone is: without risk there is no ratio.
    """
    tried = finite("a value", value)[_best(estimate, k)]
    spread = float(tried.std())
    return float(tried.max() - champion_value) / spread if np.ptp(tried) > 0 else math.nan


def worth(
    estimate: Float64[np.ndarray, "policies"],
    value: Float64[np.ndarray, "policies"],
    champion: tuple[float, float],
) -> dict[str, float | None]:
    """What ranking policies by their estimates was worth, and taking every one above the champion's; None where nothing tells.

    `champion` is the champion's estimate and value. The best few are `TRIED`, or all where there are fewer.
    """
    tried = min(TRIED, len(value))
    false_pass, false_fail = error_rates(estimate > champion[0], value, champion[1])
    found = {
        "spearman": spearman(estimate, value),
        "regret_at_1": regret_at_k(estimate, value, 1),
        "regret_at_k": regret_at_k(estimate, value, tried),
        "sharpe_ratio_at_k": sharpe_ratio_at_k(estimate, value, champion[1], tried),
        "type_1_error": false_pass,
        "type_2_error": false_fail,
    }
    return {name: number if math.isfinite(number) else None for name, number in found.items()}
