"""DVC and the library agree on which version a folder of batches is."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from offrl_models import stages, storage
from offrl_models.config import Pipeline
from offrl_models.logs.versions import log_version, recorded
from orchestration import versioning

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.usefixtures("no_pages"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # of DVC's own dependencies,
]


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(toy: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(toy.root / ".dvc" / "tmp" / "site"))
    dvc(toy.root, "init", "--no-scm", "-q")
    return toy


def dataset(pipeline: Pipeline) -> dict[str, str]:
    """sha256 of every file of the dataset, made anew where the logs are others."""
    stages.ingest(pipeline).require_clean()
    stages.coverage(pipeline)
    return {name: facts["sha256"] for name, facts in stages.episodes(pipeline).files.items()}


def test_accepted_batches_become_a_version_and_older_ones_come_back(repository: Pipeline) -> None:
    """The older version of the logs gives the older dataset, bit for bit."""
    first, older = stages.ingest(repository).version, dataset(repository)
    assert versioning.record(repository) == "data/toy/raw.dvc"
    assert yaml.safe_load((repository.root / "data/toy/raw.dvc").read_text())["outs"][0]["md5"] == first
    old = (repository.root / "data/toy/raw.dvc").read_text()
    batch = pl.read_parquet(repository.raw / "batch-1.parquet").with_columns(pl.col("episode") + 5000)
    storage.write_parquet(repository.folders.landing / "batch-3.parquet", batch.to_arrow())
    second = stages.ingest(repository).version
    versioning.record(repository)
    newer = dataset(repository)
    assert newer["train.arrow"] != older["train.arrow"] and newer["moments.json"] != older["moments.json"]
    assert second != first and recorded(repository.root, repository.raw)[0] == second
    (repository.root / "data/toy/raw.dvc").write_text(old)
    dvc(repository.root, "checkout", "-q", "--force")
    assert log_version(repository.raw) == first
    assert "up to date" in dvc(repository.root, "status")
    assert dataset(repository) == older


def test_a_folder_without_dvc_still_has_a_version(toy: Pipeline) -> None:
    assert versioning.record(toy) == "nothing: this folder is no DVC repository"


def test_the_lock_of_the_example_is_what_its_stage_makes() -> None:
    """The digest in dvc.lock; where the raw logs were made on this machine, they have it."""
    digest, holder = recorded(ROOT, ROOT / "data" / "icu_sepsis" / "raw")
    assert holder == "icu_sepsis" and digest is not None and digest.endswith(".dir")
    if (ROOT / "data" / "icu_sepsis" / "raw").exists():
        assert log_version(ROOT / "data" / "icu_sepsis" / "raw") == digest
