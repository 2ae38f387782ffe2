"""The walk from raw logs to a released policy: one function per step, called alike by the orchestrator and the command line.

Every step owns a folder, re-uses it when nothing that it depends on has changed, and refuses inputs that an earlier step did
not finish or did not let through.
"""

from offrl_models import bundle
from offrl_models.config import Pipeline
from offrl_models.gate import Status
from offrl_models.stages.behavior import behavior_policy
from offrl_models.stages.data import check_results, coverage, episodes, ingest
from offrl_models.stages.drifting import shift_report
from offrl_models.stages.judging import evidence
from offrl_models.stages.learning import candidates
from offrl_models.stages.ranking import leaderboard
from offrl_models.stages.releasing import release
from offrl_models.storage import Stage

__all__ = [
    "behavior_policy",
    "candidates",
    "check_results",
    "coverage",
    "episodes",
    "evidence",
    "ingest",
    "leaderboard",
    "release",
    "run",
    "shift_report",
]


def run(pipeline: Pipeline) -> tuple[Stage, bundle.Release | None]:
    """The whole walk without an orchestrator. Returns the evidence, and the release when the gate let it through."""
    ingest(pipeline).require_clean()
    coverage(pipeline)
    episodes(pipeline)
    behavior_policy(pipeline)
    candidates(pipeline)
    leaderboard(pipeline)
    shift_report(pipeline)
    judged = evidence(pipeline)
    return judged, release(pipeline) if judged.summary["status"] == Status.PASS else None
