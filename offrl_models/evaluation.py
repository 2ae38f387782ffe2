"""Policies against logged episodes: fit the nuisances, run every estimator, and measure what the gate asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from offrl_models.datasets.encoding import Encoder
from offrl_models.gate import GateConfig, Measures
from offrl_models.ope.diagnostics import effective_sample_size, mean_ratio_z, worst_action_z
from offrl_models.ope.doubly_robust import wdr
from offrl_models.ope.estimates import Estimates, estimate
from offrl_models.ope.fqe import FQEConfig, FQEValues
from offrl_models.ope.importance import Terms, trajectory_weights
from offrl_models.ope.intervals import bootstrap_lower_bound, bootstrap_shares, confidence_sequence_lower_bound
from offrl_models.ope.marginal import TabularModel, paired_differences, policy_table
from offrl_models.ope.sequences import completed, ratios
from offrl_models.policies import OnnxPolicy
from offrl_models.progress import progress
from offrl_models.schema import Episodes
from offrl_models.training import fit_fqe

CHAMPION = "behavior"


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
    rungs: Sequence[str], found: Evaluation, thresholds: GateConfig, states: int | None
) -> list[Measures]:
    """What the gate asks of each rung.

    The bound is marginalised where the observation is one category of `states`, and comes from WDR otherwise.
    """
    gate = found.episodes
    model = TabularModel.fit(found.fitted_on, states) if states is not None else None
    rare = found.probs[CHAMPION] < thresholds.rare_prob
    measures = []
    for name in rungs:
        bounds = _marginalised(name, found, model, thresholds) if model else None
        difference, lower, upper, weight, method = bounds or _weighted_doubly_robust(name, found, thresholds)
        ratio, probs = found.ratio[name], found.probs[name]
        measures.append(
            Measures(
                episodes=gate.n_episodes,
                rows=gate.n_rows,
                alpha=thresholds.alpha,
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
            )
        )
    return measures


Bounds = tuple[float, float, float, Float64[np.ndarray, "rows"], str]  # difference, lower, upper, row weights, method


def _marginalised(name: str, found: Evaluation, model: TabularModel, thresholds: GateConfig) -> Bounds | None:
    """Leg A. None where the policy is no function of the state, or never ends an episode in the model."""
    gate, n_star = found.episodes, thresholds.planned_episodes
    table = policy_table(
        [(found.fitted_on, found.policies[name].on(found.fitted_on)), (gate, found.probs[name])], len(model.initial)
    )
    if table is None:
        return None
    paired = paired_differences(model, table, gate, found.ratio[name])
    if paired is None:
        return None
    x, weight = paired
    lower = confidence_sequence_lower_bound(x, alpha=thresholds.alpha, planned=n_star)
    upper = -confidence_sequence_lower_bound(-x, alpha=thresholds.alpha, planned=n_star)
    method = "marginalised doubly robust paired difference, one-sided asymptotic confidence sequence"
    return float(x.mean()), lower, upper, weight, method


def _weighted_doubly_robust(name: str, found: Evaluation, thresholds: GateConfig) -> Bounds:
    """The stand-in for leg A where observations are not one category."""
    position, ratio = found.names.index(name), found.ratio[name]
    fqe = found.fqe
    mine = wdr(completed(found.episodes, fqe.next_v[position]), ratio, fqe.q[position], fqe.v[position])
    base = Terms(found.champion_returns[:, None])
    difference, lower = bootstrap_lower_bound(mine, base, found.shares, 1 - thresholds.alpha)
    upper = -bootstrap_lower_bound(base, mine, found.shares, 1 - thresholds.alpha)[1]
    return difference, lower, upper, ratio, "paired WDR difference, one-sided percentile bootstrap over episodes"
