"""Rows become episodes: what orders them, what repeats or contradicts another row, and where an episode ends."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from offrl_models import storage
from offrl_models.datasets.cut import UNCUT, Cut, read_cut, write_cut
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.logs.contract import Contract
from offrl_models.logs.index import index
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from tests.hand_made import (
    BANDIT,
    GATE,
    LOG,
    NAN,
    PAIRS,
    SELECTION,
    TRAIN,
    Columns,
    contract_of,
    dataset,
    day,
    log_of,
    numbers,
    write,
)

# --- rows to episodes -------------------------------------------------------------------------------------------------


def test_without_a_step_the_order_is_that_of_time(tmp_path: Path) -> None:
    at = [day(3), day(1), day(0), day(2)]
    episodes = dataset(tmp_path, {"step": None, "decided_at": "at"}, {"at": at, "end": [True, False, True, True]})
    assert episodes.observation.ravel().tolist() == [1.5, 0.5, 2.5, 3.5]
    assert episodes.length.tolist() == [2, 1, 1]


def test_without_a_step_a_time_is_one_decision(tmp_path: Path) -> None:
    """An exact repetition counts once. Of two rows that differ nobody knows which came first, nor whether both did."""
    roles = {"step": None, "decided_at": "at"}
    one = {
        "id": [TRAIN] * 3,
        "at": [day(1)] * 3,
        "x": [3.0] * 3,
        "a": [0] * 3,
        "r": [0.0] * 3,
        "end": [False] * 3,
        "t": [0] * 3,
    }
    last = {
        **LOG,
        "at": [day(2)] * 4,
        "id": [TRAIN, 10_000, SELECTION, GATE],
        "end": [True, True, True, True],
        "x": [4.0, 5.0, 6.0, 7.0],
    }
    episodes = dataset(tmp_path, roles, one, one, last)
    assert sorted(episodes.observation.ravel().tolist()) == [3.0, 4.0, 5.0, 6.0, 7.0]
    found = screen(log_of(tmp_path, roles, one, one, last)).index
    assert found.duplicates == {0: 2, 1: 3} and sum(found.rows.values()) == 10
    for batches, blamed, rows in (
        ([one | {"x": [3.0, 1.0, 3.0]}, last], 0, 1),
        ([one, one | {"x": [1.0] * 3}, last], 1, 3),
    ):
        (found,) = screen(log_of(tmp_path, roles, *batches)).violations
        assert (found.check, found.column, found.batch, found.rows) == ("C03", "at", blamed, rows)
        assert (
            found.problem == "contradicting another row of the same episode and time" and "log a step" in found.remedy
        )


def test_a_bandit_log_with_ids(tmp_path: Path) -> None:
    columns = {"id": [GATE, TRAIN, SELECTION, 10_000], "t": None}
    episodes = dataset(tmp_path, BANDIT, {name: c for name, c in {**LOG, **columns}.items() if c is not None})
    assert sorted(episodes.episode_id.tolist()) == sorted([GATE, TRAIN, SELECTION, 10_000])
    assert episodes.n_rows == 4 and episodes.terminated.all() and not episodes.truncated.any()
    assert not episodes.final_observation.any() and not episodes.discount.any()
    by_id = dict(zip(episodes.episode_id.tolist(), episodes.observation.ravel().tolist(), strict=True))
    assert by_id == {GATE: 0.5, TRAIN: 1.5, SELECTION: 2.5, 10_000: 3.5}


def test_two_rows_of_one_id_in_a_bandit_log_are_a_repetition_or_a_contradiction(tmp_path: Path) -> None:
    columns = {"id": [GATE, TRAIN, SELECTION, GATE], "x": [0.5, 1.5, 2.5, 0.5], "a": [0] * 4, "r": [0.5] * 4}
    assert screen(log_of(tmp_path, BANDIT, columns)).index.duplicates == {0: 1}
    assert dataset(tmp_path, BANDIT, columns).n_rows == 3
    found = screen(log_of(tmp_path, BANDIT, columns | {"r": [0.5, 0.5, 0.5, 1.0]}))
    assert found.index.duplicates == {}
    [violation] = found.violations
    assert violation.sentence("b0.parquet") == (
        "b0.parquet: column 'id' has 1 row contradicting another row of the same episode (C03), row 3; keep one row for "
        "each decision."
    )


def test_a_bandit_log_without_ids_names_rows_by_file_and_place(tmp_path: Path) -> None:
    columns = {name: values * 30 for name, values in LOG.items() if name in "xar"}
    log = Log.open(
        [write(tmp_path / f"{name}.parquet", columns) for name in ("one", "two")],
        contract_of(**BANDIT, episode_id=None),
    )
    assert screen(log).violations == () and screen(log).index.duplicates == {}
    write_splits(log, "offrl", tmp_path)
    episodes = read_splits(tmp_path, *SPLITS, salt="offrl", contract=log.contract)
    assert set(episodes.episode_id) == {f"{name}.parquet/{row}" for name in ("one", "two") for row in range(120)}
    places = [int(str(name).rpartition("/")[2]) % 4 for name in episodes.episode_id]
    assert np.array_equal(episodes.observation.ravel(), numbers(*LOG["x"])[places])


@pytest.mark.parametrize("more", [{}, {"truncated": None}, {"next_observation": ["x2"]}])
def test_what_goes_with_the_last_decision_of_a_truncated_episode_is_counted(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    """Of the gate: one is truncated after one decision, one after two, one goes on and one ends."""
    ids = [each for each in map(str, range(2000)) if bucket(each, "offrl") in SPLITS["gate"]]
    rows = [
        (ids[0], 0, -3.0, False, True), (ids[1], 0, 1.0, False, False), (ids[1], 1, -2.0, False, True),
        (ids[2], 0, 1.0, False, False), (ids[2], 1, -0.5, False, False), (ids[3], 0, 1.0, True, False),
        (str(TRAIN), 0, -9.0, False, True),
    ]  # fmt: skip
    frame = pl.DataFrame(rows, orient="row", schema=["id", "t", "r", "end", "cut"]).with_columns(x=0.5, x2=0.5, a=0)
    storage.write_parquet(tmp_path / "b.parquet", frame.to_arrow())
    contract = Contract.model_validate({
        "source": "log", "episode_id": "id", "step": "t", "observation": ["x"], "action": {"column": "a", "values": 2},
        "reward": {"column": "r", "range": [-9, 9]}, "gamma": 1.0, "terminated": "end", "truncated": "cut", **more,
    })  # fmt: skip
    log = Log.open([tmp_path / "b.parquet"], contract)
    write_cut(log, index(log), tmp_path)
    found = read_cut(tmp_path, 3, "offrl")
    if contract.next_observation:
        assert found == UNCUT
    else:
        goes_on = [] if contract.truncated else [0.5]  # told from truncated ones by their flag alone
        lost = [3.0, 2.0, *goes_on]
        assert found == Cut(len(lost), 1, sum(lost) / 4)
        assert read_cut(tmp_path, 3).rows == len(lost) + 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ids_may_be_numbers_in_one_batch_and_text_in_another(tmp_path: Path, order: tuple[int, ...]) -> None:
    ids = {name: pa.array(values) for name, values in LOG.items()}
    parts = [{name: values.take(pa.array(rows)) for name, values in ids.items()} for rows in ([0], [1, 2], [3])]
    parts[1]["id"] = parts[1]["id"].cast(pa.large_string())
    parts[2]["id"] = parts[2]["id"].cast(pa.uint64())
    episodes = dataset(tmp_path, {}, *(parts[i] for i in order))
    assert episodes.episode_id.tolist() == [str(TRAIN), str(SELECTION), str(GATE)]
    assert episodes.observation.ravel().tolist() == LOG["x"]


def test_an_entity_of_several_episodes_is_one_side_of_the_split(tmp_path: Path) -> None:
    columns = {"id": ["u", "u", "v", "w"], "who": [SELECTION, SELECTION, TRAIN, GATE]}
    episodes = dataset(tmp_path, {"entity": "who"}, columns)
    assert episodes.episode_id.tolist() == ["v", "u", "w"]
    assert episodes.entity is not None and episodes.entity.tolist() == [str(TRAIN), str(SELECTION), str(GATE)]
    assert episodes.observation.ravel().tolist() == [2.5, 0.5, 1.5, 3.5]


LONGER: Columns = {
    "id": [TRAIN] * 3 + [SELECTION] * 2 + [GATE] * 2 + [GATE + 1000],
    "t": [0, 1, 2, 0, 1, 0, 1, 0],
    "x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "y": [2.0, 3.0, 3.5, 5.0, 5.5, 7.0, 7.5, 8.5],
    "a": [0] * 8,
    "r": [0.0] * 8,
    "end": [False, False, False, False, True, False, False, False],
    "cut": [False, False, True, False, False, False, False, False],
}


def test_without_a_next_observation_a_cut_episode_ends_one_decision_earlier(tmp_path: Path) -> None:
    """The last observation is what follows the decision before. An episode of which only one is known tells nothing."""
    episodes = dataset(tmp_path, {"truncated": "cut"}, LONGER)
    assert episodes.episode_id.tolist() == [TRAIN, SELECTION, GATE]
    assert episodes.observation.ravel().tolist() == [1.0, 2.0, 4.0, 5.0, 6.0]
    assert episodes.final_observation[[0, 2], 0].tolist() == [3.0, 7.0]
    assert episodes.truncated.tolist() == [False, True, False, False, True]
    assert episodes.terminated.tolist() == [False, False, False, True, False]


def test_with_a_next_observation_a_cut_episode_keeps_every_decision(tmp_path: Path) -> None:
    episodes = dataset(tmp_path, {"truncated": "cut", "next_observation": ["y"]}, LONGER)
    wanted = sorted(
        [TRAIN, SELECTION, GATE, GATE + 1000], key=lambda i: (bucket(i, "offrl") >= 60, bucket(i, "offrl") >= 70, i)
    )
    assert episodes.episode_id.tolist() == wanted and episodes.n_rows == 8
    finals = {TRAIN: 3.5, SELECTION: 5.5, GATE: 7.5, GATE + 1000: 8.5}
    assert episodes.final_observation.ravel().tolist() == [finals[i] for i in wanted]


def test_what_follows_an_end_may_be_missing_and_is_then_some_number(tmp_path: Path) -> None:
    """Of the two decisions that terminated the next observation is null, of the one that was cut off it is needed."""
    for number, (kind, missing) in enumerate([("number", None), ("number", NAN), ("list", None), ("list", [NAN, 1.0])]):
        wide = kind == "list"
        observed = {"observation": [{"column": "x", **({"size": 2} if wide else {})}], "next_observation": ["y"]}
        x = PAIRS if wide else [0.5, 1.5, 2.5, 3.5]
        y: list[Any] = [x[1], missing, x[0], missing]
        roles = {**observed, "truncated": "cut"}
        columns = {"x": x, "y": y, "end": [False, True, False, True], "cut": [False, False, True, False]}
        episodes = dataset(tmp_path / str(number), roles, columns)
        assert np.array_equal(episodes.final_observation, numbers(x[1], x[0], x[3]).reshape(3, -1))
        wrong = screen(
            log_of(tmp_path / f"{number} cut", roles, columns | {"y": [x[1], x[0], missing, x[0]]})
        ).violations
        assert [(violation.check, violation.column, violation.rows) for violation in wrong] == [("C10", "y", 1)]


def test_a_row_that_was_only_written_down_at_another_time_is_a_repetition(tmp_path: Path) -> None:
    """Unless the time plays another role as well: then it says something of the decision."""
    at = [day(1), day(2), day(1), day(1)]
    for roles in ({"decided_at": "at", "ingested_at": "in"}, {"decided_at": "at", "ingested_at": "in", "step": None}):
        batches = [{"at": at, "in": [day(number)] * 4} for number in (5, 6)]
        folder = tmp_path / str(len(roles))
        found = screen(log_of(folder, roles, *batches))
        assert found.violations == () and found.index.duplicates == {1: 4}
        assert dataset(folder, roles, *batches).n_rows == 4
    roles = {"ingested_at": "in", "observation": ["x", {"column": "in", "timestamp": True}]}
    batches = [{"in": [day(number)] * 4} for number in (5, 6)]
    assert [v.check for v in screen(log_of(tmp_path / "seen", roles, *batches)).violations] == ["C03"]


def test_only_truncation_may_be_logged(tmp_path: Path) -> None:
    episodes = dataset(tmp_path, {"truncated": "cut", "terminated": None}, LONGER)
    assert not episodes.terminated.any() and episodes.truncated.sum() == 3


def test_lists_of_other_kinds_and_widths_are_the_same_rows(tmp_path: Path) -> None:
    observed = {"observation": [{"column": "x", "size": 2}], "next_observation": ["y"]}
    kinds = [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.int8())]
    following = [PAIRS[1], *PAIRS[1:]]
    batches = [{"x": pa.array(PAIRS, x), "y": pa.array(following, y)} for x, y in zip(kinds, kinds[::-1], strict=True)]
    assert screen(log_of(tmp_path, observed, *batches)).index.duplicates == {1: 4, 2: 4}
    assert np.array_equal(dataset(tmp_path, observed, *batches).observation, numbers(*PAIRS))
    first, rest = ([0], [1, 2, 3])  # what follows lies in a batch of another kind
    parts = [
        {name: pa.array(values, from_pandas=False).take(pa.array(rows)) for name, values in {**LOG, **batch}.items()}
        for rows, batch in ((first, batches[0]), (rest, batches[1]))
    ]
    assert screen(log_of(tmp_path, observed, *parts)).violations == ()


def test_what_is_wrong_within_a_batch_is_not_said_again_of_several(tmp_path: Path) -> None:
    """Rows of one episode that lie apart in their batch, and the episode goes on in another."""
    wrong = {
        "id": [TRAIN] * 2,
        "t": [1, 0],
        "x": [1.0, 0.0],
        "y": [2.0, 9.0],
        "a": [0] * 2,
        "r": [0.0] * 2,
        "end": [False] * 2,
    }
    after = {"id": [TRAIN], "t": [2], "x": [2.0], "y": [3.0], "a": [0], "r": [0.0], "end": [True]}
    found = screen(log_of(tmp_path, {"next_observation": ["y"]}, wrong, after)).violations
    assert [(v.check, v.batch, v.rows, v.first, v.across) for v in found] == [("C07", 0, 1, 0, False)]


def test_a_row_of_another_entity_that_does_not_follow_is_counted_once(tmp_path: Path) -> None:
    roles = {"entity": "who", "next_observation": ["y"]}
    found = screen(log_of(tmp_path, roles, {"who": [1, 2, 3, 4], "y": [0.0] * 4})).violations
    assert [(violation.check, violation.rows, violation.first) for violation in found] == [("C07", 1, 1), ("C27", 1, 1)]
