"""The page about a log that a person reads first: what blocked and which rows, then what the log covers, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl

from offrl_models import storage
from offrl_models.logs.coverage import Coverage
from offrl_models.reports import plots
from offrl_models.reports.quality import CheckResult

SHOWN_STATES = 60  # most visited states in the heatmap
SHOWN_VERSIONS = 6
MANY_VISITS = 100  # of a state, from which the frequencies of its actions say something

PICTURES = {
    "visits.png": "Visits of the states and actions seen most",
    "overlap.png": "With which probability the logged actions were drawn",
    "actions.png": "How often each action was taken, by policy version",
    "rewards.png": "Rewards, over the range of the contract",
    "returns.png": "Returns of episodes",
    "lengths.png": "Lengths of episodes",
    "cells.png": "Visits per state-action cell",
    "propensities.png": f"Logged propensity against how often the action was taken, states of {MANY_VISITS} visits or more",
}

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Coverage of {{ dataset }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th, td { padding: .3rem .7rem; text-align: left; vertical-align: top;
border-bottom: 1px solid #e2e8f0; } .ok { color: #2f855a; } .no { color: #c53030; }
.warn { color: #b7791f; } .off { color: #718096; }
figure { display: inline-block; width: 48%; margin: 0 0 1rem; } img { width: 100%; } figcaption { font-size: 13px; color: #4a5568; }
.lead { font-size: 18px; }
</style></head><body><h1>Coverage of {{ dataset }}</h1>
<p class="lead">{% if blocked %}<b class="no">Blocked:</b> {{ blocked | length }} of {{ results | length }} checks stop this log.
{% else %}
<b class="ok">The log may be used:</b> no check blocks it
{%- if warned %}, {{ warned | length }} {{ "warns" if warned | length == 1 else "warn" }}{% endif %}.{% endif %}
{{ "{:,}".format(card.rows) }} decisions in {{ "{:,}".format(card.episodes) }} episodes, {{ card.batches }} batches.</p>
{% if problems %}<h2>Which rows</h2><table><tr><th>batch</th><th>check</th><th>column</th><th>rows</th><th>first row</th>
<th>what</th></tr>
{% for p in problems %}<tr><td>{{ p.file }}</td><td>{{ p.check }}</td><td>{{ p.column }}</td><td>{{ p.rows }}</td>
<td>{{ p.first }}</td>
<td>{{ p.problem }}; {{ p.remedy }}</td></tr>{% endfor %}</table>{% endif %}
{% if quarantined %}<h2>In quarantine</h2><table><tr><th>batch</th><th>why</th></tr>
{% for q in quarantined %}<tr><td>{{ q.file }}</td><td>{{ q.reason }}</td></tr>{% endfor %}</table>{% endif %}
<h2>Checks</h2><table><tr><th>check</th><th></th><th>finding</th><th>details</th></tr>
{% for r in results %}<tr><td>{{ r.check }}</td>
<td>{% if not r.applies %}<span class="off">not applicable</span>
{% elif r.passed %}<b class="ok">holds</b>
{% elif r.blocking %}<b class="no">blocks</b>{% elif r.standing == "notes" %}notes
{% else %}<b class="warn">warns</b>{% endif %}</td>
<td>{{ r.sentence if not r.passed or not r.applies else r.title }}</td>
<td>{% if r.applies %}<a href="{{ r.page.removeprefix(prefix) }}">expectations</a>{% endif %}</td></tr>{% endfor %}</table>
<h2>What the log covers</h2>
{% for file, caption in pictures.items() %}<figure>
<img src="../{{ file }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption>
</figure>{% endfor %}
<h2>Dataset card</h2><table>{% for name, value in card.items() if value is not none %}<tr><td>{{ name.replace("_", " ") }}</td>
<td>{{ "{:,}".format(value) if value is integer else "%.4g" | format(value) }}</td></tr>{% endfor %}</table>
</body></html>
"""
)


