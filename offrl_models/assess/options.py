"""What the options of `offrl evaluate` say, by name: which policy, and what the columns of the log mean."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offrl_models.assess.column import of_column
from offrl_models.assess.log import Assessed, make_contract, read_contract, require_exists
from offrl_models.assess.target import Target, config_of_bundle, contract_of_bundle, of_function, of_graph
from offrl_models.assess.values import QUICK_STEPS, STEPS, Effort
from offrl_models.logs import formats
from offrl_models.logs.contract import Contract
from offrl_models.schema import InputError

COLUMN = re.compile(r"(?P<name>.+?)(?:\[(?P<size>\d+)\]|:(?P<categories>\d+)|:(?P<labels>[^:]*\|[^:]*))?")
WAYS = "give --contract FILE.yaml, or --observation, --action, --actions, --reward and --reward-range"
COLUMNS = (
    "horizon", "episode", "entity", "step", "observation", "next_observation", "action", "actions", "mask", "action_prob", "reward",
    "reward_range", "terminated", "truncated", "gamma",
)  # fmt: skip


def effort_of(options: Mapping[str, Any]) -> Effort:
    """How long networks are trained, and from which seed. Raises InputError for a seed below 0."""
    seed = options.get("seed", 0)
    if seed < 0:
        raise InputError(f"--seed {seed}: a seed is 0 or more.")
    return Effort(QUICK_STEPS if options.get("quick") else STEPS, seed)


def contract_of(options: Mapping[str, Any]) -> Contract:
    """What the columns mean, from the one place that says it: a file, the column options, or the bundle of the policy.

    Raises InputError where none of them says it, or two do.
    """
    spelt_out = [name for name in COLUMNS if options.get(name) is not None]
    if options.get("contract"):
        if spelt_out or options.get("format"):
            name = (spelt_out or ["format"])[0].replace("_", "-")
            raise InputError(f"--contract and --{name} both say what the columns mean; give the contract alone.")
        return read_contract(options["contract"])
    if spelt_out:
        return contract_of_columns(options, options["log"])
    own = contract_of_bundle(options["policy"]) if options.get("policy") else None
    if own is None:
        raise InputError(f"nothing says what the columns mean: {WAYS}.")
    return own.model_copy(update={"format": options["format"]}) if options.get("format") else own


def salt_of(options: Mapping[str, Any]) -> str | None:
    """That of the pipeline that released the policy, unless all entities are asked for; None where there is none."""
    released = options.get("policy") and not options.get("all_entities")
    return config_of_bundle(options["policy"]).get("salt") if released else None


def target_of(options: Mapping[str, Any]) -> Callable[[Assessed], Target]:
    """The way to read the one policy that the options name. Raises InputError unless it is exactly one."""
    ways = {"policy": of_graph, "policy_column": of_column, "policy_callable": of_function}
    given = [name for name in ways if options.get(name) is not None]
    if len(given) != 1:
        raise InputError(
            f"{len(given)} policies were given; give one, by --policy, --policy-column or --policy-callable."
        )
    return lambda assessed: ways[given[0]](options[given[0]], assessed)


def contract_of_columns(options: Mapping[str, Any], paths: Sequence[Path]) -> Contract:
    """The contract that the command's column options spell out. Raises InputError when they do not make one."""
    missing = [name for name in ("observation", "action", "actions", "reward", "reward_range") if not options.get(name)]
    if missing:
        raise InputError(f"--{missing[0].replace('_', '-')} is missing: {WAYS}.")
    actions, gamma = options["actions"], options.get("gamma")
    if gamma is None and options.get("horizon") != 1:
        raise InputError("--gamma is missing: give the discount per step, or --horizon 1 where every row stands alone.")
    plain = ("horizon", "entity", "step", "action_prob", "terminated", "truncated")
    fields = {name: options[name] for name in plain if options.get(name) is not None}
    return make_contract(
        {
            **fields,
            **({"episode_id": options["episode"]} if options.get("episode") else {}),
            "format": options.get("format") or _format_of(paths),
            "observation": [_column(text) for text in options["observation"].split(",")],
            **({"next_observation": options["next_observation"].split(",")} if options.get("next_observation") else {}),
            "action": {
                "column": options["action"],
                "values": int(actions) if actions.isdecimal() else actions.split(","),
                **({"mask": options["mask"]} if options.get("mask") else {}),
            },
            "reward": {"column": options["reward"], "range": options["reward_range"]},
            "gamma": 1.0 if gamma is None else gamma,
        },
        "the column options",
    )


def _column(text: str) -> dict[str, Any]:
    """`age`, `ward:12` (codes 0 to 11), `sex:f|m|x` (labels) or `vitals[17]` (a list of 17 numbers)."""
    found = COLUMN.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--observation {text!r} is no column; write name, name:12, name:a|b|c or name[17].")
    column: dict[str, Any] = {"column": found["name"]}
    if found["size"]:
        column["size"] = int(found["size"])
    elif found["categories"]:
        column["categories"] = int(found["categories"])
    elif found["labels"]:
        column["categories"] = found["labels"].split("|")
    return column


def _format_of(paths: Sequence[Path]) -> str:
    """The format that the names say, where they say one."""
    known = ("parquet", "arrow", "csv", "jsonl")
    for path in paths:
        require_exists(path)
        fitting = [name for name in known if path.is_file() and path.name.endswith(formats.FORMATS[name].suffixes)]
        fitting += [name for name in known if path.is_dir() and formats.batches(path, name)]
        if len(fitting) == 1:
            return fitting[0]
    raise InputError(
        f"{paths[0]} does not say its format by its name; give --format, one of {', '.join(formats.FORMATS)}."
    )
