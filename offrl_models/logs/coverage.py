"""Coverage: what a log covers and what is wrong in it, as small tables, whatever the number of rows.

Counts are exact, over every row. What needs a model of the log (leakage, confounding, the Markov test and the like) is measured
on whole episodes: all of them in a small log, a seeded share of a large one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from offrl_models.logs import independence, support, timing, values
from offrl_models.logs.chain import Chain
from offrl_models.logs.contract import Contract
from offrl_models.logs.index import Index
from offrl_models.logs.read import BATCH, Log, ahead
from offrl_models.logs.sample import Sample
from offrl_models.logs.screen import Screened, Violation, screen
from offrl_models.logs.tally import BINS, Tally
from offrl_models.schema import InputError

FEW_VISITS = 5  # a state-action cell with fewer visits counts as barely seen
SAMPLE_ROWS = 200_000


@dataclass(frozen=True)
class Coverage:
    """All measures of one log. Every table is small."""

    batches: pl.DataFrame  # one row per batch: rows, and one column of broken rows per rule
    cells: pl.DataFrame  # one row per visited state-action cell: state, action, visits, mean_action_prob
    propensity: pl.DataFrame  # one row per test of "the mean ratio is 1" (C15)
    actions: pl.DataFrame  # one row per policy version and action
    overlap: pl.DataFrame  # histogram of the logged propensities: from, rows
    rewards: pl.DataFrame  # histogram of the rewards over their range: from, rows
    episodes: pl.DataFrame  # one row per number of steps: length, episodes
    returns: pl.DataFrame  # one row per sampled episode: return
    card: dict[str, Any]  # one value per fact about the whole log
    derived: dict[str, pl.DataFrame]  # check -> what it found
    violations: tuple[Violation, ...]


def measure(log: Log, seed: int = 0, screened: Screened | None = None) -> Coverage:
    """Every measure of a log."""
    contract, held = log.contract, screened or screen(log)
    tally, times, chain = Tally(contract), _Times(contract), Chain(contract)
    share = min(1.0, SAMPLE_ROWS / max(sum(held.index.rows.values()), 1))
    chosen = _chosen_episodes(held.index, share, seed)
    parts = []
    for chunk in ahead(log.chunks()):
        if chunk.height == 0:
            continue
        tally.add(chunk.filter(_usable(contract)), values.rewards(chunk, contract, held.index.clock))
        times.add(chunk)
        chain.add(chunk)
        parts.append(chunk if share == 1.0 else chunk.filter(pl.col(contract.episode_column).is_in(chosen.implode())))
    sample = make_sample(pl.concat(parts, how="vertical_relaxed"), held.index, contract)
    visits = tally.visits()
    cells = visits if visits is not None else support.cell_visits(sample, seed=seed)
    lengths = held.index.episodes.group_by("length").len(name="episodes").sort("length")
    return Coverage(
        batches=held.broken,
        cells=cells,
        propensity=tally.mean_ratios(),
        actions=tally.action_frequencies(),
        overlap=pl.DataFrame({"from": np.linspace(0, 1, BINS + 1)[:-1], "rows": tally.propensities}),
        rewards=pl.DataFrame({"from": np.linspace(*contract.reward.range, BINS + 1)[:-1], "rows": tally.reward_counts}),
        episodes=lengths,
        returns=pl.DataFrame({"return": sample.return_}),
        card=_card(tally, held.index, sample, cells, len(log.batches)),
        derived={
            **_derived(sample, contract, seed),
            **times.found(contract),
            "C18": tally.exploration(),
            "C34": chain.found(),
        },
        violations=held.violations,
    )


def _usable(contract: Contract) -> pl.Expr:
    """Rows of which ratios can be formed; the others are left to the rules that refuse them."""
    good = pl.lit(True)
    if contract.action_prob:
        prob = values.propensity(contract)
        good &= (prob > 0) & prob.is_finite() & ((prob <= 1) if contract.action_prob.of != "density" else pl.lit(True))
    if not contract.action.continuous:
        good &= values.action_code(contract).is_not_null()
    allowed = values.mask_list(contract)
    if allowed is not None:
        good &= (allowed.list.len() == contract.action.n_actions) & ~allowed.list.contains(None)
    for name, column in contract.observed():
        if column.n_categories is not None and not column.labels:
            good &= pl.col(name).is_between(0, column.n_categories - 1) | (
                pl.col(name).is_null() & pl.lit(column.missing is not None)
            )
    return good.fill_null(False)


def _chosen_episodes(found: Index, share: float, seed: int) -> pl.Series:
    """Ids of a share of the episodes; which ones depends on their ids and the seed alone."""
    ids = found.episodes["episode"]
    return ids.filter(ids.cast(pl.String).hash(seed) % 1_000_000 < int(share * 1_000_000)) if share < 1 else ids


def make_sample(rows: pl.DataFrame, found: Index, contract: Contract) -> Sample:
    """Whole episodes from their rows, in whatever order; what is unusable, waiting or left out does not enter.

    Raises InputError when nothing is left.
    """
    keys = [contract.episode_column, contract.step_column]
    whole = found.episodes.filter(~pl.col("gap") & ~pl.col("pending")).select(pl.col("episode").alias(keys[0]))
    reward = values.reward(contract, found.clock)
    rows = rows.filter(_usable(contract) & reward.is_finite().fill_null(False)).join(whole, on=keys[0], how="semi")
    rows = rows.unique(keys, keep="first", maintain_order=True).sort(*keys)
    if rows.height == 0:
        raise InputError("no row of the log is usable; look at the checks that block it.")
    episode = rows[keys[0]].rle_id().cast(pl.Int64).to_numpy()

    def strings(column: str | None) -> np.ndarray | None:
        return rows[column].cast(pl.String).fill_null("").to_numpy().astype(str) if column else None

    discrete = not contract.action.continuous
    last = np.append(episode[1:] != episode[:-1], True)
    ended = (
        rows[contract.terminated].fill_null(False).to_numpy() if contract.terminated else last & (contract.horizon == 1)
    )
    return Sample(
        episode=episode,
        observation=values.observed_now(rows, contract),
        names=tuple(feature.name for feature in contract.features),
        categories=tuple(feature.categories for feature in contract.features),
        action=values.action(rows, contract),
        n_actions=contract.action.n_actions if discrete else None,
        mask=values.mask(rows, contract) if discrete else None,
        reward=values.rewards(rows, contract, found.clock),
        terminated=ended,
        action_prob=values.propensities(rows, contract) if contract.action_prob else None,
        gamma=contract.gamma,
        batch=rows[BATCH].cast(pl.Int64).to_numpy(),
        policy_version=strings(contract.policy_version),
        actor=strings(contract.actor),
        subgroups={name: np.asarray(strings(name)) for name in contract.subgroups},
        decided_at=rows[contract.decided_at].to_numpy() if contract.decided_at else None,
    )


def _derived(sample: Sample, contract: Contract, seed: int) -> dict[str, pl.DataFrame]:
    low, high = contract.reward.range
    longest = int(sample.length.max())
    worth = float((contract.gamma ** np.arange(longest)).sum())
    found = {
        "C09": independence.leakage(sample, seed=seed),
        "C11": support.outliers(sample),
        "C12": timing.reward_facts(sample, low, high),
        "C23": support.dataset_quality(sample, low=min(low * worth, low), high=max(high * worth, high), seed=seed),
        "C29": independence.confounding(sample, seed=seed),
        "C30": independence.markov(sample, seed=seed),
        "C36": support.subgroup_sizes(sample),
    }
    return found | ({"C17": timing.version_mixture(sample)} if contract.policy_version else {})


class _Times:
    """The times of every row, where the log has them."""

    def __init__(self, contract: Contract):
        wanted = (contract.decided_at, contract.ingested_at, contract.reward.arrived_at)
        self.columns = [name for name in wanted if name]
        self.parts: list[pl.DataFrame] = []

    def add(self, chunk: pl.DataFrame) -> None:
        if self.columns:
            self.parts.append(chunk.select(self.columns))

    def found(self, contract: Contract) -> dict[str, pl.DataFrame]:
        if not contract.decided_at or not self.parts:
            return {}
        rows = pl.concat(self.parts)
        decided = rows[contract.decided_at]
        found = {"C33": timing.daily_volume(decided.drop_nulls().to_numpy())}
        if contract.ingested_at:
            both = rows.drop_nulls([contract.decided_at, contract.ingested_at])
            source = np.full(both.height, "log")
            at = (both[contract.decided_at].to_numpy(), both[contract.ingested_at].to_numpy())
            found["C32"] = timing.clock_skew(*at, source)
        if contract.reward.arrived_at:
            both = rows.drop_nulls([contract.decided_at, contract.reward.arrived_at])
            at = (both[contract.decided_at].to_numpy(), both[contract.reward.arrived_at].to_numpy())
            found |= {"C31": timing.reward_delay(*at, contract.reward.window_hours or np.inf)} if both.height else {}
        return found


def _card(tally: Tally, found: Index, sample: Sample, cells: pl.DataFrame, batches: int) -> dict[str, Any]:
    """The dataset card (C24) and the facts about rewards and open episodes."""
    length = found.episodes["length"]
    counts = (
        np.zeros(0)
        if tally.actions == {}
        else tally.action_frequencies()
        .group_by("action", maintain_order=True)
        .agg(pl.col("rows").sum())["rows"]
        .to_numpy()
    )
    frequency = counts / max(counts.sum(), 1)
    whole = max(found.episodes.height, 1)
    return {
        "episodes": found.episodes.height,
        "rows": tally.rows,
        "batches": batches,
        **{f"return_q{int(q * 100):02d}": float(np.quantile(sample.return_, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "return_mean": float(sample.return_.mean()),
        **{f"length_q{int(q * 100):02d}": length.quantile(q, "linear") for q in (0.05, 0.5, 0.95)},
        "length_max": length.max(),
        "distinct_actions": len(counts) if len(counts) else len(np.unique(sample.action, axis=0)),
        "action_entropy_nats": float(-(frequency * np.log(frequency)).sum()),
        "reward_distinct_values": len(tally.rewards),
        "reward_share_at_bounds": tally.at_bounds / max(tally.rows, 1),
        "open_share": found.episodes["open"].sum() / whole,
        "waiting_for_rewards_share": found.episodes["pending"].sum() / whole,
        "left_out_episodes": found.left_out.height,
        "share_of_thin_cells": cells.filter(pl.col("visits") < FEW_VISITS).height / max(cells.height, 1),
        "cells": cells.height,
        "sampled_rows": sample.n_rows,
    }
