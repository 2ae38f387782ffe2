"""The evidence as people see it: a table in the terminal, a JSON file, and one HTML page."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.table import Table

from offrl_models import storage
from offrl_models.comparison import STATED
from offrl_models.evaluation import BEHAVIOR
from offrl_models.exported import Exported, OnnxPolicy
from offrl_models.ope.estimates import ESTIMATORS
from offrl_models.ope.worlds import WORLDS
from offrl_models.reports import plots
from offrl_models.reports.brief import brief
from offrl_models.reports.detail import draw
from offrl_models.schema import InputError
from offrl_models.selection import TRIED, worth

LOGGED = "logged"
STATEMENT = (
    "This holds if the logged propensities are right, episodes of different entities are independent, deployment is like the "
    "logs of the gate split, the logged reward is the one that matters, and (for the marginalised bound) the observation is a "
    "Markov state, whose "
    "fitted values and visits converge to the true ones. It does not cover hidden confounding beyond the factor that is named "
    "where it can be told, later drift, states never visited, harm to subgroups that the gate was not run for, "
    "bad tails behind a good mean, or poisoned logs."
)
EXACT_NOTE = (
    "exact values by dynamic programming, known because this world is simulated; nothing that decides reads them"
)
FEW = (
    "ESS: how many equally weighted episodes the weights of whole episodes are worth. What is pale is doubted: at the "
    "last step, or but for TIS and WIS at an earlier one, weights are worth too few episodes, or their mean is so far below 1 that "
    "large ones are likely to be missing. Such intervals may cover the value less often than they say. The verdict reads none "
    "of these intervals."
)
COMPARISON_NOTE = (
    "a comparison that decides nothing: on the left the estimate from the gate split for a policy that plays as often as "
    "the other one did, on the right what the other one earned in its own log"
)

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evidence: {{ e.dataset }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #a0aec0; } td { border-bottom: 1px solid #e2e8f0; } td:first-child, .l { text-align: left; }
small { color: #718096; display: block; } small { white-space: nowrap; } td:first-child { min-width: 8rem; }
img { max-width: 100%; } .exact { background: #fffaf0; } .pale, .pale small { color: #a0aec0; }
.verdict { padding: .8rem 1rem; border-left: 6px solid; background: #f7fafc; font-size: 17px; }
.PASS { border-color: #2f855a; } .INCONCLUSIVE { border-color: #b7791f; } .FAIL, .INVALID { border-color: #c53030; }
</style></head><body>
<h1>Evidence: {{ e.dataset }}</h1>
<p class="verdict {{ e.verdict.status }}"><b>{{ e.verdict.status }}</b>: {{ e.verdict.policy_name }}.
{{ e.verdict.reason[0] | upper }}{{ e.verdict.reason[1:] }}.</p>
<p>Champion: {{ e.champion.name }}, value {{ number(e.champion.value, digits + 1) }} over
{{ "{:,}".format(e.gate_episodes) }} episodes of the gate split. Certificate: <b>{{ e.certificate.color }}</b>,
{{ e.certificate.reason }}.</p>
<ul>{% for sentence in brief %}<li>{{ sentence }}</li>{% endfor %}</ul>
<p><img src="evidence.png" alt="Estimates and intervals of every policy"></p>
<h2>Every policy</h2>
<table><tr><th class="l">policy</th>{% for name in estimators %}<th>{{ name }}</th>{% endfor %}<th>ESS</th>
{% if e.exact %}<th class="exact">exact*</th>{% endif %}</tr>
{% for row in rows %}<tr><td>{{ row.policy }}</td>
{% for name in estimators %}{% set i = row.estimates[name] %}<td class="{{ "pale" if name in row.doubted else "" }}">
{{ number(i.estimate, digits) }}
<small>{{ number(i.low, digits) }} to {{ number(i.high, digits) }}</small></td>{% endfor %}
<td>{{ "{:,.0f}".format(row.effective_episodes) }}</td>
{% if e.exact %}<td class="exact">{{ number(e.exact["values"][row.policy], digits + 1) }}</td>{% endif %}</tr>{% endfor %}
</table>
<p>{{ few }}</p>
{% if e.exact %}<p>* {{ e.exact.note }}.</p>
{% if e.exact.rankings %}<table class="exact"><tr><th class="l">ranked by*</th><th>Spearman</th><th>regret@1</th>
<th>regret@{{ e.exact.tried }}</th><th>SharpeRatio@{{ e.exact.tried }}</th><th>type I error</th><th>type II error</th></tr>
{% for name, w in e.exact.rankings.items() %}<tr><td>{{ name }}</td><td>{{ number(w.spearman, 2) }}</td>
<td>{{ number(w.regret_at_1, digits + 1) }}</td><td>{{ number(w.regret_at_k, digits + 1) }}</td>
<td>{{ number(w.sharpe_ratio_at_k, 2) }}</td><td>{{ number(w.type_1_error, 2) }}</td>
<td>{{ number(w.type_2_error, 2) }}</td></tr>{% endfor %}</table>
<p>* What it would have been worth to rank candidates and rungs by each estimator's values; the share of those no better than
the champion whose estimate is above the champion's (type I), and of the better ones whose estimate is not (type II).</p>{% endif %}
{% endif %}
<h2>The ladder</h2>
<table><tr><th class="l">rung</th><th class="l">verdict</th><th>difference</th><th>lower bound</th><th>ESS, episodes</th>
<th>ESS, transitions</th><th class="l">reason</th></tr>
{% for rung in e.ladder %}<tr><td>{{ rung.policy }}</td><td class="l"><b>{{ rung.status }}</b></td>
<td>{{ gain(rung.measures.difference, digits + 1) }}</td><td>{{ gain(rung.measures.lower_bound, digits + 1) }}</td>
<td>{{ "{:,.0f}".format(rung.measures.effective_episodes) }}</td>
<td>{{ "{:,.0f}".format(rung.measures.effective_transitions) }}</td><td class="l">{{ rung.reason }}</td></tr>{% endfor %}
</table>
<p>Bounds: {{ e.verdict.measures.bound }}, at {{ "{:.2%}".format(1 - e.verdict.measures.alpha) }} confidence
({{ e.error_rate.reason }}).</p>
<h2>What was asked of {{ e.verdict.policy_name }}</h2>
<table><tr><th class="l">check</th><th class="l">holds</th><th>measured</th><th>asked</th><th class="l">otherwise</th></tr>
{% for f in e.verdict.findings %}<tr><td>{{ f.name }}</td><td class="l">{{ "yes" if f.holds else "NO" }}</td>
<td>{{ "-" if f.value is none else "{:.4g}".format(f.value) }}</td><td>{{ "{:.4g}".format(f.threshold) }}</td>
<td class="l">{{ f.otherwise }}</td></tr>{% endfor %}
</table>
<h2>Where it decides otherwise</h2>
<table><tr><th class="l">observed</th><th>share of decisions</th><th>other decisions there</th></tr>
{% for place in e.detail.where %}<tr><td>{{ place.where }}</td><td>{{ "{:.2%}".format(place.decisions) }}</td>
<td>{{ "{:.1%}".format(place.differs) }}</td></tr>{% endfor %}
</table>
<p><img src="evidence-detail.png" alt="Weights, sample sizes, influence, clipping, actions, calibration, course"></p>
{% if e.comparisons %}<h2>Beside another policy's own log</h2>
<p>{{ e.comparisons.note[0] | upper }}{{ e.comparisons.note[1:] }}.</p>
<table><tr><th class="l">policy</th><th class="l">counted by</th>
{% for name in compared %}<th>{{ name }}</th>{% endfor %}<th>ESS</th><th>gate episodes</th><th>logged mean ± s.e.</th>
<th>logged rows</th></tr>
{% for row in e.comparisons.rows %}<tr><td>{{ row.policy }}<small>{{ row.log }}</small></td>
<td class="l">{{ row.cells | join(", ") }}</td>
{% for name in compared %}{% set i = row.estimates[name] %}<td class="{{ "pale" if name in row.doubted else "" }}">
{{ number(i.estimate, digits) }}
<small>{{ number(i.low, digits) }} to {{ number(i.high, digits) }}</small></td>{% endfor %}
<td>{{ "{:,.0f}".format(row.effective_episodes) }}</td><td>{{ "{:,}".format(row.gate_episodes) }}</td>
<td>{{ number(row.logged_mean, digits) }}<small>± {{ number(row.logged_standard_error, digits) }}</small></td>
<td>{{ "{:,}".format(row.logged_rows) }}</td></tr>{% endfor %}
</table>{% endif %}
<h2>What this rests on</h2><p>{{ e.statement }}</p>
</body></html>
"""
)


