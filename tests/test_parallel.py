"""Several processes that train one candidate together find what one finds, fail together, and leave nobody behind."""

import itertools
import multiprocessing
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import torch

from offrl_models import parallel
from offrl_models.algorithms import config_of
from offrl_models.config import parse_pipeline
from offrl_models.learner import train
from offrl_models.rollouts import RolloutConfig
from offrl_models.schema import InputError
from offrl_models.tensors import read_tensors, write_tensors
from offrl_models.training_config import TrainingConfig
from tests import jobs
from tests.conftest import attributes
from tests.test_algorithms import LOGS, SPACES, Space, build, sampled

CASES: list[tuple[str, Space, dict[str, Any]]] = [
    *((name, space, {}) for name, space in SPACES if not issubclass(config_of(name, space), RolloutConfig)),
    ("bandit", "discrete", {"objective": "sndr"}),
]
SEEDS, STEPS = [0, 1], 4


def learned(case: tuple[str, Space, dict[str, Any]], processes: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights and losses."""
    name, space, settings = case
    algorithm = build(name, SEEDS, space, **settings)
    how = TrainingConfig(gradient_steps=STEPS, batch_size=32, clip_norm=0.5, processes=processes)
    went = train(algorithm, *sampled(algorithm, SEEDS, LOGS[space]), how, chunk=3)
    found = [entry[network] for entry in went.history for network in algorithm.learning_rates()]
    losses = [[-1.0 if loss is None else loss for loss in each] for each in found]
    return dict(algorithm.named_parameters()), losses


def every_case(folder: Path, update: Any) -> None:
    """All of them, each process beside the other; then the second one refuses to go on."""
    (folder / f"{parallel.place()}.averages").write_text(repr(jobs.averages()))
    for number, case in enumerate(CASES):
        weights, losses = learned(case, 2)
        where = folder / f"{parallel.place()}-{number}"
        write_tensors(where, {key: each.detach() for key, each in weights.items() if each.numel()})
        where.with_suffix(".losses").write_text(repr(losses))
        update("cases", number, parallel.place(), "told")
    parallel.average([torch.zeros(1)])  # until the first has written all of them, too
    if parallel.place() == 1:
        raise InputError("the second one refuses.")
    parallel.average([torch.zeros(1)])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, told = tmp_path_factory.mktemp("together"), []
    with pytest.raises(InputError, match=r"^the second one refuses\.$"):
        parallel.together(every_case, folder, 2, lambda *message: told.append(message))
    assert told[:3] == [("cases", number, 0, "told") for number in range(3)]  # by the first one alone
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: " ".join(map(str, CASES[n])))
def test_two_processes_find_what_one_finds(number: int, together: Path) -> None:
    weights, losses = learned(CASES[number], 1)
    first, second = (read_tensors(together / f"{place}-{number}") for place in (0, 1))
    for key, each in first.items():
        assert torch.equal(each, second[key])
        apart = (each - weights[key]).abs() > 1e-4  # Adam makes a whole step of a gradient that is but rounding
        assert apart.float().mean() <= 0.02, key
    found = literal_eval((together / f"0-{number}.losses").read_text())
    assert found == [pytest.approx(each, rel=1e-3, abs=1e-4) for each in losses]


def test_averages_and_means_are_those_of_all_rows(together: Path) -> None:
    first, second = (literal_eval((together / f"{place}.averages").read_text()) for place in (0, 1))
    assert first[1:] == second[1:] == [[3.5, 31.5], [[0.5, 0.5]]]
    rows = torch.arange(8.0).reshape(2, 4).requires_grad_()
    parallel.batch_mean(rows * rows).square().sum().backward()
    assert rows.grad is not None
    assert (torch.cat([torch.tensor(first[0]), torch.tensor(second[0])], 1) / 2).equal(rows.grad)


def test_when_one_dies_all_end_and_it_is_said_which(tmp_path: Path) -> None:
    with pytest.raises(parallel.LostProcessError, match="process 2 of 3 that trained together died with exit code -9"):
        parallel.together(jobs.dies, tmp_path, 3, print)
    assert not multiprocessing.active_children()
    assert not any(alive(int(path.read_text())) for path in tmp_path.glob("*.pid"))


def test_when_who_started_them_is_killed_they_end(tmp_path: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-m", "tests.jobs", str(tmp_path)])
    while len(found := list(tmp_path.glob("*.pid"))) < 2:
        assert starter.poll() is None
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in found]
    assert all(map(alive, pids))
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InputError, match="toy: training: 3 processes cannot share a batch_size of 64 evenly"):
        parse_pipeline(attributes(10, 3, training={"batch_size": 64, "processes": 3}), "toy")
    for name, (key, value) in itertools.product(("mopo", "combo", "morel"), {"processes": 2, "compile": True}.items()):
        with pytest.raises(InputError, match=f"{name} practises in a model of the world.*with `{key}`; leave it out"):
            parse_pipeline(attributes(10, 3, algorithms={name: {}}, training={key: value}), "toy")
    with pytest.raises(InputError, match="2 processes are to train together, and this is one of 1"):
        learned(CASES[0], 2)
