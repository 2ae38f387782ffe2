"""What stands behind a verdict: how the weights are spread, what carries it, where the policy differs, and what would settle it."""

import bisect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes

from offrl_models.choices import apart, shares
from offrl_models.evaluation import Evaluation, Measured
from offrl_models.gate import GateConfig, Status
from offrl_models.legs import Paired
from offrl_models.measures import Measures
from offrl_models.ope.diagnostics import (
    clip_sensitivity,
    effective_sample_size_by_group,
    effective_sample_size_by_step,
    gamma_star_of_bound,
    largest_gap,
    pareto_k,
    pareto_k_limit,
)
from offrl_models.ope.importance import Terms, trajectory_weights
from offrl_models.ope.intervals import ROUNDING, confidence_sequence_width
from offrl_models.ope.units import per_unit, planned_units
from offrl_models.reports.plots import BLUE, GRAY, ORANGE, draw_reliability, save
from offrl_models.reports.where import where_apart

MOST_EPISODES = 10_000_000  # beyond which more of the same data is no plan
SHOWN = 8  # actions, and places
LARGEST_WEIGHT = 1e300  # of an episode, as which one that overflows is shown
CLIPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, np.inf)  # of the weight of a decision


def episodes_needed(measures: Measures, config: GateConfig) -> int | None:
    """Gate episodes at which the lower bound would pass the margin, were difference and spread to stay what they are.

    None where the difference is not above the margin, or more than MOST_EPISODES would be needed.
    """
    gap = measures.difference - config.margin

    def width(episodes: int) -> float:
        """Of so many episodes, of entities that have as many each as now."""
        planned, units = (
            planned_units(number, measures.episodes, measures.independent)
            for number in (config.planned_episodes, episodes)
        )
        return confidence_sequence_width(units, alpha=measures.alpha, planned=planned)

    spread = (measures.difference - measures.lower_bound) / width(measures.episodes)
    if not gap > 0 or spread * width(MOST_EPISODES) >= gap:
        return None
    return 2 + bisect.bisect_left(range(2, MOST_EPISODES), True, key=lambda n: spread * width(n) < gap)


def canary_share(
    status: Status,
    config: GateConfig,
    return_range: tuple[float, float] | None,
    returns: Float64[np.ndarray, "episodes"],
) -> float | None:
    """The largest share of episodes, drawn at random, that a policy may play beside the champion so that all of them together lose
    at most `canary_loss` a piece, however bad it is.

    None where the verdict is settled, where no loss is allowed, or where the range of the return is not known, or not that of the
    logged ones.
    """
    if status is not Status.INCONCLUSIVE or config.canary_loss is None or return_range is None:
        return None
    low, high = return_range
    if returns.min() < low - ROUNDING * (high - low) or returns.max() > high + ROUNDING * (high - low):
        return None
    return min(config.canary_loss / (high - low), 1.0)


def _gamma_star(found: Evaluation, rung: Measured, config: GateConfig) -> float | None:
    """Of the bound that passed."""
    measures = rung.measures
    planned = planned_units(config.planned_episodes, measures.episodes, measures.independent)
    width = confidence_sequence_width(measures.independent, alpha=measures.alpha, planned=planned) * measures.widened
    outcome, unit = rung.leg.outcome - config.margin, found.unit
    return _plain(gamma_star_of_bound(found.episodes, outcome, rung.leg.correction, width, unit))


def _clipped(found: Evaluation, own: Paired) -> list[float]:
    """The difference to the policy that wrote the log, with the weights of decisions clipped."""

    def terms_of(weight: np.ndarray) -> Terms:
        kept = np.divide(weight, own.weight, out=np.ones_like(weight), where=own.weight > 0)
        return Terms((own.outcome + found.episodes.sum_per_episode(own.correction * (kept - 1.0)))[:, None])

    return [float(value) for value in clip_sensitivity(terms_of, own.weight, CLIPS)]


def _agreement(found: Evaluation, name: str) -> dict[str, Any] | None:
    intervals = {
        estimator: interval
        for estimator, interval in found.estimates[name].intervals.items()
        if np.isfinite([interval.estimate, interval.low, interval.high]).all()
    }
    gap = largest_gap(intervals) if len(intervals) > 1 else None
    return asdict(gap) if gap is not None and np.isfinite(gap.standardized) else None


def _by_group(found: Evaluation, rung: Measured, columns: tuple[str, ...]) -> dict[str, float]:
    """The effective transitions of each group."""
    row = found.episodes.episode_of_row
    return {
        f"{column} {group}": size
        for column in columns
        for group, size in effective_sample_size_by_group(
            rung.leg.weight, found.episodes.labels[column].astype(str)[row]
        ).items()
    }


