"""The policy that is assessed, where it can be asked: an exported graph, or a Python function."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float64
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from offrl_models import bundle, registry, storage
from offrl_models.assess.graphs import TOLERANCE, require_density, require_interface
from offrl_models.assess.log import Assessed, make_contract
from offrl_models.assess.named import order_of
from offrl_models.choices import Choices, Draws, Probabilities
from offrl_models.exported import Exported, OnnxPolicy, open_policy
from offrl_models.logs.contract import Contract
from offrl_models.ope.sequences import ratios
from offrl_models.policies import ROWS_AT_A_TIME
from offrl_models.schema import Episodes, InputError

Function = Callable[
    [np.ndarray, np.ndarray], Any
]  # observation [rows, columns], mask [rows, actions] -> [rows, actions]
ALIKE = 1e-6  # probabilities in one column for one observation that differ by no more are the same
ASKED, ASKED_ALONE = 256, 32  # rows, together and then some of them one by one


class FunctionPolicy(OnnxPolicy):
    """A Python function where a graph is expected. Rows with the same observation and mask are asked about once."""

    def __init__(self, function: Function, name: str):
        self.path, self.session = Path(name), cast(Any, _Session(function, name))


@dataclass(frozen=True)
class _Session:
    """Answers as the session of a graph would. Raises InputError where the function fails or gives no probabilities."""

    function: Function
    name: str

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        observation, mask = inputs["observation"], inputs["mask"]
        starts = range(0, len(mask), ROWS_AT_A_TIME)
        blocks = [slice(start, start + ROWS_AT_A_TIME) for start in starts]
        return [np.concatenate([self._ask(observation[rows], mask[rows]) for rows in blocks])]

    def _ask(self, observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(self.function(observation, mask), np.float64)
        except InputError:
            raise
        except Exception as error:  # whatever another's code raises
            raise InputError(f"{self.name} raised {type(error).__name__}: {_first_line(error)}; mend it.") from error
        if found.shape != mask.shape:
            raise InputError(
                f"{self.name} returned an array of shape {list(found.shape)} for {len(mask)} observations and {mask.shape[1]} "
                "actions; return one row of probabilities per observation."
            )
        if not np.isfinite(found).all():
            wrong = int((~np.isfinite(found)).any(1).sum())
            raise InputError(f"{self.name} returned NaN or infinity for {wrong} of {len(found)} observations; mend it.")
        return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else "no message"


@dataclass(frozen=True)
class Target:
    """What is known of the policy at the logged decisions, and as a function where it is one."""

    card: dict[str, Any]  # what it is, as plain JSON
    taken: Float64[np.ndarray, "rows"]  # probability (or density) of the logged action
    choices: Choices | None  # of all actions; None where only `taken` is known
    policy: Exported | None  # None where the probabilities at other observations are not known
    without: str = ""  # why no model of the values can be made, where it cannot

    @property
    def probs(self) -> Float64[np.ndarray, "rows actions"] | None:
        """Of all discrete actions, where they are known."""
        return self.choices.probs if isinstance(self.choices, Probabilities) else None

    def ratio(self, episodes: Episodes) -> Float64[np.ndarray, "rows"]:
        return self.taken / episodes.action_prob if self.probs is None else ratios(episodes, self.probs)


def is_bundle(path: Path) -> bool:
    """Whether `path` is the folder of a released policy and not a graph. Raises InputError where it is neither."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder of a released policy, or a policy.onnx.")
    if path.is_dir() and not (path / registry.MANIFEST).exists():
        raise InputError(f"{path} has no {registry.MANIFEST}, so it is no released policy; give its folder or a graph.")
    return path.is_dir()


def graph_of(path: Path) -> Path:
    """The graph of a released bundle, every file of it verified, or the graph itself."""
    if not is_bundle(path):
        return path
    registry.verify(path)
    return path / bundle.POLICY


def config_of_bundle(path: Path) -> dict[str, Any]:
    """The pipeline that released a policy; empty where `path` is a graph."""
    config = path / "config.json"
    found = storage.read_json(config) if is_bundle(path) and config.exists() else {}
    return found if isinstance(found, dict) else {}


def contract_of_bundle(path: Path) -> Contract | None:
    """The contract that a released policy was trained under; None where `path` is a graph."""
    logs = config_of_bundle(path).get("logs")
    return make_contract(logs, str(path / "config.json")) if isinstance(logs, dict) else None


def of_graph(path: Path, given: Assessed) -> Target:
    """Raises InputError for a graph that takes other observations or actions than the log's, and one that cannot be run."""
    trained_under, graph = contract_of_bundle(path), graph_of(path)
    if trained_under is not None and not _alike(trained_under, given.contract):
        raise InputError(
            f"{path} was trained under a contract whose observations or actions are coded or ordered otherwise; leave "
            "--contract out to use its own, or correct them."
        )
    held_out, asked = given.card["held_out_of"] is not None, given.contract.entity_column
    if trained_under is not None and held_out and trained_under.entity_column != asked:
        raise InputError(
            f"{path} was kept from some entities by column {trained_under.entity_column!r}, and here they are told apart by "
            f"{asked!r}; name the same column as the entity, or give --all-entities for logs that the policy has not seen."
        )
    policy = open_policy(graph)
    require_interface(policy, given)
    if trained_under is None and not given.contract.action.continuous:
        _require_order(policy, given.contract)
    card = {"name": str(path), "kind": "exported graph", "sha256": storage.sha256_file(graph)}
    try:
        if isinstance(policy, OnnxPolicy):
            return _of_probs(policy, policy.on(given.episodes), given.episodes, card)
        choices = Draws(given.episodes, policy)
        require_density(choices)
    except (Fail, InvalidArgument, RuntimeException) as error:
        raise InputError(f"{graph} cannot be run on the log ({_first_line(error)}); export it again.") from error
    return Target(card, choices.taken, choices, policy)


