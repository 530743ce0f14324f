"""Puts checked values, named by dotted fields, into a frozen dataclass and takes them out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Filled = TypeVar("Filled", bound="DataclassInstance")


def fill(config: Filled, fields: Mapping[str, object]) -> Filled:
    """A copy of `config` with the dotted `fields` set. An unknown field is our mistake and raises TypeError."""
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        first, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
        else:
            changes[first] = value
    for first, inner in nested.items():
        changes[first] = fill(getattr(config, first), inner)
    return dataclasses.replace(config, **changes)


def dotted(config: DataclassInstance, *, above: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf field with its dotted name, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from dotted(cast("DataclassInstance", value), above=f"{above}{field.name}.")
        else:
            yield f"{above}{field.name}", value
