"""Whole episodes of a log in memory, and what the derived coverage measures share: features, codes, folds, regressions."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from scipy import linalg

from offrl_models.schema import InputError

TABULAR_CELLS = 10_000  # most combinations of several categorical columns that still count as a table
INDICATORS = 64  # one-hot features that the categorical columns of a sample share
MOST_CODES = 8  # actions or actors that get a feature of their own
WAVES = 96  # random Fourier features
WIDEST_PRODUCT = 128  # products of observation and action features
CLIP = 5.0  # standard deviations at which an input of a regression is cut
PENALTIES = (1.0, 30.0, 1e3, 3e4)  # of the ridge regression, in rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Whole episodes of a log (all of them, or a seeded share), rows in order of episode and step.

    Raises ValueError when it has no rows, episodes are not numbered 0, 1, 2, ... in order, a number is infinite (a missing
    observation is NaN), or a propensity is not positive.
    """

    episode: Int64[np.ndarray, "rows"]  # 0, 1, 2, ... ascending
    observation: Float[np.ndarray, "rows columns"]  # NaN where a nullable column was missing
    names: tuple[str, ...]  # of the observation columns
    categories: tuple[int | None, ...]  # per column: number of codes, None for a numeric one
    action: Int64[np.ndarray, "rows"] | Float[np.ndarray, "rows dimensions"]  # discrete code or continuous vector
    n_actions: int | None  # None for continuous actions
    mask: Bool[np.ndarray, "rows actions"] | None
    reward: Float64[np.ndarray, "rows"]
    terminated: Bool[np.ndarray, "rows"]
    action_prob: Float64[np.ndarray, "rows"] | None  # None when it was not logged
    gamma: float
    batch: Int64[np.ndarray, "rows"]  # index of the batch each row came from
    policy_version: Shaped[np.ndarray, "rows"] | None = None  # strings
    actor: Shaped[np.ndarray, "rows"] | None = None  # strings: person or site that acted
    subgroups: dict[str, np.ndarray] = field(default_factory=dict)  # strings per row
    decided_at: Shaped[np.ndarray, "rows"] | None = None  # datetime64[us]

    def __post_init__(self) -> None:
        if len(self.episode) == 0:
            raise ValueError("a sample needs at least one row")
        if self.episode[0] != 0 or not np.isin(np.diff(self.episode), (0, 1)).all():
            raise ValueError("episodes of a sample must be numbered 0, 1, 2, ... in the order of its rows")
        if np.isinf(self.observation).any() or not np.isfinite(self.reward).all() or not np.isfinite(self.action).all():
            raise ValueError("a sample must not hold an infinite number, nor a missing action or reward")
        if self.action_prob is not None and not (self.action_prob > 0).all():
            raise ValueError("a sample must not hold a propensity that is missing or not positive")

    @property
    def n_rows(self) -> int:
        return len(self.episode)

    @property
    def n_episodes(self) -> int:
        return int(self.episode[-1]) + 1

    @cached_property
    def length(self) -> Int64[np.ndarray, "episodes"]:
        return np.bincount(self.episode)

    @cached_property
    def first(self) -> Int64[np.ndarray, "episodes"]:
        """Row of each episode's first decision."""
        return np.append(0, self.length.cumsum()[:-1])

    @cached_property
    def last(self) -> Int64[np.ndarray, "episodes"]:
        """Row of each episode's last decision."""
        return self.length.cumsum() - 1

    @cached_property
    def return_(self) -> Float64[np.ndarray, "episodes"]:
        """Realised discounted return of each episode."""
        step = np.arange(self.n_rows) - self.first[self.episode]
        return np.bincount(self.episode, self.gamma**step * self.reward)

    @cached_property
    def numeric(self) -> list[int]:
        return [i for i, n in enumerate(self.categories) if n is None]

    @cached_property
    def categorical(self) -> list[int]:
        return [i for i, n in enumerate(self.categories) if n is not None]

    @cached_property
    def radices(self) -> tuple[int, ...]:
        """Codes of each categorical column, with one for a missing value."""
        return tuple(n + 1 for n in self.categories if n is not None)

    @cached_property
    def codes(self) -> Int64[np.ndarray, "rows categorical"]:
        """The categorical columns; where a value is missing, its code is the number of categories.

        Raises InputError naming the column and the rows whose code is outside the contract.
        """
        found = np.empty((self.n_rows, len(self.categorical)), np.int64)
        for position, (column, radix) in enumerate(zip(self.categorical, self.radices, strict=True)):
            values = self.observation[:, column]
            missing = np.isnan(values)
            bad = int((~missing & ((values < 0) | (values >= radix - 1) | (values != np.floor(values)))).sum())
            if bad:
                raise InputError(
                    f"column {self.names[column]!r} has {bad} rows holding a category outside 0 to {radix - 2}; "
                    "recode it or raise `categories` in the contract."
                )
            found[:, position] = np.where(missing, radix - 1, values)
        return found

    @cached_property
    def is_tabular(self) -> bool:
        """Whether the observation is one categorical column, or a few with at most `TABULAR_CELLS` combinations."""
        if self.numeric:
            return False
        return len(self.radices) == 1 or float(np.prod(self.radices, dtype=float)) <= TABULAR_CELLS

    def take(self, chosen: Bool[np.ndarray, "episodes"]) -> "Sample":
        """The chosen episodes as a sample of their own, numbered anew."""
        rows = chosen[self.episode]
        optional = {
            name: None if (values := getattr(self, name)) is None else values[rows]
            for name in ("mask", "action_prob", "policy_version", "actor", "decided_at")
        }
        return replace(
            self,
            episode=(chosen.cumsum() - 1)[self.episode[rows]],
            observation=self.observation[rows],
            action=self.action[rows],
            reward=self.reward[rows],
            terminated=self.terminated[rows],
            batch=self.batch[rows],
            subgroups={name: values[rows] for name, values in self.subgroups.items()},
            **optional,
        )

    def at_most(self, rows: int, rng: np.random.Generator) -> "Sample":
        """The sample, or whole episodes of it drawn at random while they fit into so many rows (one episode always does)."""
        if self.n_rows <= rows:
            return self
        order = rng.permutation(self.n_episodes)
        fits = max(int((self.length[order].cumsum() <= rows).sum()), 1)
        return self.take(np.isin(np.arange(self.n_episodes), order[:fits]))


