"""What stands behind a verdict: how the weights are spread, what carries it, where the policy differs, and what would settle it."""

import bisect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from offrl_models.choices import apart, shares
from offrl_models.evaluation import BEHAVIOR, Evaluation, outcome_of
from offrl_models.gate import GateConfig
from offrl_models.measures import Measures
from offrl_models.ope.diagnostics import effective_sample_size_by_step, gamma_star, pareto_k, pareto_k_limit
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.intervals import confidence_sequence_width
from offrl_models.ope.sequences import completed
from offrl_models.reports.plots import BLUE, GRAY, ORANGE, save

MOST_EPISODES = 10_000_000  # beyond which more of the same data is no plan
SHOWN = 8  # actions


def episodes_needed(measures: Measures, config: GateConfig) -> int | None:
    """Gate episodes at which the lower bound would pass the margin, were difference and spread to stay what they are.

    None where the difference is not above the margin, or more than MOST_EPISODES would be needed.
    """
    gap = measures.difference - config.margin

    def width(episodes: int) -> float:
        return confidence_sequence_width(episodes, alpha=measures.alpha, planned=config.planned_episodes)

    spread = (measures.difference - measures.lower_bound) / width(measures.episodes)
    if not gap > 0 or spread * width(MOST_EPISODES) >= gap:
        return None
    return 2 + bisect.bisect_left(range(2, MOST_EPISODES), True, key=lambda n: spread * width(n) < gap)


def detail(
    found: Evaluation, name: str, champion: str, measures: Measures, config: GateConfig, states: int | None
) -> dict[str, Any]:
    """Plain JSON for the page and its pictures. `states`: of the observation, where it is one category."""
    gate, ratio = found.episodes, found.ratio[name]
    weight, whole = trajectory_weights(gate, ratio), completed(gate, found.side(name).next_v)
    pull = np.sort(np.abs(outcome_of(name, found, champion, states)))[::-1]
    mine, theirs = found.choices[name], found.choices[champion]
    confounded = champion == BEHAVIOR and bool(weight.any()) and gate.n_actions > 0  # a density has no odds
    return {
        "episodes_needed": episodes_needed(measures, config),
        "pareto_k": _plain(pareto_k(weight)),
        "pareto_k_limit": pareto_k_limit(gate.n_episodes),
        "gamma_star": _plain(gamma_star(whole, ratio, float(found.logged_returns.mean()))) if confounded else None,
        "effective_episodes_by_step": [float(size) for size in effective_sample_size_by_step(gate, ratio)],
        "weights": [float(value) for value in np.quantile(weight, np.linspace(0, 1, 101))],
        "influence": [float(value) for value in (pull.cumsum() / max(pull.sum(), 1e-300))[: max(len(pull) // 20, 1)]],
        "differs": apart(mine, theirs),
        "actions": [asdict(share) for share in shares(mine, theirs, SHOWN)],
    }


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(found: dict[str, Any], measures: dict[str, Any], path: Path) -> None:
    """Weights, effective sample size by step, what carries the evidence, where the actions differ, and the course of the gain."""
    figure, axes_of = plt.subplot_mosaic("12;34;55", figsize=(9.2, 8.2))
    first, second, third, fourth, fifth = (axes_of[name] for name in "12345")
    episodes = measures["episodes"]
    first.plot(np.linspace(0, 100, 101), found["weights"], color=BLUE)
    first.set_yscale("symlog", linthresh=0.01)
    first.set_title("weight of an episode, by percentile", fontsize=9, loc="left")
    sizes = found["effective_episodes_by_step"]
    second.plot(range(1, len(sizes) + 1), sizes, color=BLUE)
    second.set_ylim(0, episodes)
    second.set_title(f"effective sample size by step, of {episodes:,} episodes", fontsize=9, loc="left")
    share = np.arange(1, len(found["influence"]) + 1) / episodes * 100
    third.plot(share, np.array(found["influence"]) * 100, color=BLUE)
    third.axhline(5, color=GRAY, linestyle="--", linewidth=1)
    third.set_title("% of the sum of |X| carried by the top % of the episodes", fontsize=9, loc="left")
    place = np.arange(len(found["actions"]))
    for key, color, shift in (("champion", GRAY, -0.2), ("policy", ORANGE, 0.2)):
        fourth.bar(place + shift, [row[key] for row in found["actions"]], 0.4, color=color, label=key)
    labels = [str(row["action"]) for row in found["actions"]]
    ranges = any(len(label) > 5 for label in labels)  # of a continuous action
    fourth.set_xticks(place, labels, rotation=25 if ranges else 0, ha="right" if ranges else "center")
    fourth.set_title("share of each action, where they differ most", fontsize=9, loc="left")
    fourth.legend(fontsize=8, frameon=False)
    _draw_course(fifth, measures)
    for axes in axes_of.values():
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


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
        axes.fill_between(across, half["lower_bound"], half["upper_bound"], color=ORANGE, alpha=0.25, linewidth=0)
        axes.plot(across, [half["difference"]] * 2, color=ORANGE, linewidth=1, label=label)
    axes.set_xticks(place)
    axes.set_title(
        f"difference to the champion in each of {len(place)} parts of the log, oldest first", fontsize=9, loc="left"
    )
    axes.legend(fontsize=8, frameon=False)
