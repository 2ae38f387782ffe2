"""What is counted on every row of a log, chunk by chunk, in memory that does not grow with the rows."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64
from scipy import stats

from offrl_models.logs import values
from offrl_models.logs.contract import Contract

SURE = 0.999  # a propensity above it means that nothing was tried out (C18)
BINS = 50
DISTINCT = 1000  # distinct rewards that are told apart
FEWEST_TAKEN = 10  # rows of an action under which its mean ratio says nothing
ROUNDED = 1e-4  # what a mean ratio may be off by where propensities are rounded; no verdict hangs on it
ALL, UNIFORM, ALWAYS = "all", "uniform", "always "


@dataclass
class Sums:
    """n, sum and sum of squares of errors whose expectation is 0; and of the second moments, where those are known."""

    n: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    moments: float = np.nan

    def add(self, n: float, total: float, squares: float, moments: float = np.nan) -> None:
        before = self.moments if self.n else 0.0
        self.n, self.total, self.squares = self.n + n, self.total + total, self.squares + squares
        self.moments = before + moments

    def z(self, rounding: float = ROUNDED) -> float:
        """z-score of the mean, which `rounding` may have moved: its standard error is no less. A constant beyond that gets a huge
        score, not none."""
        mean = self.total / self.n
        spread = np.sqrt(max(self.squares / self.n - mean * mean, 0.0))
        return 0.0 if abs(mean) <= 1e-12 else float(mean / max(max(spread, 1e-12) / np.sqrt(self.n), rounding))

    @property
    def lower_z(self) -> float:
        """What a mean below 0 proves: 0 or less; NaN where the second moments are not known.

        A z-score that a normal mean falls below as rarely as the mean of X - E[X] can for any X >= 0, however rare and large
        its values: at most exp(-total^2 / (2 sum of E[X^2])) of the time. Maurer (2003), theorem 1, for states and mu as they are.
        """
        bound = min(self.total, 0.0) / max(np.sqrt(self.moments), 1e-12)
        return float(-stats.norm.isf(np.exp(-(bound**2) / 2) / 2) if bound > -35 else bound)


def zero_mean_z(error: Float64[np.ndarray, "rows"], rounding: float = 0.0) -> float:
    """z-score of a mean whose expectation is 0, but for `rounding`."""
    return Sums(float(len(error)), float(error.sum()), float(error @ error)).z(rounding)


def holm_z(z: Float64[np.ndarray, "tests"]) -> Float64[np.ndarray, "tests"]:
    """z-scores, shrunk to what Holm's correction for that many tests leaves of them. Holm (1979)."""
    log_p = np.log(2.0) + stats.norm.logsf(np.abs(z))
    order = np.argsort(log_p)
    adjusted = np.maximum.accumulate(log_p[order] + np.log(len(z) - np.arange(len(z))))
    corrected = np.empty(len(z))
    corrected[order] = stats.norm.isf(np.exp(np.minimum(adjusted, 0.0)) / 2)
    huge = np.abs(z) > 35  # beyond what a double can hold; no correction matters there
    return np.sign(z) * np.where(huge, np.abs(z), corrected)