def exact_values(world: str, policies: Mapping[str, Exported], gamma: float) -> dict[str, float]:
    """Exact value of each policy over discrete actions in a known world, for the marked column only.

    Raises InputError for an unknown world.
    """
    if world not in WORLDS:
        raise InputError(f"known_world {world!r} is none of {', '.join(WORLDS)}; leave it out for real logs.")
    known = WORLDS[world](gamma)
    states = np.arange(known.n_states, dtype=np.float32)[:, None]
    tables = {name: policy for name, policy in policies.items() if isinstance(policy, OnnxPolicy)}
    return {name: known.value(policy.probs(states, known.mask)) for name, policy in tables.items()}


def rankings(evidence: dict[str, Any], exact: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """What each estimator's order of candidates and rungs was worth by the exact values; of one policy there is no order."""
    champion, base = evidence["champion"], exact.get(evidence["champion"]["policy"])
    rows = [row for row in _challengers(evidence) if row["policy"] in exact]
    if base is None or len(rows) < 2:
        return {}
    value = np.array([exact[row["policy"]] for row in rows])

    def estimates(name: str) -> np.ndarray:
        return np.array([row["estimates"][name]["estimate"] for row in rows])

    return {name: worth(estimates(name), value, (champion["estimates"][name]["estimate"], base)) for name in ESTIMATORS}


def certificate(evidence: dict[str, Any]) -> dict[str, str]:
    """The color of the certificate, and what it is of: where propensities come from, and which policies wrote the log."""
    behavior = evidence["behavior"]
    logged = behavior["propensities"] == LOGGED
    reason = (
        "propensities were logged"
        if logged
        else (
            f"propensities were estimated from the log itself (calibration error {behavior['ece']:.3f}), at half the error rate"
        )
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in behavior["versions"].items())
    reason += f"; logged by {shares}" if shares else ""
    if evidence["verdict"]["relies_on_state"]:
        reason += "; leg A stands alone: it relies on Markov state and nuisances"
    return {"color": "GREEN" if logged else "AMBER", "reason": reason}


def policy_rows(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """The policy that wrote the log, the champion, the candidates, then the rungs that are not a candidate themselves."""
    champion = [evidence["champion"]] if evidence["champion"]["policy"] != BEHAVIOR else []
    return [evidence["logged"], *champion, *_challengers(evidence)]


def _challengers(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return [*evidence["candidates"], *(rung for rung in evidence["ladder"] if rung["cap"] is not None)]


def write(
    evidence: dict[str, Any], exact: dict[str, float] | None, comparisons: list[dict[str, Any]], folder: Path
) -> None:
    """`evidence.json`, `evidence.html` and `evidence.png`. Exact values and comparisons are in these alone."""
    shown = {
        **evidence,
        "statement": STATEMENT
        if evidence["behavior"]["propensities"] == LOGGED
        else STATEMENT.replace("logged", "estimated", 1),
        "certificate": certificate(evidence),
        "exact": _known(evidence, exact) if exact else None,
        "comparisons": {"note": COMPARISON_NOTE, "rows": comparisons} if comparisons else None,
    }
    rows = policy_rows(evidence)
    plots.forest(rows, ESTIMATORS, evidence["champion"]["value"], folder / "evidence.png", exact or {})
    found, asked = evidence["detail"], evidence["verdict"]["measures"]
    draw(found, asked, evidence["behavior"]["reliability"], folder / "evidence-detail.png", evidence["continuous"])
    page = PAGE.render(
        e=shown,
        brief=brief(shown),
        rows=rows,
        estimators=ESTIMATORS,
        compared=STATED,
        few=FEW,
        number=_number,
        gain=_gain,
        digits=_decimals(evidence),
    )
    storage.write_bytes(folder / "evidence.html", page.encode())
    storage.write_json(folder / "evidence.json", shown)


def _known(evidence: dict[str, Any], exact: dict[str, float]) -> dict[str, Any]:
    return {"note": EXACT_NOTE, "values": exact, "rankings": rankings(evidence, exact), "tried": TRIED}


def tables(shown: dict[str, Any]) -> list[Table]:
    """The contents of evidence.json as tables for a terminal."""
    digits = _decimals(shown)
    found = [_estimates_table(shown, digits), _ladder_table(shown, digits)]
    return [*found, _comparisons_table(shown["comparisons"], digits)] if shown["comparisons"] else found


def _estimates_table(shown: dict[str, Any], digits: int) -> Table:
    exact = (shown["exact"] or {}).get("values", {})
    table = Table(title="Value of each policy on the gate split, with 95% intervals", title_justify="left")
    table.add_column("policy")
    for name in (*ESTIMATORS, "ESS"):
        table.add_column(name, justify="right", no_wrap=True)
    if exact:
        table.add_column("exact*", justify="right", style="yellow", no_wrap=True)
    for row in policy_rows(shown):
        cells = [_cell(row, name, digits) for name in ESTIMATORS]
        truth = [_number(exact[row["policy"]], digits + 1)] if exact else []
        table.add_row(row["policy"], *cells, f"{row['effective_episodes']:,.0f}", *truth)
    return table


def _ladder_table(shown: dict[str, Any], digits: int) -> Table:
    verdicts = {rung["policy"]: rung for rung in shown["ladder"]}
    table = Table(title="The gate, rung by rung", title_justify="left")
    for column in ("policy", "verdict", "gain", "at least", "reason"):
        justify = "right" if column in ("gain", "at least") else "left"
        table.add_column(column, justify=justify, no_wrap=column != "reason")
    for row in shown["candidates"]:
        if row["policy"] not in verdicts:
            table.add_row(row["policy"], "not entered", "", "", f"ranked {row['rank']} on the selection split")
    for rung in shown["ladder"]:
        gains = [_gain(rung["measures"][name], digits + 1) for name in ("difference", "lower_bound")]
        table.add_row(rung["policy"], rung["status"], *gains, rung["reason"])
    return table


def _comparisons_table(comparisons: dict[str, Any], digits: int) -> Table:
    note = comparisons["note"]
    table = Table(
        title="Beside another policy's own log", title_justify="left", caption=f"{note[0].upper()}{note[1:]}."
    )
    table.caption_justify = "left"
    table.add_column("policy", no_wrap=True)
    for column in (*STATED, "ESS", "gate episodes", "logged mean", "logged rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparisons["rows"]:
        cells = [_cell(row, name, digits) for name in STATED]
        sizes = [f"{row[name]:,.0f}" for name in ("effective_episodes", "gate_episodes")]
        error = _short(row["logged_standard_error"], digits)
        logged = f"{_number(row['logged_mean'], digits)}\n[dim]± {error}[/]"
        table.add_row(row["policy"], *cells, *sizes, logged, f"{row['logged_rows']:,}")
    return table


def _cell(row: dict[str, Any], name: str, digits: int) -> str:
    interval = row["estimates"][name]
    low, high = (_short(interval[end], digits - 1) for end in ("low", "high"))
    estimate = _number(interval["estimate"], digits)
    return f"[dim]{estimate}\n{low}–{high}[/]" if name in row["doubted"] else f"{estimate}\n[dim]{low}–{high}[/]"


def _decimals(evidence: dict[str, Any]) -> int:
    """Three, or as many more as show two digits of the champion's value."""
    value = abs(evidence["champion"]["value"])
    return max(3, 1 - math.floor(math.log10(value))) if value else 3


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _gain(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"


def _short(value: float | None, digits: int) -> str:
    """Without the zero before the point."""
    return "?" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1 if abs(value) < 1 else 0)
