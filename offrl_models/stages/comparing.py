"""Policies that left logs of their own, beside what the gate split says of them; this decides nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from offrl_models.comparison import estimate_stated, visit_frequencies
from offrl_models.config import ComparisonConfig, Pipeline
from offrl_models.logs import values
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from offrl_models.ope.importance import Samples
from offrl_models.schema import Episodes, InputError
from offrl_models.stages.behavior import refit_of


def log_of(pipeline: Pipeline, wanted: ComparisonConfig) -> Path:
    path = pipeline.root / wanted.log
    if not path.exists():
        raise InputError(
            f"{wanted.log}, the log of {wanted.name!r} in compare_with, is missing; fetch it with `dvc pull` or "
            "`dvc repro`, or leave the comparison out."
        )
    return path


def compare(pipeline: Pipeline, wanted: ComparisonConfig, gate: Episodes, samples: Samples) -> dict[str, Any]:
    """What the gate split says of another policy, and what its own log says.

    Raises InputError where that log is missing, breaks a rule of the contract, or leaves out a cell of the gate split.
    """
    contract = wanted.contract(pipeline.config.logs)
    log = Log.open([log_of(pipeline, wanted)], contract)
    broken = screen(log).violations
    if broken:
        raise InputError(broken[0].sentence(wanted.log))
    rows = log.frame()
    names = [feature.name for feature in gate.features]
    probs = visit_frequencies(
        values.observed_now(rows, contract),
        values.action(rows, contract),
        gate.observation[:, [names.index(name) for name in wanted.cells]],
        gate.n_actions,
        wanted.log,
    )
    reward = values.rewards(rows, contract)
    return {
        "policy": wanted.name,
        "log": wanted.log,
        "cells": list(wanted.cells),
        "logged_rows": len(reward),
        "logged_mean": float(reward.mean()),
        "logged_standard_error": float(reward.std(ddof=1) / np.sqrt(len(reward))),
        "gate_episodes": gate.n_episodes,
        **estimate_stated(gate, probs, samples, refit_of(pipeline, gate)).to_json(),
    }
