"""Rules by which people release a policy today, as a gate would have to be asked: for one fixed policy and one log."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from offrl_models.evaluation import Evaluation
from offrl_models.ope.importance import trajectory_weights, wis
from offrl_models.ope.intervals import hcope_lower_bound
from offrl_models.ope.resampling import bootstrap_shares

SAMPLES = 200


@dataclass(frozen=True)
class Asked:
    """One policy on one log."""

    found: Evaluation
    name: str
    alpha: float
    seed: int


def best_fqe(asked: Asked) -> bool:
    """Fitted Q evaluation puts it above the behavior, on average over the ensemble."""
    return float(np.mean(asked.found.fqe_gains(asked.name))) > 0


def wis_t_test(asked: Asked) -> bool:
    """A one-sided t-test of weighted importance sampling against the realised returns, by influence functions."""
    gate, returns = asked.found.episodes, asked.found.episodes.return_
    terms, n = wis(gate, asked.found.ratio[asked.name]), gate.n_episodes
    influence = terms.influence() - (returns - returns.mean())
    t = (terms.estimate() - returns.mean()) / (influence.std(ddof=1) / np.sqrt(n))
    return bool(t > stats.t.ppf(1 - asked.alpha, n - 1))


def dr_bootstrap(asked: Asked) -> bool:
    """The one-sided percentile bound of trajectory-wise doubly robust estimation, paired with the realised returns."""
    shares = bootstrap_shares(asked.found.episodes.n_episodes, SAMPLES, asked.seed)
    return bool(np.quantile(shares @ asked.found.pseudo_outcome(asked.name), asked.alpha) > 0)


def hcope(asked: Asked) -> bool:
    """The clipped lower bound of the value is above the mean realised return, taken as known: Thomas et al. (2015)."""
    gate = asked.found.episodes
    weighted = trajectory_weights(gate, asked.found.ratio[asked.name]) * gate.return_
    return hcope_lower_bound(weighted, alpha=asked.alpha, seed=asked.seed) > float(gate.return_.mean())


RULES: dict[str, Callable[[Asked], bool]] = {
    "best FQE": best_fqe,
    "WIS t-test": wis_t_test,
    "DR bootstrap": dr_bootstrap,
    "HCOPE": hcope,
}


def all_rules(found: Evaluation, name: str, alpha: float, seed: int) -> dict[str, bool]:
    return {rule: bool(passes(Asked(found, name, alpha, seed))) for rule, passes in RULES.items()}
