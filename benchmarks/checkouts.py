"""Repositories that are no packages, as contenders of `benchmarks.training`: which rows they have, and how they are run.

    python -m benchmarks.training --row td3_bc/c --corl ../CORL --offlinerl-kit ../OfflineRL-Kit --unifloral ../unifloral

Over continuous actions alone, each run in a process of its own. Without a path a repository is left out; what each one does is
in `benchmarks.training_checkouts`. Unifloral needs an environment with jax, which `--make-peers` makes where it is missing.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figure

JAX = ("jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "distrax==0.1.9")


@dataclass(frozen=True)
class Checkout:
    """A repository that trains some of our rows."""

    title: str
    folder: str
    files: Mapping[str, str]  # row -> the file in the folder that trains it
    target: float | None  # times as fast

    def file(self, path: Path, row: str) -> Path:
        return path / self.folder / f"{self.files[row]}.py"

    def require(self, path: Path) -> None:
        """Raises ValueError where the path is no checkout of this repository."""
        for row in self.files:
            if not self.file(path, row).is_file():
                missing = self.file(path, row).relative_to(path)
                raise ValueError(f"{path} is no checkout of {self.title}: it has no {missing}")


CHECKOUTS = {
    "corl": Checkout(
        "CORL",
        "algorithms/offline",
        {
            "bc/c": "any_percent_bc",
            "td3_bc/c": "td3_bc",
            "iql/c": "iql",
            "awac/c": "awac",
            "cql/c": "cql",
            "sac_n/c": "sac_n",
        },
        target=1.2,
    ),
    "offlinerl-kit": Checkout(
        "OfflineRL-Kit",
        "offlinerlkit/policy/model_free",
        {"bc/c": "bc", "td3_bc/c": "td3bc", "iql/c": "iql", "cql/c": "cql", "sac_n/c": "edac"},
        target=None,
    ),
    # Its CQL draws one action of each kind per row where the others draw ten: another amount of work.
    "unifloral": Checkout(
        "Unifloral",
        "algorithms",
        {"bc/c": "bc", "td3_bc/c": "td3_bc", "iql/c": "iql", "sac_n/c": "sac_n"},
        target=0.9,
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, checkout in CHECKOUTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=f"a checkout of {checkout.title}, to run, too")
    parser.add_argument("--jax", type=Path, default=Path(".peers-jax"), help="the environment with jax, for Unifloral")


def given_paths(options: argparse.Namespace) -> dict[str, Path]:
    """The checkouts that were given. Raises ValueError where one is none."""
    paths = {name: getattr(options, name.replace("-", "_")) for name in CHECKOUTS}
    found = {name: path.absolute() for name, path in paths.items() if path}
    for name, path in found.items():
        CHECKOUTS[name].require(path)
    return found


def with_jax(folder: Path, make: bool) -> bool:
    """Whether an environment has jax and what Unifloral needs besides; says so where it has not."""
    python = folder / "bin" / "python"
    try:
        if make and not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *JAX], check=True, stdout=sys.stderr)
        subprocess.run([str(python), "-c", "import jax, flax, optax, distrax"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"Unifloral is left out, for {folder} has no jax ({error}); --make-peers makes it", file=sys.stderr)
        return False
    return True


def commands(paths: Mapping[str, Path], peers: Path | None, jax: Path, make: bool) -> dict[str, list[str]]:
    """How each checkout is run; row, gradient steps and log follow."""
    found = {}
    for name, path in paths.items():
        home = peers
        if name == "unifloral":
            home = jax.absolute() if with_jax(jax.absolute(), make) else None
        if home:
            found[name] = [str(home / "bin" / "python"), "-m", "benchmarks.training_checkouts", name, str(path)]
    return found


def ahead(figures: Sequence[Figure]) -> str:
    """Where one of these repositories is faster than we are, in a sentence."""
    end = "/ratio"
    found = [
        f"{CHECKOUTS[each.peer].title} in {each.name.removesuffix(end).removesuffix('/offrl')} (ratio {each.ratio:.2f})"
        for each in figures
        if each.peer in CHECKOUTS and each.name.endswith(end) and each.ratio is not None and each.ratio < 1
    ]
    return f"ahead of us: {', '.join(found)}" if found else "none of the checkouts is ahead of us"
