"""Compiled losses train the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offrl_models.gradients import compiled_losses
from tests.test_algorithms import LOGS, SPACES, Space, build, known_fields, sampled


def test_compiled_losses_train_the_same_weights(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # nothing was compiled before
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling"], env=environment, check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"].startswith("the losses of TD3BC cannot be compiled (") and "compiler" in found["refused"]
    assert found["apart"] < 1e-5 and found["moved"] > 0.01
    assert found["values_apart"] < 1e-5 and found["values_moved"] > 0.05
    assert (found["graphs"], found["breaks"]) == (1, 0)  # for all steps
    assert found["by_onednn"] == [0, int(torch.backends.mkldnn.is_available()), 0]
    assert len(found["slopes"]) == 18 and max(found["slopes"]) < 1e-4


@pytest.mark.parametrize(("name", "space"), [each for each in SPACES if each[0] not in ("mopo", "combo", "morel")])
def test_to_losses_that_are_compiled_steps_are_at_most_two_numbers(
    name: str, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def compile_(losses: Any, **how: Any) -> Any:
        return lambda batch: seen.add(batch.step) or losses(batch)

    forgotten: list[bool] = []
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    settings = {"policy_interval": 3} if "policy_interval" in known_fields(name, space) else {}
    algorithm = build(name, [0, 1], space, **settings)
    transitions, sampler = sampled(algorithm, [0, 1], LOGS[space])
    (batch,) = transitions.batches(sampler, 1)
    trained = [each for network in algorithm.learning_rates() for each in getattr(algorithm, network).parameters()]
    losses = compiled_losses(algorithm, trained, torch.device("cpu"))
    for step in range(7):
        wanted = algorithm.losses(batch._replace(step=step))
        slopes = torch.autograd.grad(torch.cat(list(wanted.values())).sum(), trained, allow_unused=True)
        found = losses(batch._replace(step=step))
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
        for slope, weight in zip(slopes, trained, strict=True):
            assert weight.grad is None if slope is None else weight.grad is not None and torch.equal(slope, weight.grad)
    assert seen == ({0, 1} if settings else {0}) and forgotten  # what another candidate has compiled is forgotten
