"""Bootstrap samples: the law of their counts is multinomial, exactly."""

import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from offrl_models.ope import resampling
from offrl_models.ope.resampling import CELLS, COMMON, COUNTS, Resampler, poisson_cells


@given(st.floats(0.01, 1.0))
def test_cells_and_what_is_drawn_beyond_them_make_poisson_probabilities(rate: float) -> None:
    known, rest = poisson_cells(rate)
    beyond = CELLS - len(known)
    found = np.bincount(known, minlength=COUNTS) / CELLS + beyond / CELLS * rest
    assert found == pytest.approx(stats.poisson.pmf(np.arange(COUNTS), rate), abs=1e-15)
    assert 0 < beyond < COUNTS and (np.diff(known.astype(int)) >= 0).all()


class EveryCell:
    """Random bits that take each value once."""

    def integers(self, *_: object, **__: object) -> np.ndarray:
        return np.arange(CELLS, dtype=np.uint16).view(np.uint64)

    def choice(self, counts: int, size: int, p: np.ndarray) -> np.ndarray:
        assert np.array_equal(p, poisson_cells(1.0 - resampling.SPARE / math.sqrt(CELLS))[1])
        return counts - 1 - np.arange(size)


def sample(draw: Resampler) -> np.ndarray:
    return draw(np.empty(draw.episodes, np.uint8))


def test_each_value_of_the_bits_is_its_count() -> None:
    """And what lies beyond the known ones is drawn with the probabilities that are left."""
    draw, found = Resampler(CELLS, 0), np.empty(CELLS, np.uint8)
    draw.rng = cast(Any, EveryCell())
    total = draw._poisson(found)
    assert np.array_equal(found[: len(draw.known)], draw.known)
    assert np.array_equal(found[len(draw.known) :], COUNTS - 1 - np.arange(CELLS - len(draw.known)))
    assert total == found.sum(dtype=np.int64)


@given(st.integers(1, 20_000), st.integers(0, 100))
def test_a_sample_has_as_many_draws_as_there_are_episodes(episodes: int, seed: int) -> None:
    draw = Resampler(episodes, seed)
    assert all(sample(draw).sum(dtype=np.int64) == episodes for _ in range(3))


@pytest.mark.parametrize("episodes", [2, 3, 4])
@pytest.mark.parametrize("spare", [5.0, 0.0])  # with none to spare, half of the rows are too many and are drawn again
def test_every_sample_of_a_few_episodes_is_as_frequent_as_it_should_be(
    episodes: int, spare: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resampling, "SPARE", spare)
    draw, samples = Resampler(episodes, 1), 20_000
    every = [c for c in itertools.product(range(episodes + 1), repeat=episodes) if sum(c) == episodes]
    place = {counts: i for i, counts in enumerate(every)}
    seen = np.bincount([place[tuple(sample(draw).tolist())] for _ in range(samples)], minlength=len(every))
    expected = np.array([math.factorial(episodes) / math.prod(map(math.factorial, c)) for c in every])
    assert stats.chisquare(seen, samples * expected / episodes**episodes).pvalue > 0.001


def test_counts_of_many_episodes_are_binomial_and_repel_each_other() -> None:
    episodes, samples = 2_000, 2_000
    draw = Resampler(episodes, 1)
    counts = np.array([sample(draw) for _ in range(samples)], dtype=np.int64)
    most = COMMON + 3  # both those that are compared and those that are looked up
    seen = np.bincount(np.minimum(counts.ravel(), most), minlength=most + 1)
    law = (episodes, 1 / episodes)
    expected = np.append(stats.binom.pmf(np.arange(most), *law), stats.binom.sf(most - 1, *law)) * counts.size
    assert stats.chisquare(seen, expected).pvalue > 0.001
    half = counts[:, : episodes // 2].sum(
        1
    )  # binomial of probability one half: Poisson counts would vary twice as much
    assert half.var() == pytest.approx(episodes / 4, rel=4 * math.sqrt(2 / samples))
    assert half.mean() == pytest.approx(episodes / 2, abs=4 * math.sqrt(episodes / 4 / samples))


def test_what_lay_in_memory_before_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stretch is short, and its numbers are far below those that were there."""
    for name, size in (("STRETCH", 16), ("ABREAST", 16), ("PREPARED", 64)):
        monkeypatch.setattr(resampling, name, size)
    values = np.append(np.ones(64), np.full(5, 1e-60))[:, None]
    columns = resampling.Columns(69)
    columns.put(1, lambda rows, out: np.copyto(out, values[rows]))
    found, _ = columns.sums(np.append(np.zeros(64), np.ones(5))[None])
    assert found[0, 0] / 5e-60 == pytest.approx(1.0)
