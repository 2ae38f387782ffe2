"""One file per algorithm: a frozen config with the paper's defaults, and a module whose `losses()` is the algorithm."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from offrl_models.algorithms.bc import BC, BCConfig
from offrl_models.algorithms.bcq import BCQ, BCQConfig, ContinuousBCQConfig
from offrl_models.algorithms.cql import CQL, ContinuousCQLConfig, CQLConfig
from offrl_models.algorithms.iql import IQL, IQLConfig
from offrl_models.algorithms.mcq import MCQ, MCQConfig
from offrl_models.algorithms.sac_n import SACN, EDACConfig, SACNConfig
from offrl_models.distributions import Space
from offrl_models.logs.contract import nearest_key_hint

ALGORITHMS: dict[str, tuple[type[Any], type[Any]]] = {
    "bc": (BCConfig, BC),
    "cql": (CQLConfig, CQL),
    "iql": (IQLConfig, IQL),
    "bcq": (BCQConfig, BCQ),
    "sac_n": (SACNConfig, SACN),
    "edac": (EDACConfig, SACN),
    "mcq": (MCQConfig, MCQ),
}

# Where the settings over continuous actions are others.
CONTINUOUS: dict[str, type[Any]] = {"cql": ContinuousCQLConfig, "bcq": ContinuousBCQConfig}

AlgorithmConfig = Any  # one of the configs above
Algorithm = Any  # one of the modules above: a `learner.Trainable` with `spaces` and a `distribution`


def config_of(name: str, space: Space) -> type[Any]:
    """The class of an algorithm's settings over such actions."""
    return CONTINUOUS.get(name, ALGORITHMS[name][0]) if space == "continuous" else ALGORITHMS[name][0]


def make_config(name: str, settings: dict[str, Any], space: Space = "discrete") -> AlgorithmConfig:
    """The config of an algorithm with some fields set. Raises ValueError naming the key and the nearest known one."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: {nearest_key_hint(name, list(ALGORITHMS))}")
    config = config_of(name, space)
    known = [field.name for field in dataclasses.fields(config)]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {key!r} of {name}: {nearest_key_hint(key, known)}")
    try:
        return config(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} of {name}: {first['msg'].lower()}, not {first['input']!r}") from error
