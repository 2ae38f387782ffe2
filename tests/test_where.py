"""Where a policy differs from another, in words that a person would use."""

import dataclasses

import numpy as np
import pytest

from offrl_models.choices import Probabilities, shares
from offrl_models.logs.contract import Contract
from offrl_models.logs.roles import ActionColumns
from offrl_models.reports.where import where_apart
from offrl_models.schema import Episodes, Feature
from tests.conftest import attributes


def log(columns: list[np.ndarray], features: list[Feature]) -> Episodes:
    n = len(columns[0])
    return Episodes(
        episode_id=np.arange(n), offsets=np.arange(n + 1), observation=np.stack(columns, 1).astype(np.float32),
        final_observation=np.zeros((n, len(columns)), np.float32), action=np.zeros(n, np.int64), reward=np.zeros(n),
        terminated=np.ones(n, bool), truncated=np.zeros(n, bool), mask=np.ones((n, 2), bool), action_prob=np.full(n, 0.5),
        gamma=1.0, features=tuple(features),
    )  # fmt: skip


def test_where_a_policy_differs_is_told_by_value() -> None:
    """Decisions differ in ward 2 and where the patient is old; nowhere else."""
    rng = np.random.default_rng(0)
    ward, age = rng.integers(0, 4, size=4000).astype(float), rng.uniform(0, 100, size=4000)
    episodes = log([ward, age], [Feature("ward", 4), Feature("age")])
    places = where_apart(episodes, (ward == 2).astype(float), 8)
    assert places[0].where == "ward = 2" and places[0].differs == 1.0
    assert places[0].decisions == pytest.approx((ward == 2).mean()) and all("ward" not in p.where for p in places[1:])
    old = where_apart(episodes, (age > np.quantile(age, 0.75)).astype(float), 2)[0]
    assert old.where.startswith("age from 7") and old.differs > 0.99 and old.decisions == pytest.approx(0.25, abs=0.01)
    assert len(where_apart(episodes, rng.random(4000), 3)) <= 3


def test_categories_and_actions_are_called_by_their_names() -> None:
    ward = {"column": "ward", "categories": ["icu", "er", "home"], "missing": "category"}
    contract = Contract.model_validate(
        attributes(10, 3)["logs"] | {"observation": ["age", ward], "next_observation": None,
                                     "action": {"column": "drug", "values": ["none", "low", "high"]}}
    )  # fmt: skip
    assert contract.category_names == {"ward": ("icu", "er", "home", "missing")}
    seen = log([np.zeros(200), np.arange(200) % 4.0], [*contract.features])
    places = where_apart(seen, (seen.observation[:, 1] >= 2).astype(float), 8, contract.category_names)
    assert [place.where for place in places] == ["ward = home", "ward = missing"]
    names = contract.action.action_names
    assert names == ("none", "low", "high")
    three = dataclasses.replace(seen, mask=np.ones((200, 3), bool))
    mine, theirs = (Probabilities(three, np.tile(row, (200, 1))) for row in ([0.1, 0.25, 0.65], [0.5, 0.2, 0.3]))
    found = [(share.action, share.policy, share.champion) for share in shares(mine, theirs, 2, names)]
    assert found == [
        ("none", pytest.approx(0.1), pytest.approx(0.5)),
        ("high", pytest.approx(0.65), pytest.approx(0.3)),
    ]
    assert [share.action for share in shares(mine, theirs, 2)] == ["0", "2"]
    both = ActionColumns.model_validate(
        {"components": [{"column": "dose", "values": 2}, {"column": "way", "values": ["oral", "iv"]}]}
    )
    assert both.action_names == ("dose 0, way oral", "dose 0, way iv", "dose 1, way oral", "dose 1, way iv")
    assert ActionColumns(column="a", values=3).action_names is None
    assert ActionColumns(column="a", size=2, low=0.0, high=1.0).action_names is None


def test_what_is_missing_or_always_the_same_is_a_place_too() -> None:
    rng, value = np.random.default_rng(0), np.where(np.arange(400) % 4 == 0, np.nan, 7.0)
    episodes = log([value], [Feature("lactate", missing="mean")])
    (place,) = where_apart(episodes, np.isnan(value).astype(float), 8)
    assert (place.where, place.decisions, place.differs) == ("lactate missing", 0.25, 1.0)
    (rest,) = where_apart(episodes, np.isfinite(value).astype(float), 8)
    assert rest.where == "lactate = 7" and rest.differs == 1.0
    sparse = np.where(np.arange(400) % 5 == 0, rng.uniform(1, 9, size=400), 0.0)  # a dose that is mostly 0
    dose = where_apart(log([sparse], [Feature("dose")]), (sparse == 0).astype(float), 8)
    assert [(place.where, place.differs) for place in dose] == [("dose = 0", 1.0)]
    level = rng.integers(0, 4, size=400).astype(float)
    (third,) = where_apart(log([level], [Feature("level")]), (level == 3).astype(float), 8)
    assert (third.where, third.differs) == ("level = 3", 1.0)
    few = log([np.arange(400) % 40 * 1.0], [Feature("ward", 40)])  # 10 decisions each
    assert where_apart(few, (np.arange(400) % 40 == 3).astype(float), 8) == []
