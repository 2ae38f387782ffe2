"""What the peer of `benchmarks.training` does: d3rlpy's `fit`. Runs in the peers' own environment, as `benchmarks.ope_peers` does.

python -m benchmarks.training_peers ROW STEPS FOLDER
"""

import dataclasses
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ope_peers import Values, Work, load, measured

# Settings that make their work ours. Their imitators add a penalty of the log-probabilities, and BCQ's networks share layers.
DISCRETE: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("DiscreteBCConfig", {"beta": 0.0}),
    "dqn": ("DQNConfig", {}),
    "cql": ("DiscreteCQLConfig", {}),
    "bcq": ("DiscreteBCQConfig", {"beta": 0.0, "share_encoder": False}),
}
CONTINUOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("BCConfig", {"policy_type": "stochastic"}),
    "td3_bc": ("TD3PlusBCConfig", {}),
    "iql": ("IQLConfig", {}),
    "awac": ("AWACConfig", {}),
    "cql": ("CQLConfig", {"alpha_learning_rate": 0.0}),  # the weight of the conservative term stays what it is
    "sac_n": ("SACConfig", {"n_critics": 10}),
}
CONFIGS = {f"{name}/{actions}": each for actions in ("8", "25") for name, each in DISCRETE.items()}
CONFIGS |= {f"{name}/c": each for name, each in CONTINUOUS.items()}


def _fit(row: str, folder: Path, steps: int | None) -> Work:
    """The mean loss of so many gradient steps; over continuous actions that of the critics, where there are any."""
    assert steps is not None
    library: Any = importlib.import_module("d3rlpy")
    given, continuous = load(folder), row.endswith("/c")
    library.seed(0)
    dataset = library.dataset.MDPDataset(
        given["observation"],
        given["action"],
        given["reward"].astype(np.float32),
        given["terminated"].astype(np.float32),
        action_space=library.ActionSpace.CONTINUOUS if continuous else library.ActionSpace.DISCRETE,
        action_size=given["action"].shape[1] if continuous else int(given["actions"]),
    )
    name, settings = CONFIGS[row]
    kind, sizes = getattr(library.algos, name), given["hidden"].tolist()
    same: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        if each.name.endswith("learning_rate"):
            same[each.name] = float(given["learning_rate"])
        elif each.name.endswith("encoder_factory"):
            same[each.name] = library.models.VectorEncoderFactory(sizes)
    if not row.startswith("bc/"):
        same["gamma"] = float(given["gamma"])
    learner = kind(batch_size=int(given["batch_size"]), **{**same, **settings}).create()
    learner.build_with_dataset(dataset)

    def work() -> Values:
        ((_, found),) = learner.fit(
            dataset,
            n_steps=steps,
            n_steps_per_epoch=steps,
            logger_adapter=library.logging.NoopAdapterFactory(),
            show_progress=False,
        )
        return {"loss": [float(found["loss"] if "loss" in found else found["critic_loss"])]}

    return work


WORKS = {row: partial(_fit, row) for row in CONFIGS}

if __name__ == "__main__":
    measured(WORKS, *sys.argv[1:])
