"""Policies against logged episodes: fit the nuisances, run every estimator, and measure what the gate asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from offrl_models import constraints, course, legs
from offrl_models.choices import Choices, choices_of, rare_mass
from offrl_models.datasets.cut import UNCUT, Cut
from offrl_models.datasets.encoding import Encoder
from offrl_models.exported import Exported
from offrl_models.gate import GateConfig
from offrl_models.measures import Measures, enough_effective, misfit
from offrl_models.ope.bandit import smoothed_gain
from offrl_models.ope.diagnostics import effective_sample_size, largest_share, mean_ratio_z
from offrl_models.ope.estimates import Estimates, Refit, estimate
from offrl_models.ope.fqe import FQEConfig, FQEValues
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.intervals import ROUNDING, confidence_sequence_width
from offrl_models.ope.markov import markov_z
from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.units import Units, entities_of, independent, per_unit, planned_units, summed
from offrl_models.progress import progress
from offrl_models.schema import Episodes
from offrl_models.training import fit_fqe

BEHAVIOR, CHAMPION = legs.BEHAVIOR, "champion"  # who wrote the log, and what was released last


@dataclass(frozen=True)
class Evaluation:
    """What was found about some policies; `behavior` is one of them."""

    names: list[str]
    policies: dict[str, Exported]
    fitted_on: Episodes
    episodes: Episodes
    choices: dict[str, Choices]
    ratio: dict[str, Float64[np.ndarray, "rows"]]
    fqe: FQEValues
    samples: BootstrapSamples  # of entities, where one has several episodes
    estimates: dict[str, Estimates]

    def side(self, name: str) -> legs.Side:
        """What the legs of the gate need of one policy."""
        place = self.names.index(name)
        values = (part[place] for part in (self.fqe.q, self.fqe.v, self.fqe.next_v))
        fitted = choices_of(self.policies[name], self.fitted_on)
        return legs.Side(fitted, self.choices[name], self.ratio[name], *values)

    @cached_property
    def unit(self) -> Units | None:
        """The entity of every episode, where one has several."""
        return entities_of(self.episodes)

    @property
    def logged_returns(self) -> Float64[np.ndarray, "episodes"]:
        """Realised returns, with the behavior's fitted value past a truncation."""
        return completed(self.episodes, self.fqe.next_v[self.names.index(BEHAVIOR)]).return_

    def pseudo_outcome(self, name: str) -> Float64[np.ndarray, "episodes"]:
        """Trajectory-wise doubly robust pseudo-outcome, less the realised return; not finite where weights overflow."""
        with np.errstate(over="ignore", invalid="ignore"):
            return legs.trajectory_outcome(self.side(name), self.episodes) - self.logged_returns

    def trajectory_gains(self, name: str, champion: str) -> Float64[np.ndarray, "episodes"]:
        """Leg C: per episode a number whose mean is the trajectory-wise doubly robust difference to the champion."""
        gains = self.pseudo_outcome(name)
        with np.errstate(invalid="ignore"):
            return gains if champion == BEHAVIOR else gains - self.pseudo_outcome(champion)

    def stand_in(self, name: str) -> legs.Paired:
        """What is shown where leg A cannot be trusted: leg C, or where its weights overflow fitted Q evaluation."""
        gains, method = self.pseudo_outcome(name), "trajectory-wise doubly robust paired difference"
        if not legs.has_spread(gains):
            gains = self.side(name).v[self.episodes.offsets[:-1]] - self.logged_returns
            method = "paired difference by fitted Q evaluation"
        return legs.Paired(gains, self.ratio[name], np.zeros(self.episodes.n_rows), method)

    def paired(self, name: str, model: TabularModel | None) -> legs.Paired | str:
        """Leg A against the behavior, or the sentence that says why there is none."""
        return legs.paired(self.side(name), self.side(BEHAVIOR), self.fitted_on, self.episodes, model)

    def fqe_gains(self, name: str, champion: str | None = None) -> list[float]:
        """Each FQE member's value of a policy minus its value of the champion; both saw the same resample."""
        members, base = (self.fqe.members(self.names.index(n)) for n in (name, champion or BEHAVIOR))
        return [value - reference for value, reference in zip(members, base, strict=True)]


