"""One file per algorithm: a frozen config with the paper's defaults, and a module whose `losses()` is the algorithm."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from offrl_models.algorithms.awac import AWAC, AWACConfig
from offrl_models.algorithms.awr import AWR, AWRConfig
from offrl_models.algorithms.bandit import Bandit, BanditConfig
from offrl_models.algorithms.bc import BC, BCConfig
from offrl_models.algorithms.bc_top import TopBC, TopBCConfig
from offrl_models.algorithms.bcq import BCQ, BCQConfig, ContinuousBCQConfig
from offrl_models.algorithms.combo import COMBO, COMBOConfig
from offrl_models.algorithms.cql import CQL, ContinuousCQLConfig, CQLConfig
from offrl_models.algorithms.crr import CRR, CRRConfig
from offrl_models.algorithms.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from offrl_models.algorithms.discrete_sac import DiscreteSAC, DiscreteSACConfig
from offrl_models.algorithms.dqn import DQN, DQNConfig
from offrl_models.algorithms.iql import IQL, IQLConfig
from offrl_models.algorithms.iqn import IQN, IQNConfig
from offrl_models.algorithms.mcq import MCQ, MCQConfig
from offrl_models.algorithms.mopo import MOPO, MOPOConfig
from offrl_models.algorithms.morel import MOReL, MOReLConfig
from offrl_models.algorithms.nfq import NFQ, NFQConfig
from offrl_models.algorithms.qr_dqn import QRDQN, QRDQNConfig
from offrl_models.algorithms.rebrac import ReBRAC, ReBRACConfig
from offrl_models.algorithms.sac_n import SACN, EDACConfig, SACNConfig
from offrl_models.algorithms.td3_awr import TD3AWR, TD3AWRConfig
from offrl_models.algorithms.td3_bc import TD3BC, TD3BCConfig
from offrl_models.distributions import Space
from offrl_models.logs.contract import nearest_key_hint
from offrl_models.schema import InputError

ALGORITHMS: dict[str, tuple[type[Any], type[Any]]] = {
    "bc": (BCConfig, BC),
    "cql": (CQLConfig, CQL),
    "iql": (IQLConfig, IQL),
    "bcq": (BCQConfig, BCQ),
    "awac": (AWACConfig, AWAC),
    "crr": (CRRConfig, CRR),
    "td3_bc": (TD3BCConfig, TD3BC),
    "rebrac": (ReBRACConfig, ReBRAC),
    "td3_awr": (TD3AWRConfig, TD3AWR),
    "bc_top": (TopBCConfig, TopBC),
    "awr": (AWRConfig, AWR),
    "dqn": (DQNConfig, DQN),
    "qr_dqn": (QRDQNConfig, QRDQN),
    "discrete_sac": (DiscreteSACConfig, DiscreteSAC),
    "nfq": (NFQConfig, NFQ),
    "iqn": (IQNConfig, IQN),
    "bandit": (BanditConfig, Bandit),
    "decision_transformer": (DecisionTransformerConfig, DecisionTransformer),
    "sac_n": (SACNConfig, SACN),
    "edac": (EDACConfig, SACN),
    "mcq": (MCQConfig, MCQ),
    "mopo": (MOPOConfig, MOPO),
    "combo": (COMBOConfig, COMBO),
    "morel": (MOReLConfig, MOReL),
}

# Where the settings over continuous actions are others.
CONTINUOUS: dict[str, type[Any]] = {"cql": ContinuousCQLConfig, "bcq": ContinuousBCQConfig}

AlgorithmConfig = Any  # one of the configs above
Algorithm = Any  # one of the modules above: a `learner.Trainable` with `spaces` and a `distribution`


def config_of(name: str, space: Space) -> type[Any]:
    """The class of an algorithm's settings over such actions."""
    return CONTINUOUS.get(name, ALGORITHMS[name][0]) if space == "continuous" else ALGORITHMS[name][0]


def require_space(name: str, space: Space) -> None:
    """Raises InputError for an algorithm that is not for such actions."""
    if space not in ALGORITHMS[name][1].spaces:
        able = ", ".join(other for other, (_, kind) in ALGORITHMS.items() if space in kind.spaces)
        raise InputError(f"the actions are {space}, and {name} is not for such; use one of {able}.")


def require_gateable(name: str) -> None:
    """Raises InputError for an algorithm whose policy looks at more than the present observation: a pipeline cannot judge it."""
    if getattr(ALGORITHMS[name][1], "needs_history", False):
        raise InputError(
            f"{name} can be trained by `training.fit` and cannot be gated by a pipeline: fitted Q evaluation, capped policies and "
            "marginal ratios take a policy of the present observation alone, and this one looks back; leave it out."
        )


def require_keys(name: str, settings: Iterable[str], space: Space) -> None:
    """Raises ValueError for an unknown algorithm or key, naming the nearest, and InputError where it is not for such actions."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: {nearest_key_hint(name, list(ALGORITHMS))}")
    require_space(name, space)
    known = [field.name for field in dataclasses.fields(config_of(name, space))]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {key!r} of {name}: {nearest_key_hint(key, known)}")


def make_config(
    name: str, settings: Mapping[str, Any], space: Space = "discrete", called: str | None = None
) -> AlgorithmConfig:
    """The config of an algorithm over such actions with some fields set; `called` is what errors call it.

    Raises ValueError naming the key and the nearest known one, and InputError for an algorithm that is not for such actions.
    """
    require_keys(name, settings, space)
    config = config_of(name, space)
    try:
        return config(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{first['loc'][0]} of {called or name}: {first['msg'].lower()}, not {first['input']!r}"
        ) from error
