"""YAML files in which no key is there twice: readers take the last one without a word, and what was set before is lost."""

from pathlib import Path
from typing import Any

import yaml

from offrl_models.schema import InputError


def read_yaml(path: Path, wanted: str) -> Any:
    """The document in a file. Raises InputError where it cannot be read, `wanted` being what to give, is no YAML, or repeats a
    key."""
    try:
        text = path.read_text()
        for node in yaml.compose_all(text, yaml.SafeLoader):
            _require_single_keys(node, path)
        return next(iter(yaml.safe_load_all(text)), None)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give {wanted}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from error


def _require_single_keys(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _require_single_keys(each, path)
    if isinstance(node, yaml.MappingNode):
        lines = dict[str, int]()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise InputError(
                    f"{path} has the key {name!r} twice, in lines {lines[name]} and {line}; only the last counts, so leave one."
                )
            lines[name] = line
            _require_single_keys(value, path)
