"""Settings that are there twice, and settings that would switch off what they are for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from offrl_models.assess.log import read_contract
from offrl_models.config import parse_pipeline, read_pipeline
from offrl_models.schema import InputError
from orchestration.pipeline import OfflineRLPipeline
from tests.conftest import attributes

TWICE = r"has the key 'gate' twice, in lines \d+ and \d+; only the last counts, so leave one\."


def defs(folder: Path, more: str = "") -> Path:
    path = folder / "defs.yaml"
    document = {"type": "orchestration.pipeline.OfflineRLPipeline", "attributes": attributes(10, 3)}
    path.write_text(yaml.safe_dump(document, sort_keys=False) + more)
    return path


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    context = cast(Any, SimpleNamespace(path=tmp_path, project_root=tmp_path))
    settings = read_pipeline(defs(tmp_path))
    assert OfflineRLPipeline.load(settings, context).pipeline.config == settings
    path = defs(tmp_path, "  gate: {alpha: 0.4}\n")
    with pytest.raises(InputError, match=rf"defs\.yaml {TWICE}"):
        read_pipeline(path)
    with pytest.raises(InputError, match=TWICE):
        OfflineRLPipeline.load(settings, context)  # Dagster read it with the last of them
    path.write_text("reward: {column: r, range: [0, 1], range: [0, 9]}")
    with pytest.raises(InputError, match="has the key 'range' twice, in lines 1 and 1"):
        read_contract(path)
    path.write_text("cells: [{a: 1, b: 2}, {a: 1}]\na: 2")  # of mappings beside each other
    with pytest.raises(InputError, match="declares no pipeline"):
        read_pipeline(path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"gate": {"margin": -0.1}}, "gate.margin"),  # what is worse would pass
        ({"drift": {"amber": 5.0, "red": 0.25}}, "amber is 5 and red is 0.25; red has to be the larger one"),
        ({"drift": {"amber": 0.5}}, "amber is 0.5 and red is 0.25"),
        ({"retrain": {"cron": "every monday"}}, "retrain.cron"),
    ],
)
def test_settings_that_would_switch_off_what_they_are_for_are_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_pipeline(attributes(10, 3, **more), "toy")


@pytest.mark.parametrize("cron", ["0 3 * * 1", "@daily", "*/5 1-4 1,15 * MON", None])
def test_schedules_are_taken(cron: str | None) -> None:
    assert parse_pipeline(attributes(10, 3, retrain={"cron": cron}), "toy").retrain.cron == cron
