"""One file per algorithm: a frozen config with the paper's defaults, and a module whose `losses()` is the algorithm."""

import dataclasses
from typing import Any

from offrl_models.algorithms.bc import BC, BCConfig
from offrl_models.algorithms.bcq import BCQ, BCQConfig
from offrl_models.algorithms.cql import CQL, CQLConfig
from offrl_models.algorithms.iql import IQL, IQLConfig
from offrl_models.logs.contract import nearest_key_hint

ALGORITHMS = {"bc": (BCConfig, BC), "cql": (CQLConfig, CQL), "iql": (IQLConfig, IQL), "bcq": (BCQConfig, BCQ)}

AlgorithmConfig = BCConfig | CQLConfig | IQLConfig | BCQConfig
Algorithm = BC | CQL | IQL | BCQ


def make_config(name: str, settings: dict[str, Any]) -> AlgorithmConfig:
    """The config of an algorithm with some fields set. Raises ValueError naming the nearest known name or field."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: {nearest_key_hint(name, list(ALGORITHMS))}")
    config = ALGORITHMS[name][0]
    fields = {field.name: field for field in dataclasses.fields(config)}
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise ValueError(f"unknown key {key!r} of {name}: {nearest_key_hint(key, list(fields))}")
        default = fields[key].default
        numeric = isinstance(default, int | float)
        if numeric != (isinstance(value, int | float) and not isinstance(value, bool)):
            raise ValueError(f"{key} of {name} must be like its default {default!r}, not {value!r}")
        values[key] = value if numeric else tuple(int(size) for size in value)
    return config(**values)
