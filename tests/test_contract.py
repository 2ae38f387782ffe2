"""Contracts that cannot be: every mistake is refused in one sentence."""

from typing import Any

import pytest

from offrl_models.logs.contract import Contract
from offrl_models.schema import InputError
from tests.hand_made import BANDIT, INF, ROLES, VECTOR, acting, contract_of, observing

# --- contracts that cannot be -----------------------------------------------------------------------------------------

SHAPES = "give the action as one of: column and values; components; columns, low and high; column, size, low and high"
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": ({"obsrvation": ["x"]}, "logs: unknown key 'obsrvation': did you mean 'observation'?"),
    "a misspelt key of an observation": (
        observing(categorys=3),
        "logs.observation.0: unknown key 'categorys': did you mean 'categories'?",
    ),
    "a misspelt key of the action": (
        acting(colunm="a", values=2),
        "logs.action: unknown key 'colunm': did you mean 'column'?",
    ),
    "a misspelt key of a component": (
        acting(components=[{"column": "a", "valus": 2}]),
        "logs.action.components.0: unknown key 'valus': did you mean 'values'?",
    ),
    "a misspelt key of the reward": (
        {"reward": {"column": "r", "rnge": [0, 1]}},
        "logs.reward: unknown key 'rnge': did you mean 'range'?",
    ),
    "a misspelt key of a cost": (
        {"costs": [{"column": "c", "rang": [0, 1]}]},
        "logs.costs.0: unknown key 'rang': did you mean 'range'?",
    ),
    "a misspelt key of the propensity": (
        {"action_prob": {"column": "p", "off": "vector"}},
        "logs.action_prob: unknown key 'off': did you mean 'of'?",
    ),
    "a key like no other": (
        {"reward": {"column": "r", "qq": 1}},
        (
            "logs.reward: unknown key 'qq': known keys are arrived_at, column, missing, range, unit, weights, "
            "window_hours."
        ),
    ),
    "boolean labels": (
        observing(categories=["no", False]),
        ("logs.observation.0.categories: False is no label: labels are text or whole numbers, so put quotes around it"),
    ),
    "labels of half numbers": (
        observing(ordered=[1.5]),
        ("logs.observation.0.ordered: 1.5 is no label: labels are text or whole numbers, so put quotes around it"),
    ),
    "boolean actions": (
        acting(column="a", values=[True, False]),
        "logs.action.values: True is no label: labels are text or whole numbers, so put quotes around it",
    ),
    "an unknown stand-in": (
        observing(missing="median"),
        ("logs.observation.0.missing: 'median' cannot stand for a missing value: give a number, 'mean' or 'category'"),
    ),
    "two kinds at once": (
        observing(categories=3, timestamp=True),
        "logs.observation.0: 'x' cannot be categories and timestamp at once; keep one",
    ),
    "an order in a list": (
        observing(ordered=["a"], size=3),
        "logs.observation.0: 'x' cannot be ordered and size at once; keep one",
    ),
    "no category": (observing(categories=0), "logs.observation.0: 'x' needs at least one category"),
    "fewer than no category": (observing(categories=-2), "logs.observation.0: 'x' needs at least one category"),
    "no label": (observing(categories=[]), "logs.observation.0: 'x' needs at least one category"),
    "an empty order": (observing(ordered=[]), "logs.observation.0: 'x' needs at least one category"),
    "a label twice": (observing(categories=["a", "b", "a"]), "logs.observation.0: 'x' names a label twice"),
    "a label twice as text": (observing(ordered=[1, "1"]), "logs.observation.0: 'x' names a label twice"),
    "a category for a missing number": (
        observing(missing="category"),
        "logs.observation.0: missing: category needs `categories`; give 'x' a number or 'mean'",
    ),
    "a number for a missing category": (
        observing(categories=3, missing=0),
        "logs.observation.0: 'x' has categories: a missing one is `missing: category`",
    ),
    "a range of labels": (
        observing(categories=3, range=[0, 1]),
        "logs.observation.0: 'x' is no number, so it has no range; leave it out",
    ),
    "a range of times": (
        observing(timestamp=True, range=[0, 1]),
        "logs.observation.0: 'x' is no number, so it has no range; leave it out",
    ),
    "an empty range": (
        observing(range=[1, 1]),
        "logs.observation.0: the range of 'x' [1.0, 1.0] must have its lower end below its upper end",
    ),
    "a range without end": (observing(range=[0, INF]), "logs.observation.0.range.1: Input should be a finite number"),
    "a list of nothing": (observing(size=0), "logs.observation.0.size: Input should be greater than or equal to 1"),
    "nothing observed": (
        {"observation": []},
        "logs.observation: List should have at least 1 item after validation, not 0",
    ),
    "too many categories": (
        observing(categories=2**24 + 1),
        "logs: column 'x' has over 16,777,216 categories; group them first",
    ),
    "one action": (
        acting(column="a", values=1),
        "logs.action: the action 'a' needs at least two different values, and 100,000 at most",
    ),
    "an action twice": (
        acting(column="a", values=["x", "x"]),
        "logs.action: the action 'a' needs at least two different values, and 100,000 at most",
    ),
    "one action in a component": (
        acting(components=[{"column": "a", "values": 1}]),
        "logs.action.components.0: the action 'a' needs at least two different values, and 100,000 at most",
    ),
    "no values": (acting(column="a"), f"logs.action: {SHAPES}"),
    "values and a size": (acting(column="a", values=2, size=2, low=0, high=1), f"logs.action: {SHAPES}"),
    "values beside components": (acting(components=[{"column": "a", "values": 2}], values=3), f"logs.action: {SHAPES}"),
    "one column and several": (acting(columns=["a"], column="b", low=0, high=1), f"logs.action: {SHAPES}"),
    "a column of the action twice": (
        acting(columns=["a", "a"], low=0, high=1),
        "logs.action: the action names a column twice",
    ),
    "a component twice": (
        acting(components=[{"column": "a", "values": 2}] * 2),
        "logs.action: the action names a column twice",
    ),
    "no bounds": (
        acting(columns=["a"], low=0),
        "logs.action: a continuous action needs `low` and `high`: a number each, or one per dimension",
    ),
    "bounds of other dimensions": (
        acting(columns=["a", "b"], low=[0, 0, 0], high=1),
        "logs.action: a continuous action needs `low` and `high`: a number each, or one per dimension",
    ),
    "bounds that cross": (
        acting(columns=["a", "b"], low=[0, 2], high=1),
        "logs.action: every `low` of the action must lie below its `high`",
    ),
    "bounds without end": (
        acting(columns=["a"], low=0, high=[INF]),
        "logs.action.high.float: Input should be a valid number",
    ),
    "a mask of numbers": (
        acting(columns=["a"], low=0, high=1, mask="m"),
        "logs.action: a continuous action has bounds; a mask or candidates are for discrete ones",
    ),
    "bounds of codes": (
        acting(column="a", values=2, low=0),
        "logs.action: `low` and `high` are for continuous actions; a discrete one has `values`",
    ),
    "a mask and candidates": (
        acting(column="a", values=2, mask="m", candidates="c"),
        "logs.action: give either the mask or the candidates of the action, not both",
    ),
    "candidates of a joint action": (
        acting(components=[{"column": "a", "values": 2}], candidates="c"),
        "logs.action: candidates are of an action in one column; give a joint action a mask",
    ),
    "a probability of numbers": (
        {**VECTOR, "action_prob": "p"},
        "logs: the propensity of this kind of action is `of: density`",
    ),
    "a density of codes": (
        {"action_prob": {"column": "p", "of": "density"}},
        "logs: the propensity of this kind of action is `of: action or vector`",
    ),
    "no reward": (
        {"reward": {"range": [0, 1]}},
        "logs.reward: give the reward either as `column` or as `weights` (column: weight)",
    ),
    "a reward in two ways": (
        {"reward": {"column": "r", "weights": {"r": 1}, "range": [0, 1]}},
        "logs.reward: give the reward either as `column` or as `weights` (column: weight)",
    ),
    "a reward without a range": ({"reward": {"column": "r"}}, "logs.reward.range: Field required"),
    "a reward range that crosses": (
        {"reward": {"column": "r", "range": [1, 0]}},
        "logs.reward: the reward range [1.0, 0.0] must have its lower end below its upper end",
    ),
    "a missing reward out of range": (
        {"reward": {"column": "r", "range": [0, 1], "missing": -1}},
        "logs.reward: a missing reward counts as -1, outside the range [0.0, 1.0]",
    ),
    "a window of no time": (
        {"reward": {"column": "r", "range": [0, 1], "window_hours": 0}},
        "logs.reward.window_hours: Input should be greater than 0",
    ),
    "a window without times": (
        {"reward": {"column": "r", "range": [0, 1], "window_hours": 2}},
        "logs: a reward window needs decided_at, and an episode_id by which late rewards find their row",
    ),
    "a cost range that crosses": (
        {"costs": [{"column": "c", "range": [2, 1]}]},
        "logs.costs.0: the range of 'c' [2.0, 1.0] must have its lower end below its upper end",
    ),
    "an unknown format": ({"format": "parket"}, "logs.format: unknown format 'parket': did you mean 'parquet'?"),
    "a source elsewhere": (
        {"source": "/data"},
        "logs.source: '/data' must be a folder inside the project, relative to it",
    ),
    "a source outside": (
        {"source": "../data"},
        "logs.source: '../data' must be a folder inside the project, relative to it",
    ),
    "no source": ({"source": "."}, "logs.source: '.' must be a folder inside the project, relative to it"),
    "a bandit with steps": (
        {"horizon": 1},
        "logs: with horizon 1 every row is an episode, so there is no step; leave it out",
    ),
    "a bandit with ends": (
        {"horizon": 1, "step": None},
        "logs: with horizon 1 every row is an episode, so there is no terminated; leave it out",
    ),
    "a bandit with a next observation": (
        {**BANDIT, "next_observation": ["y"]},
        "logs: with horizon 1 every row is an episode, so there is no next_observation; leave it out",
    ),
    "a longer horizon": ({"horizon": 2}, "logs.horizon: Input should be less than or equal to 1"),
    "no id": (
        {"episode_id": None},
        "logs: name the column of the episode_id, or write `horizon: 1` when every row stands alone",
    ),
    "no order": (
        {"step": None},
        "logs: name the column of the step, or of decided_at to order the rows by; or write `horizon: 1` when every row "
        "stands alone",
    ),
    "no end": (
        {"terminated": None},
        "logs: name the column that says that an episode terminated, or that it was truncated",
    ),
    "a next observation too many": (
        {"next_observation": ["y", "z"]},
        (
            "logs: next_observation names 2 columns and observation 1; give one next column for each observed "
            "column, in the same order"
        ),
    ),
    "a next observation that is the present one": (
        {"next_observation": ["x"]},
        "logs: column 'x' is named twice in one role; name it once",
    ),
    "a column observed twice": (
        {"observation": ["x", "x"]},
        "logs: column 'x' is named twice in one role; name it once",
    ),
    "a cost twice": ({"costs": ["c", "c"]}, "logs: column 'c' is named twice in one role; name it once"),
    "a subgroup twice": ({"subgroups": ["g", "g"]}, "logs: column 'g' is named twice in one role; name it once"),
    "versions without a column": (
        {"policy_versions": ["1"]},
        "logs: policy_versions are those of a column; name it as policy_version",
    ),
    "two kinds of a column": (
        {"reward": {"column": "end", "range": [0, 1]}},
        "logs: column 'end' cannot be the reward (number) and terminated (boolean) at once",
    ),
    "a time as a number": (
        {**observing(timestamp=True), "interval": "x"},
        "logs: column 'x' cannot be the observation (time) and the interval (number) at once",
    ),
    "no discount": ({"gamma": None}, "logs.gamma: Field required"),
    "a discount of nothing": ({"gamma": 0}, "logs.gamma: Input should be greater than 0"),
    "a discount beyond 1": ({"gamma": 1.5}, "logs.gamma: Input should be less than or equal to 1"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_contract_that_cannot_be_is_refused_in_one_sentence(name: str) -> None:
    roles, sentence = IMPOSSIBLE[name]
    with pytest.raises(InputError) as refusal:
        contract_of(**roles)
    assert str(refusal.value) == f"toy: {sentence}"


def test_formats_with_a_layout_of_their_own_name_its_columns() -> None:
    plain: dict[str, Any] = {
        "source": "data/toy/raw",
        "observation": ["x"],
        "action": ROLES["action"],
        "gamma": 1.0,
        "reward": {"range": [0, 1]},
    }
    found = Contract(**plain, format="d4rl")
    assert (found.episode_id, found.step, found.terminated, found.truncated) == (
        "episode_id",
        "step",
        "terminated",
        "truncated",
    )
    assert found.reward.column == "reward" and found.next_observation is None
    assert Contract(**plain, format="minari").next_observation == ["next_observation"]
    named = Contract(**plain, format="d3rlpy", episode_id="stay")
    assert named.episode_id == "stay"
    assert found.numbers_episodes_by_batch and not named.numbers_episodes_by_batch
    assert not Contract(**plain | ROLES).numbers_episodes_by_batch
    click: dict[str, Any] = plain | {"reward": {"column": "click", "range": [0, 1]}}
    assert Contract(**click, format="open_bandit").horizon == 1
