"""The log that is assessed: its contract, its rows, checked; its episodes."""

import contextlib
import gzip
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Shaped
from pydantic import ValidationError

from offrl_models import storage
from offrl_models.config import CoverageConfig
from offrl_models.datasets.cut import Cut, read_cut
from offrl_models.datasets.episodes import read_splits, write_splits
from offrl_models.datasets.leakage import SAMPLE_ROWS, sample_of
from offrl_models.datasets.split import SPLITS, buckets
from offrl_models.logs import formats, independence
from offrl_models.logs.contract import Contract, one_sentence
from offrl_models.logs.read import Log
from offrl_models.logs.screen import screen
from offrl_models.progress import Update
from offrl_models.schema import Episodes, InputError
from offrl_models.yaml_file import read_yaml

SALT = "assess"
ROUNDING = 1e-9  # share of a return by which sums of the same rewards may differ
DIFFERENT = 20  # rows at least, all there several times, that cannot be so by chance
FEWEST = 100  # entities; below, two folds and an interval mean nothing


@dataclass(frozen=True)
class Assessed:
    """The rows that hold to the contract, as episodes."""

    log: Log
    contract: Contract
    episodes: Episodes
    cut: Cut
    card: dict[str, Any]  # what was read and what was left out, as plain JSON


def read_contract(path: Path) -> Contract:
    """The contract in a YAML file: by itself, under `logs:`, or in a pipeline's defs.yaml.

    Raises InputError with one sentence naming the file and the key.
    """
    document = read_yaml(path, "the path of a contract")
    for key in ("attributes", "logs"):
        if isinstance(document, dict) and key in document:
            document = document[key]
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no contract; write which column is the observation, the action, the reward.")
    return make_contract(document, str(path))


def make_contract(fields: Mapping[str, Any], where: str) -> Contract:
    """Raises InputError with one sentence naming `where` and the key."""
    try:
        return Contract.model_validate({"source": "log", **fields})
    except ValidationError as error:
        raise one_sentence(error, where) from error