def evaluate(
    policies: Mapping[str, Exported],
    fitted_on: Episodes,
    episodes: Episodes,
    encoder: Encoder,
    fqe_config: FQEConfig,
    *,
    samples: int,
    seed: int,
    task: str,
    refit: Refit | None = None,
) -> Evaluation:
    """FQE of all policies at once on `fitted_on`, then every estimator of each on `episodes`.

    `refit` fits the propensities of `episodes` again in every bootstrap sample, where they are estimates.
    """
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
    drawn = BootstrapSamples(independent(episodes), samples, seed)
    choices = {name: choices_of(policy, episodes) for name, policy in policies.items()}
    ratio = {name: made.ratio() for name, made in choices.items()}
    found = estimate(episodes, list(ratio.values()), fqe, drawn, refit, entities_of(episodes))
    estimates = dict(zip(policies, found, strict=True))
    return Evaluation(list(policies), dict(policies), fitted_on, episodes, choices, ratio, fqe, drawn, estimates)


@dataclass(frozen=True)
class Question:
    """What the gate asks, beside its thresholds."""

    alpha: float  # of every bound
    states: int | None  # of the observation, where it is one category
    propensities: str  # "logged" or "estimated"
    return_range: tuple[float, float] | None  # of the discounted return; leg B needs it
    champion: str = BEHAVIOR  # the policy to beat
    drifted: str = ""  # what is wrong with the newest batch
    cut: Cut = UNCUT  # what was left out of the gate's episodes


@dataclass(frozen=True)
class Measured:
    """What the gate asks of a rung, and the leg A that it was read off."""

    measures: Measures
    leg: legs.Paired  # against the champion
    own: legs.Paired  # against the policy that wrote the log


def measure_rungs(rungs: Sequence[str], found: Evaluation, thresholds: GateConfig, asked: Question) -> list[Measured]:
    """What the gate asks of each rung."""
    model = TabularModel.fit(found.fitted_on, asked.states) if asked.states is not None else None
    names = [*rungs, asked.champion] if asked.champion != BEHAVIOR else rungs
    paired = {name: found.paired(name, model) for name in names}
    markov = None if model is None else markov_z(model, found.fitted_on, found.episodes)
    return [_measure(name, found, thresholds, asked, paired, markov) for name in rungs]


def _against_champion(
    name: str, found: Evaluation, champion: str, paired: Mapping[str, legs.Paired | str]
) -> tuple[legs.Paired, legs.Paired, str]:
    """Leg A against the champion and against the behavior, and why it cannot be trusted; in doubt, what stands in for it."""
    names = [name] if champion == BEHAVIOR else [name, champion]
    parts = [paired[each] for each in names]
    doubt = next((f"{each}: {part}" for each, part in zip(names, parts, strict=True) if isinstance(part, str)), "")
    if doubt:
        parts = [found.stand_in(each) for each in names]
    mine, *base = [part for part in parts if not isinstance(part, str)]
    both = [
        replace(
            mine,
            outcome=mine.outcome - other.outcome,
            correction=mine.correction - other.correction,
            behavior_weight=other.weight,
        )
        for other in base
    ]
    return [*both, mine][0], mine, doubt


