"""What a candidate has to beat."""

import math
from dataclasses import dataclass
from pathlib import Path

from offrl_models import bundle, registry, storage
from offrl_models.config import Pipeline
from offrl_models.evaluation import BEHAVIOR, CHAMPION
from offrl_models.exported import OnnxDensity, open_policy
from offrl_models.logs.contract import Contract
from offrl_models.schema import InputError
from offrl_models.stages.ranking import current_leaderboard


@dataclass(frozen=True)
class Champion:
    """What a candidate has to beat: the policy released last, or the one that wrote the logs before the first release."""

    name: str
    version: int | None
    policy: Path  # its graph
    cap: float  # on its ratio to the behavior; 1 for the behavior itself

    @property
    def key(self) -> str:
        """What it is called among the policies that are evaluated."""
        return BEHAVIOR if self.version is None else CHAMPION

    @property
    def digest(self) -> str:
        return storage.sha256_file(self.policy)


def candidate_digest(pipeline: Pipeline) -> str:
    """Digest of the candidates that climb, the best ones, and of the behavior policy that caps them."""
    board = current_leaderboard(pipeline)
    climbing = [row["candidate"] for row in board.summary["ranking"]][: pipeline.config.gate.ladders]
    return storage.digest([*(board.key["candidates"][name] for name in climbing), board.key["behavior"]])


def current_champion(pipeline: Pipeline) -> Champion:
    """The champion to beat. A candidate that was released already is held against the one that it replaced.

    Raises InputError when the champion's bundle was altered, or takes other observations or actions than these logs have.
    """
    policies = pipeline.folder / "policies"
    pointer = registry.champion(policies)
    version = None if pointer is None else int(pointer["version"])
    if version is not None:
        manifest = storage.read_json(policies / str(version) / registry.MANIFEST)
        if manifest.get("candidate") == candidate_digest(pipeline):
            version = manifest["champion_version"]
            if version is not None:
                registry.verify(policies / str(version))
    if version is None:
        return Champion("the behavior policy", None, pipeline.folder / "behavior" / bundle.POLICY, 1.0)
    cap = storage.read_json(policies / str(version) / registry.MANIFEST)["cap"]
    champion = Champion(
        f"version {version}", version, policies / str(version) / bundle.POLICY, math.inf if cap is None else cap
    )
    contract = pipeline.config.logs
    released, columns, action = open_policy(champion.policy), len(contract.features), contract.action
    if isinstance(released, OnnxDensity) is not action.continuous:
        raise InputError(
            f"{champion.policy} is not over {action.space} actions, as the logs are; a candidate cannot be held against it, so "
            "start a dataset of its own."
        )
    released.require_interface(columns, action.dimensions if action.continuous else action.n_actions)
    _require_alike(policies / str(version), contract)
    return champion


def _require_alike(released: Path, contract: Contract) -> None:
    """Raises InputError where a bundle was made for other observations or actions, in other places or called otherwise."""
    made_for = Contract.model_validate(storage.read_json(released / "config.json")["logs"])
    for part, (was, now) in {
        "observations": [(logs.features, logs.category_names) for logs in (made_for, contract)],
        "actions": [(logs.action.action_names, logs.action.dimension_names) for logs in (made_for, contract)],
    }.items():
        if was != now:
            raise InputError(
                f"{released} was made for other {part} than the contract has now, or in another order; a candidate cannot be held "
                f"against it: put the {part} back, or start a dataset of its own."
            )
