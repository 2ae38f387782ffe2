"""Whether the splits are apart, and alike: checks C26, C27 and C28."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from offrl_models.logs import independence, support
from offrl_models.logs.sample import Sample
from offrl_models.schema import Episodes

SAMPLE_ROWS = 100_000  # of each split


def sample_of(episodes: Episodes, rows: int, seed: int) -> Sample:
    """Whole episodes of a split, at most about so many rows of them, drawn at random."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(episodes.n_episodes)
    kept = np.sort(order[: max(int((episodes.length[order].cumsum() <= rows).sum()), 1)])
    chosen = np.isin(np.arange(episodes.n_episodes), kept)
    row = np.flatnonzero(chosen[episodes.episode_of_row])
    known = not np.isnan(episodes.action_prob).any()
    return Sample(
        episode=np.repeat(np.arange(len(kept)), episodes.length[kept]),
        observation=episodes.observation[row],
        names=tuple(feature.name for feature in episodes.features),
        categories=tuple(feature.categories for feature in episodes.features),
        action=episodes.action[row],
        n_actions=episodes.n_actions or None,
        mask=episodes.mask[row] if episodes.n_actions else None,
        reward=episodes.reward[row],
        terminated=episodes.terminated[row],
        action_prob=episodes.action_prob[row] if known else None,
        gamma=episodes.gamma,
        batch=np.zeros(len(row), np.int64),
    )


def _entities(part: Episodes) -> np.ndarray:
    return (part.episode_id if part.entity is None else part.entity).astype(str)


def split_tables(parts: Mapping[str, Episodes], seed: int) -> dict[str, pl.DataFrame]:
    """What the checks of the splits assert on: `support`, `entities` and `duplicates`."""
    samples = {name: sample_of(part, SAMPLE_ROWS, seed) for name, part in parts.items()}
    whole = _together(list(samples.values()))
    split = np.repeat(list(samples), [sample.n_episodes for sample in samples.values()])
    entities = pl.concat(
        pl.DataFrame({"entity": np.unique(_entities(part)), "split": name}) for name, part in parts.items()
    )
    per_entity = entities.group_by("entity").len(name="splits").group_by("splits").len(name="entities")
    return {
        "support": support.outside_support(samples["train"], samples["gate"], seed=seed),
        "entities": per_entity,
        "duplicates": independence.near_duplicates(whole, split),
    }


def _together(samples: list[Sample]) -> Sample:
    """Samples one after the other, as one."""
    first = np.cumsum([0, *(sample.n_episodes for sample in samples)])
    fields = ("observation", "action", "reward", "terminated", "batch")
    joined: dict[str, Any] = {name: np.concatenate([getattr(sample, name) for sample in samples]) for name in fields}
    masks = [sample.mask for sample in samples if sample.mask is not None]
    return Sample(
        episode=np.concatenate([sample.episode + start for sample, start in zip(samples, first, strict=False)]),
        names=samples[0].names,
        categories=samples[0].categories,
        n_actions=samples[0].n_actions,
        mask=np.concatenate(masks) if masks else None,
        action_prob=None,
        gamma=samples[0].gamma,
        **joined,
    )
