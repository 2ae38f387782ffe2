"""What the peer of `benchmarks.known_answers` does: d3rlpy's `fit`. Runs in the peers' own environment.

python -m benchmarks.known_answers_peers METHOD SEEDS FOLDER
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import measure
from benchmarks.ope_peers import load

HIDDEN, BATCH, LEARNING_RATE, TARGET_INTERVAL, STEPS = (64, 64), 256, 1e-3, 100, 3_000  # of both sides
# Settings that make their work ours. Their imitators add a penalty of the logits, and BCQ's networks share layers.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("DiscreteBCConfig", {"beta": 0.0}),
    "dqn": ("DQNConfig", {}),
    "double_dqn": ("DoubleDQNConfig", {}),
    "qr_dqn": ("DQNConfig", {"q_func_factory": "QRQFunctionFactory"}),
    "nfq": ("NFQConfig", {}),
    "discrete_sac": ("DiscreteSACConfig", {}),
    "cql": ("DiscreteCQLConfig", {}),
    "bcq": ("DiscreteBCQConfig", {"share_encoder": False}),
}


def actions(method: str, seeds: int, folder: Path) -> dict[str, list[list[int]]]:
    """The greedy action in every state, of each seed's policy; one seed is trained after the other."""
    library: Any = importlib.import_module("d3rlpy")
    given = load(folder)
    every = np.eye(int(given["sizes"][0]), dtype=np.float32)
    dataset = library.dataset.MDPDataset(
        every[given["state"]],
        given["action"],
        given["reward"],
        given["terminated"],
        action_space=library.ActionSpace.DISCRETE,
        action_size=int(given["sizes"][1]),
    )
    name, settings = CONFIGS[method]
    kind = getattr(library.algos, name)
    same: dict[str, Any] = {"batch_size": BATCH}
    for each in dataclasses.fields(kind):
        if each.name.endswith("learning_rate"):
            same[each.name] = LEARNING_RATE
        elif each.name.endswith("encoder_factory"):
            same[each.name] = library.models.VectorEncoderFactory(list(HIDDEN))
        elif each.name == "target_update_interval":
            same[each.name] = TARGET_INTERVAL
        elif each.name == "gamma":
            same[each.name] = 1.0
    if "q_func_factory" in settings:
        settings = {"q_func_factory": getattr(library.models, settings["q_func_factory"])()}
    found = []
    for seed in range(seeds):
        library.seed(seed)
        learner = kind(**{**same, **settings}).create()
        learner.fit(
            dataset,
            n_steps=STEPS,
            n_steps_per_epoch=STEPS,
            logger_adapter=library.logging.NoopAdapterFactory(),
            show_progress=False,
        )
        found.append(learner.predict(every).tolist())
    return {"actions": found}


if __name__ == "__main__":
    wanted, count, where = sys.argv[1:]
    measure(lambda: actions(wanted, int(count), Path(where)))
