"""What a checkout given to `benchmarks.training` does: train one row by its own replay buffer, networks and trainer.

Runs in the environment of the peers, or in one with jax, which have none of this project's dependencies:

    python -m benchmarks.training_checkouts corl ../CORL td3_bc/c STEPS FOLDER

What a script imports for environments and logging is replaced by something empty where it is missing. Stacks of more hidden
layers than ours are cut. Settings are the repositories' own but for sizes, learning rates and discount, and for ours where they
change the work: SAC-N's ten critics, CQL's ten actions and fixed weight. CORL and OfflineRL-Kit read their losses in each step.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from benchmarks.checkouts import CHECKOUTS
from benchmarks.ope_peers import Values, Work, load, measured

# What has nothing to do with a gradient step.
DISPENSABLE = ("d4rl", "gym", "pyrallis", "torch.utils.tensorboard", "tqdm", "tyro", "wandb")
CRITICS = 10  # of SAC-N
UPDATES = "num_critic_updates_per_step"  # Unifloral's name for the updates of critics within one step of its own

Given = Mapping[str, Any]  # the arrays of the log and the settings, by name
Losses = Mapping[str, Any]
Prepare = Callable[[Path, str, Given, int], Callable[[], Losses]]


@dataclass(frozen=True)
class Sizes:
    """Of the networks."""

    observed: int
    dimensions: int  # of actions
    hidden: tuple[int, int]
    learning_rate: float

    @classmethod
    def of(cls, given: Given) -> "Sizes":
        first, second = given["hidden"].tolist()
        observed, dimensions = given["observation"].shape[1], given["action"].shape[1]
        return cls(observed, dimensions, (first, second), float(given["learning_rate"]))


def transitions(given: Given) -> dict[str, np.ndarray]:
    """The log under the names that D4RL has made common. What follows the last row of an episode is never used."""
    observations = given["observation"].astype(np.float32)
    return {
        "observations": observations,
        "actions": given["action"].astype(np.float32),
        "rewards": given["reward"].astype(np.float32),
        "next_observations": np.roll(observations, -1, 0),
        "terminals": given["terminated"].astype(np.float32),
    }


def replace_dispensable() -> None:
    for name in DISPENSABLE:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()


def imported(file: Path) -> ModuleType:
    """A script as a module. Raises what the script raises."""
    spec = importlib.util.spec_from_file_location(f"checkout_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def accepted(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in known}


def cut(network: Any, hidden: Sequence[int]) -> Any:
    """The network with no more hidden layers than asked for in each of its stacks.

    Raises ValueError where it has no stack of so many layers, each as wide as asked for.
    """
    nn: Any = importlib.import_module("torch.nn")
    stacks = [each for each in network.modules() if isinstance(each, nn.Sequential)]
    for stack in stacks:
        bends = [place for place, each in enumerate(stack) if isinstance(each, nn.ReLU)]
        if len(bends) > len(hidden):
            del stack[bends[len(hidden) - 1] + 1 : bends[-1] + 1]
        bends = [each for each in stack if isinstance(each, nn.ReLU)]
        if len(bends) != len(hidden) or sorted(stack[2].weight.shape[-2:]) != sorted(hidden):
            raise ValueError(f"{type(network).__name__} has other hidden layers than {tuple(hidden)}: {stack}")
    if not stacks:
        raise ValueError(f"{type(network).__name__} has no stack of layers")
    return network


def loop(sample: Callable[[], Any], step: Callable[[Any], Losses], steps: int) -> Callable[[], Losses]:
    def work() -> Losses:
        found: Losses = {}
        for _ in range(steps):
            found = step(sample())
        return found

    return work


CORL_TRAINERS = {
    "bc/c": "BC",
    "td3_bc/c": "TD3_BC",
    "iql/c": "ImplicitQLearning",
    "awac/c": "AdvantageWeightedActorCritic",
    "cql/c": "ContinuousCQL",
    "sac_n/c": "SACN",
}
CORL_NETWORKS = {  # argument of the trainer -> names that the class of its network goes by
    "actor": ("Actor", "GaussianPolicy", "TanhGaussianPolicy"),
    "critic": ("VectorizedCritic",),
    "critic_1": ("Critic", "FullyConnectedQFunction"),
    "critic_2": ("Critic", "FullyConnectedQFunction"),
    "q_network": ("TwinQ",),
    "v_network": ("ValueFunction",),
}


def corl(path: Path, row: str, given: Given, steps: int) -> Callable[[], Losses]:
    """As in the other two, behavior is cloned by squared errors of a single action, where ours and d3rlpy's is a density."""
    torch: Any = importlib.import_module("torch")
    script: Any = imported(CHECKOUTS["corl"].file(path, row))
    sizes, data = Sizes.of(given), transitions(given)
    shape: dict[str, Any] = {"state_dim": sizes.observed, "observation_dim": sizes.observed, "max_action": 1.0}
    shape |= {"action_dim": sizes.dimensions, "act_dim": sizes.dimensions}
    shape |= {"hidden_dim": sizes.hidden[0], "num_critics": CRITICS}
    trainer = getattr(script, CORL_TRAINERS[row])
    arguments: dict[str, Any] = {}
    for name in accepted(trainer, CORL_NETWORKS):
        kind = next(getattr(script, each) for each in CORL_NETWORKS[name] if hasattr(script, each))
        arguments[name] = cut(kind(**accepted(kind, shape)), sizes.hidden)
        optimizer = torch.optim.Adam(arguments[name].parameters(), lr=sizes.learning_rate)
        arguments[f"{name.removesuffix('_network')}_optimizer"] = optimizer
    settings = dict.fromkeys(("policy_lr", "qf_lr", "alpha_learning_rate"), sizes.learning_rate)
    settings |= dict.fromkeys(("discount", "gamma"), float(given["gamma"]))
    settings |= {"max_action": 1.0, "max_steps": steps, "target_entropy": -float(sizes.dimensions), "bc_steps": 0}
    learner = trainer(**arguments, **accepted(trainer, settings))
    buffer = script.ReplayBuffer(sizes.observed, sizes.dimensions, len(data["rewards"]))
    buffer.load_d4rl_dataset(data)
    step = learner.train if hasattr(learner, "train") else learner.update
    return loop(partial(buffer.sample, int(given["batch_size"])), step, steps)


