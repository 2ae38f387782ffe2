"""Training that is cut short goes on where it was, bit for bit."""

import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from offrl_models import curves, stages, storage
from offrl_models.checkpoint import Checkpoint
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.reports import plots
from offrl_models.schema import InputError
from offrl_models.stages import learning
from tests.conftest import attributes, write_batches
from tests.test_algorithms import MODEL, SPACES, WORLD, Space, build
from tests.test_curves import points
from tests.test_learner import run, same


class CutShortError(Exception):
    pass


def cut_at(step: int) -> Any:
    """A report that kills the training once so many gradient steps are done."""

    def report(steps: int, losses: dict[str, float]) -> None:
        if steps >= step:
            raise CutShortError

    return report


@pytest.mark.parametrize(("name", "space"), SPACES)
def test_a_training_that_was_cut_short_goes_on_bit_for_bit(name: str, space: Space, tmp_path: Path) -> None:
    whole = build(name, [0, 1], space)
    wanted = run(whole, [0, 1], 40, space, schedule="cosine", warmup_steps=7, clip_norm=1.0, checkpoints=3)
    assert list(wanted.kept) == [13, 26]
    for step, every in (
        (5, 10),
        (16, 1),
        (21, 1),
        (35, 10),
    ):  # gone on with from the beginning, and from steps 13, 18 and 31
        saved = Checkpoint(tmp_path / f"{step}", "this", every=every)
        for stop in (step, 10**6):  # killed once, and again started
            again = build(name, [0, 1], space)
            try:
                went = run(again, [0, 1], 40, space, schedule="cosine", warmup_steps=7, clip_norm=1.0, checkpoints=3,
                           checkpoint=saved, report=cut_at(stop))  # fmt: skip
            except CutShortError:
                assert not same(whole, again)
                continue
            assert same(whole, again) and went.history == wanted.history, step
            assert list(went.kept) == [13, 26]
            for steps, weights in wanted.kept.items():
                assert all(torch.equal(each, went.kept[steps][part]) for part, each in weights.items()), (step, steps)


def test_weights_that_were_kept_are_those_of_a_shorter_training() -> None:
    for longer, shorter in ((40, 20), (30, 15)):
        whole, short = build("iql", [0, 1]), build("iql", [0, 1])
        kept = run(whole, [0, 1], longer, checkpoints=2).kept[shorter]
        run(short, [0, 1], shorter)
        assert not same(whole, short) and kept.keys() == dict(short.named_parameters()).keys()
        assert all(torch.equal(each, kept[name]) for name, each in short.named_parameters())


def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    first, second = build("iql", [0]), build("iql", [0])
    run(first, [0], 20, checkpoint=Checkpoint(tmp_path / "c", "one", every=5))
    run(second, [0], 20, checkpoint=Checkpoint(tmp_path / "c", "other", every=5))
    assert same(first, second)
    assert Checkpoint(tmp_path / "c", "one").load() is None


@pytest.mark.parametrize("place", [3, 50, -9])
def test_a_damaged_checkpoint_is_said(tmp_path: Path, place: int) -> None:
    saved = Checkpoint(tmp_path / "c", "one", every=5)
    run(build("bc", [0]), [0], 5, checkpoint=saved)
    data = bytearray(saved.path.read_bytes())
    data[place] ^= 4
    saved.path.write_bytes(data)
    with pytest.raises(InputError, match=r"c is damaged; remove it, and the training starts anew\."):
        run(build("bc", [0]), [0], 10, checkpoint=saved)


