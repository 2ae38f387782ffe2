"""The deployable bundle, and the only way to release one: with a PASS verdict that names this very policy."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offrl_models import registry, storage
from offrl_models.gate import GateConfig, Status, Verdict, judge, verdict_from_json
from offrl_models.schema import InputError

POLICY = "policy.onnx"
WEIGHTS = "policy.safetensors"
SCHEMA = 1


class ReleaseRefusedError(InputError):
    """The policy may not be released; the champion stays what it was."""


@dataclass(frozen=True)
class Release:
    version: int
    folder: Path
    manifest_sha256: str
    lower_bound: float
    judged_rows: int  # logged decisions that the verdict rests on


def require_pass(policy: Path, verdict: dict[str, Any], thresholds: GateConfig) -> Verdict:
    """The verdict, when it is a PASS of exactly this policy file and follows from its own measures.

    Raises ReleaseRefusedError otherwise.
    """
    try:
        found = verdict_from_json(verdict)
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseRefusedError(f"the verdict is incomplete ({error}); run the gate again.") from error
    if found.status is not Status.PASS:
        raise ReleaseRefusedError(f"the verdict is {found.status}, not PASS: {found.reason}; the champion stays.")
    digest = storage.sha256_file(policy)
    if found.policy != digest:
        raise ReleaseRefusedError(
            f"the verdict is about policy {found.policy[:12]} and {policy} is {digest[:12]}; run the gate on this policy."
        )
    if judge(digest, found.measures, thresholds) != found:
        raise ReleaseRefusedError(
            "the verdict does not follow from its own measures at the pipeline's thresholds; run the gate again."
        )
    return found


def release(
    rung: Path,
    verdict: dict[str, Any],
    *,
    thresholds: GateConfig,
    evidence: dict[str, Any],
    config: dict[str, Any],
    lineage: dict[str, Any],
    policies: Path,
) -> Release:
    """Write the bundle of a rung that passed and make it the champion.

    `rung` holds `policy.onnx` and `policy.safetensors`. The manifest holds no time and no path, so the same inputs give the
    same digest. Raises ReleaseRefusedError, and changes nothing, unless the verdict is a PASS of this policy; InputError where the
    champion is another than the `champion_version` of the lineage, which it was judged against.
    """
    passed = require_pass(rung / POLICY, verdict, thresholds)
    with storage.exclusive(policies / ".release.lock"):
        return _release(rung, passed, verdict, evidence, config, lineage, policies)


def _release(
    rung: Path,
    passed: Verdict,
    verdict: dict[str, Any],
    evidence: dict[str, Any],
    config: dict[str, Any],
    lineage: dict[str, Any],
    policies: Path,
) -> Release:
    """`release` of a policy that passed, by one process at a time."""
    draft = policies / ".draft"
    if draft.exists():
        shutil.rmtree(draft)  # left by a crash; it was never a version
    storage.write_bytes(draft / POLICY, (rung / POLICY).read_bytes())
    storage.write_bytes(draft / WEIGHTS, (rung / WEIGHTS).read_bytes())
    storage.write_json(draft / "config.json", config)
    storage.write_json(draft / "evidence.json", evidence)
    storage.write_json(draft / "verdict.json", verdict)
    manifest = {
        "schema": SCHEMA,
        "policy": passed.policy,
        "verdict": passed.status,
        "lower_bound": passed.measures.lower_bound,
        **lineage,
        "files": storage.list_files(draft),
    }
    storage.write_json(draft / registry.MANIFEST, manifest)
    # What was judged is what is released, even if the rung changed on disk since the check above.
    if storage.sha256_file(draft / POLICY) != passed.policy:
        shutil.rmtree(draft)
        raise ReleaseRefusedError(f"{rung / POLICY} changed while it was released; run the gate again.")
    facts = {"verdict": passed.status, "lower_bound": passed.measures.lower_bound, "policy": passed.policy}
    try:
        version = registry.publish(draft, policies, facts, lineage["champion_version"])
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    folder = policies / str(version)
    digest = storage.sha256_file(folder / registry.MANIFEST)
    return Release(version, folder, digest, passed.measures.lower_bound, passed.measures.rows)
