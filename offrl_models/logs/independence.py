"""What must not depend on what: rewards on single columns, splits on each other, actions and outcomes on what is not observed.

Each measure takes a `Sample` and returns a small frame that an expectation can assert on. None of them reports a number that
it could not estimate: too little data gives no row.
"""

import math

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64, Shaped
from scipy import special, stats

from offrl_models.logs.sample import (
    CLIP,
    Sample,
    action_features,
    design,
    features,
    folds,
    group_means,
    indicators,
    joint,
    ridge_residuals,
    standardized,
    table_residuals,
)
from offrl_models.logs.support import action_cells, episode_bits, episode_content, state_cells

FOLDS = 5
FEWEST = 20  # episodes of a class, or in all, below which a test has no row
PRIOR_ROWS = 10.0  # a category's target mean counts the overall one like so many rows
MARGIN_BITS = 13.0  # a copy counts when chance makes one like it with probability under 2**-13
MOST_ROWS = 50_000  # of a regression
CODINGS = 16  # random signs that stand in for the codes of all categorical columns


def leakage(sample: Sample, *, seed: int) -> pl.DataFrame:
    """C09: per observation column, the AUC with which its value at the last decision alone predicts the last reward.

    Positive is an episode whose last reward is above the median (at the median, where none is above). The AUC is free of
    direction, at least .5. A numeric column is taken as it is, its missing values below or above all others, whichever
    predicts better, and so only monotone dependence is seen. A categorical column is replaced by the mean target of its code
    in the other folds, and the AUC is averaged over folds. No rows when either class has fewer than 20 episodes.
    """
    reward = sample.reward[sample.last]
    middle = float(np.median(reward))
    positive = reward > middle if (reward > middle).any() else reward >= middle
    n = (int(positive.sum()), int((~positive).sum()))
    found = []
    if min(n) >= FEWEST:
        fold = _stratified(positive, np.random.default_rng(seed))
        for column, name in enumerate(sample.names):
            if sample.categories[column] is None:
                value = sample.observation[sample.last, column].astype(np.float64)
                fills = (-np.inf, np.inf) if np.isnan(value).any() else (0.0,)
                scores = [_auc(np.where(np.isnan(value), fill, value), positive) for fill in fills]
            else:
                code = sample.codes[sample.last, sample.categorical.index(column)]
                scores = [_coded_auc(code, positive, fold)]
            found.append((name, max(max(score, 1.0 - score) for score in scores), *n))
    schema = {"column": pl.String, "auc": pl.Float64, "positives": pl.Int64, "negatives": pl.Int64}
    return pl.DataFrame(found, schema=schema, orient="row")


def _stratified(positive: Bool[np.ndarray, "n"], rng: np.random.Generator) -> Int64[np.ndarray, "n"]:
    """Folds with equal shares of both classes."""
    fold = np.empty(len(positive), np.int64)
    for group in (positive, ~positive):
        fold[group] = folds(int(group.sum()), FOLDS, rng)
    return fold


def _auc(score: Float64[np.ndarray, "n"], positive: Bool[np.ndarray, "n"]) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    p = int(positive.sum())
    return float((stats.rankdata(score)[positive].sum() - p * (p + 1) / 2) / (p * (len(score) - p)))


def _coded_auc(code: Int64[np.ndarray, "n"], positive: Bool[np.ndarray, "n"], fold: Int64[np.ndarray, "n"]) -> float:
    """AUC of out-of-fold target means, averaged over folds: overall means of the other folds run against the held-out ones."""
    size, total = int(code.max()) + 1, 0.0
    for k in range(FOLDS):
        train = fold != k
        count = np.bincount(code[train], minlength=size)
        hits = np.bincount(code[train], positive[train], size)
        mean = (hits + PRIOR_ROWS * positive[train].mean()) / (count + PRIOR_ROWS)
        total += _auc(mean[code[~train]], positive[~train])
    return total / FOLDS


