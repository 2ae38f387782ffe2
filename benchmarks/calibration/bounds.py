"""Every interval that the coverage study asks: of a policy's value, and of its gain on what was logged."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from benchmarks.calibration.judging import CONFIG, Table
from offrl_models.assess import answer, overlap
from offrl_models.assess.target import Target
from offrl_models.assess.values import tabular_values
from offrl_models.choices import Probabilities
from offrl_models.evaluation import BEHAVIOR, Evaluation
from offrl_models.legs import contrast, unseen
from offrl_models.measures import Contrast
from offrl_models.ope.bandit import logarithmic_smoothing_lower_bound
from offrl_models.ope.eprocess import betting_lower_bound, betting_sequence_lower_bound
from offrl_models.ope.importance import Terms, trajectory_weights
from offrl_models.ope.intervals import (
    Interval,
    bca,
    bootstrap,
    confidence_sequence,
    delta_method,
    empirical_bernstein_lower_bound,
    hcope_lower_bound,
    hoeffding_lower_bound,
    student_t,
    student_t_lower_bound,
    two_sided,
)
from offrl_models.ope.marginal import tabular_dm
from offrl_models.ope.resampling import bootstrap_shares
from offrl_models.ope.tabular import TabularModel

SAMPLES = 400
GATE = "gate: one-sided asymptotic confidence sequence, leg A"
FOLDS = "difference by MDR on two folds, sequence"  # what `offrl evaluate` answers by, where there is one
SEQUENCES = ("leg C: difference by DR, sequence", "difference by WDR, sequence", "difference by WPDIS, sequence")


def two_sided_intervals(
    weight: np.ndarray, returns: np.ndarray, largest: float
) -> dict[str, Callable[[float], Interval]]:
    """Intervals of a value by level, from the weights and returns of episodes; no weighted return exceeds `largest`."""
    x, n = weight * returns, len(weight)
    tis, wis = Terms(x[:, None]), Terms(x[:, None], weight[:, None])
    shares = bootstrap_shares(n, SAMPLES, 0)
    bounded = (
        hoeffding_lower_bound,
        empirical_bernstein_lower_bound,
        betting_lower_bound,
        betting_sequence_lower_bound,
    )
    names = ("Hoeffding, TIS", "empirical Bernstein, TIS", "betting, TIS", "betting sequence, TIS")
    return {
        "Student's t, TIS": partial(student_t, x),
        "percentile bootstrap, TIS": partial(bootstrap, tis, shares),
        "BCa bootstrap, TIS": partial(bca, tis, shares),
        "asymptotic confidence sequence, TIS": partial(confidence_sequence, x, planned=n),
        "delta method, WIS": partial(delta_method, wis),
        "percentile bootstrap, WIS": partial(bootstrap, wis, shares),
        "BCa bootstrap, WIS": partial(bca, wis, shares),
        **{
            name: partial(two_sided, bound, x, low=0.0, high=largest)
            for name, bound in zip(names, bounded, strict=True)
        },
    }


def reported_intervals(
    found: Evaluation, terms: Mapping[str, Terms], policy: Table, model: TabularModel
) -> dict[str, Callable[[float], Interval]]:
    """The further intervals that reports show, all of them percentile bootstraps."""
    gate = found.episodes
    shown = {name: terms[name] for name in ("PDIS", "WPDIS", "DR", "WDR")} | {"tabular DM": tabular_dm(gate, policy)}
    leg = found.paired("policy", model)
    if not isinstance(leg, str):
        shown["MDR"] = Terms((leg.outcome + gate.return_)[:, None])
    shares = bootstrap_shares(gate.n_episodes, SAMPLES, 0)
    return {f"percentile bootstrap, {name}": partial(bootstrap, term, shares) for name, term in shown.items()}


def lower_bounds(
    found: Evaluation, model: TabularModel, seed: int
) -> Iterator[tuple[str, str, Callable[[float], float]]]:
    """One-sided bounds by error rate, and whether they are of the policy's value or of its gain."""
    gate, ratio = found.episodes, found.ratio["policy"]
    weight = trajectory_weights(gate, ratio)
    leg = found.paired("policy", model)
    if not isinstance(leg, str):
        missing, planned = unseen(leg, leg.error, gate), CONFIG.planned_episodes
        yield GATE, "gain", lambda alpha: contrast("", leg.outcome, alpha, planned, unseen=missing).lower_bound
        yield "Student's t, leg A", "gain", lambda alpha: student_t_lower_bound(leg.outcome, alpha=alpha)
    yield "HCOPE", "value", lambda alpha: hcope_lower_bound(weight * gate.return_, alpha=alpha, seed=seed)
    if gate.length.max() == 1:
        yield (
            "logarithmic smoothing",
            "value",
            lambda alpha: logarithmic_smoothing_lower_bound(gate, ratio, low=0.0, high=1.0, alpha=alpha),
        )


def on_two_folds(found: Evaluation, policy: Table) -> Callable[[float], answer.Gain] | None:
    """Both bounds of the gain by error rate, with values and weights of either fold fitted on the other one."""
    gate = found.episodes
    probs = policy[gate.observation[:, 0].astype(int)]
    target = Target({}, probs[np.arange(gate.n_rows), gate.action], Probabilities(gate, probs), None)
    values = tabular_values(gate, target, found.ratio["policy"], len(policy))
    if values is None or values.gains is None or gate.length.max() == 1:
        return None
    base = Terms(gate.return_[:, None])
    minuend = Terms(values.gains[:, None] + base.numerator)
    missing = overlap.unseen("MDR", gate, found.ratio["policy"], values)
    return partial(answer.gain, "MDR", minuend, base, np.arange(gate.n_episodes), unseen=missing)


def differences(found: Evaluation, terms: Mapping[str, Terms]) -> list[Callable[[float], answer.Gain | Contrast]]:
    """Both bounds of the gain by error rate, in the order of SEQUENCES: of leg C, and of what `offrl evaluate` answers by."""
    gate, gains, base = found.episodes, found.trajectory_gains("policy", BEHAVIOR), Terms(found.logged_returns[:, None])
    headline = "DR" if gate.length.max() == 1 else "WDR"
    return [
        lambda alpha: contrast("", gains, alpha, CONFIG.planned_episodes),
        *(partial(answer.gain, name, terms[name], base, np.arange(len(gains))) for name in (headline, "WPDIS")),
    ]
