"""Rules that rows break: every one is told in a sentence with the file, the column, the rows, the first row and the remedy."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from offrl_models.logs.coverage import measure
from offrl_models.logs.read import Log
from offrl_models.logs.rules import rules
from offrl_models.logs.screen import screen
from tests.hand_made import GATE, INF, MASKED, NAN, PAIRS, TRAIN, VECTOR, Columns, acting, day, log_of, observing

LABELED = acting(column="a", values=["no", "yes"], candidates="c")
WORDS: Columns = {"a": ["no", "yes", "yes", "no"], "c": [["no"], ["no", "yes"], ["yes"], ["no"]]}
LIST = acting(column="a", size=2, low=0, high=[1, 0.5])
TIMED: dict[str, Any] = {"decided_at": "at", "ingested_at": "in"}
AT: Columns = {"at": [day(1), day(2), day(3), day(4)], "in": [day(5)] * 4}
WINDOW = {"decided_at": "at", "reward": {"column": "r", "range": [0, 1], "window_hours": 24, "arrived_at": "came"}}
CAME: Columns = {"at": AT["at"], "came": [day(3), day(3), day(3), day(4)]}
FILL = "fill them at the source or leave their episodes out."
RANGE = "correct them or the range in the contract."
CLOCKS = "correct the clocks, the times or the steps."
TRIPPED: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "null id": (
        {},
        {"id": pa.array([TRAIN, TRAIN, None, GATE])},
        f"column 'id' has 1 row missing, NaN or infinite (C10), row 2; {FILL}",
    ),
    "null step": (
        {},
        {"t": pa.array([0, 1, 0, None])},
        f"column 't' has 1 row missing, NaN or infinite (C10), row 3; {FILL}",
    ),
    "NaN": (
        {},
        {"x": [0.5, NAN, INF, None]},
        f"column 'x' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "NaN in a list": (
        observing(size=2),
        {"x": [[1.0, 2.0], [NAN, 0.0], [1.0, None], None]},
        f"column 'x' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "null action": (
        {},
        {"a": pa.array([0, None, 1, 0])},
        f"column 'a' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "NaN action": (
        VECTOR,
        {"b": [0.0, NAN, 0.0, 0.0]},
        f"column 'b' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "null end": (
        {},
        {"end": [False, True, None, True]},
        f"column 'end' has 1 row missing, NaN or infinite (C10), row 2; {FILL}",
    ),
    "infinity where some may miss": (
        observing(missing=0),
        {"x": [0.5, None, -INF, NAN]},
        f"column 'x' has 1 row infinite (C10), row 2; {FILL}",
    ),
    "infinity in a list where some may miss": (
        observing(size=2, missing=0),
        {"x": [[NAN, INF], None, [None, 1.0], [1.0, 1.0]]},
        f"column 'x' has 1 row infinite (C10), row 0; {FILL}",
    ),
    "category": (
        observing(categories=2),
        {"x": [0, 1, 2, -1]},
        (
            "column 'x' has 2 rows holding a category outside 0 to 1 (C11), the first is row 2; recode it or "
            "raise `categories` in the contract."
        ),
    ),
    "label": (
        observing(categories=["u", "v"]),
        {"x": ["u", "v", "u", "U"]},
        (
            "column 'x' has 1 row holding a label other than u, v (C11), row 3; correct it or add the label to "
            "the contract."
        ),
    ),
    "length of a list": (
        observing(size=2),
        {"x": [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [1.0, 2.0]]},
        (
            "column 'x' has 2 rows holding a list of other than 2 numbers (C11), the first is row 1; pad or cut "
            "it at the source."
        ),
    ),
    "range": (
        observing(range=[0, 3]),
        {"x": [0.0, 3.0, 3.5, -0.5]},
        f"column 'x' has 2 rows outside the range [0, 3] (C11), the first is row 2; {RANGE}",
    ),
    "half a range": (
        observing(range=[None, 3], missing=0),
        {"x": [-9.0, None, NAN, 3.5]},
        f"column 'x' has 1 row outside the range [-inf, 3] (C11), row 3; {RANGE}",
    ),
    "range of a list": (
        observing(range=[0, 3], size=2),
        {"x": [[0.0, 3.0], [-1.0, 4.0], [1.0, 3.5], [0.0, 0.0]]},
        f"column 'x' has 2 rows outside the range [0, 3] (C11), the first is row 1; {RANGE}",
    ),
    "interval": (
        {"interval": "i"},
        {"i": [1, 0, -1, 2]},
        (
            "column 'i' has 1 row with a negative time between decisions (C11), row 2; log the time until the "
            "next decision."
        ),
    ),
    "action": (
        {},
        {"a": [0, 1, 2, -1]},
        (
            "column 'a' has 2 rows holding an action outside 0 to 1 (C13), the first is row 2; recode it or add "
            "it to `values` in the contract."
        ),
    ),
    "label of an action": (
        LABELED,
        {"a": ["no", "yes", "yes", "No"]},
        (
            "column 'a' has 1 row holding an action outside no, yes (C13), row 3; recode it or add it to `values`"
            " in the contract."
        ),
    ),
    "action beyond its bounds": (
        VECTOR,
        {"a": [0.0, 1.0, 0.5, 1.5], "b": [-1.0, 0.5, 0.0, 0.0]},
        (
            "column 'a' has 1 row holding an action outside [0, 1] (C13), row 3; correct `low` and `high`, "
            "or log the action that was taken."
        ),
    ),
    "second number beyond its bounds": (
        VECTOR,
        {"b": [-1.5, 0.5, 0.75, 0.0]},
        (
            "column 'b' has 2 rows holding an action outside [-1, 0.5] (C13), the first is row 0; correct "
            "`low` and `high`, or log the action that was taken."
        ),
    ),
    "list of an action": (
        LIST,
        {"a": [[0.0, 0.5], [1.0, 0.75], [0.0], [0.0, 0.0, 0.0]]},
        (
            "column 'a' has 3 rows holding an action of other than 2 numbers, or outside its bounds (C13), the "
            "first is row 1; correct `low` and `high`, or log the action that was taken."
        ),
    ),
    "mask": (
        MASKED,
        {"m": [[False, True], None, [True], [True, None]]},
        (
            "column 'm' has 4 rows holding an action that the mask does not allow, or a mask that is not 2 "
            "booleans (C13), the first is row 0; log the mask of the decision."
        ),
    ),
    "candidates": (
        LABELED,
        {"c": [["yes"], ["yes", "maybe"], None, ["no", None]]},
        (
            "column 'c' has 4 rows holding an action that is not among the candidates, or candidates that are no "
            "actions (C13), the first is row 0; log the candidates of the decision."
        ),
    ),
    "propensity": (
        {"action_prob": "p"},
        {"p": [0.0, 1.0, 1.5, -0.5]},
        (
            "column 'p' has 3 rows with a propensity outside (0, 1] (C14), the first is row 0; log the "
            "probability with which the action was drawn."
        ),
    ),
    "null propensity": (
        {"action_prob": "p"},
        {"p": [NAN, 1.0, None, 0.5]},
        f"column 'p' has 2 rows missing, NaN or infinite (C10), the first is row 0; {FILL}",
    ),
    "density": (
        {**VECTOR, "action_prob": {"column": "p", "of": "density"}},
        {"p": [0.0, 7.5, 1.5, -0.5], "b": [0.0] * 4},
        (
            "column 'p' has 2 rows with a density that is not above 0 (C14), the first is row 0; log the density "
            "with which the action was drawn."
        ),
    ),
    "vector of propensities": (
        {"action_prob": {"column": "p", "of": "vector"}},
        {"p": [[0.5, 0.4], [0.5, 0.25, 0.25], [1.0, 0.0], [1.5, -0.5]]},
        (
            "column 'p' has 4 rows without 2 propensities that sum to 1, or with 0 for the logged action (C14), "
            "the first is row 0; log the whole distribution from which the action was drawn."
        ),
    ),
    "reward": (
        {},
        {"r": [0.0, 1.0, 1.5, -0.5]},
        f"column 'r' has 2 rows outside the reward range [0, 1] (C12), the first is row 2; {RANGE}",
    ),
    "sum of rewards": (
        {"reward": {"weights": {"r": 1, "s": 2}, "range": [0, 3]}},
        {"s": [0.0, 1.5, 1.0, 1.0]},
        f"column 'r' has 1 row outside the reward range [0, 3] (C12), row 1; {RANGE}",
    ),
    "null reward": (
        {},
        {"r": [0.0, None, NAN, INF]},
        f"column 'r' has 3 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "null term": (
        {"reward": {"weights": {"r": 1, "s": 2}, "range": [0, 3]}},
        {"s": [0.0, None, 1.0, 1.0]},
        f"column 'r' has 1 row missing, NaN or infinite (C10), row 1; {FILL}",
    ),
    "cost": (
        {"costs": [{"column": "c", "range": [0, 2]}]},
        {"c": [0, 2, 3, -1]},
        f"column 'c' has 2 rows outside the range [0, 2] (C12), the first is row 2; {RANGE}",
    ),
    "null cost": (
        {"costs": ["c"]},
        {"c": [0.0, None, 1.0, INF]},
        f"column 'c' has 2 rows missing, NaN or infinite (C10), the first is row 1; {FILL}",
    ),
    "policy": (
        {"policy_version": "v", "policy_versions": ["1", "2"]},
        {"v": ["1", "3", "2", "4"]},
        (
            "column 'v' has 2 rows of a policy version other than 1, 2 (C17), the first is row 1; name the "
            "version in the contract if it is right."
        ),
    ),
    "next observation": (
        {"next_observation": ["y"]},
        {"y": [1.25, 0.0, 0.0, 0.0]},
        (
            "column 'y' has 1 row differing from 'x' in the row that follows (C07), row 0; the next observation "
            "must be what was observed next."
        ),
    ),
    "next list": (
        {**observing(size=2), "next_observation": ["y"]},
        {"x": PAIRS, "y": [[3.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]},
        (
            "column 'y' has 1 row differing from 'x' in the row that follows (C07), row 0; the next observation "
            "must be what was observed next."
        ),
    ),
    "backwards": (
        TIMED,
        {"at": [day(2), day(1), day(3), day(4)]},
        f"column 'at' has 1 row earlier than the decision before it in the episode (C08), row 1; {CLOCKS}",
    ),
    "ingested early": (
        TIMED,
        {"in": [day(5), day(2), day(3) - timedelta(minutes=6), day(4) - timedelta(minutes=5)]},
        f"column 'at' has 1 row later than their own ingestion (C08), row 2; {CLOCKS}",
    ),
    "future": (
        TIMED,
        {"at": [day(1), day(2), day(3), day(9)], "in": [day(9)] * 4},
        f"column 'at' has 1 row later than the present (C08), row 3; {CLOCKS}",
    ),
    "future reward": (
        WINDOW,
        {"came": [day(3), None, day(9), day(4)]},
        f"column 'came' has 1 row later than the present (C08), row 2; {CLOCKS}",
    ),
    "early reward": (
        WINDOW,
        {"came": [day(3), None, day(3), day(1)]},
        f"column 'came' has 1 row earlier than the decision that they reward (C08), row 3; {CLOCKS}",
    ),
    "no reward in time": (
        WINDOW,
        {"r": [0.0, None, None, None], "came": [day(3), None, None, None]},
        (
            "column 'r' has 2 rows without a reward although the time for it is over (C10), the first is row 1; "
            "land the rewards, or say in the contract what a `missing` one counts as."
        ),
    ),
    "NaN reward in time": (
        WINDOW,
        {"r": [0.0, None, None, NAN], "came": [day(4), None, None, None], "at": [day(4)] * 4},
        f"column 'r' has 1 row missing, NaN or infinite (C10), row 3; {FILL}",
    ),
    "step below 0": (
        {},
        {"t": [0, 1, -1, 0]},
        (
            "column 't' has 1 row with a step outside 0 to 2147483646 (C04), row 2; steps must run 0, 1, 2, ...: "
            "number the decisions of each episode."
        ),
    ),
    "gap": (
        {},
        {"t": [0, 2, 1, 0]},
        (
            "column 't' has 2 rows following a gap in the steps of its episode (C04), the first is row 1; steps "
            "must run 0, 1, 2, ...: add the missing decisions or leave the episode out."
        ),
    ),
    "early end": (
        {},
        {"end": [True, True, True, False]},
        (
            "column 'end' has 1 row ending an episode wrongly (C05), row 0; only the last row of an episode may "
            "be terminated or truncated, and not both: correct the flags."
        ),
    ),
    "both ends": (
        {"truncated": "cut"},
        {"cut": [False, False, True, False]},
        (
            "column 'end' has 1 row ending an episode wrongly (C05), row 2; only the last row of an episode may "
            "be terminated or truncated, and not both: correct the flags."
        ),
    ),
    "contradiction": (
        {},
        {"t": [0, 0, 0, 0], "end": [False, False, True, True]},
        (
            "column 't' has 1 row contradicting another row of the same episode and step (C03), row 1; keep one "
            "row for each decision."
        ),
    ),
    "entity": (
        {"entity": "who"},
        {"who": [1, 2, 3, 4]},
        (
            "column 'who' has 1 row belonging to another entity than their episode (C27), row 1; an episode "
            "belongs to one entity: correct its id."
        ),
    ),
}
PRESENT = day(5)
DEFAULTS: Columns = {**AT, **CAME, "p": [0.5] * 4, "b": [0.0] * 4, "m": [[True, True]] * 4, "c": [1.0] * 4}


def tripped(folder: Path, name: str) -> Log:
    roles, columns, _ = TRIPPED[name]
    more = WORDS if roles is LABELED else {"a": [[0.5, 0.5]] * 4} if roles is LIST else {}
    return log_of(folder, roles, {**DEFAULTS, **more, **columns})


@pytest.mark.parametrize("name", TRIPPED)
def test_a_broken_rule_is_one_sentence_with_file_column_rows_first_row_and_remedy(tmp_path: Path, name: str) -> None:
    sentence = TRIPPED[name][2]
    found = screen(tripped(tmp_path, name), PRESENT)
    file = tmp_path / "b0.parquet"
    assert found.violations[0].sentence("b0.parquet") == f"b0.parquet: {sentence}"
    assert found.reasons()[file][0] == f"{file}: {sentence}"
    assert found.broken["rows"].to_list() == [4]
    counted = sum(found.broken.row(0)[2:])
    assert counted == sum(violation.rows for violation in found.violations)


def test_every_rule_of_these_contracts_is_tripped_by_one_of_these_logs(tmp_path: Path) -> None:
    known, broken = set(), set()
    for number, name in enumerate(TRIPPED):
        log = tripped(tmp_path / str(number), name)
        known |= {(rule.check, rule.problem) for rule in rules(log.contract, PRESENT, PRESENT)}
        broken |= {(violation.check, violation.problem) for violation in screen(log, PRESENT).violations}
    assert known <= broken


def test_a_log_in_which_no_reward_says_when_it_came_is_measured(tmp_path: Path) -> None:
    columns = {"at": AT["at"], "came": pa.nulls(4, pa.timestamp("us"))}
    assert "C31" not in measure(log_of(tmp_path, WINDOW, columns)).derived
