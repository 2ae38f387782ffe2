"""Seeds that fail, clipped gradients, schedules and precision."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.datasets.transitions import TransitionBatch
from offrl_models.learner import NonFiniteLossError, TrainingConfig, train
from offrl_models.optimizer import FusedAdam, clip_per_seed, rate_factor
from offrl_models.processor import ready_to_train
from offrl_models.stages import learning
from offrl_models.training import fit
from tests.test_algorithms import EPISODES, LOGS, Space, build, sampled


def run(algorithm: Any, seeds: list[int], steps: int, space: Space = "discrete", **how: Any) -> Any:
    settings = {name: how.pop(name) for name in TrainingConfig.model_fields if name in how}
    config = TrainingConfig(gradient_steps=steps, **settings)
    return train(algorithm, *sampled(algorithm, seeds, LOGS[space]), config, chunk=5, **how)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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