def joint(*codes: Shaped[np.ndarray, "rows"]) -> Int64[np.ndarray, "rows"]:
    """One code 0, 1, 2, ... for each combination of codes that occurs."""
    code = np.unique(codes[0], return_inverse=True)[1]
    for other in codes[1:]:
        values, compact = np.unique(other, return_inverse=True)
        code = np.unique(code * len(values) + compact, return_inverse=True)[1]
    return code.astype(np.int64)


def indicators(codes: Shaped[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows kept"]:
    """One-hot columns of the `MOST_CODES` most frequent codes; rows of a rarer one are 0 in all of them."""
    _, inverse, count = np.unique(codes, return_inverse=True, return_counts=True)
    kept = np.argsort(-count, kind="stable")[:MOST_CODES]
    return (inverse[:, None] == kept).astype(np.float64)


def standardized(
    values: Float[np.ndarray, "rows columns"], like: Float[np.ndarray, "others columns"]
) -> Float64[np.ndarray, "rows columns"]:
    """Columns less their mean in `like`, over their standard deviation there; NaN becomes 0, a constant is only centered."""
    known = ~np.isnan(like)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, like, 0.0).sum(0, dtype=np.float64) / count
    spread = np.sqrt((np.where(known, like - mean, 0.0) ** 2).sum(0) / count)
    scale = np.where(spread > 1e-9 * np.abs(mean), spread, 1.0)  # less is rounding
    return np.nan_to_num((values - mean) / scale, nan=0.0)


def features(sample: Sample, like: Sample | None = None) -> Float64[np.ndarray, "rows features"]:
    """The observation as numbers of comparable size, in the units of `like` (default: of the sample itself).

    Numeric columns are standardized and followed by indicators of their missing values; categorical ones become
    indicators of their most frequent codes, `INDICATORS` in all.
    """
    like = like or sample
    numbers = sample.observation[:, sample.numeric]
    gaps = np.isnan(numbers)
    parts = [standardized(numbers, like.observation[:, like.numeric]), gaps.astype(np.float64)]
    for position, radix in enumerate(like.radices):
        count = np.bincount(like.codes[:, position], minlength=radix)
        kept = np.argsort(-count, kind="stable")[: max(INDICATORS // len(like.radices), 1)]
        parts.append((sample.codes[:, position, None] == kept[count[kept] > 0]).astype(np.float64))
    return np.concatenate(parts, 1)


def action_features(sample: Sample) -> Float64[np.ndarray, "rows features"]:
    """Indicators of the most frequent discrete actions, or the standardized continuous ones."""
    if sample.n_actions is not None:
        return indicators(sample.action)
    return standardized(sample.action, sample.action)


def design(sample: Sample, rng: np.random.Generator, *, action: bool) -> Float64[np.ndarray, "rows inputs"]:
    """Observation, and action if asked, as inputs of a regression: themselves, their products, and random waves of them.

    The waves are random Fourier features of a Gaussian kernel: Rahimi & Recht (2007), "Random features for large-scale
    kernel machines". Values beyond 5 standard deviations are cut.
    """
    state = features(sample).clip(-CLIP, CLIP)
    state = state[:, state.any(0)]
    parts, inputs = [state], state
    if action:
        taken = action_features(sample)
        inputs = np.concatenate([state, taken], 1)
        parts = [inputs]
        if state.shape[1] * taken.shape[1] <= WIDEST_PRODUCT:
            parts.append((state[:, :, None] * taken[:, None, :]).reshape(len(state), -1))
    directions = rng.normal(size=(inputs.shape[1], WAVES)) / np.sqrt(max(inputs.shape[1], 1))
    return np.concatenate([*parts, np.cos(inputs @ directions + rng.uniform(0, 2 * np.pi, WAVES))], 1)


def folds(groups: int, k: int, rng: np.random.Generator) -> Int64[np.ndarray, "groups"]:
    """A fold 0 to k - 1 for each group, at random and of equal sizes."""
    return rng.permutation(groups) % k


def group_means(
    values: Float64[np.ndarray, "rows columns"], group: Int64[np.ndarray, "rows"]
) -> Float64[np.ndarray, "rows columns"]:
    """For each row the mean of its group."""
    count = np.bincount(group).clip(1)
    means = [np.bincount(group, column) / count for column in values.T]
    return np.stack(means, 1)[group] if means else np.zeros_like(values)


def ridge_residuals(
    features: Float64[np.ndarray, "rows features"],
    targets: Float64[np.ndarray, "rows targets"],
    fold: Int64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "rows targets"]:
    """Targets less what ridge regression on the other folds predicts, with the penalty that serves each target best."""
    inputs = np.column_stack([np.ones(len(features)), features - features.mean(0)])
    parts = [(inputs[fold == k], targets[fold == k]) for k in range(int(fold.max()) + 1)]
    grams, moments = [x.T @ x for x, _ in parts], [x.T @ y for x, y in parts]
    penalized = np.diag(np.append(1e-9, np.ones(features.shape[1])))  # the intercept is free, unless there are no rows
    weights = np.empty((len(parts), len(PENALTIES), inputs.shape[1], targets.shape[1]))
    loss = np.zeros((len(PENALTIES), targets.shape[1]))
    for k in range(len(parts)):
        gram, moment = sum(grams) - grams[k], sum(moments) - moments[k]
        for i, penalty in enumerate(PENALTIES):
            w = weights[k, i] = linalg.solve(gram + penalty * penalized, moment, assume_a="pos")
            loss[i] += (w * (grams[k] @ w - 2 * moments[k])).sum(0)  # squared error, less what no penalty changes
    best = loss.argmin(0)
    found = np.empty_like(targets)
    for k, (x, y) in enumerate(parts):
        found[fold == k] = y - x @ weights[k, best, :, np.arange(len(best))].T
    return found


def table_residuals(
    groupings: Int64[np.ndarray, "rows groupings"],
    targets: Float64[np.ndarray, "rows targets"],
    fold: Int64[np.ndarray, "rows"],
) -> Float64[np.ndarray, "rows targets"]:
    """Targets less group means of the other folds, one grouping after the other, each shrunk by empirical Bayes."""
    found = np.empty_like(targets)
    for k in range(int(fold.max()) + 1):
        held = fold == k
        left = targets - targets[~held].mean(0) if (~held).any() else targets
        for group in groupings.T:
            left = left - _shrunk_means(left, group, ~held)
        found[held] = left[held]
    return found


def _shrunk_means(
    values: Float64[np.ndarray, "rows columns"], group: Int64[np.ndarray, "rows"], train: Bool[np.ndarray, "rows"]
) -> Float64[np.ndarray, "rows columns"]:
    """Mean of each row's group over the training rows, shrunk to 0 by the variances within and between groups."""
    size, inside = int(group.max()) + 1, values[train]
    count = np.bincount(group[train], minlength=size).astype(np.float64)
    total = np.stack([np.bincount(group[train], column, size) for column in inside.T], 1)
    rows, groups = count.sum(), float((count > 0).sum())
    if rows <= groups:
        return np.zeros_like(values)  # each training row is a group of its own: nothing can be told from noise
    explained = (total**2 / count.clip(1)[:, None]).sum(0)
    noise = ((inside**2).sum(0) - explained).clip(0) / (rows - groups)
    between = ((explained - groups * noise) / rows).clip(0)  # Var of group means about 0, weighted by rows
    weight = count[:, None] * between / np.maximum(count[:, None] * between + noise, 1e-300)
    return (weight * total / count.clip(1)[:, None])[group]
