"""A small sweep is a list in the YAML: every combination of the listed values is a variant of the algorithm.

A field that is itself a list, such as `hidden: [256, 256]`, keeps its meaning; a list of such lists sweeps it.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_origin, get_type_hints

from offrl_models.algorithms import AlgorithmConfig, config_of, make_config, require_keys
from offrl_models.distributions import Space

MOST = 64  # variants of all algorithms together
LONGEST = 120  # characters of a name, which files and folders have too
AFTER = " @"  # between the name of a variant and the gradient steps of an earlier checkpoint


@dataclasses.dataclass(frozen=True)
class Variant:
    """An algorithm with one value for each of its settings."""

    name: str  # cql alpha=4
    algorithm: str
    config: AlgorithmConfig


def expand(algorithms: Mapping[str, Mapping[str, Any]], space: Space) -> dict[str, Variant]:
    """Every variant of some algorithms, by name, in the order of the YAML, the first values of all lists first.

    Raises ValueError naming the algorithm or variant for unknown keys and values, for a list that is empty or names a value
    twice, and for more than MOST variants; InputError for an algorithm that is not for such actions.
    """
    lists: dict[str, dict[str, list[Any]]] = {}
    for name, settings in algorithms.items():
        require_keys(name, settings, space)
        lists[name] = swept(name, settings, space)
    counts = {name: math.prod(map(len, fields.values())) for name, fields in lists.items()}
    if sum(counts.values()) > MOST:
        told = ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count > 1)
        raise ValueError(
            f"the lists make {sum(counts.values()):,} variants ({told}), and at most {MOST} are trained: shorten them"
        )
    found = [
        _variant(name, algorithms[name], dict(zip(lists[name], values, strict=True)), space)
        for name in algorithms
        for values in itertools.product(*lists[name].values())
    ]
    return {variant.name: variant for variant in found}


def swept(name: str, settings: Mapping[str, Any], space: Space) -> dict[str, list[Any]]:
    """The fields of an algorithm that are swept, in the order of its config, with their values.

    Raises ValueError where a list is empty, names a value twice, or mixes values and lists.
    """
    config, found = config_of(name, space), {}
    kinds = get_type_hints(config)
    for field in (each.name for each in dataclasses.fields(config) if each.name in settings):
        value = settings[field]
        if isinstance(value, Sequence) and not isinstance(value, str) and _is_sweep(value, get_origin(kinds[field])):
            if not value:
                raise ValueError(f"{field} of {name} is an empty list; give it a value at least, or leave it out")
            if get_origin(kinds[field]) is tuple and not all(isinstance(each, (list, tuple)) for each in value):
                raise ValueError(f"{field} of {name} is one list, or a list of lists to sweep it, and not a mixture")
            labels = [label(each) for each in value]
            twice = next((each for each, count in Counter(labels).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"{field} of {name} lists {twice} twice; list every value once")
            found[field] = list(value)
    return found


def _is_sweep(value: Sequence[Any], kind: Any) -> bool:
    """A list, or where the field is a list itself, a list with lists in it."""
    return kind is not tuple or any(isinstance(each, (list, tuple)) for each in value)


def label(value: Any) -> str:
    """A value in the name of a variant: 4, 0.0003, 256x256, exp, true."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(label, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return (
        "none"
        if value is None
        else re.sub(r"[^\w.+-]+", "_", str(value).lower() if isinstance(value, bool) else str(value))
    )


def _variant(algorithm: str, settings: Mapping[str, Any], values: Mapping[str, Any], space: Space) -> Variant:
    # A list of one value is that value: it tells no variants apart.
    told = [f"{field}={label(value)}" for field, value in values.items() if len(settings[field]) > 1]
    name = " ".join([algorithm, *told])
    if len(name) > LONGEST:
        raise ValueError(f"the name {name!r} is longer than {LONGEST} characters; sweep fewer settings at once")
    return Variant(name, algorithm, make_config(algorithm, {**settings, **values}, space, name))


def file_name(variant: str) -> str:
    """The name of a variant where spaces are in the way: cql,alpha=4."""
    return variant.replace(" ", ",")


def candidate_name(variant: str, steps: int | None) -> str:
    """What a policy is called everywhere: the variant, and after how many gradient steps where those are not all."""
    return variant if steps is None else f"{variant}{AFTER}{steps}"


def variant_of(candidate: str) -> tuple[str, int | None]:
    """The variant that a candidate is of, and its gradient steps where those are not all."""
    variant, _, steps = candidate.partition(AFTER)
    return variant, int(steps) if steps else None


def checkpoint_folder(steps: int) -> str:
    """Where an earlier checkpoint lies in the folder of its variant."""
    return f"checkpoint-{steps}"
