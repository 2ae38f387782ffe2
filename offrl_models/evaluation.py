"""Policies against logged episodes: fit the nuisances, run every estimator, and measure what the gate asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from offrl_models.datasets.encoding import Encoder
from offrl_models.gate import GateConfig, Measures
from offrl_models.ope.diagnostics import (
    effective_sample_size,
    mean_ratio_z,
    without_most_influential,
    worst_action_z,
)
from offrl_models.ope.doubly_robust import wdr
from offrl_models.ope.estimates import LEVEL, Estimates, estimate
from offrl_models.ope.fqe import FQEConfig, FQEValues
from offrl_models.ope.importance import Terms, tis, trajectory_weights, wis
from offrl_models.ope.intervals import (
    bootstrap,
    bootstrap_lower_bound,
    bootstrap_shares,
    confidence_sequence_lower_bound,
)
from offrl_models.ope.marginal import TabularModel, paired_differences, policy_table
from offrl_models.ope.sequences import completed, ratios
from offrl_models.policies import OnnxPolicy
from offrl_models.progress import progress
from offrl_models.schema import Episodes, InputError
from offrl_models.training import fit_fqe

CHAMPION = "behavior"
STATED = ("TIS", "WIS")  # estimators that need no model of the values


@dataclass(frozen=True)
class Evaluation:
    """What was found about some policies; `behavior` is one of them."""

    names: list[str]
    policies: dict[str, OnnxPolicy]
    fitted_on: Episodes
    episodes: Episodes
    probs: dict[str, Float64[np.ndarray, "rows actions"]]
    ratio: dict[str, Float64[np.ndarray, "rows"]]
    fqe: FQEValues
    shares: Float64[np.ndarray, "samples episodes"]
    estimates: dict[str, Estimates]

    @property
    def champion_returns(self) -> Float64[np.ndarray, "episodes"]:
        """Realised returns, with the champion's fitted value past a truncation."""
        return completed(self.episodes, self.fqe.next_v[self.names.index(CHAMPION)]).return_

    def fqe_gains(self, name: str) -> list[float]:
        """Each FQE member's value of a policy minus its value of the champion; both saw the same resample."""
        members, base = (self.fqe.members(self.names.index(n)) for n in (name, CHAMPION))
        return [value - reference for value, reference in zip(members, base, strict=True)]


def evaluate(
    policies: dict[str, OnnxPolicy],
    fitted_on: Episodes,
    episodes: Episodes,
    encoder: Encoder,
    fqe_config: FQEConfig,
    *,
    samples: int,
    seed: int,
    task: str,
) -> Evaluation:
    """FQE of all policies at once on `fitted_on`, then every estimator of each on `episodes`."""
    with progress() as update:
        fqe = fit_fqe(
            fqe_config,
            encoder,
            list(policies.values()),
            fitted_on,
            episodes,
            seed=seed,
            report=lambda steps, loss: update(task, steps, fqe_config.gradient_steps, f"loss {loss['q']:.4f}"),
        )
    shares = bootstrap_shares(episodes.n_episodes, samples, seed)
    probs = {name: policy.on(episodes) for name, policy in policies.items()}
    ratio = {name: ratios(episodes, probs[name]) for name in policies}
    estimates = {name: estimate(episodes, ratio[name], fqe, position, shares) for position, name in enumerate(policies)}
    return Evaluation(list(policies), policies, fitted_on, episodes, probs, ratio, fqe, shares, estimates)


def measure_rungs(
    rungs: Sequence[str], found: Evaluation, thresholds: GateConfig, states: int | None, propensities: str
) -> list[Measures]:
    """What the gate asks of each rung. `propensities` says whether they were logged or estimated.

    The bound is marginalised where the observation is one category of `states`, and comes from WDR otherwise.
    """
    gate, alpha = found.episodes, thresholds.alpha * (1.0 if propensities == "logged" else 0.5)
    model = TabularModel.fit(found.fitted_on, states) if states is not None else None
    rare = found.probs[CHAMPION] < thresholds.rare_prob
    measures = []
    for name in rungs:
        bounds = _marginalised(name, found, model, thresholds.planned_episodes, alpha) if model else None
        difference, lower, upper, weight, method, without_top = bounds or _weighted_doubly_robust(name, found, alpha)
        ratio, probs = found.ratio[name], found.probs[name]
        measures.append(
            Measures(
                episodes=gate.n_episodes,
                rows=gate.n_rows,
                alpha=alpha,
                difference=difference,
                lower_bound=lower,
                upper_bound=upper,
                bound=method,
                fqe_differences=found.fqe_gains(name),
                effective_transitions=effective_sample_size(weight),
                effective_episodes=effective_sample_size(trajectory_weights(gate, ratio)),
                mean_ratio_z=mean_ratio_z(ratio),
                worst_action_z=worst_action_z(gate, ratio, probs),
                unsupported_mass=float((probs * rare).sum(1).mean()),
                ratio_q99=float(np.quantile(weight, 0.99)),
                ratio_max=float(weight.max()),
                chi_squared=float(np.square(weight).mean() - 1.0),
                without_top=without_top,
                propensities=propensities,
            )
        )
    return measures


