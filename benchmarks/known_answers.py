"""What methods over discrete actions find on ICU-Sepsis, by exact value: beside the optimum of a log, and beside d3rlpy's.

    python -m benchmarks.known_answers --make-peers          # make the peers' environment first, where it is missing
    python -m benchmarks.known_answers                       # every row
    python -m benchmarks.known_answers --row clinician/cql   # one row only; may be repeated

`tried/METHOD`: the behavior plays each allowed action as often as any other, so that the log shows nearly all of them. It is an
empirical Markov decision process; its optimum is found by dynamic programming, and what the greedy policy earns in it, too. The
ratio is the latter over the former.

`clinician/METHOD`: the log is that of the example's clinician, small, and without masks, which d3rlpy does not have; an action
that a state does not allow does what the allowed ones do on average, as in the published environment. Both sides see the state as
one column per state, and have the same networks, batches, learning rates, target updates and steps, and as many seeds, ours all at
once. What is compared is the true value of the greedy policies, seed by seed, with the verdicts of `benchmarks.control`.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, ope
from benchmarks.control import Mean, difference, kept, verdict
from benchmarks.harness import Figure
from benchmarks.known_answers_peers import BATCH, CONFIGS, HIDDEN, LEARNING_RATE, STEPS, TARGET_INTERVAL
from offrl_models.algorithms import make_config
from offrl_models.datasets.encoding import Encoder
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World, icu_sepsis
from offrl_models.schema import Episodes, Feature
from offrl_models.training import fit

TARGET = 0.99  # of the optimum
SWEEPS = 1000  # of value iteration
ENOUGH, FEW = 60_000, 6_000  # stays
EVERY: dict[str, Any] = {"target_interval": 200}
TRIED: dict[str, dict[str, Any]] = {
    "dqn": EVERY,
    "double_dqn": EVERY,
    "nfq": EVERY,
    "qr_dqn": EVERY,
    "iqn": {**EVERY, "quantiles": 8, "target_quantiles": 8},
    "cql": {**EVERY, "alpha": 0.0003},
    "bcq": {**EVERY, "threshold": 0.01, "logit_penalty": 0.001},
    "iql": {"expectile": 0.95, "inverse_temperature": 100.0, "polyak": 0.01},
}
TRAINING_TRIED = {"seeds": [0], "gradient_steps": 20_000, "batch_size": 1024, "schedule": "cosine"}
SIZES_TRIED: dict[str, Any] = {"hidden": (256,), "learning_rate": 0.003}
SEEDS = 5
ALIKE: dict[str, Any] = {"hidden": HIDDEN, "learning_rate": LEARNING_RATE}
CLINICIAN: dict[str, dict[str, Any]] = {name: {"target_interval": TARGET_INTERVAL} for name in CONFIGS}
CLINICIAN |= {"bc": {}, "nfq": {"target_interval": 1}, "iql": {}}
NAMES = [*(f"tried/{name}" for name in TRIED), *(f"clinician/{name}" for name in CLINICIAN)]


def columns(log: Episodes, world: World) -> Episodes:
    """The log with one column per state, 1 where it is the present one."""
    every, names = np.eye(world.n_states, dtype=np.float32), tuple(Feature(f"s{i}") for i in range(world.n_states))
    seen, last = (every[each[:, 0].astype(int)] for each in (log.observation, log.final_observation))
    return dataclasses.replace(log, observation=seen, final_observation=last, features=names)


def tried(stays: int) -> tuple[World, Episodes]:
    """ICU-Sepsis under a behavior that tries everything alike, and a log of it."""
    world = icu_sepsis()
    world = dataclasses.replace(world, behavior=world.mask / world.mask.sum(1, keepdims=True))
    return world, dataclasses.replace(world.simulate(stays, seed=3), features=(Feature("state", world.n_states),))


def clinician(stays: int) -> tuple[World, Episodes]:
    """The example's clinician where nothing is forbidden, and a log of it."""
    world = icu_sepsis()
    world = dataclasses.replace(world, mask=np.ones_like(world.mask))
    return world, world.simulate(stays, seed=4)


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


def table(actions: np.ndarray, world: World) -> np.ndarray:
    """A policy of one action per state, as probabilities."""
    return np.eye(world.n_actions)[actions]


def trained(row: str, settings: dict[str, Any], world: World, log: Episodes, **training: Any) -> np.ndarray:
    """The greedy action of each seed's policy in every state, [seeds, states]."""
    name = row.removeprefix("double_")
    config = make_config(name, {**settings, **({"double": True} if name != row else {})})
    algorithm, went = fit(name, config, log, Encoder(log.features), **training)
    went.require_all()
    seeds = len(training["seeds"])
    states = torch.arange(world.n_states)[:, None] if len(log.features) == 1 else torch.eye(world.n_states)
    mask = torch.as_tensor(world.mask).expand(seeds, -1, -1)
    with torch.no_grad():
        return algorithm.double().distribution(states.double().expand(seeds, -1, -1), mask).greedy.numpy()


