"""Coverage measures: what is wrong in a log, row by row, and what the log covers.

Each measure has the id of its check. `RULES` are the row-level ones: a boolean expression over the sorted log that is True
where a row breaks the rule. They are counted per batch, so that a bad batch can be named and quarantined whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64

from offrl_models.logs.contract import Contract
from offrl_models.logs.read import BATCH

FEW_VISITS = 5  # a state-action cell with fewer visits counts as barely seen


@dataclass(frozen=True)
class Rule:
    """One row-level rule on one column. `broken` is True for rows that break it."""

    check: str
    column: str
    broken: pl.Expr
    problem: str  # completes "<n> rows ..."
    remedy: str

    @property
    def name(self) -> str:
        return f"{self.check}_{self.column}"


@dataclass(frozen=True)
class Violation:
    """Rows of one batch that break one rule."""

    check: str
    batch: int
    column: str
    rows: int
    problem: str
    remedy: str

    def sentence(self, file: str) -> str:
        noun = "row" if self.rows == 1 else "rows"
        return f"{file}: column {self.column!r} has {self.rows} {noun} {self.problem} ({self.check}); {self.remedy}"


@dataclass(frozen=True)
class Coverage:
    """All measures of one log."""

    batches: pl.DataFrame  # one row per batch: rows, and one column of broken rows per rule
    cells: pl.DataFrame  # one row per visited state-action cell: state, action, visits, mean_action_prob
    propensity: pl.DataFrame  # one row per test of "the mean ratio is 1": policy, rows, mean_error, z
    card: dict[str, Any]  # one value per fact about the whole log
    violations: tuple[Violation, ...]


def _missing_or_infinite(column: str, *, floating: bool) -> pl.Expr:
    bad = pl.col(column).is_null()
    return bad | pl.col(column).is_nan() | pl.col(column).is_infinite() if floating else bad


def rules(contract: Contract) -> list[Rule]:
    """The row-level rules of a contract, over the log sorted by batch, episode and step. A batch holds whole episodes."""
    action, reward, low, high = contract.action, contract.reward.column, *contract.reward.range
    episode = pl.struct(BATCH, contract.episode_id)
    first, last = episode.ne_missing(episode.shift(1)), episode.ne_missing(episode.shift(-1))
    earlier_batch = pl.col(BATCH) > pl.col(BATCH).min().over(contract.episode_id)
    step_before = pl.col(contract.step).shift(1)
    terminated = pl.col(contract.terminated).fill_null(False)
    truncated = pl.col(contract.truncated).fill_null(False) if contract.truncated else pl.lit(False)
    found = [
        Rule("C03", contract.step, ~first & (pl.col(contract.step) == step_before),
             "repeating a step that its episode already has", "keep one row for each decision."),
        Rule("C03", contract.episode_id, earlier_batch,
             "of episodes that an earlier batch has", "a batch holds whole episodes, and each of them once."),
        Rule("C04", contract.step,
             pl.when(first).then(pl.col(contract.step) != 0).otherwise((pl.col(contract.step) - step_before) > 1),
             "following a gap in the steps of its episode", "steps must run 0, 1, 2, ...: add the missing decisions or "
             "leave the episode out."),
        Rule("C05", contract.terminated,
             pl.when(last).then(terminated == truncated).otherwise(terminated | truncated),
             "ending an episode wrongly", "the last row of an episode, and no other, must be either terminated or "
             "truncated: correct the flags."),
    ]  # fmt: skip
    entity = pl.col(contract.entity_column)
    found.append(
        Rule("C27", contract.entity_column, ~first & entity.ne_missing(entity.shift(1)),
             "belonging to another entity than the row before", "an episode belongs to one entity: correct its id.")
    )  # fmt: skip
    for column, following in zip(contract.observation, contract.next_observation, strict=True):
        name = column.column
        found.append(
            Rule("C07", following, ~last & pl.col(following).ne_missing(pl.col(name).shift(-1)),
                 f"differing from {name!r} in the row that follows", "the next observation must be what was observed next.")
        )  # fmt: skip
        if column.categories is not None:
            for coded in (name, following):
                found.append(
                    Rule("C11", coded, ~pl.col(coded).is_between(0, column.categories - 1),
                         f"holding a category outside 0 to {column.categories - 1}",
                         "recode it or raise `categories` in the contract.")
                )  # fmt: skip
    numbers = [(c.column, c.categories is None) for c in contract.observation]
    numbers += [(f, c.categories is None) for f, c in zip(contract.next_observation, contract.observation, strict=True)]
    numbers += [(action.column, False), (reward, True), (contract.terminated, False), (contract.step, False)]
    numbers += [(contract.episode_id, False), (contract.entity_column, False)]
    numbers += [(contract.truncated, False)] if contract.truncated else []
    numbers += [(contract.action_prob, True)]
    for name, floating in dict(numbers).items():
        found.append(
            Rule("C10", name, _missing_or_infinite(name, floating=floating),
                 "missing, NaN or infinite", "fill them at the source or leave their episodes out.")
        )  # fmt: skip
    found.append(
        Rule("C12", reward, ~pl.col(reward).is_between(low, high) & pl.col(reward).is_not_nan(),
             f"outside the reward range [{low:g}, {high:g}]", "correct them or the range in the contract.")
    )  # fmt: skip
    in_set = pl.col(action.column).is_between(0, action.values - 1)
    found.append(
        Rule("C13", action.column, ~in_set, f"holding an action outside 0 to {action.values - 1}",
             "recode it or raise `values` in the contract.")
    )  # fmt: skip
    if action.mask:
        mask = pl.col(action.mask)
        allowed = mask.list.get(pl.when(in_set).then(pl.col(action.column)), null_on_oob=True)
        unusable = mask.is_null() | (mask.list.len() != action.values) | mask.list.contains(None)
        found.append(
            Rule("C13", action.mask, unusable | (in_set & ~allowed.fill_null(False)),
                 f"holding an action that the mask does not allow, or a mask that is not {action.values} booleans",
                 "log the mask that was in force at the decision.")
        )  # fmt: skip
    probability = pl.col(contract.action_prob)
    found.append(
        Rule("C14", contract.action_prob, ~((probability > 0) & (probability <= 1)) & probability.is_not_nan(),
             "with a propensity outside (0, 1]", "log the probability with which the action was drawn.")
    )  # fmt: skip
    return found


def measure(log: pl.DataFrame, contract: Contract) -> Coverage:
    """Every measure of a log read by `read_batches`."""
    log = log.sort(BATCH, contract.episode_id, contract.step)
    table = rules(contract)
    flagged = log.select(BATCH, *(rule.broken.fill_null(False).alias(rule.name) for rule in table))
    sums = pl.col([rule.name for rule in table]).sum()
    batches = flagged.group_by(BATCH).agg(pl.len().alias("rows"), sums).sort(BATCH)
    violations = tuple(
        Violation(rule.check, int(row[BATCH]), rule.column, int(row[rule.name]), rule.problem, rule.remedy)
        for row in batches.iter_rows(named=True)
        for rule in table
        if row[rule.name] > 0
    )
    return Coverage(batches, _cells(log, contract), _propensity(log, contract), _card(log, contract), violations)


def zero_mean_z(error: Float64[np.ndarray, "rows"]) -> float:
    """z-score of a mean whose expectation is 0. A constant that is not 0 gets a huge score, not none."""
    center, spread = float(error.mean()), float(error.std())
    return 0.0 if abs(center) <= 1e-12 else float(center / (max(spread, 1e-12) / np.sqrt(len(error))))


def _cells(log: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """Visits of each state-action cell (C21). Numeric columns are cut at their quartiles to form states."""
    parts = []
    for column in contract.observation:
        values = log[column.column]
        if column.categories is None:
            known = values.drop_nans().drop_nulls().to_numpy()
            cuts = np.quantile(known, [0.25, 0.5, 0.75]) if len(known) else np.zeros(0)
            values = pl.Series(column.column, np.searchsorted(cuts, values.to_numpy()))
        parts.append(values.cast(pl.String))
    state = parts[0] if len(parts) == 1 else pl.select(pl.concat_str(parts, separator=",")).to_series()
    return (
        log.group_by(pl.lit(state).alias("state"), pl.col(contract.action.column).alias("action"))
        .agg(pl.len().alias("visits"), pl.col(contract.action_prob).mean().alias("mean_action_prob"))
        .sort("state", "action")
    )


def _propensity(log: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """Mean-ratio tests (C15): for any policy pi, E[pi(a|s) / mu(a|s)] is 1 when the logged mu is right.

    Tested for the uniform policy over the allowed actions and for each single action, where the expectation is whether the
    action was allowed. The errors are martingale differences, so rows may be summed as if they were independent. Rows with a
    propensity that C14 refuses are left to C14.
    """
    empty = pl.DataFrame(schema={"policy": pl.String, "rows": pl.Int64, "mean_error": pl.Float64, "z": pl.Float64})
    action, k = pl.col(contract.action.column), contract.action.values
    usable = pl.col(contract.action_prob).is_between(0, 1, closed="right") & action.is_between(0, k - 1)
    if contract.action.mask:
        usable &= (pl.col(contract.action.mask).list.len() == k).fill_null(False)
    rows = log.filter(usable)
    if rows.height < 2:
        return empty
    taken = rows[contract.action.column].to_numpy()
    ratio = 1.0 / rows[contract.action_prob].to_numpy()
    mask = np.ones((rows.height, k), bool)
    if contract.action.mask:
        mask = rows[contract.action.mask].list.to_array(k).to_numpy().astype(bool)
    tests = [("uniform", ratio / mask.sum(1).clip(1) - 1.0, rows.height)]
    for value in range(k):
        allowed = mask[:, value]
        if allowed.any():
            error = ((taken == value) * ratio - 1.0)[allowed]
            tests.append((f"always {value}", error, int(allowed.sum())))
    found = [
        {"policy": policy, "rows": n, "mean_error": float(error.mean()), "z": zero_mean_z(error)}
        for policy, error, n in tests
    ]
    return pl.DataFrame(found, schema=empty.schema)


def _card(log: pl.DataFrame, contract: Contract) -> dict[str, Any]:
    """The dataset card (C24) and the facts about rewards (C12)."""
    reward = pl.col(contract.reward.column)
    episodes = log.group_by(contract.episode_id).agg(
        (reward * pl.lit(contract.gamma).pow(pl.int_range(pl.len()))).sum().alias("return"), pl.len().alias("length")
    )
    frequency = log[contract.action.column].value_counts()["count"].to_numpy() / log.height
    low, high = contract.reward.range
    return {
        "episodes": episodes.height,
        "rows": log.height,
        "batches": log[BATCH].n_unique(),
        **{
            f"return_q{int(q * 100):02d}": episodes["return"].quantile(q, "linear")
            for q in (0.05, 0.25, 0.5, 0.75, 0.95)
        },
        "return_mean": episodes["return"].mean(),
        **{f"length_q{int(q * 100):02d}": episodes["length"].quantile(q, "linear") for q in (0.05, 0.5, 0.95)},
        "length_max": episodes["length"].max(),
        "action_entropy_nats": float(-(frequency * np.log(frequency)).sum()),
        "reward_distinct_values": log[contract.reward.column].n_unique(),
        "reward_share_at_bounds": log.select((reward.is_in([low, high])).mean()).item(),
    }


def screen(coverage: Coverage, contract: Contract, files: list[Path]) -> dict[Path, str]:
    """Batches that break a row-level rule -> one sentence about the first rule broken.

    An episode of an earlier batch is held against a batch only where no batch breaks another rule: the earlier one may
    itself be refused.
    """
    repeated = next(rule.name for rule in rules(contract) if rule.check == "C03" and rule.column == contract.episode_id)
    own = [violation for violation in coverage.violations if f"{violation.check}_{violation.column}" != repeated]
    reasons: dict[Path, str] = {}
    for violation in own or coverage.violations:
        file = files[violation.batch]
        reasons.setdefault(file, violation.sentence(str(file)))
    return reasons
