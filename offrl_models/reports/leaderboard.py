"""The leaderboard as people see it: a page and a picture of the ranking, how sure it is, and what was pruned."""

from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt

from offrl_models import storage
from offrl_models.reports.plots import BLUE, GRAY, ORANGE, save

SHOWN = 30  # candidates in a picture

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Leaderboard: {{ dataset }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .3rem .7rem; text-align: right; }
th { border-bottom: 2px solid #a0aec0; } td { border-bottom: 1px solid #e2e8f0; } .l { text-align: left; } img { max-width: 100%; }
</style></head><body>
<h1>Leaderboard: {{ dataset }}</h1>
<p>{{ found.sentence }}</p>
<p><img src="leaderboard.png" alt="Gains over the behavior with their intervals"></p>
<h2>Ranked by fitted Q evaluation</h2>
<table><tr><th>rank</th><th class="l">candidate</th><th>least gain</th><th>gain</th><th>95% interval</th>
<th>is the best</th><th>beats the next</th><th>95% of ranks</th></tr>
{% for r in found.ranking %}<tr><td>{{ r.rank }}</td><td class="l">{{ r.candidate }}</td><td>{{ gain(r.score) }}</td>
<td>{{ gain(r.gain) }}</td><td>{{ gain(r.gain_interval[0]) }} to {{ gain(r.gain_interval[1]) }}</td>
<td>{{ share(r.probability_best) }}</td><td>{{ share(r.beats_next) }}</td>
<td>{{ r.rank_interval[0] }} to {{ r.rank_interval[1] }}</td></tr>{% endfor %}
</table>
<p>Gains are over the policy that wrote the log, on {{ "{:,}".format(found.episodes) }} episodes of the selection split. The rank
is by the least gain that a member of the ensemble sees. Probabilities and intervals are of the gain itself: they draw
episodes, the same for all candidates, and the error of the fits. They do not cover what all members get wrong together, nor that
candidates and fits have learned from the same episodes; the gate, on episodes of its own, decides.</p>
{% if found.pruned %}<h2>Pruned before that</h2>
<table><tr><th class="l">candidate</th><th>first-order gain</th><th class="l">why</th></tr>
{% for r in found.pruned %}<tr><td class="l">{{ r.candidate }}</td><td>{{ gain(r.first_order_gain) }}</td>
<td class="l">{{ r.reason }}</td></tr>{% endfor %}
</table>
<p>The first-order gain is what a candidate gains by deciding once, where the behavior goes on afterwards. One fit of the behavior's
values serves all candidates. The best of every algorithm is ranked, where there are places.</p>{% endif %}
</body></html>
"""
)


def sentence(found: dict[str, Any]) -> str:
    """How sure the first place is, in a sentence or two."""
    first, *others = found["ranking"]
    said = f"{first['candidate']} is ranked first"
    if others:
        said += (
            f": it beats {others[0]['candidate']}, the second, with probability {_share(first['beats_next'])}, and is the best of "
            f"{len(others) + 1} with probability {_share(first['probability_best'])}"
        )
        likeliest = max(found["ranking"], key=lambda row: row["probability_best"])
        if likeliest["probability_best"] > first["probability_best"]:
            said += f"; the likeliest to be is {likeliest['candidate']} ({_share(likeliest['probability_best'])})"
    pruned = len(found["pruned"])
    return f"{said}. {pruned} of {found['candidates']} candidates were pruned before." if pruned else f"{said}."


def write(dataset: str, found: dict[str, Any], picture: Path, page: Path) -> None:
    """Draw the ranking and write the page around it."""
    draw(found, picture)
    text = PAGE.render(dataset=dataset, found=found, gain=_gain, share=_share)
    storage.write_bytes(page, text.encode())


def draw(found: dict[str, Any], path: Path) -> None:
    """Gains of those that are ranked, with intervals; and the cheap scores of all, where some were pruned."""
    rows, pruned = found["ranking"][:SHOWN], found["pruned"]
    panels = [rows] if not pruned else [rows, _by_first_order(found)[:SHOWN]]
    heights = [len(panel) + 1.5 for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.4, 0.9 + 0.27 * sum(heights)), height_ratios=heights, squeeze=False
    )
    _intervals(axes[0, 0], rows, len(found["ranking"]))
    if pruned:
        _scores(axes[1, 0], panels[1], found["candidates"])
    figure.tight_layout()
    save(figure, path)


def _by_first_order(found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted([*found["ranking"], *found["pruned"]], key=lambda row: -row["first_order_gain"])


def _intervals(axes: Any, rows: list[dict[str, Any]], ranked: int) -> None:
    for place, row in enumerate(rows):
        axes.plot(row["gain_interval"], [place, place], color=BLUE, linewidth=1.8, solid_capstyle="butt")
        axes.plot(row["gain"], place, "o", color=BLUE, markersize=5)
        axes.plot(row["score"], place, "|", color=ORANGE, markersize=10, markeredgewidth=2)
        low, high = row["rank_interval"]
        ranks = f"rank {low}" if low == high else f"rank {low} to {high}"
        axes.annotate(
            f"best: {_share(row['probability_best'])}, {ranks}",
            (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8,
        )  # fmt: skip
    _names(axes, rows)
    shown = "" if ranked == len(rows) else f", the first {len(rows)} of {ranked}"
    axes.set_title(
        f"Gain over the behavior by FQE, 95% intervals (orange: least member){shown}", fontsize=9, loc="left"
    )


def _scores(axes: Any, rows: list[dict[str, Any]], candidates: int) -> None:
    colors = [GRAY if "reason" in row else BLUE for row in rows]
    axes.barh(range(len(rows)), [row["first_order_gain"] for row in rows], color=colors, height=0.6)
    _names(axes, rows)
    shown = (
        f"{candidates} candidates" if len(rows) == candidates else f"the best {len(rows)} of {candidates} candidates"
    )
    axes.set_title(f"First-order gain of {shown} (gray: pruned)", fontsize=9, loc="left")


def _names(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.axvline(0.0, color=GRAY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["candidate"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _gain(value: float) -> str:
    return f"{value:+.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
