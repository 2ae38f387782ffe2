"""Bootstrap samples of episodes: how often each is drawn, in a few passes over memory instead of a draw for each.

Independent Poisson counts, given their total, are multinomial. So a sample of n episodes is a row of Poisson counts whose rate is
a little below 1, and then the few draws that are missing, one by one; a row with more than n is drawn again, which depends on the
total alone. Counts are read off 16 random bits. What 16 bits cannot resolve falls into cells of its own, in which the count is
drawn from exactly what is left of the Poisson probabilities.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8
from scipy import stats

CELLS = 2**16  # values of 16 bits
COUNTS = 64  # a Poisson count of rate 1 is below it but for 1 in 10^89
COMMON = 4  # counts above it are rare enough to be looked up one by one
BLOCK = 2**27  # counts of a block of bootstrap samples: 128 MiB, or all samples of 100,000 episodes
LOWEST = 0.01  # rate, of few episodes
SPARE = 5.0  # standard deviations by which a row is expected to stay below n


def poisson_cells(rate: float) -> tuple[UInt8[np.ndarray, "known"], Float64[np.ndarray, "counts"]]:
    """The count of each value of 16 bits, rising; and with which probability each count is drawn for the values beyond."""
    expected = stats.poisson.pmf(np.arange(COUNTS), rate) * CELLS
    whole = np.floor(expected)
    rest = expected - whole
    return np.repeat(np.arange(COUNTS, dtype=np.uint8), whole.astype(np.int64)), rest / rest.sum()


class Resampler:
    """Draws samples of as many episodes as there are, with replacement."""

    def __init__(self, episodes: int, seed: int):
        self.episodes, self.rng = episodes, np.random.default_rng(seed)
        self.known, self.rest = poisson_cells(max(1.0 - SPARE / math.sqrt(episodes), LOWEST))
        self.least = np.searchsorted(self.known, np.arange(1, COMMON + 2)).tolist()  # bits of a count of 1, 2, ...

    def __call__(self) -> UInt8[np.ndarray, "episodes"]:
        """How often each episode is in one sample."""
        count = self._poisson()
        while (missing := self.episodes - int(count.sum(dtype=np.int64))) < 0:
            count = self._poisson()
        np.add.at(count, self.rng.integers(0, self.episodes, missing), np.uint8(1))
        return count

    def _poisson(self) -> UInt8[np.ndarray, "episodes"]:
        words = self.rng.integers(0, 2**64, -(-self.episodes // 4), dtype=np.uint64)
        bits = words.view(np.uint16)[: self.episodes]
        count = np.zeros(self.episodes, np.uint8)
        for least in self.least[:-1]:
            count += bits >= least
        rare = np.flatnonzero(bits >= self.least[-1])
        beyond = bits[rare] >= len(self.known)
        count[rare[~beyond]] = self.known[bits[rare[~beyond]]]
        count[rare[beyond]] = self.rng.choice(COUNTS, int(beyond.sum()), p=self.rest)
        return count


@dataclass(frozen=True)
class BootstrapSamples:
    """How often each episode is in each bootstrap sample, a few samples at a time, drawn anew and alike at each pass.

    All of them at once may need more memory than the logs.
    """

    episodes: int
    number: int
    seed: int

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "block episodes"]]:
        """Each block overwrites the one before."""
        height = max(min(BLOCK // self.episodes, self.number), 1)
        draw, block = Resampler(self.episodes, self.seed), np.empty((height, self.episodes), np.uint8)
        for start in range(0, self.number, height):
            rows = block[: self.number - start]
            for row in rows:
                row[:] = draw()
            yield rows


def bootstrap_shares(episodes: int, samples: int, seed: int) -> Float64[np.ndarray, "samples episodes"]:
    """All of `BootstrapSamples` at once, over the number of episodes."""
    counts = itertools.chain.from_iterable(BootstrapSamples(episodes, samples, seed))
    shares = np.empty((samples, episodes))
    for row, count in zip(shares, counts, strict=True):
        row[:] = count
    return shares / episodes
