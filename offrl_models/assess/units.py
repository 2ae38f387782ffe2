"""What is resampled: entities, for the episodes of one are not independent."""

import numpy as np
from jaxtyping import Int64

from offrl_models.ope.resampling import BootstrapSamples
from offrl_models.ope.units import numbered
from offrl_models.schema import Episodes

SAMPLES = 1000  # of the bootstrap
MOST_UNITS = 5000  # that are resampled: more episodes are pooled, which costs memory for nothing


def units_of(episodes: Episodes, seed: int) -> Int64[np.ndarray, "episodes"]:
    """What is resampled: entities, or groups of entities at random where there are over MOST_UNITS."""
    entities, place = numbered(episodes)
    return (np.random.default_rng(seed).permutation(entities) % min(entities, MOST_UNITS))[place]


def samples_of(unit: Int64[np.ndarray, "episodes"], seed: int) -> BootstrapSamples:
    return BootstrapSamples(int(unit.max()) + 1, SAMPLES, seed)
