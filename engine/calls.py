"""Calls as a user writes them, `NAME[:key=value,...]`, of a table of methods or of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from .. import InputError
from .types import Parameter, Value, nearest


class Named(Protocol):
    """What stands in a table: a name, and options with their defaults."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...


Entry = TypeVar("Entry", bound=Named)


def plain(name: str) -> str:
    """A method name without case, `-` and `_`; `++`, `pp` and `plusplus` are one."""
    return name.casefold().replace("-", "").replace("_", "").replace("plusplus", "pp").replace("++", "pp")


def parse_call(kind: str, table: Mapping[str, Entry], text: str) -> tuple[Entry, dict[str, Value]]:
    """The entry that `NAME[:key=value,...]` names, and every parameter of it.

    Args:
        kind: what the table holds, for the refusals.

    Raises:
        InputError: unknown name or parameter (nearest offered), or a value out of its range.
    """
    name, _, options = text.partition(":")
    by_plain = {plain(known): entry for known, entry in table.items()}
    entry = by_plain.get(plain(name.strip()))
    if entry is None:
        raise InputError(f"no {kind} {name!r}; {nearest(name.casefold(), list(table))}")
    values: dict[str, Value] = {key: parameter.default for key, parameter in entry.parameters.items()}
    given: set[str] = set()
    for option in filter(None, options.split(",")):
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in values:
            raise InputError(f"{kind} {entry.name} has no parameter {key!r}; {nearest(key, list(values) or ['none'])}")
        if not equals or key in given:
            raise InputError(f"{kind} {entry.name}: give {key!r} once, as {key}=VALUE")
        given.add(key)
        values[key] = _value(f"{kind} {entry.name}, parameter {key!r}", entry.parameters[key], value)
    return entry, values


def _value(where: str, parameter: Parameter, text: str) -> Value:
    if parameter.choices:
        by_plain = {plain(choice): choice for choice in parameter.choices}
        if plain(text) not in by_plain:
            raise InputError(f"{where}: no choice {text!r}; {nearest(text, list(parameter.choices))}")
        return by_plain[plain(text)]
    kind = type(parameter.default)
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"{where}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    number = float(value)
    low = float("-inf") if parameter.least is None else parameter.least
    high = float("inf") if parameter.most is None else parameter.most
    if not low <= number <= high:
        raise InputError(f"{where}: {text} lies outside {low:g} .. {high:g}")
    return value
