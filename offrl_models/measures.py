"""What the gate knows of a policy: plain numbers."""

import math
from dataclasses import dataclass, field
from typing import Any

MISFIT = 2.0  # standard errors that mean ratios may be off by where the propensities are a clone's
TRAJECTORY_EPISODES, TRAJECTORY_SHARE = 200, 0.05  # see enough_effective


def enough_effective(independent: int) -> float:
    """How many of so many episodes, or entities, the weights of whole episodes must be worth: leg C is informative from there on,
    and intervals that rest on fewer may be too narrow."""
    return max(TRAJECTORY_EPISODES, TRAJECTORY_SHARE * independent)


def misfit(mean_ratio_z: float, worst_action_z: float) -> str:
    """Why propensities that are a clone's cannot be trusted; empty where they can.

    What a clone gets wrong is in no bound, and moves weights where it moves their means: overall, and of single actions or ranges
    of them.
    """
    if abs(mean_ratio_z) < MISFIT and abs(worst_action_z) < MISFIT:
        return ""
    return (
        "the propensities are those of a clone that does not fit: the mean importance ratio has z = "
        f"{mean_ratio_z:.1f} against 1, and that of one action or range of actions {worst_action_z:.1f}; what the clone gets wrong "
        "is in no bound, so log the propensities"
    )


@dataclass(frozen=True)
class Contrast:
    """A difference to the champion with one-sided bounds: of one subgroup, one cost, or one part of the log.

    `entities` is how many the episodes are of, where an entity has several: as many numbers are independent. Where there are too
    few of them the bounds are infinite.
    """

    name: str
    episodes: int
    difference: float
    lower_bound: float
    upper_bound: float
    entities: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Contrast":
        """A bound of null is infinite."""
        ends = {"lower_bound": -math.inf, "upper_bound": math.inf}
        return cls(**{**data, **{name: end for name, end in ends.items() if data[name] is None}})

    @property
    def independent(self) -> int:
        return self.episodes if self.entities is None else self.entities


@dataclass(frozen=True)
class Measures:
    """What the gate knows of one rung. Differences are against the champion, in units of return."""

    episodes: int
    rows: int
    alpha: float  # error rate of each of the bounds
    difference: float  # leg A, the primary one
    lower_bound: float  # one-sided, at 1 - alpha
    upper_bound: float  # one-sided, at 1 - alpha
    bound: str  # how the bounds were made
    doubt: str  # why they cannot be trusted; empty where they can
    e_value: float | None  # leg B: evidence that needs neither a model nor large numbers; None where it does not apply
    trajectory_difference: float | None  # leg C: trajectory-wise doubly robust; None where it does not apply
    trajectory_error: float | None  # its standard error
    fqe_differences: list[float]  # leg D: each member's value of the rung minus its value of the champion
    effective_transitions: float
    effective_episodes: float
    mean_ratio_z: float
    worst_action_z: float
    unsupported_mass: float
    few_visits_mass: float | None  # None where the observation is not one category, and has no cells to count
    ratio_q99: float  # 99% quantile, largest value and chi-squared of the state-action ratios
    ratio_max: float
    chi_squared: float
    largest_share: float  # of one episode in the sum of |X|
    without_top: float  # the difference without its 0.5% most influential episodes
    older_half: Contrast  # leg A in the half of the episodes that was recorded first, t-bounds at 1 - alpha
    newer_half: Contrast  # and in the other half
    kept: float  # what the newer half gains beyond a share of the older half's gain
    kept_bound: float  # its lower bound: beside `lower_bound`, at 1 - alpha whatever the older half gained
    course: list[Contrast]  # leg A in each tenth, oldest first, t-bounds at 1 - alpha
    sure_share: float  # of rows with a propensity over .999
    propensities: str  # "logged" or "estimated"
    markov_z: float | None = None  # of "the past tells what comes next, beyond the state"; None where it cannot be told
    trajectory_lower: float | None = None  # bounds of leg C, one-sided, at 1 - alpha
    trajectory_upper: float | None = None
    smoothed_lower: float | None = None  # leg B as a bound, logarithmic smoothing at 1 - alpha; None beyond horizon 1
    widened: float = 1.0  # how many times as wide leg A's interval is for what few surprises leave out of its variance
    drifted: str = ""  # what is wrong with the newest batch; empty where it is like those before it
    costs: list[Contrast] = field(default_factory=list)
    subgroups: list[Contrast] = field(default_factory=list)
    equal_returns: bool = False  # whether all logged returns are the same, so that nothing tells policies apart
    cut_reward: float = (
        0.0  # what last decisions that were left out may have been worth per episode, at the largest ratio
    )
    entities: int | None = None  # that the episodes are of, where one has several: these are independent

    @property
    def independent(self) -> int:
        """How many independent parts the log has: entities, or episodes where each is one of its own."""
        return self.episodes if self.entities is None else self.entities

    @property
    def influence(self) -> float:
        """Below 0 where the sign of the difference hangs on a few episodes."""
        return self.without_top * (1.0 if self.difference >= 0 else -1.0)

    @property
    def error_rate_share(self) -> float:
        """What is left of the error rate: estimating the propensities costs half of it."""
        return 1.0 if self.propensities == "logged" else 0.5

    @property
    def trajectory_informs(self) -> bool:
        """Whether enough episodes stand behind leg C."""
        return self.effective_episodes >= enough_effective(self.independent)

    @property
    def trajectory_top(self) -> float | None:
        """Leg C plus twice its standard error; None where it cannot object."""
        if self.trajectory_difference is None or self.trajectory_error is None or not self.trajectory_informs:
            return None
        return self.trajectory_difference + 2 * self.trajectory_error

    @property
    def proven(self) -> bool:
        """Whether leg B alone proves the gain. Estimates of propensities prove nothing."""
        return self.propensities == "logged" and self.e_value is not None and self.e_value >= 1.0 / self.alpha

    @property
    def relies_on_state(self) -> bool:
        """Whether nothing stands beside leg A, which holds for a Markov state and nuisances that converge."""
        alone = not (self.trajectory_informs and self.trajectory_difference is not None)
        return self.rows > self.episodes and alone and not self.doubt and not self.proven

    @property
    def trajectory_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of leg C, which needs no Markov state; infinite where it says nothing."""
        if self.trajectory_lower is None or self.trajectory_upper is None or not self.trajectory_informs:
            return -math.inf, math.inf
        return self.trajectory_lower, self.trajectory_upper
