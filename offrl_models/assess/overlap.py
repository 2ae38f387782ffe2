"""Whether a log can speak of a policy: its propensities are right, it goes where the policy goes, and often enough."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import norm

from offrl_models.assess.target import Target
from offrl_models.assess.values import Values
from offrl_models.choices import Probabilities
from offrl_models.gate import GateConfig
from offrl_models.legs import few_visits_mass
from offrl_models.logs.tally import ROUNDED, zero_mean_z
from offrl_models.measures import MISFIT, enough_effective, misfit
from offrl_models.ope.diagnostics import effective_sample_size, mean_ratio_z
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.marginal import bellman_errors
from offrl_models.ope.sequences import weights_by_step
from offrl_models.ope.surprises import unseen_variance
from offrl_models.ope.units import entities_of, summed
from offrl_models.schema import Episodes

THRESHOLDS = GateConfig()  # those of the gate
SURE = 3.0  # standard errors, or a chance as small, by which a mass that nothing measures has to be over the limit


@dataclass(frozen=True)
class Check:
    """Something that an assumption asks for. A `grave` one that fails leaves the logs with nothing to say."""

    name: str
    holds: bool
    value: float
    asked: str  # of the value
    sentence: str  # what is wrong; empty where it holds
    grave: bool


def check(name: str, holds: bool, value: float, asked: str, otherwise: str, *, grave: bool = False) -> Check:
    return Check(name, bool(holds), float(value), asked, "" if holds else otherwise, grave)


def ratio_checks(episodes: Episodes, target: Target, ratio: Float64[np.ndarray, "rows"]) -> list[Check]:
    """Whether the propensities are those of whoever acted, and the log shows what the policy plays."""
    z, limit = mean_ratio_z(ratio), THRESHOLDS.mean_ratio_z
    lost = f"{1 - ratio.mean():.1%} of the policy's choices are ones that the log never shows, or its propensities are wrong"
    wrong = "the propensities are not those of whoever acted"
    asked, mean = f"|z| under {limit:g}", ratio.mean()
    said = [
        check("mean ratio", abs(z) < limit, z, asked,
              f"the mean importance ratio is {mean:.3f} (z = {z:.1f} against 1): {lost if z < 0 else wrong}", grave=True)
    ]  # fmt: skip
    if target.choices is not None:
        worst = target.choices.worst_z(ratio)
        said.append(
            check("mean ratio per action", abs(worst) < limit, worst, asked,
                  f"the mean ratio of one action has z = {worst:.1f}: the log never shows it where the policy plays it, or its "
                  "propensities are wrong", grave=True)
        )  # fmt: skip
    return said


def misfit_check(target: Target, ratio: Float64[np.ndarray, "rows"]) -> Check:
    """Whether a clone of whoever acted fits so well that no mean ratio tells that it is one, as the gate asks."""
    z, worst = mean_ratio_z(ratio), 0.0 if target.choices is None else target.choices.worst_z(ratio)
    doubt, largest = misfit(z, worst), max(z, worst, key=abs)
    return check("fit of the propensities", not doubt, largest, f"|z| under {MISFIT:g}", doubt)


def unsupported_mass(
    episodes: Episodes,
    target: Target,
    ratio: Float64[np.ndarray, "rows"],
    rare: Float64[np.ndarray, "rows"] | None,
    visits: Float64[np.ndarray, "rows"] | None = None,
) -> float:
    """The share of the policy's mass at the logged decisions where the behavior plays with probability under `rare_prob`.

    `rare` is that share of each row by an estimate of the behavior, and `visits` how often the policy would come there for once of
    the log, where that is known. Without such an estimate, it is what the logged propensities show beyond chance: at least that
    much, and 0 where they show nothing.
    """
    if rare is not None:
        return _where_it_comes(rare, visits)
    return max(_short_of_one(episodes, ratio), _never_taken(episodes, target))


def _where_it_comes(mass: Float64[np.ndarray, "rows"], visits: Float64[np.ndarray, "rows"] | None) -> float:
    """The mean over the log's decisions, or over the policy's; 1 where it comes nowhere in the log."""
    return float(np.average(mass, weights=visits)) if visits is None or visits.any() else 1.0


def _short_of_one(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> float:
    """A lower bound by the ratios of actions that are not rare, whose mean is the mass of all that the policy has there.

    Its error is at least that of a mean at the limit: large ratios that happen to be seen too rarely look too sure by themselves.
    """
    least, rare = 1.0 - THRESHOLDS.unsupported_mass, THRESHOLDS.rare_prob
    covered = np.where(episodes.action_prob >= rare, ratio, 0.0) if episodes.n_actions else ratio
    typical = np.square(covered).sum() / max(covered.sum(), 1e-12)  # what the ratio is where the policy acts
    error = np.sqrt(max(covered.var(), least * (typical - least)) / len(covered))
    return max(float(1.0 - covered.mean() - SURE * error), 0.0)


def _never_taken(episodes: Episodes, target: Target) -> float:
    """The mass on discrete actions that the log never takes but as rare ones, unless chance may have kept them from it.

    Were no more of it unsupported than may be, the rest would be spread over so many rows, at most `largest` in each, that
    `expected` of them would be logged. The chance of none is at most exp(-expected), for each of 2^actions sets of actions.
    """
    if not isinstance(target.choices, Probabilities):
        return 0.0
    limit, rare, actions = THRESHOLDS.unsupported_mass, THRESHOLDS.rare_prob, episodes.n_actions
    taken = np.bincount(episodes.action[episodes.action_prob >= rare], minlength=actions)
    missed = target.choices.probs[:, taken == 0]
    mass, largest = float(missed.sum()) / episodes.n_rows, float(missed.max(initial=0.0))
    expected = rare * (mass - limit) * episodes.n_rows / max(largest, 1e-12)
    return mass if expected > actions * np.log(2.0) - norm.logsf(SURE) else 0.0


def support_check(
    episodes: Episodes,
    target: Target,
    ratio: Float64[np.ndarray, "rows"],
    rare: Float64[np.ndarray, "rows"] | None,
    visits: Float64[np.ndarray, "rows"] | None,
) -> Check:
    """Whether the log can speak of all but a little of what the policy plays; `rare` and `visits` as in `unsupported_mass`."""
    mass, most = unsupported_mass(episodes, target, ratio, rare, visits), THRESHOLDS.unsupported_mass
    return check("support", mass <= most, mass, f"at most {most:g}",
                 f"{'at least ' if rare is None else ''}{mass:.1%} of the policy's mass lies where whoever acted plays with "
                 f"probability under {THRESHOLDS.rare_prob:g} or never; at most {most:.1%} may", grave=True)  # fmt: skip


def visits_check(episodes: Episodes, target: Target, visits: Float64[np.ndarray, "rows"]) -> Check:
    """How much the policy does in states and actions that the log hardly shows; `visits` as in `unsupported_mass`."""
    assert target.choices is not None
    states = int(episodes.observation[:, 0].max()) + 1
    few = few_visits_mass(target.choices, (episodes,), states, THRESHOLDS.few_visits)
    assert few is not None
    mass, most = _where_it_comes(few, visits), THRESHOLDS.few_visits_mass
    return check("visits", mass <= most, mass, f"at most {most:g}",
                 f"{mass:.1%} of the policy's mass lies where the log has under {THRESHOLDS.few_visits} rows of state and action; "
                 f"at most {most:.1%} may", grave=True)  # fmt: skip


def weight_check(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Check:
    """Whether what the policy does and the log does not is missing from the weights of episodes: at each step their mean is 1.

    It is too small where the policy goes on in a way that no logged episode does; each row by itself need not show that.
    """
    unit, limit = entities_of(episodes), THRESHOLDS.mean_ratio_z
    z = min(zero_mean_z(summed(weight - 1.0, unit), ROUNDED) for weight in weights_by_step(episodes, ratio).T)
    return check("mean weight", z > -limit, z, f"z over -{limit:g}",
                 f"the weights of episodes have a mean below 1 at some step (z = {z:.1f}), so the log lacks part of what the "
                 "policy does")  # fmt: skip


def effective_check(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], values: Values | None) -> Check:
    """How much the weights are worth that the difference is made with: of transitions, or of whole episodes, by entity.

    Floors are the gate's: of leg A for weights of single decisions, of leg C for products of them.
    """
    if values is not None and values.weight is not None:
        noun, of, weight, floor = "transitions", episodes.n_rows, values.weight, THRESHOLDS.effective_transitions
    else:
        unit = entities_of(episodes)
        noun, weight = "episodes" if unit is None else "entities", summed(trajectory_weights(episodes, ratio), unit)
        of, alone = len(weight), episodes.n_rows == episodes.n_episodes
        floor = THRESHOLDS.effective_transitions if alone else enough_effective(of)
    effective = effective_sample_size(weight) if np.isfinite(weight).all() else 0.0
    return check(f"effective {noun}", effective >= floor, effective, f"at least {floor:,.0f}",
                 f"{effective:,.0f} effective {noun} of {of:,} are fewer than {floor:,.0f}")  # fmt: skip


def unseen(estimator: str, episodes: Episodes, ratio: Float64[np.ndarray, "rows"], values: Values | None) -> float:
    """What few surprises leave out of the variance, over episodes, of the difference that an estimator tells."""
    if estimator == "MDR" and values is not None and values.weight is not None:
        weight = values.weight
    else:
        by_step = weights_by_step(episodes, ratio)
        mean = by_step.mean(0)
        by_step = np.divide(by_step, mean, out=np.zeros_like(by_step), where=mean > 0)
        weight = by_step[episodes.episode_of_row, episodes.step]
    if values is None:
        surprise = episodes.reward - episodes.reward.mean()
    else:
        surprise = bellman_errors(episodes, values.q, values.v, values.next_v)
    with np.errstate(over="ignore", invalid="ignore"):
        return unseen_variance(episodes.time_discount * (weight - 1.0), surprise, episodes.n_episodes)