def offlinerl_kit(path: Path, row: str, given: Given, steps: int) -> Callable[[], Losses]:
    torch: Any = importlib.import_module("torch")
    sys.path.insert(0, str(path))
    parts = ("buffer", "modules", "nets", "policy")
    buffers, modules, nets, policies = (importlib.import_module(f"offlinerlkit.{part}") for part in parts)
    sizes, data, hidden = Sizes.of(given), transitions(given), given["hidden"].tolist()
    inputs = sizes.observed + sizes.dimensions
    adam = partial(torch.optim.Adam, lr=sizes.learning_rate)

    def single() -> Any:
        return modules.Actor(nets.MLP(input_dim=sizes.observed, hidden_dims=hidden), sizes.dimensions)

    def drawn(kind: Any, squashed: bool) -> Any:
        latent = {"latent_dim": hidden[-1], "output_dim": sizes.dimensions}
        density = kind(**latent, unbounded=squashed, conditioned_sigma=squashed)
        return modules.ActorProb(nets.MLP(input_dim=sizes.observed, hidden_dims=hidden), density)

    def critic(inputs: int = inputs) -> Any:
        return modules.Critic(nets.MLP(input_dim=inputs, hidden_dims=hidden))

    def policy(kind: Any, networks: Sequence[Any], **settings: Any) -> Any:
        return kind(*networks, *(adam(each.parameters()) for each in networks), **settings)

    log_temperature = torch.zeros(1, requires_grad=True)
    gamma, temperature = float(given["gamma"]), (-float(sizes.dimensions), log_temperature, adam([log_temperature]))
    space = SimpleNamespace(low=-np.ones(sizes.dimensions), high=np.ones(sizes.dimensions))
    match row.removesuffix("/c"):
        case "bc":
            learner = policy(policies.BCPolicy, [single()])
        case "td3_bc":
            learner = policy(policies.TD3BCPolicy, [single(), critic(), critic()], gamma=gamma)
        case "iql":
            networks = [drawn(modules.DiagGaussian, False), critic(), critic(), critic(sizes.observed)]
            weights = {"expectile": 0.7, "temperature": 3.0}
            learner = policy(policies.IQLPolicy, networks, action_space=space, gamma=gamma, **weights)
        case "cql":
            networks = [drawn(modules.TanhDiagGaussian, True), critic(), critic()]
            weights = {"cql_weight": 5.0, "with_lagrange": False}  # ours, and a weight that stays what it is
            settings = {"action_space": space, "gamma": gamma, "alpha": temperature, **weights}
            learner = policy(policies.CQLPolicy, networks, **settings)
        case _:  # EDAC without its term for diversity
            critics = modules.EnsembleCritic(sizes.observed, sizes.dimensions, hidden, num_ensemble=CRITICS)
            settings = {"gamma": gamma, "alpha": temperature, "deterministic_backup": False, "eta": 0.0}
            learner = policy(policies.EDACPolicy, [drawn(modules.TanhDiagGaussian, True), critics], **settings)
    learner.train()
    shape = {"obs_shape": (sizes.observed,), "obs_dtype": np.float32, "action_dtype": np.float32}
    buffer = buffers.ReplayBuffer(buffer_size=len(data["rewards"]), action_dim=sizes.dimensions, **shape)
    buffer.load_dataset(data)
    return loop(partial(buffer.sample, int(given["batch_size"])), learner.learn, steps)


