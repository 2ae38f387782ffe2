"""What the peers of `benchmarks.ope` do: SCOPE-RL, Open Bandit Pipeline and d3rlpy, each as its documentation says.

Runs in the peers' own environment, which has none of this project's dependencies: the arrays come from .npy files.

    python -m benchmarks.ope_peers WORK NUMBER FOLDER

NUMBER is that of bootstrap samples (0: estimates alone) or of gradient steps.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import measure

ALPHA = 0.05  # of the intervals
SCOPE_RL_NAMES = {
    "DM": "dm",
    "TIS": "tis",
    "PDIS": "pdis",
    "WIS": "sntis",
    "WPDIS": "snpdis",
    "DR": "dr",
    "WDR": "sndr",
}
OBP_NAMES = {"DM": "dm", "IPW": "ipw", "SNIPW": "snipw", "DR": "dr", "Switch-DR": "switch-dr", "DRos": "dr-os"}

Values = dict[str, list[float]]  # name of an estimator -> its estimate, or the two ends of its interval
Work = Callable[[], Any]


def load(folder: Path) -> dict[str, Any]:
    """Every array of a folder by its name."""
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def _ends(interval: dict[str, float]) -> list[float]:
    return [float(value) for key, value in interval.items() if "CI" in key]


def scope_rl(folder: Path, samples: int | None) -> Work:
    """Estimates of seven estimators, or their intervals."""
    library: Any = importlib.import_module("scope_rl.ope")
    discrete: Any = importlib.import_module("scope_rl.ope.discrete")
    given = load(folder)
    rows, actions = given["probs"].shape
    steps = int(given["steps"])
    logged = {
        "size": rows,
        "n_trajectories": rows // steps,
        "step_per_trajectory": steps,
        "action_type": "discrete",
        "n_actions": actions,
        "action_dim": None,
        "action_keys": None,
        "action_meaning": None,
        "state_dim": given["observation"].shape[1],
        "state_keys": None,
        "state": given["observation"],
        "action": given["action"],
        "reward": given["reward"],
        "done": np.zeros(rows),
        "terminal": np.zeros(rows),
        "info": {},
        "pscore": given["action_prob"],
        "behavior_policy": "behavior",
        "dataset_id": 0,
    }
    candidate = {
        "evaluation_policy_action": None,
        "evaluation_policy_action_dist": given["probs"],
        "state_action_value_prediction": given["q"],
        "initial_state_value_prediction": None,
        "state_action_marginal_importance_weight": None,
        "state_marginal_importance_weight": None,
        "on_policy_policy_value": None,
        "gamma": float(given["gamma"]),
        "behavior_policy": "behavior",
        "evaluation_policy": "candidate",
        "dataset_id": 0,
    }
    estimators = [
        discrete.DirectMethod(),
        discrete.TrajectoryWiseImportanceSampling(),
        discrete.PerDecisionImportanceSampling(),
        discrete.SelfNormalizedTIS(),
        discrete.SelfNormalizedPDIS(),
        discrete.DoublyRobust(),
        discrete.SelfNormalizedDR(),
    ]

    def work() -> Values:
        ope = library.OffPolicyEvaluation(logged, estimators)
        if samples is None:
            found = ope.estimate_policy_value({"candidate": candidate})["candidate"]
            return {ours: [float(found[theirs])] for ours, theirs in SCOPE_RL_NAMES.items()}
        found = ope.estimate_intervals(
            {"candidate": candidate}, alpha=ALPHA, n_bootstrap_samples=samples, random_state=0
        )["candidate"]
        return {ours: _ends(found[theirs]) for ours, theirs in SCOPE_RL_NAMES.items()}

    return work


def obp(folder: Path, samples: int | None) -> Work:
    """Estimates of six estimators, or their intervals."""
    ope: Any = importlib.import_module("obp.ope")
    given = load(folder)
    rounds, actions = given["probs"].shape
    feedback = {
        "n_rounds": rounds,
        "n_actions": actions,
        "context": given["observation"],
        "action": given["action"],
        "position": None,
        "reward": given["reward"],
        "pscore": given["action_prob"],
    }
    tables: dict[str, Any] = {
        "action_dist": given["probs"][:, :, None],
        "estimated_rewards_by_reg_model": given["q"][:, :, None],
    }
    estimators = [
        ope.DirectMethod(),
        ope.InverseProbabilityWeighting(),
        ope.SelfNormalizedInverseProbabilityWeighting(),
        ope.DoublyRobust(),
        ope.SwitchDoublyRobust(lambda_=float(given["tau"])),
        ope.DoublyRobustWithShrinkage(lambda_=float(given["shrinkage"])),
    ]

    def work() -> Values:
        evaluation = ope.OffPolicyEvaluation(bandit_feedback=feedback, ope_estimators=estimators)
        if samples is None:
            found = evaluation.estimate_policy_values(**tables)
            return {ours: [float(found[theirs])] for ours, theirs in OBP_NAMES.items()}
        found = evaluation.estimate_intervals(**tables, alpha=ALPHA, n_bootstrap_samples=samples, random_state=0)
        return {ours: _ends(found[theirs]) for ours, theirs in OBP_NAMES.items()}

    return work


def d3rlpy(folder: Path, samples: int | None) -> Work:
    """The mean value of the first observations by DiscreteFQE after `samples` gradient steps."""
    assert samples is not None
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
    encoder = library.models.VectorEncoderFactory(given["hidden"].tolist())
    policy = library.algos.DiscreteBCConfig(encoder_factory=encoder).create()
    policy.build_with_dataset(dataset)
    config = library.ope.FQEConfig(
        learning_rate=float(given["learning_rate"]),
        batch_size=int(given["batch_size"]),
        gamma=float(given["gamma"]),
        encoder_factory=encoder,
    )
    fqe = library.ope.DiscreteFQE(algo=policy, config=config)

    def work() -> Values:
        fqe.fit(
            dataset,
            n_steps=samples,
            n_steps_per_epoch=samples,
            logger_adapter=library.logging.NoopAdapterFactory(),
            show_progress=False,
        )
        first = given["observation"][:: int(given["steps"])]
        return {"FQE": [float(fqe.predict_value(first, policy.predict(first)).mean())]}

    return work


WORKS = {"scope_rl": scope_rl, "obp": obp, "d3rlpy": d3rlpy}


def measured(works: Mapping[str, Callable[[Path, int | None], Work]], work: str, number: str, log: str) -> None:
    """Measure one work in this process, once it has been done before: page faults and lazy imports are not counted."""
    samples = int(number) or None
    works[work](Path(log), samples and 2)()
    measure(works[work](Path(log), samples))


if __name__ == "__main__":
    measured(WORKS, *sys.argv[1:])
