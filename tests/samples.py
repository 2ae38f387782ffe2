"""Samples of simulated episodes and of columns made by hand: what tests of coverage measures vary."""

import numpy as np
import polars as pl

from offrl_models.logs.sample import Sample
from offrl_models.ope.worlds import random_world
from offrl_models.schema import Episodes

WORLD = random_world(4, 3, 4, 0.9, seed=5)


def sample_of(episodes: Episodes, states: int, **more: object) -> Sample:
    """A tabular sample of simulated episodes, in one batch."""
    fields = {
        "episode": episodes.episode_of_row,
        "observation": episodes.observation,
        "names": ("state",),
        "categories": (states,),
        "action": episodes.action,
        "n_actions": episodes.n_actions,
        "mask": episodes.mask,
        "reward": episodes.reward,
        "terminated": episodes.terminated,
        "action_prob": episodes.action_prob,
        "gamma": episodes.gamma,
        "batch": np.zeros(episodes.n_rows, np.int64),
    }
    return Sample(**{**fields, **more})  # pyright: ignore[reportArgumentType]


def sample_from(observation: np.ndarray, steps: int = 1, **more: object) -> Sample:
    """A sample of numeric columns x0, x1, ... in episodes of `steps` rows; everything else is constant unless given."""
    rows = len(observation)
    fields = {
        "episode": np.arange(rows) // steps,
        "observation": observation.astype(np.float64),
        "names": tuple(f"x{i}" for i in range(observation.shape[1])),
        "categories": (None,) * observation.shape[1],
        "action": np.zeros(rows, np.int64),
        "n_actions": 2,
        "mask": None,
        "reward": np.zeros(rows),
        "terminated": np.arange(rows) % steps == steps - 1,
        "action_prob": np.full(rows, 0.5),
        "gamma": 1.0,
        "batch": np.zeros(rows, np.int64),
    }
    return Sample(**{**fields, **more})  # pyright: ignore[reportArgumentType]


def only(frame: pl.DataFrame, column: str, **where: object) -> float:
    """The one value of a column in the rows that match."""
    found = frame.filter(*(pl.col(name) == value for name, value in where.items()))[column]
    assert len(found) == 1, frame
    return found[0]


def split_names(episodes: int) -> np.ndarray:
    return np.where(np.arange(episodes) % 4 == 0, "gate", "train")
