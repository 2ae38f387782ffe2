"""docs/estimators.md names functions that exist, and its example runs."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "estimators.md").read_text()


def test_every_function_on_the_page_exists() -> None:
    named = set(re.findall(r"`(?:offrl_models\.)?((?:ope|training)[\w.]*\.\w+)`", PAGE))
    assert len(named) > 40
    for name in named:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"offrl_models.{module}"), function)), name


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "estimators.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