def near_duplicates(sample: Sample, split_of_episode: Shaped[np.ndarray, "episodes"]) -> pl.DataFrame:
    """C28: per split, the share of its episodes that occur again in another split.

    Episodes are equal when their observations (standardized, to 0.01), actions and lengths are. Short episodes of few
    categories coincide by chance, so only those count (`judged`) that are too improbable for it: under a Markov model of all
    other distinct episodes, the expected number of equals among the others must be below 2**-13. The model takes all
    categorical columns and the discrete action as one state, and the numeric columns as independent of each other, at most 8
    of them; a copy that chance could have made, or that straddles a rounding edge, is not seen, and equal starts that decide
    all that follows look like one. `share` is duplicates over all episodes of the split, `matching` counts all equals.
    """
    content = episode_content(sample)
    keys: dict[bytes, int] = {}
    ends = sample.last + 1
    key = np.array(
        [keys.setdefault(content[a:b].tobytes(), len(keys)) for a, b in zip(sample.first, ends, strict=True)], np.int64
    )
    distinct = np.unique(key, return_index=True)[1]  # one episode of each content, in order of key
    judged = (episode_bits(sample, content, distinct) >= math.log2(sample.n_episodes) + MARGIN_BITS)[key]
    splits, split = np.unique(split_of_episode.astype(str), return_inverse=True)
    pairs = np.unique(key * len(splits) + split) // len(splits)
    matching = np.bincount(pairs)[key] > 1
    found = []
    for i, name in enumerate(splits):
        mine = split == i
        counts = [int((mine & which).sum()) for which in (mine, judged, matching, matching & judged)]
        found.append((str(name), *counts, counts[-1] / counts[0]))
    counted = dict.fromkeys(("episodes", "judged", "matching", "duplicates"), pl.Int64)
    return pl.DataFrame(found, schema={"split": pl.String, **counted, "share": pl.Float64}, orient="row")


def confounding(sample: Sample, *, seed: int) -> pl.DataFrame:
    """C29: does what drove the actions, beyond the observation, also drive the rewards? One row per test.

    - "logged propensity" (discrete actions with propensities): the log propensity of each action against the reward, both
      less what the observation and the action explain. The logger used something that was not observed, and so did rewards.
    - "earlier decisions" (episodes of two steps or more): the mean of all earlier actions less what their observations
      explain, against the reward given the present observation and action. It sees a cause that lasts, and also any other
      non-Markov effect of earlier actions.
    - "actor" (where given): the action against who acted, given the observation.

    `z` is the normal equivalent of a chi-squared score test clustered by episode (`degrees` of freedom); `r2_gain` is the
    out-of-fold share of the remaining variance explained. "Given" means within state(-action) cells where the observation
    is tabular, and after a cross-fitted ridge regression on random Fourier features otherwise; what that regression misses
    of a smooth effect can raise z, so read z with the gain. Nothing here sees a cause that acts once, between an unlogged or
    wrongly logged propensity and the reward of the same step, nor the actor's effect where actors have no rows in common
    states. No rows under 20 episodes; at most 50,000 rows are used.
    """
    rng = np.random.default_rng(seed)
    sample = sample.at_most(MOST_ROWS, rng)
    schema = {"test": pl.String, "rows": pl.Int64, "statistic": pl.Float64, "degrees": pl.Int64}
    schema |= dict.fromkeys(("z", "p_value", "r2_gain"), pl.Float64)
    if sample.n_episodes < FEWEST:
        return pl.DataFrame(schema=schema)
    # In a table the cell means are taken within each fold, two of them so that most cells have several rows in each.
    fold = folds(sample.n_episodes, 2 if sample.is_tabular else FOLDS, rng)[sample.episode]
    state, both = _given(sample, rng, action=False), _given(sample, rng, action=True)
    everything, later = np.ones(sample.n_rows, bool), _has_previous(sample)
    surprise = _residual(action_features(sample), state, fold)
    causes = []
    if sample.action_prob is not None and sample.n_actions is not None:
        taken = action_features(sample)  # apart, since what makes one action likelier makes others rarer
        causes.append(("logged propensity", everything, np.log(sample.action_prob)[:, None] * taken))
    if later.any():
        causes.append(("earlier decisions", later, _mean_before(sample, surprise)))
    found = []
    for name, rows, cause in causes:
        found.append(
            (name, *_association(sample.reward[rows, None], cause[rows], both[rows], sample.episode[rows], fold[rows]))
        )
    if sample.actor is not None:
        actor = indicators(sample.actor.astype(str))
        found.append(("actor", *_association(action_features(sample), actor, state, sample.episode, fold)))
    return pl.DataFrame(found, schema=schema, orient="row")


