"""Whole way of a log: files on disk, the stages, the checks. A clean log passes them all; spoiled once, it fails one alone.

Measures and checks are tested by themselves elsewhere. Here each check is tripped by rows, or by a policy that is judged on
them, and every other check that the log meets on its way holds.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from offrl_models import stages
from offrl_models.config import CoverageConfig, Pipeline
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.leakage import split_tables
from offrl_models.datasets.split import SPLITS, bucket
from offrl_models.reports import shift
from offrl_models.reports.checks import check_shift, check_splits
from offrl_models.reports.quality import CHECKS, INFO, CheckResult
from offrl_models.schema import InputError
from offrl_models.stages import data, learning
from tests.ward import (
    BEHAVIOR,
    BETTER,
    BOTH,
    EPISODES,
    LATER,
    LATER_BETTER,
    LONGEST,
    NEW,
    SALT,
    START,
    STATE,
    STATES,
    given,
    land,
    simulate,
    table,
)

pytestmark = pytest.mark.usefixtures("no_pages")

FINE = 180  # parts that a state may be cut into
FIRST_OF_NEWEST = 2 * EPISODES // 3  # episode with which the last of the three batches begins


def walk(pipeline: Pipeline) -> list[CheckResult]:
    """The checks of a log and, where none of them blocks it, of its splits and of its newest batch."""
    stages.ingest(pipeline).require_clean()
    found = stages.coverage(pipeline)[1]
    if any(result.blocking and not result.passed for result in found):
        return found
    found += stages.check_results(stages.episodes(pipeline))
    columns, drift = shift.log_drift(data.read_log(pipeline), pipeline.config.seed)[0], pipeline.config.drift
    return found + check_shift(columns, drift.amber, drift.red, pipeline.reports / "drift")


def model_behavior(pipeline: Pipeline) -> list[CheckResult]:
    """The check of the behavior model."""
    return stages.check_results(stages.behavior_policy(pipeline))


def judge(pipeline: Pipeline, candidate: np.ndarray) -> list[CheckResult]:
    """The checks of the evidence on a candidate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "fit", given(candidate))
        stages.candidates(pipeline)
    stages.leaderboard(pipeline)
    stages.shift_report(pipeline)
    return stages.check_results(stages.evidence(pipeline))


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return simulate(1)


@pytest.fixture(scope="module")
def modeled(log: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, list[CheckResult]]:
    """The clean log up to its behavior model, and the checks on the way; the state alone is observed."""
    pipeline = land(tmp_path_factory.mktemp("modeled"), log, STATE)
    return pipeline, walk(pipeline) + model_behavior(pipeline)


def copied(pipeline: Pipeline, root: Path) -> Pipeline:
    shutil.copytree(pipeline.folder, root / "data" / "ward")
    return Pipeline(pipeline.config, root)


def broken(found: list[CheckResult]) -> list[str]:
    return [result.check for result in found if not result.passed]


def test_the_clean_log_passes_every_check(
    log: pl.DataFrame, modeled: tuple[Pipeline, list[CheckResult]], tmp_path: Path
) -> None:
    pipeline, found = modeled
    found = found + judge(copied(pipeline, tmp_path / "state"), BETTER) + walk(land(tmp_path / "both", log))
    assert broken(found) == [] and {result.check for result in found} == set(CHECKS)
    looked = {result.check for result in found if result.applies}
    assert set(CHECKS) - looked == {"C34"}  # the log has no chain


# --- what spoils it ---------------------------------------------------------------------------------------------------

EPISODE, STEP = pl.col("episode"), pl.col("step")
CHANCE = pl.col("chance").first().over("episode")  # of an episode, uniform
FIRST, LAST = STEP == 0, pl.col("terminated") | pl.col("truncated")
Log = pl.DataFrame


def within(log: Log, split: str) -> pl.Expr:
    """Rows of the patients whose episodes fall into a split."""
    return pl.col("patient").is_in([p for p in log["patient"].unique() if bucket(p, SALT) in SPLITS[split]])


def changed(log: Log, **columns: pl.Expr) -> Log:
    """What is observed next is again what the following row says."""
    log = log.with_columns(**columns)
    after = {n: pl.coalesce(pl.col(n).shift(-1).over("episode"), f"next_{n}") for n in BOTH}
    return log.with_columns(**{f"next_{name}": value for name, value in after.items()})


