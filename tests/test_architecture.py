"""The rules that keep the shape: arrows between modules, no orchestrator in the library, no arithmetic in orchestration."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "offrl_models"

ROWS = [
    {"schema", "storage", "mapped", "tensors", "progress", "curves", "parallel", "products", "processor"}
    | {"yaml_file"},
    {"logs", "datasets", "nets", "losses", "distributions", "actors", "vae", "transformer"}
    | {"model_losses", "dynamics", "early_stopping", "rollouts"},
    {"policies", "measures"},
    {"densities"},
    {"exported"},
    {"exporting"},
    {"history"},
    {"algorithms", "ope", "optimizer", "checkpoint", "gradients"},
    {"training_config", "course"},
    {"learner", "gate", "registry", "variants", "choices"},
    {"config", "ledger", "legs"},
    {"training", "bundle"},
    {"cloning"},
    {"constraints"},
    {"evaluation", "comparison"},
    {"selection"},
    {"reports"},
    {"stages", "assess"},
    {"cli"},
]


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """The top-level module of the library that a dotted name belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "offrl_models" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules(LIBRARY), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_arrows_point_down(path: Path) -> None:
    mine = path.relative_to(LIBRARY).with_suffix("").parts[0]
    if mine == "__init__":
        return
    height = {name: row for row, names in enumerate(ROWS) for name in names}
    for name in imports(path):
        other = room(name)
        if other in height and other != mine:
            same_row_below = height[other] == height[mine] == 1  # networks, losses, datasets and logs know each other
            assert height[other] < height[mine] or same_row_below or {mine, other} <= ROWS[0], (
                f"{path.name} imports {name}"
            )


def test_every_module_has_its_row() -> None:
    found = {p.relative_to(LIBRARY).with_suffix("").parts[0] for p in modules(LIBRARY)} - {"__init__"}
    assert found == set().union(*ROWS)


def test_the_library_imports_without_dagster() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in modules(LIBRARY)]
    code = "import sys; sys.modules['dagster'] = None\nimport " + ", ".join(names)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_orchestration_does_no_arithmetic() -> None:
    banned = {"torch", "numpy", "polars", "pandas", "scipy", "pyarrow"}
    for path in modules(ROOT / "orchestration"):
        assert not {name.split(".")[0] for name in imports(path)} & banned, path


def test_nothing_pickles_or_evaluates() -> None:
    banned = {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
    for package in (LIBRARY, ROOT / "orchestration"):
        for path in modules(package):
            assert not {name.split(".")[0] for name in imports(path)} & banned, path
            source = (
                path.read_text()
                .replace(".eval()", "")
                .replace(".list.eval(", "(")
                .replace("safetensors.torch.load", "")
            )
            assert not re.search(r"\b(eval|exec|torch\.load|yaml\.load)\(", source), path


def test_only_reports_read_the_truth() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in (LIBRARY, ROOT / "orchestration")
        for path in modules(package)
        if any(name.startswith("offrl_models.ope.worlds") for name in imports(path))
    }
    assert readers == {"offrl_models/reports/evidence.py"}


def test_no_postponed_annotations() -> None:
    for package in (LIBRARY, ROOT / "orchestration"):
        for path in modules(package):
            assert "__future__" not in imports(path), path


def test_all_file_output_goes_through_storage() -> None:
    writers = re.compile(
        r"\.write_(text|bytes)\(|open\([^)]*['\"][wax]|\.savefig\((?!buffer)|np\.save|to_parquet|\.sink_"
    )
    for path in modules(LIBRARY):
        if path.name not in ("storage.py", "mapped.py"):
            found = [line for line in path.read_text().splitlines() if writers.search(line) and "storage." not in line]
            assert not found, (path, found)


def test_files_stay_small() -> None:
    for package, limit in ((LIBRARY, 300), (LIBRARY / "algorithms", 120), (ROOT / "orchestration", 300)):
        for path in modules(package):
            assert len(path.read_text().splitlines()) <= limit, path


@pytest.mark.parametrize("name", ["offrl_models.losses", "offrl_models.model_losses"])
def test_examples_in_docstrings_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 10 and found.failed == 0


def test_the_readme_names_targets_and_files_that_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)\b", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