def markov(sample: Sample, *, seed: int) -> pl.DataFrame:
    """C30: how much better reward, ending and next observation are predicted from the previous step beyond (s, a).

    One row per target ("reward", "terminated", and each observation column at the next step) over the rows that have a
    previous step: `r2` from the observation and action, `gain` in R2 from adding the previous observation, action and
    reward, both out of fold by episode, and the `z` of the gain over episodes. It is about 0 when the state is Markov.
    Tabular observations are predicted by shrunken means of their cells; others by ridge regression on random Fourier
    features, where history can also stand in for what that regression misses. A categorical column is predicted through
    random signs of its codes, a share of Brier score. No row for a constant target or under 20 episodes; at most 50,000 rows
    are used.
    """
    rng = np.random.default_rng(seed)
    sample = sample.at_most(MOST_ROWS, rng)
    fold = folds(sample.n_episodes, FOLDS, rng)[sample.episode]
    later = _has_previous(sample)
    onward = later & np.isin(np.arange(sample.n_rows), sample.last, invert=True)
    now = {"reward": sample.reward[:, None], "terminated": sample.terminated[:, None].astype(np.float64)}
    following = {name: np.roll(values, -1, 0) for name, values in _observed(sample, rng).items()}
    given = [_given(sample, rng, action=action) for action in ((False, True) if sample.is_tabular else (True,))]
    base, history = np.column_stack(given), _past(sample)
    found = []
    for rows, targets in ((later, now), (onward, following)):
        if len(np.unique(sample.episode[rows])) < FEWEST:
            continue
        values = np.concatenate(list(targets.values()), 1)[rows]
        fit = table_residuals if sample.is_tabular else ridge_residuals
        squares = [fit(inputs[rows], values, fold[rows]) ** 2 for inputs in (base, np.concatenate([base, history], 1))]
        total = (values - values.mean(0)) ** 2
        owner = np.repeat(list(targets), [v.shape[1] for v in targets.values()])
        for name in targets:
            mine = owner == name
            spread = float(total[:, mine].sum())
            if spread > 1e-9 * float((values[:, mine] ** 2).sum()):
                before, after = (s[:, mine].sum(1) for s in squares)
                gained = np.bincount(sample.episode[rows], before - after)
                noise = math.sqrt(float(((gained - gained.mean()) ** 2).sum()))
                z = float(gained.sum()) / max(noise, 1e-12)
                found.append((name, int(rows.sum()), 1 - float(before.sum()) / spread, float(gained.sum()) / spread, z))
    schema = {"target": pl.String, "rows": pl.Int64, "r2": pl.Float64, "gain": pl.Float64, "z": pl.Float64}
    return pl.DataFrame(found, schema=schema, orient="row")


def _mean_before(sample: Sample, values: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "rows columns"]:
    """Mean of the earlier rows of the episode; 0 in its first row."""
    before = values.cumsum(0) - values
    step = np.arange(sample.n_rows) - sample.first[sample.episode]
    return (before - before[sample.first[sample.episode]]) / step.clip(1)[:, None]


def _has_previous(sample: Sample) -> Bool[np.ndarray, "rows"]:
    return np.isin(np.arange(sample.n_rows), sample.first, invert=True)


def _given(
    sample: Sample, rng: np.random.Generator, *, action: bool
) -> Int64[np.ndarray, "rows"] | Float64[np.ndarray, "rows features"]:
    """What is held fixed: the cell of a tabular observation (and action), else a design matrix of both."""
    if not sample.is_tabular:
        return design(sample, rng, action=action)
    cell = state_cells(sample, seed=0)
    return joint(cell, action_cells(sample)) if action else cell


