"""The row-level rules of a contract: what one row, or it and the one before, may hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from offrl_models.logs import values
from offrl_models.logs.contract import Contract
from offrl_models.logs.roles import ObservationColumn
from offrl_models.logs.values import within

CLOCK_SKEW = timedelta(minutes=5)
SUM_TOLERANCE = 1e-6  # of a logged vector of propensities


@dataclass(frozen=True)
class Rule:
    """One row-level rule on one column. `broken` is True for rows that break it; it sees one chunk in order of reading."""

    check: str
    column: str
    broken: pl.Expr
    problem: str  # completes "<n> rows ..."
    remedy: str
    across: bool = False  # it sets batches against each other: another batch decides whether rows break it

    @property
    def name(self) -> str:
        return f"{self.check}_{self.column}"


LAST_STEP = 2**31 - 2  # of an episode
BACKWARDS, CORRECT_CLOCKS = (
    "earlier than the decision before it in the episode",
    "correct the clocks, the times or the steps.",
)
CORRECT_RANGE = "correct them or the range in the contract."
FUTURE, EARLY = "later than the present", "earlier than the decision that they reward"
MISSING, FILL = "missing, NaN or infinite", "fill them at the source or leave their episodes out."


def _not_finite(column: pl.Expr, kind: str) -> pl.Expr:
    if kind == "number":
        number = column.cast(pl.Float64)
        return number.is_null() | number.is_nan() | number.is_infinite()
    if kind.startswith("numbers"):
        each = column.cast(pl.List(pl.Float64)).list
        return column.is_null() | ~each.sum().is_finite() | each.contains(None)
    return column.is_null()


def _present(contract: Contract) -> list[Rule]:
    """C10: nothing is missing but where the contract says what stands for it."""
    kinds, found = contract.kinds, []
    required = [contract.episode_id, contract.entity, contract.step, contract.terminated, contract.truncated]
    required += [*(c.column for c in contract.action.choices), *contract.action.columns, contract.interval]
    required += [contract.action.column if contract.action.size else None, contract.decided_at, contract.policy_version]
    required += [cost.column for cost in contract.costs]
    required += [contract.action_prob.column if contract.action_prob else None]
    required += [name for name, column in contract.observed() if column.missing is None]
    for name in dict.fromkeys(name for name in required if name):
        found.append(Rule("C10", name, _not_finite(pl.col(name), kinds[name]), MISSING, FILL))
    for name, column in contract.observed():
        if column.missing is not None and kinds[name] == "number":
            found.append(Rule("C10", name, pl.col(name).cast(pl.Float64).is_infinite(), "infinite", FILL))
        elif column.missing is not None and column.size:
            infinite = pl.col(name).cast(pl.List(pl.Float64)).list.eval(pl.element().is_infinite())
            found.append(Rule("C10", name, infinite.list.any(), "infinite", FILL))
    return found


def shown_range(low: float | None, high: float | None) -> str:
    return f"[{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}]"


def _observed(name: str, column: ObservationColumn) -> list[Rule]:
    """C11: labels, codes and numbers lie within the contract."""
    found = []
    if column.labels:
        unknown = pl.col(name).is_not_null() & values.codes(name, column.labels).is_null()
        found.append(Rule("C11", name, unknown, f"holding a label other than {', '.join(map(str, column.labels))}",
                          "correct it or add the label to the contract."))  # fmt: skip
    elif column.n_categories is not None:
        found.append(Rule("C11", name, ~pl.col(name).is_between(0, column.n_categories - 1),
                          f"holding a category outside 0 to {column.n_categories - 1}",
                          "recode it or raise `categories` in the contract."))  # fmt: skip
    elif column.size:
        found.append(Rule("C11", name, pl.col(name).cast(pl.List(pl.Float64)).list.len() != column.size,
                          f"holding a list of other than {column.size} numbers", "pad or cut it at the source."))  # fmt: skip
    if column.range:
        low, high = column.range
        numbers = pl.col(name).cast(pl.List(pl.Float64) if column.size else pl.Float64)
        lowest, highest = (numbers.list.min(), numbers.list.max()) if column.size else (numbers, numbers)
        outside = ~(within(lowest, low, None) & within(highest, None, high)) & lowest.is_not_nan()
        found.append(Rule("C11", name, outside, f"outside the range {shown_range(low, high)}",
                          CORRECT_RANGE))  # fmt: skip
    return found


def _actions(contract: Contract) -> list[Rule]:
    """C13: the action is one of those there are, and was allowed."""
    action, found = contract.action, []
    for choice in action.choices:
        shown = ", ".join(map(str, choice.labels)) if choice.labels else f"0 to {choice.n_values - 1}"
        unknown = pl.col(choice.column).is_not_null() & values.component_code(choice).is_null()
        found.append(Rule("C13", choice.column, unknown, f"holding an action outside {shown}",
                          "recode it or add it to `values` in the contract."))  # fmt: skip
    for name, low, high in zip(action.columns, *action.bounds, strict=False):
        outside = ~within(pl.col(name), low, high) & pl.col(name).cast(pl.Float64).is_finite()
        found.append(Rule("C13", name, outside, f"holding an action outside {shown_range(low, high)}",
                          "correct `low` and `high`, or log the action that was taken."))  # fmt: skip
    if action.size and action.column:
        each = pl.col(action.column).cast(pl.List(pl.Float64)).list
        inside = [
            within(each.get(i, null_on_oob=True), *bounds) for i, bounds in enumerate(zip(*action.bounds, strict=True))
        ]
        outside = (each.len() != action.size) | ~pl.all_horizontal(inside)
        found.append(Rule("C13", action.column, outside.fill_null(False),
                          f"holding an action of other than {action.size} numbers, or outside its bounds",
                          "correct `low` and `high`, or log the action that was taken."))  # fmt: skip
    allowed = values.mask_list(contract)
    if allowed is not None:
        code, n = values.action_code(contract), action.n_actions
        unusable = allowed.is_null() | (allowed.list.len() != n) | allowed.list.contains(None)
        taken = allowed.list.get(code, null_on_oob=True).fill_null(False)
        if action.candidates:
            known = values.action_names(action.choices[0])
            unusable |= pl.col(action.candidates).list.eval(~pl.element().is_in(known).fill_null(False)).list.any()
        found.append(Rule("C13", str(action.mask or action.candidates), unusable | (code.is_not_null() & ~taken),
                          f"holding an action that the mask does not allow, or a mask that is not {n} booleans" if action.mask
                          else "holding an action that is not among the candidates, or candidates that are no actions",
                          f"log the {'mask' if action.mask else 'candidates'} of the decision."))  # fmt: skip
    return found


def _propensities(contract: Contract) -> list[Rule]:
    """C14: propensities are probabilities, or densities."""
    prob = contract.action_prob
    if prob is None:
        return []
    value, column = values.propensity(contract), pl.col(prob.column)
    finite = value.is_finite().fill_null(False)
    if prob.of == "density":
        return [Rule("C14", prob.column, finite & (value <= 0), "with a density that is not above 0",
                     "log the density with which the action was drawn.")]  # fmt: skip
    outside = finite & ~((value > 0) & (value <= 1))
    if prob.of == "action":
        return [Rule("C14", prob.column, outside, "with a propensity outside (0, 1]",
                     "log the probability with which the action was drawn.")]  # fmt: skip
    n, each = contract.action.n_actions, column.cast(pl.List(pl.Float64)).list
    wrong = (each.len() != n) | ((each.sum() - 1).abs() > SUM_TOLERANCE) | (each.min() < 0)
    return [Rule("C14", prob.column, (outside | wrong).fill_null(False), f"without {n} propensities that sum to 1, or with 0 for "
                 "the logged action", "log the whole distribution from which the action was drawn.")]  # fmt: skip


def _rewards(contract: Contract, clock: datetime | None) -> list[Rule]:
    reward, (low, high) = contract.reward, contract.reward.range
    value = values.reward(contract, clock)
    wrong = value.is_nan() | value.is_infinite()
    found = [Rule("C12", reward.name, ~within(value, low, high) & value.is_finite(),
                  f"outside the reward range {shown_range(low, high)}", CORRECT_RANGE)]  # fmt: skip
    if reward.window_hours:
        due = values.window_closed(contract, clock) & value.is_null()
        found += [Rule("C10", reward.name, wrong, MISSING, FILL),
                  Rule("C10", reward.name, due, "without a reward although the time for it is over",
                       "land the rewards, or say in the contract what a `missing` one counts as.", across=True)]  # fmt: skip
    else:
        found.append(Rule("C10", reward.name, wrong | value.is_null(), MISSING, FILL))
    for cost in contract.costs:
        if cost.range:
            column = pl.col(cost.column).cast(pl.Float64)
            found.append(Rule("C12", cost.column, ~within(column, *cost.range) & column.is_finite(),
                              f"outside the range {shown_range(*cost.range)}", CORRECT_RANGE)
                         )  # fmt: skip
    if contract.interval:
        found.append(Rule("C11", contract.interval, pl.col(contract.interval) < 0, "with a negative time between decisions",
                          "log the time until the next decision."))  # fmt: skip
    return found


def _sequence(contract: Contract) -> list[Rule]:
    """C07 and C08: what follows follows. Rows of one episode that lie apart are left to the index."""
    found = []
    episode, step = pl.col(contract.episode_column), pl.col(contract.step_column)
    goes_on = (episode == episode.shift(-1)) & (step + 1 == step.shift(-1))
    for flag in (contract.terminated, contract.truncated):
        goes_on = goes_on & ~pl.col(flag) if flag else goes_on
    if contract.entity:
        goes_on &= pl.col(contract.entity).eq_missing(pl.col(contract.entity).shift(-1))
    for column, following in zip(contract.observation, contract.next_observation or [], strict=False):
        now_seen, said = pl.col(column.column), pl.col(following)
        if column.size:
            kind = pl.List(pl.Float64)
            now_seen, said = now_seen.cast(kind).hash(), said.cast(kind).hash()
        found.append(Rule("C07", following, (goes_on & said.ne_missing(now_seen.shift(-1))).fill_null(False),
                          f"differing from {column.column!r} in the row that follows",
                          "the next observation must be what was observed next."))  # fmt: skip
    if contract.decided_at:
        at = pl.col(contract.decided_at)
        backwards = goes_on.shift(1).fill_null(False) & (at < at.shift(1))
        found.append(Rule("C08", contract.decided_at, backwards, BACKWARDS, CORRECT_CLOCKS))
    return found


def _clocks(contract: Contract, now: datetime | None) -> list[Rule]:
    """C08: nothing is logged before it happened."""
    decided, ingested, arrived, found = contract.decided_at, contract.ingested_at, contract.reward.arrived_at, []
    if decided and now is not None:
        found.append(Rule("C08", decided, pl.col(decided) > now + CLOCK_SKEW, FUTURE, CORRECT_CLOCKS))
    if decided and ingested:
        early = pl.col(decided) > pl.col(ingested) + CLOCK_SKEW
        found.append(Rule("C08", decided, early, "later than their own ingestion", CORRECT_CLOCKS))
    if arrived and now is not None:  # of late rewards, it is what their batch says
        late = pl.col(arrived) > now + CLOCK_SKEW
        found.append(Rule("C08", arrived, late, FUTURE, CORRECT_CLOCKS, across=True))
    if arrived and decided:
        early = pl.col(arrived) + CLOCK_SKEW < pl.col(decided)
        found.append(Rule("C08", arrived, early, EARLY, CORRECT_CLOCKS, across=True))
    return found


def _steps(contract: Contract) -> list[Rule]:
    if contract.step is None:
        return []
    outside = ~pl.col(contract.step).is_between(0, LAST_STEP)
    return [Rule("C04", contract.step, outside, f"with a step outside 0 to {LAST_STEP}", "steps must run 0, 1, 2, ...: "
                 "number the decisions of each episode.")]  # fmt: skip


def rules(contract: Contract, clock: datetime | None = None, now: datetime | None = None) -> list[Rule]:
    """Every row-level rule. `clock` is the latest time in the log, `now` the time at which it is read."""
    found = [*_steps(contract), *_sequence(contract), *_clocks(contract, now)]
    found += [rule for name, column in contract.observed() for rule in _observed(name, column)]
    found += [*_present(contract), *_rewards(contract, clock), *_actions(contract), *_propensities(contract)]
    if contract.policy_version and contract.policy_versions is not None:
        known = pl.col(contract.policy_version).is_in(list(contract.policy_versions))
        found.append(Rule("C17", contract.policy_version, ~known,
                          f"of a policy version other than {', '.join(contract.policy_versions)}",
                          "name the version in the contract if it is right."))  # fmt: skip
    return found


def late_reward_rules(contract: Contract, now: datetime | None, columns: Sequence[str]) -> list[Rule]:
    """The rules of a batch of rewards with these columns, joined by key to the decisions: `_known` is null where there is none."""
    name, keys, bounds = contract.reward.name, contract.reward_keys, contract.reward.range
    value, told = values.reward_sum(contract), pl.struct(list(contract.reward.terms))
    unlike_first = told != told.first().over(keys)
    usable = pl.col("_known").is_not_null() & value.is_finite()
    contradicts = pl.any_horizontal(pl.col(n).ne_missing(pl.col(f"{n}_known")) for n in contract.reward.terms)
    other, once = "with another reward than the one known", "a reward is logged once: correct the one that is wrong."
    found = [
        Rule("C31", keys[0], pl.col("_known").is_null(), "with a reward for a decision that no batch has",
             "land its decisions first, or correct the key."),
        Rule("C03", name, usable & unlike_first, other, once),
        Rule("C03", name, usable & contradicts & ~unlike_first, other, once, across=True),
        Rule("C10", name, ~value.is_finite() | value.is_null(), MISSING, "leave out rewards that have not come."),
        Rule("C12", name, usable & ~within(value, *bounds), f"outside the reward range {shown_range(*bounds)}", CORRECT_RANGE),
    ]  # fmt: skip
    arrived = contract.reward.arrived_at
    if arrived and arrived in columns and now is not None:
        found.append(Rule("C08", arrived, pl.col(arrived) > now + CLOCK_SKEW, FUTURE, CORRECT_CLOCKS))
    if arrived and arrived in columns and contract.decided_at:
        early = pl.col(arrived) + CLOCK_SKEW < pl.col(contract.decided_at)
        found.append(Rule("C08", arrived, early, EARLY, CORRECT_CLOCKS))
    return found