def draw(measured: Coverage, reports: Path) -> dict[str, str]:
    """Write every picture that the log gives material for. Returns file -> caption."""
    drawn = ["rewards.png", "returns.png", "lengths.png", "cells.png"]
    _draw_histogram(measured.rewards, "Rewards", reports / "rewards.png")
    plots.histogram(
        measured.returns["return"].to_numpy(), "Returns", "discounted return", reports / "returns.png", log=True
    )
    lengths = measured.episodes
    plots.weighted_histogram(
        lengths["length"].to_numpy(), lengths["episodes"].to_numpy(), "Lengths", "decisions", reports / "lengths.png"
    )
    visits = np.log10(measured.cells["visits"].to_numpy())
    plots.histogram(visits, "Visits per state-action cell", "log10 visits", reports / "cells.png")
    if measured.cells.schema["action"].is_integer() and measured.cells.schema["state"].is_integer():
        plots.heatmap(
            _most_visited(measured.cells),
            "Visits",
            ("state, by visits", "action", "log10 visits"),
            reports / "visits.png",
        )
        drawn.append("visits.png")
    if measured.actions.height:
        _draw_actions(measured.actions, reports / "actions.png")
        drawn.append("actions.png")
    if measured.overlap["rows"].sum():
        _draw_histogram(measured.overlap, "Overlap", reports / "overlap.png")
        drawn.append("overlap.png")
        known = measured.cells.filter(
            pl.col("mean_action_prob").is_not_null() & pl.col("mean_action_prob").is_not_nan()
        )
        if _draw_propensities(known, reports / "propensities.png"):
            drawn.append("propensities.png")
    return {file: caption for file, caption in PICTURES.items() if file in drawn}


def _draw_histogram(counts: pl.DataFrame, title: str, path: Path) -> None:
    width = float(counts["from"][1] - counts["from"][0])
    plots.weighted_histogram(
        (counts["from"] + width / 2).to_numpy(), counts["rows"].to_numpy(), title, "", path, bins=counts.height
    )


def _most_visited(cells: pl.DataFrame) -> np.ndarray:
    """log10 visits of the states visited most, by action; NaN where a cell was never visited."""
    states = cells.group_by("state").agg(pl.col("visits").sum()).sort("visits", "state", descending=[True, False])
    top = states.head(SHOWN_STATES)["state"].to_list()
    table = np.full((len(top), int(cells["action"].to_numpy().max()) + 1), np.nan)
    place = {state: i for i, state in enumerate(top)}
    shown = cells.filter(pl.col("state").is_in(top))
    for state, action, visits in shown.select("state", "action", "visits").iter_rows():
        table[place[state], action] = np.log10(visits)
    return table


def _draw_actions(actions: pl.DataFrame, path: Path) -> None:
    most = int(actions["action"].to_numpy().max()) + 1
    versions = actions.group_by("version").agg(pl.col("rows").sum()).sort("rows", descending=True)
    groups = {}
    for version in versions.head(SHOWN_VERSIONS)["version"]:
        heights = [0.0] * most
        for code, share in actions.filter(pl.col("version") == version).select("action", "share").iter_rows():
            heights[code] = share
        groups[str(version)] = heights
    plots.grouped_bars(groups, "Actions", ("action", "share of rows"), path)


def _draw_propensities(cells: pl.DataFrame, path: Path) -> bool:
    """The mean logged propensity of cells against the share of their state's visits in which the action was taken."""
    bins = pl.col("mean_action_prob").clip(0, 0.999999).mul(10).floor()
    state = pl.col("visits").sum().over("state")
    rows = cells.with_columns(state_visits=state, bin=bins).filter(pl.col("state_visits") >= MANY_VISITS)
    weight = pl.col("state_visits")
    found = rows.group_by("bin").agg(
        predicted=(pl.col("mean_action_prob") * weight).sum() / weight.sum(),
        frequency=pl.col("visits").sum() / weight.sum(),
        pairs=weight.sum(),
    )
    if found.height == 0:
        return False
    plots.reliability(found.sort("bin").to_dicts(), "Logged propensities", path)
    return True


def write(
    dataset: str,
    measured: Coverage,
    results: Sequence[CheckResult],
    problems: Sequence[dict[str, Any]],
    quarantined: Sequence[dict[str, str]],
    reports: Path,
    docs: Path,
) -> None:
    """Write the page and its pictures. `problems` are broken rules by batch, `quarantined` batches with their reasons."""
    page = PAGE.render(
        dataset=dataset,
        card=measured.card,
        results=results,
        blocked=[r for r in results if r.blocking and not r.passed],
        warned=[r for r in results if r.standing == "warns"],
        problems=problems,
        quarantined=quarantined,
        pictures=draw(measured, reports),
        prefix=f"{docs.name}/",
    )
    storage.write_bytes(docs / "index.html", page.encode())
