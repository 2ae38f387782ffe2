"""From what the library returns to what the Dagster UI shows."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from offrl_models.config import Pipeline
from offrl_models.schema import InputError
from offrl_models.storage import Stage

REPORTS_URL = os.environ.get("OFFRL_REPORTS_URL", "/reports")


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """A user's mistake fails the step with its sentence and is not retried."""
    try:
        yield
    except InputError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None


def page(pipeline: Pipeline, file: str) -> dg.MetadataValue:
    """A link that opens in the browser."""
    return dg.MetadataValue.url(f"{REPORTS_URL}/{pipeline.config.dataset}/{file}")


def plot(pipeline: Pipeline, file: str) -> dg.MetadataValue:
    """An image shown in place."""
    return dg.MetadataValue.md(f"![{file}]({REPORTS_URL}/{pipeline.config.dataset}/{file})")


def materialized(
    stage: Stage, *, rows: int, metadata: Mapping[str, Any], key: dg.AssetKey | None = None
) -> dg.MaterializeResult:
    """A finished stage; its content digest is the data version."""
    return dg.MaterializeResult(
        asset_key=key,
        data_version=dg.DataVersion(stage.digest),
        metadata={
            "dagster/row_count": rows,
            "folder": dg.MetadataValue.path(str(stage.folder)),
            "reused": stage.reused,
            **metadata,
        },
    )
