"""An assessment as people see it: tables in the terminal, a JSON file, and one HTML page that needs nothing else."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from offrl_models import storage
from offrl_models.reports.plots import BLUE, GRAY, ORANGE, plt

WORDS = {"better": "BETTER", "worse": "WORSE", "unsettled": "NOT SETTLED", "unusable": "CANNOT TELL"}
TITLES = {
    "IPW": "importance sampling", "SNIPW": "self-normalised importance sampling",
    "TIS": "trajectory-wise importance sampling", "PDIS": "per-decision importance sampling",
    "WIS": "self-normalised TIS", "WPDIS": "self-normalised PDIS", "DR": "doubly robust",
    "WDR": "self-normalised doubly robust", "SNDR": "self-normalised doubly robust",
    "MDR": "marginalised doubly robust", "DM": "direct method, tabular", "FQE": "direct method, fitted Q evaluation",
}  # fmt: skip

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation: {{ e.policy.name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
h1 { font-size: 24px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 14px; } th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #a0aec0; } td { border-bottom: 1px solid #e2e8f0; } .l { text-align: left; }
.logged td { background: #f7fafc; font-weight: 600; } .used td { background: #ebf4ff; }
small { color: #718096; } .pale td, .pale small { color: #a0aec0; } img { max-width: 100%; display: block; }
.answer { padding: .8rem 1rem; border-left: 6px solid; background: #f7fafc; font-size: 17px; }
.better { border-color: #2f855a; } .unsettled { border-color: #b7791f; } .worse, .unusable { border-color: #c53030; }
.notice { padding: .6rem 1rem; border: 1px solid #b7791f; background: #fffaf0; }
.fails { color: #c53030; font-weight: 600; } .checks td:not(:last-child) { white-space: nowrap; }
</style></head><body>
<h1>Evaluation of {{ e.policy.name }}</h1>
<p class="answer {{ e.answer }}"><b>{{ word }}</b>: {{ e.sentence }}</p>
<p class="notice">{{ e.notice }}</p>
<p>{{ "{:,}".format(e.log.rows) }} decisions in {{ "{:,}".format(e.log.episodes) }} episodes of
{{ "{:,}".format(e.log.entities) }} entities, {{ e.log.files | length }} file{{ "s" if e.log.files | length > 1 }}. Propensities:
<b>{{ e.behavior.color }}</b>, {{ propensities }}.</p>
<p><img alt="Every estimate with its interval, beside the mean of the log" src="data:image/png;base64,{{ forest }}"></p>
<h2>Value per episode</h2>
<table><tr><th class="l">estimator</th><th>estimate</th><th>{{ level }} interval</th><th>minus logged</th></tr>
<tr class="logged"><td class="l">the logs themselves</td><td>{{ number(e.logged.estimate) }}</td>
<td>{{ number(e.logged.low) }} to {{ number(e.logged.high) }}</td><td></td></tr>
{% for name, i in e.estimates.items() %}<tr class="{{ "used" if name == e.difference.estimator }} {{
"pale" if name in e.doubted }}">
<td class="l">{{ name }} <small>{{ titles[name] }}</small></td><td>{{ number(i.estimate) }}</td>
<td>{{ number(i.low) }} to {{ number(i.high) }}</td>
<td>{{ signed(none if i.estimate is none else i.estimate - e.logged.estimate) }}</td></tr>{% endfor %}
</table>
<p>Difference, paired by episode ({{ e.difference.estimator }}): <b>{{ signed(e.difference.estimate) }}</b>, at least
{{ signed(e.difference.lower_bound) }} and at most {{ signed(e.difference.upper_bound) }}, {{ e.ends }}.</p>
{% for names, why in e.left_out.items() %}<p>Left out: {{ names }}. {{ sentence(why) }}</p>{% endfor %}
<h2>What speaks against believing it</h2>
<table class="checks"><tr><th class="l">check</th><th class="l"></th><th>measured</th><th class="l">asked</th><th></th></tr>
{% for check in e.checks %}<tr><td class="l">{{ check.name }}</td>
<td class="l {{ "" if check.holds else "fails" }}">{{ "holds" if check.holds else "fails" }}</td>
<td>{{ short(check.value) }}</td><td class="l">{{ check.asked }}</td>
<td class="l">{{ "" if check.holds else sentence(check.sentence) }}</td></tr>{% endfor %}
</table>
<h2>How much hangs on few episodes</h2>
{% if weights %}<p><img alt="Importance weights of episodes" src="data:image/png;base64,{{ weights }}"></p>{% endif %}
<p>{{ tail }} What is pale above is doubted: at the last step, or but for TIS and WIS at an earlier one, weights are worth too few
episodes, or their mean is so far below 1 that large ones are likely to be missing. Such intervals may cover the value less often
than they say; the answer is read off none of these intervals.</p>
<h2>How it was done</h2>
<p>Policy: {{ e.policy.kind }}{% if e.policy.sha256 %}, sha256 {{ e.policy.sha256[:16] }}{% endif %}. Observed:
{{ e.log.observed | join(", ") }}. Reward: {{ e.log.reward.column }}, from {{ e.log.reward.range[0] }} to
{{ e.log.reward.range[1] }}; discount {{ e.log.gamma }}.</p>
{% for said in e.method %}<p>{{ said }}</p>{% endfor %}
{% if dropped %}<p>{{ dropped }}</p>{% endif %}
<h2>What this rests on</h2><p>{{ e.statement }}</p>
</body></html>
"""
)


