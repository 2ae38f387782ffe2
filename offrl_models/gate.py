"""The gate: plain numbers in, findings and a verdict out. It fails closed, and only PASS can release.

A rung of the ladder passes when no finding objects. Thresholds live in the pipeline's YAML and change by commit; there is no
way around them.
"""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator

from offrl_models.logs.contract import Strict


class Status(StrEnum):
    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"  # keep the champion
    FAIL = "FAIL"  # evidence of harm
    INVALID = "INVALID"  # an assumption check failed
    NOT_TESTED = "NOT TESTED"  # an earlier rung did not pass


class GateConfig(Strict):
    """Thresholds of the gate."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)  # one-sided error rate of each rung
    margin: float = 0.0  # by which the candidate must beat the champion, in units of return
    caps: tuple[float | None, ...] = (
        1.2,
        1.5,
        2.0,
        None,
    )  # ratio caps of the ladder, in the order tested; None is uncapped

    @field_validator("caps")
    @classmethod
    def _caps_climb(cls, caps: tuple[float | None, ...]) -> tuple[float | None, ...]:
        numbers = [math.inf if cap is None else cap for cap in caps]
        if not numbers or min(numbers) <= 1 or any(not low < high for low, high in pairwise(numbers)):
            raise ValueError(f"caps {list(caps)} must be above 1 and rise from rung to rung, null (no cap) only last")
        return caps

    planned_episodes: int = Field(default=5000, ge=500)  # gate episodes at which the bound is to be tightest
    first_look: int = Field(default=500, ge=2)  # fewest gate episodes for a verdict
    effective_transitions: float = Field(default=500, ge=0)  # floor, marginal weights
    effective_episodes: float = Field(default=100, ge=0)  # floor, trajectory weights
    mean_ratio_z: float = Field(default=4.0, gt=0)  # largest |z| of the mean-ratio tests
    rare_prob: float = Field(default=0.01, ge=0, lt=1)  # a behavior probability below it counts as unsupported
    unsupported_mass: float = Field(default=0.05, ge=0, le=1)  # most of the candidate's mass where it is


@dataclass(frozen=True)
class Measures:
    """What the gate knows of one rung. Differences are against the champion, in units of return."""

    episodes: int
    rows: int
    alpha: float  # error rate of each of the two bounds
    difference: float
    lower_bound: float  # one-sided, at 1 - alpha
    upper_bound: float  # one-sided, at 1 - alpha
    bound: str  # how the bounds were made
    fqe_differences: list[float]  # each member's value of the rung minus its value of the champion
    effective_transitions: float
    effective_episodes: float
    mean_ratio_z: float
    worst_action_z: float
    unsupported_mass: float
    ratio_q99: float  # 99% quantile, largest value and chi-squared of the state-action ratios
    ratio_max: float
    chi_squared: float
    without_top: float  # the difference without its 0.5% most influential episodes
    propensities: str  # "logged" or "estimated"

    @property
    def influence(self) -> float:
        """Below 0 where the sign of the difference hangs on a few episodes."""
        return self.without_top * (1.0 if self.difference >= 0 else -1.0)

    @property
    def error_rate_share(self) -> float:
        """What is left of the error rate: estimating the propensities costs half of it."""
        return 1.0 if self.propensities == "logged" else 0.5


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def findings(m: Measures, config: GateConfig) -> list[Finding]:
    """Every check of one rung, in the order in which they decide."""
    alpha = config.alpha * m.error_rate_share
    level = f"{1 - alpha:.1%}".replace(".0%", "%")
    smallest = min(m.fqe_differences)
    return [
        Finding("error rate", m.alpha <= alpha, Status.INVALID, m.alpha, alpha,
                f"the bounds were made at an error rate of {m.alpha:g}, above the {alpha:g} that is asked"),
        Finding("mean ratio", abs(m.mean_ratio_z) < config.mean_ratio_z, Status.INVALID, m.mean_ratio_z,
                config.mean_ratio_z, f"the mean importance ratio has z = {m.mean_ratio_z:.1f} against 1: the logged "
                "propensities are not those of the policy that acted"),
        Finding("mean ratio per action", abs(m.worst_action_z) < config.mean_ratio_z, Status.INVALID, m.worst_action_z,
                config.mean_ratio_z, f"the mean ratio of one action has z = {m.worst_action_z:.1f}: its logged "
                "propensities are wrong"),
        Finding("support", m.unsupported_mass <= config.unsupported_mass, Status.INVALID, m.unsupported_mass,
                config.unsupported_mass, f"{m.unsupported_mass:.1%} of the policy's mass lies where the behavior plays "
                f"with probability under {config.rare_prob:g}; at most {config.unsupported_mass:.1%} may"),
        Finding("harm", m.upper_bound >= 0.0, Status.FAIL, m.upper_bound, 0.0,
                f"the policy is worse than the champion: the difference is at most {m.upper_bound:+.4f} at {level}"),
        Finding("episodes", m.episodes >= config.first_look, Status.INCONCLUSIVE, m.episodes, config.first_look,
                f"{m.episodes} gate episodes are fewer than the {config.first_look} of a first look"),
        Finding("effective transitions", m.effective_transitions >= config.effective_transitions, Status.INCONCLUSIVE,
                m.effective_transitions, config.effective_transitions, f"{m.effective_transitions:.0f} effective "
                f"transitions of {m.rows:,} are fewer than {config.effective_transitions:.0f}"),
        Finding("effective episodes", m.effective_episodes >= config.effective_episodes, Status.INCONCLUSIVE,
                m.effective_episodes, config.effective_episodes, f"{m.effective_episodes:.0f} effective episodes of "
                f"{m.episodes:,} are fewer than {config.effective_episodes:.0f}"),
        Finding("influence", m.influence >= 0, Status.INCONCLUSIVE, m.without_top, 0.0,
                f"without its 0.5% most influential episodes the difference is {m.without_top:+.3g}, of another sign"),
        Finding("fitted Q evaluation", all(d > 0.0 for d in m.fqe_differences), Status.INCONCLUSIVE, smallest, 0.0,
                f"a member of the FQE ensemble puts the difference at {smallest:+.4f}"),
        Finding("lower bound", m.lower_bound > config.margin, Status.INCONCLUSIVE, m.lower_bound, config.margin,
                f"the lower bound of the difference is {m.lower_bound:+.4f} at {level}, not above {config.margin:+.4f}"),
    ]  # fmt: skip


def judge(policy: str, measures: Measures, config: GateConfig) -> Verdict:
    """The verdict on one rung; `policy` is the sha256 of its exported graph. Any number that is NaN fails its check."""
    found = findings(measures, config)
    objections = [finding for finding in found if not finding.holds]
    if not objections:
        reason = (
            f"the difference to the champion is {measures.difference:+.4f}, at least {measures.lower_bound:+.4f} at "
            f"{1 - measures.alpha:.1%} confidence".replace(".0%", "%")
        )
        return Verdict(Status.PASS, policy, "lower bound", reason, measures, found)
    # The gravest objection decides; within a kind, the first.
    order = [Status.INVALID, Status.FAIL, Status.INCONCLUSIVE]
    decisive = min(objections, key=lambda finding: order.index(finding.otherwise))
    return Verdict(decisive.otherwise, policy, decisive.name, decisive.sentence, measures, found)


def verdict_from_json(data: dict[str, Any]) -> Verdict:
    """The inverse of `to_json`. Raises KeyError or TypeError when fields are missing or unknown."""
    return Verdict(
        status=Status(data["status"]),
        policy=data["policy"],
        decided_by=data["decided_by"],
        reason=data["reason"],
        measures=Measures(**data["measures"]),
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


def decisive_rung(verdicts: list[Verdict]) -> int:
    """Index of the rung that the ladder comes to: the last that passed, or the first when none did."""
    passed = [i for i, verdict in enumerate(verdicts) if verdict.status is Status.PASS]
    return passed[-1] if passed else 0
