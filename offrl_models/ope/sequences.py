"""Ragged rows to one row per episode and one column per step, and the products of ratios along an episode."""

import dataclasses

import numpy as np
from jaxtyping import Float64

from offrl_models.schema import Episodes, InputError

CHUNK = 4096  # rows of probabilities at a time


def finite(name: str, values: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """The values, unchanged. Raises InputError when one is NaN or infinite: nothing is skipped."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):  # then all of them are
            return values
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise InputError(f"{name} holds {bad} values that are NaN or infinite; no estimate can be made from them.")
    return values


def ratios(episodes: Episodes, probs: Float64[np.ndarray, "rows actions"]) -> Float64[np.ndarray, "rows"]:
    """pi(a|s) / mu(a|s) of every logged action, with the logged mu.

    Raises InputError when the evaluation probabilities are not a distribution over the allowed actions of each row.
    """
    return ratios_and_values(episodes, probs, None)[0]


def ratios_and_values(
    episodes: Episodes, probs: Float64[np.ndarray, "rows actions"], q: Float64[np.ndarray, "rows actions"] | None
) -> tuple[Float64[np.ndarray, "rows"], Float64[np.ndarray, "valued"], Float64[np.ndarray, "valued"]]:
    """The ratios, and of a table q(s, a) the entry of every logged action and v(s) = sum_a pi(a|s) q(s, a), if there is one.

    Raises InputError as `ratios` does.
    """
    if episodes.action.min(initial=0) < 0 or episodes.action.max(initial=0) >= probs.shape[1]:
        raise InputError(f"the evaluation policy has {probs.shape[1]} actions, and the log has others.")
    off, total = np.empty(len(probs), bool), np.empty(CHUNK)
    found = np.empty((1 if q is None else 3, len(probs)))  # at once: the system is slow to hand out memory
    taken, q_taken, v = found[0], *(found[1:] if q is not None else np.empty((2, 0)))
    ones, place = np.ones(probs.shape[1]), np.arange(CHUNK) * probs.shape[1]
    for start in range(0, len(probs), CHUNK):  # so that each row is brought from memory once
        rows = slice(start, start + CHUNK)
        part = np.ascontiguousarray(probs[rows])
        entry = place[: len(part)] + episodes.action[rows]
        if q is not None:  # first, since it reads both tables from end to end
            values = np.ascontiguousarray(q[rows])
            np.einsum("ra,ra->r", part, values, out=v[rows])
            values.take(entry, out=q_taken[rows], mode="clip")  # no entry lies outside, and any other mode would copy
        part.take(entry, out=taken[rows], mode="clip")
        off[rows] = ~(np.abs(np.matmul(part, ones, out=total[: len(part)]) - 1.0) <= 1e-5)
        if not part.min() >= 0:
            finite("the evaluation policy", probs)
            off[rows] |= (part < 0).any(1)
    if off.any():
        finite("the evaluation policy", probs)
        raise InputError(
            f"the evaluation policy's probabilities are negative or do not sum to 1 in {int(off.sum())} rows."
        )
    if not episodes.mask.all():
        forbidden = np.einsum("ra,ra->r", probs, ~episodes.mask) > 1e-6
        if forbidden.any():
            raise InputError(
                f"the evaluation policy plays actions that the mask forbids in {int(forbidden.sum())} rows."
            )
    return finite("the ratio", np.divide(taken, episodes.action_prob, out=taken)), q_taken, v


def completed(episodes: Episodes, next_v: Float64[np.ndarray, "rows"]) -> Episodes:
    """The episodes with the value past a truncation counted as part of the last reward.

    Estimators then all speak of the same thing, the value of going on; a terminated episode is left as it is.
    """
    if not episodes.truncated.any():
        return episodes
    past = np.where(episodes.truncated, episodes.discount * finite("the next value", next_v), 0.0)
    return dataclasses.replace(episodes, reward=episodes.reward + past)


def by_step(
    episodes: Episodes, values: Float64[np.ndarray, "rows"], past_end: float | Float64[np.ndarray, "episodes"]
) -> Float64[np.ndarray, "episodes steps"]:
    """One row per episode, one column per step; columns past an episode's end hold `past_end`."""
    shape = (episodes.n_episodes, int(episodes.length.max()))
    if episodes.n_rows == shape[0] * shape[1]:  # all episodes are as long as the longest
        return values.reshape(shape)
    table = np.empty(shape)
    table[:] = np.reshape(past_end, (-1, 1)) if isinstance(past_end, np.ndarray) else past_end
    table[episodes.episode_of_row, episodes.step] = values
    return table


def weights_by_step(episodes: Episodes, ratio: Float64[np.ndarray, "rows"]) -> Float64[np.ndarray, "episodes steps"]:
    """w_t = product of the ratios up to and including step t; past the end it stays what it was at the end.

    Infinite where a product is too large for a double, but 0 from a ratio of 0 on. Raises InputError for a ratio that is NaN or
    infinite.
    """
    table = by_step(episodes, finite("the ratio", ratio), 1.0)
    if table.shape[1] == 1:
        return table
    with np.errstate(over="ignore", invalid="ignore"):
        weight = np.cumprod(table, axis=1)
        if not np.isfinite(weight[:, -1].sum()):
            weight[np.minimum.accumulate(table, axis=1) == 0.0] = 0.0
    return weight


def sum_of_products(
    left: Float64[np.ndarray, "episodes steps"], right: Float64[np.ndarray, "episodes steps"]
) -> Float64[np.ndarray, "episodes"]:
    """Row by row."""
    return left[:, 0] * right[:, 0] if left.shape[1] == 1 else np.einsum("es,es->e", left, right)