def detail(
    found: Evaluation,
    name: str,
    champion: str,
    rung: Measured,
    config: GateConfig,
    status: Status,
    *,
    action_names: Sequence[str] | None = None,
    category_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Plain JSON for the page and its pictures, with what people call actions and categories in the place of their codes."""
    gate, ratio, measures = found.episodes, found.ratio[name], rung.measures
    weight = np.minimum(trajectory_weights(gate, ratio), LARGEST_WEIGHT)
    pull = np.sort(np.abs(per_unit(rung.leg.outcome, found.unit)))[::-1]
    mine, theirs = found.choices[name], found.choices[champion]
    differs = apart(mine, theirs)
    confounded = status is Status.PASS and gate.n_actions > 0  # a density has no odds
    return {
        "episodes_needed": episodes_needed(measures, config),
        "pareto_k": None if (weight == LARGEST_WEIGHT).any() else _plain(pareto_k(weight)),
        "pareto_k_limit": pareto_k_limit(gate.n_episodes),
        "gamma_star": _gamma_star(found, rung, config) if confounded else None,
        "agreement": _agreement(found, name),
        "clipped": None if measures.doubt else _clipped(found, rung.own),
        "effective_transitions_by_group": _by_group(found, rung, config.subgroups),
        "effective_episodes_by_step": [float(size) for size in effective_sample_size_by_step(gate, ratio)],
        "weights": [float(value) for value in np.quantile(weight, np.linspace(0, 1, 101))],
        "influence": [float(value) for value in (pull.cumsum() / max(pull.sum(), 1e-300))[: max(len(pull) // 20, 1)]],
        "differs": float(differs.mean()),
        "where": [asdict(place) for place in where_apart(gate, differs, SHOWN, category_names)],
        "actions": [asdict(share) for share in shares(mine, theirs, SHOWN, action_names)],
    }


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(
    found: dict[str, Any],
    measures: dict[str, Any],
    reliability: list[dict[str, Any]],
    path: Path,
    continuous: bool = False,
) -> None:
    """Weights, effective sample size by step, what carries the evidence, clipping, where the actions differ, the calibration of
    the behavior model, and the course of the gain."""
    figure, axes_of = plt.subplot_mosaic("123;456;777", figsize=(12.6, 8.4))
    first, second, third, clip, fourth, calibrated, course = (axes_of[name] for name in "1234567")
    episodes, independent = measures["episodes"], measures["entities"] or measures["episodes"]
    first.plot(np.linspace(0, 100, 101), found["weights"], color=BLUE)
    first.set_yscale("symlog", linthresh=0.01)
    first.set_title("weight of an episode, by percentile", fontsize=9, loc="left")
    sizes = found["effective_episodes_by_step"]
    second.plot(range(1, len(sizes) + 1), sizes, color=BLUE)
    second.set_ylim(0, episodes)
    second.set_title(f"effective sample size by step, of {episodes:,} episodes", fontsize=9, loc="left")
    share = np.arange(1, len(found["influence"]) + 1) / independent * 100
    third.plot(share, np.array(found["influence"]) * 100, color=BLUE)
    third.axhline(5, color=GRAY, linestyle="--", linewidth=1)
    third.set_title(
        f"% of the sum of |X| carried by the top % of the {'entities' if measures['entities'] else 'episodes'}",
        fontsize=9,
        loc="left",
    )
    place = np.arange(len(found["actions"]))
    for key, color, shift in (("champion", GRAY, -0.2), ("policy", ORANGE, 0.2)):
        fourth.bar(place + shift, [row[key] for row in found["actions"]], 0.4, color=color, label=key)
    labels = [textwrap.shorten(row["action"], 20, placeholder="...") for row in found["actions"]]
    long = any(len(label) > 5 for label in labels)  # ranges of a continuous action, or names
    fourth.set_xticks(place, labels, rotation=25 if long else 0, ha="right" if long else "center")
    fourth.set_title("share of each action, where they differ most", fontsize=9, loc="left")
    fourth.legend(fontsize=8, frameon=False)
    _draw_clipped(clip, found["clipped"])
    _draw_reliability(calibrated, reliability, continuous)
    _draw_course(course, measures)
    for axes in axes_of.values():
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def _draw_clipped(axes: Axes, clipped: list[float] | None) -> None:
    axes.set_title("difference to the log's policy, weights clipped", fontsize=9, loc="left")
    if clipped is None:
        axes.text(0.5, 0.5, "no weights that can be trusted", ha="center", fontsize=8, color=GRAY)
        return
    place = range(len(CLIPS))
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.plot(place, clipped, "o-", color=BLUE, markersize=4, linewidth=1)
    axes.set_xticks(place, ["none" if np.isinf(each) else f"{each:g}" for each in CLIPS])


def _draw_reliability(axes: Axes, bins: list[dict[str, Any]], continuous: bool) -> None:
    """Probability by the behavior model against frequency, on episodes that it was not fitted on."""
    draw_reliability(axes, bins)
    event = "an action lies below a value" if continuous else "an action is taken"
    axes.set_xlabel("probability", fontsize=7)
    axes.set_ylabel("share", fontsize=7)
    axes.set_title(f"behavior model: probability that {event},\nand how often it was so", fontsize=9, loc="left")


def _draw_course(axes: Axes, measures: dict[str, Any]) -> None:
    """Leg A in each part of the log, and in its two halves, with their bounds."""
    means, lows, highs = (
        np.array([part[name] for part in measures["course"]], float)
        for name in ("difference", "lower_bound", "upper_bound")
    )
    place = np.arange(1, len(means) + 1)
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.errorbar(place, means, [means - lows, highs - means], fmt="o", color=BLUE, markersize=4, linewidth=1)
    middle = len(means) / 2
    for name, label, start in (("older_half", "halves", 0.5), ("newer_half", None, middle + 0.5)):
        half, across = measures[name], [start, start + middle]
        if half["lower_bound"] is not None:
            axes.fill_between(across, half["lower_bound"], half["upper_bound"], color=ORANGE, alpha=0.25, linewidth=0)
        axes.plot(across, [half["difference"]] * 2, color=ORANGE, linewidth=1, label=label)
    axes.set_xticks(place)
    axes.set_title(
        f"difference to the champion in each of {len(place)} parts of the log, oldest first", fontsize=9, loc="left"
    )
    axes.legend(fontsize=8, frameon=False)
