"""What speaks against believing a difference: beside the overlap, that it hangs on few, on what was cut off, or on what is over."""

import numpy as np
from jaxtyping import Float64, Int64

from offrl_models import course
from offrl_models.assess.answer import Gain
from offrl_models.assess.overlap import (
    THRESHOLDS,
    Check,
    check,
    effective_check,
    ratio_checks,
    support_check,
    visits_check,
    weight_check,
)
from offrl_models.assess.target import Target
from offrl_models.assess.values import Values
from offrl_models.datasets.cut import Cut
from offrl_models.ope.importance import Terms
from offrl_models.ope.intervals import Interval, confidence_sequence_width, difference
from offrl_models.ope.units import independent
from offrl_models.schema import Episodes

CUT = 0.05  # share of episodes that are truncated beyond which what lies past their end may decide


def checks(
    episodes: Episodes,
    target: Target,
    ratio: Float64[np.ndarray, "rows"],
    values: Values | None,
    found: Gain,
    without_top: float,
    rare: Float64[np.ndarray, "rows"] | None = None,
) -> list[Check]:
    """What the answer rests on, in the order in which it decides.

    `rare` is the policy's mass in each row where an estimate of the behavior is rare, if there is one.
    """
    number = independent(episodes)
    one, noun = ("episode", "episodes") if number == episodes.n_episodes else ("entity", "entities")
    said = [
        *ratio_checks(episodes, target, ratio),
        support_check(episodes, target, ratio, rare, None if values is None else values.visits),
        *([] if values is None or values.visits is None else [visits_check(episodes, target, values.visits)]),
        check(noun, number >= THRESHOLDS.first_look, number, f"at least {THRESHOLDS.first_look}",
              f"{number} {noun} are fewer than {THRESHOLDS.first_look}"),
        effective_check(episodes, ratio, values),
    ]  # fmt: skip
    if not np.isfinite(found.estimate):
        return said
    if found.estimator != "MDR":
        said.append(weight_check(episodes, ratio))
    most, share, sign = THRESHOLDS.largest_share, found.largest_share, 1.0 if found.estimate >= 0 else -1.0
    return [
        *said,
        check("largest share", share <= most, share, f"at most {most:g}",
              f"one {one} carries {share:.1%} of the difference, more than {most:.0%}"),
        check("influence", sign * without_top >= 0, without_top, "the same sign",
              f"without its 0.5% most influential {noun} the difference is {without_top:+.3g}, of another sign"),
    ]  # fmt: skip


def direct_check(direct: Interval, logged: float, found: Gain) -> Check:
    """The direct method may not contradict a difference that is settled."""
    apart = direct.estimate - logged
    settled = 1.0 if found.lower_bound > 0 else -1.0 if found.upper_bound < 0 else 0.0
    return check("direct method", settled * apart >= 0, apart, "no other sign",
                 f"the direct method puts the difference at {apart:+.3g}")  # fmt: skip


def recorded_checks(episodes: Episodes, ratio: Float64[np.ndarray, "rows"], cut: Cut, found: Gain) -> list[Check]:
    """What lies past the end of recordings is known by fitted values alone, or not at all, and no bound knows their error.

    MDR, whose weights are those of the infinite horizon, makes up for it, unless nobody ever acts in the states where recordings
    stop. What the last decisions earned is left out with them where nothing was observed after them: it may not undo a difference.
    """
    lost = episodes.truncated
    if found.estimator == "MDR":
        lost = lost & ~np.isin(episodes.next_observation[:, 0], episodes.observation[:, 0])
    share = (float(lost.sum()) + cut.episodes) / (episodes.n_episodes + cut.episodes)
    settled = max(found.lower_bound, -found.upper_bound, 0.0)
    most = cut.reward * float(ratio.max(initial=1.0))
    return [
        check("recorded to the end", share <= CUT, share, f"at most {CUT:g}",
              f"{share:.1%} of the episodes were recorded until before their task ended, and what either policy earns past that "
              "is in no bound; mark them as ended if it is of no account"),
        check("last rewards", settled == 0 or most < settled, most, "less than the difference",
              f"the last decisions of {cut.rows:,} recordings that stopped are left out, for nothing was observed after them, and "
              f"their rewards may come to {most:.3g} per episode; name the next observation, or mark these episodes as ended"),
    ]  # fmt: skip


def loss_check(found: Gain) -> Check:
    """By WPDIS no policy is worse: what few logged episodes do, and it would do often, may be missing from its weights.

    Its upper bound then lies too low; the lower one errs to the safe side (docs/calibration.md).
    """
    return check("loss", found.upper_bound >= 0, found.upper_bound, "not by weights alone",
                 "without a model of the values, weights of whole episodes show no loss: what the policy would do and the log "
                 "hardly does is missing from them")  # fmt: skip


def newer_check(
    minuend: Terms, base: Terms, unit: Int64[np.ndarray, "episodes"], oldest: Int64[np.ndarray, "episodes"], found: Gain
) -> Check:
    """The half of the episodes that was recorded later has to keep a part of a gain that is settled, as the gate asks."""
    paired = difference(minuend, base)
    outcome, alpha, units = paired.estimate() + paired.influence(), 1 - found.level, len(np.unique(unit))
    width = confidence_sequence_width(units, alpha=alpha, planned=units) * np.sqrt(units)
    left = course.kept(outcome, oldest, alpha=alpha, width=width, unit=unit)
    older, newer = (half.difference for half in course.halves(outcome, oldest, alpha))
    return check("newer half", not found.lower_bound > 0 or left.lower_bound > 0, left.lower_bound,
                 "above 0 where the whole is", "the newer half of the log does not show that the gain is still there: the "
                 f"difference was {older:+.3g} and is {newer:+.3g} now, which is more than {course.KEPT:g} of what it was by at "
                 f"least {left.lower_bound:+.3g}")  # fmt: skip
