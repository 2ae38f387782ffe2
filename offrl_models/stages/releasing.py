"""The release of what passed."""

from offrl_models import bundle, storage
from offrl_models.config import Pipeline
from offrl_models.exported import interface, open_policy
from offrl_models.gate import Status
from offrl_models.stages.judging import evidence_key


def release(pipeline: Pipeline) -> bundle.Release:
    """Release the rung that the verdict names.

    Raises ReleaseRefusedError unless the verdict is a PASS of that very policy, and InputError when evidence or shift report are
    of other logs or settings than the present ones, so that the configuration in the bundle is the one that was trained and
    judged.
    """
    config = pipeline.config
    judged = storage.load_stage(pipeline.folder / "evidence", evidence_key(pipeline))
    found = storage.read_json(judged.folder / "evidence.json")
    verdict = storage.read_json(judged.folder / "verdict.json")
    if judged.summary["status"] != Status.PASS:
        raise bundle.ReleaseRefusedError(
            f"the verdict on {judged.summary['policy_name']} is {judged.summary['status']}, not PASS: "
            f"{judged.summary['reason']}; the champion stays."
        )
    return bundle.release(
        judged.folder / judged.summary["rung"],
        verdict,
        thresholds=config.gate,
        evidence=found,
        config=config.resolved(),
        lineage={
            "interface": interface(open_policy(judged.folder / judged.summary["rung"] / bundle.POLICY)),
            "dataset": config.dataset,
            "algorithm": judged.summary["algorithm"],
            "candidate_name": judged.summary["candidate_name"],
            "cap": judged.summary["cap"],
            "compared_with": found["champion"]["name"],
            "champion_version": judged.summary["champion_version"],
            "candidate": judged.summary["candidate"],
            "raw_logs": found["raw_logs"],
            "code": judged.key["code"],
        },
        policies=pipeline.folder / "policies",
    )
