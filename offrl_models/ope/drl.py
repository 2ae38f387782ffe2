"""Double reinforcement learning: doubly robust terms whose values and weights come from the other folds of the same log.

Kallus & Uehara (2020), https://arxiv.org/abs/1908.08526. The mean of the terms is the estimate and their spread its standard
error: each term is the efficient influence function plus the value, so an interval from them is the efficient one.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from offrl_models.ope.doubly_robust import dr
from offrl_models.ope.fitted_ratios import Refusal, fit_ratios
from offrl_models.ope.flow import Flow
from offrl_models.ope.importance import Terms
from offrl_models.ope.marginal import pseudo_outcomes, state_weights
from offrl_models.ope.sequences import completed
from offrl_models.ope.tabular import RATIO_LIMIT, TabularModel, fit_ending, states_of
from offrl_models.ope.units import fold_of
from offrl_models.schema import Episodes, Feature, InputError

Form = Literal["history", "markov"]
Rows = Float64[np.ndarray, "rows"]
ValuesOf = Callable[[Episodes, Episodes], tuple[Rows, Rows, Rows]]


def cross_fit(
    episodes: Episodes,
    folds: int,
    terms_of: Callable[[Episodes, Episodes, Bool[np.ndarray, "rows"]], Float64[np.ndarray, "held"]],
) -> Terms:
    """One term per episode, from nuisances that were fitted on the other folds. Kallus & Uehara (2020), section 4.

    `terms_of(others, held, rows)` fits on the first episodes and returns the terms of the second, which are those `rows`.
    """
    fold = fold_of(episodes, folds)
    numerator = np.empty((episodes.n_episodes, 1))
    for number in range(folds):
        held = fold == number
        numerator[held, 0] = terms_of(episodes.take(~held), episodes.take(held), held[episodes.episode_of_row])
    return Terms(numerator)


def drl(
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    policy: Float64[np.ndarray, "states actions"],
    *,
    form: Form,
    folds: int = 5,
) -> Terms:
    """Double reinforcement learning where the observation is one category: nuisances are the tabular models of other folds.

    "history" is the form of the model M1, which weighs an episode by the product of its ratios and so asks nothing of the
    state but for good values; "markov" that of M2, which weighs a transition by state ratio and ratio. The process is taken
    to be the same at every step; where it is not, the step belongs in the state (`with_step`). The state ratio is limited
    to RATIO_LIMIT.

    Raises InputError where a fold's table is too large, or the policy never ends an episode in it.
    """

    def terms_of(others: Episodes, held: Episodes, rows: np.ndarray) -> np.ndarray:
        return _terms(fit_ending(others, policy), policy, held, ratio[rows], form)

    return cross_fit(episodes, folds, terms_of)


def drl_fitted(
    episodes: Episodes, ratio: Float64[np.ndarray, "rows"], values_of: ValuesOf, *, form: Form, folds: int = 5
) -> Terms:
    """Double reinforcement learning for observations of any kind and actions of any kind.

    `values_of(others, held)` fits values on the first episodes and gives q of the logged action, v, and next_v (read in
    truncated rows only) in the rows of the second. The state ratios of "markov" are fitted on the others as well
    (`fitted_ratios`), and used only where they balance on the fold itself.

    Raises InputError where the ratios of a fold cannot be trusted, with the reason.
    """

    def terms_of(others: Episodes, held: Episodes, rows: np.ndarray) -> np.ndarray:
        q, v, next_v = values_of(others, held)
        if form == "history":
            return dr(completed(held, next_v), ratio[rows], q, v).numerator[:, 0]
        found = fit_ratios(Flow.by_state(others, ratio[~rows])).weights(Flow.by_state(held, ratio[rows]))
        if isinstance(found, Refusal):
            raise InputError(found.reason)
        return pseudo_outcomes(held, found.weight, q, v, next_v)

    return cross_fit(episodes, folds, terms_of)


def _terms(
    model: TabularModel,
    policy: Float64[np.ndarray, "states actions"],
    episodes: Episodes,
    ratio: Float64[np.ndarray, "rows"],
    form: Form,
) -> Float64[np.ndarray, "episodes"]:
    state, following = states_of(episodes)
    q = model.q_values(policy)
    v = (policy * q).sum(1)
    taken = q[state, episodes.action]
    if form == "history":
        return dr(completed(episodes, v[following]), ratio, taken, v[state]).numerator[:, 0]
    weight = state_weights(model, policy, episodes, ratio, RATIO_LIMIT)
    return pseudo_outcomes(episodes, weight, taken, v[state], v[following])


def with_step(episodes: Episodes, states: int) -> Episodes:
    """The episodes with state and step as one category: code step * states + state.

    The policy's table is tiled likewise, once more than the longest episode has steps, since a recording that stops shows one
    state more. What was stationary by state is then by state and step.
    """
    state, following = states_of(episodes)
    last = episodes.offsets[1:] - 1
    return dataclasses.replace(
        episodes,
        observation=(episodes.step * states + state)[:, None].astype(np.float64),
        final_observation=(episodes.length * states + following[last])[:, None].astype(np.float64),
        features=(Feature("state and step", (int(episodes.length.max()) + 1) * states),),
    )
