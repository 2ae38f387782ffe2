"""What value-based methods find on ICU-Sepsis where everything was tried, beside the optimum of the log.

    python -m benchmarks.known_answers               # every method
    python -m benchmarks.known_answers --row dqn     # one only; may be repeated

The behavior plays each allowed action as often as any other. The log is an empirical Markov decision process; its optimum is found
by dynamic programming, and what the greedy action of a method earns in it as well. `share` is the latter over the former.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Figure
from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World, icu_sepsis
from offrl_models.schema import Episodes, Feature
from offrl_models.training import fit

TARGET = 0.99  # of the optimum
STAYS, STEPS, BATCH, LEARNING_RATE, HIDDEN = 60_000, 20_000, 1024, 0.003, (256,)
SWEEPS = 1000  # of value iteration
EVERY: dict[str, Any] = {"target_interval": 200}
ROWS: dict[str, dict[str, Any]] = {
    "dqn": EVERY,
    "nfq": EVERY,
    "qr_dqn": EVERY,
    "iqn": {**EVERY, "quantiles": 8, "target_quantiles": 8},
    "cql": {**EVERY, "alpha": 0.0003},
    "bcq": {**EVERY, "threshold": 0.01, "logit_penalty": 0.001},
    "iql": {"expectile": 0.95, "inverse_temperature": 100.0, "polyak": 0.01},
}


def uniform_log(stays: int) -> tuple[World, Episodes]:
    """ICU-Sepsis under a behavior that tries everything alike, and a log of it."""
    world = icu_sepsis()
    world = dataclasses.replace(world, behavior=world.mask / world.mask.sum(1, keepdims=True))
    log = world.simulate(stays, seed=3)
    return world, dataclasses.replace(log, features=(Feature("state", world.n_states),))


def best_value(model: TabularModel, mask: np.ndarray) -> float:
    """Of the best policy over actions that the log shows, by value iteration."""
    shown, q = (model.visits > 0) & mask, np.zeros(model.reward.shape)
    value = np.zeros(len(q))
    for _ in range(SWEEPS):
        q = model.reward + model.transition @ value
        value = np.where(shown.any(1), np.where(shown, q, -np.inf).max(1), 0.0)
    return float(model.initial @ value)


def value_of(model: TabularModel, policy: np.ndarray) -> float:
    """By repeated backups: who goes round in circles earns nothing."""
    value = np.zeros(len(policy))
    for _ in range(SWEEPS):
        value = (policy * (model.reward + model.transition @ value)).sum(1)
    return float(model.initial @ value)


def greedy(algorithm: Any, world: World) -> np.ndarray:
    """The likeliest action of the policy in every state, as a table."""
    states = torch.arange(float(world.n_states))[None, :, None].double()
    with torch.no_grad():
        probs = algorithm.double().distribution(states, torch.as_tensor(world.mask)[None]).log_probs.exp()[0].numpy()
    return np.eye(probs.shape[1])[probs.argmax(1)]


def run(row: str, world: World, log: Episodes, steps: int, about: dict[str, Any]) -> list[Figure]:
    model = TabularModel.fit(log, world.n_states)
    assert model is not None
    optimum, started = best_value(model, world.mask), time.process_time()
    config = make_config(row, {"hidden": HIDDEN, "learning_rate": LEARNING_RATE, **ROWS[row]})
    how = {"seeds": [0], "gradient_steps": steps, "batch_size": BATCH, "schedule": "cosine"}
    algorithm, went = fit(row, config, log, Encoder(log.features), **how)
    went.require_all()
    cpu, policy = time.process_time() - started, greedy(algorithm, world)
    found, title = value_of(model, policy), f"known_answers/{row}"
    return [
        Figure(f"{title}/value", found, "return", "optimum of the log", found / optimum, TARGET, about),
        Figure(f"{title}/true_value", world.value(policy), "return", None, None, None, about),
        Figure(f"{title}/cpu", cpu, "CPU s", None, None, None, about),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_answers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--row", action="append", choices=list(ROWS), help="only this method; may be repeated")
    parser.add_argument("--stays", type=int, default=STAYS, help="in the log")
    parser.add_argument("--steps", type=int, default=STEPS, help="gradient steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = harness.machine("torch", "lightning")
    world, log = uniform_log(options.stays)
    for row in options.row or ROWS:
        print(f"{row}: {options.steps:,} steps on {log.n_rows:,} rows", file=sys.stderr)
        harness.print_figures(run(row, world, log, options.steps, about))


if __name__ == "__main__":
    main()
