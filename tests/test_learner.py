"""Training that is cut short, seeds that fail, clipped gradients and schedules."""

import gc
import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from offrl_models import curves, stages, storage
from offrl_models.algorithms import make_config
from offrl_models.checkpoint import Checkpoint
from offrl_models.config import Pipeline, parse_pipeline
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.learner import NonFiniteLossError, TrainingConfig, train
from offrl_models.optimizer import FusedAdam, clip_per_seed, rate_factor
from offrl_models.processor import ready_to_train
from offrl_models.reports import plots
from offrl_models.schema import InputError
from offrl_models.stages import learning
from offrl_models.training import fit
from tests.conftest import attributes, write_batches
from tests.test_algorithms import EPISODES, LOGS, MODEL, SPACES, WORLD, Space, build, sampled
from tests.test_curves import points


class CutShortError(Exception):
    pass


def run(algorithm: Any, seeds: list[int], steps: int, space: Space = "discrete", **how: Any) -> Any:
    settings = {name: how.pop(name) for name in TrainingConfig.model_fields if name in how}
    config = TrainingConfig(gradient_steps=steps, **settings)
    return train(algorithm, *sampled(algorithm, seeds, LOGS[space]), config, chunk=5, **how)


def cut_at(step: int) -> Any:
    """A report that kills the training once so many gradient steps are done."""

    def report(steps: int, losses: dict[str, float]) -> None:
        if steps >= step:
            raise CutShortError

    return report


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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


class Exploding(torch.nn.Module):
    """IQL whose second seed gets a loss that is no number at its seventh step."""

    def __init__(self, seeds: list[int], bad: list[int]):
        super().__init__()
        self.inner, self.bad = build("iql", seeds), bad
        self.targets, self.draws, self.target_update = {}, 0, self.inner.target_update
        self.value, self.q, self.policy = self.inner.value, self.inner.q, self.inner.policy

    def learning_rates(self) -> dict[str, float]:
        return self.inner.learning_rates()

    def losses(self, batch: TransitionBatch) -> dict[str, torch.Tensor]:
        found = self.inner.losses(batch)
        factor = torch.ones(len(found["value"]))
        if batch.step >= 7:
            factor[self.bad] = torch.nan
        return {**found, "value": found["value"] * factor}


def test_a_seed_that_explodes_stops_with_its_last_good_weights_and_the_others_go_on() -> None:
    healthy, broken, early = Exploding([3, 4, 5], []), Exploding([3, 4, 5], [1]), Exploding([3, 4, 5], [])
    run(healthy, [3, 4, 5], 20)
    went = run(broken, [3, 4, 5], 20)
    run(early, [3, 4, 5], 5)
    assert list(went.stopped) == [1] and went.stopped[1].startswith("the value loss of seed 4 is not finite after 10")
    assert went.history[0]["value"][1] is not None and went.history[-1]["value"][1] is None
    trios = zip(healthy.parameters(), broken.parameters(), early.parameters(), strict=True)
    for good, found, before in trios:
        if found.numel():
            good, found, before = (each.unflatten(0, (3, -1)) for each in (good, found, before))
            assert torch.equal(found[[0, 2]], good[[0, 2]]) and torch.equal(found[1], before[1])
    with pytest.raises(NonFiniteLossError, match="the value loss of seed 3 is not finite after 10 gradient steps"):
        run(Exploding([3, 4, 5], [0, 1, 2]), [3, 4, 5], 20)


class BadGradient(Exploding):
    """The last loss before the end is a number, and its gradient is not."""

    def losses(self, batch: TransitionBatch) -> dict[str, torch.Tensor]:
        found = self.inner.losses(batch)
        if batch.step < 19:
            return found
        value = found["value"].clone()
        kept = value[self.bad]
        value[self.bad] = kept + torch.sqrt((kept - kept.detach()).clamp(min=0.0))  # adds 0, with an infinite slope
        return {**found, "value": value}


