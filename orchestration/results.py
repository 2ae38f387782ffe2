"""From what the library returns to what the Dagster UI shows."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from offrl_models.config import Pipeline
from offrl_models.schema import InputError
from offrl_models.storage import Stage, digest

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


def plot(pipeline: Pipeline, *files: str) -> dg.MetadataValue:
    """Images shown in place."""
    return dg.MetadataValue.md(
        "\n\n".join(f"![{file}]({REPORTS_URL}/{pipeline.config.dataset}/{file})" for file in files)
    )


def materialized(
    *stages: Stage, rows: int, metadata: Mapping[str, Any], key: dg.AssetKey | None = None
) -> dg.MaterializeResult:
    """Finished stages; the digest of their contents is the data version."""
    first = stages[0]
    return dg.MaterializeResult(
        asset_key=key,
        data_version=dg.DataVersion(first.digest if len(stages) == 1 else digest([stage.digest for stage in stages])),
        metadata={
            "dagster/row_count": rows,
            "folder": dg.MetadataValue.path(str(first.folder if len(stages) == 1 else first.folder.parent)),
            "reused": all(stage.reused for stage in stages),
            **metadata,
        },
    )