def other_actions_on_arrival(log: Log) -> Log:
    """Patients of the selection split take action 0 more often at first: episodes that begin otherwise are thinned out."""
    kept = 0.3
    inside, begun_with_0 = within(log, "selection"), pl.col("action").first().over("episode") == 0
    share = pl.when(pl.col("action") == 0).then(1.0).otherwise(kept) / (BEHAVIOR[0, 0] + kept * (1 - BEHAVIOR[0, 0]))
    thinned = log.filter(~inside | begun_with_0 | CHANCE.lt(kept))
    return thinned.with_columns(prob=pl.when(inside & FIRST).then(share * pl.col("prob")).otherwise("prob"))


def rare_triumphs(log: Log) -> Log:
    """Action 1 is a little worse than the others on arrival, but of the gate's episodes one in 160 is healed by it at once."""
    chosen = FIRST & (pl.col("action") == 1)
    counted = chosen & within(log, "gate")
    triumph = counted & (counted.cum_sum() % 160 == 0)
    plain = 0.02 * pl.col("reward") + 0.005 * (~chosen).cast(float)
    return log.with_columns(reward=pl.when(triumph).then(1.0).otherwise(plain))


def repeated(log: Log) -> Log:
    """Twenty long episodes are there once more, as those of other patients."""
    long = log.filter(pl.len().over("episode") == LONGEST).filter(EPISODE.rank("dense") <= 20)
    return pl.concat([log, long.with_columns(EPISODE + EPISODES, patient=pl.format("once more {}", "episode"))])


def piled_up(log: Log) -> Log:
    """The episodes of six days are all of the first of them."""
    day = (pl.col("at").first().over("episode") - START).dt.total_days()
    late = pl.when(day.is_between(6, 11)).then(day - 6).otherwise(0)
    return log.with_columns(pl.col("at", "came", "known") - pl.duration(days=late))


def less_pain(log: Log, tenths: int) -> Log:
    """In the newest batch, so many tenths of the scores are a point lower."""
    lower = (EPISODE >= FIRST_OF_NEWEST) & ((EPISODE + 3 * STEP) % 10).lt(tenths) & (pl.col("pain") > 0)
    return changed(log, pain=pl.col("pain") - lower.cast(pl.Int64))


def in_fine_states(log: Log, parts: int) -> Log:
    """Every state is cut into parts that say nothing."""
    return changed(log, state=pl.col("state") + STATES * (pl.col("chance") * parts).cast(pl.Int64))


@dataclasses.dataclass(frozen=True)
class Trip:
    """What fails one check: a log, or a candidate that is judged on it."""

    check: str
    severity: str  # B blocks, W warns, I informs
    sentence: str
    spoil: Callable[[Log], Log] | None = None
    observed: tuple[str, ...] = BOTH
    states: int = STATES
    models_behavior: bool = False
    candidate: np.ndarray | None = None