def _residual(
    values: Float64[np.ndarray, "rows columns"],
    given: Int64[np.ndarray, "rows"] | Float64[np.ndarray, "rows features"],
    fold: Int64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "rows columns"]:
    """Values less what `given` explains of them, without carrying anything from one fold to another."""
    if given.ndim == 1:
        return values - group_means(values, joint(given, fold))
    return ridge_residuals(given, values, fold)


def _association(
    outcome: Float64[np.ndarray, "rows outcomes"],
    cause: Float64[np.ndarray, "rows causes"],
    given: Int64[np.ndarray, "rows"] | Float64[np.ndarray, "rows features"],
    episode: Int64[np.ndarray, "rows"],
    fold: Int64[np.ndarray, "rows"],
) -> tuple[int, float, int, float, float, float]:
    """Score test that residuals of outcome and cause are uncorrelated: rows, statistic, degrees, z, p-value, R2 gain.

    Scores are summed per episode, so that rows of an episode may depend on each other. With few episodes for the number of
    scores the test is conservative. z is Wilson & Hilferty's normal equivalent, which does not overflow as a p-value does.
    """
    outcome, cause = _residual(outcome, given, fold), _residual(cause, given, fold)
    cause = np.where(cause.std(0) > 1e-9, cause, 0.0)  # less is rounding
    spread = np.ones(len(given))
    if given.ndim == 1:
        cell = joint(given, fold)
        n = np.bincount(cell)[cell]
        spread = np.sqrt(n / (n - 1).clip(1))  # residuals from the mean of n rows vary less by (n - 1) / n
    pairs = [y * x for y in outcome.T for x in cause.T]
    total = np.array([pair.sum() for pair in pairs])
    scores = np.stack([np.bincount(episode, pair * spread) for pair in pairs], 1)
    values, vectors = np.linalg.eigh(scores.T @ scores)
    kept = values > max(1e-10 * float(values.max()), 1e-30)
    degrees = int(kept.sum())
    if degrees == 0:
        return len(outcome), 0.0, 0, 0.0, 1.0, 0.0
    statistic = float(((total @ vectors[:, kept]) ** 2 / values[kept]).sum())
    z = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    left = ridge_residuals(cause, outcome, fold)
    gain = 1 - float((left**2).sum()) / float((outcome**2).sum())
    return len(outcome), statistic, degrees, z, float(special.chdtrc(degrees, statistic)), gain


def _observed(sample: Sample, rng: np.random.Generator) -> dict[str, Float64[np.ndarray, "rows parts"]]:
    """Each observation column as targets of a regression, in units in which every part weighs the same."""
    found = {}
    for column, name in enumerate(sample.names):
        if sample.categories[column] is None:
            values = sample.observation[:, [column]].astype(np.float64)
            gaps = np.isnan(values)
            found[name] = np.concatenate([standardized(values, values), gaps[:, gaps.any(0)]], 1)
        else:
            position = sample.categorical.index(column)
            signs = rng.choice([-1.0, 1.0], size=(sample.radices[position], max(CODINGS // len(sample.radices), 1)))
            found[name] = signs[sample.codes[:, position]]
    return found


def _past(sample: Sample) -> np.ndarray:
    """What the previous step adds to them; meaningless in the first row of an episode."""
    if not sample.is_tabular:
        reward = sample.reward[:, None]
        parts = [features(sample).clip(-CLIP, CLIP), action_features(sample), standardized(reward, reward)]
        return np.roll(np.concatenate(parts, 1), 1, 0)
    cell, action = state_cells(sample, seed=0), action_cells(sample)
    level = np.searchsorted(np.quantile(sample.reward, [0.25, 0.5, 0.75]), sample.reward)
    before = [np.roll(code, 1) for code in (cell, action, level)]
    groupings = [joint(cell, code) for code in before]
    return np.stack([*groupings, joint(cell, action, before[0], before[1])], 1)