def _require_order(policy: Exported, contract: Contract) -> None:
    """Raises InputError for a graph that has the actions in another order than the log, or does not say in which."""
    said = policy.session.get_modelmeta().custom_metadata_map.get("actions")
    try:
        given = None if said is None else json.loads(said)
    except ValueError:
        given = said
    if given is not None and not isinstance(given, list):
        raise InputError(f"{policy.path} has metadata `actions` that are no list of names in JSON; export it again.")
    order = order_of(
        given, contract, str(policy.path), "export it with metadata `actions`, a list of their names in JSON:"
    )
    if order is not None and order != sorted(order):
        raise InputError(
            f"{policy.path} has the actions in the order {said}; name them in that one: --actions or `values`."
        )


def _require_discrete(given: Assessed) -> None:
    if given.contract.action.continuous:
        raise InputError(
            f"the action {given.contract.action.name!r} is continuous; give --policy-column with the policy's density at it, or "
            "--policy with an exported graph."
        )


def _alike(one: Contract, other: Contract) -> bool:
    """Whether policies of one contract can be asked under the other; columns may have other names, but not each other's."""
    names, others = ([each.name for each in contract.features] for contract in (one, other))
    return _meaning(one) == _meaning(other) and (names == others or sorted(names) != sorted(others))


def _meaning(contract: Contract) -> dict[str, Any]:
    """How observations and actions are coded, whatever their columns are called."""
    observed = [column.model_dump(exclude={"column", "range", "unit"}) for column in contract.observation]
    named = {"column", "columns", "mask", "candidates"}
    action = contract.action.model_dump(exclude={*named, "components"})
    return {"observed": observed, "action": action, "choices": [choice.values for choice in contract.action.choices]}


def of_function(name: str, given: Assessed) -> Target:
    """A function `package.module:function`, imported from the current folder. Raises InputError where it is no policy."""
    _require_discrete(given)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"--policy-callable {name!r} names no function; write package.module:function.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever another's module raises
        raise InputError(f"{module} cannot be imported ({type(error).__name__}: {_first_line(error)}).") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    function = getattr(imported, attribute, None)
    if function is None:
        raise InputError(f"module {module} has no {attribute}; write package.module:function.")
    if not callable(function):
        raise InputError(f"{name} is a {type(function).__name__}, not a function of observations and masks.")

    def in_order(observation: np.ndarray, mask: np.ndarray) -> Any:
        found = function(observation, mask)
        order = order_of(getattr(found, "columns", None), given.contract, name, "return a DataFrame with columns")
        return found if order is None else np.asarray(found)[:, order]

    policy, few = FunctionPolicy(in_order, name), min(ASKED, given.episodes.n_rows)
    observation, mask = given.episodes.observation[:few], np.array(given.episodes.mask[:few])
    together = policy.probs(observation, mask)[:ASKED_ALONE]
    alone = [policy.probs(observation[i : i + 1], mask[i : i + 1]) for i in range(len(together))]
    if np.abs(together - np.concatenate(alone)).max() > ALIKE:
        raise InputError(
            f"{name} answers the same observation in two ways; return probabilities, not a drawn action, and those of a row from "
            "that row alone."
        )
    return _of_probs(policy, policy.on(given.episodes), given.episodes, {"name": name, "kind": "Python function"})


def _of_probs(
    policy: OnnxPolicy, probs: Float64[np.ndarray, "rows actions"], episodes: Episodes, card: dict[str, Any]
) -> Target:
    require_distributions(probs, np.array(episodes.mask), str(card["name"]), "rows")
    choices = Probabilities(episodes, probs)
    return Target(card, choices.taken, choices, policy)


def require_distributions(
    probs: Float64[np.ndarray, "rows actions"], mask: Bool[np.ndarray, "rows actions"], name: str, noun: str
) -> None:
    """Raises InputError where a row is no distribution over the actions allowed there."""
    off = (np.abs(probs.sum(1) - 1.0) > TOLERANCE) | (probs < 0).any(1) | ~np.isfinite(probs).all(1)
    forbidden = (probs * ~mask).sum(1) > ALIKE
    for broken, problem in (
        (off, "are NaN, negative or do not add up to 1"),
        (forbidden, "go to actions that the mask forbids"),
    ):
        if broken.any():
            raise InputError(
                f"{name}: the probabilities {problem} in {int(broken.sum())} of {len(probs)} {noun}, the first is number "
                f"{int(broken.argmax())} when sorted by episode and step; give a distribution over the allowed actions."
            )
