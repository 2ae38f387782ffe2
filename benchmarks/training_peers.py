"""What the peer of `benchmarks.training` does: d3rlpy's `fit`. Runs in the peers' own environment, as `benchmarks.ope_peers` does.

python -m benchmarks.training_peers ALGORITHM STEPS FOLDER
"""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ope_peers import Values, Work, load, measured

# Settings that make their work ours. Their imitators add a penalty of the log-probabilities, and BCQ's networks share layers.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("DiscreteBCConfig", {"beta": 0.0}),
    "cql": ("DiscreteCQLConfig", {}),
    "bcq": ("DiscreteBCQConfig", {"beta": 0.0, "share_encoder": False}),
}


def _fit(algorithm: str, folder: Path, steps: int | None) -> Work:
    """The mean loss of so many gradient steps."""
    assert steps is not None
    library: Any = importlib.import_module("d3rlpy")
    given = load(folder)
    library.seed(0)
    dataset = library.dataset.MDPDataset(
        given["observation"],
        given["action"],
        given["reward"].astype(np.float32),
        given["terminated"].astype(np.float32),
        action_space=library.ActionSpace.DISCRETE,
        action_size=int(given["actions"]),
    )
    name, settings = CONFIGS[algorithm]
    if algorithm != "bc":
        settings = {**settings, "gamma": float(given["gamma"])}
    learner = getattr(library.algos, name)(
        learning_rate=float(given["learning_rate"]),
        batch_size=int(given["batch_size"]),
        encoder_factory=library.models.VectorEncoderFactory(given["hidden"].tolist()),
        **settings,
    ).create()
    learner.build_with_dataset(dataset)

    def work() -> Values:
        ((_, found),) = learner.fit(
            dataset,
            n_steps=steps,
            n_steps_per_epoch=steps,
            logger_adapter=library.logging.NoopAdapterFactory(),
            show_progress=False,
        )
        return {"loss": [float(found["loss"])]}

    return work


WORKS = {algorithm: partial(_fit, algorithm) for algorithm in CONFIGS}

if __name__ == "__main__":
    measured(WORKS, *sys.argv[1:])
