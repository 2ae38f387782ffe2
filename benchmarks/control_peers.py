"""What `benchmarks.control` does in the peers' own environment: simulate, and train d3rlpy's algorithms.

    python -m benchmarks.control_peers log TASK SEEDS FOLDER              # make the log, and roll out what logged it
    python -m benchmarks.control_peers rollout TASK/ALGORITHM SEEDS FOLDER  # of the policies in ALGORITHM.onnx
    python -m benchmarks.control_peers TASK/ALGORITHM SEEDS FOLDER STEPS  # train, and roll out

Results are mean returns, one per training seed.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.control_tasks import BATCH, GAMMA, HIDDEN, LEARNING_RATE, TASKS, Act, make_log, mean_return
from benchmarks.harness import measure
from benchmarks.ope_peers import Values, load

PROPOSALS, SAMPLES = 10, 4  # actions per row that BCQ chooses from and CQL estimates its integral with, on both sides
MEMBERS = 10  # critics of SAC-N, on both sides
# Settings besides learning rates and sizes that make their work ours: where names are missing here, defaults are the same.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "td3_bc": ("TD3PlusBCConfig", {}),
    "iql": ("IQLConfig", {}),
    "awac": ("AWACConfig", {}),
    "cql": (
        "CQLConfig",
        {"alpha_learning_rate": 0.0, "temp_learning_rate": LEARNING_RATE, "n_action_samples": SAMPLES},
    ),
    "bcq": ("BCQConfig", {"n_action_samples": PROPOSALS, "imitator_learning_rate": LEARNING_RATE}),
    "rebrac": ("ReBRACConfig", {"actor_beta": 0.01}),
    "crr": ("CRRConfig", {}),
    "sac_n": ("SACConfig", {"temp_learning_rate": LEARNING_RATE, "n_critics": MEMBERS}),
}


def log(name: str, seeds: int, folder: Path) -> Values:
    """Make the log. Returns what it earned, and what its two policies earn where the others are evaluated."""
    task = TASKS[name]
    make_log(task, folder)
    rng = np.random.default_rng(1)
    return {
        "log": np.load(folder / "return.npy").tolist(),
        "controller": [mean_return(task, seed, lambda seen: task.noisy(seen, rng)) for seed in range(seeds)],
        "greedy": [mean_return(task, seed, task.controller) for seed in range(seeds)],
        "random": [mean_return(task, seed, lambda seen: task.uniform(seen, rng)) for seed in range(seeds)],
    }


def rollout(row: str, seeds: int, folder: Path) -> Values:
    """Of policies exported by `benchmarks.control`: as deployed, and what they think best."""
    name, _, algorithm = row.partition("/")
    task, runtime = TASKS[name], importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(folder / f"{algorithm}.onnx"), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(2)

    def acting(output: str, seed: int) -> Act:
        def act(observation: np.ndarray) -> np.ndarray:
            uniform = rng.random((len(observation), 1 + task.dimensions))
            (found,) = session.run([output], {"observation": observation, "uniform": uniform})
            return found[seed]

        return act

    return {
        output: [mean_return(task, seed, acting(output, seed)) for seed in range(seeds)]
        for output in ("greedy", "drawn")
    }


def d3rlpy(row: str, seeds: int, folder: Path, steps: int) -> Values:
    """Trained one seed after the other; its policies act greedily."""
    name, _, algorithm = row.partition("/")
    library: Any = importlib.import_module("d3rlpy")
    task, given = TASKS[name], load(folder)
    timeouts = np.zeros(len(given["reward"]), np.float32)
    timeouts[given["offsets"][1:] - 1] = 1.0
    dataset = library.dataset.MDPDataset(
        given["observation"],
        given["action"],
        given["reward"].astype(np.float32),
        np.zeros_like(timeouts),
        timeouts,
        action_space=library.ActionSpace.CONTINUOUS,
    )
    config, settings = CONFIGS[algorithm]
    plain = library.models.VectorEncoderFactory(list(HIDDEN))
    encoders = {"actor_encoder_factory": plain, "critic_encoder_factory": plain}
    if algorithm == "rebrac":
        encoders["critic_encoder_factory"] = library.models.VectorEncoderFactory(list(HIDDEN), use_layer_norm=True)
    if algorithm == "iql":
        encoders["value_encoder_factory"] = plain
    if algorithm == "bcq":
        encoders["imitator_encoder_factory"] = plain
    found = []
    for seed in range(seeds):
        library.seed(seed)
        learner = getattr(library.algos, config)(
            batch_size=BATCH,
            gamma=GAMMA,
            observation_scaler=library.preprocessing.StandardObservationScaler(),
            action_scaler=library.preprocessing.MinMaxActionScaler(
                [-task.limit] * task.dimensions, [task.limit] * task.dimensions
            ),
            actor_learning_rate=LEARNING_RATE,
            critic_learning_rate=LEARNING_RATE,
            **encoders,
            **settings,
        ).create()
        learner.fit(
            dataset,
            n_steps=steps,
            n_steps_per_epoch=steps,
            logger_adapter=library.logging.NoopAdapterFactory(),
            show_progress=False,
        )
        if algorithm == "crr":  # it would draw some actions, and one of them by the critic
            policy = learner.impl.modules.policy
            learner.impl.inner_predict_best_action = lambda seen, policy=policy: policy(seen).squashed_mu
        found.append(mean_return(task, seed, learner.predict))
    return {"greedy": found}


def main(what: str, *given: str) -> None:
    works = {"log": log, "rollout": rollout}
    if what in works:
        name, seeds, folder = given
        measure(lambda: works[what](name, int(seeds), Path(folder)))
        return
    seeds, folder, steps = given
    measure(lambda: d3rlpy(what, int(seeds), Path(folder), int(steps)))


if __name__ == "__main__":
    main(*sys.argv[1:])