@dataclass
class Tally:
    """Running counts of one log."""

    contract: Contract
    rows: int = 0
    actions: dict[tuple[str, int], list[float]] = field(
        default_factory=dict
    )  # (version, action) -> rows, sum of propensity
    ratios: dict[tuple[str, str], Sums] = field(default_factory=dict)  # (version, policy) -> errors of the mean ratio
    choices: Counter[str] = field(default_factory=Counter)  # version -> rows in which there was a choice
    sure: Counter[str] = field(default_factory=Counter)  # version -> those of them with a propensity above SURE
    propensities: Int64[np.ndarray, "bins"] = field(
        default_factory=lambda: np.zeros(BINS, np.int64)
    )  # histogram over [0, 1]
    reward_counts: Int64[np.ndarray, "bins"] = field(
        default_factory=lambda: np.zeros(BINS, np.int64)
    )  # over their range
    at_bounds: int = 0
    rewards: set[float] = field(default_factory=set)
    cells: Int64[np.ndarray, "cells"] | None = (
        None  # state * actions + action -> visits, where there is a table of states
    )
    cell_probs: Float64[np.ndarray, "cells"] | None = None

    def add(self, chunk: pl.DataFrame, reward: Float64[np.ndarray, "rows"]) -> None:
        contract = self.contract
        self.rows += chunk.height
        versions = (
            chunk[contract.policy_version].fill_null("").to_numpy()
            if contract.policy_version
            else np.full(chunk.height, ALL, dtype=object)
        )
        prob = values.propensities(chunk, contract) if contract.action_prob else None
        known = reward[~np.isnan(reward)]
        self.reward_counts += np.histogram(known, BINS, contract.reward.range)[0]
        self.at_bounds += int(np.isin(known, contract.reward.range).sum())
        if len(self.rewards) < DISTINCT:
            self.rewards |= set(np.unique(known)[:DISTINCT].tolist())
        names, which = np.unique(versions.astype(str), return_inverse=True)
        for number, version in enumerate(names):
            mine = slice(None) if len(names) == 1 else which == number
            self._add_version(
                str(version), chunk if len(names) == 1 else chunk.filter(pl.lit(which == number)), prob, mine
            )
        if contract.tabular_states:
            self._add_cells(chunk, prob)

    def _add_version(
        self, version: str, chunk: pl.DataFrame, prob: Float64[np.ndarray, "rows"] | None, mine: slice | np.ndarray
    ) -> None:
        contract = self.contract
        action = values.action(chunk, contract)
        p = np.full(len(action), np.nan) if prob is None else prob[mine]
        if not contract.action.continuous:
            n = contract.action.n_actions
            visits, total = np.bincount(action, minlength=n), np.bincount(action, np.nan_to_num(p), n)
            for code in np.flatnonzero(visits):
                kept = self.actions.setdefault((version, int(code)), [0.0, 0.0])
                kept[0] += int(visits[code])
                kept[1] += float(total[code])
        if prob is None:
            return
        self.propensities += np.histogram(np.minimum(p, 1.0), BINS, (0.0, 1.0))[0]
        if contract.action.continuous:
            return  # densities are held against the behavior model: a uniform policy plays where they all but vanish
        mask = values.mask(chunk, contract)
        choice = np.full(len(p), True) if mask is None else mask.sum(1) > 1
        self.choices[version] += int(choice.sum())
        self.sure[version] += int((choice & (p > SURE)).sum())
        self._add_ratios(version, action, p, mask, values.probabilities(chunk, contract))

    def _add_ratios(
        self,
        version: str,
        action: Int64[np.ndarray, "rows"],
        p: Float64[np.ndarray, "rows"],
        mask: Bool[np.ndarray, "rows actions"] | None,
        probs: Float64[np.ndarray, "rows actions"] | None,
    ) -> None:
        """Mean-ratio tests (C15): for any policy pi, E[pi(a|s) / mu(a|s)] is 1 when the logged mu is right and never 0.

        Tested for the uniform policy over the allowed actions and for each single action, where the expectation is whether the
        action was allowed. The errors are martingale differences, so rows may be summed as if they were independent. A mean
        below 1 is no proof of wrong propensities: an action may be allowed where it is played too rarely to be seen. It is one
        where all of mu was logged, for then both what can be seen and the second moments, the sum of pi^2 / mu, are known.
        """
        rows, n, ratio = len(action), self.contract.action.n_actions, 1.0 / p
        allowed = np.full(rows, n) if mask is None else np.maximum(mask.sum(1), 1)
        times = np.full(n, float(rows)) if mask is None else mask.sum(0).astype(np.float64)  # an action could be seen
        mass, moments, uniform = np.ones(rows), np.full(n, np.nan), np.nan
        if probs is not None:
            could = (probs > 0) & (True if mask is None else mask)
            second = np.divide(1.0, probs, out=np.zeros_like(probs), where=could)
            times, mass = could.sum(0).astype(np.float64), could.sum(1) / allowed
            moments, uniform = second.sum(0), float((second.sum(1) / allowed**2).sum())
        error = ratio / allowed - mass
        self._sums(version, UNIFORM).add(rows, float(error.sum()), float(error @ error), uniform)
        # The error of a single action is 1/p - 1 where it was taken, -1 where it could have been and was not.
        taken, first, square = (np.bincount(action, w, n) for w in (np.ones(rows), ratio, ratio**2))
        for code in np.flatnonzero(times):
            squares = square[code] - 2 * first[code] + taken[code] + (times[code] - taken[code])
            total = first[code] - times[code]
            self._sums(version, f"{ALWAYS}{code}").add(times[code], total, squares, moments[code])

    def _sums(self, version: str, policy: str) -> Sums:
        return self.ratios.setdefault((version, policy), Sums())

    def _add_cells(self, chunk: pl.DataFrame, prob: Float64[np.ndarray, "rows"] | None) -> None:
        states, n = int(self.contract.tabular_states or 0), self.contract.action.n_actions
        if n == 0:
            return
        cell = values.observed_now(chunk, self.contract)[:, 0].astype(np.int64) * n + values.action(
            chunk, self.contract
        )
        if self.cells is None or self.cell_probs is None:
            self.cells, self.cell_probs = np.zeros(states * n, np.int64), np.zeros(states * n)
        self.cells += np.bincount(cell, minlength=states * n)
        if prob is not None:
            self.cell_probs += np.bincount(cell, prob, states * n)

    def mean_ratios(self) -> pl.DataFrame:
        """One row per test of C15: policy version, policy, rows, mean error, z, and z after Holm's correction."""
        schema = {
            "version": pl.String,
            "policy": pl.String,
            "rows": pl.Int64,
            "mean_error": pl.Float64,
            "z": pl.Float64,
            "lower_z": pl.Float64,
        }
        tests = [
            (version, policy, int(sums.n), sums.total / sums.n, sums.z(), sums.lower_z)
            for (version, policy), sums in sorted(self.ratios.items())
            if policy == UNIFORM or self._taken(version, policy) >= FEWEST_TAKEN
        ]
        found = pl.DataFrame(tests, schema=schema, orient="row")
        corrected = holm_z(found["z"].to_numpy()) if found.height else np.zeros(0)
        found = found.with_columns(z_holm=pl.Series(corrected, dtype=pl.Float64))
        known = found["lower_z"].is_not_nan().to_numpy()
        lower = np.full(found.height, np.nan)
        lower[known] = holm_z(found["lower_z"].to_numpy()[known])
        return found.with_columns(lower_z_holm=pl.Series(lower, dtype=pl.Float64).fill_nan(None))

    def _taken(self, version: str, policy: str) -> float:
        """How often the action that a policy always plays was taken; never, if there is no such entry."""
        return self.actions.get((version, int(policy.removeprefix(ALWAYS))), [0.0])[0]

    def action_frequencies(self) -> pl.DataFrame:
        """One row per policy version and action: rows, their share of the version, mean propensity."""
        schema = {"version": pl.String, "action": pl.Int64, "rows": pl.Int64, "mean_action_prob": pl.Float64}
        rows = [(version, code, int(n), p / n) for (version, code), (n, p) in sorted(self.actions.items())]
        found = pl.DataFrame(rows, schema=schema, orient="row")
        return found.with_columns(share=pl.col("rows") / pl.col("rows").sum().over("version"))

    def visits(self) -> pl.DataFrame | None:
        """Visits of each cell of the table of states and actions; None where there is no table."""
        if self.cells is None or self.cell_probs is None:
            return None
        seen = np.flatnonzero(self.cells)
        n, visits = self.contract.action.n_actions, self.cells[seen]
        return pl.DataFrame(
            {
                "state": seen // n,
                "action": seen % n,
                "visits": visits,
                "mean_action_prob": self.cell_probs[seen] / visits,
            }
        )

    def exploration(self) -> pl.DataFrame:
        """One row per policy version: rows with a choice, and the share of them with a propensity above .999 (C18)."""
        rows = [(version, n, self.sure[version] / n) for version, n in sorted(self.choices.items()) if n]
        return pl.DataFrame(
            rows, schema={"version": pl.String, "rows": pl.Int64, "share_sure": pl.Float64}, orient="row"
        )