def _measure(
    name: str,
    found: Evaluation,
    thresholds: GateConfig,
    asked: Question,
    paired: Mapping[str, legs.Paired | str],
    markov: float | None,
) -> Measured:
    gate, side, planned, unit = found.episodes, found.side(name), thresholds.planned_episodes, found.unit
    mine, own, doubt = _against_champion(name, found, asked.champion, paired)
    each = per_unit(mine.outcome, unit)
    unseen = legs.unseen(mine, mine.error, gate)
    overall = legs.contrast(name, mine.outcome, asked.alpha, planned, unit, unseen)
    seen = each.var()
    widened = float(np.sqrt(1.0 + unseen * len(each) / gate.n_episodes / seen)) if seen > 0 else 1.0
    older, newer = course.halves(mine.outcome, gate.oldest_first, asked.alpha, unit)
    tuned = planned_units(planned, gate.n_episodes, len(each))
    width = confidence_sequence_width(len(each), alpha=asked.alpha, planned=tuned) * np.sqrt(len(each))
    kept = course.kept(mine.outcome, gate.oldest_first, alpha=asked.alpha, width=width, unit=unit)
    sure = legs.sure_share(gate)
    leg_c = found.trajectory_gains(name, asked.champion)
    trajectories = (
        legs.has_spread(leg_c) and sure <= thresholds.sure_share
    )  # else the logs leave too little to weigh (C18)
    trajectory = legs.contrast(name, leg_c, asked.alpha, planned, unit) if trajectories else None
    betting = (
        trajectories
        and asked.propensities == "logged"  # by estimates of them nothing is proved
        and asked.champion == BEHAVIOR
        and asked.return_range is not None
        and not gate.truncated.any()
        and unit is None  # the proof is for episodes that are independent
    )
    effective = effective_sample_size(summed(trajectory_weights(gate, side.ratio), unit))
    choices = found.choices[name]
    weighed = [name] if asked.champion == BEHAVIOR else [name, asked.champion]
    held = constraints.Held(
        found.fitted_on, gate, unit, asked.alpha, asked.states, thresholds,
        markov=markov is None or markov < thresholds.markov_z,
        informs=trajectories and effective >= enough_effective(len(each)),
    )  # fmt: skip
    sides, parts = [found.side(policy) for policy in weighed], [paired[policy] for policy in weighed]
    one_step = gate.n_rows == gate.n_episodes
    rare = legs.few_visits_mass(choices, (found.fitted_on, gate), asked.states, thresholds.few_visits)
    z = max((mean_ratio_z(found.ratio[each]) for each in weighed), key=abs)
    worst_z = max((found.choices[each].worst_z(found.ratio[each]) for each in weighed), key=abs)
    if asked.propensities != "logged" and asked.states is None:
        doubt = doubt or misfit(z, worst_z)
    measures = Measures(
        episodes=gate.n_episodes,
        rows=gate.n_rows,
        alpha=asked.alpha,
        difference=overall.difference,
        lower_bound=overall.lower_bound,
        upper_bound=overall.upper_bound,
        bound=f"{mine.method}, one-sided asymptotic confidence sequence{legs.widening(widened)}",
        widened=widened,
        doubt=doubt,
        e_value=legs.betting(side, gate, asked.return_range, thresholds.margin)
        if betting and asked.return_range
        else None,
        smoothed_lower=smoothed_gain(gate, side.ratio, asked.return_range, alpha=asked.alpha)
        if betting and asked.return_range and one_step
        else None,
        trajectory_difference=trajectory.difference if trajectory else None,
        trajectory_error=float(per_unit(leg_c, unit).std(ddof=1) / np.sqrt(len(each))) if trajectory else None,
        trajectory_lower=trajectory.lower_bound if trajectory else None,
        trajectory_upper=trajectory.upper_bound if trajectory else None,
        fqe_differences=found.fqe_gains(name, asked.champion),
        effective_transitions=effective_sample_size(mine.weight),
        effective_episodes=effective,
        mean_ratio_z=z,
        worst_action_z=worst_z,
        unsupported_mass=legs.visited(mine, rare_mass(choices, found.choices[BEHAVIOR], thresholds.rare_prob)),
        few_visits_mass=None if rare is None else legs.visited(mine, rare),
        ratio_q99=float(np.quantile(mine.weight, 0.99)),
        ratio_max=float(mine.weight.max()),
        chi_squared=float(np.square(mine.weight).mean() - 1.0),
        largest_share=largest_share(each),
        without_top=legs.influence(each),
        older_half=older,
        newer_half=newer,
        kept=kept.difference,
        kept_bound=kept.lower_bound,
        course=course.parts(mine.outcome, gate.oldest_first, asked.alpha, unit),
        sure_share=sure,
        propensities=asked.propensities,
        markov_z=markov,
        drifted=asked.drifted,
        cut_reward=asked.cut.reward * max(float(side.ratio.max()), 1.0),
        costs=constraints.costs(held, sides, parts, mine),
        subgroups=constraints.groups(held, mine, leg_c),
        equal_returns=bool(np.ptp(gate.return_) <= ROUNDING * np.abs(gate.return_).max()),
        entities=None if unit is None else len(each),
    )
    return Measured(measures, mine, own)