def require_exists(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist; give the files of the log, or their folder.")


def batches_of(paths: Sequence[Path], contract: Contract) -> list[Path]:
    """The files of a log given as files and folders, each once.

    Raises InputError for one that does not exist, a folder without any, and two of one name where names tell rows apart.
    """
    known, found = formats.FORMATS[contract.format], dict[Path, Path]()
    for path in paths:
        require_exists(path)
        is_batch = (path / "data").is_dir() if not known.suffixes else path.is_file()
        inside = [path] if is_batch else formats.batches(path, contract.format) if path.is_dir() else []
        if not inside:
            raise InputError(
                f"{path} holds no {known.title} ({', '.join(known.suffixes) or 'folders'}); give the right folder or --format."
            )
        found |= {batch.resolve(): batch for batch in inside}
    if contract.episode_id is None:
        _refuse_copies(list(found.values()))
    names = [path.name for path in found.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice and contract.episode_id is None:
        raise InputError(
            f"{names.count(twice)} files are called {twice}, and rows without an episode id go by file and place; rename one."
        )
    return list(found.values())


def _refuse_copies(batches: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for path in batches:
        with gzip.open(path) if path.suffix == ".gz" else contextlib.nullcontext() as inside:
            digest = hashlib.file_digest(inside, "sha256").hexdigest() if inside else storage.sha256_tree(path)
        same = first.setdefault(digest, path)
        if same is not path:
            raise InputError(
                f"{path} is a copy of {same}, and without an episode id its rows would count twice; give one of them."
            )


def _entities(episodes: Episodes) -> Shaped[np.ndarray, "episodes"]:
    return episodes.episode_id if episodes.entity is None else episodes.entity


def _require_enough(entities: int, log: Log, which: str) -> None:
    if entities < FEWEST:
        contract = log.contract
        alone = contract.entity is None and contract.episode_id is None
        told = f"column {contract.entity_column!r} tells {entities} entities{which} apart"
        raise InputError(
            f"{log.batches[0].path}: {f'it has {entities} decisions{which}' if alone else told}, and an estimate needs {FEWEST} at "
            "least; collect more."
        )


def _require_no_leak(episodes: Episodes, log: Log) -> None:
    """C09. Raises InputError where an observed column by itself predicts the last reward."""
    found = independence.leakage(sample_of(episodes, SAMPLE_ROWS, 0), seed=0)
    told = found.filter(pl.col("auc") > CoverageConfig().leakage_auc)
    if told.height:
        raise InputError(
            f"{log.batches[0].path}: column {told['column'][0]!r} alone predicts the last reward (AUC {told['auc'][0]:.3f}, C09), "
            "so it is not known at the decision; leave it out of the observation."
        )


def _require_single(episodes: Episodes, log: Log) -> None:
    """Raises InputError where every row without an id is there several times over, as a join on a key of several rows leaves it."""
    told = {"action": episodes.action, "prob": episodes.action_prob, "reward": episodes.reward}
    seen = {f"observed {column}": episodes.observation[:, column] for column in range(episodes.observation.shape[1])}
    alike = pl.DataFrame({**told, **seen}).group_by(pl.all()).len()["len"].to_numpy()
    times = int(np.gcd.reduce(alike))
    if times > 1 and len(alike) >= DIFFERENT:
        raise InputError(
            f"{log.batches[0].path}: every row is there {times} times, or a multiple of that, as after a join on a key that is not "
            "unique; keep one of each, or name an id."
        )


def read(paths: Sequence[Path], contract: Contract, update: Update, salt: str | None = None) -> Assessed:
    """The whole log as episodes, in memory; with `salt`, those of the entities that a pipeline of that salt never trains on.

    Raises InputError with the sentence of the first rule that rows break, for too few entities and where all returns are equal.
    """
    log = Log.open(batches_of(paths, contract), contract)
    update("reading the log", 1, 3, "files hold to the contract")
    found = screen(log, datetime.now(UTC).replace(tzinfo=None))
    if found.violations:
        raise InputError(next(iter(found.reasons().values()))[0])
    _require_enough(found.index.episodes["entity"].n_unique(), log, "")
    update("reading the log", 2, 3, "rows hold to the rules")
    with tempfile.TemporaryDirectory(prefix="offrl-") as folder:
        write_splits(log, SALT, Path(folder))
        episodes = read_splits(Path(folder), *SPLITS, salt=SALT, contract=contract)
        whole = episodes.n_episodes
        if salt is not None:
            episodes = episodes.take(np.isin(buckets(_entities(episodes), salt), SPLITS["gate"]))
        cut = read_cut(Path(folder), episodes.n_episodes, salt)
    entities = len(np.unique(_entities(episodes)))
    _require_enough(entities, log, " that the policy was not trained on")
    worst, best = float(episodes.return_.min()), float(episodes.return_.max())
    if best - worst <= ROUNDING * max(abs(best), abs(worst)):
        raise InputError(
            f"{log.batches[0].path}: column {contract.reward.name!r} gives all {episodes.n_episodes:,} episodes the same return, "
            f"{best:g}, so that no policy can be told from another; give a reward that varies."
        )
    _require_no_leak(episodes, log)
    if contract.episode_id is None and contract.entity is None:
        _require_single(episodes, log)
    update("reading the log", 3, 3, f"{episodes.n_rows:,} decisions in {episodes.n_episodes:,} episodes")
    card = {
        "files": [str(batch.path) for batch in log.batches],
        "format": contract.format,
        "rows_read": sum(found.index.rows.values()),
        "repeated_rows": sum(found.index.duplicates.values()),
        "episodes_with_gaps": found.index.left_out.height,
        "held_out_of": whole if salt is not None else None,
        "rows": episodes.n_rows,
        "episodes": episodes.n_episodes,
        "entities": entities,
        "longest": int(episodes.length.max()),
        "truncated": int(episodes.truncated.sum()),
        "cut_off": asdict(cut),
        "actions": episodes.n_actions,
        "observed": [feature.name for feature in episodes.features],
        "gamma": contract.gamma,
        "reward": {"column": contract.reward.name, "range": list(contract.reward.range)},
    }
    return Assessed(log, contract, episodes, cut, card)
