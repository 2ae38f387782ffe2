"""Plots as PNG files. Every figure is drawn off screen and written whole or not at all."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offrl_models import storage

BLUE, ORANGE, GRAY = "#2b6cb0", "#dd6b20", "#718096"


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    storage.write_bytes(path, buffer.getvalue())


def _axes(title: str, width: float = 6.4, height: float = 3.4) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def learning_curves(
    history: list[dict[str, Any]], title: str, path: Path, model: list[dict[str, Any]] | None = None
) -> None:
    """Loss of each network, one thin line per seed and a thick one for their mean. Below, where there is one, the same of each
    member of the model of the world, and its errors on rows held out."""
    parts = [("", history)] if model is None else [("", history), ("model: ", model)]
    panels = [[name for name in rows[0] if name != "gradient_steps"] for _, rows in parts]
    across = max(map(len, panels))
    figure, grid = plt.subplots(len(parts), across, figsize=(3.6 * across, 2.8 * len(parts)), squeeze=False)
    for (of, rows), names, line in zip(parts, panels, grid, strict=True):
        steps = [row["gradient_steps"] for row in rows]
        for axes in line[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(line, names, strict=False):
            losses = np.ma.masked_invalid(np.array([row[name] for row in rows], float))  # None where a seed was stopped
            axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.7)
            axes.plot(steps, losses.mean(1), color=BLUE, linewidth=1.6)
            what = name.replace("_", " ") if name.endswith("_error") else f"{name} loss"
            axes.set_title(of + what, fontsize=9, loc="left")
            axes.set_xlabel("gradient steps", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.suptitle(title, fontsize=10, x=0.02, ha="left", y=1.04)
    save(figure, path)


def reliability(
    bins: list[dict[str, Any]],
    title: str,
    path: Path,
    predicted: str = "probability",
    happened: str = "share taken",
) -> None:
    """Probability of an event against its frequency; that of an action, unless the axes are named otherwise."""
    figure, axes = _axes(title, 6.4, 3.4)
    draw_reliability(axes, bins)
    axes.set_xlabel(predicted)
    axes.set_ylabel(happened)
    save(figure, path)


def draw_reliability(axes: Axes, bins: list[dict[str, Any]]) -> None:
    """A dot per bin, the larger the more pairs are in it, beside the line on which all would lie."""
    axes.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1)
    sizes = np.array([row["pairs"] for row in bins], float)
    place = [[row[name] for row in bins] for name in ("predicted", "frequency")]
    axes.scatter(*place, s=12 + 100 * sizes / sizes.max(initial=1.0), color=BLUE)


def histogram(values: Sequence[float] | np.ndarray, title: str, label: str, path: Path, *, log: bool = False) -> None:
    figure, axes = _axes(title)
    axes.hist(np.asarray(values), bins=40, color=BLUE, log=log)
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    save(figure, path)


def weighted_histogram(
    values: np.ndarray, weights: np.ndarray, title: str, label: str, path: Path, *, bins: int = 40
) -> None:
    """A histogram of values that stand for several things each."""
    figure, axes = _axes(title)
    axes.hist(values, bins=bins, weights=weights, color=BLUE, log=len(values) > 1)
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    save(figure, path)


def bars(labels: Sequence[str], values: Sequence[float], title: str, label: str, path: Path) -> None:
    figure, axes = _axes(title)
    axes.bar(range(len(values)), values, color=BLUE)
    wrapped = [textwrap.fill(each, 18, break_long_words=False) for each in labels]
    axes.set_xticks(range(len(labels)), wrapped, fontsize=7)
    axes.set_ylabel(label)
    save(figure, path)


def heatmap(values: np.ndarray, title: str, labels: tuple[str, str, str], path: Path) -> None:
    """A matrix as colors; `labels` are those of the rows, of the columns and of the colors."""
    figure, axes = _axes(title, 7.2, 3.8)
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    figure.colorbar(image, ax=axes, label=labels[2])
    save(figure, path)


def grouped_bars(groups: dict[str, list[float]], title: str, labels: tuple[str, str], path: Path) -> None:
    """One bar per position and group, side by side."""
    figure, axes = _axes(title)
    width = 0.8 / max(len(groups), 1)
    for number, (name, heights) in enumerate(groups.items()):
        axes.bar(np.arange(len(heights)) + number * width - 0.4 + width / 2, heights, width, label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if len(groups) > 1:
        axes.legend(fontsize=7, frameon=False)
    save(figure, path)


def forest(
    rows: list[dict[str, Any]], estimators: Sequence[str], reference: float, path: Path, exact: dict[str, float]
) -> None:
    """Every estimate with its interval, one panel per policy; the champion's value is the dashed line. What is doubted
    is pale."""
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    figure, grid = plt.subplots(down, across, figsize=(2.3 * across + 0.6, 2.5 * down), sharey=True, squeeze=False)
    panels = grid.ravel()
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels, rows, strict=False):
        for position, name in enumerate(estimators):
            interval = row["estimates"][name]
            if interval["estimate"] is None or interval["low"] is None:
                continue  # no overlap, nothing to draw
            pale = {"alpha": 0.25} if name in row["doubted"] else {}
            axes.plot([interval["low"], interval["high"]], [position, position], color=BLUE, linewidth=1.6, **pale)
            axes.plot(interval["estimate"], position, "o", color=BLUE, markersize=3.5, **pale)
        axes.axvline(reference, color=GRAY, linestyle="--", linewidth=1)
        if row["policy"] in exact:
            axes.axvline(exact[row["policy"]], color=ORANGE, linewidth=1.2)
        axes.set_title(textwrap.fill(row["policy"], 24), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(estimators)), estimators)
    panels[0].invert_yaxis()
    figure.tight_layout()
    note = "95% intervals; pale: doubted; dashed: champion" + (
        "; orange: exact value, known in simulation" if exact else ""
    )
    figure.suptitle(f"Value of each policy ({note})", fontsize=9, x=0.02, ha="left", y=1.02)
    save(figure, path)