# difference, lower, upper, row weights, method, difference without the most influential episodes
Bounds = tuple[float, float, float, Float64[np.ndarray, "rows"], str, float]


def _marginalised(name: str, found: Evaluation, model: TabularModel, planned: int, alpha: float) -> Bounds | None:
    """Leg A. None where the policy is no function of the state, or never ends an episode in the model."""
    gate = found.episodes
    table = policy_table(
        [(found.fitted_on, found.policies[name].on(found.fitted_on)), (gate, found.probs[name])], len(model.initial)
    )
    if table is None:
        return None
    paired = paired_differences(model, table, gate, found.ratio[name])
    if paired is None:
        return None
    x, weight = paired
    lower = confidence_sequence_lower_bound(x, alpha=alpha, planned=planned)
    upper = -confidence_sequence_lower_bound(-x, alpha=alpha, planned=planned)
    method = "marginalised doubly robust paired difference, one-sided asymptotic confidence sequence"
    without_top = without_most_influential(Terms(x[:, None]), Terms(np.zeros((len(x), 1))))
    return float(x.mean()), lower, upper, weight, method, without_top


def _weighted_doubly_robust(name: str, found: Evaluation, alpha: float) -> Bounds:
    """The stand-in for leg A where observations are not one category."""
    position, ratio = found.names.index(name), found.ratio[name]
    fqe = found.fqe
    mine = wdr(completed(found.episodes, fqe.next_v[position]), ratio, fqe.q[position], fqe.v[position])
    base = Terms(found.champion_returns[:, None])
    difference, lower = bootstrap_lower_bound(mine, base, found.shares, 1 - alpha)
    upper = -bootstrap_lower_bound(base, mine, found.shares, 1 - alpha)[1]
    method = "paired WDR difference, one-sided percentile bootstrap over episodes"
    return difference, lower, upper, ratio, method, without_most_influential(mine, base)


def visit_frequencies(
    visited: Float[np.ndarray, "visited columns"],
    action: Int64[np.ndarray, "visited"],
    asked: Float[np.ndarray, "asked columns"],
    n_actions: int,
    log: str,
) -> Float64[np.ndarray, "asked actions"]:
    """The policy that another log shows: how often each action was taken where the observation was the one asked about.

    The frequency is an unbiased estimate of the mean probability of an action in its cell. The mean of its logged
    propensities is not: an action is logged more often when its probability is high.
    Raises InputError naming `log` when it has no row in a cell that is asked about.
    """
    cell = np.unique(np.concatenate([visited, asked]), axis=0, return_inverse=True)[1].ravel()
    visits = np.zeros((int(cell.max()) + 1, n_actions))
    np.add.at(visits, (cell[: len(visited)], action), 1.0)
    found = visits[cell[len(visited) :]]
    total = found.sum(1, keepdims=True)
    if not total.all():
        raise InputError(
            f"{log} has no row in the cells of {int((total == 0).sum())} evaluated rows; compare by fewer `cells`."
        )
    return found / total


def estimate_stated(
    episodes: Episodes,
    probs: Float64[np.ndarray, "rows actions"],
    shares: Float64[np.ndarray, "samples episodes"],
) -> Estimates:
    """The value of a policy of which only the probabilities at the logged observations are known."""
    ratio = ratios(episodes, probs)
    terms = (tis(episodes, ratio), wis(episodes, ratio))
    intervals = {name: bootstrap(term, shares, LEVEL) for name, term in zip(STATED, terms, strict=True)}
    return Estimates(intervals, effective_sample_size(trajectory_weights(episodes, ratio)))