def write(found: dict[str, Any], html: Path, json: Path | None) -> None:
    """The page, and the numbers behind it where a file for them is named."""
    digits = decimals(found)
    page = PAGE.render(
        e={**found, "policy": {"sha256": None, **found["policy"]}},
        word=WORDS[found["answer"]],
        titles=TITLES,
        level=f"{found['logged']['level']:.0%}",
        propensities=_propensities(found["behavior"]),
        forest=_forest(found),
        weights=_weights(found["weights"]),
        tail=_tail(found),
        dropped=_dropped(found["log"]),
        number=lambda value: _number(value, digits),
        signed=lambda value: _number(value, digits, "+"),
        short=_short,
        sentence=lambda text: f"{text[0].upper()}{text[1:]}.",
    )
    storage.write_bytes(html, page.encode())
    if json is not None:
        storage.write_json(json, found)


def table(found: dict[str, Any]) -> Table:
    """Every estimate, for a terminal."""
    digits = decimals(found)
    rows = Table(title=f"Value per episode of {escape(found['policy']['name'])}", title_justify="left")
    for column in ("estimator", "estimate", f"{found['logged']['level']:.0%} interval", "minus logged"):
        rows.add_column(column, justify="left" if column == "estimator" else "right", no_wrap=column != "estimator")
    logged = found["logged"]
    rows.add_row(
        "the logs themselves", _number(logged["estimate"], digits), _ends(logged, digits), "", end_section=True
    )
    for name, interval in found["estimates"].items():
        apart = None if interval["estimate"] is None else interval["estimate"] - logged["estimate"]
        cells = [_number(interval["estimate"], digits), _ends(interval, digits), _number(apart, digits, "+")]
        rows.add_row(f"{name} [dim]{TITLES[name]}[/]", *cells, style="dim" if name in found["doubted"] else None)
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """What else a terminal shows: the answer, what was left out, and what it rests on."""
    digits, gain = decimals(found), found["difference"]
    ends = [_number(gain[name], digits, "+") for name in ("estimate", "lower_bound", "upper_bound")]
    said = [
        f"Difference ({gain['estimator']}): {ends[0]}, at least {ends[1]} and at most {ends[2]}, {found['ends']}.",
        _tail(found),
        f"Propensities: {found['behavior']['color']}, {_propensities(found['behavior'])}.",
        *(f"Left out: {names}: {why}." for names, why in found["left_out"].items()),
        *found["method"],
        f"{WORDS[found['answer']]}: {found['sentence']}",
        found["notice"],
    ]
    return [line for line in said if line]


def decimals(found: dict[str, Any]) -> int:
    """Three, or as many more as show two digits of the logged value's standard error."""
    width = found["logged"]["high"] - found["logged"]["low"] if found["logged"]["low"] is not None else 0.0
    return min(max(3, 1 - math.floor(math.log10(width / 4))), 12) if width > 0 else 3


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign},.{digits}f}"


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ends(interval: dict[str, Any], digits: int) -> str:
    return f"{_number(interval['low'], digits)} to {_number(interval['high'], digits)}"