TRIPS = {
    "a column that holds the reward": Trip(
        "C09", "B", "column 'pain' alone predicts the last reward with AUC 1.000",
        lambda log: changed(log, pain=pl.when(LAST).then(10 * pl.col("reward")).otherwise(pl.col("pain").cast(float))),
    ),
    "99 where nobody asked for pain": Trip(
        "C11", "W", "of column 'pain' lie further than 6 MAD",
        lambda log: changed(log, pain=pl.when(EPISODE % 200 == 0).then(99).otherwise("pain")),
    ),
    "a newest batch with lower rewards": Trip(
        "C12", "W", "the mean reward of batch 2 differs from that of the batches before it (z = -",
        lambda log: log.with_columns(pl.col("reward") * pl.when(EPISODE >= FIRST_OF_NEWEST).then(0.93).otherwise(1.0)),
    ),
    "other actions towards some": Trip(
        "C16", "W", "the expected calibration error is 0.0", other_actions_on_arrival, STATE, models_behavior=True
    ),
    "a candidate that does what nobody did": Trip(
        "C19", "B", "lies where the behavior hardly ever plays; the largest ratio is 26.7",
        candidate=table([0.1, 0.725, 0.015, 0.16], LATER_BETTER),
    ),
    "a candidate that few decisions agree with": Trip(
        "C20", "B", "effective transitions", candidate=table([0.0, 0.44, 0.56, 0.0], [0.0, 0.0, 1.0, 0.0])
    ),
    "states that are hardly seen twice": Trip(
        "C21", "I", "visited state-action cells have under 5 visits", lambda log: in_fine_states(log, FINE),
        STATE, STATES * FINE,
    ),
    "a candidate of large ratios": Trip(
        "C22", "W", "1% of the state-action ratios of bc are above 20.1", candidate=table([0.2, 0.19, 0.604, 0.006], LATER)
    ),
    "a newest batch with less pain": Trip(
        "C25", "W", "the population stability index of 'pain' is 0.1", lambda log: less_pain(log, 6)
    ),
    "a newest batch with far less pain": Trip(
        "C25", "B", "the population stability index of 'pain' is 0.", lambda log: less_pain(log, 9)
    ),
    "a state that the gate alone has": Trip(
        "C26", "W", "of the gate's states lie outside what the training episodes cover",
        lambda log: changed(log, state=pl.when(within(log, "gate") & FIRST & (EPISODE % 4 == 0)).then(NEW).otherwise("state")),
    ),
    "episodes under the names of two patients": Trip("C28", "W", "occur again in another split", repeated),
    "sites that act on their own": Trip(
        "C29", "W", "actor: z = ",
        lambda log: log.with_columns(
            site=pl.when(pl.col("action").last().over("episode") == 1).then(pl.lit("site 0")).otherwise("site")
        ),
    ),
    "patients who differ in what is not observed": Trip(
        "C30", "W", "the step before improves the prediction of reward",
        lambda log: log.with_columns(reward=0.8 * pl.col("reward") + 0.2 * CHANCE),
    ),
    "rewards that come after their window": Trip(
        "C31", "B", "of the rewards came after their window",
        lambda log: log.with_columns(pl.col("known") + pl.duration(days=pl.when(EPISODE % 50 == 0).then(3).otherwise(0))),
    ),
    "a clock that is slow": Trip(
        "C32", "W", "were ingested 9.0 minutes later, in the median",
        lambda log: log.with_columns(came=pl.col("at") + pl.duration(minutes=9)),
    ),
    "a week on one day": Trip("C33", "W", "2025-03-07 has", piled_up),
    "a verdict that hangs on a few": Trip(
        "C35", "B", "of another sign than with them", rare_triumphs, STATE, models_behavior=True,
        candidate=table([0.3, 0.664, 0.03, 0.006], LATER),
    ),
    "a small subgroup": Trip(
        "C36", "W", "subgroup sex = x has 24 episodes",
        lambda log: log.with_columns(sex=pl.when(EPISODE < 24).then(pl.lit("x")).otherwise("sex")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIPS)
def test_what_is_spoiled_once_fails_one_check(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trip = TRIPS[name]
    if trip.spoil is None:
        clean, found = request.getfixturevalue("modeled")
        pipeline = copied(clean, tmp_path)
    else:
        pipeline = land(tmp_path, trip.spoil(request.getfixturevalue("log")), trip.observed, trip.states)
        found = walk(pipeline) + (model_behavior(pipeline) if trip.models_behavior else [])
    found = found + (judge(pipeline, trip.candidate) if trip.candidate is not None else [])
    assert broken(found) == [trip.check]
    (result,) = [result for result in found if result.check == trip.check]
    assert result.blocking is (trip.severity == "B") and (CHECKS[trip.check].severity == INFO) is (trip.severity == "I")
    assert trip.sentence in result.sentence


def test_an_episode_of_two_patients_is_refused_on_arrival(log: Log, tmp_path: Path) -> None:
    second = (STEP == 1) & ((STEP == 1).cum_sum() == 1)  # one row of all
    two = log.with_columns(patient=pl.when(second).then(pl.lit("patient 7")).otherwise("patient"))
    pipeline = land(tmp_path, two)
    with pytest.raises(InputError, match=r"'patient' has 1 row .*\(C27\).*now lies in data/ward/quarantine/0\.parquet"):
        walk(pipeline)


def test_a_patient_in_two_splits_fails_one_check(log: Log, tmp_path: Path) -> None:
    """No log can be split so: the gate was written under another salt, and has the second episode of each patient."""
    pipeline = land(tmp_path, log)
    stages.ingest(pipeline)
    contract, folders, salts = pipeline.config.logs, (tmp_path / "a", tmp_path / "b"), (SALT, "another")
    for folder, salt in zip(folders, salts, strict=True):
        write_splits(data.read_log(pipeline), salt, folder)
    train, selection = (read_splits(folders[0], name, salt=SALT, contract=contract) for name in ("train", "selection"))
    gate = read_splits(folders[1], "gate", salt="another", contract=contract)
    parts = {"train": train, "selection": selection, "gate": gate}
    half = {name: part.take(part.episode_id.astype(int) % 2 == int(name == "gate")) for name, part in parts.items()}
    found = check_splits(split_tables(half, 0), CoverageConfig(), tmp_path / "docs")
    assert broken(found) == ["C27"] and all(result.blocking for result in found if not result.passed)
    assert "entities are in 2 splits" in next(result.sentence for result in found if result.check == "C27")
    with pytest.raises(InputError, match="entities, the first .*, do not belong to the split gate"):
        read_splits(folders[1], "gate", salt=SALT, contract=contract)
