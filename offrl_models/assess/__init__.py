"""Is a policy any good, when all there is are logs? Anyone's logs, anyone's policy, no pipeline.

It decides nothing: no policy is released by it, and the gate does not read it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offrl_models import storage
from offrl_models.assess import answer as answers
from offrl_models.assess import checks, overlap, units
from offrl_models.assess.log import Assessed, read
from offrl_models.assess.options import contract_of, effort_of, salt_of, target_of
from offrl_models.assess.propensities import propensity_check
from offrl_models.assess.target import Target
from offrl_models.assess.values import Effort, Values, fitted_values, logged_returns, tabular_values, with_propensities
from offrl_models.datasets.cut import UNCUT, Cut
from offrl_models.logs.contract import Contract
from offrl_models.ope.behavior import version_shares
from offrl_models.ope.density import require_density
from offrl_models.ope.estimates import REFITS, doubted
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval
from offrl_models.ope.sequences import completed, finite
from offrl_models.ope.units import entities_of
from offrl_models.progress import Update, progress
from offrl_models.reports.evidence import LOGGED, STATEMENT
from offrl_models.schema import Episodes

ESTIMATED = "estimated"
NOTICE = "This is an estimate and not a release."
UNSEEN = (
    " It assumes that the policy has not seen these logs: one that was learned from them looks better here than it is."
)


__all__ = ["assess", "contract_of", "effort_of", "salt_of", "target_of"]


def assess(
    paths: Sequence[Path],
    contract: Contract,
    target: Callable[[Assessed], Target],
    effort: Effort,
    salt: str | None = None,
) -> dict[str, Any]:
    """Everything that a log says about a policy, as plain JSON.

    With `salt`, it is said of the entities that a pipeline of that salt keeps from training.
    Raises InputError where the log breaks a rule of its contract, or the policy cannot be held against it.
    """
    with progress() as update:
        given = read(paths, contract, update, salt)
        policy = target(given)
        episodes, propensities, ece, rare = _with_propensities(given, policy, effort, update)
        ratio = finite("the ratio", policy.ratio(episodes))
        with np.errstate(over="ignore", invalid="ignore"):  # weights of long episodes may overflow
            values, why = _values(given, episodes, policy, ratio, effort, update)
            states = given.contract.tabular_states
            found = _found(episodes, policy, ratio, values, propensities, states, effort, rare, given.cut)
    return storage.plain(
        {
            "policy": policy.card,
            "log": given.card,
            "behavior": {
                "propensities": propensities,
                "color": "GREEN" if propensities == LOGGED else "AMBER",
                "ece": ece,
                "versions": version_shares(episodes, contract.policy_version),
            },
            **found,
            "left_out": _left_out(episodes, values, why),
            "method": _method(given, values, propensities),
            "notice": NOTICE + (UNSEEN if salt is None else ""),
            "statement": _statement(propensities),
        }
    )


def _with_propensities(
    given: Assessed, target: Target, effort: Effort, update: Update
) -> tuple[Episodes, str, float | None, np.ndarray | None]:
    """The episodes and where their propensities come from; of those that were estimated, the calibration error and the policy's
    mass in each row where the behavior is rare."""
    episodes, contract = given.episodes, given.contract
    if contract.action.continuous:
        require_density(episodes, contract.action.dimension_names)
    if contract.action_prob:
        return episodes, LOGGED, None, None
    estimated, ece, rare = with_propensities(episodes, target, contract.tabular_states, effort, update)
    return estimated, ESTIMATED, ece, rare


def _values(
    given: Assessed, episodes: Episodes, target: Target, ratio: np.ndarray, effort: Effort, update: Update
) -> tuple[Values | None, str]:
    """The values of the policy, or why there are none."""
    states = given.contract.tabular_states
    found = tabular_values(episodes, target, ratio, states) if states is not None and target.probs is not None else None
    if found is None and target.policy is not None:
        found = fitted_values(episodes, target.policy, effort, update)
    return found, "" if found else target.without


def _found(
    episodes: Episodes,
    target: Target,
    ratio: np.ndarray,
    values: Values | None,
    propensities: str,
    states: int | None,
    effort: Effort,
    rare: np.ndarray | None = None,
    cut: Cut = UNCUT,
) -> dict[str, Any]:
    unit = units.units_of(episodes, effort.seed)
    samples = units.samples_of(unit, effort.seed)
    returns = Terms(logged_returns(episodes, values)[:, None])
    terms = answers.every_terms(episodes, ratio, values)
    intervals = answers.intervals({"": returns, **terms}, samples, unit)
    logged = intervals.pop("")
    if propensities != LOGGED and states is not None:
        intervals |= answers.refitted_intervals(episodes, ratio, values, states, samples, unit)
    if values is not None and isinstance(values.direct, Interval):
        intervals["FQE"] = values.direct
    alpha = overlap.THRESHOLDS.alpha * (1.0 if propensities == LOGGED else 0.5)
    name = answers.headline(terms)
    entity = entities_of(episodes)
    missing = overlap.unseen(name, episodes, ratio, values)
    gain = answers.gain(name, terms[name], returns, unit, alpha, entity, missing)
    without_top = answers.influence(terms[name], returns, entity)
    said = checks.checks(episodes, target, ratio, values, gain, without_top, rare)
    if propensities == LOGGED:
        said.append(propensity_check(episodes))
    elif states is None:
        said.append(overlap.misfit_check(target, ratio))
    if np.isfinite(gain.estimate):
        said.append(checks.newer_check(terms[name], returns, unit, episodes.oldest_first, gain))
        said += [checks.loss_check(gain)] if name == "WPDIS" else []
        if episodes.truncated.any() or cut.rows:
            said += checks.recorded_checks(episodes, ratio, cut, gain)
    direct = intervals.get("DM", intervals.get("FQE"))
    if direct is not None:
        said.append(checks.direct_check(direct, logged.estimate, gain))
    word, sentence = answers.answer(gain, said)
    return {
        "answer": word,
        "sentence": sentence,
        "logged": logged,
        "estimates": intervals,
        "doubted": doubted(intervals, episodes, ratio, entity),
        "difference": gain,
        "ends": answers.ends(gain),
        "checks": said,
        "weights": answers.tail(completed(episodes, values.next_v) if values else episodes, ratio, logged.estimate),
    }


def _left_out(episodes: Episodes, values: Values | None, why: str) -> dict[str, str]:
    """Estimators that could not be made -> why."""
    if values is None:
        return {"all with a model of the values (doubly robust, marginalised, direct)": why}
    if values.markov_z is not None and values.gains is None:
        return {"MDR": f"what happens next depends on more than the state (z = {values.markov_z:.1f})"}
    if values.gains is None and episodes.length.max() > 1:
        asked = "the observation to be one category, and the policy a function of it whose episodes end"
        return {"MDR": f"marginalised weights need {asked}"}
    return {}


def _method(given: Assessed, values: Values | None, propensities: str) -> list[str]:
    """How it was done, in sentences."""
    said, episodes, whole = [], given.episodes, given.card["held_out_of"]
    if whole is not None:
        said.append(
            f"Of {whole:,} episodes, the {episodes.n_episodes:,} of entities that the pipeline of this policy keeps from training "
            "are evaluated; where the logs are new to it, --all-entities takes the rest as well."
        )
    counted = propensities != LOGGED and given.contract.tabular_states is not None
    if propensities != LOGGED:
        again = (
            "fitted again in every bootstrap sample of the estimators that weigh with them (MDR and DM take their fit as given)"
            if counted
            else "taken as given by the intervals"
        )
        floor = "0.01" if given.episodes.n_actions else "a hundredth of their median"
        said.append(
            f"No propensities were logged. They were estimated from the log itself, floored at {floor} and {again}, and every "
            "bound is made at half the error rate."
        )
    if values is not None:
        said.append(
            "The log is all there is, so its entities were cut into two folds by a hash of their id. Values were fitted by "
            f"{values.how}; each fold is evaluated with the values of the other one"
            + (", but DM, which is of the whole log." if isinstance(values.direct, Terms) else ".")
        )
    cut = int(episodes.truncated.sum())
    if cut:
        past = "the fitted value past that point" if values else "nothing past that point, for either policy"
        said.append(
            f"{cut:,} of {episodes.n_episodes:,} recordings stopped before the task ended; estimates count {past}."
        )
    if given.cut.rows:
        said.append(
            f"Of {given.cut.rows:,} recordings that stopped, the last decision is left out with its reward, for nothing was "
            f"observed after it; of {given.cut.episodes:,} of them that is all there is."
        )
    networks = values is not None and isinstance(values.direct, Interval)
    said.append(
        f"Intervals are percentile bootstraps over entities, {units.SAMPLES:,} samples"
        + (f" ({REFITS} where propensities are fitted again)" if counted else "")
        + ("; FQE's is a t-interval over its networks" if networks else "")
        + ". The two bounds of the difference are asymptotic confidence sequences, each on its own and for a look at this log: who "
        "looks again and again while it grows needs the gate and its ledger."
    )
    return said


def _statement(propensities: str) -> str:
    said = STATEMENT.replace(" of the gate split", "")
    return said if propensities == LOGGED else said.replace("logged", ESTIMATED, 1)
