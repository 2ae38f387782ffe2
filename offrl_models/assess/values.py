"""What has to be fitted before a policy can be assessed: its values, and propensities where none were logged.

The log is all there is, so it is cut into two folds by entity, and what is used on one fold was fitted on the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64

from offrl_models.algorithms import BCConfig
from offrl_models.assess.log import SALT
from offrl_models.assess.target import FunctionPolicy, Target
from offrl_models.choices import Choices, Draws, Probabilities, rare_mass
from offrl_models.cloning import fit_clone
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.split import buckets
from offrl_models.densities import MixtureDensity, log_density_of
from offrl_models.exported import Exported, OnnxDensity
from offrl_models.gate import GateConfig
from offrl_models.ope import behavior, density
from offrl_models.ope.estimates import LEVEL
from offrl_models.ope.fqe import FQEConfig
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval, ensemble
from offrl_models.ope.marginal import paired_differences, policy_table, pseudo_outcomes, state_weights, tabular_dm
from offrl_models.ope.markov import markov_z
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import RATIO_LIMIT, TabularModel, states_of
from offrl_models.ope.units import entities_of, per_unit
from offrl_models.policies import Mixture, probs_of
from offrl_models.progress import Update
from offrl_models.schema import Episodes
from offrl_models.training import fit_fqe

STEPS, QUICK_STEPS = 5000, 1000  # gradient steps of every fit
CLONES = 3  # networks of a behavior clone
MEMBERS = 3  # of the ensemble of fitted Q functions


@dataclass(frozen=True)
class Effort:
    """How long networks are trained, and from which seed."""

    steps: int
    seed: int

    @property
    def fqe(self) -> FQEConfig:
        return FQEConfig(gradient_steps=self.steps, members=MEMBERS)


@dataclass(frozen=True)
class Values:
    """Values of the policy at every logged decision, each from the fold that does not hold it."""

    q: Float64[np.ndarray, "rows"]  # of the logged action
    v: Float64[np.ndarray, "rows"]
    next_v: Float64[np.ndarray, "rows"]  # of what was observed next; read in truncated rows
    logged_next_v: Float64[np.ndarray, "rows"]  # the same under the policy that wrote the log
    direct: Terms | Interval  # the direct method
    how: str  # completes "values were fitted by ..."
    gains: Float64[np.ndarray, "episodes"] | None = None  # marginalised doubly robust, over the realised return
    weight: Float64[np.ndarray, "rows"] | None = None  # of each transition in `gains`
    earned: Float64[np.ndarray, "episodes"] | None = None  # by the behavior, where `gains` make up for what was cut off
    visits: Float64[np.ndarray, "rows"] | None = None  # of the policy for one of the log, where states are counted
    markov_z: float | None = (
        None  # of "the past tells what comes next, beyond the state"; at the gate's limit there are no gains
    )


def first_fold(episodes: Episodes) -> Bool[np.ndarray, "episodes"]:
    """One of two folds; all episodes of an entity fall into the same."""
    entity = episodes.episode_id if episodes.entity is None else episodes.entity
    return buckets(entity, f"{SALT} folds") % 2 == 0


@dataclass(frozen=True)
class _Fold:
    """The episodes that something is fitted on, and those that it is used on."""

    number: int
    others: Episodes
    held: Episodes
    rows: Bool[np.ndarray, "rows"]  # of the whole log, that are held
    mine: Bool[np.ndarray, "episodes"]


def _folds(episodes: Episodes) -> Iterator[_Fold]:
    even = first_fold(episodes)
    for number, mine in enumerate((even, ~even), 1):
        yield _Fold(number, episodes.take(~mine), episodes.take(mine), mine[episodes.episode_of_row], mine)


def with_propensities(
    episodes: Episodes, target: Target, states: int | None, effort: Effort, update: Update
) -> tuple[Episodes, float, Float64[np.ndarray, "rows"] | None]:
    """The episodes with estimated propensities; the calibration error of the model behind them; and by that model the share of
    the policy's mass in each row where the behavior is rare, None where only the probability of logged actions is known.

    They are counted in these very episodes where the observation is one category; else each fold's are those of a clone of
    the other fold, calibrated on the fold itself.
    """
    found, rare, errors = np.empty(episodes.n_rows), np.empty(episodes.n_rows), []
    for fold in _folds(episodes):
        clone = (
            _clone(fold, effort, update) if states is None else behavior.estimate_table(fold.others, states, fold.held)
        )
        if isinstance(clone, MixtureDensity):
            spread = density.calibrated(clone, fold.held, "temperature")
            errors.append(density.calibration(fold.held, spread)["ece"])
            found[fold.rows] = np.exp(log_density_of(spread, fold.held))
            acted: Choices = Draws(fold.held, _CloneDensity(spread))
        else:
            model = behavior.calibrated(clone, fold.held, "temperature") if states is None else clone
            acted = Probabilities(fold.held, probs_of(model, fold.held))
            errors.append(behavior.calibration(fold.held, acted.probs)["ece"])
            found[fold.rows] = acted.taken
        if target.choices is not None:
            rare[fold.rows] = rare_mass(_on(fold, target.choices), acted, GateConfig().rare_prob)
    if states is not None:
        found = behavior.estimate_propensities(episodes, states)
    floored = np.maximum(found, behavior.FLOOR) if episodes.n_actions else density.floored(found)
    known = rare if target.choices is not None else None
    return replace(episodes, action_prob=floored), float(np.mean(errors)), known


def _on(fold: _Fold, choices: Choices) -> Choices:
    """What the policy does in the rows of a fold that are held."""
    if isinstance(choices, Probabilities):
        return Probabilities(fold.held, choices.probs[fold.rows])
    return Draws(fold.held, choices.policy)


def _clone(fold: _Fold, effort: Effort, update: Update) -> Mixture | MixtureDensity:
    """The policy that wrote the log, cloned from the other fold."""
    task, seeds = f"behavior clone, fold {fold.number} of 2", range(effort.seed, effort.seed + CLONES)
    cloned = fit_clone(
        BCConfig(hidden=(64, 64)), fold.others, Encoder.fit(fold.others), seeds=seeds, gradient_steps=effort.steps,
        batch_size=256, report=lambda step, of, loss: update(task, step, of, f"loss {loss['policy']:.4f}"),
    )  # fmt: skip
    if fold.others.n_actions:
        return Mixture(cloned, CLONES)
    return MixtureDensity(cloned, CLONES, fold.others.action.shape[1])


def tabular_values(
    episodes: Episodes, target: Target, ratio: Float64[np.ndarray, "rows"], states: int
) -> Values | None:
    """Values from the empirical Markov decision process of the other fold.

    None where the policy is no function of the state, never ends an episode in the model, or the table would be too large.
    """
    table = None if target.probs is None else policy_table([(episodes, target.probs)], states)
    whole = None if table is None else TabularModel.fit(episodes, states)
    if table is None or whole is None:
        return None
    table[table.sum(1) == 0] = 1.0 / episodes.n_actions  # states that no decision was made in
    q, v, next_v, logged = (np.zeros(episodes.n_rows) for _ in range(4))
    weight, gains, markov = np.empty(episodes.n_rows), np.empty(episodes.n_episodes), []
    earned, visits = np.empty(episodes.n_episodes), np.empty(episodes.n_rows)
    for fold in _folds(episodes):
        model = TabularModel.fit(fold.others, states)
        paired = model and paired_differences(model, table, fold.held, ratio[fold.rows])
        if model is None or paired is None or not whole.ends(table):
            return None
        of_action, base = model.q_values(table), model.behavior
        of_state, of_base = (table * of_action).sum(1), (base * model.q_values(base)).sum(1)
        state, following = states_of(fold.held)
        q[fold.rows], v[fold.rows] = of_action[state, fold.held.action], of_state[state]
        next_v[fold.rows], logged[fold.rows] = of_state[following], of_base[following]
        gains[fold.mine], weight[fold.rows] = paired.outcome, paired.weight
        stands = state_weights(model, base, fold.held, np.ones(fold.held.n_rows), RATIO_LIMIT)
        earned[fold.mine] = pseudo_outcomes(fold.held, stands, of_base[state], of_base[state], of_base[following])
        visits[fold.rows] = np.minimum(model.recorded_state_ratio(table), RATIO_LIMIT)[state]
        markov.append(markov_z(model, fold.others, fold.held))
    direct, how = tabular_dm(episodes, table), "counting transitions and rewards by state and action"
    if not max(markov) < GateConfig().markov_z:
        return Values(q, v, next_v, logged, direct, how, markov_z=max(markov), visits=visits)
    cut = episodes.truncated.any()
    return Values(q, v, next_v, logged, direct, how, gains, weight, earned if cut else None, visits, max(markov))


def fitted_values(episodes: Episodes, policy: Exported, effort: Effort, update: Update) -> Values:
    """Values by fitted Q evaluation on the other fold; those of the policy that wrote the log as well where episodes are cut."""
    q, v, next_v, logged = (np.zeros(episodes.n_rows) for _ in range(4))
    initial = np.zeros((MEMBERS, episodes.n_episodes))
    for fold in _folds(episodes):
        policies: list[Exported] = [policy]
        if episodes.truncated.any():
            policies.append(_as_policy(_clone(fold, effort, update)))
        task = f"FQE, fold {fold.number} of 2"
        found = fit_fqe(
            effort.fqe, Encoder.fit(fold.others), policies, fold.others, fold.held, seed=effort.seed,
            report=lambda step, loss, task=task: update(task, step, effort.steps, f"loss {loss['q']:.4g}"),
        )  # fmt: skip
        q[fold.rows], v[fold.rows], next_v[fold.rows] = found.q[0], found.v[0], found.next_v[0]
        logged[fold.rows] = found.next_v[-1]
        initial[:, fold.mine] = found.initial[0]
    values = per_unit(initial.mean(0), entities_of(episodes))
    direct = ensemble([float(value) for value in initial.mean(1)], values, LEVEL)
    return Values(
        q, v, next_v, logged, direct, f"fitted Q evaluation, {MEMBERS} networks and {effort.steps:,} steps each"
    )


class _CloneDensity(OnnxDensity):
    """A clone over continuous actions where a graph is expected."""

    def __init__(self, clone: MixtureDensity):
        self.path, self.clone = Path("behavior clone"), clone

    @property
    def numbers(self) -> int:
        return self.clone.numbers

    @torch.no_grad()
    def run(
        self, observation: np.ndarray, action: np.ndarray, uniform: np.ndarray
    ) -> tuple[Float64[np.ndarray, "rows actions"], Float64[np.ndarray, "rows draws dimensions"]]:
        found = self.clone(*(torch.as_tensor(each) for each in (observation, action, uniform)))
        log_density, drawn = (each.numpy() for each in found)
        return log_density, drawn


def _as_policy(clone: Mixture | MixtureDensity) -> Exported:
    if isinstance(clone, MixtureDensity):
        return _CloneDensity(clone)

    def function(observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return clone(torch.as_tensor(observation), torch.as_tensor(mask)).numpy()

    return FunctionPolicy(function, "behavior clone")


def logged_returns(episodes: Episodes, values: Values | None) -> Float64[np.ndarray, "episodes"]:
    """Realised returns; past a truncation, the fitted value of the policy that wrote the log, where values were fitted, or by what
    makes up for it on the policy's side."""
    if values is not None and values.earned is not None:
        return values.earned
    return episodes.return_ if values is None else completed(episodes, values.logged_next_v).return_