def test_a_candidate_that_was_cut_short_is_finished_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_batches(tmp_path, WORLD.simulate(300, seed=3))
    configured = attributes(WORLD.n_states, 3, algorithms={"iql": {"hidden": [8]}})
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    for stage in (stages.ingest, stages.coverage, stages.episodes):
        stage(pipeline)
    monkeypatch.setattr(learning, "Checkpoint", partial(Checkpoint, every=100))
    monkeypatch.setattr(curves, "FLUSHED_S", 0.0)
    unfinished = pipeline.candidate("iql").with_name(".iql.checkpoint")
    shown = pipeline.folder / "tensorboard" / "iql"

    def dying(task: str, done: int, total: int, note: str) -> None:
        assert points(shown)["loss/q"][-1][0] == done  # while it trains
        if done >= 200:
            raise CutShortError

    with pytest.raises(CutShortError):
        learning._train_candidate((pipeline, "iql"), dying)
    assert unfinished.exists() and not pipeline.candidate("iql").exists()
    resumed: list[int] = []
    training, started = {**configured["training"], "processes": 2}, []  # any number of processes goes on with it
    several = Pipeline(parse_pipeline({**configured, "training": training}, "toy"), tmp_path)

    def alone(train: Any, job: Any, count: int, update: Any) -> None:
        """In place of two processes, which tests/test_parallel.py starts."""
        started.append(count)
        train(pickle.loads(pickle.dumps(job))._replace(pipeline=pipeline), update)

    monkeypatch.setattr(learning, "together", alone)
    stage = learning._train_candidate((several, "iql"), lambda task, done, total, note: resumed.append(done))
    written = (pipeline.candidate("iql") / "losses.csv").read_text().splitlines()
    assert written[0] == "seed,gradient_steps,policy,q,value" and len(written) == 1 + 2 * 2
    assert resumed == [200] and started == [2] and stage.summary["stopped"] == {} and not unfinished.exists()
    history = storage.read_json(pipeline.candidate("iql") / "losses.json")
    assert [step for step, _ in points(shown)["speed/steps_per_s"]] == [200]
    for seed, name in itertools.product((0, 1), ("q", "value", "policy")):  # each step once, though 200 was done twice
        wanted = [(entry["gradient_steps"], pytest.approx(entry[name][seed])) for entry in history]
        assert points(shown / f"seed-{seed}")[f"loss/{name}"] == wanted and len(wanted) == 2
    times = {path: path.stat().st_mtime_ns for path in shown.rglob("*")}
    assert learning._train_candidate((several, "iql"), dying).reused
    assert {path: path.stat().st_mtime_ns for path in shown.rglob("*")} == times


def test_a_candidate_with_a_model_that_was_cut_short_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model of the world leaves its losses, its errors on rows held out, and no checkpoint."""
    write_batches(tmp_path, WORLD.simulate(300, seed=3))
    settings = {**MODEL, "hidden": [8], "dynamics_hidden": [8], "dynamics_steps": 200}
    configured = attributes(WORLD.n_states, 3, algorithms={"mopo": settings})
    pipeline = Pipeline(parse_pipeline(configured, "toy"), tmp_path)
    for stage in (stages.ingest, stages.coverage, stages.episodes):
        stage(pipeline)
    monkeypatch.setattr(learning, "Checkpoint", partial(Checkpoint, every=100))
    drawn, draw = [], plots.learning_curves
    monkeypatch.setattr(plots, "learning_curves", lambda *given: (drawn.append(given), draw(*given)))
    folder = pipeline.candidate("mopo")
    unfinished = [folder.with_name(name) for name in (".mopo.checkpoint", ".mopo.checkpoint.model")]

    def dying(task: str, done: int, total: int, note: str) -> None:
        assert (total == 200 and "steps/s" in note) or done == 100
        if (task, done) == ("mopo", 200):
            raise CutShortError

    with pytest.raises(CutShortError):
        learning._train_candidate((pipeline, "mopo"), dying)
    assert all(path.exists() for path in unfinished) and not folder.exists()
    resumed: list[tuple[str, int]] = []
    stage = learning._train_candidate((pipeline, "mopo"), lambda task, done, *more: resumed.append((task, done)))
    written = (folder / "losses.csv").read_text().splitlines()
    assert written[0] == "seed,gradient_steps,policy,q,temperature" and len(written) == 1 + 2 * 2
    assert resumed == [("mopo", 200)] and stage.summary["stopped"] == {}
    assert not any(path.exists() for path in unfinished)
    table = pl.read_csv(folder / "model_losses.csv")
    networks = ["allowed", "allowed_holdout_error", "transition", "transition_holdout_error"]
    assert table.columns == ["seed", "member", "gradient_steps", *networks]
    assert table[["seed", "member", "gradient_steps"]].rows() == [
        (seed, member, steps) for steps in (100, 200) for seed in (0, 1) for member in range(4)
    ]
    least = table.group_by("seed", "member").agg(pl.col("transition_holdout_error").min())
    elites = least.group_by("seed").agg(pl.col("transition_holdout_error").bottom_k(2).mean())
    error = pytest.approx(elites["transition_holdout_error"].mean(), rel=0.01)  # less than that is no better
    assert stage.summary["model"] == {"gradient_steps": 200, "holdout_error": error}
    assert [row["gradient_steps"] for row in drawn[0][3]] == [100, 200]
