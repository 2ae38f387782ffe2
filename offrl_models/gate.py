"""The gate: plain numbers in, findings and a verdict out. It fails closed, and only PASS can release.

A rung of the ladder passes when no finding objects. Thresholds live in the pipeline's YAML and change by commit; there is no
way around them.
"""

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator

from offrl_models.course import KEPT
from offrl_models.logs.contract import Strict
from offrl_models.measures import Contrast, Measures
from offrl_models.storage import plain

SUBGROUP_EPISODES = 200  # below which bounds of a group, which hold for large numbers, are not believed


class Status(StrEnum):
    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"  # keep the champion
    FAIL = "FAIL"  # evidence of harm
    INVALID = "INVALID"  # an assumption check failed
    NOT_TESTED = "NOT TESTED"  # an earlier rung did not pass


class GateConfig(Strict):
    """Thresholds of the gate."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)  # largest one-sided error rate of a release
    yearly_alpha: float = Field(default=0.1, gt=0, lt=1)  # most that all looks of 365 days may spend together
    long_run_alpha: float = Field(default=0.05, gt=0, lt=1)  # share of false ones among all releases, by e-LOND
    margin: float = Field(default=0.0, ge=0)  # by which the candidate must beat the champion, in units of return
    caps: tuple[float | None, ...] = (1.2, 1.5, 2.0, 5.0, None)  # of the ladder, in the order tested; None is uncapped
    ladders: int = Field(
        default=1, ge=1
    )  # candidates that climb, from the top of the leaderboard; they share the error rate
    planned_episodes: int = Field(default=5000, ge=500)  # gate episodes at which the bound is to be tightest
    first_look: int = Field(default=500, ge=2)  # fewest gate episodes for a verdict
    effective_transitions: float = Field(default=500, ge=0)  # floor, marginal weights
    mean_ratio_z: float = Field(default=4.0, gt=0)  # largest |z| of the mean-ratio tests
    rare_prob: float = Field(default=0.01, ge=0, lt=1)  # a behavior probability below it counts as unsupported
    unsupported_mass: float = Field(default=0.05, ge=0, le=1)  # most of the candidate's mass where it is
    few_visits: int = Field(default=5, ge=1)  # rows of a state-action cell below which nothing is known of it
    few_visits_mass: float = Field(default=0.02, ge=0, le=1)  # most of the candidate's mass in such cells
    largest_share: float = Field(default=0.05, gt=0, le=1)  # most that one episode may carry of the evidence
    sure_share: float = Field(
        default=0.2, ge=0, le=1
    )  # rows with a propensity over .999 from which trajectory legs are off
    markov_z: float = Field(default=4.0, gt=0)  # from which the state is not Markov, and leg C has to show the gain too
    return_range: tuple[float, float] | None = None  # of the discounted return, where more is known than of one reward
    constraints: dict[str, float] = Field(
        default_factory=dict
    )  # cost column -> most by which its expected total may rise
    subgroups: tuple[str, ...] = ()  # label columns in each of whose groups the candidate must not do harm
    subgroup_margin: float = Field(default=0.0, ge=0)  # loss in a group that its lower bound must exclude; 0: harm only
    canary_loss: float | None = Field(
        default=None, gt=0
    )  # most that trying what is not settled may cost per episode, in units of return

    @field_validator("return_range")
    @classmethod
    def _range_has_room(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError(f"return_range {list(ends)} must be two numbers, the lower one first")
        return ends

    @field_validator("caps")
    @classmethod
    def _caps_climb(cls, caps: tuple[float | None, ...]) -> tuple[float | None, ...]:
        numbers = [math.inf if cap is None else cap for cap in caps]
        if not numbers or min(numbers) <= 1 or any(not low < high for low, high in pairwise(numbers)):
            raise ValueError(f"caps {list(caps)} must be above 1 and rise from rung to rung, null (no cap) only last")
        return caps


@dataclass(frozen=True)
class Finding:
    """One check of the gate: what was measured, what was asked, and what follows when it is not met."""

    name: str
    holds: bool
    otherwise: Status
    value: float
    threshold: float
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of one rung, naming the very policy file it is about."""

    status: Status
    policy: str  # sha256 of the exported graph that was evaluated
    decided_by: str
    reason: str
    measures: Measures
    findings: list[Finding]

    @property
    def certificate(self) -> str:
        """GREEN where the propensities were logged; AMBER where the verdict rests on estimates of them."""
        return "GREEN" if self.measures.propensities == "logged" else "AMBER"

    @property
    def exact(self) -> bool:
        """Whether leg B alone proves the gain: at any time, for any weights, without a Markov state."""
        return self.status is Status.PASS and self.measures.proven

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a bound that is infinite is null."""
        return plain(asdict(self))


def findings(m: Measures, config: GateConfig) -> list[Finding]:
    """Every check of one rung, in the order in which they decide."""
    groups = (_validity, _unmeasured, _harm, _enough, _evidence)
    return [finding for group in groups for finding in group(m, config)]


def _level(alpha: float) -> str:
    return f"{1 - alpha:.1%}".replace(".0%", "%")


def _validity(m: Measures, config: GateConfig) -> list[Finding]:
    """What makes the numbers mean nothing."""
    alpha = config.alpha * m.error_rate_share
    return [
        Finding("error rate", 0 < m.alpha <= alpha, Status.INVALID, m.alpha, alpha,
                f"the bounds were made at an error rate of {m.alpha:g}, not above 0 and at most the {alpha:g} that is asked"),
        Finding("mean ratio", abs(m.mean_ratio_z) < config.mean_ratio_z, Status.INVALID, m.mean_ratio_z,
                config.mean_ratio_z, f"the mean importance ratio has z = {m.mean_ratio_z:.1f} against 1: the "
                f"{m.propensities} propensities are not those of the policy that acted"),
        Finding("mean ratio per action", abs(m.worst_action_z) < config.mean_ratio_z, Status.INVALID, m.worst_action_z,
                config.mean_ratio_z, f"the mean ratio of one action has z = {m.worst_action_z:.1f}: its "
                f"{m.propensities} propensities are wrong"),
        Finding("support", m.unsupported_mass <= config.unsupported_mass, Status.INVALID, m.unsupported_mass,
                config.unsupported_mass, f"{m.unsupported_mass:.1%} of the policy's mass lies where the behavior plays "
                f"with probability under {config.rare_prob:g}; at most {config.unsupported_mass:.1%} may, and {m.rows:,} "
                f"transitions are worth {m.effective_transitions:.0f}"),
        *([] if m.few_visits_mass is None else [
            Finding("visits", m.few_visits_mass <= config.few_visits_mass, Status.INVALID, m.few_visits_mass,
                    config.few_visits_mass, f"{m.few_visits_mass:.1%} of the policy's mass lies where the log has under "
                    f"{config.few_visits} rows; at most {config.few_visits_mass:.1%} may")]),
        Finding("returns", not m.equal_returns, Status.INVALID, float(m.equal_returns), 0.0,
                "all gate episodes have the same return, so that nothing tells policies apart"),
        Finding("drift", not m.drifted, Status.INVALID, float(bool(m.drifted)), 0.0, m.drifted or "nothing has drifted"),
    ]  # fmt: skip


def _unmeasured(m: Measures, config: GateConfig) -> list[Finding]:
    """Costs and groups that the thresholds name and nobody measured."""
    costs, groups = {cost.name for cost in m.costs}, [group.name for group in m.subgroups]
    missing = [name for name in config.constraints if name not in costs]
    missing += [name for name in config.subgroups if not any(group.startswith(f"{name} ") for group in groups)]
    return [Finding(f"measure of {name}", False, Status.INVALID, 0.0, 0.0, f"{name} is to be held and was not measured")
            for name in missing]  # fmt: skip


def _is_markov(m: Measures, config: GateConfig) -> bool:
    """Whether leg A may be believed without leg C."""
    return m.markov_z is None or m.markov_z < config.markov_z


def _harm(m: Measures, config: GateConfig) -> list[Finding]:
    """Evidence that the policy is worse than the champion, for all or for some: where there is enough to say so."""
    level, top = _level(m.alpha), m.upper_bound if _is_markov(m, config) else max(m.upper_bound, m.trajectory_bounds[1])
    found = [
        Finding("harm", top >= 0.0, Status.FAIL, m.upper_bound, 0.0,
                f"the policy is worse than the champion: the difference is at most {m.upper_bound:+.4g} at {level}"),
        *(Finding(f"harm to {group.name}", group.upper_bound >= 0.0, Status.FAIL, group.upper_bound, 0.0,
                  f"the policy is worse for {group.name} ({group.episodes:,} episodes): the difference is at most "
                  f"{group.upper_bound:+.4g} at {level}")
          for group in m.subgroups if group.independent >= SUBGROUP_EPISODES),
        *(Finding(f"cost {cost.name}", cost.lower_bound <= config.constraints[cost.name], Status.FAIL, cost.lower_bound,
                  config.constraints[cost.name], f"{cost.name} rises by at least {cost.lower_bound:+.4g} at {level}, and by "
                  f"{config.constraints[cost.name]:+.4g} it may") for cost in m.costs),
    ]  # fmt: skip
    enough = all(finding.holds for finding in _enough(m, config))
    return [replace(finding, holds=finding.holds or not enough) for finding in found]


def _enough(m: Measures, config: GateConfig) -> list[Finding]:
    """Whether there is enough to judge by, and no single part of it decides."""
    one, several = ("episode", "episodes") if m.entities is None else ("entity", "entities")
    return [
        Finding("episodes", m.independent >= config.first_look, Status.INCONCLUSIVE, m.independent, config.first_look,
                f"{m.independent} gate {several} are fewer than the {config.first_look} of a first look"),
        Finding("trust", not m.doubt, Status.INCONCLUSIVE, float(bool(m.doubt)), 0.0, m.doubt or "nothing is in doubt"),
        Finding("effective transitions", m.effective_transitions >= config.effective_transitions, Status.INCONCLUSIVE,
                m.effective_transitions, config.effective_transitions, f"{m.effective_transitions:.0f} effective "
                f"transitions of {m.rows:,} are fewer than {config.effective_transitions:.0f}"),
        Finding("one episode", m.largest_share <= config.largest_share, Status.INCONCLUSIVE, m.largest_share,
                config.largest_share, f"one {one} carries {m.largest_share:.1%} of the evidence; at most "
                f"{config.largest_share:.1%} may"),
        Finding("influence", m.influence >= 0, Status.INCONCLUSIVE, m.without_top, 0.0,
                f"without its 0.5% most influential {several} the difference is {m.without_top:+.3g}, of another sign"),
    ]  # fmt: skip


def _evidence(m: Measures, config: GateConfig) -> list[Finding]:
    """The vetoes of legs C and D, and the bounds that decide."""
    level, top, smallest = _level(m.alpha), m.trajectory_top, min(m.fqe_differences, default=0.0)
    gone = (1 - KEPT) * config.margin  # what is kept where nothing but the margin is left
    return [
        Finding("trajectory doubly robust", top is None or top >= 0.0, Status.INCONCLUSIVE, 0.0 if top is None else top,
                0.0, f"trajectory-wise doubly robust estimation puts the difference at {m.trajectory_difference or 0:+.4g}, "
                "more than 2 standard errors below 0"),
        Finding("fitted Q evaluation", bool(m.fqe_differences) and all(d > 0.0 for d in m.fqe_differences),
                Status.INCONCLUSIVE, smallest, 0.0, f"a member of the FQE ensemble puts the difference at {smallest:+.4g}"),
        Finding("Markov state", _is_markov(m, config) or m.trajectory_bounds[0] > config.margin, Status.INCONCLUSIVE,
                m.markov_z or 0.0, config.markov_z, "what happens next depends on more than the state (z = "
                f"{m.markov_z or 0:.1f}), and trajectory-wise doubly robust estimation, which needs no such state, does not show "
                f"that the difference is above {config.margin:+.4g}"),
        *(Finding(f"bound on {cost.name}", cost.upper_bound <= config.constraints[cost.name], Status.INCONCLUSIVE,
                  cost.upper_bound, config.constraints[cost.name], f"{cost.name} may rise by {cost.upper_bound:+.4g} at "
                  f"{level}, above the {config.constraints[cost.name]:+.4g} that is allowed") for cost in m.costs),
        *(Finding(f"size of {group.name}", group.independent >= SUBGROUP_EPISODES, Status.INCONCLUSIVE, group.independent,
                  SUBGROUP_EPISODES, f"{group.name} has {group.independent} gate "
                  f"{'episodes' if group.entities is None else 'entities'}, fewer than the {SUBGROUP_EPISODES} that a "
                  "bound for it needs") for group in m.subgroups if config.subgroup_margin > 0),
        *(Finding(f"bound for {group.name}", group.lower_bound >= -config.subgroup_margin, Status.INCONCLUSIVE,
                  group.lower_bound, -config.subgroup_margin, f"for {group.name} ({group.episodes:,} episodes) the "
                  f"difference may be {group.lower_bound:+.4g} at {level}, below {-config.subgroup_margin:+.4g}")
          for group in m.subgroups if config.subgroup_margin > 0),
        Finding("lower bound", m.lower_bound > config.margin, Status.INCONCLUSIVE, m.lower_bound, config.margin,
                f"the lower bound of the difference is {m.lower_bound:+.4g} at {level}, not above {config.margin:+.4g}"),
        Finding("newer half", m.kept_bound > gone, Status.INCONCLUSIVE, m.kept_bound, gone,
                f"the newer half of the log ({m.newer_half.episodes:,} episodes) does not show that the gain is still there: the "
                f"difference was {m.older_half.difference:+.4g} and is {m.newer_half.difference:+.4g} now, which is more than "
                f"{KEPT:g} of what it was by at least {m.kept_bound:+.4g}, not above {gone:+.4g}"),
        Finding("last rewards", m.cut_reward <= max(m.lower_bound - config.margin, 0.0), Status.INCONCLUSIVE, m.cut_reward,
                max(m.lower_bound - config.margin, 0.0), f"last decisions of recordings that stopped, after which nothing was "
                f"observed, are left out and may be worth {m.cut_reward:.4g} per episode; name next_observation in the contract"),
    ]  # fmt: skip


def judge(policy: str, measures: Measures, config: GateConfig) -> Verdict:
    """The verdict on one rung; `policy` is the sha256 of its exported graph. Any number that is NaN fails its check."""
    found = findings(measures, config)
    objections = [finding for finding in found if not finding.holds]
    if not objections:
        reason = (
            f"the difference to the champion is {measures.difference:+.4g}, at least {measures.lower_bound:+.4g} at "
            f"{1 - measures.alpha:.1%} confidence".replace(".0%", "%")
        )
        return Verdict(Status.PASS, policy, "lower bound", reason, measures, found)
    # The gravest objection decides; within a kind, the first.
    order = [Status.INVALID, Status.FAIL, Status.INCONCLUSIVE]
    decisive = min(objections, key=lambda finding: order.index(finding.otherwise))
    return Verdict(decisive.otherwise, policy, decisive.name, decisive.sentence, measures, found)


def verdict_from_json(data: dict[str, Any]) -> Verdict:
    """The inverse of `to_json`. Raises KeyError or TypeError when fields are missing or unknown."""
    measured = data["measures"]
    several, each = ("costs", "subgroups", "course"), Contrast.from_json
    nested: dict[str, Any] = {name: [*map(each, measured[name])] for name in several}
    nested |= {name: each(measured[name]) for name in ("older_half", "newer_half")}
    return Verdict(
        status=Status(data["status"]),
        policy=data["policy"],
        decided_by=data["decided_by"],
        reason=data["reason"],
        measures=Measures(**{**measured, **nested}),
        findings=[Finding(**{**f, "otherwise": Status(f["otherwise"])}) for f in data["findings"]],
    )


def ladder(policies: list[str], measures: list[Measures], config: GateConfig) -> list[Verdict]:
    """Fixed-sequence testing: each rung at full alpha, in order, stopping at the first that does not pass."""
    verdicts: list[Verdict] = []
    for policy, measured in zip(policies, measures, strict=True):
        if verdicts and verdicts[-1].status is not Status.PASS:
            reason = "an earlier rung did not pass"
            verdicts.append(Verdict(Status.NOT_TESTED, policy, "order of the ladder", reason, measured, []))
        else:
            verdicts.append(judge(policy, measured, config))
    return verdicts


def decisive_ladder(ladders: list[list[Verdict]]) -> int:
    """Index of the ladder that decides: of those that passed a rung, the one with the highest lower bound; else the first."""

    def bound(verdicts: list[Verdict]) -> float:
        rung = verdicts[decisive_rung(verdicts)]
        return rung.measures.lower_bound if rung.status is Status.PASS else -math.inf

    return max(range(len(ladders)), key=lambda place: bound(ladders[place]))


def decisive_rung(verdicts: list[Verdict]) -> int:
    """Index of the rung that the ladder comes to: the last that passed, or the first when none did."""
    passed = [i for i, verdict in enumerate(verdicts) if verdict.status is Status.PASS]
    return passed[-1] if passed else 0
