"""Several steps at once and windows: identities against single steps, and nothing crosses the border of an episode."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl_models.datasets.views import multi_step, windows
from offrl_models.schema import Episodes, InputError
from tests.conftest import chain_world

WORLD = chain_world(0.9)


def logged(seed: int, *, cut: bool = False) -> Episodes:
    episodes = WORLD.simulate(12, seed)
    if cut:  # the recordings of half of the episodes stop
        stops = np.isin(np.arange(episodes.n_rows), episodes.offsets[1:][::2] - 1)
        episodes = dataclasses.replace(episodes, terminated=episodes.terminated & ~stops, truncated=stops)
    return episodes


def following(episodes: Episodes, value: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The value of what follows each row."""
    shifted = np.append(value[1:], 0.0)
    shifted[episodes.offsets[1:] - 1] = final
    return shifted


@given(st.integers(0, 1000), st.integers(1, 7), st.booleans())
def test_n_steps_are_n_times_one_step(seed: int, n: int, cut: bool) -> None:
    """Where V is what n - 1 steps from the next row make of V, the n-step target is the one-step target."""
    episodes = logged(seed, cut=cut)
    rng = np.random.default_rng(seed)
    value, final = rng.normal(size=episodes.n_rows), rng.normal(size=episodes.n_episodes)

    def target(steps: int) -> np.ndarray:
        view = multi_step(episodes, steps)
        picked = np.where(view.past_end, final[episodes.episode_of_row], value[view.next_row])
        return view.reward + view.discount * picked

    one = multi_step(episodes, 1)
    assert one.reward == pytest.approx(episodes.reward) and one.discount == pytest.approx(episodes.discount)
    shorter = value if n == 1 else target(n - 1)
    wanted = episodes.reward + episodes.discount * following(episodes, shorter, final)
    assert target(n) == pytest.approx(wanted, abs=1e-12)


def test_enough_steps_are_the_return_to_go() -> None:
    episodes = logged(3)
    view = multi_step(episodes, 10)
    assert view.reward == pytest.approx(episodes.return_to_go) and not view.discount.any()


def test_time_between_decisions_counts() -> None:
    """Half the interval twice is the interval once."""
    episodes = logged(3, cut=True)
    interval = np.random.default_rng(0).uniform(0.5, 2.0, episodes.n_rows)
    timed = dataclasses.replace(episodes, interval=interval)
    view, row = multi_step(timed, 2), int(episodes.offsets[:-1][episodes.length > 2][0])
    assert view.discount[row] == pytest.approx(0.9 ** (interval[row] + interval[row + 1]))
    assert view.reward[row] == pytest.approx(episodes.reward[row] + 0.9 ** interval[row] * episodes.reward[row + 1])


@given(st.integers(0, 1000), st.integers(1, 6))
def test_windows_end_at_their_row_and_stay_in_its_episode(seed: int, context: int) -> None:
    episodes = logged(seed)
    view = windows(episodes, context)
    assert (view.row[:, -1] == np.arange(episodes.n_rows)).all() and view.known[:, -1].all()
    owner = episodes.episode_of_row
    assert (owner[view.row] == owner[:, None]).all()
    assert (view.known.sum(1) == np.minimum(episodes.step + 1, context)).all()
    assert (np.diff(view.known.astype(int), axis=1) >= 0).all()  # padded at the front only
    assert (view.step == np.where(view.known, episodes.step[view.row], 0)).all()
    assert (np.diff(view.row, axis=1)[view.known[:, :-1]] == 1).all()


def test_chosen_windows_are_those_of_all() -> None:
    episodes, last = logged(1), np.array([5, 0, 7])
    every, some = windows(episodes, 3), windows(episodes, 3, last)
    assert (some.row == every.row[last]).all() and (some.known == every.known[last]).all()


@pytest.mark.parametrize("make", [multi_step, windows])
def test_fewer_than_one_row_is_refused(make) -> None:
    with pytest.raises(InputError, match="give at least 1"):
        make(logged(0), 0)
