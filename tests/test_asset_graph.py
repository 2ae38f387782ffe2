"""The shape of the asset graph, against the one on record."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

SNAPSHOT = Path(__file__).parent / "graph.json"

pytestmark = pytest.mark.filterwarnings("ignore:Parameter `execution_type`")  # Dagster warns of its own beta code


def graph(definitions: dg.Definitions) -> dict[str, Any]:
    repository = definitions.get_repository_def()
    nodes = repository.asset_graph
    return {
        "assets": {
            key.to_user_string(): {
                "deps": sorted(parent.to_user_string() for parent in nodes.get(key).parent_keys),
                "kinds": sorted(nodes.get(key).kinds),
            }
            for key in sorted(nodes.get_all_asset_keys())
        },
        "checks": {
            f"{key.asset_key.to_user_string()}:{key.name}": nodes.get(key).blocking
            for key in sorted(nodes.asset_check_keys, key=str)
        },
        "jobs": sorted(name for name in repository.job_names if not name.startswith("__")),
        "schedules": {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs},
        "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
    }


def test_the_graph_is_the_one_on_record() -> None:
    """After a change that is meant, run `python -m tests.test_asset_graph` and commit the new record."""
    from orchestration.definitions import defs

    assert graph(defs()) == json.loads(SNAPSHOT.read_text())


if __name__ == "__main__":
    from orchestration.definitions import defs

    SNAPSHOT.write_text(json.dumps(graph(defs()), indent=1, sort_keys=True) + "\n")
