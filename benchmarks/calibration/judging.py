"""Policies whose probabilities are known everywhere, before the pipeline's own gate.

A table stands where the pipeline has an exported graph, and fitted Q evaluation is tabular; all that measures and judges is the
pipeline's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from offrl_models.choices import choices_of
from offrl_models.evaluation import BEHAVIOR, Evaluation, Question, measure_rungs
from offrl_models.exported import OnnxPolicy
from offrl_models.gate import GateConfig, Status, Verdict, judge
from offrl_models.legs import Paired
from offrl_models.measures import Measures
from offrl_models.ope.behavior import fit_table
from offrl_models.ope.fqe import FQEValues
from offrl_models.ope.nulls import FAMILIES, ExactWorld, Family, policies
from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World
from offrl_models.schema import Episodes

Table = np.ndarray[Any, np.dtype[np.float64]]  # [states, actions]

ALPHA = 0.05
CONFIG = GateConfig(alpha=ALPHA)
RETURNS = (0.0, 1.0)
MEMBERS = 3


class KnownPolicy(OnnxPolicy):
    """A policy by its function of the observation: distinct probabilities, and which of them each row has."""

    def __init__(self, known: Callable[[np.ndarray], tuple[Table, np.ndarray]]):
        self.known = known

    @classmethod
    def of(cls, table: Table) -> "KnownPolicy":
        """A table over the codes of an observation that is one category."""
        return cls(lambda observation: (table, observation[:, 0].astype(np.int64)))

    def distinct_probs(self, observation: np.ndarray, mask: np.ndarray) -> tuple[Table, np.ndarray]:
        return self.known(observation)


def behavior_table(episodes: Episodes, mask: np.ndarray) -> Table:
    """The behavior policy that the pipeline fits to logged propensities, in every state."""
    states = np.arange(len(mask), dtype=np.float32)[:, None]
    with torch.no_grad():
        return fit_table(episodes, len(mask))(torch.as_tensor(states), torch.as_tensor(mask)).numpy()


def resampled(episodes: Episodes, seed: int) -> Episodes:
    """A bootstrap resample of episodes."""
    n = episodes.n_episodes
    chosen = np.sort(np.random.default_rng(seed).integers(0, n, n))
    return replace(episodes.take(chosen), episode_id=np.arange(n))


def models(episodes: Episodes, states: int, seed: int, members: int = MEMBERS) -> list[TabularModel]:
    """A model of each of some bootstrap resamples: the ensemble of leg D."""
    found = [TabularModel.fit(resampled(episodes, member), states) for member in _seeds(seed, members)]
    return [model for model in found if model is not None]


def _seeds(seed: int, members: int) -> list[int]:
    return np.random.SeedSequence(seed).generate_state(members).tolist()


def tabular_values(ensemble: Sequence[TabularModel], tables: Sequence[Table], episodes: Episodes) -> FQEValues:
    """Fitted Q evaluation by dynamic programming in the models. NaN, which no check passes, where values do not exist."""
    state = episodes.observation[:, 0].astype(np.int64)
    starts = state[episodes.offsets[:-1]]
    q, v = np.zeros((2, len(tables), episodes.n_rows))
    initial = np.empty((len(tables), len(ensemble), episodes.n_episodes))
    for place, table in enumerate(tables):
        for member, model in enumerate(ensemble):
            values = model.q_values(table) if model.ends(table) else np.full_like(table, np.nan)
            of_state = (table * values).sum(1)
            initial[place, member] = of_state[starts]
            q[place] += np.nan_to_num(values)[state, episodes.action] / len(ensemble)
            v[place] += np.nan_to_num(of_state)[state] / len(ensemble)
    return FQEValues(q, v, np.zeros_like(v), initial)


def evaluation(
    tables: Mapping[str, Table],
    behavior: Table,
    fitted_on: Episodes,
    gate: Episodes,
    seed: int,
    ensemble: Sequence[TabularModel] | None = None,
) -> Evaluation:
    """What the pipeline knows of some policies and of the behavior, all of them tables over one category."""
    named = {**tables, BEHAVIOR: behavior}
    chosen = models(fitted_on, len(behavior), seed) if ensemble is None else ensemble
    fqe = tabular_values(chosen, list(named.values()), gate)
    return with_values({name: KnownPolicy.of(table) for name, table in named.items()}, fitted_on, gate, fqe)


def with_values(policies: Mapping[str, OnnxPolicy], fitted_on: Episodes, gate: Episodes, fqe: FQEValues) -> Evaluation:
    choices = {name: choices_of(policy, gate) for name, policy in policies.items()}
    ratio = {name: made.ratio() for name, made in choices.items()}
    none = BootstrapSamples(gate.n_episodes, 0, 0)
    return Evaluation(list(policies), dict(policies), fitted_on, gate, choices, ratio, fqe, none, {})


def on_a_log(world: World, tables: Mapping[str, Table], seed: int, fitted_on: int, judged_on: int) -> Evaluation:
    """Some policies on a log of their own, of which the first episodes are for the nuisances."""
    both = world.simulate(fitted_on + judged_on, seed)
    return split(both, world.mask, tables, seed, fitted_on)


def split(log: Episodes, mask: np.ndarray, tables: Mapping[str, Table], seed: int, fitted_on: int) -> Evaluation:
    """Some policies on a log, of which the first episodes are for the nuisances."""
    fitted = np.arange(log.n_episodes) < fitted_on
    train = log.take(fitted)
    return evaluation(tables, behavior_table(train, mask), train, log.take(~fitted), seed)


def known_policies(
    world: ExactWorld, difference: float, families: tuple[Family, ...] = FAMILIES, seed: int = 0
) -> dict[str, Table]:
    """Policies by name, each with this exact difference to the behavior. States of high value count as severe ones."""
    worth = (world.behavior * world.q_values(world.behavior)).sum(1)
    found = policies(world, worth, difference, families=families, seed=seed)
    return {str(family): policy for family, policy in found.items()}


@dataclass(frozen=True)
class Prefix(Evaluation):
    """The first episodes of an evaluation. Leg A, one number per episode, is that of the whole."""

    known: Mapping[str, Paired | str]

    def paired(self, name: str, model: TabularModel | None) -> Paired | str:
        leg, n, rows = self.known[name], self.episodes.n_episodes, self.episodes.n_rows
        if isinstance(leg, str):
            return leg
        visits = np.broadcast_to(leg.visits, leg.weight.shape)[:rows]
        error = np.broadcast_to(leg.error, leg.weight.shape)[:rows]
        return replace(
            leg, outcome=leg.outcome[:n], weight=leg.weight[:rows], correction=leg.correction[:rows], error=error,
            behavior_weight=np.broadcast_to(leg.behavior_weight, leg.weight.shape)[:rows], visits=visits,
        )  # fmt: skip


def first(found: Evaluation, n: int, known: Mapping[str, Paired | str]) -> Prefix:
    """The evaluation after `n` gate episodes."""
    gate = found.episodes.take(np.arange(found.episodes.n_episodes) < n)
    rows, fqe = gate.n_rows, found.fqe
    values = FQEValues(fqe.q[:, :rows], fqe.v[:, :rows], fqe.next_v[:, :rows], fqe.initial[..., :n])
    choices = {name: choices_of(policy, gate) for name, policy in found.policies.items()}
    ratio = {name: each[:rows] for name, each in found.ratio.items()}
    return Prefix(
        found.names, found.policies, found.fitted_on, gate, choices, ratio, values, BootstrapSamples(n, 0, 0), {}, known
    )


def asked(states: int | None, alpha: float = ALPHA, propensities: str = "logged") -> Question:
    """The gate's question. Where propensities were estimated the error rate is halved."""
    return Question(alpha * (1.0 if propensities == "logged" else 0.5), states, propensities, RETURNS)


def measured(found: Evaluation, question: Question, looks: Sequence[int] | None = None) -> dict[str, list[Measures]]:
    """What the gate measures of every policy, after so many gate episodes; of all of them if no looks are named."""
    names = [name for name in found.names if name != BEHAVIOR]
    if looks is None:
        each = [measure_rungs(names, found, CONFIG, question)]
    else:
        model = TabularModel.fit(found.fitted_on, question.states) if question.states is not None else None
        known = {name: found.paired(name, model) for name in names}
        each = [measure_rungs(names, first(found, n, known), CONFIG, question) for n in looks]
    return {name: [rungs[place].measures for rungs in each] for place, name in enumerate(names)}


def judged(measures: Sequence[Measures], config: GateConfig = CONFIG) -> dict[str, Any]:
    """The verdict of every look, and the numbers behind the last one."""
    verdicts = [judge("", each, config) for each in measures]
    return {"passes": [int(verdict.status is Status.PASS) for verdict in verdicts], **last(verdicts[-1])}


def last(verdict: Verdict) -> dict[str, Any]:
    found = verdict.measures
    numbers = {name: getattr(found, name) for name in ("difference", "lower_bound", "e_value")}
    return {"status": str(verdict.status), "decided_by": verdict.decided_by, **numbers}
