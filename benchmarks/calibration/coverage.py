"""Nominal against empirical coverage of every interval that the library has, on a grid of (episodes, horizon, overlap).

The world is random, small and exact; the policy evaluated is a mixture of the behavior and the best policy. Two-sided intervals
are for its value; the one-sided bounds are asked whether they lie below what they bound.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.calibration.bounds import (
    FOLDS,
    GATE,
    SEQUENCES,
    differences,
    lower_bounds,
    on_two_folds,
    reported_intervals,
    two_sided_intervals,
)
from benchmarks.calibration.judging import MEMBERS, Table, evaluation
from benchmarks.calibration.small import world as small_world
from benchmarks.calibration.store import Experiment, Found, Lines
from benchmarks.calibration.tables import below, clopper_pearson, cost, plain, prose, table
from offrl_models.measures import TRAJECTORY_EPISODES, TRAJECTORY_SHARE, enough_effective
from offrl_models.ope.diagnostics import effective_sample_size
from offrl_models.ope.distribution import band_interval, mean, tis_cdf
from offrl_models.ope.doubly_robust import Model
from offrl_models.ope.estimates import ESTIMATORS, MISSED, UNWEIGHTED, all_terms, doubted
from offrl_models.ope.importance import trajectory_weights
from offrl_models.ope.intervals import ensemble
from offrl_models.ope.tabular import TabularModel
from offrl_models.ope.worlds import World
from offrl_models.reports.plots import BLUE, GRAY, save

EPISODES, HORIZONS, OVERLAP = (100, 500, 2_000), (1, 5, 20), {"near": 0.2, "far": 0.6}
FITTED = 7 / 3  # episodes for the nuisances, for one that judges: the shares of the permanent split
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
REPORTED = LEVELS.index(0.95)
UNDEFINED = "-"  # the one-sided sequence has no bound at 50%
SIDES = ("lower bound", "upper bound")
BOUNDS = [f"{name}, {side}" for name in SEQUENCES for side in SIDES]  # the last one decides nothing
FOLD_BOUNDS = [f"{FOLDS}, {side}" for side in SIDES]
ENOUGH, FEWEST = "enough effective episodes", 20  # for gate and `evaluate` to read them; logs that a share is told of
SHOWN = {f"percentile bootstrap, {name}": name for name in ESTIMATORS if name not in UNWEIGHTED}  # on the evidence page
SOLID = {name: f"not doubted: {name}" for name in SHOWN}  # whether it is drawn there in full
Counts = dict[str, dict[str, np.ndarray]]  # by interval, cell of the grid and level


@cache
def setting(horizon: int, overlap: str) -> tuple[World, Table]:
    """A world and the policy that is evaluated in it."""
    world = small_world(3, 3, horizon)
    share = OVERLAP[overlap]
    return world, (1 - share) * world.behavior + share * world.optimal()


def covered(horizon: int, overlap: str, n: int, seed: int) -> dict[str, str]:
    """Which levels every interval covers at on one log: one digit for each of LEVELS."""
    world, policy = setting(horizon, overlap)
    fitted_on = round(FITTED * n)
    log = world.simulate(fitted_on + n, seed)
    fitted = np.arange(log.n_episodes) < fitted_on
    found = evaluation({"policy": policy}, world.behavior, log.take(fitted), log.take(~fitted), seed)
    value, base = world.value(policy), world.value(world.behavior)
    gate = found.episodes
    weight = trajectory_weights(gate, found.ratio["policy"])
    largest = float((policy / world.behavior).max()) ** horizon
    intervals = two_sided_intervals(weight, gate.return_, largest)
    cdf = tis_cdf(gate, found.ratio["policy"], low=0.0, high=1.0)
    intervals["mean by a band of the CDF, TIS"] = partial(band_interval, cdf, mean, largest)
    model = TabularModel.fit(found.fitted_on, world.n_states)
    assert model is not None
    terms = all_terms(gate, found.ratio["policy"], Model.of(gate, found.fqe.q[0], found.fqe.v[0]))
    intervals |= reported_intervals(found, terms, policy, model)
    initial = found.fqe.initial[0].mean(0)
    intervals[f"t over {MEMBERS} FQE models"] = partial(ensemble, found.fqe.members(0), initial)
    digits = {
        name: _digits(interval.low <= value <= interval.high for interval in map(of_level, LEVELS))
        for name, of_level in intervals.items()
    }
    for name, what, bound in lower_bounds(found, model, seed):
        truth = value - base if what == "gain" else value
        digits[name] = _digits(bound(1 - level) <= truth for level in LEVELS[name == GATE :])
    folds, sequences = on_two_folds(found, policy), zip(SEQUENCES, differences(found, terms), strict=True)
    for name, bounds in [*sequences, *([(FOLDS, folds)] if folds else [])]:
        ends = [bounds(1 - level) for level in LEVELS[1:]]
        digits[f"{name}, {SIDES[0]}"] = _digits(end.lower_bound <= value - base for end in ends)
        digits[f"{name}, {SIDES[1]}"] = _digits(end.upper_bound >= value - base for end in ends)
    pale = doubted(SHOWN.values(), gate, found.ratio["policy"], None)
    flags = {SOLID[name]: SHOWN[name] not in pale for name in SHOWN}
    flags[ENOUGH] = effective_sample_size(weight) >= enough_effective(n)
    digits |= {name: str(int(flag)) * len(LEVELS) for name, flag in flags.items()}
    return {name: digit.rjust(len(LEVELS), UNDEFINED) for name, digit in digits.items()}


def _digits(hits: Iterator[bool]) -> str:
    return "".join(str(int(hit)) for hit in hits)


def coverage(seed: int) -> Found:
    grid = list(product(HORIZONS, OVERLAP, EPISODES))
    seeds = np.random.SeedSequence(seed).generate_state(len(grid)).tolist()
    return {
        f"n {n}, horizon {horizon}, {overlap}": covered(horizon, overlap, n, own)
        for (horizon, overlap, n), own in zip(grid, seeds, strict=True)
    }


def has_all(found: Found) -> bool:
    """Whether a log was simulated after the sequences of differences, and what is doubted, came in."""
    return all({ENOUGH, *BOUNDS, *SOLID.values()} <= digits.keys() for digits in found.values()) and any(
        FOLD_BOUNDS[0] in digits for digits in found.values()
    )


def counts(lines: Lines, flag: str | None = None) -> Counts:
    """By interval and cell of the grid, how many logs are covered at each level; of those with a flag alone if one is given."""
    found: Counts = {}
    for line in lines.values():
        for cell, digits in line.found.items():
            if flag and not int(digits[flag][0]):
                continue
            for name, hits in digits.items():
                total = found.setdefault(name, {}).setdefault(cell, np.zeros(len(LEVELS)))
                total += [np.nan if hit == UNDEFINED else int(hit) for hit in hits]
    return found


def report(lines: Lines, path: Path) -> list[str]:
    found, among, logs = counts(lines), counts(lines, ENOUGH), len(lines)
    solid = {name: (found.pop(flag), counts(lines, flag)) for name, flag in SOLID.items()}
    asked = {cell: int(hits[REPORTED]) for cell, hits in found.pop(ENOUGH).items()}
    plot = path.with_name("calibration-coverage.png")
    _plot(found, logs, plot)
    rows = [("interval", "coverage at 95%, least and most of the grid", "below nominal at 95%")]
    short = set[str]()  # cells of the grid in which a bound of a difference covers less than it says
    for name, cells in found.items():
        shares = {cell: hits[REPORTED] / logs for cell, hits in cells.items()}
        low = {cell: share for cell, share in shares.items() if below(share * logs, logs, LEVELS[REPORTED])}
        short |= low.keys() if name in BOUNDS else set()
        told = "; ".join(f"{cell}: {share:.1%}" for cell, share in low.items()) or "nowhere"
        rows.append((name, f"{min(shares.values()):.1%} to {max(shares.values()):.1%}", told))
    own = _own(found, among, asked, logs)
    return [
        "## Intervals",
        "",
        *prose(
            "A random exact world of 3 states and 3 actions a step; the policy evaluated is the behavior with a share of the best "
            f"policy mixed in, {OVERLAP['near']:.0%} (near) or {OVERLAP['far']:.0%} (far). Below nominal: the upper "
            "Clopper-Pearson limit lies under the level. TIS and WIS are (weighted) trajectory importance sampling, PDIS to MDR "
            "the estimators of the reports, with the nuisances of the gate. HCOPE, logarithmic smoothing (horizon 1 only), leg A "
            "and its t-bound are one-sided lower bounds, of the value or, for leg A, of the gain; its nuisances are fitted on 7 "
            "episodes for 3 that judge. Differences are to the logged mean return, with a one-sided bound on either side; at "
            f"horizon 1 that by WDR is by DR, and WPDIS is SNIPW. {cost(lines)}"
        ),
        *table(*rows),
        *prose(
            "The gate decides by the one-sided confidence sequence of leg A, and by that of leg C as well where the state is not "
            "Markov; from 500 episodes on, and only where the findings on weights, influence and visits do not object. `offrl "
            "evaluate` answers by a sequence too, and from as many: around the difference by MDR on two folds where there is one, "
            "else by WDR, and without a model of the values by WPDIS, whose upper bound decides nothing. The others stand in "
            "reports. Leg B, a test by betting, is no interval. Where a row above names n 100, neither looks; where it names more "
            "episodes, neither uses that interval, or only on logs that suffice for it: leg C, and differences by WDR and WPDIS, "
            f"are asked from {TRAJECTORY_EPISODES} effective episodes on, and {TRAJECTORY_SHARE:.0%} of all. Over "
            f"all logs a bound of theirs falls below nominal in {len(short)} of {len(asked)} regimes, and in "
            f"{sum(asked[cell] < FEWEST for cell in short)} of these fewer than {FEWEST} logs have as many: not asked. What the "
            "lower and the upper bound cover at 95% on the logs that have:"
        ),
        *table(("regime", f"logs with {ENOUGH}", *SEQUENCES), *_asked(among, asked, logs)),
        *prose(
            f"Where {FEWEST} logs ask, what is decided by covers what it says at every level"
            + (", but for:" if own else ".")
        ),
        *[f"- {each}" for each in own],
        *[""] * bool(own),
        *prose(
            "Pages show an estimate pale, as doubted, where its weights are worth fewer effective episodes than that, or their "
            f"mean is more than {MISSED:.0f} standard errors below 1: at the last step or, but for TIS and WIS, at an earlier "
            "one. Few effective episodes alone do not tell: weights look even where the large ones did not come. Over all "
            f"regimes, and in the worst of those that have {FEWEST} such logs, intervals at {LEVELS[REPORTED]:.0%} cover:"
        ),
        *table(("interval", "not doubted", "worst", "doubted", "worst"), *_pale(found, solid, logs)),
        f"![Nominal against empirical coverage]({plot.name})",
        "",
    ]


def _asked(among: Counts, asked: Mapping[str, int], logs: int) -> Iterator[tuple[str, ...]]:
    """By regime, what lower and upper bounds of differences cover at 95% where they are asked."""
    for cell, n in asked.items():
        shares = [among[name][cell][REPORTED] / n if n >= FEWEST else np.nan for name in BOUNDS]
        told = [f"{low:.1%} and {high:.1%}" for low, high in zip(shares[::2], shares[1::2], strict=True)]
        yield cell, plain(n, logs), *(told if n >= FEWEST else ["not asked"] * len(told))


def _pale(
    found: Counts, solid: dict[str, tuple[dict[str, np.ndarray], Counts]], logs: int
) -> Iterator[tuple[str, ...]]:
    """By interval, what it covers at 95% where it is not doubted, and where it is."""
    for name, (flagged, among) in solid.items():
        number = {cell: int(each[REPORTED]) for cell, each in flagged.items()}
        hits = {cell: int(among[name][cell][REPORTED]) if n else 0 for cell, n in number.items()}
        pale = {cell: int(found[name][cell][REPORTED]) - hits[cell] for cell in number}
        others = {cell: logs - n for cell, n in number.items()}
        yield name, *_worst(hits, number), *_worst(pale, others)


def _worst(hits: Mapping[str, int], number: Mapping[str, int]) -> tuple[str, str]:
    """Hits in all regimes together, and the least share of one."""
    n = sum(number.values())
    shares = {cell: hits[cell] / each for cell, each in number.items() if each >= FEWEST}
    worst = min(shares, key=shares.__getitem__, default=None)
    told = "-" if worst is None else f"{worst}: {shares[worst]:.1%}"
    return f"{sum(hits.values()) / n:.1%} of {n:,}" if n else "-", told


def _own(found: Counts, among: Counts, asked: Mapping[str, int], logs: int) -> list[str]:
    """Where a bound that is decided by covers less than it says: leg A from the first look on, the others where asked."""
    sentences = []
    for name, cell in product((GATE, *FOLD_BOUNDS, *BOUNDS[:-1]), asked):
        counted, n = (among, asked[cell]) if name in BOUNDS else (found, 0 if cell.startswith("n 100,") else logs)
        for level, hit in list(zip(LEVELS, counted.get(name, {}).get(cell, ()), strict=False))[1:]:
            if n >= FEWEST and below(hit, n, level):
                sentences.append(f"{name}, {cell}: {hit:.0f} of {n} at {level:.0%}")
    return sentences


def _plot(found: Counts, logs: int, path: Path) -> None:
    """One panel per interval, one line per cell, dotted where the overlap is poor; bands where the measurement is exact."""
    figure, grid = plt.subplots(-(-len(found) // 4), 4, figsize=(11, 0.46 * len(found)), sharex=True, sharey=True)
    low, high = np.array([clopper_pearson(round(level * logs), logs) for level in LEVELS]).T
    for axes in grid.ravel()[len(found) :]:
        axes.set_visible(False)
    for axes, (name, cells) in zip(grid.ravel(), found.items(), strict=False):
        axes.fill_between(LEVELS, low, high, color=GRAY, alpha=0.35)
        axes.plot([0.5, 1], [0.5, 1], color=GRAY, linewidth=0.8)
        for cell, hits in cells.items():
            axes.plot(LEVELS, hits / logs, ":" if cell.endswith("far") else "-", color=BLUE, linewidth=0.9)
        axes.set_title("\n".join(name.split(": ")[-1].rsplit(", ", 1)), fontsize=8)
        axes.set_xlim(0.5, 1.0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("nominal; gray: the diagonal and where a share of that many logs would fall, 95%", fontsize=9)
    figure.supylabel("empirical; solid: near, dotted: far", fontsize=9)
    figure.tight_layout()
    save(figure, path)


EXPERIMENTS = {"coverage": Experiment(coverage, 1_000, report, has_all)}
