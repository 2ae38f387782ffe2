"""DVC, kept at arm's length: it stores the bytes of raw logs, and its lock files say which version they are."""

import os
from typing import Any, cast

from offrl_models.config import Pipeline
from offrl_models.logs.versions import log_version, recorded
from offrl_models.schema import InputError


def record(pipeline: Pipeline) -> str:
    """Make the accepted batches a DVC version when they are not one yet. Returns what holds the digest.

    Raises InputError when DVC ends up with another digest than the library's.
    """
    version = log_version(pipeline.raw)
    digest, holder = recorded(pipeline.root, pipeline.raw)
    if digest == version and holder:
        return holder
    if not (pipeline.root / ".dvc").is_dir():
        return "nothing: this folder is no DVC repository"
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    os.environ.setdefault("DVC_SITE_CACHE_DIR", str(pipeline.root / ".dvc" / "tmp" / "site"))
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(pipeline.root)) as opened:
            repo = cast(Any, opened)
            if holder and not holder.endswith(".dvc"):
                repo.commit(holder, force=True)
            else:
                repo.add(str(pipeline.raw))
    except DvcException as error:
        raise InputError(f"DVC could not record {pipeline.raw}: {error}; run `dvc status` and try again.") from error
    digest, holder = recorded(pipeline.root, pipeline.raw)
    if digest != version or holder is None:
        raise InputError(f"DVC recorded {pipeline.raw} as {digest} where its files are {version}; run `dvc status`.")
    return holder
