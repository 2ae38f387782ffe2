"""Bootstrap samples of episodes: how often each is drawn, in a few passes over memory instead of a draw for each.

Independent Poisson counts, given their total, are multinomial. So a sample of n episodes is a row of Poisson counts whose rate is
a little below 1, and then the few draws that are missing, one by one; a row with more than n is drawn again, which depends on the
total alone. Counts are read off 16 random bits. What 16 bits cannot resolve falls into cells of its own, in which the count is
drawn from exactly what is left of the Poisson probabilities.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Real, UInt8
from scipy import stats

CELLS = 2**16  # values of 16 bits
COUNTS = 64  # a Poisson count of rate 1 is below it but for 1 in 10^89
COMMON = 4  # counts above it are rare enough to be looked up one by one
BLOCK = 2**27  # counts of a block of bootstrap samples: 128 MiB, or all samples of 100,000 episodes
LOWEST = 0.01  # rate, of few episodes
SPARE = 5.0  # standard deviations by which a row is expected to stay below n

STRETCH = 512  # rows that are added up in single precision
PREPARED = 2**16  # numbers of columns that are written at once, so that they stay in the cache
ABREAST = 16  # rows of a stretch whose largest numbers are looked for side by side
Part = Callable[[slice, Float64[np.ndarray, "rows width"]], object]  # writes some rows of columns
Stretch = tuple[Float32[np.ndarray, "rows width"], Float64[np.ndarray, "width"]]  # of columns; what they are divided by


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
        self.above = np.empty(episodes, bool)

    def __call__(self, count: UInt8[np.ndarray, "episodes"]) -> UInt8[np.ndarray, "episodes"]:
        """How often each episode is in one sample, written into `count`."""
        while (missing := self.episodes - self._poisson(count)) < 0:
            pass
        np.add.at(count, self.rng.integers(0, self.episodes, missing), np.uint8(1))
        return count

    def _poisson(self, count: UInt8[np.ndarray, "episodes"]) -> int:
        """Writes independent counts, and returns their total."""
        words = self.rng.integers(0, 2**64, -(-self.episodes // 4), dtype=np.uint64)
        bits, above, total = words.view(np.uint16)[: self.episodes], self.above, 0
        count.fill(0)
        for least in self.least[:-1]:
            np.greater_equal(bits, least, out=above)
            np.add(count, above.view(np.uint8), out=count)
            total += int(np.count_nonzero(above))
        rare = np.flatnonzero(np.greater_equal(bits, self.least[-1], out=above))
        beyond = bits[rare] >= len(self.known)
        count[rare[~beyond]] = self.known[bits[rare[~beyond]]]
        count[rare[beyond]] = self.rng.choice(COUNTS, int(beyond.sum()), p=self.rest)
        return total - COMMON * len(rare) + int(count[rare].sum(dtype=np.int64))


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
                draw(row)
            yield rows


def bootstrap_shares(episodes: int, samples: int, seed: int) -> Float64[np.ndarray, "samples episodes"]:
    """All of `BootstrapSamples` at once, over the number of episodes."""
    counts = itertools.chain.from_iterable(BootstrapSamples(episodes, samples, seed))
    shares = np.empty((samples, episodes))
    for row, count in zip(shares, counts, strict=True):
        row[:] = count
    return shares / episodes


class Columns:
    """Columns in single precision: over each stretch of rows, each of them is divided by its largest number there. They may take as
    much memory as the logs, so they are kept only when they are asked for again."""

    def __init__(self, rows: int):
        self.rows, self.width, self.uses = rows, 0, 0
        self.parts, self.kept = list[tuple[slice, Part]](), list[Stretch]()

    def put(self, width: int, part: Part) -> list[int]:
        """The places of new columns, whose numbers `part` writes where it is asked to."""
        places = slice(self.width, self.width + width)
        self.parts.append((places, part))
        self.width += width
        return list(range(places.start, places.stop))

    def _stretches(self) -> Iterator[Stretch]:
        together = max(min(PREPARED // (STRETCH * self.width), -(-self.rows // STRETCH)), 1)
        buffer = np.zeros((together, STRETCH, self.width))
        flat = buffer.reshape(-1, self.width)
        for start in range(0, self.rows, len(flat)):
            rows = slice(start, min(start + len(flat), self.rows))
            for places, part in self.parts:
                part(rows, flat[: rows.stop - start, places])
            flat[rows.stop - start :] = 0.0
            # In two steps: a maximum over rows of few columns is slow.
            scales = np.abs(buffer).reshape(together, -1, ABREAST * self.width).max(1)
            scales = scales.reshape(together, ABREAST, self.width).max(1)
            scales[scales == 0] = 1.0
            buffer /= scales[:, None]
            firsts = range(start, self.rows, STRETCH)
            for values, scale, first in zip(buffer.astype(np.float32), scales, firsts, strict=False):
                yield values[: self.rows - first], scale

    def sums(
        self, block: Real[np.ndarray, "samples rows"]
    ) -> tuple[Float64[np.ndarray, "samples width"], Float64[np.ndarray, "width"]]:
        """The sum of every column in every sample, and the largest number of each column; stretches of zeros count as 1.

        Stretches of rows are added up in double precision: over millions of rows a sum in single precision drifts off.
        """
        self.uses += 1
        if self.uses == 2:
            self.kept = list(self._stretches())
        found, largest = np.zeros((len(block), self.width)), np.zeros(self.width)
        product = np.empty((len(block), self.width), np.float32)
        for place, (values, scale) in enumerate(self.kept or self._stretches()):
            counts: Float32[np.ndarray, "samples stretch"] = block[:, place * STRETCH :][:, :STRETCH].astype(np.float32)
            found += np.matmul(counts, values, out=product) * scale
            np.maximum(largest, scale, out=largest)
        return found, largest