def test_weights_that_became_no_numbers_stop_a_seed_too() -> None:
    broken = BadGradient([3, 4, 5], [1])
    went = run(broken, [3, 4, 5], 20)
    assert list(went.stopped) == [1] and went.stopped[1].startswith("the weights of seed 4 are not finite after 20")
    assert all(bool(each.isfinite().all()) for each in broken.parameters())
    with pytest.raises(NonFiniteLossError, match="the weights of seed 4 are not finite"):
        went.require_all()


def test_a_network_that_a_chunk_did_not_train_has_no_loss_in_it() -> None:
    history = [
        {"gradient_steps": 5, "q": [1.0, 3.0], "policy": [2.0, None]},
        {"gradient_steps": 6, "q": [5.0, 7.0], "policy": [None, None]},
    ]
    assert learning._last_losses(history) == {"policy": 2.0, "q": 6.0}
    assert learning._table(history).row(3) == (1, 6, None, 7.0)


def test_adam_pairs_gradients_with_weights_wherever_they_lie_in_memory() -> None:
    gradient, moved = torch.arange(6.0).view(2, 3) - 2.0, []
    for each in (gradient, gradient.T.contiguous().T):
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        parameter.grad = each
        FusedAdam([{"params": [parameter], "lr": 0.1, "name": "one"}]).advance()
        moved.append(parameter.detach())
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0].sign(), -gradient.sign())


def test_gradients_are_clipped_per_seed() -> None:
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[[4.0]], [[0.4]]])]
    clip_per_seed(gradients, 2, 1.0)
    assert gradients[0].tolist() == [[pytest.approx(0.6), 0.0], [pytest.approx(0.3), 0.0]]
    assert gradients[1].flatten().tolist() == pytest.approx([0.8, 0.4])
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    adam = FusedAdam([{"params": [parameter], "lr": 0.1, "name": "one"}], seeds=2, clip_norm=1e-9)
    parameter.grad = torch.ones(2, 3)
    adam.step()
    assert float(parameter.detach().abs().max()) < 0.06  # Adam's own eps tells a tiny gradient from a large one


def test_rates_rise_then_fall() -> None:
    def factors(**how: Any) -> list[float]:
        return [rate_factor(step, gradient_steps=10, **how) for step in range(10)]

    assert factors(schedule="constant", warmup_steps=0) == [1.0] * 10
    assert factors(schedule="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = factors(schedule="cosine", warmup_steps=0)
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.5) and (np.diff(cosine) < 0).all()


@pytest.mark.parametrize(
    "how", [{"schedule": "cosine"}, {"warmup_steps": 5}, {"clip_norm": 1e-3}, {"precision": "bf16"}]
)
def test_no_knob_of_the_training_is_dead(how: dict[str, Any]) -> None:
    base, changed = build("cql", [0]), build("cql", [0])
    run(base, [0], 12)
    went = run(changed, [0], 12, **how)
    assert not same(base, changed) and np.isfinite(went.history[-1]["q"]).all()


def test_half_precision_learns_the_same_thing() -> None:
    found = {}
    for precision in ("32", "bf16"):
        config = make_config("bc", {"hidden": (32,), "learning_rate": 0.01})
        algorithm, went = fit(
            "bc",
            config,
            EPISODES,
            Encoder(EPISODES.features),
            seeds=[0],
            gradient_steps=200,
            batch_size=64,
            precision=precision,
        )
        assert all(each.dtype == torch.float32 for each in algorithm.parameters())
        found[precision] = went.history[-1]["policy"][0]
    assert found["bf16"] == pytest.approx(found["32"], abs=0.02)


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


def test_a_process_is_as_it_was_once_training_failed() -> None:
    def state() -> tuple[int, ...]:
        return *gc.get_threshold(), torch.get_num_threads()

    within: list[int] = []

    def fail() -> None:
        with ready_to_train():
            within.extend(state())
            raise RuntimeError("in the midst")

    alone = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = state()
        with pytest.raises(RuntimeError, match="in the midst"):
            fail()
        assert within[:2] == list(before[:2]) and within[2] > 10**6 and within[3] == 1
        assert state() == before
    finally:
        torch.set_num_threads(alone)