def beside_the_optimum(names: Sequence[str], about: dict[str, Any]) -> list[str]:
    """Rows of `tried`, each as a line of a table under TRIED_HEADER, and the figures on stdout."""
    world, log = tried(ENOUGH)
    model, lines = TabularModel.fit(log, world.n_states), []
    assert model is not None
    optimum = best_value(model, world.mask)
    for name in names:
        print(f"tried/{name}: {log.n_rows:,} rows", file=sys.stderr)
        started = time.process_time()
        (actions,) = trained(name, {**SIZES_TRIED, **TRIED[name]}, world, log, **TRAINING_TRIED)
        cpu, policy, title = time.process_time() - started, table(actions, world), f"known_answers/tried/{name}"
        found, truth = value_of(model, policy), world.value(policy)
        harness.print_figures(
            [
                Figure(f"{title}/value", found, "return", "optimum of the log", found / optimum, TARGET, about),
                Figure(f"{title}/true_value", truth, "return", None, None, None, about),
                Figure(f"{title}/cpu", cpu, "CPU s", None, None, None, about),
            ]
        )
        lines.append(f"| {name} | {found:.4f} | {optimum:.4f} | {found / optimum:.4f} | {truth:.4f} | {cpu:.0f} |")
    return lines


def beside_d3rlpy(names: Sequence[str], folder: Path, python: str | None, about: dict[str, Any]) -> list[str]:
    """Rows of `clinician`, each as a line of a table under CLINICIAN_HEADER, and the figures on stdout."""
    (world, log), lines = clinician(FEW), []
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "state": log.observation[:, 0].astype(np.int64),
        "action": log.action,
        "reward": log.reward.astype(np.float32),
        "terminated": log.terminated.astype(np.float32),
        "sizes": np.array([world.n_states, world.n_actions]),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    log = columns(log, world)
    for name in names:
        print(f"clinician/{name}: {log.n_rows:,} rows", file=sys.stderr)
        how = {"seeds": list(range(SEEDS)), "gradient_steps": STEPS, "batch_size": BATCH}
        actions = trained(name, {**ALIKE, **CLINICIAN[name]}, world, log, **how)
        ours, title = [world.value(table(each, world)) for each in actions], f"known_answers/clinician/{name}"
        figures, cells = (
            [Figure(f"{title}/offrl", Mean.of(ours).value, "return", None, None, None, about)],
            ["", "", ""],
        )
        if python and name in CONFIGS:
            command = [python, "-m", "benchmarks.known_answers_peers", name, str(SEEDS), str(folder)]
            given = kept(folder / f"{name}-{STEPS}-{SEEDS}.json", command).result["actions"]
            theirs = [world.value(table(np.array(each), world)) for each in given]
            apart = difference(ours, theirs)
            cells = [f"{Mean.of(theirs):.3f}", f"{apart:.3f}", verdict(apart)]
            figures += [
                Figure(f"{title}/d3rlpy", Mean.of(theirs).value, "return", None, None, None, about),
                Figure(f"{title}/difference", apart.value, "return", "d3rlpy", None, None, about),
                Figure(f"{title}/difference/to", apart.high, "return", "d3rlpy", None, 0.0, about),
            ]
        harness.print_figures(figures)
        lines.append(f"| {' | '.join([name, f'{Mean.of(ours):.3f}', *cells])} |")
    behavior = world.value(world.behavior)
    return [*lines, f"| the clinician | {behavior:.3f} | | | |"]


TRIED_HEADER = """| row | value in the log | optimum of the log | share | true value | CPU s |
|---|---|---|---|---|---|"""
CLINICIAN_HEADER = """| row | offrl | d3rlpy | difference | verdict |
|---|---|---|---|---|"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_answers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--row", action="append", choices=NAMES, help="only this log/method; may be repeated")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the environment of the peers")
    parser.add_argument("--make-peers", action="store_true", help="make that environment where it is missing")
    parser.add_argument("--folder", type=Path, help="keep d3rlpy's results here; what is in it is not run again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = harness.machine("torch", "lightning")
    chosen = {log: [name for row in options.row or NAMES for kind, _, name in [row.partition("/")] if kind == log]
              for log in ("tried", "clinician")}  # fmt: skip
    tables: list[str] = []
    if chosen["tried"]:
        tables += ["", TRIED_HEADER, *beside_the_optimum(chosen["tried"], about)]
    if chosen["clinician"]:
        peers = options.peers.absolute()
        python = str(peers / "bin" / "python") if ope.ready(peers, options.make_peers) else None
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = beside_d3rlpy(chosen["clinician"], folder, python, {**about, "peers": ope.PEERS})
            tables += ["", CLINICIAN_HEADER, *found]
    print("\n".join(tables), file=sys.stderr)


if __name__ == "__main__":
    main()
