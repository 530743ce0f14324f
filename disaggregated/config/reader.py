"""Turns a section of a configuration file into checked values, by the key table.

    mapping  ──collect──▶  Found, one a key  ──decide──▶  Decision: fields, notes, and what is not built yet

Both steps are pure, and every error names the key as the operator wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from disaggregated.config.key_table import Key, KeyTable, Outcome
from disaggregated.config.kinds import BadValue, shown
from disaggregated.config.server_keys import FLATTENED
from disaggregated.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where values come from, so that an error can say it: a file, of which some keys the environment overrides."""

    name: str
    overridden: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path of a key -> the environment variable that set it."""

    def error(self, path: str, message: str) -> ConfigError:
        variables = [name for at, name in self.overridden.items() if path == at or path.startswith(f"{at}.")]
        parts = [variables[0] if variables else self.name, path, message]
        return ConfigError(": ".join(part for part in parts if part))


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    path: str
    """The key as the operator wrote it: `generation_servers.tp_size`, or `--tp_size`."""
    name: str
    """The key as the table calls it, which may still be an alias."""
    value: object


@dataclasses.dataclass(slots=True)
class Decision:
    fields: dict[str, object] = dataclasses.field(default_factory=dict)
    """Dotted target -> checked value."""
    notes: list[str] = dataclasses.field(default_factory=list)
    not_built: list[str] = dataclasses.field(default_factory=list)


def collect(
    mapping: Mapping[str, object], keys: KeyTable, source: Source, *, at: str = ""
) -> tuple[list[Found], list[str]]:
    """The known keys below `mapping` (which stands at path `at`) that have a value, checked, and notes on old shapes.

    Raises ConfigError for an unknown key and for a value that its kind refuses.
    """
    found: list[Found] = []
    notes: list[str] = []
    pending = [(at, "", mapping)]
    while pending:
        path_above, name_above, section = pending.pop(0)
        for key, raw in section.items():
            path = f"{path_above}.{key}" if path_above else str(key)
            name = f"{name_above}.{key}" if name_above else str(key)
            if raw is None or raw == "None":  # Python's None, written into YAML, is text there.
                continue
            if name == FLATTENED:
                pending.append((path, "", _section(raw, source, path)))
                notes.append(f"{path}: old shape; its keys are taken as if they stood in the section itself")
            elif keys.is_group(name):
                pending.append((path, name, _section(raw, source, path)))
            elif name in keys:
                found.append(Found(path, name, _checked(keys[name], raw, source, path)))
            else:
                raise source.error(path, f"unknown key{keys.suggestion(name)}")
    return found, notes


def _section(value: object, source: Source, path: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise source.error(path, f"must be a section of keys, is {shown(value)}")
    return value


def _checked(key: Key, value: object, source: Source, path: str) -> object:
    try:
        return key.kind.check(value)
    except BadValue as error:
        raise source.error(path, str(error)) from None


def inherit(general: list[Found], own: list[Found], keys: KeyTable, source: Source) -> list[Found]:
    """A section's own keys and the ones it inherits from the top level.

    Raises ConfigError when both name one key with different values, as TensorRT-LLM does.
    """
    mine = {keys.canonical(item.name): item for item in own}
    merged = list(own)
    for item in general:
        other = mine.get(keys.canonical(item.name))
        if other is None or _yields(item, keys) or _yields(other, keys):
            merged.append(item)
        elif other.value != item.value:
            text = f"is {shown(other.value)}, but {item.path} is {shown(item.value)}; name it in one of the two places"
            raise source.error(other.path, text)
    return merged


def _yields(item: Found, keys: KeyTable) -> bool:
    alias = keys.alias(item.name)
    return alias is not None and alias.yields


def decide(found: list[Found], keys: KeyTable, source: Source) -> Decision:
    """What the keys come to: fields to fill, notes, and what is not built. Raises ConfigError for a refused value."""
    decision = Decision()
    for item in _one_each(found, keys, source, decision.notes):
        _decide_one(item, keys[item.name], source, decision)
    return decision


def _one_each(found: list[Found], keys: KeyTable, source: Source, notes: list[str]) -> list[Found]:
    """Aliases give way to the key itself where both are named; two different values are an error otherwise."""
    chosen: dict[str, Found] = {}
    for item in sorted(found, key=lambda item: _yields(item, keys)):
        alias = keys.alias(item.name)
        if alias is not None and alias.says:
            notes.append(f"{item.path}: {alias.says}")
        first = chosen.setdefault(keys.canonical(item.name), item)
        if first.value == item.value:
            continue
        if not _yields(item, keys):
            raise source.error(item.path, f"is {shown(item.value)}, but {first.path} is {shown(first.value)}")
        notes.append(f"{item.path}: {shown(item.value)} has no effect here: {first.path} is {shown(first.value)}")
    return list(chosen.values())


def _decide_one(item: Found, key: Key, source: Source, decision: Decision) -> None:
    value = item.value
    said = f"{item.path}: {shown(value)}"
    if key.outcome is Outcome.HONOURED:
        choice = value if isinstance(value, str) else ""
        if choice in key.not_built_values:
            decision.not_built.append(f"{said} is not built yet: {key.not_built_values[choice]}")
        elif choice in key.substitutes:
            value, reason = key.substitutes[choice]
            decision.notes.append(f"{said}: {reason}")
            decision.fields[key.target] = value
        else:
            decision.fields[key.target] = value
    elif value in key.harmless:
        return
    elif key.outcome is Outcome.NO_EFFECT:
        decision.notes.append(f"{item.path}: no effect: {key.says}")
    elif key.outcome is Outcome.NOT_BUILT:
        decision.not_built.append(f"{said} is not built yet: {key.says}")
    else:
        raise source.error(item.path, f"{shown(value)} is refused: {key.says}")
