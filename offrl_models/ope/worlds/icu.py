"""Sepsis treatment in intensive care, from the tables of the `icu-sepsis` package."""

import importlib.util
import math
from functools import cache
from pathlib import Path

import numpy as np

from offrl_models.schema import InputError

from .tabular import World


@cache
def icu_tables() -> dict[str, np.ndarray]:
    """The tables inside the `icu-sepsis` package: sepsis treatment in intensive care, fitted to MIMIC-III.

    Choudhary, Gupta & Thomas (2024), https://arxiv.org/abs/2406.05646. The package's environment is not imported.
    Raises InputError when the package is not installed.
    """
    found = importlib.util.find_spec("icu_sepsis")
    if found is None or found.origin is None:
        raise InputError("the example needs the package icu-sepsis; install it with `pip install offrl[demo]`.")
    assets = Path(found.origin).parent / "envs" / "assets"
    tables = dict(np.load(assets / "dynamics.npz"))
    allowed = np.zeros(tables["tx_mat"].shape[:2], bool)
    lines = (assets / "admissible_actions.txt").read_text().splitlines()
    for state, line in enumerate(lines[1:]):
        allowed[state, [int(action) for action in line.split()]] = True
    return {**tables, "admissible": allowed}


def icu_sepsis(gamma: float = 1.0) -> World:
    """ICU-Sepsis with a behavior policy of 0.8 the shipped expert on admissible actions and 0.2 uniform on them.

    716 states: 713 of a patient under treatment, then death, survival (reward 1) and an absorbing state; 25 actions.
    """
    tables = icu_tables()
    mask = tables["admissible"]
    uniform = mask / mask.sum(1, keepdims=True)
    expert = np.where(mask, tables["expert_policy"], 0.0)
    total = np.array([[math.fsum(row)] for row in expert])  # exact, so that every processor logs the same propensities
    expert = np.where(total > 0, expert / np.where(total > 0, total, 1.0), uniform)
    terminal = np.arange(len(mask)) >= 713
    return World(
        transition=tables["tx_mat"],
        reward=np.where(terminal[:, None, None], 0.0, tables["r_mat"]),
        initial=tables["d_0"],
        terminal=terminal,
        mask=mask,
        gamma=gamma,
        behavior=0.8 * expert + 0.2 * uniform,
    )
