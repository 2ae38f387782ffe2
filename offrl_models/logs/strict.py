"""Configuration that is refused in one sentence where it names something unknown."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from offrl_models.schema import InputError


def nearest_key_hint(key: str, known: list[str]) -> str:
    """'; did you mean ...' for a misspelt key, or the list of known ones."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}."


def _open_schema(schema: dict[str, Any]) -> None:
    """Leave unknown keys to the validator of `Strict`, which says more than that they are not allowed."""
    schema.pop("additionalProperties", None)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_open_schema)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}: {nearest_key_hint(str(key), list(cls.model_fields))}")
        return data


def one_sentence(error: ValidationError, where: str) -> InputError:
    """The first complaint of a pydantic error, as a sentence that says where it is."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{where}: {path + ': ' if path else ''}{message}")
