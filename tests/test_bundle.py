"""Release: only a PASS that names this very policy, a bundle whose digest is a function of its inputs, one atomic pointer."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from offrl_models import bundle, registry, storage
from offrl_models.gate import GateConfig, Status, judge
from offrl_models.logs.contract import Contract
from offrl_models.schema import InputError
from offrl_models.stages.champion import _require_alike
from tests.hand_made import BAD, GOOD

CONFIG = GateConfig()


@pytest.fixture
def rung(tmp_path: Path) -> Path:
    """The release never opens the graph; any bytes will do."""
    folder = tmp_path / "rung"
    storage.write_bytes(folder / "policy.onnx", b"graph")
    storage.write_bytes(folder / "policy.safetensors", b"weights")
    return folder


def passing(rung: Path) -> dict[str, Any]:
    verdict = judge(storage.sha256_file(rung / "policy.onnx"), GOOD, CONFIG)
    assert verdict.status is Status.PASS
    return json.loads(json.dumps(verdict.to_json()))


def release(rung: Path, verdict: dict[str, Any], policies: Path, **more: Any) -> bundle.Release:
    return bundle.release(
        rung,
        verdict,
        thresholds=more.pop("thresholds", CONFIG),
        evidence={"estimates": 1},
        config=more.pop("config", {"gamma": 1.0}),
        lineage={"dataset": "toy", "raw_logs": "abc.dir", "champion_version": more.pop("beaten", None)},
        policies=policies,
    )


def test_a_pass_is_released_and_the_champion_points_at_it(rung: Path, tmp_path: Path) -> None:
    released = release(rung, passing(rung), tmp_path / "policies")
    pointer = registry.champion(tmp_path / "policies")
    assert pointer is not None
    assert (pointer["version"], pointer["verdict"], pointer["lower_bound"]) == (1, "PASS", GOOD.lower_bound)
    assert pointer["manifest_sha256"] == released.manifest_sha256
    manifest = registry.verify(released.folder)
    assert manifest["raw_logs"] == "abc.dir"
    assert set(manifest["files"]) == {
        "policy.onnx",
        "policy.safetensors",
        "config.json",
        "evidence.json",
        "verdict.json",
    }


def test_the_same_inputs_give_the_same_digest_and_no_second_version(rung: Path, tmp_path: Path) -> None:
    first = release(rung, passing(rung), tmp_path / "a")
    second = release(rung, passing(rung), tmp_path / "b")
    again = release(rung, passing(rung), tmp_path / "a")
    assert first.manifest_sha256 == second.manifest_sha256 == again.manifest_sha256
    assert again.version == 1 and registry.versions(tmp_path / "a") == [1]
    other = release(rung, passing(rung), tmp_path / "a", config={"gamma": 0.9}, beaten=1)
    assert other.version == 2 and other.manifest_sha256 != first.manifest_sha256
    assert not list((tmp_path / "a").glob(".draft*"))


def test_only_what_beat_the_champion_takes_its_place(rung: Path, tmp_path: Path) -> None:
    """Another rung of a candidate that was released is judged against what that one replaced: it may be worse than it."""
    policies = tmp_path / "policies"
    first = release(rung, passing(rung), policies)
    before = registry.champion(policies)
    again = release(
        rung, passing(rung), policies, config={"description": "another"}
    )  # the very policy that is the champion
    assert again == first
    storage.write_bytes(rung / "policy.onnx", b"another rung")
    with pytest.raises(
        InputError, match="judged against the behavior policy, and the champion is version 1, which it never had"
    ):
        release(rung, passing(rung), policies)
    assert registry.champion(policies) == before and registry.versions(policies) == [1]
    assert not list(policies.glob(".draft*"))
    assert release(rung, passing(rung), policies, beaten=1).version == 2
    storage.write_bytes(rung / "policy.onnx", b"graph")
    with pytest.raises(InputError, match="the champion is version 2"):
        release(rung, passing(rung), policies)
    (policies / "champion.json").unlink()
    with pytest.raises(InputError, match=r"champion.json is gone, and there are released versions"):
        registry.champion(policies)


def test_without_its_pointer_a_single_version_is_no_champion_either(rung: Path, tmp_path: Path) -> None:
    release(rung, passing(rung), tmp_path / "policies")
    (tmp_path / "policies" / "champion.json").unlink()
    with pytest.raises(InputError, match=r"champion.json is gone, and there are released versions"):
        registry.champion(tmp_path / "policies")


def released_elsewhere(rung: Path, policies: Path) -> None:
    release(rung, passing(rung), policies)


def test_releases_at_once_leave_one_whole_champion(rung: Path, tmp_path: Path) -> None:
    """One after the other, whatever each of them wrote."""
    processes = [
        multiprocessing.get_context("fork").Process(target=released_elsewhere, args=(rung, tmp_path / str(pair)))
        for pair in range(8)
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    for pair in range(8):
        pointer = registry.champion(tmp_path / str(pair))
        assert pointer is not None and registry.versions(tmp_path / str(pair)) == [1]


@pytest.mark.parametrize(
    ("part", "logs"),
    [
        ("observations", {"observation": ["y", "x"]}),
        ("observations", {"observation": ["x", {"column": "y", "categories": ["a", "b"]}]}),
        ("actions", {"action": {"column": "a", "values": ["treat", "wait"]}}),
    ],
)
def test_a_champion_is_asked_under_the_contract_it_was_made_for(
    tmp_path: Path, part: str, logs: dict[str, Any]
) -> None:
    """Else it would read one column as another, or do one thing for another."""
    made = {
        "source": "log", "horizon": 1, "observation": ["x", "y"], "action": {"column": "a", "values": ["wait", "treat"]},
        "reward": {"column": "r", "range": [0, 1]}, "gamma": 1.0,
    }  # fmt: skip
    storage.write_json(tmp_path / "config.json", {"logs": made})
    _require_alike(tmp_path, Contract.model_validate(made))
    with pytest.raises(InputError, match=f"was made for other {part} than the contract has now, or in another order"):
        _require_alike(tmp_path, Contract.model_validate(made | logs))


def unchanged(policies: Path) -> bool:
    return not policies.exists() or not [p for p in policies.iterdir() if not p.name.startswith(".")]


@pytest.mark.parametrize("name", BAD)
def test_no_other_verdict_is_released(rung: Path, tmp_path: Path, name: str) -> None:
    import dataclasses

    field, value, status = BAD[name]
    digest = storage.sha256_file(rung / "policy.onnx")
    verdict = judge(digest, dataclasses.replace(GOOD, **{field: value}), CONFIG).to_json()
    with pytest.raises(bundle.ReleaseRefusedError, match=f"the verdict is {status}, not PASS"):
        release(rung, verdict, tmp_path / "policies")
    forged = {**verdict, "status": "PASS"}
    with pytest.raises(bundle.ReleaseRefusedError, match="does not follow from its own measures"):
        release(rung, forged, tmp_path / "policies")
    assert unchanged(tmp_path / "policies")


def test_a_verdict_about_another_policy_is_refused(rung: Path, tmp_path: Path) -> None:
    verdict = passing(rung)
    storage.write_bytes(rung / "policy.onnx", b"another graph")
    with pytest.raises(bundle.ReleaseRefusedError, match="the verdict is about policy"):
        release(rung, verdict, tmp_path / "policies")
    assert unchanged(tmp_path / "policies")


def test_a_pass_without_findings_or_with_other_thresholds_is_refused(rung: Path, tmp_path: Path) -> None:
    with pytest.raises(bundle.ReleaseRefusedError, match="does not follow"):
        release(rung, {**passing(rung), "findings": []}, tmp_path / "policies")
    with pytest.raises(bundle.ReleaseRefusedError, match="does not follow"):
        release(rung, passing(rung), tmp_path / "policies", thresholds=GateConfig(margin=0.5))
    with pytest.raises(bundle.ReleaseRefusedError, match="incomplete"):
        release(rung, {"status": "PASS"}, tmp_path / "policies")
    assert unchanged(tmp_path / "policies")


def test_a_crash_before_the_pointer_leaves_the_old_champion(
    rung: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = tmp_path / "policies"
    release(rung, passing(rung), policies)
    before = registry.champion(policies)
    write = storage.write_json

    def crash(path: Path, value: Any) -> None:
        if path.name == registry.CHAMPION:
            raise OSError("power cut")
        write(path, value)

    monkeypatch.setattr(storage, "write_json", crash)
    with pytest.raises(OSError, match="power cut"):
        release(rung, passing(rung), policies, config={"gamma": 0.5}, beaten=1)
    first = tmp_path / "first"  # where none was released before, not even twice
    for gamma in (0.5, 0.6):
        with pytest.raises(OSError, match="power cut"):
            release(rung, passing(rung), first, config={"gamma": gamma})
        assert registry.champion(first) is None
    monkeypatch.undo()
    assert release(rung, passing(rung), first, config={"gamma": 0.7}).version == 3
    (first / "champion.json").unlink()
    with pytest.raises(InputError, match=r"champion.json is gone"):
        registry.champion(first)
    assert registry.champion(policies) == before
    assert release(rung, passing(rung), policies, config={"gamma": 0.5}, beaten=1).version == 2
    pointer = registry.champion(policies)
    assert pointer is not None and pointer["version"] == 2


def test_an_altered_bundle_is_not_a_champion(rung: Path, tmp_path: Path) -> None:
    released = release(rung, passing(rung), tmp_path / "policies")
    (released.folder / "policy.onnx").write_bytes(b"graph!")
    with pytest.raises(InputError, match=r"policy\.onnx is not what .*manifest\.json says"):
        registry.champion(tmp_path / "policies")
    storage.write_json(released.folder / "manifest.json", {"files": {}})
    with pytest.raises(InputError, match=r"manifest\.json is not the one that"):
        registry.champion(tmp_path / "policies")


def test_before_the_first_release_there_is_no_champion(tmp_path: Path) -> None:
    assert registry.champion(tmp_path) is None