def _propensities(behavior: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in behavior["versions"].items())
    said = "they were logged"
    if behavior["ece"] is not None:
        said = (
            f"they were estimated from the log itself (calibration error {behavior['ece']:.3f}), at half the error rate"
        )
    return said + (f"; logged by {shares}" if shares else "")


def _dropped(log: dict[str, Any]) -> str:
    """Rows that were read and are in no estimate."""
    parts = [
        f"{log['repeated_rows']:,} rows repeat an earlier one" if log["repeated_rows"] else "",
        f"{log['episodes_with_gaps']:,} episodes have gaps" if log["episodes_with_gaps"] else "",
    ]
    if log["rows"] == log["rows_read"] or log["held_out_of"] is not None:
        return ""
    why = "; ".join(part for part in parts if part) or "the rest follows the last observation that is known"
    return f"Of {log['rows_read']:,} rows that were read, {log['rows']:,} are evaluated: {why}."


def _tail(found: dict[str, Any]) -> str:
    weights, episodes = found["weights"], found["log"]["episodes"]
    if "overflow" in weights:
        return f"The importance weights of {weights['overflow']:,} of {episodes:,} episodes are too large to be represented."
    zero = "none is" if not weights["zero"] else "one is" if weights["zero"] == 1 else f"{weights['zero']:,} are"
    said = (
        f"The weights of {episodes:,} whole episodes are worth {weights['effective_episodes']:,.0f} equal ones; the largest is "
        f"{weights['largest']:,.4g}, {weights['largest_share']:.1%} of their sum, and {zero} 0."
    )
    if weights["pareto_k"] is not None:
        limit, shape = weights["pareto_k_limit"], weights["pareto_k"]
        said += f" Their tail has Pareto k = {shape:.2f}, {'above' if shape > limit else 'within'} the limit of {limit:.2f}."
    transitions = next((check for check in found["checks"] if check["name"] == "effective transitions"), None)
    if transitions and "MDR" in found["estimates"]:
        said += (
            f" MDR weighs single transitions instead, worth {transitions['value']:,.0f} of {found['log']['rows']:,}."
        )
    if weights["gamma_star"] is not None:
        said += (
            f" Hidden confounding with an odds ratio of {weights['gamma_star']:.3g} at every decision could turn the sign of "
            "the self-normalised difference."
        )
    return said


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _forest(found: dict[str, Any]) -> str:
    """Every estimate with its interval; the band is that of the logged value."""
    rows = {"the logs": found["logged"], **found["estimates"]}
    figure, axes = plt.subplots(figsize=(7.6, 0.38 * len(rows) + 0.9))
    logged = found["logged"]
    if logged["low"] is not None:
        axes.axvspan(logged["low"], logged["high"], color=GRAY, alpha=0.15, linewidth=0)
    axes.axvline(logged["estimate"], color=GRAY, linestyle="--", linewidth=1)
    for place, (name, interval) in enumerate(rows.items()):
        if interval["estimate"] is None:
            continue
        color = GRAY if place == 0 else ORANGE if name == found["difference"]["estimator"] else BLUE
        alpha = 0.25 if name in found["doubted"] else 1.0
        if interval["low"] is not None:
            axes.plot([interval["low"], interval["high"]], [place, place], color=color, linewidth=2, alpha=alpha)
        axes.plot(interval["estimate"], place, "o", color=color, markersize=4.5, alpha=alpha)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("value per episode")
    axes.spines[["top", "right"]].set_visible(False)
    note = f"band: the logs; orange: {found['difference']['estimator']}, which the answer is read off; pale: doubted"
    axes.set_title(f"Estimates with {logged['level']:.0%} intervals ({note})", fontsize=9, loc="left")
    return _png(figure)


def _weights(weights: dict[str, Any]) -> str:
    """Histogram of the weights that are above 0, as a PNG; empty where there are none."""
    if not weights.get("counts"):
        return ""
    figure, axes = plt.subplots(figsize=(7.6, 2.4))
    edges = np.power(10.0, weights["log10_edges"])
    axes.stairs(weights["counts"], edges, fill=True, color=BLUE)
    axes.set_xscale("log")
    axes.axvline(1.0, color=GRAY, linestyle="--", linewidth=1)
    axes.set_xlabel("importance weight of an episode (1: as the logs; smaller than 0.0001 in the first bar)")
    axes.set_ylabel("episodes")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