UNIFLORAL_NETWORKS = {  # name within the state of training -> names that its class goes by, and how many inputs it has
    "actor": (("DeterministicTanhActor", "TanhGaussianActor"), 1),
    "dual_q": (("DualQNetwork",), 2),
    "vec_q": (("VectorQ",), 2),
    "value": (("StateValueFunction",), 1),
    "alpha": (("EntropyCoef",), 0),
}


def unifloral(path: Path, row: str, given: Given, steps: int) -> Callable[[], Losses]:
    """All steps are one `scan`, as in its scripts, compiled before the clock starts; it draws its batches within.

    A step of its TD3+BC is two of ours, for it updates the critics twice, on one batch.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # XLA has as many threads as it may use cores
    jax: Any = importlib.import_module("jax")
    # The scripts set flags for GPUs, which an XLA that has begun does not read.
    jax.block_until_ready(jax.numpy.zeros(1))
    script: Any = imported(CHECKOUTS["unifloral"].file(path, row))
    script.range = lambda _layers: range(2)  # their networks count hidden layers with it, and nothing else here does
    sizes, data = Sizes.of(given), transitions(given)
    settings = {"lr": sizes.learning_rate, "gamma": float(given["gamma"]), "batch_size": int(given["batch_size"])}
    args = script.Args(**accepted(script.Args, {**settings, "num_updates": steps, "num_critics": CRITICS}))
    log = script.Transition(*map(jax.numpy.array, data.values()))
    shape = {"num_actions": sizes.dimensions, "obs_mean": log.obs.mean(0), "obs_std": log.obs.std(0)}
    inputs = [jax.numpy.zeros(sizes.observed), jax.numpy.zeros(sizes.dimensions)]
    networks: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for number, name in enumerate(script.AgentTrainState._fields):
        of = name.removesuffix("_target")
        if of in networks:
            states[name] = states[of]
            continue
        kinds, width = UNIFLORAL_NETWORKS[of]
        kind = next(getattr(script, each) for each in kinds if hasattr(script, each))
        fields = {each.name for each in dataclasses.fields(kind)}
        known = {**shape, "num_critics": CRITICS}
        networks[of] = kind(**{key: value for key, value in known.items() if key in fields})
        states[of] = script.create_train_state(args, jax.random.PRNGKey(number), networks[of], inputs[:width])
        wide = [leaf.shape[-2:] for leaf in jax.tree_util.tree_leaves(states[of].params) if leaf.ndim > 1]
        if width and wide.count(sizes.hidden) != 1:
            raise ValueError(f"{type(networks[of]).__name__} has other hidden layers than {sizes.hidden}: {wide}")
    step = script.make_train_step(args, *(each.apply for each in networks.values()), log)
    iterations = -(-steps // getattr(args, UPDATES, 1))
    first = (jax.random.PRNGKey(0), script.AgentTrainState(**states))
    train = jax.jit(lambda state: jax.lax.scan(step, state, None, iterations)).lower(first).compile()

    def work() -> Losses:
        _, losses = jax.block_until_ready(train(first))
        return {name: values[-1] for name, values in losses.items()}

    return work


WORKS: dict[str, Prepare] = {"corl": corl, "offlinerl-kit": offlinerl_kit, "unifloral": unifloral}


def fit(name: str, path: Path, row: str, folder: Path, steps: int | None) -> Work:
    assert steps is not None
    np.random.seed(0)  # what their buffers draw by
    if name != "unifloral":
        importlib.import_module("torch").manual_seed(0)
    replace_dispensable()
    work = WORKS[name](path, row, load(folder), steps)

    def checked() -> Values:
        losses = {key: float(value) for key, value in work().items() if "loss" in key}
        if not losses or not all(map(math.isfinite, losses.values())):
            raise ValueError(f"{CHECKOUTS[name].title} ended {row} with losses that are no numbers: {losses}")
        return {"loss": [sum(losses.values())]}

    return checked


def main(arguments: Sequence[str]) -> None:
    name, path, *rest = arguments
    measured({row: partial(fit, name, Path(path), row) for row in CHECKOUTS[name].files}, *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
