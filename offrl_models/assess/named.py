"""Which number of a policy is which action. In another order they would be another policy, and no log tells the two apart."""

from collections.abc import Iterable, Sequence

from offrl_models.logs.contract import Contract
from offrl_models.schema import InputError

SHOWN = 6  # names in a message


def names_of(contract: Contract) -> tuple[str, ...]:
    """The discrete actions in the order of their codes: by what the contract calls them, or the codes themselves."""
    return contract.action.action_names or tuple(map(str, range(contract.action.n_actions)))


def order_of(given: Iterable[object] | None, contract: Contract, whose: str, remedy: str) -> list[int] | None:
    """Where the numbers of a policy have each action of the log, by the names `given` with them; None: in the order of the log.

    Raises InputError for other names, and for none where actions have names and not just codes.
    """
    names = names_of(contract)
    if given is None:
        if contract.action.action_names is not None:
            raise InputError(f"{whose} does not say which number is which action; {remedy} {_shown(names)}.")
        return None
    found = list(map(str, given))
    if sorted(found) != sorted(names):
        raise InputError(
            f"{whose} names {len(found)} actions, {_shown(found)}, and the log has {len(names)}, {_shown(names)}; name these."
        )
    return [found.index(name) for name in names]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
